// torch.ops.fwpkm.product_key_topk and its backward on the CPU.
#include "ops/product_key_topk.h"

#include <atomic>

#include <torch/csrc/stable/library.h>

#include "binding/dispatch.h"
#include "binding/tensors.h"
#include "cpu/ordered_lists.h"
#include "cpu/product_key.h"

namespace fwpkm {
namespace {

std::tuple<Tensor, Tensor> product_key_topk_cpu(const Tensor& query, const Tensor& sub_keys, int64_t topk,
                                                std::string score, double eps) {
  const ProductKeySizes s = check_sub_keys(sub_keys);
  check_query(query, sub_keys, s);
  check_topk(topk, s);
  check_eps(eps);
  const Score kind = parse_score(score);
  const auto type = sub_keys.scalar_type();
  const Tensor q = prepared(query, type), k = prepared(sub_keys, type);
  Tensor scores = make(k, with_last(query, topk), type);
  Tensor indices = make(k, with_last(query, topk), ScalarType::Int);
  const int64_t reads = s.heads * topk, tokens = scores.numel() / reads;
  std::atomic<int64_t> odd{-1};  // a token with a score that is not finite
  dispatch_memory(k, [&](auto t) {
    using T = decltype(t);
    const T* qp = q.const_data_ptr<T>();
    const T* kp = k.const_data_ptr<T>();
    T* sp = scores.mutable_data_ptr<T>();
    int32_t* ip = indices.mutable_data_ptr<int32_t>();
    torch::stable::parallel_for(0, tokens, ProductKeySearch<T>::kBlock, [&](int64_t begin, int64_t end) {
      ProductKeySearch<T> search(s, topk, kind, eps);
      std::vector<int32_t> list_indices(search.kBlock * 2 * reads), places(reads);
      std::vector<T> list_scores(search.kBlock * 2 * reads);
      for (int64_t x = begin; x < end; x += search.kBlock) {
        const int64_t n = std::min(search.kBlock, end - x);
        const bool finite = search(qp + x * s.heads * s.key_dim(), n, kp, [&](int64_t i) {
          return SearchResult<T>{list_indices.data() + i * 2 * reads, list_scores.data() + i * 2 * reads, places.data(),
                                 ip + (x + i) * reads, sp + (x + i) * reads};
        });
        if (!finite) odd = x;
      }
    });
  });
  STD_TORCH_CHECK(odd < 0, "query, sub_keys: expected finite scores, got NaN or infinity among the tokens from ",
                  odd.load(), " on (leading dimensions of query flattened)");
  return {scores, indices};
}

std::tuple<Tensor, Tensor> product_key_topk_backward_cpu(const Tensor& dscores, const Tensor& query,
                                                         const Tensor& sub_keys, const Tensor& indices,
                                                         std::string score, double eps) {
  const ProductKeySizes s = check_product_key_topk_backward(dscores, query, sub_keys, indices, eps);
  const bool idw = parse_score(score) == Score::kIdw;
  const auto type = sub_keys.scalar_type();
  const int64_t topk = reads_of(indices), heads = s.heads, half = s.half_width, reads = heads * topk;
  const Tensor d = prepared(dscores, type), q = prepared(query, type), k = prepared(sub_keys, type),
               ids = prepared(indices, ScalarType::Int);
  const int64_t tokens = d.numel() / reads;
  const int32_t* ip = ids.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < ids.numel(); ++i)
    STD_TORCH_CHECK(ip[i] >= 0 && ip[i] < s.sub_keys * s.sub_keys, "indices: expected slots in [0, ",
                    s.sub_keys * s.sub_keys, "), got ", ip[i]);
  std::vector<int64_t> query_shape(query.sizes().begin(), query.sizes().end());
  Tensor dquery = make(k, query_shape, type);
  Tensor dsub_keys = make_zeros(k, {heads, 2, s.sub_keys, half}, type);
  dispatch_memory(k, [&](auto t) {
    using T = decltype(t);
    const auto& v = vector::kernels<T>();
    const T *dp = d.const_data_ptr<T>(), *qp = q.const_data_ptr<T>(), *kp = k.const_data_ptr<T>();
    T *dqp = dquery.mutable_data_ptr<T>(), *dkp = dsub_keys.mutable_data_ptr<T>();
    // Entry e = (token, head, half, read): its sub-key, and dscore * d(score of the half) / d(...) over `difference`.
    std::vector<int32_t> key(2 * tokens * reads);
    std::vector<T> beta(2 * tokens * reads);
    torch::stable::parallel_for(0, tokens * heads, 16, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(topk);
      for (int64_t x = begin; x < end; ++x)
        for (int64_t p = 0; p < 2; ++p) {
          const T* qx = qp + (2 * x + p) * half;
          T* b = beta.data() + (2 * x + p) * topk;
          for (int64_t r = 0; r < topk; ++r) {
            const int32_t slot = ip[x * topk + r];
            const int64_t j = p == 0 ? slot / s.sub_keys : slot % s.sub_keys;
            const int64_t table = (x % heads * 2 + p) * s.sub_keys + j;
            key[(2 * x + p) * topk + r] = int32_t(table);
            rows[r] = kp + table * half;
          }
          if (idw) v.distances(rows.data(), topk, qx, half, b);
          for (int64_t r = 0; r < topk; ++r) b[r] = idw ? 2 * dp[x * topk + r] / (T(eps) + b[r]) : dp[x * topk + r];
          v.weighted_sum(rows.data(), idw ? qx : nullptr, b, topk, half, dqp + (2 * x + p) * half);
        }
    });
    OrderedLists lists(2 * heads * s.sub_keys);
    lists.build(int64_t(key.size()), [&](int32_t e) { return key[e]; });
    lists.for_each<T>(
        0, [&](int32_t e) { return qp + e / topk * half; }, [&](int32_t e) { return beta[e]; },
        [&](const auto& group, const auto& rows, const auto& coefficients, T*) {
          const int64_t at = group.key * half;
          ordered_sum<T>(rows, idw ? kp + at : nullptr, coefficients, half, dkp + at);
        });
  });
  return {prepared(dquery, query.scalar_type()), dsub_keys};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) {
  m.impl("product_key_topk", TORCH_BOX(&product_key_topk_cpu));
  m.impl("product_key_topk_backward", TORCH_BOX(&product_key_topk_backward_cpu));
}

}  // namespace fwpkm
