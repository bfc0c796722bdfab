"""Scans of the size that a GPU is bought for: there the large search filter, sorts of many tiles and the column kernels
are at work, which no small test reaches.

They promise the bits of the plain kernels. Inputs whose rows are not 16-byte aligned take the plain ones: so the same
scan, one element off, must have the same bits. The operators of the CPU say whether the numbers are right."""

import os
from pathlib import Path

import pytest
import torch
from inputs import drawn_on_the_cpu

import fwpkm_cuda

ON_A_GPU = torch.cuda.is_available()
LIBRARY = Path(os.environ.get("FWPKM_LIBRARY", "")).name
ON_THE_CPU = "simt" in LIBRARY  # the CUDA code, in the build of tests/simt
LAUNCHED = "launched" in LIBRARY  # there, with the launches of a GPU
DEVICE = torch.device("cuda", 0) if ON_A_GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_A_GPU or ON_THE_CPU), reason="needs a GPU"),
]

if ON_A_GPU:
    B, C, P, K, V, CHUNKS = 8, 512, 512, 512, 512, 2
elif LAUNCHED:  # the least work that is large (kernels/tuning.cuh)
    B, C, P, K, V, CHUNKS = 4, 1024, 256, 256, 32, 1
else:
    B, C, P, K, V, CHUNKS = 4, 16, 64, 32, 32, 2
randn, rand = map(drawn_on_the_cpu, (torch.randn, torch.rand))


def draw(H, R=8, chunks=CHUNKS):
    """values, sub_keys, query, target, loss_weights"""
    torch.manual_seed(1)
    T = chunks * C
    # As large with more heads and reads, for time matters here.
    rows, width = (B // H, K * 8 // R) if LAUNCHED else (B, K)
    sub_keys, query = randn(H, 2, P, width // 2) / width**0.5, randn(rows, T, H, width) / width**0.5
    return [randn(P * P, V), sub_keys, query, randn(rows, T, V), rand(rows, T)]


def placed(tensor, offset, device=DEVICE):
    """A copy that begins `offset` elements after a 16-byte boundary."""
    room = torch.empty(tensor.numel() + 8, dtype=tensor.dtype, device=device)
    return room[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def everything(inputs, **options):
    """{name: tensor} of what a training step computes, and of the search."""
    inputs = [x.requires_grad_(i > 0) for i, x in enumerate(inputs)]
    scan = fwpkm_cuda.chunk_scan(*inputs, **options)
    loss = scan.out.square().sum() + scan.losses.sum() + scan.addressing_loss.sum() + scan.new_sub_keys.square().sum()
    gradients = torch.autograd.grad(loss, inputs[1:])
    values, sub_keys, query, *_ = (x.detach() for x in inputs)
    values, new_sub_keys = values.clone(), sub_keys.clone()
    fwpkm_cuda.commit_(values, new_sub_keys, scan)
    scores, slots = fwpkm_cuda.product_key_topk(query, sub_keys, options["topk"], options["score"])
    found = {name: x.detach() for name, x in scan._asdict().items() if x is not None}
    found |= {f"gradient of {name}": x for name, x in zip(("sub_keys", "query", "target", "weights"), gradients)}
    return found | {"values": values, "sub_keys": new_sub_keys, "scores": scores, "slots": slots}


def differing(a, b):
    return [name for name in a if not torch.equal(a[name], b[name])]


def far(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


CASES = [
    pytest.param(H, R, score, values_only, id=f"h{H}k{R}-{score}" + ("" if values_only else "-keys_by_memory_loss"))
    for H, R, score, values_only in [
        (1, 8, "idw", True), (1, 8, "dot", False), (1, 8, "dot", True), (2, 8, "idw", False), (1, 32, "idw", True),
        (2, 32, "dot", False),
    ]
]  # fmt: skip


@pytest.mark.parametrize("H, R, score, values_only", CASES)
def test_kernels_of_large_work_have_the_bits_of_the_plain_ones(H, R, score, values_only):
    inputs = draw(H, R)
    options = dict(topk=R, chunk_size=C, score=score, values_only=values_only, grad_clip=0.5, lr=0.3, sparse_grad=False)
    aligned, plain = (everything([placed(x, offset) for x in inputs], **options) for offset in (0, 1))
    again = aligned if LAUNCHED else everything([placed(x, 0) for x in inputs], **options)
    fwpkm_cuda.check(DEVICE)
    assert not (found := differing(aligned, again)), f"another run has other bits: {found}"
    assert not (found := differing(aligned, plain)), f"other kernels have other bits: {found}"
    assert all(x.isfinite().all() for x in aligned.values() if x.is_floating_point())
    if not ON_A_GPU:
        return
    expected = everything([placed(x, 0, "cpu") for x in inputs], **options)
    found = {name: x.cpu() for name, x in aligned.items()}
    # Two slots whose scores are as good as the same may change places; what was read and written there is another row.
    same = (found["indices"] == expected["indices"]).flatten(2).all(-1)
    assert same.double().mean() > 0.99
    assert far(found["out"][same], expected["out"][same]) < 1e-3
    assert (found["slots"] == expected["slots"]).double().mean() > 0.999
    for name in ("out", "losses", "scores", "values", "sub_keys", *(x for x in expected if "gradient" in x)):
        assert (error := far(found[name], expected[name])) < 0.05, f"{name}: {error:.1e} away from the CPU's"
