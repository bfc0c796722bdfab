// The derivatives of product-key search, on plain pointers. A score of a half is <q, k> or, with `idw`,
// -log(eps + |q - k|^2), and the score of a slot is the sum of those of its two sub-keys:
//
//   beta[t,h,p,r] = dscores[t,h,r],  or 2 dscores[t,h,r] / (eps + |q - k|^2)
//   dquery[t,h,p]    = sum over r of beta * k,  or beta * (k - q)
//   dsub_keys[h,p,j] = sum over the reads of sub-key j of beta * q,  or beta * (q - k)
//
// Orders of summation; none depends on N, on the launch or on addresses:
//   |q - k|^2   16 bytes of a row at a time go to the 32 lanes in turn; each lane adds its squares in ascending order
//   of
//               columns, from zero, by fused multiply-add; then the lanes are added as a tree (warp_sum).
//   dquery      r ascending, from zero, one fused multiply-add each.
//   dsub_keys   the reads of a sub-key in ascending order of t and r, as ordered_sums.cuh says (by
//               column_sums.cuh).
//
// A slot outside [0, P*P) is reported in `errors` and nothing is read there; dquery of its token and head is NaN, and
// dsub_keys leaves the read out.
#pragma once
#include "kernels/column_sums.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------ dquery
// One warp per token, head and half. keys and betas (N, H, 2, R) are for dsub_keys: the row of sub_keys that was read,
// or -1, and beta.
template <typename Size, bool kIdw, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads, 4)
    through_scores(const T* __restrict__ dscores, const T* __restrict__ query, const T* __restrict__ sub_keys,
                   const int32_t* __restrict__ slots, int64_t tokens, int64_t heads, int32_t num_sub_keys, int32_t topk,
                   int64_t width, T eps, int32_t* keys, T* betas, T* __restrict__ dquery, unsigned* errors) {
  constexpr int kInFlight = 4;  // rows on their way at once
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32);
  for (int64_t n = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; n < 2 * tokens * heads; n += step) {
    const int64_t token_head = n / 2, first_key = n % (2 * heads) * num_sub_keys;
    const T* const q = query + n * width;
    int32_t* const key = keys + n * topk;
    T* const beta = betas + n * topk;

    for (int32_t first = 0; first < topk; first += 32) {
      const bool mine = first + lane < topk;
      const int64_t at = token_head * topk + first + lane;
      const int32_t slot = mine ? slots[at] : 0;
      const bool valid = slot >= 0 && slot < num_sub_keys * num_sub_keys;
      if (!valid && n % 2 == 0) report(errors, kIndexOutOfRange);
      const int32_t sub_key = n % 2 == 0 ? slot / num_sub_keys : slot % num_sub_keys;
      const int32_t row = valid ? int32_t(first_key + sub_key) : -1;
      T factor = mine ? dscores[at] : T(0);
      if constexpr (kIdw) {
        const int32_t count = topk - first < 32 ? topk - first : 32;
        T squares = 0;
#pragma unroll 2
        for (int r = 0; r < count; ++r) {
          const int32_t its_row = __shfl_sync(kFullWarp, row, r);
          T sum = 0;
          for (int64_t column = lane * Pack<T>::kSize; column < width && its_row >= 0; column += 32 * Pack<T>::kSize) {
            Pack<T> difference = load_pack<kAligned>(q, column, width);
            subtract(difference, load_pack<kAligned>(sub_keys + its_row * width, column, width));
#pragma unroll
            for (int j = 0; j < Pack<T>::kSize; ++j) sum = fma(difference.v[j], difference.v[j], sum);
          }
          sum = warp_sum(sum);
          if (r == lane) squares = sum;
        }
        factor = 2 * factor / (eps + squares);
      }
      if (mine) {
        key[first + lane] = row;
        beta[first + lane] = factor;
      }
    }
    __syncwarp();  // the other lanes' rows and betas

    for (int64_t column = lane * Pack<T>::kSize; column < width; column += 32 * Pack<T>::kSize) {
      [[maybe_unused]] Pack<T> minus;
      if constexpr (kIdw) minus = load_pack<kAligned>(q, column, width);
      Pack<T> sum = filled_pack(T(0));
      for (int32_t first = 0; first < topk; first += kInFlight) {
        Pack<T> packs[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int32_t row = first + j < topk ? key[first + j] : -1;
          packs[j] = row >= 0 ? load_pack<kAligned>(sub_keys + row * width, column, width) : filled_pack(T(NAN));
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (first + j >= topk) continue;
          if constexpr (kIdw) subtract(packs[j], minus);
          add_product(sum, beta[first + j], packs[j]);
        }
      }
      store_pack<kAligned>(dquery + n * width, column, width, sum);
    }
  }
}

// --------------------------------------------------------------------------------------------------------- dsub_keys
// Entry of the lists: (t, h, p, r), numbered in this order.
template <typename T>
struct DotTerms {
  const T *query, *betas;
  uint32_t topk;
  int64_t width;
  __device__ const T* row(int32_t entry) const { return query + uint32_t(entry) / topk * width; }
  __device__ const T* row_of_list(uint32_t list) const { return query + list * width; }
  __device__ T factor(int32_t entry) const { return betas[entry]; }
};

template <typename T>
struct IdwTerms : DotTerms<T> {
  static constexpr bool kMinus = true;
  const T* sub_keys;
  __device__ const T* minus(int32_t key) const { return sub_keys + key * this->width; }
};

// ------------------------------------------------------------------------------------------------------------ launch
// dscores and slots (N, H, R), query and dquery (N, H, 2, K/2), sub_keys and dsub_keys (H, 2, P, K/2); all contiguous.
// dsub_keys comes as zeros; only the rows of sub-keys that were read are written. With n = N * H * 2 * R below 2^31:
// keys and betas have n elements, workspace ordered_lists_workspace(n), scratch column_sums_scratch(n, 2H, K/2).
template <typename Sorting = OrderedListsSize, typename Size = LaunchSize, typename T>
cudaError_t product_key_topk_backward(const T* dscores, const T* query, const T* sub_keys, const int32_t* slots,
                                      int64_t tokens, int64_t heads, int64_t num_sub_keys, int64_t topk,
                                      int64_t half_width, bool idw, T eps, int32_t* keys, T* betas, int32_t* workspace,
                                      T* scratch, T* dquery, T* dsub_keys, unsigned* errors, cudaStream_t stream) {
  if (tokens == 0) return cudaSuccess;
  const bool aligned = rows_are_packs<T>(half_width, query, sub_keys, dquery, dsub_keys, scratch);
  const auto kernel = idw       ? aligned ? through_scores<Size, true, true, T> : through_scores<Size, true, false, T>
                      : aligned ? through_scores<Size, false, true, T>
                                : through_scores<Size, false, false, T>;
  cudaError_t error = simt::launch(kernel, blocks_for<Size>(2 * tokens * heads, Size::kThreads / 32), Size::kThreads,
                                   stream, dscores, query, sub_keys, slots, tokens, heads, int32_t(num_sub_keys),
                                   int32_t(topk), half_width, eps, keys, betas, dquery, errors);
  const auto by_key = grouping(static_cast<const int32_t*>(keys), int32_t(2 * tokens * heads * topk),
                               int32_t(2 * heads * num_sub_keys), workspace, errors);
  if (error == cudaSuccess) error = build_ordered_lists<Sorting>(by_key, stream);
  if (error != cudaSuccess) return error;
  const OrderedLists lists = by_key.lists();
  const DotTerms<T> dot{query, betas, uint32_t(topk), half_width};
  const StoreRows<T> output{dsub_keys, half_width};
  const auto sums = [&](const auto& terms) {
    return column_sums<Size>(lists, terms, output, 2 * heads, topk, half_width, scratch, aligned, stream);
  };
  return idw ? sums(IdwTerms<T>{dot, sub_keys}) : sums(dot);
}

}  // namespace fwpkm::kernels
