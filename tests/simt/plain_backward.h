// What the backward kernels of a chunk must do, in plain loops, in the orders of summation that backward_rows.cuh,
// backward_tokens.cuh and backward_keys.cuh document; and the data that they read and write.
#pragma once
#include "kernels/backward_keys.cuh"
#include "kernels/backward_rows.cuh"
#include "plain_chunk.h"

namespace testing {

struct BackwardShape {
  Shape s = {};
  bool through = true;      // somebody gave a gradient of the sub-keys,
  bool given = true;        // and of all outputs
  bool wanted = false;      // somebody wants the gradient of the values
  bool writes = true;       // false: the partial tail
  bool row_is_slot = true;  // of the gradient rows
  bool broken = false;      // some saved numbers are out of range
};

inline bool same(const Buffer<RowState>& found, const Buffer<RowState>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const RowState &a = found[i], &b = expected[i];
    if (a.first != b.first || a.step != b.step || a.written != b.written) return false;
  }
  return true;
}

template <typename T>
bool same(const Buffer<ListGradient<T>>& found, const Buffer<ListGradient<T>>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    const ListGradient<T>&a = found[i], &b = expected[i];
    if (a.row != b.row || a.place != b.place || a.scale != b.scale || a.holds != b.holds || a.wanted != b.wanted)
      return false;
  }
  return true;
}

// All that the backward pass of one chunk reads and writes; three writes come after it.
template <typename T>
struct Backward : Data<T> {
  using Data<T>::s, Data<T>::n, Data<T>::m, Data<T>::width, Data<T>::each;
  BackwardShape b;
  int64_t all_reads = s.first_place() + m * n, rows = s.all_slots() + (b.row_is_slot ? 0 : all_reads);

  Buffer<int32_t> saved_indices;
  Buffer<T> gamma, dout, dweights, dlosses, daddressing, dnew_rows;
  // Read and written
  Buffer<int32_t> row_of;
  Buffer<RowState> states;
  Buffer<T> gradient_rows, dquery, dsub_keys;
  // Written
  Buffer<int64_t> slots_of_call;
  Buffer<int32_t> list_of;
  Buffer<ListGradient<T>> gradients;
  Buffer<T> dscores, directions, read_directions, y, delta, dtarget, dloss_weights, theta, beta, value_rows;
  Buffer<double> sum;

  explicit Backward(const BackwardShape& shape)
      : Data<T>(shape.s),
        b(shape),
        saved_indices(2 * m * n),
        gamma(m * n),
        dout(s.batch * (s.length() - s.carried()) * width, s.offset),
        dweights(s.batch * (s.length() - s.carried()) * n),
        dlosses(s.batch * s.all_pairs()),
        daddressing(s.memories),
        dnew_rows(s.places() * width, s.offset),
        row_of(s.all_slots()),
        states(rows),
        gradient_rows(rows * width, s.offset),
        dquery(this->query.size(), s.offset),
        dsub_keys(this->sub_keys.size(), s.offset),
        slots_of_call(all_reads),
        list_of(m * n),
        gradients(m * n),
        dscores(m * n),
        directions(2 * m * n),
        read_directions(m * n),
        y(m * n),
        delta(m * width, s.offset),
        dtarget(this->target.size(), s.offset),
        dloss_weights(this->loss_weights.size()),
        theta(this->sub_keys.size(), s.offset),
        beta(2 * m * n),
        value_rows(all_reads * width, s.offset),
        sum(s.key_rows()) {
    own(*this, [](const char*, auto& buffer, auto&) { buffer.clear(kUntouched); });
    row_of.clear(0), states.clear(0), gradients.clear(0);
    gradient_rows.clear(0xFF);  // NaN where no later chunk has left a gradient
    Random random{2};
    for (auto* buffer : {&gamma, &dout, &dweights, &dlosses, &daddressing, &dnew_rows, &dquery, &dsub_keys})
      for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = T(random.real());
    for (auto* buffer : {&this->open_rows, &this->open_keys})
      for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = uint8_t(random.below(256));
    for (int64_t i = 0; i < m * n; ++i) this->read_from[i] = -1;
    for (int64_t i = 0; i < m * n; ++i) save(i);
    for (int64_t i = 0; i < all_reads; ++i) slots_of_call[i] = random.below(s.all_slots());
    for (int64_t slot = 0; slot < s.all_slots() && b.writes; ++slot) {
      if (random.below(2)) continue;
      const int64_t row = slot + rows - s.all_slots();
      row_of[slot] = int32_t(row) + 1;
      states[row] = {int32_t(all_reads + slot), int32_t(s.before + 1 + random.below(3)), random.below(2) != 0};
      for (int64_t c = 0; c < width; ++c) gradient_rows[row * width + c] = T(random.real());
    }
    for (int64_t l = 0; l < 2 * m * n; ++l) {
      const bool odd = s.odd && l / (2 * n) % s.odd == s.odd - 1;
      saved_indices[l] = odd ? -1 : this->list_indices[l];
    }
    for (int64_t t = 0; t < m && b.broken; ++t) {
      const int64_t r = t * n + n / 2;
      if (t % 6 == 1) saved_indices[2 * t * n + n] = int32_t(s.sub_keys);
      if (t % 6 == 2) saved_indices[2 * t * n] = -5;
      if (t % 6 == 3) this->places[r] = int32_t(s.topk * s.topk);
      if (t % 6 == 4) this->read_from[r] = int32_t(s.places());
      if (t % 6 == 5) this->read_from[r] = -2;
      if (t % 7 == 6) this->places[r] = -1;
    }
    this->list_indices.clear(kUntouched), this->slots.clear(kUntouched), this->scores.clear(kUntouched);
  }

  // The version that read i has read, while the slots of make_lists are still there.
  void save(int64_t i) {
    const int64_t list = i / s.topk * 2 * s.topk, place = this->places[i];
    const int32_t j0 = this->list_indices[list + place / s.topk],
                  j1 = this->list_indices[list + s.topk + place % s.topk];
    const int64_t first = this->first_slot(i / n);
    if (j0 >= 0 && j1 >= 0) this->read_from[i] = this->place_of(int32_t(first + j0 * s.sub_keys + j1));
  }

  template <typename F>
  void own(Backward& o, const F& f) {
    f("saved indices", saved_indices, o.saved_indices), f("gamma", gamma, o.gamma), f("d out", dout, o.dout);
    f("d weights", dweights, o.dweights), f("d losses", dlosses, o.dlosses), f("row of", row_of, o.row_of);
    f("d addressing loss", daddressing, o.daddressing), f("d new rows", dnew_rows, o.dnew_rows);
    f("states", states, o.states), f("gradient rows", gradient_rows, o.gradient_rows), f("y", y, o.y);
    f("d query", dquery, o.dquery), f("d sub-keys", dsub_keys, o.dsub_keys), f("beta", beta, o.beta);
    f("slots of the call", slots_of_call, o.slots_of_call), f("list of", list_of, o.list_of), f("sum", sum, o.sum);
    f("gradients", gradients, o.gradients), f("d scores", dscores, o.dscores), f("delta", delta, o.delta);
    f("directions", directions, o.directions), f("read directions", read_directions, o.read_directions);
    f("d target", dtarget, o.dtarget), f("d loss weights", dloss_weights, o.dloss_weights);
    f("theta", theta, o.theta), f("value rows", value_rows, o.value_rows);
  }
  template <typename F>
  void each(Backward& o, const F& f) {
    Data<T>::each(o, f);
    own(o, f);
  }

  Chunk chunk() const {
    Chunk c = Data<T>::chunk();
    c.writes = b.writes;
    return c;
  }
  int64_t all_writes() const { return s.before + (b.writes ? 4 : 0); }
  bool memory_moved_keys() const { return b.writes && !s.values_only && s.pairs() > 0; }
  bool through() const { return b.through && b.writes; }
  bool second_order() const { return through() && memory_moved_keys(); }
  bool addressed() const {
    return b.writes && s.addressing_weight != 0 && this->addressed_rows(s.batch) > 0 && (through() || b.given);
  }
  const uint8_t* open() const { return s.clip < 0 ? nullptr : this->open_rows.get(); }
  bool left_out(int64_t t) const { return this->list_indices[2 * t * n] < 0; }
  // Element c of the row that read i has read.
  T read_element(int64_t i, int64_t c) const {
    const int32_t place = this->read_from[i];
    if (place >= 0 && !b.writes) return this->log[place * width + c];
    return Data<T>::element(this->slots[i], place, c, s.before);
  }
  T keep_to(int64_t n) const { return this->decayed(T(1), n); }
};

// ---------------------------------------------------------------------------------------------------------------- rows
template <typename T>
void plain_check(Backward<T>& x) {
  const Shape& s = x.s;
  const int64_t n = x.n;
  for (int64_t t = 0; t < x.m; ++t) {
    const int32_t* const ids = &x.saved_indices[2 * t * n];
    bool valid = std::all_of(ids, ids + 2 * n, [&](int32_t j) { return j >= 0 && j < s.sub_keys; });
    for (int64_t i = t * n; i < (t + 1) * n; ++i)
      valid &= x.places[i] >= 0 && x.places[i] < s.topk * s.topk && x.read_from[i] >= -1 && x.read_from[i] < s.places();
    if (!valid && ids[0] >= 0) x.report(kIndexOutOfRange);
    for (int64_t l = 0; l < 2 * n; ++l) x.list_indices[2 * t * n + l] = valid ? ids[l] : -1;
    for (int64_t r = 0; r < n; ++r) {
      const int64_t list = r / s.topk * 2 * s.topk, place = x.places[t * n + r];
      const int64_t slot =
          valid ? x.first_slot(t) + ids[list + place / s.topk] * s.sub_keys + ids[list + s.topk + place % s.topk]
                : int64_t(-1);
      x.slots[t * n + r] = int32_t(slot);
      if (x.b.wanted) x.slots_of_call[s.first_place() + t * n + r] = valid ? slot : 0;
    }
    if (x.addressed()) plain_address_weights<T>(x, t, !valid);
  }
}

template <typename T>
void plain_rows_after_write(Backward<T>& x) {
  const Shape& s = x.s;
  const ListTable lists = slot_lists(x);
  int32_t p = 0;
  for (int64_t slot = 0; slot < s.all_slots(); p += int32_t(lists[slot++].size())) {
    const auto& list = lists[slot];
    if (list.empty()) continue;
    for (const int32_t i : list) x.list_of[i] = p;
    const bool met = x.row_of[slot] != 0, holds = x.b.writes && (met || x.b.given);
    const bool wanted = x.b.wanted || x.read_from[list[0]] >= 0;
    const int32_t place = int32_t(s.first_place()) + list[0];
    const int32_t row = met ? x.row_of[slot] - 1 : x.b.row_is_slot ? int32_t(slot) : place;
    const RowState state = met ? x.states[row] : RowState{place, 0, false};
    x.gradients[p] = {row, place, holds ? -T(s.lr) * x.gamma[p] : T(0), holds, wanted};
    if (holds || wanted) {
      x.row_of[slot] = row + 1;
      x.states[row] = {place, int32_t(s.before) + !wanted, state.written || x.b.writes};
    }
    const T decay = met ? x.keep_to(state.step - s.before - 1) : T(1);
    const T decay_new = state.written ? T(1) : x.keep_to(x.all_writes() - s.before - 1);
    for (int64_t c = 0; c < x.width && holds && (x.b.given || decay != 1); ++c) {
      T& element = x.gradient_rows[row * x.width + c];
      T sum = met ? std::fma(decay, element, T(0)) : T(0);
      if (x.b.given) sum = std::fma(decay_new, x.dnew_rows[place * x.width + c], sum);
      element = sum;
    }
  }
}

template <typename T>
void plain_add_reads(Backward<T>& x) {
  for (const auto& list : slot_lists(x)) {
    if (list.empty() || !x.gradients[x.list_of[list[0]]].wanted) continue;
    const ListGradient<T> g = x.gradients[x.list_of[list[0]]];
    for (int64_t c = 0; c < x.width; ++c) {
      T& element = x.gradient_rows[g.row * x.width + c];
      T sum = ordered_sum<T>(
          list, [&](int32_t i, T& sum) { sum = std::fma(x.weights[i], x.delta[i / x.n * x.width + c], sum); });
      if (g.holds) sum = std::fma(T(x.s.keep), element, sum);
      if (x.second_order())
        sum += ordered_sum<T>(list, [&](int32_t i, T& sum) {
          if (x.good[i / x.n]) sum = std::fma(x.y[i], x.errors[i / x.n * x.width + c], sum);
        });
      element = sum;
    }
  }
}

template <typename T>
void plain_rows_of_reads(Backward<T>& x) {
  for (int64_t i = 0; i < x.all_reads; ++i) {
    const int64_t row = int64_t(x.row_of[x.slots_of_call[i]]) - 1;
    const bool here = row >= 0 && x.states[row].first == i;
    for (int64_t c = 0; c < x.width; ++c)
      x.value_rows[i * x.width + c] =
          here ? std::fma(x.keep_to(x.states[row].step), x.gradient_rows[row * x.width + c], T(0)) : T(0);
  }
}

// -------------------------------------------------------------------------------------------------------------- tokens
// out += d/dz of sum_i y_i b_i, y = J t
template <typename T>
void plain_second_order(Activation f, T temperature, const std::vector<T>& a, const T* z, const T* b, const T* t,
                        T* out) {
  const int64_t n = int64_t(a.size());
  if (f == Activation::kSoftmax) {
    const T mean_b = sum_of<T>(n, [&](int64_t i) { return a[i] * b[i]; });
    const T mean_t = sum_of<T>(n, [&](int64_t i) { return a[i] * t[i]; });
    const T mean = sum_of<T>(n, [&](int64_t i) { return a[i] * (b[i] - mean_b) * (t[i] - mean_t); });
    for (int64_t i = 0; i < n; ++i)
      out[i] += a[i] * ((b[i] - mean_b) * (t[i] - mean_t) - mean) / temperature / temperature;
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    const T x = z[i] / temperature, sigmoid = 1 / (1 + std::exp(-x));
    const T curve = f == Activation::kRelu ? T(0) : sigmoid * (1 - sigmoid) * (2 + x * (1 - 2 * sigmoid));
    out[i] += b[i] * t[i] * curve / temperature / temperature;
  }
}

template <typename Size, typename T>
void plain_tokens(Backward<T>& x) {
  const Shape& s = x.s;
  const int64_t n = x.n, width = x.width, bytes = (width + 7) / 8;
  for (int64_t t = 0; t < x.m; ++t) {
    if (x.left_out(t)) continue;
    const T scale = T(x.pairs_of(x.memory(t))) * T(width);
    T *const z = &x.scores[t * n], *const directions = &x.read_directions[t * n], *const y = &x.y[t * n];
    const auto list_sum = [&](const Buffer<T>& entries, int64_t i) {
      const int64_t list = i / s.topk * 2 * s.topk, place = x.places[i];
      return entries[list + place / s.topk] + entries[list + s.topk + place % s.topk];
    };
    for (int64_t r = 0; r < n; ++r) z[r] = list_sum(x.list_scores, t * n + r);
    const auto a = plain_weights(s.activation, x.kTemperature, z, n);
    std::copy(a.begin(), a.end(), &x.weights[t * n]);
    if (x.second_order()) {
      for (int64_t r = 0; r < n; ++r) y[r] = directions[r] = list_sum(x.directions, t * n + r);
      plain_through_weights(s.activation, x.kTemperature, a, z, y);
      for (int64_t r = 0; r < n; ++r) y[r] /= scale;
    }
    const auto gradient = [&](int64_t r) { return x.gradients[x.list_of[t * n + r]]; };
    const auto g = [&](int64_t r, int64_t c) {
      const bool open = !x.open() || x.open()[gradient(r).place * bytes + c / 8] >> (c % 8) & 1;
      return open ? x.gradient_rows[gradient(r).row * width + c] : T(0);
    };

    const bool pair = x.has_pair(t);
    const int64_t row = t / s.chunk_tokens() * (s.length() - s.carried()) + x.position(t) - s.carried();
    const T w = !pair ? T(0) : s.gated ? x.loss_weights[x.at(t)] : T(1);
    const int64_t loss_at = t / s.chunk_tokens() * s.all_pairs() + s.before + t % s.chunk_tokens();
    const T dloss = pair && x.b.given ? x.dlosses[loss_at] : T(0);
    T* const delta = &x.delta[t * width];
    std::vector<T> errors(width), squares(32 * row_block<T, Size>(width).y), gates(squares.size());
    for (int64_t c = 0; c < width && pair; ++c) {
      T error = 0, derror = 0;
      for (int64_t r = 0; r < n; ++r) {
        error = std::fma(a[r], x.read_element(t * n + r, c), error);
        if (x.second_order()) derror = std::fma(y[r], x.read_element(t * n + r, c), derror);
        if (gradient(r).holds) derror = std::fma(a[r] * gradient(r).scale, g(r, c), derror);
      }
      error -= x.target[x.target_row(t) * width + c];
      T &square = squares[c / x.kPack % squares.size()], &gate = gates[c / x.kPack % gates.size()];
      square = std::fma(error, error, square);
      gate = std::fma(derror, error, gate);
      errors[c] = error;
      delta[c] = derror;
    }
    const T squared = block_sum(squares);
    const bool good = pair && std::isfinite(squared) && std::isfinite(w * squared / T(width));
    x.good[t] = good;
    if (good && s.gated) x.dloss_weights[x.at(t)] = std::fma(dloss, squared / T(width), block_sum(gates));
    for (int64_t c = 0; c < width; ++c) {
      const T back = good ? w * std::fma(2 * dloss / T(width), errors[c], delta[c]) : T(0);
      delta[c] = (x.is_own(t) && x.b.given ? x.dout[row * width + c] : T(0)) + back;
      x.errors[t * width + c] = good ? errors[c] *= w : T(NAN);  // of other tokens e means nothing
      if (good) x.dtarget[x.target_row(t) * width + c] = -back;
    }

    T *const dz = &x.dscores[t * n], *const terms = x.memory_moved_keys() ? &x.memory_terms[t * n] : nullptr;
    for (int64_t r = 0; r < n; ++r) {
      T through_out[32] = {}, through_step[32] = {}, b[32] = {};
      for (int64_t c = 0; c < width; ++c) {
        const int64_t lane = c / x.kPack % 32;
        const T element = x.read_element(t * n + r, c);
        through_out[lane] = std::fma(element, delta[c], through_out[lane]);
        if (good) b[lane] = std::fma(element, errors[c], b[lane]);
        if (good && gradient(r).holds) through_step[lane] = std::fma(g(r, c), errors[c], through_step[lane]);
      }
      const T given = x.is_own(t) && x.b.given ? x.dweights[row * n + r] : T(0);
      dz[r] = given + std::fma(gradient(r).scale, warp_sum(through_step), warp_sum(through_out));
      if (terms) terms[r] = warp_sum(b) / scale;
    }
    plain_through_weights(s.activation, x.kTemperature, a, z, dz);
    if (x.second_order() && good) plain_second_order(s.activation, x.kTemperature, a, z, terms, directions, dz);
    if (terms) plain_through_weights(s.activation, x.kTemperature, a, z, terms);
  }
}

// ---------------------------------------------------------------------------------------------------------------- keys
template <typename T>
void plain_directions(Backward<T>& x) {
  const Shape& s = x.s;
  const int64_t half = s.half_width, bytes = (half + 7) / 8;
  for (int64_t i = 0; i < int64_t(x.theta.size()); ++i) {
    const int64_t c = i % half;
    const bool open = s.clip < 0 || x.open_keys[i / half * bytes + c / 8] >> (c % 8) & 1;
    x.theta[i] = open ? -T(s.lr) * x.dsub_keys[i] : T(0);
    if (s.keep != 1) x.dsub_keys[i] *= T(s.keep);
  }
  for (int64_t l = 0; l < 2 * x.m * x.n; ++l) {
    T& t = x.directions[l] = 0;
    for (int64_t first = 0; first < half && !x.left_out(l / (2 * x.n)); first += 8 * x.kPack) {
      T packs[8] = {};
      for (int64_t c = first; c < half && c < first + 8 * x.kPack; ++c) {
        const int64_t key = x.entry_key(l) * half + c;
        const T q = x.query[x.query_row(l) * half + c];
        T& sum = packs[(c - first) / x.kPack];
        sum = std::fma(x.theta[key], s.idw ? q - x.sub_keys[key] : q, sum);
      }
      for (int apart = 4; apart; apart /= 2)
        for (int i = 0; i < apart; ++i) packs[i] += packs[i + apart];
      t += packs[0];
    }
    if (s.idw && !x.left_out(l / (2 * x.n))) t *= 2 * std::exp(x.list_scores[l]);
  }
}

template <typename Size, typename T>
void plain_key_gradients(Backward<T>& x) {
  const Shape& s = x.s;
  const int64_t topk = s.topk, half = s.half_width, lists = 2 * x.m * s.heads;
  if (lists == 0) return;
  const auto lane_sum = [&](auto zero, int64_t at, const auto& f) {  // of P f
    decltype(zero) lanes[32] = {};
    for (int64_t l = 0; l < topk; ++l) lanes[l % 32] = std::fma(decltype(zero)(x.p[at + l]), f(l), lanes[l % 32]);
    return warp_sum(lanes);
  };
  const auto mean_direction = [&](int64_t at) {
    return lane_sum(T(0), at, [&](int64_t l) { return x.directions[at + l]; });
  };
  for (int64_t l = 0; l < lists * topk && x.addressed() && x.through(); ++l)
    x.beta[l] = x.p[l] * (x.directions[l] - mean_direction(l / topk * topk));
  if (x.addressed()) plain_tables<Size, T>(x, x.through() ? x.beta.get() : nullptr);
  for (int64_t list = 0; list < lists; ++list) {
    const int64_t at = list * topk, reads = list / 2 * topk;
    const bool left_out = x.left_out(list / (2 * s.heads));
    const int64_t memory = x.memory(list / (2 * s.heads));
    const double rows = double(x.addressed_rows(s.rows_of(memory))), factor = s.addressing_weight / rows;
    const auto j = [&](int64_t l) { return (2 * memory + list % 2) * s.sub_keys + x.list_indices[at + l]; };
    const bool addressed = x.addressed() && !left_out;
    const double mean_u = addressed ? lane_sum(0.0, at, [&](int64_t l) { return x.slope[j(l)]; }) : 0;
    const T mean_t = addressed && x.through() ? mean_direction(at) : T(0);
    const auto dp = [&](int64_t l) {
      return std::fma(factor * double(x.directions[at + l] - mean_t), x.slope[j(l)] - mean_u,
                      x.extra[j(l)] * x.curvature[j(l)] / rows);
    };
    const double mean_dp = addressed && x.through() ? lane_sum(0.0, at, dp) : 0;
    for (int64_t l = 0; l < topk; ++l) {
      T sigma = 0, dsub = 0, of_reads = 0, of_memory = 0;
      if (addressed) {
        const double p = double(x.p[at + l]), sigma_a = factor * p * (x.slope[j(l)] - mean_u);
        sigma = T(sigma_a);
        dsub = T(std::fma(x.b.given ? double(x.daddressing[memory]) : 0.0, sigma_a,
                          x.through() ? p * (dp(l) - mean_dp) : 0.0));
      }
      for (int64_t r = reads; r < reads + topk; ++r) {
        if ((list % 2 == 0 ? x.places[r] / topk : x.places[r] % topk) != l) continue;
        of_reads += x.dscores[r];
        if (x.memory_moved_keys()) of_memory += x.memory_terms[r];
      }
      dsub += of_reads;
      if (x.memory_moved_keys()) sigma += of_memory;
      const T slope = s.idw ? 2 * std::exp(x.list_scores[at + l]) : T(1);
      if (s.idw && x.through()) dsub = std::fma(sigma, x.directions[at + l], dsub);
      x.alpha[at + l] = left_out ? T(0) : slope * sigma;
      x.beta[at + l] = left_out ? T(0) : slope * dsub;
    }
    for (int64_t c = 0; c < half && !left_out; ++c) {
      T& dq = x.dquery[x.query_row(at) * half + c];
      const T q = x.query[x.query_row(at) * half + c];
      T sum = 0, through = 0;
      for (int64_t l = at; l < at + topk; ++l) {
        const int64_t key = x.entry_key(l) * half + c;
        sum = std::fma(x.beta[l], s.idw ? x.sub_keys[key] - q : x.sub_keys[key], sum);
        if (x.through()) through = std::fma(x.alpha[l], x.theta[key], through);
      }
      dq += sum;
      if (x.through()) dq += through;
    }
  }
  const ListTable table = key_lists(x);
  for (int64_t key = 0; key < s.key_rows() && s.idw && x.through(); ++key) {
    std::vector<double> threads(Size::kThreads);
    for (size_t j = 0; j < table[key].size(); ++j) threads[j % Size::kThreads] += double(x.alpha[table[key][j]]);
    x.sum[key] = block_sum(threads);
  }
  for (int64_t key = 0; key < s.key_rows(); ++key)
    for (int64_t c = 0; c < half && !table[key].empty(); ++c) {
      T& element = x.dsub_keys[key * half + c];
      element += ordered_sum<T>(table[key], [&](int32_t l, T& sum) {
        const T q = x.query[x.query_row(l) * half + c];
        sum = std::fma(x.beta[l], s.idw ? q - x.sub_keys[key * half + c] : q, sum);
      });
      if (s.idw && x.through()) element = std::fma(T(-x.sum[key]), x.theta[key * half + c], element);
    }
}

}  // namespace testing
