// The vectorised loops, compiled for x86-64-v3 (AVX2, FMA).
#define FWPKM_VECTOR_NAMESPACE avx2
#include "cpu/vector_impl.h"
