// Backward pass of a scan, between the entries of a chunk's lists and its queries: what a query and the sub-keys of its
// list give the entries, and what those give the query (backward_keys.cuh has the formulas).
//
//   t_l = slope <theta, difference>     d q += sum_list (beta (k - q) + alpha theta)
//
// Many entries read few sub-keys. So each of the two has a second kernel for many tokens of one memory, with the same
// bits: a block takes some columns of all sub-keys of a half, and of their theta, into shared memory (128 KB for 512 of
// them and 32 columns of float), and reads them there for its part of the tokens.
//
// Order of <theta, difference>: the columns of a pack of 16 bytes ascending, from zero, one fused multiply-add each; 8
// consecutive packs as a tree, i and i + 4 first; then these sums in turn, from zero. Of sums over a list: its entries
// in turn, from zero, the one with theta by itself.
#pragma once
#include "kernels/addressing.cuh"
#include "kernels/ordered_sums.cuh"

namespace fwpkm::kernels {

template <typename T>
struct BackwardKeys {
  ScanView<T> view;
  Chunk chunk;
  OrderedLists lists;                    // of the chunk's entries
  bool through;                          // with theta
  const int32_t *list_indices, *places;  // (m, H, 2, R) checked, (m, H, R)
  const T *list_scores, *sub_keys;       // (m, H, 2, R), (memories, H, 2, P, K/2) that the chunk was read with
  const uint8_t* open;                   // (memories, H, 2, P, (K/2 + 7) / 8), or null
  const T *dscores, *memory_terms;       // (m, H, R); null unless the memory loss moved the sub-keys
  const T* daddressing;                  // (memories): d(addressing loss) of the write; or null
  T *dquery, *dsub_keys;                 // as query; as sub_keys: dK', becomes dK
  // Workspace
  T *theta, *directions;  // as sub_keys, t (m, H, 2, R): kept from key_directions to key_gradients
  T *alpha, *beta, *p;    // (m, H, 2, R); p: address_weights, if addressed()
  AddressTables tables;
  double* sum;  // (memories, H, 2, P)
  T* scratch;   // column_sums_scratch(entries, 2H, K/2)

  __device__ bool left_out(int64_t list) const { return list_indices[list * view.topk] < 0; }
  __device__ int64_t row_of(int64_t l) const { return view.key_row(chunk, l, list_indices[l]) * view.half_width; }
  __host__ __device__ int64_t num_lists() const { return view.tokens(chunk) * view.heads * 2; }
  // Whether anything comes through the addressing loss.
  __host__ __device__ bool addressed() const {
    return chunk.writes && view.addressing_weight != 0 && view.addressed_rows(chunk) > 0 && (through || daddressing);
  }
};

constexpr int kSlicePacks = 8;  // of the tree of <theta, difference>

template <typename T>
__device__ __forceinline__ T slice_sum(T x) {
#pragma unroll
  for (int distance = kSlicePacks / 2; distance; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

// The columns of a pack.
template <typename T>
__device__ __forceinline__ T dot(const Pack<T>& a, const Pack<T>& b) {
  T sum = 0;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) sum = fma(a.v[j], b.v[j], sum);
  return sum;
}

// ------------------------------------------------------------------------------------------- kernels: a warp per list
template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads) list_directions(BackwardKeys<T> x) {
  constexpr int kPack = Pack<T>::kSize, kSlice = kSlicePacks * kPack;
  const ScanView<T>& view = x.view;
  const int lane = threadIdx.x % 32;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), half = view.half_width, lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    const bool left_out = x.left_out(list);
    const T* const q = view.query_of_list(x.chunk, uint32_t(list));
    for (int64_t l = list * view.topk; l < (list + 1) * view.topk; ++l) {
      T sum = 0;
      for (int64_t first = 0; first < half && !left_out; first += 32 * kPack) {
        const int64_t column = first + lane * kPack;
        T product = 0;
        if (column < half) {
          Pack<T> difference = load_pack<kAligned>(q, column, half);
          if (view.idw) subtract(difference, load_pack<kAligned>(x.sub_keys + x.row_of(l), column, half));
          product = dot(load_pack<kAligned>(x.theta + x.row_of(l), column, half), difference);
        }
        product = slice_sum(product);
        for (int slice = 0; slice < 32 / kSlicePacks; ++slice) {
          const T its = __shfl_sync(kFullWarp, product, slice * kSlicePacks);
          if (first + slice * kSlice < half) sum += its;
        }
      }
      if (view.idw && !left_out) sum *= 2 * exp(x.list_scores[l]);
      if (lane == 0) x.directions[l] = sum;
    }
  }
}

template <typename Size, bool kAligned, typename T>
__global__ void __launch_bounds__(Size::kThreads) add_to_query(BackwardKeys<T> x) {
  constexpr int kPack = Pack<T>::kSize;
  const ScanView<T>& view = x.view;
  const int64_t step = int64_t(gridDim.x) * (Size::kThreads / 32), half = view.half_width, lists = x.num_lists();
  for (int64_t list = (int64_t(blockIdx.x) * Size::kThreads + threadIdx.x) / 32; list < lists; list += step) {
    if (x.left_out(list)) continue;
    const T* const q = view.query_of_list(x.chunk, uint32_t(list));
    T* const dq = x.dquery + (q - view.query);
    for (int64_t column = threadIdx.x % 32 * kPack; column < half; column += 32 * kPack) {
      const Pack<T> query = load_pack<kAligned>(q, column, half);
      Pack<T> sum = filled_pack(T(0)), through = sum;
#pragma unroll 4
      for (int64_t l = list * view.topk; l < (list + 1) * view.topk; ++l) {
        Pack<T> key = load_pack<kAligned>(x.sub_keys + x.row_of(l), column, half);
        if (view.idw) subtract(key, query);
        add_product(sum, x.beta[l], key);
        if (x.through) add_product(through, x.alpha[l], load_pack<kAligned>(x.theta + x.row_of(l), column, half));
      }
      Pack<T> total = load_pack<kAligned>(dq, column, half);
      add(total, sum);
      if (x.through) add(total, through);
      store_pack<kAligned>(dq, column, half, total);
    }
  }
}

// -------------------------------------------------------------------------------- kernels: sub-keys in shared memory
// How a block of them sees its work: kLanes lanes per list, each with a pack of the row.
template <typename Size, typename T, int kLanes_>
struct KeyTile {
  static constexpr int kThreads = 2 * Size::kThreads, kLanes = kLanes_, kLists = 32 / kLanes;  // of a warp at a time
  static __host__ __device__ int64_t slices(int64_t width) {
    return (width + kLanes * Pack<T>::kSize - 1) / (kLanes * Pack<T>::kSize);
  }
  // Packs in shared memory: of all sub-keys of a half, then of their theta.
  static __host__ __device__ int64_t packs(const BackwardKeys<T>& x) {
    return x.view.num_sub_keys * kLanes * (x.through ? 2 : 1);
  }
};

// f(slice, list, exists, column, inside) by all lanes of a warp, over the lists of `parts` parts of the tokens in turn,
// while `rows` has the slice of the list's half.
template <typename Tile, typename T, typename F>
__device__ __forceinline__ void for_each_list(const BackwardKeys<T>& x, int32_t parts, Pack<T>* rows, const F& f) {
  constexpr int kLanes = Tile::kLanes;
  const int64_t half = x.view.half_width, groups = 2 * x.view.heads, tokens = x.view.tokens(x.chunk);
  const int64_t slices = Tile::slices(half);
  const int32_t keys = int32_t(x.view.num_sub_keys), lane = threadIdx.x % 32;
  for (int64_t b = blockIdx.x; b < groups * slices * parts; b += gridDim.x) {
    const int64_t slice = b % slices, group = b / slices / parts, part = b / slices % parts;
    const int64_t column = (slice * kLanes + lane % kLanes) * Pack<T>::kSize;
    const bool inside = column < half;
    for (int32_t i = threadIdx.x; i < keys * kLanes; i += Tile::kThreads) {
      const int64_t from = (group * keys + i / kLanes) * half + column;
      simt::copy16_async(&rows[i], inside ? x.sub_keys + from : nullptr);
      if (x.through) simt::copy16_async(&rows[keys * kLanes + i], inside ? x.theta + from : nullptr);
    }
    simt::commit_copies();
    simt::wait_for_copies<0>();
    __syncthreads();  // rows
    const int64_t stop = tokens * (part + 1) / parts;
    for (int64_t first = tokens * part / parts + threadIdx.x / 32 * Tile::kLists; first < stop;
         first += Tile::kThreads / kLanes) {
      const int64_t token = first + lane / kLanes;
      const bool exists = token < stop;
      f(slice, (exists ? token : first) * groups + group, exists, column, inside);
    }
    __syncthreads();  // rows have been read
  }
}

// <theta, difference> of the columns of each slice: partial (slices, entries).
template <typename Size, typename T>
__global__ void __launch_bounds__(2 * Size::kThreads, 1)
    directions_of_columns(BackwardKeys<T> x, int32_t parts, T* __restrict__ partial) {
  using Tile = KeyTile<Size, T, kSlicePacks>;
  constexpr int kLanes = Tile::kLanes;
  SIMT_DYNAMIC_ARRAY(rows, Tile::packs(x), Pack<T>);
  const Pack<T>* const thetas = rows + x.view.num_sub_keys * kLanes;
  const int lane = threadIdx.x % 32, my_pack = lane % kLanes, first_lane = lane - my_pack;
  const int64_t topk = x.view.topk, entries = x.num_lists() * topk;
  for_each_list<Tile>(x, parts, rows, [&](int64_t slice, int64_t list, bool exists, int64_t column, bool inside) {
    const T* const q = x.view.query_of_list(x.chunk, uint32_t(list));
    const Pack<T> query = inside ? load_pack<true>(q, column, x.view.half_width) : filled_pack(T(0));
    for (int64_t l = 0; l < topk; l += kLanes) {
      const bool its = exists && l + my_pack < topk;
      const int64_t at = list * topk + l + my_pack;
      const int32_t index = its ? x.list_indices[at] : 0, known = index < 0 ? 0 : index;
      T sums[kLanes];
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        const int32_t row = __shfl_sync(kFullWarp, known, first_lane + j) * kLanes + my_pack;
        Pack<T> difference = query;
        if (x.view.idw) subtract(difference, rows[row]);
        sums[j] = dot(thetas[row], difference);
      }
      // The tree of slice_sum for 8 entries at once: lanes share out what is left of them, and lane i ends with entry
      // i.
#pragma unroll
      for (int distance = kLanes / 2; distance; distance /= 2)
#pragma unroll
        for (int j = 0; j < distance; ++j) {
          const bool upper = my_pack & distance;
          const T mine = upper ? sums[j + distance] : sums[j], given = upper ? sums[j] : sums[j + distance];
          sums[j] = mine + __shfl_xor_sync(kFullWarp, given, distance);
        }
      if (its) partial[slice * entries + at] = sums[0];
    }
  });
}

// t from them. One thread per entry.
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads)
    add_directions(BackwardKeys<T> x, int64_t slices, const T* __restrict__ partial) {
  const int64_t entries = x.num_lists() * x.view.topk, step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t l = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; l < entries; l += step) {
    T sum = 0;
#pragma unroll 8
    for (int64_t slice = 0; slice < slices; ++slice) sum += partial[slice * entries + l];
    if (x.view.idw) sum *= 2 * exp(x.list_scores[l]);
    x.directions[l] = x.list_indices[l] < 0 ? T(0) : sum;
  }
}

template <typename Size, int kLanes, typename T>
__global__ void __launch_bounds__(2 * Size::kThreads, 1) add_columns_to_query(BackwardKeys<T> x, int32_t parts) {
  using Tile = KeyTile<Size, T, kLanes>;
  SIMT_DYNAMIC_ARRAY(rows, Tile::packs(x), Pack<T>);
  const Pack<T>* const thetas = rows + x.view.num_sub_keys * kLanes;
  const int lane = threadIdx.x % 32, my_pack = lane % kLanes, first_lane = lane - my_pack;
  const int64_t topk = x.view.topk, half = x.view.half_width;
  for_each_list<Tile>(x, parts, rows, [&](int64_t, int64_t list, bool exists, int64_t column, bool inside) {
    const bool mine = exists && inside && !x.left_out(list);
    const T* const q = x.view.query_of_list(x.chunk, uint32_t(list));
    T* const dq = x.dquery + (q - x.view.query);
    Pack<T> sum = filled_pack(T(0)), through = sum, query = sum, total = sum;
    if (exists && inside) {  // not `mine`, for which loads would wait
      query = load_pack<true>(q, column, half);
      total = load_pack<true>(dq, column, half);
    }
    for (int64_t l = 0; l < topk; l += kLanes) {
      const bool its = exists && l + my_pack < topk;
      const int64_t at = list * topk + l + my_pack;
      const int32_t index = its ? x.list_indices[at] : 0, known = index < 0 ? 0 : index;
      const T beta = its ? x.beta[at] : T(0), alpha = its && x.through ? x.alpha[at] : T(0);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) {
        if (l + j >= topk) break;
        const int32_t row = __shfl_sync(kFullWarp, known, first_lane + j) * kLanes + my_pack;
        Pack<T> key = rows[row];
        if (x.view.idw) subtract(key, query);
        add_product(sum, __shfl_sync(kFullWarp, beta, first_lane + j), key);
        if (x.through) add_product(through, __shfl_sync(kFullWarp, alpha, first_lane + j), thetas[row]);
      }
    }
    add(total, sum);
    if (x.through) add(total, through);
    if (mine) store_pack<true>(dq, column, half, total);
  });
}

// ------------------------------------------------------------------------------------------------------------ launch
// Launches a kernel of a KeyTile if its sub-keys fit into shared memory and enough tokens read them; else false. With
// more than kPiece entries the scratch has room for `partial`: an element per entry and 16 columns.
template <typename Tile, typename Size, typename T, typename Kernel, typename... Arguments>
bool launch_from_shared(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream, cudaError_t* error, Kernel* kernel,
                        Arguments... arguments) {
  constexpr int64_t kLeastReads = 4;  // of a sub-key by a block
  const ScanView<T>& view = x.view;
  const int64_t groups = 2 * view.heads, blocks = groups * Tile::slices(view.half_width);
  const int64_t entries = x.num_lists() * view.topk, bytes = Tile::packs(x) * int64_t(sizeof(Pack<T>));
  const int64_t wanted = (Size::kSharedBlocks + blocks - 1) / blocks;
  const int64_t most = entries / (groups * view.num_sub_keys) / kLeastReads, parts = wanted < most ? wanted : most;
  if (view.memories.of_row || !aligned || parts == 0 || entries <= kPiece || without("columns") ||
      entries * view.half_width < Size::kLeastSharedElements || bytes > Size::kMostSharedBytes ||
      !simt::allow_shared(kernel, size_t(bytes)))
    return false;
  *error = simt::launch_with_shared(size_t(bytes), kernel, blocks_for<Size>(blocks * parts, 1), Tile::kThreads, stream,
                                    x, int32_t(parts), arguments...);
  return true;
}

template <typename Size, typename T>
cudaError_t launch_list_directions(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  using Tile = KeyTile<Size, T, kSlicePacks>;
  cudaError_t error = cudaSuccess;
  if (launch_from_shared<Tile, Size>(x, aligned, stream, &error, directions_of_columns<Size, T>, x.scratch)) {
    if (error != cudaSuccess) return error;
    return simt::launch(add_directions<Size, T>, blocks_for<Size>(x.num_lists() * x.view.topk, Size::kThreads),
                        Size::kThreads, stream, x, Tile::slices(x.view.half_width), x.scratch);
  }
  const auto kernel = aligned ? list_directions<Size, true, T> : list_directions<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(x.num_lists(), Size::kThreads / 32), Size::kThreads, stream, x);
}

template <typename Size, typename T>
cudaError_t launch_add_to_query(const BackwardKeys<T>& x, bool aligned, cudaStream_t stream) {
  cudaError_t error = cudaSuccess;
  if (launch_from_shared<KeyTile<Size, T, 8>, Size>(x, aligned, stream, &error, add_columns_to_query<Size, 8, T>) ||
      launch_from_shared<KeyTile<Size, T, 4>, Size>(x, aligned, stream, &error, add_columns_to_query<Size, 4, T>))
    return error;
  const auto kernel = aligned ? add_to_query<Size, true, T> : add_to_query<Size, false, T>;
  return simt::launch(kernel, blocks_for<Size>(x.num_lists(), Size::kThreads / 32), Size::kThreads, stream, x);
}

}  // namespace fwpkm::kernels
