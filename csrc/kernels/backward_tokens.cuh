// Backward pass of a scan, the side of tokens: from the gradients of out, weights and losses, and of the rows after the
// write (backward_rows.cuh), to those of targets, loss weights and scores of the reads.
//
//   err = out - target     e = w err     g_r = gradient of the sum of a e at the row of read r
//   d e = sum_r a_r g_r  [ + sum_r y_r row_r ]
//   delta = d out + w (d e + (2/V) d loss err)
//   d target = d out - delta     d w = <d e, err> + d loss |err|^2 / V
//   d a_r = <delta, row_r> + <g_r, e> + d weights_r
//   d z = J d a  [ + the derivative of sum_r y_r b_r by z ]
//   b_r = <row_r, e> / (M V)     y = J t / (M V)     t_r = sum of t over the two list places of read r
//
// t: backward_keys.cuh. J = d a / d z (read_weights.cuh). Brackets: only when the memory loss moved the sub-keys.
// Orders of summation: as in read_chunk.cuh; over r ascending.
//
// A token that was left out of the forward pass passes no gradients on, and nothing is written for it. A pair whose
// loss is not finite is no pair.
#pragma once
#include "kernels/backward_rows.cuh"
#include "kernels/read_chunk.cuh"

namespace fwpkm::kernels {

template <typename T>
struct BackwardTokens {
  ScanView<T> view;
  Chunk chunk;
  Versions<T> versions;
  const int32_t *list_indices, *slots;  // (m, H, 2, R), (m, H, R): checked
  const int32_t *places, *read_from;    // (m, H, R)
  const T* list_scores;                 // (m, H, 2, R)
  const int32_t* list_of;               // (m, H, R): where a read's list of the slots begins
  const ListGradient<T>* gradients;     // there
  const T* gradient_rows;               // buffer rows
  const uint8_t* open;                  // (places of the log, (V+7)/8), or null
  const T *dout, *dweights, *dlosses;   // or null
  const T* directions;                  // t (m, H, 2, R); null without second-order terms
  T *scores, *weights, *dscores;        // z, a, d z (m, H, R)
  T* memory_terms;                      // J b (m, H, R); null unless the memory loss moved the sub-keys
  T *read_directions, *y;               // t_r, y (m, H, R); with `directions`
  T *delta, *errors;                    // delta, e (m, V); e of good tokens
  uint8_t* good;                        // (m): the token has a pair
  T *dtarget, *dloss_weights;           // (B, T, V), (B, T) or null: pairs are stored, others are left as they are
};

template <typename T>
struct TokenRead {
  const T *row, *gradient;  // gradient null: g = 0
  int32_t decays, place;    // of the row; in the log, for the bits of `open`
  T weight, scale;          // a; g = scale * open * gradient
};

// ------------------------------------------------------------------------------------------------------------ kernel
// Which columns of a pack the clamp let through, from bit 0 on. open: of the row, or null.
__device__ __forceinline__ unsigned open_bits(const uint8_t* open, int64_t column) {
  return open ? open[column / 8] >> (column % 8) : ~0u;  // a pack does not straddle bytes
}

template <typename T>
__device__ __forceinline__ void clear_closed(Pack<T>& pack, unsigned bits) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j)
    if (!(bits >> j & 1)) pack.v[j] = 0;
}

// A pack of a row of gradients where the clamp was open, and 0 elsewhere.
template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T> load_open(const T* row, const uint8_t* open, int64_t column, int64_t width) {
  Pack<T> pack = load_pack<kAligned>(row, column, width);
  clear_closed(pack, open_bits(open, column));
  return pack;
}

template <typename T>
__device__ __forceinline__ T add_dot(T sum, const Pack<T>& a, const Pack<T>& b) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) sum = fma(a.v[j], b.v[j], sum);
  return sum;
}

// z, a and what follows from them, by the first warp; the lanes keep to their own elements.
template <typename T>
__device__ __forceinline__ void weigh_reads(const BackwardTokens<T>& x, int64_t t, TokenRead<T>* reads) {
  const ScanView<T>& view = x.view;
  const int64_t n = view.reads(), topk = view.topk;
  T *const z = x.scores + t * n, *const a = x.weights + t * n;
  const auto list_sum = [&](const T* entries, int64_t r) {
    const int64_t list = (t * n + r) / topk * 2 * topk;
    const int32_t place = x.places[t * n + r];
    return entries[list + place / topk] + entries[list + topk + place % topk];
  };
  each_read(n, [&](int64_t r) { z[r] = list_sum(x.list_scores, r); });
  read_weights(view.activation, view.temperature, z, n, a);
  each_read(n, [&](int64_t r) { reads[r].weight = a[r]; });
  if (!x.directions) return;
  T *const y = x.y + t * n, *const directions = x.read_directions + t * n;
  const T scale = T(view.pairs_of(x.chunk, view.memory(x.chunk, t))) * T(view.width);
  each_read(n, [&](int64_t r) { directions[r] = list_sum(x.directions, r); });
  through_weights(view.activation, view.temperature, a, z, directions, n, y);
  each_read(n, [&](int64_t r) { y[r] /= scale; });
}

// One block per token: its threads stand side by side over the columns, 16 bytes each; then its warps over the reads.
template <typename Size, int kMostReads, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads, 3) token_gradients(BackwardTokens<T> x) {
  constexpr int kInFlight = 4, kPack = Pack<T>::kSize;  // reads on their way at once
  SIMT_SHARED(reads, TokenRead<T>[kMostReads]);
  SIMT_SHARED(partial, T[2][32]);
  const ScanView<T>& view = x.view;
  const int64_t n = view.reads(), width = view.width, open_bytes = (width + 7) / 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const T width_t = T(width);
  for (int64_t t = blockIdx.x; t < view.tokens(x.chunk); t += gridDim.x) {
    if (x.list_indices[t * 2 * n] < 0) continue;
    const Token token = view.token(x.chunk, t);
    const bool own = token.x >= x.chunk.own, pair = view.has_pair(x.chunk, token);
    if (warp == 0) weigh_reads(x, t, &reads[0]);
    for (int64_t r = blockDim.x - 1 - threadIdx.x; r < n;
         r += blockDim.x) {  // the last threads: they have nothing to do
      const int64_t i = t * n + r;
      const Row<T> row = x.versions.row(x.slots[i], x.read_from[i], x.chunk.writes_before, !x.chunk.writes);
      const ListGradient<T> g = x.gradients[x.list_of[i]];
      reads[r].row = row.data;
      reads[r].decays = int32_t(row.decays);
      reads[r].gradient = g.holds ? x.gradient_rows + g.row * width : nullptr;
      reads[r].place = g.place;
      reads[r].scale = g.scale;
    }
    __syncthreads();  // reads; y
    const auto open_of = [&](const TokenRead<T>& read) { return x.open ? x.open + read.place * open_bytes : nullptr; };
    const auto row_of = [](const TokenRead<T>& read) { return Row<T>{read.row, read.decays}; };

    // err and d e; of all columns, for whether the loss is finite decides what becomes of them
    bool good = pair;
    const bool one_pack = width <= int64_t(blockDim.x) * kPack;  // of each thread: it stays in registers
    Pack<T> kept_error, kept_derror;
    T *const errors = x.errors + t * width, *const delta = x.delta + t * width;
    const T w = pair ? view.loss_weight(token) : T(0);
    const T dloss = pair && x.dlosses ? x.dlosses[view.loss_at(x.chunk, token)] : T(0);
    if (pair) {
      T squared = 0, gate = 0;
      for (int64_t column = int64_t(threadIdx.x) * kPack; column < width; column += int64_t(blockDim.x) * kPack) {
        const Pack<T> target = load_pack<kAligned>(view.target + view.target_row(token) * width, column, width);
        Pack<T> error = filled_pack(T(0)), derror = error;
        for (int64_t first = 0; first < n; first += kInFlight) {
          Pack<T> rows[kInFlight], gradients[kInFlight];
          unsigned open[kInFlight];
#pragma unroll
          for (int j = 0; j < kInFlight; ++j) {
            if (first + j >= n) continue;
            const TokenRead<T>& read = reads[first + j];
            rows[j] = load_pack<kAligned>(read.row, column, width);
            if (!read.gradient) continue;
            gradients[j] = load_pack<kAligned>(read.gradient, column, width);
            open[j] = open_bits(open_of(read), column);
          }
#pragma unroll
          for (int j = 0; j < kInFlight; ++j) {
            if (first + j >= n) continue;
            const TokenRead<T>& read = reads[first + j];
            apply_decays(rows[j], read.decays, view.keep);
            add_product(error, read.weight, rows[j]);
            if (x.directions) add_product(derror, x.y[t * n + first + j], rows[j]);
            if (!read.gradient) continue;
            clear_closed(gradients[j], open[j]);
            add_product(derror, read.weight * read.scale, gradients[j]);
          }
        }
        subtract(error, target);
        squared = add_dot(squared, error, error);  // zero beyond the row
        gate = add_dot(gate, derror, error);
        if (one_pack) {
          kept_error = error;
          kept_derror = derror;
        } else {
          store_pack<kAligned>(errors, column, width, error);
          store_pack<kAligned>(delta, column, width, derror);
        }
      }
      squared = block_sum(squared, &partial[0][0]);
      gate = block_sum(gate, &partial[1][0]);
      good = isfinite(squared) && isfinite(w * squared / width_t);
      if (good && x.dloss_weights && threadIdx.x == 0)
        x.dloss_weights[view.at(token)] = fma(dloss, squared / width_t, gate);
    }
    if (threadIdx.x == 0) x.good[t] = good;

    const T twice = 2 * dloss / width_t;
    for (int64_t column = int64_t(threadIdx.x) * kPack; column < width; column += int64_t(blockDim.x) * kPack) {
      Pack<T> sum = filled_pack(T(0));
      if (own && x.dout) sum = load_pack<kAligned>(x.dout + view.own_row(token) * width, column, width);
      if (good) {
        Pack<T> error = one_pack ? kept_error : load_pack<kAligned>(errors, column, width);
        Pack<T> back = one_pack ? kept_derror : load_pack<kAligned>(delta, column, width), dtarget;
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          back.v[j] = w * fma(twice, error.v[j], back.v[j]);
          dtarget.v[j] = -back.v[j];
          error.v[j] *= w;
        }
        add(sum, back);
        store_pack<kAligned>(errors, column, width, error);
        store_pack<kAligned>(x.dtarget + view.target_row(token) * width, column, width, dtarget);
      }
      store_pack<kAligned>(delta, column, width, sum);
    }
    __syncthreads();  // delta, e

    T *const dz = x.dscores + t * n, *const terms = x.memory_terms ? x.memory_terms + t * n : nullptr;
    const T scale = T(view.pairs_of(x.chunk, view.memory(x.chunk, t))) * width_t;
    for (int64_t r = warp; r < n; r += warps) {
      const TokenRead<T> read = reads[r];
      T through_out = 0, through_step = 0, b = 0;
#pragma unroll 4
      for (int64_t column = lane * kPack; column < width; column += 32 * kPack) {
        const Pack<T> row = load_row<kAligned>(row_of(read), view.keep, column, width);
        through_out = add_dot(through_out, row, load_pack<kAligned>(delta, column, width));
        if (!good || !(read.gradient || terms)) continue;
        const Pack<T> error = load_pack<kAligned>(errors, column, width);
        if (terms) b = add_dot(b, row, error);
        if (read.gradient)
          through_step = add_dot(through_step, load_open<kAligned>(read.gradient, open_of(read), column, width), error);
      }
      through_out = warp_sum(through_out);
      through_step = warp_sum(through_step);
      b = warp_sum(b);
      if (lane) continue;
      const T given = own && x.dweights ? x.dweights[view.own_row(token) * n + r] : T(0);
      dz[r] = given + fma(read.scale, through_step, through_out);
      if (terms) terms[r] = b / scale;
    }
    __syncthreads();  // d a, b; and `reads` is free for the next token
    if (warp == 0) {
      const T *const z = x.scores + t * n, *const a = x.weights + t * n;
      through_weights(view.activation, view.temperature, a, z, dz, n, dz);
      if (x.directions && good)
        add_second_order(view.activation, view.temperature, a, z, terms, x.read_directions + t * n, n, dz);
      if (terms) through_weights(view.activation, view.temperature, a, z, terms, n, terms);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// `aligned`: rows_are_packs of values, log, gradient rows, target, dout, delta, errors and dtarget.
template <typename Size = LaunchSize, typename T>
cudaError_t backward_tokens(const BackwardTokens<T>& arguments, bool aligned, cudaStream_t stream) {
  const int64_t tokens = arguments.view.tokens(arguments.chunk), reads = arguments.view.reads();
  if (tokens == 0) return cudaSuccess;
  constexpr int kFew = 64;  // more tokens at a time on a multiprocessor
  const auto kernel =
      aligned ? reads <= kFew ? token_gradients<Size, kFew, true, T> : token_gradients<Size, kMostReads, true, T>
      : reads <= kFew ? token_gradients<Size, kFew, false, T>
                      : token_gradients<Size, kMostReads, false, T>;
  const dim3 block = row_block<T, Size>(arguments.view.width);
  return simt::launch(kernel, blocks_for<Size>(tokens, 1), 32 * block.y, stream, arguments);
}

}  // namespace fwpkm::kernels
