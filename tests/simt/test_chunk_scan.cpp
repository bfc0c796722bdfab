// read_chunk.cuh, write_rows.cuh, addressing.cuh and write_keys.cuh against the plain loops of plain_chunk.h. A case is
// one stage of one chunk; the plain loops do the stages before it.
#include "kernels/read_chunk.cuh"
#include "kernels/write_keys.cuh"
#include "kernels/write_rows.cuh"
#include "stages.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

// ----------------------------------------------------------------------------------------------------------- kernels
template <typename Size, typename T>
cudaError_t launch_read(Data<T>& d) {
  return read_chunk<Size>(
      ReadArguments<T>{.view = d.view(),
                       .chunk = d.chunk(),
                       .versions = d.versions(),
                       .newest = d.s.in_place ? nullptr : d.newest.get(),
                       .scores = d.scores.get(),
                       .slots = d.slots.get(),
                       .list_indices = d.list_indices.get(),
                       .list_scores = d.list_scores.get(),
                       .p = d.addressed() ? d.p.get() : nullptr,
                       .weights = d.weights.get(),
                       .errors = d.errors.get(),
                       .good = d.good.get(),
                       .memory_terms = d.s.values_only ? nullptr : d.memory_terms.get(),
                       .read_from = d.s.in_place ? nullptr : d.read_from.get(),
                       .out = d.out.get(),
                       .own_indices = d.own_indices.get(),
                       .own_weights = d.own_weights.get(),
                       .losses = d.losses.get(),
                       .error_word = d.error.get()},
      rows_are_packs<T>(d.width, d.values.get(), d.log.get(), d.target.get(), d.out.get(), d.errors.get()), nullptr);
}

template <typename Keys>
std::vector<int32_t> all_keys(const Keys& keys, int64_t n) {
  std::vector<int32_t> all(n);
  const int stride = int(n + 2) / 3;
  for (int first = 0; first < stride; ++first) {
    int32_t some[3];
    keys.load(first, stride, int32_t(n), some);
    for (int i = first, s = 0; i < n; i += stride) all[i] = some[s++];
  }
  return all;
}

// Reads and entries can be grouped before the chunk is read as well as afterwards.
template <typename Size, typename T>
cudaError_t run_read(Data<T>& d) {
  const ReadKeys by_slot{d.slots.get(), uint32_t(d.s.heads), uint32_t(d.s.topk)};
  const EntryKeys<T> by_key{d.view(), d.chunk(), d.list_indices.get(), d.slots.get()};
  const int64_t reads = d.m * d.n;
  const auto slots = all_keys(by_slot, reads), keys = all_keys(by_key, 2 * reads);
  const cudaError_t error = launch_read<Size>(d);
  if (all_keys(by_slot, reads) != slots || all_keys(by_key, 2 * reads) != keys) return cudaErrorUnknown;
  for (int64_t i = 0; i < reads; ++i)
    if (slots[i] != d.slots[i]) return cudaErrorUnknown;
  for (int64_t l = 0; l < 2 * reads; ++l)
    if (keys[l] != d.entry_key(l)) return cudaErrorUnknown;
  return error;
}

template <typename Size, typename T>
cudaError_t run_rows(Data<T>& d) {
  const Shape& s = d.s;
  const int32_t reads = int32_t(d.m * d.n);
  const Lists lists(slot_lists(d), reads);
  Buffer<int32_t> counts(reads), kept_pairs(s.memories);
  Buffer<T> gamma(reads), scratch(ordered_sums_scratch(reads, d.width));
  unsigned* const error_word = d.error.get();
  const auto each = [](int64_t items, int64_t per_block) { return blocks_for<Size>(items, per_block); };
  if (s.in_place && s.keep != 1)
    simt::launch(decay<Size, T>, each(d.values.size(), Size::kThreads), Size::kThreads, nullptr, d.values.get(),
                 d.values.size(), T(s.keep), error_word);
  const WriteScale scale{kappa(s), s.release && s.masked && s.batch * s.pairs() > 0};
  cudaError_t error =
      list_step_sizes<Size>(lists, d.view(), d.chunk(), scale, counts.get(), kept_pairs.get(), gamma.get(), nullptr);
  const NewRows<T> output{
      .view = d.view(),
      .versions = d.versions(),
      .newest = s.in_place ? nullptr : d.newest.get(),
      .writes = s.before + 1,
      .gamma = gamma.get(),
      .to = s.in_place ? d.values.get() : d.log.get() + s.first_place() * d.width,
      .open = s.in_place || s.clip < 0 ? nullptr : d.open_rows.get() + s.first_place() * ((d.width + 7) / 8),
      .error_word = error_word};
  if (!error)
    error = ordered_sums<Size>(
        lists, ErrorTerms<T>{d.errors.get(), d.weights.get(), d.good.get(), uint32_t(d.n), d.width}, output, d.width,
        scratch.get(), rows_are_packs<T>(d.width, d.values.get(), d.log.get(), d.errors.get(), scratch.get()), nullptr);
  if (!error && !s.in_place)
    error = simt::launch(publish_rows<Size, T>, each(reads, Size::kThreads / 32), Size::kThreads, nullptr, lists,
                         int32_t(s.first_place()), d.width, d.newest.get(), d.new_slots.get(), d.log.get());
  if (!error && !s.in_place && s.keep != 1)
    error = simt::launch(finish_rows<Size, T>, each(s.places(), Size::kThreads / 32), Size::kThreads, nullptr, d.view(),
                         d.versions(), s.places(), s.before + 1, d.new_slots.get(), d.log.get(), error_word);
  return error;
}

template <typename Size, typename T>
cudaError_t run_address(Data<T>& d) {
  const AddressTables tables{d.mean.get(), d.slope.get(), d.curvature.get(), d.extra.get()};
  return address_chunk<Size>(d.view(), d.chunk(), Lists(key_lists(d), 2 * d.m * d.n), d.p.get(), d.list_scores.get(),
                             tables, nullptr);
}

template <typename Size, typename T>
cudaError_t run_keys(Data<T>& d) {
  const Shape& s = d.s;
  const int32_t entries = int32_t(2 * d.m * d.n);
  Buffer<T> scratch(column_sums_scratch<T, Size>(entries, 2 * s.heads, s.half_width));
  const KeyWrite<T> write{.sub_keys = d.sub_keys.get(),
                          .to = d.new_keys.get(),
                          .open = s.clip < 0 ? nullptr : d.open_keys.get(),
                          .loss = d.loss.get(),
                          .list_indices = d.list_indices.get(),
                          .places = d.places.get(),
                          .list_scores = d.list_scores.get(),
                          .memory_terms = s.values_only ? nullptr : d.memory_terms.get(),
                          .p = d.addressed() ? d.p.get() : nullptr,
                          .alpha = d.alpha.get(),
                          .tables = {d.mean.get(), d.slope.get(), nullptr, nullptr},
                          .scratch = scratch.get(),
                          .error_word = d.error.get()};
  return write_keys<Size>(
      d.view(), d.chunk(), Lists(key_lists(d), entries), write,
      rows_are_packs<T>(s.half_width, d.query.get(), d.sub_keys.get(), d.new_keys.get(), scratch.get()), nullptr);
}

template <typename Size, typename T>
void plain_address(Data<T>& d) {
  plain_tables<Size, T>(d, d.list_scores.get());
}

// ------------------------------------------------------------------------------------------------------------- cases
template <typename Size, typename T>
Run read(const Shape& s) {
  return make_stage<Data<T>>(s, nullptr, plain_read<Size, T>, run_read<Size, T>);
}
template <typename Size, typename T>
Run rows(const Shape& s) {
  return make_stage<Data<T>>(s, plain_read<Size, T>, plain_rows<Size, T>, run_rows<Size, T>);
}
template <typename Size, typename T>
Run address(const Shape& s) {
  return make_stage<Data<T>>(s, plain_read<Size, T>, plain_address<Size, T>, run_address<Size, T>);
}
template <typename Size, typename T>
Run keys(const Shape& s) {
  return make_stage<Data<T>>(s, plain_read<Size, T>, plain_keys<Size, T>, run_keys<Size, T>);
}

using Normal = LaunchSize;
struct OneBlock : Small {
  static constexpr int kMaxBlocks = 1;
};
constexpr auto kSilu = Activation::kSilu, kRelu = Activation::kRelu;
constexpr bool kYes = true;

const Register kCases({
    {"read_one", [] { return read<Small, float>({.topk = 1, .width = 3}); }},
    {"read_one_silu", [] { return read<Small, double>({.topk = 1, .width = 3, .activation = kSilu}); }},
    {"read_8", [] { return read<Small, float>({.topk = 8, .sub_keys = 9, .masked = kYes}); }},
    {"read_8_double", [] { return read<Small, double>({.topk = 8, .sub_keys = 9, .gated = false}); }},
    {"read_8_silu", [] { return read<Small, float>({.topk = 8, .sub_keys = 9, .activation = kSilu, .keep = 0.9}); }},
    {"read_8_relu",
     [] { return read<Small, float>({.topk = 8, .sub_keys = 9, .boundary = kCarry, .activation = kRelu}); }},
    {"read_40", [] { return read<Normal, float>({.heads = 5, .topk = 8, .sub_keys = 9, .width = 136}); }},
    {"read_40_silu",
     [] { return read<Normal, double>({.heads = 5, .topk = 8, .sub_keys = 9, .width = 136, .activation = kSilu}); }},
    {"read_40_relu",
     [] { return read<Small, double>({.heads = 5, .topk = 8, .sub_keys = 9, .width = 72, .activation = kRelu}); }},
    {"read_64", [] { return read<Small, float>({.heads = 8, .topk = 8, .sub_keys = 9, .tokens = 2}); }},
    {"read_70",
     [] { return read<Normal, float>({.heads = 7, .topk = 10, .sub_keys = 11, .width = 300, .tokens = 2}); }},
    {"read_70_double",
     [] { return read<Normal, double>({.heads = 70, .topk = 1, .width = 300, .tokens = 2, .in_place = kYes}); }},
    {"read_70_relu", [] { return read<Small, float>({.heads = 7, .topk = 10, .sub_keys = 11, .activation = kRelu}); }},
    {"read_70_silu_shifted",
     [] { return read<Small, float>({.heads = 70, .topk = 1, .activation = kSilu, .offset = 1}); }},
    {"read_1024",
     [] { return read<Small, float>({.heads = 8, .topk = 128, .sub_keys = 128, .batch = 1, .tokens = 2}); }},
    {"read_wide", [] { return read<Small, float>({.width = 521, .tokens = 2, .masked = kYes}); }},
    {"read_shifted", [] { return read<Small, float>({.width = 136, .offset = 1}); }},
    {"read_shifted_double", [] { return read<Small, double>({.width = 136, .keep = 0.9, .offset = 1}); }},
    {"read_in_place", [] { return read<Small, float>({.boundary = kCarry, .in_place = kYes, .masked = kYes}); }},
    {"read_in_place_decay", [] { return read<Small, double>({.in_place = kYes, .keep = 0.9}); }},
    {"read_carry", [] { return read<Small, float>({.tokens = 5, .lookahead = 3, .boundary = kCarry, .keep = 0.9}); }},
    {"read_first_carry", [] { return read<Small, float>({.lookahead = 2, .before = 0, .boundary = kCarry}); }},
    {"read_later_carry", [] { return read<Small, float>({.lookahead = 2, .boundary = kCarryLater, .masked = kYes}); }},
    {"read_first", [] { return read<Small, float>({.before = 0, .keep = 0.9}); }},
    {"read_no_pairs", [] { return read<Small, float>({.lookahead = 7}); }},
    {"read_no_lookahead", [] { return read<Small, float>({.lookahead = 0}); }},
    {"read_no_tokens", [] { return read<Small, float>({.batch = 0}); }},
    {"read_values_only", [] { return read<Small, float>({.width = 136, .values_only = kYes}); }},
    {"read_odd", [] { return read<Small, float>({.heads = 3, .tokens = 9, .masked = kYes, .odd = 2}); }},
    {"read_odd_in_place", [] { return read<Small, double>({.boundary = kCarry, .in_place = kYes, .odd = 3}); }},
    {"read_odd_70",
     [] { return read<Small, float>({.heads = 70, .topk = 1, .width = 133, .values_only = kYes, .odd = 3}); }},
    {"read_astray", [] { return read<Small, float>({.width = 136, .odd = 4, .astray = 2}); }},
    {"read_astray_silu",
     [] { return read<Small, double>({.gated = false, .activation = kSilu, .keep = 0.9, .astray = 3}); }},
    {"read_large", [] { return read<Small, float>({.activation = kRelu, .keep = 1.5, .large = kYes}); }},
    {"read_memories",
     [] {
       return read<Small, float>({.batch = 5, .before = 1, .masked = kYes, .keep = 0.9, .odd = 4, .memories = 3});
     }},
    {"read_memories_in_place",
     [] { return read<Small, double>({.batch = 4, .boundary = kCarry, .in_place = kYes, .memories = 4}); }},
    {"small_read", [] { return read<OneBlock, float>({.width = 136, .tokens = 3, .masked = kYes, .odd = 5}); }},

    {"rows_float", [] { return rows<Normal, float>({.width = 136, .tokens = 8}); }},
    {"rows_double", [] { return rows<Small, double>({.heads = 2, .width = 72, .masked = kYes, .clip = 0.1}); }},
    {"rows_narrow", [] { return rows<Small, float>({.width = 3, .boundary = kCarry, .clip = 0.1}); }},
    {"rows_narrow_double", [] { return rows<Small, double>({.width = 11, .keep = 0.9, .clip = 0.1}); }},
    {"rows_shifted", [] { return rows<Small, float>({.width = 20, .keep = 0.9, .clip = 0.05, .offset = 1}); }},
    {"rows_clip_zero", [] { return rows<Small, float>({.clip = 0}); }},
    {"rows_release", [] { return rows<Small, float>({.heads = 3, .release = kYes}); }},
    {"rows_release_mask",
     [] { return rows<Small, double>({.heads = 2, .tokens = 40, .lookahead = 5, .masked = kYes, .release = kYes}); }},
    {"rows_release_carry",
     [] { return rows<Small, float>({.lookahead = 3, .boundary = kCarry, .masked = kYes, .release = kYes}); }},
    {"rows_carry", [] { return rows<Small, float>({.tokens = 3, .lookahead = 3, .boundary = kCarry, .keep = 0.9}); }},
    {"rows_first_carry",
     [] { return rows<Small, float>({.before = 0, .boundary = kCarry, .release = kYes, .keep = 0.9}); }},
    {"rows_later_carry", [] { return rows<Small, float>({.lookahead = 2, .boundary = kCarryLater, .release = kYes}); }},
    {"rows_in_place", [] { return rows<Small, float>({.in_place = kYes, .masked = kYes, .clip = 0.1}); }},
    {"rows_in_place_decay", [] { return rows<Small, double>({.width = 6, .in_place = kYes, .keep = 0.9}); }},
    {"rows_no_pairs", [] { return rows<Small, float>({.lookahead = 7, .masked = kYes, .release = kYes}); }},
    {"rows_odd", [] { return rows<Small, float>({.heads = 2, .masked = kYes, .clip = 0.1, .odd = 3, .astray = 3}); }},
    {"rows_all_odd", [] { return rows<Small, float>({.batch = 1, .tokens = 2, .before = 1, .odd = 1}); }},
    {"rows_overflow", [] { return rows<Small, float>({.width = 20, .release = kYes, .lr = 3e38, .clip = 5}); }},
    {"rows_overflow_in_place",
     [] { return rows<Small, float>({.width = 7, .in_place = kYes, .release = kYes, .lr = 3e38}); }},
    {"rows_decay_overflow", [] { return rows<Small, float>({.keep = 1.5, .clip = 0.1, .large = kYes}); }},
    {"rows_decay_overflow_in_place",
     [] { return rows<Small, double>({.in_place = kYes, .keep = 1.5, .large = kYes}); }},
    {"rows_hot", [] { return rows<Small, float>({.heads = 70, .topk = 1, .sub_keys = 1, .tokens = 8, .clip = 0.1}); }},
    {"rows_hot_carry",
     [] {
       return rows<Small, double>({.heads = 5,
                                   .topk = 2,
                                   .sub_keys = 2,
                                   .width = 70,
                                   .tokens = 6,
                                   .lookahead = 4,
                                   .boundary = kCarry,
                                   .odd = 6});
     }},
    {"rows_memories",
     [] { return rows<Small, float>({.batch = 5, .before = 1, .keep = 0.9, .clip = 0.1, .odd = 4, .memories = 3}); }},
    {"rows_memories_release_mask",
     [] { return rows<Small, double>({.batch = 5, .tokens = 20, .masked = kYes, .release = kYes, .memories = 3}); }},
    {"rows_memories_in_place",
     [] {
       return rows<Small, float>(
           {.batch = 4, .boundary = kCarry, .in_place = kYes, .release = kYes, .keep = 0.9, .memories = 4});
     }},
    {"small_rows", [] { return rows<OneBlock, float>({.batch = 1, .tokens = 3, .clip = 0.1}); }},

    {"address_float", [] { return address<Normal, float>({}); }},
    {"address_double", [] { return address<Small, double>({.heads = 3, .topk = 40, .sub_keys = 41, .tokens = 2}); }},
    {"address_carry", [] { return address<Small, float>({.heads = 2, .lookahead = 2, .boundary = kCarry, .odd = 3}); }},
    {"address_no_tokens", [] { return address<Small, float>({.batch = 0}); }},
    {"address_memories",
     [] { return address<Small, float>({.heads = 2, .batch = 5, .boundary = kCarry, .odd = 3, .memories = 3}); }},
    {"small_address_memories",
     [] { return address<OneBlock, double>({.topk = 2, .sub_keys = 2, .batch = 3, .tokens = 12, .memories = 3}); }},
    {"small_address", [] { return address<OneBlock, float>({.topk = 2, .sub_keys = 2, .batch = 1, .tokens = 40}); }},

    {"keys_float", [] { return keys<Normal, float>({.half_width = 136, .batch = 1}); }},
    {"keys_double", [] { return keys<Small, double>({.heads = 3, .topk = 8, .sub_keys = 9, .idw = kYes}); }},
    {"keys_idw", [] { return keys<Small, float>({.heads = 2, .half_width = 8, .idw = kYes, .clip = 1e-3}); }},
    {"keys_idw_shifted", [] { return keys<Small, float>({.half_width = 8, .idw = kYes, .keep = 0.9, .offset = 1}); }},
    {"keys_clip", [] { return keys<Small, double>({.sub_keys = 20, .half_width = 7, .keep = 0.9, .clip = 1e-3}); }},
    {"keys_many_reads", [] { return keys<Small, float>({.topk = 40, .sub_keys = 41, .tokens = 2, .idw = kYes}); }},
    {"keys_carry",
     [] { return keys<Small, float>({.heads = 2, .lookahead = 2, .boundary = kCarry, .idw = kYes, .masked = kYes}); }},
    {"keys_values_only", [] { return keys<Small, float>({.heads = 2, .values_only = kYes}); }},
    {"keys_no_addressing", [] { return keys<Small, float>({.idw = kYes, .addressing_weight = 0}); }},
    {"keys_only_decay", [] { return keys<Small, float>({.values_only = kYes, .keep = 0.9, .addressing_weight = 0}); }},
    {"keys_no_pairs", [] { return keys<Small, float>({.lookahead = 7, .before = 0, .boundary = kCarryFirst}); }},
    {"keys_odd", [] { return keys<Small, float>({.heads = 3, .idw = kYes, .clip = 1e-3, .odd = 2, .astray = 3}); }},
    {"keys_all_odd", [] { return keys<Small, double>({.batch = 1, .tokens = 2, .before = 1, .odd = 1}); }},
    {"keys_no_tokens", [] { return keys<Small, float>({.batch = 0, .keep = 0.9}); }},
    {"keys_overflow", [] { return keys<Small, float>({.half_width = 9, .lr = 3e38, .addressing_weight = 100}); }},
    {"keys_decay_overflow",
     [] { return keys<Small, float>({.topk = 2, .sub_keys = 20, .keep = 1.5, .clip = 1e-3, .large = kYes}); }},
    {"keys_columns", [] { return keys<Shared<Normal>, float>({.topk = 8, .sub_keys = 9, .half_width = 136}); }},
    {"keys_columns_double",
     [] { return keys<Shared<Small>, double>({.heads = 3, .topk = 8, .sub_keys = 9, .idw = kYes, .clip = 1e-3}); }},
    {"keys_columns_clip",
     [] {
       return keys<Shared<Small>, float>(
           {.heads = 2, .topk = 4, .sub_keys = 20, .half_width = 20, .idw = kYes, .keep = 0.9, .clip = 1e-3});
     }},
    {"keys_columns_parts",
     [] {
       return keys<Shared<Small, 64>, float>(
           {.topk = 40, .sub_keys = 41, .half_width = 12, .tokens = 20, .idw = kYes, .clip = 1e-3});
     }},
    {"keys_columns_carry",
     [] {
       return keys<Shared<Small>, float>({.heads = 2,
                                          .topk = 4,
                                          .half_width = 8,
                                          .batch = 3,
                                          .tokens = 9,
                                          .lookahead = 2,
                                          .boundary = kCarry,
                                          .idw = kYes,
                                          .masked = kYes});
     }},
    {"keys_columns_odd",
     [] {
       return keys<Shared<Small, 16>, float>({.heads = 3,
                                              .topk = 8,
                                              .sub_keys = 9,
                                              .half_width = 8,
                                              .tokens = 20,
                                              .idw = kYes,
                                              .clip = 1e-3,
                                              .odd = 2,
                                              .astray = 3});
     }},
    {"keys_columns_overflow",
     [] { return keys<Shared<Small>, float>({.topk = 4, .half_width = 12, .lr = 3e38, .addressing_weight = 100}); }},
    {"keys_memories",
     [] {
       return keys<Small, float>(
           {.heads = 2, .half_width = 8, .batch = 5, .idw = kYes, .keep = 0.9, .clip = 1e-3, .memories = 3});
     }},
    {"keys_memories_columns",
     [] {
       return keys<Shared<Small>, float>({.heads = 2, .topk = 4, .half_width = 8, .batch = 5, .odd = 4, .memories = 3});
     }},
    {"keys_memories_no_addressing",
     [] { return keys<Small, double>({.batch = 3, .idw = kYes, .addressing_weight = 0, .memories = 3}); }},
    {"small_keys_memories",
     [] { return keys<OneBlock, float>({.topk = 2, .sub_keys = 2, .half_width = 3, .batch = 3, .memories = 3}); }},
    {"keys_hot",
     [] {
       return keys<Small, float>({.topk = 1,
                                  .sub_keys = 1,
                                  .half_width = 3,
                                  .width = 3,
                                  .tokens = 530,
                                  .activation = kSilu,
                                  .addressing_weight = 0});
     }},
});

}  // namespace
