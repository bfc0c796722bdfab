// Body of the vectorised loops; see vector.h. Included by one file per instruction set, which defines
// FWPKM_VECTOR_NAMESPACE. No standard headers with inline functions: compiled for a newer instruction set they could
// replace the ordinary copies of the other files at link time.
#include "cpu/vector.h"

namespace fwpkm::vector::FWPKM_VECTOR_NAMESPACE {
namespace {

#define FWPKM_INLINE inline __attribute__((always_inline))

// ---- 64 bytes: one register of AVX-512, two of AVX2, four of SSE2 or NEON -----------------------------------------
#if defined(__AVX512F__)
#define FWPKM_REGISTER_BYTES 64
#elif defined(__AVX__)
#define FWPKM_REGISTER_BYTES 32
#else
#define FWPKM_REGISTER_BYTES 16
#endif
constexpr int kRegisters = 64 / FWPKM_REGISTER_BYTES;
// Sums held in registers: of pairs of a token and a key, and of columns of a weighted sum of rows.
constexpr int kTileTokens = kRegisters == 1 ? 4 : 2, kTileKeys = kRegisters == 1 ? 4 : 2;
constexpr int kColumns = kRegisters == 1 ? 16 : 4;

template <typename T>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef int32_t bits __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef int64_t bits __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
};

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

// A struct of native registers, because compilers keep a longer vector type in memory.
template <typename T>
struct Vec {
  typename Register<T>::type v[kRegisters];

  FWPKM_INLINE friend Vec operator-(Vec a, const Vec& b) {
    for (int i = 0; i < kRegisters; ++i) a.v[i] -= b.v[i];
    return a;
  }
  FWPKM_INLINE void add_product(const Vec& a, const Vec& b) {  // fused where the instruction set has it
    for (int i = 0; i < kRegisters; ++i) v[i] += a.v[i] * b.v[i];
  }
  FWPKM_INLINE void add_product(T a, const Vec& b) {
    for (int i = 0; i < kRegisters; ++i) v[i] += a * b.v[i];
  }
};

template <typename T>
FWPKM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  for (int i = 0; i < kRegisters; ++i)
    __builtin_memcpy(&v.v[i], p + i * (kLanes<T> / kRegisters), FWPKM_REGISTER_BYTES);
  return v;
}

template <typename T>
FWPKM_INLINE Vec<T> load_partial(const T* p, int64_t n) {  // the lanes from n on are 0
  T lanes[kLanes<T>] = {};
  for (int64_t l = 0; l < n; ++l) lanes[l] = p[l];
  return load(lanes);
}

template <typename T>
FWPKM_INLINE void store(T* p, const Vec<T>& v) {
  for (int i = 0; i < kRegisters; ++i)
    __builtin_memcpy(p + i * (kLanes<T> / kRegisters), &v.v[i], FWPKM_REGISTER_BYTES);
}

template <typename T>
FWPKM_INLINE void store_partial(T* p, const Vec<T>& v, int64_t n) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (int64_t l = 0; l < n; ++l) p[l] = lanes[l];
}

template <typename T>
FWPKM_INLINE T sum(const Vec<T>& v) {
  typedef T Half __attribute__((vector_size(32)));
  typedef T Quarter __attribute__((vector_size(16)));
  Half h[2];
  Quarter q[2];
  __builtin_memcpy(h, &v, 64);
  h[0] += h[1];
  __builtin_memcpy(q, h, 32);
  q[0] += q[1];
  if constexpr (sizeof(T) == 4) return (q[0][0] + q[0][2]) + (q[0][1] + q[0][3]);
  return q[0][0] + q[0][1];
}

template <typename T>
FWPKM_INLINE bool any_greater(const Vec<T>& v, T threshold) {
  typename Register<T>::bits any = v.v[0] > threshold;
  for (int i = 1; i < kRegisters; ++i) any |= v.v[i] > threshold;
  int64_t words[FWPKM_REGISTER_BYTES / 8], all = 0;
  __builtin_memcpy(words, &any, sizeof any);
  for (const int64_t word : words) all |= word;
  return all != 0;
}

// ---- scores ---------------------------------------------------------------------------------------------------------
template <typename T, int N, int M, bool Distance>
FWPKM_INLINE void score_tile(const T* q, int64_t q_stride, const T* keys, int64_t width, T* out, int64_t out_stride) {
  Vec<T> acc[N][M] = {};
  auto add = [&](auto load_at) __attribute__((always_inline)) {
    Vec<T> k[M];
    for (int j = 0; j < M; ++j) k[j] = load_at(keys + j * width);
    for (int i = 0; i < N; ++i) {
      const Vec<T> x = load_at(q + i * q_stride);
      for (int j = 0; j < M; ++j) {
        const Vec<T> d = Distance ? x - k[j] : x;
        acc[i][j].add_product(d, Distance ? d : k[j]);
      }
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>)
    add([&](const T* p) __attribute__((always_inline)) { return load(p + c); });
  if (c < width) add([&](const T* p) __attribute__((always_inline)) { return load_partial(p + c, width - c); });
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < M; ++j) {
      const T s = sum(acc[i][j]);
      out[i * out_stride + j] = Distance ? -s : s;
    }
}

template <typename T, bool Distance>
void scores_of(const T* q, int64_t q_stride, int64_t n, const T* keys, int64_t num_keys, int64_t width, T* out) {
  int64_t j = 0;
  for (; j + kTileKeys <= num_keys; j += kTileKeys) {
    const T* k = keys + j * width;
    int64_t i = 0;
    for (; i + kTileTokens <= n; i += kTileTokens)
      score_tile<T, kTileTokens, kTileKeys, Distance>(q + i * q_stride, q_stride, k, width, out + i * num_keys + j,
                                                      num_keys);
    for (; i < n; ++i)
      score_tile<T, 1, kTileKeys, Distance>(q + i * q_stride, q_stride, k, width, out + i * num_keys + j, num_keys);
  }
  for (; j < num_keys; ++j)
    for (int64_t i = 0; i < n; ++i)
      score_tile<T, 1, 1, Distance>(q + i * q_stride, q_stride, keys + j * width, width, out + i * num_keys + j,
                                    num_keys);
}

template <typename T>
void scores(const T* q, int64_t q_stride, int64_t n, const T* keys, int64_t num_keys, int64_t width, bool distance,
            T* out) {
  if (distance)
    scores_of<T, true>(q, q_stride, n, keys, num_keys, width, out);
  else
    scores_of<T, false>(q, q_stride, n, keys, num_keys, width, out);
}

// ---- selection ------------------------------------------------------------------------------------------------------
template <typename T>
FWPKM_INLINE void insert(T x, int32_t j, int64_t last, T* best, int32_t* index) {
  int64_t p = last;
  for (; p > 0 && best[p - 1] < x; --p) {
    best[p] = best[p - 1];
    index[p] = index[p - 1];
  }
  best[p] = x;
  index[p] = j;
}

template <typename T>
bool largest(const T* scores, int64_t n, int64_t k, T* best, int32_t* index) {
  if (!(n >= k && k > 0)) return false;
  int64_t j = 0;
  T odd = 0;  // x * 0 is 0 for every finite x, NaN for the others
  for (; j < k; ++j) {
    insert(scores[j], int32_t(j), j, best, index);
    odd += scores[j] * 0;
  }
  Vec<T> odds = {};
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    const Vec<T> v = load(scores + j);
    odds.add_product(T(0), v);
    if (any_greater<T>(v, best[k - 1]))
      for (int64_t l = 0; l < kLanes<T>; ++l)
        if (scores[j + l] > best[k - 1]) insert(scores[j + l], int32_t(j + l), k - 1, best, index);
  }
  for (; j < n; ++j) {
    odd += scores[j] * 0;
    if (scores[j] > best[k - 1]) insert(scores[j], int32_t(j), k - 1, best, index);
  }
  return odd + sum(odds) == 0;
}

// ---- rows -----------------------------------------------------------------------------------------------------------
template <typename T, int N>
FWPKM_INLINE void weighted_sum_columns(const T* const* rows, const T* minus, const T* weights, int64_t count, int64_t c,
                                       T* out) {
  Vec<T> acc[N] = {};
  for (int64_t r = 0; r < count; ++r)
    for (int v = 0; v < N; ++v) {
      Vec<T> x = load(rows[r] + c + v * kLanes<T>);
      if (minus) x = x - load(minus + c + v * kLanes<T>);
      acc[v].add_product(weights[r], x);
    }
  for (int v = 0; v < N; ++v) store(out + c + v * kLanes<T>, acc[v]);
}

template <typename T>
void weighted_sum(const T* const* rows, const T* minus, const T* weights, int64_t count, int64_t width, T* out) {
  int64_t c = 0;
  for (; c + kColumns * kLanes<T> <= width; c += kColumns * kLanes<T>)
    weighted_sum_columns<T, kColumns>(rows, minus, weights, count, c, out);
  for (; c + 4 * kLanes<T> <= width; c += 4 * kLanes<T>)
    weighted_sum_columns<T, 4>(rows, minus, weights, count, c, out);
  for (; c + kLanes<T> <= width; c += kLanes<T>) weighted_sum_columns<T, 1>(rows, minus, weights, count, c, out);
  if (c == width) return;
  Vec<T> acc = {};
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> x = load_partial(rows[r] + c, width - c);
    if (minus) x = x - load_partial(minus + c, width - c);
    acc.add_product(weights[r], x);
  }
  store_partial(out + c, acc, width - c);
}

template <typename T, int N, bool Distance>
FWPKM_INLINE void dot_rows(const T* const* rows, const T* const* minus, const T* x, int64_t width, T* out) {
  Vec<T> acc[N] = {};
  auto add = [&](auto load_at) __attribute__((always_inline)) {
    const Vec<T> xv = load_at(x);
    for (int r = 0; r < N; ++r) {
      const Vec<T> row = load_at(rows[r]);
      const Vec<T> d = Distance ? xv - row : minus ? xv - load_at(minus[r]) : xv;
      acc[r].add_product(d, Distance ? d : row);
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>)
    add([&](const T* p) __attribute__((always_inline)) { return load(p + c); });
  if (c < width) add([&](const T* p) __attribute__((always_inline)) { return load_partial(p + c, width - c); });
  for (int r = 0; r < N; ++r) out[r] = sum(acc[r]);
}

template <typename T, bool Distance>
FWPKM_INLINE void all_dot_rows(const T* const* rows, const T* const* minus, int64_t count, const T* x, int64_t width,
                               T* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<T, 4, Distance>(rows + r, minus ? minus + r : minus, x, width, out + r);
  for (; r < count; ++r) dot_rows<T, 1, Distance>(rows + r, minus ? minus + r : minus, x, width, out + r);
}

template <typename T>
void dots(const T* const* rows, const T* const* minus, int64_t count, const T* x, int64_t width, T* out) {
  all_dot_rows<T, false>(rows, minus, count, x, width, out);
}

template <typename T>
void distances(const T* const* rows, int64_t count, const T* x, int64_t width, T* out) {
  all_dot_rows<T, true>(rows, nullptr, count, x, width, out);
}

template <typename T>
void axpy(T a, const T* x, int64_t width, T* y) {
  for (int64_t c = 0; c < width; ++c) y[c] += a * x[c];
}

template <typename T>
void step(const T* old, const T* sum, T scale, T lr, T clip, int64_t width, T* next, uint8_t* open) {
  if (clip < 0) {
    for (int64_t c = 0; c < width; ++c) next[c] = old[c] - lr * (scale * sum[c]);
    return;
  }
  if (open)
    for (int64_t c = 0; c < width; c += 8) {
      uint8_t bits = 0;
      for (int64_t l = 0; l < 8 && c + l < width; ++l) {
        const T g = scale * sum[c + l];
        bits |= uint8_t(g <= clip && g >= -clip) << l;
      }
      open[c / 8] = bits;
    }
  for (int64_t c = 0; c < width; ++c) {
    T g = scale * sum[c];
    g = g > clip ? clip : g < -clip ? -clip : g;
    next[c] = old[c] - lr * g;
  }
}

template <int64_t N>
struct Size {
  static constexpr int64_t value = N;
};

template <typename T>
void scaled(const T* x, T a, int64_t times, int64_t width, T* y) {
  // Elements side by side: one chain of multiplications alone waits for each of them.
  constexpr int64_t kBlock = 8 * kLanes<T>;
  int64_t c = 0;
  const auto block = [&](auto size) {
    constexpr int64_t n = decltype(size)::value;
    for (; c + n <= width; c += n) {
      T v[n];
      for (int64_t l = 0; l < n; ++l) v[l] = x[c + l];
      for (int64_t i = 0; i < times; ++i)
        for (int64_t l = 0; l < n; ++l) v[l] *= a;
      for (int64_t l = 0; l < n; ++l) y[c + l] = v[l];
    }
  };
  block(Size<kBlock>{});
  block(Size<kLanes<T>>{});
  block(Size<1>{});
}

template <typename T>
bool all_finite(const T* x, int64_t n) {
  Vec<T> odds = {};
  int64_t c = 0;
  for (; c + kLanes<T> <= n; c += kLanes<T>) odds.add_product(T(0), load(x + c));
  odds.add_product(T(0), load_partial(x + c, n - c));
  return sum(odds) == 0;
}

template <typename T>
constexpr Kernels<T> table() {
  return {scores<T>, largest<T>, weighted_sum<T>, dots<T>, distances<T>, axpy<T>, step<T>, scaled<T>, all_finite<T>};
}

}  // namespace

// constinit: no code of a newer instruction set may run when the library is loaded.
extern constinit const Kernels<float> kFloat = table<float>();
extern constinit const Kernels<double> kDouble = table<double>();

}  // namespace fwpkm::vector::FWPKM_VECTOR_NAMESPACE
