// product_key_search.cuh and product_key_topk_backward.cuh against plain loops in the orders that they document.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/product_key_search.cuh"
#include "kernels/product_key_topk_backward.cuh"
#include "testing.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

enum class Numbers {
  kReal,
  kInteger,  // -1, 0, 1: many scores are equal, and many sums
  kTwins,    // every sub-key comes three times
  kCut,      // sub-keys differ by what tensor cores do not see: few, then many of them
  kCutAll,
  kTiny,          // queries whose squares are zero
  kNaN,           // in one query
  kInfinity,      // in one sub-key
  kLargeSums,     // finite scores whose sums overflow
  kZeroDistance,  // eps = 0, and a query that is a sub-key
};

struct Shape {
  int64_t tokens, heads, sub_keys, width, topk;  // N, H, P, K/2, R
  bool idw = false;
  Numbers numbers = Numbers::kReal;
  size_t offset = 0;                               // of the rows from a multiple of 16 bytes, in elements
  int64_t per_row = 0, row_stride = 0, first = 0;  // TokenRows; 0: one batch row
  bool places = true;
  int filtered = -1;    // 1: the filter leaves nothing over; 0: it leaves something over
  int64_t invalid = 0;  // every invalid-th slot of a backward is out of range
  int64_t memories = 1;

  int64_t lists() const { return 2 * heads; }
  int64_t memory(int64_t t) const { return memories == 1 ? 0 : (t / per_row * 2 + 1) % memories; }
  // memories: of_row, if there are several
  TokenRows rows(const int32_t* of_row) const {
    return per_row ? TokenRows{tokens, per_row, row_stride, first, of_row} : TokenRows{tokens, tokens, tokens, 0};
  }
  int64_t row(int64_t t) const { return per_row ? t / per_row * row_stride + first + t % per_row : t; }
  int64_t query_rows() const { return tokens ? row(tokens - 1) + 1 : 0; }
};

template <typename T>
struct Data {
  Shape s;
  T eps;
  Buffer<T> query, sub_keys;

  explicit Data(const Shape& shape)
      : s(shape),
        eps(s.numbers == Numbers::kZeroDistance ? T(0) : T(1e-3)),
        query(s.query_rows() * s.lists() * s.width, s.offset),
        sub_keys(s.memories * s.lists() * s.sub_keys * s.width, s.offset) {
    Random random;
    for (auto* buffer : {&query, &sub_keys})
      for (size_t i = 0; i < buffer->size(); ++i)
        (*buffer)[i] = s.numbers == Numbers::kInteger ? T(random.below(3) - 1) : T(random.real());
    if (s.numbers == Numbers::kTwins)
      for (int64_t j = 0; j < s.lists() * s.sub_keys; ++j)
        std::copy_n(&sub_keys[j / 3 * 3 * s.width], s.width, &sub_keys[j * s.width]);
    if (s.numbers == Numbers::kCut || s.numbers == Numbers::kCutAll || s.numbers == Numbers::kTiny) {
      const int64_t alike = s.numbers == Numbers::kCutAll ? s.sub_keys : 5;
      for (int64_t j = 0; j < s.lists() * s.sub_keys; ++j)
        for (int64_t c = 0; c < s.width; ++c) {
          const int64_t first = j - j % s.sub_keys % alike;
          sub_keys[j * s.width + c] = sub_keys[first * s.width + c] * T(1 + double(random.below(1000)) / 1.1e6);
        }
    }
    if (s.numbers == Numbers::kTiny)
      for (size_t i = 0; i < query.size(); ++i) query[i] *= T(1e-23);
    if (s.numbers == Numbers::kNaN) query[((s.row(s.tokens / 2) + 1) * s.lists() - 1) * s.width] = T(NAN);
    if (s.numbers == Numbers::kInfinity) sub_keys[sub_keys.size() - 1] = T(INFINITY);
    if (s.numbers == Numbers::kLargeSums) {
      std::fill_n(&query[0], query.size(), T(1));
      for (size_t i = 0; i < sub_keys.size(); ++i)
        sub_keys[i] = std::numeric_limits<T>::max() / (s.width * (i < sub_keys.size() / 2 ? 1.1 : 3));
    }
    if (s.numbers == Numbers::kZeroDistance) std::copy_n(&sub_keys[0], s.width, &query[0]);
  }
  bool reported() const { return s.numbers >= Numbers::kNaN; }
  const T* query_of(int64_t t, int64_t list) const { return &query[(s.row(t) * s.lists() + list) * s.width]; }
  // list: through all memories
  const T* sub_key(int64_t list, int64_t j) const { return &sub_keys[(list * s.sub_keys + j) * s.width]; }
};

// NaN has many bit patterns; a result that must be NaN is compared as one.
template <typename T>
bool same_or_nan(const Buffer<T>& found, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (std::isnan(expected[i]) ? !std::isnan(found[i]) : std::memcmp(&found[i], &expected[i], sizeof(T)) != 0)
      return false;
  return true;
}

// ------------------------------------------------------------------------------------------------------------ search
template <typename T>
struct Lists {
  std::vector<int32_t> indices, places, slots;
  std::vector<T> list_scores, scores;
};

// One list of the search, by sorting all similarities.
template <typename T>
void search_list(const Data<T>& d, int64_t t, int64_t list, int32_t* indices, T* scores) {
  const Shape& s = d.s;
  constexpr int64_t kPack = 16 / sizeof(T);
  std::vector<T> similarity(s.sub_keys);
  for (int64_t j = 0; j < s.sub_keys; ++j) {
    T sum = 0;
    for (int64_t c = 0; c < (s.width + kPack - 1) / kPack * kPack; ++c) {
      const T q = c < s.width ? d.query_of(t, list)[c] : T(0),
              k = c < s.width ? d.sub_key(s.memory(t) * s.lists() + list, j)[c] : T(0);
      sum = s.idw ? std::fma(-(q - k), q - k, sum) : std::fma(q, k, sum);
    }
    similarity[j] = sum;
  }
  bool finite = std::all_of(similarity.begin(), similarity.end(), [](T x) { return std::isfinite(x); });
  if (finite) {
    std::vector<int32_t> order(s.sub_keys);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return similarity[a] > similarity[b]; });
    for (int64_t r = 0; r < s.topk; ++r) {
      indices[r] = order[r];
      scores[r] = s.idw ? -std::log(d.eps - similarity[order[r]]) : similarity[order[r]];
      finite &= std::isfinite(scores[r]);
    }
  }
  if (finite) return;
  std::fill_n(indices, s.topk, -1);
  std::fill_n(scores, s.topk, T(NAN));
}

// The best sums of two lists, by sorting all of them.
template <typename T>
void combine_list(const Shape& s, int64_t token, const int32_t* indices, const T* list_scores, int32_t* places,
                  int32_t* slots, T* scores) {
  const auto sum = [&](int32_t pair) { return list_scores[pair / s.topk] + list_scores[s.topk + pair % s.topk]; };
  const auto slot = [&](int32_t pair) {
    const int64_t first_slot = s.memory(token) * s.sub_keys * s.sub_keys;
    return int32_t(first_slot + indices[pair / s.topk] * s.sub_keys + indices[s.topk + pair % s.topk]);
  };
  std::vector<int32_t> order(s.topk * s.topk);
  std::iota(order.begin(), order.end(), 0);
  bool finite = indices[0] >= 0 && indices[s.topk] >= 0;
  if (finite)
    std::sort(order.begin(), order.end(),
              [&](int32_t a, int32_t b) { return sum(a) > sum(b) || (sum(a) == sum(b) && slot(a) < slot(b)); });
  for (int64_t r = 0; r < s.topk; ++r) finite &= std::isfinite(sum(order[r]));
  for (int64_t r = 0; r < s.topk; ++r) {
    places[r] = finite ? order[r] : 0;
    slots[r] = finite ? slot(order[r]) : -1;
    scores[r] = finite ? sum(order[r]) : T(NAN);
  }
}

template <typename Size, typename T>
Run make_search(Shape s) {
  auto d = std::make_shared<Data<T>>(s);
  const int64_t entries = s.tokens * s.lists() * s.topk, reads = entries / 2;
  Lists<T> expected{std::vector<int32_t>(entries), std::vector<int32_t>(reads), std::vector<int32_t>(reads),
                    std::vector<T>(entries), std::vector<T>(reads)};
  for (int64_t l = 0; l < s.tokens * s.lists(); ++l)
    search_list(*d, l / s.lists(), l % s.lists(), &expected.indices[l * s.topk], &expected.list_scores[l * s.topk]);
  for (int64_t n = 0; n < s.tokens * s.heads; ++n)
    combine_list(s, n / s.heads, &expected.indices[2 * n * s.topk], &expected.list_scores[2 * n * s.topk],
                 &expected.places[n * s.topk], &expected.slots[n * s.topk], &expected.scores[n * s.topk]);
  return [=]() -> std::string {
    Buffer<int32_t> indices(entries), places(s.places ? reads : 0), slots(reads);
    Buffer<T> list_scores(entries), scores(reads);
    Buffer<uint8_t> workspace(search_workspace<T, Size>(s.tokens, s.heads, s.sub_keys));
    Buffer<unsigned> errors(1);
    errors.clear(0);
    Buffer<int32_t> of_row(s.memories == 1 ? 0 : s.tokens / s.per_row);
    for (size_t b = 0; b < of_row.size(); ++b) of_row[b] = int32_t(s.memory(int64_t(b) * s.per_row));
    const TokenRows rows = s.rows(s.memories == 1 ? nullptr : of_row.get());
    if (search_product_keys<Size>(ProductKeySearch<T>{.query = d->query.get(),
                                                      .rows = rows,
                                                      .sub_keys = d->sub_keys.get(),
                                                      .heads = s.heads,
                                                      .num_sub_keys = s.sub_keys,
                                                      .half_width = s.width,
                                                      .topk = s.topk,
                                                      .idw = s.idw,
                                                      .eps = d->eps,
                                                      .workspace = workspace.get(),
                                                      .list_indices = indices.get(),
                                                      .list_scores = list_scores.get(),
                                                      .places = s.places ? places.get() : nullptr,
                                                      .slots = slots.get(),
                                                      .scores = scores.get(),
                                                      .errors = &errors[0]},
                                  nullptr))
      return "launch";
    if (s.filtered >= 0 &&
        s.filtered != !std::count(workspace.get(), workspace.get() + rows.tiles(kRedoTokens) * s.lists(), 1))
      return "which lists were left over by the filter";
    if (!indices.same_bits(expected.indices)) return "list indices";
    if (!same_or_nan(list_scores, expected.list_scores)) return "list scores";
    if (!slots.same_bits(expected.slots)) return "slots";
    if (s.places && !places.same_bits(expected.places)) return "places";
    if (!same_or_nan(scores, expected.scores)) return "scores";
    return expect(errors[0] == (d->reported() ? unsigned(kNotFinite) : 0u), "error word");
  };
}

// The combination alone, of lists that rounding keeps from falling: two neighbours stand the wrong way round.
template <typename Size, int kPerLane, typename T>
Run make_combine(Shape s) {
  Random random;
  const int64_t reads = s.tokens * s.heads * s.topk;
  const auto indices = std::make_shared<Buffer<int32_t>>(2 * reads);
  const auto list_scores = std::make_shared<Buffer<T>>(2 * reads);
  for (int64_t l = 0; l < 2 * reads; ++l) {
    const int64_t r = l % s.topk;
    (*indices)[l] = int32_t((r * 7 + l / s.topk) % s.sub_keys);
    (*list_scores)[l] = (r ? (*list_scores)[l - 1] : T(1)) - T(random.below(3)) / 4;  // with ties
  }
  for (int64_t list = 0; list < 2 * reads / s.topk; list += 3)
    std::swap((*list_scores)[list * s.topk], (*list_scores)[list * s.topk + s.topk - 1]);
  return [=]() -> std::string {
    Buffer<int32_t> places(reads), slots(reads);
    Buffer<T> scores(reads);
    Buffer<unsigned> errors(1);
    errors.clear(0);
    if (simt::launch(combine<Size, kPerLane, T>, blocks_for<Size>(s.tokens * s.heads, Size::kThreads / 32),
                     Size::kThreads, nullptr, indices->get(), list_scores->get(), s.rows(nullptr), s.heads,
                     int32_t(s.sub_keys), int(s.topk), places.get(), slots.get(), scores.get(), &errors[0]))
      return "launch";
    std::vector<int32_t> its_places(s.topk), its_slots(s.topk);
    std::vector<T> its_scores(s.topk);
    for (int64_t n = 0; n < s.tokens * s.heads; ++n) {
      combine_list(s, n / s.heads, indices->get() + 2 * n * s.topk, list_scores->get() + 2 * n * s.topk,
                   its_places.data(), its_slots.data(), its_scores.data());
      for (int64_t r = 0; r < s.topk; ++r)
        if (slots[n * s.topk + r] != its_slots[r] || places[n * s.topk + r] != its_places[r] ||
            scores[n * s.topk + r] != its_scores[r])
          return "read " + std::to_string(r) + " of " + std::to_string(n);
    }
    return expect(errors[0] == 0, "error word");
  };
}

// More reads than a list has places.
template <typename T>
Run make_too_many() {
  return [] {
    Buffer<T> rows(kMaxTopk + 1);
    ProductKeySearch<T> x{};
    x.query = x.sub_keys = rows.get();
    x.rows = {1, 1, 1, 0};
    x.heads = x.half_width = 1;
    x.num_sub_keys = x.topk = kMaxTopk + 1;
    const bool refused = search_product_keys(x, nullptr) != cudaSuccess;
    return expect(refused, "not refused");
  };
}

// ---------------------------------------------------------------------------------------------------------- backward
template <typename T>
T square_distance(const T* a, const T* b, int64_t width) {
  T lanes[32] = {};
  for (int64_t c = 0; c < width; ++c) {
    T& sum = lanes[c / (16 / sizeof(T)) % 32];
    sum = std::fma(a[c] - b[c], a[c] - b[c], sum);
  }
  for (int half = 16; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

template <typename Sorting, typename Size, typename T>
Run make_backward(Shape s) {
  auto d = std::make_shared<Data<T>>(s);
  const int64_t reads = s.tokens * s.heads * s.topk;
  auto slots = std::make_shared<Buffer<int32_t>>(reads);
  auto dscores = std::make_shared<Buffer<T>>(reads);
  Random random{2};
  for (int64_t i = 0; i < reads; ++i) {
    (*slots)[i] = int32_t(random.below(1 + random.below(s.sub_keys * s.sub_keys)));
    if (s.invalid && i % s.invalid == 1) (*slots)[i] = i % 2 ? -1 : int32_t(s.sub_keys * s.sub_keys);
    (*dscores)[i] = T(random.real());
  }
  std::vector<T> dquery(d->query.size()), dsub_keys(d->sub_keys.size());
  std::vector<std::vector<T>> pieces(dsub_keys.size());
  std::vector<int64_t> lengths(s.lists() * s.sub_keys);
  for (int64_t l = 0; l < s.tokens * s.lists(); ++l)
    for (int64_t r = 0; r < s.topk; ++r) {
      const int64_t i = l / 2 * s.topk + r, list = l % s.lists(), slot = (*slots)[i];
      const T* const q = d->query_of(l / s.lists(), list);
      T* const dq = &dquery[l * s.width];
      if (slot < 0 || slot >= s.sub_keys * s.sub_keys) {
        for (int64_t c = 0; c < s.width; ++c) dq[c] = T(NAN);
        continue;
      }
      const int64_t row = list * s.sub_keys + (l % 2 == 0 ? slot / s.sub_keys : slot % s.sub_keys);
      const T* const k = d->sub_key(0, row);
      const T beta = s.idw ? 2 * (*dscores)[i] / (d->eps + square_distance(q, k, s.width)) : (*dscores)[i];
      const bool begins = lengths[row]++ % 32 == 0;
      for (int64_t c = 0; c < s.width; ++c) {
        dq[c] = std::fma(beta, s.idw ? k[c] - q[c] : k[c], dq[c]);
        std::vector<T>& sums = pieces[row * s.width + c];
        if (begins) sums.push_back(0);
        sums.back() = std::fma(beta, s.idw ? q[c] - k[c] : q[c], sums.back());
      }
    }
  for (size_t i = 0; i < dsub_keys.size(); ++i) dsub_keys[i] = pieces[i].empty() ? T(0) : tree(pieces[i]);
  return [=]() -> std::string {
    const int32_t entries = int32_t(2 * reads);
    Buffer<int32_t> keys(entries), workspace(ordered_lists_workspace<Sorting>(entries));
    Buffer<T> betas(entries), scratch(column_sums_scratch<T, Size>(entries, s.lists(), s.width)),
        found(dquery.size(), s.offset), found_keys(dsub_keys.size(), s.offset);
    Buffer<unsigned> errors(1);
    errors.clear(0);
    found_keys.clear(0);
    if (product_key_topk_backward<Sorting, Size>(dscores->get(), d->query.get(), d->sub_keys.get(), slots->get(),
                                                 s.tokens, s.heads, s.sub_keys, s.topk, s.width, s.idw, d->eps,
                                                 keys.get(), betas.get(), workspace.get(), scratch.get(), found.get(),
                                                 found_keys.get(), errors.get(), nullptr))
      return "launch";
    if (!same_or_nan(found, dquery)) return "dquery";
    if (!found_keys.same_bits(dsub_keys)) return "dsub_keys";
    return expect(errors[0] == (s.invalid ? unsigned(kIndexOutOfRange) : 0u), "error word");
  };
}

using Normal = SearchSize;
template <typename Base>
struct NoFilter : Base {
  static constexpr int kManyTokens = 64, kFewTokens = 16, kManyBlocks = 0, kLeastTokens = 1 << 30;
  static constexpr int kManyThreads = Base::kThreads;
};
struct Many : SearchSize {  // never the way of few tokens, nor the filter
  using Filter = NoFilter<LaunchSize>;
  static constexpr int64_t kFewSimilarities = 0;
};
struct SmallFew : Small {
  using Filter = NoFilter<Small>;
  static constexpr int64_t kFewSimilarities = 1 << 30;
};
struct SmallMany : Small {
  using Filter = NoFilter<Small>;
  static constexpr int64_t kFewSimilarities = 0;
};
template <int kBlocks, int kTimes = 1>
struct Filtering : SearchSize {  // blocks of many tokens, with so many times the threads, or of few
  struct Filter : FilterSize {
    static constexpr int kManyBlocks = kBlocks, kLeastTokens = 1, kManyThreads = kTimes * kThreads;
  };
};
template <int kBlocks, int kTimes = 1>
struct SmallFiltering : SmallMany {
  struct Filter : Small {
    static constexpr int kManyTokens = 32, kFewTokens = 16, kManyBlocks = kBlocks, kLeastTokens = 1;
    static constexpr int kManyThreads = kTimes * kThreads;
  };
};
using FilterMany = Filtering<0>;
using FilterFew = Filtering<1 << 30>;
using FilterTwice = Filtering<0, 2>;
using SmallFilterMany = SmallFiltering<0>;
using SmallFilterFew = SmallFiltering<1 << 30>;
using SmallFilterTwice = SmallFiltering<0, 2>;
using Sort = OrderedListsSize;
constexpr bool kIdw = true;

const Register kCases({
    {"search_float", [] { return make_search<Normal, float>({17, 2, 300, 40, 8}); }},
    {"search_double", [] { return make_search<Normal, double>({17, 1, 300, 40, 8}); }},
    {"search_idw_float", [] { return make_search<Normal, float>({17, 1, 300, 40, 8, kIdw}); }},
    {"search_idw_double", [] { return make_search<Normal, double>({9, 2, 70, 20, 8, kIdw}); }},
    {"search_many_float", [] { return make_search<Many, float>({70, 1, 200, 40, 3}); }},
    {"search_many_double", [] { return make_search<Many, double>({40, 1, 200, 20, 3}); }},
    {"search_many_idw_float", [] { return make_search<Many, float>({17, 2, 130, 33, 8, kIdw}); }},
    {"search_many_idw_double", [] { return make_search<Many, double>({17, 1, 130, 9, 3, kIdw}); }},
    {"search_one_token", [] { return make_search<Normal, float>({1, 4, 64, 64, 8}); }},
    {"search_no_tokens", [] { return make_search<Normal, float>({0, 2, 5, 4, 3}); }},
    {"search_one_read", [] { return make_search<SmallFew, float>({17, 1, 150, 3, 1}); }},
    {"search_one_column", [] { return make_search<SmallFew, double>({5, 1, 70, 1, 2, kIdw}); }},
    {"search_one_sub_key", [] { return make_search<SmallMany, float>({3, 1, 1, 5, 1}); }},
    {"search_32_reads", [] { return make_search<SmallFew, float>({5, 1, 140, 8, 32}); }},
    {"search_33_reads", [] { return make_search<SmallFew, double>({4, 1, 140, 8, 33}); }},
    {"search_128_reads", [] { return make_search<SmallMany, float>({2, 1, 300, 8, 128}); }},
    {"search_128_reads_idw", [] { return make_search<SmallFew, float>({2, 1, 200, 8, 128, kIdw}); }},
    {"search_all_read", [] { return make_search<SmallFew, float>({3, 1, 40, 5, 40}); }},
    {"search_all_128_read", [] { return make_search<SmallFew, double>({1, 1, 128, 5, 128, kIdw}); }},
    {"search_shifted", [] { return make_search<SmallFew, float>({9, 1, 70, 40, 4, false, Numbers::kReal, 1}); }},
    {"search_ties", [] { return make_search<SmallFew, float>({12, 2, 140, 3, 8, false, Numbers::kInteger}); }},
    {"search_ties_many", [] { return make_search<SmallMany, double>({12, 1, 140, 3, 8, kIdw, Numbers::kInteger}); }},
    {"search_ties_100_reads",
     [] { return make_search<SmallFew, float>({2, 1, 110, 3, 100, false, Numbers::kInteger}); }},
    {"search_twins", [] { return make_search<SmallMany, float>({9, 1, 150, 17, 8, false, Numbers::kTwins}); }},
    {"search_twins_idw", [] { return make_search<SmallFew, float>({9, 1, 150, 17, 10, kIdw, Numbers::kTwins}); }},
    {"search_nan", [] { return make_search<SmallFew, float>({5, 2, 150, 9, 4, false, Numbers::kNaN}); }},
    {"search_nan_idw", [] { return make_search<SmallMany, double>({5, 2, 150, 9, 40, kIdw, Numbers::kNaN}); }},
    {"search_infinity", [] { return make_search<SmallFew, double>({5, 2, 150, 9, 4, false, Numbers::kInfinity}); }},
    {"search_infinity_idw", [] { return make_search<SmallMany, float>({5, 2, 150, 9, 4, kIdw, Numbers::kInfinity}); }},
    {"search_large_sums", [] { return make_search<SmallFew, float>({2, 2, 70, 4, 3, false, Numbers::kLargeSums}); }},
    {"search_zero_distance",
     [] { return make_search<SmallFew, float>({3, 2, 70, 4, 3, kIdw, Numbers::kZeroDistance}); }},
    {"search_batch_rows",
     [] { return make_search<SmallFew, float>({23, 1, 30, 8, 4, false, Numbers::kReal, 0, 7, 10, 2}); }},
    {"search_batch_rows_many",
     [] { return make_search<SmallMany, double>({18, 2, 30, 5, 4, kIdw, Numbers::kReal, 1, 6, 11, 3}); }},
    {"search_no_places",
     [] { return make_search<SmallFew, float>({3, 1, 30, 8, 4, false, Numbers::kReal, 0, 0, 0, 0, false}); }},
    {"filter_many",
     [] { return make_search<FilterMany, float>({70, 1, 512, 40, 8, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_many_idw",
     [] { return make_search<FilterMany, float>({70, 1, 512, 36, 8, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_twice",
     [] { return make_search<FilterTwice, float>({70, 1, 512, 40, 8, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_twice_32_reads_idw",
     [] { return make_search<FilterTwice, float>({40, 1, 300, 12, 32, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_twice_many_rounds",
     [] {
       return make_search<SmallFilterTwice, float>({40, 2, 300, 36, 8, false, Numbers::kReal, 0, 0, 0, 0, true, 1});
     }},
    {"filter_twice_batch_rows",
     [] {
       return make_search<SmallFilterTwice, float>({38, 2, 40, 12, 4, kIdw, Numbers::kReal, 0, 6, 11, 3, true, 1});
     }},
    {"filter_few",
     [] { return make_search<FilterFew, float>({20, 2, 300, 20, 8, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_few_idw",
     [] { return make_search<FilterFew, float>({17, 1, 600, 72, 8, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_one_read",
     [] { return make_search<SmallFilterFew, float>({17, 1, 60, 4, 1, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_all_sets",
     [] { return make_search<FilterMany, float>({20, 1, 256, 8, 32, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_32_reads_idw",
     [] { return make_search<FilterFew, float>({18, 1, 300, 12, 32, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_17_reads",
     [] { return make_search<FilterFew, float>({18, 1, 300, 12, 17, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"filter_too_many_reads",
     [] { return make_search<FilterFew, float>({18, 1, 300, 12, 33, false, Numbers::kReal, 0, 0, 0, 0, true, -1}); }},
    {"filter_many_rounds",
     [] {
       return make_search<SmallFilterMany, float>({40, 2, 300, 36, 8, false, Numbers::kReal, 0, 0, 0, 0, true, 1});
     }},
    {"filter_shifted",
     [] { return make_search<FilterFew, float>({9, 1, 70, 40, 4, false, Numbers::kReal, 1, 0, 0, 0, true, -1}); }},
    {"filter_ties",
     [] {
       return make_search<SmallFilterFew, float>({20, 2, 300, 4, 2, false, Numbers::kInteger, 0, 0, 0, 0, true, 0});
     }},
    {"filter_twins",
     [] {
       return make_search<SmallFilterMany, float>({33, 1, 150, 16, 4, false, Numbers::kTwins, 0, 0, 0, 0, true, 1});
     }},
    {"filter_twins_idw",
     [] { return make_search<FilterFew, float>({20, 1, 300, 16, 8, kIdw, Numbers::kTwins, 0, 0, 0, 0, true, 1}); }},
    {"filter_cut",
     [] {
       return make_search<SmallFilterMany, float>({40, 1, 150, 64, 4, false, Numbers::kCut, 0, 0, 0, 0, true, 1});
     }},
    {"filter_cut_idw",
     [] { return make_search<FilterFew, float>({20, 1, 300, 64, 8, kIdw, Numbers::kCut, 0, 0, 0, 0, true, 1}); }},
    {"filter_cut_all",
     [] {
       return make_search<SmallFilterFew, float>({20, 1, 150, 32, 4, kIdw, Numbers::kCutAll, 0, 0, 0, 0, true, 0});
     }},
    {"filter_tiny", [] { return make_search<FilterFew, float>({40, 2, 300, 64, 8, false, Numbers::kTiny}); }},
    {"filter_nan",
     [] { return make_search<SmallFilterFew, float>({20, 2, 150, 8, 4, false, Numbers::kNaN, 0, 0, 0, 0, true, 0}); }},
    {"filter_infinity",
     [] {
       return make_search<SmallFilterMany, float>({40, 2, 150, 8, 4, kIdw, Numbers::kInfinity, 0, 0, 0, 0, true, 0});
     }},
    {"filter_infinity_first_tile",
     [] {
       return make_search<SmallFilterFew, float>({5, 1, 300, 8, 4, false, Numbers::kInfinity, 0, 0, 0, 0, true, 0});
     }},
    {"filter_large_sums",
     [] {
       return make_search<SmallFilterFew, float>({2, 2, 80, 4, 3, false, Numbers::kLargeSums, 0, 0, 0, 0, true, 0});
     }},
    {"filter_zero_distance",
     [] {
       return make_search<SmallFilterFew, float>({3, 2, 70, 4, 3, kIdw, Numbers::kZeroDistance, 0, 0, 0, 0, true, 0});
     }},
    {"filter_batch_rows",
     [] { return make_search<SmallFilterFew, float>({23, 1, 40, 8, 4, false, Numbers::kReal, 0, 7, 10, 2, true, 1}); }},
    {"filter_batch_rows_many",
     [] {
       return make_search<SmallFilterMany, float>({38, 2, 40, 12, 4, kIdw, Numbers::kReal, 0, 6, 11, 3, true, 1});
     }},
    {"search_memories",
     [] {
       return make_search<SmallFew, float>({21, 2, 40, 8, 4, false, Numbers::kReal, 0, 7, 10, 2, true, -1, 0, 3});
     }},
    {"search_memories_one_token_each",
     [] { return make_search<Normal, float>({6, 1, 40, 8, 4, kIdw, Numbers::kReal, 0, 1, 1, 0, true, -1, 0, 5}); }},
    {"search_memories_many",
     [] {
       return make_search<SmallMany, double>({38, 1, 40, 6, 4, kIdw, Numbers::kReal, 1, 19, 20, 1, true, -1, 0, 2});
     }},
    {"search_memories_ties",
     [] {
       return make_search<SmallMany, float>({36, 1, 140, 3, 8, false, Numbers::kInteger, 0, 18, 19, 1, true, -1, 0, 2});
     }},
    {"filter_memories",
     [] {
       return make_search<SmallFilterMany, float>(
           {105, 2, 40, 12, 4, kIdw, Numbers::kReal, 0, 35, 40, 3, true, 1, 0, 4});
     }},
    {"filter_memories_few",
     [] {
       return make_search<SmallFilterFew, float>({63, 1, 40, 8, 4, false, Numbers::kReal, 0, 21, 24, 1, true, 1, 0, 3});
     }},
    {"filter_memories_infinity",
     [] {
       return make_search<SmallFilterMany, float>(
           {105, 1, 60, 8, 4, false, Numbers::kInfinity, 0, 35, 40, 3, true, 0, 0, 4});
     }},
    {"small_search_ties", [] { return make_search<SmallFew, float>({3, 1, 220, 1, 2, false, Numbers::kInteger}); }},
    {"small_search_33_reads", [] { return make_search<SmallFew, float>({2, 1, 40, 4, 33}); }},
    {"small_search_many_ties",
     [] { return make_search<SmallMany, float>({9, 1, 40, 1, 10, false, Numbers::kInteger}); }},
    {"small_search_large_sums",
     [] { return make_search<SmallFew, float>({2, 1, 40, 4, 33, false, Numbers::kLargeSums}); }},
    {"small_filter_few",
     [] { return make_search<SmallFilterFew, float>({20, 1, 70, 36, 2, false, Numbers::kReal, 0, 0, 0, 0, true, 1}); }},
    {"small_filter_twice",
     [] {
       return make_search<SmallFilterTwice, float>({35, 1, 150, 20, 4, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1});
     }},
    {"small_filter_many",
     [] {
       return make_search<SmallFilterMany, float>({35, 1, 150, 20, 4, kIdw, Numbers::kReal, 0, 0, 0, 0, true, 1});
     }},
    {"combine_not_falling", [] { return make_combine<SmallFew, 1, float>({7, 2, 41, 1, 5}); }},
    {"combine_not_falling_40_reads", [] { return make_combine<SmallFew, 4, double>({3, 2, 43, 1, 40}); }},
    {"search_too_many_reads", [] { return make_too_many<float>(); }},
    {"small_search_few", [] { return make_search<SmallFew, float>({17, 1, 70, 36, 2}); }},
    {"small_search_many", [] { return make_search<SmallMany, float>({33, 1, 130, 20, 2, kIdw}); }},

    {"topk_backward_float", [] { return make_backward<Sort, Normal, float>({20, 2, 9, 136, 5}); }},
    {"topk_backward_double", [] { return make_backward<Sort, Normal, double>({20, 2, 9, 10, 5}); }},
    {"topk_backward_idw_float", [] { return make_backward<Sort, Normal, float>({20, 2, 9, 136, 5, kIdw}); }},
    {"topk_backward_idw_double", [] { return make_backward<Sort, Normal, double>({20, 1, 9, 70, 5, kIdw}); }},
    {"topk_backward_odd_rows", [] { return make_backward<Small, Small, float>({9, 2, 7, 133, 3, kIdw}); }},
    {"topk_backward_shifted",
     [] { return make_backward<Small, Small, float>({9, 2, 7, 8, 3, false, Numbers::kReal, 1}); }},
    {"topk_backward_33_reads", [] { return make_backward<Small, Small, double>({3, 2, 40, 3, 33, kIdw}); }},
    {"topk_backward_128_reads", [] { return make_backward<Small, Small, float>({2, 1, 130, 4, 128}); }},
    {"topk_backward_hot", [] { return make_backward<Small, Small, float>({300, 1, 2, 4, 2, kIdw}); }},
    {"topk_backward_no_tokens", [] { return make_backward<Small, Small, float>({0, 2, 7, 8, 3}); }},
    {"topk_backward_invalid",
     [] {
       return make_backward<Small, Small, double>({9, 2, 7, 6, 3, false, Numbers::kReal, 0, 0, 0, 0, true, -1, 10});
     }},
    {"topk_backward_invalid_idw",
     [] { return make_backward<Small, Small, float>({9, 2, 7, 6, 3, kIdw, Numbers::kReal, 0, 0, 0, 0, true, -1, 7}); }},
    {"topk_columns_float", [] { return make_backward<Sort, Shared<Normal>, float>({60, 2, 3, 136, 5}); }},
    {"topk_columns_double", [] { return make_backward<Sort, Shared<Normal>, double>({60, 1, 3, 18, 4, kIdw}); }},
    {"topk_columns_parts", [] { return make_backward<Small, Shared<Small, 64>, float>({50, 2, 7, 20, 16, kIdw}); }},
    {"topk_columns_uneven_parts",
     [] { return make_backward<Small, Shared<Small, 64>, double>({50, 1, 5, 10, 12, kIdw}); }},
    {"topk_columns_one_sub_key", [] { return make_backward<Small, Shared<Small, 64>, float>({9, 2, 1, 8, 16}); }},
    {"topk_columns_few_reads", [] { return make_backward<Small, Shared<Small>, float>({20, 2, 7, 12, 3, kIdw}); }},
    {"topk_columns_shifted",
     [] { return make_backward<Small, Shared<Small>, float>({9, 2, 7, 8, 4, false, Numbers::kReal, 1}); }},
    {"topk_columns_hot", [] { return make_backward<Small, Shared<Small>, float>({300, 1, 2, 12, 8, kIdw}); }},
    {"topk_columns_hotter", [] { return make_backward<Small, Shared<Small, 8>, double>({280, 1, 1, 2, 124}); }},
    {"topk_columns_too_many_keys", [] { return make_backward<Small, Shared<Small>, float>({9, 1, 31000, 4, 4}); }},
    {"topk_columns_no_tokens", [] { return make_backward<Small, Shared<Small>, float>({0, 2, 7, 8, 4}); }},
    {"topk_columns_invalid",
     [] {
       return make_backward<Small, Shared<Small, 16>, float>(
           {50, 2, 7, 16, 8, kIdw, Numbers::kReal, 0, 0, 0, 0, true, -1, 7});
     }},
    {"small_topk_columns", [] { return make_backward<Small, Shared<Small>, float>({70, 1, 1, 20, 8, kIdw}); }},
    {"small_topk_backward", [] { return make_backward<Small, Small, float>({5, 1, 3, 8, 3, kIdw}); }},
});

}  // namespace
