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
template <typename Size, int kTokens_, int kSets_>
struct FilterTile {
  static constexpr int kThreads = Size::kThreads, kWarps = kThreads / 32, kTokens = kTokens_, kSets = kSets_;
  static constexpr int kBands = kTokens / 16, kGroups = 8, kKeys = kWarps * kGroups * 8;
  static constexpr int kQueryRows = (kTokens * 4 + kThreads - 1) / kThreads;   // of which a thread brings a part
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
  const float* queries[Tile::kQueryRows];  // of which this thread brings 16 bytes for each slice; null: there is none
#pragma unroll
  for (int i = 0; i < Tile::kQueryRows; ++i) {
    const int row = thread / 4 + i * (Tile::kThreads / 4);
    queries[i] = row < task.tokens ? task.query_row(row) : nullptr;
  }
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
#pragma unroll
    for (int i = 0; i < Tile::kQueryRows; ++i)
      if (const int row = thread / 4 + i * (Tile::kThreads / 4); row < Tile::kTokens)
        simt::copy16_async(&stage.slices.query[slot][row][4 * t],
                           queries[i] && column < task.width ? queries[i] + column : nullptr);
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

}  // namespace fwpkm::kernels
