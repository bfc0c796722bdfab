// The addressing loss of one chunk over its lists (m, H, 2, R), and sums of numbers over the lists' entries.
//
//   P = softmax over the R scores of a list
//   mean[p, j] = (1 / N_a) sum of P over the entries of sub-key j, all heads
//   loss = omega sum mean ln(mean + floor)
//   slope u = ln(mean + floor) + mean / (mean + floor), and its derivative
//   sigma = d(loss) / d(score) = omega P (u - sum_l P u) / N_a
//
// Each memory has its own. Tables of (memories, 2, P) are float64: 1 / mean may reach 1e8. Entries of a sub-key,
// (memory, h, p, j), are an ordered list; tokens that do not count have P = 0, those that were left out have no entries
// (index -1).
#pragma once
#include "kernels/ordered_sums.cuh"
#include "kernels/scan.cuh"

namespace fwpkm::kernels {

constexpr double kLogFloor = 1e-8;

// Row in (memories, H, 2, P) of each entry, as keys of a grouping.
template <typename T>
struct EntryKeys {
  ScanView<T> view;
  Chunk chunk;
  const int32_t* list_indices;  // (m, H, 2, R)
  __device__ int32_t operator[](int64_t l) const {
    const int32_t j = list_indices[l];
    return j < 0 ? -1 : int32_t(view.key_row(chunk, l, j));
  }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// One warp per list.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    address_weights(ScanView<T> view, Chunk chunk, const int32_t* __restrict__ list_indices,
                    const T* __restrict__ list_scores, T* __restrict__ p) {
  const int lane = threadIdx.x % 32;
  const int64_t topk = view.topk, lists = view.tokens(chunk) * view.heads * 2;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const bool counts =
        list_indices[list * topk] >= 0 && view.addressed(chunk, view.token(chunk, list / (2 * view.heads)));
    const T *s = list_scores + list * topk, top = s[0];  // scores fall
    T sum = 0;
    for (int64_t l = lane; l < topk; l += 32) sum += exp(s[l] - top);
    sum = warp_sum(sum);
    for (int64_t l = lane; l < topk; l += 32) p[list * topk + l] = counts ? exp(s[l] - top) / sum : T(0);
  }
}

// Sums of x over lists. by_half: out (memories, 2, P), of the sub-keys of all heads, times factor / N_a; else
// (memories, H, 2, P), of every sub-key, times factor. One block per sum.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    sum_entries(ScanView<T> view, Chunk chunk, OrderedLists lists, const T* __restrict__ x, bool by_half, double factor,
                double* __restrict__ out) {
  SIMT_SHARED(partial, double[32]);
  const int32_t keys = int32_t(view.key_rows_of_memory()), apart = by_half ? int32_t(2 * view.num_sub_keys) : keys;
  for (int32_t i = blockIdx.x; i < int32_t(view.memories.count) * apart; i += gridDim.x) {
    const int32_t memory = i / apart, first_key = memory * keys;
    const int64_t rows = by_half ? view.addressed_rows_of(chunk, memory) : 1;
    double sum = 0;
    for (int32_t key = first_key + i % apart; key < first_key + keys; key += apart) {
      const int32_t begin = end_of_list(lists, key - 1, 0), end = end_of_list(lists, key, begin);
      for (int64_t place = int64_t(begin) + threadIdx.x; place < end; place += Size::kThreads)
        sum += double(x[lists.entry[place]]);
    }
    sum = block_sum(sum, &partial[0]);
    if (threadIdx.x == 0) out[i] = (rows ? factor / double(rows) : 0.0) * sum;
    __syncthreads();  // before the next sum takes `partial`
  }
}

// One block per memory. slope and curvature (memories, 2, P), loss (memories); curvature and loss may be null.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    address_slopes(ScanView<T> view, const double* __restrict__ mean, double* __restrict__ slope,
                   double* __restrict__ curvature, T* loss) {
  SIMT_SHARED(partial, double[32]);
  const int64_t table = 2 * view.num_sub_keys;
  for (int64_t memory = blockIdx.x; memory < view.memories.count; memory += gridDim.x) {
    double sum = 0;
    for (int64_t i = memory * table + threadIdx.x; i < (memory + 1) * table; i += Size::kThreads) {
      const double x = mean[i], floored = x + kLogFloor, logarithm = log(floored);
      slope[i] = logarithm + x / floored;
      if (curvature) curvature[i] = 1 / floored + kLogFloor / (floored * floored);
      sum = fma(x, logarithm, sum);
    }
    sum = block_sum(sum, &partial[0]);
    if (loss && threadIdx.x == 0) loss[memory] = T(view.addressing_weight * sum);
    __syncthreads();  // before the next sum takes `partial`
  }
}

// sum_l P_l u_l of one list, by a warp. table: of its memory and half.
template <typename T>
__device__ __forceinline__ double mean_slope(const T* p, const int32_t* list_indices, const double* table,
                                             int64_t topk) {
  double sum = 0;
  for (int64_t l = threadIdx.x % 32; l < topk; l += 32) sum = fma(double(p[l]), table[list_indices[l]], sum);
  return warp_sum(sum);
}

// Sum of x over the reads of a (token, head), R of them, that took list place l of half `half`; in turn.
template <typename T>
__device__ __forceinline__ T sum_at_place(const int32_t* places, const T* x, int32_t topk, int half, int32_t l) {
  T sum = 0;
  for (int32_t r = 0; r < topk; ++r)
    if ((half == 0 ? places[r] / topk : places[r] % topk) == l) sum += x[r];
  return sum;
}

// ------------------------------------------------------------------------------------------------------------ launch
// P (m, H, 2, R), mean, slope and curvature (memories, 2, P) and losses (memories) of a chunk; curvature and loss may
// be null. lists: of the entries.
template <typename Size = LaunchSize, typename T>
cudaError_t address_chunk(const ScanView<T>& view, const Chunk& chunk, const OrderedLists& lists,
                          const int32_t* list_indices, const T* list_scores, T* p, double* mean, double* slope,
                          double* curvature, T* loss, cudaStream_t stream) {
  const int64_t n = view.tokens(chunk) * view.heads * 2;
  cudaError_t error = cudaSuccess;
  if (n)
    error = simt::launch(address_weights<Size, T>, blocks_for<Size>(n, Size::kThreads / 32), Size::kThreads, stream,
                         view, chunk, list_indices, list_scores, p);
  if (error == cudaSuccess)
    error = simt::launch(sum_entries<Size, T>, blocks_for<Size>(view.table_size(), 1), Size::kThreads, stream, view,
                         chunk, lists, p, true, 1.0, mean);
  if (error == cudaSuccess)
    error = simt::launch(address_slopes<Size, T>, blocks_for<Size>(view.memories.count, 1), Size::kThreads, stream,
                         view, mean, slope, curvature, loss);
  return error;
}

}  // namespace fwpkm::kernels
