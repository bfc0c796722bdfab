"""FWPKM_CUDA_WITHOUT leaves ways of the CUDA code out (csrc/kernels/switches.cuh): other kernels, the same bits. In the
libraries of tests/simt, without a GPU."""

import pytest
from test_simt import ROOT, missing
from test_simt_ops import built, python

reason = missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

BITS = """
import ctypes, hashlib, os, torch, fwpkm_cuda
import test_large_shapes as large
found = large.everything([large.placed(x, 0) for x in large.draw(2, chunks=2)], topk=4, chunk_size=large.C,
                         score="idw", values_only=False, grad_clip=0.5, lr=0.3, sparse_grad=False)
waits = ctypes.CDLL(os.environ["FWPKM_LIBRARY"]).simt_streams(ctypes.c_bool(False), ctypes.c_int(-1))
print(hashlib.sha256(b"".join(x.numpy().tobytes() for x in found.values())).hexdigest(), waits)
"""
KERNELS = """
import os, sys, torch, fwpkm_cuda
from kernel_traffic import Counter
counter = Counter(os.environ["FWPKM_LIBRARY"])
fwpkm_cuda.product_key_topk(torch.randn(130, 1, 8), torch.randn(1, 2, 16, 4), 2)
fwpkm_cuda.value_gather(torch.randn(4, 8), torch.tensor([[1, 2]]), torch.ones(1, 2))
print(*(x.kernel.replace(" ", "") for x in counter.launches()))
"""


def run(library, code, without):
    paths = f"{ROOT / 'python'}:{ROOT / 'tests'}:{ROOT / 'scripts'}"
    return python(built(library), "-c", code, PYTHONPATH=paths, FWPKM_CUDA_WITHOUT=without).split()


def test_results_are_the_same_bits():
    expected, waits = run("simt_ops", BITS, "")
    assert int(waits) > 0
    for without in ("filter", "columns", "packs", "filter,streams", "streams"):
        found, waits = run("simt_ops", BITS, without)
        assert found == expected, without
        assert (int(waits) == 0) == ("streams" in without), without


@pytest.mark.parametrize(
    "without, filters, packs",
    [("", True, True), ("filter", False, True), ("packs", False, False), ("fil,streams,packs_", True, True)],
)
def test_other_kernels_are_launched(without, filters, packs):
    kernels = run("simt_traffic", KERNELS, without)
    assert any(x.startswith("filter<") for x in kernels) == filters
    (gather,) = (x for x in kernels if x.startswith("gather<"))
    assert gather.startswith(f"gather<LaunchSize,{str(packs).lower()},")
