// The search of few tokens, as in decoding: two short launches with as many blocks as there is work for. The first
// writes similarities to device memory, the second takes the best of each half, and the best of their sums. Results and
// orders of summation: product_key_search.cuh.
#pragma once
#include "kernels/product_key_combine.cuh"
#include "kernels/product_key_filter.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
// What a block holds: rows of up to 1 KB, all of them on their way at once. A warp has a token, a lane a sub-key.
template <typename T, int kThreads>
struct FewTile {
  static constexpr int kTokens = kThreads / 32, kKeys = 32;
  static constexpr int kPacks = 64, kColumns = kPacks * Pack<T>::kSize;
  static constexpr int kStride = kColumns + Pack<T>::kSize;  // of sub-keys: eight lanes read from all 32 banks
  static constexpr int kRowsAtOnce = kThreads / kPacks;      // that the block loads, one pack per thread
  static_assert(kKeys % kRowsAtOnce == 0 && kTokens % kRowsAtOnce == 0);
};

template <typename T, typename Tile>
struct FewStage {
  alignas(16) T keys[Tile::kKeys][Tile::kStride], query[Tile::kTokens][Tile::kColumns];
};

// ----------------------------------------------------------------------------------------------------------- kernels
// similarities (N, lists, P). One block per 8 tokens or so, list and 32 sub-keys.
template <typename Size, bool kIdw, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    find_similarities(const T* __restrict__ query, TokenRows rows, const T* __restrict__ sub_keys, bool aligned,
                      int64_t lists, int32_t num_sub_keys, int64_t width, T* __restrict__ similarities) {
  using Tile = FewTile<T, Size::kThreads>;
  using Stage = FewStage<T, Tile>;
  SIMT_SHARED(stage, Stage);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int load_row = threadIdx.x / Tile::kPacks, load_column = threadIdx.x % Tile::kPacks * Pack<T>::kSize;
  const int64_t parts = (num_sub_keys + Tile::kKeys - 1) / Tile::kKeys;
  const int64_t blocks = rows.tiles(Tile::kTokens) * lists * parts;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t list = b / parts % lists;
    const TokenTile tokens = rows.tile(b / parts / lists, Tile::kTokens);
    const T* const keys = sub_keys + (tokens.memory * lists + list) * num_sub_keys * width;
    const int32_t first_key = int32_t(b % parts) * Tile::kKeys;
    const T* query_rows[Tile::kTokens / Tile::kRowsAtOnce];
#pragma unroll
    for (int i = 0; i < Tile::kTokens / Tile::kRowsAtOnce; ++i) {
      const int row = load_row + i * Tile::kRowsAtOnce;
      const int64_t token = tokens.first + (row < tokens.tokens ? row : 0);
      query_rows[i] = query + (rows.row(token) * lists + list) * width;
    }
    T sum = 0;
    for (int64_t first_column = 0; first_column < width; first_column += Tile::kColumns) {
      Pack<T> key_packs[Tile::kKeys / Tile::kRowsAtOnce], query_packs[Tile::kTokens / Tile::kRowsAtOnce];
      const int64_t column = first_column + load_column;
      const auto load = [&]<bool kAligned>() {  // all on their way before the first is needed
#pragma unroll
        for (int i = 0; i < Tile::kKeys / Tile::kRowsAtOnce; ++i) {
          const int32_t key = first_key + load_row + i * Tile::kRowsAtOnce;
          if (key < num_sub_keys) key_packs[i] = load_pack<kAligned>(keys + key * width, column, width);
        }
#pragma unroll
        for (int i = 0; i < Tile::kTokens / Tile::kRowsAtOnce; ++i)
          query_packs[i] = load_pack<kAligned>(query_rows[i], column, width);
      };
      if (column < width && aligned) load.template operator()<true>();
      if (column < width && !aligned) load.template operator()<false>();
      __syncthreads();  // the stage is free
#pragma unroll
      for (int i = 0; i < Tile::kKeys / Tile::kRowsAtOnce; ++i)
        *reinterpret_cast<Pack<T>*>(&stage.keys[load_row + i * Tile::kRowsAtOnce][load_column]) = key_packs[i];
#pragma unroll
      for (int i = 0; i < Tile::kTokens / Tile::kRowsAtOnce; ++i)
        *reinterpret_cast<Pack<T>*>(&stage.query[load_row + i * Tile::kRowsAtOnce][load_column]) = query_packs[i];
      __syncthreads();  // the slice is complete
      if (warp >= tokens.tokens) continue;
      const int columns = width - first_column < Tile::kColumns ? int(width - first_column) : Tile::kColumns;
#pragma unroll 4
      for (int c = 0; c < columns; c += Pack<T>::kSize) {
        const Pack<T> k = load_pack<true>(stage.keys[lane], c, 0), q = load_pack<true>(stage.query[warp], c, 0);
#pragma unroll
        for (int j = 0; j < Pack<T>::kSize; ++j) {
          const T difference = q.v[j] - k.v[j];
          sum = kIdw ? fma(-difference, difference, sum) : fma(q.v[j], k.v[j], sum);
        }
      }
    }
    if (warp < tokens.tokens && first_key + lane < num_sub_keys)
      similarities[((tokens.first + warp) * lists + list) * num_sub_keys + first_key + lane] = sum;
  }
}

// The list of one half, by one warp; to global memory, and to shared memory for the combination.
template <bool kIdw, int kPerLane, typename T>
__device__ __forceinline__ void take_best(const T* similarities, int32_t num_sub_keys, int topk, T eps,
                                          Candidates<T>& left, int32_t* list_indices, T* list_scores, int32_t* indices,
                                          T* scores, unsigned* errors) {
  const int lane = threadIdx.x % 32;
  bool finite = true;
#pragma unroll 8
  for (int32_t j = lane; j < num_sub_keys; j += 32) finite &= bool(isfinite(similarities[j]));
  if (!__ballot_sync(kFullWarp, !finite))
    find_best<kPerLane>(
        num_sub_keys, topk,
        [&](int32_t j, T& score, int32_t& index) {
          score = similarities[j];
          index = j;
        },
        left,
        [&](int place, T similarity, int32_t index) {
          scores[place] = kIdw ? -log(eps - similarity) : similarity;
          indices[place] = index;
          finite &= bool(isfinite(scores[place]));
        });
  const bool bad = __ballot_sync(kFullWarp, !finite) != 0;
  __syncwarp();  // the list
  if (bad && lane == 0) report(errors, kNotFinite);
  for (int r = lane; r < topk; r += 32) {
    if (bad) indices[r] = -1;
    if (bad) scores[r] = T(NAN);
    list_indices[r] = indices[r];
    list_scores[r] = scores[r];
  }
}

// One block of two warps per token and head.
template <bool kIdw, int kPerLane, typename T>
__global__ void __launch_bounds__(64)
    take_best_and_combine(const T* __restrict__ similarities, TokenRows rows, int64_t heads, int32_t num_sub_keys,
                          int topk, T eps, int32_t* __restrict__ list_indices, T* __restrict__ list_scores,
                          int32_t* __restrict__ places, int32_t* __restrict__ slots, T* __restrict__ scores,
                          unsigned* errors) {
  constexpr int kMost = 32 * kPerLane;
  using Left = Candidates<T>;
  using Sums = LeftSums<kPerLane, T>;
  SIMT_SHARED(left, Left[2]);
  SIMT_SHARED(left_sums, Sums);
  SIMT_SHARED(best_indices, int32_t[2 * kMost]);
  SIMT_SHARED(best_scores, T[2 * kMost]);
  const int half = threadIdx.x / 32;
  for (int64_t n = blockIdx.x; n < rows.count * heads; n += gridDim.x) {
    const int64_t list = 2 * n + half;
    take_best<kIdw, kPerLane>(similarities + list * num_sub_keys, num_sub_keys, topk, eps, left[half],
                              list_indices + list * topk, list_scores + list * topk, &best_indices[half * topk],
                              &best_scores[half * topk], errors);
    __syncthreads();  // both lists
    if (half == 0)
      combine_lists(&best_indices[0], &best_scores[0], num_sub_keys, topk, left_sums,
                    Combination<T>{first_slot(rows, n / heads, num_sub_keys), places ? places + n * topk : nullptr,
                                   slots + n * topk, scores + n * topk},
                    errors);
    __syncthreads();  // the lists have been read
  }
}

}  // namespace fwpkm::kernels
