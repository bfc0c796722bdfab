// What the kernels of a scan share, forward and backward: its inputs, a chunk, a token, versions of a row.
//
// The tokens of a chunk are numbered t = b * tokens() + i over the batch; its reads t * H*R + h * R + r; the entries of
// its lists ((t * H + h) * 2 + p) * R + l. m: tokens of the chunk over the batch.
#pragma once
#include "kernels/product_key_search.cuh"

namespace fwpkm::kernels {

enum class Activation { kSoftmax, kSilu, kRelu };

// One chunk: reads its tokens with one state of the memory, then (unless it is a partial tail) writes it.
struct Chunk {
  int64_t first, own, stop;             // reads tokens [first, stop) of each batch row; those from `own` on are its own
  int64_t pairs;                        // tokens [first, first + pairs) are pairs of the write
  int64_t tokens_before, pairs_before;  // per batch row, of earlier chunks
  int64_t writes_before;
  bool writes;
  __host__ __device__ int64_t tokens() const { return stop - first; }
};

struct Token {
  int64_t b, i, x;  // batch row; number within the chunk; position in the sequence
};

// A scan as its kernels see it; passed by value.
template <typename T>
struct ScanView {
  const T *query, *target, *loss_weights;  // (B, T, H, 2, K/2), (B, T, V), (B, T) or null
  const uint8_t* mask;                     // (B, T) or null; any byte but 0 is true
  int64_t batch, length, carried, lookahead;
  int64_t heads, num_sub_keys, half_width, topk, num_slots, width;  // num_slots: S, of one memory
  int64_t all_pairs;                                                // per batch row, of all chunks
  bool carry, idw, values_only;
  Activation activation;
  T eps, temperature, lr, keep, grad_clip;  // keep = 1 - lr * weight_decay; grad_clip negative: none
  double addressing_weight;
  Memories memories;

  __host__ __device__ int64_t reads() const { return heads * topk; }  // of one token
  __host__ __device__ bool clips() const { return grad_clip >= 0; }
  __host__ __device__ bool decays() const { return keep != 1; }
  __host__ __device__ int64_t tokens(const Chunk& c) const { return batch * c.tokens(); }
  __host__ __device__ int64_t pairs(const Chunk& c) const { return batch * c.pairs; }
  __host__ __device__ int64_t key_rows_of_memory() const { return heads * 2 * num_sub_keys; }
  __host__ __device__ int64_t key_rows() const { return memories.count * key_rows_of_memory(); }
  // Of tables (memories, 2, P)
  __host__ __device__ int64_t table_size() const { return memories.count * 2 * num_sub_keys; }
  __host__ __device__ int64_t addressed_rows(const Chunk& c) const {
    return batch * (carry ? c.pairs : c.tokens()) * heads;
  }

  // Of one memory: the batch rows it serves, M of the memory loss, N_a of the addressing loss.
  __device__ int64_t batch_of(int64_t memory) const { return memories.of_row ? memories.rows[memory] : batch; }
  __device__ int64_t pairs_of(const Chunk& c, int64_t memory) const { return batch_of(memory) * c.pairs; }
  __device__ int64_t addressed_rows_of(const Chunk& c, int64_t memory) const {
    return batch_of(memory) * (carry ? c.pairs : c.tokens()) * heads;
  }
  // Which memory serves token t of a chunk.
  __device__ int64_t memory(const Chunk& c, int64_t t) const {
    return memories.of_row ? memories.of_row[uint32_t(t) / uint32_t(c.tokens())] : 0;
  }

  // Tokens, reads and entries of a chunk are fewer than 2^31, and 32-bit divisions much cheaper than 64-bit ones.
  __device__ Token token(const Chunk& c, int64_t t) const {
    const uint32_t per_row = uint32_t(c.tokens()), b = uint32_t(t) / per_row, i = uint32_t(t) - b * per_row;
    return {b, i, c.first + i};
  }
  __device__ int64_t at(const Token& k) const { return k.b * length + k.x; }                             // in (B, T)
  __device__ int64_t own_row(const Token& k) const { return k.b * (length - carried) + k.x - carried; }  // of outputs
  __device__ int64_t target_row(const Token& k) const { return at(k) + lookahead; }
  __device__ int64_t loss_at(const Chunk& c, const Token& k) const { return k.b * all_pairs + c.pairs_before + k.i; }
  __device__ bool has_pair(const Chunk& c, const Token& k) const {
    return k.i < c.pairs && (!mask || mask[at(k)] != 0);
  }
  __device__ T loss_weight(const Token& k) const { return loss_weights ? loss_weights[at(k)] : T(1); }
  // Tokens whose addresses count in the addressing loss: all, or with `carry` those with a pair, masked or not.
  __device__ bool addressed(const Chunk& c, const Token& k) const { return !carry || k.i < c.pairs; }
  __device__ const T* query_half(const Token& k, int64_t hp) const {  // hp = h * 2 + p
    return query + (at(k) * heads * 2 + hp) * half_width;
  }
  // Of an entry of the lists: its query half, and its row in tables of (memories, H, 2, P).
  __device__ const T* query_of(const Chunk& c, int64_t l) const {
    return query_of_list(c, uint32_t(l) / uint32_t(topk));
  }
  __device__ const T* query_of_list(const Chunk& c, uint32_t list) const {
    const uint32_t lists = uint32_t(2 * heads);
    return query_half(token(c, list / lists), list % lists);
  }
  __device__ int64_t key_row(const Chunk& c, int64_t l, int32_t sub_key) const {
    const uint32_t list = uint32_t(l) / uint32_t(topk), lists = uint32_t(2 * heads);
    return memory(c, list / lists) * key_rows_of_memory() + list % lists * num_sub_keys + sub_key;
  }

  TokenRows rows(const Chunk& c) const { return {tokens(c), c.tokens(), length, c.first, memories.of_row}; }
};

// A row of the memory as a chunk reads it: `decays` times the factor keep is still to come.
template <typename T>
struct Row {
  const T* data;
  int64_t decays;
};

// Where the newest version of a row is. Places of the log are numbered through all chunks that write: the first such
// chunk has `first_places` of them, every other `places` (the last one may have fewer).
template <typename T>
struct Versions {
  const T *values, *log;  // log null: the scan is in place, and `values` is up to date
  int64_t width, first_places, places;
  bool decays;

  __device__ int64_t writer(int64_t place) const {  // which write made the row at this place
    return place < first_places ? 0 : 1 + (place - first_places) / places;
  }
  // `writes` of this scan came before; `finished`: rows of the log that are still the newest have all their decays.
  __device__ Row<T> row(int64_t slot, int32_t place, int64_t writes, bool finished) const {
    if (!log) return {values + slot * width, 0};
    if (place < 0) return {values + slot * width, decays ? writes : 0};
    return {log + place * width, decays && !finished ? writes - writer(place) - 1 : 0};
  }
};

template <typename T>
__device__ __forceinline__ void apply_decays(Pack<T>& pack, int64_t decays, T keep) {
#pragma unroll 1
  for (int64_t i = 0; i < decays; ++i)
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack.v[j] *= keep;
}

template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T> load_row(const Row<T>& row, T keep, int64_t column, int64_t width) {
  Pack<T> pack = load_pack<kAligned>(row.data, column, width);
  apply_decays(pack, row.decays, keep);
  return pack;
}

// ------------------------------------------------------------------------------------------- clipped gradient steps
// next = old - lr * clamp(gradient). `open`: the clamp passes gradients on; `finite`: it may be written.
template <typename T>
__device__ __forceinline__ T gradient_step(T old, T gradient, T lr, T grad_clip, bool& open, bool& finite) {
  open = true;
  if (grad_clip >= 0) {
    open = gradient <= grad_clip && gradient >= -grad_clip;
    gradient = gradient > grad_clip ? grad_clip : gradient < -grad_clip ? -grad_clip : gradient;
  }
  const T next = fma(-lr, gradient, old);
  finite = isfinite(next);
  return next;
}

// Bit c % 8 of byte c / 8 for column c of a row. The lanes of a warp hold consecutive packs of the row.
template <typename T>
__device__ __forceinline__ void store_open_bits(uint8_t* row, int64_t column, bool inside,
                                                const bool (&open)[Pack<T>::kSize]) {
  constexpr int kPerByte = 8 / Pack<T>::kSize;  // lanes
  unsigned bits = 0;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) bits |= unsigned(open[j]) << (column % 8 + j);
  if (!inside) bits = 0;
#pragma unroll
  for (int lanes = 1; lanes < kPerByte; lanes *= 2) bits |= __shfl_xor_sync(kFullWarp, bits, lanes);
  if (inside && column % 8 == 0) row[column / 8] = uint8_t(bits);
}

__device__ __forceinline__ bool open_bit(const uint8_t* row, int64_t column) {
  return row[column / 8] >> (column % 8) & 1;
}

}  // namespace fwpkm::kernels
