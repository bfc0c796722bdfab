// Backward pass of a scan, the side of queries and sub-keys: from the gradients of the reads' scores and of the
// sub-keys after a write to the gradients of the query and of the sub-keys before it. Letters: docs/mathematics.md,
// section 5.
#pragma once
#include <vector>

#include "cpu/scan.h"

namespace fwpkm {

// What the forward pass saved of one step, m tokens.
template <typename T>
struct SavedStep {
  const Step& step;
  int64_t m, written;           // tokens; writes before the step
  const int32_t* list_indices;  // [m, H, 2, R]
  const T* list_scores;         // [m, H, 2, R]
  const int32_t* places;        // [m, H, R]
  const int32_t* read_from;     // [m, H, R]
  const T* sub_keys;            // [H, 2, P, K/2]  that the step read with
};

template <typename T>
class KeyGradients {
 public:
  // dsub_keys: [H, 2, P, K/2], the gradient of the sub-keys after the last write; `is_zero` when nobody gave one.
  KeyGradients(const ScanView<T>& view, const uint8_t* open_keys, T* dsub_keys, bool is_zero, T* dquery)
      : v_(view),
        k_(vector::kernels<T>()),
        half_(view.s.keys.half_width),
        tables_(2 * view.s.keys.heads * view.s.keys.sub_keys),
        open_keys_(open_keys),
        dsub_keys_(dsub_keys),
        is_zero_(is_zero),
        dquery_(dquery),
        theta_(tables_ * half_),
        lists_(tables_) {}

  // Whether the step's write can pass a gradient on: it moved the sub-keys, and somebody later read them.
  bool through_write(const Step& step) const { return step.writes && !is_zero_ && v_.o.keys_move(); }

  // Before the tokens: theta = -lr open dK', and t = slope <theta, difference> of every list entry.
  const std::vector<T>& directions(const SavedStep<T>& saved) {
    const int64_t topk = v_.o.topk, open_bytes = (half_ + 7) / 8;
    const uint8_t* open = v_.o.clips() ? open_keys_ + saved.written * tables_ * open_bytes : nullptr;
    const bool idw = v_.o.score == Score::kIdw;
    torch::stable::parallel_for(0, tables_, 64, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t c = 0; c < half_; ++c) {
          const bool passes = !open || (open[j * open_bytes + c / 8] >> (c % 8) & 1);
          theta_[j * half_ + c] = passes ? T(-v_.o.lr) * dsub_keys_[j * half_ + c] : T(0);
        }
    });
    t_.resize(saved.m * 2 * v_.reads);
    torch::stable::parallel_for(0, lists_of(saved), 16, [&](int64_t begin, int64_t end) {
      std::vector<const T*> thetas(topk), keys(topk);
      for (int64_t list = begin; list < end; ++list) {
        rows_of(saved, list, keys.data(), thetas.data());
        T* t = t_.data() + list * topk;
        const T* q = v_.query_of(saved.step, list * topk);
        k_.dots(thetas.data(), idw ? keys.data() : nullptr, topk, q, half_, t);
        if (idw)
          for (int64_t r = 0; r < topk; ++r) t[r] *= 2 * std::exp(saved.list_scores[list * topk + r]);
      }
    });
    return t_;
  }

  // After the tokens. dz [m, H, R]: gradient of the reads' scores. sigma_memory [m, H, R]: d(memory loss) / d(scores),
  // empty unless it moved the sub-keys. daddressing: gradient of the step's addressing loss.
  void add(const SavedStep<T>& saved, const std::vector<T>& dz, const std::vector<T>& sigma_memory, T daddressing) {
    const int64_t topk = v_.o.topk, entries = lists_of(saved) * topk;
    const bool through = through_write(saved.step);
    sigma_.assign(entries, T(0));
    dsub_.assign(entries, T(0));
    if (saved.step.writes && v_.o.addressing_weight != 0 && (through || daddressing != 0))
      addressing(saved, through, daddressing);
    for (int64_t i = 0; i < saved.m * v_.reads; ++i) {  // what a read says, onto its two list places
      const int64_t list = i / topk * 2 * topk;
      const int64_t p0 = list + saved.places[i] / topk, p1 = list + topk + saved.places[i] % topk;
      dsub_[p0] += dz[i];
      dsub_[p1] += dz[i];
      if (!sigma_memory.empty()) sigma_[p0] += sigma_memory[i], sigma_[p1] += sigma_memory[i];
    }
    const bool idw = v_.o.score == Score::kIdw;
    torch::stable::parallel_for(0, entries, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {  // sigma becomes alpha, dsub becomes beta
        const T slope = idw ? 2 * std::exp(saved.list_scores[l]) : T(1);
        if (idw && through) dsub_[l] += sigma_[l] * t_[l];
        dsub_[l] *= slope;
        sigma_[l] *= slope;
      }
    });
    add_dquery(saved, through);
    add_dsub_keys(saved, through);
  }

 private:
  int64_t lists_of(const SavedStep<T>& saved) const { return saved.m * 2 * v_.s.keys.heads; }

  // The sub-keys, and their rows of theta, on one list.
  void rows_of(const SavedStep<T>& saved, int64_t list, const T** keys, const T** thetas) const {
    for (int64_t r = 0; r < v_.o.topk; ++r) {
      const int64_t at = v_.sub_key_of(list * v_.o.topk + r, saved.list_indices) * half_;
      keys[r] = saved.sub_keys + at;
      thetas[r] = theta_.data() + at;
    }
  }

  // The addressing loss: sigma, its gradient by the list scores, and its Hessian times t (how the step changes with
  // them).
  void addressing(const SavedStep<T>& saved, bool through, T daddressing) {
    const Addressing<T> address(v_, saved.step, saved.list_indices, saved.list_scores);
    if (!address.rows()) return;
    const int64_t topk = v_.o.topk;
    const double factor = v_.o.addressing_weight / double(address.rows());
    const std::vector<double> u = address.slope();
    std::vector<double> dmean(2 * v_.s.keys.sub_keys, 0.0);
    std::vector<T> centred(through ? lists_of(saved) * topk : 0);  // t - sum P t
    if (through) {
      std::vector<T> pt(centred.size());
      torch::stable::parallel_for(0, lists_of(saved), 64, [&](int64_t begin, int64_t end) {
        for (int64_t list = begin; list < end; ++list) {
          const T *p = address.p().data() + list * topk, *t = t_.data() + list * topk;
          T mean = 0;
          for (int64_t r = 0; r < topk; ++r) mean += p[r] * t[r];
          for (int64_t r = 0; r < topk; ++r) {
            centred[list * topk + r] = t[r] - mean;
            pt[list * topk + r] = p[r] * (t[r] - mean);
          }
        }
      });
      address.accumulate(pt, factor, dmean);  // sum P t~ first: 1 / Pbar may reach 2e8
      const std::vector<double> curvature = address.curvature();
      for (size_t j = 0; j < dmean.size(); ++j) dmean[j] *= curvature[j];
    }
    torch::stable::parallel_for(0, lists_of(saved), 64, [&](int64_t begin, int64_t end) {
      std::vector<double> u_centred(topk), dp(topk);
      for (int64_t list = begin; list < end; ++list) {
        const T* p = address.p().data() + list * topk;
        address.centre(list, u, u_centred.data());
        double mean_dp = 0;
        for (int64_t r = 0; r < topk; ++r) {
          const int64_t l = list * topk + r;
          dp[r] = !through ? 0.0
                           : factor * double(centred[l]) * u_centred[r] +
                                 dmean[address.table_at(l)] / double(address.rows());
          mean_dp += double(p[r]) * dp[r];
        }
        for (int64_t r = 0; r < topk; ++r) {
          const double sigma = factor * double(p[r]) * u_centred[r];
          sigma_[list * topk + r] = through ? T(sigma) : T(0);
          dsub_[list * topk + r] = T(double(p[r]) * (dp[r] - mean_dp) + double(daddressing) * sigma);
        }
      }
    });
  }

  void add_dquery(const SavedStep<T>& saved, bool through) {
    const int64_t topk = v_.o.topk;
    const bool idw = v_.o.score == Score::kIdw;
    torch::stable::parallel_for(0, lists_of(saved), 16, [&](int64_t begin, int64_t end) {
      std::vector<const T*> keys(topk), thetas(topk);
      std::vector<T> sum(half_);
      for (int64_t list = begin; list < end; ++list) {
        const T* q = v_.query_of(saved.step, list * topk);
        T* dq = dquery_ + (q - v_.query);
        rows_of(saved, list, keys.data(), thetas.data());
        k_.weighted_sum(keys.data(), idw ? q : nullptr, dsub_.data() + list * topk, topk, half_, sum.data());
        k_.axpy(T(1), sum.data(), half_, dq);
        if (!through) continue;
        k_.weighted_sum(thetas.data(), nullptr, sigma_.data() + list * topk, topk, half_, sum.data());
        k_.axpy(T(1), sum.data(), half_, dq);
      }
    });
  }

  // One owner per sub-key, its list entries in token order.
  void add_dsub_keys(const SavedStep<T>& saved, bool through) {
    const int64_t entries = lists_of(saved) * v_.o.topk;
    const bool idw = v_.o.score == Score::kIdw;
    if (saved.step.writes && v_.o.decays()) k_.scaled(dsub_keys_, T(v_.o.keep()), 1, tables_ * half_, dsub_keys_);
    lists_.build(entries, [&](int32_t l) { return v_.sub_key_of(l, saved.list_indices); });
    lists_.for_each<T>(
        half_, [&](int32_t l) { return v_.query_of(saved.step, l); }, [&](int32_t l) { return dsub_[l]; },
        [&](const OrderedLists::Group& group, const auto& rows, const auto& beta, T* sum) {
          const int64_t at = group.key * half_;
          const T* minus = idw ? saved.sub_keys + at : nullptr;
          ordered_sum<T>(rows, minus, beta, half_, sum);
          k_.axpy(T(1), sum, half_, dsub_keys_ + at);
          if (!idw || !through) return;
          T alpha = 0;
          for (int32_t l = group.first; l >= 0; l = lists_.next(l)) alpha += sigma_[l];
          k_.axpy(-alpha, theta_.data() + at, half_, dsub_keys_ + at);
        });
    is_zero_ = is_zero_ && entries == 0;
  }

  const ScanView<T>& v_;
  const vector::Kernels<T>& k_;
  const int64_t half_, tables_;  // K/2; H*2*P sub-keys
  const uint8_t* open_keys_;
  T* dsub_keys_;
  bool is_zero_;
  T* dquery_;
  std::vector<T> theta_;             // [H, 2, P, K/2]
  std::vector<T> t_, sigma_, dsub_;  // [m, H, 2, R]
  OrderedLists lists_;
};

}  // namespace fwpkm
