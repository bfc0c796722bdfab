// Counts the bytes of global memory that the kernels of simt_traffic move, launch by launch. Its files are compiled
// with -fsanitize=thread, which puts a call before every load and store, and linked with these calls in place of
// ThreadSanitizer's.
//
// Loads are counted in sectors of 32 bytes: once for each launch, which is what must come from memory or L2 at least;
// and once for each block, which is what a multiprocessor must be given at least, if its L1 cache forgets nothing that
// the block asks for again. Stores pass through L1: their bytes are counted, and their sectors once for each launch.
#include <cstdio>
#include <unordered_map>
#include <vector>

#include "cuda_on_cpu.h"

namespace {

constexpr uintptr_t kSector = 32, kPage = 1 << 20;

// Who touched each sector last: blocks are numbered through all launches, from 1 on.
class Sectors {
 public:
  uint64_t& operator[](uintptr_t at) {
    if (at / kPage != page_ || !blocks_) {
      page_ = at / kPage;
      blocks_ = &pages_[page_];
      blocks_->resize(kPage / kSector);
    }
    return (*blocks_)[at % kPage / kSector];
  }

 private:
  std::unordered_map<uintptr_t, std::vector<uint64_t>> pages_;
  uintptr_t page_ = 0;
  std::vector<uint64_t>* blocks_ = nullptr;
};

struct Side {  // loads or stores of one launch
  uint64_t bytes = 0, sectors = 0, sectors_of_blocks = 0;
};

struct Record {
  simt::detail::Launch launch;
  uint64_t first_block;
  Side loads, stores;
};

std::vector<Record> records;
Sectors loaded, stored;
uint64_t block;  // the one that runs
uint3 block_index;

Record& record() {
  const simt::detail::Launch& now = simt::detail::running;
  const bool new_launch = records.empty() || records.back().launch.number != now.number;
  if (new_launch || block_index.x != blockIdx.x || block_index.y != blockIdx.y || block_index.z != blockIdx.z) ++block;
  block_index = blockIdx;
  if (new_launch) records.push_back({now, block, {}, {}});
  return records.back();
}

void count(Sectors& last, Side Record::* side, const void* p, size_t size) {
  if (!simt::detail::in_global_memory(p)) return;
  Record& r = record();
  Side& to = r.*side;
  to.bytes += size;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t at = begin / kSector * kSector; at < begin + size; at += kSector) {
    uint64_t& by = last[at];
    to.sectors += by < r.first_block;
    to.sectors_of_blocks += by < block;
    by = block;
  }
}
void load(const void* p, size_t size) { count(loaded, &Record::loads, p, size); }
void store(const void* p, size_t size) { count(stored, &Record::stores, p, size); }

}  // namespace

extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start[];  // where this library begins

// Writes a line for each launch since the last call: where in the library its kernel is, blocks, threads of a block;
// bytes of sectors loaded by the blocks, by the launch; bytes stored, of distinct sectors. Counting begins with the
// first call, for from then on no two blocks run at the same time.
extern "C" __attribute__((visibility("default"))) int simt_traffic(const char* path) {
  simt::options.resident = 1;
  std::FILE* const file = std::fopen(path, "w");
  if (!file) return 1;
  for (const Record& r : records) {
    const auto volume = [](dim3 d) { return uint64_t(d.x) * d.y * d.z; };
    const uint64_t numbers[] = {uint64_t(static_cast<const char*>(r.launch.kernel) - __ehdr_start),
                                volume(r.launch.grid),
                                volume(r.launch.block),
                                r.loads.sectors_of_blocks * kSector,
                                r.loads.sectors * kSector,
                                r.stores.bytes,
                                r.stores.sectors * kSector};
    for (const uint64_t number : numbers) std::fprintf(file, "%llu ", static_cast<unsigned long long>(number));
    std::fprintf(file, "\n");
  }
  records.clear();
  return std::fclose(file);
}

// ---- what the compiler calls
#define SIMT_ACCESS(n)                                     \
  void __tsan_read##n(void* p) { load(p, n); }             \
  void __tsan_write##n(void* p) { store(p, n); }           \
  void __tsan_unaligned_read##n(void* p) { load(p, n); }   \
  void __tsan_unaligned_write##n(void* p) { store(p, n); } \
  void __tsan_volatile_read##n(void* p) { load(p, n); }    \
  void __tsan_volatile_write##n(void* p) { store(p, n); }
// An atomic operation is a load and a store; fetch_add and fetch_sub are the host's alone (cuda_on_cpu.h).
#define SIMT_ATOMIC(bits, T)                                                                               \
  T __tsan_atomic##bits##_load(const T* p, int) {                                                          \
    load(p, sizeof(T));                                                                                    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                           \
  }                                                                                                        \
  void __tsan_atomic##bits##_store(T* p, T v, int) {                                                       \
    store(p, sizeof(T));                                                                                   \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                              \
  }                                                                                                        \
  bool __tsan_atomic##bits##_compare_exchange_strong(T* p, T* expected, T v, int, int) {                   \
    load(p, sizeof(T));                                                                                    \
    store(p, sizeof(T));                                                                                   \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);         \
  }                                                                                                        \
  bool __tsan_atomic##bits##_compare_exchange_weak(T* p, T* expected, T v, int a, int b) {                 \
    return __tsan_atomic##bits##_compare_exchange_strong(p, expected, v, a, b);                            \
  }                                                                                                        \
  T __tsan_atomic##bits##_fetch_add(T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); }
extern "C" {
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
void __tsan_read_range(void* p, size_t size) { load(p, size); }
void __tsan_write_range(void* p, size_t size) { store(p, size); }
SIMT_ATOMIC(8, uint8_t)
SIMT_ATOMIC(32, uint32_t)
SIMT_ATOMIC(64, uint64_t)
void __tsan_init() {}
void __tsan_vptr_update(void*, void*) {}
void __tsan_vptr_read(void*) {}
}
