// One chunk of a scan for the tests of its kernels: all that they read and write, made up.
#pragma once
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/scan.cuh"
#include "testing.h"

namespace testing {

using namespace fwpkm::kernels;

enum Boundary {
  kDrop,
  kCarry,       // the scan begins with carried tokens, the chunk re-reads tokens
  kCarryFirst,  // nothing was carried, and this is the first chunk
  kCarryLater,  // nothing was carried, the chunk re-reads tokens
};

struct Shape {
  int64_t heads = 1, topk = 3, sub_keys = 4, half_width = 6, width = 8;  // H, R, P, K/2, V
  int64_t batch = 2, tokens = 4, lookahead = 1;                          // tokens: own ones of the chunk
  int64_t before = 2;                                                    // tokens of earlier chunks, and their writes
  Boundary boundary = kDrop;
  bool in_place = false, idw = false, values_only = false, masked = false, gated = true, release = false;
  Activation activation = Activation::kSoftmax;
  double keep = 1, lr = 0.5, clip = -1, addressing_weight = 0.25;
  size_t offset = 0;   // of the rows from a multiple of 16 bytes, in elements
  int64_t odd = 0;     // one token of so many has a score that is not finite,
  int64_t astray = 0;  // one a target that is not, or in turn a loss weight
  bool large = false;  // keys and values that a decay by more than 1 takes to infinity
  int64_t memories = 1;

  bool carry() const { return boundary != kDrop; }
  int64_t carried() const { return boundary == kCarry ? lookahead : 0; }
  int64_t own() const { return before + (boundary == kCarry || boundary == kCarryLater ? lookahead : 0); }
  int64_t length() const { return own() + tokens + 1; }
  int64_t chunk_tokens() const { return own() + tokens - before; }
  int64_t pairs() const { return std::max<int64_t>(chunk_tokens() - lookahead, 0); }
  int64_t all_pairs() const { return before + pairs() + 1; }
  int64_t m() const { return batch * chunk_tokens(); }
  int64_t reads() const { return heads * topk; }
  int64_t slots() const { return sub_keys * sub_keys; }  // of one memory
  int64_t all_slots() const { return memories * slots(); }
  int64_t key_rows() const { return memories * heads * 2 * sub_keys; }
  int64_t table() const { return memories * 2 * sub_keys; }
  // The memory of batch row b; with several, the first serves no rows.
  int64_t memory(int64_t b) const { return memories == 1 ? 0 : 1 + b * b % (memories - 1); }
  int64_t rows_of(int64_t of) const {
    int64_t rows = 0;
    for (int64_t b = 0; b < batch; ++b) rows += memory(b) == of;
    return rows;
  }
  // The log: earlier writes have as many places as this one, but the first, which has two more.
  int64_t first_places() const { return m() * reads() + (before ? 2 : 0); }
  int64_t first_place() const { return before ? first_places() + (before - 1) * m() * reads() : 0; }
  int64_t places() const { return in_place ? 0 : first_place() + m() * reads(); }
  int64_t writer(int64_t place) const {
    return place < first_places() ? 0 : 1 + (place - first_places()) / (m() * reads());
  }
};

constexpr int kUntouched = 0x7b;  // byte of an output; finite in every type

// All that one chunk reads and writes.
template <typename T>
struct Data {
  static constexpr int64_t kPack = 16 / sizeof(T);
  Shape s;
  int64_t n = s.reads(), m = s.m(), width = s.width;

  Buffer<T> query, target, loss_weights, sub_keys, scores, list_scores;
  Buffer<uint8_t> mask;
  Buffer<int32_t> places, memory_of_row, rows_of_memory;
  // Read and written
  Buffer<T> values, log;
  Buffer<int32_t> newest, new_slots, slots, list_indices;
  Buffer<unsigned> error;
  // Written
  Buffer<T> weights, errors, memory_terms, out, own_weights, losses, p, alpha, new_keys, loss;
  Buffer<uint8_t> good, open_rows, open_keys;
  Buffer<int32_t> read_from, own_indices;
  Buffer<double> mean, slope, curvature, extra;

  explicit Data(const Shape& shape)
      : s(shape),
        query(s.batch * s.length() * s.heads * 2 * s.half_width, s.offset),
        target(s.batch * s.length() * width, s.offset),
        loss_weights(s.batch * s.length()),
        sub_keys(s.key_rows() * s.half_width, s.offset),
        scores(m * n),
        list_scores(2 * m * n),
        mask(s.batch * s.length()),
        places(m * n),
        memory_of_row(s.batch),
        rows_of_memory(s.memories),
        values(s.all_slots() * width, s.offset),
        log(s.places() * width, s.offset),
        newest(s.in_place ? 0 : s.all_slots()),
        new_slots(s.places()),
        slots(m * n),
        list_indices(2 * m * n),
        error(1),
        weights(m * n),
        errors(m * width, s.offset),
        memory_terms(s.values_only ? 0 : m * n),
        out(s.batch * (s.length() - s.carried()) * width, s.offset),
        own_weights(s.batch * (s.length() - s.carried()) * n),
        losses(s.batch * s.all_pairs()),
        p(2 * m * n),
        alpha(2 * m * n),
        new_keys(s.key_rows() * s.half_width, s.offset),
        loss(s.memories),
        good(m),
        open_rows(s.places() * ((width + 7) / 8)),
        open_keys(s.key_rows() * ((s.half_width + 7) / 8)),
        read_from(s.in_place ? 0 : m * n),
        own_indices(s.batch * (s.length() - s.carried()) * n),
        mean(s.table()),
        slope(s.table()),
        curvature(s.table()),
        extra(s.table()) {
    each(*this, [](const char*, auto& buffer, auto&) { buffer.clear(kUntouched); });
    error.clear(0);
    newest.clear(0);
    Random random;
    for (auto* buffer : {&query, &target, &loss_weights, &sub_keys, &values, &log})
      for (size_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = T(random.real());
    for (size_t i = 0; i < mask.size(); ++i) mask[i] = uint8_t(random.below(3));
    for (int64_t b = 0; b < s.batch; ++b) memory_of_row[b] = int32_t(s.memory(b));
    for (int64_t i = 0; i < s.memories; ++i) rows_of_memory[i] = int32_t(s.rows_of(i));
    if (s.large)
      for (auto* buffer : {&values, &log, &sub_keys})
        for (size_t i = 1; i < buffer->size(); i += 41) (*buffer)[i] = std::numeric_limits<T>::max();
    make_log(random);
    make_lists(random);
    for (int64_t t = 0; t < m; ++t) {
      if (s.odd && t % s.odd == s.odd - 1) make_odd(t);
      if (!s.astray || t % s.astray) continue;
      (t / s.astray % 2 ? loss_weights[at(t)] : target[target_row(t) * width + t % width]) = T(INFINITY);
    }
  }

  // f(name, buffer, its twin) for every buffer.
  template <typename F>
  void each(Data& o, const F& f) {
    f("query", query, o.query), f("target", target, o.target), f("loss weights", loss_weights, o.loss_weights);
    f("sub-keys", sub_keys, o.sub_keys), f("scores", scores, o.scores), f("list scores", list_scores, o.list_scores);
    f("mask", mask, o.mask), f("places", places, o.places), f("values", values, o.values), f("log", log, o.log);
    f("newest", newest, o.newest), f("new slots", new_slots, o.new_slots), f("slots", slots, o.slots);
    f("list indices", list_indices, o.list_indices), f("error word", error, o.error);
    f("weights", weights, o.weights), f("errors", errors, o.errors), f("out", out, o.out);
    f("memory terms", memory_terms, o.memory_terms), f("own weights", own_weights, o.own_weights);
    f("losses", losses, o.losses), f("p", p, o.p), f("alpha", alpha, o.alpha), f("new keys", new_keys, o.new_keys);
    f("addressing loss", loss, o.loss), f("good", good, o.good), f("open rows", open_rows, o.open_rows);
    f("open keys", open_keys, o.open_keys), f("read from", read_from, o.read_from), f("mean", mean, o.mean);
    f("own indices", own_indices, o.own_indices), f("slope", slope, o.slope), f("curvature", curvature, o.curvature);
    f("extra", extra, o.extra);
  }

  // A newest row in the log for every second slot or so.
  void make_log(Random& random) {
    for (int64_t place = 0; place < s.places() && place < s.first_place(); ++place) new_slots[place] = -1;
    for (int64_t slot = 0; slot < int64_t(newest.size()) && s.first_place(); ++slot) {
      const int64_t place = random.below(s.first_place());
      if (random.below(2) && new_slots[place] < 0) {
        new_slots[place] = int32_t(slot);
        newest[slot] = int32_t(place) + 1;
      }
    }
  }
  void make_lists(Random& random) {
    std::vector<int32_t> all(s.sub_keys);
    std::iota(all.begin(), all.end(), 0);
    for (int64_t l = 0; l < 2 * m * n; ++l) {
      if (l % s.topk == 0)
        for (int64_t j = 0; j < s.topk; ++j) std::swap(all[j], all[j + random.below(s.sub_keys - j)]);
      list_indices[l] = all[l % s.topk];
      list_scores[l] = (l % s.topk ? list_scores[l - 1] : T(1)) - T(std::abs(random.real()));
    }
    for (int64_t i = 0; i < m * n; ++i) {
      const int64_t pair = random.below(s.topk * s.topk), at = i / s.topk * 2 * s.topk;
      const int64_t l0 = at + pair / s.topk, l1 = at + s.topk + pair % s.topk;
      places[i] = int32_t(pair);
      slots[i] = int32_t(first_slot(i / n) + list_indices[l0] * s.sub_keys + list_indices[l1]);
      scores[i] = list_scores[l0] + list_scores[l1];
    }
  }
  // As the search leaves a list that is bad.
  void make_odd(int64_t t) {
    const int64_t head = t * s.heads + t % s.heads;
    for (int64_t r = 0; r < s.topk; ++r) {
      list_indices[(2 * head + 1) * s.topk + r] = -1;
      list_scores[(2 * head + 1) * s.topk + r] = T(NAN);
      slots[head * s.topk + r] = -1;
      scores[head * s.topk + r] = t % 2 ? T(NAN) : T(INFINITY);
    }
  }

  int64_t at(int64_t t) const { return t / s.chunk_tokens() * s.length() + position(t); }  // in (B, T)
  int64_t position(int64_t t) const { return s.before + t % s.chunk_tokens(); }
  int64_t target_row(int64_t t) const { return at(t) + s.lookahead; }
  bool is_own(int64_t t) const { return position(t) >= s.own(); }
  bool in_pairs(int64_t t) const { return t % s.chunk_tokens() < s.pairs(); }
  bool has_pair(int64_t t) const { return in_pairs(t) && (!s.masked || mask[at(t)]); }
  int64_t memory(int64_t t) const { return s.memory(t / s.chunk_tokens()); }
  int64_t first_slot(int64_t t) const { return memory(t) * s.slots(); }
  int64_t pairs_of(int64_t of) const { return s.rows_of(of) * s.pairs(); }
  // Which list of an entry: its row in (memories, H, 2, P).
  int32_t entry_key(int64_t l) const {
    const int64_t list = l / s.topk, lists = 2 * s.heads, key = list % lists * s.sub_keys + list_indices[l];
    return list_indices[l] < 0 ? -1 : int32_t(memory(list / lists) * lists * s.sub_keys + key);
  }
  // Its query half, among all of them.
  int64_t query_row(int64_t l) const {
    const int64_t list = l / s.topk;
    return at(list / (2 * s.heads)) * 2 * s.heads + list % (2 * s.heads);
  }
  int64_t addressed_rows(int64_t rows) const { return rows * (s.carry() ? s.pairs() : s.chunk_tokens()) * s.heads; }
  bool addressed() const { return s.addressing_weight != 0; }
  int32_t place_of(int32_t slot) const { return s.in_place || slot < 0 ? -1 : newest[slot] - 1; }
  T decayed(T v, int64_t times) const {
    for (int64_t i = 0; i < times && s.keep != 1; ++i) v *= T(s.keep);
    return v;
  }
  // Element c of a slot's row, after `writes` writes.
  T element(int64_t slot, int64_t place, int64_t c, int64_t writes) const {
    if (place >= 0) return decayed(log[place * width + c], writes - s.writer(place) - 1);
    return decayed(values[slot * width + c], s.in_place ? 0 : writes);
  }
  void report(Error e) { error[0] |= e; }

  Chunk chunk() const { return {s.before, s.own(), s.own() + s.tokens, s.pairs(), s.before, s.before, s.before, true}; }
  ScanView<T> view() const {
    return {.query = query.get(),
            .target = target.get(),
            .loss_weights = s.gated ? loss_weights.get() : nullptr,
            .mask = s.masked ? mask.get() : nullptr,
            .batch = s.batch,
            .length = s.length(),
            .carried = s.carried(),
            .lookahead = s.lookahead,
            .heads = s.heads,
            .num_sub_keys = s.sub_keys,
            .half_width = s.half_width,
            .topk = s.topk,
            .num_slots = s.slots(),
            .width = width,
            .all_pairs = s.all_pairs(),
            .carry = s.carry(),
            .idw = s.idw,
            .values_only = s.values_only,
            .activation = s.activation,
            .eps = T(1e-3),
            .temperature = kTemperature,
            .lr = T(s.lr),
            .keep = T(s.keep),
            .grad_clip = T(s.clip),
            .addressing_weight = s.addressing_weight,
            .memories = s.memories == 1 ? Memories{} : Memories{s.memories, memory_of_row.get(), rows_of_memory.get()}};
  }
  Versions<T> versions() const {
    return {values.get(), s.in_place ? nullptr : log.get(), width, s.first_places(), m * n, s.keep != 1};
  }
  static constexpr T kTemperature = T(0.7);
};

}  // namespace testing
