"""Whether the CUDA operators of a scan need every wait between their two streams, and have all that they need: run with
FWPKM_LIBRARY naming the library of simt_ops, by ../test_simt_ops.py.

cuda_on_cpu.h lets one of the streams do nothing before the other waits for it; here first the one, then the other. The
results must be the same. When a wait is left out (in a process of its own, for then anything may happen), they must not
be. At the end there are two: of the scan, and of its SideStream before memory is freed; where nothing fails, one may be
enough, but not none. Inputs are late: the current stream still has to bring them. And whichever launch fails, all that
was given to the two streams is done before memory is freed.
"""

import contextlib
import ctypes
import os
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from inputs import DEFAULTS, memory, tokens

import fwpkm_cuda

library = ctypes.CDLL(fwpkm_cuda.library_path())
CHUNKS = 5  # odd: in place, the last sub-keys are copied into the memory
OPTIONS = dict(topk=3, chunk_size=4, lookahead=1, score="idw", values_only=False, weight_decay=0.1)


def set_streams(side_first, skip_wait=-1, skip_waits=1):
    """Returns how many waits there were since the last call."""
    library.simt_skip_waits(skip_waits)
    return library.simt_streams(ctypes.c_bool(side_first), skip_wait)


def late(tensors):
    """Copies that the current stream has still to bring: until then they hold what nobody can take for a number."""
    copies = []
    for x in tensors:
        copies.append(torch.empty_like(x))
        copies[-1].untyped_storage().fill_(0xFF)
        library.simt_late_copy(*map(ctypes.c_void_p, (copies[-1].data_ptr(), x.data_ptr())), ctypes.c_size_t(x.nbytes))
    return copies


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def ends_otherwise(run, expected):
    child = os.fork()
    if child == 0:
        os._exit(0 if same(run(), expected) else 1)
    return os.waitpid(child, 0)[1] != 0


def noticed(run, expected, *skipped):
    found = False
    for side_first in (False, True):
        set_streams(side_first, *skipped)
        found |= ends_otherwise(run, expected)
    return found


def check(name, run, expected_waits, needless=()):
    set_streams(side_first=False)
    expected = run()
    waits = set_streams(side_first=True)
    assert same(run(), expected), f"{name}: the result depends on which stream is first"
    assert waits == expected_waits, (name, waits)
    for wait in sorted({*range(waits - 1)} - {*needless}):  # the last is for a scan that fails
        assert noticed(run, expected, wait), f"{name}: nobody needs wait {wait}"
    assert noticed(run, expected, waits - 2, 2), f"{name}: nobody needs the two waits at the end"
    set_streams(side_first=False)
    print(name, "needs its waits")


def after_failure(run, launch, *streams):
    """What run() leaves when so many launches were done, and how many waits there were."""
    set_streams(*streams)
    library.simt_fail_launch(launch)
    left = []
    with contextlib.suppress(RuntimeError):
        left = run()
    library.simt_fail_launch(-1)
    return left, set_streams(side_first=False)


def check_failures(name, run):
    library.simt_fail_launch(-1)
    run()
    launches, needed = library.simt_fail_launch(-1), 0
    library.simt_left_behind()
    for launch in range(launches):
        left, _ = after_failure(run, launch, False)
        again, waits = after_failure(run, launch, True)
        assert same(left, again), f"{name}: what is left when launch {launch} fails depends on which stream is first"
        assert library.simt_left_behind() == 0, f"{name}: work is left when launch {launch} fails"
        after_failure(run, launch, False, waits - 1)
        needed += library.simt_left_behind() > 0
    assert needed, f"{name}: nobody needs the wait of a scan that fails"
    print(name, f"may fail at any of {launches} launches")


def make(chunks):
    """The three operators, on inputs that are late; the first also returns its memory, and that after a failure."""
    torch.manual_seed(3)
    inputs = [*memory(2, 6, 8, 5), *tokens(2, 4 * chunks, 2, 8, 5)]
    options = tuple((DEFAULTS | OPTIONS).values())
    saved = torch.ops.fwpkm.chunk_scan(*inputs, *options)
    gradients = [torch.randn_like(x) for x in (saved[0], *saved[2:6])]
    # This one is copied by PyTorch, which on the CPU does not wait for the current stream.
    dnew_sub_keys = torch.randn_like(saved[7])

    def in_place():
        arrived = late(inputs)
        with contextlib.suppress(RuntimeError):
            return [*torch.ops.fwpkm.chunk_scan_(*arrived, *options), *arrived]
        return arrived

    def with_log():
        return torch.ops.fwpkm.chunk_scan(*late(inputs), *options)

    def backward():
        given = [*late(gradients), dnew_sub_keys, *late([*inputs, saved[5], *saved[7:]])]
        return torch.ops.fwpkm.chunk_scan_backward(*given, *options, True)

    return in_place, with_log, backward


torch.set_num_threads(1)
in_place, with_log, backward = make(CHUNKS)
end = 3 * CHUNKS + 1
check("chunk_scan_", in_place, end + 2)
check("chunk_scan", with_log, end + 2, needless=[end])  # what is left to do at its end needs nothing of the side's
# Wait 3: before memory is used again, for the first time.
check("chunk_scan_backward", backward, 4 * CHUNKS + 2, needless=[3, 4 * CHUNKS])
for name, run in zip(("chunk_scan_", "chunk_scan", "chunk_scan_backward"), make(chunks=2), strict=True):
    check_failures(name, run)
