"""python -m fwpkm_cuda must report and return 0, above all when something is broken."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__import__("fwpkm_cuda").__file__).parent
OPERATORS = ("product_key_topk", "value_gather", "chunk_scan", "chunk_scan_backward", "chunk_scan_", "commit_")


def run(*arguments, path=(), command=("-m", "fwpkm_cuda")):
    """Output of the report in a process of its own; `path` is searched before the installed packages."""
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join([*map(str, path), *inherited]))
    result = subprocess.run(
        [sys.executable, *map(str, command), *arguments],
        env=environment,
        cwd=PACKAGE.anchor,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result.stdout


def copy_of_package(folder, leave_out=()):
    shutil.copytree(PACKAGE, folder / "fwpkm_cuda", ignore=shutil.ignore_patterns("__pycache__", *leave_out))
    return folder


def fake_torch(folder, body):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "__init__.py").write_text(body)
    return folder


def test_json_names_every_part():
    import torch

    import fwpkm_cuda

    found = json.loads(run("--json"))
    assert found["fwpkm_cuda"] == fwpkm_cuda.__version__
    assert found["torch"] == str(torch.__version__)
    assert found["library"]["state"] == "loaded"
    assert Path(found["library"]["path"]).exists()
    assert found["cpu"]["capability"] in ("avx512", "avx2", "baseline")
    assert set(found["operators"]) == set(OPERATORS)
    for name in OPERATORS:
        assert found["operators"][name]["CPU"] == f"C++ kernel, {found['cpu']['capability']}"
        assert found["operators"][name]["CUDA"] in ("CUDA kernel", "no CUDA kernel yet", "not built")
    assert "unavailable" not in json.dumps({k: v for k, v in found.items() if k not in ("build", "library_cuda")})


def test_build_information():
    _C = pytest.importorskip("fwpkm_cuda._C")
    import fwpkm_cuda

    info = _C.build_info()
    assert info["version"] == fwpkm_cuda.__version__
    assert info["torch_target"] == "2.11"
    assert isinstance(info["cuda_archs"], list)
    assert (info["cuda_compiler"] is None) == (info["cuda_archs"] == [])
    assert json.loads(run("--json"))["build"] == info
    assert set(_C.cuda_runtime_info()) == {"runtime", "driver", "status", "devices"}


def test_text_has_one_line_per_operator():
    text = run()
    for name in OPERATORS:
        (line,) = [x for x in text.splitlines() if x.startswith(f"{name}:")]
        assert "CPU: C++ kernel" in line and "CUDA: " in line


def test_library_missing(tmp_path):
    found = json.loads(run("--json", path=[copy_of_package(tmp_path, ["*.so"])]))
    assert found["library"]["state"].startswith("not loaded (")
    assert "libfwpkm_cuda_ops.so" in found["library"]["state"]
    assert found["operators"]["chunk_scan"]["CPU"] == "unavailable (operator not registered)"


def test_library_damaged(tmp_path):
    copy_of_package(tmp_path, ["*.so"])
    (tmp_path / "fwpkm_cuda" / "libfwpkm_cuda_ops.so").write_bytes(b"not a library")
    found = json.loads(run("--json", path=[tmp_path]))
    assert found["library"]["state"].startswith("not loaded (")


def test_another_library(tmp_path, monkeypatch):
    copy = shutil.copy(PACKAGE / "libfwpkm_cuda_ops.so", tmp_path / "another.so")
    monkeypatch.setenv("FWPKM_LIBRARY", str(copy))
    found = json.loads(run("--json"))
    assert found["library"] == {"path": str(copy), "state": "loaded"}
    assert found["operators"]["chunk_scan"]["CPU"].startswith("C++ kernel")
    monkeypatch.setenv("FWPKM_LIBRARY", str(tmp_path / "missing.so"))
    state = json.loads(run("--json"))["library"]["state"]
    assert state.startswith("not loaded (") and "FWPKM_LIBRARY" in state and "missing.so" in state


def test_build_module_missing(tmp_path):
    """As in the wheel for all Python versions."""
    found = json.loads(run("--json", path=[copy_of_package(tmp_path, ["_C*"])]))
    assert found["library"]["state"] == "loaded"
    assert found["build"].startswith("unavailable")
    assert found["operators"]["chunk_scan"]["CPU"].startswith("C++ kernel")


@pytest.mark.parametrize(
    "body",
    ["raise ImportError('libcudnn.so.9: cannot open shared object file')", "raise RuntimeError('broken')", "pass"],
)
def test_torch_broken(tmp_path, body):
    fake_torch(tmp_path, body)
    found = json.loads(run("--json", path=[tmp_path, PACKAGE.parent]))
    assert found["torch"].startswith("unavailable")
    assert found["library"]["state"].startswith("not loaded")
    assert "torch:" in run(path=[tmp_path, PACKAGE.parent])


def test_driver_too_old(tmp_path):
    """A torch with CUDA whose devices cannot be asked."""
    fake_torch(
        tmp_path,
        "__version__ = '2.99'\n"
        "class version: cuda = '13.0'\n"
        "class cuda:\n"
        "    @staticmethod\n"
        "    def device_count(): raise RuntimeError('The NVIDIA driver on your system is too old')\n",
    )
    found = json.loads(run("--json", path=[tmp_path, PACKAGE.parent]))
    assert found["torch_cuda"] == "13.0"
    assert "too old" in found["gpus"]


def test_runs_as_a_file_when_the_package_does_not_import(tmp_path):
    copy_of_package(tmp_path, ["*.so"])
    (tmp_path / "fwpkm_cuda" / "__init__.py").write_text("raise SyntaxError('broken')")
    text = run(path=[tmp_path], command=[tmp_path / "fwpkm_cuda" / "__main__.py"])
    assert "fwpkm_cuda:" in text and "broken" in text


def test_architecture_fits():
    from fwpkm_cuda.__main__ import architecture_fits

    assert architecture_fits("80-real", 8, 6)
    assert not architecture_fits("80-real", 9, 0)
    assert architecture_fits("90a-real", 9, 0)
    assert not architecture_fits("90a-real", 10, 0)
    assert architecture_fits("80-virtual", 12, 0)
    assert not architecture_fits("90-virtual", 8, 9)
    assert architecture_fits("86", 12, 0)
    assert architecture_fits("120-real", 12, 1)
