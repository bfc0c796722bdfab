// Chooses the vectorised loops for the machine, once, and names the kernel that a shape takes.
#include <cstdlib>
#include <cstring>
#include <string>

#include "api.h"
#include "cpu/vector.h"

namespace fwpkm::vector {

#define FWPKM_DECLARE(NAME)             \
  namespace NAME {                      \
  extern const Kernels<float> kFloat;   \
  extern const Kernels<double> kDouble; \
  }
FWPKM_DECLARE(baseline)
#if defined(__x86_64__)
FWPKM_DECLARE(avx2)
FWPKM_DECLARE(avx512)
#endif

namespace {

struct Choice {
  const char* name;
  const Kernels<float>* of_float;
  const Kernels<double>* of_double;
};

Choice choose() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FWPKM_CPU_CAPABILITY");
  const bool baseline_only = limit && !std::strcmp(limit, "baseline");
  const bool avx2_only = limit && !std::strcmp(limit, "avx2");
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vl");
  if (has_avx512 && !baseline_only && !avx2_only) return {"avx512", &avx512::kFloat, &avx512::kDouble};
  if (has_avx2 && !baseline_only) return {"avx2", &avx2::kFloat, &avx2::kDouble};
#endif
  return {"baseline", &baseline::kFloat, &baseline::kDouble};
}

const Choice& chosen() {
  static const Choice choice = choose();
  return choice;
}

}  // namespace

template <>
const Kernels<float>& kernels<float>() {
  return *chosen().of_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *chosen().of_double;
}

const char* capability() { return chosen().name; }

}  // namespace fwpkm::vector

FWPKM_API const char* fwpkm_cpu_capability() { return fwpkm::vector::capability(); }

namespace {

// The limits of csrc/cuda/scan.h; packs and lists of csrc/kernels/warp.cuh and best_list.cuh.
const char* kernel_on_cuda([[maybe_unused]] const std::string& name, [[maybe_unused]] bool is_double,
                           [[maybe_unused]] int64_t topk, [[maybe_unused]] int64_t key_dim,
                           [[maybe_unused]] int64_t value_dim) {
#ifdef FWPKM_WITH_CUDA
  static thread_local std::string answer;
  const bool searches = name != "value_gather" && name != "commit_" && key_dim > 0;
  if (searches && topk > 128) return "none: topk is at most 128 on CUDA";
  const auto rows = [&](int64_t width) {
    return width % (is_double ? 2 : 4) ? "single elements" : "packs of 16 bytes";
  };
  answer = std::string("cuda/simt: ") + (is_double ? "float64" : "float32");
  if (searches)
    answer += std::string(", half keys in ") + rows(key_dim / 2) + ", lists of " + (topk <= 32 ? "1" : "4") +
              " registers a lane";
  if (name != "product_key_topk" && value_dim > 0) answer += std::string(", value rows in ") + rows(value_dim);
  return answer.c_str();
#else
  return "none: this build has no CUDA kernels";
#endif
}

}  // namespace

FWPKM_API const char* fwpkm_kernel_for(const char* op, const char* device, const char* dtype, int64_t topk,
                                       int64_t num_sub_keys, int64_t key_dim, int64_t value_dim) {
  static thread_local std::string answer;
  const std::string name(op ? op : "");
  const bool is_double = dtype && !std::strcmp(dtype, "float64");
  if (!device || std::strcmp(device, "cpu") != 0) return kernel_on_cuda(name, is_double, topk, key_dim, value_dim);
  const int64_t lanes = is_double ? 8 : 16;
  const auto rows = [&](int64_t width) {
    return std::to_string(width / lanes) + " vectors" +
           (width % lanes ? " + " + std::to_string(width % lanes) + " elements" : "");
  };
  answer = std::string("cpu/") + fwpkm::vector::capability() + ": " + std::to_string(lanes) + " lanes of " +
           (is_double ? "float64" : "float32");
  if (name != "value_gather" && name != "commit_" && key_dim > 0)
    answer += ", half keys of " + rows(key_dim / 2) + ", selection of " + std::to_string(topk) + " among " +
              std::to_string(num_sub_keys) + " by threshold scan";
  if (name != "product_key_topk" && value_dim > 0) answer += ", value rows of " + rows(value_dim);
  return answer.c_str();
}
