// ordered_lists.cuh against std::stable_sort.
#include <algorithm>
#include <numeric>

#include "testing.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

struct ManyTiles : Small {
  static constexpr int kFewTiles = 1;
};

// Keys below num_keys, the lower ones more often; every 17th outside the range if `invalid`.
template <typename Size, typename Index>
Run make_lists(int32_t n, int32_t num_keys, bool invalid) {
  auto keys = std::make_shared<Buffer<Index>>(n);
  Random random;
  for (int32_t i = 0; i < n; ++i) {
    (*keys)[i] = Index(random.below(1 + random.below(num_keys)));
    if (invalid && i % 17 == 3) (*keys)[i] = sizeof(Index) == 8 ? Index(num_keys) : Index(-1);
  }
  const auto key_of = [=](int32_t i) {
    const Index k = (*keys)[i];
    return k >= 0 && k < num_keys ? int32_t(k) : num_keys;
  };
  std::vector<int32_t> entry(n), key(n), begin(n);
  std::iota(entry.begin(), entry.end(), 0);
  std::stable_sort(entry.begin(), entry.end(), [&](int32_t a, int32_t b) { return key_of(a) < key_of(b); });
  for (int32_t p = 0; p < n; ++p) {
    key[p] = key_of(entry[p]);
    begin[p] = p && key[p - 1] == key[p] ? begin[p - 1] : p;
  }
  return [=]() -> std::string {
    Buffer<int32_t> workspace(ordered_lists_workspace<Size>(n));
    Buffer<unsigned> errors(1);
    errors[0] = 0;
    OrderedLists lists;
    if (build_ordered_lists<Size>(keys->get(), n, num_keys, workspace.get(), errors.get(), nullptr, &lists))
      return "launch";
    const auto same = [&](const int32_t* p, const std::vector<int32_t>& v) {
      return std::equal(v.begin(), v.end(), p);
    };
    if (!same(lists.key, key)) return "keys";
    if (!same(lists.entry, entry)) return "entries";
    if (!same(lists.begin, begin)) return "begins";
    for (int32_t p = 0; p < n; ++p)
      if (end_of_list(lists, key[p], p) != std::upper_bound(key.begin(), key.end(), key[p]) - key.begin())
        return "ends";
    return expect(errors[0] == (invalid ? unsigned(kIndexOutOfRange) : 0u), "error word");
  };
}

const Register kCases({
    {"ordered_lists", [] { return make_lists<OrderedListsSize, int32_t>(5000, 300, false); }},
    {"ordered_lists_invalid", [] { return make_lists<OrderedListsSize, int64_t>(2100, 255, true); }},
    {"ordered_lists_three_passes", [] { return make_lists<Small, int32_t>(700, 70000, true); }},
    {"ordered_lists_largest_key", [] { return make_lists<Small, int32_t>(130, 2147483647, false); }},
    {"ordered_lists_one_entry", [] { return make_lists<Small, int64_t>(1, 1, false); }},
    {"ordered_lists_none", [] { return make_lists<Small, int64_t>(0, 1, false); }},
    {"ordered_lists_many_tiles", [] { return make_lists<ManyTiles, int32_t>(900, 70000, true); }},
    {"ordered_lists_power_of_two", [] { return make_lists<Small, int32_t>(500, 1024, true); }},
    {"small_ordered_lists", [] { return make_lists<Small, int32_t>(300, 300, true); }},
    {"small_many_tiles", [] { return make_lists<ManyTiles, int32_t>(300, 40, true); }},
});

}  // namespace
