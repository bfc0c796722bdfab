// Product-key search and read weights of blocks of tokens; used by product_key_topk and by the scan.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/vector.h"
#include "ops/chunk_scan.h"

namespace fwpkm {

// Where the search of one token puts its results.
template <typename T>
struct SearchResult {
  int32_t* list_indices;  // [H, 2, R]  the R best sub-keys of each half, falling score
  T* list_scores;         // [H, 2, R]
  int32_t* places;        // [H, R]     i*R + j: the sum of list places i and j; falling sum
  int32_t* slots;         // [H, R]
  T* scores;              // [H, R]
};

// The R best sums, falling; equal sums by rising slot. Both lists fall, so sums fall along i and along j.
template <typename T>
void combine(const T* s0, const T* s1, const int32_t* i0, const int32_t* i1, int64_t topk, int64_t num_sub_keys,
             int32_t* places, int32_t* slots, T* z) {
  int64_t count = 0;
  for (int64_t i = 0; i < topk; ++i) {
    if (count == topk && s0[i] + s1[0] < z[topk - 1]) break;
    for (int64_t j = 0; j < topk; ++j) {
      const T sum = s0[i] + s1[j];
      const int32_t slot = int32_t(i0[i] * num_sub_keys + i1[j]);
      if (count == topk) {
        if (sum < z[topk - 1]) break;
        if (sum == z[topk - 1] && slot > slots[topk - 1]) continue;
      }
      int64_t p = count < topk ? count++ : topk - 1;
      for (; p > 0 && (z[p - 1] < sum || (z[p - 1] == sum && slots[p - 1] > slot)); --p) {
        z[p] = z[p - 1];
        slots[p] = slots[p - 1];
        places[p] = places[p - 1];
      }
      z[p] = sum;
      slots[p] = slot;
      places[p] = int32_t(i * topk + j);
    }
  }
}

template <typename T>
class ProductKeySearch {
 public:
  static constexpr int64_t kBlock = 16;  // tokens whose scores are held at a time; more queries leave the L1 cache

  ProductKeySearch(const ProductKeySizes& sizes, int64_t topk, Score score, double eps)
      : s_(sizes),
        topk_(topk),
        idw_(score == Score::kIdw),
        eps_(T(eps)),
        scores_(kBlock * sizes.sub_keys),
        query_(kBlock * sizes.half_width) {}

  // n <= kBlock tokens whose queries [H, K] lie one after the other. result(i): where token i's results go. False if
  // a score is NaN or infinite; the results are then in range, but without meaning.
  template <typename ResultOf>
  bool operator()(const T* query, int64_t n, const T* sub_keys, const ResultOf& result) {
    const auto& v = vector::kernels<T>();
    const int64_t half = s_.half_width, stride = s_.heads * s_.key_dim();
    bool finite = true;
    for (int64_t h = 0; h < s_.heads; ++h)
      for (int64_t p = 0; p < 2; ++p) {
        for (int64_t i = 0; i < n; ++i) std::copy_n(query + i * stride + (2 * h + p) * half, half, &query_[i * half]);
        v.scores(query_.data(), half, n, sub_keys + (2 * h + p) * s_.sub_keys * half, s_.sub_keys, half, idw_,
                 scores_.data());
        for (int64_t i = 0; i < n; ++i) {
          const SearchResult<T> r = result(i);
          T* best = r.list_scores + (2 * h + p) * topk_;
          finite &= v.largest(scores_.data() + i * s_.sub_keys, s_.sub_keys, topk_, best,
                              r.list_indices + (2 * h + p) * topk_);
          if (idw_)
            for (int64_t l = 0; l < topk_; ++l) best[l] = -std::log(eps_ - best[l]);
        }
      }
    for (int64_t i = 0; i < n; ++i) {
      const SearchResult<T> r = result(i);
      for (int64_t h = 0; h < s_.heads; ++h) {
        const int64_t l = 2 * h * topk_, o = h * topk_;
        combine(r.list_scores + l, r.list_scores + l + topk_, r.list_indices + l, r.list_indices + l + topk_, topk_,
                s_.sub_keys, r.places + o, r.slots + o, r.scores + o);
        finite &= std::isfinite(r.scores[o]) && std::isfinite(r.scores[o + topk_ - 1]);  // the sum may overflow
      }
    }
    return finite;
  }

 private:
  ProductKeySizes s_;
  int64_t topk_;
  bool idw_;
  T eps_;
  std::vector<T> scores_;  // [kBlock, P]
  std::vector<T> query_;   // [kBlock, K/2]: of one half, side by side
};

// ---- a = f(z / temperature) and its Jacobian J (symmetric); n = H*R reads of one token ------------------------------
template <typename T>
void read_weights(Activation f, T temperature, const T* z, int64_t n, T* a) {
  if (f == Activation::kSoftmax) {
    const T top = *std::max_element(z, z + n);
    T total = 0;
    for (int64_t r = 0; r < n; ++r) total += a[r] = std::exp((z[r] - top) / temperature);
    for (int64_t r = 0; r < n; ++r) a[r] /= total;
    return;
  }
  for (int64_t r = 0; r < n; ++r) {
    const T x = z[r] / temperature;
    a[r] = f == Activation::kRelu ? std::max(x, T(0)) : x / (1 + std::exp(-x));
  }
}

// First and second derivative of silu or relu.
template <typename T>
void curve(Activation f, T x, T& d1, T& d2) {
  const T s = 1 / (1 + std::exp(-x));
  d1 = f == Activation::kRelu ? T(x > 0) : s * (1 + x * (1 - s));
  d2 = f == Activation::kRelu ? T(0) : s * (1 - s) * (2 + x * (1 - 2 * s));
}

// out = J g
template <typename T>
void through_weights(Activation f, T temperature, const T* a, const T* z, const T* g, int64_t n, T* out) {
  if (f == Activation::kSoftmax) {
    T mean = 0;
    for (int64_t r = 0; r < n; ++r) mean += a[r] * g[r];
    for (int64_t r = 0; r < n; ++r) out[r] = a[r] * (g[r] - mean) / temperature;
    return;
  }
  for (int64_t r = 0; r < n; ++r) {
    T d1, d2;
    curve(f, z[r] / temperature, d1, d2);
    out[r] = g[r] * d1 / temperature;
  }
}

// d/dz of sum_r y_r b_r with y = J t: the second-order term of weights that depend on scores. out += it.
template <typename T>
void add_second_order(Activation f, T temperature, const T* a, const T* z, const T* b, const T* t, int64_t n, T* out) {
  if (f == Activation::kSoftmax) {
    T mean_b = 0, mean_t = 0, mean = 0;
    for (int64_t r = 0; r < n; ++r) mean_b += a[r] * b[r], mean_t += a[r] * t[r];
    for (int64_t r = 0; r < n; ++r) mean += a[r] * (b[r] - mean_b) * (t[r] - mean_t);
    for (int64_t r = 0; r < n; ++r)
      out[r] += a[r] * ((b[r] - mean_b) * (t[r] - mean_t) - mean) / temperature / temperature;
    return;
  }
  for (int64_t r = 0; r < n; ++r) {
    T d1, d2;
    curve(f, z[r] / temperature, d1, d2);
    out[r] += b[r] * t[r] * d2 / temperature / temperature;
  }
}

}  // namespace fwpkm
