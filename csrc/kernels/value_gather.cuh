// value_gather and its two derivatives, on plain pointers.
//
//   out[t]        = sum over r of weights[t, r] * values[indices[t, r]]
//   dweights[t,r] = <dout[t], values[indices[t, r]]>
//   dvalues[s]    = sum over the reads (t, r) of slot s of weights[t, r] * dout[t]
//
// values (S, V), indices and weights (N, R), out and dout (N, V), dvalues (S, V); all contiguous. T is float or double,
// Index int32_t or int64_t as the caller has them: an index is compared with S before it is used.
//
// Orders of summation; none depends on N, on the launch or on addresses:
//   out       r ascending, from zero, one fused multiply-add each.
//   dweights  16 bytes of a row at a time go to the 32 lanes in turn; each lane adds its products in ascending order of
//             columns, from zero, by fused multiply-add; then the lanes are added as a tree (warp_sum).
//   dvalues   the reads of a slot in ascending order of t * R + r, as ordered_sums.cuh says.
//
// An index outside [0, S) is reported in `errors`, nothing is read or written there, and it makes NaN: of out[t], of
// dweights[t, r]; dvalues leaves the read out.
#pragma once
#include "kernels/ordered_sums.cuh"

namespace fwpkm::kernels {

// --------------------------------------------------------------------------------------------------------------- out
// One thread per 16 bytes of an output row: the warps of a row stand side by side in the block (row_block).
template <typename Size, bool kAligned, typename T, typename Index>
__global__ void __launch_bounds__(Size::kThreads)
    gather(const T* __restrict__ values, const Index* __restrict__ indices, const T* __restrict__ weights,
           int64_t tokens, int64_t reads, int64_t num_slots, int64_t width, T* __restrict__ out, unsigned* errors) {
  constexpr int kInFlight = 8;  // rows on their way at once
  const int64_t step = int64_t(gridDim.x) * blockDim.z;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.z + threadIdx.z; t < tokens; t += step) {
    const Index* const index = indices + t * reads;
    const T* const weight = weights + t * reads;
    for (int64_t column = int64_t(threadIdx.y * 32 + threadIdx.x) * Pack<T>::kSize; column < width;
         column += int64_t(blockDim.y) * 32 * Pack<T>::kSize) {
      const auto row = [&](int64_t r) {
        const Index slot = index[r];
        if (slot >= 0 && slot < num_slots) return load_pack<kAligned>(values + int64_t(slot) * width, column, width);
        if (column == 0) report(errors, kIndexOutOfRange);
        return filled_pack(T(NAN));
      };
      Pack<T> sum = filled_pack(T(0));
      int64_t r = 0;
      for (; r + kInFlight <= reads; r += kInFlight) {
        Pack<T> packs[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) packs[j] = row(r + j);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) add_product(sum, weight[r + j], packs[j]);
      }
      for (; r < reads; ++r) add_product(sum, weight[r], row(r));
      store_pack<kAligned>(out + t * width, column, width, sum);
    }
  }
}

template <typename Size = LaunchSize, typename T, typename Index>
cudaError_t value_gather(const T* values, const Index* indices, const T* weights, int64_t tokens, int64_t reads,
                         int64_t num_slots, int64_t width, T* out, unsigned* errors, cudaStream_t stream) {
  if (tokens == 0 || width == 0) return cudaSuccess;
  const dim3 block = row_block<T, Size>(width);
  const auto kernel =
      rows_are_packs<T>(width, values, out) ? gather<Size, true, T, Index> : gather<Size, false, T, Index>;
  return simt::launch(kernel, blocks_for<Size>(tokens, block.z), block, stream, values, indices, weights, tokens, reads,
                      num_slots, width, out, errors);
}

// ---------------------------------------------------------------------------------------------------------- dweights
// One warp per read; threadIdx.y counts reads of a token, threadIdx.z tokens.
template <typename Size, bool kAligned, typename T, typename Index>
__global__ void __launch_bounds__(Size::kThreads)
    read_dots(const T* __restrict__ dout, const T* __restrict__ values, const Index* __restrict__ indices,
              int64_t tokens, int64_t reads, int64_t num_slots, int64_t width, T* __restrict__ dweights,
              unsigned* errors) {
  const int lane = threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.z;
  for (int64_t t = int64_t(blockIdx.x) * blockDim.z + threadIdx.z; t < tokens; t += step)
    for (int64_t r = threadIdx.y; r < reads; r += blockDim.y) {
      const Index slot = indices[t * reads + r];
      T dot = T(NAN);
      if (slot >= 0 && slot < num_slots) {
        const T *const row = values + int64_t(slot) * width, *const d = dout + t * width;
        T sum = 0;
#pragma unroll 4
        for (int64_t column = lane * Pack<T>::kSize; column < width; column += 32 * Pack<T>::kSize) {
          const Pack<T> a = load_pack<kAligned>(d, column, width), b = load_pack<kAligned>(row, column, width);
#pragma unroll
          for (int j = 0; j < Pack<T>::kSize; ++j) sum = fma(a.v[j], b.v[j], sum);
        }
        dot = warp_sum(sum);
      } else if (lane == 0) {
        report(errors, kIndexOutOfRange);
      }
      if (lane == 0) dweights[t * reads + r] = dot;
    }
}

template <typename Size = LaunchSize, typename T, typename Index>
cudaError_t value_gather_dweights(const T* dout, const T* values, const Index* indices, int64_t tokens, int64_t reads,
                                  int64_t num_slots, int64_t width, T* dweights, unsigned* errors,
                                  cudaStream_t stream) {
  if (tokens == 0 || reads == 0) return cudaSuccess;
  constexpr unsigned kWarps = Size::kThreads / 32;
  unsigned y = 1;
  while (y < reads && y < kWarps) y *= 2;
  const dim3 block(32, y, kWarps / y);
  const auto kernel =
      rows_are_packs<T>(width, values, dout) ? read_dots<Size, true, T, Index> : read_dots<Size, false, T, Index>;
  return simt::launch(kernel, blocks_for<Size>(tokens, block.z), block, stream, dout, values, indices, tokens, reads,
                      num_slots, width, dweights, errors);
}

// ----------------------------------------------------------------------------------------------------------- dvalues
// Entry i of the lists is read i % R of token i / R.
template <typename T>
struct ReadTerms {
  const T *rows, *weights;  // dout, weights
  uint32_t reads;
  int64_t width;
  __device__ const T* row(int32_t entry) const { return rows + int64_t(uint32_t(entry) / reads) * width; }
  __device__ T factor(int32_t entry) const { return weights[entry]; }
};

// dvalues comes as zeros; only the rows of slots that are read are written. N * R and S are below 2^31.
// workspace: ordered_lists_workspace(N * R) elements; scratch: ordered_sums_scratch(N * R, V) elements.
template <typename Sorting = OrderedListsSize, typename Size = LaunchSize, typename T, typename Index>
cudaError_t value_gather_dvalues(const T* dout, const Index* indices, const T* weights, int64_t tokens, int64_t reads,
                                 int64_t num_slots, int64_t width, int32_t* workspace, T* scratch, T* dvalues,
                                 unsigned* errors, cudaStream_t stream) {
  if (tokens == 0 || reads == 0) return cudaSuccess;
  const auto by_slot = grouping(indices, int32_t(tokens * reads), int32_t(num_slots), workspace, errors);
  const cudaError_t error = build_ordered_lists<Sorting>(by_slot, stream);
  if (error != cudaSuccess) return error;
  return ordered_sums<Size>(by_slot.lists(), ReadTerms<T>{dout, weights, uint32_t(reads), width},
                            StoreRows<T>{dvalues, width}, width, scratch,
                            rows_are_packs<T>(width, dout, dvalues, scratch), stream);
}

}  // namespace fwpkm::kernels
