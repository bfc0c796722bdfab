// The addressing loss of one chunk over its lists (m, H, 2, R).
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
#include "kernels/ordered_lists.cuh"
#include "kernels/scan.cuh"

namespace fwpkm::kernels {

constexpr double kLogFloor = 1e-8;

// Of some entries, kept[s] becomes -1 where their tokens take part in nothing, for one of a token's (token, head) is
// bad: its slots are -1, with which the search left them. To be asked while read_chunk gives -1 to the token's other
// heads, which changes nothing here.
template <int kSteps>
__device__ __forceinline__ void leave_out(const int32_t* slots, uint32_t heads, uint32_t topk,
                                          const uint32_t (&tokens)[kSteps], int32_t (&kept)[kSteps]) {
#pragma unroll 1
  for (uint32_t h = 0; h < heads; ++h) {
    int32_t of_head[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) of_head[s] = slots[(tokens[s] * heads + h) * topk];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) kept[s] |= of_head[s] >> 31;  // negative: all bits, -1
  }
}

// Slot of each read, as keys of a grouping.
struct ReadKeys {
  using Key = int32_t;
  const int32_t* slots;  // (m, H, R)
  uint32_t heads, topk;
  template <int kSteps>
  __device__ void load(int64_t first, int stride, int32_t n, int32_t (&key)[kSteps]) const {
    uint32_t tokens[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t i = first + s * stride;
      tokens[s] = i < n ? uint32_t(i) / (heads * topk) : 0;
      key[s] = i < n ? slots[i] : -1;
    }
    if (heads > 1) leave_out(slots, heads, topk, tokens, key);  // of one head, these are its slots
  }
};

// Row in (memories, H, 2, P) of each entry, as keys of a grouping.
template <typename T>
struct EntryKeys {
  using Key = int32_t;
  ScanView<T> view;
  Chunk chunk;
  const int32_t *list_indices, *slots;  // (m, H, 2, R), (m, H, R)
  template <int kSteps>
  __device__ void load(int64_t first, int stride, int32_t n, int32_t (&key)[kSteps]) const {
    const uint32_t heads = uint32_t(view.heads), topk = uint32_t(view.topk);
    uint32_t tokens[kSteps];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int64_t l = first + s * stride;
      tokens[s] = l < n ? uint32_t(l) / (2 * heads * topk) : 0;
      key[s] = l < n ? list_indices[l] : -1;
    }
    leave_out(slots, heads, topk, tokens, key);
#pragma unroll
    for (int s = 0; s < kSteps; ++s)
      if (key[s] >= 0) key[s] = int32_t(view.key_row(chunk, first + s * stride, key[s]));
  }
};

// P of one list, by a warp; 0 if it does not count. scores: of its entries, falling.
template <typename T>
__device__ __forceinline__ void address_weights(const T* scores, int64_t topk, bool counts, T* p) {
  const int lane = threadIdx.x % 32;
  T sum = 0;
  for (int64_t l = lane; l < topk && counts; l += 32) sum += exp(scores[l] - scores[0]);
  sum = warp_sum(sum);
  for (int64_t l = lane; l < topk; l += 32) p[l] = counts ? exp(scores[l] - scores[0]) / sum : T(0);
}

// Of (memories, 2, P) each; curvature and extra may be null.
struct AddressTables {
  double *mean, *slope, *curvature;
  double* extra;  // (omega / N_a) times the sum of other numbers of the entries
};

// ------------------------------------------------------------------------------------------------------------ kernel
// p, extra: (m, H, 2, R); extra goes with its table. One block per sub-key of a half. 4 blocks: left alone, ptxas
// spills to make room for more.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads, 4)
    sum_addresses(ScanView<T> view, Chunk chunk, OrderedLists lists, const T* __restrict__ p,
                  const T* __restrict__ extra, AddressTables tables) {
  SIMT_SHARED(partial, double[2][32]);
  const int32_t table = int32_t(2 * view.num_sub_keys), keys = int32_t(view.key_rows_of_memory());
  for (int32_t i = blockIdx.x; i < int32_t(view.table_size()); i += gridDim.x) {
    const int32_t memory = i / table, first_key = memory * keys;
    double sum = 0, extra_sum = 0;
    for (int32_t key = first_key + i % table; key < first_key + keys; key += table) {
      const Places places = find_list(lists, key);
      for (int64_t place = int64_t(places.begin) + threadIdx.x; place < places.end; place += Size::kThreads) {
        const int32_t entry = lists.entry[place];
        sum += double(p[entry]);
        if (extra) extra_sum += double(extra[entry]);
      }
    }
    sum = block_sum(sum, &partial[0][0]);
    if (extra) extra_sum = block_sum(extra_sum, &partial[1][0]);
    if (threadIdx.x == 0) {
      const int64_t rows = view.addressed_rows_of(chunk, memory);
      const double mean = (rows ? 1 / double(rows) : 0.0) * sum, floored = mean + kLogFloor;
      tables.mean[i] = mean;
      tables.slope[i] = log(floored) + mean / floored;
      if (tables.curvature) tables.curvature[i] = 1 / floored + kLogFloor / (floored * floored);
      if (extra) tables.extra[i] = (rows ? view.addressing_weight / double(rows) : 0.0) * extra_sum;
    }
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

// The loss of one memory, by a block. mean: (2, P). partial: one element per warp.
template <typename Size, typename T>
__device__ __forceinline__ T addressing_loss(const ScanView<T>& view, const double* mean, double* partial) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < 2 * view.num_sub_keys; i += Size::kThreads)
    sum = fma(mean[i], log(mean[i] + kLogFloor), sum);
  return T(view.addressing_weight * block_sum(sum, partial));
}

// ------------------------------------------------------------------------------------------------------------ launch
// lists: of the chunk's entries.
template <typename Size = LaunchSize, typename T>
cudaError_t address_chunk(const ScanView<T>& view, const Chunk& chunk, const OrderedLists& lists, const T* p,
                          const T* extra, const AddressTables& tables, cudaStream_t stream) {
  return simt::launch(sum_addresses<Size, T>, blocks_for<Size>(view.table_size(), 1), Size::kThreads, stream, view,
                      chunk, lists, p, extra, tables);
}

}  // namespace fwpkm::kernels
