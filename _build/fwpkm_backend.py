"""The setuptools build backend, with two changes.

torch is a build requirement only where it is not installed yet. The wheel does not depend on which torch (2.11 or
newer) built it, so downloading gigabytes into pip's isolated environment would be a waste when the environment pip was
started from has one.

A setuptools that is too old, as it can be with --no-build-isolation, is refused here, by its version. It would refuse
pyproject.toml itself, with a message that does not name the cause.
"""

import os
import subprocess
import sys

import setuptools
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

OLDEST_SETUPTOOLS = 77  # as in pyproject.toml; the first that reads `license = "Apache-2.0"`
if int(setuptools.__version__.split(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(
        f"fwpkm-cuda: setuptools {setuptools.__version__} found, {OLDEST_SETUPTOOLS} or newer is needed. "
        f'Install it: {sys.executable} -m pip install "setuptools>={OLDEST_SETUPTOOLS}"'
    )


def _installed(module):
    # -I drops PYTHONPATH and with it pip's isolation: the interpreter's own site-packages is searched.
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([sys.executable, "-I", "-c", code]).returncode == 0


def _torch():
    return [] if os.environ.get("FWPKM_TORCH_DIR") or _installed("torch") else ["torch>=2.11"]


def get_requires_for_build_wheel(config_settings=None):
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings=None):
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
