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
// beta. Sums over a list: its entries, or a lane's packs, ascending; then the lanes as in warp_sum.
#pragma once
#include "kernels/write_keys.cuh"

namespace fwpkm::kernels {

template <typename T>
struct BackwardKeys {
  ScanView<T> view;
  Chunk chunk;
  OrderedLists lists;                    // of the chunk's entries
  bool through;                          // with theta
  const int32_t *list_indices, *places;  // (m, H, 2, R) checked, (m, H, R)
  const T *list_scores, *sub_keys;       // (m, H, 2, R), (H, 2, P, K/2) that the chunk was read with
  const uint8_t* open;                   // (H, 2, P, (K/2 + 7) / 8), or null
  const T *dscores, *memory_terms;       // (m, H, R); null unless the memory loss moved the sub-keys
  const T* daddressing;                  // d(addressing loss) of the write, or null
  T *dquery, *dsub_keys;                 // as query; (H, 2, P, K/2): dK', becomes dK
  // Workspace
  T *theta, *directions;                   // (H, 2, P, K/2), t (m, H, 2, R): kept from key_directions to key_gradients
  T *alpha, *beta, *p;                     // (m, H, 2, R)
  double *mean, *slope, *curvature, *sum;  // (2, P); sum (H, 2, P)
  T* scratch;                              // column_sums_scratch(entries, 2H, K/2)

  __device__ bool left_out(int64_t list) const { return list_indices[list * view.topk] < 0; }
  __device__ int64_t row_of(int64_t l) const { return view.key_row(l, list_indices[l]) * view.half_width; }
  __host__ __device__ int64_t num_lists() const { return view.tokens(chunk) * view.heads * 2; }
};

// The sums, for column_sums.
template <typename T>
struct AddToKeys {
  T* dsub_keys;
  const T* theta;
  const double* alpha;  // sums of alpha by sub-key; null: without theta

  __device__ bool wanted(const List&) const { return true; }
  __device__ void expect(const List&, int64_t, int64_t) const {}
  template <bool kAligned>
  __device__ void put(const List& list, int64_t column, int64_t width, bool inside, Pack<T> sum) const {
    if (!inside) return;
    T* const row = dsub_keys + list.key * width;
    add(sum, load_pack<kAligned>(row, column, width));
    if (alpha) add_product(sum, T(-alpha[list.key]), load_pack<kAligned>(theta + list.key * width, column, width));
    store_pack<kAligned>(row, column, width, sum);
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

// t. One warp per list.
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads) list_directions(BackwardKeys<T> x) {
  constexpr int kPack = Pack<T>::kSize;
  const ScanView<T>& view = x.view;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), half = view.half_width, lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const bool left_out = x.left_out(list);
    const T* const q = view.query_of(x.chunk, list * view.topk);
    for (int64_t l = list * view.topk; l < (list + 1) * view.topk; ++l) {
      T sum = 0;
      if (!left_out) {
        const T *const theta = x.theta + x.row_of(l), *const key = x.sub_keys + x.row_of(l);
        for (int64_t column = lane * kPack; column < half; column += 32 * kPack) {
          Pack<T> difference = load_pack<kAligned>(q, column, half);
          const Pack<T> direction = load_pack<kAligned>(theta, column, half);
          if (view.idw) subtract(difference, load_pack<kAligned>(key, column, half));
#pragma unroll
          for (int j = 0; j < kPack; ++j) sum = fma(direction.v[j], difference.v[j], sum);
        }
        sum = warp_sum(sum);
        if (view.idw) sum *= 2 * exp(x.list_scores[l]);
      }
      if (lane == 0) x.directions[l] = sum;
    }
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

// alpha and beta. One warp per list. `addressed`: with the addressing loss; sum then holds (omega / N_a) sum P t~.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) key_factors(BackwardKeys<T> x, bool addressed) {
  const ScanView<T>& view = x.view;
  const int32_t topk = int32_t(view.topk);
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), lists = x.num_lists();
  const double rows = double(view.addressed_rows(x.chunk)), factor = view.addressing_weight / rows;
  const T daddressing = x.daddressing ? *x.daddressing : T(0);
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const int64_t at = list * topk;
    if (x.left_out(list)) {
      for (int32_t l = threadIdx.x % 32; l < topk; l += 32) x.alpha[at + l] = x.beta[at + l] = 0;
      continue;
    }
    const int half = int(list % 2);
    const int64_t table = half * view.num_sub_keys, reads = list / 2 * topk;  // of the token and head
    double mean_u = 0, mean_dp = 0;
    T mean_t = 0;
    const auto centred_u = [&](int32_t l) { return x.slope[table + x.list_indices[at + l]] - mean_u; };
    const auto dp = [&](int32_t l) {
      const int64_t j = table + x.list_indices[at + l];
      return fma(factor * double(x.directions[at + l] - mean_t), centred_u(l), x.sum[j] * x.curvature[j] / rows);
    };
    if (addressed) mean_u = mean_slope(x.p + at, x.list_indices + at, x.slope + table, topk);
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

// d q += the sums of a list, the one with theta by itself. One warp per list.
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads) add_to_query(BackwardKeys<T> x) {
  constexpr int kPack = Pack<T>::kSize;
  const ScanView<T>& view = x.view;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), half = view.half_width, lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    if (x.left_out(list)) continue;
    const T* const q = view.query_of(x.chunk, list * view.topk);
    T* const dq = x.dquery + (q - view.query);
    for (int64_t column = threadIdx.x % 32 * kPack; column < half; column += 32 * kPack) {
      const Pack<T> query = load_pack<kAligned>(q, column, half);
      Pack<T> sum = filled_pack(T(0)), through = sum;
#pragma unroll 4
      for (int64_t l = list * view.topk; l < (list + 1) * view.topk; ++l) {
        Pack<T> key = load_pack<kAligned>(x.sub_keys + x.row_of(l), column, half);
        if (view.idw) subtract(key, query);
        add_product(sum, x.beta[l], key);
        if (x.through) add_product(through, x.alpha[l], load_pack<kAligned>(x.theta + x.row_of(l), column, half));
      }
      Pack<T> total = load_pack<kAligned>(dq, column, half);
      add(total, sum);
      if (x.through) add(total, through);
      store_pack<kAligned>(dq, column, half, total);
    }
  }
}

// Slices of a row with kLanes packs each.
template <typename T, int kLanes>
__host__ __device__ int64_t slices_of(int64_t width) {
  return (width + kLanes * Pack<T>::kSize - 1) / (kLanes * Pack<T>::kSize);
}

// The same, bit for bit, from shared memory: a block takes kLanes packs of all sub-keys of a half, and of their theta,
// and one of `parts` parts of the tokens. kLanes lanes per list.
template <typename Size, int kLanes, typename T>
__global__ void __launch_bounds__(2 * Size::kThreads, 1) add_columns_to_query(BackwardKeys<T> x, int32_t parts) {
  constexpr int kThreads = 2 * Size::kThreads, kLists = 32 / kLanes;  // of a warp at a time
  const ScanView<T>& view = x.view;
  const int64_t half = view.half_width, groups = 2 * view.heads, keys = view.num_sub_keys, topk = view.topk;
  const int64_t tokens = view.tokens(x.chunk), slices = slices_of<T, kLanes>(half);
  SIMT_DYNAMIC_ARRAY(rows, keys * kLanes * (x.through ? 2 : 1), Pack<T>);
  Pack<T>* const thetas = rows + keys * kLanes;
  const int lane = threadIdx.x % 32, my_pack = lane % kLanes, first_lane = lane - my_pack;
  for (int64_t b = blockIdx.x; b < groups * slices * parts; b += gridDim.x) {
    const int64_t group = b / slices / parts, part = b / slices % parts;
    const int64_t column = (b % slices * kLanes + my_pack) * Pack<T>::kSize;
    const bool inside = column < half;
    for (int64_t i = threadIdx.x; i < keys * kLanes; i += kThreads) {
      const int64_t from = (group * keys + i / kLanes) * half + column;
      simt::copy16_async(&rows[i], inside ? x.sub_keys + from : nullptr);
      if (x.through) simt::copy16_async(&thetas[i], inside ? x.theta + from : nullptr);
    }
    simt::commit_copies();
    simt::wait_for_copies<0>();
    __syncthreads();  // rows and thetas
    const int64_t stop = tokens * (part + 1) / parts;
    for (int64_t first = tokens * part / parts + threadIdx.x / 32 * kLists; first < stop; first += kThreads / kLanes) {
      const int64_t token = first + lane / kLanes, list = token * groups + group;
      const bool exists = token < stop, mine = exists && inside && !x.left_out(list);
      const T* const q = view.query_of_list(x.chunk, uint32_t(exists ? list : group));
      T* const dq = x.dquery + (q - view.query);
      Pack<T> sum = filled_pack(T(0)), through = sum, query = sum, total = sum;
      if (exists && inside) {  // not `mine`, for which loads would wait
        query = load_pack<true>(q, column, half);
        total = load_pack<true>(dq, column, half);
      }
      for (int64_t l = 0; l < topk; l += kLanes) {
        const bool its = exists && l + my_pack < topk;
        const int64_t at = list * topk + l + my_pack;
        const int32_t index = its ? x.list_indices[at] : 0, known = index < 0 ? 0 : index;
        const T beta = its ? x.beta[at] : T(0), alpha = its && x.through ? x.alpha[at] : T(0);
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          if (l + j >= topk) break;
          const int32_t row = __shfl_sync(kFullWarp, known, first_lane + j) * kLanes + my_pack;
          Pack<T> key = rows[row];
          if (view.idw) subtract(key, query);
          add_product(sum, __shfl_sync(kFullWarp, beta, first_lane + j), key);
          if (x.through) add_product(through, __shfl_sync(kFullWarp, alpha, first_lane + j), thetas[row]);
        }
      }
      add(total, sum);
      if (x.through) add(total, through);
      if (mine) store_pack<true>(dq, column, half, total);
    }
    __syncthreads();  // rows and thetas have been read
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// add_to_query, with sub-keys in shared memory where they fit there and enough tokens read them.
template <typename Size, typename T>
cudaError_t launch_add_to_query(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  const ScanView<T>& view = x.view;
  const int64_t half = view.half_width, groups = 2 * view.heads, entries = x.num_lists() * view.topk;
  const int64_t reads = entries / (groups * view.num_sub_keys);  // of a sub-key
  cudaError_t error = cudaSuccess;
  const auto from_shared = [&](auto lanes) {
    constexpr int64_t kLeastReads = 4;  // of a sub-key by a block
    const auto kernel = add_columns_to_query<Size, lanes(), T>;
    const int64_t blocks = groups * slices_of<T, lanes()>(half), wanted = (Size::kSharedBlocks + blocks - 1) / blocks;
    const int64_t parts = wanted < reads / kLeastReads ? wanted : reads / kLeastReads;
    const int64_t bytes = view.num_sub_keys * lanes() * 16 * (x.through ? 2 : 1);
    if (!aligned || parts == 0 || entries * half < Size::kLeastSharedElements || bytes > Size::kMostSharedBytes ||
        !simt::allow_shared(kernel, size_t(bytes)))
      return false;
    error = simt::launch_with_shared(size_t(bytes), kernel, blocks_for<Size>(blocks * parts, 1), 2 * Size::kThreads,
                                     stream, x, int32_t(parts));
    return true;
  };
  if (from_shared(std::integral_constant<int, 8>()) || from_shared(std::integral_constant<int, 4>())) return error;
  const auto kernel = aligned ? add_to_query<Size, true, T> : add_to_query<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(x.num_lists(), Size::kThreads / 32), Size::kThreads, stream, x);
}

// `aligned`: rows_are_packs of query, dquery, sub_keys, dsub_keys, theta and scratch.

// theta and t, which the tokens need; only with `through`.
template <typename Size = LaunchSize, typename T>
cudaError_t key_directions(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  const int64_t elements = x.view.key_rows() * x.view.half_width, lists = x.num_lists();
  const cudaError_t error =
      simt::launch(through_steps<Size, T>, blocks_for<Size>(elements, Size::kThreads), Size::kThreads, stream, x);
  if (error != cudaSuccess || lists == 0) return error;
  const auto kernel = aligned ? list_directions<Size, true, T> : list_directions<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(lists, Size::kThreads / 32), Size::kThreads, stream, x);
}

// d q and dK, after the tokens.
template <typename Size = LaunchSize, typename T>
cudaError_t key_gradients(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  const ScanView<T>& view = x.view;
  const int64_t rows = view.addressed_rows(x.chunk), lists = x.num_lists();
  if (lists == 0) return cudaSuccess;
  const unsigned warp_per_list = blocks_for<Size>(lists, Size::kThreads / 32);
  const bool addressed = x.chunk.writes && view.addressing_weight != 0 && rows > 0 && (x.through || x.daddressing);
  const int32_t table = int32_t(2 * view.num_sub_keys), keys = int32_t(view.key_rows());
  cudaError_t error = cudaSuccess;
  if (addressed)
    error = address_chunk<Size>(view, x.chunk, x.lists, x.list_indices, x.list_scores, x.p, x.mean, x.slope,
                                x.curvature, static_cast<T*>(nullptr), stream);
  if (addressed && x.through && error == cudaSuccess)
    error = simt::launch(centred_directions<Size, T>, warp_per_list, Size::kThreads, stream, x);
  if (addressed && x.through && error == cudaSuccess)  // before 1 / mean, which may reach 2e8, multiplies it
    error = simt::launch(sum_entries<Size, T>, blocks_for<Size>(table, 1), Size::kThreads, stream, x.lists, x.beta,
                         table, view.addressing_weight / double(rows), x.sum);
  if (error == cudaSuccess)
    error = simt::launch(key_factors<Size, T>, warp_per_list, Size::kThreads, stream, x, addressed);
  if (error == cudaSuccess) error = launch_add_to_query<Size>(x, aligned, stream);
  const bool pulled = view.idw && x.through;
  if (pulled && error == cudaSuccess)
    error = simt::launch(sum_entries<Size, T>, blocks_for<Size>(keys, 1), Size::kThreads, stream, x.lists, x.alpha,
                         keys, 1.0, x.sum);
  if (error != cudaSuccess) return error;
  const AddToKeys<T> output{x.dsub_keys, x.theta, pulled ? x.sum : nullptr};
  const auto sums = [&](const auto& terms) {
    return column_sums<Size>(x.lists, terms, output, 2 * view.heads, view.topk, view.half_width, x.scratch, aligned,
                             stream);
  };
  return view.idw ? sums(QueryTerms<T, true>{view, x.chunk, x.beta, x.sub_keys})
                  : sums(QueryTerms<T, false>{view, x.chunk, x.beta, x.sub_keys});
}

}  // namespace fwpkm::kernels
