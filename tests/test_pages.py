"""Large tensors in huge pages: the same tensors, and where they lie."""

import mmap
import re
from pathlib import Path

import pytest
import torch

import fwpkm_cuda
from fwpkm_cuda import pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def wishes_of(address):
    """The flags of the mapping in which the address lies."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE") or not THP.exists(), reason="no huge pages here")
def test_the_memory_lies_in_huge_pages():
    memory = fwpkm_cuda.Memory.random(128, 4, 520, seed=1)
    assert memory.values.numel() * 4 >= pages.SMALLEST
    for values in (memory.values, memory.clone().values):
        assert "hg" in wishes_of(values.data_ptr() + values.numel() * 2)


@pytest.mark.parametrize("shape", [(0, 3), (5, 3), (pages.SMALLEST // 12 + 1, 3)])
def test_a_copy_is_a_copy(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = pages.copied(x)
    assert torch.equal(x, y) and y.dtype == x.dtype and not y.requires_grad and y.is_contiguous()
    assert y.numel() == 0 or y.data_ptr() != x.data_ptr()
    assert pages.copied(x, "meta").shape == x.shape
