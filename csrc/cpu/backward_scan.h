// The scan backward on the CPU: exact derivatives, chunk by chunk in reverse.
//
// This file: the side of values and tokens; queries and sub-keys are in key_gradients.h. Letters (docs/mathematics.md,
// section 5), of one chunk, token x and read r:  a weights, z scores, J = da/dz;  err = out - target, e = w err;
// gamma = kappa / N_read;  g = -lr gamma open d(row after the write).  "mem" terms and second order: only when the
// memory loss moved the sub-keys (values_only = False).
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <vector>

#include "cpu/key_gradients.h"
#include "cpu/pages.h"
#include "cpu/scan.h"
#include "ops/chunk_scan_backward.h"

namespace fwpkm {

template <typename T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? t->const_data_ptr<T>() : nullptr;
}

template <typename T>
class BackwardScan {
 public:
  BackwardScan(const ScanInputs& in, const ScanSizes& sizes, const ScanOptions& options, const SavedScan& saved,
               const ScanGradients& grads, bool need_dvalues, ScanInputGradients& result)
      : s_(sizes),
        o_(options),
        view_(in, sizes, options),
        k_(vector::kernels<T>()),
        saved_(saved),
        grads_(grads),
        need_dvalues_(need_dvalues),
        result_(result),
        sub_keys_(in.sub_keys.const_data_ptr<T>()),
        key_count_(2 * s_.keys.heads * s_.keys.sub_keys * s_.keys.half_width),
        rows_(sizes, options, in.values.const_data_ptr<T>(), saved.new_rows.const_data_ptr<T>()),
        keys_(view_, saved.open_keys.const_data_ptr<uint8_t>(), result.sub_keys.mutable_data_ptr<T>(),
              !grads.new_sub_keys, result.query.mutable_data_ptr<T>()),
        slot_lists_(s_.slots),
        row_id_(s_.slots) {
    if (grads.new_sub_keys)
      std::memcpy(result.sub_keys.mutable_data_ptr<T>(), grads.new_sub_keys->const_data_ptr<T>(),
                  key_count_ * sizeof(T));
    // One gradient row per distinct slot at most; memory that is never written is never taken.
    const int64_t most = std::min(s_.slots, s_.batch * s_.tokens * view_.reads);
    const int64_t bytes = std::max<int64_t>(most, 1) * s_.width * sizeof(T);
    drows_ = {static_cast<T*>(FreePages::instance().take(bytes)), GivePages{bytes}};
  }

  void run() {
    int64_t written = s_.writes;
    for (auto step = s_.steps.rbegin(); step != s_.steps.rend(); ++step) {
      if (step->writes) --written;
      chunk(saved_step(*step, written));
    }
    if (need_dvalues_) finish_dvalues();
  }

 private:
  using Token = typename ScanView<T>::Token;

  SavedStep<T> saved_step(const Step& step, int64_t written) const {
    const int64_t before = s_.batch * step.tokens_before * view_.reads;
    return {step,
            s_.batch * step.tokens(),
            written,
            saved_.list_indices.template const_data_ptr<int32_t>() + 2 * before,
            saved_.list_scores.template const_data_ptr<T>() + 2 * before,
            saved_.places.template const_data_ptr<int32_t>() + before,
            saved_.read_from.template const_data_ptr<int32_t>() + before,
            key_version(written)};
  }

  void chunk(const SavedStep<T>& saved) {
    const int64_t reads = saved.m * view_.reads;
    slots_.resize(reads);
    for (int64_t i = 0; i < reads; ++i) slots_[i] = slot_of(saved, i);
    slot_lists_.build(reads, [&](int32_t i) { return slots_[i]; });

    memory_gradient(saved);
    const bool through_keys = keys_.through_write(saved.step);
    const bool mem = saved.step.writes && !o_.values_only && view_.pair_count(saved.step) > 0;
    const std::vector<T>* t = through_keys ? &keys_.directions(saved) : nullptr;
    token_part(saved, mem, mem ? t : nullptr);
    row_part(saved, mem && t);
    const T* daddressing = pointer<T>(grads_.addressing_loss);
    keys_.add(saved, dz_, sigma_memory_, daddressing && saved.step.writes ? daddressing[saved.written] : T(0));
  }

  const T* key_version(int64_t written) const {
    if (written == 0 || !o_.keys_move()) return sub_keys_;
    if (written == s_.writes) return saved_.new_sub_keys.template const_data_ptr<T>();  // a partial, unwritten chunk
    return saved_.key_versions.template const_data_ptr<T>() + (written - 1) * key_count_;
  }

  int32_t slot_of(const SavedStep<T>& saved, int64_t read) const {  // read = (t*H + h)*R + r of the step
    const int64_t topk = s_.topk;
    const int32_t* list = saved.list_indices + read / topk * 2 * topk;
    return int32_t(list[saved.places[read] / topk] * s_.keys.sub_keys + list[topk + saved.places[read] % topk]);
  }

  // ---- g: gradient of each slot's row after the write, in the factors and rows that the tokens multiply -------------
  void memory_gradient(const SavedStep<T>& saved) {
    const Step& step = saved.step;
    const auto& groups = slot_lists_.groups();
    const int64_t width = s_.width, written = saved.written;
    const int64_t first_place = s_.batch * step.tokens_before * view_.reads;
    group_of_read_.resize(saved.m * view_.reads);
    g_rows_.assign(groups.size(), nullptr);
    g_scale_.assign(groups.size(), T(0));
    for (size_t g = 0; g < groups.size(); ++g)
      for (int32_t i = groups[g].first; i >= 0; i = slot_lists_.next(i)) group_of_read_[i] = int32_t(g);
    if (!step.writes) return;

    // d(row after the write): what later chunks left, brought back over the decays between, plus d(new_rows).
    const T* dnew = pointer<T>(grads_.new_rows);
    for (size_t g = 0; g < groups.size(); ++g)
      if (dnew && !row_id_[groups[g].key]) new_row_id(groups[g].key, -1);
    const double scale = view_.write_scale(step);
    const uint8_t* open = o_.clips() ? saved_.open_rows.template const_data_ptr<uint8_t>() : nullptr;
    const int64_t open_bytes = (width + 7) / 8;
    if (open) open_rows_.resize(groups.size() * width);
    torch::stable::parallel_for(0, int64_t(groups.size()), 16, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) {
        const auto& group = groups[g];
        const int32_t id = row_id_[group.key] - 1;
        if (id < 0) continue;
        T* drow = drows_.get() + id * width;
        RowState& state = row_step_[id];
        if (state.step < 0)
          std::fill_n(drow, width, T(0));
        else if (o_.decays())
          k_.scaled(drow, std::pow(T(o_.keep()), T(state.step - written - 1)), 1, width, drow);
        const int64_t place = first_place + group.first;
        if (dnew) {
          const bool newest = !state.written;  // a newest row is returned as the last write left it
          const T decay = newest ? std::pow(T(o_.keep()), T(s_.writes - written - 1)) : T(1);
          k_.axpy(decay, dnew + place * width, width, drow);
        }
        state.step = int32_t(written + 1);
        state.written = true;
        g_rows_[g] = drow;
        if (open) {
          T* masked = open_rows_.data() + g * width;
          const uint8_t* bits = open + place * open_bytes;
          for (int64_t c = 0; c < width; ++c) masked[c] = bits[c / 8] >> (c % 8) & 1 ? drow[c] : T(0);
          g_rows_[g] = masked;
        }
        g_scale_[g] = T(-o_.lr * view_.gamma(step, scale, slot_lists_, group));
      }
    });
  }

  int32_t new_row_id(int32_t slot, int32_t step) {
    row_step_.push_back({step, false});
    return row_id_[slot] = int32_t(row_step_.size());
  }

  // ---- tokens: one token, its rows and its rows of g
  // -------------------------------------------------------------------- mem: the memory loss moved the sub-keys; t: of
  // every list entry, if the gradient comes back through that
  void token_part(const SavedStep<T>& saved, bool mem, const std::vector<T>* t_of_entry) {
    const Step& step = saved.step;
    const int64_t n = view_.reads, width = s_.width, m = saved.m;
    const bool second_order = t_of_entry;
    a_.resize(m * n);
    dz_.resize(m * n);
    delta_.resize(m * width);
    sigma_memory_.assign(mem ? m * n : 0, T(0));
    if (second_order) {
      y_.assign(m * n, T(0));
      e_.resize(m * width);
    }
    const T *dout = pointer<T>(grads_.out), *dweights = pointer<T>(grads_.weights),
            *dlosses = pointer<T>(grads_.losses);
    T* dtarget = result_.target.mutable_data_ptr<T>();
    T* dgate = result_.loss_weights.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, m, 8, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(n), g_rows(n);
      std::vector<T> z(n), g_weights(n), da(n), dots(n), tr(n), b(n), err(width), e(width), de(width), extra(width);
      std::vector<T> decayed(rows_.needs_scratch() ? n * width : 0);
      for (int64_t t = begin; t < end; ++t) {
        const Token token = view_.token(step, t);
        T *a = a_.data() + t * n, *dz = dz_.data() + t * n, *delta = delta_.data() + t * width;
        for (int64_t r = 0; r < n; ++r) {
          const int64_t list = (t * s_.keys.heads + r / s_.topk) * 2 * s_.topk, place = saved.places[t * n + r];
          z[r] = saved.list_scores[list + place / s_.topk] + saved.list_scores[list + s_.topk + place % s_.topk];
          rows[r] = rows_.row(slots_[t * n + r], saved.read_from[t * n + r], saved.written, !step.writes,
                              decayed.empty() ? nullptr : decayed.data() + r * width);
          if (second_order)
            tr[r] = (*t_of_entry)[list + place / s_.topk] + (*t_of_entry)[list + s_.topk + place % s_.topk];
        }
        read_weights(o_.activation, T(o_.temperature), z.data(), n, a);
        const bool own = token.x >= step.own;
        if (dout && own)
          std::memcpy(delta, dout + view_.own_row(token) * width, width * sizeof(T));
        else
          std::fill_n(delta, width, T(0));
        std::fill_n(da.data(), n, T(0));
        if (dweights && own) std::memcpy(da.data(), dweights + view_.own_row(token) * n, n * sizeof(T));

        const bool pair = view_.has_pair(step, token);
        int64_t touched = 0;  // reads with a row of g
        if (pair) {
          const T w = view_.loss_weight(token);
          const T* target = view_.target + view_.target_row(token) * width;
          k_.weighted_sum(rows.data(), nullptr, a, n, width, err.data());
          for (int64_t c = 0; c < width; ++c) err[c] -= target[c], e[c] = w * err[c];
          for (int64_t r = 0; r < n; ++r) {
            const int32_t g = group_of_read_[t * n + r];
            if (!g_rows_[g]) continue;
            g_rows[touched] = g_rows_[g];
            g_weights[touched++] = a[r] * g_scale_[g];
          }
          k_.weighted_sum(g_rows.data(), nullptr, g_weights.data(), touched, width, de.data());
          if (mem) {
            const T scale = 1 / (T(view_.pair_count(step)) * T(width));
            k_.dots(rows.data(), nullptr, n, e.data(), width, b.data());
            for (T& x : b) x *= scale;
            through_weights(o_.activation, T(o_.temperature), a, z.data(), b.data(), n, sigma_memory_.data() + t * n);
            if (second_order) {
              T* y = y_.data() + t * n;
              through_weights(o_.activation, T(o_.temperature), a, z.data(), tr.data(), n, y);
              for (int64_t r = 0; r < n; ++r) y[r] *= scale;  // y / (M V), as it is used everywhere
              k_.weighted_sum(rows.data(), nullptr, y, n, width, extra.data());
              k_.axpy(T(1), extra.data(), width, de.data());
              std::memcpy(e_.data() + t * width, e.data(), width * sizeof(T));
            }
          }
          const T dloss = dlosses ? dlosses[token.b * s_.pairs + step.pairs_before + token.i] : T(0);
          T* dt = dtarget + view_.target_row(token) * width;
          for (int64_t c = 0; c < width; ++c) {
            const T back = w * (de[c] + 2 * dloss / T(width) * err[c]);
            delta[c] += back;
            dt[c] -= back;
          }
          const T* self = err.data();
          T gate, squared;
          k_.dots(&self, nullptr, 1, de.data(), width, &gate);
          k_.dots(&self, nullptr, 1, err.data(), width, &squared);
          if (view_.loss_weights) dgate[view_.at(token)] += gate + dloss * squared / T(width);
          k_.dots(g_rows.data(), nullptr, touched, e.data(), width, dots.data());
          touched = 0;
          for (int64_t r = 0; r < n; ++r) {
            const int32_t g = group_of_read_[t * n + r];
            if (g_rows_[g]) da[r] += g_scale_[g] * dots[touched++];
          }
        }
        k_.dots(rows.data(), nullptr, n, delta, width, dots.data());
        for (int64_t r = 0; r < n; ++r) da[r] += dots[r];
        through_weights(o_.activation, T(o_.temperature), a, z.data(), da.data(), n, dz);
        if (second_order && pair)
          add_second_order(o_.activation, T(o_.temperature), a, z.data(), b.data(), tr.data(), n, dz);
      }
    });
  }

  // ---- rows: one row, its reads in token order
  // ------------------------------------------------------------------------
  void row_part(const SavedStep<T>& saved, bool second_order) {
    const int64_t n = view_.reads, width = s_.width;
    // Rows whose gradient somebody will read: those an earlier chunk wrote, and all when d(values) is wanted.
    for (const auto& group : slot_lists_.groups())
      if ((need_dvalues_ || saved.read_from[group.first] >= 0) && !row_id_[group.key]) new_row_id(group.key, -1);
    slot_lists_.for_each<T>(
        width, [&](int32_t i) { return delta_.data() + i / n * width; }, [&](int32_t i) { return a_[i]; },
        [&](const OrderedLists::Group& group, const auto& rows, const auto& weights, T* sum) {
          if (!need_dvalues_ && saved.read_from[group.first] < 0) return;
          const int32_t id = row_id_[group.key] - 1;
          T* drow = drows_.get() + id * width;
          RowState& state = row_step_[id];
          ordered_sum<T>(rows, nullptr, weights, width, sum);
          if (second_order)
            for (int32_t i = group.first; i >= 0; i = slot_lists_.next(i))
              if (view_.has_pair(saved.step, view_.token(saved.step, i / n)))
                k_.axpy(y_[i], e_.data() + i / n * width, width, sum);
          if (state.step >= 0) k_.axpy(T(o_.keep()), drow, width, sum);  // memory_gradient brought it to this write
          std::memcpy(drow, sum, width * sizeof(T));
          state.step = int32_t(saved.written);
        });
  }

  // d(initial values): one row per read of the call; a slot's gradient stands at its first read, zeros at the others.
  void finish_dvalues() {
    T* rows = result_.value_rows.mutable_data_ptr<T>();
    int64_t* slots = result_.value_slots.mutable_data_ptr<int64_t>();
    int64_t at = 0;
    for (const Step& step : s_.steps) {
      const SavedStep<T> saved = saved_step(step, 0);
      for (int64_t i = 0; i < saved.m * view_.reads; ++i, ++at) {
        slots[at] = slot_of(saved, i);
        T* row = rows + at * s_.width;
        int32_t& id = row_id_[slots[at]];
        if (id > 0) {  // only once
          const RowState& state = row_step_[id - 1];
          k_.scaled(drows_.get() + (id - 1) * s_.width, std::pow(T(o_.keep()), T(state.step)), 1, s_.width, row);
          id = 0;
        } else {
          std::fill_n(row, s_.width, T(0));
        }
      }
    }
  }

  struct RowState {
    int32_t step;  // the gradient belongs to the row as it was before write number `step`; -1: no gradient yet
    bool written;  // a later write of this slot was met
  };

  const ScanSizes& s_;
  const ScanOptions& o_;
  const ScanView<T> view_;
  const vector::Kernels<T>& k_;
  const SavedScan& saved_;
  const ScanGradients& grads_;
  const bool need_dvalues_;
  ScanInputGradients& result_;
  const T* sub_keys_;
  const int64_t key_count_;
  const RowReader<T> rows_;
  KeyGradients<T> keys_;
  OrderedLists slot_lists_;
  ZeroedTable row_id_;                   // slot -> its gradient row + 1
  std::unique_ptr<T, GivePages> drows_;  // [distinct slots, V]
  std::vector<RowState> row_step_;       // of each gradient row
  // of the current step
  std::vector<int32_t> slots_, group_of_read_;  // [m, H, R]
  std::vector<const T*> g_rows_;                // [groups]
  std::vector<T> g_scale_, open_rows_;          // [groups], [groups, V]
  std::vector<T> a_, dz_, y_, sigma_memory_;    // [m, H, R]
  std::vector<T> delta_, e_;                    // [m, V]
};

}  // namespace fwpkm
