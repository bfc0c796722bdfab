// torch.ops.fwpkm.value_gather and its derivatives on CUDA. An index out of range is not an error here, for the host
// does not wait: the results it touches are NaN, and the device's error word says so.
#include "kernels/value_gather.cuh"

#include <limits>

#include "binding/dispatch.h"
#include "binding/stream.h"
#include "binding/tensors.h"
#include "cuda/errors.h"
#include "ops/value_gather.h"

namespace fwpkm {
namespace {

// The dtypes of the memory and of the indices as arguments of f.
template <typename F>
cudaError_t dispatch(const Tensor& memory, const Tensor& indices, const F& f) {
  return dispatch_memory(memory, [&](auto t) { return dispatch_index(indices, [&](auto i) { return f(t, i); }); });
}

// Rows of `indices`, each of `reads` reads; known even if there are no reads.
int64_t tokens_of(const Tensor& indices) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < indices.dim(); ++d) tokens *= indices.size(d);
  return tokens;
}

Tensor value_gather_cuda(const Tensor& values, const Tensor& indices, const Tensor& weights, bool /*sparse_grad*/) {
  check_value_gather(values, indices, weights);
  const CudaScope cuda(values);
  const auto type = values.scalar_type();
  const Tensor v = prepared(values, type), ids = prepared(indices, indices.scalar_type()), w = prepared(weights, type);
  const int64_t width = v.size(1);
  Tensor out = make(v, with_last(indices, width), type);
  check_cuda(dispatch(v, ids,
                      [&](auto t, auto i) {
                        using T = decltype(t);
                        using Index = decltype(i);
                        return kernels::value_gather(v.const_data_ptr<T>(), ids.const_data_ptr<Index>(),
                                                     w.const_data_ptr<T>(), tokens_of(ids), reads_of(ids), v.size(0),
                                                     width, out.mutable_data_ptr<T>(), error_word(), cuda.stream());
                      }),
             "value_gather");
  return out;
}

Tensor value_gather_dvalues_cuda(const Tensor& dout, const Tensor& indices, const Tensor& weights, int64_t num_slots) {
  check_value_gather_dvalues(dout, indices, weights, num_slots);
  STD_TORCH_CHECK(indices.numel() <= std::numeric_limits<int32_t>::max(),
                  "expected fewer than 2^31 reads in one call, got ", indices.numel());
  const CudaScope cuda(dout);
  const auto type = dout.scalar_type();
  const Tensor d = prepared(dout, type), ids = prepared(indices, indices.scalar_type()), w = prepared(weights, type);
  const int64_t width = d.size(d.dim() - 1);
  const int32_t reads = int32_t(ids.numel());
  Tensor dvalues = make_zeros(d, {num_slots, width}, type);
  Tensor workspace = make(d, {kernels::ordered_lists_workspace(reads)}, ScalarType::Int);
  Tensor scratch = make(d, {kernels::ordered_sums_scratch(reads, width)}, type);
  check_cuda(dispatch(d, ids,
                      [&](auto t, auto i) {
                        using T = decltype(t);
                        using Index = decltype(i);
                        return kernels::value_gather_dvalues(
                            d.const_data_ptr<T>(), ids.const_data_ptr<Index>(), w.const_data_ptr<T>(), tokens_of(ids),
                            reads_of(ids), num_slots, width, workspace.mutable_data_ptr<int32_t>(),
                            scratch.mutable_data_ptr<T>(), dvalues.mutable_data_ptr<T>(), error_word(), cuda.stream());
                      }),
             "value_gather_dvalues");
  return dvalues;
}

Tensor value_gather_dweights_cuda(const Tensor& dout, const Tensor& values, const Tensor& indices,
                                  bool /*sparse_grad*/) {
  check_value_gather_dweights(dout, values, indices);
  const CudaScope cuda(values);
  const auto type = values.scalar_type();
  const Tensor d = prepared(dout, type), v = prepared(values, type), ids = prepared(indices, indices.scalar_type());
  Tensor dweights = make(v, with_last(indices, reads_of(indices)), type);
  check_cuda(dispatch(v, ids,
                      [&](auto t, auto i) {
                        using T = decltype(t);
                        using Index = decltype(i);
                        return kernels::value_gather_dweights(
                            d.const_data_ptr<T>(), v.const_data_ptr<T>(), ids.const_data_ptr<Index>(), tokens_of(ids),
                            reads_of(ids), v.size(0), v.size(1), dweights.mutable_data_ptr<T>(), error_word(),
                            cuda.stream());
                      }),
             "value_gather_dweights");
  return dweights;
}

}  // namespace

FWPKM_CUDA_LIBRARY_IMPL(m) {
  m.impl("value_gather", TORCH_BOX(&value_gather_cuda));
  m.impl("value_gather_dvalues", TORCH_BOX(&value_gather_dvalues_cuda));
  m.impl("value_gather_dweights", TORCH_BOX(&value_gather_dweights_cuda));
}

}  // namespace fwpkm
