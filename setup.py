"""Runs CMake for the wheel; everything static is in pyproject.toml.

Environment variables: FWPKM_WITH_PYBIND=0 (no _C: one wheel for all Pythons), MAX_JOBS, CMAKE_ARGS, FWPKM_BUILD_DIR,
FWPKM_BUILD_TYPE, and the options of CMakeLists.txt: FWPKM_WITH_CUDA, FWPKM_CUDA_ARCHS, FWPKM_TORCH_DIR, ...
"""

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
WITH_PYBIND = os.environ.get("FWPKM_WITH_PYBIND", "1").upper() not in ("0", "OFF", "NO", "FALSE")
OPTIONS = (
    "FWPKM_WITH_CUDA",
    "FWPKM_CUDA_ARCHS",
    "FWPKM_TORCH_DIR",
    "FWPKM_TORCH_TARGET",
    "FWPKM_WERROR",
    "FWPKM_LINEINFO",
    "FWPKM_PTXAS_VERBOSE",
)


def find_tool(name, folder_attribute):
    """The program from the Python package of that name (present in every build environment), else from PATH."""
    try:
        path = shutil.which(name, path=getattr(importlib.import_module(name), folder_attribute))
    except (ImportError, AttributeError):
        path = None
    path = path or shutil.which(name)
    if path is None:
        sys.exit(f"fwpkm-cuda: {name} not found. Install it into the build environment: pip install {name}")
    return path


def check_compiler():
    compiler = shlex.split(os.environ.get("CXX", ""))
    names = compiler[:1] or ["c++", "g++", "clang++"]
    if not any(shutil.which(name) for name in names):
        sys.exit(
            f"fwpkm-cuda: no C++ compiler found (looked for {', '.join(names)}). "
            "Install one (Debian, Ubuntu: apt install g++), or set CXX."
        )


def memory_gib():
    """Memory that is free for us, in GiB: of the machine, or of the container if that is less."""
    kib = 8 << 20
    for line in Path("/proc/meminfo").read_text().splitlines() if os.path.exists("/proc/meminfo") else ():
        if line.startswith("MemAvailable:"):
            kib = int(line.split()[1])
    try:
        kib = min(kib, int(Path("/sys/fs/cgroup/memory.max").read_text()) >> 10)
    except (OSError, ValueError):  # no cgroup, or "max"
        pass
    return kib / (1 << 20)


def jobs():
    if os.environ.get("MAX_JOBS"):
        return os.environ["MAX_JOBS"]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return str(max(1, min(cores, int(memory_gib() / 2))))  # a CUDA file can take 2 GiB


class CMakeBuild(build_ext):
    def run(self):
        check_compiler()
        cmake = find_tool("cmake", "CMAKE_BIN_DIR")
        ninja = find_tool("ninja", "BIN_DIR")
        # Not self.build_temp: an editable installation throws that away, and the next build starts from nothing.
        build = ROOT / os.environ.get("FWPKM_BUILD_DIR", f"build/cmake-{sys.implementation.cache_tag}")
        in_place = self.inplace or getattr(self, "editable_mode", False)
        destination = ROOT / "python" if in_place else Path(self.build_lib).resolve()
        subprocess.check_call(
            [cmake, "-S", ROOT, "-B", build, "-GNinja"]
            + ["-U", "FWPKM_*"]  # forget the options of the last build
            # Given each time, because pip's isolated environments, and the programs in them, come and go.
            + [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
            + [f"-DCMAKE_BUILD_TYPE={os.environ.get('FWPKM_BUILD_TYPE', 'Release')}"]
            + [f"-DFWPKM_WITH_PYBIND={'ON' if WITH_PYBIND else 'OFF'}"]
            + [f"-D{name}={os.environ[name]}" for name in OPTIONS if name in os.environ]
            + shlex.split(os.environ.get("CMAKE_ARGS", ""))
        )
        subprocess.check_call([cmake, "--build", build, "--parallel", jobs()])
        # An earlier build with other options must not leave its files in this wheel.
        for pattern in ("_C*.so", "libfwpkm_cuda_ops.so"):
            for old in (destination / "fwpkm_cuda").glob(pattern):
                old.unlink()
        subprocess.check_call([cmake, "--install", build, "--strip", "--prefix", destination])


cmdclass = {"build_ext": CMakeBuild}
if not WITH_PYBIND:  # nothing in the wheel depends on the Python version then
    from setuptools.command.bdist_wheel import bdist_wheel

    class AnyPythonWheel(bdist_wheel):
        def get_tag(self):
            return "py3", "none", super().get_tag()[2]

    cmdclass["bdist_wheel"] = AnyPythonWheel

setup(ext_modules=[Extension("fwpkm_cuda._C", sources=[])], cmdclass=cmdclass)
