"""Finds and loads the library of operators. A failure is kept, so that `python -m fwpkm_cuda` can report it.

The environment variable FWPKM_LIBRARY names another file to load; it is for tests of another build of the operators.
"""

import os
from pathlib import Path

_NAME = "libfwpkm_cuda_ops.so"


def library_path() -> Path | None:
    """The file that holds the operators, or None if this installation has none."""
    path = Path(os.environ.get("FWPKM_LIBRARY") or Path(__file__).parent / _NAME)
    return path if path.is_file() else None


def _load() -> Exception | None:
    path = library_path()
    if path is None:
        if os.environ.get("FWPKM_LIBRARY"):
            return ImportError(f"FWPKM_LIBRARY: no such file: {os.environ['FWPKM_LIBRARY']}")
        return ImportError(f"{_NAME} is missing from {Path(__file__).parent}: build or install fwpkm-cuda first")
    try:
        import torch  # here: a broken torch is one of the things to report

        torch.ops.load_library(str(path))
    except Exception as error:  # the report must be able to say what went wrong, whatever it was
        return error
    return None


load_error = _load()
