// The vectorised loops, compiled for every machine of the target architecture.
#define FWPKM_VECTOR_NAMESPACE baseline
#include "cpu/vector_impl.h"
