// CUDA for a host compiler: the language and the intrinsics that the kernels use. Each CUDA thread is a fiber; the
// scheduler is cuda_on_cpu.cpp. Types come from NVIDIA's own headers.
//
// Every schedule follows from Options::seed. Wrong use of barriers and collectives, and deadlock, throw
// std::runtime_error and name the thread and the line; memory errors and races are for the sanitizers to find.
#pragma once
#include <driver_types.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#define __global__
#define __device__
#define __host__
#define __shared__ static_assert(false, "use SIMT_SHARED(name, type)");
#define __forceinline__ inline
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;  // rewritten at every switch
inline dim3 blockDim, gridDim;
using std::exp;
using std::fma;
using std::isfinite;
using std::log;
using std::sqrt;

// The caller's place, as default arguments.
#define SIMT_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace simt {

struct Site {
  const char* file = "";
  int line = 0;
  bool operator==(const Site& other) const { return line == other.line && !std::strcmp(file, other.file); }
  std::string str() const { return std::string(file) + ":" + std::to_string(line); }
};

struct Options {
  uint64_t seed = 0;
  int resident = 2;                    // blocks in flight at once
  double preempt = 0.25;               // chance of a switch at an atomic or a fence
  Site skip;                           // the barrier here does nothing: for mutation tests
  int skip_wait = -1;                  // neither does this wait of a stream for another, counted from 0 as they come
  int skip_waits = 1;                  // nor those that follow, so many in all
  int fail_launch = -1;                // this launch is refused, counted from 0 as they come
  bool side_first = false;             // of two streams, the made one runs first wherever it may; else stream 0
  size_t shared_of_block = 227 << 10;  // what the device lets a kernel opt in to
};
inline Options options;
inline std::vector<Site> barriers_seen;  // every __syncthreads and __syncwarp that was reached
inline int waits_seen = 0;               // of streams for other streams
inline int launches_seen = 0;
inline int left_behind = 0;     // of what a stream was given, and nobody has waited for when stream 0 was synchronised
inline int shared_refused = 0;  // more shared memory than the device has

namespace detail {

enum class Op { kSync, kShfl, kShflUp, kShflDown, kShflXor, kBallot, kMatchAny, kMultiply };

// What a lane brings to kMultiply.
struct Fragments {
  float a[4], b[2];
};

// The launch under way, for traffic.cpp; `number` counts launches.
struct Launch {
  const void* kernel = nullptr;
  dim3 grid, block;
  size_t number = 0;
};
inline Launch running;

cudaError_t run(dim3 grid, dim3 block, size_t dynamic_shared, const void* kernel, const std::function<void()>& body);
bool in_global_memory(const void* p);
cudaError_t submit(cudaStream_t stream, std::function<cudaError_t()> work);
cudaError_t submit_launch(cudaStream_t stream, std::function<cudaError_t()> work);
bool allow_shared(const void* kernel, size_t bytes);
void require_aligned(const void* p, size_t bytes, const char* what, Site at);
void block_barrier(Site at);
void warp_collective(Op op, unsigned mask, int argument, const void* in, void* out, size_t size, Site at);
void* shared(const void* key, size_t size, size_t align, bool dynamic);
void preempt();
void fence();
void copy_async(void* to, const void* from);
void commit_copies();
bool take_copy(size_t open, void** to, const void** from);

template <typename T>
T collective(Op op, unsigned mask, T v, int argument, Site at) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  T out = v;
  warp_collective(op, mask, argument, &v, &out, sizeof(T), at);
  return out;
}

// Relaxed, as in CUDA.
template <typename T, typename F>
T atomic(T* p, F f) {
  preempt();
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(p, &old, f(old), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return old;
}

// Copies of the parameters are no loads of the kernel's.
template <typename Kernel, typename Tuple, size_t... I>
__attribute__((no_sanitize("thread"))) void call(Kernel* kernel, const Tuple& parameters, std::index_sequence<I...>) {
  kernel(std::get<I>(parameters)...);
}

}  // namespace detail

template <typename... Parameters, typename... Arguments>
cudaError_t launch_with_shared(size_t shared, void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                               Arguments&&... arguments) {
  std::tuple<Parameters...> parameters{static_cast<Parameters>(std::forward<Arguments>(arguments))...};
  return detail::submit_launch(stream, [=] {
    return detail::run(grid, block, shared, reinterpret_cast<const void*>(kernel),
                       [&] __attribute__((no_sanitize("thread"))) {
                         detail::call(kernel, parameters, std::index_sequence_for<Parameters...>());
                       });
  });
}
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_with_shared(0, kernel, grid, block, stream, std::forward<Arguments>(arguments)...);
}
template <typename Kernel>
bool allow_shared(Kernel* kernel, size_t bytes) {
  return detail::allow_shared(reinterpret_cast<const void*>(kernel), bytes);
}

inline unsigned load_relaxed(const unsigned* p) { return __atomic_load_n(p, __ATOMIC_RELAXED); }

// Copies happen when they are waited for, never before; from their beginning on there is garbage (NaN, -1).
inline void copy16_async(void* to, const void* from, SIMT_HERE) {
  detail::require_aligned(to, 16, "copy16_async", {file, line});
  detail::require_aligned(from, 16, "copy16_async", {file, line});
  std::memset(to, 0xFF, 16);
  detail::copy_async(to, from);
}
inline void commit_copies() { detail::commit_copies(); }
template <int kOpen>
void wait_for_copies() {
  void* to;
  const void* from;
  while (detail::take_copy(kOpen, &to, &from))
    for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(to)[i] = from ? static_cast<const uint32_t*>(from)[i] : 0;
}

// Operands lose what is below 10 bits of mantissa, as a device may.
inline void multiply_tf32(float (&sum)[4], const float (&a)[4], const float (&b)[2], SIMT_HERE) {
  detail::Fragments in{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, out;
  detail::warp_collective(detail::Op::kMultiply, ~0u, 0, &in, &out, sizeof in, {file, line});
  for (int i = 0; i < 4; ++i) sum[i] += out.a[i];
}

inline void load_tiles(float (&x)[4], const float* row, SIMT_HERE) {
  detail::require_aligned(row, 16, "load_tiles", {file, line});
  const int lane = int(threadIdx.x) % 32;
  for (int i = 0; i < 4; ++i) {
    const auto from =
        detail::collective(detail::Op::kShfl, ~0u, reinterpret_cast<uintptr_t>(row), 8 * i + lane / 4, {file, line});
    x[i] = reinterpret_cast<const float*>(from)[lane % 4];
  }
}

template <typename T>
void store16(void* to, const T& from, SIMT_HERE) {
  detail::require_aligned(to, 16, "store16", {file, line});
  *static_cast<T*>(to) = from;
}

}  // namespace simt

#define SIMT_SHARED(name, ...)                                      \
  static char name##_simt_key;                                      \
  auto& name = *static_cast<std::remove_reference_t<__VA_ARGS__>*>( \
      ::simt::detail::shared(&name##_simt_key, sizeof(__VA_ARGS__), alignof(__VA_ARGS__), false))

#define SIMT_DYNAMIC_SHARED(name, ...)                              \
  static char name##_simt_key;                                      \
  auto& name = *static_cast<std::remove_reference_t<__VA_ARGS__>*>( \
      ::simt::detail::shared(&name##_simt_key, sizeof(__VA_ARGS__), 16, true))

#define SIMT_DYNAMIC_ARRAY(name, count, ...) \
  static char name##_simt_key;               \
  auto* const name =                         \
      static_cast<__VA_ARGS__*>(::simt::detail::shared(&name##_simt_key, sizeof(__VA_ARGS__) * (count), 16, true))

// ---- barriers and fences
inline void __syncthreads(SIMT_HERE) { simt::detail::block_barrier({file, line}); }
inline void __syncwarp(unsigned mask = ~0u, SIMT_HERE) {
  simt::detail::collective(simt::detail::Op::kSync, mask, 0, 0, {file, line});
}
inline void __threadfence() { simt::detail::fence(); }

// ---- warp collectives. No __activemask: its value is not defined enough to test. A shuffle's width is 32.
template <typename T>
T __shfl_sync(unsigned mask, T v, int lane, SIMT_HERE) {
  static_assert(std::is_arithmetic_v<T>);
  return simt::detail::collective(simt::detail::Op::kShfl, mask, v, lane, {file, line});
}
template <typename T>
T __shfl_up_sync(unsigned mask, T v, unsigned distance, SIMT_HERE) {
  static_assert(std::is_arithmetic_v<T>);
  return simt::detail::collective(simt::detail::Op::kShflUp, mask, v, int(distance), {file, line});
}
template <typename T>
T __shfl_down_sync(unsigned mask, T v, unsigned distance, SIMT_HERE) {
  static_assert(std::is_arithmetic_v<T>);
  return simt::detail::collective(simt::detail::Op::kShflDown, mask, v, int(distance), {file, line});
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T v, int lane_mask, SIMT_HERE) {
  static_assert(std::is_arithmetic_v<T>);
  return simt::detail::collective(simt::detail::Op::kShflXor, mask, v, lane_mask, {file, line});
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SIMT_HERE) {
  return simt::detail::collective(simt::detail::Op::kBallot, mask, unsigned(predicate != 0), 0, {file, line});
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T v, SIMT_HERE) {
  static_assert(sizeof(T) == 4);
  unsigned bits;
  std::memcpy(&bits, &v, 4);
  return simt::detail::collective(simt::detail::Op::kMatchAny, mask, bits, 0, {file, line});
}

// ---- atomics
template <typename T>
T atomicAdd(T* p, std::common_type_t<T> v) {
  static_assert(std::is_integral_v<T>, "sums of floats in any order are not repeatable");
  return simt::detail::atomic(p, [&](T old) { return T(old + v); });
}
template <typename T>
T atomicMax(T* p, std::common_type_t<T> v) {
  static_assert(std::is_integral_v<T>);
  return simt::detail::atomic(p, [&](T old) { return old > v ? old : T(v); });
}
template <typename T>
T atomicOr(T* p, std::common_type_t<T> v) {
  return simt::detail::atomic(p, [&](T old) { return T(old | v); });
}
template <typename T>
T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> v) {
  return simt::detail::atomic(p, [&](T old) { return old == expected ? T(v) : old; });
}

template <typename T>
T atomicExch(T* p, std::common_type_t<T> v) {
  return simt::detail::atomic(p, [&](T) { return T(v); });
}

// ---- the runtime, for the host code around the kernels. Everything is done when a call returns, until a stream waits
// for another: from then on until cudaStreamSynchronize one of the two does nothing before somebody waits for it, by
// turns (Options::side_first); and what nobody waits for is never done. So a wait that is missing gives wrong results.
//
// While a stream is captured nothing is recorded: work is done as ever. But calls are refused that CUDA refuses, and
// make the capture invalid; so is a capture that ends before all of its streams have been joined. What is not declared
// here (events and streams that are asked or waited for, memory) may not be used at all.
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind, cudaStream_t stream) {
  return simt::detail::submit(stream, [=] {
    std::memcpy(to, from, size);
    return cudaSuccess;
  });
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority);
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned flags);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
namespace simt {
// All that a stream has been given, and what that waits for, is done. For memory here is freed when the host frees it,
// and not in the order of a stream; no call of CUDA.
void finish(cudaStream_t stream);
}  // namespace simt
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph);
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaDeviceSynchronize();
inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
namespace simt::detail {
cudaError_t unsafe_in_capture();
}
template <typename T>
cudaError_t cudaGetSymbolAddress(void** address, T& symbol) {  // may load the library's code
  *address = &symbol;
  return simt::detail::unsafe_in_capture();
}

// ---- bits
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
