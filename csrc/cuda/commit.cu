// torch.ops.fwpkm.commit_ on CUDA.
#include "kernels/commit.cuh"

#include <limits>

#include "binding/dispatch.h"
#include "binding/stream.h"
#include "binding/tensors.h"
#include "cuda/errors.h"
#include "ops/commit.h"

namespace fwpkm {
namespace {

void commit_cuda(Tensor values, Tensor sub_keys, const Tensor& new_rows, const Tensor& new_slots,
                 const Tensor& new_sub_keys, double keep, int64_t writes) {
  check_commit(values, sub_keys, new_rows, new_slots, new_sub_keys, keep, writes);
  const CudaScope cuda(values);
  const auto type = values.scalar_type();
  const Tensor rows = prepared(new_rows, type), slots = prepared(new_slots, ScalarType::Int),
               keys = prepared(new_sub_keys, type);
  check_apart(sub_keys, "sub_keys", values, sub_keys);
  check_apart(rows, "new_rows", values, sub_keys);
  check_apart(slots, "new_slots", values, sub_keys);
  check_apart(keys, "new_sub_keys", values, sub_keys);
  STD_TORCH_CHECK(slots.numel() < std::numeric_limits<int32_t>::max(), "new_slots: expected fewer than 2^31, got ",
                  slots.numel());
  Tensor owner = make(values, {values.size(0)}, ScalarType::Int);
  dispatch_memory(values, [&](auto t) {
    using T = decltype(t);
    check_cuda(kernels::commit_rows(values.mutable_data_ptr<T>(), values.size(0), values.size(1),
                                    rows.const_data_ptr<T>(), slots.const_data_ptr<int32_t>(), slots.numel(), T(keep),
                                    writes, owner.mutable_data_ptr<int32_t>(), error_word(), cuda.stream()),
               "commit_rows");
    check_cuda(kernels::copy_keys(keys.const_data_ptr<T>(), keys.numel(), sub_keys.mutable_data_ptr<T>(), error_word(),
                                  cuda.stream()),
               "copy_keys");
  });
}

}  // namespace

FWPKM_CUDA_LIBRARY_IMPL(m) { m.impl("commit_", TORCH_BOX(&commit_cuda)); }

}  // namespace fwpkm
