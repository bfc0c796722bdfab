// The plain C interface of the ops library: what it was built from, what it sees, what it would run. No torch types, so
// that module.cpp (or any program) can use it without torch headers. Nothing here throws or needs a GPU or a driver.
#pragma once
#include <stdint.h>

#ifdef __cplusplus
#define FWPKM_API extern "C" __attribute__((visibility("default")))
#else
#define FWPKM_API
#endif

// Null: not part of this build.
struct FwpkmBuildInfo {
  const char* version;
  const char* torch_headers;
  const char* torch_target;  // the oldest PyTorch the library loads in
  const char* cxx_compiler;
  const char* cxx_compiler_version;
  const char* cxx_flags;
  const char* build_type;
  const char* cuda_compiler_version;
  const char* cuda_archs;  // separated by commas; empty without CUDA
};

struct FwpkmCudaDevice {
  char name[256];
  int capability_major;
  int capability_minor;
  int64_t total_memory;
};

FWPKM_API const struct FwpkmBuildInfo* fwpkm_build_info(void);

// CUDA versions are coded as in cudaRuntimeGetVersion: 13000 is 13.0. 0: no CUDA in this build, or no driver.
FWPKM_API int fwpkm_cuda_runtime_version(void);
FWPKM_API int fwpkm_cuda_driver_version(void);
FWPKM_API int fwpkm_cuda_device_count(void);
// Why fwpkm_cuda_device_count() is what it is: "ok", "none" or the error text of the CUDA runtime.
FWPKM_API const char* fwpkm_cuda_status(void);
// Returns 0, and leaves `device` alone, if there is no such device.
FWPKM_API int fwpkm_cuda_device(int index, struct FwpkmCudaDevice* device);

// Defined in cpu/dispatch.cpp.
FWPKM_API const char* fwpkm_cpu_capability(void);
// The kernel that a shape takes. The string lives until the next call of the same thread.
FWPKM_API const char* fwpkm_kernel_for(const char* op, const char* device, const char* dtype, int64_t topk,
                                       int64_t num_sub_keys, int64_t key_dim, int64_t value_dim);
