// Body of the vectorised loops; see vector.h. Included by one file per instruction set, which defines
// FWPKM_VECTOR_NAMESPACE. No standard headers with inline functions: compiled for a newer instruction set they could
// replace the ordinary copies of the other files at link time. (Those of the intrinsics never leave an object file.)
#if defined(__SSE2__)
#include <immintrin.h>
#endif

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
constexpr int kTileTokens = 4, kTileKeys = kRegisters == 1 ? 4 : 3;
constexpr int kColumns = kRegisters == 1 ? 16 : 4;

template <typename T>
struct Register;
template <>
struct Register<float> {
  typedef float type __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef int32_t bits __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef float anywhere __attribute__((vector_size(FWPKM_REGISTER_BYTES), aligned(sizeof(float)), may_alias));
};
template <>
struct Register<double> {
  typedef double type __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef int64_t bits __attribute__((vector_size(FWPKM_REGISTER_BYTES)));
  typedef double anywhere __attribute__((vector_size(FWPKM_REGISTER_BYTES), aligned(sizeof(double)), may_alias));
};

template <typename T>
constexpr int64_t kLanes = 64 / sizeof(T);

// A struct of native registers, because compilers keep a longer vector type in memory. So they do with an array of Vec
// that is filled by `= {}` or memcpy instead of assignments.
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
  FWPKM_INLINE void subtract_product(const Vec& a, const Vec& b) {
    for (int i = 0; i < kRegisters; ++i) v[i] -= a.v[i] * b.v[i];
  }
  FWPKM_INLINE void add_product(T a, const Vec& b) {
    for (int i = 0; i < kRegisters; ++i) v[i] += a * b.v[i];
  }
};

template <typename T>
FWPKM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  for (int i = 0; i < kRegisters; ++i)
    v.v[i] = *reinterpret_cast<const typename Register<T>::anywhere*>(p + i * (kLanes<T> / kRegisters));
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
    *reinterpret_cast<typename Register<T>::anywhere*>(p + i * (kLanes<T> / kRegisters)) = v.v[i];
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

// out[i * stride + j] = sum(v[i][j])
template <typename T, int N, int M>
FWPKM_INLINE void store_sums(const Vec<T> (&v)[N][M], T* out, int64_t stride) {
  for (int i = 0; i < N; ++i)
    for (int j = 0; j < M; ++j) out[i * stride + j] = sum(v[i][j]);
}

#if __has_builtin(__builtin_shufflevector)
#if defined(__AVX512F__)
// The same additions, on several vectors at a time.
FWPKM_INLINE void store_sums(const Vec<float> (&v)[4][4], float* out, int64_t stride) {
  typedef Register<float>::type Floats;
  Floats row[4];  // four lanes each of v[0][j], v[1][j], v[2][j], v[3][j]
  for (int j = 0; j < 4; ++j) {
    Floats half[2];  // eight lanes each of v[i][j], v[i + 1][j]
    for (int i = 0; i < 4; i += 2) {
      const Floats a = v[i][j].v[0], b = v[i + 1][j].v[0];
      half[i / 2] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                    __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    row[j] = __builtin_shufflevector(half[0], half[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             __builtin_shufflevector(half[0], half[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
  Floats pairs[2];  // in each quarter two lanes of row j and of row j + 1
  for (int j = 0; j < 4; j += 2)
    pairs[j / 2] =
        __builtin_shufflevector(row[j], row[j + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(row[j], row[j + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  const Floats all =
      __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
      __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
  float sums[16];
  __builtin_memcpy(sums, &all, sizeof sums);
  for (int i = 0; i < 4; ++i) __builtin_memcpy(out + i * stride, sums + 4 * i, 4 * sizeof(float));
}
#else
typedef float Quarter __attribute__((vector_size(16)));

FWPKM_INLINE Quarter quarter_sums(const Vec<float>& v) {
#if defined(__AVX__)
  const auto half = v.v[0] + v.v[1];
  return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#else
  return (v.v[0] + v.v[2]) + (v.v[1] + v.v[3]);
#endif
}

// The same additions, on four vectors at a time.
template <int M>
FWPKM_INLINE void store_sums(const Vec<float> (&v)[4][M], float* out, int64_t stride) {
  for (int j = 0; j < M; ++j) {
    Quarter pairs[2];  // two sums of each of two vectors
    for (int i = 0; i < 4; i += 2) {
      const Quarter a = quarter_sums(v[i][j]), b = quarter_sums(v[i + 1][j]);
      pairs[i / 2] = __builtin_shufflevector(a, b, 0, 1, 4, 5) + __builtin_shufflevector(a, b, 2, 3, 6, 7);
    }
    const Quarter all = __builtin_shufflevector(pairs[0], pairs[1], 0, 2, 4, 6) +
                        __builtin_shufflevector(pairs[0], pairs[1], 1, 3, 5, 7);
    for (int i = 0; i < 4; ++i) out[i * stride + j] = all[i];
  }
}
#endif
#endif

// Bit l: lane l is `threshold` or more.
template <typename T>
FWPKM_INLINE uint32_t at_least(const Vec<T>& v, T threshold) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return _mm512_cmp_ps_mask(v.v[0], _mm512_set1_ps(threshold), _CMP_GE_OQ);
  if constexpr (sizeof(T) == 8) return _mm512_cmp_pd_mask(v.v[0], _mm512_set1_pd(threshold), _CMP_GE_OQ);
#else
  uint32_t mask = 0;
  for (int i = 0; i < kRegisters; ++i) {
    const typename Register<T>::bits bits = v.v[i] >= threshold;
    constexpr int kLanesHere = FWPKM_REGISTER_BYTES / sizeof(T);
#if defined(__AVX__)
    if constexpr (sizeof(T) == 4) mask |= uint32_t(_mm256_movemask_ps((__m256)bits)) << (i * kLanesHere);
    if constexpr (sizeof(T) == 8) mask |= uint32_t(_mm256_movemask_pd((__m256d)bits)) << (i * kLanesHere);
#elif defined(__SSE2__)
    if constexpr (sizeof(T) == 4) mask |= uint32_t(_mm_movemask_ps((__m128)bits)) << (i * kLanesHere);
    if constexpr (sizeof(T) == 8) mask |= uint32_t(_mm_movemask_pd((__m128d)bits)) << (i * kLanesHere);
#else
    for (int l = 0; l < kLanesHere; ++l) mask |= uint32_t(bits[l] & 1) << (i * kLanesHere + l);
#endif
  }
  return mask;
#endif
}

template <typename T>
bool all_finite(const T* x, int64_t n) {
  // x * 0 is 0 for every finite x, NaN for the others. Four sums: one alone waits for each addition.
  Vec<T> odds[4] = {};
  int64_t c = 0;
  for (; c + 4 * kLanes<T> <= n; c += 4 * kLanes<T>)
    for (int i = 0; i < 4; ++i) odds[i].add_product(T(0), load(x + c + i * kLanes<T>));
  for (; c + kLanes<T> <= n; c += kLanes<T>) odds[0].add_product(T(0), load(x + c));
  odds[1].add_product(T(0), load_partial(x + c, n - c));
  return (sum(odds[0]) + sum(odds[1])) + (sum(odds[2]) + sum(odds[3])) == 0;
}

// ---- scores ---------------------------------------------------------------------------------------------------------
// One pass over the columns for each register of a vector, whose lanes do not meet before the end: so all sums of a
// tile stay in registers. Whole: rows are whole vectors.
template <typename T, int N, int M, bool Distance, bool Whole>
FWPKM_INLINE void score_tile(const T* q, int64_t q_stride, const T* keys, int64_t width, T* out, int64_t out_stride) {
  typedef typename Register<T>::type Lanes;
  Vec<T> sums[N][M];
#pragma GCC unroll 4
  for (int r = 0; r < kRegisters; ++r) {
    Lanes acc[N][M];
    for (auto& row : acc)
      for (auto& sum : row) sum = Lanes{};
    auto add = [&](auto load_at) __attribute__((always_inline)) {
      Lanes k[M];
      for (int j = 0; j < M; ++j) k[j] = load_at(keys + j * width);
      for (int i = 0; i < N; ++i) {
        const Lanes x = load_at(q + i * q_stride);
        for (int j = 0; j < M; ++j) {
          const Lanes d = Distance ? x - k[j] : x;
          if constexpr (Distance)
            acc[i][j] -= d * d;
          else
            acc[i][j] += d * k[j];
        }
      }
    };
    int64_t c = 0;
    for (; c + kLanes<T> <= width; c += kLanes<T>)
      add([&](const T* p) __attribute__((always_inline)) {
        return Lanes(*reinterpret_cast<const typename Register<T>::anywhere*>(p + c + r * (kLanes<T> / kRegisters)));
      });
    if constexpr (!Whole)
      add([&](const T* p) __attribute__((always_inline)) { return load_partial(p + c, width - c).v[r]; });
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < M; ++j) sums[i][j].v[r] = acc[i][j];
  }
  store_sums(sums, out, out_stride);
}

template <typename T, bool Distance, bool Whole>
void scores_of(const T* q, int64_t q_stride, int64_t n, const T* keys, int64_t num_keys, int64_t width, T* out) {
  int64_t j = 0;
  for (; j + kTileKeys <= num_keys; j += kTileKeys) {
    const T* k = keys + j * width;
    int64_t i = 0;
    for (; i + kTileTokens <= n; i += kTileTokens)
      score_tile<T, kTileTokens, kTileKeys, Distance, Whole>(q + i * q_stride, q_stride, k, width,
                                                             out + i * num_keys + j, num_keys);
    for (; i < n; ++i)
      score_tile<T, 1, kTileKeys, Distance, Whole>(q + i * q_stride, q_stride, k, width, out + i * num_keys + j,
                                                   num_keys);
  }
  for (; j < num_keys; ++j)
    for (int64_t i = 0; i < n; ++i)
      score_tile<T, 1, 1, Distance, Whole>(q + i * q_stride, q_stride, keys + j * width, width, out + i * num_keys + j,
                                           num_keys);
}

template <typename T>
void scores(const T* q, int64_t q_stride, int64_t n, const T* keys, int64_t num_keys, int64_t width, bool distance,
            T* out) {
  const auto run = width % kLanes<T> == 0 ? distance ? scores_of<T, true, true> : scores_of<T, false, true>
                   : distance             ? scores_of<T, true, false>
                                          : scores_of<T, false, false>;
  run(q, q_stride, n, keys, num_keys, width, out);
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

// A number that at least k of the scores reach: the k-th largest of the maxima of Groups * kLanes sets of scores. So
// few scores but the k largest reach it that the search hardly meets another.
template <typename T, int Groups>
T reached_by(const T* scores, int64_t n, int64_t k) {
  Vec<T> most[Groups];
  for (auto& m : most)
    for (auto& v : m.v) v = typename Register<T>::type{} - T(__builtin_inf());
  for (int64_t j = 0; j + Groups * kLanes<T> <= n; j += Groups * kLanes<T>)
    for (int g = 0; g < Groups; ++g) {
      const Vec<T> x = load(scores + j + g * kLanes<T>);
      for (int i = 0; i < kRegisters; ++i) most[g].v[i] = x.v[i] > most[g].v[i] ? x.v[i] : most[g].v[i];
    }
  constexpr int kSets = Groups * int(kLanes<T>);
  T maxima[kSets];
  for (int g = 0; g < Groups; ++g) store(maxima + g * kLanes<T>, most[g]);
  typename Register<T>::bits larger[Groups][kRegisters] = {};  // minus the number of larger maxima
  for (const T m : maxima)
    for (int g = 0; g < Groups; ++g)
      for (int i = 0; i < kRegisters; ++i) larger[g][i] += m > most[g].v[i];
  decltype(larger[0][0][0] + 0) counts[kSets];
  __builtin_memcpy(counts, larger, sizeof larger);
  T bound = T(__builtin_inf());
  for (int i = 0; i < kSets; ++i) bound = -counts[i] < k && maxima[i] < bound ? maxima[i] : bound;
  return bound;
}

template <typename T>
bool largest(const T* scores, int64_t n, int64_t k, T* best, int32_t* index) {
  if (!(n >= k && k > 0)) return false;
  if (!all_finite(scores, n)) {
    for (int64_t r = 0; r < k; ++r) best[r] = scores[r], index[r] = int32_t(r);
    return false;
  }
  constexpr int kGroups = 16 / int(kLanes<T>);  // 16 sets
  T threshold = k <= 8    ? reached_by<T, kGroups>(scores, n, k)
                : k <= 32 ? reached_by<T, 4 * kGroups>(scores, n, k)
                          : -T(__builtin_inf());
  int64_t count = 0;
  const auto offer = [&](int64_t j) __attribute__((always_inline)) {
    if (count < k)
      insert(scores[j], int32_t(j), count++, best, index);
    else if (scores[j] > best[k - 1])
      insert(scores[j], int32_t(j), k - 1, best, index);
  };
  int64_t j = 0;
  for (; j + kLanes<T> <= n; j += kLanes<T>) {
    uint32_t lanes = at_least(load(scores + j), threshold);
    if (!lanes) continue;
    for (; lanes; lanes &= lanes - 1) offer(j + __builtin_ctz(lanes));
    if (count == k) threshold = best[k - 1];
  }
  for (; j < n; ++j)
    if (scores[j] >= threshold) offer(j);
  return true;
}

// ---- rows -----------------------------------------------------------------------------------------------------------
// row_of(r): the r-th row. on_the_way(r, c, n): called where n vectors of it are read, from column c on.
template <typename T, int N, bool Minus, typename RowOf, typename OnTheWay>
FWPKM_INLINE void add_columns(const RowOf& row_of, const OnTheWay& on_the_way, const T* minus, const T* weights,
                              int64_t count, int64_t c, T* out) {
  Vec<T> acc[N];
  for (auto& sum : acc) sum = Vec<T>{};
  for (int64_t r = 0; r < count; ++r) {
    const T* row = row_of(r) + c;
    on_the_way(r, c, N);
    for (int v = 0; v < N; ++v) {
      Vec<T> x = load(row + v * kLanes<T>);
      if constexpr (Minus) x = x - load(minus + c + v * kLanes<T>);
      acc[v].add_product(weights[r], x);
    }
  }
  for (int v = 0; v < N; ++v) store(out + c + v * kLanes<T>, acc[v]);
}

template <typename T, bool Minus, typename RowOf, typename OnTheWay>
FWPKM_INLINE void add_rows(const RowOf& row_of, const OnTheWay& on_the_way, const T* minus, const T* weights,
                           int64_t count, int64_t width, T* out) {
  int64_t c = 0;
  for (; c + kColumns * kLanes<T> <= width; c += kColumns * kLanes<T>)
    add_columns<T, kColumns, Minus>(row_of, on_the_way, minus, weights, count, c, out);
  if constexpr (kColumns > 4)
    for (; c + 4 * kLanes<T> <= width; c += 4 * kLanes<T>)
      add_columns<T, 4, Minus>(row_of, on_the_way, minus, weights, count, c, out);
  for (; c + kLanes<T> <= width; c += kLanes<T>)
    add_columns<T, 1, Minus>(row_of, on_the_way, minus, weights, count, c, out);
  if (c == width) return;
  Vec<T> acc = {};
  for (int64_t r = 0; r < count; ++r) {
    Vec<T> x = load_partial(row_of(r) + c, width - c);
    if constexpr (Minus) x = x - load_partial(minus + c, width - c);
    acc.add_product(weights[r], x);
  }
  store_partial(out + c, acc, width - c);
}

template <typename T>
void weighted_sum(const T* const* rows, const T* minus, const T* weights, int64_t count, int64_t width, T* out) {
  const auto row_of = [&](int64_t r) __attribute__((always_inline)) { return rows[r]; };
  const auto nothing = [](int64_t, int64_t, int) __attribute__((always_inline)) {};
  if (minus)
    add_rows<T, true>(row_of, nothing, minus, weights, count, width, out);
  else
    add_rows<T, false>(row_of, nothing, minus, weights, count, width, out);
}

// The processor fetches rows by itself only once they are being read. Asked for so many reads ahead, line by line as
// the same lines of the present row are added, they come while there are sums to do.
constexpr int64_t kReadsAhead = 16;

template <typename T>
void gather(const T* values, const int32_t* ids, const T* weights, int64_t n, int64_t count, int64_t known,
            int64_t width, T* out) {
  for (int64_t x = 0; x < n; ++x) {
    const int64_t first = x * count;
    const auto row_of = [&](int64_t r) __attribute__((always_inline)) { return values + ids[first + r] * width; };
    const auto fetch = [&](int64_t r, int64_t c, int vectors) __attribute__((always_inline)) {
      const int64_t ahead = first + r + kReadsAhead;
      if (ahead >= known) return;
      const T* row = values + ids[ahead] * width + c;
      for (int v = 0; v < vectors; ++v) __builtin_prefetch(row + v * kLanes<T>);
    };
    add_rows<T, false>(row_of, fetch, static_cast<const T*>(nullptr), weights + first, count, width, out + x * width);
  }
}

template <typename T, int N, bool Distance, bool Minus>
FWPKM_INLINE void dot_rows(const T* const* rows, const T* const* minus, const T* x, int64_t width, T* out) {
  Vec<T> acc[N];
  for (auto& sum : acc) sum = Vec<T>{};
  auto add = [&](auto load_at) __attribute__((always_inline)) {
    const Vec<T> xv = load_at(x);
    for (int r = 0; r < N; ++r) {
      const Vec<T> row = load_at(rows[r]);
      Vec<T> d = xv;
      if constexpr (Distance) d = xv - row;
      if constexpr (Minus) d = xv - load_at(minus[r]);
      acc[r].add_product(d, Distance ? d : row);
    }
  };
  int64_t c = 0;
  for (; c + kLanes<T> <= width; c += kLanes<T>)
    add([&](const T* p) __attribute__((always_inline)) { return load(p + c); });
  if (c < width) add([&](const T* p) __attribute__((always_inline)) { return load_partial(p + c, width - c); });
  for (int r = 0; r < N; ++r) out[r] = sum(acc[r]);
}

template <typename T, bool Distance, bool Minus>
FWPKM_INLINE void all_dot_rows(const T* const* rows, const T* const* minus, int64_t count, const T* x, int64_t width,
                               T* out) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) dot_rows<T, 4, Distance, Minus>(rows + r, minus + r, x, width, out + r);
  for (; r < count; ++r) dot_rows<T, 1, Distance, Minus>(rows + r, minus + r, x, width, out + r);
}

template <typename T>
void dots(const T* const* rows, const T* const* minus, int64_t count, const T* x, int64_t width, T* out) {
  if (minus)
    all_dot_rows<T, false, true>(rows, minus, count, x, width, out);
  else
    all_dot_rows<T, false, false>(rows, nullptr, count, x, width, out);
}

template <typename T>
void distances(const T* const* rows, int64_t count, const T* x, int64_t width, T* out) {
  all_dot_rows<T, true, false>(rows, nullptr, count, x, width, out);
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
constexpr Kernels<T> table() {
  return {scores<T>,    largest<T>, weighted_sum<T>, gather<T>, dots<T>,
          distances<T>, axpy<T>,    step<T>,         scaled<T>, all_finite<T>};
}

}  // namespace

// constinit: no code of a newer instruction set may run when the library is loaded.
extern constinit const Kernels<float> kFloat = table<float>();
extern constinit const Kernels<double> kDouble = table<double>();

}  // namespace fwpkm::vector::FWPKM_VECTOR_NAMESPACE
