// Who reads what, in which order: groups numbered entries by key without sorting. Each group is owned by one thread,
// which adds its entries in their order; so a sum has the same bits for any number of threads, without atomics.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <new>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "binding/checks.h"

namespace fwpkm {

// One int32 per slot or sub-key, zero at first. A large table is mapped: its pages come zeroed from the system, and
// those that are never touched cost nothing. (calloc does this only until the first large block was freed.)
class ZeroedTable {
 public:
  explicit ZeroedTable(int64_t n) : bytes_(size_t(std::max<int64_t>(n, 1)) * sizeof(int32_t)) {
    void* p = mapped() ? mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                       : std::calloc(1, bytes_);
    if (!p || p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<int32_t*>(p);
  }
  ~ZeroedTable() {
    if (mapped())
      munmap(data_, bytes_);
    else
      std::free(data_);
  }
  ZeroedTable(const ZeroedTable&) = delete;
  ZeroedTable& operator=(const ZeroedTable&) = delete;
  int32_t& operator[](int64_t i) { return data_[i]; }
  int32_t operator[](int64_t i) const { return data_[i]; }

 private:
  bool mapped() const { return bytes_ >= size_t(1) << 18; }
  size_t bytes_;
  int32_t* data_;
};

class OrderedLists {
 public:
  struct Group {
    int32_t key, first, last, count;
  };

  explicit OrderedLists(int64_t num_keys) : group_of_(num_keys) {}

  // key_of(i) for the entries 0 <= i < n. Groups come in the order of their first entries.
  template <typename KeyOf>
  void build(int64_t n, const KeyOf& key_of) {
    STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 reads in one call, got ", n);
    groups_.clear();
    next_.resize(n);
    for (int32_t i = 0; i < n; ++i) {
      const int32_t key = key_of(i);
      next_[i] = -1;
      if (const int32_t g = group_of_[key]) {
        Group& group = groups_[g - 1];
        next_[group.last] = i;
        group.last = i;
        ++group.count;
      } else {
        groups_.push_back({key, i, i, 1});
        group_of_[key] = int32_t(groups_.size());
      }
    }
    for (const Group& group : groups_) group_of_[group.key] = 0;
  }

  const std::vector<Group>& groups() const { return groups_; }
  int32_t next(int32_t i) const { return next_[i]; }  // -1 after the last

  // use(group, rows, coefficients, scratch) for every group, in parallel; its entries in order. row_of(i) may return
  // null: the entry is left out of rows and coefficients. scratch: `scratch_size` numbers of the thread's own.
  template <typename T, typename RowOf, typename CoefficientOf, typename Use>
  void for_each(int64_t scratch_size, const RowOf& row_of, const CoefficientOf& coefficient_of, const Use& use) const {
    torch::stable::parallel_for(0, int64_t(groups_.size()), 8, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows;
      std::vector<T> coefficients, scratch(scratch_size);
      for (int64_t g = begin; g < end; ++g) {
        rows.clear();
        coefficients.clear();
        for (int32_t i = groups_[g].first; i >= 0; i = next_[i])
          if (const T* row = row_of(i)) {
            rows.push_back(row);
            coefficients.push_back(coefficient_of(i));
          }
        use(groups_[g], rows, coefficients, scratch.data());
      }
    });
  }

 private:
  ZeroedTable group_of_;  // key -> its group + 1, while building
  std::vector<Group> groups_;
  std::vector<int32_t> next_;
};

}  // namespace fwpkm
