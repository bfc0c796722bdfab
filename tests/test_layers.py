"""FwPKM and PKM against plain compositions of torch functions and reference.py; what they promise, what they refuse.

(The same layer around an MLP is in test_fast_mlp.py.)"""

import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from inputs import SCANS, dense, rand, randn
from torch.autograd import gradcheck

import fwpkm_cuda
from fwpkm_cuda import PKM, FwMLP, FwPKM, Memory, reference
from fwpkm_cuda.layers import RMSNorm, normalize

pytestmark = pytest.mark.usefixtures("device")

SIZES = dict(key_dim=4, value_dim=3, topk=2, num_sub_keys=4, chunk_size=3)
MLP_SIZES = dict(key_dim=4, value_dim=3, hidden_units=5, chunk_size=3)
PKM_SIZES = dict(key_dim=4, value_dim=3, heads=2, topk=2, num_sub_keys=4)
LAYER_SCANS = {name: options for name, options in SCANS.items() if not {"carried", "flush"} & options.keys()}
WIDTH = 6
REFUSED = (RuntimeError, ValueError, TypeError)


def randomized(module):
    """Every parameter moved: a norm's weight starts at 0, where a missing factor does not show."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p), alpha=0.3)
    return module


def fwpkm(dtype=torch.float64, **options):
    return randomized(FwPKM(WIDTH, **SIZES | options, device="cpu")).to(torch.get_default_device(), dtype)


def hidden_states(B=2, T=8, dtype=torch.float64):
    return randn(B, T, WIDTH, dtype=dtype)


def bits(memory):
    return [t.detach().clone() for t in memory.tensors.values()]


def state(memory):
    """All that a refused call must leave as it was."""
    return [*bits(memory), torch.tensor([memory.pending_tokens, memory.pending is not None])]


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b))


# ------------------------------------------------------------------------------------------- FwPKM as a composition
def rms(p, name, x, eps=1e-6):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (1 + p[f"{name}.weight"])


def linear(p, name, x):
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def zscore_or_l2(x, kind):
    if kind == "zscore":
        centred = x - x.mean(-1, keepdim=True)
        return centred / ((centred.square().sum(-1, keepdim=True) / (x.shape[-1] - 1)).sqrt() + 1e-6)
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() if kind == "l2" else x


def composed(
    p, hidden, values, sub_keys, mask=None, *, gate="output_and_loss", target_norm="zscore", query_norm=None,
    norm_eps=1e-6, **options,
):  # fmt: skip
    """-> y and the `reference.Scan`.  p: {name: parameter}"""
    query = linear(p, "query_proj", rms(p, "query_norm", hidden, norm_eps)).unflatten(-1, (len(sub_keys), -1))
    halves = query.chunk(2, -1)
    query = torch.cat([zscore_or_l2(half, query_norm) for half in halves], -1)
    value = zscore_or_l2(linear(p, "value_proj", rms(p, "value_norm", hidden, norm_eps)), target_norm)
    g = None
    if gate != "none":
        g = linear(p, "gate_proj", rms(p, "gate_norm", hidden, norm_eps)).mean(-1).sigmoid()
    weights = g if gate == "output_and_loss" else None
    scan = reference.chunk_scan(values, sub_keys, query, value, weights, mask, **options)
    mixed = scan.out + value if g is None else g[..., None] * scan.out + (1 - g[..., None]) * value
    return linear(p, "out_proj", rms(p, "out_norm", mixed, norm_eps)), scan


def assert_layer_is_composition(layer_options, scan_options, mask=None, T=8):
    """Output, everything in the details, the memory after the commit, and all gradients."""
    layer = fwpkm(**layer_options, **scan_options)
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    values, sub_keys = bits(memory)
    hidden = hidden_states(T=T).requires_grad_()
    y, details = layer(hidden, memory, mask, return_details=True)
    parameters = dict(layer.named_parameters())
    options = {k: SIZES[k] for k in ("topk", "chunk_size")} | scan_options
    other = {k: v for k, v in layer_options.items() if k in ("gate", "target_norm", "query_norm")}
    other |= dict(norm_eps=layer_options.get("norm_eps", 1e-6))
    expected, scan = composed(parameters, hidden, values, sub_keys, mask, **other, **options)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    assert torch.equal(details.indices.long(), scan.indices)
    for name in ("weights", "losses", "addressing_loss"):
        torch.testing.assert_close(getattr(details, name), getattr(scan, name), rtol=1e-9, atol=1e-10)
    leaves = [hidden, *parameters.values()]
    direction = torch.randn_like(y)
    loss = (y * direction).sum(), (expected * direction).sum()
    ours, theirs = (torch.autograd.grad(x, leaves, materialize_grads=True, allow_unused=True) for x in loss)
    for name, a, b in zip(["hidden", *parameters], ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"gradient of {n}: {m}")
    memory.commit()
    torch.testing.assert_close(memory.values, scan.values.detach(), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(memory.sub_keys, scan.sub_keys.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("gate", ["output_and_loss", "output", "none"])
@pytest.mark.parametrize("target_norm", ["zscore", "l2", None])
@pytest.mark.parametrize("query_norm", ["zscore", "l2", None])
def test_fwpkm_is_its_composition(heads, gate, target_norm, query_norm):
    sizes = dict(heads=heads, key_dim=8)  # halves of 4
    assert_layer_is_composition(sizes | dict(gate=gate, target_norm=target_norm, query_norm=query_norm), {})


@pytest.mark.parametrize("name", LAYER_SCANS)
def test_fwpkm_hands_every_option_to_the_scan(name):
    assert_layer_is_composition(dict(heads=2), LAYER_SCANS[name], rand(2, 8) > 0.3)


def test_fwpkm_hands_eps_to_the_scan_and_norm_eps_to_the_norms():
    assert_layer_is_composition(dict(norm_eps=0.5), dict(score="idw", eps=0.5))


@pytest.mark.parametrize("T", [0, 1, 3, 4])
def test_fwpkm_of_few_tokens_is_its_composition(T):
    assert_layer_is_composition({}, {}, T=T)


def test_the_released_layer_is_its_composition():
    mask = rand(2, 8) > 0.3
    assert_layer_is_composition({}, dict(score="idw", write_rule="release"), mask)


def gradcheck_layer(layer, *inputs, call):
    """gradcheck of call(layer, *inputs) with respect to inputs and the layer's parameters."""
    names = [name for name, _ in layer.named_parameters()]
    leaves = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def function(*x):
        parameters = dict(zip(names, x[len(inputs) :], strict=True))
        return call(lambda *a: torch.func.functional_call(layer, parameters, a), *x[: len(inputs)])

    return gradcheck(function, (*(x.clone().requires_grad_() for x in inputs), *leaves), atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(heads=2, query_norm="l2", target_norm="l2", gate="output", score="idw", values_only=False),
        dict(gate="none", target_norm=None, boundary="carry", activation="silu"),
    ],
    ids=["default", "l2", "carry"],
)
def test_gradcheck_of_the_layer(options):
    layer = fwpkm(**options)
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    before = bits(memory)

    def call(layer, hidden):
        memory.rollback()
        return layer(hidden, memory)

    assert gradcheck_layer(layer, hidden_states(B=1, T=7), call=call)
    assert equal(bits(memory), before)


# ------------------------------------------------------------------------------------------- learned initial memory
@pytest.mark.parametrize("sparse_grad", [True, False], ids=["sparse", "dense"])
def test_gradients_of_a_learned_initial_memory(sparse_grad):
    layer = fwpkm(learned_initial_memory=True, sparse_grad=sparse_grad)
    hidden = hidden_states()
    y = layer(hidden, layer.new_memory())
    parameters = dict(layer.named_parameters())
    options = {k: SIZES[k] for k in ("topk", "chunk_size")}
    expected, _ = composed(parameters, hidden, layer.initial_values, layer.initial_sub_keys, **options)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-10)
    direction = torch.randn_like(y)
    y.backward(direction)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters.values())
    assert layer.initial_values.grad.is_sparse == sparse_grad
    for (name, p), b in zip(parameters.items(), theirs, strict=True):
        torch.testing.assert_close(dense(p.grad), b, rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_gradcheck_of_a_learned_initial_memory():
    layer = fwpkm(learned_initial_memory=True, sparse_grad=False)
    names = ("hidden", "values", "sub_keys")
    inputs = [hidden_states(B=1, T=5), layer.initial_values.detach(), layer.initial_sub_keys.detach()]

    def function(hidden, values, sub_keys):
        return layer(hidden, Memory(values, sub_keys))

    assert len(names) == len(inputs)
    assert gradcheck(function, [x.clone().requires_grad_() for x in inputs], atol=1e-6)


def test_a_learned_memory_is_the_parameters_until_its_first_write():
    layer = fwpkm(learned_initial_memory=True)
    initial = [layer.initial_values.clone(), layer.initial_sub_keys.clone()]
    memory = layer.new_memory()
    assert memory.values is layer.initial_values and memory.sub_keys is layer.initial_sub_keys
    layer(hidden_states(), memory)
    assert memory.values is layer.initial_values
    memory.commit()
    assert not memory.values.requires_grad and not equal(bits(memory), initial)
    assert torch.equal(layer.initial_values, initial[0]) and torch.equal(layer.initial_sub_keys, initial[1])
    assert memory.reset().values is layer.initial_values


@pytest.mark.parametrize("method", ["forward", "stream"])
def test_a_refused_call_leaves_a_learned_memory_with_its_parameters(method):
    layer = fwpkm(learned_initial_memory=True)
    memory = layer.new_memory()
    with pytest.raises(REFUSED):
        if method == "stream":
            layer.stream(hidden_states(), memory)  # forgot torch.no_grad()
        else:
            layer(hidden_states(), memory, chunk_size=0)
    assert memory.values is layer.initial_values
    layer(hidden_states(), memory).sum().backward()
    assert layer.initial_values.grad is not None


@pytest.mark.cpu
@pytest.mark.parametrize("name, value", [("seed", 1), ("device", "cpu"), ("dtype", torch.float64)])
def test_a_learned_memory_takes_nothing(name, value):
    with pytest.raises(ValueError, match=name):
        fwpkm(learned_initial_memory=True).new_memory(**{name: value})


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float16])
def test_learned_tables_stay_float32_in_a_low_precision_layer(to):
    layer = FwPKM(WIDTH, **SIZES, learned_initial_memory=True)
    layer(hidden_states(dtype=torch.float32), layer.new_memory()).sum().backward()
    for convert in (lambda m: m.to(to), lambda m: torch.nn.Sequential(m).to(to)[0]):
        layer = convert(layer)
        assert layer.initial_values.dtype == layer.initial_sub_keys.dtype == torch.float32
        assert layer.initial_values.grad.dtype == torch.float32
        assert layer.query_proj.weight.dtype == layer.out_norm.weight.dtype == to
    assert layer.double().initial_values.dtype == torch.float64


# ------------------------------------------------------------------------------------------------------ configurations
DEFAULTS = dict(
    topk=8, chunk_size=512, lookahead=1, score="dot", eps=1e-3, activation="softmax", temperature=1.0, lr=1.0,
    weight_decay=0.0, grad_clip=None, write_rule="paper", values_only=True, addressing_weight=1.0, boundary="drop",
)  # fmt: skip


@pytest.mark.cpu
@pytest.mark.parametrize("released", [False, True], ids=["paper", "released"])
def test_defaults_are_exactly_the_documented_ones(released):
    layer = FwPKM.released(WIDTH, device="meta") if released else FwPKM(WIDTH, device="meta")
    scan = dict(score="idw", write_rule="release") if released else {}
    assert layer.options == DEFAULTS | scan
    assert layer.sizes == dict(num_sub_keys=512, key_dim=512, value_dim=512, heads=1)
    assert (layer.gate, layer.target_norm, layer.query_norm_kind) == ("output_and_loss", "zscore", None)
    assert layer.initial_values is None and layer.initial_sub_keys is None
    assert {m.eps for m in layer.modules() if isinstance(m, RMSNorm)} == {1e-6}
    assert layer.query_proj.weight.shape == layer.value_proj.weight.shape == (512, WIDTH)
    assert layer.gate_proj.weight.shape == (8, WIDTH) and layer.out_proj.weight.shape == (WIDTH, 512)


@pytest.mark.cpu
def test_released_takes_changes():
    changes = dict(SIZES, heads=2, score="dot", lookahead=2, gate="none", query_norm="l2", learned_initial_memory=True)
    layer = FwPKM.released(WIDTH, **changes)
    assert layer.options == DEFAULTS | dict(topk=2, chunk_size=3, score="dot", write_rule="release", lookahead=2)
    assert layer.sizes == dict(num_sub_keys=4, key_dim=4, value_dim=3, heads=2)
    assert layer.gate == "none" and layer.query_norm_kind == "l2" and layer.initial_values.shape == (16, 3)
    with pytest.raises(TypeError, match="chunks"):
        FwPKM.released(WIDTH, chunks=3)


@pytest.mark.cpu
def test_repr_names_every_option():
    text = repr(FwPKM(WIDTH, **SIZES, heads=2, temperature=0.25, gate="output"))
    for part in ("num_sub_keys=4", "key_dim=4", "value_dim=3", "heads=2", "temperature=0.25", "gate='output'"):
        assert part in text


PROJECTIONS = [
    f"{name}_{leaf}"
    for name in ("query", "value", "gate", "out")
    for leaf in ("norm.weight", "proj.weight", "proj.bias")
]


@pytest.mark.cpu
def test_state_dict_holds_the_documented_parameters_and_no_memory():
    layer = FwPKM(WIDTH, **SIZES)
    layer(hidden_states(dtype=torch.float32), layer.new_memory())
    assert sorted(layer.state_dict()) == sorted([*PROJECTIONS, "sub_keys"])
    without = [name for name in PROJECTIONS if not name.startswith("gate")]
    assert list(FwPKM(WIDTH, **SIZES, gate="none", keep_sub_keys=False).state_dict()) == without
    learned = FwPKM(WIDTH, **SIZES, learned_initial_memory=True)
    assert set(learned.state_dict()) == {*PROJECTIONS, "initial_values", "initial_sub_keys"}
    other = FwPKM(WIDTH, **SIZES, learned_initial_memory=True)
    other.load_state_dict(learned.state_dict())
    assert torch.equal(other.initial_values, learned.initial_values)
    assert [n for n, _ in layer.named_buffers()] == ["sub_keys"] and not [*learned.named_buffers()]


@pytest.mark.parametrize(
    "make", [lambda: fwpkm(), lambda: fwpkm(learned_initial_memory=True)], ids=["plain", "learned"]
)
def test_copies_of_a_layer_compute_the_same(make):
    layer, hidden = make(), hidden_states()
    memory = Memory.random(4, 4, 3, seed=0, dtype=torch.float64)
    expected = layer(hidden, memory.frozen())
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    for twin in (copy.deepcopy(layer), torch.load(file, weights_only=False)):
        assert torch.equal(twin(hidden, memory.frozen()), expected)
        assert all(p is not q for p, q in zip(twin.parameters(), layer.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------- a new memory
@pytest.mark.parametrize(
    "make", [lambda **o: FwPKM(WIDTH, **SIZES, heads=2, **o), lambda **o: FwMLP(WIDTH, **MLP_SIZES, **o)]
)
class TestNewMemory:
    def test_seeds(self, make):
        layer = make()
        a, b, c = (bits(layer.new_memory(seed=s)) for s in (1, 1, 2))
        assert equal(a, b) and not equal(a, c)
        memories = [layer.new_memory() for _ in range(2)]
        assert not equal(bits(memories[0]), bits(memories[1])) and memories[0].seed != memories[1].seed
        torch.manual_seed(7)
        a = bits(layer.new_memory())
        torch.manual_seed(7)
        assert equal(bits(layer.new_memory()), a)

    def test_a_seed_leaves_torch_s_generator_alone(self, make):
        layer = make()
        before = torch.get_rng_state()
        layer.new_memory(seed=3)
        assert torch.equal(torch.get_rng_state(), before)

    def test_dtypes(self, make):
        layer = make()
        assert layer.new_memory().dtype == layer.bfloat16().new_memory().dtype == torch.float32
        assert layer.new_memory(dtype=torch.float64).dtype == torch.float64
        for dtype in (torch.bfloat16, torch.float16, torch.int32):
            with pytest.raises(ValueError, match="expected .*float32 or float64, got .*" + str(dtype)):
                layer.new_memory(dtype=dtype)

    def test_of_a_float64_layer_fits_it(self, make):
        layer = make(dtype=torch.float64)
        assert layer(hidden_states(), layer.new_memory()).dtype == torch.float64

    def test_belongs_to_no_module(self, make):
        layer = make()
        memory = layer.new_memory()
        assert not any(t.requires_grad for t in memory.tensors.values())
        before = bits(memory)
        layer.double()
        assert equal(bits(memory), before)

    def test_can_be_made_under_a_default_device(self, make):
        with torch.device("meta"):
            layer = make()
            memory = layer.new_memory(seed=0, device="cpu")
            assert memory.device.type == "cpu" and all(t.isfinite().all() for t in memory.tensors.values())
            layer.new_memory(device="cpu")


@pytest.mark.cpu
def test_shapes_and_distribution_of_a_new_memory():
    memory = FwPKM(WIDTH, key_dim=64, value_dim=16, heads=2, num_sub_keys=32, topk=2).new_memory(seed=0)
    assert memory.values.shape == (1024, 16) and memory.sub_keys.shape == (2, 2, 32, 32)
    assert abs(memory.values.std().item() - 16**-0.5) < 0.01 and abs(memory.values.mean().item()) < 0.01
    assert memory.sub_keys.abs().max() <= 64**-0.5 and memory.sub_keys.abs().mean() > 0.45 * 64**-0.5


@pytest.mark.cpu
@pytest.mark.parametrize("options", [dict(), dict(learned_initial_memory=True)], ids=["plain", "learned"])
def test_a_layer_can_be_made_without_storage(options):
    """As large models are: on the meta device, then to_empty and load_state_dict."""
    with torch.device("meta"):
        layer = FwPKM(WIDTH, **SIZES, **options)
    assert all(p.is_meta for p in layer.parameters())
    full = FwPKM(WIDTH, **SIZES, **options)
    layer.to_empty(device="cpu").load_state_dict(full.state_dict())
    memory = Memory.random(4, 4, 3, seed=0)
    hidden = hidden_states(dtype=torch.float32)
    assert torch.equal(layer(hidden, memory.frozen()), full(hidden, memory.frozen()))


# ------------------------------------------------------------------------------------------------- options of a call
@pytest.mark.parametrize("boundary", ["drop", "carry"])
def test_chunk_size_of_a_call(boundary):
    layer, other = fwpkm(boundary=boundary), fwpkm(boundary=boundary, chunk_size=5)
    other.load_state_dict(layer.state_dict())
    hidden, new = hidden_states(), lambda: layer.new_memory(seed=0, dtype=torch.float64)
    a, b, c, d = new(), new(), new(), new()
    y = layer(hidden, a, chunk_size=5)
    assert torch.equal(y, other(hidden, b)) and not torch.equal(y, layer(hidden, c))
    a.commit(), b.commit()
    assert equal(bits(a), bits(b))
    assert layer.options["chunk_size"] == 3
    with torch.no_grad():
        streamed = layer.stream(hidden, d, chunk_size=5, flush=True)
    assert torch.equal(streamed, y) and equal(bits(d), bits(a))


def test_details():
    layer, hidden = fwpkm(torch.float32, heads=2), hidden_states(T=8, dtype=torch.float32)
    memory = layer.new_memory(seed=0)
    plain = layer(hidden, memory)
    memory.rollback()
    y, details = layer(hidden, memory, return_details=True)
    assert torch.equal(y, plain) and y.requires_grad
    assert details._fields == ("gates", "losses", "addressing_loss", "indices", "weights")
    shapes = [(2, 8), (2, 5), (3,), (2, 8, 2, 2), (2, 8, 2, 2)]  # 8 = 3 + 3 + 2 tokens, 2 + 2 + 1 pairs
    assert [tuple(x.shape) for x in details] == shapes
    assert not any(x.requires_grad for x in details) and details.indices.dtype == torch.int32
    assert (details.gates > 0).all() and (details.gates < 1).all()
    torch.testing.assert_close(details.weights.flatten(-2).sum(-1), torch.ones(2, 8))
    memory.rollback()
    with torch.no_grad():
        y, streamed = layer.stream(hidden, memory, flush=True, return_details=True)
        assert torch.equal(y, plain) and all(torch.equal(a, b) for a, b in zip(streamed, details, strict=True))
        _, partial = layer.stream(hidden, memory, return_details=True)
        assert partial.losses.shape == (2, 4) and partial.addressing_loss.shape == (2,)
        assert partial.indices.shape == (2, 8, 2, 2)
        _, frozen = layer.stream(hidden, memory.frozen(), return_details=True)
        assert frozen.losses.shape == (2, 0) and frozen.addressing_loss.shape == (0,)
    assert fwpkm(gate="none")(hidden.double(), Memory.random(4, 4, 3, dtype=torch.float64), return_details=True)[
        1
    ].gates is None  # fmt: skip


def test_read_passes_are_the_sequence_again_and_again():
    layer, hidden = fwpkm(), hidden_states(T=6).requires_grad_()
    new = lambda: layer.new_memory(seed=0, dtype=torch.float64)
    a, b, c = new(), new(), new()
    y, details = layer(hidden, a, read_passes=3, return_details=True)
    twice = layer(torch.cat([hidden] * 3, 1), b)[:, -6:]
    torch.testing.assert_close(y, twice, rtol=1e-10, atol=1e-12)
    direction = torch.randn_like(y)
    for x, z in zip(*(torch.autograd.grad(o, hidden, direction) for o in (y, twice)), strict=True):
        torch.testing.assert_close(x, z, rtol=1e-8, atol=1e-10)
    assert details.indices.shape[1] == details.weights.shape[1] == details.gates.shape[1] == 6
    assert details.losses.shape == (2, 3 * 4) and details.addressing_loss.shape == (3 * 2,)
    a.commit(), b.commit()
    torch.testing.assert_close(bits(a), bits(b), rtol=1e-10, atol=1e-12)
    with torch.no_grad():
        streamed, same = layer.stream(hidden, c, flush=True, read_passes=3, return_details=True)
    assert torch.equal(streamed, y) and equal(bits(c), bits(a))
    assert equal(same, details), "losses are of all chunks that the call wrote"


@torch.no_grad()
def test_read_passes_of_a_stream_take_any_number_of_tokens():
    layer, hidden = fwpkm(), hidden_states(T=7)
    a, b = (layer.new_memory(seed=0, dtype=torch.float64) for _ in range(2))
    y = layer.stream(hidden, a, flush=True, read_passes=2)
    layer.stream(hidden, b, flush=True)
    assert torch.equal(y, layer.stream(hidden, b, flush=True)) and equal(bits(a), bits(b))


@torch.no_grad()
def test_read_passes_that_cannot_be():
    layer, hidden = fwpkm(), hidden_states(T=6)
    memory = layer.new_memory(seed=0, dtype=torch.float64)

    def refused(call, match):
        before = state(memory)
        with pytest.raises(REFUSED, match=match):
            call()
        assert equal(state(memory), before)

    for n in (0, -1, 2.0, "2", None):
        refused(lambda n=n: layer(hidden, memory, read_passes=n), f"read_passes.*expected.*{n}")
        refused(lambda n=n: layer.stream(hidden, memory, flush=True, read_passes=n), f"read_passes.*expected.*{n}")
    refused(lambda: layer(hidden[:, :5], memory, read_passes=2), "read_passes.*multiple of chunk_size 3.*got 5")
    refused(lambda: layer(hidden, memory, read_passes=2, chunk_size=4), "read_passes.*multiple of chunk_size 4")
    refused(lambda: layer.stream(hidden, memory, read_passes=2), "read_passes.*flush=True")
    carry = fwpkm(boundary="carry")
    refused(lambda: carry(hidden, memory, read_passes=2), "read_passes.*'drop'")
    layer.stream(hidden[:, :2], memory)
    refused(lambda: layer.stream(hidden, memory, flush=True, read_passes=2), "read_passes.*2 tokens are pending")


# ------------------------------------------------------------------------------------------------------------ a stream
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [dict(), dict(boundary="carry", lookahead=2), dict(score="idw", heads=2)], ids=str)
def test_a_flushed_stream_has_the_bits_of_forward_and_commit(options, dtype):
    layer, hidden = fwpkm(dtype, **options), hidden_states(T=11, dtype=dtype)
    mask = rand(2, 11) > 0.3
    a, b = layer.new_memory(seed=0), layer.new_memory(seed=0)
    for _ in range(2):
        y = layer(hidden, a, mask)
        a.commit()
        with torch.no_grad():
            assert torch.equal(layer.stream(hidden, b, mask, flush=True), y) and y.dtype == dtype
        assert equal(bits(a), bits(b)) and b.pending_tokens == 0
    with torch.inference_mode():
        y = layer.stream(hidden, b)
    assert torch.equal(y, layer(hidden, a))


@torch.no_grad()
def test_a_stream_of_no_tokens_leaves_nothing_behind():
    layer = fwpkm()
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    assert layer.stream(hidden_states(T=0), memory).shape == (2, 0, WIDTH)
    assert memory.pending_tokens == 0
    layer(hidden_states(B=1), memory)  # needs no flush, and may have other rows and options
    layer.stream(hidden_states(B=1), memory, chunk_size=4)


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(), dict(boundary="carry", lookahead=2)], ids=str)
def test_a_stream_can_be_cut_anywhere(options):
    layer, hidden = fwpkm(torch.float32, **options), hidden_states(T=11, dtype=torch.float32)
    whole = layer.new_memory(seed=0)
    y = layer.stream(hidden, whole, flush=True)
    projected = layer.project(hidden)  # a linear layer's bits may depend on the number of tokens, a memory's may not
    tokens = [projected.query, projected.value, projected.gate]
    out = whole.clone().copy_(layer.new_memory(seed=0)).stream(*tokens, **layer.options).out
    for cuts in ([1] * 11, *([i, 11 - i] for i in range(1, 11))):
        memory = layer.new_memory(seed=0)
        parts = zip(*(x.split(cuts, 1) for x in tokens), strict=True)
        assert torch.equal(torch.cat([memory.stream(*part, **layer.options).out for part in parts], 1), out)
        memory.flush()
        assert equal(bits(memory), bits(whole))
        memory = layer.new_memory(seed=0)
        close = torch.cat([layer.stream(part, memory) for part in hidden.split(cuts, 1)], 1)
        torch.testing.assert_close(close, y, rtol=1e-4, atol=1e-5)
        assert 0 <= memory.pending_tokens < 3


@pytest.mark.parametrize("learned", [False, True])
def test_a_frozen_memory_gives_gradients_and_keeps_its_bits(learned):
    layer = fwpkm(learned_initial_memory=learned)
    memory = Memory.random(4, 4, 3, dtype=torch.float64) if not learned else layer.new_memory()
    before = bits(memory)
    hidden = hidden_states().requires_grad_()
    y = layer(hidden, memory.frozen(), rand(2, 8) > 0.3)
    assert memory.pending is None
    y.sum().backward()
    assert hidden.grad.abs().max() > 0 and layer.query_proj.weight.grad.abs().max() > 0
    if learned:
        assert dense(layer.initial_values.grad).abs().max() > 0 and memory.values is layer.initial_values
    memory.commit()
    with torch.no_grad():
        for flush in (False, True):
            assert torch.equal(layer.stream(hidden, memory.frozen(), flush=flush), y)
        for cut in range(1, 8):
            parts = [layer.stream(part, memory.frozen()) for part in hidden.split([cut, 8 - cut], 1)]
            torch.testing.assert_close(torch.cat(parts, 1), y, rtol=1e-10, atol=1e-12)
    assert equal(bits(memory), before) and memory.pending_tokens == 0


def test_a_forward_pass_writes_nothing_before_the_commit():
    layer, hidden = fwpkm(), hidden_states()
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    before = bits(memory)
    layer(hidden, memory).sum().backward()
    assert equal(bits(memory), before) and memory.pending is not None
    layer(hidden, memory)  # commits the one before
    assert not equal(bits(memory), before)


def test_train_and_eval_mode_are_one():
    layer, hidden = fwpkm(), hidden_states()
    a, b = (layer.new_memory(seed=0, dtype=torch.float64) for _ in range(2))
    assert torch.equal(layer.train()(hidden, a), layer.eval()(hidden, b))
    a.commit(), b.commit()
    assert equal(bits(a), bits(b))


@pytest.mark.parametrize("method", ["forward", "stream"])
def test_autocast(method):
    """The linear maps run in bfloat16, the norms, gate, memory and its writes in float32."""
    layer, hidden = fwpkm(torch.float32), hidden_states(dtype=torch.float32)
    memory, other = layer.new_memory(seed=0), layer.new_memory(seed=0)
    expected = layer(hidden, other)
    with torch.autocast(hidden.device.type, torch.bfloat16), torch.set_grad_enabled(method == "forward"):
        y, details = getattr(layer, method)(hidden, memory, return_details=True)
    assert details.gates.dtype == details.losses.dtype == details.weights.dtype == memory.dtype == torch.float32
    assert (y.float() - expected).norm() < 0.1 * expected.norm()
    if method == "forward":
        y.sum().backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())
    memory.commit()


# --------------------------------------------------------------------------------------------- RMSNorm and normalize
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm(dtype, input_dtype):
    norm = randomized(RMSNorm(5, 1e-3)).to(dtype)
    x = randn(2, 3, 5).to(input_dtype)
    y = norm(x)
    assert y.dtype == dtype and y.shape == x.shape
    expected = rms({"norm.weight": norm.weight.double()}, "norm", x.double(), 1e-3)
    torch.testing.assert_close(y.double(), expected, rtol=2 * torch.finfo(dtype).eps + 2e-7, atol=1e-6)
    assert torch.equal(RMSNorm(5).weight, torch.zeros(5)) and RMSNorm(5).eps == 1e-6


def test_rms_norm_has_the_range_of_float32_in_a_float16_layer():
    y = RMSNorm(4, dtype=torch.float16)(torch.full((1, 4), 1000.0, dtype=torch.float16))  # 1000^2 is beyond float16
    torch.testing.assert_close(y, torch.ones(1, 4, dtype=torch.float16))


def test_gradcheck_of_the_norms():
    x = randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = randn(5, dtype=torch.float64, requires_grad=True)
    norm = RMSNorm(5, dtype=torch.float64)
    assert gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x,)), (x, weight))
    for kind in ("zscore", "l2", None):
        assert gradcheck(lambda x, k=kind: normalize(x, k), (x,))


@pytest.mark.parametrize("kind", ["zscore", "l2", None])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalize(kind, dtype):
    x = randn(2, 3, 5).to(dtype)
    y = normalize(x, kind)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = zscore_or_l2(x.double(), kind)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [0.0, 3.0])
@pytest.mark.parametrize("kind", ["zscore", "l2", None])
def test_normalize_of_a_constant(kind, value):
    x = torch.full((2, 5), value, requires_grad=True)
    y = normalize(x, kind)
    y.sum().backward()
    expected = {"zscore": 0.0, "l2": value / (5 * value**2 + 1e-6) ** 0.5, None: value}[kind]
    torch.testing.assert_close(y, torch.full((2, 5), expected))
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("layer, sizes", [(FwPKM, SIZES), (FwMLP, MLP_SIZES)], ids=["FwPKM", "FwMLP"])
def test_values_of_one_number(layer, sizes):
    """z-scores need two numbers: an unbiased standard deviation of one does not exist."""
    for norm in ("l2", None):
        module = layer(WIDTH, **sizes | dict(value_dim=1), target_norm=norm, dtype=torch.float64)
        memory = module.new_memory(dtype=torch.float64)
        assert module(hidden_states(), memory).isfinite().all()
        memory.commit()
        assert all(t.isfinite().all() for t in memory.tensors.values())
    with pytest.raises(ValueError, match=r"value_dim.*2.*zscore.*got 1|target_norm.*zscore.*value_dim.*got 1"):
        layer(WIDTH, **sizes | dict(value_dim=1))


@pytest.mark.cpu
def test_query_halves_of_one_number():
    with pytest.raises(ValueError, match=r"key_dim.*zscore.*got 2|query_norm.*zscore.*key_dim.*got 2"):
        FwPKM(WIDTH, **SIZES | dict(key_dim=2), query_norm="zscore")


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_read_is_no_reason_to_warn(shape):
    layer = fwpkm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert layer(hidden_states(*shape), Memory.random(4, 4, 3, dtype=torch.float64)).shape == (*shape, WIDTH)


# ---------------------------------------------------------------------------------------------------------------- PKM
def pkm_composed(p, x, *, heads=2, topk=2, query_norm=True, swilu=True, gated=False, norm_eps=1e-6):
    query = linear(p, "query_proj", x)
    if query_norm:
        query = query / (query.square().mean(-1, keepdim=True) + norm_eps).sqrt() * p["query_norm.weight"]
    reads = reference.product_key_topk(query.unflatten(-1, (heads, -1)), p["sub_keys"], topk)
    y = torch.einsum("...hr,...hrv->...v", reads.scores.softmax(-1), p["values"][reads.indices])
    if swilu:
        y = y * F.silu(linear(p, "swilu_proj", x))
    y = linear(p, "out_proj", y)
    return (linear(p, "gate_proj", x).sigmoid() * y if gated else y), reads.indices


def pkm(dtype=torch.float64, **options):
    return randomized(PKM(WIDTH, 5, **PKM_SIZES | options, device="cpu")).to(torch.get_default_device(), dtype)


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("query_norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no_gate"])
@pytest.mark.parametrize("swilu", [True, False], ids=["swilu", "no_swilu"])
def test_pkm_is_its_composition(swilu, gated, query_norm, sparse_grad):
    options = dict(swilu=swilu, gated=gated, query_norm=query_norm)
    layer = pkm(**options, sparse_grad=sparse_grad, norm_eps=0.1)
    x = randn(2, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    y, indices = layer(x, return_indices=True)
    parameters = dict(layer.named_parameters())
    expected, expected_indices = pkm_composed(parameters, x, **options, norm_eps=0.1)
    assert torch.equal(indices.long(), expected_indices) and indices.dtype == torch.int32
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    assert torch.equal(layer(x), y)
    direction = torch.randn_like(y)
    leaves = [x, *parameters.values()]
    ours, theirs = (torch.autograd.grad((z * direction).sum(), leaves) for z in (y, expected))
    for name, a, b in zip(["x", *parameters], ours, theirs, strict=True):
        assert a.is_sparse == (sparse_grad and name == "values")
        torch.testing.assert_close(dense(a), b, rtol=1e-9, atol=1e-10, msg=lambda m, n=name: f"gradient of {n}: {m}")


@pytest.mark.parametrize("options", [dict(), dict(swilu=False, gated=True, query_norm=False)], ids=["default", "gated"])
def test_gradcheck_of_pkm(options):
    x = randn(3, WIDTH, dtype=torch.float64)
    assert gradcheck_layer(pkm(**options), x, call=lambda layer, x: layer(x))


def test_gradcheck_of_peer():
    layer = randomized(PKM(WIDTH, **PKM_SIZES, peer=True, dtype=torch.float64))
    assert gradcheck_layer(layer, randn(3, WIDTH, dtype=torch.float64), call=lambda layer, x: layer(x))


@pytest.mark.parametrize("peer", [False, True], ids=["values", "peer"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3), (2, 3, 4), (0,), (2, 0), (0, 3)], ids=str)
def test_pkm_takes_any_leading_dimensions(shape, peer):
    layer = PKM(WIDTH, **PKM_SIZES, peer=peer, gated=True, dtype=torch.float64)
    x = randn(*shape, WIDTH, dtype=torch.float64, requires_grad=True)
    y, indices = layer(x, return_indices=True)
    assert y.shape == x.shape and indices.shape == (*shape, 2, 2)
    flat, flat_indices = layer(x.reshape(-1, WIDTH), return_indices=True)
    torch.testing.assert_close(y.reshape(-1, WIDTH), flat, rtol=1e-11, atol=1e-12)
    assert torch.equal(indices.reshape(-1, 2, 2), flat_indices)
    y.sum().backward()
    assert x.grad.shape == x.shape and all(p.grad is not None for p in layer.parameters())


@pytest.mark.cpu
def test_parameters_of_pkm():
    linears = [f"{name}_proj.{leaf}" for name in ("query", "out", "swilu", "gate") for leaf in ("weight", "bias")]
    layer = PKM(WIDTH, 5, **PKM_SIZES, gated=True)
    assert set(layer.state_dict()) == {"sub_keys", "values", "query_norm.weight", *linears}
    assert layer.sub_keys.shape == (2, 2, 4, 2) and layer.values.shape == (16, 3)
    plain = PKM(WIDTH, 5, **PKM_SIZES, query_norm=False, swilu=False)
    assert set(plain.state_dict()) == {"sub_keys", "values", *linears[:4]}
    peer = PKM(WIDTH, **PKM_SIZES, peer=True)
    assert set(peer.state_dict()) == {"sub_keys", "values", "up_values", "query_norm.weight", *linears[:2]}
    assert peer.values.shape == peer.up_values.shape == (16, WIDTH)


@pytest.mark.cpu
def test_defaults_of_pkm():
    layer = PKM(64, device="meta")
    assert layer.sub_keys.shape == (4, 2, 512, 256) and layer.values.shape == (512**2, 512) and layer.topk == 32
    assert layer.query_norm is not None and layer.swilu_proj is not None and layer.out_proj.weight.shape == (64, 512)
    assert layer.gate_proj is None and layer.up_values is None and not layer.sparse_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("peer", [False, True], ids=["values", "peer"])
def test_tables_of_pkm_stay_float32(dtype, peer):
    layers = PKM(WIDTH, **PKM_SIZES, peer=peer, dtype=dtype), PKM(WIDTH, **PKM_SIZES, peer=peer).to(dtype)
    for layer in layers:
        tables = [p for n, p in layer.named_parameters() if n in layer.TABLES]
        assert len(tables) == 2 + peer and {p.dtype for p in tables} == {torch.float32}
        assert layer.query_proj.weight.dtype == dtype
        y = layer(randn(3, WIDTH, dtype=dtype))
        assert y.dtype == dtype
        y.sum().backward()
        assert all(p.grad.dtype == p.dtype for p in layer.parameters())
    assert PKM(WIDTH, **PKM_SIZES, dtype=torch.float64).values.dtype == torch.float64


@pytest.mark.parametrize("options", [dict(), dict(peer=True), dict(gated=True, swilu=False)], ids=str)
def test_pkm_under_autocast(options):
    layer, x = PKM(WIDTH, **PKM_SIZES, **options), randn(4, WIDTH)
    expected = layer(x)
    with torch.autocast(x.device.type, torch.bfloat16):
        y = layer(x)
    assert (y.float() - expected).norm() < 0.1 * expected.norm()
    y.sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


def test_pkm_is_reproducible_and_reset_draws_anew():
    torch.manual_seed(3)
    a = PKM(WIDTH, **PKM_SIZES, gated=True)
    torch.manual_seed(3)
    b = PKM(WIDTH, **PKM_SIZES, gated=True)
    assert equal(list(a.parameters()), list(b.parameters()))
    before = a.values.clone()
    a.reset_parameters()
    assert not torch.equal(a.values, before)
    twin = copy.deepcopy(b)
    x = randn(3, WIDTH)
    assert torch.equal(twin(x), b(x)) and twin.values is not b.values


# ---------------------------------------------------------------------------------------------------------- bad input
BAD_SIZES = [  # of both layers: what is refused when the layer is made, not at its first call
    *((name, value) for name in ("value_dim", "chunk_size") for value in (0, -1, 3.0, True, "3")),
    ("lookahead", -1), ("lookahead", 1.0), ("lookahead", True), ("lr", "fast"), ("lr", float("nan")),
    ("weight_decay", float("inf")), ("grad_clip", -1.0), ("gate", "half"), ("gate", None), ("target_norm", "minmax"),
]  # fmt: skip
BAD_PKM_SIZES = [
    *((name, value) for name in ("key_dim", "heads", "topk", "num_sub_keys") for value in (0, -2, 2.0, True, "2")),
    ("key_dim", 5), ("topk", 5),
]  # fmt: skip
BAD_FWPKM = [
    *BAD_SIZES, *BAD_PKM_SIZES, ("score", "cosine"), ("activation", "gelu"), ("write_rule", "paper's"),
    ("boundary", "wrap"), ("query_norm", "layer"), ("temperature", 0.0), ("eps", 0.0),
    ("addressing_weight", float("nan")),
]  # fmt: skip
BAD_FWMLP = [
    *BAD_SIZES, *((name, value) for name in ("key_dim", "hidden_units") for value in (0, -1, 4.0, True)),
    ("loss", "huber"), ("lookahead_target", "first"),
]  # fmt: skip
CONSTRUCTORS = [
    *((FwPKM, SIZES, *bad) for bad in BAD_FWPKM),
    *((FwMLP, MLP_SIZES, *bad) for bad in BAD_FWMLP),
    *((PKM, PKM_SIZES, *bad) for bad in [*BAD_PKM_SIZES, ("value_dim", 0), ("value_dim", 3.0), ("output_dim", 0)]),
]


@pytest.mark.cpu
@pytest.mark.parametrize(
    "layer, sizes, name, value", CONSTRUCTORS, ids=[f"{c[0].__name__}-{c[2]}={c[3]!r}" for c in CONSTRUCTORS]
)
def test_a_layer_refuses_options_when_it_is_made(layer, sizes, name, value):
    with pytest.raises((ValueError, TypeError), match=f"(?s){name}.*expected.*got"):
        layer(WIDTH, **sizes | {name: value})


@pytest.mark.cpu
@pytest.mark.parametrize("layer, sizes", [(FwPKM, SIZES), (FwMLP, MLP_SIZES)], ids=["FwPKM", "FwMLP"])
@pytest.mark.parametrize("size", [0, -1, 6.0, True])
def test_a_layer_refuses_a_hidden_size_that_is_none(layer, sizes, size):
    with pytest.raises((ValueError, TypeError), match=r"hidden_size.*expected.*got"):
        layer(size, **sizes)


@pytest.mark.cpu
def test_carry_with_a_lookahead_beyond_the_chunk_is_refused_when_the_layer_is_made():
    with pytest.raises(ValueError, match="lookahead: expected at most chunk_size"):
        FwPKM(WIDTH, **SIZES, boundary="carry", lookahead=4)


@pytest.mark.cpu
def test_peer_takes_one_size():
    with pytest.raises(ValueError, match=r"output_dim: expected input_dim = 6 .*got 5"):
        PKM(WIDTH, 5, **PKM_SIZES, peer=True)


def yes(*shape):
    return torch.ones(*shape, dtype=torch.bool)


H = torch.zeros(2, 5, WIDTH)
BAD_CALLS = {  # arguments of a call, and what the message must say of it
    "hidden_width": (torch.zeros(2, 5, 7), None, {}, r"hidden: expected.*6.*got.*2, 5, 7"),
    "hidden_1d": (torch.zeros(WIDTH), None, {}, r"hidden: expected.*6.*got.*6"),
    "hidden_2d": (torch.zeros(5, WIDTH), None, {}, r"hidden: expected.*6.*got.*5, 6"),
    "hidden_4d": (torch.zeros(1, 2, 5, WIDTH), None, {}, r"hidden: expected.*6.*got.*1, 2, 5, 6"),
    "hidden_int": (torch.zeros(2, 5, WIDTH, dtype=torch.int64), None, {}, "hidden: expected.*got.*int64"),
    "hidden_list": ([[0.0] * WIDTH], None, {}, "hidden: expected.*got"),
    "mask_float": (H, torch.ones(2, 5), {}, "mask: expected [Bb]ool.*got.*[Ff]loat"),
    "mask_int": (H, torch.ones(2, 5, dtype=torch.int64), {}, "mask: expected [Bb]ool.*got.*([Ll]ong|int64)"),
    "mask_short": (H, yes(2, 4), {}, r"mask: expected.*2, 5.*got.*2, 4"),
    "mask_one_row": (H, yes(1, 5), {}, r"mask: expected.*2, 5.*got.*1, 5"),
    "mask_1d": (H, yes(5), {}, r"mask: expected.*got.*5"),
    "mask_3d": (H, yes(2, 5, 1), {}, r"mask: expected.*got.*2, 5, 1"),
    "mask_list": (H, [[True] * 5] * 2, {}, "mask.*expected.*(got|found)|expected.*mask"),
    **{
        f"chunk_size_{n!r}": (H, None, dict(chunk_size=n), f"chunk_size: expected.*got.*{n}")
        for n in (0, -3, 2.0, "2", True)
    },
}  # fmt: skip


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("case", BAD_CALLS)
@pytest.mark.parametrize("method", ["forward", "stream"])
@pytest.mark.parametrize("layer, sizes", [(FwPKM, SIZES), (FwMLP, MLP_SIZES)], ids=["FwPKM", "FwMLP"])
def test_a_refused_call_names_its_argument_and_leaves_the_memory(layer, sizes, method, case):
    hidden, mask, options, match = BAD_CALLS[case]
    layer = layer(WIDTH, **sizes)
    for streamed in (0, 2) if method == "stream" else (0,):
        memory = layer.new_memory(seed=0)
        if streamed:
            layer.stream(randn(2, streamed, WIDTH), memory, yes(2, streamed))
        before = state(memory)
        with pytest.raises(REFUSED, match=match):
            getattr(layer, method)(hidden, memory, yes(2, 5) if mask is None else mask, **options)
        assert equal(state(memory), before)


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "stream"])
@pytest.mark.parametrize(
    "layer, sizes, other",
    [
        *((FwPKM, SIZES, {n: v}) for n, v in dict(key_dim=6, value_dim=4, num_sub_keys=5, heads=2).items()),
        *((FwMLP, MLP_SIZES, {n: v}) for n, v in dict(key_dim=5, value_dim=4, hidden_units=7).items()),
    ],
    ids=lambda x: "" if x in (SIZES, MLP_SIZES) else x.__name__ if isinstance(x, type) else "-".join(x),
)
def test_a_memory_of_other_sizes_is_refused(layer, sizes, other, method):
    memory = layer(WIDTH, **sizes | other).new_memory(seed=0)
    before = state(memory)
    with pytest.raises(REFUSED, match=r"memory: expected.*got"):
        getattr(layer(WIDTH, **sizes), method)(H, memory)
    assert equal(state(memory), before)


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "stream"])
@pytest.mark.parametrize("kind", ["None", "of the other layer", "float64"])
@pytest.mark.parametrize("layer, sizes", [(FwPKM, SIZES), (FwMLP, MLP_SIZES)], ids=["FwPKM", "FwMLP"])
def test_a_memory_of_another_kind_is_refused(layer, sizes, kind, method):
    other, other_sizes = (FwMLP, MLP_SIZES) if layer is FwPKM else (FwPKM, SIZES)
    layer = layer(WIDTH, **sizes)
    memory = {
        "None": None,
        "of the other layer": other(WIDTH, **other_sizes).new_memory(seed=0),
        "float64": layer.new_memory(seed=0, dtype=torch.float64),
    }[kind]
    before = memory and state(memory)
    if kind == "float64" and isinstance(layer, FwMLP):
        return  # its tokens are converted to the memory's dtype
    with pytest.raises(REFUSED, match=r"memory.*(expected|got)|expected.*memory"):
        getattr(layer, method)(H, memory)
    assert memory is None or equal(state(memory), before)


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("method", ["forward", "stream"])
@pytest.mark.parametrize("layer, sizes", [(FwPKM, SIZES), (FwMLP, MLP_SIZES)], ids=["FwPKM", "FwMLP"])
def test_nothing_that_is_not_finite_reaches_a_memory(layer, sizes, method, value):
    layer = layer(WIDTH, **sizes)
    memory = layer.new_memory(seed=0)
    hidden = randn(1, 7, WIDTH)
    hidden[0, 4, 2] = value
    before = state(memory)
    with pytest.raises(RuntimeError, match="expected finite"):
        getattr(layer, method)(hidden, memory)
    assert equal(state(memory), before)


def test_a_stream_is_refused_where_gradients_are_recorded():
    layer = fwpkm()
    memory = layer.new_memory(seed=0, dtype=torch.float64)
    before = state(memory)
    with pytest.raises(RuntimeError, match=r"requires grad.*torch.no_grad\(\)"):
        layer.stream(hidden_states(), memory)
    assert equal(state(memory), before)


@pytest.mark.cpu
@torch.no_grad()
@pytest.mark.parametrize("width", [0, 5, 7])
def test_pkm_refuses_another_width(width):
    with pytest.raises(RuntimeError, match=f"shapes.*{width}.*6|x: expected"):
        PKM(WIDTH, **PKM_SIZES)(torch.zeros(3, width))
    assert fwpkm_cuda.PKM is PKM
