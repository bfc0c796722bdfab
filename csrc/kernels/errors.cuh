// What a kernel may report without the host waiting for it: bits of one word in device memory, set and never cleared by
// kernels. A kernel's `errors` may be null: then nobody wants to know.
#pragma once
#include "kernels/simt.cuh"

namespace fwpkm::kernels {

enum Error : unsigned {
  kIndexOutOfRange = 1,  // an index was not a slot; nothing was read or written there
};

__device__ __forceinline__ void report(unsigned* errors, Error error) {
  if (errors) atomicOr(errors, unsigned(error));
}

}  // namespace fwpkm::kernels
