// Product-key search, on plain pointers: the R best sub-keys of each half, and the R best of their R*R sums.
//
//   similarity(t, h, p, j) = <q, k_j>, or -|q - k_j|^2 with `idw`; q and k_j are of token t, head h, half p
//   lists    the R highest similarities of each half, falling; equal ones by rising sub-key j. Their scores are the
//            similarities themselves, or -log(eps + |q - k_j|^2)
//   slots    the R highest sums of a score of half 0 and a score of half 1, falling; equal ones by rising slot,
//            j0 * P + j1 of the token's memory (tokens.cuh)
//
// Order of summation: columns ascending, from zero, one fused multiply-add each; a row ends with zeros up to whole
// packs of 16 bytes. It depends on nothing else, so a token's bits do not depend on the other tokens of a call, nor on
// the way it is searched: `search` is the plain way; many tokens take the filter before it (product_key_filter.cuh),
// few another one (product_key_few.cuh). But for the few, there is no matrix of similarities in device memory.
//
// A similarity or score that is NaN or infinite is reported in `errors` and makes the whole list of its (token, head,
// half) bad: indices -1, scores NaN. A bad list, or a sum that is infinite, makes (token, head) bad: slots -1, scores
// NaN, places 0.
#pragma once
#include "kernels/product_key_few.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
// What one block of `search` holds at a time: so many tokens, so many sub-keys, 64 bytes of each row. Its warps share
// the tokens among them; a lane owns the sub-keys at distances of 32.
template <typename T, int kThreads>
struct SearchTile {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kLaneTokens = 32 / sizeof(T), kLaneKeys = 4;
  static constexpr int kTokens = kWarps * kLaneTokens, kKeys = 32 * kLaneKeys;

  static constexpr int kPacks = 4, kColumns = kPacks * Pack<T>::kSize;
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
__device__ __forceinline__ bool left_over(const uint8_t* redo, const TokenRows& rows, const TokenTile& tokens,
                                          int64_t lists, int64_t list) {
  bool left = false;
  const int64_t last = rows.tile_of(tokens.first + tokens.tokens - 1, kRedoTokens);
  for (int64_t band = rows.tile_of(tokens.first, kRedoTokens); band <= last; ++band)
    left |= redo[band * lists + list] != 0;
  return left;
}

// One block per tile of tokens, head and half. The next slice is on its way to registers while one is worked on. redo:
// null, or what the filter has left over.
template <typename Size, bool kIdw, int kPerLane, typename T>
__global__ void __launch_bounds__(Size::kThreads, 2)
    search(const T* __restrict__ query, TokenRows rows, const T* __restrict__ sub_keys, bool aligned, int64_t lists,
           int32_t num_sub_keys, int64_t width, int topk, T eps, const uint8_t* __restrict__ redo,
           int32_t* list_indices, T* list_scores, unsigned* errors) {
  using Tile = SearchTile<T, Size::kThreads>;
  using Stage = SearchStage<T, Tile>;
  SIMT_SHARED(stage, Stage);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int my_token = warp * Tile::kLaneTokens;
  const int load_row = threadIdx.x / Tile::kPacks, load_column = threadIdx.x % Tile::kPacks * Pack<T>::kSize;
  const int64_t blocks = rows.tiles(Tile::kTokens) * lists;
  for (int64_t b = blockIdx.x; b < blocks; b += gridDim.x) {
    const int64_t list = b % lists;
    const TokenTile tokens = rows.tile(b / lists, Tile::kTokens);
    if (redo && !left_over(redo, rows, tokens, lists, list)) continue;
    const T* const keys = sub_keys + (tokens.memory * lists + list) * num_sub_keys * width;
    const T* queries[Tile::kQueryLoads];
#pragma unroll
    for (int i = 0; i < Tile::kQueryLoads; ++i) {
      const int row = load_row + i * Tile::kRowsAtOnce;
      queries[i] = row < tokens.tokens ? query + (rows.row(tokens.first + row) * lists + list) * width : nullptr;
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
          for (int j = 0; j < Tile::kLaneKeys; ++j) k[j] = load_pack<true>(stage.slice.keys[lane + 32 * j], column, 0);
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
        for (int j = 0; j < Tile::kLaneKeys; ++j) stage.scores[my_token + i][lane + 32 * j] = sums[i][j];
      __syncthreads();  // the similarities are complete
      const int32_t left = num_sub_keys - first_key;
#pragma unroll 1
      for (int i = warp; i < tokens.tokens; i += Tile::kWarps) {
        const int64_t at = ((tokens.first + i) * lists + list) * topk;
        offer_tile<kIdw, kPerLane>(stage.scores[i], first_key, left < Tile::kKeys ? left : Tile::kKeys,
                                   left <= Tile::kKeys, topk, eps, list_indices + at, list_scores + at, errors);
      }
    }
  }
}

// One warp per token and head. 3 blocks: left alone, ptxas spills to make room for more.
template <typename Size, int kPerLane, typename T>
__global__ void __launch_bounds__(Size::kThreads, 3)
    combine(const int32_t* __restrict__ list_indices, const T* __restrict__ list_scores, TokenRows rows, int64_t heads,
            int32_t num_sub_keys, int topk, int32_t* __restrict__ places, int32_t* __restrict__ slots,
            T* __restrict__ scores, unsigned* errors) {
  using Left = LeftSums<kPerLane, T>;
  SIMT_SHARED(left, Left[Size::kThreads / 32]);
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t n = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; n < rows.count * heads; n += step)
    combine_lists(list_indices + n * 2 * topk, list_scores + n * 2 * topk, num_sub_keys, topk, left[threadIdx.x / 32],
                  Combination<T>{first_slot(rows, n / heads, num_sub_keys), places ? places + n * topk : nullptr,
                                 slots + n * topk, scores + n * topk},
                  errors);
}

// ------------------------------------------------------------------------------------------------------------ launch
// query: rows (H, 2, K/2); sub_keys ([memories,] H, 2, P, K/2); all contiguous. N = rows.count tokens.
// 1 <= R <= kMaxTopk, R <= P. A T is float or double.
template <typename T>
struct ProductKeySearch {
  const T* query;
  TokenRows rows;
  const T* sub_keys;
  int64_t heads, num_sub_keys, half_width, topk;
  bool idw;
  T eps;
  void* workspace;          // search_workspace bytes
  int32_t* list_indices;    // (N, H, 2, R)
  T* list_scores;           // (N, H, 2, R)
  int32_t *places, *slots;  // (N, H, R): i * R + j of the places in both lists, may be null; slots
  T* scores;                // (N, H, R)
  unsigned* errors;

  int64_t lists() const { return 2 * heads; }
  int64_t similarities() const { return rows.count * lists() * num_sub_keys; }
};

// Bytes of the workspace for searches of up to `tokens` tokens.
template <typename T, typename Size = SearchSize>
int64_t search_workspace(int64_t tokens, int64_t heads, int64_t num_sub_keys) {
  const int64_t similarities = std::min(tokens * 2 * heads * num_sub_keys, Size::kFewSimilarities);
  return std::max(tokens * 2 * heads, similarities * int64_t(sizeof(T)));  // `redo` has no more than that
}

// f(the list's registers per lane as a type, idw as a type)
template <typename F>
cudaError_t with_search_kind(int64_t topk, bool idw, const F& f) {
  if (topk < 1 || topk > kMaxTopk) return cudaErrorInvalidValue;
  const auto with = [&](auto per_lane) { return idw ? f(per_lane, std::true_type()) : f(per_lane, std::false_type()); };
  return topk <= 32 ? with(std::integral_constant<int, 1>()) : with(std::integral_constant<int, 4>());
}

template <typename Size, typename T>
cudaError_t search_few(const ProductKeySearch<T>& x, bool aligned, cudaStream_t stream) {
  using Tile = FewTile<T, Size::kThreads>;
  const int64_t parts = (x.num_sub_keys + Tile::kKeys - 1) / Tile::kKeys;
  const int64_t blocks = x.rows.tiles(Tile::kTokens) * x.lists() * parts;
  const int32_t num_sub_keys = int32_t(x.num_sub_keys);
  T* const similarities = static_cast<T*>(x.workspace);
  return with_search_kind(x.topk, x.idw, [&](auto per_lane, auto idw) {
    const cudaError_t error =
        simt::launch(find_similarities<Size, idw(), T>, blocks_for<Size>(blocks, 1), Size::kThreads, stream, x.query,
                     x.rows, x.sub_keys, aligned, x.lists(), num_sub_keys, x.half_width, similarities);
    if (error != cudaSuccess) return error;
    return simt::launch(take_best_and_combine<idw(), per_lane(), T>, blocks_for<Size>(x.rows.count * x.heads, 1), 64,
                        stream, similarities, x.rows, x.heads, num_sub_keys, int(x.topk), x.eps, x.list_indices,
                        x.list_scores, x.places, x.slots, x.scores, x.errors);
  });
}

// redo: of the filter, or null.
template <typename Size, typename T>
cudaError_t search_many(const ProductKeySearch<T>& x, bool aligned, const uint8_t* redo, cudaStream_t stream) {
  const int64_t blocks = x.rows.tiles(SearchTile<T, Size::kThreads>::kTokens) * x.lists();
  const int64_t token_heads = x.rows.count * x.heads;
  const int32_t num_sub_keys = int32_t(x.num_sub_keys);
  return with_search_kind(x.topk, x.idw, [&](auto per_lane, auto idw) {
    const cudaError_t error =
        simt::launch(search<Size, idw(), per_lane(), T>, blocks_for<Size>(blocks, 1), Size::kThreads, stream, x.query,
                     x.rows, x.sub_keys, aligned, x.lists(), num_sub_keys, x.half_width, int(x.topk), x.eps, redo,
                     x.list_indices, x.list_scores, x.errors);
    if (error != cudaSuccess) return error;
    return simt::launch(combine<Size, per_lane(), T>, blocks_for<Size>(token_heads, Size::kThreads / 32),
                        Size::kThreads, stream, x.list_indices, x.list_scores, x.rows, x.heads, num_sub_keys,
                        int(x.topk), x.places, x.slots, x.scores, x.errors);
  });
}

template <typename Size = SearchSize, typename T>
cudaError_t search_product_keys(const ProductKeySearch<T>& x, cudaStream_t stream) {
  if (x.rows.count == 0) return cudaSuccess;
  const bool aligned = rows_are_packs<T>(x.half_width, x.query, x.sub_keys);
  if constexpr (std::is_same_v<T, float>) {
    cudaError_t error = cudaSuccess;
    uint8_t* const redo = static_cast<uint8_t*>(x.workspace);
    if (aligned &&
        launch_filter<typename Size::Filter>(x.query, x.rows, x.sub_keys, x.lists(), x.num_sub_keys, x.half_width,
                                             x.topk, x.idw, x.eps, x.list_indices, x.list_scores, redo, stream, &error))
      return error == cudaSuccess ? search_many<Size>(x, aligned, redo, stream) : error;
  }
  return x.similarities() <= Size::kFewSimilarities ? search_few<Size>(x, aligned, stream)
                                                    : search_many<Size>(x, aligned, nullptr, stream);
}

}  // namespace fwpkm::kernels
