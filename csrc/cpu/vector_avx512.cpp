// The vectorised loops, compiled for x86-64-v4 (AVX-512).
#define FWPKM_VECTOR_NAMESPACE avx512
#include "cpu/vector_impl.h"
