// What the forward and the backward pass of a scan share on the CPU: views, versions of rows, address terms.
#pragma once
#include <atomic>
#include <cmath>
#include <vector>

#include "binding/dispatch.h"
#include "cpu/ordered_lists.h"
#include "cpu/product_key.h"
#include "cpu/vector.h"
#include "ops/scan_tensors.h"

namespace fwpkm {

// Plain pointers to the inputs, and the indexing.
template <typename T>
struct ScanView {
  const ScanSizes& s;
  const ScanOptions& o;
  const T *query, *target, *loss_weights;
  const uint8_t* mask;  // not bool: a byte other than 0 and 1 is true as well
  int64_t reads;        // H*R, of one token

  ScanView(const ScanInputs& in, const ScanSizes& sizes, const ScanOptions& options)
      : s(sizes),
        o(options),
        query(in.query.const_data_ptr<T>()),
        target(in.target.const_data_ptr<T>()),
        loss_weights(in.loss_weights ? in.loss_weights->const_data_ptr<T>() : nullptr),
        mask(in.mask ? static_cast<const uint8_t*>(in.mask->const_data_ptr()) : nullptr),
        reads(sizes.reads_per_token()) {}

  // Tokens of a step are numbered t = b * step.tokens() + i and stand at x = step.first + i of batch row b.
  struct Token {
    int64_t b, i, x;
  };
  Token token(const Step& step, int64_t t) const {
    const int64_t b = t / step.tokens(), i = t % step.tokens();
    return {b, i, step.first + i};
  }
  int64_t at(const Token& k) const { return k.b * s.length + k.x; }                                 // in (B, T)
  int64_t own_row(const Token& k) const { return k.b * (s.length - o.carried) + k.x - o.carried; }  // in the outputs
  int64_t target_row(const Token& k) const { return at(k) + o.lookahead; }
  bool has_pair(const Step& step, const Token& k) const { return k.i < step.pairs && (!mask || mask[at(k)] != 0); }
  T loss_weight(const Token& k) const { return loss_weights ? loss_weights[at(k)] : T(1); }
  const T* query_half(const Token& k, int64_t h, int64_t p) const {
    return query + ((at(k) * s.keys.heads + h) * 2 + p) * s.keys.half_width;
  }
  // Tokens whose addresses count in the addressing loss: all ("drop"), or those with a pair, masked or not ("carry").
  bool addressed(const Step& step, const Token& k) const { return o.boundary == Boundary::kDrop || k.i < step.pairs; }
  int64_t addressed_rows(const Step& step) const {
    return s.batch * (o.boundary == Boundary::kDrop ? step.tokens() : step.pairs) * s.keys.heads;
  }
  int64_t pair_count(const Step& step) const { return s.batch * step.pairs; }  // M
  // kappa of gamma[s] = kappa / N_read(s)
  double write_scale(const Step& step) const {
    if (pair_count(step) == 0) return 0;
    if (o.write_rule == WriteRule::kPaper) return 1;
    int64_t samples = s.batch * (step.stop - step.own);
    if (mask) {
      samples = 0;
      for (int64_t b = 0; b < s.batch; ++b)
        for (int64_t i = 0; i < step.pairs; ++i) samples += mask[b * s.length + step.first + i] != 0;
    }
    return double(samples) / double(pair_count(step)) * double(reads);
  }
  // N_read of a slot: the reads of its list by tokens of the chunk itself.
  int64_t read_count(const Step& step, const OrderedLists& lists, const OrderedLists::Group& group) const {
    if (step.first == step.own) return group.count;
    int64_t count = 0;
    for (int32_t i = group.first; i >= 0; i = lists.next(i)) count += token(step, i / reads).x >= step.own;
    return count;
  }
  double gamma(const Step& step, double write_scale, const OrderedLists& lists,
               const OrderedLists::Group& group) const {
    return write_scale / double(std::max<int64_t>(read_count(step, lists, group), 1));
  }
  // Key of list entry l = ((t*H + h)*2 + p)*R + r in tables of [H, 2, P].
  int32_t sub_key_of(int64_t l, const int32_t* list_indices) const {
    const int64_t hp = l / o.topk % (2 * s.keys.heads);
    return int32_t(hp * s.keys.sub_keys + list_indices[l]);
  }
  const T* query_of(const Step& step, int64_t l) const {
    const int64_t hp = l / o.topk;
    return query_half(token(step, hp / (2 * s.keys.heads)), 0, 0) + hp % (2 * s.keys.heads) * s.keys.half_width;
  }
};

// The version of a row that a step reads. Places of the log are numbered through all writing steps; -1 is `values`.
template <typename T>
class RowReader {
 public:
  RowReader(const ScanSizes& s, const ScanOptions& o, const T* values, const T* log)
      : width_(s.width), keep_(T(o.keep())), decays_(o.decays()), values_(values), log_(log) {
    for (const Step& step : s.steps)
      if (step.writes) first_place_.push_back(s.batch * step.tokens_before * s.reads_per_token());
  }

  // `writes`: how many writes came before; `final`: rows of the log have been brought up to the last of them. With
  // weight decay a row is decayed on the way into `scratch`, once for each write since its own.
  const T* row(int32_t slot, int32_t place, int64_t writes, bool final, T* scratch) const {
    const T* base = place < 0 ? values_ + slot * width_ : log_ + place * width_;
    const int64_t times = !decays_ ? 0 : place < 0 ? writes : final ? 0 : writes - writer(place) - 1;
    if (times == 0) return base;
    vector::kernels<T>().scaled(base, keep_, times, width_, scratch);
    return scratch;
  }
  bool needs_scratch() const { return decays_; }
  int64_t writer(int64_t place) const {  // which write made the row at this place
    return std::upper_bound(first_place_.begin(), first_place_.end(), place) - first_place_.begin() - 1;
  }

 private:
  int64_t width_;
  T keep_;
  bool decays_;
  const T *values_, *log_;
  std::vector<int64_t> first_place_;
};

constexpr double kLogFloor = 1e-8;  // inside the logarithm of the addressing loss

// The addressing loss of one write over lists [m, H, 2, R], m tokens. Entries of tokens that do not count get P = 0.
template <typename T>
class Addressing {
 public:
  Addressing(const ScanView<T>& view, const Step& step, const int32_t* list_indices, const T* list_scores)
      : v_(view),
        step_(step),
        list_indices_(list_indices),
        list_scores_(list_scores),
        rows_(view.addressed_rows(step)),
        mean_(2 * view.s.keys.sub_keys, 0.0) {
    const int64_t m = v_.s.batch * step.tokens();
    p_.resize(m * 2 * v_.reads);
    torch::stable::parallel_for(0, m, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t)
        if (v_.addressed(step_, v_.token(step_, t)))
          for (int64_t hp = 0; hp < 2 * v_.s.keys.heads; ++hp) {
            const int64_t l = (t * 2 * v_.s.keys.heads + hp) * v_.o.topk;
            read_weights(Activation::kSoftmax, T(1), list_scores_ + l, v_.o.topk, p_.data() + l);
          }
    });
    if (rows_) accumulate(p_, 1.0 / double(rows_), mean_);
  }

  int64_t rows() const { return rows_; }
  const std::vector<T>& p() const { return p_; }
  double loss() const {
    double sum = 0;
    for (const double x : mean_) sum += x * std::log(x + kLogFloor);
    return v_.o.addressing_weight * sum;
  }
  // u = d(P ln(P + floor)) / dP at the mean address, and its derivative
  std::vector<double> slope() const {
    std::vector<double> u(mean_);
    for (double& x : u) x = std::log(x + kLogFloor) + x / (x + kLogFloor);
    return u;
  }
  std::vector<double> curvature() const {
    std::vector<double> u(mean_);
    for (double& x : u) x = 1 / (x + kLogFloor) + kLogFloor / ((x + kLogFloor) * (x + kLogFloor));
    return u;
  }
  // u~ of one list: u less its mean under P
  void centre(int64_t list, const std::vector<double>& u, double* centred) const {
    const int64_t topk = v_.o.topk;
    double mean = 0;
    for (int64_t r = 0; r < topk; ++r) mean += double(p_[list * topk + r]) * u[table_at(list * topk + r)];
    for (int64_t r = 0; r < topk; ++r) centred[r] = u[table_at(list * topk + r)] - mean;
  }
  // table[p, j] = scale * sum of x over the list entries of sub-key j, tokens in turn (heads share the table)
  void accumulate(const std::vector<T>& x, double scale, std::vector<double>& table) const {
    const int64_t entries = int64_t(x.size()), topk = v_.o.topk, sub_keys = v_.s.keys.sub_keys;
    for (int64_t l = 0; l < entries; ++l) table[l / topk % 2 * sub_keys + list_indices_[l]] += double(x[l]);
    for (double& sum : table) sum *= scale;
  }
  int64_t table_at(int64_t l) const { return l / v_.o.topk % 2 * v_.s.keys.sub_keys + list_indices_[l]; }

 private:
  const ScanView<T>& v_;
  const Step& step_;
  const int32_t* list_indices_;
  const T* list_scores_;
  int64_t rows_;              // N_a
  std::vector<double> mean_;  // [2, P]
  std::vector<T> p_;
};

}  // namespace fwpkm
