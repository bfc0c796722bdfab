// commit_: validation, for every device. A memory that is written in place must be contiguous: a copy would be lost.
#pragma once
#include <cmath>
#include <string>
#include <utility>

#include "ops/product_key_topk.h"
#include "ops/value_gather.h"

namespace fwpkm {

inline void check_in_place(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), name,
                  ": expected a contiguous tensor, as it is written in place, got strides of "
                  "another order for shape ",
                  shape_string(t));
}

// `t`, contiguous, must not lie in what is written while it is read. (`t` may be sub_keys itself: then only values
// count.)
inline void check_apart(const Tensor& t, const char* name, const Tensor& values, const Tensor& sub_keys) {
  const auto bytes = [](const Tensor& x) {
    const auto begin = reinterpret_cast<uintptr_t>(x.const_data_ptr());
    return std::pair{begin, begin + uintptr_t(x.numel()) * x.element_size()};
  };
  const auto [begin, end] = bytes(t);
  for (const auto& [written, written_name] : {std::pair{&values, "values"}, {&sub_keys, "sub_keys"}}) {
    const auto [first, last] = bytes(*written);
    if (begin == first && end == last && std::string(name) == written_name) continue;
    STD_TORCH_CHECK(begin >= last || first >= end || begin == end || first == last, name,
                    ": expected memory of its own, but it shares memory with ", written_name,
                    ", which is written in place; pass a copy");
  }
}

inline void check_commit(const Tensor& values, const Tensor& sub_keys, const Tensor& new_rows, const Tensor& new_slots,
                         const Tensor& new_sub_keys, double keep, int64_t writes) {
  check_values(values);
  check_sub_keys(sub_keys);
  check_slots(values, sub_keys);
  check_in_place(values, "values");
  check_in_place(sub_keys, "sub_keys");
  const auto type = values.scalar_type();
  check_dtype(sub_keys, type, "sub_keys", "the dtype of values");
  check_dtype(new_rows, type, "new_rows", "the dtype of values");
  check_dtype(new_slots, ScalarType::Int, "new_slots", "as chunk_scan returns them");
  check_dtype(new_sub_keys, type, "new_sub_keys", "the dtype of values");
  check_rank(new_rows, 2, "new_rows", "(E, V)");
  check_rank(new_slots, 1, "new_slots", "(E,)");
  check_rank(new_sub_keys, 4, "new_sub_keys", "(H, 2, P, K/2)");
  check_size(new_rows, 0, new_slots.size(0), "new_rows", "(E, V)");
  check_size(new_rows, 1, values.size(1), "new_rows", "(E, V)");
  for (int64_t d = 0; d < 4; ++d) check_size(new_sub_keys, d, sub_keys.size(d), "new_sub_keys", "(H, 2, P, K/2)");
  for (const auto& [t, name] : {std::pair{&sub_keys, "sub_keys"},
                                {&new_rows, "new_rows"},
                                {&new_slots, "new_slots"},
                                {&new_sub_keys, "new_sub_keys"}})
    check_device(*t, values, name, "values");
  STD_TORCH_CHECK(writes >= 0, "writes: expected 0 or more, got ", writes);
  STD_TORCH_CHECK(std::isfinite(keep), "keep: expected 1 - lr * weight_decay to be finite, got ", keep);
}

}  // namespace fwpkm
