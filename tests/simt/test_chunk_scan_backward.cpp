// backward_rows.cuh, backward_tokens.cuh and backward_keys.cuh against the plain loops of plain_backward.h, stage by
// stage.
#include "kernels/backward_tokens.cuh"
#include "plain_backward.h"
#include "stages.h"

namespace {

using namespace testing;
using namespace fwpkm::kernels;

// ----------------------------------------------------------------------------------------------------------- kernels
template <typename T>
const T* if_given(const Backward<T>& x, const Buffer<T>& buffer) {
  return x.b.given ? buffer.get() : nullptr;
}

template <typename T>
RowGradients<T> table_of(Backward<T>& x) {
  return {x.row_of.get(), x.states.get(), x.gradient_rows.get(), x.b.row_is_slot};
}

template <typename Size, typename T>
cudaError_t run_check(Backward<T>& x) {
  return check_reads<Size>(x.view(), x.chunk(), x.s.places(), x.saved_indices.get(), x.places.get(), x.read_from.get(),
                           x.list_scores.get(), x.list_indices.get(), x.slots.get(),
                           x.b.wanted ? x.slots_of_call.get() + x.s.first_place() : nullptr,
                           x.addressed() ? x.p.get() : nullptr, x.error.get(), nullptr);
}

template <typename Size, typename T>
cudaError_t run_rows_after_write(Backward<T>& x) {
  const RowsAfterWrite<T> rows{.table = table_of(x),
                               .first_read = int32_t(x.s.first_place()),
                               .all_writes = int32_t(x.all_writes()),
                               .all_wanted = x.b.wanted,
                               .read_from = x.read_from.get(),
                               .dnew_rows = if_given(x, x.dnew_rows),
                               .gamma = x.gamma.get(),
                               .gradients = x.gradients.get(),
                               .list_of = x.list_of.get()};
  return gather_row_gradients<Size>(x.view(), x.chunk(), Lists(slot_lists(x), x.m * x.n), rows,
                                    rows_are_packs<T>(x.width, rows.table.rows, x.dnew_rows.get()), nullptr);
}

template <typename Size, typename T>
cudaError_t run_tokens(Backward<T>& x) {
  const BackwardTokens<T> tokens{.view = x.view(),
                                 .chunk = x.chunk(),
                                 .versions = x.versions(),
                                 .list_indices = x.list_indices.get(),
                                 .slots = x.slots.get(),
                                 .places = x.places.get(),
                                 .read_from = x.read_from.get(),
                                 .list_scores = x.list_scores.get(),
                                 .list_of = x.list_of.get(),
                                 .gradients = x.gradients.get(),
                                 .gradient_rows = x.gradient_rows.get(),
                                 .open = x.open(),
                                 .dout = if_given(x, x.dout),
                                 .dweights = if_given(x, x.dweights),
                                 .dlosses = if_given(x, x.dlosses),
                                 .directions = x.second_order() ? x.directions.get() : nullptr,
                                 .scores = x.scores.get(),
                                 .weights = x.weights.get(),
                                 .dscores = x.dscores.get(),
                                 .memory_terms = x.memory_moved_keys() ? x.memory_terms.get() : nullptr,
                                 .read_directions = x.read_directions.get(),
                                 .y = x.y.get(),
                                 .delta = x.delta.get(),
                                 .errors = x.errors.get(),
                                 .good = x.good.get(),
                                 .dtarget = x.dtarget.get(),
                                 .dloss_weights = x.s.gated ? x.dloss_weights.get() : nullptr};
  const cudaError_t error = backward_tokens<Size>(
      tokens,
      rows_are_packs<T>(x.width, x.values.get(), x.log.get(), tokens.gradient_rows, x.target.get(), x.dout.get(),
                        tokens.delta, tokens.errors, tokens.dtarget),
      nullptr);
  for (int64_t i = 0; i < x.m * x.width; ++i)
    if (!x.good[i / x.width]) x.errors[i] = NAN;  // as plain_tokens has it
  return error;
}

template <typename Size, typename T>
cudaError_t run_add_reads(Backward<T>& x) {
  const int32_t reads = int32_t(x.m * x.n);
  Buffer<T> scratch(ordered_sums_scratch(reads, x.width));
  return add_reads<Size>(
      x.view(), Lists(slot_lists(x), reads), x.gradients.get(), x.delta.get(), x.weights.get(),
      x.second_order() ? x.y.get() : nullptr, x.errors.get(), x.good.get(), x.gradient_rows.get(), scratch.get(),
      rows_are_packs<T>(x.width, x.gradient_rows.get(), x.delta.get(), x.errors.get(), scratch.get()), nullptr);
}

template <typename Size, typename T>
cudaError_t run_rows_of_reads(Backward<T>& x) {
  return finish_rows_of_reads<Size>(x.view(), table_of(x), x.all_reads, x.slots_of_call.get(), x.value_rows.get(),
                                    rows_are_packs<T>(x.width, x.gradient_rows.get(), x.value_rows.get()), nullptr);
}

template <typename Size, typename T, bool kDirections>
cudaError_t run_keys(Backward<T>& x) {
  const Shape& s = x.s;
  const int32_t entries = int32_t(2 * x.m * x.n);
  Buffer<T> scratch(column_sums_scratch<T, Size>(entries, 2 * s.heads, s.half_width));
  const Lists lists(key_lists(x), entries);
  const BackwardKeys<T> keys{.view = x.view(),
                             .chunk = x.chunk(),
                             .lists = lists,
                             .through = x.through(),
                             .list_indices = x.list_indices.get(),
                             .places = x.places.get(),
                             .list_scores = x.list_scores.get(),
                             .sub_keys = x.sub_keys.get(),
                             .open = s.clip < 0 ? nullptr : x.open_keys.get(),
                             .dscores = x.dscores.get(),
                             .memory_terms = x.memory_moved_keys() ? x.memory_terms.get() : nullptr,
                             .daddressing = if_given(x, x.daddressing),
                             .dquery = x.dquery.get(),
                             .dsub_keys = x.dsub_keys.get(),
                             .theta = x.theta.get(),
                             .directions = x.directions.get(),
                             .alpha = x.alpha.get(),
                             .beta = x.beta.get(),
                             .p = x.p.get(),
                             .tables = {x.mean.get(), x.slope.get(), x.curvature.get(), x.extra.get()},
                             .sum = x.sum.get(),
                             .scratch = scratch.get()};
  const bool aligned = rows_are_packs<T>(s.half_width, x.query.get(), keys.dquery, keys.sub_keys, keys.dsub_keys,
                                         keys.theta, keys.scratch);
  if (kDirections) return key_directions<Size>(keys, aligned, nullptr);
  const cudaError_t error = key_addresses<Size>(keys, nullptr);
  return error == cudaSuccess ? key_gradients<Size>(keys, aligned, nullptr) : error;
}

// ------------------------------------------------------------------------------------------------------------- cases
template <typename T>
void before_tokens(Backward<T>& x) {
  plain_check(x);
  plain_rows_after_write(x);
  if (x.through()) plain_directions(x);
}
template <typename Size, typename T>
void with_tokens(Backward<T>& x) {
  before_tokens(x);
  plain_tokens<Size>(x);
}

template <typename Size, typename T>
Run check(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, nullptr, plain_check<T>, run_check<Size, T>);
}
template <typename Size, typename T>
Run after_write(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, plain_check<T>, plain_rows_after_write<T>, run_rows_after_write<Size, T>);
}
template <typename Size, typename T>
Run tokens(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, before_tokens<T>, plain_tokens<Size, T>, run_tokens<Size, T>);
}
template <typename Size, typename T>
Run add(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, with_tokens<Size, T>, plain_add_reads<T>, run_add_reads<Size, T>);
}
template <typename Size, typename T>
Run of_reads(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, before_tokens<T>, plain_rows_of_reads<T>, run_rows_of_reads<Size, T>);
}
template <typename Size, typename T>
Run directions(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, plain_check<T>, plain_directions<T>, run_keys<Size, T, true>);
}
template <typename Size, typename T>
Run keys(const BackwardShape& b) {
  return make_stage<Backward<T>>(b, with_tokens<Size, T>, plain_key_gradients<Size, T>, run_keys<Size, T, false>);
}

using Normal = LaunchSize;
struct OneBlock : Small {
  static constexpr int kMaxBlocks = 1;
};
constexpr auto kSilu = Activation::kSilu, kRelu = Activation::kRelu;
constexpr bool kYes = true;

const Shape kHot{.heads = 5, .topk = 2, .sub_keys = 2, .width = 70, .tokens = 12, .lookahead = 4};
const Shape kMany{.heads = 7, .topk = 10, .sub_keys = 11, .width = 300, .batch = 1, .tokens = 2};
const Shape kClipped{.heads = 2, .width = 21, .masked = kYes, .keep = 0.9, .clip = 1};
const Shape kShifted{.width = 136, .keep = 0.9, .clip = 1, .offset = 1};
const Shape kCarried{.heads = 2, .tokens = 5, .lookahead = 3, .boundary = kCarry, .masked = kYes};
const Shape kTail{.lookahead = 7, .keep = 0.9};
const Shape kOdd{.heads = 3, .width = 136, .idw = kYes, .odd = 3, .astray = 2};
const Shape kMemories{.heads = 2, .batch = 5, .idw = kYes, .masked = kYes, .keep = 0.9, .odd = 4, .memories = 3};
const Shape kTiny{.width = 136, .batch = 1, .tokens = 3};

const Register kCases({
    {"backward_check", [] { return check<Normal, float>({.s = {.heads = 3, .odd = 3}}); }},
    {"backward_check_wanted", [] { return check<Small, double>({.s = {.topk = 12, .sub_keys = 12}, .wanted = kYes}); }},
    {"backward_check_broken",
     [] { return check<Small, float>({.s = {.heads = 2, .tokens = 9}, .wanted = kYes, .broken = kYes}); }},
    {"backward_check_memories", [] { return check<Small, float>({.s = kMemories, .wanted = kYes, .broken = kYes}); }},
    {"backward_check_no_tokens", [] { return check<Small, float>({.s = {.batch = 0}}); }},

    {"after_write", [] { return after_write<Normal, float>({.s = {.width = 136}}); }},
    {"after_write_double", [] { return after_write<Small, double>({.s = {.keep = 0.9}, .row_is_slot = false}); }},
    {"after_write_shifted", [] { return after_write<Small, float>({.s = kShifted, .wanted = kYes}); }},
    {"after_write_nothing_given",
     [] { return after_write<Small, float>({.s = {.width = 9, .keep = 0.9}, .given = false, .row_is_slot = false}); }},
    {"after_write_no_decay", [] { return after_write<Small, float>({.given = false, .wanted = kYes}); }},
    {"after_write_tail", [] { return after_write<Small, float>({.s = kTail, .writes = false}); }},
    {"after_write_odd", [] { return after_write<Small, float>({.s = kOdd, .row_is_slot = false}); }},
    {"after_write_memories", [] { return after_write<Small, float>({.s = kMemories, .row_is_slot = false}); }},
    {"after_write_no_tokens", [] { return after_write<Small, float>({.s = {.batch = 0}}); }},
    {"small_after_write", [] { return after_write<OneBlock, float>({.s = {.width = 136, .keep = 0.9}}); }},

    {"tokens_float", [] { return tokens<Normal, float>({.s = {.width = 136}}); }},
    {"tokens_double", [] { return tokens<Small, double>({.s = {.heads = 2, .width = 72, .idw = kYes}}); }},
    {"tokens_one_read", [] { return tokens<Small, float>({.s = {.topk = 1, .width = 3}}); }},
    {"tokens_silu", [] { return tokens<Small, float>({.s = {.width = 11, .gated = false, .activation = kSilu}}); }},
    {"tokens_relu", [] { return tokens<Small, double>({.s = {.heads = 2, .activation = kRelu}}); }},
    {"tokens_clipped", [] { return tokens<Small, float>({.s = kClipped}); }},
    {"tokens_shifted", [] { return tokens<Small, double>({.s = kShifted, .wanted = kYes}); }},
    {"tokens_64", [] { return tokens<Small, float>({.s = {.heads = 8, .topk = 8, .sub_keys = 9, .tokens = 2}}); }},
    {"tokens_70", [] { return tokens<Normal, float>({.s = kMany}); }},
    {"tokens_70_odd_width",
     [] {
       return tokens<Small, double>({.s = {.heads = 70, .topk = 1, .width = 133, .tokens = 2, .values_only = kYes}});
     }},
    {"tokens_wide", [] { return tokens<Small, float>({.s = {.width = 521, .tokens = 2, .masked = kYes}}); }},
    {"tokens_carried", [] { return tokens<Small, float>({.s = kCarried, .row_is_slot = false}); }},
    {"tokens_first", [] { return tokens<Small, float>({.s = {.before = 0, .boundary = kCarryFirst}}); }},
    {"tokens_tail", [] { return tokens<Small, float>({.s = kTail, .writes = false}); }},
    {"tokens_values_only", [] { return tokens<Small, float>({.s = {.width = 72, .values_only = kYes}}); }},
    {"tokens_first_order", [] { return tokens<Small, float>({.s = {.clip = 1}, .through = false}); }},
    {"tokens_nothing_given", [] { return tokens<Small, float>({.s = {.keep = 0.9}, .given = false}); }},
    {"tokens_odd", [] { return tokens<Small, float>({.s = kOdd}); }},
    {"tokens_broken", [] { return tokens<Small, double>({.s = {.tokens = 9}, .broken = kYes}); }},
    {"tokens_memories", [] { return tokens<Small, float>({.s = kMemories}); }},
    {"tokens_no_tokens", [] { return tokens<Small, float>({.s = {.batch = 0}}); }},
    {"small_tokens", [] { return tokens<OneBlock, float>({.s = kTiny}); }},
    {"small_tokens_double", [] { return tokens<OneBlock, double>({.s = kTiny}); }},

    {"add_reads", [] { return add<Normal, float>({.s = {.width = 136}}); }},
    {"add_reads_double", [] { return add<Small, double>({.s = {.keep = 0.9}, .wanted = kYes, .row_is_slot = false}); }},
    {"add_reads_shifted", [] { return add<Small, float>({.s = kShifted, .wanted = kYes}); }},
    {"add_reads_hot", [] { return add<Small, float>({.s = kHot, .wanted = kYes}); }},
    {"add_reads_values_only", [] { return add<Small, float>({.s = {.values_only = kYes}, .given = false}); }},
    {"add_reads_tail", [] { return add<Small, float>({.s = kTail, .wanted = kYes, .writes = false}); }},
    {"add_reads_odd", [] { return add<Small, double>({.s = kOdd, .wanted = kYes}); }},
    {"small_add_reads", [] { return add<OneBlock, float>({.s = kTiny, .wanted = kYes}); }},

    {"add_reads_memories", [] { return add<Small, float>({.s = kMemories, .wanted = kYes}); }},

    {"rows_of_reads", [] { return of_reads<Normal, float>({.s = {.width = 136}, .wanted = kYes}); }},
    {"rows_of_reads_double",
     [] { return of_reads<Small, double>({.s = {.keep = 0.9}, .wanted = kYes, .row_is_slot = false}); }},
    {"rows_of_reads_shifted", [] { return of_reads<Small, float>({.s = kShifted, .wanted = kYes}); }},
    {"rows_of_reads_odd", [] { return of_reads<Small, float>({.s = kOdd, .wanted = kYes}); }},

    {"directions_memories", [] { return directions<Small, float>({.s = kMemories}); }},
    {"directions_float", [] { return directions<Normal, float>({.s = {.half_width = 136, .batch = 1}}); }},
    {"directions_idw", [] { return directions<Small, double>({.s = {.heads = 2, .half_width = 7, .idw = kYes}}); }},
    {"directions_clipped", [] { return directions<Small, float>({.s = {.half_width = 8, .keep = 0.9, .clip = 1}}); }},
    {"directions_shifted", [] { return directions<Small, float>({.s = {.half_width = 8, .idw = kYes, .offset = 1}}); }},
    {"directions_odd", [] { return directions<Small, float>({.s = kOdd}); }},
    {"directions_no_tokens", [] { return directions<Small, float>({.s = {.batch = 0, .keep = 0.9}}); }},

    {"directions_shared",
     [] {
       return directions<Shared<Normal, 16>, float>({.s = {.topk = 8, .sub_keys = 9, .half_width = 136, .idw = kYes}});
     }},
    {"directions_shared_double",
     [] {
       return directions<Shared<Small, 64>, double>(
           {.s = {.heads = 3, .topk = 8, .sub_keys = 9, .half_width = 18, .tokens = 12, .idw = kYes, .clip = 1}});
     }},
    {"directions_shared_dot",
     [] {
       return directions<Shared<Small>, float>(
           {.s = {.heads = 2, .topk = 13, .sub_keys = 14, .half_width = 60, .batch = 3, .tokens = 20}});
     }},
    {"directions_shared_carried",
     [] {
       return directions<Shared<Small, 64>, float>({.s = {.heads = 2,
                                                          .topk = 4,
                                                          .half_width = 40,
                                                          .batch = 3,
                                                          .tokens = 21,
                                                          .lookahead = 3,
                                                          .boundary = kCarry,
                                                          .masked = kYes}});
     }},
    {"directions_shared_odd",
     [] {
       return directions<Shared<Small>, float>(
           {.s = {.heads = 3, .topk = 4, .half_width = 8, .tokens = 20, .idw = kYes, .odd = 3, .astray = 2}});
     }},
    {"directions_no_room",
     [] { return directions<Shared<Small, 1, 1000>, float>({.s = {.topk = 4, .half_width = 40, .tokens = 20}}); }},
    {"small_directions",
     [] {
       return directions<Shared<OneBlock, 8>, float>({.s = {.topk = 4, .half_width = 36, .tokens = 8, .idw = kYes}});
     }},
    {"key_gradients_memories", [] { return keys<Small, float>({.s = kMemories}); }},
    {"key_gradients_memories_columns",
     [] {
       return keys<Shared<Small>, float>(
           {.s = {.heads = 2, .topk = 4, .half_width = 8, .batch = 5, .boundary = kCarry, .memories = 3}});
     }},
    {"key_gradients_float", [] { return keys<Normal, float>({.s = {.half_width = 136, .batch = 1}}); }},
    {"key_gradients_double",
     [] { return keys<Small, double>({.s = {.heads = 3, .topk = 8, .sub_keys = 9, .idw = kYes}}); }},
    {"key_gradients_idw", [] { return keys<Small, float>({.s = {.heads = 2, .half_width = 8, .idw = kYes}}); }},
    {"key_gradients_shifted",
     [] { return keys<Small, float>({.s = {.half_width = 8, .idw = kYes, .keep = 0.9, .clip = 1, .offset = 1}}); }},
    {"key_gradients_many_reads",
     [] { return keys<Small, float>({.s = {.topk = 40, .sub_keys = 41, .tokens = 2, .idw = kYes}}); }},
    {"key_gradients_carried", [] { return keys<Small, float>({.s = kCarried}); }},
    {"key_gradients_values_only", [] { return keys<Small, float>({.s = {.idw = kYes, .values_only = kYes}}); }},
    {"key_gradients_no_addressing",
     [] { return keys<Small, float>({.s = {.idw = kYes, .addressing_weight = 0}, .given = false}); }},
    {"key_gradients_not_through", [] { return keys<Small, float>({.s = {.idw = kYes}, .through = false}); }},
    {"key_gradients_of_out_alone",
     [] { return keys<Small, double>({.s = {.values_only = kYes}, .through = false, .given = false}); }},
    {"key_gradients_no_pairs",
     [] { return keys<Small, float>({.s = {.lookahead = 7, .before = 0, .boundary = kCarryFirst}}); }},
    {"key_gradients_tail", [] { return keys<Small, float>({.s = kTail, .writes = false}); }},
    {"key_gradients_odd", [] { return keys<Small, float>({.s = kOdd}); }},
    {"key_gradients_no_tokens", [] { return keys<Small, float>({.s = {.batch = 0}}); }},
    {"key_gradients_hot", [] { return keys<Small, float>({.s = kHot}); }},
    {"key_gradients_shared",
     [] { return keys<Shared<Normal, 64>, float>({.s = {.topk = 8, .sub_keys = 9, .half_width = 136, .idw = kYes}}); }},
    {"key_gradients_shared_double",
     [] {
       return keys<Shared<Small, 64>, double>(
           {.s = {.heads = 3, .topk = 8, .sub_keys = 9, .tokens = 12, .idw = kYes, .clip = 1}});
     }},
    {"key_gradients_shared_dot",
     [] {
       return keys<Shared<Small>, float>(
           {.s = {.heads = 2, .topk = 5, .sub_keys = 6, .half_width = 12, .batch = 3, .tokens = 20}});
     }},
    {"key_gradients_shared_narrow",
     [] {
       return keys<Shared<Small, 64, 600>, float>(
           {.s = {.heads = 2, .topk = 4, .half_width = 24, .batch = 3, .tokens = 20, .idw = kYes}});
     }},
    {"key_gradients_shared_narrow_double",
     [] {
       return keys<Shared<Small, 1, 600>, double>(
           {.s = {.topk = 9, .sub_keys = 9, .half_width = 10, .tokens = 20, .lr = 0.1}, .through = false});
     }},
    {"key_gradients_no_room",
     [] {
       return keys<Shared<Small, 1, 500>, float>({.s = {.topk = 4, .half_width = 24, .tokens = 20, .idw = kYes}});
     }},
    {"key_gradients_shared_not_through",
     [] {
       return keys<Shared<Small, 4>, float>(
           {.s = {.heads = 2, .topk = 4, .half_width = 36, .batch = 3, .tokens = 20, .idw = kYes}, .through = false});
     }},
    {"key_gradients_shared_carried",
     [] {
       return keys<Shared<Small, 64>, float>({.s = {.heads = 2,
                                                    .topk = 4,
                                                    .half_width = 40,
                                                    .batch = 3,
                                                    .tokens = 21,
                                                    .lookahead = 3,
                                                    .boundary = kCarry,
                                                    .masked = kYes}});
     }},
    {"key_gradients_shared_odd",
     [] {
       return keys<Shared<Small>, float>(
           {.s = {.heads = 3, .topk = 4, .half_width = 8, .tokens = 20, .idw = kYes, .odd = 3, .astray = 2}});
     }},
    {"small_shared_key_gradients",
     [] { return keys<Shared<OneBlock, 8>, float>({.s = {.topk = 4, .half_width = 36, .tokens = 8, .idw = kYes}}); }},
    {"small_key_gradients", [] { return keys<OneBlock, float>({.s = {.batch = 1, .tokens = 3, .idw = kYes}}); }},
});

}  // namespace
