// The few tensor functions this project needs from torch's stable ABI.
#pragma once
#include <optional>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "binding/checks.h"

namespace fwpkm {

// Uninitialised, on the device of `like`.
inline Tensor make(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, type);
}

inline Tensor make_zeros(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  return torch::stable::new_zeros(like, {size.data(), size.size()}, type);
}

// The shape of `t` with another last dimension.
inline std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> shape(t.sizes().begin(), t.sizes().end());
  shape.back() = last;
  return shape;
}

// Contiguous and of the given dtype; the tensor itself when it already is.
inline Tensor prepared(const Tensor& t, ScalarType type) {
  const Tensor c = t.is_contiguous() ? t : torch::stable::contiguous(t);
  return c.scalar_type() == type ? c : torch::stable::to(c, type);
}

inline std::optional<Tensor> prepared(const std::optional<Tensor>& t, ScalarType type) {
  if (!t) return std::nullopt;
  return prepared(*t, type);
}

}  // namespace fwpkm
