// The vectorised loops of the CPU backend, as a table of functions. The same source (vector_impl.h) is compiled once
// per instruction set; `kernels<T>()` is the table for the machine we run on (measured:
// bench/results/cpu_capability.json).
//
// Every sum over a row has one order, whatever the instruction set, the tile or the number of tokens: lane l of a
// 64-byte vector adds the elements l, l + lanes, l + 2*lanes, ... in turn, then the lanes are folded in halves.
// Instruction sets differ in one thing only: with fused multiply-add a product is not rounded before it is added.
#pragma once
#include <cstdint>

namespace fwpkm::vector {

template <typename T>
struct Kernels {
  // out[i][j] = <q[i], keys[j]>, or -|q[i] - keys[j]|^2 with `distance`.
  // q: n rows of `width`, `q_stride` apart; keys [num_keys, width]; out [n, num_keys].
  void (*scores)(const T* q, int64_t q_stride, int64_t n, const T* keys, int64_t num_keys, int64_t width, bool distance,
                 T* out);
  // The k largest of n scores, falling; of equal scores the one with the smaller index comes first.
  // False if any score is NaN or infinite.
  bool (*largest)(const T* scores, int64_t n, int64_t k, T* best, int32_t* index);
  // out = sum_r weights[r] * (rows[r] - minus), r in turn; minus may be null.
  void (*weighted_sum)(const T* const* rows, const T* minus, const T* weights, int64_t count, int64_t width, T* out);
  // out[x] = sum_r weights[x][r] * values[ids[x][r]], r in turn, for n tokens x of `count` reads each. So many ids are
  // `known`, more than n * count where the next call goes on behind this one: rows are fetched ahead.
  void (*gather)(const T* values, const int32_t* ids, const T* weights, int64_t n, int64_t count, int64_t known,
                 int64_t width, T* out);
  // out[r] = <x - minus[r], rows[r]>; minus may be null.
  void (*dots)(const T* const* rows, const T* const* minus, int64_t count, const T* x, int64_t width, T* out);
  // out[r] = |x - rows[r]|^2
  void (*distances)(const T* const* rows, int64_t count, const T* x, int64_t width, T* out);
  // y += a * x
  void (*axpy)(T a, const T* x, int64_t width, T* y);
  // next = old - lr * clip(scale * sum); `clip` < 0: no clipping. open: one bit per element, set where the gradient
  // was not clipped; null when nobody asks.
  void (*step)(const T* old, const T* sum, T scale, T lr, T clip, int64_t width, T* next, uint8_t* open);
  // y = a * x, `times` times over (x = y between them): the bits of so many single passes
  void (*scaled)(const T* x, T a, int64_t times, int64_t width, T* y);
  bool (*all_finite)(const T* x, int64_t n);
};

template <typename T>
const Kernels<T>& kernels();
template <>
const Kernels<float>& kernels<float>();
template <>
const Kernels<double>& kernels<double>();

// "avx512", "avx2" or "baseline". FWPKM_CPU_CAPABILITY, read once, can lower it.
const char* capability();

}  // namespace fwpkm::vector
