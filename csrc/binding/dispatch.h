// From a tensor's dtype to a template argument.
#pragma once
#include "binding/checks.h"

namespace fwpkm {

// Calls f(T{}) with T = float or double, the dtypes of a memory. Use: dispatch_memory(values, [&](auto t) {
//   using T = decltype(t); ... });
template <typename F>
auto dispatch_memory(const Tensor& memory, F&& f) {
  if (memory.scalar_type() == ScalarType::Double) return f(double{});
  STD_TORCH_CHECK(memory.scalar_type() == ScalarType::Float, "expected float32 or float64, got ",
                  dtype_string(memory.scalar_type()));
  return f(float{});
}

// The same for int32_t and int64_t, the dtypes of indices.
template <typename F>
auto dispatch_index(const Tensor& indices, F&& f) {
  if (indices.scalar_type() == ScalarType::Long) return f(int64_t{});
  STD_TORCH_CHECK(indices.scalar_type() == ScalarType::Int, "expected int32 or int64, got ",
                  dtype_string(indices.scalar_type()));
  return f(int32_t{});
}

}  // namespace fwpkm
