// Who reads what, in which order: groups numbered entries by key without sorting. Each group is owned by one thread,
// which adds its entries in their order; so a sum has the same bits for any number of threads, without atomics.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include <torch/csrc/stable/ops.h>

#include "binding/checks.h"
#include "cpu/vector.h"

namespace fwpkm {

// One int32 per slot or sub-key, zero at first.
class ZeroedTable {
 public:
  explicit ZeroedTable(int64_t n)
      : size_(std::max<int64_t>(n, 1)), data_(static_cast<int32_t*>(std::calloc(size_, sizeof(int32_t)))) {
    if (!data_) throw std::bad_alloc();
  }
  int64_t size() const { return size_; }
  int32_t& operator[](int64_t i) { return data_.get()[i]; }
  int32_t operator[](int64_t i) const { return data_.get()[i]; }

 private:
  struct Free {
    void operator()(int32_t* p) const { std::free(p); }
  };
  int64_t size_;
  std::unique_ptr<int32_t, Free> data_;
};

class OrderedLists {
 public:
  struct Group {
    int32_t key, first, last, count;
  };

  // The table is all zeros between two builds, so the next OrderedLists of the thread takes it as it is: a call with
  // few tokens would otherwise spend its time on clearing one number per slot.
  explicit OrderedLists(int64_t num_keys) : group_of_(std::move(spare())) {
    if (!group_of_ || group_of_->size() < num_keys) group_of_ = std::make_unique<ZeroedTable>(num_keys);
  }
  ~OrderedLists() {
    if (clean_ && (!spare() || spare()->size() < group_of_->size())) spare() = std::move(group_of_);
  }
  OrderedLists(const OrderedLists&) = delete;
  OrderedLists& operator=(const OrderedLists&) = delete;

  // key_of(i) for the entries 0 <= i < n. Groups come in the order of their first entries.
  template <typename KeyOf>
  void build(int64_t n, const KeyOf& key_of) {
    STD_TORCH_CHECK(n <= std::numeric_limits<int32_t>::max(), "expected fewer than 2^31 reads in one call, got ", n);
    clean_ = false;
    groups_.clear();
    next_.resize(n);
    ZeroedTable& group_of = *group_of_;
    for (int32_t i = 0; i < n; ++i) {
      const int32_t key = key_of(i);
      next_[i] = -1;
      if (const int32_t g = group_of[key]) {
        Group& group = groups_[g - 1];
        next_[group.last] = i;
        group.last = i;
        ++group.count;
      } else {
        groups_.push_back({key, i, i, 1});
        group_of[key] = int32_t(groups_.size());
      }
    }
    for (const Group& group : groups_) group_of[group.key] = 0;
    clean_ = true;
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
  static std::unique_ptr<ZeroedTable>& spare() {
    static thread_local std::unique_ptr<ZeroedTable> table;
    return table;
  }

  std::unique_ptr<ZeroedTable> group_of_;  // key -> its group + 1, while building
  bool clean_ = true;                      // group_of_ is all zeros
  std::vector<Group> groups_;
  std::vector<int32_t> next_;
};

// out = sum over i of coefficients[i] * (rows[i] - minus); minus may be null. Pieces of 32 terms, each in turn; then
// groups of 32 sums of pieces, each in turn; then groups of their sums, until one is left, as the CUDA kernels add: in
// one long chain the rounding errors of a row that many have read would grow with their number.
template <typename T>
void ordered_sum(const std::vector<const T*>& rows, const T* minus, const std::vector<T>& coefficients, int64_t width,
                 T* out) {
  constexpr int64_t kGroup = 32;
  const int64_t count = int64_t(rows.size());
  const auto& k = vector::kernels<T>();
  if (count <= kGroup) return k.weighted_sum(rows.data(), minus, coefficients.data(), count, width, out);
  std::vector<std::vector<T>> sums;  // of the group that is being added, by level
  std::vector<int64_t> terms;        // in it
  const auto add = [&](const T* sum, size_t level) {
    if (level == sums.size()) {
      sums.emplace_back(width);
      terms.push_back(0);
    }
    if (terms[level]++ == 0)
      std::copy_n(sum, width, sums[level].data());
    else
      k.axpy(T(1), sum, width, sums[level].data());
  };
  for (int64_t first = 0; first < count; first += kGroup) {
    k.weighted_sum(rows.data() + first, minus, coefficients.data() + first, std::min(kGroup, count - first), width,
                   out);
    add(out, 0);
    for (size_t level = 0; level < sums.size() && terms[level] == kGroup; ++level) {
      add(std::vector<T>(sums[level]).data(), level + 1);
      terms[level] = 0;
    }
  }
  for (size_t level = 0; level + 1 < sums.size(); ++level)
    if (terms[level]) add(std::vector<T>(sums[level]).data(), level + 1);
  std::copy_n(sums.back().data(), width, out);
}

}  // namespace fwpkm
