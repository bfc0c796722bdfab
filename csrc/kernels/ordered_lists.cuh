// Who reads what, in which order: groups numbered entries by key, each group in ascending order of entry numbers. Sums
// over a group can then be taken in a fixed order, without atomics (ordered_sums.cuh).
//
// Entry i of n has the key keys[i]. The entries are sorted by (key, i) with a stable radix sort, least significant
// digit first, of as few passes as digits of at most 10 bits allow. In every pass each tile of entries counts its
// digits, then moves its entries behind those of smaller digits and of tiles before; where there are many tiles, a
// kernel in between sums their counts. Nothing depends on the order in which blocks run. Costs O(n), whatever num_keys
// is; nothing has a size of num_keys.
#pragma once
#include "kernels/errors.cuh"
#include "kernels/warp.cuh"

namespace fwpkm::kernels {

// The result, in device memory. A list is a range of places with equal keys; places of entries whose key was out of
// range come last and have the key num_keys.
struct OrderedLists {
  int32_t n, num_keys;
  const int32_t* key;    // (n): ascending
  const int32_t* entry;  // (n): ascending within a list
  const int32_t* begin;  // (n): the place where this place's list begins
};

// First place at or after `from` whose key is greater than `key`.
__device__ __forceinline__ int32_t end_of_list(const OrderedLists& lists, int32_t key, int32_t from) {
  int32_t low = from, high = lists.n;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (lists.key[middle] > key)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// ------------------------------------------------------------------------------------------------------------- sizes
struct OrderedListsSize : LaunchSize {
  static constexpr int kSteps = 8;      // 32 entries a warp and step
  static constexpr int kFewTiles = 64;  // a block sums the counts of so many tiles by itself
};
constexpr int kMostDigitBits = 10, kMostDigits = (1 << kMostDigitBits) + 1;  // one more for keys out of range

template <typename Size>
constexpr int kTile = Size::kThreads * Size::kSteps;  // entries of a block in one pass

template <typename Size>
int32_t tiles_of(int32_t n) {
  return int32_t((int64_t(n) + kTile<Size> - 1) / kTile<Size>);
}

// int32 elements of the workspace that build_ordered_lists needs, and that holds its result.
template <typename Size = OrderedListsSize>
int64_t ordered_lists_workspace(int32_t n) {
  return 4 * int64_t(n) + int64_t(kMostDigits) * (tiles_of<Size>(n) + 1);
}

// One pass: digit (key >> shift) & mask of `digits` that occur. In the last one the mask is all ones, so that num_keys,
// the key of what is out of range, comes last even if it is a power of two.
struct RadixPass {
  int shift;
  int32_t mask, digits, tiles;
  __device__ int digit(int32_t key) const { return (key >> shift) & mask; }
};

// Where a pass finds its entries: what the caller gave, or what the pass before has left.
template <typename Keys>
struct CheckedKeys {
  Keys keys;
  int32_t num_keys;
  unsigned* errors;
  __device__ int32_t key(int32_t i) const {
    const auto k = keys[i];
    if (k >= 0 && k < num_keys) return int32_t(k);
    report(errors, kIndexOutOfRange);
    return num_keys;
  }
  __device__ int32_t entry(int32_t i) const { return i; }
};
struct MovedKeys {
  const int32_t *keys, *entries;
  __device__ int32_t key(int32_t i) const { return keys[i]; }
  __device__ int32_t entry(int32_t i) const { return entries[i]; }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// One block per tile: counts (digits, tiles).
template <typename Size, typename Source>
__global__ void __launch_bounds__(Size::kThreads)
    count_digits(Source source, int32_t n, RadixPass pass, int32_t* __restrict__ counts) {
  SIMT_SHARED(count, int[kMostDigits]);
  for (int d = threadIdx.x; d < pass.digits; d += Size::kThreads) count[d] = 0;
  __syncthreads();
  const int64_t tile = blockIdx.x;
  int32_t keys[Size::kSteps];  // all on their way at once
#pragma unroll
  for (int s = 0; s < Size::kSteps; ++s) {
    const int64_t i = tile * kTile<Size> + s * Size::kThreads + threadIdx.x;
    keys[s] = i < n ? source.key(int32_t(i)) : -1;
  }
#pragma unroll
  for (int s = 0; s < Size::kSteps; ++s)
    if (keys[s] >= 0) atomicAdd(&count[pass.digit(keys[s])], 1);
  __syncthreads();
  for (int d = threadIdx.x; d < pass.digits; d += Size::kThreads) counts[int64_t(d) * pass.tiles + tile] = count[d];
}

// For many tiles. One warp per digit: its counts become the sums over the tiles before; totals (digits).
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    sum_over_tiles(int32_t* __restrict__ counts, RadixPass pass, int32_t* __restrict__ totals) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (Size::kThreads / 32);
  for (int d = (blockIdx.x * Size::kThreads + threadIdx.x) / 32; d < pass.digits; d += warps) {
    int32_t* row = counts + int64_t(d) * pass.tiles;
    int before = 0;
    for (int32_t first = 0; first < pass.tiles; first += 32) {
      const int32_t tile = first + lane;
      const int count = tile < pass.tiles ? row[tile] : 0, sum = inclusive_sum(count, lane);
      if (tile < pass.tiles) row[tile] = before + sum - count;
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    if (lane == 0) totals[d] = before;
  }
}

// One block per tile; a warp owns kSteps * 32 consecutive entries. An entry's new place is the number of entries of
// smaller digits, plus those of its digit in tiles, warps, steps and lanes before: the sort is stable. totals: of
// sum_over_tiles, or null if counts are still those of each tile.
template <typename Size, typename Source>
__global__ void __launch_bounds__(Size::kThreads, 4)
    move_entries(Source source, int32_t n, RadixPass pass, const int32_t* __restrict__ counts,
                 const int32_t* __restrict__ totals, int32_t* __restrict__ new_key, int32_t* __restrict__ new_entry) {
  constexpr int kWarps = Size::kThreads / 32;
  SIMT_SHARED(place, int[kWarps][kMostDigits]);  // of the warp's next entry of a digit; before that, counts
  SIMT_SHARED(total, int[kMostDigits]);          // entries of a digit; then, of smaller digits
  SIMT_SHARED(before, int[kMostDigits]);         // entries of a digit in tiles before
  SIMT_SHARED(warp_sums, int[kWarps]);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x, first = tile * kTile<Size> + warp * (Size::kSteps * 32) + lane;

  for (int d = lane; d < pass.digits; d += 32) place[warp][d] = 0;
  __syncwarp();
  int32_t keys[Size::kSteps], entries[Size::kSteps];  // all on their way at once; -1: no entry
#pragma unroll
  for (int s = 0; s < Size::kSteps; ++s) {
    const int64_t i = first + s * 32;
    keys[s] = i < n ? source.key(int32_t(i)) : -1;
    entries[s] = i < n ? source.entry(int32_t(i)) : 0;
  }
#pragma unroll
  for (int s = 0; s < Size::kSteps; ++s)
    if (keys[s] >= 0) atomicAdd(&place[warp][pass.digit(keys[s])], 1);
  for (int d = threadIdx.x; d < pass.digits; d += Size::kThreads) {
    const int32_t* const row = counts + int64_t(d) * pass.tiles;
    before[d] = totals ? row[tile] : 0;
    total[d] = totals ? totals[d] : 0;
    for (int32_t t = 0; t < pass.tiles && !totals; ++t) {
      if (t < tile) before[d] += row[t];
      total[d] += row[t];
    }
  }
  __syncthreads();  // total
  const int per_thread = (pass.digits + Size::kThreads - 1) / Size::kThreads, own = int(threadIdx.x) * per_thread;
  int sum = 0;
  for (int d = own; d < own + per_thread && d < pass.digits; ++d) sum += total[d];
  const int up_to = inclusive_sum(sum, lane);
  if (lane == 31) warp_sums[warp] = up_to;
  __syncthreads();  // warp_sums
  int smaller = up_to - sum;
  for (int w = 0; w < warp; ++w) smaller += warp_sums[w];
  for (int d = own; d < own + per_thread && d < pass.digits; ++d) {
    const int count = total[d];
    total[d] = smaller;
    smaller += count;
  }
  __syncthreads();  // total, of smaller digits
  for (int d = threadIdx.x; d < pass.digits; d += Size::kThreads) {
    int next = total[d] + before[d];
    for (int w = 0; w < kWarps; ++w) {
      const int count = place[w][d];
      place[w][d] = next;
      next += count;
    }
  }
  __syncthreads();  // place
#pragma unroll
  for (int s = 0; s < Size::kSteps; ++s) {
    const int32_t k = keys[s];
    const int digit = k >= 0 ? pass.digit(k) : kMostDigits;  // kMostDigits: no entry
    const unsigned same = __match_any_sync(kFullWarp, digit), in_front = same & ((1u << lane) - 1);
    const int to = k >= 0 ? place[warp][digit] + __popc(in_front) : 0;
    __syncwarp();  // all have read place
    if (k >= 0) {
      new_key[to] = k;
      new_entry[to] = entries[s];
      if (!in_front) place[warp][digit] += __popc(same);
    }
    __syncwarp();  // place is ready for the next step
  }
}

// One thread per place.
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    find_begins(const int32_t* __restrict__ key, int32_t n, int32_t* __restrict__ begin) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t p = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; p < n; p += step) {
    const int32_t k = key[p];
    int32_t low = 0, high = int32_t(p);  // key[high] == k
    if (high > 0 && key[high - 1] != k) low = high;
    while (low < high) {
      const int32_t middle = low + (high - low) / 2;
      if (key[middle] < k)
        low = middle + 1;
      else
        high = middle;
    }
    begin[p] = low;
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
template <typename Size, typename Source>
cudaError_t radix_pass(const Source& source, int32_t n, const RadixPass& pass, int32_t* counts, int32_t* new_key,
                       int32_t* new_entry, cudaStream_t stream) {
  constexpr int kWarps = Size::kThreads / 32;
  int32_t* const totals = pass.tiles > Size::kFewTiles ? counts + int64_t(kMostDigits) * pass.tiles : nullptr;
  cudaError_t error =
      simt::launch(count_digits<Size, Source>, pass.tiles, Size::kThreads, stream, source, n, pass, counts);
  if (totals && error == cudaSuccess)
    error = simt::launch(sum_over_tiles<Size>, blocks_for<Size>(pass.digits, kWarps), Size::kThreads, stream, counts,
                         pass, totals);
  if (error == cudaSuccess)
    error = simt::launch(move_entries<Size, Source>, pass.tiles, Size::kThreads, stream, source, n, pass, counts,
                         totals, new_key, new_entry);
  return error;
}

// keys[i] on the device: an array, or a struct with that operator; int32 or int64. The lists lie in `workspace`
// (ordered_lists_workspace(n) elements). A key outside [0, num_keys) is reported in `errors`, and its entry belongs to
// no list.
template <typename Size = OrderedListsSize, typename Keys>
cudaError_t build_ordered_lists(Keys keys, int32_t n, int32_t num_keys, int32_t* workspace, unsigned* errors,
                                cudaStream_t stream, OrderedLists* lists) {
  static_assert(Size::kThreads % 32 == 0);
  *lists = OrderedLists{n, num_keys, nullptr, nullptr, nullptr};
  if (n == 0) return cudaSuccess;
  int bits = 1;  // of the largest key
  while ((int64_t(num_keys) - 1) >> bits > 0) ++bits;
  const int passes = (bits + kMostDigitBits - 1) / kMostDigitBits, digit_bits = (bits + passes - 1) / passes;
  int32_t *key = workspace, *new_key = key + n, *entry = new_key + n, *new_entry = entry + n, *counts = new_entry + n;
  cudaError_t error = cudaSuccess;
  for (int p = 0; p < passes && error == cudaSuccess; ++p) {
    const int shift = p * digit_bits;
    const bool last = p + 1 == passes;
    const int32_t mask = last ? -1 : (1 << digit_bits) - 1;
    const RadixPass pass{shift, mask, last ? (num_keys >> shift) + 1 : mask + 1, tiles_of<Size>(n)};
    error = p == 0 ? radix_pass<Size>(CheckedKeys<Keys>{keys, num_keys, errors}, n, pass, counts, key, entry, stream)
                   : radix_pass<Size>(MovedKeys{key, entry}, n, pass, counts, new_key, new_entry, stream);
    if (p == 0) continue;
    std::swap(key, new_key);
    std::swap(entry, new_entry);
  }
  if (error == cudaSuccess)
    error =
        simt::launch(find_begins<Size>, blocks_for<Size>(n, Size::kThreads), Size::kThreads, stream, key, n, new_key);
  lists->key = key;
  lists->entry = entry;
  lists->begin = new_key;
  return error;
}

}  // namespace fwpkm::kernels
