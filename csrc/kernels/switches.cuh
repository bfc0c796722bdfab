// Ways of doing things that can be left out of a process, to find out which of them is wrong on a GPU: the environment
// variable FWPKM_CUDA_WITHOUT names some of
//
//   streams   the second stream of a scan
//   filter    the search's filter on tensor cores, with its asynchronous copies
//   columns   the kernels that keep columns of rows in shared memory
//   packs     loads and stores of 16 bytes; without them there are no columns and no filter either
//
// Results are the same bits without any of them.
#pragma once
#include <cstdlib>
#include <string_view>

namespace fwpkm::kernels {

inline bool without(std::string_view way) {
  static const char* const variable = std::getenv("FWPKM_CUDA_WITHOUT");
  std::string_view names = variable ? variable : "";
  while (!names.empty()) {
    const size_t end = names.find(',') < names.size() ? names.find(',') : names.size();
    if (names.substr(0, end) == way) return true;
    names.remove_prefix(end < names.size() ? end + 1 : end);
  }
  return false;
}

}  // namespace fwpkm::kernels
