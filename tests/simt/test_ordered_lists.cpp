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
struct InBlock : Small {
  static constexpr int kBlockTiles = 4;
};

// Keys below num_keys, the lower ones more often; every 17th outside the range if `invalid`.
template <typename Index>
struct Data {
  int32_t n, num_keys;
  bool invalid;
  Buffer<Index> keys;
  std::vector<int32_t> entry, key, begin;

  Data(int32_t size, int32_t range, bool odd, uint64_t seed)
      : n(size), num_keys(range), invalid(odd && size > 3), keys(n), entry(n), key(n), begin(n) {
    Random random{seed};
    for (int32_t i = 0; i < n; ++i) {
      keys[i] = Index(random.below(1 + random.below(num_keys)));
      if (invalid && i % 17 == 3) keys[i] = sizeof(Index) == 8 ? Index(num_keys) : Index(-1);
    }
    const auto key_of = [&](int32_t i) {
      const Index k = keys[i];
      return k >= 0 && k < num_keys ? int32_t(k) : num_keys;
    };
    std::iota(entry.begin(), entry.end(), 0);
    std::stable_sort(entry.begin(), entry.end(), [&](int32_t a, int32_t b) { return key_of(a) < key_of(b); });
    for (int32_t p = 0; p < n; ++p) {
      key[p] = key_of(entry[p]);
      begin[p] = p && key[p - 1] == key[p] ? begin[p - 1] : p;
    }
  }
  std::string compare(const OrderedLists& lists) const {
    const auto same = [&](const int32_t* p, const std::vector<int32_t>& v) {
      return std::equal(v.begin(), v.end(), p);
    };
    if (!same(lists.key, key)) return "keys";
    if (!same(lists.entry, entry)) return "entries";
    if (!same(lists.begin, begin)) return "begins";
    for (int32_t p = 0; p < n; ++p)
      if (end_of_list(lists, key[p], p) != std::upper_bound(key.begin(), key.end(), key[p]) - key.begin())
        return "ends";
    return "";
  }
};

template <typename Size, typename Index>
Run make_lists(int32_t n, int32_t num_keys, bool invalid) {
  auto d = std::make_shared<Data<Index>>(n, num_keys, invalid, 1);
  return [=]() -> std::string {
    Buffer<int32_t> workspace(ordered_lists_workspace<Size>(n));
    Buffer<unsigned> errors(1);
    errors[0] = 0;
    const Index* const keys = d->keys.get();
    const auto only = grouping(keys, n, num_keys, workspace.get(), errors.get());
    if (build_ordered_lists<Size>(only, nullptr)) return "launch";
    if (const std::string wrong = d->compare(only.lists()); !wrong.empty()) return wrong;
    return expect(errors[0] == (d->invalid ? unsigned(kIndexOutOfRange) : 0u), "error word");
  };
}

// find_list of every key that may occur, one warp each.
__global__ void find_lists(OrderedLists lists, Places* found) {
  const Places places = find_list(lists, int32_t(blockIdx.x));
  if (threadIdx.x == 0) found[blockIdx.x] = places;
}

// end_of_list from places near and far, and find_list.
Run make_search(int32_t n, int32_t num_keys) {
  const auto d = std::make_shared<Data<int32_t>>(n, num_keys, true, 1);
  return [=]() -> std::string {
    const OrderedLists lists{n, num_keys, d->key.data(), d->entry.data(), d->begin.data()};
    Buffer<Places> found(size_t(num_keys) + 1);
    if (simt::launch(find_lists, unsigned(num_keys) + 1, 32, nullptr, lists, found.get())) return "launch";
    for (int32_t k = 0; k <= num_keys; ++k) {
      const auto [begin, end] = std::equal_range(d->key.begin(), d->key.end(), k);
      const int32_t first = int32_t(begin - d->key.begin()), last = int32_t(end - d->key.begin());
      if (found[k].begin != first || found[k].end != last) return "list " + std::to_string(k);
      for (const int32_t from : {0, first / 2, first, (first + last) / 2, last})
        if (end_of_list(lists, k, from) != last) return "end " + std::to_string(k);
    }
    return "";
  };
}

// Two at once.
template <typename Size>
Run make_two(int32_t n, int32_t num_keys, int32_t other_n, int32_t other_keys) {
  auto d = std::make_shared<Data<int32_t>>(n, num_keys, true, 1);
  auto other = std::make_shared<Data<int64_t>>(other_n, other_keys, true, 2);
  return [=]() -> std::string {
    Buffer<int32_t> workspace(ordered_lists_workspace<Size>(n)),
        other_workspace(ordered_lists_workspace<Size>(other_n));
    const int32_t* const keys = d->keys.get();
    const int64_t* const more = other->keys.get();
    const auto first = grouping(keys, n, num_keys, workspace.get(), nullptr);
    const auto second = grouping(more, other_n, other_keys, other_workspace.get(), nullptr);
    if (build_ordered_lists<Size>(first, second, nullptr)) return "launch";
    if (const std::string wrong = d->compare(first.lists()); !wrong.empty()) return "first: " + wrong;
    const std::string wrong = other->compare(second.lists());
    return wrong.empty() ? "" : "second: " + wrong;
  };
}

const Register kCases({
    {"ordered_lists", [] { return make_lists<OrderedListsSize, int32_t>(9000, 300, false); }},
    {"ordered_lists_invalid", [] { return make_lists<OrderedListsSize, int64_t>(8300, 255, true); }},
    {"ordered_lists_in_block", [] { return make_lists<OrderedListsSize, int32_t>(5000, 300, false); }},
    {"ordered_lists_three_passes", [] { return make_lists<Small, int32_t>(700, 70000, true); }},
    {"ordered_lists_largest_key", [] { return make_lists<Small, int32_t>(130, 2147483647, false); }},
    {"ordered_lists_one_entry", [] { return make_lists<Small, int64_t>(1, 1, false); }},
    {"ordered_lists_none", [] { return make_lists<Small, int64_t>(0, 1, false); }},
    {"ordered_lists_many_tiles", [] { return make_lists<ManyTiles, int32_t>(900, 70000, true); }},
    {"ordered_lists_power_of_two", [] { return make_lists<Small, int32_t>(500, 1024, true); }},
    {"ordered_lists_in_block_largest_key", [] { return make_lists<InBlock, int32_t>(500, 2147483647, false); }},
    {"ordered_lists_in_block_invalid", [] { return make_lists<InBlock, int64_t>(512, 1024, true); }},
    {"ordered_lists_in_block_one", [] { return make_lists<InBlock, int32_t>(1, 1, false); }},
    {"ordered_lists_two", [] { return make_two<Small>(700, 70000, 300, 9); }},
    {"ordered_lists_two_passes_and_three", [] { return make_two<Small>(130, 1025, 300, 2000000); }},
    {"ordered_lists_none_and_one", [] { return make_two<Small>(0, 5, 300, 9); }},
    {"ordered_lists_one_and_none", [] { return make_two<Small>(300, 5, 0, 9); }},
    {"ordered_lists_two_many_tiles", [] { return make_two<ManyTiles>(900, 5, 50, 70000); }},
    {"ordered_lists_two_in_block", [] { return make_two<InBlock>(400, 70000, 512, 9); }},
    {"ordered_lists_too_many_for_a_block", [] { return make_two<InBlock>(400, 70000, 513, 9); }},
    {"ordered_lists_none_in_block", [] { return make_two<InBlock>(0, 7, 40, 9); }},
    {"find_lists", [] { return make_search(3000, 7); }},
    {"find_lists_short", [] { return make_search(1100, 900); }},
    {"find_lists_32", [] { return make_search(32, 3); }},
    {"find_lists_33", [] { return make_search(33, 40); }},
    {"find_lists_of_one", [] { return make_search(1, 2); }},
    {"find_lists_none", [] { return make_search(0, 2); }},
    {"small_ordered_lists", [] { return make_lists<Small, int32_t>(300, 300, true); }},
    {"small_many_tiles", [] { return make_lists<ManyTiles, int32_t>(300, 40, true); }},
    {"small_in_block", [] { return make_two<InBlock>(300, 2000, 200, 40); }},
});

}  // namespace
