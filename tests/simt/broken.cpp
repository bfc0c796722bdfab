// Kernels with one mistake each: tests of the harness, which must report them. Some have a right version beside them,
// which must pass. The program's command `broken NAME` runs one.
#include "broken.h"

#include "kernels/warp.cuh"
#include "testing.h"

namespace {

using fwpkm::kernels::Pack;

__global__ void exchange(int* out, bool barrier) {
  SIMT_SHARED(x, int[64]);
  x[threadIdx.x] = int(threadIdx.x);
  if (barrier) __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 33];
}
__global__ void shuffle_as_fence(int* out) {
  SIMT_SHARED(x, int[64]);
  x[threadIdx.x] = int(threadIdx.x);
  __shfl_sync(~0u, 0, 0);
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}
__global__ void divergent_barrier(int* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void return_before_barrier(int* out) {
  if (threadIdx.x > 40) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void shuffle_outside_mask(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0xffffu, int(threadIdx.x), 8);
}
__global__ void different_masks(int* out) {
  out[threadIdx.x] = __shfl_sync(threadIdx.x % 32 < 16 ? 0xffffu : ~0u, int(threadIdx.x), 0);
}
__global__ void mask_of_returned_lane(int* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = int(__ballot_sync(~0u, 1));
}
__global__ void deadlock(int* out) {
  if (threadIdx.x < 16)
    __syncwarp();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void endless_spin(int* out) {
  while (atomicAdd(out, 0) != 7) {
  }
}
__global__ void write_beyond_array(int* out) { out[threadIdx.x + 1] = 1; }
__global__ void write_beyond_shared(int* out) {
  SIMT_SHARED(x, int[64]);
  int* p = x;
  p[threadIdx.x + 1] = 1;
  out[threadIdx.x] = 1;
}
__global__ void misaligned_pack(int* out) {
  const auto* p = reinterpret_cast<const Pack<float>*>(out + 1);
  const Pack<float> pack = *p;
  out[0] = int(pack.v[0]);
}
__global__ void misaligned_copy(int* out) {
  SIMT_SHARED(x, Pack<int>);
  simt::copy16_async(&x, out + 1);
}
__global__ void static_shared(int* out) {
  SIMT_SHARED(x, char[(48 << 10) + 1]);
  out[0] = x[0];
}
__global__ void dynamic_shared(int* out, int bytes) {
  SIMT_SHARED(y, int[64]);
  SIMT_DYNAMIC_ARRAY(x, bytes, char);
  out[0] = x[0] + y[0];
}
__global__ void two_blocks_add(int* out) {
  if (threadIdx.x == 0) out[0] += 1;
}
// The last block to finish adds what all have left.
__global__ void last_block(int* part, unsigned* ticket, int* out, bool fence) {
  if (threadIdx.x) return;
  part[blockIdx.x] = int(blockIdx.x);
  if (fence) __threadfence();
  const bool last = atomicAdd(ticket, 1u) == gridDim.x - 1;
  if (fence) __threadfence();
  for (unsigned i = 0; last && i < gridDim.x; ++i) *out += part[i];
}

// Launches with so much dynamic shared memory.
int launch_dynamic(int* out, int given, int taken) {
  return simt::launch_with_shared(size_t(given), dynamic_shared, 1, 1, nullptr, out, taken);
}

// What ends a capture in which two streams work, one beside the other; or the first error.
int capture(const std::string& mistake) {
  cudaStream_t side, other;
  cudaEvent_t begin, end;
  for (cudaStream_t* s : {&side, &other}) cudaStreamCreateWithPriority(s, 0, 0);
  for (cudaEvent_t* e : {&begin, &end}) cudaEventCreateWithFlags(e, 0);
  int error = cudaStreamBeginCapture(nullptr, cudaStreamCaptureModeGlobal);
  const auto check = [&](int result) { error = error ? error : result; };
  const auto wait = [&](cudaStream_t behind, cudaEvent_t event, cudaStream_t ahead) {
    check(cudaEventRecord(event, ahead));
    check(cudaStreamWaitEvent(behind, event, 0));
  };
  wait(side, begin, mistake == "capture_waits_for_others" ? other : nullptr);
  if (mistake == "capture_waits_for_others") wait(nullptr, end, other);
  if (mistake == "capture_synchronises_stream") check(cudaStreamSynchronize(side));
  if (mistake == "capture_synchronises_device") check(cudaDeviceSynchronize());
  if (mistake == "capture_makes_stream") check(cudaStreamCreateWithPriority(&other, 0, 0));
  if (mistake == "capture_makes_event") check(cudaEventCreateWithFlags(&begin, 0));
  if (mistake == "right_capture") {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cudaThreadExchangeStreamCaptureMode(&mode);
    check(cudaStreamCreateWithPriority(&other, 0, 0));
    cudaThreadExchangeStreamCaptureMode(&mode);
  }
  int to = 0;
  if (mistake != "capture_unjoined") wait(nullptr, end, side);
  if (mistake == "capture_unjoined_again") check(cudaMemcpyAsync(&to, &error, 4, cudaMemcpyDefault, side));
  const int ended = cudaStreamEndCapture(nullptr, nullptr);
  if (error && ended != cudaErrorStreamCaptureInvalidated) return -1;
  check(ended);
  return error;
}

}  // namespace

int run_broken(const std::string& name) {
  testing::Buffer<int> out(64);
  out.clear(0);
  int* p = out.get();
  if (name == "missing_barrier") return simt::launch(exchange, 1, 64, nullptr, p, false);
  if (name == "right_barrier") return simt::launch(exchange, 1, 64, nullptr, p, true);
  if (name == "shuffle_as_fence") return simt::launch(shuffle_as_fence, 1, 64, nullptr, p);
  if (name == "divergent_barrier") return simt::launch(divergent_barrier, 1, 64, nullptr, p);
  if (name == "return_before_barrier") return simt::launch(return_before_barrier, 1, 64, nullptr, p);
  if (name == "shuffle_outside_mask") return simt::launch(shuffle_outside_mask, 1, 64, nullptr, p);
  if (name == "different_masks") return simt::launch(different_masks, 1, 64, nullptr, p);
  if (name == "mask_of_returned_lane") return simt::launch(mask_of_returned_lane, 1, 64, nullptr, p);
  if (name == "deadlock") return simt::launch(deadlock, 1, 32, nullptr, p);
  if (name == "endless_spin") return simt::launch(endless_spin, 1, 32, nullptr, p);
  if (name == "write_beyond_array") return simt::launch(write_beyond_array, 1, 64, nullptr, p);
  if (name == "write_beyond_shared") return simt::launch(write_beyond_shared, 1, 64, nullptr, p);
  if (name == "misaligned_pack") return simt::launch(misaligned_pack, 1, 1, nullptr, p);
  if (name == "misaligned_copy") return simt::launch(misaligned_copy, 1, 1, nullptr, p);
  if (name == "static_shared") return simt::launch(static_shared, 1, 1, nullptr, p);
  if (name == "right_shared")
    return simt::allow_shared(dynamic_shared, 226 << 10) ? launch_dynamic(p, 226 << 10, 226 << 10) : -1;
  if (name == "shared_beyond_launch") return launch_dynamic(p, 100, 101);
  if (name == "shared_beyond_device")
    return simt::allow_shared(dynamic_shared, 227 << 10) ? launch_dynamic(p, 227 << 10, 100) : -1;
  if (name == "shared_beyond_what_is_known") {
    const int first = launch_dynamic(p, 100, 100);
    return first ? first : simt::allow_shared(dynamic_shared, 227 << 10) ? 0 : -2;
  }
  if (name == "shared_not_allowed") return launch_dynamic(p, (48 << 10) + 1, 100);
  if (name == "many_threads") return simt::launch(two_blocks_add, 1, 1025, nullptr, p);
  if (name == "large_grid") return simt::launch(two_blocks_add, 1u << 31, 1, nullptr, p);
  if (name.find("capture") != std::string::npos) return capture(name);
  if (name == "two_blocks_add") return simt::launch(two_blocks_add, 2, 64, nullptr, p);
  if (name == "missing_fence")
    return simt::launch(last_block, 4, 32, nullptr, p, reinterpret_cast<unsigned*>(p + 10), p + 20, false);
  if (name == "right_fence")
    return simt::launch(last_block, 4, 32, nullptr, p, reinterpret_cast<unsigned*>(p + 10), p + 20, true);
  if (name == "no_blocks") return simt::launch(two_blocks_add, 0, 64, nullptr, p);
  return -1;
}
