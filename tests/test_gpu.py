"""What the CUDA operators promise on a GPU. `pytest -m gpu` runs this file and, on "cuda", all tests with a `device`.

All but what only a GPU has (graphs, streams) also runs in the build of the same code for the CPU: test_simt_ops.py runs
this file there. Unlike the other tests these set no default device: whatever the package makes must be on the device of
what it is given."""

import os
from pathlib import Path

import pytest
import torch
from contract import assert_same_bits, commit, functional, in_place
from inputs import DEFAULTS, SCANS, TOLERANCE, dense, memory, randn, tokens

import fwpkm_cuda
from fwpkm_cuda import Memory, reference

ON_A_GPU = torch.cuda.is_available()
ON_THE_CPU = "simt" in Path(os.environ.get("FWPKM_LIBRARY", "")).name  # the CUDA code, in the build of tests/simt
DEVICE = torch.device("cuda", 0) if ON_A_GPU else torch.device("cpu")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_A_GPU or ON_THE_CPU), reason="needs a GPU"),
]
gpu_only = pytest.mark.skipif(not ON_A_GPU, reason="needs a GPU")

REPEATS = 100 if ON_A_GPU else 3
OPTIONS = dict(topk=4, chunk_size=8, lookahead=2)
WITHOUT_DECAY = {name: o for name, o in SCANS.items() if not {"weight_decay", "flush", "carried"} & o.keys()}


@pytest.fixture(autouse=True)
def nothing_reported():
    """No test begins or ends with an error that nobody has asked for."""
    fwpkm_cuda.check(DEVICE)
    yield
    fwpkm_cuda.check(DEVICE)


def on(device, inputs):
    return [None if x is None else x.to(device) for x in inputs]


def make(B=2, T=20, H=2, K=16, P=12, V=24, dtype=torch.float32, activation=None, device=DEVICE):
    """values, sub_keys, query, target, loss_weights, mask"""
    torch.manual_seed(3)
    activations = tokens(B, T, H, K, V, dtype)
    if activation is not None:
        activations = [x.to(activation) if x.is_floating_point() else x for x in activations]
    return on(device, [*memory(H, P, K, V, dtype), *activations])


def everything(inputs, **options):
    """All outputs of a scan, and the gradients of its inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    scan = fwpkm_cuda.chunk_scan(*leaves, inputs[5], **options, sparse_grad=False)
    loss = scan.out.float().square().sum() + scan.losses.sum() + scan.addressing_loss.sum()
    return [x.detach() for x in scan] + list(torch.autograd.grad(loss, leaves))


# ------------------------------------------------------------------------------------------------- the promises
@pytest.mark.parametrize("score", ["dot", "idw"])
def test_the_same_bits_in_every_run(score):
    """Forward and backward, in place and in a log; every block and every warp may be the first to finish."""
    size = dict(B=4, T=256, K=64, P=32, V=128) if ON_A_GPU else {}
    inputs = make(**size)
    options = dict(topk=8, chunk_size=64 if ON_A_GPU else 8, score=score, values_only=False, grad_clip=0.5)
    indices = torch.randint(0, 50, (300, 8), device="cpu").to(DEVICE)  # many reads of each slot
    dout, weights = randn(300, 40).to(DEVICE), randn(300, 8).to(DEVICE)
    results = []
    for _ in range(REPEATS):
        dvalues = torch.ops.fwpkm.value_gather_dvalues(dout, indices, weights, 50)
        results.append([*everything(inputs, **options), *in_place(*inputs, **options), dvalues])
        results = [results[0], results[-1]]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_read_depends_on_the_memory_and_its_own_query_alone(dtype, score):
    """The bits of a token are those of a call of its own, of an odd number of tokens, and of a large batch."""
    n = 1000 if ON_A_GPU else 37
    values, sub_keys, query, target, *_ = make(B=n, T=1, dtype=dtype)
    options = dict(topk=5, chunk_size=4, score=score, flush=False)  # nothing is written
    read = lambda rows: fwpkm_cuda.chunk_scan_(values, sub_keys, query[rows], target[rows], **options)[:3]
    whole = read(slice(None))
    scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 5, score)
    gathered = fwpkm_cuda.value_gather(values, indices.flatten(-2), scores.flatten(-2))
    assert torch.equal(indices, whole[1])
    for rows in (*(slice(i, i + 1) for i in range(0, n, 1 + n // 20)), slice(5, 8), slice(1, n - 3)):
        assert all(torch.equal(a, b[rows]) for a, b in zip(read(rows), whole, strict=True))
        part = fwpkm_cuda.product_key_topk(query[rows], sub_keys, 5, score)
        assert torch.equal(part[0], scores[rows]) and torch.equal(part[1], indices[rows])
        assert torch.equal(fwpkm_cuda.value_gather(values, part[1].flatten(-2), part[0].flatten(-2)), gathered[rows])


@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("sub_keys", ["apart", "close", "alike"])
def test_many_tokens_are_searched_as_few_are(sub_keys, score):
    """Many tokens pass a filter that sees 10 bits of a number; where that cannot tell sub-keys apart, it must not."""
    n, H, P, K, topk = 300 if ON_A_GPU else 70, 2, 200, 64, 8
    torch.manual_seed(4)
    keys = randn(H, 2, P, K // 2)
    if sub_keys == "close":
        keys = keys[:, :, torch.arange(P) // 6] * (1 + 1e-4 * randn(H, 2, P, K // 2))
    if sub_keys == "alike":
        keys = keys[:, :, torch.arange(P) % 5]
    query, keys = randn(n, H, K).to(DEVICE), keys.contiguous().to(DEVICE)
    many = fwpkm_cuda.product_key_topk(query, keys, topk, score)
    few = [fwpkm_cuda.product_key_topk(query[i : i + 3], keys, topk, score) for i in range(0, n, 3)]
    for a, b in zip(many, zip(*few, strict=True), strict=True):
        assert torch.equal(a, torch.cat(b))
    exact = fwpkm_cuda.product_key_topk(query.double(), keys.double(), topk, score)[0]
    torch.testing.assert_close(many[0], exact.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITHOUT_DECAY)
def test_rows_that_are_not_read_may_hold_anything(name):
    """In place as well: they keep their bits, and nothing else has them."""
    options = OPTIONS | WITHOUT_DECAY[name]
    values, *inputs = make()
    clean = in_place(values, *inputs, **options)
    unread = torch.ones(len(values), dtype=torch.bool, device=DEVICE)
    unread[clean.indices.flatten().long()] = False
    assert unread.sum() > 3
    poisoned = values.masked_fill(unread.unsqueeze(-1), torch.nan)
    for scan in (in_place, functional):
        again = scan(poisoned, *inputs, **options)
        for a, b in zip(again[:5], clean, strict=False):
            assert torch.equal(a, b)
        assert torch.equal(again.values[~unread], clean.values[~unread]) and again.values[unread].isnan().all()


@pytest.mark.parametrize("offset", [64, 1], ids=["aligned", "unaligned"])
def test_memory_beside_the_tensors_is_left_alone(offset):
    """What is written lies between guards; the unread rows of the memory are guards as well. What is read ends where
    memory of NaN begins."""

    def guarded(tensor):
        room = torch.full((tensor.numel() + 2 * offset,), torch.nan, dtype=tensor.dtype, device=DEVICE)
        inner = room[offset : offset + tensor.numel()].view(tensor.shape)
        inner.copy_(tensor)
        return inner, room

    inputs = make(V=23)
    plain = in_place(*inputs, **OPTIONS)
    pairs = [guarded(x) for x in inputs[:5]]
    held = [inner for inner, _ in pairs]
    outside = [torch.cat((room[:offset], room[-offset:])).clone() for _, room in pairs]
    before = [x.clone() for x in held]
    scan = fwpkm_cuda.chunk_scan(*held, inputs[5], **OPTIONS)
    assert_same_bits(held, before, "a differentiable scan writes none of its inputs")
    values, sub_keys = commit(*held[:2], scan, {})
    fwpkm_cuda.chunk_scan_(*held, inputs[5], **OPTIONS)
    assert_same_bits(held[:2], [values, sub_keys], "in place as with a commit")
    assert_same_bits(held[:2], plain[5:], "whatever the alignment")
    assert_same_bits(held[2:], before[2:], "activations")
    held[0].copy_(before[0]), held[1].copy_(before[1])
    fwpkm_cuda.commit_(*held[:2], scan)
    assert_same_bits(held[:2], [values, sub_keys], "commit_")
    assert_same_bits([torch.cat((room[:offset], room[-offset:])) for _, room in pairs], outside, "guards")


# ---------------------------------------------------------------------------------------------- two devices, one result
def judge(inputs, options):
    """Outputs, memory and gradients on the CPU: of its own operators, where this process has them."""
    scan = functional if ON_A_GPU else reference.chunk_scan
    inputs = on("cpu", inputs)
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    result = scan(*leaves, inputs[5], **options)
    gradients = torch.autograd.grad(result.out.square().sum() + result.losses.sum(), leaves)
    return [x.detach() for x in result], [dense(x) for x in gradients]


@pytest.mark.parametrize("name", SCANS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def test_cpu_and_gpu_agree(dtype, name):
    """Half precision: of the activations, with a float32 memory. Inputs with no two scores so close that rounding could
    change the slots."""
    half = dtype in (torch.bfloat16, torch.float16)
    options = dict(topk=3, chunk_size=4) | SCANS[name]
    inputs = make(T=11, H=2, K=8, P=6, V=5, dtype=torch.float32 if half else dtype, activation=dtype if half else None)
    widened = [x if x.dtype == torch.bool else x.float() if half else x for x in inputs]
    expected, gradients = judge(widened, options)
    leaves = [x.detach().clone().requires_grad_() for x in inputs[:5]]
    scan = fwpkm_cuda.chunk_scan(*leaves, inputs[5], **options)
    found = [*scan[:5], *commit(inputs[0], inputs[1], scan, options)]
    assert torch.equal(found[1].cpu().long(), expected[1].long()), "slots"
    limits = TOLERANCE[torch.float32 if half else dtype]
    for field, a, b in zip(reference.Scan._fields, found, expected, strict=True):
        limit = TOLERANCE[a.dtype] if a.is_floating_point() else limits
        torch.testing.assert_close(a.detach().cpu().to(b.dtype), b, **limit, msg=lambda m, f=field: f"{f}: {m}")
    loss = scan.out.to(scan.losses.dtype).square().sum() + scan.losses.sum()
    for i, (a, b) in enumerate(zip(torch.autograd.grad(loss, leaves), gradients, strict=True)):
        close = dict(rtol=TOLERANCE[dtype]["rtol"], atol=TOLERANCE[dtype]["rtol"] * b.abs().max().item())
        torch.testing.assert_close(dense(a).cpu().to(b.dtype), b, **close, msg=lambda m, i=i: f"gradient {i}: {m}")


def test_a_layer_and_its_memory_live_where_they_were_made(tmp_path):
    """The whole life of a memory, with no default device to help."""
    torch.manual_seed(0)
    sizes = dict(key_dim=8, value_dim=6, topk=3, num_sub_keys=8, chunk_size=4, lookahead=1, heads=2)
    layer = fwpkm_cuda.FwPKM(10, **sizes).to(DEVICE)
    hidden, mask = randn(2, 11, 10).to(DEVICE), (randn(2, 11) > -0.5).to(DEVICE)
    memory = layer.new_memory(seed=0)
    assert memory.device == DEVICE == layer.new_memory(device=DEVICE).device
    twin, start = memory.clone(), memory.clone(device="cpu")
    y, details = layer(hidden, memory, mask, return_details=True)
    y.square().sum().backward()
    assert all(p.grad.device == DEVICE and p.grad.isfinite().all() for p in layer.parameters())
    assert all(x.device == DEVICE for x in details)
    memory.commit()
    with torch.no_grad():
        assert torch.equal(
            layer.stream(hidden[:, :6], twin, mask[:, :6]), layer(hidden[:, :6], start.clone(DEVICE), mask[:, :6])
        )
        assert twin.pending_tokens == 2
        twin.save(tmp_path / "memory")
        loaded = Memory.load(tmp_path / "memory", device=DEVICE)
        assert loaded.device == DEVICE and loaded.pending_tokens == 2
        ends = []
        for m in (twin, loaded, twin.clone()):
            layer.stream(hidden[:, 6:], m, mask[:, 6:], flush=True)
            ends.append([m.values, m.sub_keys])
    assert_same_bits(ends[1], ends[0]), assert_same_bits(ends[2], ends[0])
    torch.testing.assert_close(ends[0], [memory.values, memory.sub_keys], **TOLERANCE[torch.float32])
    layer(hidden, memory.frozen(), mask).sum().backward()
    found = fwpkm_cuda.usage(details.indices, memory.num_slots)
    assert 0 < found.coverage <= 1 and fwpkm_cuda.gate_histogram(details.gates) is not None
    memory.copy_(start)
    assert_same_bits(memory.values.cpu(), start.values)
    memory.reset()
    fast = fwpkm_cuda.FwMLP(10, key_dim=6, value_dim=4, hidden_units=5, chunk_size=4).to(DEVICE)
    fast(hidden, fast.new_memory(), mask).sum().backward()
    slow = fwpkm_cuda.PKM(10, key_dim=8, value_dim=6, heads=2, topk=3, num_sub_keys=8, sparse_grad=True).to(DEVICE)
    slow(hidden).sum().backward()
    assert slow.values.grad.is_sparse and slow.values.grad.device == DEVICE


def test_a_compiled_scan_is_the_scan():
    def loss(values, sub_keys, query, target, gate, mask):
        scan = fwpkm_cuda.chunk_scan(values, sub_keys, query.sin(), target, gate, mask, **OPTIONS, sparse_grad=False)
        scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 3)
        gathered = fwpkm_cuda.value_gather(values, indices.flatten(-2), scores.flatten(-2).softmax(-1))
        return (scan.out * gathered).sum() + scan.losses.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if ON_A_GPU else "aot_eager")
    *inputs, mask = make()
    results = []
    for function in (loss, compiled):
        leaves = [x.clone().requires_grad_() for x in inputs]
        value = function(*leaves, mask)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager, **TOLERANCE[torch.float32])


# ---------------------------------------------------------------------------------------------- values that are wrong
def reported():
    """What `check` says, and that it says it once."""
    with pytest.raises(RuntimeError) as error:
        fwpkm_cuda.check(DEVICE)
    fwpkm_cuda.check(DEVICE)
    return str(error.value)


@pytest.mark.parametrize("index", [9, -1, 2**31 - 1])
def test_an_index_out_of_range_gives_nan_and_is_reported(index):
    values = randn(9, 4).to(DEVICE)
    indices = torch.tensor([[0, 1], [2, index], [3, 4]], dtype=torch.int32, device=DEVICE)
    weights = torch.ones(3, 2, device=DEVICE)
    out = fwpkm_cuda.value_gather(values, indices, weights)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], values[indices[[0, 2]].long()].sum(1))
    assert "indices out of range" in (text := reported()) and "NaN or infinite" not in text and str(DEVICE) in text
    torch.ops.fwpkm.value_gather_dvalues(out.new_ones(3, 4), indices, weights, 9)
    assert "indices out of range" in reported()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_query_that_is_not_finite_harms_its_own_token_alone(wrong):
    """Its token reads NaN and writes nothing; nothing that is not finite gets into the memory."""
    values, sub_keys, query, target, gate, _ = make(T=8)
    query[1, 3, 0, 2] = wrong  # of one head and half
    whole = query.clone()
    whole[1, 3] = torch.nan
    fwpkm_cuda.product_key_topk(query, sub_keys, 3)
    assert "NaN or infinite" in reported()
    for scan in (in_place, functional):
        result = scan(values, sub_keys, query, target, gate, **OPTIONS)
        assert "NaN or infinite" in reported()
        nan = result.out.isnan()
        assert nan[1, 3].all() and nan.sum() == nan[1, 3].numel()
        assert result.values.isfinite().all() and result.sub_keys.isfinite().all()
        assert not torch.equal(result.values, values)
        assert_same_bits(result[3:], scan(values, sub_keys, whole, target, gate, **OPTIONS)[3:], "it is left out")
        assert "NaN or infinite" in reported()


def test_a_target_that_is_not_finite_reaches_no_memory():
    values, sub_keys, query, target, gate, _ = make(T=8)
    target[0, 5, 1] = torch.nan
    for scan in (in_place, functional):
        result = scan(values, sub_keys, query, target, gate, **OPTIONS)
        assert "NaN or infinite" in reported()
        assert result.values.isfinite().all() and result.sub_keys.isfinite().all() and result.out.isfinite().all()


@pytest.mark.parametrize("options", [dict(), dict(score="idw", values_only=False, weight_decay=0.1, boundary="carry")])
def test_gradients_pass_by_tokens_that_were_left_out(options):
    """They are the derivatives of what the scan has done: nothing through a query or a target that is not finite."""
    *inputs, mask = make(T=14, P=5, V=5, dtype=torch.float64)
    inputs[2][0, 5, 1, 2], inputs[2][1, 9, 0, 0], inputs[3][1, 4, 2] = torch.nan, torch.inf, torch.nan
    options = dict(topk=3, chunk_size=4, sparse_grad=False) | options

    def loss(tensors):
        scan = fwpkm_cuda.chunk_scan(*tensors, mask, **options)
        outputs = (scan.out, scan.weights, scan.losses, scan.addressing_loss, scan.new_sub_keys)
        return sum((i + 2) * torch.where(x.isfinite(), x, 0).sin().sum() for i, x in enumerate(outputs)), scan.indices

    leaves = [x.clone().requires_grad_() for x in inputs]
    value, slots = loss(leaves)
    gradients = torch.autograd.grad(value, leaves)
    assert "NaN or infinite" in reported()
    assert not gradients[2][0, 5].any() and not gradients[2][1, 9].any() and not gradients[3][1, 4].any()
    step = 1e-6
    for i, gradient in enumerate(gradients):
        assert gradient.isfinite().all() and gradient.any()
        direction = randn(*gradient.shape, dtype=torch.float64).to(DEVICE)
        with torch.no_grad():
            ends = [loss([*inputs[:i], inputs[i] + side * direction, *inputs[i + 1 :]]) for side in (step, -step)]
        assert all(torch.equal(end[1], slots) for end in ends)
        slope = (ends[0][0] - ends[1][0]) / (2 * step)
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-6)
    assert "NaN or infinite" in reported()


@pytest.mark.parametrize(
    "name, wrong",
    [
        ("list_indices", 12),
        ("list_indices", -7),
        ("places", 9),
        ("places", -1),
        ("read_from", 2**31 - 1),
        ("read_from", -2),
    ],
)
def test_the_backward_pass_does_not_follow_saved_numbers_out_of_range(name, wrong):
    inputs = make()
    options = tuple((DEFAULTS | dict(values_only=False)).values())
    saved = list(torch.ops.fwpkm.chunk_scan(*inputs, *options))
    token = 7  # of the saved lists; a chunk has 4 tokens of each of 2 rows: token 3 of row 1
    saved[{"list_indices": 8, "places": 10, "read_from": 11}[name]][token, 1].view(-1)[-1] = wrong
    dquery, dtarget, dgate, dsub_keys, slots, rows = torch.ops.fwpkm.chunk_scan_backward(
        torch.ones_like(saved[0]), *[None] * 4, torch.ones_like(saved[7]), *inputs, saved[5], *saved[7:], *options, True
    )
    assert "indices out of range" in reported()
    assert all(x.isfinite().all() for x in (dquery, dtarget, dgate, dsub_keys, rows))
    assert not dquery[1, 3].any() and dquery[1, 2].any()
    assert ((slots >= 0) & (slots < len(inputs[0]))).all()


def test_a_write_that_would_overflow_is_not_written():
    values, sub_keys = torch.zeros(4, 2, device=DEVICE), torch.zeros(1, 2, 2, 1, device=DEVICE)
    query, target = torch.zeros(1, 2, 1, 2, device=DEVICE), torch.full((1, 2, 2), 3e38, device=DEVICE)
    for scan in (in_place, functional):
        result = scan(values, sub_keys, query, target, topk=1, chunk_size=2, lr=1e30)
        text = reported()
        assert "overflowed" in text or "NaN or infinite" in text
        assert torch.equal(result.values, values)


# ------------------------------------------------------------------------------------------------- what only a GPU has
def captured(function):
    """A CUDA graph of function(), and what it returns at every replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # modules are loaded, and the allocator has its memory
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


# Rows of the batch: chunks so small that a scan takes one stream, and such that it takes two.
SMALL_AND_LARGE = pytest.mark.parametrize("B", [2, 32])


@gpu_only
@SMALL_AND_LARGE
@pytest.mark.parametrize("score", ["dot", "idw"])
def test_a_scan_in_place_can_be_captured(score, B):
    """Decoding in a CUDA graph: the replay reads the tokens, and writes the memory, that are there at that moment."""
    values, sub_keys, *activations = make(B=B, T=16)
    first, other = make(B=B, T=32), [x.clone() for x in (values, sub_keys)]
    graph, reading = captured(lambda: fwpkm_cuda.chunk_scan_(values, sub_keys, *activations, **OPTIONS, score=score))
    for held in ((values, sub_keys), other):
        for x, start in zip(held, first, strict=False):
            x.copy_(start)
    for half in (slice(0, 16), slice(16, 32)):
        for x, new in zip(activations, first[2:], strict=True):
            x.copy_(new[:, half])
        graph.replay()
        expected = fwpkm_cuda.chunk_scan_(*other, *(x.clone() for x in activations), **OPTIONS, score=score)
        assert_same_bits(list(reading), list(expected)), assert_same_bits([values, sub_keys], other)


@gpu_only
@SMALL_AND_LARGE
@pytest.mark.parametrize("score", ["dot", "idw"])
def test_a_training_step_can_be_captured(score, B):
    values, sub_keys, query, target, gate, mask = make(B=B)
    leaves = [x.requires_grad_() for x in (query, target, gate)]
    options = dict(OPTIONS, score=score, values_only=False)

    def step():
        scan = fwpkm_cuda.chunk_scan(values, sub_keys, *leaves, mask, **options)
        gradients = torch.autograd.grad(scan.out.square().sum() + scan.losses.sum(), leaves)
        fwpkm_cuda.commit_(values, sub_keys, fwpkm_cuda.Scan(*(x.detach() for x in scan)))
        return [scan.out.detach(), *gradients]

    graph, result = captured(step)
    start = [randn(*x.shape).to(DEVICE) for x in (values, sub_keys)]
    ends = []
    for run in (graph.replay, lambda: [a.copy_(b) for a, b in zip(result, step(), strict=True)]):
        values.copy_(start[0]), sub_keys.copy_(start[1])
        run()
        run()  # learns once more, from what the first has written
        ends.append([x.clone() for x in (*result, values, sub_keys)])
    assert_same_bits(*ends)


@gpu_only
@SMALL_AND_LARGE
def test_work_goes_to_the_current_stream(B):
    """The inputs arrive late in a stream of their own; work that does not wait for it would read what was there
    before."""
    inputs = make(B=B, T=40)
    expected = [*everything(inputs, **OPTIONS), *in_place(*inputs, **OPTIONS)]
    late = [torch.zeros_like(x) for x in inputs]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for x, source in zip(late, inputs, strict=True):
            x.copy_(source)
        found = [*everything(late, **OPTIONS), *in_place(*late, **OPTIONS)]
    stream.synchronize()
    assert_same_bits(found, expected)


@gpu_only
def test_check_waits_for_every_stream():
    stream = torch.cuda.Stream()
    values, weights = torch.zeros(4, 2, device=DEVICE), torch.ones(1, 1, device=DEVICE)
    index = torch.full((1, 1), 4, device=DEVICE)
    fwpkm_cuda.value_gather(values, index * 0, weights)
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        fwpkm_cuda.value_gather(values, index, weights)
    assert "indices out of range" in reported()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_device_of_the_tensors_need_not_be_the_current_one():
    inputs = make()
    other = on("cuda:1", inputs)
    assert torch.cuda.current_device() == 0
    expected, found = (everything(x, **OPTIONS) for x in (inputs, other))
    assert all(x.device == other[0].device for x in found)
    assert_same_bits(on(DEVICE, found), expected)
    fwpkm_cuda.value_gather(other[0], torch.full((1, 1), 10**6, device="cuda:1"), torch.ones(1, 1, device="cuda:1"))
    fwpkm_cuda.check()
    with pytest.raises(RuntimeError, match="cuda:1"):
        fwpkm_cuda.check("cuda:1")


@gpu_only
def test_tensors_of_two_devices_are_refused():
    values, sub_keys, query, target, *_ = make()
    with pytest.raises(RuntimeError, match="device"):
        fwpkm_cuda.chunk_scan(values, sub_keys, query.cpu(), target, **OPTIONS)
    with pytest.raises(RuntimeError, match="device"):
        fwpkm_cuda.product_key_topk(query, sub_keys.cpu(), 3)
    with pytest.raises(RuntimeError, match="device"):
        fwpkm_cuda.value_gather(values, torch.zeros(1, 1, dtype=torch.int32), torch.ones(1, 1, device=DEVICE))
