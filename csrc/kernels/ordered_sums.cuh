// One weighted sum of rows per ordered list, in a fixed order, however long the list is:
//
//   sum(list) = sum over its entries of factor(entry) * row(entry),  or of factor(entry) * (row(entry) - minus(key))
//
// Order: a list is cut into pieces of 32 consecutive entries. The sum of a piece starts from zero and takes its entries
// in order, one fused multiply-add each; entries whose row is null are passed over. Sums of pieces are then added in
// groups of 32 consecutive ones, in order, from the first; so are the sums of groups, until one is left. The order
// depends on the length of the list alone, and a list of 32 entries or fewer is a plain loop. The pieces of a hot list
// are as parallel as many short lists.
//
// What is summed, and what becomes of a sum, is said by two structs that the kernels get by value:
//
//   struct Terms {
//     const T* row(int32_t entry) const;   // or null
//     T factor(int32_t entry) const;
//     const T* minus(int32_t key) const;   // only with `static constexpr bool kMinus = true`
//   };
//   struct Output {
//     struct Row {...};                    // where a list's sum goes
//     bool wanted(const List&) const;      // false: nobody needs this sum
//     Row row(const List&) const;
//     // What `put` needs of the row at this column, asked for while the sum is not there yet.
//     template <bool kAligned>
//     Pack<T> before(const Row&, int64_t column, int64_t width) const;
//     // Called by all lanes of a warp for each part of a row, 16 bytes a lane; !inside: the lane is beyond the row,
//     and
//     // `before` is not there.
//     template <bool kAligned>
//     void put(const Row&, int64_t column, int64_t width, bool inside, const Pack<T>& sum, const Pack<T>& before)
//         const;
//   };
#pragma once
#include "kernels/ordered_lists.cuh"

namespace fwpkm::kernels {

// ------------------------------------------------------------------------------------------------------------- sizes
constexpr int kPiece = 32;  // entries of a piece, and sums of a group: one for every lane of a warp

// Sums of pieces wait in scratch rows. Those of the list that begins at place b lie at b / 16, b / 16 + 1, ...: lists
// do not overlap there, because a list of n > 32 entries has at most n / 16 pieces, rounded down; shorter ones need no
// rows.
__device__ __forceinline__ int64_t scratch_row(int32_t begin, int32_t piece) { return begin / (kPiece / 2) + piece; }

// Elements of the scratch for sums over n entries of rows of `width`.
inline int64_t ordered_sums_scratch(int32_t n, int64_t width) {
  return n > kPiece ? (n / (kPiece / 2) + 1) * width : 0;
}

struct List {
  int32_t key, begin, first;  // its place, and its first entry
};

template <typename Terms>
concept HasMinus = Terms::kMinus;

// The plain output: row `key` of a table.
template <typename T>
struct StoreRows {
  T* rows;
  int64_t row_width;
  using Row = T*;
  __device__ bool wanted(const List&) const { return true; }
  __device__ Row row(const List& list) const { return rows + list.key * row_width; }
  template <bool kAligned>
  __device__ Pack<T> before(Row, int64_t, int64_t) const {
    return filled_pack(T(0));
  }
  template <bool kAligned>
  __device__ void put(Row row, int64_t column, int64_t width, bool inside, const Pack<T>& sum, const Pack<T>&) const {
    if (inside) store_pack<kAligned>(row, column, width, sum);
  }
};

// ----------------------------------------------------------------------------------------------------------- kernels
// One warp per place and kParts parts of the row; the warps of places where a piece begins have work.
template <typename Size, int kParts, bool kAligned, typename T, typename Terms, typename Output>
__global__ void __launch_bounds__(Size::kThreads, kParts == 1 ? 4 : 3)
    sum_pieces(OrderedLists lists, Terms terms, Output output, int64_t width, T* __restrict__ scratch) {
  constexpr int kInFlight = kParts == 1 ? 4 : 1;  // rows on their way at once
  constexpr int kPart = 32 * Pack<T>::kSize, kColumns = kParts * kPart;
  const int lane = threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.z;
  for (int64_t p = int64_t(blockIdx.x) * blockDim.z + threadIdx.z; p < lists.n; p += step) {
    // All that can be asked for at once is, whether or not a piece begins here.
    const int32_t begin = lists.begin[p], its_key = p + lane < lists.n ? lists.key[p + lane] : lists.num_keys;
    const int32_t entry = p + lane < lists.n ? lists.entry[p + lane] : 0;
    const int32_t key = __shfl_sync(kFullWarp, its_key, 0), first_entry = __shfl_sync(kFullWarp, entry, 0);
    const bool longer = p + kPiece < lists.n && lists.key[p + kPiece] == key;
    if (key == lists.num_keys) return;  // no list here nor after it
    if ((p - begin) % kPiece) continue;
    const List list{key, begin, p == begin ? first_entry : lists.entry[begin]};
    if (!output.wanted(list)) continue;
    const bool mine = its_key == key, only = p == begin && !longer;
    const int count = __popc(__ballot_sync(kFullWarp, mine));
    typename Output::Row to{};
    if (only) to = output.row(list);
    const T* const row = mine ? terms.row(entry) : nullptr;
    const T factor = mine ? terms.factor(entry) : T(0);

    for (int64_t first_column = int64_t(threadIdx.y) * kColumns + lane * Pack<T>::kSize;
         first_column - lane * Pack<T>::kSize < width; first_column += int64_t(blockDim.y) * kColumns) {
      Pack<T> sum[kParts], before[kParts];
      [[maybe_unused]] Pack<T> minus[kParts];
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int64_t column = first_column + i * kPart;
        sum[i] = before[i] = minus[i] = filled_pack(T(0));
        if (column >= width) continue;
        if (only) before[i] = output.template before<kAligned>(to, column, width);
        if constexpr (HasMinus<Terms>) minus[i] = load_pack<kAligned>(terms.minus(key), column, width);
      }
      for (int first = 0; first < count; first += kInFlight) {
        Pack<T> packs[kInFlight][kParts];
        const T* rows[kInFlight];
        T factors[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int from = first + j < kPiece ? first + j : 0;
          rows[j] = reinterpret_cast<const T*>(__shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(row), from));
          factors[j] = __shfl_sync(kFullWarp, factor, from);
          if (first + j >= count) rows[j] = nullptr;
#pragma unroll
          for (int i = 0; i < kParts; ++i)
            if (const int64_t column = first_column + i * kPart; rows[j] && column < width)
              packs[j][i] = load_pack<kAligned>(rows[j], column, width);
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          if (!rows[j]) continue;
#pragma unroll
          for (int i = 0; i < kParts; ++i) {
            if constexpr (HasMinus<Terms>) subtract(packs[j][i], minus[i]);
            add_product(sum[i], factors[j], packs[j][i]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < kParts; ++i) {
        const int64_t column = first_column + i * kPart;
        if (column - lane * Pack<T>::kSize >= width) continue;
        const bool inside = column < width;
        if (only)
          output.template put<kAligned>(to, column, width, inside, sum[i], before[i]);
        else if (inside)
          store_pack<kAligned>(scratch + scratch_row(begin, int32_t(p - begin) / kPiece) * width, column, width,
                               sum[i]);
      }
    }
  }
}

// The tree over the sums of pieces. kLevel: of a sum of up to 32^kLevel of them, those from `first` on.
template <int kLevel, typename T, typename Load>
__device__ __forceinline__ Pack<T> tree_sum(int64_t first, int64_t pieces, const Load& load) {
  if constexpr (kLevel == 0) {
    return load(first);
  } else {
    constexpr int kInFlight = kLevel == 1 ? 8 : 1;
    constexpr int64_t kStride = int64_t(1) << (5 * (kLevel - 1));
    Pack<T> sum = filled_pack(T(0));
    for (int64_t from = 0; from < kPiece && first + from * kStride < pieces; from += kInFlight) {
      Pack<T> terms[kInFlight];
#pragma unroll
      for (int j = 0; j < kInFlight; ++j)
        if (const int64_t at = first + (from + j) * kStride; at < pieces)
          terms[j] = tree_sum<kLevel - 1, T>(at, pieces, load);
#pragma unroll
      for (int j = 0; j < kInFlight; ++j) {
        if (first + (from + j) * kStride >= pieces) continue;
        if (from + j)
          add(sum, terms[j]);
        else
          sum = terms[j];
      }
    }
    return sum;
  }
}

// One warp per list of more than one piece and part of the row; a warp looks for the lists that begin at 32 places.
template <typename Size, bool kAligned, typename T, typename Output>
__global__ void __launch_bounds__(Size::kThreads)
    add_pieces(OrderedLists lists, Output output, int64_t width, const T* __restrict__ scratch) {
  constexpr int kLevels = 6;  // 32^6 pieces are more than any list has
  const int lane = threadIdx.x;
  const int64_t step = int64_t(gridDim.x) * blockDim.z * 32;
  for (int64_t window = (int64_t(blockIdx.x) * blockDim.z + threadIdx.z) * 32; window < lists.n; window += step) {
    const int64_t p = window + lane;
    const bool starts = p + kPiece < lists.n && lists.key[p] != lists.num_keys && lists.begin[p] == p &&
                        lists.key[p + kPiece] == lists.key[p];
    for (unsigned found = __ballot_sync(kFullWarp, starts); found; found &= found - 1) {
      const int32_t begin = int32_t(window) + __ffs(int(found)) - 1, key = lists.key[begin];
      const List list{key, begin, lists.entry[begin]};
      if (!output.wanted(list)) continue;
      const int64_t pieces = (end_of_list(lists, key, begin) - begin + kPiece - 1) / kPiece;
      const T* const sums = scratch + scratch_row(begin, 0) * width;
      const typename Output::Row to = output.row(list);
      constexpr int kColumns = 32 * Pack<T>::kSize;
      for (int64_t part = int64_t(threadIdx.y) * kColumns; part < width; part += int64_t(blockDim.y) * kColumns) {
        const int64_t column = part + lane * Pack<T>::kSize;
        const bool inside = column < width;
        Pack<T> sum = filled_pack(T(0)), before = sum;
        if (inside) {
          before = output.template before<kAligned>(to, column, width);
          sum = tree_sum<kLevels, T>(
              0, pieces, [&](int64_t piece) { return load_pack<kAligned>(sums + piece * width, column, width); });
        }
        output.template put<kAligned>(to, column, width, inside, sum, before);
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------------------ launch
// scratch: ordered_sums_scratch(lists.n, width) elements. `aligned`: rows_are_packs of the rows, the outputs and the
// scratch.
template <typename Size, bool kAligned, typename T, typename Terms, typename Output>
cudaError_t launch_ordered_sums(const OrderedLists& lists, const Terms& terms, const Output& output, int64_t width,
                                T* scratch, cudaStream_t stream) {
  constexpr int kParts = 4;  // a warp that has looked for a piece sums a whole row of so many parts
  const dim3 block = row_block<T, Size>(width), whole_rows = row_block<T, Size>((width + kParts - 1) / kParts);
  const bool wide = width > int64_t(kParts) / 2 * 32 * Pack<T>::kSize;
  const dim3 pieces = wide ? whole_rows : block;
  cudaError_t error = simt::launch(
      wide ? sum_pieces<Size, kParts, kAligned, T, Terms, Output> : sum_pieces<Size, 1, kAligned, T, Terms, Output>,
      blocks_for<Size>(lists.n, pieces.z), pieces, stream, lists, terms, output, width, scratch);
  if (lists.n > kPiece && error == cudaSuccess)
    error = simt::launch(add_pieces<Size, kAligned, T, Output>, blocks_for<Size>(lists.n, 32 * block.z), block, stream,
                         lists, output, width, scratch);
  return error;
}

template <typename Size = LaunchSize, typename T, typename Terms, typename Output>
cudaError_t ordered_sums(const OrderedLists& lists, const Terms& terms, const Output& output, int64_t width, T* scratch,
                         bool aligned, cudaStream_t stream) {
  if (lists.n == 0 || width == 0) return cudaSuccess;
  return aligned ? launch_ordered_sums<Size, true>(lists, terms, output, width, scratch, stream)
                 : launch_ordered_sums<Size, false>(lists, terms, output, width, scratch, stream);
}

}  // namespace fwpkm::kernels
