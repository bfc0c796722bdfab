// Reading a chunk: weights of the reads, out, for tokens with a pair the memory loss and what the write needs, and the
// weights of the addressing loss.
//
//   a = f(z / temperature)     out = sum_r a_r row(slot_r)     err = out - target     loss = w |err|^2 / V     e = w
//   err and, unless values_only:   b_r = <row(slot_r), e> / (M V)     memory_terms = J b, d(memory loss) / d(scores)
//
// Orders of summation, none of which depends on other tokens: out as in value_gather.cuh. |err|^2: thread i of the
// token's block (row_block(V).y warps) takes the packs i, i + blockDim.x, ..., one fused multiply-add a column, then
// block_sum. <row, e>: the same over the lanes of a warp, then warp_sum, then divided by T(M) * T(V).
//
// A token with a score that is not finite gets NaN, -1 for its slots, and takes no part in any write. Neither does a
// token whose loss is not finite (`good`); both are reported.
#pragma once
#include "kernels/addressing.cuh"
#include "kernels/read_weights.cuh"

namespace fwpkm::kernels {

template <typename T>
struct ReadArguments {
  ScanView<T> view;
  Chunk chunk;
  Versions<T> versions;
  const int32_t* newest;  // (memories, S): place in the log + 1 of a slot's newest row, 0: none; null in place
  const T* scores;        // (m, H, R)
  int32_t* slots;         // (m, H, R)
  int32_t* list_indices;  // (m, H, 2, R)
  const T* list_scores;   // (m, H, 2, R)
  T* p;                   // (m, H, 2, R): address_weights, or null
  T* weights;             // (m, H, R)
  T* errors;              // (m, V): e of good tokens
  uint8_t* good;          // (m): the token has a pair that takes part in the write
  T* memory_terms;        // (m, H, R), or null
  int32_t* read_from;     // (m, H, R): place of the log that was read, -1: the memory; null in place
  // Outputs of the scan; rows of the chunk's own tokens, and losses of its pairs.
  T* out;                // (B, T - carried, V)
  int32_t* own_indices;  // (B, T - carried, H, R): slots of the token's memory, numbered from 0
  T* own_weights;        // (B, T - carried, H, R)
  T* losses;             // (B, all pairs)
  unsigned* error_word;
};

// ------------------------------------------------------------------------------------------------------------ kernel
// One block per token: its threads stand side by side over the columns, 16 bytes each. 3 blocks: a few spills cost less
// than warps that are missing.
template <typename Size, int kMostReads, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads, 3) read_tokens(ReadArguments<T> x) {
  constexpr int kInFlight = 8, kPack = Pack<T>::kSize;  // rows on their way at once
  SIMT_SHARED(a, T[kMostReads]);
  SIMT_SHARED(rows, Row<T>[kMostReads]);
  SIMT_SHARED(partial, T[32]);
  SIMT_SHARED(left_out, bool[1]);
  const ScanView<T>& view = x.view;
  const int64_t n = view.reads(), width = view.width;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  for (int64_t t = blockIdx.x; t < view.tokens(x.chunk); t += gridDim.x) {
    const Token token = view.token(x.chunk, t);
    const T* const z = x.scores + t * n;
    // The last threads ask for the reads' rows while the first warp makes the weights.
    const int64_t from = blockDim.x - 1 - threadIdx.x;
    const int32_t early_slot = from < n ? x.slots[t * n + from] : -1;
    const bool early = x.newest && uint32_t(early_slot) < uint32_t(view.memories.count * view.num_slots);
    const int32_t early_place = early ? x.newest[early_slot] - 1 : -1;
    if (warp == 0) {
      bool odd = false;
      each_read(n, [&](int64_t r) { odd |= !isfinite(z[r]); });
      odd = __ballot_sync(kFullWarp, odd) != 0;
      if (!odd)
        read_weights(view.activation, view.temperature, z, n, &a[0]);
      else
        each_read(n, [&](int64_t r) { a[r] = T(NAN); });
      if (lane == 0) left_out[0] = odd;
      if (odd && lane == 0) report(x.error_word, kNotFinite);
    }
    __syncthreads();
    const bool odd = left_out[0], own = token.x >= x.chunk.own, pair = view.has_pair(x.chunk, token) && !odd;
    for (int64_t r = from; r < n; r += blockDim.x) {
      const int64_t i = t * n + r, o = view.own_row(token) * n + r;
      if (odd) x.slots[i] = -1;
      const int32_t slot = odd ? -1 : r == from ? early_slot : x.slots[i];
      const int32_t place = odd || !x.newest ? -1 : r == from ? early_place : x.newest[slot] - 1;
      rows[r] = odd ? Row<T>{nullptr, 0} : x.versions.row(slot, place, x.chunk.writes_before, false);
      x.weights[i] = a[r];
      if (x.read_from) x.read_from[i] = place;
      if (own) {
        x.own_indices[o] = odd ? -1 : slot - int32_t(view.memory(x.chunk, t) * view.num_slots);
        x.own_weights[o] = a[r];
      }
      if (x.memory_terms && !pair) x.memory_terms[i] = 0;
    }
    if (odd)
      for (int64_t l = threadIdx.x; l < 2 * n; l += blockDim.x) x.list_indices[t * 2 * n + l] = -1;
    __syncthreads();  // rows

    T squared = 0;
    const T w = pair ? view.loss_weight(token) : T(0);
    for (int64_t column = int64_t(threadIdx.x) * kPack; column < width; column += int64_t(blockDim.x) * kPack) {
      Pack<T> sum = filled_pack(odd ? T(NAN) : T(0)), target;
      if (pair) target = load_pack<kAligned>(view.target + view.target_row(token) * width, column, width);
      for (int64_t first = 0; first < n && !odd; first += kInFlight) {
        Pack<T> packs[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
          if (first + j < n) packs[j] = load_pack<kAligned>(rows[first + j].data, column, width);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (first + j >= n) continue;
          apply_decays(packs[j], rows[first + j].decays, view.keep);
          add_product(sum, a[first + j], packs[j]);
        }
      }
      if (own) store_pack<kAligned>(x.out + view.own_row(token) * width, column, width, sum);
      if (!pair) continue;
      subtract(sum, target);
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        squared = fma(sum.v[j], sum.v[j], squared);  // zero beyond the row
        sum.v[j] *= w;
      }
      store_pack<kAligned>(x.errors + t * width, column, width, sum);
    }
    squared = block_sum(squared, &partial[0]);
    const T loss = pair ? w * squared / T(width) : odd ? T(NAN) : T(0);
    const bool good = pair && isfinite(squared) && isfinite(loss);
    if (threadIdx.x == 0) {
      x.good[t] = good;
      if (token.i < x.chunk.pairs) x.losses[view.loss_at(x.chunk, token)] = view.has_pair(x.chunk, token) ? loss : T(0);
      if (pair && !good) report(x.error_word, kNotFinite);
    }
    if (x.memory_terms && pair) {  // errors are there: block_sum has a barrier
      T* const terms = x.memory_terms + t * n;
      const T scale = T(view.pairs_of(x.chunk, view.memory(x.chunk, t))) * T(width);
      for (int64_t r = warp; r < n; r += warps) {
        T sum = 0;
        for (int64_t column = lane * kPack; column < width && good; column += 32 * kPack) {
          const Pack<T> row = load_row<kAligned>(rows[r], view.keep, column, width),
                        e = load_pack<kAligned>(x.errors + t * width, column, width);
#pragma unroll
          for (int j = 0; j < kPack; ++j) sum = fma(row.v[j], e.v[j], sum);
        }
        sum = warp_sum(sum);
        if (lane == 0) terms[r] = sum / scale;
      }
      __syncthreads();  // terms
      if (warp == 0) through_weights(view.activation, view.temperature, &a[0], z, terms, n, terms);
    }
    for (int64_t list = warp; list < 2 * view.heads && x.p; list += warps) {
      const int64_t l = t * 2 * n + list * view.topk;
      address_weights(x.list_scores + l, view.topk, !odd && view.addressed(x.chunk, token), x.p + l);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
constexpr int kMostReads = 1024;  // H*R, of one token

// Rows are read as 16-byte packs when `aligned`: rows_are_packs of values, log, target, out and errors.
template <typename Size = LaunchSize, typename T>
cudaError_t read_chunk(const ReadArguments<T>& arguments, bool aligned, cudaStream_t stream) {
  const int64_t tokens = arguments.view.tokens(arguments.chunk), reads = arguments.view.reads();
  if (tokens == 0) return cudaSuccess;
  constexpr int kFew = 64;  // more tokens at a time on a multiprocessor
  const auto kernel = aligned
                          ? reads <= kFew ? read_tokens<Size, kFew, true, T> : read_tokens<Size, kMostReads, true, T>
                      : reads <= kFew ? read_tokens<Size, kFew, false, T>
                                      : read_tokens<Size, kMostReads, false, T>;
  const dim3 block = row_block<T, Size>(arguments.view.width);
  return simt::launch(kernel, blocks_for<Size>(tokens, 1), 32 * block.y, stream, arguments);
}

}  // namespace fwpkm::kernels
