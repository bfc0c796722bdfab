"""Whether the CUDA operators can be captured into a CUDA graph: run with FWPKM_LIBRARY naming the library of simt_ops,
by ../test_simt_ops.py.

cuda_on_cpu.h refuses what CUDA refuses while a stream is captured, and does the work at once. So a capture must end
without an error and give the bits of an ordinary run; and there must be an error when an operator waits for the device,
or when a wait is left out that takes the second stream into the capture or back out of it.
"""

import ctypes
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from inputs import memory, tokens

import fwpkm_cuda

library = ctypes.CDLL(fwpkm_cuda.library_path())
library.simt_capture.restype = ctypes.c_char_p
UNSUPPORTED = "operation not permitted when stream is capturing"
INVALIDATED = "operation failed due to a previous error during capture"
UNJOINED = "capturing stream has unjoined work"
ISOLATION = "dependency created on uncaptured work in another stream"


def captured(run):
    """What run() returns in a capture; the errors of run() and of the end of the capture."""
    assert library.simt_capture(ctypes.c_bool(True)) == b"no error"
    result, error = None, None
    try:
        result = run()
    except RuntimeError as raised:
        error = str(raised)
    return result, error, library.simt_capture(ctypes.c_bool(False)).decode()


def errors_without(wait, waits, run):
    library.simt_skip_waits(waits)
    library.simt_streams(ctypes.c_bool(False), wait)
    _, error, end = captured(run)
    library.simt_streams(ctypes.c_bool(False), -1)
    return error, end


torch.manual_seed(3)
torch.set_num_threads(1)
values, sub_keys, *inputs, mask = *memory(2, 6, 8, 5), *tokens(2, 20, 2, 8, 5)
options = dict(topk=3, chunk_size=4, lookahead=2, score="idw", values_only=False)
leaves = [x.clone().requires_grad_() for x in inputs]


def in_place():
    held = values.clone(), sub_keys.clone()
    return [*fwpkm_cuda.chunk_scan_(*held, *inputs, mask, **options), *held]


def training_step():
    held = values.clone(), sub_keys.clone()
    scan = fwpkm_cuda.chunk_scan(*held, *leaves, mask, **options)
    gradients = torch.autograd.grad(scan.out.square().sum() + scan.losses.sum(), leaves)
    fwpkm_cuda.commit_(*held, fwpkm_cuda.Scan(*(x.detach() for x in scan)))
    return [scan.out.detach(), *gradients, *held]


# The first call of the process makes the second stream, and asks where the error word is: in the capture.
for name, run in {"chunk_scan_": in_place, "a training step": training_step}.items():
    result, error, end = captured(run)
    assert error is None and end == "no error", (name, error, end)
    assert all(torch.equal(a, b) for a, b in zip(result, run(), strict=True)), name
    print(name, "can be captured")

_, error, end = captured(lambda: fwpkm_cuda.check("cpu"))
assert UNSUPPORTED in error and end == INVALIDATED, (error, end)
library.simt_streams(ctypes.c_bool(False), -1)
in_place()
waits = library.simt_streams(ctypes.c_bool(False), -1)
error, end = errors_without(0, 1, in_place)
assert ISOLATION in error and end == INVALIDATED, (error, end)
error, end = errors_without(waits - 2, 2, in_place)
assert error is None and end == UNJOINED, (error, end)
print("what cannot be captured is noticed")
