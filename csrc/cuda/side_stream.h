// A second stream beside PyTorch's current one, for launches that need not wait for each other. To everybody else all
// of it is work of the current stream: it begins after what that was given before, and ends before what comes next. In
// a CUDA graph it becomes a branch.
#pragma once
#include "binding/stream.h"

namespace fwpkm {

// A side belongs to one stream of one device, for good: what is captured into a graph meets nobody else's work there.
// Its kernels go first where both could run. Memory that is freed in the order of the current stream may be used on
// both until this object is gone.
class SideStream {
 public:
  // `apart` false: the side is the current stream itself, and nothing waits.
  SideStream(cudaStream_t current, bool apart);
  ~SideStream();
  SideStream(const SideStream&) = delete;
  SideStream& operator=(const SideStream&) = delete;

  cudaStream_t stream() const { return side_; }
  void follow();  // the side waits for all that the current stream has been given so far
  void join();    // the current stream waits for all that the side has been given so far

 private:
  cudaStream_t current_, side_;
  cudaEvent_t of_current_{}, of_side_{};
};

}  // namespace fwpkm
