// The sums of ordered_sums.cuh, bit for bit, where many entries share few rows: a row is fetched once, not once for
// every entry.
//
// Entry ((t * groups) + g) * R + r is read r of list (t, g). All entries of a list have the same row, and those of
// group g have its keys, one of `groups` equal ranges. A block takes 8 columns of all rows of a group into shared
// memory (128 KB for 4096 tokens of float) and sums the entries of the group's keys from there; where that leaves too
// few blocks, several share the keys. To gather a factor per entry and slice would cost as much as the rows did: a
// kernel before puts rows and factors into the order of the lists.
//
// Terms and Output are those of ordered_sums.cuh. No row is null, all sums are wanted, and Terms also has
//
//   const T* row_of_list(uint32_t list) const;  // list t * groups + g
#pragma once
#include "kernels/ordered_sums.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
template <typename Size, typename T>
struct ColumnTile {
  static constexpr int kThreads = 2 * Size::kThreads, kWarps = kThreads / 32;
  static constexpr int kColumns = 8;                        // no fewer, for one byte of open bits has so many
  static constexpr int kLanes = kColumns / Pack<T>::kSize;  // of a piece; each has a pack of the row
  static constexpr int kPieces = 32 / kLanes;               // of a warp at a time
  static constexpr int kBatch = 8;                          // terms of each piece that are fetched together
};

// Who sums what: `splits` parts of the keys of each group, numbered through all groups.
struct KeyParts {
  int32_t tokens, groups, topk, keys, splits;  // keys: of a group
  __host__ __device__ int32_t count() const { return groups * splits; }
  __device__ int32_t part_of(int32_t key) const { return key / keys * splits + key % keys * splits / keys; }
  // A list of n entries has at most n / 32 + 1 pieces; and one place for the end.
  __host__ __device__ int64_t most_pieces() const {
    return int64_t(tokens) * topk / kPiece + (keys + splits - 1) / splits + 1;
  }
};

template <typename T>
struct SortedTerm {
  int32_t token;
  T factor;
};

// The entries as their lists have them.
template <typename T>
struct SortedTerms {
  SortedTerm<T>* terms;  // (n): by place
  uint32_t* starts;      // (n / 32 + 1): whether a piece begins at a place, 32 places a word
  int32_t* bounds;       // (parts + 1): the places where parts begin
};

// A piece of a list: its place, and how many the list has before it.
struct PieceStart {
  int32_t place, number;
};

// Shared memory of a block: a slice of all rows of a group, then the part's pieces.
template <typename Tile>
__host__ __device__ int64_t column_packs(const KeyParts& parts) {
  return int64_t(parts.tokens) * Tile::kLanes + (parts.most_pieces() * int64_t(sizeof(PieceStart)) + 15) / 16;
}

// Elements of the scratch for sums over n entries of rows of `width`: as for ordered_sums, then SortedTerms.
template <typename T, typename Size = LaunchSize>
int64_t column_sums_scratch(int32_t n, int64_t groups, int64_t width) {
  return ordered_sums_scratch(n, width) + int64_t(sizeof(SortedTerm<T>) / sizeof(T)) * n + n / 32 + 1 +
         (groups + Size::kSharedBlocks + 1);
}

// ------------------------------------------------------------------------------------------------------ sorted terms
// One thread per place, and one for the end.
template <typename Size, typename T, typename Terms>
__global__ void __launch_bounds__(Size::kThreads)
    sort_terms(OrderedLists lists, Terms terms, KeyParts parts, SortedTerms<T> sorted) {
  const int lane = threadIdx.x % 32;
  const uint32_t of_token = uint32_t(parts.groups * parts.topk);
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t p = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; p - lane <= lists.n; p += step) {
    const int32_t key = p < lists.n ? lists.key[p] : lists.num_keys;
    const bool listed = key != lists.num_keys;
    const unsigned starts = __ballot_sync(kFullWarp, listed && (p - lists.begin[p]) % kPiece == 0);
    if (lane == 0) sorted.starts[p / 32] = starts;
    if (listed) {
      const int32_t entry = lists.entry[p];
      sorted.terms[p] = {int32_t(uint32_t(entry) / of_token), terms.factor(entry)};
    }
    if (p > lists.n) continue;
    const int32_t before = p ? parts.part_of(lists.key[p - 1]) : -1;
    for (int32_t part = before + 1; part <= parts.part_of(key); ++part) sorted.bounds[part] = int32_t(p);
  }
}

// ------------------------------------------------------------------------------------------------- parts of the kernel
// Finds the pieces between two places, in order; behind them comes the end. Returns how many there are. All threads of
// a block; who reads the pieces waits for a barrier.
template <typename Tile>
__device__ __forceinline__ int32_t find_pieces(const OrderedLists& lists, const uint32_t* starts, int32_t first,
                                               int32_t end, PieceStart* pieces) {
  SIMT_SHARED(warp_counts, int32_t[Tile::kWarps]);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int32_t first_word = first / 32, last_word = (end + 31) / 32;  // a run of words for each thread
  const int32_t per_thread = (last_word - first_word + Tile::kThreads - 1) / Tile::kThreads;
  const int32_t own = first_word + thread * per_thread;
  const auto for_each = [&](const auto& f) {
    for (int32_t word = own; word < own + per_thread && word < last_word; ++word)
      for (unsigned bits = starts[word]; bits; bits &= bits - 1) {
        const int32_t place = word * 32 + __ffs(int(bits)) - 1;
        if (place >= first && place < end) f(place);
      }
  };
  int32_t count = 0;
  for_each([&](int32_t) { ++count; });
  const int32_t up_to = inclusive_sum(count, lane);
  if (lane == 31) warp_counts[warp] = up_to;
  __syncthreads();  // warp_counts
  int32_t at = up_to - count, all = 0;
  for (int w = 0; w < Tile::kWarps; ++w) {
    if (w < warp) at += warp_counts[w];
    all += warp_counts[w];
  }
  for_each([&](int32_t place) { pieces[at++] = {place, (place - lists.begin[place]) / kPiece}; });
  if (thread == 0) pieces[all] = {end, 0};
  return all;
}

// Begins to copy a slice of all rows of a group. column: of this lane's pack.
template <typename Tile, typename T, typename Terms>
__device__ __forceinline__ void copy_rows(const Terms& terms, const KeyParts& parts, int32_t group, int64_t column,
                                          bool inside, Pack<T>* rows) {
  const int lane = threadIdx.x % 32, my_piece = lane / Tile::kLanes, my_pack = lane % Tile::kLanes;
  for (int32_t first = threadIdx.x / 32 * 32; first < parts.tokens; first += Tile::kThreads) {
    const int32_t token = first + lane;
    const T* const row =
        token < parts.tokens ? terms.row_of_list(uint32_t(token) * uint32_t(parts.groups) + group) : nullptr;
#pragma unroll
    for (int i = 0; i < Tile::kLanes; ++i) {
      const int its = i * Tile::kPieces + my_piece;
      const auto* const from =
          reinterpret_cast<const T*>(__shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(row), its));
      if (from) simt::copy16_async(&rows[(first + its) * Tile::kLanes + my_pack], inside ? from + column : nullptr);
    }
  }
  simt::commit_copies();
}

// The sum of this lane's piece, by a warp: its pieces are those from `first` on, with at most `most` entries each.
template <typename Tile, bool kMinus, typename T>
__device__ __forceinline__ Pack<T> sum_piece(const SortedTerm<T>* terms, const Pack<T>* rows, const PieceStart* pieces,
                                             int32_t first, int32_t count, int32_t entries, const Pack<T>& minus,
                                             SortedTerm<T> (&batch)[Tile::kPieces][Tile::kBatch + 1]) {
  constexpr int kBatch = Tile::kBatch, kFetches = kBatch / Tile::kLanes;
  const int lane = threadIdx.x % 32, my_piece = lane / Tile::kLanes, my_pack = lane % Tile::kLanes;
  const int32_t most = warp_max(entries);
  SortedTerm<T> fetched[kFetches] = {};
  const auto fetch = [&](int32_t from) {  // lanes side by side have terms side by side
#pragma unroll
    for (int i = 0; i < kFetches; ++i) {
      const int32_t piece = first + (i * 32 + lane) / kBatch;
      if (piece >= count) continue;
      const int32_t place = pieces[piece].place + from + lane % kBatch;
      if (place < pieces[piece + 1].place) fetched[i] = terms[place];
    }
  };
  Pack<T> sum = filled_pack(T(0));
  fetch(0);
  for (int32_t from = 0; from < most; from += kBatch) {
    __syncwarp();  // the batch before has been read
#pragma unroll
    for (int i = 0; i < kFetches; ++i) batch[(i * 32 + lane) / kBatch][lane % kBatch] = fetched[i];
    __syncwarp();  // this batch is there
    fetch(from + kBatch);
    const int32_t now = entries - from < kBatch ? entries - from : kBatch;
#pragma unroll 4
    for (int32_t j = 0; j < now; ++j) {
      const SortedTerm<T> term = batch[my_piece][j];
      Pack<T> row = rows[term.token * Tile::kLanes + my_pack];
      if constexpr (kMinus) subtract(row, minus);
      add_product(sum, term.factor, row);
    }
  }
  return sum;
}

// ------------------------------------------------------------------------------------------------------------ kernel
// One block per part and slice of columns.
template <typename Size, typename T, typename Terms, typename Output>
__global__ void __launch_bounds__(ColumnTile<Size, T>::kThreads, 1)
    sum_columns(OrderedLists lists, Terms terms, Output output, KeyParts parts, SortedTerms<T> sorted, int64_t width,
                T* scratch) {
  using Tile = ColumnTile<Size, T>;
  constexpr int32_t kStep = Tile::kWarps * Tile::kPieces;
  SIMT_DYNAMIC_ARRAY(rows, column_packs<Tile>(parts), Pack<T>);
  SIMT_SHARED(batches, SortedTerm<T>[Tile::kWarps][Tile::kPieces][Tile::kBatch + 1]);  // one more: other banks
  PieceStart* const pieces = reinterpret_cast<PieceStart*>(rows + parts.tokens * Tile::kLanes);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, my_piece = lane / Tile::kLanes;
  const int64_t slices = (width + Tile::kColumns - 1) / Tile::kColumns;
  for (int64_t b = blockIdx.x; b < parts.count() * slices; b += gridDim.x) {
    const int32_t part = int32_t(b / slices);
    const int64_t column = b % slices * Tile::kColumns + lane % Tile::kLanes * Pack<T>::kSize;
    const bool inside = column < width;
    copy_rows<Tile>(terms, parts, part / parts.splits, column, inside, rows);
    const int32_t count = find_pieces<Tile>(lists, sorted.starts, sorted.bounds[part], sorted.bounds[part + 1], pieces);
    simt::wait_for_copies<0>();
    __syncthreads();  // rows and pieces

    const auto list_of = [&](const PieceStart& at) {
      const int32_t begin = at.place - at.number * kPiece;
      return List{lists.key[begin], begin, lists.entry[begin]};
    };
    const auto put = [&](const List& list, int64_t column, bool inside, const Pack<T>& sum) {
      const typename Output::Row to = output.row(list);
      Pack<T> before = filled_pack(T(0));
      if (inside) before = output.template before<true>(to, column, width);
      output.template put<true>(to, column, width, inside, sum, before);
    };
    for (int32_t first = warp * Tile::kPieces; first < count; first += kStep) {
      const int32_t i = first + my_piece;
      const bool mine = i < count;
      const PieceStart at = pieces[mine ? i : first], next = pieces[mine ? i + 1 : first];
      const List list = list_of(at);
      Pack<T> minus = filled_pack(T(0));
      if constexpr (HasMinus<Terms>)
        if (inside) minus = load_pack<true>(terms.minus(list.key), column, width);
      const Pack<T> sum = sum_piece<Tile, HasMinus<Terms>>(sorted.terms, rows, pieces, first, count,
                                                           next.place - at.place, minus, batches[warp]);
      const bool only = mine && at.number == 0 && next.number == 0;
      if (__ballot_sync(kFullWarp, only)) put(list, column, only && inside, sum);
      if (mine && !only && inside)
        store_pack<true>(scratch + scratch_row(list.begin, at.number) * width, column, width, sum);
    }

    // The levels of the tree: `stride` pieces lie between the sums that are added, which replace the first of them.
    for (int32_t stride = 1;; stride *= kPiece) {
      __syncthreads();  // sums of pieces, or of the level before; and the rows have been read
      if (stride >= count) break;
      for (int32_t first = warp * Tile::kPieces; first < count; first += kStep) {
        const int32_t i = first + my_piece;
        const PieceStart at = pieces[i < count ? i : first];
        const auto has = [&](int32_t ahead) {  // so many pieces on, still the same list
          return i + ahead < count && pieces[i + ahead].number == at.number + ahead;
        };
        const bool starts = (at.number & (kPiece * stride - 1)) == 0 && has(stride);
        if (!__ballot_sync(kFullWarp, starts)) continue;
        const bool finishes = starts && at.number == 0 && !has(kPiece * stride);
        const List list = list_of(at);
        T* const sums = scratch + scratch_row(list.begin, at.number) * width;
        int32_t group = 1;
        while (starts && group < kPiece && has(group * stride)) ++group;
        Pack<T> sum = filled_pack(T(0));
        if (starts && inside) {
          sum = load_pack<true>(sums, column, width);
#pragma unroll 4
          for (int32_t j = 1; j < group; ++j) add(sum, load_pack<true>(sums + j * stride * width, column, width));
        }
        put(list, column, finishes && inside, sum);
        if (starts && !finishes && inside) store_pack<true>(sums, column, width, sum);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// groups and topk: of the entries' numbers. scratch: column_sums_scratch(lists.n, groups, width) elements. What is too
// small, or does not fit into shared memory, is left to ordered_sums.
template <typename Size = LaunchSize, typename T, typename Terms, typename Output>
cudaError_t column_sums(const OrderedLists& lists, const Terms& terms, const Output& output, int64_t groups,
                        int64_t topk, int64_t width, T* scratch, bool aligned, cudaStream_t stream) {
  using Tile = ColumnTile<Size, T>;
  constexpr int64_t kLeastReads = 4;  // of a row by a block
  const auto kernel = sum_columns<Size, T, Terms, Output>;
  const int64_t slices = (width + Tile::kColumns - 1) / Tile::kColumns;
  if (aligned && !without("columns") && topk >= kLeastReads && int64_t(lists.n) * width >= Size::kLeastSharedElements) {
    const int64_t wanted = (Size::kSharedBlocks + groups * slices - 1) / (groups * slices);
    const KeyParts parts{int32_t(lists.n / (groups * topk)), int32_t(groups), int32_t(topk),
                         int32_t(lists.num_keys / groups),
                         int32_t(wanted < topk / kLeastReads ? wanted : topk / kLeastReads)};
    const int64_t bytes = column_packs<Tile>(parts) * int64_t(sizeof(Pack<T>));
    if (bytes <= Size::kMostSharedBytes && simt::allow_shared(kernel, size_t(bytes))) {
      auto* const sorted_terms = reinterpret_cast<SortedTerm<T>*>(scratch + ordered_sums_scratch(lists.n, width));
      auto* const starts = reinterpret_cast<uint32_t*>(sorted_terms + lists.n);
      const SortedTerms<T> sorted{sorted_terms, starts, reinterpret_cast<int32_t*>(starts + lists.n / 32 + 1)};
      const cudaError_t error =
          simt::launch(sort_terms<Size, T, Terms>, blocks_for<Size>(int64_t(lists.n) + 1, Size::kThreads),
                       Size::kThreads, stream, lists, terms, parts, sorted);
      if (error != cudaSuccess) return error;
      return simt::launch_with_shared(size_t(bytes), kernel, blocks_for<Size>(parts.count() * slices, 1),
                                      Tile::kThreads, stream, lists, terms, output, parts, sorted, width, scratch);
    }
  }
  return ordered_sums<Size>(lists, terms, output, width, scratch, aligned, stream);
}

}  // namespace fwpkm::kernels
