"""What PyTorch asks of an operator: opcheck, compile, export, AOTInductor, autocast, activation checkpointing."""

import pytest
import torch
from inputs import BASE, DEFAULTS, SCANS, leaves, memory, rand, randint, randn, tokens
from torch.library import opcheck

import fwpkm_cuda

pytestmark = pytest.mark.usefixtures("device")

OPS = torch.ops.fwpkm


def scan_inputs(grad=True):
    values, sub_keys, query, target, gate, mask = memory(dtype=torch.float32) + tokens(dtype=torch.float32)
    tensors = (values, sub_keys, query, target, gate)
    return (*(leaves(*tensors) if grad else tensors), mask)


def positional(options):
    return tuple((DEFAULTS | options).values())


def topk_inputs():
    _, sub_keys = memory(dtype=torch.float32)
    return leaves(randn(7, 2, 8), sub_keys)


def gather_inputs():
    values, weights = leaves(randn(36, 5), rand(4, 3))
    return values, randint(0, 36, (4, 3), dtype=torch.int32), weights


def check(op, *arguments):
    result = opcheck(op.default, arguments)  # all four utilities; raises on a failure
    assert len(result) == 4 and set(result.values()) == {"SUCCESS"}


def test_opcheck_product_key_topk():
    query, sub_keys = topk_inputs()
    for score in ("dot", "idw"):
        check(OPS.product_key_topk, query, sub_keys, 3, score)
    scores, indices = OPS.product_key_topk(query, sub_keys, 3)
    check(
        OPS.product_key_topk_backward, torch.randn_like(scores), query.detach(), sub_keys.detach(), indices, "dot", 1e-3
    )


def test_opcheck_value_gather():
    values, indices, weights = gather_inputs()
    dout = randn(4, 5, requires_grad=True)
    check(OPS.value_gather, values, indices, weights)
    check(OPS.value_gather, values.detach(), indices, weights, True)
    check(OPS.value_gather_dvalues, dout, indices, weights, 36)
    check(OPS.value_gather_dweights, dout, values, indices)


@pytest.mark.parametrize("name", ["default", "idw", "clip", "keys_by_memory_loss", "unflushed_decay_clip_carry"])
def test_opcheck_chunk_scan(name):
    options = positional(SCANS[name])
    check(OPS.chunk_scan, *scan_inputs(), *options, False)
    values, sub_keys, *activations = scan_inputs(grad=False)
    check(OPS.chunk_scan_, values.clone(), sub_keys.clone(), *activations, *options)
    result = OPS.chunk_scan(values, sub_keys, *activations, *options)
    check(OPS.commit_, values.clone(), sub_keys.clone(), *result[5:8])
    gradients = (torch.randn_like(result[0]), *[None] * 5)
    check(OPS.chunk_scan_backward, *gradients, values, sub_keys, *activations, result[5], *result[7:], *options, False)


def loss_of_scan(values, sub_keys, query, target, gate, mask):
    scan = fwpkm_cuda.chunk_scan(
        values, sub_keys, query.sin(), target, gate, mask, **BASE, score="idw", sparse_grad=False
    )
    return scan.out.square().sum() + scan.losses.sum()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_without_graph_breaks(dynamic):
    compiled = torch.compile(loss_of_scan, fullgraph=True, dynamic=dynamic)
    for T in (11, 16, 6) if dynamic else (11,):
        inputs = leaves(*(memory(dtype=torch.float32) + tokens(T=T, dtype=torch.float32)))
        expected = loss_of_scan(*inputs)
        result = compiled(*inputs)
        torch.testing.assert_close(result, expected)
        for a, b in zip(
            torch.autograd.grad(result, inputs[:5]), torch.autograd.grad(expected, inputs[:5]), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_compile_in_place_and_commit():
    def forward(values, sub_keys, query, target):
        out = fwpkm_cuda.chunk_scan_(values, sub_keys, query * 2, target, **BASE).out
        scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **BASE)
        fwpkm_cuda.commit_(values, sub_keys, scan)
        return out + scan.out

    ours, other = (memory(dtype=torch.float32) for _ in range(2))
    for a, b in zip(ours, other, strict=True):
        b.copy_(a)
    query, target, *_ = tokens(dtype=torch.float32)
    result = torch.compile(forward, fullgraph=True)(*ours, query, target)
    torch.testing.assert_close(result, forward(*other, query, target))
    assert all(torch.equal(a, b) for a, b in zip(ours, other, strict=True))


class Reader(torch.nn.Module):
    def __init__(self):
        super().__init__()
        values, sub_keys = memory(dtype=torch.float32)
        self.register_buffer("values", values)
        self.register_buffer("sub_keys", sub_keys)

    def forward(self, query, target):
        scan = fwpkm_cuda.chunk_scan(self.values, self.sub_keys, query.sin(), target, **BASE)
        scores, indices = fwpkm_cuda.product_key_topk(query, self.sub_keys, 3)
        return scan.out + 1, fwpkm_cuda.value_gather(self.values, indices, scores.softmax(-1))


@pytest.mark.cpu
def test_export_and_aot_inductor(tmp_path):
    """One export for every length above a chunk; the AOTInductor package finds the operators without Python code."""
    model = Reader()
    query, target, *_ = tokens(T=11, dtype=torch.float32)
    T = torch.export.Dim("T", min=5, max=4096)
    exported = torch.export.export(model, (query, target), dynamic_shapes={"query": {1: T}, "target": {1: T}})
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "reader.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for length in (5, 11, 30):
        query, target, *_ = tokens(T=length, dtype=torch.float32)
        expected = model(query, target)
        torch.testing.assert_close(exported.module()(query, target), expected)
        torch.testing.assert_close(tuple(loaded(query, target)), expected)


def test_autocast_leaves_the_memory_in_float32():
    """A bfloat16 model over a float32 memory: the projections are cast, the memory is not."""
    values, sub_keys = memory(dtype=torch.float32)
    project = torch.nn.Linear(16, 16)
    hidden = randn(2, 11, 16)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        query = project(hidden)
        assert query.dtype == torch.bfloat16
        scan = fwpkm_cuda.chunk_scan(values, sub_keys, query.view(2, 11, 2, 8), query[..., :5], **BASE)
        scores, indices = fwpkm_cuda.product_key_topk(query.view(2, 11, 2, 8), sub_keys, 3)
        gathered = fwpkm_cuda.value_gather(values, indices, scores.softmax(-1))
    assert scan.out.dtype == torch.bfloat16
    assert scan.new_rows.dtype == scan.new_sub_keys.dtype == scores.dtype == gathered.dtype == torch.float32
    expected = fwpkm_cuda.chunk_scan(
        values, sub_keys, query.detach().float().view(2, 11, 2, 8), query.detach().float()[..., :5], **BASE
    )
    assert torch.equal(scan.new_rows, expected.new_rows)
    scan.out.float().sum().backward()
    assert project.weight.grad.abs().max() > 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_repeats_the_scan_and_writes_nothing(reentrant):
    values, sub_keys = memory(dtype=torch.float32)
    before = values.clone()
    gradients = []
    for wrap in (
        lambda f, *x: f(*x),
        lambda f, *x: torch.utils.checkpoint.checkpoint(f, *x, use_reentrant=reentrant),
    ):
        torch.manual_seed(1)
        query, target = leaves(*tokens(dtype=torch.float32)[:2])
        out = wrap(lambda q, t: fwpkm_cuda.chunk_scan(values, sub_keys, q.sin(), t, **BASE).out, query, target)
        out.square().sum().backward()
        gradients.append((query.grad, target.grad))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert torch.equal(values, before)
