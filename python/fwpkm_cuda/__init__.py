"""Fast-weight product key memory: a huge sparse memory that learns while it reads.

Importing this package registers the operators as torch.ops.fwpkm.*; the functions below are thin wrappers with
documented shapes. `fwpkm_cuda.reference` is the same mathematics in plain PyTorch.
"""

from importlib import import_module

from ._library import library_path, load_error
from ._version import __version__

__all__ = [
    "PKM",
    "FwMLP",
    "FwPKM",
    "MLPMemory",
    "Memories",
    "Memory",
    "Scan",
    "Usage",
    "__version__",
    "check",
    "chunk_scan",
    "chunk_scan_",
    "commit_",
    "gate_histogram",
    "library_path",
    "product_key_topk",
    "random_usage",
    "read_counts",
    "reference",
    "usage",
    "value_dot",
    "value_gather",
]

if load_error is None:
    from . import reference
    from .fast_mlp import MLPMemory
    from .layers import PKM, FwMLP, FwPKM
    from .memories import Memories
    from .memory import Memory
    from .ops import Scan, check, chunk_scan, chunk_scan_, commit_, product_key_topk, value_dot, value_gather
    from .statistics import Usage, gate_histogram, random_usage, read_counts, usage
else:  # importable all the same: `python -m fwpkm_cuda` says what is wrong

    def __getattr__(name):
        if name == "reference":  # needs torch only
            return import_module("fwpkm_cuda.reference")
        if name in __all__:
            raise ImportError(f"fwpkm_cuda.{name}: the library of operators is not loaded") from load_error
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
