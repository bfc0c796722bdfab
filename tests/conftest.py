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
        if "full" in item.keywords and "gpu" not in item.keywords and not FULL:  # long on the CPU, not on a GPU
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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """FWPKM_KEEP_INPUTS=folder: of a test that failed, the tensors of its frames are kept there."""
    report = yield
    folder = os.environ.get("FWPKM_KEEP_INPUTS")
    if folder and report.failed and call.excinfo:
        frames = [(entry.name, entry.frame.f_locals) for entry in call.excinfo.traceback][-6:]
        kept = {}
        for function, names in frames:
            for name, x in names.items():
                parts = x if isinstance(x, list | tuple) else [x]
                for i, part in enumerate(parts):
                    if isinstance(part, torch.Tensor) and part.layout == torch.strided and part.numel() <= 1 << 18:
                        try:
                            kept[f"{function}.{name}.{i}"] = part.detach().cpu()
                        except RuntimeError:  # the GPU's context is gone
                            continue
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(kept, Path(folder) / (re.sub(r"\W+", "-", item.nodeid)[-120:] + ".pt"))
    return report
