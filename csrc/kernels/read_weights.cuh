// Weights of a token's reads, a = f(z / temperature), and their derivatives, by the lanes of one warp.
//
// n = H*R reads of one token, jointly for softmax. All functions are called by a whole warp; arrays may lie in shared
// or device memory; lane l owns elements l, l + 32, ...: it reads and writes no others. Sums: a lane's elements in
// ascending order, then the lanes as in warp_sum.
#pragma once
#include "kernels/scan.cuh"

namespace fwpkm::kernels {

// f(i) for the lane's own elements.
template <typename F>
__device__ __forceinline__ void each_read(int64_t n, const F& f) {
#pragma unroll 1  // most tokens have no more reads than a warp has lanes
  for (int64_t i = threadIdx.x % 32; i < n; i += 32) f(i);
}

// Sum of f(i) over all elements.
template <typename T, typename F>
__device__ __forceinline__ T sum_of_reads(int64_t n, const F& f) {
  T sum = 0;
  each_read(n, [&](int64_t i) { sum += f(i); });
  return warp_sum(sum);
}

template <typename T>
__device__ void read_weights(Activation f, T temperature, const T* z, int64_t n, T* a) {
  if (f == Activation::kSoftmax) {
    T top = -INFINITY;
    each_read(n, [&](int64_t i) { top = z[i] > top ? z[i] : top; });
    top = warp_max(top);
    each_read(n, [&](int64_t i) { a[i] = exp((z[i] - top) / temperature); });
    const T total = sum_of_reads<T>(n, [&](int64_t i) { return a[i]; });
    each_read(n, [&](int64_t i) { a[i] /= total; });
    return;
  }
  each_read(n, [&](int64_t i) {
    const T x = z[i] / temperature;
    a[i] = f == Activation::kRelu ? (x > 0 ? x : T(0)) : x / (1 + exp(-x));
  });
}

// First and second derivative of silu or relu.
template <typename T>
__device__ __forceinline__ void curve(Activation f, T x, T& d1, T& d2) {
  if (f == Activation::kRelu) {
    d1 = x > 0 ? T(1) : T(0);
    d2 = 0;
    return;
  }
  const T s = 1 / (1 + exp(-x));
  d1 = s * (1 + x * (1 - s));
  d2 = s * (1 - s) * (2 + x * (1 - 2 * s));
}

// out = J g with J = da/dz, which is symmetric. out may be g.
template <typename T>
__device__ void through_weights(Activation f, T temperature, const T* a, const T* z, const T* g, int64_t n, T* out) {
  if (f == Activation::kSoftmax) {
    const T mean = sum_of_reads<T>(n, [&](int64_t i) { return a[i] * g[i]; });
    each_read(n, [&](int64_t i) { out[i] = a[i] * (g[i] - mean) / temperature; });
    return;
  }
  each_read(n, [&](int64_t i) {
    T d1, d2;
    curve(f, z[i] / temperature, d1, d2);
    out[i] = g[i] * d1 / temperature;
  });
}

// out += d/dz of sum_i y_i b_i with y = J t: the second-order term of weights that depend on scores.
template <typename T>
__device__ void add_second_order(Activation f, T temperature, const T* a, const T* z, const T* b, const T* t, int64_t n,
                                 T* out) {
  if (f == Activation::kSoftmax) {
    const T mean_b = sum_of_reads<T>(n, [&](int64_t i) { return a[i] * b[i]; });
    const T mean_t = sum_of_reads<T>(n, [&](int64_t i) { return a[i] * t[i]; });
    const T mean = sum_of_reads<T>(n, [&](int64_t i) { return a[i] * (b[i] - mean_b) * (t[i] - mean_t); });
    each_read(
        n, [&](int64_t i) { out[i] += a[i] * ((b[i] - mean_b) * (t[i] - mean_t) - mean) / temperature / temperature; });
    return;
  }
  each_read(n, [&](int64_t i) {
    T d1, d2;
    curve(f, z[i] / temperature, d1, d2);
    out[i] += b[i] * t[i] * d2 / temperature / temperature;
  });
}

}  // namespace fwpkm::kernels
