"""Shared by all tests: FWPKM_TEST_FULL=1 (make test-full) adds the long versions."""

import os

import pytest
import torch

FULL = os.environ.get("FWPKM_TEST_FULL", "0") not in ("", "0")


def pytest_configure(config):  # here, not in pyproject.toml: the tests also run away from the source tree
    config.addinivalue_line("markers", "full: long versions, run by make test-full")


def pytest_collection_modifyitems(items):
    for item in items:
        if "full" in item.keywords and not FULL:
            item.add_marker(pytest.mark.skip(reason="long version: FWPKM_TEST_FULL=1, or make test-full"))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
