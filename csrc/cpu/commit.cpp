// torch.ops.fwpkm.commit_ on the CPU: the newest rows of a scan become part of the memory.
#include "ops/commit.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include <torch/csrc/stable/library.h>

#include "binding/dispatch.h"
#include "binding/tensors.h"
#include "cpu/ordered_lists.h"
#include "cpu/vector.h"

namespace fwpkm {
namespace {

void commit_cpu(Tensor values, Tensor sub_keys, const Tensor& new_rows, const Tensor& new_slots,
                const Tensor& new_sub_keys, double keep, int64_t writes) {
  check_commit(values, sub_keys, new_rows, new_slots, new_sub_keys, keep, writes);
  const auto type = values.scalar_type();
  const Tensor rows = prepared(new_rows, type), slots = prepared(new_slots, ScalarType::Int),
               keys = prepared(new_sub_keys, type);
  check_apart(sub_keys, "sub_keys", values, sub_keys);
  check_apart(rows, "new_rows", values, sub_keys);
  check_apart(slots, "new_slots", values, sub_keys);
  check_apart(keys, "new_sub_keys", values, sub_keys);
  const int64_t num_slots = values.size(0), width = values.size(1), places = slots.numel();
  const int32_t* place_slot = slots.const_data_ptr<int32_t>();
  ZeroedTable place_of(num_slots);  // slot -> its place + 1
  for (int64_t e = 0; e < places; ++e) {
    if (place_slot[e] == -1) continue;
    STD_TORCH_CHECK(place_slot[e] >= 0 && place_slot[e] < num_slots, "new_slots: expected -1 or a slot in [0, ",
                    num_slots, "), got ", place_slot[e], " at place ", e);
    STD_TORCH_CHECK(place_of[place_slot[e]] == 0, "new_slots: expected each slot at most once, got slot ",
                    place_slot[e], " twice");
    place_of[place_slot[e]] = int32_t(e) + 1;
  }
  dispatch_memory(values, [&](auto t) {
    using T = decltype(t);
    const auto& k = vector::kernels<T>();
    T* vp = values.mutable_data_ptr<T>();
    const T* rp = rows.const_data_ptr<T>();
    std::atomic<int64_t> odd_place{-1}, odd_slot{-1};
    torch::stable::parallel_for(0, places, 64, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        if (place_slot[e] >= 0 && !k.all_finite(rp + e * width, width)) odd_place = e;
    });
    STD_TORCH_CHECK(odd_place < 0, "new_rows: expected finite numbers, got NaN or infinity at place ",
                    odd_place.load());
    STD_TORCH_CHECK(k.all_finite(keys.const_data_ptr<T>(), keys.numel()),
                    "new_sub_keys: expected finite numbers, got NaN or infinity");
    if (std::abs(keep) > 1)
      torch::stable::parallel_for(0, num_slots, 64, [&](int64_t begin, int64_t end) {
        std::vector<T> row(width);
        for (int64_t s = begin; s < end; ++s) {
          k.scaled(vp + s * width, T(keep), writes, width, row.data());
          if (place_of[s] == 0 && !k.all_finite(row.data(), width)) odd_slot = s;
        }
      });
    STD_TORCH_CHECK(odd_slot < 0,
                    "values: expected finite rows after the decay by keep = 1 - lr * weight_decay = ", keep,
                    ", got an overflow at slot ", odd_slot.load());
    if (keep != 1)  // the one pass over all rows: weight decay
      torch::stable::parallel_for(0, num_slots, 64, [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s)
          if (place_of[s] == 0) k.scaled(vp + s * width, T(keep), writes, width, vp + s * width);
      });
    torch::stable::parallel_for(0, places, 64, [&](int64_t begin, int64_t end) {
      for (int64_t e = begin; e < end; ++e)
        if (place_slot[e] >= 0) std::memcpy(vp + place_slot[e] * width, rp + e * width, width * sizeof(T));
    });
    std::memcpy(sub_keys.mutable_data_ptr<T>(), keys.const_data_ptr<T>(), keys.numel() * sizeof(T));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) { m.impl("commit_", TORCH_BOX(&commit_cpu)); }

}  // namespace fwpkm
