// Where CUDA work of an operator goes: the device of its tensors and PyTorch's current stream there; and the dispatch
// key under which it registers. For csrc/cuda, whose files nvcc compiles for the GPU. The tests compile the same files
// with the host compiler (kernels/simt.cuh): device memory is the host's there, the key CPU, and a launch ends with its
// kernel.
#pragma once
#include <torch/csrc/stable/library.h>

#include "binding/checks.h"
#include "kernels/simt.cuh"

#ifdef __CUDACC__
#include <torch/csrc/stable/accelerator.h>

// FWPKM_CUDA_LIBRARY_IMPL(m) { m.impl(...); } registers CUDA operators.
#define FWPKM_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fwpkm, CUDA, m)

// Lives in libtorch_cuda.so alone. Weak: the library must load in a PyTorch without CUDA, where there are no CUDA
// tensors and nobody calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#else
#define FWPKM_CUDA_LIBRARY_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m)
#endif

namespace fwpkm {

inline void check_cuda(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": CUDA error: ", cudaGetErrorString(error));
}

// While a stream is being captured CUDA may refuse calls that others could be hurt by: making streams, asking for what
// code must be loaded for. Those that are made while it lives hurt nobody.
class RelaxedCapture {
 public:
  RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~RelaxedCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

#ifdef __CUDACC__
// While it lives the device of `t` is the current one.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "a CUDA tensor came, but this PyTorch has no CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};
#else
class CudaScope {
 public:
  explicit CudaScope(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};
#endif

}  // namespace fwpkm
