// product_key_topk: validation and sizes, for every device.
#pragma once
#include <limits>

#include "ops/value_gather.h"

namespace fwpkm {

enum class Score { kDot, kIdw };

inline Score parse_score(const std::string& score) {
  STD_TORCH_CHECK(score == "dot" || score == "idw", "score: expected 'dot' or 'idw', got '", score, "'");
  return score == "dot" ? Score::kDot : Score::kIdw;
}

struct ProductKeySizes {
  int64_t heads, sub_keys, half_width;  // H, P, K/2
  int64_t key_dim() const { return 2 * half_width; }
};

inline ProductKeySizes check_sub_keys(const Tensor& sub_keys) {
  check_memory_dtype(sub_keys, "sub_keys");
  check_rank(sub_keys, 4, "sub_keys", "(H, 2, P, K/2)");
  check_size(sub_keys, 1, 2, "sub_keys", "(H, 2, P, K/2)");
  const ProductKeySizes s{sub_keys.size(0), sub_keys.size(2), sub_keys.size(3)};
  STD_TORCH_CHECK(s.heads > 0 && s.sub_keys > 0 && s.half_width > 0,
                  "sub_keys: expected no empty dimension in (H, 2, P, K/2), got shape ", shape_string(sub_keys));
  STD_TORCH_CHECK(s.sub_keys <= 46340, "sub_keys: expected P*P slots to fit int32 (P <= 46340), got P = ", s.sub_keys);
  return s;
}

inline void check_slots(const Tensor& values, const Tensor& sub_keys) {
  const int64_t slots = sub_keys.size(2) * sub_keys.size(2);
  STD_TORCH_CHECK(values.size(0) == slots, "values: expected P*P = ", slots, " slots from sub_keys ",
                  shape_string(sub_keys), ", got shape ", shape_string(values));
}

// The last two dimensions of a query: heads and key dimension.
inline void check_query(const Tensor& query, const Tensor& sub_keys, const ProductKeySizes& s) {
  check_activation_dtype(query, sub_keys.scalar_type(), "query");
  STD_TORCH_CHECK(query.dim() >= 2, "query: expected at least 2 dimensions (..., H, K), got shape ",
                  shape_string(query));
  const int64_t h = query.size(query.dim() - 2), k = query.size(query.dim() - 1);
  STD_TORCH_CHECK(k % 2 == 0, "query: expected an even key dimension K, two halves of K/2, got K = ", k);
  STD_TORCH_CHECK(h == s.heads && k == s.key_dim(), "query: expected (..., H, K) = (..., ", s.heads, ", ", s.key_dim(),
                  ") from sub_keys ", shape_string(sub_keys), ", got shape ", shape_string(query));
  check_device(query, sub_keys, "query", "sub_keys");
}

inline void check_topk(int64_t topk, const ProductKeySizes& s) {
  STD_TORCH_CHECK(topk >= 1 && topk <= s.sub_keys, "topk: expected 1 <= topk <= P = ", s.sub_keys, ", got ", topk);
}

inline void check_eps(double eps) {
  STD_TORCH_CHECK(eps > 0 && eps < std::numeric_limits<double>::infinity(),
                  "eps: expected a positive finite number, got ", eps);
}

// dscores and indices (..., H, R) of query (..., H, K)
inline ProductKeySizes check_product_key_topk_backward(const Tensor& dscores, const Tensor& query,
                                                       const Tensor& sub_keys, const Tensor& indices, double eps) {
  const ProductKeySizes s = check_sub_keys(sub_keys);
  check_query(query, sub_keys, s);
  check_eps(eps);
  check_dtype(indices, ScalarType::Int, "indices", "as product_key_topk returns them");
  check_device(indices, sub_keys, "indices", "sub_keys");
  check_per_read(dscores, indices, sub_keys, "dscores", "sub_keys");
  bool same = indices.dim() == query.dim();
  for (int64_t i = 0; same && i + 1 < indices.dim(); ++i) same = indices.size(i) == query.size(i);
  STD_TORCH_CHECK(same,
                  "indices, query: expected (..., H, R) and (..., H, K) of the same leading dimensions, got shapes ",
                  shape_string(indices), " and ", shape_string(query));
  check_topk(reads_of(indices), s);
  return s;
}

}  // namespace fwpkm
