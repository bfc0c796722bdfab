// Backward pass of a scan, the side of rows, chunk by chunk in reverse: the gradient of a slot's row stands in one row
// of a buffer, whichever version of the row it belongs to at the time.
//
//   after the write   dV'(s) = what later chunks left, with the decays of the writes between; + d(new_rows)
//                     g_s = -lr gamma_s open dV'(s)     gradient of the sum of a e over the reads of s
//   before it         dV(s) = keep dV'(s) + sum over the reads (x, r) of s of a delta_x  [ + y e_x ]
//
// Brackets: only when the memory loss moved the sub-keys. delta, y, e: backward_tokens.cuh. Sums: ordered_sums.cuh, the
// bracket in a second pass. A buffer row is written before it is read, and only slots that were read have one.
#pragma once
#include "kernels/addressing.cuh"
#include "kernels/value_gather.cuh"
#include "kernels/write_rows.cuh"

namespace fwpkm::kernels {

struct RowState {
  int32_t first;  // earliest read of the slot met so far, of all reads of the call
  int32_t step;   // the gradient belongs to the row as it was before write number `step`
  bool written;   // a later write of the slot was met
};

// Of the whole pass. A slot's buffer row is `slot` if there are no more slots than reads; else the number of the read
// at which it was first met.
template <typename T>
struct RowGradients {
  int32_t* row_of;   // (memories, S): its buffer row + 1, 0: none
  RowState* states;  // by buffer row
  T* rows;           // (min(S, reads of the call), V)
  bool row_is_slot;
};

// Of a list of one chunk's reads, at the place where it begins.
template <typename T>
struct ListGradient {
  int32_t row;    // buffer row; valid if `holds` or `wanted`
  int32_t place;  // of the new row in the log
  T scale;        // -lr gamma
  bool holds;     // the buffer row is dV', to begin with
  bool wanted;    // somebody reads dV
};

template <typename T>
__device__ __forceinline__ T power(T x, int64_t n) {
  T y = 1;
  for (; n > 0; n /= 2, x *= x)
    if (n % 2) y *= x;
  return y;
}

// dV of a list, for ordered_sums.
template <typename T>
struct RowsBefore {
  const ListGradient<T>* gradients;
  T keep;
  T* rows;
  int64_t width;
  bool adds;  // the second pass: dV is there, the sum is added

  __device__ bool wanted(const List& list) const { return gradients[list.begin].wanted; }
  struct Row {
    T* data;
    bool holds;
  };
  __device__ Row row(const List& list) const {
    const ListGradient<T> g = gradients[list.begin];
    return {rows + g.row * width, g.holds};
  }
  template <bool kAligned>
  __device__ Pack<T> before(Row row, int64_t column, int64_t width) const {
    return adds || row.holds ? load_pack<kAligned>(row.data, column, width) : filled_pack(T(0));
  }
  template <bool kAligned>
  __device__ void put(Row row, int64_t column, int64_t width, bool inside, Pack<T> sum, const Pack<T>& before) const {
    if (!inside) return;
    if (adds)
      add(sum, before);
    else if (row.holds)
      add_product(sum, keep, before);
    store_pack<kAligned>(row.data, column, width, sum);
  }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// What the forward pass saved of a chunk, as the backward pass follows it: slots of the reads, and -1 throughout for a
// token that was left out or has a number out of range. One warp per token. slots_of_call: of the chunk's reads in
// d(values), or null. p: address_weights of its lists, or null.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    checked_reads(ScanView<T> view, Chunk chunk, int64_t log_places, const int32_t* __restrict__ saved_indices,
                  const int32_t* __restrict__ places, const int32_t* __restrict__ read_from,
                  const T* __restrict__ list_scores, int32_t* __restrict__ list_indices, int32_t* __restrict__ slots,
                  int64_t* __restrict__ slots_of_call, T* __restrict__ p, unsigned* error_word) {
  const int lane = threadIdx.x % 32;
  const int32_t topk = int32_t(view.topk), n = int32_t(view.reads()), most = int32_t(view.num_sub_keys);
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), tokens = view.tokens(chunk);
  for (int64_t t = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; t < tokens; t += step) {
    const int32_t* const ids = saved_indices + t * 2 * n;
    bool valid = true;
    for (int32_t l = lane; l < 2 * n; l += 32) valid &= ids[l] >= 0 && ids[l] < most;
    for (int32_t r = lane; r < n; r += 32) {
      const int32_t place = places[t * n + r], from = read_from[t * n + r];
      valid &= place >= 0 && place < topk * topk && from >= -1 && from < log_places;
    }
    valid = __ballot_sync(kFullWarp, !valid) == 0;
    if (!valid && lane == 0 && ids[0] >= 0) report(error_word, kIndexOutOfRange);
    const int32_t first_slot = int32_t(view.memory(chunk, t) * view.num_slots);
    for (int32_t l = lane; l < 2 * n; l += 32) list_indices[t * 2 * n + l] = valid ? ids[l] : -1;
    for (int32_t r = lane; r < n; r += 32) {
      const int32_t place = places[t * n + r], list = r / topk * 2 * topk;
      const int32_t slot = valid ? first_slot + ids[list + place / topk] * most + ids[list + topk + place % topk] : -1;
      slots[t * n + r] = slot;
      if (slots_of_call) slots_of_call[t * n + r] = valid ? slot : 0;
    }
    const bool counts = valid && view.addressed(chunk, view.token(chunk, t));
    for (int64_t l = t * 2 * n; l < (t + 1) * 2 * n && p; l += topk)
      address_weights(list_scores + l, topk, counts, p + l);
  }
}

// dV' of every list, and where it is. One warp per place.
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    rows_after_write(ScanView<T> view, Chunk chunk, OrderedLists lists, RowGradients<T> table, int32_t first_read,
                     int32_t all_writes, bool all_wanted, const int32_t* __restrict__ read_from,
                     const T* __restrict__ dnew_rows, const T* __restrict__ gamma,
                     ListGradient<T>* __restrict__ gradients, int32_t* __restrict__ list_of) {
  constexpr int kPack = Pack<T>::kSize;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), width = view.width;
  const int32_t writes = int32_t(chunk.writes_before);
  for (int64_t p = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; p < lists.n; p += step) {
    const int32_t slot = lists.key[p], first = lists.entry[p];
    if (slot == lists.num_keys) return;  // no list here nor after it
    if (lane == 0) list_of[first] = lists.begin[p];
    if (lists.begin[p] != p) continue;
    const bool met = table.row_of[slot] != 0;
    const bool holds = chunk.writes && (met || dnew_rows), wanted = all_wanted || read_from[first] >= 0;
    const int32_t place = first_read + first;
    const int32_t row = met ? table.row_of[slot] - 1 : table.row_is_slot ? slot : place;
    const RowState state = met ? table.states[row] : RowState{place, 0, false};
    __syncwarp();  // all have read the tables
    if (lane == 0) {
      gradients[p] = {row, place, holds ? -view.lr * gamma[p] : T(0), holds, wanted};
      if (holds || wanted) {
        table.row_of[slot] = row + 1;
        table.states[row] = {place, writes + (wanted ? 0 : 1), state.written || chunk.writes};
      }
    }
    if (!holds) continue;
    const T decay = met && view.decays() ? power(view.keep, state.step - writes - 1) : T(1);
    if (!dnew_rows && decay == 1) continue;
    // A newest row is returned as the last write left it.
    const T decay_new = view.decays() && !state.written ? power(view.keep, all_writes - writes - 1) : T(1);
    for (int64_t column = lane * kPack; column < width; column += 32 * kPack) {
      Pack<T> sum = filled_pack(T(0));
      if (met) add_product(sum, decay, load_pack<kAligned>(table.rows + row * width, column, width));
      if (dnew_rows) add_product(sum, decay_new, load_pack<kAligned>(dnew_rows + place * width, column, width));
      store_pack<kAligned>(table.rows + row * width, column, width, sum);
    }
  }
}

// d(values): one row per read of the call; a slot's gradient stands at its first read, zeros at the others. One warp
// per read.
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    rows_of_reads(ScanView<T> view, RowGradients<T> table, int64_t reads, const int64_t* __restrict__ slots,
                  T* __restrict__ drows) {
  constexpr int kPack = Pack<T>::kSize;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), width = view.width;
  for (int64_t i = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; i < reads; i += step) {
    const int64_t row = int64_t(table.row_of[slots[i]]) - 1;
    const bool here = row >= 0 && table.states[row].first == i;
    const T decay = here && view.decays() ? power(view.keep, table.states[row].step) : T(1);
    for (int64_t column = threadIdx.x % 32 * kPack; column < width; column += 32 * kPack) {
      Pack<T> pack = filled_pack(T(0));
      if (here) add_product(pack, decay, load_pack<kAligned>(table.rows + row * width, column, width));
      store_pack<kAligned>(drows + i * width, column, width, pack);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// list_indices, p (m, H, 2, R), slots (m, H, R): see checked_reads.
template <typename Size = LaunchSize, typename T>
cudaError_t check_reads(const ScanView<T>& view, const Chunk& chunk, int64_t log_places, const int32_t* saved_indices,
                        const int32_t* places, const int32_t* read_from, const T* list_scores, int32_t* list_indices,
                        int32_t* slots, int64_t* slots_of_call, T* p, unsigned* error_word, cudaStream_t stream) {
  if (view.tokens(chunk) == 0) return cudaSuccess;
  return simt::launch(checked_reads<Size, T>, blocks_for<Size>(view.tokens(chunk), Size::kThreads / 32), Size::kThreads,
                      stream, view, chunk, log_places, saved_indices, places, read_from, list_scores, list_indices,
                      slots, slots_of_call, p, error_word);
}

template <typename T>
struct RowsAfterWrite {
  RowGradients<T> table;
  int32_t first_read, all_writes;  // reads of earlier chunks; writes of the scan
  bool all_wanted;                 // somebody wants d(values)
  const int32_t* read_from;        // (m, H, R)
  const T* dnew_rows;              // (places, V) or null
  const T* gamma;                  // by the place where a list begins; only if the chunk writes
  ListGradient<T>* gradients;      // (m*H*R)
  int32_t* list_of;                // (m, H, R): where a read's list begins
};

// lists: of the chunk's slots. `aligned`: rows_are_packs of table.rows and dnew_rows.
template <typename Size = LaunchSize, typename T>
cudaError_t gather_row_gradients(const ScanView<T>& view, const Chunk& chunk, const OrderedLists& lists,
                                 const RowsAfterWrite<T>& x, bool aligned, cudaStream_t stream) {
  if (lists.n == 0) return cudaSuccess;
  const auto kernel = aligned ? rows_after_write<Size, true, T> : rows_after_write<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(lists.n, Size::kThreads / 32), Size::kThreads, stream, view, chunk,
                      lists, x.table, x.first_read, x.all_writes, x.all_wanted, x.read_from, x.dnew_rows, x.gamma,
                      x.gradients, x.list_of);
}

// dV of every list that somebody wants. y (m, H, R), errors (m, V), good (m): of the second-order terms; y null: none.
// scratch: ordered_sums_scratch(reads of the chunk, V). `aligned`: rows_are_packs of rows, delta, errors and scratch.
template <typename Size = LaunchSize, typename T>
cudaError_t add_reads(const ScanView<T>& view, const OrderedLists& lists, const ListGradient<T>* gradients,
                      const T* delta, const T* weights, const T* y, const T* errors, const uint8_t* good, T* rows,
                      T* scratch, bool aligned, cudaStream_t stream) {
  const uint32_t reads = uint32_t(view.reads());
  const cudaError_t error = ordered_sums<Size>(lists, ReadTerms<T>{delta, weights, reads, view.width},
                                               RowsBefore<T>{gradients, view.keep, rows, view.width, false}, view.width,
                                               scratch, aligned, stream);
  if (error != cudaSuccess || !y) return error;
  return ordered_sums<Size>(lists, ErrorTerms<T>{errors, y, good, reads, view.width},
                            RowsBefore<T>{gradients, view.keep, rows, view.width, true}, view.width, scratch, aligned,
                            stream);
}

// drows (reads, V), slots (reads): of all reads of the call. `aligned`: rows_are_packs of table.rows and drows.
template <typename Size = LaunchSize, typename T>
cudaError_t finish_rows_of_reads(const ScanView<T>& view, const RowGradients<T>& table, int64_t reads,
                                 const int64_t* slots, T* drows, bool aligned, cudaStream_t stream) {
  if (reads == 0) return cudaSuccess;
  const auto kernel = aligned ? rows_of_reads<Size, true, T> : rows_of_reads<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(reads, Size::kThreads / 32), Size::kThreads, stream, view, table, reads,
                      slots, drows);
}

}  // namespace fwpkm::kernels
