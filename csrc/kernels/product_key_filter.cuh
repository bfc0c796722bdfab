// The search of many float tokens: what product_key_approximation.cuh lets through, with the similarities that `search`
// has. The lists are those of product_key_search.cuh, but for tokens that are left to `search`.
#pragma once
#include <type_traits>

#include "kernels/product_key_approximation.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------- parts of the kernel
// Numbers what is kept through all tokens. One warp.
template <typename Tile>
__device__ __forceinline__ void number_kept(int32_t tokens, int topk, FilterStage<Tile>& stage) {
  const int lane = threadIdx.x % 32;
  int32_t all = 0;
  for (int first = 0; first < Tile::kTokens; first += 32) {
    const int token = first + lane;
    int32_t count = token < Tile::kTokens ? stage.count[token] : 0;
    if (token < tokens && (count < topk || count > Tile::kMostKept || !isfinite(stage.bound[token]))) {
      atomicOr(&stage.redo[token / kRedoTokens], 1u);
      count = 0;
    }
    const int32_t up_to = inclusive_sum(count, lane);
    if (token < Tile::kTokens) stage.before[token] = all + up_to - count;
    if (token < Tile::kTokens) stage.count[token] = count;
    all += __shfl_sync(kFullWarp, up_to, 31);
  }
  if (lane == 0) stage.all_kept = all;
}

// Whose kept sub-key the number i is: the last token with no more than i before it.
template <typename Tile>
__device__ __forceinline__ int token_of(int32_t i, const FilterStage<Tile>& stage) {
  int token = 0;
#pragma unroll
  for (int step = Tile::kTokens / 2; step; step /= 2)
    if (stage.before[token + step] <= i) token += step;
  return token;
}

// Similarities of what is kept, a thread for each, in the order of summation of `search`.
template <bool kIdw, typename Tile>
__device__ __forceinline__ void find_similarities(const FilterTask& task, FilterStage<Tile>& stage) {
  constexpr int kPacks = Tile::kRowColumns / 4;
  const int thread = threadIdx.x;
  for (int32_t first = 0; first < stage.all_kept; first += Tile::kThreads) {
    const int32_t i = first + thread;
    const bool mine = i < stage.all_kept;
    const int token = mine ? token_of(i, stage) : 0, place = mine ? i - stage.before[token] : 0;
    stage.pair[thread] = mine ? stage.kept[token][place] : -1;
    __syncthreads();  // pair; and all rows of the round before have been read
    const int my_column = thread % kPacks * 4;
    const float* from[kPacks];  // rows of which this thread brings 16 bytes of each slice; null: there is none
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      const int32_t key = stage.pair[thread / kPacks + j * (Tile::kThreads / kPacks)];
      from[j] = key >= 0 ? task.keys + key * task.width + my_column : nullptr;
    }
    const auto fetch = [&](int32_t slice) {
      const int64_t column = slice * Tile::kRowColumns;
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int row = thread / kPacks + j * (Tile::kThreads / kPacks);
        simt::copy16_async(&stage.rows[slice % Tile::kRowStages][row][my_column],
                           from[j] && column + my_column < task.width ? from[j] + column : nullptr);
      }
    };
    const float* const query = task.query_row(token);
    const int32_t slices = int32_t((task.width + Tile::kRowColumns - 1) / Tile::kRowColumns);
    float sum = 0;
    for (int32_t slice = 0; slice < Tile::kRowStages - 1; ++slice) {
      if (slice < slices) fetch(slice);
      simt::commit_copies();
    }
    for (int32_t slice = 0; slice < slices; ++slice) {
      const int64_t column = slice * Tile::kRowColumns;
      const int slot = slice % Tile::kRowStages;
      Pack<float> q[kPacks];
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        q[j] = mine && column + 4 * j < task.width ? load_pack<true>(query, column + 4 * j, 0) : filled_pack(0.0f);
      simt::wait_for_copies<Tile::kRowStages - 2>();
      __syncthreads();  // this slice is complete, and nobody reads the one before
      if (slice + Tile::kRowStages - 1 < slices) fetch(slice + Tile::kRowStages - 1);
      simt::commit_copies();
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {  // columns beyond the row are zeros
        const Pack<float> k = load_pack<true>(stage.rows[slot][thread], 4 * j, 0);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float difference = q[j].v[c] - k.v[c];
          sum = kIdw ? fma(-difference, difference, sum) : fma(q[j].v[c], k.v[c], sum);
        }
      }
    }
    if (mine) stage.similarity[token][place] = sum;
  }
}

// What is kept, to its places in the lists.
template <bool kIdw, typename Tile>
__device__ __forceinline__ void write_lists(const FilterTask& task, int topk, float eps, FilterStage<Tile>& stage,
                                            int32_t* list_indices, float* list_scores) {
  for (int32_t i = threadIdx.x; i < stage.all_kept; i += Tile::kThreads) {
    const int token = token_of(i, stage), place = i - stage.before[token];
    const float mine = stage.similarity[token][place];
    const int32_t key = stage.kept[token][place];
    int better = 0;
    for (int other = 0; other < stage.count[token]; ++other) {
      const float its = stage.similarity[token][other];
      better += its > mine || (its == mine && stage.kept[token][other] < key);
    }
    if (better >= topk) continue;
    const float score = kIdw ? -log(eps - mine) : mine;
    if (!isfinite(score)) atomicOr(&stage.redo[token / kRedoTokens], 1u);
    const int64_t at = ((task.first_token + token) * task.lists + task.list) * topk + better;
    list_indices[at] = key;
    list_scores[at] = score;
  }
}

// -------------------------------------------------------------------------------------------------------------- kernel
// One block per tile of tokens, head and half. redo (rows.tiles(kRedoTokens), lists): 1 for what is left to `search`.
template <typename Size, int kTokens, int kSets, int kStages, bool kIdw>
__global__ void __launch_bounds__(FilterTile<Size, kTokens, kSets, kStages>::kThreads, kStages == 2 ? 2 : 1)
    filter(const float* __restrict__ query, TokenRows rows, const float* __restrict__ sub_keys, int64_t lists,
           int32_t num_sub_keys, int64_t width, int topk, float eps, FilterBounds bounds,
           int32_t* __restrict__ list_indices, float* __restrict__ list_scores, uint8_t* __restrict__ redo) {
  using Tile = FilterTile<Size, kTokens, kSets, kStages>;
  SIMT_DYNAMIC_SHARED(stage, FilterStage<Tile>);
  const int thread = threadIdx.x;
  const int64_t blocks = rows.tiles(kTokens) * lists;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t list = b % lists;
    const TokenTile tokens = rows.tile(b / lists, kTokens);
    const FilterTask task{.query = query,
                          .keys = sub_keys + (tokens.memory * lists + list) * num_sub_keys * width,
                          .rows = rows,
                          .first_token = tokens.first,
                          .lists = lists,
                          .list = list,
                          .width = width,
                          .tokens = tokens.tokens,
                          .num_sub_keys = num_sub_keys};
    for (int i = thread; i < kTokens; i += Tile::kThreads) stage.count[i] = 0;
    if (thread < Tile::kBands) stage.redo[thread] = 0;
    for (int32_t first_key = 0; first_key < num_sub_keys; first_key += Tile::kKeys) {
      Tile tile;
      approximate<kIdw>(task, first_key, tile, stage);
      find_largest(tile, stage);
      __syncthreads();  // largest and norms; and all slices have been read
      find_reached<kIdw>(first_key == 0, topk, bounds, stage);
      __syncthreads();  // reached
      keep(first_key, task.tokens, tile, stage);
    }
    __syncthreads();  // kept
    if (thread < 32) number_kept(task.tokens, topk, stage);
    __syncthreads();  // before
    find_similarities<kIdw>(task, stage);
    __syncthreads();  // similarities
    write_lists<kIdw>(task, topk, eps, stage, list_indices, list_scores);
    __syncthreads();  // redo; and the stage is free for the next tile
    for (int band = thread; band * kRedoTokens < task.tokens; band += Tile::kThreads)
      redo[(rows.tile_of(tokens.first, kRedoTokens) + band) * lists + list] = uint8_t(stage.redo[band]);
  }
}

// -------------------------------------------------------------------------------------------------------------- launch
// false: the whole search is left to `search`, without a launch. Arguments as of search_lists, rows that are packs.
template <typename Size = FilterSize>
bool launch_filter(const float* query, TokenRows rows, const float* sub_keys, int64_t lists, int64_t num_sub_keys,
                   int64_t width, int64_t topk, bool idw, float eps, int32_t* list_indices, float* list_scores,
                   uint8_t* redo, cudaStream_t stream, cudaError_t* error) {
  const auto with = [&](auto tokens, auto sets, auto stages, auto is_idw) {
    using Tile = FilterTile<Size, tokens(), sets(), stages()>;
    const auto kernel = filter<Size, tokens(), sets(), stages(), is_idw()>;
    if (topk > Tile::kMostTopk || !simt::allow_shared(kernel, sizeof(FilterStage<Tile>))) return false;
    const int64_t blocks = rows.tiles(tokens()) * lists;
    *error = simt::launch_with_shared(sizeof(FilterStage<Tile>), kernel, blocks_for<Size>(blocks, 1), Tile::kThreads,
                                      stream, query, rows, sub_keys, lists, int32_t(num_sub_keys), width, int(topk),
                                      eps, FilterBounds(width), list_indices, list_scores, redo);
    return true;
  };
  // Sets must be many more than R for the filter to let few pass, and hold some sub-keys each.
  if (without("filter") || rows.count < Size::kLeastTokens || num_sub_keys < 8 * topk || num_sub_keys > kMostFilterKeys)
    return false;
  using Many = std::integral_constant<int, Size::kManyTokens>;
  using Few = std::integral_constant<int, Size::kFewTokens>;
  const bool many = rows.tiles(Many::value) * lists >= Size::kManyBlocks;
  const bool one_each = rows.tiles(Few::value) * lists <= Size::kManyBlocks;  // a multiprocessor for each block
  // With more stages or tokens a block has a multiprocessor for itself, and some devices have no room for it.
  const auto with_tokens = [&](auto sets, auto is_idw) {
    return (many && with(Many(), sets, std::integral_constant<int, 3>(), is_idw)) ||
           (one_each && with(Few(), sets, std::integral_constant<int, 4>(), is_idw)) ||
           with(Few(), sets, std::integral_constant<int, 2>(), is_idw);
  };
  const auto with_sets = [&](auto is_idw) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    return topk <= FilterTile<Size, Few::value, 1, 2>::kMostTopk ? with_tokens(One(), is_idw)
                                                                 : with_tokens(Two(), is_idw);
  };
  return idw ? with_sets(std::true_type()) : with_sets(std::false_type());
}

}  // namespace fwpkm::kernels
