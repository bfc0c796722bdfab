// Large arrays straight from the operating system, in huge pages where it grants them. A training loop asks for the
// same sizes in every step, so freed blocks are kept for the next step: having pages mapped anew costs more than all
// the rest of the step does.
#pragma once
#include <algorithm>
#include <mutex>
#include <new>
#include <vector>

#include <sys/mman.h>

#include "binding/tensors.h"

namespace fwpkm {

constexpr int64_t kHugePage = 2 << 20;

// The freed blocks, the latest last. What they hold may be taken back by the system when it runs short of memory.
class FreePages {
 public:
  static FreePages& instance() {
    static auto* pages = new FreePages;  // never destroyed: tensors may outlive static objects
    return *pages;
  }

  // What they hold is unspecified.
  void* take(int64_t bytes) {
    void* p = take_kept(bytes);
    if (p) return p;
    p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    madvise(p, bytes, MADV_HUGEPAGE);  // a wish
    return p;
  }

  void give(void* p, int64_t bytes) {
    const std::lock_guard lock(mutex_);
    madvise(p, bytes, MADV_FREE);
    blocks_.push_back({p, bytes});
    kept_ += bytes;
    while (kept_ > kMostKept) {
      munmap(blocks_.front().start, blocks_.front().bytes);
      kept_ -= blocks_.front().bytes;
      blocks_.erase(blocks_.begin());
    }
  }

 private:
  static constexpr int64_t kMostKept = int64_t(1) << 30;
  struct Block {
    void* start;
    int64_t bytes;
  };

  void* take_kept(int64_t bytes) {
    const std::lock_guard lock(mutex_);
    const auto block = std::find_if(blocks_.rbegin(), blocks_.rend(), [&](const Block& b) { return b.bytes == bytes; });
    if (block == blocks_.rend()) return nullptr;
    void* p = block->start;
    blocks_.erase(std::next(block).base());
    kept_ -= bytes;
    return p;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  int64_t kept_ = 0;
};

struct GivePages {
  int64_t bytes;
  void operator()(void* p) const { FreePages::instance().give(p, bytes); }
};

// On the CPU; uninitialised.
inline Tensor make_pages(const Tensor& like, const std::vector<int64_t>& size, ScalarType type) {
  int64_t bytes = type == ScalarType::Byte ? 1 : like.element_size();
  for (const int64_t n : size) bytes *= n;
  if (bytes < kHugePage) return make(like, size, type);
  std::vector<int64_t> strides(size.size(), 1);
  for (size_t d = size.size() - 1; d > 0; --d) strides[d - 1] = strides[d] * size[d];
  return torch::stable::from_blob(FreePages::instance().take(bytes), {size.data(), size.size()},
                                  {strides.data(), strides.size()}, like.device(), type, GivePages{bytes});
}

}  // namespace fwpkm
