// What the CUDA runtime inside the library sees. With CUDA only; the stand-ins are in ../api.cpp.
#include <cstring>

#include <cuda_runtime.h>

#include "api.h"

namespace {

// The runtime keeps the last error for whoever asks next; a question of ours must not look like a failure of theirs.
bool ok(cudaError_t error) {
  if (error != cudaSuccess) cudaGetLastError();
  return error == cudaSuccess;
}

}  // namespace

FWPKM_API int fwpkm_cuda_runtime_version() {
  int version = 0;
  return ok(cudaRuntimeGetVersion(&version)) ? version : 0;
}

FWPKM_API int fwpkm_cuda_driver_version() {
  int version = 0;
  return ok(cudaDriverGetVersion(&version)) ? version : 0;
}

FWPKM_API int fwpkm_cuda_device_count() {
  int count = 0;
  return ok(cudaGetDeviceCount(&count)) ? count : 0;
}

FWPKM_API const char* fwpkm_cuda_status() {
  if (fwpkm_cuda_driver_version() == 0) return "none";
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  return ok(error) ? "ok" : cudaGetErrorString(error);
}

FWPKM_API int fwpkm_cuda_device(int index, FwpkmCudaDevice* device) {
  cudaDeviceProp properties;
  if (index < 0 || index >= fwpkm_cuda_device_count() || !ok(cudaGetDeviceProperties(&properties, index))) return 0;
  static_assert(sizeof(device->name) == sizeof(properties.name));
  std::memcpy(device->name, properties.name, sizeof(device->name));
  device->capability_major = properties.major;
  device->capability_minor = properties.minor;
  device->total_memory = static_cast<int64_t>(properties.totalGlobalMem);
  return 1;
}
