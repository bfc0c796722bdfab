// The one header that a kernel file includes for CUDA itself. Under nvcc it is CUDA; under a host compiler the tests'
// stand-in takes its place (tests/simt/cuda_on_cpu.h), which runs every CUDA thread as a fiber.
//
// Kernels keep to what both understand: SIMT_SHARED instead of __shared__, simt::launch instead of <<<>>>, collectives
// with explicit masks, fmaf instead of a * b + c (nvcc contracts that, a host compiler may not).
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

// Returns before the kernel ends. An error of the launch itself is returned, and not left for the next caller to find.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.stream = stream;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...);
  if (error != cudaSuccess) cudaGetLastError();
  return error;
}

}  // namespace simt

// SIMT_SHARED(sums, float[32]); declares shared memory of the block.
#define SIMT_SHARED(name, ...) __shared__ typename ::simt::Type<__VA_ARGS__>::type name
#else
#include "cuda_on_cpu.h"
#endif
