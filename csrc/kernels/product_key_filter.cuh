// The search of many float tokens on tensor cores: a filter, and the similarities of what it lets through.
//
// The filter computes all similarities from operands of 10 bits, takes for each token and list a number that at least
// R of the true similarities reach, and keeps the sub-keys that may reach it as well: about 11 for R = 8 and P = 512.
// Their similarities are then computed as `search` computes them, so that the lists are those of product_key_search.cuh
// bit for bit. Where that cannot be promised - too many sub-keys are that close together, a number is not finite - some
// 16 tokens are left to `search` itself (`redo`).
//
// Why nothing is missed. Let x' be x with all but 10 bits of its mantissa cut off or rounded: |x - x'| <= 2^-10 |x|,
// and
//
//   |<q', k'> - <q, k>|  <=  (2^-9 + 2^-20) sum |q_c k_c|  <=  (2^-9 + 2^-20) |q| |k|
//
// `bound` is that, with an eighth more, and 2^-20 a column for the rounding of sums here and in `search`. With idw the
// filter ranks by 2 <q, k> - |k|^2, the similarity plus |q|^2. Each of many sets of sub-keys has a largest approximate
// similarity. The R-th largest of these, less the bound, is reached by R true similarities; a sub-key whose approximate
// one is more than a bound below that has R better ones.
#pragma once
#include <type_traits>

#include "kernels/best_list.cuh"

namespace fwpkm::kernels {

// Token t = b * per_row + i of a launch stands at row b * row_stride + first + i of a (B, T, ...) tensor.
struct TokenRows {
  int64_t count, per_row, row_stride, first;
  __device__ int64_t row(int64_t t) const { return t / per_row * row_stride + first + t % per_row; }
};

// ------------------------------------------------------------------------------------------------------------- sizes
constexpr int kRedoTokens = 16;               // tokens that are left to `search` together
constexpr int64_t kMostFilterKeys = 1 << 16;  // sub-keys that 16 bits can number

// What a block works on at a time: all similarities of kTokens tokens and kKeys sub-keys, in registers. A warp has all
// tokens and every kWarps-th group of 8 sub-keys; a lane has kSets sets of sub-keys of each of its tokens.
template <typename Size, int kTokens_, int kSets_>
struct FilterTile {
  static constexpr int kThreads = Size::kThreads, kWarps = kThreads / 32, kTokens = kTokens_, kSets = kSets_;
  static constexpr int kBands = kTokens / 16, kGroups = 8, kKeys = kWarps * kGroups * 8;
  static constexpr int kNormRows = (kTokens + 8 * kWarps - 1) / (8 * kWarps);  // tokens of whose norm a lane has parts
  static constexpr int kAllSets = kWarps * 4 * kSets, kMostTopk = kAllSets / (kSets == 1 ? 4 : 2);
  static constexpr int kMostKept = kSets == 1 ? 48 : 80;  // sub-keys of a token
  static constexpr int kStages = 2;
  static constexpr int kColumns = 16;                          // of the filter's slices
  static constexpr int kRowColumns = 32, kRowStride = 32 + 4;  // of those of kept rows; no two lanes in one bank
  static_assert(kBands * kRedoTokens == kTokens && kGroups % kSets == 0);

  // Token and sub-key of x[band][group][i], as multiply_tf32 leaves them.
  float x[kBands][kGroups][4] = {};
  static __device__ int token(int band, int i) { return band * 16 + threadIdx.x % 32 / 4 + i / 2 * 8; }
  static __device__ int first_key(int group) { return (group * kWarps + threadIdx.x / 32) * 8; }
  static __device__ int key(int group, int i) { return first_key(group) + threadIdx.x % 4 * 2 + i % 2; }
};

template <typename Tile>
struct FilterStage {
  struct Slices {
    float keys[Tile::kStages][Tile::kKeys][Tile::kColumns], query[Tile::kStages][Tile::kTokens][Tile::kColumns];
  };
  union {  // first all tiles, then what is kept
    Slices slices;
    float rows[Tile::kStages][Tile::kThreads][Tile::kRowStride];
  };
  union {
    float largest[Tile::kTokens][Tile::kAllSets];      // of each set
    float similarity[Tile::kTokens][Tile::kMostKept];  // of what is kept, as `search` has it
  };
  uint16_t kept[Tile::kTokens][Tile::kMostKept];
  int32_t count[Tile::kTokens], before[Tile::kTokens];          // kept; kept by tokens before
  int32_t all_kept, pair[Tile::kThreads];                       // token << 16 | sub-key, or -1
  float query_norm[Tile::kTokens], largest_norm[Tile::kWarps];  // squared; of the sub-keys so far, by warp
  float reached[Tile::kTokens], bound[Tile::kTokens];
  unsigned redo[Tile::kBands];
};

// A block's part of the search: some tokens and one list.
struct FilterTask {
  const float *query, *keys;
  TokenRows rows;
  int64_t first_token, lists, list, width;
  int32_t tokens, num_sub_keys;
  __device__ const float* query_row(int token) const {
    return query + (rows.row(first_token + token) * lists + list) * width;
  }
};

// Approximate similarities are wrong by at most  relative |q| |k|, or  2 relative |q| |k| + squares (|q| + |k|)^2  with
// idw. Elements below 2^-63 may be missing from a norm, for their squares are too small to be numbers: `missing`.
struct FilterBounds {
  float relative, squares, missing;
  explicit FilterBounds(int64_t width)
      : relative(1.125f / 512 + float(width) / (1 << 20)),
        squares(float(width + 4) / (1 << 22)),
        missing(std::sqrt(float(width)) * 0x1p-62f) {}
};
constexpr float kMostNorm = 1e36f;  // squares below it cannot overflow, nor can similarities

// ------------------------------------------------------------------------------------------------- parts of the kernel
__device__ __forceinline__ float square_sum(float sum, const Pack<float>& pack) {
#pragma unroll
  for (int c = 0; c < 4; ++c) sum = fma(pack.v[c], pack.v[c], sum);
  return sum;
}

// Sum over the four lanes that share a row of fragments.
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kFullWarp, x, 1);
  return x + __shfl_xor_sync(kFullWarp, x, 2);
}

// Approximate similarities of the tile's queries and the sub-keys from first_key on, and norms.
template <bool kIdw, typename Tile>
__device__ __forceinline__ void approximate(const FilterTask& task, int32_t first_key, Tile& tile,
                                            FilterStage<Tile>& stage) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
  const auto fetch = [&](int slot, int64_t first_column) {
    const int64_t column = first_column + 4 * t;
#pragma unroll
    for (int i = 0; i < Tile::kKeys * 4 / Tile::kThreads; ++i) {
      const int row = thread / 4 + i * (Tile::kThreads / 4);
      const int32_t key = first_key + row;
      const bool exists = key < task.num_sub_keys && column < task.width;
      simt::copy16_async(&stage.slices.keys[slot][row][4 * t],
                         exists ? task.keys + key * task.width + column : nullptr);
    }
    for (int row = thread / 4; row < Tile::kTokens; row += Tile::kThreads / 4) {
      const bool exists = row < task.tokens && column < task.width;
      simt::copy16_async(&stage.slices.query[slot][row][4 * t], exists ? task.query_row(row) + column : nullptr);
    }
    simt::commit_copies();
  };
  // A lane brings columns 4t to 4t + 3 of its rows: any four that are the same on both sides would do.
  const auto pack_of = [&](const float (&row)[Tile::kColumns]) { return load_pack<true>(row, 4 * t, 0); };
  float key_norms[Tile::kGroups] = {}, query_norms[Tile::kNormRows] = {};
  fetch(0, 0);
  for (int64_t column = 0; column < task.width; column += Tile::kColumns) {
    const int slot = int(column / Tile::kColumns) % Tile::kStages;
    simt::wait_for_copies<0>();
    __syncthreads();  // this slice is complete, and nobody reads the one before
    if (column + Tile::kColumns < task.width) fetch((slot + 1) % Tile::kStages, column + Tile::kColumns);
    Pack<float> q[Tile::kBands][2];
#pragma unroll
    for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
      for (int h = 0; h < 2; ++h) q[band][h] = pack_of(stage.slices.query[slot][Tile::token(band, 2 * h)]);
#pragma unroll
    for (int i = 0; i < Tile::kNormRows; ++i)
      if (const int row = (i * Tile::kWarps + warp) * 8 + g; row < Tile::kTokens)
        query_norms[i] = square_sum(query_norms[i], pack_of(stage.slices.query[slot][row]));
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      if (first_key + Tile::first_key(group) >= task.num_sub_keys) continue;
      const Pack<float> k = pack_of(stage.slices.keys[slot][Tile::first_key(group) + g]);
      key_norms[group] = square_sum(key_norms[group], k);
#pragma unroll
      for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
        for (int c = 0; c < 4; c += 2)
          simt::multiply_tf32(tile.x[band][group],
                              {q[band][0].v[c], q[band][1].v[c], q[band][0].v[c + 1], q[band][1].v[c + 1]},
                              {k.v[c], k.v[c + 1]});
    }
  }

  float largest = 0;
#pragma unroll
  for (int group = 0; group < Tile::kGroups; ++group) {
    const float norm = quad_sum(key_norms[group]);
    if (!(norm <= largest)) largest = norm < kMostNorm ? norm : INFINITY;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float its_norm = kIdw ? __shfl_sync(kFullWarp, norm, 4 * (2 * t + i)) : 0;
#pragma unroll
      for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
        for (int h = 0; h < 4; h += 2) {
          float& x = tile.x[band][group][h + i];
          if (kIdw) x = 2 * x - its_norm;
          if (first_key + Tile::key(group, i) >= task.num_sub_keys) x = -INFINITY;
        }
    }
  }
  largest = warp_max(largest);
  if (lane == 0 && (first_key == 0 || largest > stage.largest_norm[warp])) stage.largest_norm[warp] = largest;
#pragma unroll
  for (int i = 0; i < Tile::kNormRows; ++i) {
    const float norm = quad_sum(query_norms[i]);
    if (const int row = (i * Tile::kWarps + warp) * 8 + g; t == 0 && row < Tile::kTokens) stage.query_norm[row] = norm;
  }
}

// The largest of each set.
template <typename Tile>
__device__ __forceinline__ void find_largest(const Tile& tile, FilterStage<Tile>& stage) {
  const int warp = threadIdx.x / 32, t = threadIdx.x % 4;
#pragma unroll
  for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
    for (int h = 0; h < 4; h += 2)
#pragma unroll
      for (int set = 0; set < Tile::kSets; ++set) {
        float largest = -INFINITY;
#pragma unroll
        for (int group = set; group < Tile::kGroups; group += Tile::kSets)
#pragma unroll
          for (int i = h; i < h + 2; ++i)
            if (tile.x[band][group][i] > largest) largest = tile.x[band][group][i];
        stage.largest[Tile::token(band, h)][(set * Tile::kWarps + warp) * 4 + t] = largest;
      }
}

// `reached` and `bound` of every token. One warp per token.
template <bool kIdw, typename Tile>
__device__ __forceinline__ void find_reached(bool first, int topk, const FilterBounds& bounds,
                                             FilterStage<Tile>& stage) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float key_norm = 0;
#pragma unroll
  for (int w = 0; w < Tile::kWarps; ++w)
    if (stage.largest_norm[w] > key_norm) key_norm = stage.largest_norm[w];
  for (int token = warp; token < Tile::kTokens; token += Tile::kWarps) {
    const float query_norm = stage.query_norm[token];
    const float q = sqrt(query_norm) + bounds.missing, k = sqrt(key_norm) + bounds.missing;
    const float wrong =
        kIdw ? 2 * bounds.relative * q * k + bounds.squares * (q + k) * (q + k) : bounds.relative * q * k;
    const float bound = query_norm + key_norm < kMostNorm ? wrong : NAN;
    if (lane == 0) stage.bound[token] = bound;
    for (int set = lane; set < Tile::kAllSets; set += 32) {
      const float mine = stage.largest[token][set];
      int better = 0;
#pragma unroll 8
      for (int other = 0; other < Tile::kAllSets; ++other) {
        const float its = stage.largest[token][other];
        better += its > mine || (its == mine && other < set);
      }
      if (better == topk - 1 && (first || mine - bound > stage.reached[token])) stage.reached[token] = mine - bound;
    }
  }
}

// Keeps the sub-keys that may reach what R of them do.
template <typename Tile>
__device__ __forceinline__ void keep(int32_t first_key, int32_t tokens, const Tile& tile, FilterStage<Tile>& stage) {
#pragma unroll
  for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
    for (int h = 0; h < 4; h += 2) {
      const int token = Tile::token(band, h);
      const float least = token < tokens ? stage.reached[token] - stage.bound[token] : INFINITY;
      unsigned keeps = 0;
#pragma unroll
      for (int group = 0; group < Tile::kGroups; ++group)
#pragma unroll
        for (int i = 0; i < 2; ++i) keeps |= unsigned(tile.x[band][group][h + i] >= least) << (2 * group + i);
      for (; keeps; keeps &= keeps - 1) {
        const int bit = __ffs(int(keeps)) - 1, at = atomicAdd(&stage.count[token], 1);
        if (at < Tile::kMostKept) stage.kept[token][at] = uint16_t(first_key + Tile::key(bit / 2, bit % 2));
      }
    }
}

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
    const auto fetch = [&](int slot, int64_t first_column) {
      const int64_t column = first_column + thread % kPacks * 4;
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        const int row = thread / kPacks + j * (Tile::kThreads / kPacks);
        const int32_t key = stage.pair[row];
        const bool exists = key >= 0 && column < task.width;
        simt::copy16_async(&stage.rows[slot][row][thread % kPacks * 4],
                           exists ? task.keys + key * task.width + column : nullptr);
      }
      simt::commit_copies();
    };
    const float* const query = task.query_row(token);
    float sum = 0;
    fetch(0, 0);
    for (int64_t column = 0; column < task.width; column += Tile::kRowColumns) {
      const int slot = int(column / Tile::kRowColumns) % Tile::kStages;
      Pack<float> q[kPacks];
#pragma unroll
      for (int j = 0; j < kPacks; ++j)
        q[j] = mine && column + 4 * j < task.width ? load_pack<true>(query, column + 4 * j, 0) : filled_pack(0.0f);
      simt::wait_for_copies<0>();
      __syncthreads();  // this slice is complete, and nobody reads the one before
      if (column + Tile::kRowColumns < task.width) fetch((slot + 1) % Tile::kStages, column + Tile::kRowColumns);
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
// One block per tile of tokens, head and half. redo (filter_workspace(N, lists)): 1 for what is left to `search`.
template <typename Size, int kTokens, int kSets, bool kIdw>
__global__ void __launch_bounds__(Size::kThreads, kTokens == Size::kManyTokens ? 1 : 2)
    filter(const float* __restrict__ query, TokenRows rows, const float* __restrict__ sub_keys, int64_t lists,
           int32_t num_sub_keys, int64_t width, int topk, float eps, FilterBounds bounds,
           int32_t* __restrict__ list_indices, float* __restrict__ list_scores, uint8_t* __restrict__ redo) {
  using Tile = FilterTile<Size, kTokens, kSets>;
  SIMT_DYNAMIC_SHARED(stage, FilterStage<Tile>);
  const int thread = threadIdx.x;
  const int64_t blocks = (rows.count + kTokens - 1) / kTokens * lists;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t list = b % lists, first_token = b / lists * kTokens, left = rows.count - first_token;
    const FilterTask task{.query = query,
                          .keys = sub_keys + list * num_sub_keys * width,
                          .rows = rows,
                          .first_token = first_token,
                          .lists = lists,
                          .list = list,
                          .width = width,
                          .tokens = left < kTokens ? int32_t(left) : kTokens,
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
      redo[(first_token / kRedoTokens + band) * lists + list] = uint8_t(stage.redo[band]);
  }
}

// -------------------------------------------------------------------------------------------------------------- launch
inline int64_t filter_workspace(int64_t tokens, int64_t lists) {
  return (tokens + kRedoTokens - 1) / kRedoTokens * lists;
}

// false: the whole search is left to `search`, without a launch. Arguments as of search_lists, rows that are packs.
template <typename Size = FilterSize>
bool launch_filter(const float* query, TokenRows rows, const float* sub_keys, int64_t lists, int64_t num_sub_keys,
                   int64_t width, int64_t topk, bool idw, float eps, int32_t* list_indices, float* list_scores,
                   uint8_t* redo, cudaStream_t stream, cudaError_t* error) {
  const auto with = [&](auto tokens, auto sets, auto is_idw) {
    using Tile = FilterTile<Size, tokens(), sets()>;
    const auto kernel = filter<Size, tokens(), sets(), is_idw()>;
    if (topk > Tile::kMostTopk || !simt::allow_shared(kernel, sizeof(FilterStage<Tile>))) return false;
    const int64_t blocks = (rows.count + tokens() - 1) / tokens() * lists;
    *error = simt::launch_with_shared(sizeof(FilterStage<Tile>), kernel, blocks_for<Size>(blocks, 1), Size::kThreads,
                                      stream, query, rows, sub_keys, lists, int32_t(num_sub_keys), width, int(topk),
                                      eps, FilterBounds(width), list_indices, list_scores, redo);
    return true;
  };
  // Sets must be many more than R for the filter to let few pass, and hold some sub-keys each.
  if (rows.count < Size::kLeastTokens || num_sub_keys < 8 * topk || num_sub_keys > kMostFilterKeys) return false;
  using Many = std::integral_constant<int, Size::kManyTokens>;
  using Few = std::integral_constant<int, Size::kFewTokens>;
  const bool many = (rows.count + Many::value - 1) / Many::value * lists >= Size::kManyBlocks;
  const auto with_tokens = [&](auto sets, auto is_idw) {
    return many ? with(Many(), sets, is_idw) : with(Few(), sets, is_idw);
  };
  const auto with_sets = [&](auto is_idw) {
    using One = std::integral_constant<int, 1>;
    using Two = std::integral_constant<int, 2>;
    return topk <= FilterTile<Size, Few::value, 1>::kMostTopk ? with_tokens(One(), is_idw) : with_tokens(Two(), is_idw);
  };
  return idw ? with_sets(std::true_type()) : with_sets(std::false_type());
}

}  // namespace fwpkm::kernels
