// torch.ops.fwpkm.chunk_scan_backward on CUDA: check, allocate, launch chunk by chunk in reverse, register. The host
// never waits; a saved number out of range is not followed, and reported in the device's error word.
#include "ops/chunk_scan_backward.h"

#include <algorithm>

#include "binding/dispatch.h"
#include "binding/stream.h"
#include "cuda/errors.h"
#include "cuda/scan.h"
#include "cuda/side_stream.h"
#include "kernels/backward_keys.cuh"
#include "kernels/backward_rows.cuh"
#include "kernels/backward_tokens.cuh"

namespace fwpkm {
namespace {

void check_launch(cudaError_t error) { check_cuda(error, "chunk_scan_backward"); }

template <typename T>
class BackwardScan {
 public:
  BackwardScan(const ScanInputs& in, const ScanSizes& s, const ScanOptions& o, const SavedScan& saved,
               const ScanGradients& grads, bool need_dvalues, ScanInputGradients& result, cudaStream_t stream)
      : s_(s),
        o_(o),
        saved_(saved),
        need_dvalues_(need_dvalues),
        masked_(in.mask.has_value()),
        result_(result),
        stream_(stream),
        error_word_(error_word()),
        view_(scan_view<T>(in, s, o)),
        sub_keys_(in.sub_keys.const_data_ptr<T>()),
        versions_(versions_of<T>(s, o, in.values.const_data_ptr<T>(), saved.new_rows.const_data_ptr<T>())),
        like_(in.values),
        no_dsub_keys_(!grads.new_sub_keys),
        dout_(pointer(grads.out)),
        dweights_(pointer(grads.weights)),
        dlosses_(pointer(grads.losses)),
        daddressing_(pointer(grads.addressing_loss)),
        dnew_rows_(pointer(grads.new_rows)),
        side_(stream, works_apart(s)) {
    const int64_t tokens = most_tokens(s), n = tokens * s.reads_per_token();
    const int64_t rows = std::min(s.slots, reads_of_call());
    table_ = {ints(s.slots), take<kernels::RowState>(rows, ScalarType::Byte), numbers(rows * s.width),
              s.slots <= reads_of_call()};
    check_launch(kernels::fill(table_.row_of, s.slots, 0, stream));

    for (Reads* x : {&reads_, &next_reads_})
      *x = {.list_indices = ints(2 * n),
            .slots = ints(n),
            .slot_lists = ints(kernels::ordered_lists_workspace(int32_t(n))),
            .key_lists = ints(kernels::ordered_lists_workspace(int32_t(2 * n))),
            .p = o.keys_move() ? numbers(2 * n) : nullptr,
            .by_slot = {},
            .by_key = {}};
    list_of_ = ints(n);
    gradients_ = take<kernels::ListGradient<T>>(n, ScalarType::Byte);
    counts_ = ints(n + 1);  // and the number of pairs
    gamma_ = numbers(n);
    for (T** p : {&scores_, &weights_, &dscores_}) *p = numbers(n);
    if (!o.values_only)
      for (T** p : {&memory_terms_, &read_directions_, &y_}) *p = numbers(n);
    delta_ = numbers(tokens * s.width);
    errors_ = numbers(tokens * s.width);
    good_ = take<uint8_t>(tokens, ScalarType::Byte);
    scratch_ = numbers(kernels::ordered_sums_scratch(int32_t(n), s.width));
    key_scratch_ = numbers(kernels::column_sums_scratch<T>(int32_t(2 * n), 2 * s.keys.heads, s.keys.half_width));
    if (o.keys_move()) {
      theta_ = numbers(key_count());
      directions_ = numbers(2 * n);
      for (double** p : {&tables_.mean, &tables_.slope, &tables_.curvature, &tables_.extra})
        *p = take<double>(view_.table_size(), ScalarType::Double);
      sums_ = take<double>(view_.key_rows(), ScalarType::Double);
    }
    alpha_ = numbers(2 * n);
    beta_ = numbers(2 * n);
  }

  // The side has what queries and sub-keys wait for, and checks and sorts the reads of the chunk that comes next. The
  // current stream has rows and tokens.
  void run() {
    const auto chunks = chunks_of(s_);
    if (!chunks.empty()) prepare(chunks.back(), next_reads_);
    side_.join();
    for (size_t i = chunks.size(); i-- > 0;)
      backward(chunks[i], write_scale_of(s_.steps[i], s_, o_, masked_), i ? &chunks[i - 1] : nullptr);
    side_.join();
    if (!need_dvalues_) return;
    T* const drows = result_.value_rows.mutable_data_ptr<T>();
    check_launch(kernels::finish_rows_of_reads(view_, table_, reads_of_call(),
                                               result_.value_slots.const_data_ptr<int64_t>(), drows,
                                               kernels::rows_are_packs<T>(s_.width, table_.rows, drows), stream_));
  }

 private:
  using Chunk = kernels::Chunk;

  static const T* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr<T>() : nullptr; }

  // Workspace of `size` elements, for as long as this object lives.
  template <typename E>
  E* take(int64_t size, ScalarType type) {
    kept_.push_back(make(like_, {type == ScalarType::Byte ? size * int64_t(sizeof(E)) : size}, type));
    return static_cast<E*>(kept_.back().mutable_data_ptr());
  }
  int32_t* ints(int64_t size) { return take<int32_t>(size, ScalarType::Int); }
  T* numbers(int64_t size) { return take<T>(size, like_.scalar_type()); }

  int64_t reads_of_call() const { return s_.batch * s_.tokens * s_.reads_per_token(); }
  int64_t key_count() const { return view_.key_rows() * view_.half_width; }
  const T* keys_of(const Chunk& c) const {
    if (c.writes_before == 0 || !o_.keys_move()) return sub_keys_;
    if (c.writes_before == s_.writes) return saved_.new_sub_keys.const_data_ptr<T>();  // a partial, unwritten chunk
    return saved_.key_versions.const_data_ptr<T>() + (c.writes_before - 1) * key_count();
  }

  // What a chunk has read, checked and sorted.
  struct Reads {
    int32_t *list_indices, *slots;    // (m, H, 2, R), (m, H, R)
    int32_t *slot_lists, *key_lists;  // workspace, where the lists lie
    T* p;                             // (m, H, 2, R): address_weights, if sub-keys move
    kernels::OrderedLists by_slot, by_key;
  };

  int64_t reads_before(const Chunk& c) const { return s_.batch * c.tokens_before * view_.reads(); }
  const int32_t* places(const Chunk& c) const { return saved_.places.const_data_ptr<int32_t>() + reads_before(c); }
  const int32_t* read_from(const Chunk& c) const {
    return saved_.read_from.const_data_ptr<int32_t>() + reads_before(c);
  }
  const T* list_scores(const Chunk& c) const { return saved_.list_scores.const_data_ptr<T>() + 2 * reads_before(c); }

  void prepare(const Chunk& c, Reads& x) {
    const int64_t reads = view_.tokens(c) * view_.reads(), before = reads_before(c);
    side_.follow();  // nobody reads what was in x
    check_launch(
        kernels::check_reads(view_, c, s_.places(), saved_.list_indices.const_data_ptr<int32_t>() + 2 * before,
                             places(c), read_from(c), list_scores(c), x.list_indices, x.slots,
                             need_dvalues_ ? result_.value_slots.mutable_data_ptr<int64_t>() + before : nullptr,
                             c.writes && view_.addressing_weight != 0 ? x.p : nullptr, error_word_, side_.stream()));
    const auto by_slot = kernels::grouping(static_cast<const int32_t*>(x.slots), int32_t(reads), int32_t(s_.slots),
                                           x.slot_lists, nullptr);
    const auto by_key = kernels::grouping(kernels::EntryKeys<T>{view_, c, x.list_indices, x.slots}, int32_t(2 * reads),
                                          int32_t(view_.key_rows()), x.key_lists, nullptr);
    check_launch(kernels::build_ordered_lists(by_slot, by_key, side_.stream()));
    x.by_slot = by_slot.lists();
    x.by_key = by_key.lists();
  }

  // `next`: the chunk before it, or null.
  void backward(const Chunk& c, const kernels::WriteScale& scale, const Chunk* next) {
    std::swap(reads_, next_reads_);
    // Of the sub-keys: whether the write passes their gradient on, for it moved them, and somebody later read them.
    const bool through = c.writes && o_.keys_move() && !no_dsub_keys_;
    const bool memory_moved_keys = c.writes && !o_.values_only && c.pairs > 0;
    const kernels::BackwardKeys<T> keys = key_arguments(c, through, memory_moved_keys);
    const bool keys_aligned = kernels::rows_are_packs<T>(view_.half_width, view_.query, keys.dquery, keys.sub_keys,
                                                         keys.dsub_keys, theta_, key_scratch_);
    row_gradients(c, scale);
    if (through) check_launch(kernels::key_directions(keys, keys_aligned, side_.stream()));
    side_.join();  // directions
    check_launch(kernels::key_addresses(keys, side_.stream()));
    if (next) prepare(*next, next_reads_);

    const bool second_order = through && memory_moved_keys;
    const kernels::BackwardTokens<T> tokens{
        .view = view_,
        .chunk = c,
        .versions = versions_,
        .list_indices = reads_.list_indices,
        .slots = reads_.slots,
        .places = places(c),
        .read_from = read_from(c),
        .list_scores = list_scores(c),
        .list_of = list_of_,
        .gradients = gradients_,
        .gradient_rows = table_.rows,
        .open = o_.clips() ? saved_.open_rows.const_data_ptr<uint8_t>() : nullptr,
        .dout = dout_,
        .dweights = dweights_,
        .dlosses = dlosses_,
        .directions = second_order ? directions_ : nullptr,
        .scores = scores_,
        .weights = weights_,
        .dscores = dscores_,
        .memory_terms = memory_moved_keys ? memory_terms_ : nullptr,
        .read_directions = read_directions_,
        .y = y_,
        .delta = delta_,
        .errors = errors_,
        .good = good_,
        .dtarget = result_.target.mutable_data_ptr<T>(),
        .dloss_weights = view_.loss_weights ? result_.loss_weights.mutable_data_ptr<T>() : nullptr};
    check_launch(
        kernels::backward_tokens(tokens,
                                 kernels::rows_are_packs<T>(s_.width, versions_.values, versions_.log, table_.rows,
                                                            view_.target, dout_, delta_, errors_, tokens.dtarget),
                                 stream_));
    if (next) side_.join();  // its reads
    side_.follow();          // gradients of scores
    check_launch(kernels::add_reads(
        view_, reads_.by_slot, gradients_, delta_, weights_, second_order ? y_ : nullptr, errors_, good_, table_.rows,
        scratch_, kernels::rows_are_packs<T>(s_.width, table_.rows, delta_, errors_, scratch_), stream_));
    check_launch(kernels::key_gradients(keys, keys_aligned, side_.stream()));
    no_dsub_keys_ = no_dsub_keys_ && view_.tokens(c) == 0;
  }

  // The gradients of the rows after the write, by the lists of the chunk's slots.
  void row_gradients(const Chunk& c, const kernels::WriteScale& scale) {
    const kernels::OrderedLists& lists = reads_.by_slot;
    if (c.writes)
      check_launch(kernels::list_step_sizes(lists, view_, c, scale, counts_, counts_ + lists.n, gamma_, stream_));
    const kernels::RowsAfterWrite<T> rows{.table = table_,
                                          .first_read = int32_t(reads_before(c)),
                                          .all_writes = int32_t(s_.writes),
                                          .all_wanted = need_dvalues_,
                                          .read_from = read_from(c),
                                          .dnew_rows = dnew_rows_,
                                          .gamma = gamma_,
                                          .gradients = gradients_,
                                          .list_of = list_of_};
    check_launch(kernels::gather_row_gradients(view_, c, lists, rows,
                                               kernels::rows_are_packs<T>(s_.width, table_.rows, dnew_rows_), stream_));
  }

  kernels::BackwardKeys<T> key_arguments(const Chunk& c, bool through, bool memory_moved_keys) {
    const int64_t open_bytes = view_.key_rows() * ((view_.half_width + 7) / 8);
    return {.view = view_,
            .chunk = c,
            .lists = reads_.by_key,
            .through = through,
            .list_indices = reads_.list_indices,
            .places = places(c),
            .list_scores = list_scores(c),
            .sub_keys = keys_of(c),
            .open = o_.clips() && o_.keys_move() && c.writes
                        ? saved_.open_keys.const_data_ptr<uint8_t>() + c.writes_before * open_bytes
                        : nullptr,
            .dscores = dscores_,
            .memory_terms = memory_moved_keys ? memory_terms_ : nullptr,
            .daddressing = daddressing_ && c.writes ? daddressing_ + c.writes_before : nullptr,
            .dquery = result_.query.mutable_data_ptr<T>(),
            .dsub_keys = result_.sub_keys.mutable_data_ptr<T>(),
            .theta = theta_,
            .directions = directions_,
            .alpha = alpha_,
            .beta = beta_,
            .p = reads_.p,
            .tables = tables_,
            .sum = sums_,
            .scratch = key_scratch_};
  }

  const ScanSizes& s_;
  const ScanOptions& o_;
  const SavedScan& saved_;
  const bool need_dvalues_, masked_;
  ScanInputGradients& result_;
  const cudaStream_t stream_;
  unsigned* const error_word_;
  const kernels::ScanView<T> view_;
  const T* sub_keys_;
  const kernels::Versions<T> versions_;
  const Tensor& like_;
  bool no_dsub_keys_;  // so far: the gradient of the sub-keys is zero
  const T *const dout_, *const dweights_, *const dlosses_, *const daddressing_, *const dnew_rows_;
  std::vector<Tensor> kept_;
  // Of the whole pass
  kernels::RowGradients<T> table_{};
  // Of the current chunk; m tokens
  Reads reads_{}, next_reads_{};
  int32_t *list_of_, *counts_;                     // (m, H, R); workspace
  kernels::ListGradient<T>* gradients_;            // (m, H, R)
  T *gamma_, *scores_, *weights_, *dscores_;       // (m, H, R)
  T *memory_terms_{}, *read_directions_{}, *y_{};  // (m, H, R), unless values_only
  T *delta_, *errors_;                             // (m, V)
  uint8_t* good_;                                  // (m)
  T *scratch_, *key_scratch_;
  T *theta_{}, *directions_{};       // (H, 2, P, K/2); (m, H, 2, R), if sub-keys move
  T *alpha_, *beta_;                 // (m, H, 2, R)
  kernels::AddressTables tables_{};  // if sub-keys move
  double* sums_{};                   // (H, 2, P), if sub-keys move
  SideStream side_;                  // ends first: it uses all of the above
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> chunk_scan_backward_cuda(
    std::optional<Tensor> dout, std::optional<Tensor> dweights, std::optional<Tensor> dlosses,
    std::optional<Tensor> daddressing_loss, std::optional<Tensor> dnew_rows, std::optional<Tensor> dnew_sub_keys,
    const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
    std::optional<Tensor> loss_weights, std::optional<Tensor> mask, const Tensor& new_rows, const Tensor& new_sub_keys,
    const Tensor& list_indices, const Tensor& list_scores, const Tensor& places, const Tensor& read_from,
    const Tensor& key_versions, const Tensor& open_rows, const Tensor& open_keys, int64_t topk, int64_t chunk_size,
    int64_t lookahead, std::string score, double eps, std::string activation, double temperature, double lr,
    double weight_decay, std::optional<double> grad_clip, std::string write_rule, bool values_only,
    double addressing_weight, std::string boundary, int64_t carried, bool flush, bool need_dvalues) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  check_kernel_limits(s);
  const SavedSizes z = saved_sizes(s, o);
  const SavedScan saved{new_rows,  new_sub_keys, list_indices, list_scores, places,
                        read_from, key_versions, open_rows,    open_keys};
  check_saved(saved, values, s, z);
  const CudaScope cuda(values);
  const ScanGradients grads = prepared_gradients({dout, dweights, dlosses, daddressing_loss, dnew_rows, dnew_sub_keys},
                                                 values, s, z, o.carried);
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  const auto type = values.scalar_type();
  const int64_t heads = s.keys.heads, reads = need_dvalues ? z.tokens * s.reads_per_token() : 0;
  ScanInputGradients result{make_zeros(in.values, {s.batch, s.length, heads, s.keys.key_dim()}, type),
                            make_zeros(in.values, {s.batch, s.length, s.width}, type),
                            make_zeros(in.values, {loss_weights ? s.batch : 0, s.length}, type),
                            make_zeros(in.values, {heads, 2, s.keys.sub_keys, s.keys.half_width}, type),
                            make(in.values, {reads}, ScalarType::Long),
                            make(in.values, {reads, s.width}, type)};
  if (grads.new_sub_keys) torch::stable::copy_(result.sub_keys, *grads.new_sub_keys);
  dispatch_memory(in.values, [&](auto t) {
    BackwardScan<decltype(t)>(in, s, o, saved, grads, need_dvalues, result, cuda.stream()).run();
  });
  return {prepared(result.query, query.scalar_type()),
          prepared(result.target, target.scalar_type()),
          loss_weights ? prepared(result.loss_weights, loss_weights->scalar_type()) : result.loss_weights,
          result.sub_keys,
          result.value_slots,
          result.value_rows};
}

}  // namespace

FWPKM_CUDA_LIBRARY_IMPL(m) { m.impl("chunk_scan_backward", TORCH_BOX(&chunk_scan_backward_cuda)); }

}  // namespace fwpkm
