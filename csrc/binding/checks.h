// Argument checks. Every message names the argument, what was expected and what came.
#pragma once
#include <cstdint>
#include <optional>
#include <string>

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace fwpkm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_string(const Tensor& t) {
  std::string s = "(";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + ")";
}

inline std::string dtype_string(ScalarType type) { return torch::headeronly::toString(type); }

// PyTorch hands an undefined tensor to an operator when it is given None for a tensor.
inline void check_given(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.defined(), name, ": expected a tensor, got None");
}

inline void check_rank(const Tensor& t, int64_t rank, const char* name, const char* shape) {
  check_given(t, name);
  STD_TORCH_CHECK(t.dim() == rank, name, ": expected ", rank, " dimensions ", shape, ", got shape ", shape_string(t));
}

inline void check_size(const Tensor& t, int64_t dim, int64_t expected, const char* name, const char* shape) {
  STD_TORCH_CHECK(t.size(dim) == expected, name, ": expected ", expected, " in dimension ", dim, " of ", shape,
                  ", got shape ", shape_string(t));
}

// `like` is the tensor that sets the device; its name is part of the message.
inline void check_device(const Tensor& t, const Tensor& like, const char* name, const char* like_name) {
  check_given(t, name);
  STD_TORCH_CHECK(t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index(), name,
                  ": expected the device of ", like_name, " (",
                  like.is_cpu() ? "cpu" : "cuda:", like.is_cpu() ? "" : std::to_string(like.get_device_index()),
                  "), got ", t.is_cpu() ? "cpu" : "cuda:", t.is_cpu() ? "" : std::to_string(t.get_device_index()));
}

inline void check_memory_dtype(const Tensor& t, const char* name) {
  check_given(t, name);
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, name, ": expected float32 or float64, got ",
                  dtype_string(type));
}

inline void check_dtype(const Tensor& t, ScalarType expected, const char* name, const char* reason) {
  check_given(t, name);
  STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected ", dtype_string(expected), " (", reason, "), got ",
                  dtype_string(t.scalar_type()));
}

// Activations may be in the memory's dtype or in one of the half-precision formats of a model.
inline void check_activation_dtype(const Tensor& t, ScalarType memory, const char* name) {
  check_given(t, name);
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(type == memory || type == ScalarType::BFloat16 || type == ScalarType::Half, name, ": expected ",
                  dtype_string(memory), " (the dtype of the memory), BFloat16 or Half, got ", dtype_string(type));
}

}  // namespace fwpkm
