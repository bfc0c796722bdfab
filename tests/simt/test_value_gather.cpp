// value_gather.cuh against plain loops in the orders of summation that it documents.
#include <cmath>
#include <limits>

#include "kernels/value_gather.cuh"
#include "testing.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

struct Shape {
  int64_t tokens, reads, slots, width;
  size_t offset = 0;     // of the rows from a multiple of 16 bytes, in elements
  bool invalid = false;  // some indices are out of range
  bool hot = false;      // most reads are of one slot
};

template <typename T, typename Index>
struct Data {
  Shape s;
  Buffer<T> values, weights, dout;
  Buffer<Index> indices;

  explicit Data(const Shape& shape)
      : s(shape),
        values(s.slots * s.width, s.offset),
        weights(s.tokens * s.reads),
        dout(s.tokens * s.width, s.offset),
        indices(s.tokens * s.reads) {
    Random random;
    for (auto* buffer : {&values, &weights, &dout})
      for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = T(random.real());
    for (size_t i = 0; i < indices.size(); ++i) {
      indices[i] = Index(random.below(s.slots));
      if (s.hot && i % 8) indices[i] = Index(s.slots / 2);
      if (s.invalid && i % 11 == 5) indices[i] = i % 2 ? Index(-1) : Index(s.slots);
    }
  }
  bool valid(size_t i) const { return indices[i] >= 0 && indices[i] < s.slots; }
};

// NaN has many bit patterns; a result that must be NaN is compared as one.
template <typename T>
bool same_or_nan(const Buffer<T>& found, const std::vector<T>& expected) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (std::isnan(expected[i]) ? !std::isnan(found[i]) : std::memcmp(&found[i], &expected[i], sizeof(T)) != 0)
      return false;
  return true;
}

// `call(errors)` launches; `right()` compares.
template <typename Call, typename Right>
std::string checked(bool invalid, const Call& call, const Right& right) {
  Buffer<unsigned> errors(1);
  errors[0] = 0;
  if (call(errors.get())) return "launch";
  if (!right()) return "wrong result";
  return expect(errors[0] == (invalid ? unsigned(kIndexOutOfRange) : 0u), "error word");
}

template <typename Size, typename T, typename Index>
Run make_gather(Shape s) {
  auto d = std::make_shared<Data<T, Index>>(s);
  std::vector<T> expected(s.tokens * s.width);
  for (int64_t t = 0; t < s.tokens; ++t)
    for (int64_t c = 0; c < s.width; ++c) {
      T sum = 0;
      for (int64_t i = t * s.reads; i < (t + 1) * s.reads; ++i) {
        const T x = d->valid(i) ? d->values[d->indices[i] * s.width + c] : std::numeric_limits<T>::quiet_NaN();
        sum = std::fma(d->weights[i], x, sum);
      }
      expected[t * s.width + c] = sum;
    }
  return [=] {
    Buffer<T> out(s.tokens * s.width, s.offset);
    return checked(
        s.invalid,
        [&](unsigned* errors) {
          return value_gather<Size>(d->values.get(), d->indices.get(), d->weights.get(), s.tokens, s.reads, s.slots,
                                    s.width, out.get(), errors, nullptr);
        },
        [&] { return same_or_nan(out, expected); });
  };
}

template <typename Size, typename T, typename Index>
Run make_dweights(Shape s) {
  auto d = std::make_shared<Data<T, Index>>(s);
  std::vector<T> expected(s.tokens * s.reads);
  for (int64_t i = 0; i < s.tokens * s.reads; ++i) {
    T lanes[32] = {};
    for (int64_t c = 0; c < s.width && d->valid(i); ++c) {
      T& sum = lanes[c / (16 / sizeof(T)) % 32];
      sum = std::fma(d->dout[i / s.reads * s.width + c], d->values[d->indices[i] * s.width + c], sum);
    }
    for (int half = 16; half; half /= 2)
      for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
    expected[i] = d->valid(i) ? lanes[0] : std::numeric_limits<T>::quiet_NaN();
  }
  return [=] {
    Buffer<T> dweights(s.tokens * s.reads);
    return checked(
        s.invalid,
        [&](unsigned* errors) {
          return value_gather_dweights<Size>(d->dout.get(), d->values.get(), d->indices.get(), s.tokens, s.reads,
                                             s.slots, s.width, dweights.get(), errors, nullptr);
        },
        [&] { return same_or_nan(dweights, expected); });
  };
}

template <typename Sorting, typename Size, typename T, typename Index>
Run make_dvalues(Shape s) {
  auto d = std::make_shared<Data<T, Index>>(s);
  std::vector<T> expected(s.slots * s.width);
  for (int64_t slot = 0; slot < s.slots; ++slot)
    for (int64_t c = 0; c < s.width; ++c) {
      std::vector<T> pieces;
      int64_t length = 0;
      for (int64_t i = 0; i < s.tokens * s.reads; ++i) {
        if (d->indices[i] != slot) continue;
        if (length++ % 32 == 0) pieces.push_back(0);
        pieces.back() = std::fma(d->weights[i], d->dout[i / s.reads * s.width + c], pieces.back());
      }
      expected[slot * s.width + c] = length ? tree(pieces) : T(0);
    }
  return [=] {
    const int32_t n = int32_t(s.tokens * s.reads);
    Buffer<T> dvalues(s.slots * s.width, s.offset), scratch(ordered_sums_scratch(n, s.width));
    Buffer<int32_t> workspace(ordered_lists_workspace<Sorting>(n));
    dvalues.clear(0);
    return checked(
        s.invalid,
        [&](unsigned* errors) {
          return value_gather_dvalues<Sorting, Size>(d->dout.get(), d->indices.get(), d->weights.get(), s.tokens,
                                                     s.reads, s.slots, s.width, workspace.get(), scratch.get(),
                                                     dvalues.get(), errors, nullptr);
        },
        [&] { return dvalues.same_bits(expected); });
  };
}

using Normal = LaunchSize;
using Sort = OrderedListsSize;
constexpr Shape kRows{5, 19, 40, 136};  // whole packs, more than one part of a row
constexpr Shape kOddRows{6, 9, 40, 133};
constexpr Shape kShifted{5, 19, 40, 136, 1};
constexpr Shape kNarrow{70, 3, 12, 3, 0, true};
constexpr Shape kManyReads{2, 1030, 25, 9, 0, true};
constexpr Shape kHot{143, 8, 9, 12, 0, true, true};  // one slot has about 1000 reads: two levels
constexpr Shape kHotter{1100, 2, 5, 3, 0, false, true};
constexpr Shape kOnlyHot{1030, 1, 1, 4};    // 1030 reads: a group of one term
constexpr Shape kFullGroup{1024, 1, 1, 4};  // 32 whole pieces
constexpr Shape kWide{2, 3, 4, 2100};       // more parts than warps of a block
constexpr Shape kTiny{3, 5, 6, 8, 0, true};
constexpr Shape kTinyHot{14, 5, 4, 8, 0, true, true};

const Register kCases({
    {"gather_float", [] { return make_gather<Normal, float, int32_t>(kRows); }},
    {"gather_double", [] { return make_gather<Normal, double, int64_t>(kRows); }},
    {"gather_odd_rows", [] { return make_gather<Normal, float, int64_t>(kOddRows); }},
    {"gather_shifted", [] { return make_gather<Normal, float, int32_t>(kShifted); }},
    {"gather_narrow", [] { return make_gather<Small, double, int32_t>(kNarrow); }},
    {"gather_many_reads", [] { return make_gather<Small, float, int32_t>(kManyReads); }},
    {"gather_wide", [] { return make_gather<Normal, double, int32_t>(kWide); }},
    {"gather_no_reads", [] { return make_gather<Small, float, int32_t>({3, 0, 4, 8}); }},
    {"gather_no_tokens", [] { return make_gather<Small, float, int32_t>({0, 3, 4, 8}); }},
    {"gather_no_columns", [] { return make_gather<Small, float, int32_t>({3, 3, 4, 0}); }},
    {"small_gather", [] { return make_gather<Small, float, int32_t>(kTiny); }},

    {"dweights_float", [] { return make_dweights<Normal, float, int32_t>(kRows); }},
    {"dweights_double", [] { return make_dweights<Normal, double, int64_t>(kOddRows); }},
    {"dweights_shifted", [] { return make_dweights<Normal, float, int64_t>(kShifted); }},
    {"dweights_narrow", [] { return make_dweights<Small, double, int32_t>(kNarrow); }},
    {"dweights_many_reads", [] { return make_dweights<Small, float, int32_t>(kManyReads); }},
    {"dweights_wide", [] { return make_dweights<Normal, float, int32_t>(kWide); }},
    {"dweights_no_columns", [] { return make_dweights<Small, float, int32_t>({3, 3, 4, 0}); }},
    {"small_dweights", [] { return make_dweights<Small, float, int32_t>(kTiny); }},

    {"dvalues_float", [] { return make_dvalues<Sort, Normal, float, int32_t>(kRows); }},
    {"dvalues_double", [] { return make_dvalues<Small, Normal, double, int64_t>(kOddRows); }},
    {"dvalues_shifted", [] { return make_dvalues<Small, Normal, float, int64_t>(kShifted); }},
    {"dvalues_narrow", [] { return make_dvalues<Small, Small, double, int32_t>(kNarrow); }},
    {"dvalues_hot", [] { return make_dvalues<Small, Small, float, int32_t>(kHot); }},
    {"dvalues_hotter", [] { return make_dvalues<Sort, Small, double, int64_t>(kHotter); }},
    {"dvalues_only_hot", [] { return make_dvalues<Sort, Small, float, int32_t>(kOnlyHot); }},
    {"dvalues_full_group", [] { return make_dvalues<Sort, Small, float, int32_t>(kFullGroup); }},
    {"dvalues_wide", [] { return make_dvalues<Small, Small, float, int32_t>(kWide); }},
    {"dvalues_no_reads", [] { return make_dvalues<Small, Small, float, int32_t>({3, 0, 4, 8}); }},
    {"dvalues_no_columns", [] { return make_dvalues<Small, Small, float, int32_t>({3, 3, 4, 0}); }},
    {"small_dvalues", [] { return make_dvalues<Small, Small, float, int32_t>(kTinyHot); }},
});

}  // namespace
