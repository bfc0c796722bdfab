// Who reads what, in which order: groups numbered entries by key, each group in ascending order of entry numbers. Sums
// over a group can then be taken in a fixed order, without atomics (ordered_sums.cuh).
//
// Entry i of n has the key keys[i]. The entries are sorted by (key, i) with a stable radix sort, 8 bits a pass, least
// significant first; as many passes as num_keys has bits. Every pass has three kernels: each tile of entries counts its
// digits; the counts of each digit are summed over the tiles; each tile moves its entries. Nothing depends on the order
// in which blocks run. Costs O(n), whatever num_keys is; nothing has a size of num_keys.
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
  static constexpr int kSteps = 8;  // 32 entries a warp and step
};
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;

template <typename Size>
constexpr int kTile = Size::kThreads * Size::kSteps;  // entries of a block in one pass

template <typename Size>
int32_t tiles_of(int32_t n) {
  return int32_t((int64_t(n) + kTile<Size> - 1) / kTile<Size>);
}

// int32 elements of the workspace that build_ordered_lists needs, and that holds its result.
template <typename Size = OrderedListsSize>
int64_t ordered_lists_workspace(int32_t n) {
  return 4 * int64_t(n) + int64_t(kDigits) * (tiles_of<Size>(n) + 1);
}

__device__ __forceinline__ int digit_of(int32_t key, int shift) { return (key >> shift) & (kDigits - 1); }

// ----------------------------------------------------------------------------------------------------------- kernels
// One thread per entry.
template <typename Size, typename Keys>
__global__ void __launch_bounds__(Size::kThreads)
    checked_keys(Keys keys, int32_t n, int32_t num_keys, int32_t* __restrict__ key, int32_t* __restrict__ entry,
                 unsigned* errors) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < n; i += step) {
    const auto k = keys[i];
    const bool valid = k >= 0 && k < num_keys;
    if (!valid) report(errors, kIndexOutOfRange);
    key[i] = valid ? int32_t(k) : num_keys;
    entry[i] = int32_t(i);
  }
}

// One block per tile: counts (kDigits, tiles).
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    count_digits(const int32_t* __restrict__ key, int32_t n, int shift, int32_t tiles, int32_t* __restrict__ counts) {
  SIMT_SHARED(count, int[kDigits]);
  for (int d = threadIdx.x; d < kDigits; d += Size::kThreads) count[d] = 0;
  __syncthreads();
  const int64_t tile = blockIdx.x;
  for (int s = 0; s < Size::kSteps; ++s) {
    const int64_t i = tile * kTile<Size> + s * Size::kThreads + threadIdx.x;
    if (i < n) atomicAdd(&count[digit_of(key[i], shift)], 1);
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kDigits; d += Size::kThreads) counts[int64_t(d) * tiles + tile] = count[d];
}

// One warp per digit: its counts become the sums over the tiles before; totals (kDigits).
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    sum_over_tiles(int32_t* __restrict__ counts, int32_t tiles, int32_t* __restrict__ totals) {
  const int lane = threadIdx.x % 32, warps = gridDim.x * (Size::kThreads / 32);
  for (int d = (blockIdx.x * Size::kThreads + threadIdx.x) / 32; d < kDigits; d += warps) {
    int32_t* row = counts + int64_t(d) * tiles;
    int before = 0;
    for (int32_t first = 0; first < tiles; first += 32) {
      const int32_t tile = first + lane;
      const int count = tile < tiles ? row[tile] : 0, sum = inclusive_sum(count, lane);
      if (tile < tiles) row[tile] = before + sum - count;
      before += __shfl_sync(kFullWarp, sum, 31);
    }
    if (lane == 0) totals[d] = before;
  }
}

// One block per tile; a warp owns kSteps * 32 consecutive entries. An entry's new place is the number of entries of
// smaller digits, plus those of its digit in tiles, warps, steps and lanes before: the sort is stable.
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    move_entries(const int32_t* __restrict__ key, const int32_t* __restrict__ entry, int32_t n, int shift,
                 int32_t tiles, const int32_t* __restrict__ counts, const int32_t* __restrict__ totals,
                 int32_t* __restrict__ new_key, int32_t* __restrict__ new_entry) {
  constexpr int kWarps = Size::kThreads / 32, kPerLane = kDigits / 32;
  SIMT_SHARED(place, int[kWarps][kDigits]);  // of the warp's next entry of a digit; before that, counts
  SIMT_SHARED(base, int[kDigits]);           // entries of smaller digits
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t tile = blockIdx.x, first = tile * kTile<Size> + warp * (Size::kSteps * 32) + lane;

  for (int d = lane; d < kDigits; d += 32) place[warp][d] = 0;
  __syncwarp();
  for (int s = 0; s < Size::kSteps; ++s) {
    const int64_t i = first + s * 32;
    if (i < n) atomicAdd(&place[warp][digit_of(key[i], shift)], 1);
  }
  if (warp == 0) {
    int sum = 0;
    for (int j = 0; j < kPerLane; ++j) sum += totals[lane * kPerLane + j];
    int before = inclusive_sum(sum, lane) - sum;
    for (int j = 0; j < kPerLane; ++j) {
      base[lane * kPerLane + j] = before;
      before += totals[lane * kPerLane + j];
    }
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kDigits; d += Size::kThreads) {
    int next = base[d] + counts[int64_t(d) * tiles + tile];
    for (int w = 0; w < kWarps; ++w) {
      const int count = place[w][d];
      place[w][d] = next;
      next += count;
    }
  }
  __syncthreads();
  for (int s = 0; s < Size::kSteps; ++s) {
    const int64_t i = first + s * 32;
    const int32_t k = i < n ? key[i] : 0;
    const int digit = i < n ? digit_of(k, shift) : kDigits;  // kDigits: no entry
    const unsigned same = __match_any_sync(kFullWarp, digit), before = same & ((1u << lane) - 1);
    const int to = i < n ? place[warp][digit] + __popc(before) : 0;
    __syncwarp();  // all have read place
    if (i < n) {
      new_key[to] = k;
      new_entry[to] = entry[i];
      if (!before) place[warp][digit] += __popc(same);
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
// keys[i] on the device: an array, or a struct with that operator; int32 or int64. The lists lie in `workspace`
// (ordered_lists_workspace(n) elements). A key outside [0, num_keys) is reported in `errors`, and its entry belongs to
// no list.
template <typename Size = OrderedListsSize, typename Keys>
cudaError_t build_ordered_lists(Keys keys, int32_t n, int32_t num_keys, int32_t* workspace, unsigned* errors,
                                cudaStream_t stream, OrderedLists* lists) {
  static_assert(Size::kThreads % 32 == 0);
  *lists = OrderedLists{n, num_keys, nullptr, nullptr, nullptr};
  if (n == 0) return cudaSuccess;
  const int32_t tiles = tiles_of<Size>(n);
  const unsigned scan_blocks = kDigits / (Size::kThreads / 32), one_per_entry = blocks_for<Size>(n, Size::kThreads);
  int32_t *key = workspace, *new_key = key + n, *entry = new_key + n, *new_entry = entry + n;
  int32_t *counts = new_entry + n, *totals = counts + int64_t(kDigits) * tiles;
  cudaError_t error = simt::launch(checked_keys<Size, Keys>, one_per_entry, Size::kThreads, stream, keys, n, num_keys,
                                   key, entry, errors);
  for (int shift = 0; shift < 32 && (num_keys >> shift) > 0; shift += kDigitBits) {
    if (error == cudaSuccess)
      error = simt::launch(count_digits<Size>, tiles, Size::kThreads, stream, key, n, shift, tiles, counts);
    if (error == cudaSuccess)
      error = simt::launch(sum_over_tiles<Size>, unsigned(tiles) < scan_blocks ? tiles : scan_blocks, Size::kThreads,
                           stream, counts, tiles, totals);
    if (error == cudaSuccess)
      error = simt::launch(move_entries<Size>, tiles, Size::kThreads, stream, key, entry, n, shift, tiles, counts,
                           totals, new_key, new_entry);
    std::swap(key, new_key);
    std::swap(entry, new_entry);
  }
  if (error == cudaSuccess)
    error = simt::launch(find_begins<Size>, one_per_entry, Size::kThreads, stream, key, n, new_key);
  lists->key = key;
  lists->entry = entry;
  lists->begin = new_key;
  return error;
}

}  // namespace fwpkm::kernels
