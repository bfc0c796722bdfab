// torch.ops.fwpkm.chunk_scan_backward on the CPU: check all that was saved, allocate, run (backward_scan.h), register.
#include <torch/csrc/stable/library.h>

#include "cpu/backward_scan.h"

namespace fwpkm {
namespace {

void check_range(const Tensor& t, int64_t low, int64_t high, const char* name) {
  const int32_t* p = t.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < t.numel(); ++i)
    STD_TORCH_CHECK(p[i] >= low && p[i] < high, name, ": expected numbers in [", low, ", ", high, "), got ", p[i]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_backward_cpu(
    std::optional<Tensor> dout, std::optional<Tensor> dweights, std::optional<Tensor> dlosses,
    std::optional<Tensor> daddressing_loss, std::optional<Tensor> dnew_rows, std::optional<Tensor> dnew_sub_keys,
    const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
    std::optional<Tensor> loss_weights, std::optional<Tensor> mask, const Tensor& new_rows, const Tensor& new_sub_keys,
    const Tensor& list_indices, const Tensor& list_scores, const Tensor& places, const Tensor& read_from,
    const Tensor& key_versions, const Tensor& open_rows, const Tensor& open_keys, int64_t topk, int64_t chunk_size,
    int64_t lookahead, std::string score, double eps, std::string activation, double temperature, double lr,
    double weight_decay, std::optional<double> grad_clip, std::string write_rule, bool values_only,
    double addressing_weight, std::string boundary, int64_t carried, bool flush, bool need_dvalues) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  const SavedSizes z = saved_sizes(s, o);
  const SavedScan saved{new_rows,  new_sub_keys, list_indices, list_scores, places,
                        read_from, key_versions, open_rows,    open_keys};
  check_saved(saved, values, s, z);
  check_range(list_indices, 0, s.keys.sub_keys, "list_indices");
  check_range(places, 0, s.topk * s.topk, "places");
  check_range(read_from, -1, z.places, "read_from");

  const ScanGradients grads = prepared_gradients({dout, dweights, dlosses, daddressing_loss, dnew_rows, dnew_sub_keys},
                                                 values, s, z, o.carried);
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  const auto type = values.scalar_type();
  const int64_t heads = s.keys.heads, reads = need_dvalues ? z.tokens * s.reads_per_token() : 0;
  ScanInputGradients result{make_zeros(in.values, {s.batch, s.length, heads, s.keys.key_dim()}, type),
                            make_zeros(in.values, {s.batch, s.length, s.width}, type),
                            make_zeros(in.values, {loss_weights ? s.batch : 0, s.length}, type),
                            make_zeros(in.values, {heads, 2, s.keys.sub_keys, s.keys.half_width}, type),
                            make(in.values, {reads}, ScalarType::Long),
                            make_pages(in.values, {reads, s.width}, type)};
  dispatch_memory(in.values,
                  [&](auto t) { BackwardScan<decltype(t)>(in, s, o, saved, grads, need_dvalues, result).run(); });
  return {prepared(result.query, query.scalar_type()),
          prepared(result.target, target.scalar_type()),
          loss_weights ? prepared(result.loss_weights, loss_weights->scalar_type()) : result.loss_weights,
          result.sub_keys,
          result.value_slots,
          result.value_rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) { m.impl("chunk_scan_backward", TORCH_BOX(&chunk_scan_backward_cpu)); }

}  // namespace fwpkm
