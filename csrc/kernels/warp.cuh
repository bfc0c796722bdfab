// Small tools of all kernels: lanes and warps, 16-byte packs of a row, the size of a launch.
#pragma once
#include "kernels/simt.cuh"
#include "kernels/switches.cuh"
#include "kernels/tuning.cuh"

namespace fwpkm::kernels {

constexpr unsigned kFullWarp = 0xffffffffu;

// Blocks for `items` of work, `per_block` of them at a time.
template <typename Size>
unsigned blocks_for(int64_t items, int64_t per_block) {
  const int64_t blocks = (items + per_block - 1) / per_block;
  return unsigned(blocks < Size::kMaxBlocks ? blocks : Size::kMaxBlocks);
}

// 16 bytes of a row: what one thread loads at once.
template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T v[kSize];
};

// The pack of a row that begins at `column`, which is a multiple of the pack's size. kAligned: rows are whole packs,
// and addresses multiples of 16; else element by element, with zeros beyond the row.
template <bool kAligned, typename T>
__device__ __forceinline__ Pack<T> load_pack(const T* row, int64_t column, int64_t width) {
  if constexpr (kAligned) {
    return *reinterpret_cast<const Pack<T>*>(row + column);
  } else {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j) pack.v[j] = column + j < width ? row[column + j] : T(0);
    return pack;
  }
}

template <bool kAligned, typename T>
__device__ __forceinline__ void store_pack(T* row, int64_t column, int64_t width, const Pack<T>& pack) {
  if constexpr (kAligned) {
    simt::store16(row + column, pack);
  } else {
#pragma unroll
    for (int j = 0; j < Pack<T>::kSize; ++j)
      if (column + j < width) row[column + j] = pack.v[j];
  }
}

template <typename T>
__device__ __forceinline__ Pack<T> filled_pack(T x) {
  Pack<T> pack;
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) pack.v[j] = x;
  return pack;
}

// sum += factor * pack, rounded once
template <typename T>
__device__ __forceinline__ void add_product(Pack<T>& sum, T factor, const Pack<T>& pack) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) sum.v[j] = fma(factor, pack.v[j], sum.v[j]);
}

template <typename T>
__device__ __forceinline__ void add(Pack<T>& sum, const Pack<T>& pack) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) sum.v[j] += pack.v[j];
}

template <typename T>
__device__ __forceinline__ void subtract(Pack<T>& pack, const Pack<T>& other) {
#pragma unroll
  for (int j = 0; j < Pack<T>::kSize; ++j) pack.v[j] -= other.v[j];
}

// Whether every pointer is a multiple of 16 and every row whole packs.
template <typename T, typename... Pointers>
bool rows_are_packs(int64_t width, Pointers... pointers) {
  return width % Pack<T>::kSize == 0 && !without("packs") && ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Sum of x over the lanes up to and including this one.
__device__ __forceinline__ int inclusive_sum(int x, int lane) {
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int before = __shfl_up_sync(kFullWarp, x, distance);
    if (lane >= distance) x += before;
  }
  return x;
}

// Lanes in the order of the sum: l and l + 16, then l and l + 8, ...: every lane ends with the same bits.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) x += __shfl_xor_sync(kFullWarp, x, distance);
  return x;
}

// Sum of x over the threads of a block of whole warps, the same in every thread: the warps' sums in turn. Threads are
// numbered by threadIdx.x alone. `partial`: one element per warp in shared memory, for this call only.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* partial) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  T sum = 0;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += partial[w];
  return sum;
}

template <typename T>
__device__ __forceinline__ T warp_max(T x) {
#pragma unroll
  for (int distance = 16; distance; distance /= 2) {
    const T other = __shfl_xor_sync(kFullWarp, x, distance);
    if (other > x) x = other;
  }
  return x;
}

// p[0, n) = x
template <typename Size, typename T>
__global__ void __launch_bounds__(Size::kThreads) fill_kernel(T* __restrict__ p, int64_t n, T x) {
  const int64_t step = int64_t(gridDim.x) * Size::kThreads;
  for (int64_t i = int64_t(blockIdx.x) * Size::kThreads + threadIdx.x; i < n; i += step) p[i] = x;
}

template <typename Size = LaunchSize, typename T>
cudaError_t fill(T* p, int64_t n, T x, cudaStream_t stream) {
  if (n == 0) return cudaSuccess;
  return simt::launch(fill_kernel<Size, T>, blocks_for<Size>(n, Size::kThreads), Size::kThreads, stream, p, n, x);
}

// The places of one row among the threads of a block: threadIdx.x is the lane, threadIdx.y the part of the row,
// threadIdx.z the row. A part is 32 packs wide; a row of more parts than threads wraps around.
template <typename T, typename Size>
dim3 row_block(int64_t width) {
  const int64_t parts = (width + 32 * Pack<T>::kSize - 1) / (32 * Pack<T>::kSize);
  unsigned y = 1;
  while (y < parts && y < unsigned(Size::kThreads) / 32) y *= 2;
  return dim3(32, y, Size::kThreads / 32 / y);
}

}  // namespace fwpkm::kernels
