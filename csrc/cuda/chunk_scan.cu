// torch.ops.fwpkm.chunk_scan and chunk_scan_ on CUDA: check, allocate, launch chunk by chunk, register. The host never
// waits: numbers that are not numbers are reported in the device's error word.
#include <algorithm>

#include "binding/dispatch.h"
#include "binding/stream.h"
#include "cuda/errors.h"
#include "cuda/scan.h"
#include "cuda/search.h"
#include "cuda/side_stream.h"
#include "kernels/read_chunk.cuh"
#include "kernels/write_keys.cuh"
#include "kernels/write_rows.cuh"

namespace fwpkm {
namespace {

// Both operators run the same kernels: chunk_scan puts new rows into a log and leaves the memory alone, chunk_scan_
// puts them where the old ones were.
template <typename T>
class ForwardScan {
 public:
  ForwardScan(const ScanInputs& in, const ScanSizes& s, const ScanOptions& o, ScanOutputs& r, bool in_place,
              cudaStream_t stream)
      : s_(s),
        o_(o),
        r_(r),
        in_place_(in_place),
        masked_(in.mask.has_value()),
        stream_(stream),
        error_word_(error_word()),
        view_(scan_view<T>(in, s, o)),
        values_(const_cast<T*>(in.values.const_data_ptr<T>())),
        sub_keys_(const_cast<T*>(in.sub_keys.const_data_ptr<T>())),
        keys_(sub_keys_),
        log_(in_place ? nullptr : r.new_rows.mutable_data_ptr<T>()),
        versions_(versions_of<T>(s, o, values_, log_)),
        side_(stream, works_apart(s)) {
    const int64_t most = most_tokens(s), n = s.reads_per_token();
    const auto type = in.values.scalar_type();
    const auto buffer = [&](int64_t size, ScalarType t) { return make(in.values, {size}, t); };
    slots_ = buffer(most * n, ScalarType::Int);
    scores_ = buffer(most * n, type);
    weights_ = buffer(most * n, type);
    good_ = buffer(most, ScalarType::Byte);
    search_ = buffer(kernels::search_workspace<T>(most, s.keys.heads, s.keys.sub_keys), ScalarType::Byte);
    if (in_place) {
      list_indices_ = buffer(2 * most * n, ScalarType::Int);
      list_scores_ = buffer(2 * most * n, type);
      places_ = buffer(most * n, ScalarType::Int);
    }
    if (s.writes == 0) return;
    errors_ = buffer(most * s.width, type);
    if (!o.values_only) memory_terms_ = buffer(most * n, type);
    for (Tensor* t : {&slot_lists_, &other_slot_lists_})
      *t = buffer(kernels::ordered_lists_workspace(int32_t(most * n)), ScalarType::Int);
    scratch_ = buffer(kernels::ordered_sums_scratch(int32_t(most * n), s.width), type);
    counts_ = buffer(most * n + 1, ScalarType::Int);  // and the number of pairs
    gamma_ = buffer(most * n, type);
    if (!in_place) newest_ = make_zeros(in.values, {s.slots}, ScalarType::Int);
    if (!o.keys_move()) return;
    key_lists_ = buffer(kernels::ordered_lists_workspace(int32_t(2 * most * n)), ScalarType::Int);
    key_scratch_ =
        buffer(kernels::column_sums_scratch<T>(int32_t(2 * most * n), 2 * s.keys.heads, s.keys.half_width), type);
    if (o.addressing_weight != 0) p_ = buffer(2 * most * n, type);
    alpha_ = buffer(2 * most * n, type);
    tables_ = buffer(2 * view_.table_size(), ScalarType::Double);
    if (in_place) other_keys_ = make(in.sub_keys, {key_count()}, type);
  }

  // The side has what sub-keys wait for, many short launches: searching, sorting, the sub-keys' step. The current
  // stream has the rows. So the search of the next chunk, which needs no row of this one, need not wait for the rows'
  // step.
  void run(Tensor& sub_keys) {
    const auto chunks = chunks_of(s_);
    side_.follow();
    for (size_t i = 0; i < chunks.size(); ++i) {
      search(chunks[i]);
      side_.join();  // slots
      read(chunks[i]);
      if (!chunks[i].writes) break;  // a partial chunk, and the last
      const auto [by_slot, by_key] = build_lists(chunks[i]);
      side_.follow();  // what was read; and that slots and scores have been used
      side_.join();    // lists
      write_rows(chunks[i], by_slot, write_scale_of(s_.steps[i], s_, o_, masked_));
      if (o_.keys_move()) write_keys(chunks[i], by_key);
    }
    side_.join();
    finish(sub_keys);
  }

 private:
  using Size = kernels::LaunchSize;
  using Chunk = kernels::Chunk;

  // Of `saved`, which holds `per_token` elements of every token of the scan, the part of one chunk; in place,
  // `scratch`.
  template <typename E>
  E* part(Tensor& saved, Tensor& scratch, const Chunk& c, int64_t per_token) {
    return in_place_ ? scratch.mutable_data_ptr<E>()
                     : saved.mutable_data_ptr<E>() + s_.batch * c.tokens_before * per_token;
  }
  int32_t* list_indices(const Chunk& c) { return part<int32_t>(r_.list_indices, list_indices_, c, 2 * view_.reads()); }
  T* list_scores(const Chunk& c) { return part<T>(r_.list_scores, list_scores_, c, 2 * view_.reads()); }
  int32_t* places(const Chunk& c) { return part<int32_t>(r_.places, places_, c, view_.reads()); }
  // Null where a scan has no such buffer.
  template <typename E>
  static E* pointer(Tensor& t) {
    return t.defined() ? t.mutable_data_ptr<E>() : nullptr;
  }
  int64_t key_count() const { return view_.key_rows() * view_.half_width; }
  T* memory_terms() { return pointer<T>(memory_terms_); }
  T* p() { return pointer<T>(p_); }
  int32_t* newest() { return pointer<int32_t>(newest_); }

  void search(const Chunk& c) {
    const kernels::ProductKeySearch<T> search{.query = view_.query,
                                              .rows = view_.rows(c),
                                              .sub_keys = keys_,
                                              .heads = view_.heads,
                                              .num_sub_keys = view_.num_sub_keys,
                                              .half_width = view_.half_width,
                                              .topk = view_.topk,
                                              .idw = view_.idw,
                                              .eps = view_.eps,
                                              .workspace = search_.mutable_data_ptr(),
                                              .list_indices = list_indices(c),
                                              .list_scores = list_scores(c),
                                              .places = places(c),
                                              .slots = slots_.mutable_data_ptr<int32_t>(),
                                              .scores = scores_.mutable_data_ptr<T>(),
                                              .errors = error_word_};
    check_cuda(search_product_keys(search, side_.stream()), "search_product_keys");
  }

  void read(const Chunk& c) {
    const kernels::ReadArguments<T> arguments{
        .view = view_,
        .chunk = c,
        .versions = versions_,
        .newest = newest(),
        .scores = scores_.const_data_ptr<T>(),
        .slots = slots_.mutable_data_ptr<int32_t>(),
        .list_indices = list_indices(c),
        .list_scores = list_scores(c),
        .p = c.writes ? p() : nullptr,
        .weights = weights_.mutable_data_ptr<T>(),
        .errors = pointer<T>(errors_),
        .good = good_.mutable_data_ptr<uint8_t>(),
        .memory_terms = memory_terms(),
        .read_from =
            in_place_ ? nullptr : r_.read_from.mutable_data_ptr<int32_t>() + s_.batch * c.tokens_before * view_.reads(),
        .out = r_.out.mutable_data_ptr<T>(),
        .own_indices = r_.indices.mutable_data_ptr<int32_t>(),
        .own_weights = r_.weights.mutable_data_ptr<T>(),
        .losses = r_.losses.mutable_data_ptr<T>(),
        .error_word = error_word_};
    const bool aligned =
        kernels::rows_are_packs<T>(s_.width, values_, log_, view_.target, arguments.out, arguments.errors);
    check_cuda(kernels::read_chunk(arguments, aligned, stream_), "read_chunk");
  }

  // The chunk's reads by slot; its entries by sub-key, if they move.
  std::pair<kernels::OrderedLists, kernels::OrderedLists> build_lists(const Chunk& c) {
    const int32_t reads = int32_t(view_.tokens(c) * view_.reads()), entries = o_.keys_move() ? 2 * reads : 0;
    const int32_t* const slots = slots_.const_data_ptr<int32_t>();
    std::swap(slot_lists_, other_slot_lists_);  // those of the chunk before may still be in use
    const auto by_slot = kernels::grouping(kernels::ReadKeys{slots, uint32_t(view_.heads), uint32_t(view_.topk)}, reads,
                                           int32_t(s_.slots), slot_lists_.mutable_data_ptr<int32_t>(), nullptr);
    const auto by_key = kernels::grouping(kernels::EntryKeys<T>{view_, c, list_indices(c), slots}, entries,
                                          int32_t(view_.key_rows()), pointer<int32_t>(key_lists_), nullptr);
    check_cuda(kernels::build_ordered_lists(by_slot, by_key, side_.stream()), "build_ordered_lists");
    return {by_slot.lists(), by_key.lists()};
  }

  void write_rows(const Chunk& c, const kernels::OrderedLists& lists, const kernels::WriteScale& scale) {
    const int32_t reads = lists.n;
    const int64_t first_place = s_.batch * c.tokens_before * view_.reads(), open_bytes = (s_.width + 7) / 8;
    if (in_place_ && o_.decays())
      check_cuda(simt::launch(kernels::decay<Size, T>, kernels::blocks_for<Size>(s_.slots * s_.width, Size::kThreads),
                              Size::kThreads, stream_, values_, s_.slots * s_.width, view_.keep, error_word_),
                 "decay");
    if (reads == 0) return;
    int32_t* const counts = counts_.mutable_data_ptr<int32_t>();
    T *const gamma = gamma_.mutable_data_ptr<T>(), *const to = in_place_ ? values_ : log_ + first_place * s_.width;
    check_cuda(kernels::list_step_sizes(lists, view_, c, scale, counts, counts + reads, gamma, stream_),
               "list_step_sizes");
    const T* const errors = errors_.const_data_ptr<T>();
    T* const scratch = scratch_.mutable_data_ptr<T>();
    const kernels::ErrorTerms<T> terms{errors, weights_.const_data_ptr<T>(), good_.const_data_ptr<uint8_t>(),
                                       uint32_t(view_.reads()), s_.width};
    const kernels::NewRows<T> output{.view = view_,
                                     .versions = versions_,
                                     .newest = newest(),
                                     .writes = c.writes_before + 1,
                                     .gamma = gamma,
                                     .to = to,
                                     .open = in_place_ || !o_.clips()
                                                 ? nullptr
                                                 : r_.open_rows.mutable_data_ptr<uint8_t>() + first_place * open_bytes,
                                     .error_word = error_word_};
    check_cuda(kernels::ordered_sums(lists, terms, output, s_.width, scratch,
                                     kernels::rows_are_packs<T>(s_.width, values_, log_, errors, scratch), stream_),
               "write_rows");
    if (in_place_) return;
    check_cuda(simt::launch(kernels::publish_rows<Size, T>, kernels::blocks_for<Size>(reads, Size::kThreads / 32),
                            Size::kThreads, stream_, lists, int32_t(first_place), s_.width, newest(),
                            r_.new_slots.mutable_data_ptr<int32_t>(), log_),
               "publish_rows");
  }

  void write_keys(const Chunk& c, const kernels::OrderedLists& lists) {
    T* const next = in_place_ ? keys_ == sub_keys_ ? other_keys_.mutable_data_ptr<T>() : sub_keys_
                    : c.writes_before + 1 == s_.writes
                        ? r_.new_sub_keys.mutable_data_ptr<T>()
                        : r_.key_versions.mutable_data_ptr<T>() + c.writes_before * key_count();
    double* const tables = tables_.mutable_data_ptr<double>();
    T* const scratch = key_scratch_.mutable_data_ptr<T>();
    const kernels::KeyWrite<T> write{
        .sub_keys = keys_,
        .to = next,
        .open = in_place_ || !o_.clips() ? nullptr
                                         : r_.open_keys.mutable_data_ptr<uint8_t>() +
                                               c.writes_before * view_.key_rows() * ((view_.half_width + 7) / 8),
        .loss = r_.addressing_loss.mutable_data_ptr<T>() + c.writes_before,
        .list_indices = list_indices(c),
        .places = places(c),
        .list_scores = list_scores(c),
        .memory_terms = memory_terms(),
        .p = p(),
        .alpha = alpha_.mutable_data_ptr<T>(),
        .tables = {tables, tables + view_.table_size(), nullptr, nullptr},
        .scratch = scratch,
        .error_word = error_word_};
    check_cuda(kernels::write_keys(view_, c, lists, write,
                                   kernels::rows_are_packs<T>(view_.half_width, view_.query, keys_, next, scratch),
                                   side_.stream()),
               "write_keys");
    keys_ = next;
  }

  // What is left when all chunks are done.
  void finish(Tensor& sub_keys) {
    if (!o_.keys_move())
      check_cuda(kernels::fill(r_.addressing_loss.mutable_data_ptr<T>(), s_.writes, T(0), stream_), "addressing_loss");
    if (in_place_) {
      if (keys_ != sub_keys_)
        check_cuda(
            cudaMemcpyAsync(sub_keys_, keys_, size_t(key_count()) * sizeof(T), cudaMemcpyDeviceToDevice, stream_),
            "sub_keys");
      return;
    }
    if (s_.writes == 0 || !o_.keys_move()) torch::stable::copy_(r_.new_sub_keys, sub_keys);
    if (o_.decays() && s_.places())
      check_cuda(
          simt::launch(kernels::finish_rows<Size, T>, kernels::blocks_for<Size>(s_.places(), Size::kThreads / 32),
                       Size::kThreads, stream_, view_, versions_, s_.places(), s_.writes,
                       r_.new_slots.const_data_ptr<int32_t>(), log_, error_word_),
          "finish_rows");
  }

  const ScanSizes& s_;
  const ScanOptions& o_;
  ScanOutputs& r_;
  const bool in_place_, masked_;
  const cudaStream_t stream_;
  unsigned* const error_word_;
  const kernels::ScanView<T> view_;
  T *values_, *sub_keys_, *keys_;  // keys_: as the writes so far left them
  T* const log_;
  const kernels::Versions<T> versions_;
  Tensor newest_;                                   // (S): place in the log + 1; none in place
  Tensor list_indices_, list_scores_, places_;      // in place only: nothing is saved
  Tensor other_keys_;                               // in place: writes alternate between it and the memory's own
  Tensor slots_, scores_, weights_, memory_terms_;  // (m, H, R) of the current chunk, as all that follows
  Tensor errors_, good_;                            // (m, V), (m)
  Tensor p_, alpha_;                                // (m, H, 2, R); p_: with the addressing loss
  Tensor tables_, slot_lists_, other_slot_lists_, key_lists_, scratch_, key_scratch_, counts_, gamma_, search_;
  SideStream side_;  // ends first: it uses all of the above
};

ScanResult chunk_scan_cuda(const Tensor& values, const Tensor& sub_keys, const Tensor& query, const Tensor& target,
                           std::optional<Tensor> loss_weights, std::optional<Tensor> mask, int64_t topk,
                           int64_t chunk_size, int64_t lookahead, std::string score, double eps, std::string activation,
                           double temperature, double lr, double weight_decay, std::optional<double> grad_clip,
                           std::string write_rule, bool values_only, double addressing_weight, std::string boundary,
                           int64_t carried, bool flush, bool /*sparse_grad*/) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  check_kernel_limits(s);
  const CudaScope cuda(values);
  auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  ScanOutputs r = ScanOutputs::of_scan(s, o, in.values, make);
  dispatch_memory(in.values,
                  [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, false, cuda.stream()).run(in.sub_keys); });
  return r.result(query.scalar_type());
}

ScanReading chunk_scan_in_place_cuda(Tensor values, Tensor sub_keys, const Tensor& query, const Tensor& target,
                                     std::optional<Tensor> loss_weights, std::optional<Tensor> mask, int64_t topk,
                                     int64_t chunk_size, int64_t lookahead, std::string score, double eps,
                                     std::string activation, double temperature, double lr, double weight_decay,
                                     std::optional<double> grad_clip, std::string write_rule, bool values_only,
                                     double addressing_weight, std::string boundary, int64_t carried, bool flush) {
  const ScanOptions o =
      parse_scan_options(topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip,
                         write_rule, values_only, addressing_weight, boundary, carried, flush);
  const ScanSizes s = check_scan(values, sub_keys, query, target, loss_weights, mask, o);
  check_kernel_limits(s);
  const CudaScope cuda(values);
  const auto in = ScanInputs::prepare(values, sub_keys, query, target, loss_weights, mask);
  in.check_apart_from(values, sub_keys);
  ScanOutputs r = ScanOutputs::of_reading(s, o, in.values);
  dispatch_memory(in.values, [&](auto t) { ForwardScan<decltype(t)>(in, s, o, r, true, cuda.stream()).run(sub_keys); });
  return r.reading(query.scalar_type());
}

}  // namespace

FWPKM_CUDA_LIBRARY_IMPL(m) {
  m.impl("chunk_scan", TORCH_BOX(&chunk_scan_cuda));
  m.impl("chunk_scan_", TORCH_BOX(&chunk_scan_in_place_cuda));
}

}  // namespace fwpkm
