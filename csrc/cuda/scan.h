// From the checked arguments of a scan to what its kernels see. For the .cu files of chunk_scan and its backward pass.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels/write_rows.cuh"
#include "ops/scan_tensors.h"

namespace fwpkm {

template <typename T>
kernels::ScanView<T> scan_view(const ScanInputs& in, const ScanSizes& s, const ScanOptions& o) {
  static_assert(int(Activation::kSilu) == int(kernels::Activation::kSilu) &&
                int(Activation::kRelu) == int(kernels::Activation::kRelu));
  return {.query = in.query.const_data_ptr<T>(),
          .target = in.target.const_data_ptr<T>(),
          .loss_weights = in.loss_weights ? in.loss_weights->const_data_ptr<T>() : nullptr,
          .mask = in.mask ? static_cast<const uint8_t*>(in.mask->const_data_ptr()) : nullptr,
          .batch = s.batch,
          .length = s.length,
          .carried = o.carried,
          .lookahead = o.lookahead,
          .heads = s.keys.heads,
          .num_sub_keys = s.keys.sub_keys,
          .half_width = s.keys.half_width,
          .topk = s.topk,
          .num_slots = s.slots,
          .width = s.width,
          .all_pairs = s.pairs,
          .carry = o.boundary == Boundary::kCarry,
          .idw = o.score == Score::kIdw,
          .values_only = o.values_only,
          .activation = kernels::Activation(int(o.activation)),
          .eps = T(o.eps),
          .temperature = T(o.temperature),
          .lr = T(o.lr),
          .keep = T(o.keep()),
          .grad_clip = T(o.grad_clip),
          .addressing_weight = o.addressing_weight,
          .memories = {}};  // one: the operators have no argument for more
}

inline std::vector<kernels::Chunk> chunks_of(const ScanSizes& s) {
  std::vector<kernels::Chunk> chunks;
  int64_t writes = 0;
  for (const Step& step : s.steps) {
    chunks.push_back(
        {step.first, step.own, step.stop, step.pairs, step.tokens_before, step.pairs_before, writes, step.writes});
    writes += step.writes;
  }
  return chunks;
}

// Tokens of a chunk over the batch, at most.
inline int64_t most_tokens(const ScanSizes& s) {
  int64_t most = 0;
  for (const Step& step : s.steps) most = std::max(most, s.batch * step.tokens());
  return most;
}

// Whether a scan, or its backward pass, should use two streams.
inline bool works_apart(const ScanSizes& s) {
  return s.writes > 0 && most_tokens(s) * s.reads_per_token() >= kernels::ScanSize::kLeastReadsApart &&
         !kernels::without("streams");
}

// kappa of gamma = kappa / N_read
inline kernels::WriteScale write_scale_of(const Step& step, const ScanSizes& s, const ScanOptions& o, bool masked) {
  const double pairs = double(s.batch * step.pairs);
  if (pairs == 0) return {0, false};
  if (o.write_rule == WriteRule::kPaper) return {1, false};
  if (masked) return {0, true};
  return {double(s.batch * (step.stop - step.own)) / pairs * double(s.reads_per_token()), false};
}

// log null: the scan is in place.
template <typename T>
kernels::Versions<T> versions_of(const ScanSizes& s, const ScanOptions& o, const T* values, const T* log) {
  int64_t places[2] = {1, 1}, writes = 0;  // of the first and the second chunk that writes
  for (const Step& step : s.steps)
    if (step.writes && writes < 2) places[writes++] = s.batch * step.tokens() * s.reads_per_token();
  return {values, log, s.width, places[0], places[1], o.decays()};
}

// What the kernels hold in shared memory or registers.
inline void check_kernel_limits(const ScanSizes& s) {
  STD_TORCH_CHECK(s.topk <= 128, "topk: expected at most 128 on CUDA, got ", s.topk);
  STD_TORCH_CHECK(s.reads_per_token() <= 1024,
                  "topk: expected at most 1024 reads H*R of a token on CUDA, got H = ", s.keys.heads, ", R = ", s.topk);
}

}  // namespace fwpkm
