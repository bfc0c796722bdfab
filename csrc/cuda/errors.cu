// See errors.h.
#include "cuda/errors.h"

#include "binding/stream.h"

namespace fwpkm {
namespace {

__device__ unsigned word;  // one on every device

}  // namespace

unsigned* error_word() {
  void* address = nullptr;
  check_cuda(cudaGetSymbolAddress(&address, word), "error_word");
  return static_cast<unsigned*>(address);
}

}  // namespace fwpkm
