// The word in which the kernels of a device report what the host has not waited for (kernels/errors.cuh).
#pragma once

namespace fwpkm {

// Of the current device, in its memory; zero until a kernel reports something. Nothing is copied or waited for.
unsigned* error_word();

}  // namespace fwpkm
