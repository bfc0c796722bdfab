"""Whether the CUDA operators of a scan need every wait between their two streams, and have all that they need: run with
FWPKM_LIBRARY naming the library of simt_ops, by ../test_simt_ops.py.

cuda_on_cpu.h lets one of the streams do nothing before the other waits for it; here first the one, then the other. The
results must be the same. When a wait is left out (in a process of its own, for then anything may happen), they must not
be.
"""

import ctypes
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from inputs import memory, tokens

import fwpkm_cuda

library = ctypes.CDLL(os.environ["FWPKM_LIBRARY"])
CHUNKS = 6
OPTIONS = dict(topk=3, chunk_size=4, lookahead=1, score="idw", values_only=False, weight_decay=0.1)


def set_streams(side_first, skip_wait=-1):
    """Returns how many waits there were since the last call."""
    return library.simt_streams(ctypes.c_bool(side_first), ctypes.c_int(skip_wait))


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ends_otherwise(run, expected):
    child = os.fork()
    if child == 0:
        os._exit(0 if same(run(), expected) else 1)
    return os.waitpid(child, 0)[1] != 0


def check(name, run, expected_waits, needless=()):
    set_streams(side_first=False)
    expected = run()
    waits = set_streams(side_first=True)
    assert same(run(), expected), f"{name}: the result depends on which stream is first"
    assert waits == expected_waits, (name, waits)
    # The first: for inputs, which are there. The last two: at the end, and once more, for after an exception.
    for wait in sorted({*range(1, waits - 2)} - {*needless}):
        noticed = False
        for side_first in (False, True):
            set_streams(side_first, wait)
            noticed |= ends_otherwise(run, expected)
        assert noticed, f"{name}: nobody needs wait {wait}"
    set_streams(side_first=False)
    print(name, "needs its waits")


torch.manual_seed(3)
torch.set_num_threads(1)
values, sub_keys, *inputs, mask = *memory(2, 6, 8, 5), *tokens(2, 4 * CHUNKS, 2, 8, 5)
leaves = [x.clone().requires_grad_() for x in (values, sub_keys, *inputs)]
scan = fwpkm_cuda.chunk_scan(*leaves, mask, **OPTIONS, sparse_grad=False)
loss = scan.out.square().sum() + scan.losses.sum() + scan.addressing_loss.sum() + scan.new_sub_keys.sin().sum()


def in_place():
    memory = values.clone(), sub_keys.clone()
    return [*fwpkm_cuda.chunk_scan_(*memory, *inputs, mask, **OPTIONS), *memory]


def with_log():
    return [x.detach() for x in fwpkm_cuda.chunk_scan(*leaves, mask, **OPTIONS, sparse_grad=False)]


check("chunk_scan_", in_place, 1 + 3 * CHUNKS + 2)
check("chunk_scan", with_log, 1 + 3 * CHUNKS + 2)
# Wait 3: before memory is used again, for the first time.
check("chunk_scan_backward", lambda: torch.autograd.grad(loss, leaves, retain_graph=True), 4 * CHUNKS + 2, needless=[3])
