"""Shared by all tests: the devices they run on, and FWPKM_TEST_FULL=1 (make test-full), which adds the long versions.

`pytest -m gpu` runs what runs on a GPU; without one it is not there. A test module that says

    pytestmark = pytest.mark.usefixtures("device")

runs on the CPU and on the GPU, with PyTorch's default device set. Random numbers come from inputs.py: they are drawn on
the CPU and moved, and so are the same on both."""

import os
import re
from pathlib import Path

import pytest
import torch

FULL = os.environ.get("FWPKM_TEST_FULL", "0") not in ("", "0")


def pytest_configure(config):  # here, not in pyproject.toml: the tests also run away from the source tree
    config.addinivalue_line("markers", "full: long versions, run by make test-full")
    config.addinivalue_line("markers", "gpu: runs on a GPU")
    config.addinivalue_line(
        "markers",
        "cpu: for the CPU alone, where a wrong value raises at once, or of nothing that depends on the device",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("full") and "gpu" not in item.keywords and not FULL:  # long on the CPU, not on a GPU
            item.add_marker(pytest.mark.skip(reason="long version: FWPKM_TEST_FULL=1, or make test-full"))


def pytest_generate_tests(metafunc):
    wanted = "device" in metafunc.fixturenames and not metafunc.definition.get_closest_marker("cpu")
    if wanted and torch.cuda.is_available():
        no_id = getattr(pytest, "HIDDEN_PARAM", "cpu")  # a test on the CPU has the same name on every machine
        devices = [pytest.param("cpu", id=no_id), pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("device", devices, indirect=True)


@pytest.fixture
def device(request):
    """The device of the test, which is PyTorch's default device meanwhile."""
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield torch.device("cpu")
    else:
        with torch.device(name):
            yield torch.get_default_device()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tensors_in(name, x):
    """(name, tensor) of a variable, or of what a list or tuple holds; none that is large."""
    for i, part in enumerate(x if isinstance(x, list | tuple) else [x]):
        if isinstance(part, torch.Tensor) and part.layout == torch.strided and part.numel() <= 1 << 18:
            yield f"{name}.{i}", part


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """FWPKM_KEEP_INPUTS=folder: of a test that failed, the tensors of its functions' variables are kept there."""
    report = yield
    folder = os.environ.get("FWPKM_KEEP_INPUTS")
    if not (folder and report.failed and call.excinfo):
        return report
    kept = {}
    for entry in call.excinfo.traceback[-6:]:
        for name, x in entry.frame.f_locals.items():
            for key, tensor in tensors_in(f"{entry.name}.{name}", x) if name.isidentifier() else ():
                try:
                    kept[key] = tensor.detach().cpu()
                except RuntimeError:  # the GPU's context is gone
                    continue
    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.save(kept, Path(folder) / (re.sub(r"\W+", "-", item.nodeid)[-120:] + ".pt"))
    return report
