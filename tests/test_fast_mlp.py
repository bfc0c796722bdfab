"""FwMLP and its fast weights against a composition whose writes are torch.autograd.grad."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from fwpkm_cuda import FwMLP, FwPKM, MLPMemory
from fwpkm_cuda.fast_mlp import MLPScan, MLPWeights, mlp_loss, mlp_read, mlp_scan, mlp_write

Q, V, N = 4, 3, 5
WIDTH = 6
SIZES = dict(key_dim=Q, value_dim=V, hidden_units=N, chunk_size=4)
REFUSED = (RuntimeError, ValueError, TypeError)


def fast_weights(dtype=torch.float64):
    shapes = ((N, Q), (N,), (N, Q), (N,), (V, N), (V,))
    return MLPWeights(*(0.4 * torch.randn(shape, dtype=dtype) for shape in shapes))


def tokens(B=2, T=10, dtype=torch.float64):
    """query, target, loss_weights, mask"""
    query, target = torch.randn(B, T, Q, dtype=dtype), torch.randn(B, T, V, dtype=dtype)
    return query, target, torch.rand(B, T, dtype=dtype), torch.rand(B, T) > 0.3


def fwmlp(dtype=torch.float64, **options):
    layer = FwMLP(WIDTH, **SIZES | dict(lr=0.5) | options)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return layer.to(dtype)


def hidden_states(B=2, T=10, dtype=torch.float64):
    return torch.randn(B, T, WIDTH, dtype=dtype)


def bits(memory):
    return [t.detach().clone() for t in memory.tensors.values()]


def state(memory):
    return [*bits(memory), torch.tensor([memory.pending_tokens, memory.pending is not None])]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------------------- composition
def composed(
    weights, query, target, loss_weights=None, mask=None, *, chunk_size, lookahead=1, lookahead_target="mean",
    loss="mse", lr=0.1, weight_decay=0.0, grad_clip=None,
):  # fmt: skip
    """One pair at a time, as it is written on paper. -> out, losses, weights"""
    weights = [w if w.requires_grad else w.detach().requires_grad_() for w in weights]
    outs, losses = [query.new_zeros(len(query), 0, V)], [query.new_zeros(len(query), 0)]
    for q, t, start in zip(
        query.split(chunk_size, 1), target.split(chunk_size, 1), range(0, query.shape[1], chunk_size), strict=True
    ):
        w_up, b_up, w_gate, b_gate, w_down, b_down = weights
        gate = q @ w_gate.T + b_gate
        out = ((q @ w_up.T + b_up) * gate / (1 + (-gate).exp())) @ w_down.T + b_down
        outs.append(out)
        chunk = []
        for x in range(q.shape[1] - lookahead):
            goal = t[:, x : x + lookahead + 1].mean(1) if lookahead_target == "mean" else t[:, x + lookahead]
            error = out[:, x] - goal
            pair = (error**2).mean(-1) if loss == "mse" else error.abs().mean(-1)
            if loss_weights is not None:
                pair = pair * loss_weights[:, start + x]
            chunk.append(pair if mask is None else torch.where(mask[:, start + x], pair, torch.zeros_like(pair)))
        gradients = [torch.zeros_like(w) for w in weights]
        if chunk:
            losses.append(torch.stack(chunk, 1))
            gradients = torch.autograd.grad(losses[-1].sum() / losses[-1].numel(), weights, create_graph=True)
        if grad_clip is not None:
            gradients = [g.clamp(-grad_clip, grad_clip) for g in gradients]
        weights = [w - lr * (g + weight_decay * w) for w, g in zip(weights, gradients, strict=True)]
    return torch.cat(outs, 1), torch.cat(losses, 1), weights


OPTIONS = {
    "default": dict(),
    "mae": dict(loss="mae"),
    "last": dict(lookahead_target="last", lookahead=2),
    "mae_last": dict(loss="mae", lookahead_target="last"),
    "lookahead0": dict(lookahead=0),
    "lookahead2": dict(lookahead=2),  # the last chunk has 2 tokens: no pairs
    "lookahead3": dict(lookahead=3),
    "lookahead3_last": dict(lookahead=3, lookahead_target="last"),
    "lookahead_beyond_chunk": dict(lookahead=5, weight_decay=0.1),
    "decay": dict(weight_decay=0.2),
    "clip": dict(grad_clip=0.02),
    "clip_and_decay": dict(grad_clip=0.02, weight_decay=0.2),
    "lr": dict(lr=0.9),
    "chunk1": dict(chunk_size=1, lookahead=0),
    "one_chunk": dict(chunk_size=20),
}


@pytest.mark.parametrize("given", ["plain", "weighted", "masked", "both"])
@pytest.mark.parametrize("name", OPTIONS)
def test_scan_is_its_composition(name, given):
    options = dict(chunk_size=4, lr=0.5) | OPTIONS[name]
    query, target, loss_weights, mask = tokens()
    loss_weights = loss_weights if given in ("weighted", "both") else None
    mask = mask if given in ("masked", "both") else None
    leaves = [x.clone().requires_grad_() for x in (*fast_weights(), query, target)]
    leaves += [] if loss_weights is None else [loss_weights.requires_grad_()]
    before = [x.detach().clone() for x in leaves]
    call = MLPWeights(*leaves[:6]), *leaves[6:8], loss_weights, mask
    scan = mlp_scan(*call, **options)
    out, losses, weights = composed(*call, **options)
    for a, b in zip(scan, (out, losses, *weights), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)
    factors = [torch.randn_like(x) for x in scan]
    ours, theirs = (
        torch.autograd.grad(
            sum((x * f).sum() for x, f in zip(outputs, factors, strict=True)), leaves, materialize_grads=True,
            allow_unused=True,
        )
        for outputs in (scan, (out, losses, *weights))
    )  # fmt: skip
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, i=i: f"gradient {i}: {m}")
    assert equal(before, leaves), "nothing given is changed"


@pytest.mark.parametrize("name", ["default", "last", "mae", "clip_and_decay", "lookahead0"])
def test_gradcheck(name):
    query, target, loss_weights, _ = tokens(B=1, T=6)
    mask = torch.tensor([[True, False, True, True, True, True]])
    leaves = [x.requires_grad_() for x in (*fast_weights(), query, target, loss_weights)]
    options = dict(chunk_size=3, lr=0.5) | OPTIONS[name]
    assert gradcheck(
        lambda *x: tuple(mlp_scan(MLPWeights(*x[:6]), *x[6:], mask, **options)), leaves, atol=1e-6, fast_mode=False
    )


def test_pieces():
    weights, (query, target, loss_weights, mask) = fast_weights(), tokens(T=5)
    out = mlp_read(weights, query)
    up, gate = F.linear(query, weights.w_up, weights.b_up), F.linear(query, weights.w_gate, weights.b_gate)
    torch.testing.assert_close(out, F.linear(up * F.silu(gate), weights.w_down, weights.b_down))
    assert mlp_read(weights, query[0, 0]).shape == (V,)
    for lookahead in range(7):
        losses = mlp_loss(out, target, loss_weights, mask, lookahead=lookahead)
        assert losses.shape == (2, max(5 - lookahead, 0))
        assert (losses[~mask[:, : losses.shape[1]]] == 0).all()
    same = mlp_write(weights, out[:, :0, 0], lr=0.5)
    assert equal(same, weights)
    torch.testing.assert_close(mlp_write(weights, out[:, :0, 0], lr=0.5, weight_decay=0.2).w_up, 0.9 * weights.w_up)


@pytest.mark.parametrize("lookahead_target", ["mean", "last"])
def test_a_masked_token_may_have_anything_for_a_target_and_a_loss_weight(lookahead_target):
    """Pairs 1 and 2 are masked; with "mean" they are the only ones that see target 2, with "last" target 3."""
    query, target, loss_weights, _ = tokens(B=1, T=4)
    mask = torch.tensor([[True, False, False, True]])
    weights = fast_weights()
    nan_target, nan_weights = target.clone(), loss_weights.clone()
    nan_target[0, 2 if lookahead_target == "mean" else 3] = torch.nan
    nan_weights[0, 1:3] = torch.nan
    leaves = [x.requires_grad_() for x in (*weights, query, nan_target, nan_weights)]
    options = dict(chunk_size=4, lookahead_target=lookahead_target)
    clean = mlp_scan(weights, query, target, loss_weights, mask, **options)
    scan = mlp_scan(MLPWeights(*leaves[:6]), *leaves[6:], mask, **options)
    assert equal(scan, clean)
    for gradient in torch.autograd.grad(sum(x.sum() for x in scan), leaves):
        assert gradient.isfinite().all()


def test_an_unflushed_tail_is_read_and_not_written():
    weights, inputs = fast_weights(), tokens(T=10)
    scan = mlp_scan(weights, *inputs, chunk_size=4, flush=False)
    whole = mlp_scan(weights, *inputs, chunk_size=4)
    head = mlp_scan(weights, *(x[:, :8] for x in inputs), chunk_size=4)
    assert torch.equal(scan.out, whole.out) and scan.losses.shape == (2, 6) and equal(scan[1:], head[1:])


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_read(shape):
    weights = fast_weights()
    scan = mlp_scan(weights, *tokens(*shape), chunk_size=2)
    assert scan.out.shape == (*shape, V) and scan.losses.shape[0] == shape[0]
    assert all(torch.isfinite(w).all() for w in scan[2:]) and equal(scan[2:], weights)


def test_no_graph_under_no_grad():
    inputs = tokens()
    expected = mlp_scan(weights := fast_weights(), *inputs, chunk_size=4)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            scan = mlp_scan(weights, *inputs, chunk_size=4)
        assert not any(x.requires_grad for x in scan), mode
        for a, b in zip(scan, expected, strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tokens_with_float32_weights(dtype):
    weights, (query, target, gates, mask) = fast_weights(torch.float32), tokens(dtype=torch.float32)
    half = [x.to(dtype) for x in (query, target, gates)]
    scan = mlp_scan(weights, *half, mask, chunk_size=4)
    expected = mlp_scan(weights, *(x.float() for x in half), mask, chunk_size=4)
    assert {x.dtype for x in scan} == {torch.float32} and equal(scan, expected)


# ------------------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize("cuts", [[10], [1] * 10, [4, 4, 2], [3, 5, 2], [9, 1], [1, 9], [6, 0, 4]], ids=str)
@torch.no_grad()
def test_a_stream_cut_anywhere_is_close_to_one_call(cuts):
    options = dict(chunk_size=4, lookahead=2, lr=0.5, weight_decay=0.1)
    inputs = tokens()
    whole = mlp_scan(weights := fast_weights(), *inputs, **options)
    memory = MLPMemory(*(w.clone() for w in weights))
    outs, losses = [], []
    for part in zip(*(x.split(cuts, 1) for x in inputs), strict=True):
        reading = memory.stream(*part, **options)
        assert isinstance(reading, MLPScan)
        outs.append(reading.out), losses.append(reading.losses)
    assert memory.pending_tokens == 2
    memory.flush()
    torch.testing.assert_close(torch.cat(outs, 1), whole.out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(torch.cat(losses, 1), whole.losses, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(list(memory.weights), list(whole[2:]), rtol=1e-11, atol=1e-12)


def test_scan_waits_for_the_commit():
    inputs = tokens()
    memory = MLPMemory(*(w.clone() for w in fast_weights()))
    before = bits(memory)
    scan = memory.scan(*inputs, chunk_size=4)
    assert memory.pending is not None and equal(bits(memory), before)
    memory.rollback()
    memory.commit()
    assert equal(bits(memory), before)
    memory.scan(*inputs, chunk_size=4)
    memory.commit()
    assert memory.pending is None and equal(bits(memory), [x.detach() for x in scan[2:]])
    other = MLPMemory(*before)
    with torch.no_grad():
        other.stream(*inputs, chunk_size=4)
        other.flush()
    assert equal(bits(other), bits(memory))


def test_a_commit_before_the_backward_pass_fails_loudly():
    layer = fwmlp()
    memory = layer.new_memory(dtype=torch.float64)
    y = layer(hidden_states(), memory)
    memory.commit()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_frozen():
    layer, hidden = fwmlp(), hidden_states().requires_grad_()
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    before = bits(memory)
    y, details = layer(hidden, memory.frozen(), return_details=True)
    y.sum().backward()
    assert hidden.grad.abs().max() > 0 and memory.pending is None and details.losses.shape == (2, 0)
    with torch.no_grad():
        torch.testing.assert_close(layer.stream(hidden, memory.frozen(), flush=True), y)
        assert not layer.stream(hidden, memory, flush=True).equal(y)
        memory.copy_(MLPMemory(*before))
    assert equal(bits(memory), before)


def test_gradients_reach_initial_weights_until_the_first_write():
    leaves = [w.requires_grad_() for w in fast_weights()]
    memory = MLPMemory(*leaves)
    memory.scan(*tokens(), chunk_size=4).out.sum().backward()
    assert all(w.grad.abs().max() > 0 for w in leaves)
    before = [w.detach().clone() for w in leaves]
    memory.commit()
    assert equal(leaves, before) and not equal(bits(memory), before)
    assert not any(w.requires_grad for w in memory.weights)


def test_random_is_reproducible_and_distributed_as_documented():
    memory = MLPMemory.random(64, 32, 256, seed=1)
    again = MLPMemory.random(64, 32, 256, seed=1)
    assert equal(bits(memory), bits(again)) and memory.dtype == torch.float32
    for name, w in memory.tensors.items():
        if name.startswith("b_"):
            assert (w == 0).all()
        else:
            assert abs(w.std().item() * w.shape[1] ** 0.5 - 1) < 0.03
    first = bits(memory)
    with torch.no_grad():
        memory.stream(torch.randn(1, 8, 64), torch.randn(1, 8, 32), chunk_size=4)
    assert not equal(bits(memory), first) and equal(bits(memory.reset()), first)


def test_copies_and_files(tmp_path):
    inputs = tokens()
    memory = MLPMemory(*fast_weights())
    with torch.no_grad():
        memory.stream(*inputs, chunk_size=4)
    memory.save(tmp_path / "mlp")
    expected = None
    loaded = MLPMemory.load(tmp_path / "mlp")
    for twin in (memory.clone(), copy.deepcopy(memory), pickle.loads(pickle.dumps(memory)), loaded):
        assert twin.pending_tokens == 2 and equal(bits(twin), bits(memory))
        with torch.no_grad():
            twin.stream(*inputs, chunk_size=4)
        expected = expected or bits(twin)
        assert equal(bits(twin), expected) and not equal(bits(memory), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_inference_then_training(mode):
    layer, hidden = fwmlp(), hidden_states()
    memory, other = (layer.new_memory(seed=0, dtype=torch.float64) for _ in range(2))
    with mode():
        y = layer.stream(hidden, memory, flush=True)
    torch.testing.assert_close(y.clone(), layer(hidden, other), rtol=1e-11, atol=1e-12)
    layer(hidden, memory).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_under_autocast_the_fast_weights_stay_float32():
    """As the memory of FwPKM: the linear maps of the layer run in bfloat16, reads and writes of the memory do not."""
    memory, other = (MLPMemory.random(Q, V, N, seed=0) for _ in range(2))
    inputs = tokens(dtype=torch.float32)
    with torch.no_grad():
        expected = memory.stream(*inputs, chunk_size=4)
        with torch.autocast("cpu", torch.bfloat16):
            reading = other.stream(*inputs, chunk_size=4)
    assert reading.out.dtype == torch.float32
    assert torch.equal(reading.out, expected.out) and equal(bits(memory), bits(other))


# ------------------------------------------------------------------------------------------------------------- layer
def layer_composed(p, hidden, weights, mask, gate, **options):
    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + p[f"{name}_norm.weight"])

    def linear(name, x):
        return x @ p[f"{name}_proj.weight"].T + p[f"{name}_proj.bias"]

    value = linear("value", norm("value", hidden))
    centred = value - value.mean(-1, keepdim=True)
    value = centred / ((centred.square().sum(-1, keepdim=True) / (V - 1)).sqrt() + 1e-6)
    g = None if gate == "none" else linear("gate", norm("gate", hidden)).mean(-1).sigmoid()
    query = linear("query", norm("query", hidden))
    out, losses, weights = composed(
        weights, query, value, g if gate == "output_and_loss" else None, mask, chunk_size=4, lr=0.5, **options
    )
    mixed = out + value if g is None else g[..., None] * out + (1 - g[..., None]) * value
    return linear("out", norm("out", mixed)), losses, weights


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize("gate", ["output", "output_and_loss", "none"])
@pytest.mark.parametrize("options", [dict(), dict(lookahead=2, loss="mae", lookahead_target="mean", weight_decay=0.1)])
def test_layer_is_its_composition(options, gate, masked):
    layer = fwmlp(gate=gate, **options)
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    weights, mask = bits(memory), torch.rand(2, 10) > 0.3 if masked else None
    hidden = hidden_states().requires_grad_()
    y, details = layer(hidden, memory, mask, return_details=True)
    parameters = dict(layer.named_parameters())
    target = dict(lookahead_target="last") | options
    expected, losses, after = layer_composed(parameters, hidden, weights, mask, gate, **target)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(details.losses, losses, rtol=1e-10, atol=1e-11)
    assert (details.gates is None) == (gate == "none")
    assert details.indices is details.weights is details.addressing_loss is None
    assert not any(x.requires_grad for x in details if x is not None)
    leaves, direction = [hidden, *parameters.values()], torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((z * direction).sum(), leaves) for z in (y, expected))
    for name, a, b in zip(["hidden", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"gradient of {n}: {m}")
    memory.commit()
    torch.testing.assert_close(bits(memory), [w.detach() for w in after], rtol=1e-10, atol=1e-11)


def test_gradcheck_of_the_layer():
    layer = fwmlp(gate="output_and_loss", chunk_size=3)
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    names = [name for name, _ in layer.named_parameters()]

    def function(hidden, *parameters):
        memory.rollback()
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (hidden, memory))

    leaves = [x.detach().clone().requires_grad_() for x in (hidden_states(B=1, T=5), *layer.parameters())]
    assert gradcheck(function, leaves, atol=1e-6)


@torch.no_grad()
def test_stream_of_a_layer():
    layer, hidden = fwmlp(), hidden_states()
    a, b = (layer.new_memory(seed=0, dtype=torch.float64) for _ in range(2))
    y = layer(hidden, a)
    a.commit()
    assert torch.equal(layer.stream(hidden, b, flush=True), y) and equal(bits(a), bits(b))
    for cut in range(1, 10):
        b.reset()
        parts = [layer.stream(part, b) for part in hidden.split([cut, 10 - cut], 1)]
        b.flush()
        torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(bits(a), bits(b), rtol=1e-10, atol=1e-11)


def test_read_passes():
    layer, hidden = fwmlp(), hidden_states(T=8)
    a, b, c = (layer.new_memory(seed=0, dtype=torch.float64) for _ in range(3))
    y = layer(hidden, a, read_passes=2)
    torch.testing.assert_close(y, layer(torch.cat([hidden] * 2, 1), b)[:, 8:])
    with torch.no_grad():
        torch.testing.assert_close(layer.stream(hidden, c, flush=True, read_passes=2), y)
    assert layer(hidden[:, :0], layer.new_memory(dtype=torch.float64), read_passes=2).shape == (2, 0, WIDTH)


def test_defaults_are_the_paper_s():
    layer = FwMLP(WIDTH, device="meta")
    assert layer.sizes == dict(key_dim=512, value_dim=512, hidden_units=2304) and layer.gate == "output_and_loss"
    assert layer.options == dict(
        chunk_size=512, lookahead=1, lookahead_target="last", loss="mse", lr=0.1, weight_decay=0.0, grad_clip=None
    )
    released = FwMLP.released(WIDTH, device="meta", lr=0.2)
    assert released.gate == "output" and released.options == layer.options | dict(lookahead_target="mean", lr=0.2)
    fwpkm = FwPKM(WIDTH, device="meta")
    assert {k: fwpkm.options[k] for k in layer.options.keys() & fwpkm.options.keys() - {"lr"}} == {
        k: layer.options[k] for k in layer.options.keys() & fwpkm.options.keys() - {"lr"}
    }, "comparable"
    leaves = ("norm.weight", "proj.weight", "proj.bias")
    assert list(layer.state_dict()) == [f"{n}_{leaf}" for n in ("query", "value", "gate", "out") for leaf in leaves]


# --------------------------------------------------------------------------------------------------------- bad input
SCAN_INPUTS = {
    "query": [torch.zeros(2, 10), torch.zeros(2, 10, Q + 1), torch.zeros(2, 10, 1, Q)],
    "target": [torch.zeros(2, 10), torch.zeros(2, 10, V + 1), torch.zeros(2, 9, V), torch.zeros(1, 10, V)],
    "loss_weights": [torch.zeros(2, 9), torch.zeros(10), torch.zeros(2, 10, 1)],
    "mask": [torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 10), torch.ones(2, 10, dtype=torch.int64)],
}
SCAN_OPTIONS = {
    "chunk_size": [0, -1, 2.0, "4", True],
    "lookahead": [-1, 1.0, "1", True],
    "loss": ["huber", None],
    "lookahead_target": ["first", None],
    "lr": ["fast", float("nan")],
    "weight_decay": [float("inf")],
    "grad_clip": [-1.0, float("nan")],
}


@torch.no_grad()
@pytest.mark.parametrize("method", ["scan", "stream"])
@pytest.mark.parametrize(
    "name, value",
    [(n, v) for cases in (SCAN_INPUTS, SCAN_OPTIONS) for n, values in cases.items() for v in values],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}" if isinstance(x, torch.Tensor) else repr(x),
)
def test_refused_input_is_named_and_leaves_the_memory(name, value, method):
    arguments = dict(zip(("query", "target", "loss_weights", "mask"), tokens(), strict=True)) | dict(chunk_size=4)
    for streamed in (0, 3) if method == "stream" else (0,):
        memory = MLPMemory(*fast_weights())
        if streamed:
            memory.stream(*tokens(T=streamed), chunk_size=4)
        before = state(memory)
        with pytest.raises(REFUSED, match=rf"(?s)\b{name}\b.*expected.*got"):
            getattr(memory, method)(**arguments | {name: value})
        assert equal(state(memory), before)


def test_weights_of_other_shapes_and_dtypes_are_refused():
    weights = fast_weights()
    for name, wrong in [
        ("b_up", torch.zeros(N + 1, dtype=torch.float64)),
        ("w_gate", torch.zeros(N, Q + 1, dtype=torch.float64)),
        ("w_down", torch.zeros(V, N + 1, dtype=torch.float64)),
        ("b_down", weights.b_down.float()),
        ("b_gate", weights.b_gate.bfloat16()),
        ("w_up", torch.zeros(N, dtype=torch.float64)),
    ]:
        with pytest.raises(ValueError, match=f"{name}: expected.*got"):
            MLPMemory(*weights._replace(**{name: wrong}))
    for sizes in ((0, 3, 5), (4, -1, 5), (4, 3, 0)):
        with pytest.raises(ValueError, match=r"(key_dim|value_dim|hidden_units): expected"):
            MLPMemory.random(*sizes)


def test_a_stream_is_refused_where_gradients_are_recorded():
    layer = fwmlp()
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    before = state(memory)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        layer.stream(hidden_states(), memory)
    assert equal(state(memory), before)
