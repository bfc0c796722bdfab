// Backward pass of a scan, the side of queries and sub-keys. Over the entries l of a chunk's lists:
//
//   theta_j = -lr open dK'_j     t_l = slope <theta, difference>     t~ = t - sum_list P t     u~ = u - sum_list P u
//   d mean_j = (omega / N_a) (sum of P t~ over the entries of j) u'_j       d P = (omega / N_a) t~ u~ + d mean / N_a
//   d sub = P (d P - sum_list P d P) + d(addressing loss) sigma_a + d z of the reads at this place
//   sigma = sigma_a + memory terms of the reads at this place,  sigma_a = omega P u~ / N_a
//   alpha = slope sigma     beta = slope (d sub + sigma t)  for idw,  d sub  for dot
//
//   d q += sum_list (beta (k - q) + alpha theta)                             idw
//   dK_j = keep dK'_j + sum (beta (q - k_j)) - (sum alpha) theta_j
//   d q += sum_list (beta k + alpha theta)                                   dot
//   dK_j = keep dK'_j + sum (beta q)
//
// slope, difference: write_keys.cuh; P, u, u' and the tables of (2, P): addressing.cuh. All that has theta is there
// only if the chunk moved the sub-keys and somebody gave their gradient. Tokens that were left out have no alpha and
// beta. Sums over a list: its entries, ascending by lane; then the lanes as in warp_sum.
#pragma once
#include "kernels/backward_queries.cuh"
#include "kernels/write_keys.cuh"

namespace fwpkm::kernels {

// The sums, for column_sums.
template <typename T>
struct AddToKeys {
  T* dsub_keys;
  const T* theta;
  const double* alpha;  // sums of alpha by sub-key; null: without theta

  __device__ bool wanted(const List&) const { return true; }
  using Row = int32_t;  // its number
  __device__ Row row(const List& list) const { return list.key; }
  template <bool kAligned>
  __device__ Pack<T> before(Row row, int64_t column, int64_t width) const {
    return load_pack<kAligned>(dsub_keys + row * width, column, width);
  }
  template <bool kAligned>
  __device__ void put(Row row, int64_t column, int64_t width, bool inside, Pack<T> sum, const Pack<T>& before) const {
    if (!inside) return;
    add(sum, before);
    if (alpha) add_product(sum, T(-alpha[row]), load_pack<kAligned>(theta + row * width, column, width));
    store_pack<kAligned>(dsub_keys + row * width, column, width, sum);
  }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// theta, and the decay of dK. One thread per element.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) through_steps(BackwardKeys<T> x) {
  const ScanView<T>& view = x.view;
  const int64_t half = view.half_width, n = view.key_rows() * half, open_bytes = (half + 7) / 8;
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < n; i += step) {
    const T gradient = x.dsub_keys[i];
    const bool passes = !x.open || open_bit(x.open + i / half * open_bytes, i % half);
    x.theta[i] = passes ? -view.lr * gradient : T(0);
    if (view.decays()) x.dsub_keys[i] = view.keep * gradient;
  }
}

// sum_list P t, by a warp.
template <typename T>
__device__ __forceinline__ T mean_direction(const BackwardKeys<T>& x, int64_t list) {
  const int64_t at = list * x.view.topk;
  T sum = 0;
  for (int64_t l = threadIdx.x % 32; l < x.view.topk; l += 32) sum = fma(x.p[at + l], x.directions[at + l], sum);
  return warp_sum(sum);
}

// P t~, into beta. One warp per list.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) centred_directions(BackwardKeys<T> x) {
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), topk = x.view.topk, lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const T mean = mean_direction(x, list);
    for (int64_t l = list * topk + threadIdx.x % 32; l < (list + 1) * topk; l += 32)
      x.beta[l] = x.p[l] * (x.directions[l] - mean);
  }
}

// alpha and beta. One warp per list. tables.extra: sums of P t~.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) key_factors(BackwardKeys<T> x) {
  const ScanView<T>& view = x.view;
  const bool addressed = x.addressed();
  const int32_t topk = int32_t(view.topk);
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const int64_t at = list * topk;
    if (x.left_out(list)) {
      for (int32_t l = threadIdx.x % 32; l < topk; l += 32) x.alpha[at + l] = x.beta[at + l] = 0;
      continue;
    }
    const int half = int(list % 2);
    const int64_t memory = view.memory(x.chunk, uint32_t(list) / uint32_t(2 * view.heads));
    const int64_t table = (2 * memory + half) * view.num_sub_keys, reads = list / 2 * topk;  // of the token and head
    const double rows = double(view.addressed_rows_of(x.chunk, memory)), factor = view.addressing_weight / rows;
    const T daddressing = x.daddressing ? x.daddressing[memory] : T(0);
    double mean_u = 0, mean_dp = 0;
    T mean_t = 0;
    const auto centred_u = [&](int32_t l) { return x.tables.slope[table + x.list_indices[at + l]] - mean_u; };
    const auto dp = [&](int32_t l) {
      const int64_t j = table + x.list_indices[at + l];
      return fma(factor * double(x.directions[at + l] - mean_t), centred_u(l),
                 x.tables.extra[j] * x.tables.curvature[j] / rows);
    };
    if (addressed) mean_u = mean_slope(x.p + at, x.list_indices + at, x.tables.slope + table, topk);
    if (addressed && x.through) {
      mean_t = mean_direction(x, list);
      for (int32_t l = threadIdx.x % 32; l < topk; l += 32) mean_dp = fma(double(x.p[at + l]), dp(l), mean_dp);
      mean_dp = warp_sum(mean_dp);
    }
    for (int32_t l = threadIdx.x % 32; l < topk; l += 32) {
      T sigma = 0, dsub = 0;
      if (addressed) {
        const double p = double(x.p[at + l]), sigma_a = factor * p * centred_u(l);
        sigma = T(sigma_a);
        dsub = T(fma(double(daddressing), sigma_a, x.through ? p * (dp(l) - mean_dp) : 0.0));
      }
      dsub += sum_at_place(x.places + reads, x.dscores + reads, topk, half, l);
      if (x.memory_terms) sigma += sum_at_place(x.places + reads, x.memory_terms + reads, topk, half, l);
      const T slope = view.idw ? 2 * exp(x.list_scores[at + l]) : T(1);
      if (view.idw && x.through) dsub = fma(sigma, x.directions[at + l], dsub);
      x.alpha[at + l] = slope * sigma;
      x.beta[at + l] = slope * dsub;
    }
  }
}

// sum: of alpha, by sub-key. One block per sub-key.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) sum_alpha(BackwardKeys<T> x) {
  SIMT_SHARED(partial, double[32]);
  for (int32_t key = blockIdx.x; key < x.lists.num_keys; key += gridDim.x) {
    const Places places = find_list(x.lists, key);
    double sum = 0;
    for (int64_t place = int64_t(places.begin) + threadIdx.x; place < places.end; place += Size::kThreads)
      sum += double(x.alpha[x.lists.entry[place]]);
    sum = block_sum(sum, &partial[0]);
    if (threadIdx.x == 0) x.sum[key] = sum;
    __syncthreads();  // before the next sum takes `partial`
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// `aligned`: rows_are_packs of query, dquery, sub_keys, dsub_keys, theta and scratch.

// theta and t, which the tokens need; only with `through`.
template <typename Size = LaunchSize, typename T>
cudaError_t key_directions(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  const int64_t elements = x.view.key_rows() * x.view.half_width;
  const cudaError_t error =
      simt::launch(through_steps<Size, T>, blocks_for<Size>(elements, Size::kThreads), Size::kThreads, stream, x);
  if (error != cudaSuccess || x.num_lists() == 0) return error;
  return launch_list_directions<Size>(x, aligned, stream);
}

// tables, if anything comes through the addressing loss; also P t~, kept in beta until then.
template <typename Size = LaunchSize, typename T>
cudaError_t key_addresses(const BackwardKeys<T>& x, cudaStream_t stream) {
  const int64_t lists = x.num_lists();
  if (lists == 0 || !x.addressed()) return cudaSuccess;
  cudaError_t error = cudaSuccess;
  if (x.through)
    error = simt::launch(centred_directions<Size, T>, blocks_for<Size>(lists, Size::kThreads / 32), Size::kThreads,
                         stream, x);
  if (error != cudaSuccess) return error;
  return address_chunk<Size>(x.view, x.chunk, x.lists, x.p, x.through ? x.beta : nullptr, x.tables, stream);
}

// d q and dK, after the tokens and key_addresses.
template <typename Size = LaunchSize, typename T>
cudaError_t key_gradients(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  const ScanView<T>& view = x.view;
  const int64_t lists = x.num_lists();
  if (lists == 0) return cudaSuccess;
  cudaError_t error =
      simt::launch(key_factors<Size, T>, blocks_for<Size>(lists, Size::kThreads / 32), Size::kThreads, stream, x);
  if (error == cudaSuccess) error = launch_add_to_query<Size>(x, aligned, stream);
  const bool pulled = view.idw && x.through;
  if (pulled && error == cudaSuccess)
    error = simt::launch(sum_alpha<Size, T>, blocks_for<Size>(x.lists.num_keys, 1), Size::kThreads, stream, x);
  if (error != cudaSuccess) return error;
  const AddToKeys<T> output{x.dsub_keys, x.theta, pulled ? x.sum : nullptr};
  const auto sums = [&](const auto& terms) {
    return sums_by_key<Size>(view, x.lists, terms, output, x.scratch, aligned, stream);
  };
  return view.idw ? sums(QueryTerms<T, true>{view, x.chunk, x.beta, x.sub_keys})
                  : sums(QueryTerms<T, false>{view, x.chunk, x.beta, x.sub_keys});
}

}  // namespace fwpkm::kernels
