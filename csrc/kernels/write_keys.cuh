// Writing a chunk, the side of sub-keys: one gradient step on the addressing loss and, unless values_only, on the
// memory loss.
//
//   sigma_l = d(loss) / d(score of list entry l)     alpha = slope sigma,  slope = d(score) / d(sub-key) over
//   `difference` k_j <- keep k_j - lr clamp(sum over its entries of alpha (q - k_j))     idw;  alpha q for dot
//
// The entries of a sub-key are an ordered list, summed as ordered_sums.cuh says (by column_sums.cuh).
#pragma once
#include "kernels/addressing.cuh"
#include "kernels/column_sums.cuh"

namespace fwpkm::kernels {

// sum of factor * (q - k) or, for dot, factor * q.
template <typename T, bool kIdw>
struct QueryTerms {
  static constexpr bool kMinus = kIdw;
  ScanView<T> view;
  Chunk chunk;
  const T *factors, *sub_keys;  // (m, H, 2, R), (memories, H, 2, P, K/2)
  __device__ const T* row(int32_t entry) const { return view.query_of(chunk, entry); }
  __device__ const T* row_of_list(uint32_t list) const { return view.query_of_list(chunk, list); }
  __device__ T factor(int32_t entry) const { return factors[entry]; }
  __device__ const T* minus(int32_t key) const { return sub_keys + key * view.half_width; }
};

template <typename T>
struct NewKeys {
  ScanView<T> view;
  const T* sub_keys;
  T* to;
  uint8_t* open;  // (memories, H, 2, P, (K/2 + 7) / 8), or null
  unsigned* error_word;

  __device__ bool wanted(const List&) const { return true; }
  using Row = int32_t;  // its number
  __device__ Row row(const List& list) const { return list.key; }
  template <bool kAligned>
  __device__ Pack<T> before(Row row, int64_t column, int64_t width) const {
    return load_pack<kAligned>(sub_keys + row * width, column, width);
  }
  template <bool kAligned>
  __device__ void put(Row row, int64_t column, int64_t width, bool inside, const Pack<T>& sum,
                      const Pack<T>& old) const {
    constexpr int kPack = Pack<T>::kSize;
    bool passes[kPack] = {}, finite = true;
    if (inside) {
      Pack<T> decayed = old, key;
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        bool fits;
        if (view.decays()) decayed.v[j] *= view.keep;
        key.v[j] = gradient_step(decayed.v[j], sum.v[j], view.lr, view.grad_clip, passes[j], fits);
        finite &= fits;
      }
      if (!finite) {
        report(error_word, kOverflow);
#pragma unroll
        for (int j = 0; j < kPack; ++j) key.v[j] = isfinite(decayed.v[j]) ? decayed.v[j] : old.v[j];
      }
      store_pack<kAligned>(to + row * width, column, width, key);
    }
    if (open) store_open_bits<T>(open + row * ((width + 7) / 8), column, inside, passes);
  }
};

// The sums over the entries of every sub-key. column_sums knows the sub-keys of one memory only.
template <typename Size, typename T, typename Terms, typename Output>
cudaError_t sums_by_key(const ScanView<T>& view, const OrderedLists& lists, const Terms& terms, const Output& output,
                        T* scratch, bool aligned, cudaStream_t stream) {
  return view.memories.of_row ? ordered_sums<Size>(lists, terms, output, view.half_width, scratch, aligned, stream)
                              : column_sums<Size>(lists, terms, output, 2 * view.heads, view.topk, view.half_width,
                                                  scratch, aligned, stream);
}

template <typename T>
struct KeyWrite {
  const T* sub_keys;                     // (memories, H, 2, P, K/2) that the chunk was read with
  T* to;                                 // elsewhere
  uint8_t* open;                         // (memories, H, 2, P, (K/2 + 7) / 8), or null
  T* loss;                               // (memories): addressing loss of the write
  const int32_t *list_indices, *places;  // (m, H, 2, R), (m, H, R)
  const T *list_scores, *memory_terms;   // (m, H, 2, R); (m, H, R), null if values_only
  const T* p;                            // (m, H, 2, R): address_weights; null without addressing loss
  T* alpha;                              // (m, H, 2, R): workspace
  AddressTables tables;                  // workspace: mean and slope
  T* scratch;                            // column_sums_scratch(entries, 2H, K/2)
  unsigned* error_word;
};

// ------------------------------------------------------------------------------------------------------------- kernel
// alpha of the entries of a (token, head), by a warp.
template <typename T>
__device__ __forceinline__ void entry_steps(const ScanView<T>& view, const Chunk& chunk, const KeyWrite<T>& w,
                                            int64_t th) {
  const int32_t topk = int32_t(view.topk);
  const int64_t memory = view.memory(chunk, uint32_t(th) / uint32_t(view.heads));
  const int64_t rows = view.addressed_rows_of(chunk, memory);
  const double factor = rows ? view.addressing_weight / double(rows) : 0.0;
  for (int half = 0; half < 2; ++half) {
    const int64_t at = (th * 2 + half) * topk;
    const int32_t* const ids = w.list_indices + at;
    const bool left_out = ids[0] < 0;
    const double* const u = w.p ? w.tables.slope + (2 * memory + half) * view.num_sub_keys : nullptr;
    const double mean = u && !left_out ? mean_slope(w.p + at, ids, u, topk) : 0.0;
    for (int32_t l = threadIdx.x % 32; l < topk; l += 32) {
      T sigma = u && !left_out ? T(factor * double(w.p[at + l]) * (u[ids[l]] - mean)) : T(0);
      if (w.memory_terms && !left_out)
        sigma += sum_at_place(w.places + th * topk, w.memory_terms + th * topk, topk, half, l);
      w.alpha[at + l] = view.idw && !left_out ? 2 * exp(w.list_scores[at + l]) * sigma : sigma;
    }
  }
}

// All that the sums wait for: the loss, alpha, and every sub-key as it becomes if nobody looked at it, for which
// next = keep * present and the gradient of 0 passes the clamp. 3 blocks: left alone, ptxas spills to make room for
// more.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads, 3) key_steps(ScanView<T> view, Chunk chunk, KeyWrite<T> w) {
  SIMT_SHARED(partial, double[32]);
  for (int64_t memory = gridDim.x - 1 - blockIdx.x; memory < view.memories.count; memory += gridDim.x) {
    const T loss =
        w.p ? addressing_loss<Size>(view, w.tables.mean + memory * 2 * view.num_sub_keys, &partial[0]) : T(0);
    if (threadIdx.x == 0) w.loss[memory] = loss;
    __syncthreads();  // before the next sum takes `partial`
  }
  const int64_t thread = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x,
                threads = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t th = thread / 32; th < view.tokens(chunk) * view.heads; th += threads / 32)
    entry_steps(view, chunk, w, th);
  const int64_t rows = view.key_rows(), open_bytes = rows * ((view.half_width + 7) / 8);
  for (int64_t i = thread; i < rows * view.half_width; i += threads) {
    const T old = w.sub_keys[i], v = view.decays() ? view.keep * old : old;
    w.to[i] = isfinite(v) ? v : old;
    if (!isfinite(v)) report(w.error_word, kOverflow);
    if (w.open && i < open_bytes) w.open[i] = 0xff;
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// lists: of the chunk's entries (EntryKeys). `aligned`: rows_are_packs of query, sub_keys, to and scratch.
template <typename Size = LaunchSize, typename T>
cudaError_t write_keys(const ScanView<T>& view, const Chunk& chunk, const OrderedLists& lists, const KeyWrite<T>& w,
                       bool aligned, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (w.p) error = address_chunk<Size>(view, chunk, lists, w.p, static_cast<const T*>(nullptr), w.tables, stream);
  const int64_t warps = std::max(view.tokens(chunk) * view.heads, view.key_rows() * view.half_width / 32);
  if (error == cudaSuccess)
    error = simt::launch(key_steps<Size, T>, blocks_for<Size>(warps + 1, Size::kThreads / 32), Size::kThreads, stream,
                         view, chunk, w);
  if (error != cudaSuccess) return error;
  const NewKeys<T> output{view, w.sub_keys, w.to, w.open, w.error_word};
  const auto sums = [&](const auto& terms) {
    return sums_by_key<Size>(view, lists, terms, output, w.scratch, aligned, stream);
  };
  return view.idw ? sums(QueryTerms<T, true>{view, chunk, w.alpha, w.sub_keys})
                  : sums(QueryTerms<T, false>{view, chunk, w.alpha, w.sub_keys});
}

}  // namespace fwpkm::kernels
