// What the kernels of a chunk must do, in plain loops, in the orders of summation that read_chunk.cuh, write_rows.cuh,
// addressing.cuh and write_keys.cuh document.
#pragma once
#include <algorithm>

#include "chunk_data.h"
#include "kernels/addressing.cuh"

namespace testing {

// -------------------------------------------------------------------------------------------------------------- orders
// Lanes l and l + 16, then l and l + 8, ...
template <typename T>
T warp_sum(T* lanes) {
  for (int half = 16; half; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return lanes[0];
}

// The warps in turn.
template <typename T>
T block_sum(std::vector<T> threads) {
  T sum = 0;
  for (size_t first = 0; first < threads.size(); first += 32) sum += warp_sum(&threads[first]);
  return sum;
}

// Sum of f(i), i < n, by the lanes of a warp.
template <typename T, typename F>
T sum_of(int64_t n, const F& f) {
  T lanes[32] = {};
  for (int64_t i = 0; i < n; ++i) lanes[i % 32] += f(i);
  return warp_sum(lanes);
}

// The order of ordered_sums.cuh; add(entry, sum) adds one term.
template <typename T, typename F>
T ordered_sum(const std::vector<int32_t>& list, const F& add) {
  std::vector<T> terms;
  for (size_t i = 0; i < list.size(); ++i) {
    if (i % 32 == 0) terms.push_back(0);
    add(list[i], terms.back());
  }
  return tree(terms);
}

// Entries by key.
using ListTable = std::vector<std::vector<int32_t>>;

template <typename F>
ListTable list_table(int64_t n, int64_t num_keys, const F& key) {
  ListTable table(num_keys);
  for (int64_t i = 0; i < n; ++i)
    if (key(i) >= 0) table[key(i)].push_back(int32_t(i));
  return table;
}
template <typename T>
ListTable slot_lists(const Data<T>& d) {
  return list_table(d.m * d.n, d.s.all_slots(), [&](int64_t i) { return d.slots[i]; });
}
template <typename T>
ListTable key_lists(const Data<T>& d) {
  return list_table(2 * d.m * d.n, d.s.key_rows(), [&](int64_t l) { return d.entry_key(l); });
}

// ---------------------------------------------------------------------------------------------------------------- read
template <typename T>
std::vector<T> plain_weights(Activation f, T temperature, const T* z, int64_t n) {
  std::vector<T> a(n);
  const T top = *std::max_element(z, z + n);
  for (int64_t i = 0; i < n; ++i) {
    const T x = z[i] / temperature;
    a[i] = f == Activation::kSoftmax ? std::exp((z[i] - top) / temperature)
           : f == Activation::kRelu  ? std::max(x, T(0))
                                     : x / (1 + std::exp(-x));
  }
  const T total = f == Activation::kSoftmax ? sum_of<T>(n, [&](int64_t i) { return a[i]; }) : T(1);
  for (T& x : a) x /= total;
  return a;
}

// g becomes (da/dz) g
template <typename T>
void plain_through_weights(Activation f, T temperature, const std::vector<T>& a, const T* z, T* g) {
  const int64_t n = int64_t(a.size());
  const T mean = f == Activation::kSoftmax ? sum_of<T>(n, [&](int64_t i) { return a[i] * g[i]; }) : T(0);
  for (int64_t i = 0; i < n; ++i) {
    const T x = z[i] / temperature, sigmoid = 1 / (1 + std::exp(-x));
    g[i] = f == Activation::kSoftmax ? a[i] * (g[i] - mean) / temperature
           : f == Activation::kRelu  ? g[i] * T(x > 0) / temperature
                                     : g[i] * (sigmoid * (1 + x * (1 - sigmoid))) / temperature;
  }
}

// P of the lists of token t.
template <typename T>
void plain_address_weights(Data<T>& d, int64_t t, bool left_out) {
  const int64_t topk = d.s.topk;
  const bool counts = !left_out && (!d.s.carry() || d.in_pairs(t));
  for (int64_t l = 2 * t * d.n; l < 2 * (t + 1) * d.n; l += topk) {
    const T* const z = &d.list_scores[l];
    const T sum = sum_of<T>(topk, [&](int64_t i) { return std::exp(z[i] - z[0]); });
    for (int64_t i = 0; i < topk; ++i) d.p[l + i] = counts ? std::exp(z[i] - z[0]) / sum : T(0);
  }
}

template <typename Size, typename T>
void plain_read(Data<T>& d) {
  const Shape& s = d.s;
  const int64_t n = d.n, width = d.width, outputs = s.length() - s.carried();
  for (int64_t t = 0; t < d.m; ++t) {
    const T* const z = &d.scores[t * n];
    const bool odd = !std::all_of(z, z + n, [](T x) { return std::isfinite(x); }), pair = d.has_pair(t) && !odd;
    const auto a = odd ? std::vector<T>(n, T(NAN)) : plain_weights(s.activation, d.kTemperature, z, n);
    if (odd) {
      d.report(kNotFinite);
      std::fill_n(&d.slots[t * n], n, -1);
      std::fill_n(&d.list_indices[2 * t * n], 2 * n, -1);
    }
    if (d.addressed()) plain_address_weights(d, t, odd);
    const int32_t* const slots = &d.slots[t * n];
    std::copy_n(a.begin(), n, &d.weights[t * n]);
    for (int64_t r = 0; r < n && !s.in_place; ++r) d.read_from[t * n + r] = d.place_of(slots[r]);
    const auto element = [&](int64_t r, int64_t c) { return d.element(slots[r], d.place_of(slots[r]), c, s.before); };

    const T w = s.gated ? d.loss_weights[d.at(t)] : T(1);
    std::vector<T> out(width, odd ? T(NAN) : T(0)), threads(32 * row_block<T, Size>(width).y);
    for (int64_t c = 0; c < width; ++c) {
      for (int64_t r = 0; r < n && !odd; ++r) out[c] = std::fma(a[r], element(r, c), out[c]);
      if (!pair) continue;
      const T error = out[c] - d.target[d.target_row(t) * width + c];
      T& squares = threads[c / d.kPack % threads.size()];
      squares = std::fma(error, error, squares);
      d.errors[t * width + c] = error * w;
    }
    const T squared = block_sum(threads), loss = odd ? T(NAN) : w * squared / T(width);
    d.good[t] = pair && std::isfinite(squared) && std::isfinite(loss);
    if (pair && !d.good[t]) d.report(kNotFinite);
    if (d.in_pairs(t))
      d.losses[t / s.chunk_tokens() * s.all_pairs() + s.before + t % s.chunk_tokens()] = d.has_pair(t) ? loss : T(0);
    if (d.is_own(t)) {
      const int64_t row = t / s.chunk_tokens() * outputs + d.position(t) - s.carried();
      std::copy(out.begin(), out.end(), &d.out[row * width]);
      for (int64_t r = 0; r < n; ++r) d.own_indices[row * n + r] = odd ? -1 : int32_t(slots[r] - d.first_slot(t));
      std::copy_n(a.begin(), n, &d.own_weights[row * n]);
    }
    if (s.values_only) continue;
    T* const terms = &d.memory_terms[t * n];
    std::fill_n(terms, n, T(0));
    if (!pair) continue;
    for (int64_t r = 0; r < n && d.good[t]; ++r) {
      T lanes[32] = {};
      for (int64_t c = 0; c < width; ++c) {
        T& sum = lanes[c / d.kPack % 32];
        sum = std::fma(element(r, c), d.errors[t * width + c], sum);
      }
      terms[r] = warp_sum(lanes) / (T(d.pairs_of(d.memory(t))) * T(width));
    }
    plain_through_weights(s.activation, d.kTemperature, a, z, terms);
  }
}

// --------------------------------------------------------------------------------------------------------------- write
// One 16-byte pack of a row takes its step; if it would overflow, its decay alone, or where that does, too, none.
template <typename T, typename Old, typename Gradient>
void plain_step(Data<T>& d, int64_t first, int64_t width, const Old& old, const Gradient& gradient, const T* kept,
                T* row, uint8_t* open) {
  T next[Data<T>::kPack];
  bool finite = true;
  const int64_t end = std::min(width, first + d.kPack);
  for (int64_t c = first; c < end; ++c) {
    T g = gradient(c);
    const T clip = T(d.s.clip);
    if (open) open[c / 8] = uint8_t((open[c / 8] & ~(1 << c % 8)) | (g <= clip && g >= -clip) << c % 8);
    if (d.s.clip >= 0) g = std::min(std::max(g, -clip), clip);
    next[c - first] = std::fma(-T(d.s.lr), g, old(c));
    finite &= std::isfinite(next[c - first]);
  }
  if (!finite) d.report(kOverflow);
  for (int64_t c = first; c < end; ++c) row[c] = finite ? next[c - first] : std::isfinite(old(c)) ? old(c) : kept[c];
}

template <typename T>
void decay_or_keep(Data<T>& d, T& x, int64_t times) {
  const T v = d.decayed(x, times);
  if (!std::isfinite(v)) d.report(kOverflow);
  if (std::isfinite(v)) x = v;
}

// Of gamma, if the mask does not matter.
inline double kappa(const Shape& s) {
  if (s.batch * s.pairs() == 0) return 0;
  return s.release ? double(s.batch * s.tokens) / double(s.batch * s.pairs()) * double(s.reads()) : 1;
}

template <typename Size, typename T>
void plain_rows(Data<T>& d) {
  const Shape& s = d.s;
  const int64_t n = d.n, width = d.width, bytes = (width + 7) / 8;
  if (s.in_place && s.keep != 1)
    for (size_t i = 0; i < d.values.size(); ++i) decay_or_keep(d, d.values[i], 1);
  std::vector<double> scale(s.memories, kappa(s)), kept(s.memories);
  for (int64_t t = 0; t < d.m; ++t) kept[d.memory(t)] += d.has_pair(t);
  for (int64_t i = 0; i < s.memories && s.release && s.masked && s.pairs(); ++i)
    scale[i] = double(n) / double(d.pairs_of(i)) * kept[i];
  for (int64_t e = s.first_place(); e < s.places(); ++e) {
    d.new_slots[e] = -1;
    std::fill_n(&d.log[e * width], width, T(0));
  }
  const ListTable lists = slot_lists(d);
  for (int64_t slot = 0; slot < s.all_slots(); ++slot) {
    const auto& list = lists[slot];
    if (list.empty()) continue;
    const int64_t own = std::count_if(list.begin(), list.end(), [&](int32_t i) { return d.is_own(i / n); });
    const T gamma = T(scale[slot / s.slots()] / double(std::max<int64_t>(own, 1)));
    const int64_t old = d.place_of(int32_t(slot)), place = s.first_place() + list[0];
    for (int64_t c = 0; c < width; c += d.kPack)
      plain_step(
          d, c, width, [&](int64_t c) { return d.element(slot, old, c, s.before + 1); },
          [&](int64_t c) {
            return gamma * ordered_sum<T>(list, [&](int32_t i, T& sum) {
                     if (d.good[i / n]) sum = std::fma(d.weights[i], d.errors[i / n * width + c], sum);
                   });
          },
          old < 0 ? &d.values[slot * width] : &d.log[old * width],
          s.in_place ? &d.values[slot * width] : &d.log[place * width],
          s.in_place || s.clip < 0 ? nullptr : &d.open_rows[place * bytes]);
    if (s.in_place) continue;
    if (old >= 0) d.new_slots[old] = -1;
    d.new_slots[place] = int32_t(slot);
    d.newest[slot] = int32_t(place) + 1;
  }
  for (int64_t e = 0; e < s.places(); ++e)
    for (int64_t c = 0; c < width && d.new_slots[e] >= 0 && s.keep != 1; ++c)
      decay_or_keep(d, d.log[e * width + c], s.before - s.writer(e));
}

// The tables of the addressing loss; extra: numbers of the entries.
template <typename Size, typename T>
void plain_tables(Data<T>& d, const T* extra) {
  const Shape& s = d.s;
  const int64_t table = 2 * s.sub_keys;
  const ListTable lists = key_lists(d);
  for (int64_t i = 0; i < s.memories * table; ++i) {
    const int64_t memory = i / table, rows = d.addressed_rows(s.rows_of(memory));
    const auto sum_of_entries = [&](const T* x) {
      std::vector<double> threads(Size::kThreads);
      for (int64_t h = 0, key = (memory * s.heads * 2 * s.sub_keys) + i % table; h < s.heads; ++h, key += table)
        for (size_t j = 0; j < lists[key].size(); ++j) threads[j % Size::kThreads] += double(x[lists[key][j]]);
      return block_sum(threads);
    };
    const double mean = (rows ? 1 / double(rows) : 0) * sum_of_entries(d.p.get()), floored = mean + kLogFloor;
    d.mean[i] = mean;
    d.slope[i] = std::log(floored) + mean / floored;
    d.curvature[i] = 1 / floored + kLogFloor / (floored * floored);
    if (extra) d.extra[i] = (rows ? s.addressing_weight / double(rows) : 0) * sum_of_entries(extra);
  }
}

template <typename Size, typename T>
T plain_addressing_loss(Data<T>& d, int64_t memory) {
  const int64_t table = 2 * d.s.sub_keys;
  std::vector<double> threads(Size::kThreads);
  for (int64_t i = 0; i < table; ++i) {
    const double mean = d.mean[memory * table + i];
    double& sum = threads[i % Size::kThreads];
    sum = std::fma(mean, std::log(mean + kLogFloor), sum);
  }
  return T(d.s.addressing_weight * block_sum(threads));
}

template <typename Size, typename T>
void plain_keys(Data<T>& d) {
  const Shape& s = d.s;
  const bool addressed = s.addressing_weight != 0;
  const int64_t half = s.half_width;
  if (addressed) plain_tables<Size, T>(d, nullptr);
  for (int64_t i = 0; i < s.memories; ++i) d.loss[i] = addressed ? plain_addressing_loss<Size>(d, i) : T(0);
  d.curvature.clear(kUntouched);
  for (int64_t list = 0; list < 2 * d.m * s.heads; ++list) {
    const int64_t at = list * s.topk, reads = list / 2 * s.topk;
    const int32_t* const ids = &d.list_indices[at];
    const bool left_out = ids[0] < 0;
    const int64_t memory = d.memory(list / (2 * s.heads)), rows = d.addressed_rows(s.rows_of(memory));
    const auto slope = [&](int64_t l) { return d.slope[(2 * memory + list % 2) * s.sub_keys + ids[l]]; };
    double lanes[32] = {};
    for (int64_t l = 0; l < s.topk && addressed && !left_out; ++l)
      lanes[l % 32] = std::fma(double(d.p[at + l]), slope(l), lanes[l % 32]);
    const double mean = warp_sum(lanes), factor = rows ? s.addressing_weight / double(rows) : 0;
    for (int64_t l = 0; l < s.topk; ++l) {
      T sigma = addressed && !left_out ? T(factor * double(d.p[at + l]) * (slope(l) - mean)) : T(0), terms = 0;
      for (int64_t r = reads; r < reads + s.topk && !s.values_only; ++r)
        if ((list % 2 == 0 ? d.places[r] / s.topk : d.places[r] % s.topk) == l) terms += d.memory_terms[r];
      if (!s.values_only && !left_out) sigma += terms;
      d.alpha[at + l] = s.idw && !left_out ? 2 * std::exp(d.list_scores[at + l]) * sigma : sigma;
    }
  }
  const ListTable lists = key_lists(d);
  if (s.clip >= 0) d.open_keys.clear(0xff);
  for (int64_t key = 0; key < s.key_rows(); ++key) {
    const T* const old = &d.sub_keys[key * half];
    T* const to = &d.new_keys[key * half];
    for (int64_t c = 0; c < half; ++c) decay_or_keep(d, to[c] = old[c], 1);
    for (int64_t c = 0; c < half && !lists[key].empty(); c += d.kPack)
      plain_step(
          d, c, half, [&](int64_t c) { return d.decayed(old[c], 1); },
          [&](int64_t c) {
            return ordered_sum<T>(lists[key], [&](int32_t l, T& sum) {
              const T q = d.query[d.query_row(l) * half + c];
              sum = std::fma(d.alpha[l], s.idw ? q - old[c] : q, sum);
            });
          },
          old, to, s.clip >= 0 ? &d.open_keys[key * ((half + 7) / 8)] : nullptr);
  }
}

}  // namespace testing
