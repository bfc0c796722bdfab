// torch.ops.fwpkm.product_key_topk and its backward on CUDA. Scores that are not finite and slots out of range are no
// errors here, for the host does not wait: the results they touch are NaN (indices: -1), and the device's error word
// says so.
#include "kernels/product_key_topk_backward.cuh"

#include <limits>

#include "binding/dispatch.h"
#include "binding/stream.h"
#include "binding/tensors.h"
#include "cuda/errors.h"
#include "cuda/search.h"
#include "ops/product_key_topk.h"

namespace fwpkm {
namespace {

std::tuple<Tensor, Tensor> product_key_topk_cuda(const Tensor& query, const Tensor& sub_keys, int64_t topk,
                                                 std::string score, double eps) {
  const ProductKeySizes s = check_sub_keys(sub_keys);
  check_query(query, sub_keys, s);
  check_topk(topk, s);
  check_eps(eps);
  STD_TORCH_CHECK(topk <= kernels::kMaxTopk, "topk: expected at most ", kernels::kMaxTopk, " on CUDA, got ", topk);
  const bool idw = parse_score(score) == Score::kIdw;
  const CudaScope cuda(sub_keys);
  const auto type = sub_keys.scalar_type();
  const Tensor q = prepared(query, type), k = prepared(sub_keys, type);
  Tensor scores = make(k, with_last(query, topk), type);
  Tensor indices = make(k, with_last(query, topk), ScalarType::Int);
  const int64_t tokens = scores.numel() / (s.heads * topk);
  Tensor list_scores = make(k, {tokens, s.heads, 2, topk}, type);
  Tensor list_indices = make(k, {tokens, s.heads, 2, topk}, ScalarType::Int);
  dispatch_memory(k, [&](auto t) {
    using T = decltype(t);
    const Tensor workspace = make(k, {kernels::search_workspace<T>(tokens, s.heads, s.sub_keys)}, ScalarType::Byte);
    const kernels::ProductKeySearch<T> search{.query = q.const_data_ptr<T>(),
                                              .rows = {tokens, tokens, tokens, 0},
                                              .sub_keys = k.const_data_ptr<T>(),
                                              .heads = s.heads,
                                              .num_sub_keys = s.sub_keys,
                                              .half_width = s.half_width,
                                              .topk = topk,
                                              .idw = idw,
                                              .eps = T(eps),
                                              .workspace = workspace.mutable_data_ptr(),
                                              .list_indices = list_indices.mutable_data_ptr<int32_t>(),
                                              .list_scores = list_scores.mutable_data_ptr<T>(),
                                              .places = nullptr,
                                              .slots = indices.mutable_data_ptr<int32_t>(),
                                              .scores = scores.mutable_data_ptr<T>(),
                                              .errors = error_word()};
    check_cuda(search_product_keys(search, cuda.stream()), "product_key_topk");
  });
  return {scores, indices};
}

std::tuple<Tensor, Tensor> product_key_topk_backward_cuda(const Tensor& dscores, const Tensor& query,
                                                          const Tensor& sub_keys, const Tensor& indices,
                                                          std::string score, double eps) {
  const ProductKeySizes s = check_product_key_topk_backward(dscores, query, sub_keys, indices, eps);
  const bool idw = parse_score(score) == Score::kIdw;
  STD_TORCH_CHECK(2 * indices.numel() <= std::numeric_limits<int32_t>::max(),
                  "expected fewer than 2^30 reads in one call, got ", indices.numel());
  STD_TORCH_CHECK(2 * s.heads * s.sub_keys <= std::numeric_limits<int32_t>::max(),
                  "sub_keys: expected fewer than 2^31 in all, got ", 2 * s.heads * s.sub_keys);
  const CudaScope cuda(sub_keys);
  const auto type = sub_keys.scalar_type();
  const Tensor d = prepared(dscores, type), q = prepared(query, type), k = prepared(sub_keys, type),
               ids = prepared(indices, ScalarType::Int);
  const int64_t topk = reads_of(ids), half = s.half_width;
  const int32_t entries = int32_t(2 * ids.numel());  // a read is one of both halves
  std::vector<int64_t> query_shape(query.sizes().begin(), query.sizes().end());
  Tensor dquery = make(k, query_shape, type);
  Tensor dsub_keys = make_zeros(k, {s.heads, 2, s.sub_keys, half}, type);
  Tensor keys = make(k, {entries}, ScalarType::Int), betas = make(k, {entries}, type);
  Tensor workspace = make(k, {kernels::ordered_lists_workspace(entries)}, ScalarType::Int);
  dispatch_memory(k, [&](auto t) {
    using T = decltype(t);
    Tensor scratch = make(k, {kernels::column_sums_scratch<T>(entries, 2 * s.heads, half)}, type);
    check_cuda(kernels::product_key_topk_backward(
                   d.const_data_ptr<T>(), q.const_data_ptr<T>(), k.const_data_ptr<T>(), ids.const_data_ptr<int32_t>(),
                   ids.numel() / (s.heads * topk), s.heads, s.sub_keys, topk, half, idw, T(eps),
                   keys.mutable_data_ptr<int32_t>(), betas.mutable_data_ptr<T>(), workspace.mutable_data_ptr<int32_t>(),
                   scratch.mutable_data_ptr<T>(), dquery.mutable_data_ptr<T>(), dsub_keys.mutable_data_ptr<T>(),
                   error_word(), cuda.stream()),
               "product_key_topk_backward");
  });
  return {prepared(dquery, query.scalar_type()), dsub_keys};
}

}  // namespace

FWPKM_CUDA_LIBRARY_IMPL(m) {
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk_cuda));
  m.impl("product_key_topk_backward", TORCH_BOX(&product_key_topk_backward_cuda));
}

}  // namespace fwpkm
