// The tensors of a scan, for every device: its inputs made ready, its outputs allocated, and both handed back.
#pragma once
#include <tuple>

#include "binding/tensors.h"
#include "ops/chunk_scan.h"
#include "ops/commit.h"

namespace fwpkm {

// The tensor arguments, contiguous, activations in the dtype of the memory.
struct ScanInputs {
  Tensor values, sub_keys, query, target;
  std::optional<Tensor> loss_weights, mask;

  static ScanInputs prepare(const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
                            const std::optional<Tensor>& loss_weights, const std::optional<Tensor>& mask) {
    const auto type = values.scalar_type();
    return {prepared(values, type), prepared(sub_keys, type),     prepared(query, type),
            prepared(target, type), prepared(loss_weights, type), prepared(mask, ScalarType::Bool)};
  }

  // For a scan in place: what it reads must not lie in what it writes.
  void check_apart_from(const Tensor& written_values, const Tensor& written_sub_keys) const {
    check_in_place(written_values, "values");
    check_in_place(written_sub_keys, "sub_keys");
    written_values.mutable_data_ptr();  // a lazy copy becomes a real one, before its address is asked for
    written_sub_keys.mutable_data_ptr();
    const auto check = [&](const Tensor& t, const char* name) {
      check_apart(t, name, written_values, written_sub_keys);
    };
    check(written_sub_keys, "sub_keys");
    check(query, "query");
    check(target, "target");
    if (loss_weights) check(*loss_weights, "loss_weights");
    if (mask) check(*mask, "mask");
  }
};

using ScanReading = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;  // of chunk_scan_
using ScanResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor, Tensor>;  // of chunk_scan

struct ScanOutputs {
  Tensor out, indices, weights, losses, addressing_loss;  // out in the dtype of the memory
  Tensor new_rows, new_slots, new_sub_keys;
  Tensor list_indices, list_scores, places, read_from, key_versions, open_rows, open_keys;

  // The five tensors both operators return.
  static ScanOutputs of_reading(const ScanSizes& s, const ScanOptions& o, const Tensor& like) {
    const int64_t own = s.length - o.carried;
    const auto type = like.scalar_type();
    ScanOutputs r;
    r.out = make(like, {s.batch, own, s.width}, type);
    r.indices = make(like, {s.batch, own, s.keys.heads, s.topk}, ScalarType::Int);
    r.weights = make(like, {s.batch, own, s.keys.heads, s.topk}, type);
    r.losses = make(like, {s.batch, s.pairs}, type);
    r.addressing_loss = make(like, {s.writes}, type);
    return r;
  }

  // All of chunk_scan's. make_rows(like, size, type) allocates the log, by far the largest.
  template <typename F>
  static ScanOutputs of_scan(const ScanSizes& s, const ScanOptions& o, const Tensor& like, const F& make_rows) {
    const SavedSizes z = saved_sizes(s, o);
    const auto type = like.scalar_type(), ints = ScalarType::Int;
    const int64_t heads = s.keys.heads, sub_keys = s.keys.sub_keys, half = s.keys.half_width;
    ScanOutputs r = of_reading(s, o, like);
    r.new_rows = make_rows(like, {z.places, s.width}, type);
    r.new_slots = make(like, {z.places}, ints);
    r.new_sub_keys = make(like, {heads, 2, sub_keys, half}, type);
    r.list_indices = make(like, {z.tokens, heads, 2, s.topk}, ints);
    r.list_scores = make(like, {z.tokens, heads, 2, s.topk}, type);
    r.places = make(like, {z.tokens, heads, s.topk}, ints);
    r.read_from = make(like, {z.tokens, heads, s.topk}, ints);
    r.key_versions = make(like, {z.key_versions, half}, type);
    r.open_rows = make_zeros(like, {z.open_rows, (s.width + 7) / 8}, ScalarType::Byte);
    r.open_keys = make(like, {z.open_keys, heads, 2, sub_keys, (half + 7) / 8}, ScalarType::Byte);
    return r;
  }

  // `activations`: the dtype that `out` is handed back in.
  ScanReading reading(ScalarType activations) const {
    return {prepared(out, activations), indices, weights, losses, addressing_loss};
  }
  ScanResult result(ScalarType activations) const {
    return std::tuple_cat(reading(activations), std::tuple{new_rows, new_slots, new_sub_keys, list_indices, list_scores,
                                                           places, read_from, key_versions, open_rows, open_keys});
  }
};

}  // namespace fwpkm
