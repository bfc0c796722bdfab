// The one header that a kernel file includes for CUDA itself. Under nvcc it is CUDA; under a host compiler the tests'
// stand-in takes its place (tests/simt/cuda_on_cpu.h), which runs every CUDA thread as a fiber.
//
// Kernels keep to what both understand: SIMT_SHARED instead of __shared__, simt::launch instead of <<<>>>, collectives
// with explicit masks, fma where a product and a sum are to be rounded once (neither compiler may contract a * b + c).
//
// The comment of an instruction that is written as PTX names the section of the PTX ISA manual that defines it.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <utility>

#ifdef __CUDACC__
#include <cuda_runtime.h>

namespace simt {

template <typename T>
struct Type {
  using type = T;
};

// 16 bytes to global memory in one store. From a struct held in registers the compiler makes four.
// PTX ISA, "Data Movement and Conversion Instructions: st".
template <typename T>
__device__ __forceinline__ void store16(void* to, const T& from) {
  const uint4 x = __builtin_bit_cast(uint4, from);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// What other threads may be changing with atomics at this time.
// PTX ISA, "Data Movement and Conversion Instructions: ld"; relaxed: "Memory Consistency Model".
__device__ __forceinline__ unsigned load_relaxed(const unsigned* p) {
  unsigned x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p));
  return x;
}

// Returns before the kernel ends. An error of the launch itself is returned, and not left for the next caller to find.
// `shared`: bytes of SIMT_DYNAMIC_SHARED.
template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_shared(size_t shared, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                               Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_with_shared(0, kernel, grid, block, stream, std::forward<Arguments>(arguments)...);
}

// Lets a kernel have so much dynamic shared memory; false where the device has less. The limit belongs to the kernel,
// whoever launches it: it is only ever raised, to what the device has.
template <typename Kernel>
bool allow_shared(Kernel* kernel, size_t bytes) {
  cudaFuncAttributes now{};
  int device = 0, most = 0;
  const auto done = [](cudaError_t error) {
    if (error != cudaSuccess) cudaGetLastError();
    return error == cudaSuccess;
  };
  if (!done(cudaFuncGetAttributes(&now, kernel))) return false;
  if (bytes <= size_t(now.maxDynamicSharedSizeBytes)) return true;
  if (!done(cudaGetDevice(&device)) ||
      !done(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)))
    return false;
  most -= int(now.sharedSizeBytes);
  return int64_t(bytes) <= most &&
         done(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most));
}

// 16 bytes from global to shared memory, zeros if `from` is null; they are there after wait_for_copies and a barrier.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async".
__device__ __forceinline__ void copy16_async(void* to, const void* from) {
  const unsigned shared = unsigned(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(from), "r"(from ? 16 : 0) : "memory");
}
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.commit_group".
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Of the groups that this thread has committed, all but the newest kOpen are done.
// PTX ISA, "Data Movement and Conversion Instructions: cp.async.wait_group / cp.async.wait_all".
template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// Four tiles of 8 rows of 4 numbers from shared memory. Lane 8i + r gives the address of row r of tile i, a multiple of
// 16; lane 4g + t gets x[i], element t of row g of tile i.
// PTX ISA, "Warp-level matrix load instruction: ldmatrix".
__device__ __forceinline__ void load_tiles(float (&x)[4], const float* row) {
  unsigned bits[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "r"(unsigned(__cvta_generic_to_shared(row)))
               : "memory");
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = __uint_as_float(bits[i]);
}

// sum += A B on tensor cores, A (16, 8), B (8, 8); operands keep 10 bits of their mantissa at least. Of lane 4g + t,
// a: A[g][t], A[g+8][t], A[g][t+4], A[g+8][t+4]; b: B[t][g], B[t+4][g]; sum: [g][2t], [g][2t+1], [g+8][2t],
// [g+8][2t+1].
// PTX ISA, "Multiply-and-Accumulate Instruction: mma"; the operands: "Matrix Fragments for mma.m16n8k8".
__device__ __forceinline__ void multiply_tf32(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
               : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
                 "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace simt

// SIMT_SHARED(sums, float[32]); declares shared memory of the block.
#define SIMT_SHARED(name, ...) __shared__ typename ::simt::Type<__VA_ARGS__>::type name
// The same for a struct too large for that; one per kernel, launched with launch_with_shared(sizeof(the struct), ...).
#define SIMT_DYNAMIC_SHARED(name, ...)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  auto& name = *reinterpret_cast<typename ::simt::Type<__VA_ARGS__>::type*>(dynamic_shared)
// For an array of `count` elements that only the launch knows.
#define SIMT_DYNAMIC_ARRAY(name, count, ...)                      \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  auto* const name = reinterpret_cast<typename ::simt::Type<__VA_ARGS__>::type*>(dynamic_shared)
#else
#include "cuda_on_cpu.h"
#endif
