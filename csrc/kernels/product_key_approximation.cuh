// The search of many float tokens, first part: tensor cores find the few sub-keys that may be among the R best.
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
#include "kernels/best_list.cuh"
#include "kernels/tokens.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
constexpr int kRedoTokens = 16;               // tokens that are left to `search` together
constexpr int64_t kMostFilterKeys = 1 << 16;  // sub-keys that 16 bits can number

// What a block works on at a time: all similarities of kTokens tokens and kKeys sub-keys, in registers. A warp has all
// tokens and every kWarps-th group of 8 sub-keys; a lane has kSets sets of sub-keys of each of its tokens.
template <typename Size, int kTokens_, int kSets_, int kStages_>
struct FilterTile {
  static constexpr int kTokens = kTokens_, kSets = kSets_;
  static constexpr int kThreads = kTokens == Size::kManyTokens ? Size::kManyThreads : Size::kThreads;
  static constexpr int kWarps = kThreads / 32, kBands = kTokens / 16;
  static constexpr int kGroups = 8 * Size::kThreads / kThreads, kKeys = kWarps * kGroups * 8;
  static constexpr int kQueryRows = (kTokens * 4 + kThreads - 1) / kThreads;   // of which a thread brings a part
  static constexpr int kNormRows = (kTokens + 8 * kWarps - 1) / (8 * kWarps);  // tokens of whose norm a lane has parts
  static constexpr int kAllSets = kWarps * 4 * kSets, kMostTopk = kAllSets / (kSets == 1 ? 4 : 2);
  static constexpr int kMostKept = kSets == 1 ? 48 : 80;  // sub-keys of a token
  // Slices of rows that are on their way at once: of all sub-keys, and of those that are kept. Strides: no two lanes in
  // one bank.
  static constexpr int kStages = kStages_, kRowStages = kStages == 2 || kGroups < 8 ? 2 : 4;
  static constexpr int kColumns = 16, kStride = 16 + 4;
  static constexpr int kRowColumns = 32, kRowStride = 32 + 4;
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
    float keys[Tile::kStages][Tile::kKeys][Tile::kStride], query[Tile::kStages][Tile::kTokens][Tile::kStride];
  };
  union {  // first all tiles, then what is kept
    Slices slices;
    float rows[Tile::kRowStages][Tile::kThreads][Tile::kRowStride];
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
  const float* queries[Tile::kQueryRows];  // of which this thread brings 16 bytes for each slice; null: there is none
#pragma unroll
  for (int i = 0; i < Tile::kQueryRows; ++i) {
    const int row = thread / 4 + i * (Tile::kThreads / 4);
    queries[i] = row < task.tokens ? task.query_row(row) : nullptr;
  }
  const float* const keys =
      task.keys + (first_key + thread / 4) * task.width;  // this thread's first row, and next ones
  const int64_t next_row = Tile::kThreads / 4 * task.width;
  const int32_t left = task.num_sub_keys - first_key - thread / 4;
  const auto fetch = [&](int32_t slice) {
    const int64_t column = slice * Tile::kColumns + 4 * t;
    const int slot = slice % Tile::kStages;
    const float* from = keys + column;
#pragma unroll
    for (int i = 0; i < Tile::kKeys * 4 / Tile::kThreads; ++i, from += next_row) {
      const int row = i * (Tile::kThreads / 4);
      simt::copy16_async(&stage.slices.keys[slot][thread / 4 + row][4 * t],
                         row < left && column < task.width ? from : nullptr);
    }
#pragma unroll
    for (int i = 0; i < Tile::kQueryRows; ++i)
      if (const int row = thread / 4 + i * (Tile::kThreads / 4); row < Tile::kTokens)
        simt::copy16_async(&stage.slices.query[slot][row][4 * t],
                           queries[i] && column < task.width ? queries[i] + column : nullptr);
  };
  float key_norms[Tile::kGroups] = {}, query_norms[Tile::kNormRows] = {};
  const int32_t slices = int32_t((task.width + Tile::kColumns - 1) / Tile::kColumns);
  for (int32_t slice = 0; slice < Tile::kStages - 1; ++slice) {
    if (slice < slices) fetch(slice);
    simt::commit_copies();
  }
  for (int32_t slice = 0; slice < slices; ++slice) {
    const int slot = slice % Tile::kStages;
    simt::wait_for_copies<Tile::kStages - 2>();
    __syncthreads();  // this slice is complete, and nobody reads the one before
    if (slice + Tile::kStages - 1 < slices) fetch(slice + Tile::kStages - 1);
    simt::commit_copies();
    // Operands of two products each, of columns 0 to 7 and 8 to 15.
    float q[Tile::kBands][2][4];
#pragma unroll
    for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        simt::load_tiles(q[band][half], &stage.slices.query[slot][band * 16 + lane % 16][half * 8 + lane / 16 * 4]);
#pragma unroll
    for (int i = 0; i < Tile::kNormRows; ++i)
      if (const int row = (i * Tile::kWarps + warp) * 8 + g; row < Tile::kTokens)
        query_norms[i] = square_sum(query_norms[i], load_pack<true>(stage.slices.query[slot][row], 4 * t, 0));
#pragma unroll
    for (int group = 0; group < Tile::kGroups; ++group) {
      if (first_key + Tile::first_key(group) >= task.num_sub_keys) continue;
      float k[4];
      simt::load_tiles(k, &stage.slices.keys[slot][Tile::first_key(group) + lane % 8][lane / 8 * 4]);
#pragma unroll
      for (int c = 0; c < 4; ++c) key_norms[group] = fma(k[c], k[c], key_norms[group]);
#pragma unroll
      for (int band = 0; band < Tile::kBands; ++band)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          simt::multiply_tf32(tile.x[band][group], q[band][half], {k[2 * half], k[2 * half + 1]});
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

}  // namespace fwpkm::kernels
