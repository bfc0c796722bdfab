// Passes of a stable radix sort of entries by their keys, least significant digit first, as few as digits of at most 10
// bits allow. In every pass each tile of entries counts its digits, then moves its entries behind those of smaller
// digits and of tiles before; where there are many tiles, a kernel in between sums their counts. Two sorts may share
// launches.
#pragma once
#include "kernels/errors.cuh"
#include "kernels/warp.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
constexpr int kMostDigitBits = 10, kMostDigits = (1 << kMostDigitBits) + 1;  // one more for keys out of range

template <typename Size>
constexpr int kTile = Size::kThreads * Size::kSteps;  // entries of a block in one pass

template <typename Size>
int32_t tiles_of(int32_t n) {
  return int32_t((int64_t(n) + kTile<Size> - 1) / kTile<Size>);
}

// One pass: digit (key >> shift) & mask of `digits` that occur. In the last one the mask is all ones, so that num_keys,
// the key of what is out of range, comes last even if it is a power of two.
struct RadixPass {
  int shift;
  int32_t mask, digits;
  __device__ int digit(int32_t key) const { return (key >> shift) & mask; }
};

struct Radix {
  int32_t num_keys;
  int passes, digit_bits;
  __host__ __device__ RadixPass operator[](int pass) const {
    const int shift = pass * digit_bits;
    const bool last = pass + 1 == passes;
    const int32_t mask = last ? -1 : (1 << digit_bits) - 1;
    return {shift, mask, last ? (num_keys >> shift) + 1 : mask + 1};
  }
};

inline Radix radix_of(int32_t num_keys) {
  int bits = 1;  // of the largest key
  while ((int64_t(num_keys) - 1) >> bits > 0) ++bits;
  const int passes = (bits + kMostDigitBits - 1) / kMostDigitBits;
  return {num_keys, passes, (bits + passes - 1) / passes};
}

// Where a pass finds its entries: what the caller gave, or what the pass before has left. load: keys of the entries
// first, first + stride, ... below n, all on their way at once, and -1 for others.
//
// Keys has `Key`, and a load of its own that may leave anything for others.
template <typename Index>
struct GivenKeys {
  using Key = Index;
  const Index* keys;
  template <int kSteps>
  __device__ void load(int64_t first, int stride, int32_t n, Index (&key)[kSteps]) const {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) key[s] = first + s * stride < n ? keys[first + s * stride] : Index(-1);
  }
};

template <typename Keys>
struct CheckedKeys {
  Keys keys;
  int32_t num_keys;
  unsigned* errors;
  template <int kSteps>
  __device__ void load(int64_t first, int stride, int32_t n, int32_t (&key)[kSteps]) const {
    typename Keys::Key given[kSteps];
    keys.load(first, stride, n, given);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) key[s] = first + s * stride < n ? checked(given[s]) : -1;
  }
  __device__ int32_t checked(typename Keys::Key k) const {
    if (k >= 0 && k < num_keys) return int32_t(k);
    report(errors, kIndexOutOfRange);
    return num_keys;
  }
  __device__ int32_t entry(int32_t i) const { return i; }
};

struct MovedKeys : GivenKeys<int32_t> {
  const int32_t* entries;
  __device__ int32_t entry(int32_t i) const { return entries[i]; }
};

// What one pass does with the entries of one grouping.
template <typename Source>
struct Sort {
  Source source;
  int32_t n, tiles;
  RadixPass pass;
  int32_t *counts, *totals;  // (digits, tiles), (digits); few tiles: (tiles, digits), null
  int32_t *new_key, *new_entry;
  __device__ int32_t& count(int digit, int32_t tile) const {
    return counts[totals ? int64_t(digit) * tiles + tile : int64_t(tile) * pass.digits + digit];
  }
};

// Blocks of a launch: first those of one grouping, then those of the other.
template <typename A, typename B, typename F>
__device__ __forceinline__ void of_either(const A& a, const B& b, const F& f) {
  if (int32_t(blockIdx.x) < a.tiles)
    f(a, int32_t(blockIdx.x));
  else
    f(b, int32_t(blockIdx.x) - a.tiles);
}

// ----------------------------------------------------------------------------------------------------------- kernels
// One block per tile.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads) count_digits(Sort<A> first, Sort<B> second) {
  SIMT_SHARED(count, int[kMostDigits]);
  of_either(first, second, [&](const auto& x, int32_t tile) {
    for (int d = threadIdx.x; d < x.pass.digits; d += Size::kThreads) count[d] = 0;
    __syncthreads();
    int32_t keys[Size::kSteps];
    x.source.load(int64_t(tile) * kTile<Size> + threadIdx.x, Size::kThreads, x.n, keys);
#pragma unroll
    for (int s = 0; s < Size::kSteps; ++s)
      if (keys[s] >= 0) atomicAdd(&count[x.pass.digit(keys[s])], 1);
    __syncthreads();
    for (int d = threadIdx.x; d < x.pass.digits; d += Size::kThreads) x.count(d, tile) = count[d];
  });
}

// For many tiles. One warp per digit: its counts become the sums over the tiles before.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads) sum_over_tiles(Sort<A> first, Sort<B> second) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (Size::kThreads / 32);
  const auto sum_up = [&](const auto& x) {
    for (int d = (blockIdx.x * Size::kThreads + threadIdx.x) / 32; x.totals && d < x.pass.digits; d += warps) {
      int32_t* row = x.counts + int64_t(d) * x.tiles;
      int before = 0;
      for (int32_t from = 0; from < x.tiles; from += 32) {
        const int32_t tile = from + lane;
        const int count = tile < x.tiles ? row[tile] : 0, sum = inclusive_sum(count, lane);
        if (tile < x.tiles) row[tile] = before + sum - count;
        before += __shfl_sync(kFullWarp, sum, 31);
      }
      if (lane == 0) x.totals[d] = before;
    }
  };
  sum_up(first);
  sum_up(second);
}

template <typename Size>
struct MoveStage {
  static constexpr int kWarps = Size::kThreads / 32;
  int place[kWarps][kMostDigits];  // of the warp's next entry of a digit; before that, counts
  int total[kMostDigits];          // entries of a digit; then, of smaller digits
  int before[kMostDigits];         // entries of a digit in tiles before
  int warp_sums[kWarps];
};

// Moves the entries of a tile, of which a warp owns consecutive ones, kSteps * 32 a round. An entry's new place is the
// number of entries of smaller digits, plus those of its digit in tiles, warps, rounds, steps and lanes before: the
// sort is stable. kAlone: there is no other tile, nor are there counts, and there may be several rounds, whose keys are
// loaded twice; unrolled they would be hundreds of KB of code.
template <typename Size, bool kAlone, typename Source>
__device__ __forceinline__ void move_tile(const Sort<Source>& x, int32_t tile, MoveStage<Size>& stage) {
  constexpr int kWarps = Size::kThreads / 32, kSteps = Size::kSteps;
  const int rounds = kAlone ? (x.n + kTile<Size> - 1) / kTile<Size> : 1;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, digits = x.pass.digits;
  const int64_t first = int64_t(tile) * kTile<Size> + warp * rounds * (kSteps * 32) + lane;
  int* const place = stage.place[warp];

  int32_t keys[kSteps], entries[kSteps];
  const auto load = [&](int round) {
    const int64_t begin = first + round * kSteps * 32;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) entries[s] = begin + s * 32 < x.n ? x.source.entry(int32_t(begin + s * 32)) : 0;
    x.source.load(begin, 32, x.n, keys);
  };
  for (int d = lane; d < digits; d += 32) place[d] = 0;
  __syncwarp();
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    load(round);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (keys[s] >= 0) atomicAdd(&place[x.pass.digit(keys[s])], 1);
  }
  if (kAlone) __syncthreads();  // counts of all warps
  for (int d = threadIdx.x; d < digits; d += Size::kThreads) {
    int before = 0, total = 0;
    if (kAlone) {
      for (int w = 0; w < kWarps; ++w) total += stage.place[w][d];
    } else {
      before = x.totals ? x.count(d, tile) : 0;
      total = x.totals ? x.totals[d] : 0;
      const int32_t tiles = x.totals ? 0 : x.tiles;
      constexpr int kInFlight = 16;  // counts on their way at once
      for (int32_t from = 0; from < tiles; from += kInFlight) {
        int32_t counts[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) counts[j] = from + j < tiles ? x.counts[(from + j) * x.pass.digits + d] : 0;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (from + j < tile) before += counts[j];
          total += counts[j];
        }
      }
    }
    stage.before[d] = before;
    stage.total[d] = total;
  }
  __syncthreads();  // total
  const int per_thread = (digits + Size::kThreads - 1) / Size::kThreads, own = int(threadIdx.x) * per_thread;
  int sum = 0;
  for (int d = own; d < own + per_thread && d < digits; ++d) sum += stage.total[d];
  const int up_to = inclusive_sum(sum, lane);
  if (lane == 31) stage.warp_sums[warp] = up_to;
  __syncthreads();  // warp_sums
  int smaller = up_to - sum;
  for (int w = 0; w < warp; ++w) smaller += stage.warp_sums[w];
  for (int d = own; d < own + per_thread && d < digits; ++d) {
    const int count = stage.total[d];
    stage.total[d] = smaller;
    smaller += count;
  }
  __syncthreads();  // total, of smaller digits
  for (int d = threadIdx.x; d < digits; d += Size::kThreads) {
    int next = stage.total[d] + stage.before[d];
    for (int w = 0; w < kWarps; ++w) {
      const int count = stage.place[w][d];
      stage.place[w][d] = next;
      next += count;
    }
  }
  __syncthreads();  // place
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    if (rounds > 1) load(round);
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int32_t k = keys[s];
      const int digit = k >= 0 ? x.pass.digit(k) : kMostDigits;  // kMostDigits: no entry
      const unsigned same = __match_any_sync(kFullWarp, digit), in_front = same & ((1u << lane) - 1);
      const int to = k >= 0 ? place[digit] + __popc(in_front) : 0;
      __syncwarp();  // all have read place
      if (k >= 0) {
        x.new_key[to] = k;
        x.new_entry[to] = entries[s];
        if (!in_front) place[digit] += __popc(same);
      }
      __syncwarp();  // place is ready for the next step
    }
  }
}

// One block per tile.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads, 4) move_entries(Sort<A> first, Sort<B> second) {
  SIMT_SHARED(stage, MoveStage<Size>);
  of_either(first, second, [&](const auto& x, int32_t tile) { move_tile<Size, false>(x, tile, stage); });
}

}  // namespace fwpkm::kernels
