// The scan forward on the CPU: read every chunk, then write it. chunk_scan and chunk_scan_ run the same code: the first
// puts new rows into a log and leaves the memory alone, the second puts them where the old ones were. Formulas:
// reference.py.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "cpu/scan.h"

namespace fwpkm {

template <typename T>
class ForwardScan {
 public:
  // values and sub_keys are written when `in_place`; `out` then holds only the first five tensors.
  ForwardScan(const ScanInputs& in, const ScanSizes& sizes, const ScanOptions& options, ScanOutputs& out, bool in_place)
      : s_(sizes),
        o_(options),
        view_(in, sizes, options),
        k_(vector::kernels<T>()),
        in_place_(in_place),
        out_(out),
        values_(const_cast<T*>(in.values.const_data_ptr<T>())),
        sub_keys_(const_cast<T*>(in.sub_keys.const_data_ptr<T>())),
        log_(in_place ? nullptr : out.new_rows.mutable_data_ptr<T>()),
        rows_(sizes, options, values_, log_),
        lists_(std::max(s_.slots, 2 * s_.keys.heads * s_.keys.sub_keys)),
        newest_(in_place ? 0 : s_.slots),
        read_from_(in_place ? nullptr : out.read_from.mutable_data_ptr<int32_t>()) {}

  void run() {
    check_inputs();
    key_count_ = 2 * s_.keys.heads * s_.keys.sub_keys * s_.keys.half_width;
    keys_ = sub_keys_;
    int64_t most = 0;
    for (const Step& step : s_.steps) most = std::max(most, s_.batch * step.tokens());
    slots_.resize(most * view_.reads);
    scores_.resize(most * view_.reads);
    weights_.resize(most * view_.reads);
    if (!o_.values_only) memory_terms_.resize(most * view_.reads);
    if (in_place_) {
      lists_scratch_.resize(most * 2 * view_.reads);
      scores_scratch_.resize(most * 2 * view_.reads);
      places_scratch_.resize(most * view_.reads);
      if (o_.keys_move()) other_keys_.resize(key_count_);
    }
    if (!in_place_) std::fill_n(out_.new_slots.mutable_data_ptr<int32_t>(), s_.places(), -1);
    for (const Step& step : s_.steps) {
      if (!step.writes && !in_place_) finish_rows();
      read(step);
      if (step.writes) {
        make_keys(step);  // aside; nothing of a chunk is written before all of it is known to be finite
        write_values(step);
        write_keys();
        ++written_;
      }
    }
    if (s_.steps.empty() || s_.steps.back().writes) finish_rows();
    if (!in_place_)
      if (T* last = out_.new_sub_keys.mutable_data_ptr<T>(); last != keys_)
        std::memcpy(last, keys_, key_count_ * sizeof(T));
  }

 private:
  using Token = typename ScanView<T>::Token;

  // Everything a caller can get wrong in the numbers themselves, before anything is written.
  void check_inputs() {
    const auto finite = [&](const T* p, int64_t n, const char* name) {
      STD_TORCH_CHECK(k_.all_finite(p, n), name, ": expected finite numbers, got NaN or infinity");
    };
    finite(view_.query, s_.batch * s_.length * s_.keys.heads * s_.keys.key_dim(), "query");
    for (const Step& step : s_.steps)
      for (int64_t t = 0; t < s_.batch * step.tokens(); ++t) {
        const Token token = view_.token(step, t);
        if (!view_.has_pair(step, token)) continue;  // a masked token's target may be anything
        finite(view_.target + view_.target_row(token) * s_.width, s_.width, "target");
        if (view_.loss_weights) finite(view_.loss_weights + view_.at(token), 1, "loss_weights");
      }
  }

  // Saved lists of a step: [m, H, 2, R] and [m, H, R].
  int32_t* list_indices(const Step& step) {
    return in_place_ ? lists_scratch_.data()
                     : out_.list_indices.mutable_data_ptr<int32_t>() + s_.batch * step.tokens_before * 2 * view_.reads;
  }
  T* list_scores(const Step& step) {
    return in_place_ ? scores_scratch_.data()
                     : out_.list_scores.mutable_data_ptr<T>() + s_.batch * step.tokens_before * 2 * view_.reads;
  }
  int32_t* places(const Step& step) {
    return in_place_ ? places_scratch_.data()
                     : out_.places.mutable_data_ptr<int32_t>() + s_.batch * step.tokens_before * view_.reads;
  }
  int64_t first_place(const Step& step) const { return s_.batch * step.tokens_before * view_.reads; }

  // ---- read: lists, weights, out; for pairs the losses and w * (out - target) ---------------------------------------
  void read(const Step& step) {
    const int64_t m = s_.batch * step.tokens();
    errors_.resize(s_.batch * step.pairs * s_.width);
    largest_errors_.assign(s_.batch * step.pairs, 0.0);
    std::atomic<int64_t> odd_scores{-1}, odd_rows{-1};  // one of such tokens; which one, depends on the threads
    torch::stable::parallel_for(0, m, ProductKeySearch<T>::kBlock, [&](int64_t begin, int64_t end) {
      ProductKeySearch<T> search(s_.keys, s_.topk, o_.score, o_.eps);
      std::vector<const T*> rows(view_.reads);
      std::vector<T> scratch(s_.width), decayed(rows_.needs_scratch() ? view_.reads * s_.width : 0);
      for (int64_t t = begin; t < end;) {
        const Token first = view_.token(step, t);
        const int64_t n = std::min({search.kBlock, end - t, step.tokens() - first.i});  // tokens of one batch row
        const bool finite = search(view_.query_half(first, 0, 0), n, keys_, [&](int64_t i) {
          return SearchResult<T>{list_indices(step) + (t + i) * 2 * view_.reads,
                                 list_scores(step) + (t + i) * 2 * view_.reads, places(step) + (t + i) * view_.reads,
                                 slots_.data() + (t + i) * view_.reads, scores_.data() + (t + i) * view_.reads};
        });
        if (!finite) odd_scores = t;
        for (const int64_t stop = t + n; t < stop; ++t)
          if (!read_token(step, t, stop, rows.data(), scratch.data(), decayed.empty() ? nullptr : decayed.data()))
            odd_rows = t;
      }
    });
    const auto where = [&](int64_t t) {
      const Token token = view_.token(step, t);
      return "batch row " + std::to_string(token.b) + ", near token " + std::to_string(token.x) + ", after " +
             std::to_string(written_) + " chunks written in this call";
    };
    STD_TORCH_CHECK(odd_scores < 0, "sub_keys: expected finite scores, got NaN or infinity (", where(odd_scores),
                    "); the sub-keys are damaged or have diverged, or queries are too large");
    STD_TORCH_CHECK(odd_rows < 0, "values: expected a finite memory loss, got NaN or infinity (", where(odd_rows),
                    "); the rows read are damaged or have diverged");
  }

  // The slots of the tokens up to `known` have been found.
  bool read_token(const Step& step, int64_t t, int64_t known, const T** rows, T* scratch, T* decayed) {
    const Token token = view_.token(step, t);
    const int64_t n = view_.reads;
    const int32_t* slots = slots_.data() + t * n;
    T* a = weights_.data() + t * n;
    read_weights(o_.activation, T(o_.temperature), scores_.data() + t * n, n, a);
    for (int64_t r = 0; r < n; ++r) {
      const int32_t place = in_place_ ? -1 : newest_[slots[r]] - 1;
      if (!in_place_) read_from_[first_place(step) + t * n + r] = place;
      rows[r] = rows_.row(slots[r], place, in_place_ ? 0 : written_, !step.writes,
                          decayed ? decayed + r * s_.width : nullptr);
    }
    T* out = scratch;
    if (token.x >= step.own) {
      const int64_t row = view_.own_row(token);
      out = out_.out.mutable_data_ptr<T>() + row * s_.width;
      std::memcpy(out_.indices.mutable_data_ptr<int32_t>() + row * n, slots, n * sizeof(int32_t));
      std::memcpy(out_.weights.mutable_data_ptr<T>() + row * n, a, n * sizeof(T));
    }
    if (in_place_)  // rows of the next tokens are fetched on the way
      k_.gather(values_, slots, a, 1, n, (known - t) * n, s_.width, out);
    else
      k_.weighted_sum(rows, nullptr, a, n, s_.width, out);
    if (token.i >= step.pairs) return true;
    T& loss = out_.losses.mutable_data_ptr<T>()[token.b * s_.pairs + step.pairs_before + token.i];
    T* b = o_.values_only ? nullptr : memory_terms_.data() + t * n;
    if (!view_.has_pair(step, token)) {
      loss = 0;
      if (b) std::fill_n(b, n, T(0));
      return true;
    }
    T* error = errors_.data() + (token.b * step.pairs + token.i) * s_.width;
    const T* target = view_.target + view_.target_row(token) * s_.width;
    const T w = view_.loss_weight(token);
    for (int64_t c = 0; c < s_.width; ++c) error[c] = out[c] - target[c];
    const T* self = error;
    T squared;
    k_.dots(&self, nullptr, 1, error, s_.width, &squared);
    loss = w * squared / T(s_.width);
    if (!std::isfinite(squared) || !std::isfinite(loss)) return false;
    for (int64_t c = 0; c < s_.width; ++c) error[c] *= w;
    // No element is larger than the root of the sum of squares, unless these were too small to be held.
    double largest = std::sqrt(double(squared)) * std::abs(double(w));
    if (squared < T(1e-30))
      for (int64_t c = 0; c < s_.width; ++c) largest = std::max(largest, std::abs(double(error[c])));
    largest_errors_[token.b * step.pairs + token.i] = largest;
    if (b) {  // b = <V[slot], error> / (M V), then J b: d(memory loss) / d(scores)
      k_.dots(rows, nullptr, n, error, s_.width, b);
      for (int64_t r = 0; r < n; ++r) b[r] /= T(view_.pair_count(step)) * T(s_.width);
      through_weights(o_.activation, T(o_.temperature), a, scores_.data() + t * n, b, n, b);
    }
    return true;
  }

  // ---- write: one owner per slot that was read ----------------------------------------------------------------------
  void write_values(const Step& step) {
    const int64_t m = s_.batch * step.tokens(), n = view_.reads, offset = first_place(step);
    const double scale = view_.write_scale(step);
    lists_.build(m * n, [&](int32_t i) { return slots_[i]; });
    const auto error_of = [&](int32_t i) -> const T* {
      const Token token = view_.token(step, i / n);
      return view_.has_pair(step, token) ? errors_.data() + (token.b * step.pairs + token.i) * s_.width : nullptr;
    };
    const auto weight_of = [&](int32_t i) { return weights_[i]; };
    // The slot's row after this write; `scratch` of 2*V.
    const auto step_row = [&](const OrderedLists::Group& group, const auto& errors, const auto& weights, T* scratch,
                              const T* old, T* next, uint8_t* open) {
      ordered_sum<T>(errors, nullptr, weights, s_.width, scratch);
      k_.step(old, scratch, T(view_.gamma(step, scale, lists_, group)), T(o_.lr), T(o_.grad_clip), s_.width, next,
              open);
    };
    const auto old_row = [&](int32_t slot, T* scratch) {
      return rows_.row(slot, in_place_ ? -1 : newest_[slot] - 1, in_place_ ? 1 : written_ + 1, false, scratch);
    };

    if (may_overflow(step, scale)) {
      std::atomic<int32_t> odd{-1};
      lists_.for_each<T>(2 * s_.width, error_of, weight_of,
                         [&](const auto& group, const auto& errors, const auto& weights, T* scratch) {
                           T* row = scratch + s_.width;
                           step_row(group, errors, weights, scratch, old_row(group.key, row), row, nullptr);
                           if (!k_.all_finite(row, s_.width)) odd = group.key;
                         });
      STD_TORCH_CHECK(odd < 0, "values: expected finite rows after the write of chunk ", written_,
                      ", got an overflow at slot ", odd.load(), "; lr, weight_decay or the targets are too large");
    }
    if (in_place_) {
      if (o_.decays()) decay_values();
      lists_.for_each<T>(s_.width, error_of, weight_of,
                         [&](const auto& group, const auto& errors, const auto& weights, T* scratch) {
                           T* row = values_ + group.key * s_.width;
                           // Rows to be written are anywhere in the memory: the next but one is fetched meanwhile.
                           const auto& groups = lists_.groups();
                           if (const size_t ahead = &group - groups.data() + 2; ahead < groups.size())
                             for (int64_t c = 0; c < s_.width; c += int64_t(64 / sizeof(T)))
                               __builtin_prefetch(values_ + groups[ahead].key * s_.width + c, 1);
                           step_row(group, errors, weights, scratch, row, row, nullptr);
                         });
      return;
    }
    const int64_t open_bytes = (s_.width + 7) / 8;
    int32_t* new_slots = out_.new_slots.mutable_data_ptr<int32_t>();
    uint8_t* open = o_.clips() ? out_.open_rows.mutable_data_ptr<uint8_t>() : nullptr;
    lists_.for_each<T>(2 * s_.width, error_of, weight_of,
                       [&](const auto& group, const auto& errors, const auto& weights, T* scratch) {
                         const int64_t place = offset + group.first;
                         const T* old = old_row(group.key, scratch + s_.width);
                         step_row(group, errors, weights, scratch, old, log_ + place * s_.width,
                                  open ? open + place * open_bytes : nullptr);
                         if (newest_[group.key]) new_slots[newest_[group.key] - 1] = -1;
                         new_slots[place] = group.key;
                         newest_[group.key] = int32_t(place) + 1;
                         for (int32_t i = lists_.next(group.first); i >= 0; i = lists_.next(i))
                           std::fill_n(log_ + (offset + i) * s_.width, s_.width, T(0));
                       });
  }

  // False if no element of a row can move by as much as half the last place of the largest number: then a row that is
  // finite stays so, and need not be looked at.
  bool may_overflow(const Step& step, double scale) const {
    if (std::abs(o_.keep()) > 1) return true;
    double weight = 0, error = 0;
    for (int64_t i = 0; i < s_.batch * step.tokens() * view_.reads; ++i)
      weight = std::max(weight, std::abs(double(weights_[i])));
    for (const double e : largest_errors_) error = std::max(error, e);
    const double sum = double(s_.batch * step.tokens() * view_.reads) * weight * error;
    constexpr double kLimit = std::numeric_limits<T>::max() * std::numeric_limits<T>::epsilon() / 4;
    return !(sum * std::max(1.0, scale) * std::max(1.0, std::abs(o_.lr)) < kLimit);
  }

  // The one pass over all rows.
  void decay_values() {
    const T keep = T(o_.keep());
    const auto decay = [&](int64_t slot, T* to) { k_.scaled(values_ + slot * s_.width, keep, 1, s_.width, to); };
    if (std::abs(o_.keep()) > 1) {
      std::atomic<int64_t> odd{-1};
      torch::stable::parallel_for(0, s_.slots, 64, [&](int64_t begin, int64_t end) {
        std::vector<T> row(s_.width);
        for (int64_t slot = begin; slot < end; ++slot) {
          decay(slot, row.data());
          if (!k_.all_finite(row.data(), s_.width)) odd = slot;
        }
      });
      STD_TORCH_CHECK(odd < 0, "values: expected finite rows after the decay of chunk ", written_,
                      ", got an overflow at slot ", odd.load(), "; lr or weight_decay is too large");
    }
    torch::stable::parallel_for(0, s_.slots, 64, [&](int64_t begin, int64_t end) {
      for (int64_t slot = begin; slot < end; ++slot) decay(slot, values_ + slot * s_.width);
    });
  }

  // Weight decay: the newest rows catch up with the writes since their own. The backward pass does not miss what they
  // were: a writing step replaces every row it reads, so none of them has read a row that is still the newest.
  void finish_rows() {
    if (in_place_ || !o_.decays()) return;
    const int32_t* new_slots = out_.new_slots.mutable_data_ptr<int32_t>();
    torch::stable::parallel_for(0, s_.places(), 64, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        if (new_slots[e] >= 0)
          k_.scaled(log_ + e * s_.width, T(o_.keep()), written_ - rows_.writer(e) - 1, s_.width, log_ + e * s_.width);
    });
  }

  // The sub-keys after this write, computed beside the present ones.
  void make_keys(const Step& step) {
    const int64_t m = s_.batch * step.tokens(), entries = m * 2 * view_.reads, topk = s_.topk;
    T& loss = out_.addressing_loss.mutable_data_ptr<T>()[written_];
    loss = 0;
    next_keys_ = keys_;
    if (!o_.keys_move()) return;
    next_keys_ = in_place_                   ? other_keys_.data()
                 : written_ + 1 == s_.writes ? out_.new_sub_keys.mutable_data_ptr<T>()
                                             : out_.key_versions.mutable_data_ptr<T>() + written_ * key_count_;
    const int32_t* ids = list_indices(step);
    const T* scores = list_scores(step);
    // sigma = d(key loss) / d(score of a list entry), then alpha = sigma * d(score) / d(sub-key) over `difference`
    std::vector<T> alpha(entries, T(0));
    if (o_.addressing_weight != 0) {
      const Addressing<T> address(view_, step, ids, scores);
      loss = T(address.loss());
      if (address.rows()) {
        const std::vector<double> u = address.slope();
        const double factor = o_.addressing_weight / double(address.rows());
        torch::stable::parallel_for(0, entries / topk, 64, [&](int64_t begin, int64_t end) {
          std::vector<double> centred(topk);
          for (int64_t list = begin; list < end; ++list) {
            address.centre(list, u, centred.data());
            for (int64_t r = 0; r < topk; ++r)
              alpha[list * topk + r] = T(factor * double(address.p()[list * topk + r]) * centred[r]);
          }
        });
      }
    }
    if (!o_.values_only)
      for (int64_t t = 0; t < m; ++t) {
        if (view_.token(step, t).i >= step.pairs) continue;
        for (int64_t r = 0; r < view_.reads; ++r) {
          const int64_t h = r / topk, place = places(step)[t * view_.reads + r], b = t * view_.reads + r;
          const int64_t list = (t * s_.keys.heads + h) * 2 * topk;
          alpha[list + place / topk] += memory_terms_[b];
          alpha[list + topk + place % topk] += memory_terms_[b];
        }
      }
    const bool idw = o_.score == Score::kIdw;
    if (idw)
      torch::stable::parallel_for(0, entries, 4096, [&](int64_t begin, int64_t end) {
        for (int64_t l = begin; l < end; ++l) alpha[l] *= 2 * std::exp(scores[l]);
      });

    const int64_t half = s_.keys.half_width, open_bytes = (half + 7) / 8;
    T* next = next_keys_;
    each_key([&](int64_t at) { k_.scaled(keys_ + at, T(o_.keep()), o_.decays(), half, next + at); });
    uint8_t* open = nullptr;
    if (!in_place_ && o_.clips()) {
      const int64_t bytes = key_count_ / half * open_bytes;
      open = out_.open_keys.mutable_data_ptr<uint8_t>() + written_ * bytes;
      std::memset(open, 0xff, bytes);  // gradient 0 where nobody looked
    }
    lists_.build(entries, [&](int32_t l) { return view_.sub_key_of(l, ids); });
    lists_.for_each<T>(
        half, [&](int32_t l) { return view_.query_of(step, l); }, [&](int32_t l) { return alpha[l]; },
        [&](const OrderedLists::Group& group, const auto& rows, const auto& coefficients, T* sum) {
          const int64_t at = group.key * half;
          ordered_sum<T>(rows, idw ? keys_ + at : nullptr, coefficients, half, sum);
          k_.step(next + at, sum, T(1), T(o_.lr), T(o_.grad_clip), half, next + at,
                  open ? open + group.key * open_bytes : nullptr);
        });
    std::atomic<bool> odd{false};
    each_key([&](int64_t at) {
      if (!k_.all_finite(next + at, half)) odd = true;
    });
    STD_TORCH_CHECK(!odd, "sub_keys: expected finite numbers after the write of chunk ", written_,
                    ", got an overflow; lr, weight_decay or addressing_weight is too large, or queries are");
  }

  void write_keys() {
    if (!in_place_)
      keys_ = next_keys_;
    else if (next_keys_ != keys_)
      each_key([&](int64_t at) { std::memcpy(sub_keys_ + at, next_keys_ + at, s_.keys.half_width * sizeof(T)); });
  }

  // f(offset of the sub-key) for every sub-key, in parallel.
  template <typename F>
  void each_key(const F& f) const {
    const int64_t half = s_.keys.half_width;
    torch::stable::parallel_for(0, key_count_ / half, 128, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) f(j * half);
    });
  }

  const ScanSizes& s_;
  const ScanOptions& o_;
  const ScanView<T> view_;
  const vector::Kernels<T>& k_;
  const bool in_place_;
  ScanOutputs& out_;
  T *values_, *sub_keys_, *log_;
  const RowReader<T> rows_;
  OrderedLists lists_;
  ZeroedTable newest_;  // slot -> newest place of the log + 1
  int32_t* read_from_;
  T* next_keys_ = nullptr;
  T* keys_ = nullptr;  // sub-keys as the writes so far left them
  int64_t key_count_ = 0, written_ = 0;
  // of the current step
  std::vector<int32_t> slots_;                           // [m, H, R]
  std::vector<T> scores_, weights_, memory_terms_;       // [m, H, R]
  std::vector<double> largest_errors_;                   // [B, pairs]  no element of an error is larger
  std::vector<T> errors_;                                // [B, pairs, V]  w * (out - target)
  std::vector<int32_t> lists_scratch_, places_scratch_;  // in place only: nothing is saved
  std::vector<T> scores_scratch_, other_keys_;
};

}  // namespace fwpkm
