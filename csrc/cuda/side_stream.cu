// Makes the side streams of side_stream.h, each when it is first asked for.
#include "cuda/side_stream.h"

#include <map>
#include <mutex>

namespace fwpkm {
namespace {

struct Side {
  cudaStream_t stream;
  cudaEvent_t of_current, of_side;
};

Side make_side() {
  const RelaxedCapture relaxed;
  Side side{};
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "side stream");
  check_cuda(cudaStreamCreateWithPriority(&side.stream, cudaStreamNonBlocking, greatest), "side stream");
  for (cudaEvent_t* event : {&side.of_current, &side.of_side})
    check_cuda(cudaEventCreateWithFlags(event, cudaEventDisableTiming), "side stream");
  return side;
}

// PyTorch has a few dozen streams a device, and so there are as many sides at most; they live as long as the process.
Side side_of(cudaStream_t current) {
  static std::mutex mutex;
  static auto& sides = *new std::map<std::pair<int, cudaStream_t>, Side>;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "side stream");
  const std::lock_guard lock(mutex);
  const auto found = sides.find({device, current});
  if (found != sides.end()) return found->second;
  return sides[{device, current}] = make_side();
}

// `behind` waits for what `ahead` has been given so far.
cudaError_t wait(cudaStream_t behind, cudaStream_t ahead, cudaEvent_t event) {
  if (behind == ahead) return cudaSuccess;
  cudaError_t error = cudaEventRecord(event, ahead);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(behind, event, 0);
  if (error != cudaSuccess) cudaGetLastError();  // returned, and not left for the next caller to find
  return error;
}

}  // namespace

SideStream::SideStream(cudaStream_t current, bool apart) : current_(current), side_(current) {
  if (!apart || current == cudaStreamPerThread) return;  // the latter is another stream in every thread
  const Side side = side_of(current);
  side_ = side.stream;
  of_current_ = side.of_current;
  of_side_ = side.of_side;
}

// Whatever has gone wrong before: what the side was given may still use memory that is freed from now on.
SideStream::~SideStream() {
  wait(current_, side_, of_side_);
#ifndef __CUDACC__
  simt::finish(current_);  // the memory of the tests' stand-in is not freed in the order of a stream
#endif
}

void SideStream::follow() { check_cuda(wait(side_, current_, of_current_), "side stream"); }
void SideStream::join() { check_cuda(wait(current_, side_, of_side_), "side stream"); }

}  // namespace fwpkm
