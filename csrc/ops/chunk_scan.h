// The scan: options, schedule of chunks, validation and sizes, for every device and both directions.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "binding/checks.h"
#include "ops/product_key_topk.h"
#include "ops/value_gather.h"

namespace fwpkm {

enum class Activation { kSoftmax, kSilu, kRelu };
enum class WriteRule { kPaper, kRelease };
enum class Boundary { kDrop, kCarry };

struct ScanOptions {
  int64_t topk, chunk_size, lookahead;
  Score score;
  double eps;
  Activation activation;
  double temperature, lr, weight_decay;
  double grad_clip;  // negative: none
  WriteRule write_rule;
  bool values_only;
  double addressing_weight;
  Boundary boundary;
  int64_t carried;
  bool flush;

  double keep() const { return 1 - lr * weight_decay; }
  bool decays() const { return keep() != 1; }
  bool clips() const { return grad_clip >= 0; }
  // Whether a write can change the sub-keys.
  bool keys_move() const { return addressing_weight != 0 || !values_only || decays(); }
};

inline ScanOptions parse_scan_options(int64_t topk, int64_t chunk_size, int64_t lookahead, const std::string& score,
                                      double eps, const std::string& activation, double temperature, double lr,
                                      double weight_decay, std::optional<double> grad_clip,
                                      const std::string& write_rule, bool values_only, double addressing_weight,
                                      const std::string& boundary, int64_t carried, bool flush) {
  const auto finite = [](double x, const char* name) {
    STD_TORCH_CHECK(std::isfinite(x), name, ": expected a finite number, got ", x);
  };
  STD_TORCH_CHECK(chunk_size >= 1, "chunk_size: expected at least 1, got ", chunk_size);
  STD_TORCH_CHECK(lookahead >= 0, "lookahead: expected 0 or more, got ", lookahead);
  check_eps(eps);
  finite(temperature, "temperature");
  STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
  finite(lr, "lr");
  finite(weight_decay, "weight_decay");
  finite(addressing_weight, "addressing_weight");
  STD_TORCH_CHECK(!grad_clip || (std::isfinite(*grad_clip) && *grad_clip >= 0),
                  "grad_clip: expected None or a finite number, 0 or more, got ", grad_clip.value_or(0));
  STD_TORCH_CHECK(activation == "softmax" || activation == "silu" || activation == "relu",
                  "activation: expected 'softmax', 'silu' or 'relu', got '", activation, "'");
  STD_TORCH_CHECK(write_rule == "paper" || write_rule == "release", "write_rule: expected 'paper' or 'release', got '",
                  write_rule, "'");
  STD_TORCH_CHECK(boundary == "drop" || boundary == "carry", "boundary: expected 'drop' or 'carry', got '", boundary,
                  "'");
  STD_TORCH_CHECK(boundary == "drop" || lookahead <= chunk_size,
                  "lookahead: expected at most chunk_size = ", chunk_size, " with boundary 'carry', got ", lookahead);
  STD_TORCH_CHECK(carried == 0 || (boundary == "carry" && carried == lookahead),
                  "carried: expected 0, or lookahead = ", lookahead, " with boundary 'carry', got ", carried);
  return {topk,
          chunk_size,
          lookahead,
          parse_score(score),
          eps,
          activation == "softmax" ? Activation::kSoftmax
          : activation == "silu"  ? Activation::kSilu
                                  : Activation::kRelu,
          temperature,
          lr,
          weight_decay,
          grad_clip.value_or(-1),
          write_rule == "paper" ? WriteRule::kPaper : WriteRule::kRelease,
          values_only,
          addressing_weight,
          boundary == "drop" ? Boundary::kDrop : Boundary::kCarry,
          carried,
          flush};
}

// One chunk: reads its tokens with one state of the memory, then (unless it is a partial tail) writes it.
struct Step {
  int64_t first;  // first token it reads, of each batch row
  int64_t own;    // first token that belongs to it (boundary "carry" re-reads the `own - first` before)
  int64_t stop;   // end of its tokens
  int64_t pairs;  // tokens [first, first + pairs) are pairs of the write
  bool writes;
  int64_t tokens_before;  // per batch row: tokens read by earlier steps (place in the saved lists)
  int64_t pairs_before;   // per batch row: pairs of earlier steps (place in losses)

  int64_t tokens() const { return stop - first; }
};

struct ScanSizes {
  int64_t batch, length;       // B, T (with the carried tokens)
  ProductKeySizes keys;        // H, P, K/2
  int64_t topk, slots, width;  // R, S, V
  std::vector<Step> steps;
  int64_t writes;                // W, number of writing steps
  int64_t pairs;                 // per batch row
  int64_t tokens, write_tokens;  // read by all steps / by writing steps, per batch row

  int64_t reads_per_token() const { return keys.heads * topk; }
  int64_t places() const { return batch * write_tokens * reads_per_token(); }  // E, places of the log
};

inline std::vector<Step> schedule(int64_t length, const ScanOptions& o) {
  std::vector<Step> steps;
  int64_t tokens = 0, pairs = 0;
  for (int64_t start = o.carried; start < length;) {
    Step s{};
    s.own = start;
    s.stop = start + std::min(o.chunk_size, length - start);
    s.writes = o.flush || s.stop - start == o.chunk_size;
    const int64_t before = start == o.carried ? o.carried : o.boundary == Boundary::kCarry ? o.lookahead : 0;
    s.first = s.writes ? start - before : start;
    s.pairs = s.writes ? std::max<int64_t>(s.stop - s.first - o.lookahead, 0) : 0;
    s.tokens_before = tokens;
    s.pairs_before = pairs;
    tokens += s.tokens();
    pairs += s.pairs;
    start = s.stop;
    steps.push_back(s);
  }
  return steps;
}

// An option that float32 turns into zero or infinity.
inline void check_representable(const ScanOptions& o, ScalarType memory) {
  if (memory != ScalarType::Float) return;
  const std::pair<double, const char*> all[] = {{o.eps, "eps"},
                                                {o.temperature, "temperature"},
                                                {o.lr, "lr"},
                                                {o.weight_decay, "weight_decay"},
                                                {o.grad_clip, "grad_clip"},
                                                {o.addressing_weight, "addressing_weight"}};
  for (const auto& [value, name] : all)
    STD_TORCH_CHECK(std::isfinite(float(value)), name, ": expected a number that float32 can hold, got ", value);
  STD_TORCH_CHECK(std::isfinite(float(o.keep())), "weight_decay, lr: expected 1 - lr * weight_decay to be finite, got ",
                  o.keep());
  for (const auto& [value, name] : {all[0], all[1]})
    STD_TORCH_CHECK(float(value) > 0, name, ": expected a number that float32 tells from zero, got ", value);
}

inline ScanSizes check_scan(const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
                            const std::optional<Tensor>& loss_weights, const std::optional<Tensor>& mask,
                            const ScanOptions& o) {
  check_values(values);
  check_representable(o, values.scalar_type());
  ScanSizes s{};
  s.keys = check_sub_keys(sub_keys);
  check_dtype(sub_keys, values.scalar_type(), "sub_keys", "the dtype of values");
  check_device(sub_keys, values, "sub_keys", "values");
  check_rank(query, 4, "query", "(B, T, H, K)");
  check_query(query, sub_keys, s.keys);
  check_topk(o.topk, s.keys);
  s.batch = query.size(0), s.length = query.size(1), s.topk = o.topk;
  s.slots = values.size(0), s.width = values.size(1);
  check_slots(values, sub_keys);
  STD_TORCH_CHECK(s.width > 0, "values: expected V > 0, got shape ", shape_string(values));
  const auto check_bt = [&](const Tensor& t, const char* name, const char* shape) {
    STD_TORCH_CHECK(t.size(0) == s.batch && t.size(1) == s.length, name, ": expected ", shape, " with (B, T) = (",
                    s.batch, ", ", s.length, ") from query, got shape ", shape_string(t));
    check_device(t, values, name, "values");
  };
  check_rank(target, 3, "target", "(B, T, V)");
  check_bt(target, "target", "(B, T, V)");
  check_size(target, 2, s.width, "target", "(B, T, V)");
  check_activation_dtype(target, values.scalar_type(), "target");
  if (loss_weights) {
    check_rank(*loss_weights, 2, "loss_weights", "(B, T)");
    check_bt(*loss_weights, "loss_weights", "(B, T)");
    check_activation_dtype(*loss_weights, values.scalar_type(), "loss_weights");
  }
  if (mask) {
    check_rank(*mask, 2, "mask", "(B, T)");
    check_bt(*mask, "mask", "(B, T)");
    check_dtype(*mask, ScalarType::Bool, "mask", "True = counts in the memory loss");
  }
  STD_TORCH_CHECK(o.carried <= s.length, "carried: expected at most T = ", s.length, ", got ", o.carried);
  s.steps = schedule(s.length, o);
  for (const Step& step : s.steps) {
    s.writes += step.writes;
    s.pairs += step.pairs;
    s.tokens += step.tokens();
    if (step.writes) s.write_tokens += step.tokens();
  }
  STD_TORCH_CHECK(s.batch * s.tokens * s.reads_per_token() <= std::numeric_limits<int32_t>::max(),
                  "query: expected fewer than 2^31 reads B*T*H*R in one call, got ",
                  s.batch * s.tokens * s.reads_per_token(), "; split the call along T");
  for (const Step& step : s.steps)
    STD_TORCH_CHECK(2 * s.batch * step.tokens() * s.reads_per_token() <= std::numeric_limits<int32_t>::max(),
                    "chunk_size: expected fewer than 2^30 reads B*C*H*R in one chunk, got ",
                    s.batch * step.tokens() * s.reads_per_token());
  return s;
}

// Leading sizes of what chunk_scan keeps for its backward pass; nothing depends on the data.
struct SavedSizes {
  int64_t places;                // of the log: one per read of a writing step
  int64_t tokens;                // in the saved lists
  int64_t key_versions;          // rows of the sub-keys between the first and the last write: (W - 1) * H*2*P
  int64_t open_rows, open_keys;  // clip bits
};

inline SavedSizes saved_sizes(const ScanSizes& s, const ScanOptions& o) {
  return {s.places(), s.batch * s.tokens,
          o.keys_move() ? std::max<int64_t>(s.writes - 1, 0) * 2 * s.keys.heads * s.keys.sub_keys : 0,
          o.clips() ? s.places() : 0, o.clips() && o.keys_move() ? s.writes : 0};
}

}  // namespace fwpkm
