// torch.ops.fwpkm.chunk_scan and chunk_scan_ on the CPU: check, allocate, run (forward_scan.h), register.
#include <torch/csrc/stable/library.h>

#include "cpu/forward_scan.h"
#include "cpu/pages.h"

namespace fwpkm {
namespace {

ScanResult chunk_scan_cpu(const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
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
  ScanOutputs r = ScanOutputs::of_scan(s, o, in.values, make_pages);
  dispatch_memory(in.values, [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, false).run(); });
  return r.result(query.scalar_type());
}

ScanReading chunk_scan_in_place_cpu(Tensor values, Tensor sub_keys, const Tensor& query, const Tensor& target,
                                    std::optional<Tensor> loss_weights, std::optional<Tensor> mask, int64_t topk,
                                    int64_t chunk_size, int64_t lookahead, std::string score, double eps,
                                    std::string activation, double temperature, double lr, double weight_decay,
                                    std::optional<double> grad_clip, std::string write_rule, bool values_only,
                                    double addressing_weight, std::string boundary, int64_t carried, bool flush) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  in.check_apart_from(values, sub_keys);
  ScanOutputs r = ScanOutputs::of_reading(s, o, in.values);
  dispatch_memory(in.values, [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, true).run(); });
  return r.reading(query.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) {
  m.impl("chunk_scan", TORCH_BOX(&chunk_scan_cpu));
  m.impl("chunk_scan_", TORCH_BOX(&chunk_scan_in_place_cpu));
}

}  // namespace fwpkm
