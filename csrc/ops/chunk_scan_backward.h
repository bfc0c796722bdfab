// The backward pass of a scan: what the forward pass saved, gradients of its outputs, and their checks, for every
// device.
#pragma once
#include <optional>
#include <vector>

#include "binding/tensors.h"
#include "ops/chunk_scan.h"

namespace fwpkm {

struct ScanGradients {  // of the outputs; absent = zero
  std::optional<Tensor> out, weights, losses, addressing_loss, new_rows, new_sub_keys;
};

struct SavedScan {
  Tensor new_rows, new_sub_keys, list_indices, list_scores, places, read_from, key_versions, open_rows, open_keys;
};

struct ScanInputGradients {
  Tensor query, target, loss_weights, sub_keys, value_slots, value_rows;
};

inline bool has_shape(const Tensor& t, const std::vector<int64_t>& shape) {
  bool same = t.dim() == int64_t(shape.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == shape[d];
  return same;
}

// Each must be what chunk_scan returned for these inputs and options: device, dtype and shape. Numbers in them are for
// the device to check.
inline void check_saved(const SavedScan& saved, const Tensor& values, const ScanSizes& s, const SavedSizes& z) {
  const auto type = values.scalar_type();
  const int64_t heads = s.keys.heads, sub_keys = s.keys.sub_keys, half = s.keys.half_width;
  const auto check = [&](const Tensor& t, const std::vector<int64_t>& shape, ScalarType expected, const char* name) {
    check_dtype(t, expected, name, "as chunk_scan returned it");
    check_device(t, values, name, "values");
    STD_TORCH_CHECK(has_shape(t, shape) && t.is_contiguous(), name,
                    ": expected the tensor that chunk_scan returned for these inputs and options, got shape ",
                    shape_string(t));
  };
  check(saved.new_rows, {z.places, s.width}, type, "new_rows");
  check(saved.new_sub_keys, {heads, 2, sub_keys, half}, type, "new_sub_keys");
  check(saved.list_indices, {z.tokens, heads, 2, s.topk}, ScalarType::Int, "list_indices");
  check(saved.list_scores, {z.tokens, heads, 2, s.topk}, type, "list_scores");
  check(saved.places, {z.tokens, heads, s.topk}, ScalarType::Int, "places");
  check(saved.read_from, {z.tokens, heads, s.topk}, ScalarType::Int, "read_from");
  check(saved.key_versions, {z.key_versions, half}, type, "key_versions");
  check(saved.open_rows, {z.open_rows, (s.width + 7) / 8}, ScalarType::Byte, "open_rows");
  check(saved.open_keys, {z.open_keys, heads, 2, sub_keys, (half + 7) / 8}, ScalarType::Byte, "open_keys");
}

// Gradients of the outputs, checked and prepared for use.
inline ScanGradients prepared_gradients(const ScanGradients& given, const Tensor& values, const ScanSizes& s,
                                        const SavedSizes& z, int64_t carried) {
  const auto type = values.scalar_type();
  const int64_t heads = s.keys.heads, own = s.length - carried;
  const auto gradient = [&](const std::optional<Tensor>& t, const std::vector<int64_t>& shape,
                            const char* name) -> std::optional<Tensor> {
    if (!t) return std::nullopt;
    STD_TORCH_CHECK(has_shape(*t, shape), name, ": expected a tensor of the shape of the output, got shape ",
                    shape_string(*t));
    check_device(*t, values, name, "values");
    check_activation_dtype(*t, type, name);
    return prepared(*t, type);
  };
  return {gradient(given.out, {s.batch, own, s.width}, "dout"),
          gradient(given.weights, {s.batch, own, heads, s.topk}, "dweights"),
          gradient(given.losses, {s.batch, s.pairs}, "dlosses"),
          gradient(given.addressing_loss, {s.writes}, "daddressing_loss"),
          gradient(given.new_rows, {z.places, s.width}, "dnew_rows"),
          gradient(given.new_sub_keys, {heads, 2, s.keys.sub_keys, s.keys.half_width}, "dnew_sub_keys")};
}

}  // namespace fwpkm
