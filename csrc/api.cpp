// What the library was built from; the rest of api.h is answered by cpu/dispatch.cpp and cuda/device.cu.
#include "api.h"

#include "build_info.h"

namespace {

constexpr const char* null_if_empty(const char* text) { return text[0] == '\0' ? nullptr : text; }

// TORCH_TARGET_VERSION is 0xMMmmpp..., one byte each.
constexpr uint64_t kTarget = TORCH_TARGET_VERSION;
constexpr int kTargetMajor = (kTarget >> 56) & 0xff;
constexpr int kTargetMinor = (kTarget >> 48) & 0xff;
static_assert(kTargetMajor == 2 && kTargetMinor >= 10 && kTargetMinor < 100, "kTargetText has room for 2.NN");
constexpr char kTargetText[] = {'2', '.', '0' + kTargetMinor / 10, '0' + kTargetMinor % 10, '\0'};

}  // namespace

FWPKM_API const FwpkmBuildInfo* fwpkm_build_info() {
  static const FwpkmBuildInfo info = {
      .version = FWPKM_VERSION,
      .torch_headers = FWPKM_TORCH_HEADERS,
      .torch_target = kTargetText,
      .cxx_compiler = FWPKM_CXX_COMPILER,
      .cxx_compiler_version = FWPKM_CXX_COMPILER_VERSION,
      .cxx_flags = FWPKM_CXX_FLAGS,
      .build_type = FWPKM_BUILD_TYPE,
      .cuda_compiler_version = null_if_empty(FWPKM_CUDA_COMPILER_VERSION),
      .cuda_archs = FWPKM_CUDA_ARCHS,
  };
  return &info;
}

#ifndef FWPKM_WITH_CUDA  // with CUDA: cuda/device.cu
FWPKM_API int fwpkm_cuda_runtime_version() { return 0; }
FWPKM_API int fwpkm_cuda_driver_version() { return 0; }
FWPKM_API int fwpkm_cuda_device_count() { return 0; }
FWPKM_API const char* fwpkm_cuda_status() { return "none"; }
FWPKM_API int fwpkm_cuda_device(int, FwpkmCudaDevice*) { return 0; }
#endif
