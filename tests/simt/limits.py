"""Whether the CUDA operators can be launched on every GPU, up to the largest shapes that they allow: run with
FWPKM_LIBRARY naming the library of simt_ops or simt_launched, by ../test_simt_ops.py.

cuda_on_cpu.h refuses what a device refuses: blocks of more than 1,024 threads, grids beyond CUDA's limits, more than 48
KiB of static shared memory, and more shared memory in all than a block may have. The last is what differs between GPUs;
with less of it an operator takes another way, which must give the same bits.
"""

import ctypes
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent.parent))
from inputs import memory, tokens

import fwpkm_cuda

library = ctypes.CDLL(fwpkm_cuda.library_path())
# KiB of shared memory that a kernel may have a block opt in to, by compute capability (the CUDA programming guide).
SHARED = {"9.0 and 10.0": 227, "8.0": 163, "8.6, 8.9 and 12.0": 99}


def make(B, T, H, P, K, V, dtype=torch.float32):
    torch.manual_seed(2)
    return [
        x.to(dtype) if x.is_floating_point() else x for x in (*memory(H, P, K, V, dtype), *tokens(B, T, H, K, V, dtype))
    ]


def step(inputs, **options):
    """All that a training step and a scan in place compute, and a search."""
    leaves = [x.clone().requires_grad_() for x in inputs[:5]]
    options = dict(values_only=False, grad_clip=0.5) | options
    scan = fwpkm_cuda.chunk_scan(*leaves, inputs[5], **options, sparse_grad=False)
    loss = scan.out.square().sum() + scan.losses.sum() + scan.addressing_loss.sum() + scan.new_sub_keys.square().sum()
    gradients = torch.autograd.grad(loss, leaves)
    held, again = ([x.clone() for x in inputs[:2]] for _ in range(2))
    fwpkm_cuda.commit_(*held, scan)
    reading = fwpkm_cuda.chunk_scan_(*again, *inputs[2:], **options)
    found = fwpkm_cuda.product_key_topk(inputs[2], inputs[1], options["topk"], options.get("score", "dot"))
    return [*(x.detach() for x in scan), *gradients, *held, *again, *reading, *found]


def search(inputs, topk, score):
    query, sub_keys = inputs[2].clone().requires_grad_(), inputs[1].clone().requires_grad_()
    scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, topk, score)
    return [scores.detach(), indices, *torch.autograd.grad(scores.sin().sum(), [query, sub_keys])]


def gather(N, R, V, S=50):
    torch.manual_seed(2)
    values, weights = torch.randn(S, V, requires_grad=True), torch.randn(N, R, requires_grad=True)
    out = fwpkm_cuda.value_gather(values, torch.randint(0, S, (N, R)), weights)
    return [out.detach(), *torch.autograd.grad(out.sin().sum(), [values, weights])]


CASES = {
    "1024 reads of a token": lambda: step(make(1, 2, 8, 128, 8, 4), topk=128, chunk_size=2, score="idw"),
    "128 reads of one head": lambda: step(make(1, 3, 1, 130, 8, 4), topk=128, chunk_size=2, lookahead=0),
    "wide rows": lambda: step(make(1, 3, 1, 4, 4096, 4100), topk=4, chunk_size=2),
    "one sub-key": lambda: step(make(2, 8, 2, 1, 8, 8), topk=1, chunk_size=4),
    # Kernels that keep columns of all tokens, or of all sub-keys, in shared memory.
    "many tokens, in float64": lambda: step(make(1, 1700, 1, 4, 4, 2, torch.float64), topk=4, chunk_size=1700),
    "many sub-keys": lambda: step(make(1, 400, 1, 700, 8, 4), topk=8, chunk_size=400, score="idw"),
    "a search by many tokens": lambda: search(make(1, 5500, 1, 8, 8, 4), 4, "dot"),
    # The filter, with 16 and with 64 tokens a block.
    "a search by some tokens": lambda: search(make(1, 512, 1, 160, 40, 4), 16, "idw"),
    "a search with heads": lambda: search(make(1, 1100, 4, 80, 16, 4), 8, "dot"),
    "a gather of 128 rows": lambda: gather(3, 128, 1000),
}

torch.set_num_threads(1)
refused = dict.fromkeys(SHARED, 0)
for name, run in CASES.items():
    results = {}
    for device, kib in SHARED.items():
        library.simt_shared_of_block(kib)
        results[device] = run()
        refused[device] += library.simt_shared_of_block(kib)
        fwpkm_cuda.check("cpu")
    expected = results["9.0 and 10.0"]
    for device, found in results.items():
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True)), f"{name}: other bits on {device}"
    print(f"{name}: the same bits on every device; kernels refused so far:", *refused.values())
assert 0 == refused["9.0 and 10.0"] < refused["8.0"] <= refused["8.6, 8.9 and 12.0"], refused
