"""Large tensors in huge pages. A read or write of a slot goes to a row anywhere in memory; with pages of 4 KiB the
processor has to look up the page of nearly every row first, and misses its own table of pages."""

import ctypes
import mmap

import torch

SMALLEST = 32 << 20  # bytes; from here on the C library asks the system for every tensor by itself


def empty(shape, device=None, dtype=None):
    """torch.empty; a large tensor on the CPU lies in huge pages where the system grants them."""
    tensor = torch.empty(shape, device=device, dtype=dtype)
    size = tensor.numel() * tensor.element_size()
    if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and size >= SMALLEST:
        _wish(tensor.data_ptr(), size)
    return tensor


def copied(tensor, device=None):
    """A contiguous copy of it, on `device` if given, without its history."""
    copy = empty(tensor.shape, tensor.device if device is None else device, tensor.dtype)
    return copy.copy_(tensor.detach())


def _wish(address, size):
    """Only pages that have not been touched yet follow it."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(address + size - start), mmap.MADV_HUGEPAGE)
