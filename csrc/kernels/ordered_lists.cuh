// Who reads what, in which order: groups numbered entries by key, each group in ascending order of entry numbers. Sums
// over a group can then be taken in a fixed order, without atomics (ordered_sums.cuh).
//
// Entry i of n has the key keys[i]. The entries are sorted by (key, i) with a stable radix sort, least significant
// digit first, of as few passes as digits of at most 10 bits allow. In every pass each tile of entries counts its
// digits, then moves its entries behind those of smaller digits and of tiles before; where there are many tiles, a
// kernel in between sums their counts. Entries that fit into one block are sorted by it, in one launch. Nothing depends
// on the order in which blocks run. Costs O(n), whatever num_keys is; nothing has a size of num_keys.
//   Two groupings can be built in the same launches, because those of a small one cost more than its work.
#pragma once
#include <algorithm>

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

// What one pass does with the entries of one grouping.
template <typename Source>
struct Sort {
  Source source;
  int32_t n, tiles;
  RadixPass pass;
  int32_t *counts, *totals;  // (digits, tiles), (digits); totals null: few tiles
  int32_t *new_key, *new_entry;
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
    int32_t keys[Size::kSteps];  // all on their way at once; -1: no entry
#pragma unroll
    for (int s = 0; s < Size::kSteps; ++s) {
      const int64_t i = int64_t(tile) * kTile<Size> + s * Size::kThreads + threadIdx.x;
      keys[s] = i < x.n ? x.source.key(int32_t(i)) : -1;
    }
#pragma unroll
    for (int s = 0; s < Size::kSteps; ++s)
      if (keys[s] >= 0) atomicAdd(&count[x.pass.digit(keys[s])], 1);
    __syncthreads();
    for (int d = threadIdx.x; d < x.pass.digits; d += Size::kThreads) x.counts[int64_t(d) * x.tiles + tile] = count[d];
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

// Moves the entries of a tile, of which a warp owns kSteps * 32 consecutive ones. An entry's new place is the number of
// entries of smaller digits, plus those of its digit in tiles, warps, steps and lanes before: the sort is stable.
// kAlone: there is no other tile, nor are there counts.
template <typename Size, int kSteps, bool kAlone, typename Source>
__device__ __forceinline__ void move_tile(const Sort<Source>& x, int32_t tile, MoveStage<Size>& stage) {
  constexpr int kWarps = Size::kThreads / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, digits = x.pass.digits;
  const int64_t first = int64_t(tile) * (Size::kThreads * kSteps) + warp * (kSteps * 32) + lane;
  int* const place = stage.place[warp];

  for (int d = lane; d < digits; d += 32) place[d] = 0;
  __syncwarp();
  int32_t keys[kSteps], entries[kSteps];  // all on their way at once; -1: no entry
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int64_t i = first + s * 32;
    keys[s] = i < x.n ? x.source.key(int32_t(i)) : -1;
    entries[s] = i < x.n ? x.source.entry(int32_t(i)) : 0;
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s)
    if (keys[s] >= 0) atomicAdd(&place[x.pass.digit(keys[s])], 1);
  if (kAlone) __syncthreads();  // counts of all warps
  for (int d = threadIdx.x; d < digits; d += Size::kThreads) {
    int before = 0, total = 0;
    if (kAlone) {
      for (int w = 0; w < kWarps; ++w) total += stage.place[w][d];
    } else {
      const int32_t* const row = x.counts + int64_t(d) * x.tiles;
      before = x.totals ? row[tile] : 0;
      total = x.totals ? x.totals[d] : 0;
      for (int32_t t = 0; t < x.tiles && !x.totals; ++t) {
        if (t < tile) before += row[t];
        total += row[t];
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

// One block per tile.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads, 4) move_entries(Sort<A> first, Sort<B> second) {
  SIMT_SHARED(stage, MoveStage<Size>);
  of_either(first, second, [&](const auto& x, int32_t tile) { move_tile<Size, Size::kSteps, false>(x, tile, stage); });
}

// First place of the list that has place p; key is sorted.
__device__ __forceinline__ int32_t begin_of_list(const int32_t* key, int32_t p) {
  const int32_t k = key[p];
  int32_t low = 0, high = p;  // key[high] == k
  if (high > 0 && key[high - 1] != k) low = high;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (key[middle] < k)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

// One thread per place, of both groupings.
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads) find_begins(OrderedLists first, int32_t* __restrict__ first_begin,
                                                              OrderedLists second, int32_t* __restrict__ second_begin) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads, n = int64_t(first.n) + second.n;
  for (int64_t p = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; p < n; p += step) {
    if (p < first.n)
      first_begin[p] = begin_of_list(first.key, int32_t(p));
    else
      second_begin[p - first.n] = begin_of_list(second.key, int32_t(p - first.n));
  }
}

// One grouping to be built.
template <typename Keys>
struct Grouping {
  CheckedKeys<Keys> keys;
  int32_t n;
  Radix radix;
  int32_t* workspace;  // (4, n): keys and entries before and after a pass; the result goes to one of both

  __host__ __device__ int32_t* key(int pass) const { return workspace + int64_t(pass % 2) * n; }
  __host__ __device__ int32_t* entry(int pass) const { return workspace + int64_t(2 + pass % 2) * n; }
  __host__ __device__ int32_t* begin() const { return key(radix.passes); }
  __host__ __device__ OrderedLists lists() const {
    return {n, radix.num_keys, key(radix.passes - 1), entry(radix.passes - 1), begin()};
  }
  // Pass number `pass` if there is one, else one of no tiles.
  __host__ __device__ auto first_sort(int32_t tiles, int32_t* counts, int32_t* totals) const {
    return Sort<CheckedKeys<Keys>>{keys, n, tiles, radix[0], counts, totals, key(0), entry(0)};
  }
  __host__ __device__ Sort<MovedKeys> sort(int pass, int32_t tiles, int32_t* counts, int32_t* totals) const {
    if (pass >= radix.passes) return {};
    return {{key(pass - 1), entry(pass - 1)}, n, tiles, radix[pass], counts, totals, key(pass), entry(pass)};
  }
};

// One block per grouping does all of it.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads) sort_in_block(Grouping<A> first, Grouping<B> second) {
  SIMT_SHARED(stage, MoveStage<Size>);
  const auto sort = [&](const auto& x) {
    if (x.n == 0) return;
    move_tile<Size, Size::kBlockSteps, true>(x.first_sort(1, nullptr, nullptr), 0, stage);
    __syncthreads();  // keys, entries; and the stage is free
    for (int pass = 1; pass < x.radix.passes; ++pass) {
      move_tile<Size, Size::kBlockSteps, true>(x.sort(pass, 1, nullptr, nullptr), 0, stage);
      __syncthreads();  // the same
    }
    const OrderedLists lists = x.lists();
    for (int32_t p = threadIdx.x; p < x.n; p += Size::kThreads) x.begin()[p] = begin_of_list(lists.key, p);
  };
  if (blockIdx.x == 0)
    sort(first);
  else
    sort(second);
}

// ------------------------------------------------------------------------------------------------------------ launch
template <typename Size, typename A, typename B>
cudaError_t radix_pass(const Sort<A>& first, const Sort<B>& second, cudaStream_t stream) {
  const unsigned tiles = unsigned(first.tiles) + unsigned(second.tiles);
  cudaError_t error = simt::launch(count_digits<Size, A, B>, tiles, Size::kThreads, stream, first, second);
  if ((first.totals || second.totals) && error == cudaSuccess)
    error = simt::launch(sum_over_tiles<Size, A, B>, blocks_for<Size>(kMostDigits, Size::kThreads / 32), Size::kThreads,
                         stream, first, second);
  if (error == cudaSuccess)
    error = simt::launch(move_entries<Size, A, B>, tiles, Size::kThreads, stream, first, second);
  return error;
}

// keys[i] on the device: an array, or a struct with that operator; int32 or int64. The lists will lie in `workspace`
// (ordered_lists_workspace(n) elements). A key outside [0, num_keys) is reported in `errors`, and its entry belongs to
// no list.
template <typename Keys>
Grouping<Keys> grouping(Keys keys, int32_t n, int32_t num_keys, int32_t* workspace, unsigned* errors) {
  return {{keys, num_keys, errors}, n, radix_of(num_keys), workspace};
}

// Afterwards first.lists() and second.lists() are there.
template <typename Size = OrderedListsSize, typename A, typename B>
cudaError_t build_ordered_lists(const Grouping<A>& first, const Grouping<B>& second, cudaStream_t stream) {
  static_assert(Size::kThreads % 32 == 0);
  if (first.n == 0 && second.n == 0) return cudaSuccess;
  constexpr int kInBlock = Size::kThreads * Size::kBlockSteps;
  if constexpr (kInBlock > 0)
    if (first.n <= kInBlock && second.n <= kInBlock)
      return simt::launch(sort_in_block<Size, A, B>, second.n ? 2 : 1, Size::kThreads, stream, first, second);
  const auto with_counts = [](const auto& x, const auto& f) {
    const int32_t tiles = tiles_of<Size>(x.n);
    int32_t* const counts = x.workspace + 4 * int64_t(x.n);
    return f(tiles, counts, tiles > Size::kFewTiles ? counts + int64_t(kMostDigits) * tiles : nullptr);
  };
  const auto first_sort = [&](const auto& x) {
    return with_counts(x, [&](auto... counts) { return x.first_sort(counts...); });
  };
  cudaError_t error = radix_pass<Size>(first_sort(first), first_sort(second), stream);
  for (int pass = 1; pass < std::max(first.radix.passes, second.radix.passes) && error == cudaSuccess; ++pass) {
    const auto sort = [&](const auto& x) {
      return with_counts(x, [&](auto... counts) { return x.sort(pass, counts...); });
    };
    error = radix_pass<Size>(sort(first), sort(second), stream);
  }
  if (error == cudaSuccess)
    error = simt::launch(find_begins<Size>, blocks_for<Size>(int64_t(first.n) + second.n, Size::kThreads),
                         Size::kThreads, stream, first.lists(), first.begin(), second.lists(), second.begin());
  return error;
}

template <typename Size = OrderedListsSize, typename Keys>
cudaError_t build_ordered_lists(const Grouping<Keys>& only, cudaStream_t stream) {
  return build_ordered_lists<Size>(only, grouping<const int32_t*>(nullptr, 0, 1, nullptr, nullptr), stream);
}

}  // namespace fwpkm::kernels
