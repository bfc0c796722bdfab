// The error word of each device (errors.h), and torch.ops.fwpkm.take_errors on CUDA: the one operator that waits.
#include "cuda/errors.h"

#include <atomic>

#include "binding/stream.h"
#include "binding/tensors.h"
#include "kernels/errors.cuh"

namespace fwpkm {
namespace {

__device__ unsigned word;  // one on every device

// Exchanged, not read and then cleared: a kernel of another stream may report something in between.
__global__ void take(unsigned* errors, unsigned* taken) { *taken = atomicExch(errors, 0u); }

// What the kernels of the device have reported since the last call, as bits of kernels::Error.
int64_t take_errors_cuda(const Tensor& device) {
  const CudaScope cuda(device);
  const Tensor taken = make(device, {1}, ScalarType::Int);
  void* address = taken.mutable_data_ptr();
  unsigned errors = 0;
  check_cuda(cudaDeviceSynchronize(), "take_errors");  // whatever was queued before, in any stream, has reported
  check_cuda(simt::launch(take, 1, 1, cuda.stream(), error_word(), static_cast<unsigned*>(address)), "take_errors");
  check_cuda(cudaMemcpyAsync(&errors, address, sizeof errors, cudaMemcpyDeviceToHost, cuda.stream()), "take_errors");
  check_cuda(cudaStreamSynchronize(cuda.stream()), "take_errors");
  return errors;
}

}  // namespace

// Asked of CUDA once per device: the question may load the library's code there.
unsigned* error_word() {
  constexpr int kMostDevices = 64;
  static std::atomic<unsigned*> known[kMostDevices];
  int device = 0;
  check_cuda(cudaGetDevice(&device), "error_word");
  STD_TORCH_CHECK(device < kMostDevices, "device: expected a number below ", kMostDevices, ", got ", device);
  if (unsigned* const address = known[device].load(std::memory_order_relaxed)) return address;
  void* address = nullptr;
  const RelaxedCapture relaxed;
  check_cuda(cudaGetSymbolAddress(&address, word), "error_word");
  known[device].store(static_cast<unsigned*>(address), std::memory_order_relaxed);
  return static_cast<unsigned*>(address);
}

FWPKM_CUDA_LIBRARY_IMPL(m) { m.impl("take_errors", TORCH_BOX(&take_errors_cuda)); }

}  // namespace fwpkm
