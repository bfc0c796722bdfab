// How one stage of a chunk is tested: the plain loops do what comes before it and the stage itself, the kernels the
// stage alone; every buffer must then have the same bits.
#pragma once
#include <memory>

#include "plain_chunk.h"

namespace testing {

// A table as build_ordered_lists leaves it: entries of no list come last.
struct Lists {
  Buffer<int32_t> key, entry, begin;
  int32_t num_keys;
  Lists(const ListTable& table, int64_t n) : key(n), entry(n), begin(n), num_keys(int32_t(table.size())) {
    std::vector<bool> listed(n);
    int32_t p = 0;
    const auto put = [&](int32_t k, const std::vector<int32_t>& list) {
      for (int32_t first = p; const int32_t i : list) {
        key[p] = k, entry[p] = i, begin[p++] = first;
        listed[i] = true;
      }
    };
    for (int32_t k = 0; k < num_keys; ++k) put(k, table[k]);
    std::vector<int32_t> rest;
    for (int32_t i = 0; i < n; ++i)
      if (!listed[i]) rest.push_back(i);
    put(num_keys, rest);
  }
  operator OrderedLists() const { return {int32_t(key.size()), num_keys, key.get(), entry.get(), begin.get()}; }
};

// NaN has many bit patterns; a result that must be NaN is compared as one.
template <typename E>
bool same(const Buffer<E>& found, const Buffer<E>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if constexpr (std::is_floating_point_v<E>)
      if (std::isnan(found[i]) && std::isnan(expected[i])) continue;
    if (std::memcmp(&found[i], &expected[i], sizeof(E))) return false;
  }
  return true;
}

// Bits beyond the end of a row mean nothing.
inline void clear_padding(Buffer<uint8_t>& open, int64_t width) {
  for (size_t i = (width + 7) / 8 - 1; width % 8 && i < open.size(); i += (width + 7) / 8)
    open[i] &= uint8_t((1 << width % 8) - 1);
}

// D: Data<T>, or what is built on it. `done`: by the plain loops, before the stage.
template <typename D, typename S>
Run make_stage(const S& shape, void (*done)(D&), void (*plain)(D&), cudaError_t (*stage)(D&)) {
  const auto before = std::make_shared<D>(shape), after = std::make_shared<D>(shape);
  for (D* d : {before.get(), after.get()}) {
    if (done) done(*d);
    d->error.clear(0);
  }
  plain(*after);
  return [=]() -> std::string {
    D found(shape);
    found.each(*before, [](const char*, auto& to, const auto& from) {
      for (size_t i = 0; i < from.size(); ++i) to[i] = from[i];
    });
    if (stage(found)) return "launch";
    for (D* d : {&found, after.get()}) {
      clear_padding(d->open_rows, d->width);
      clear_padding(d->open_keys, d->s.half_width);
    }
    std::string wrong;
    found.each(*after, [&](const char* name, const auto& a, const auto& b) {
      if (!same(a, b)) wrong += std::string(wrong.empty() ? "" : ", ") + name;
    });
    return wrong;
  };
}

}  // namespace testing
