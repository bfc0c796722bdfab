// The Python module _C: a report of what was built and what would run. It holds no kernel; the ops library works
// without it, under any Python version.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>

#include "api.h"

namespace py = pybind11;

namespace {

py::object text_or_none(const char* text) { return text ? py::object(py::str(text)) : py::none(); }

py::list split(const std::string& text) {
  py::list parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    parts.append(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

py::dict build_info() {
  const FwpkmBuildInfo& info = *fwpkm_build_info();
  py::dict d;
  d["version"] = info.version;
  d["torch_headers"] = info.torch_headers;
  d["torch_target"] = info.torch_target;
  d["cxx_compiler"] = std::string(info.cxx_compiler) + " " + info.cxx_compiler_version;
  d["cxx_flags"] = info.cxx_flags;
  d["build_type"] = info.build_type;
  d["cuda_compiler"] = text_or_none(info.cuda_compiler_version);
  d["cuda_archs"] = split(info.cuda_archs);
  return d;
}

py::object cuda_version(int code) {
  if (code == 0) return py::none();
  return py::str(std::to_string(code / 1000) + "." + std::to_string(code % 1000 / 10));
}

py::dict cuda_runtime_info() {
  py::list devices;
  for (int i = 0; i < fwpkm_cuda_device_count(); ++i) {
    FwpkmCudaDevice device;
    if (!fwpkm_cuda_device(i, &device)) continue;
    py::dict d;
    d["name"] = device.name;
    d["capability"] = py::make_tuple(device.capability_major, device.capability_minor);
    d["total_memory"] = device.total_memory;
    devices.append(d);
  }
  py::dict d;
  d["runtime"] = cuda_version(fwpkm_cuda_runtime_version());
  d["driver"] = cuda_version(fwpkm_cuda_driver_version());
  d["status"] = fwpkm_cuda_status();
  d["devices"] = devices;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How the operator library was built, and which kernel a shape takes.";
  m.def("build_info", &build_info,
        "Versions, compilers, flags and GPU architectures of the build. None: not part of it.");
  m.def("cuda_runtime_info", &cuda_runtime_info,
        "What the CUDA runtime inside the library sees: runtime and driver version, status, devices.");
  m.def("cpu_capability", &fwpkm_cpu_capability, "Instruction set of the CPU kernels: avx512, avx2 or baseline.");
  m.def("kernel_for", &fwpkm_kernel_for, py::arg("op"), py::arg("device"), py::arg("dtype"), py::arg("topk"),
        py::arg("num_sub_keys"), py::arg("key_dim"), py::arg("value_dim"), "Name of the kernel that a shape takes.");
}
