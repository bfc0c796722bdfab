// Who reads what, in which order: groups numbered entries by key, each group in ascending order of entry numbers. Sums
// over a group can then be taken in a fixed order, without atomics (ordered_sums.cuh).
//
// Entry i of n has the key keys[i]. The entries are sorted by (key, i), radix_sort.cuh; those that fit into one block
// by that block, in one launch. Nothing depends on the order in which blocks run. Costs O(n), whatever num_keys is;
// nothing has a size of num_keys.
//   Two groupings can be built in the same launches, because those of a small one cost more than its work.
#pragma once
#include <algorithm>

#include "kernels/radix_sort.cuh"

namespace fwpkm::kernels {

// The result, in device memory. A list is a range of places with equal keys; places of entries whose key was out of
// range come last and have the key num_keys.
struct OrderedLists {
  int32_t n, num_keys;
  const int32_t* key;    // (n): ascending
  const int32_t* entry;  // (n): ascending within a list
  const int32_t* begin;  // (n): the place where this place's list begins
};

// First place at or after `from` whose key is greater than `key`. Most lists are short: looks near `from` first.
__device__ __forceinline__ int32_t end_of_list(const OrderedLists& lists, int32_t key, int32_t from) {
  int32_t low = from, high = from;
  for (int64_t step = 1; high < lists.n && lists.key[high] <= key; step *= 2) {
    low = high + 1;
    high = lists.n - low > step ? int32_t(low + step) : lists.n;
  }
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    if (lists.key[middle] > key)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The list of a key, which may be empty, found by a warp from nothing: places [begin, end).
struct Places {
  int32_t begin, end;
};
__device__ __forceinline__ Places find_list(const OrderedLists& lists, int32_t key) {
  const int lane = threadIdx.x % 32;
  int32_t low[2] = {0, 0}, high[2] = {lists.n, lists.n};  // of the first place whose key is at least key + i
  while (low[0] < high[0] || low[1] < high[1])
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // both searches wait for memory at the same time
      const int32_t left = high[i] - low[i], step = left > 32 ? (left - 1) / 32 + 1 : 1;
      const int64_t probe = low[i] + (lane + 1) * int64_t(step) - 1;
      const bool before = probe < high[i] && lists.key[probe] < key + i;
      low[i] += __popc(__ballot_sync(kFullWarp, before)) * step;
      if (high[i] > low[i] + step - 1) high[i] = low[i] + step - 1;
    }
  return {low[0], low[1]};
}

// int32 elements of the workspace that build_ordered_lists needs, and that holds its result.
template <typename Size = OrderedListsSize>
int64_t ordered_lists_workspace(int32_t n) {
  return 4 * int64_t(n) + int64_t(kMostDigits) * (tiles_of<Size>(n) + 1);
}

// ----------------------------------------------------------------------------------------------------------- kernels
// First place of the list that has place p; key is sorted.
__device__ __forceinline__ int32_t begin_of_list(const int32_t* key, int32_t p) {
  const int32_t k = key[p];
  int32_t low = 0, high = p;  // key[high] == k
  for (int64_t step = 1; low < high; step *= 2) {
    const int32_t probe = high > step ? int32_t(high - step) : 0;
    if (key[probe] != k) {
      low = probe + 1;
      break;
    }
    high = probe;
  }
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

// One grouping to be built, when its keys have been looked at.
struct Passes {
  int32_t n;
  Radix radix;
  int32_t* workspace;  // (4, n): keys and entries before and after a pass; the result goes to one of both

  __host__ __device__ int32_t* key(int pass) const { return workspace + int64_t(pass & 1) * n; }
  __host__ __device__ int32_t* entry(int pass) const { return workspace + int64_t(2 + (pass & 1)) * n; }
  __host__ __device__ int32_t* begin() const { return key(radix.passes); }
  __host__ __device__ OrderedLists lists() const {
    return {n, radix.num_keys, key(radix.passes - 1), entry(radix.passes - 1), begin()};
  }
  // Pass number `pass` if there is one, else one of no tiles.
  __host__ __device__ Sort<MovedKeys> sort(int pass, int32_t tiles, int32_t* counts, int32_t* totals) const {
    if (pass >= radix.passes) return {};
    return {{{key(pass - 1)}, entry(pass - 1)}, n, tiles, radix[pass], counts, totals, key(pass), entry(pass)};
  }
};

template <typename Keys>
struct Grouping : Passes {
  CheckedKeys<Keys> keys;
  // Pass 0, which looks at them itself.
  auto first_sort(int32_t tiles, int32_t* counts, int32_t* totals) const {
    return Sort<CheckedKeys<Keys>>{keys, n, tiles, radix[0], counts, totals, key(0), entry(0)};
  }
};

// One block per grouping does all of it: puts keys and entries where a pass before the first would have left them, and
// has one loop for all passes, for it is much code.
template <typename Size, typename A, typename B>
__global__ void __launch_bounds__(Size::kThreads) sort_in_block(Grouping<A> first, Grouping<B> second) {
  SIMT_SHARED(stage, MoveStage<Size>);
  const auto begin = [&](const auto& x) {
    for (int32_t first = threadIdx.x; first < x.n; first += kTile<Size>) {
      int32_t keys[Size::kSteps];
      x.keys.load(first, Size::kThreads, x.n, keys);
#pragma unroll
      for (int s = 0; s < Size::kSteps; ++s)
        if (const int32_t i = first + s * Size::kThreads; i < x.n) {
          x.key(-1)[i] = keys[s];
          x.entry(-1)[i] = i;
        }
    }
    return Passes(x);
  };
  const Passes x = blockIdx.x == 0 ? begin(first) : begin(second);
  for (int pass = 0; pass < x.radix.passes && x.n; ++pass) {
    __syncthreads();  // keys, entries; and the stage is free
    move_tile<Size, true>(x.sort(pass, 1, nullptr, nullptr), 0, stage);
  }
  __syncthreads();  // the result
  const OrderedLists lists = x.lists();
  for (int32_t p = threadIdx.x; p < x.n; p += Size::kThreads) x.begin()[p] = begin_of_list(lists.key, p);
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

// keys on the device: an array of int32 or int64, or a struct like GivenKeys. The lists will lie in `workspace`
// (ordered_lists_workspace(n) elements). A key outside [0, num_keys) is reported in `errors`, and its entry belongs to
// no list.
template <typename Keys>
Grouping<Keys> grouping(Keys keys, int32_t n, int32_t num_keys, int32_t* workspace, unsigned* errors) {
  return {{n, radix_of(num_keys), workspace}, {keys, num_keys, errors}};
}
template <typename Index>
Grouping<GivenKeys<Index>> grouping(const Index* keys, int32_t n, int32_t num_keys, int32_t* workspace,
                                    unsigned* errors) {
  return grouping(GivenKeys<Index>{keys}, n, num_keys, workspace, errors);
}

// Afterwards first.lists() and second.lists() are there.
template <typename Size = OrderedListsSize, typename A, typename B>
cudaError_t build_ordered_lists(const Grouping<A>& first, const Grouping<B>& second, cudaStream_t stream) {
  static_assert(Size::kThreads % 32 == 0);
  if (first.n == 0 && second.n == 0) return cudaSuccess;
  constexpr int kInBlock = kTile<Size> * Size::kBlockTiles;
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
  return build_ordered_lists<Size>(only, grouping(GivenKeys<int32_t>{}, 0, 1, nullptr, nullptr), stream);
}

}  // namespace fwpkm::kernels
