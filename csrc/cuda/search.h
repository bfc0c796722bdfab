// Product-key search for all operators: its kernels are many, and compiled once, in search.cu.
#pragma once
#include "kernels/product_key_search.cuh"

namespace fwpkm {

cudaError_t search_product_keys(const kernels::ProductKeySearch<float>& search, cudaStream_t stream);
cudaError_t search_product_keys(const kernels::ProductKeySearch<double>& search, cudaStream_t stream);

}  // namespace fwpkm
