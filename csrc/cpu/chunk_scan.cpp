// torch.ops.fwpkm.chunk_scan and chunk_scan_ on the CPU: check, allocate, run (forward_scan.h), register.
#include <torch/csrc/stable/library.h>

#include "cpu/forward_scan.h"
#include "cpu/pages.h"
#include "ops/commit.h"

namespace fwpkm {
namespace {

// The five tensors both operators return; `out` in the dtype of the memory.
ScanOutputs read_outputs(const ScanSizes& s, const ScanOptions& o, const Tensor& like, ScalarType type) {
  const int64_t own = s.length - o.carried;
  ScanOutputs r;
  r.out = make(like, {s.batch, own, s.width}, type);
  r.indices = make(like, {s.batch, own, s.keys.heads, s.topk}, ScalarType::Int);
  r.weights = make(like, {s.batch, own, s.keys.heads, s.topk}, type);
  r.losses = make(like, {s.batch, s.pairs}, type);
  r.addressing_loss = make(like, {s.writes}, type);
  return r;
}

using FullResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                              Tensor, Tensor, Tensor, Tensor>;

FullResult chunk_scan_cpu(const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
                          std::optional<Tensor> loss_weights, std::optional<Tensor> mask, int64_t topk,
                          int64_t chunk_size, int64_t lookahead, std::string score, double eps, std::string activation,
                          double temperature, double lr, double weight_decay, std::optional<double> grad_clip,
                          std::string write_rule, bool values_only, double addressing_weight, std::string boundary,
                          int64_t carried, bool flush, bool /*sparse_grad*/) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  const auto type = values.scalar_type();
  ScanOutputs r = read_outputs(s, o, in.values, type);
  const SavedSizes z = saved_sizes(s, o);
  r.new_rows = make_pages(in.values, {z.places, s.width}, type);
  r.new_slots = make(in.values, {z.places}, ScalarType::Int);
  r.new_sub_keys = make(in.values, {s.keys.heads, 2, s.keys.sub_keys, s.keys.half_width}, type);
  r.list_indices = make(in.values, {z.tokens, s.keys.heads, 2, s.topk}, ScalarType::Int);
  r.list_scores = make(in.values, {z.tokens, s.keys.heads, 2, s.topk}, type);
  r.places = make(in.values, {z.tokens, s.keys.heads, s.topk}, ScalarType::Int);
  r.read_from = make(in.values, {z.tokens, s.keys.heads, s.topk}, ScalarType::Int);
  r.key_versions = make(in.values, {z.key_versions, s.keys.half_width}, type);
  r.open_rows = make_zeros(in.values, {z.open_rows, (s.width + 7) / 8}, ScalarType::Byte);
  r.open_keys =
      make(in.values, {z.open_keys, s.keys.heads, 2, s.keys.sub_keys, (s.keys.half_width + 7) / 8}, ScalarType::Byte);
  dispatch_memory(in.values, [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, false).run(); });
  return {prepared(r.out, query.scalar_type()),
          r.indices,
          r.weights,
          r.losses,
          r.addressing_loss,
          r.new_rows,
          r.new_slots,
          r.new_sub_keys,
          r.list_indices,
          r.list_scores,
          r.places,
          r.read_from,
          r.key_versions,
          r.open_rows,
          r.open_keys};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_in_place_cpu(
    Tensor values, Tensor sub_keys, const Tensor& query, const Tensor& target, std::optional<Tensor> loss_weights,
    std::optional<Tensor> mask, int64_t topk, int64_t chunk_size, int64_t lookahead, std::string score, double eps,
    std::string activation, double temperature, double lr, double weight_decay, std::optional<double> grad_clip,
    std::string write_rule, bool values_only, double addressing_weight, std::string boundary, int64_t carried,
    bool flush) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  check_in_place(values, "values");
  check_in_place(sub_keys, "sub_keys");
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  values.mutable_data_ptr();  // a lazy copy becomes a real one, before its address is asked for
  sub_keys.mutable_data_ptr();
  check_apart(sub_keys, "sub_keys", values, sub_keys);
  check_apart(in.query, "query", values, sub_keys);
  check_apart(in.target, "target", values, sub_keys);
  if (in.loss_weights) check_apart(*in.loss_weights, "loss_weights", values, sub_keys);
  if (in.mask) check_apart(*in.mask, "mask", values, sub_keys);
  ScanOutputs r = read_outputs(s, o, in.values, values.scalar_type());
  dispatch_memory(in.values, [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, true).run(); });
  return {prepared(r.out, query.scalar_type()), r.indices, r.weights, r.losses, r.addressing_loss};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) {
  m.impl("chunk_scan", TORCH_BOX(&chunk_scan_cpu));
  m.impl("chunk_scan_", TORCH_BOX(&chunk_scan_in_place_cpu));
}

}  // namespace fwpkm
