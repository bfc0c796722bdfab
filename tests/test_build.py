"""The build backend says what is missing in an environment that it cannot build in."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BACKEND = ROOT / "_build"

pytestmark = pytest.mark.skipif(not BACKEND.is_dir(), reason="the tests run away from the source tree")


def load_backend(version):
    """A process that loads the backend where setuptools says that it is of this version."""
    program = f"import setuptools; setuptools.__version__ = {version!r}; import fwpkm_backend"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(BACKEND)!r}); {program}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_old_setuptools_is_refused_in_plain_words():
    pytest.importorskip("setuptools")
    (needed,) = re.findall(r'"(setuptools>=\d+)"', (ROOT / "pyproject.toml").read_text())
    oldest = int(needed.split("=")[1])
    for version in ("65.5.0", f"{oldest - 1}.1.0"):
        result = load_backend(version)
        assert result.returncode == 1
        assert result.stderr == (
            f"fwpkm-cuda: setuptools {version} found, {oldest} or newer is needed. "
            f'Install it: {sys.executable} -m pip install "{needed}"\n'
        )
    for version in (f"{oldest}.0.1", f"{oldest + 25}.0.0.post20270101"):
        result = load_backend(version)
        assert result.returncode == 0, result.stderr
