"""python -m fwpkm_cuda [--json]: what is installed, what was built, and which code an operator would run here.

The report exists for the day on which something is broken: every entry is computed on its own, an entry that fails
says why, and the exit code is 0. It also runs as a plain file (python .../fwpkm_cuda/__main__.py), should the import of
the package itself fail.
"""

import ctypes
import importlib
import json
import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path

OPERATORS = ("product_key_topk", "value_gather", "chunk_scan", "chunk_scan_backward", "chunk_scan_", "commit_")
HERE = Path(__file__).resolve().parent


def guarded(function, *args):
    """The result of `function`, or one line that says what went wrong."""
    try:
        return function(*args)
    except Exception as error:
        text = " ".join(str(error).split())
        return f"unavailable ({type(error).__name__}: {text[:300]})"


def torch():
    return importlib.import_module("torch")


def build_module():
    return importlib.import_module("fwpkm_cuda._C")


def package_version():
    return re.search(r'__version__ = "(.+?)"', (HERE / "_version.py").read_text())[1]


def driver_version():
    try:
        return re.search(r"\s(\d+\.\d+(\.\d+)?)\s", Path("/proc/driver/nvidia/version").read_text())[1]
    except (OSError, TypeError):
        pass
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def architecture_fits(architecture, major, minor):
    """Whether code built for e.g. "80-real", "90a-real" or "80-virtual" runs on a GPU of that compute capability."""
    number, suffix, kind = re.fullmatch(r"(\d+)([af]?)(?:-(real|virtual))?", architecture).groups()
    built = divmod(int(number), 10)
    if suffix == "a":
        return built == (major, minor)
    if kind != "real" and not suffix:  # carries PTX: any newer GPU can compile it
        return built <= (major, minor)
    return built[0] == major and built[1] <= minor


def gpus():
    """The GPUs that torch sees; those that the library sees where torch has no CUDA."""
    if torch().version.cuda is not None:
        cuda = torch().cuda
        found = [cuda.get_device_properties(i) for i in range(cuda.device_count())]
        found = [(p.name, p.major, p.minor, p.total_memory) for p in found]
    else:
        found = [(d["name"], *d["capability"], d["total_memory"]) for d in library_gpus()]
    return [
        {
            "name": name,
            "capability": f"{major}.{minor}",
            "memory_gib": round(memory / 2**30, 1),
            "architecture_built": guarded(architecture_built, major, minor),
        }
        for name, major, minor, memory in found
    ]


def library_gpus():
    try:
        return build_module().cuda_runtime_info()["devices"]
    except ImportError:
        return []


def architecture_built(major, minor):
    return any(architecture_fits(a, major, minor) for a in build_module().build_info()["cuda_archs"])


def library_path():
    return os.environ.get("FWPKM_LIBRARY") or str(HERE / "libfwpkm_cuda_ops.so")


def library_state():
    """ "loaded", or why not."""
    package = importlib.import_module("fwpkm_cuda")
    error = getattr(package, "load_error", None)
    if error is not None:
        return f"not loaded ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
    return "loaded" if operator_known("chunk_scan") else "not loaded"


def operator_known(name):
    return torch()._C._dispatch_has_kernel(f"fwpkm::{name}")


def cpu_capability():
    if operator_known("chunk_scan"):  # the library is in this process
        function = ctypes.CDLL(library_path()).fwpkm_cpu_capability
        function.restype = ctypes.c_char_p
        return function().decode()
    return "unknown (library not loaded)"


def built_with_cuda():
    library = ctypes.CDLL(library_path())
    return library.fwpkm_cuda_runtime_version() > 0


def operator_path(name, device):
    if not operator_known(name):
        return "unavailable (operator not registered)"
    if torch()._C._dispatch_has_kernel_for_dispatch_key(f"fwpkm::{name}", device):
        return f"C++ kernel, {cpu_capability()}" if device == "CPU" else "CUDA kernel"
    if device == "CPU":
        return "no CPU kernel"
    return "no CUDA kernel yet" if built_with_cuda() else "not built"


def report():
    return {
        "fwpkm_cuda": guarded(package_version),
        "python": guarded(lambda: f"{platform.python_version()} ({sys.executable})"),
        "platform": guarded(platform.platform),
        "torch": guarded(lambda: str(torch().__version__)),
        "torch_cuda": guarded(lambda: torch().version.cuda),
        "driver": guarded(driver_version),
        "gpus": guarded(gpus),
        "library": {"path": guarded(library_path), "state": guarded(library_state)},
        "build": guarded(lambda: build_module().build_info()),
        "library_cuda": guarded(
            lambda: {k: v for k, v in build_module().cuda_runtime_info().items() if k != "devices"}
        ),
        "cpu": {
            "capability": guarded(cpu_capability),
            "threads": guarded(lambda: torch().get_num_threads()),
            "cores": guarded(os.cpu_count),
        },
        "operators": {
            name: {device: guarded(operator_path, name, device) for device in ("CPU", "CUDA")} for name in OPERATORS
        },
    }


def show(value):
    if value is None or value == []:
        return "none"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def lines(found):
    """The report as text, one line per entry."""
    for key, value in found.items():
        if key == "gpus" and isinstance(value, list) and value:
            for i, gpu in enumerate(value):
                text = f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
                if gpu["architecture_built"] is False:
                    text += " (not among the architectures of this build)"
                yield f"gpu {i}", text
        elif key == "operators" and isinstance(value, dict):
            for name, paths in value.items():
                yield name, "; ".join(f"{device}: {path}" for device, path in paths.items())
        elif isinstance(value, dict):
            for name, entry in value.items():
                yield (name if name.startswith(key) else f"{key} {name}").replace("_", " "), show(entry)
        else:
            yield key if key == "fwpkm_cuda" else key.replace("_", " "), show(value)


def main(arguments=None):
    arguments = sys.argv[1:] if arguments is None else arguments
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken driver makes torch warn; the report says it in its own line
        found = report()
    if "--json" in arguments:
        print(json.dumps(found, indent=2, default=str))
    else:
        for name, text in lines(found):
            print(f"{name + ':':<28}{text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
