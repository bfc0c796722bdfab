// What the tests of the kernels share: device memory of exact sizes, small launches, a register of cases.
#pragma once
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "kernels/ordered_lists.cuh"

namespace testing {

// "Device memory": exactly n elements, all bytes 0xFF (NaN, -1), `offset` elements after a multiple of 256 bytes.
template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t n, size_t offset = 0) : n_(n), offset_(offset) {
    void* p = nullptr;
    if (posix_memalign(&p, 256, (n + offset) * sizeof(T))) std::abort();
    data_.reset(static_cast<T*>(p));
    clear(0xFF);
  }
  void clear(int byte) { std::memset(static_cast<void*>(get()), byte, n_ * sizeof(T)); }
  T* get() const { return data_.get() + offset_; }
  size_t size() const { return n_; }
  T& operator[](size_t i) { return get()[i]; }
  const T& operator[](size_t i) const { return get()[i]; }
  bool same_bits(const std::vector<T>& other) const {
    return other.size() == n_ && (n_ == 0 || !std::memcmp(get(), other.data(), n_ * sizeof(T)));
  }

 private:
  struct Free {
    void operator()(T* p) const { std::free(p); }
  };
  size_t n_, offset_;
  std::unique_ptr<T, Free> data_;
};

// Repeatable numbers.
struct Random {
  uint64_t state = 1;
  uint64_t word() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return state >> 33;
  }
  int64_t below(int64_t n) { return int64_t(word() % uint64_t(n)); }
  double real() { return double(word()) / double(1u << 30) - 1; }
};

// Adds terms in groups of 32, then the groups' sums, until one is left.
template <typename T>
T tree(std::vector<T> terms) {
  while (terms.size() > 1) {
    std::vector<T> sums;
    for (size_t i = 0; i < terms.size(); ++i)
      if (i % 32)
        sums.back() += terms[i];
      else
        sums.push_back(terms[i]);
    terms = sums;
  }
  return terms[0];
}

// Many blocks and steps from little data; TSan wants few threads (about 1 ms each).
struct Small : fwpkm::kernels::OrderedListsSize {
  static constexpr int kThreads = 64, kMaxBlocks = 2, kSteps = 2, kBlockTiles = 0;
};

// Rows go through shared memory, however few they are.
template <typename Base, int kBlocks = 1, int64_t kBytes = 1 << 18>
struct Shared : Base {
  static constexpr int64_t kMostSharedBytes = kBytes;
  static constexpr int64_t kLeastSharedElements = 1;
  static constexpr int kSharedBlocks = kBlocks;
};

// Runs one kernel once under the schedule of simt::options; "" when every bit is right.
using Run = std::function<std::string()>;

struct Case {
  const char* name;
  Run (*make)();
};

// The cases of one file: static const Register r({{"name", make}, ...});
inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}
struct Register {
  Register(std::initializer_list<Case> more) { cases().insert(cases().end(), more); }
};

inline std::string expect(bool right, const std::string& what) { return right ? "" : what; }

}  // namespace testing
