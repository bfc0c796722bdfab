// value_gather and its derivatives: validation, for every device.
#pragma once
#include <limits>

#include "binding/checks.h"

namespace fwpkm {

inline void check_indices_dtype(const Tensor& indices) {
  check_given(indices, "indices");
  const auto type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Int || type == ScalarType::Long, "indices: expected int32 or int64, got ",
                  dtype_string(type));
  STD_TORCH_CHECK(indices.dim() >= 1, "indices: expected at least 1 dimension (..., R), got a scalar");
}

// weights or any other tensor with one number per read, of the dtype of `like`
inline void check_per_read(const Tensor& t, const Tensor& indices, const Tensor& like, const char* name,
                           const char* like_name) {
  check_dtype(t, like.scalar_type(), name, (std::string("the dtype of ") + like_name).c_str());
  bool same = t.dim() == indices.dim();
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == indices.size(d);
  STD_TORCH_CHECK(same, name, ": expected the shape of indices ", shape_string(indices), ", got ", shape_string(t));
  check_device(t, indices, name, "indices");
}

inline void check_values(const Tensor& values) {
  check_memory_dtype(values, "values");
  check_rank(values, 2, "values", "(S, V)");
  STD_TORCH_CHECK(values.size(0) <= 2147483647, "values: expected at most 2^31 - 1 slots, got ", values.size(0));
}

// dout (..., V) of indices (..., R)
inline void check_dout(const Tensor& dout, const Tensor& indices) {
  check_memory_dtype(dout, "dout");
  bool same = dout.dim() == indices.dim();
  for (int64_t d = 0; same && d + 1 < dout.dim(); ++d) same = dout.size(d) == indices.size(d);
  STD_TORCH_CHECK(same, "dout: expected the leading dimensions of indices ", shape_string(indices), ", got shape ",
                  shape_string(dout));
  check_device(dout, indices, "dout", "indices");
}

inline int64_t reads_of(const Tensor& indices) { return indices.size(indices.dim() - 1); }

// ---- of each operator, all but the indices themselves
inline void check_value_gather(const Tensor& values, const Tensor& indices, const Tensor& weights) {
  check_values(values);
  check_device(indices, values, "indices", "values");
  check_indices_dtype(indices);
  check_per_read(weights, indices, values, "weights", "values");
}

inline void check_value_gather_dvalues(const Tensor& dout, const Tensor& indices, const Tensor& weights,
                                       int64_t num_slots) {
  STD_TORCH_CHECK(num_slots >= 0 && num_slots <= std::numeric_limits<int32_t>::max(),
                  "num_slots: expected a number in [0, 2^31), got ", num_slots);
  check_indices_dtype(indices);
  check_dout(dout, indices);
  check_per_read(weights, indices, dout, "weights", "dout");
}

inline void check_value_gather_dweights(const Tensor& dout, const Tensor& values, const Tensor& indices) {
  check_values(values);
  check_indices_dtype(indices);
  check_device(values, indices, "values", "indices");
  check_dout(dout, indices);
  check_dtype(dout, values.scalar_type(), "dout", "the dtype of values");
  check_size(dout, dout.dim() - 1, values.size(1), "dout", "(..., V)");
}

}  // namespace fwpkm
