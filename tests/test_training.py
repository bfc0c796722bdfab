"""The layers in a training loop: order of calls, checkpointing, dtypes, compile, sparse optimizers, a byte model."""

import contextlib
import copy
import gc
import importlib.util
import io
import warnings
from pathlib import Path

import pytest
import torch
from inputs import dense
from torch import nn
from torch.utils.checkpoint import checkpoint

from fwpkm_cuda import PKM, FwMLP, FwPKM, Memory, reference

WIDTH, T = 6, 12
SIZES = dict(key_dim=4, value_dim=5, topk=3, num_sub_keys=5, chunk_size=4)
TABLES = ("initial_values", "initial_sub_keys", "values", "up_values", "sub_keys")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work this small is slower when it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


def make_layer(kind="pkm", dtype=torch.float64, **options):
    if kind == "mlp":
        return FwMLP(WIDTH, key_dim=4, value_dim=5, hidden_units=7, chunk_size=4, dtype=dtype)
    return FwPKM(WIDTH, **SIZES | options, learned_initial_memory=kind == "learned", dtype=dtype)


def new_memory(layer):
    return layer.new_memory(**{} if getattr(layer, "initial_values", None) is not None else dict(seed=1))


def make(kind="pkm", dtype=torch.float64, **options):
    """A layer, its memory and hidden states: the same ones in every call."""
    torch.manual_seed(4)
    layer = make_layer(kind, dtype, **options)
    return layer, new_memory(layer), torch.randn(2, T, WIDTH, dtype=dtype, requires_grad=True)


def gradients(module):
    return [dense(p.grad).clone() for p in module.parameters()]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def snapshot(memory):
    return [t.detach().clone() for t in memory.tensors.values()]


def scan_options(layer):
    return {k: v for k, v in layer.options.items() if k != "boundary"}


def reference_answer(layer, hidden, values, sub_keys, passes=1, **changes):
    """What the layer should answer, and the memory afterwards, by the reference."""
    query, value, gate = layer.project(hidden)
    for _ in range(passes):
        scan = reference.chunk_scan(values, sub_keys, query, value, gate, **scan_options(layer) | changes)
        values, sub_keys = scan.values, scan.sub_keys
    return layer.combine(scan.out, value, gate), values, sub_keys


# ------------------------------------------------------------------------------------------------- order of the calls
def test_gradient_accumulation_reads_what_earlier_micro_batches_wrote():
    layer, memory, _ = make()
    values, sub_keys = snapshot(memory)
    batches = [torch.randn(2, T, WIDTH, dtype=torch.float64) for _ in range(3)]
    for hidden in batches:
        layer(hidden, memory).sin().sum().backward()
    memory.commit()
    found = gradients(layer)
    layer.zero_grad()
    for hidden in batches:
        y, values, sub_keys = reference_answer(layer, hidden, values.detach(), sub_keys.detach())
        y.sin().sum().backward()
    for a, b in zip(found, gradients(layer), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(memory.values, values.detach())
    torch.testing.assert_close(memory.sub_keys, sub_keys.detach())


def test_two_forwards_before_one_backward_is_autograd_s_error():
    layer, memory, hidden = make()
    first, second = layer(hidden, memory), layer(hidden + 1, memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (first.sum() + second.sum()).backward()


def test_the_second_of_two_forwards_has_its_gradient():
    layer, memory, hidden = make()
    layer(hidden, memory)
    layer(hidden.sin(), memory).sum().backward()
    found = gradients(layer)
    layer.zero_grad()
    _, other, _ = make()
    with torch.no_grad():
        layer.stream(hidden, other)
    layer(hidden.sin(), other).sum().backward()
    assert same(found, gradients(layer))


@pytest.mark.parametrize("end", ["commit", "stream", "clone", "save", "copy_", "reset", "forward"])
def test_a_backward_pass_that_comes_too_late_is_autograd_s_error(end, tmp_path):
    """Also after a forward under no_grad, as of an evaluation in between: it belongs on memory.frozen() or a clone."""
    layer, memory, hidden = make()
    y = layer(hidden, memory)
    with torch.no_grad():
        {
            "commit": memory.commit,
            "stream": lambda: layer.stream(hidden, memory),
            "clone": memory.clone,
            "save": lambda: memory.save(tmp_path / "memory"),
            "copy_": lambda: memory.copy_(layer.new_memory()),
            "reset": memory.reset,
            "forward": lambda: layer(hidden, memory),
        }[end]()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("method", ["forward", "stream"])
def test_an_evaluation_with_a_frozen_memory_in_between_disturbs_nothing(method):
    results = []
    for evaluates in (False, True):
        layer, memory, hidden = make()
        y = layer(hidden, memory)
        if evaluates:
            with torch.no_grad():
                getattr(layer, method)(hidden + 1, memory.frozen())
        y.sum().backward()
        memory.commit()
        results.append([*gradients(layer), *snapshot(memory)])
    assert same(*results)


def test_a_rollback_does_not_hinder_the_backward_pass():
    layer, memory, hidden = make()
    before = snapshot(memory)
    expected, _, _ = reference_answer(layer, hidden, *before)
    expected.sum().backward()
    wanted = gradients(layer)
    layer.zero_grad()
    y = layer(hidden, memory)
    memory.rollback()
    y.sum().backward()
    memory.commit()
    assert same(snapshot(memory), before)
    torch.testing.assert_close(gradients(layer), wanted)


def test_a_backward_pass_twice_through_a_retained_graph():
    layer, memory, hidden = make()
    loss = layer(hidden, memory).square().sum()
    a = torch.autograd.grad(loss, layer.query_proj.weight, retain_graph=True)
    assert same(a, torch.autograd.grad(loss, layer.query_proj.weight))


@pytest.mark.parametrize("chunk_size", [4, 6, 12])
def test_read_passes_are_scans_in_a_row(chunk_size):
    layer, memory, hidden = make()
    expected, values, sub_keys = reference_answer(layer, hidden, *snapshot(memory), passes=3, chunk_size=chunk_size)
    y = layer(hidden, memory, read_passes=3, chunk_size=chunk_size)
    torch.testing.assert_close(y, expected)
    inputs = [hidden, *layer.parameters()]
    found, theirs = (torch.autograd.grad(x.sin().sum(), inputs) for x in (y, expected))
    torch.testing.assert_close(found, theirs, rtol=1e-7, atol=1e-9)
    memory.commit()
    torch.testing.assert_close(memory.values, values.detach())
    torch.testing.assert_close(memory.sub_keys, sub_keys.detach())


@pytest.mark.parametrize("kind", ["pkm", "mlp"])
@torch.no_grad()
def test_read_passes_of_a_stream_are_streams_and_flushes_in_a_row(kind):
    layer, memory, hidden = make(kind)
    twin = memory.clone()
    y = layer.stream(hidden[:, :10], memory, read_passes=3, flush=True)
    for _ in range(3):
        expected = layer.stream(hidden[:, :10], twin)
        twin.flush()
    assert torch.equal(y, expected) and same(snapshot(memory), snapshot(twin))


# ------------------------------------------------------------------------------------------- activation checkpointing
class Block(nn.Module):
    """Something before the layer that must be repeated, dropout, and a residual connection."""

    def __init__(self, layer):
        super().__init__()
        self.before, self.drop, self.layer = nn.Linear(WIDTH, WIDTH, dtype=torch.float64), nn.Dropout(0.2), layer

    def forward(self, hidden, memory):
        hidden = self.drop(self.before(hidden))
        return hidden + self.layer(hidden, memory)


def counted(memory):
    """The list of the memory's commits and scans, as they come."""
    calls = []
    for name in ("_commit", "_scan"):
        original = getattr(memory, name)

        def call(*args, name=name, original=original, **options):
            calls.append(name)
            return original(*args, **options)

        setattr(memory, name, call)
    return calls


REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


@pytest.mark.parametrize("nested", [False, True], ids=["once", "nested"])
@REENTRANT
@pytest.mark.parametrize("kind", ["pkm", "learned", "mlp"])
def test_checkpointing_gives_the_same_gradients_and_writes_once(kind, reentrant, nested):
    if kind == "mlp" and not reentrant:  # the write of an MLP is a backward pass inside of the forward
        layer, memory, hidden = make(kind)
        with pytest.raises(RuntimeError, match="use_reentrant=True"):
            checkpoint(layer, hidden, memory, use_reentrant=False)
        return
    results = []
    for checkpointed in (False, True):
        layer, memory, hidden = make(kind)
        block, calls = Block(layer), counted(memory)
        run = lambda h, block=block, memory=memory: block(h, memory)
        if checkpointed:
            inner = (lambda h, run=run: checkpoint(run, h, use_reentrant=reentrant)) if nested else run
            run = lambda h, inner=inner: checkpoint(inner, h, use_reentrant=reentrant)
        torch.manual_seed(7)
        for _ in range(2):  # two steps, so that the second reads what the first wrote
            run(hidden).sin().sum().backward()
        memory.commit()
        results.append([hidden.grad, *gradients(block), *snapshot(memory)])
        assert calls.count("_commit") == 2
        assert (calls.count("_scan") > 2) == checkpointed
    if kind == "mlp":  # plain torch: to rounding
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)
    else:
        assert same(*results)


@REENTRANT
def test_checkpointing_with_read_passes(reentrant):
    results = []
    for run in (lambda f, h: f(h), lambda f, h: checkpoint(f, h, use_reentrant=reentrant)):
        layer, memory, hidden = make()
        run(lambda h: layer(h, memory, read_passes=2), hidden).sin().sum().backward()  # noqa: B023
        memory.commit()
        results.append([hidden.grad, *gradients(layer), *snapshot(memory)])
    assert same(*results)


@REENTRANT
@pytest.mark.parametrize(
    "between", ["forward", "forward_without_grad", "stream", "commit", "rollback", "reset", "clone"]
)
def test_checkpointing_out_of_order_is_an_error(reentrant, between):
    """Never a wrong gradient."""
    layer, memory, hidden = make()
    run = lambda h: checkpoint(layer, h, memory, use_reentrant=reentrant)
    y = run(hidden)
    other = hidden.detach().sin()
    without_grad = torch.no_grad()
    {
        "forward": lambda: run(hidden.sin()),
        "forward_without_grad": without_grad(lambda: layer(other, memory)),
        "stream": without_grad(lambda: layer.stream(other, memory)),
        "commit": memory.commit,
        "rollback": memory.rollback,
        "reset": memory.reset,
        "clone": memory.clone,
    }[between]()
    with pytest.raises(RuntimeError, match=r"activation checkpointing repeats|modified by an inplace operation"):
        y.sum().backward()


@REENTRANT
def test_checkpointing_with_a_frozen_memory(reentrant):
    """Nothing waits for a commit, so that the order of forwards does not matter."""
    layer, memory, hidden = make()
    before, frozen = snapshot(memory), memory.frozen()
    run = lambda h: checkpoint(layer, h, frozen, use_reentrant=reentrant)
    (run(hidden).sin() + run(hidden * 2).cos()).sum().backward()
    found, hidden.grad = hidden.grad, None
    (layer(hidden, frozen).sin() + layer(hidden * 2, frozen).cos()).sum().backward()
    torch.testing.assert_close(found, hidden.grad, rtol=1e-12, atol=1e-14)
    assert same(snapshot(memory), before) and memory.pending is None


@REENTRANT
def test_a_checkpointed_read_of_a_frozen_memory_that_is_written_in_between_is_an_error(reentrant):
    layer, memory, hidden = make()
    frozen = memory.frozen()
    expected = torch.autograd.grad(layer(hidden, frozen).sin().sum(), hidden)
    y = checkpoint(layer, hidden, frozen, use_reentrant=reentrant)
    with torch.no_grad():
        layer.stream(hidden.sin(), memory)
    try:
        y.sin().sum().backward()
    except RuntimeError:
        return
    assert same([hidden.grad], expected), "no error, and a gradient that is wrong"


def test_a_frozen_memory_that_is_written_between_two_checkpointed_reads_is_an_error():
    layer, memory, hidden = make()
    frozen = memory.frozen()
    run = lambda h: checkpoint(layer, h, frozen, use_reentrant=False)
    first = run(hidden)
    with torch.no_grad():
        layer.stream(hidden.sin(), memory)
    second = run(hidden.cos())
    with pytest.raises(RuntimeError):
        (first.sin() + second.cos()).sum().backward()


@REENTRANT
def test_a_memory_may_be_frozen_inside_of_a_checkpoint(reentrant):
    results = []
    for run in (lambda f, h: f(h), lambda f, h: checkpoint(f, h, use_reentrant=reentrant)):
        layer, memory, hidden = make()
        both = lambda h: layer(h, memory) + layer(h.cos(), memory.frozen())  # noqa: B023
        run(both, hidden).sin().sum().backward()
        memory.commit()
        results.append([hidden.grad, *gradients(layer), *snapshot(memory)])
    assert same(*results)


@pytest.mark.parametrize("name", ["out", "losses", "weights", "addressing_loss", "new_rows", "new_sub_keys"])
def test_a_late_backward_pass_through_any_output_of_a_checkpointed_scan_is_an_error(name):
    torch.manual_seed(0)
    memory = Memory.random(5, 4, 5, seed=0, dtype=torch.float64)
    query = torch.randn(1, T, 1, 4, dtype=torch.float64, requires_grad=True)
    target = torch.randn(1, T, 5, dtype=torch.float64)
    scan = lambda q: getattr(memory.scan(q, target, topk=3, chunk_size=4), name)
    first = checkpoint(scan, query, use_reentrant=False).sin().sum()
    second = checkpoint(scan, query, use_reentrant=False).cos().sum()
    with pytest.raises(RuntimeError):
        (first + second).backward()


def test_a_late_backward_pass_through_a_frozen_memory_is_autograd_s_error():
    layer, memory, hidden = make()
    y = layer(hidden, memory.frozen())
    with torch.no_grad():
        layer.stream(hidden, memory)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_two_checkpointed_forwards_of_the_same_tokens_before_one_backward_are_an_error():
    """As of a batch that is fed twice. (Reentrant checkpointing has nothing that could tell them apart.)"""
    layer, memory, hidden = make()
    run = lambda h: checkpoint(layer, h, memory, use_reentrant=False)
    y = run(hidden).sin() + run(hidden).sin()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["pkm", "learned", "mlp"])
def test_steps_leave_nothing_behind(kind):
    """No tensor outlives its step, also without the garbage collector."""
    layer, memory, hidden = make(kind)

    def step(checkpointed):
        run = (lambda h: checkpoint(layer, h, memory, use_reentrant=kind == "mlp")) if checkpointed else layer
        run(*[hidden, memory][: 1 if checkpointed else 2]).sin().sum().backward()
        memory.commit()
        layer.zero_grad()

    alive = lambda: sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    step(True), step(False), gc.collect()
    gc.disable()
    try:
        counts = []
        for i in range(6):
            step(i % 2 == 0)
            counts.append(alive())
    finally:
        gc.enable()
    assert counts[-1] == counts[1], counts


def test_checkpointing_that_draws_another_dropout_is_an_error():
    layer, memory, hidden = make()
    y = checkpoint(Block(layer), hidden, memory, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(RuntimeError, match="activation checkpointing repeats a scan that is not the memory's last"):
        y.sum().backward()


# ------------------------------------------------------------------------------------------------------------- dtypes
@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nothing_that_is_done_to_a_module_touches_its_memory(train):
    layer, memory, hidden = make()
    before = snapshot(memory)
    model = nn.Sequential(layer)
    owned = [*model.parameters(), *model.buffers(), *model.state_dict().values()]
    assert not {t.data_ptr() for t in owned} & {t.data_ptr() for t in memory.tensors.values()}
    assert len(owned) == 2 * len([*model.parameters(), layer.sub_keys])
    model.eval().train(train).requires_grad_(False).requires_grad_(True).zero_grad()
    model.load_state_dict(copy.deepcopy(model).state_dict())
    model.to(torch.float32).bfloat16().double().apply(lambda m: None).share_memory()
    assert same(snapshot(memory), before) and memory.dtype == torch.float64 and not memory.values.is_shared()
    optimizer = torch.optim.AdamW(model.parameters())
    layer(hidden, memory).sum().backward()
    optimizer.step()
    assert same(snapshot(memory), before), "the step of an optimizer, before the commit"
    memory.commit()
    assert not same(snapshot(memory), before)


def test_a_layer_without_gradients_still_writes():
    layer, memory, hidden = make()
    twin = memory.clone()
    layer(hidden, twin)
    twin.commit()
    layer.requires_grad_(False)
    y = layer(hidden.detach(), memory)
    memory.commit()
    assert not y.requires_grad and same(snapshot(memory), snapshot(twin))


def test_gradients_pass_through_a_layer_whose_weights_are_fixed():
    layer, memory, hidden = make()
    expected = torch.autograd.grad(layer(hidden, memory).sin().sum(), hidden)
    memory.rollback()
    layer.requires_grad_(False)
    assert same(torch.autograd.grad(layer(hidden, memory).sin().sum(), hidden), expected)


@pytest.mark.parametrize("kind", ["pkm", "learned", "mlp"])
@pytest.mark.parametrize("how", ["autocast", "bfloat16"])
def test_low_precision_keeps_the_memory_in_float32(how, kind):
    layer, memory, hidden = make(kind, dtype=torch.float32)
    exact = copy.deepcopy(layer)
    exact_memory = new_memory(exact)
    expected = exact(hidden, exact_memory)
    expected.sin().sum().backward()
    if how == "bfloat16":
        layer, memory = layer.bfloat16(), new_memory(layer)
        y = layer(hidden.detach().bfloat16(), memory)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(hidden, memory)
    assert y.dtype == torch.bfloat16
    assert (y.float() - expected).norm() < 0.05 * expected.norm()
    y.float().sin().sum().backward()
    for name, p in layer.named_parameters():
        assert p.dtype == (torch.bfloat16 if how == "bfloat16" and name not in TABLES else torch.float32)
        assert p.grad.dtype == p.dtype and dense(p.grad).isfinite().all(), name
    found, wanted = (torch.cat([g.float().flatten() for g in gradients(m)]) for m in (layer, exact))
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    for m in (memory, exact_memory):
        m.commit()
    for a, b in zip(snapshot(memory), snapshot(exact_memory), strict=True):
        assert a.dtype == torch.float32 and (a - b).norm() < 0.05 * b.norm() + 1e-3


def tables_of(module):
    return {name: p for name, p in module.named_parameters() if name in TABLES}


MODULES = {
    "learned": lambda: make_layer("learned", torch.float32),
    "pkm": lambda: PKM(WIDTH, key_dim=4, value_dim=5, heads=2, topk=2, num_sub_keys=4),
    "peer": lambda: PKM(WIDTH, key_dim=4, heads=2, topk=2, num_sub_keys=4, peer=True, sparse_grad=True),
}


def answer(module, hidden):
    return module(hidden, module.new_memory()) if isinstance(module, FwPKM) else module(hidden)


@pytest.mark.parametrize("make_module", MODULES.values(), ids=MODULES)
@pytest.mark.parametrize("to", ["bfloat16", "half", "double"])
def test_tables_of_slow_weights_stay_at_least_float32_and_so_do_their_gradients(make_module, to):
    module = make_module()
    answer(module, torch.randn(1, T, WIDTH)).sin().sum().backward()
    before = {n: (p.detach().clone(), dense(p.grad).clone()) for n, p in tables_of(module).items()}
    assert len(before) >= 2
    module = getattr(module, to)()
    expected = torch.float64 if to == "double" else torch.float32
    for name, p in tables_of(module).items():
        assert p.dtype == p.grad.dtype == expected, name
        value, gradient = before[name]
        assert torch.equal(p, value.to(expected)) and torch.equal(dense(p.grad), gradient.to(expected)), name
    low = getattr(torch, to)
    assert module.query_proj.weight.dtype == low
    y = answer(module, torch.randn(1, T, WIDTH, dtype=low))
    y.sin().sum().backward()
    assert y.dtype == low and all(dense(p.grad).isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "make_module", [*MODULES.values(), lambda: make_layer(dtype=torch.float32)], ids=[*MODULES, "random"]
)
def test_state_dict_and_deepcopy_carry_the_module_over(make_module):
    module, other = make_module(), make_module()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    twin = copy.deepcopy(module)
    assert not same([*module.parameters()], [*other.parameters()])
    result = other.load_state_dict(torch.load(file, weights_only=True))
    assert not result.missing_keys and not result.unexpected_keys
    for m in (other, twin):
        assert same([*module.parameters()], [*m.parameters()])
        with torch.no_grad():
            for p in m.parameters():
                p += 1
        assert not any(torch.equal(a, b) for a, b in zip(module.parameters(), m.parameters(), strict=True))


@pytest.mark.parametrize("make_module", MODULES.values(), ids=MODULES)
def test_a_state_dict_loads_into_a_module_of_another_dtype(make_module):
    module = make_module()
    low, high = make_module().bfloat16(), make_module().double()
    low.load_state_dict(module.state_dict())
    high.load_state_dict(low.state_dict())
    for (name, a), b, c in zip(module.named_parameters(), low.parameters(), high.parameters(), strict=True):
        assert b.dtype == (torch.float32 if name in TABLES else torch.bfloat16) and c.dtype == torch.float64
        assert torch.equal(a.to(b.dtype), b) and torch.equal(b.double(), c), name


# ------------------------------------------------------------------------------------------------------------- compile
class Model(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.layers = nn.ModuleList(FwPKM(WIDTH, **SIZES | options) for _ in range(2))

    def forward(self, hidden, memories):
        for layer, memory in zip(self.layers, memories, strict=True):
            hidden = hidden + layer(hidden, memory)
        return hidden


CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend, dynamic", [("aot_eager", False), ("aot_eager", True), ("inductor", False)])
def test_a_model_with_two_memories_compiles_into_one_graph(backend, dynamic):
    model = Model()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=dynamic)
    memories = [layer.new_memory(seed=0) for layer in model.layers]
    twins = [m.clone() for m in memories]
    for length in (12, 16, 9, 6) if dynamic else (12, 12, 12):
        hidden = torch.randn(2, length, WIDTH)
        results = []
        for run, used in ((compiled, memories), (model, twins)):
            model.zero_grad()
            y = run(hidden, used)
            y.square().sum().backward()
            results.append([y.detach(), *gradients(model)])
            for memory in used:
                memory.commit()
            results[-1] += [t for m in used for t in snapshot(m)]
        torch.testing.assert_close(*results, **CLOSE)
    before = [snapshot(m) for m in memories]
    with torch.no_grad():
        y, expected = (f(hidden, [m.frozen() for m in memories]) for f in (compiled, model))
    torch.testing.assert_close(y, expected, **CLOSE)
    assert all(same(snapshot(m), b) and m.pending is None for m, b in zip(memories, before, strict=True))


def test_steps_and_other_memories_need_no_new_compilation():
    layer, memory, hidden = make(dtype=torch.float32)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for used in (memory, memory, memory, layer.new_memory(seed=9), memory.clone()):
        compiled(hidden, used).sum().backward()
        used.commit()
    assert counter.frame_count == 1


def test_compiled_code_says_when_a_commit_was_forgotten():
    model = Model()
    memories = [layer.new_memory(seed=0) for layer in model.layers]
    hidden = torch.randn(2, T, WIDTH)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled(hidden, memories)
    with pytest.raises(Exception, match=r"call commit\(\)"):
        compiled(hidden, memories)
    for memory in memories:
        memory.commit()
    compiled(hidden, memories)


def test_a_learned_initial_memory_compiles():
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")):
        layer, memory, hidden = make("learned", dtype=torch.float32, sparse_grad=False)
        run = wrap(layer)
        for _ in range(2):
            run(hidden, memory).sin().sum().backward()
            memory.rollback()
        results.append([hidden.grad, *gradients(layer)])
    torch.testing.assert_close(*results, **CLOSE)


def test_a_compiled_block_may_checkpoint():
    results = []
    for wrap in (lambda f: f, lambda f: torch.compile(f, backend="aot_eager")):
        layer, memory, hidden = make(dtype=torch.float32)
        run = wrap(lambda h: checkpoint(layer, h, memory, use_reentrant=False))  # noqa: B023
        for _ in range(2):
            run(hidden).sin().sum().backward()
            memory.commit()
        results.append([hidden.grad, *gradients(layer), *snapshot(memory)])
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("cut", [1, 3, 4, 6])
@torch.no_grad()
def test_a_stream_compiles(cut):
    """Cut into calls of one size, which leave and find different numbers of pending tokens."""
    layer, memory, hidden = make(dtype=torch.float32)
    twin = memory.clone()
    compiled = torch.compile(layer.stream, fullgraph=True, backend="aot_eager")
    for piece in hidden.detach().split(cut, 1):
        torch.testing.assert_close(compiled(piece, memory), layer.stream(piece, twin), **CLOSE)
        assert memory.pending_tokens == twin.pending_tokens
    torch.testing.assert_close(snapshot(memory), snapshot(twin), **CLOSE)


# --------------------------------------------------------------------------------------------------- sparse optimizers
def train_pkm(layer, optimizers, steps=40):
    """-> losses, and the slots that were read"""
    torch.manual_seed(2)
    x = torch.randn(30, WIDTH)
    target = x.sin() @ torch.randn(WIDTH, WIDTH)
    losses, read = [], torch.zeros(layer.values.shape[0], dtype=torch.bool)
    for _ in range(steps):
        y, indices = layer(x, return_indices=True)
        loss = (y - target).square().mean()
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        for o in optimizers:
            o.step()
        losses.append(loss.item())
        read[indices.flatten().long()] = True
    return losses, read


def split(layer):
    """The tables with sparse gradients, and the other parameters"""
    tables = [p for n, p in layer.named_parameters() if n in ("values", "up_values", "initial_values")]
    return tables, [p for p in layer.parameters() if all(p is not t for t in tables)]


def make_pkm(peer, sparse_grad):
    torch.manual_seed(0)
    sizes = dict(key_dim=4, value_dim=8, heads=2, topk=2, num_sub_keys=16)
    return PKM(WIDTH, **sizes, peer=peer, sparse_grad=sparse_grad)


@pytest.mark.parametrize("peer", [False, True], ids=["values", "peer"])
def test_pkm_trains_with_sparse_adam(peer):
    layer = make_pkm(peer, sparse_grad=True)
    tables, rest = split(layer)
    assert len(tables) == 1 + peer
    before = [t.detach().clone() for t in tables]
    losses, read = train_pkm(layer, [torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)])
    assert all(t.grad.is_sparse for t in tables)
    assert losses[-1] < 0.7 * losses[0]
    assert read.any() and not read.all()
    for table, old in zip(tables, before, strict=True):
        assert torch.equal(table[~read], old[~read])
        assert (table[read] != old[read]).any(-1).float().mean() > 0.9


@pytest.mark.parametrize("peer", [False, True], ids=["values", "peer"])
def test_sparse_and_dense_gradients_train_the_same(peer):
    """With SGD, which moves no row without a gradient."""
    trained = []
    for sparse_grad in (False, True):
        layer = make_pkm(peer, sparse_grad)
        losses, _ = train_pkm(layer, [torch.optim.SGD(layer.parameters(), lr=0.05)])
        assert layer.values.grad.is_sparse == sparse_grad and losses[-1] < losses[0]
        trained.append([*layer.parameters()])
    torch.testing.assert_close(*trained, rtol=1e-4, atol=1e-6)


def train_learned(make_optimizers, sparse_grad, steps=30):
    """Every sequence starts from the learned memory: what a scan wrote is rolled back after the step."""
    layer, memory, hidden = make("learned", torch.float32, sparse_grad=sparse_grad)
    optimizers, target, losses = make_optimizers(layer), torch.randn(2, T, WIDTH), []
    for _ in range(steps):
        loss = (layer(hidden.detach(), memory) - target).square().mean()
        for o in optimizers:
            o.zero_grad()
        loss.backward()
        assert layer.initial_values.grad.is_sparse == sparse_grad
        for o in optimizers:
            o.step()
        memory.rollback()
        assert memory.values is layer.initial_values
        losses.append(loss.item())
    return layer, losses


def test_a_learned_initial_memory_trains_with_sparse_adam():
    def optimizers(layer):
        tables, rest = split(layer)
        return [torch.optim.SparseAdam(tables, lr=1e-2), torch.optim.AdamW(rest, lr=1e-2)]

    before = make("learned", torch.float32)[0]
    layer, losses = train_learned(optimizers, sparse_grad=True)
    assert losses[-1] < 0.8 * losses[0]
    assert not torch.equal(layer.initial_values, before.initial_values)
    assert not torch.equal(layer.initial_sub_keys, before.initial_sub_keys)


def test_a_learned_initial_memory_trains_the_same_with_sparse_and_dense_gradients():
    sgd = lambda layer: [torch.optim.SGD(layer.parameters(), lr=0.05)]
    (a, losses), (b, _) = (train_learned(sgd, sparse_grad) for sparse_grad in (True, False))
    assert losses[-1] < losses[0]
    torch.testing.assert_close([*a.parameters()], [*b.parameters()], rtol=1e-4, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- a whole training
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "train_bytes.py"


@pytest.mark.skipif(not EXAMPLE.is_file(), reason="the tests run away from the source tree")
def test_a_byte_model_learns_a_real_text():
    spec = importlib.util.spec_from_file_location("train_bytes", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    model = example.Model()
    assert len(model.fwpkm) == 2 and len(model.mlps) == 4 and sum(isinstance(m, PKM) for m in model.mlps) == 1
    memories = {i: layer.new_memory() for i, layer in model.fwpkm.items()}
    before = {i: snapshot(m) for i, m in memories.items()}
    slow = [p.detach().clone() for p in model.parameters()]
    steps = list(example.train(model, memories, 200, length=192))
    losses = torch.tensor([loss for loss, _ in steps])
    assert len(losses) == 200 and losses.isfinite().all()
    assert losses[-20:].mean() < 0.7 * losses[:20].mean()
    assert not any(torch.equal(a, b) for a, b in zip(slow, model.parameters(), strict=True)), "every weight learns"
    for i, memory in memories.items():
        memory_loss, gate = torch.tensor([layers[int(i)] for _, layers in steps]).unbind(1)
        assert memory_loss.isfinite().all() and (memory_loss > 0).all() and ((gate > 0) & (gate < 1)).all()
        assert memory_loss[-20:].mean() < 0.7 * memory_loss[0] and gate.std() > 0.01
        after = snapshot(memory)
        assert all(t.isfinite().all() for t in after) and not any(map(torch.equal, after, before[i]))


def test_no_warning_in_an_ordinary_step():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer, memory, hidden = make(dtype=torch.float32)
        layer(hidden, memory).sum().backward()
        memory.commit()
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()) as printed:
            layer.stream(hidden, memory, flush=True)
    assert isinstance(memory, Memory) and printed.getvalue() == ""
