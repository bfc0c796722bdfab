// Product-key search, on plain pointers: the R best sub-keys of each half, and the R best of their R*R sums.
//
//   similarity(t, h, p, j) = <q, k_j>, or -|q - k_j|^2 with `idw`; q and k_j are of token t, head h, half p
//   search_lists   the R highest similarities of each half, falling; equal ones by rising sub-key j. Their scores are
//                  the similarities themselves, or -log(eps + |q - k_j|^2)
//   combine_lists  the R highest sums of a score of half 0 and a score of half 1, falling; equal ones by rising slot
//                  j0 * P + j1
//
// Order of summation: columns ascending, from zero, one fused multiply-add each; a row ends with zeros up to whole
// packs of 16 bytes. It depends on nothing else, so a token's bits do not depend on the other tokens of a call. There
// is no matrix of similarities in device memory.
//
// A similarity or score that is NaN or infinite is reported in `errors` and makes the whole list of its (token, head,
// half) bad: indices -1, scores NaN. A bad list, or a sum that is infinite, makes (token, head) bad: slots -1, scores
// NaN, places 0.
#pragma once
#include "kernels/best_list.cuh"
#include "kernels/errors.cuh"
#include "kernels/product_key_filter.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
struct SearchSize : LaunchSize {
  using Filter = FilterSize;
  static constexpr int kManyBlocks = 128;  // fewer leave a large GPU without work: then a block takes fewer tokens
};

// What one block holds at a time: so many tokens, so many sub-keys, 128 bytes of each row. With many tokens its warps
// share the tokens among them, else the sub-keys; a lane owns the sub-keys at distances of 32.
template <typename T, int kThreads, bool kMany>
struct SearchTile {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLaneTokens = kMany ? 32 / sizeof(T) : 8, kLaneKeys = kMany ? 4 : 1;
  static constexpr int kTokens = kMany ? kWarps * kLaneTokens : kLaneTokens;
  static constexpr int kKeys = 32 * kLaneKeys * (kMany ? 1 : kWarps);

  static constexpr int kPacks = kMany ? 4 : 8, kColumns = kPacks * Pack<T>::kSize;
  static constexpr int kStride = kColumns + Pack<T>::kSize;  // of sub-keys: eight lanes read from all 32 banks
  static constexpr int kRowsAtOnce = kThreads / kPacks;      // that the block loads, one pack per thread
  static constexpr int kKeyLoads = kKeys / kRowsAtOnce, kQueryLoads = (kTokens + kRowsAtOnce - 1) / kRowsAtOnce;
  static_assert(kThreads % 32 == 0 && kKeys % kRowsAtOnce == 0);
};

template <typename T, typename Tile>
union alignas(16) SearchStage {
  struct {
    T keys[Tile::kKeys][Tile::kStride], query[Tile::kTokens][Tile::kColumns];
  } slice;
  T scores[Tile::kTokens][Tile::kKeys];  // when all slices have been added
};

// ----------------------------------------------------------------------------------------------------------- kernels
// Offers one tile of similarities to a token's list, which lies in `indices` and `scores` from tile to tile. One warp;
// a list that went bad stays so.
template <bool kIdw, int kPerLane, typename T>
__device__ __forceinline__ void offer_tile(const T* similarities, int32_t first_key, int32_t keys, bool last, int topk,
                                           T eps, int32_t* indices, T* scores, unsigned* errors) {
  const int lane = threadIdx.x % 32;
  BestList<T, int32_t, kPerLane> best(topk);
  bool bad = false;
  for (int j = lane; j < keys; j += 32) bad |= !isfinite(similarities[j]);
  if (first_key) {
    best.load(scores, indices);
    best.for_each([&](int, T score, int32_t) { bad |= score != score; });
  }
  if (!__ballot_sync(kFullWarp, bad)) {
#pragma unroll 1
    for (int j = 0; j < keys; j += 32) best.offer(similarities[j + lane], first_key + j + lane, j + lane < keys);
    best.for_each([&](int place, T similarity, int32_t index) {
      const T score = kIdw && last ? -log(eps - similarity) : similarity;
      bad |= last && !isfinite(score);
      scores[place] = score;
      indices[place] = index;
    });
  }
  if (!__ballot_sync(kFullWarp, bad)) return;
  if (lane == 0) report(errors, kNotFinite);
  best.for_each([&](int place, T, int32_t) {
    scores[place] = T(NAN);
    indices[place] = -1;
  });
}

// Whether the filter has left a token of the tile to `search`.
template <int kTokens>
__device__ __forceinline__ bool left_over(const uint8_t* redo, int64_t first_token, int64_t tokens, int64_t lists,
                                          int64_t list) {
  bool left = false;
  for (int64_t band = first_token / kRedoTokens;
       band * kRedoTokens < tokens && band * kRedoTokens < first_token + kTokens; ++band)
    left |= redo[band * lists + list] != 0;
  return left;
}

// One block per tile of tokens, head and half. The next slice is on its way to registers while one is worked on. redo:
// null, or what the filter has left over.
template <typename Size, bool kMany, bool kIdw, int kPerLane, typename T>
__global__ void __launch_bounds__(Size::kThreads, 2)
    search(const T* __restrict__ query, TokenRows rows, const T* __restrict__ sub_keys, bool aligned, int64_t lists,
           int32_t num_sub_keys, int64_t width, int topk, T eps, const uint8_t* __restrict__ redo,
           int32_t* list_indices, T* list_scores, unsigned* errors) {
  using Tile = SearchTile<T, Size::kThreads, kMany>;
  using Stage = SearchStage<T, Tile>;
  SIMT_SHARED(stage, Stage);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_key = kMany ? lane : int(threadIdx.x), my_token = kMany ? warp * Tile::kLaneTokens : 0;
  const int load_row = threadIdx.x / Tile::kPacks, load_column = threadIdx.x % Tile::kPacks * Pack<T>::kSize;
  const int64_t blocks = (rows.count + Tile::kTokens - 1) / Tile::kTokens * lists;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t list = b % lists, first_token = b / lists * Tile::kTokens;
    if (redo && !left_over<Tile::kTokens>(redo, first_token, rows.count, lists, list)) continue;
    const T* const keys = sub_keys + list * num_sub_keys * width;
    const T* queries[Tile::kQueryLoads];
#pragma unroll
    for (int i = 0; i < Tile::kQueryLoads; ++i) {
      const int row = load_row + i * Tile::kRowsAtOnce;
      const bool exists = row < Tile::kTokens && first_token + row < rows.count;
      queries[i] = exists ? query + (rows.row(first_token + row) * lists + list) * width : nullptr;
    }

    Pack<T> key_packs[Tile::kKeyLoads], query_packs[Tile::kQueryLoads];
    const auto load = [&](const T* row, int64_t column) {
      return aligned ? load_pack<true>(row, column, width) : load_pack<false>(row, column, width);
    };
    const auto fetch = [&](int32_t first_key, int64_t first_column) {
      const int64_t column = first_column + load_column;
#pragma unroll
      for (int i = 0; i < Tile::kKeyLoads; ++i) {
        const int32_t key = first_key + load_row + i * Tile::kRowsAtOnce;
        key_packs[i] = key < num_sub_keys && column < width ? load(keys + key * width, column) : filled_pack(T(0));
      }
#pragma unroll
      for (int i = 0; i < Tile::kQueryLoads; ++i)
        query_packs[i] = queries[i] && column < width ? load(queries[i], column) : filled_pack(T(0));
    };
    const auto put = [&] {
#pragma unroll
      for (int i = 0; i < Tile::kKeyLoads; ++i)
        *reinterpret_cast<Pack<T>*>(&stage.slice.keys[load_row + i * Tile::kRowsAtOnce][load_column]) = key_packs[i];
#pragma unroll
      for (int i = 0; i < Tile::kQueryLoads; ++i)
        if (const int row = load_row + i * Tile::kRowsAtOnce; row < Tile::kTokens)
          *reinterpret_cast<Pack<T>*>(&stage.slice.query[row][load_column]) = query_packs[i];
    };

    fetch(0, 0);
    for (int32_t first_key = 0; first_key < num_sub_keys; first_key += Tile::kKeys) {
      T sums[Tile::kLaneTokens][Tile::kLaneKeys] = {};
      for (int64_t first_column = 0; first_column < width; first_column += Tile::kColumns) {
        __syncthreads();  // the stage is free
        put();
        __syncthreads();  // the slice is complete
        const bool same_keys = first_column + Tile::kColumns < width;
        fetch(same_keys ? first_key : first_key + Tile::kKeys, same_keys ? first_column + Tile::kColumns : 0);
        const int columns = width - first_column < Tile::kColumns ? int(width - first_column) : Tile::kColumns;
#pragma unroll 1
        for (int column = 0; column < columns; column += Pack<T>::kSize) {
          Pack<T> k[Tile::kLaneKeys];
#pragma unroll
          for (int j = 0; j < Tile::kLaneKeys; ++j)
            k[j] = load_pack<true>(stage.slice.keys[my_key + 32 * j], column, 0);
#pragma unroll
          for (int i = 0; i < Tile::kLaneTokens; ++i) {
            const Pack<T> q = load_pack<true>(stage.slice.query[my_token + i], column, 0);
#pragma unroll
            for (int j = 0; j < Tile::kLaneKeys; ++j)
#pragma unroll
              for (int c = 0; c < Pack<T>::kSize; ++c) {
                const T difference = q.v[c] - k[j].v[c];
                sums[i][j] = kIdw ? fma(-difference, difference, sums[i][j]) : fma(q.v[c], k[j].v[c], sums[i][j]);
              }
          }
        }
      }
      __syncthreads();  // the last slice has been read: the similarities take its place
#pragma unroll
      for (int i = 0; i < Tile::kLaneTokens; ++i)
#pragma unroll
        for (int j = 0; j < Tile::kLaneKeys; ++j) stage.scores[my_token + i][my_key + 32 * j] = sums[i][j];
      __syncthreads();  // the similarities are complete
      const int32_t left = num_sub_keys - first_key;
#pragma unroll 1
      for (int i = warp; i < Tile::kTokens && first_token + i < rows.count; i += Tile::kWarps) {
        const int64_t at = ((first_token + i) * lists + list) * topk;
        offer_tile<kIdw, kPerLane>(stage.scores[i], first_key, left < Tile::kKeys ? left : Tile::kKeys,
                                   left <= Tile::kKeys, topk, eps, list_indices + at, list_scores + at, errors);
      }
    }
  }
}

// One warp per token and head. Pairs come 32 at a time, row by row of the R*R sums; both lists fall, so nothing is
// missed where the rest of a row, or of all rows, is left out for being lower than the R-th sum so far.
template <typename Size, int kPerLane, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    combine(const int32_t* __restrict__ list_indices, const T* __restrict__ list_scores, int64_t token_heads,
            int64_t num_sub_keys, int topk, int32_t* __restrict__ places, int32_t* __restrict__ slots,
            T* __restrict__ scores, unsigned* errors) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t n = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; n < token_heads; n += step) {
    const int32_t *const index0 = list_indices + n * 2 * topk, *const index1 = index0 + topk;
    const T *const score0 = list_scores + n * 2 * topk, *const score1 = score0 + topk;
    BestList<T, int64_t, kPerLane> best(topk);  // index: the slot, then 32 bits of the place i * R + j
    bool bad = index0[0] < 0 || index1[0] < 0;
    for (int32_t pair = 0; pair < topk * topk && !bad;) {
      const int32_t i = pair / topk, j = pair % topk;
      if (score0[i] + score1[j] < best.lowest_score()) {
        if (j == 0) break;
        pair = (i + 1) * topk;
        continue;
      }
      const int32_t mine = pair + lane < topk * topk ? pair + lane : pair;
      const int32_t my_i = mine / topk, my_j = mine % topk;
      const int64_t slot = index0[my_i] * num_sub_keys + index1[my_j];
      best.offer(score0[my_i] + score1[my_j], slot << 32 | mine, pair + lane < topk * topk);
      pair += 32;
    }
    best.for_each([&](int, T score, int64_t) { bad |= !isfinite(score); });
    bad = __ballot_sync(kFullWarp, bad) != 0;
    if (bad && lane == 0) report(errors, kNotFinite);
    best.for_each([&](int place, T score, int64_t index) {
      const int64_t at = n * topk + place;
      slots[at] = bad ? -1 : int32_t(index >> 32);
      scores[at] = bad ? T(NAN) : score;
      if (places) places[at] = bad ? 0 : int32_t(index & 0xffffffff);
    });
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// f(kernel arguments as types): the list's registers per lane
template <typename F>
cudaError_t with_list_size(int64_t topk, const F& f) {
  if (topk < 1 || topk > kMaxTopk) return cudaErrorInvalidValue;
  return topk <= 32 ? f(std::integral_constant<int, 1>{}) : f(std::integral_constant<int, 4>{});
}

// Bytes of the workspace that search_lists needs.
inline int64_t search_workspace(int64_t tokens, int64_t heads) { return filter_workspace(tokens, 2 * heads); }

// query: rows (H, 2, K/2); sub_keys (H, 2, P, K/2); lists (N, H, 2, R) of the N = rows.count tokens; all contiguous.
// 1 <= R <= kMaxTopk, R <= P. A T is float or double.
template <typename Size = SearchSize, typename T>
cudaError_t search_lists(const T* query, TokenRows rows, const T* sub_keys, int64_t heads, int64_t num_sub_keys,
                         int64_t half_width, int64_t topk, bool idw, T eps, uint8_t* workspace, int32_t* list_indices,
                         T* list_scores, unsigned* errors, cudaStream_t stream) {
  if (rows.count == 0) return cudaSuccess;
  const bool aligned = rows_are_packs<T>(half_width, query, sub_keys);
  const uint8_t* redo = nullptr;
  if constexpr (std::is_same_v<T, float>) {
    cudaError_t error = cudaSuccess;
    if (aligned &&
        launch_filter<typename Size::Filter>(query, rows, sub_keys, 2 * heads, num_sub_keys, half_width, topk, idw, eps,
                                             list_indices, list_scores, workspace, stream, &error))
      redo = workspace;
    if (error != cudaSuccess) return error;
  }
  const auto with = [&](auto many, auto is_idw, auto per_lane) {
    constexpr int kTokens = SearchTile<T, Size::kThreads, many()>::kTokens;
    const int64_t blocks = (rows.count + kTokens - 1) / kTokens * 2 * heads;
    return simt::launch(search<Size, many(), is_idw(), per_lane(), T>, blocks_for<Size>(blocks, 1), Size::kThreads,
                        stream, query, rows, sub_keys, aligned, 2 * heads, int32_t(num_sub_keys), half_width, int(topk),
                        eps, redo, list_indices, list_scores, errors);
  };
  constexpr int kManyTokens = SearchTile<T, Size::kThreads, true>::kTokens;
  const bool many = (rows.count + kManyTokens - 1) / kManyTokens * 2 * heads >= Size::kManyBlocks;
  return with_list_size(topk, [&](auto per_lane) {
    using Yes = std::true_type;
    using No = std::false_type;
    if (many) return idw ? with(Yes{}, Yes{}, per_lane) : with(Yes{}, No{}, per_lane);
    return idw ? with(No{}, Yes{}, per_lane) : with(No{}, No{}, per_lane);
  });
}

// Lists (N, H, 2, R) of search_lists; places (N, H, R): i * R + j of the places in both lists, may be null; slots and
// scores (N, H, R).
template <typename Size = LaunchSize, typename T>
cudaError_t combine_lists(const int32_t* list_indices, const T* list_scores, int64_t tokens, int64_t heads,
                          int64_t num_sub_keys, int64_t topk, int32_t* places, int32_t* slots, T* scores,
                          unsigned* errors, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  return with_list_size(topk, [&](auto per_lane) {
    return simt::launch(combine<Size, per_lane(), T>, blocks_for<Size>(tokens * heads, Size::kThreads / 32),
                        Size::kThreads, stream, list_indices, list_scores, tokens * heads, num_sub_keys, int(topk),
                        places, slots, scores, errors);
  });
}

}  // namespace fwpkm::kernels
