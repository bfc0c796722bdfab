// commit.cuh against plain loops.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/commit.cuh"
#include "testing.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

struct Shape {
  int64_t slots = 20, places = 9, width = 12;
  double keep = 1;
  int64_t writes = 3;
  size_t offset = 0;        // of the rows from a multiple of 16 bytes, in elements
  bool invalid = false;     // some places have slots that are out of range,
  bool not_finite = false;  // some have rows that are not finite
  bool large = false;       // some values grow to infinity
  bool twice = false;       // some slots have several rows
};

template <typename T>
struct Data {
  Shape s;
  Buffer<T> values, new_rows;
  Buffer<int32_t> new_slots;

  explicit Data(const Shape& shape)
      : s(shape), values(s.slots * s.width, s.offset), new_rows(s.places * s.width, s.offset), new_slots(s.places) {
    Random random;
    for (auto* buffer : {&values, &new_rows})
      for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = T(random.real());
    std::vector<int32_t> slots(s.slots);  // every slot has one newest row
    std::iota(slots.begin(), slots.end(), 0);
    for (int64_t e = 0; e < s.places; ++e) {
      std::swap(slots[e], slots[e + random.below(s.slots - e)]);
      new_slots[e] = e % 3 == 1 ? -1 : slots[e];
      if (s.invalid && e % 5 == 3) new_slots[e] = e % 2 ? int32_t(s.slots) : -2;
      if (s.twice && e % 4 == 3) new_slots[e] = new_slots[e - 3 + e % 3];
      if (s.not_finite && e % 4 == 2) new_rows[e * s.width + e % s.width] = e % 8 == 2 ? T(NAN) : T(-INFINITY);
    }
    if (s.large)
      for (int64_t i = 1; i < s.slots * s.width; i += 7) values[i] = std::numeric_limits<T>::max();
  }
};

template <typename Size, typename T>
Run make_commit(Shape s) {
  auto d = std::make_shared<Data<T>>(s);
  std::vector<T> expected(d->values.get(), d->values.get() + d->values.size());
  std::vector<bool> committed(s.slots);
  unsigned expected_errors = 0;
  std::vector<int64_t> last(s.slots, -1);
  for (int64_t e = 0; e < s.places; ++e)
    if (const int32_t slot = d->new_slots[e]; slot >= 0 && slot < s.slots) last[slot] = e;
  for (int64_t e = 0; e < s.places; ++e) {
    const int32_t slot = d->new_slots[e];
    const T* const row = &d->new_rows[e * s.width];
    if (slot < -1 || slot >= s.slots) expected_errors |= kIndexOutOfRange;
    if (slot < 0 || slot >= s.slots) continue;
    committed[slot] = true;
    if (last[slot] != e) expected_errors |= kWrittenTwice;
    if (last[slot] != e) continue;
    const bool finite = std::all_of(row, row + s.width, [](T x) { return std::isfinite(x); });
    if (!finite) expected_errors |= kNotFinite;
    if (finite) std::copy_n(row, s.width, expected.begin() + slot * s.width);
  }
  for (int64_t i = 0; i < s.slots * s.width; ++i) {
    if (committed[i / s.width]) continue;
    T v = expected[i];
    for (int64_t k = 0; k < s.writes && s.keep != 1; ++k) v *= T(s.keep);
    if (!std::isfinite(v)) expected_errors |= kOverflow;
    if (std::isfinite(v)) expected[i] = v;
  }
  return [=]() -> std::string {
    Buffer<T> values(d->values.size(), s.offset);
    std::copy_n(d->values.get(), values.size(), values.get());
    Buffer<int32_t> owner(s.slots);
    Buffer<unsigned> errors(1);
    errors[0] = 0;
    if (commit_rows<Size>(values.get(), s.slots, s.width, d->new_rows.get(), d->new_slots.get(), s.places, T(s.keep),
                          s.writes, owner.get(), errors.get(), nullptr))
      return "launch";
    if (!values.same_bits(expected)) return "values";
    return expect(errors[0] == expected_errors, "error word");
  };
}

template <typename T>
Run make_keys(int64_t n, bool finite) {
  auto from = std::make_shared<Buffer<T>>(n, 1);
  std::vector<T> expected(n, T(5));
  Random random;
  for (int64_t i = 0; i < n; ++i) {
    (*from)[i] = finite || i % 9 ? T(random.real()) : i % 2 ? T(NAN) : T(INFINITY);
    if (std::isfinite((*from)[i])) expected[i] = (*from)[i];
  }
  return [=]() -> std::string {
    Buffer<T> to(n);
    std::fill_n(to.get(), n, T(5));
    Buffer<unsigned> errors(1);
    errors[0] = 0;
    if (copy_keys<Small>(from->get(), n, to.get(), errors.get(), nullptr)) return "launch";
    if (!to.same_bits(expected)) return "keys";
    return expect(errors[0] == (finite ? 0u : unsigned(kNotFinite)), "error word");
  };
}

const Register kCases({
    {"commit_float", [] { return make_commit<LaunchSize, float>({.width = 136}); }},
    {"commit_double", [] { return make_commit<Small, double>({.width = 136}); }},
    {"commit_odd_rows", [] { return make_commit<Small, float>({.places = 13, .width = 131}); }},
    {"commit_shifted", [] { return make_commit<Small, float>({.places = 13, .offset = 1}); }},
    {"commit_decay", [] { return make_commit<Small, float>({.width = 40, .keep = 0.9}); }},
    {"commit_decay_no_writes", [] { return make_commit<Small, float>({.keep = 0.9, .writes = 0}); }},
    {"commit_decay_no_places", [] { return make_commit<Small, float>({.places = 0, .keep = 0.9}); }},
    {"commit_decay_all", [] { return make_commit<Small, double>({.places = 20, .keep = 0.9}); }},
    {"commit_decay_overflow", [] { return make_commit<Small, double>({.width = 7, .keep = 1.5, .large = true}); }},
    {"commit_decay_out_of_range",
     [] { return make_commit<Small, float>({.places = 19, .keep = 0.9, .invalid = true}); }},
    {"commit_decay_not_finite",
     [] { return make_commit<Small, double>({.places = 19, .width = 9, .keep = 0.9, .not_finite = true}); }},
    {"commit_out_of_range", [] { return make_commit<Small, float>({.places = 19, .width = 5, .invalid = true}); }},
    {"commit_not_finite", [] { return make_commit<Small, float>({.places = 19, .width = 136, .not_finite = true}); }},
    {"commit_twice", [] { return make_commit<Small, float>({.slots = 90, .places = 80, .width = 40, .twice = true}); }},
    {"commit_decay_twice",
     [] { return make_commit<Small, double>({.slots = 90, .places = 80, .width = 5, .keep = 0.9, .twice = true}); }},
    {"commit_no_places", [] { return make_commit<Small, float>({.places = 0}); }},
    {"commit_no_columns", [] { return make_commit<Small, float>({.width = 0}); }},
    {"small_commit", [] { return make_commit<Small, float>({.slots = 9, .places = 6, .width = 4}); }},

    {"commit_keys", [] { return make_keys<float>(1000, true); }},
    {"commit_keys_not_finite", [] { return make_keys<double>(333, false); }},
    {"commit_no_keys", [] { return make_keys<float>(0, true); }},
});

}  // namespace
