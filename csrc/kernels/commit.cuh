// commit_: the newest rows of a scan become part of the memory.
//
//   values[new_slots[e]] <- new_rows[e] where new_slots[e] is a slot; every other row decays by keep, `writes` times
//
// A row that is not finite is not written, an element that would overflow by its decay keeps its value, of two rows of
// one slot the last is taken; all that is reported, as is a slot out of range.
#pragma once
#include "kernels/errors.cuh"
#include "kernels/warp.cuh"

namespace fwpkm::kernels {

// owner (S), zeros: of every slot whose row will be replaced, the number of the place that does, from 1 on. One thread
// per place.
template <typename Size>
__global__ void __launch_bounds__(Size::kThreads)
    mark_slots(const int32_t* __restrict__ new_slots, int64_t places, int64_t num_slots, int32_t* __restrict__ owner) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t e = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; e < places; e += step) {
    const int32_t slot = new_slots[e];
    if (slot >= 0 && slot < num_slots) atomicMax(&owner[slot], int32_t(e) + 1);
  }
}

// The one pass over all rows. One warp per row.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    decay_others(T* __restrict__ values, int64_t num_slots, int64_t width, T keep, int64_t writes,
                 const int32_t* __restrict__ owner, unsigned* error_word) {
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t s = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; s < num_slots; s += step) {
    if (owner[s]) continue;
    for (int64_t c = threadIdx.x % 32; c < width; c += 32) {
      T v = values[s * width + c];
      for (int64_t i = 0; i < writes; ++i) v *= keep;
      if (isfinite(v))
        values[s * width + c] = v;
      else
        report(error_word, kOverflow);
    }
  }
}

// One warp per place.
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    copy_rows(const T* __restrict__ new_rows, const int32_t* __restrict__ new_slots, int64_t places, int64_t num_slots,
              int64_t width, const int32_t* __restrict__ owner, T* __restrict__ values, unsigned* error_word) {
  constexpr int kPack = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t e = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; e < places; e += step) {
    const int32_t slot = new_slots[e];
    if (slot < 0 || slot >= num_slots) {
      if (slot != -1 && lane == 0) report(error_word, kIndexOutOfRange);
      continue;
    }
    if (owner[slot] != e + 1) {
      if (lane == 0) report(error_word, kWrittenTwice);
      continue;
    }
    const T* const row = new_rows + e * width;
    bool finite = true;
    for (int64_t column = lane * kPack; column < width; column += 32 * kPack) {
      const Pack<T> pack = load_pack<kAligned>(row, column, width);
#pragma unroll
      for (int j = 0; j < kPack; ++j) finite &= isfinite(pack.v[j]);
    }
    if (__ballot_sync(kFullWarp, !finite)) {
      if (lane == 0) report(error_word, kNotFinite);
      continue;
    }
    for (int64_t column = lane * kPack; column < width; column += 32 * kPack)
      store_pack<kAligned>(values + slot * width, column, width, load_pack<kAligned>(row, column, width));
  }
}

// to[0, n) = from[0, n), but for elements that are not finite.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    copy_finite(const T* __restrict__ from, int64_t n, T* __restrict__ to, unsigned* error_word) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < n; i += step)
    if (isfinite(from[i]))
      to[i] = from[i];
    else
      report(error_word, kNotFinite);
}

// ------------------------------------------------------------------------------------------------------------ launch
// owner: workspace (S); places below 2^31.
template <typename Size = LaunchSize, typename T>
cudaError_t commit_rows(T* values, int64_t num_slots, int64_t width, const T* new_rows, const int32_t* new_slots,
                        int64_t places, T keep, int64_t writes, int32_t* owner, unsigned* error_word,
                        cudaStream_t stream) {
  constexpr int kWarps = Size::kThreads / 32;
  cudaError_t error = fill<Size>(owner, num_slots, 0, stream);
  if (error == cudaSuccess && places)
    error = simt::launch(mark_slots<Size>, blocks_for<Size>(places, Size::kThreads), Size::kThreads, stream, new_slots,
                         places, num_slots, owner);
  if (keep != 1 && writes > 0 && error == cudaSuccess)
    error = simt::launch(decay_others<Size, T>, blocks_for<Size>(num_slots, kWarps), Size::kThreads, stream, values,
                         num_slots, width, keep, writes, owner, error_word);
  if (error != cudaSuccess || places == 0) return error;
  const auto kernel = rows_are_packs<T>(width, values, new_rows) ? copy_rows<Size, true, T> : copy_rows<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(places, kWarps), Size::kThreads, stream, new_rows, new_slots, places,
                      num_slots, width, owner, values, error_word);
}

template <typename Size = LaunchSize, typename T>
cudaError_t copy_keys(const T* from, int64_t n, T* to, unsigned* error_word, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return simt::launch(copy_finite<Size, T>, blocks_for<Size>(n, Size::kThreads), Size::kThreads, stream, from, n, to,
                      error_word);
}

}  // namespace fwpkm::kernels
