// torch.ops.fwpkm.value_gather and its derivatives on the CPU.
#include "ops/value_gather.h"

#include <type_traits>

#include <torch/csrc/stable/library.h>

#include "binding/dispatch.h"
#include "binding/tensors.h"
#include "cpu/ordered_lists.h"
#include "cpu/vector.h"

namespace fwpkm {
namespace {

constexpr int64_t kTokensPerTask = 16;

// int32 copy of indices, every one checked to lie in [0, num_slots).
Tensor checked_indices(const Tensor& indices, int64_t num_slots) {
  const auto check = [&](const auto* p) {
    using Unsigned = std::make_unsigned_t<std::remove_cvref_t<decltype(*p)>>;  // a negative slot is a large one
    const Unsigned end = Unsigned(num_slots);
    bool right = true;  // without a branch in the loop
    for (int64_t i = 0, n = indices.numel(); i < n; ++i) right &= Unsigned(p[i]) < end;
    for (int64_t i = 0; !right; ++i)
      STD_TORCH_CHECK(p[i] >= 0 && int64_t(p[i]) < num_slots, "indices: expected slots in [0, ", num_slots, "), got ",
                      p[i], " at flat position ", i);
  };
  const Tensor raw = prepared(indices, indices.scalar_type());
  if (raw.scalar_type() == ScalarType::Long)
    check(raw.const_data_ptr<int64_t>());
  else
    check(raw.const_data_ptr<int32_t>());
  return prepared(raw, ScalarType::Int);
}

Tensor value_gather_cpu(const Tensor& values, const Tensor& indices, const Tensor& weights, bool /*sparse_grad*/) {
  check_value_gather(values, indices, weights);
  const Tensor ids = checked_indices(indices, values.size(0));
  const auto type = values.scalar_type();
  const Tensor v = prepared(values, type), w = prepared(weights, type);
  const int64_t width = v.size(1), reads = reads_of(indices);
  Tensor out = make(v, with_last(indices, width), type);
  dispatch_memory(v, [&](auto t) {
    using T = decltype(t);
    const T *vp = v.const_data_ptr<T>(), *wp = w.const_data_ptr<T>();
    const int32_t* ip = ids.const_data_ptr<int32_t>();
    T* op = out.mutable_data_ptr<T>();
    const int64_t tokens = width ? out.numel() / width : 0;
    torch::stable::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      vector::kernels<T>().gather(vp, ip + begin * reads, wp + begin * reads, end - begin, reads, (end - begin) * reads,
                                  width, op + begin * width);
    });
  });
  return out;
}

// dvalues[s] = sum over the reads of slot s, in their order, of weights * dout
Tensor value_gather_dvalues_cpu(const Tensor& dout, const Tensor& indices, const Tensor& weights, int64_t num_slots) {
  check_value_gather_dvalues(dout, indices, weights, num_slots);
  const Tensor ids = checked_indices(indices, num_slots);
  const auto type = dout.scalar_type();
  const Tensor d = prepared(dout, type), w = prepared(weights, type);
  const int64_t width = d.size(d.dim() - 1), reads = reads_of(indices);
  Tensor dvalues = make_zeros(d, {num_slots, width}, type);
  dispatch_memory(d, [&](auto t) {
    using T = decltype(t);
    const T *dp = d.const_data_ptr<T>(), *wp = w.const_data_ptr<T>();
    const int32_t* ip = ids.const_data_ptr<int32_t>();
    T* out = dvalues.mutable_data_ptr<T>();
    OrderedLists lists(num_slots);
    lists.build(ids.numel(), [&](int32_t i) { return ip[i]; });
    lists.for_each<T>(
        0, [&](int32_t i) { return dp + i / reads * width; }, [&](int32_t i) { return wp[i]; },
        [&](const auto& group, const auto& rows, const auto& coefficients, T*) {
          ordered_sum<T>(rows, nullptr, coefficients, width, out + group.key * width);
        });
  });
  return dvalues;
}

// dweights[..., r] = <dout, values[indices[..., r]]>
Tensor value_gather_dweights_cpu(const Tensor& dout, const Tensor& values, const Tensor& indices, bool) {
  check_value_gather_dweights(dout, values, indices);
  const Tensor ids = checked_indices(indices, values.size(0));
  const auto type = values.scalar_type();
  const Tensor d = prepared(dout, type), v = prepared(values, type);
  const int64_t width = v.size(1), reads = reads_of(indices);
  Tensor dweights = make(v, with_last(indices, reads), type);
  dispatch_memory(v, [&](auto t) {
    using T = decltype(t);
    const T *dp = d.const_data_ptr<T>(), *vp = v.const_data_ptr<T>();
    const int32_t* ip = ids.const_data_ptr<int32_t>();
    T* out = dweights.mutable_data_ptr<T>();
    const int64_t tokens = reads ? dweights.numel() / reads : 0;
    torch::stable::parallel_for(0, tokens, kTokensPerTask, [&](int64_t begin, int64_t end) {
      std::vector<const T*> rows(reads);
      for (int64_t x = begin; x < end; ++x) {
        for (int64_t r = 0; r < reads; ++r) rows[r] = vp + ip[x * reads + r] * width;
        vector::kernels<T>().dots(rows.data(), nullptr, reads, dp + x * width, width, out + x * reads);
      }
    });
  });
  return dweights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) {
  m.impl("value_gather", TORCH_BOX(&value_gather_cpu));
  m.impl("value_gather_dvalues", TORCH_BOX(&value_gather_dvalues_cpu));
  m.impl("value_gather_dweights", TORCH_BOX(&value_gather_dweights_cpu));
}

}  // namespace fwpkm
