// Writing a chunk, the side of values: every row that was read takes one gradient step.
//
//   row(s) <- keep row(s) - lr clamp(gamma_s sum over the reads (x, r) of s of a[x, r] e[x])     gamma_s = kappa /
//   N_read(s)
//
// The reads of a slot are an ordered list (ordered_lists.cuh), summed as ordered_sums.cuh says. The new row goes in
// place, or into the log at the place of the slot's first read of the chunk; the log has one place per read, and those
// without a row are zeros (they must not show what the memory held before).
#pragma once
#include "kernels/ordered_sums.cuh"
#include "kernels/scan.cuh"

namespace fwpkm::kernels {

// kappa as the host knows it, or `by_mask`: H*R times the part of a memory's pairs that the mask keeps.
struct WriteScale {
  double constant;
  bool by_mask;
};

// The sum over a slot's reads of a e. Entry i is read i % (H*R) of token i / (H*R).
template <typename T>
struct ErrorTerms {
  const T *errors, *weights;  // (m, V), (m, H, R)
  const uint8_t* good;        // (m)
  uint32_t reads;
  int64_t width;
  __device__ const T* row(int32_t entry) const {
    const uint32_t t = uint32_t(entry) / reads;
    return good[t] ? errors + t * width : nullptr;
  }
  __device__ T factor(int32_t entry) const { return weights[entry]; }
};

// The step itself.
template <typename T>
struct NewRows {
  ScanView<T> view;
  Versions<T> versions;
  const int32_t* newest;  // (memories, S), or null in place
  int64_t writes;         // of this scan, with this one
  const T* gamma;         // by the place where a list begins
  T* to;                  // places of the chunk in the log, or the memory
  uint8_t* open;          // (places of the chunk, (V+7)/8), or null
  unsigned* error_word;

  __device__ bool wanted(const List&) const { return true; }
  struct Row {
    kernels::Row<T> old;
    int64_t at;
    T step;
  };
  __device__ Row row(const List& list) const {
    const int32_t place = newest ? newest[list.key] - 1 : -1;
    return {versions.row(list.key, place, writes, false), newest ? list.first : list.key, gamma[list.begin]};
  }
  template <bool kAligned>
  __device__ Pack<T> before(const Row& row, int64_t column, int64_t width) const {
    return load_pack<kAligned>(row.old.data, column, width);
  }
  template <bool kAligned>
  __device__ void put(const Row& row, int64_t column, int64_t width, bool inside, const Pack<T>& sum,
                      const Pack<T>& before) const {
    constexpr int kPack = Pack<T>::kSize;
    bool passes[kPack] = {}, finite = true;
    if (inside) {
      Pack<T> old = before, next;
      apply_decays(old, row.old.decays, view.keep);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        bool fits;
        next.v[j] = gradient_step(old.v[j], row.step * sum.v[j], view.lr, view.grad_clip, passes[j], fits);
        finite &= fits;
      }
      if (!finite) {
        report(error_word, kOverflow);
#pragma unroll
        for (int j = 0; j < kPack; ++j) next.v[j] = isfinite(old.v[j]) ? old.v[j] : before.v[j];
      }
      store_pack<kAligned>(to + row.at * width, column, width, next);
    }
    if (open) store_open_bits<T>(open + row.at * ((width + 7) / 8), column, inside, passes);
  }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// Adds the reads of the chunk's own tokens to counts[place where their list begins].
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    count_reads(OrderedLists lists, ScanView<T> view, Chunk chunk, int32_t* __restrict__ counts) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t p = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; p - lane < lists.n; p += step) {
    const bool in_list = p < lists.n && lists.key[p] != lists.num_keys;
    const int32_t begin = in_list ? lists.begin[p] : -1;
    const bool own = in_list && view.token(chunk, uint32_t(lists.entry[p]) / uint32_t(view.reads())).x >= chunk.own;
    const unsigned same = __match_any_sync(kFullWarp, begin), owned = __ballot_sync(kFullWarp, own) & same;
    if (in_list && !(same & ((1u << lane) - 1)) && owned) atomicAdd(&counts[begin], __popc(owned));
  }
}

// gamma of each list, at the place where it begins. counts: of count_reads, or null if all reads count. kept_pairs: of
// count_pairs, or null if kappa is `constant`.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    step_sizes(OrderedLists lists, ScanView<T> view, Chunk chunk, const int32_t* __restrict__ counts, double constant,
               const int32_t* __restrict__ kept_pairs, T* __restrict__ gamma) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t p = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; p < lists.n; p += step) {
    if (lists.begin[p] != p || lists.key[p] == lists.num_keys) continue;
    const int32_t count = counts ? counts[p] : end_of_list(lists, lists.key[p], int32_t(p)) - int32_t(p);
    double kappa = constant;
    if (kept_pairs) {
      const uint32_t memory = uint32_t(lists.key[p]) / uint32_t(view.num_slots);
      kappa = double(view.reads()) / double(view.pairs_of(chunk, memory)) * double(kept_pairs[memory]);
    }
    gamma[p] = T(kappa / double(count > 1 ? count : 1));
  }
}

// How many pairs of each memory the mask keeps.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) count_pairs(ScanView<T> view, Chunk chunk, int32_t* kept_pairs) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  int kept = 0;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < view.pairs(chunk); i += step) {
    const int64_t b = i / chunk.pairs;
    if (!view.mask[b * view.length + chunk.first + i % chunk.pairs]) continue;
    if (view.memories.of_row)
      atomicAdd(&kept_pairs[view.memories.of_row[b]], 1);
    else
      ++kept;
  }
  kept = inclusive_sum(kept, threadIdx.x % 32);
  if (threadIdx.x % 32 == 31 && kept) atomicAdd(kept_pairs, kept);
}

// After the rows: moves the pointers to them, and clears the places of the chunk that have none. One warp per place.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    publish_rows(OrderedLists lists, int32_t first_place, int64_t width, int32_t* __restrict__ newest,
                 int32_t* __restrict__ new_slots, T* __restrict__ log) {
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t p = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; p < lists.n; p += step) {
    const int32_t slot = lists.key[p], place = first_place + lists.entry[p];
    const bool has_row = slot != lists.num_keys && lists.begin[p] == p;
    if (lane == 0) {
      new_slots[place] = has_row ? slot : -1;
      if (has_row) {
        if (newest[slot]) new_slots[newest[slot] - 1] = -1;
        newest[slot] = place + 1;
      }
    }
    if (!has_row)
      for (int64_t c = lane; c < width; c += 32) log[place * width + c] = T(0);
  }
}

// The newest rows of the log, which is also that of `versions`, catch up with the writes since their own. One warp per
// place.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    finish_rows(ScanView<T> view, Versions<T> versions, int64_t places, int64_t writes,
                const int32_t* __restrict__ new_slots, T* log, unsigned* error_word) {
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), width = view.width;
  for (int64_t e = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; e < places; e += step) {
    if (new_slots[e] < 0) continue;
    const Row<T> row = versions.row(new_slots[e], int32_t(e), writes, false);
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
      T v = row.data[c];
      for (int64_t i = 0; i < row.decays; ++i) v *= view.keep;
      if (isfinite(v))
        log[e * width + c] = v;
      else
        report(error_word, kOverflow);
    }
  }
}

// p[0, n) *= keep: the one pass over all rows. An element that would overflow keeps its value.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) decay(T* __restrict__ p, int64_t n, T keep, unsigned* error_word) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < n; i += step) {
    const T v = p[i] * keep;
    if (isfinite(v))
      p[i] = v;
    else
      report(error_word, kOverflow);
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// gamma of every list of a chunk's reads. counts (n), kept_pairs (memories): workspace.
template <typename Size = LaunchSize, typename T>
cudaError_t list_step_sizes(const OrderedLists& lists, const ScanView<T>& view, const Chunk& chunk,
                            const WriteScale& scale, int32_t* counts, int32_t* kept_pairs, T* gamma,
                            cudaStream_t stream) {
  if (lists.n == 0) return cudaSuccess;
  const unsigned blocks = blocks_for<Size>(lists.n, Size::kThreads);
  if (!scale.by_mask) kept_pairs = nullptr;
  if (chunk.first == chunk.own) counts = nullptr;
  cudaError_t error = cudaSuccess;
  if (counts) error = fill<Size>(counts, lists.n, 0, stream);
  if (counts && error == cudaSuccess)
    error = simt::launch(count_reads<Size, T>, blocks, Size::kThreads, stream, lists, view, chunk, counts);
  if (kept_pairs && error == cudaSuccess) error = fill<Size>(kept_pairs, view.memories.count, 0, stream);
  if (kept_pairs && error == cudaSuccess)
    error = simt::launch(count_pairs<Size, T>, blocks_for<Size>(view.pairs(chunk), Size::kThreads), Size::kThreads,
                         stream, view, chunk, kept_pairs);
  if (error == cudaSuccess)
    error = simt::launch(step_sizes<Size, T>, blocks, Size::kThreads, stream, lists, view, chunk, counts,
                         scale.constant, kept_pairs, gamma);
  return error;
}

}  // namespace fwpkm::kernels
