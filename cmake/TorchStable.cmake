# Target torch_stable: two header folders and one soname are all that is used of PyTorch. find_package(Torch) would want
# the whole CUDA toolkit and add flags that the stable ABI exists to avoid.
set(FWPKM_TORCH_TARGET 0x020b000000000000 CACHE STRING "Oldest PyTorch the library must load in (2.11)")
if(NOT FWPKM_TORCH_DIR)
  fwpkm_python_package(FWPKM_TORCH_DIR torch)
endif()
set(TORCH_STABLE_INCLUDE ${FWPKM_TORCH_DIR}/include)
set(_header ${TORCH_STABLE_INCLUDE}/torch/headeronly/version.h)
if(NOT EXISTS ${_header})
  message(FATAL_ERROR "PyTorch 2.11 or newer not found (looked in '${FWPKM_TORCH_DIR}'). "
    "Install it for ${Python_EXECUTABLE}, or set FWPKM_TORCH_DIR to site-packages/torch.")
endif()
file(STRINGS ${_header} _lines REGEX "TORCH_VERSION_(MAJOR|MINOR|PATCH) [0-9]+")
string(REGEX REPLACE ".*MAJOR ([0-9]+).*MINOR ([0-9]+).*PATCH ([0-9]+).*" "\\1.\\2.\\3" TORCH_STABLE_VERSION "${_lines}")
if(TORCH_STABLE_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "PyTorch 2.11 or newer is needed, found ${TORCH_STABLE_VERSION} in ${FWPKM_TORCH_DIR}.")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE ${TORCH_STABLE_INCLUDE})
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=${FWPKM_TORCH_TARGET})
# libtorch.so must stay in NEEDED though no symbol of it is used: in a CUDA build of PyTorch it pulls in libtorch_cuda.so,
# where the weak symbol of the current stream lives. With libtorch_cpu.so alone that symbol is silently null.
target_link_libraries(torch_stable INTERFACE
  -Wl,--no-as-needed ${FWPKM_TORCH_DIR}/lib/libtorch.so ${FWPKM_TORCH_DIR}/lib/libtorch_cpu.so -Wl,--as-needed)
