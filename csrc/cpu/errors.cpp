// torch.ops.fwpkm.take_errors on the CPU, where what is wrong raises at once: there is never anything to report.
#include <torch/csrc/stable/library.h>

#include "binding/checks.h"

namespace fwpkm {
namespace {

int64_t take_errors_cpu(const Tensor& /*device*/) { return 0; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fwpkm, CPU, m) { m.impl("take_errors", TORCH_BOX(&take_errors_cpu)); }

}  // namespace fwpkm
