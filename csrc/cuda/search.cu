// The kernels of product-key search, for the operators that search (search.h).
#include "cuda/search.h"

namespace fwpkm {

cudaError_t search_product_keys(const kernels::ProductKeySearch<float>& search, cudaStream_t stream) {
  return kernels::search_product_keys(search, stream);
}
cudaError_t search_product_keys(const kernels::ProductKeySearch<double>& search, cudaStream_t stream) {
  return kernels::search_product_keys(search, stream);
}

}  // namespace fwpkm
