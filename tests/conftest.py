"""Shared by all tests: the devices they run on, and FWPKM_TEST_FULL=1 (make test-full), which adds the long versions.

`pytest -m gpu` runs what runs on a GPU; without one it is not there. A test module that says

    pytestmark = pytest.mark.usefixtures("device")

runs on the CPU and on the GPU, with PyTorch's default device set. Random numbers come from inputs.py: they are drawn on
the CPU and moved, and so are the same on both."""

import os

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
