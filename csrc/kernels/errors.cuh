// What a kernel may report without the host waiting for it: bits of one word in device memory, set and never cleared by
// kernels. A kernel's `errors` may be null: then nobody wants to know.
#pragma once
#include "kernels/simt.cuh"

namespace fwpkm::kernels {

enum Error : unsigned {  // for people: check() in python/fwpkm_cuda/ops.py
  kIndexOutOfRange = 1,  // an index was not a slot; nothing was read or written there
  kNotFinite = 2,        // scores, targets or rows were NaN or infinite; the token was left out of every write
  kOverflow = 4,         // a write would have overflowed; 16 bytes of the row were not written
  kWrittenTwice = 8,     // two rows were given for one slot; the last one was written
};

__device__ __forceinline__ void report(unsigned* errors, Error error) {
  if (errors && !(simt::load_relaxed(errors) & error)) atomicOr(errors, unsigned(error));  // many threads may report
}

}  // namespace fwpkm::kernels
