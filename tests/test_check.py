"""fwpkm_cuda.check: what does not depend on a GPU. (What kernels report: test_gpu.py.)"""

import re
from pathlib import Path

import pytest
import torch

import fwpkm_cuda
from fwpkm_cuda.ops import REPORTS

ERRORS = Path(__file__).parent.parent / "csrc" / "kernels" / "errors.cuh"


@pytest.mark.parametrize("where", [None, "cpu", torch.device("cpu")], ids=str)
def test_on_the_cpu_there_is_nothing_to_report(where):
    assert fwpkm_cuda.check(where) is None
    with pytest.raises(RuntimeError, match="indices: expected slots"):
        fwpkm_cuda.value_gather(torch.ones(2, 1), torch.tensor([[2]]), torch.ones(1, 1))
    assert fwpkm_cuda.check(where) is None


@pytest.mark.skipif(not ERRORS.is_file(), reason="the tests run away from the source tree")
def test_every_error_of_the_kernels_has_a_text():
    bits = [int(bit) for bit in re.findall(r"^  k\w+ = (\d+),", ERRORS.read_text(), re.MULTILINE)]
    assert bits == list(REPORTS) == [1 << i for i in range(len(bits))]
