// Large arrays of zeros, straight from the operating system: nothing is cleared that nobody writes, and in huge pages
// (where the system grants them) the first writes cost one fault for 2 MiB, not for 4 KiB.
#pragma once
#include <new>
#include <vector>

#include <sys/mman.h>

#include "binding/tensors.h"

namespace fwpkm {

constexpr int64_t kHugePage = 2 << 20;

struct Unmap {
  int64_t bytes;
  void operator()(void* p) const { munmap(p, bytes); }
};

inline void* map_zeros(int64_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) throw std::bad_alloc();
  madvise(p, bytes, MADV_HUGEPAGE);  // a wish
  return p;
}

// On the CPU.
inline Tensor make_zero_pages(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  int64_t bytes = type == ScalarType::Byte ? 1 : like.element_size();
  for (const int64_t n : size) bytes *= n;
  if (bytes < kHugePage) return make_zeros(like, size, type);
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return torch::stable::from_blob(map_zeros(bytes), {size.data(), size.size()}, {strides.data(), strides.size()},
                                  like.device(), type, Unmap{bytes});
}

}  // namespace fwpkm
