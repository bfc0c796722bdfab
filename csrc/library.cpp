// The schemas of torch.ops.fwpkm, and nothing else. Kernels register beside their code: cpu/*.cpp, cuda/*.cu.
// Shapes, meanings and formulas: python/fwpkm_cuda/ops.py. Mathematics: python/fwpkm_cuda/reference.py.
#include <torch/csrc/stable/library.h>

// Options of a scan, in the order of ScanOptions (ops/chunk_scan.h).
#define FWPKM_SCAN_OPTIONS                                                              \
  "int topk, int chunk_size, int lookahead, str score, float eps, str activation, "     \
  "float temperature, float lr, float weight_decay, float? grad_clip, str write_rule, " \
  "bool values_only, float addressing_weight, str boundary, int carried, bool flush"

STABLE_TORCH_LIBRARY(fwpkm, m) {
  m.def("product_key_topk(Tensor query, Tensor sub_keys, int topk, str score='dot', float eps=1e-3) "
        "-> (Tensor scores, Tensor indices)");
  m.def("product_key_topk_backward(Tensor dscores, Tensor query, Tensor sub_keys, Tensor indices, str score, "
        "float eps) -> (Tensor dquery, Tensor dsub_keys)");

  // The three derivatives of the trilinear form sum_r weights[r] <values[indices[r]], dout>.
  m.def("value_gather(Tensor values, Tensor indices, Tensor weights, bool sparse_grad=False) -> Tensor");
  m.def("value_gather_dvalues(Tensor dout, Tensor indices, Tensor weights, SymInt num_slots) -> Tensor");
  m.def("value_gather_dweights(Tensor dout, Tensor values, Tensor indices, bool sparse_grad=False) -> Tensor");

  m.def("chunk_scan(Tensor values, Tensor sub_keys, Tensor query, Tensor target, Tensor? loss_weights, "
        "Tensor? mask, " FWPKM_SCAN_OPTIONS ", bool sparse_grad=True) -> ("
        "Tensor out, Tensor indices, Tensor weights, Tensor losses, Tensor addressing_loss, "
        "Tensor new_rows, Tensor new_slots, Tensor new_sub_keys, "
        // kept for chunk_scan_backward
        "Tensor list_indices, Tensor list_scores, Tensor places, Tensor read_from, "
        "Tensor key_versions, Tensor open_rows, Tensor open_keys)");
  m.def(
      "chunk_scan_backward(Tensor? dout, Tensor? dweights, Tensor? dlosses, Tensor? daddressing_loss, "
      "Tensor? dnew_rows, Tensor? dnew_sub_keys, "
      "Tensor values, Tensor sub_keys, Tensor query, Tensor target, Tensor? loss_weights, Tensor? mask, "
      "Tensor new_rows, Tensor new_sub_keys, Tensor list_indices, Tensor list_scores, Tensor places, Tensor read_from, "
      "Tensor key_versions, Tensor open_rows, Tensor open_keys, " FWPKM_SCAN_OPTIONS
      ", bool need_dvalues) -> (Tensor dquery, Tensor dtarget, Tensor dloss_weights, Tensor dsub_keys, "
      "Tensor dvalue_slots, Tensor dvalue_rows)");
  m.def("chunk_scan_(Tensor(a!) values, Tensor(b!) sub_keys, Tensor query, Tensor target, Tensor? loss_weights, "
        "Tensor? mask, " FWPKM_SCAN_OPTIONS
        ") -> (Tensor out, Tensor indices, Tensor weights, Tensor losses, Tensor addressing_loss)");
  m.def("commit_(Tensor(a!) values, Tensor(b!) sub_keys, Tensor new_rows, Tensor new_slots, Tensor new_sub_keys, "
        "float keep=1.0, int writes=0) -> ()");

  // What kernels have reported on the device of a tensor since the last call: bits of kernels/errors.cuh. Waits for
  // them.
  m.def("take_errors(Tensor device) -> int");
}
