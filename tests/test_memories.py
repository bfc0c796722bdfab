"""The memories of a model: what they begin with, kept sub-keys, forgetting, one file for all, streaming, one write."""

import copy
import inspect
import io
import json

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fwpkm_cuda
from fwpkm_cuda import PKM, FwMLP, FwPKM, Memories, Memory, MLPMemory

WIDTH = 6
SIZES = dict(key_dim=4, value_dim=3, topk=2, num_sub_keys=4, chunk_size=3)
MLP_SIZES = dict(key_dim=4, value_dim=3, hidden_units=5, chunk_size=3)
VALUES, SUB_KEYS = (16, 3), (1, 2, 4, 2)
ANY_ERROR = (RuntimeError, ValueError, TypeError, AttributeError)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work this small is slower when it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def fwpkm(**options):
    return FwPKM(WIDTH, **SIZES | dict(dtype=torch.float64) | options)


def fwmlp(**options):
    return FwMLP(WIDTH, **MLP_SIZES | dict(dtype=torch.float64, lr=0.5) | options)


LAYERS = {
    "pkm": fwpkm,
    "carry": lambda **o: fwpkm(boundary="carry", **o),
    "idw": lambda **o: fwpkm(score="idw", write_rule="release", heads=2, **o),
    "decay": lambda **o: fwpkm(weight_decay=0.1, lr=0.5, values_only=False, **o),
    "learned": lambda **o: fwpkm(learned_initial_memory=True, **o),
    "mlp": fwmlp,
}
KINDS = pytest.mark.parametrize("kind", ["pkm", "mlp"])
REENTRANT = pytest.mark.parametrize("reentrant", [False, True], ids=["non_reentrant", "reentrant"])


def hidden_states(T=8, B=2, dtype=torch.float64):
    return torch.randn(B, T, WIDTH, dtype=dtype)


def tokens(T=8, B=2, dtype=torch.float64):
    """query, target"""
    return torch.randn(B, T, 1, 4, dtype=dtype), torch.randn(B, T, 3, dtype=dtype)


def bits(memory):
    return [t.detach().clone() for t in memory.tensors.values()]


def all_bits(memories):
    return [t for memory in memories.values() for t in bits(memory)]


def same(a, b):
    return len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def addresses(memory):
    return [t.data_ptr() for t in memory.tensors.values()]


def write(layer, memory, hidden=None):
    """One step of a training loop."""
    layer(hidden_states(dtype=memory.dtype) if hidden is None else hidden, memory).sum().backward()
    memory.commit()
    return memory


@torch.no_grad()
def reading(layer, memory, hidden):
    """What a layer and a memory answer, all of it, with the memory that is left."""
    memory = memory.clone()
    return [layer.stream(hidden, memory, flush=True), *bits(memory)]


# ------------------------------------------------------------------------------------------------------ kept sub-keys
@pytest.mark.parametrize("heads", [1, 2])
def test_kept_sub_keys_are_a_buffer_in_the_state_dict(heads):
    layer = fwpkm(heads=heads)
    assert [name for name, _ in layer.named_buffers()] == ["sub_keys"]
    assert layer.state_dict()["sub_keys"].shape == (heads, 2, 4, 2) and not layer.sub_keys.requires_grad
    assert "sub_keys" not in dict(layer.named_parameters())


def test_new_layers_have_sub_keys_of_their_own_uniform_in_the_documented_range():
    a, b = (FwPKM(WIDTH, **SIZES | dict(num_sub_keys=64)).sub_keys for _ in range(2))
    assert not torch.equal(a, b) and a.abs().max() <= 0.5 and a.abs().max() > 0.48 and a.mean().abs() < 0.05


@pytest.mark.parametrize("T", [0, 1, 2, 3, 8])
@pytest.mark.parametrize(
    "options",
    [
        dict(), dict(addressing_weight=0.0), dict(values_only=False), dict(weight_decay=0.1), dict(heads=2),
        dict(gate="none"), dict(boundary="carry"), dict(chunk_size="all"), dict(score="idw", write_rule="release"),
    ],
    ids=str,
)  # fmt: skip
def test_every_commit_in_train_mode_leaves_the_memory_s_sub_keys_in_the_layer(options, T):
    layer = fwpkm(**options)
    memory = layer.new_memory(sub_keys="random", seed=1)
    first = memory.sub_keys.clone()
    assert not torch.equal(layer.sub_keys, first)
    for _ in range(3):
        before = layer.sub_keys.clone()
        layer(hidden_states(T), memory).sum().backward()
        assert torch.equal(layer.sub_keys, before), "before the commit"
        memory.commit()
        assert torch.equal(layer.sub_keys, memory.sub_keys)
        assert torch.equal(layer.state_dict()["sub_keys"], memory.sub_keys) and not layer.sub_keys.requires_grad
    assert torch.equal(memory.sub_keys, first) == ("addressing_weight" in options) or T < 8


def test_sub_keys_of_a_layer_and_its_memories_are_different_tensors():
    layer = fwpkm()
    first, second = layer.new_memory(), layer.new_memory()
    before = bits(second)
    write(layer, first)
    assert same(bits(second), before) and not torch.equal(first.sub_keys, second.sub_keys)
    write(layer.eval(), first)
    assert len({t.data_ptr() for t in (layer.sub_keys, first.sub_keys, second.sub_keys)}) == 3


def test_gradient_accumulation_keeps_what_each_forward_commits():
    layer, twin = fwpkm(), fwpkm()
    twin.load_state_dict(layer.state_dict())
    memory, other, batches = layer.new_memory(seed=0), twin.new_memory(seed=0), [hidden_states() for _ in range(3)]
    kept = []
    for hidden in batches:
        layer(hidden, memory).sum().backward()
        kept.append(layer.sub_keys.clone())
        assert torch.equal(layer.sub_keys, memory.sub_keys)
    memory.commit()
    kept.append(layer.sub_keys.clone())
    for hidden, before in zip(batches, kept):
        assert torch.equal(twin.sub_keys, before)
        write(twin, other, hidden)
    assert torch.equal(twin.sub_keys, kept[-1]) and len({tuple(k.flatten().tolist()) for k in kept}) == 4


@pytest.mark.parametrize("end", ["forward", "frozen", "stream", "flush", "clone", "save", "copy_from"])
def test_whatever_commits_a_scan_keeps_its_sub_keys(end, tmp_path):
    layer = fwpkm()
    memory, before = layer.new_memory(), layer.sub_keys.clone()
    expected = write(copy.deepcopy(layer), memory.clone(), hidden := hidden_states()).sub_keys
    layer(hidden, memory)
    with torch.no_grad():
        {
            "forward": lambda: layer(hidden_states(), memory),
            "frozen": lambda: layer(hidden_states(), memory.frozen()),
            "stream": lambda: layer.stream(hidden_states(), memory),
            "flush": memory.flush,
            "clone": memory.clone,
            "save": lambda: memory.save(tmp_path / "memory"),
            "copy_from": lambda: layer.new_memory().copy_(memory),
        }[end]()
    assert torch.equal(layer.sub_keys, before if end == "frozen" else expected)
    assert not torch.equal(before, expected)


@pytest.mark.parametrize("end", ["rollback", "reset", "forget", "copy_into"])
def test_whatever_drops_a_scan_keeps_nothing_of_it(end):
    layer = fwpkm()
    memory, before = layer.new_memory(), layer.sub_keys.clone()
    layer(hidden_states(), memory)
    {
        "rollback": memory.rollback,
        "reset": memory.reset,
        "forget": memory.forget,
        "copy_into": lambda: memory.copy_(layer.new_memory(sub_keys="random")),
    }[end]()
    memory.commit()
    assert torch.equal(layer.sub_keys, before)


@pytest.mark.parametrize("use", ["eval", "frozen", "stream", "streaming", "frozen_streaming"])
def test_sub_keys_of_a_layer_stay_when_it_is_only_used(use):
    layer = fwpkm().train(use != "eval")
    memory, before = layer.new_memory(sub_keys="random"), layer.sub_keys.clone()
    start = bits(memory)
    with torch.no_grad():
        for _ in range(2):
            {
                "eval": lambda: layer(hidden_states(), memory),
                "frozen": lambda: layer(hidden_states(), memory.frozen()),
                "stream": lambda: layer.stream(hidden_states(), memory, flush=True),
                "streaming": lambda: layer(hidden_states(), memory.streaming(flush=True)),
                "frozen_streaming": lambda: layer(hidden_states(), memory.frozen().streaming(flush=True)),
            }[use]()
            memory.commit()
    assert torch.equal(layer.sub_keys, before) and same(bits(memory), start) == ("frozen" in use)


def test_a_pending_scan_of_train_mode_is_kept_although_the_layer_is_in_eval_mode_by_then():
    layer = fwpkm()
    memory, validated = layer.new_memory(), layer.new_memory()
    layer(hidden_states(), memory)
    layer.eval()(hidden_states(), validated)
    validated.commit(), memory.commit()
    assert torch.equal(layer.sub_keys, memory.sub_keys) and not torch.equal(layer.sub_keys, validated.sub_keys)
    layer(hidden_states(), memory)
    layer.train()
    memory.commit()
    assert not torch.equal(layer.sub_keys, memory.sub_keys), "a scan of eval mode, committed in train mode"


def test_a_training_forward_without_gradients_moves_the_sub_keys_too():
    layer = fwpkm()
    memory, before = layer.new_memory(), layer.sub_keys.clone()
    with torch.no_grad():
        layer(hidden_states(), memory)
        memory.commit()
    assert torch.equal(layer.sub_keys, memory.sub_keys) and not torch.equal(layer.sub_keys, before)


def test_of_two_memories_the_last_commit_counts():
    layer = fwpkm()
    a, b = layer.new_memory(), layer.new_memory()
    layer(hidden_states(), a), layer(hidden_states(), b)
    b.commit(), a.commit()
    assert torch.equal(layer.sub_keys, a.sub_keys) and not torch.equal(a.sub_keys, b.sub_keys)


def test_a_memory_that_goes_through_two_layers_leaves_each_what_its_scan_wrote():
    first, second = fwpkm(), fwpkm()
    memory = first.new_memory()
    with torch.no_grad():
        first(hidden_states(), memory)
        second(hidden_states(), memory)
        between = memory.sub_keys.clone()
        memory.commit()
    assert torch.equal(first.sub_keys, between) and torch.equal(second.sub_keys, memory.sub_keys)


def test_read_passes_keep_the_sub_keys_of_the_last_pass():
    layer = fwpkm()
    memory = layer.new_memory()
    layer(hidden_states(6), memory, read_passes=3).sum().backward()
    memory.commit()
    assert torch.equal(layer.sub_keys, memory.sub_keys)


def test_new_memories_begin_with_the_trained_sub_keys():
    layer = fwpkm()
    before = layer.sub_keys.clone()
    memory = write(layer, layer.new_memory(seed=0))
    for new in (layer.new_memory(), layer.new_memory(seed=5), layer.new_memory(values="zeros")):
        assert torch.equal(new.sub_keys, memory.sub_keys) and not torch.equal(new.sub_keys, before)
    assert not layer.new_memory(values="zeros").values.any()
    assert torch.equal(layer.new_memory(seed=5).values, layer.new_memory(seed=5).values)
    assert not torch.equal(layer.new_memory(seed=5).values, layer.new_memory(seed=6).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loaded_checkpoint_reads_with_the_same_bits(dtype):
    layer, other, file = fwpkm(dtype=dtype), fwpkm(dtype=dtype), io.BytesIO()
    write(layer, layer.new_memory(seed=0))
    torch.save(layer.state_dict(), file)
    file.seek(0)
    hidden = hidden_states(dtype=dtype)
    expected = reading(layer, layer.new_memory(seed=3), hidden)
    assert not same(reading(other, other.new_memory(seed=3), hidden), expected)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(reading(other, other.new_memory(seed=3), hidden), expected)
    empty = [reading(x, x.new_memory(values="zeros"), hidden) for x in (layer, other)]
    assert same(*empty) and not same(empty[0], expected)


def test_a_state_dict_may_be_assigned():
    layer, other = fwpkm(), fwpkm()
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    assert torch.equal(layer.sub_keys, other.sub_keys)
    memory = write(other, other.new_memory())
    assert torch.equal(other.sub_keys, memory.sub_keys) and not torch.equal(layer.sub_keys, memory.sub_keys)


def test_without_kept_sub_keys_they_are_drawn_anew():
    layer = fwpkm(keep_sub_keys=False)
    assert not [*layer.buffers()] and "sub_keys" not in layer.state_dict()
    memory = write(layer, layer.new_memory(seed=1))
    assert same(bits(layer.new_memory(seed=1)), bits(Memory.random(4, 4, 3, seed=1, dtype=torch.float64)))
    other = layer.new_memory(seed=2)
    assert not torch.equal(other.sub_keys, layer.new_memory(seed=1).sub_keys)
    assert not torch.equal(other.sub_keys, memory.sub_keys)
    torch.manual_seed(0)
    drawn = layer.new_memory()
    torch.manual_seed(0)
    assert same(bits(drawn), bits(layer.new_memory()))


@pytest.mark.parametrize("keep", [True, False])
def test_with_a_learned_initial_memory_the_parameters_are_what_is_kept(keep):
    layer = fwpkm(learned_initial_memory=True, keep_sub_keys=keep)
    assert not [*layer.buffers()] and "sub_keys" not in layer.state_dict()
    before = layer.initial_sub_keys.detach().clone()
    memory = write(layer, layer.new_memory())
    assert torch.equal(layer.initial_sub_keys, before) and not torch.equal(memory.sub_keys, before)


@pytest.mark.parametrize("to", ["bfloat16", "half", "float", "double"])
def test_kept_sub_keys_stay_at_least_float32(to):
    layer = fwpkm(dtype=torch.float32)
    memory = write(layer, layer.new_memory())
    layer = getattr(layer, to)()
    expected = torch.float64 if to == "double" else torch.float32
    assert layer.sub_keys.dtype == expected and torch.equal(layer.sub_keys, memory.sub_keys.to(expected))
    new = layer.new_memory()
    assert new.dtype == expected and torch.equal(new.sub_keys, layer.sub_keys)
    write(layer, new, hidden_states(dtype=layer.query_proj.weight.dtype))
    assert torch.equal(layer.sub_keys, new.sub_keys) and not torch.equal(new.sub_keys, memory.sub_keys.to(expected))


def test_a_deep_copy_has_its_own_sub_keys():
    layer = fwpkm()
    memory = layer.new_memory()
    layer(hidden_states(), memory).sum().backward()
    twin = copy.deepcopy(layer)
    before = twin.sub_keys.clone()
    memory.commit()
    assert torch.equal(twin.sub_keys, before) and not torch.equal(layer.sub_keys, before)
    kept = layer.sub_keys.clone()
    other = write(twin, twin.new_memory())
    assert torch.equal(twin.sub_keys, other.sub_keys) and torch.equal(layer.sub_keys, kept)


def test_a_layer_on_the_meta_device_gets_its_sub_keys_from_a_checkpoint():
    layer, empty = fwpkm(), fwpkm(device="meta")
    write(layer, layer.new_memory())
    assert empty.sub_keys.is_meta and empty.sub_keys.shape == SUB_KEYS
    empty.to_empty(device="cpu").load_state_dict(layer.state_dict())
    hidden = hidden_states()
    expected = reading(layer, layer.new_memory(seed=0), hidden)
    assert same(reading(empty, empty.new_memory(seed=0), hidden), expected)
    memory = write(empty, empty.new_memory())
    assert torch.equal(empty.sub_keys, memory.sub_keys)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_compiled_layer_keeps_its_sub_keys(backend):
    torch._dynamo.reset()
    layer = fwpkm(dtype=torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    memory = layer.new_memory()
    for _ in range(3):
        before = layer.sub_keys.clone()
        compiled(hidden_states(dtype=torch.float32), memory).sum().backward()
        assert torch.equal(layer.sub_keys, before)
        memory.commit()
        assert torch.equal(layer.sub_keys, memory.sub_keys) and not torch.equal(layer.sub_keys, before)
    layer.eval()
    kept = layer.sub_keys.clone()
    compiled(hidden_states(dtype=torch.float32), memory)
    memory.commit()
    assert torch.equal(layer.sub_keys, kept) and not torch.equal(memory.sub_keys, kept)
    layer.train()
    compiled(hidden_states(dtype=torch.float32), memory)
    memory.rollback()
    assert torch.equal(layer.sub_keys, kept)


@REENTRANT
def test_a_checkpointed_layer_keeps_its_sub_keys(reentrant):
    layer, plain = fwpkm(), fwpkm()
    plain.load_state_dict(layer.state_dict())
    memory, other = layer.new_memory(seed=0), plain.new_memory(seed=0)
    for _ in range(3):
        hidden, before = hidden_states().requires_grad_(), layer.sub_keys.clone()
        checkpoint(layer, hidden, memory, use_reentrant=reentrant).sum().backward()
        assert torch.equal(layer.sub_keys, before), "the repeated forward writes nothing"
        memory.commit()
        write(plain, other, hidden.detach())
        assert torch.equal(layer.sub_keys, memory.sub_keys) and torch.equal(layer.sub_keys, plain.sub_keys)
    checkpoint(layer, hidden, memory, use_reentrant=reentrant).sum().backward()
    memory.rollback()
    assert torch.equal(layer.sub_keys, plain.sub_keys)


@pytest.mark.parametrize(
    "memory", [lambda: Memory.random(4, 4, 3), lambda: MLPMemory.random(4, 3, 5)], ids=KINDS.args[1]
)
@torch.no_grad()
def test_scan_keeps_any_tensor_of_the_memory_by_its_name(memory):
    memory = memory()
    query, target = tokens(dtype=torch.float32)
    query, options = (query, dict(topk=2)) if "values" in memory.tensors else (query.flatten(2), {})
    keep = {name: torch.zeros_like(t) for name, t in memory.tensors.items()}
    memory.scan(query, target, chunk_size=3, keep=keep, **options)
    assert not any(t.any() for t in keep.values())
    memory.commit()
    assert same([*keep.values()], bits(memory))
    kept = bits(memory)
    memory.frozen().scan(query, target, chunk_size=3, keep=keep, **options)
    memory.scan(query, target, chunk_size=3, **options)
    memory.commit()
    assert same([*keep.values()], kept) and not same(bits(memory), kept)


@pytest.mark.parametrize(
    "keep", [dict(keys=torch.zeros(SUB_KEYS)), dict(sub_keys=torch.zeros(2, 2))], ids=["name", "shape"]
)
@torch.no_grad()
def test_a_wrong_keep_is_refused_before_anything_is_written(keep):
    memory = Memory.random(4, 4, 3, seed=0)
    before = bits(memory)
    with pytest.raises(ANY_ERROR, match="keep"):
        memory.scan(*tokens(dtype=torch.float32), topk=2, chunk_size=3, keep=keep)
    memory.commit()
    assert same(bits(memory), before)


# -------------------------------------------------------------------------------------------- what a memory begins with
def test_values_may_be_zeros_random_or_a_tensor():
    layer, given = fwpkm(), torch.randn(VALUES, dtype=torch.float64)
    assert not layer.new_memory(values="zeros").values.any()
    random = layer.new_memory(seed=3).values
    assert torch.equal(random, layer.new_memory(values="random", seed=3).values)
    assert torch.equal(random, Memory.random(4, 4, 3, seed=3, dtype=torch.float64).values)
    assert torch.equal(layer.new_memory(values=given).values, given)


@pytest.mark.parametrize(
    "make", [fwpkm().new_memory, lambda **o: Memory.random(4, 4, 3, dtype=torch.float64, **o)], ids=["layer", "random"]
)
def test_given_tensors_are_copied(make):
    values = torch.randn(VALUES, dtype=torch.float64).requires_grad_()
    sub_keys = torch.randn(SUB_KEYS[::-1], dtype=torch.float64).permute(3, 2, 1, 0)
    before = [values.detach().clone(), sub_keys.clone()]
    memory = make(values=values, sub_keys=sub_keys)
    assert same(bits(memory), before) and not any(t.requires_grad for t in memory.tensors.values())
    with torch.no_grad():
        values.zero_(), sub_keys.zero_()
    assert same(bits(memory), before)
    write(fwpkm(), memory)
    assert not values.any() and not sub_keys.any() and same(bits(memory.reset()), before)


@pytest.mark.parametrize("name, shape", [("values", VALUES), ("sub_keys", SUB_KEYS)])
def test_an_array_is_no_start(name, shape):
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        fwpkm().new_memory(**{name: torch.zeros(shape).numpy()})


def test_sub_keys_may_be_random_or_a_tensor_in_place_of_the_layer_s():
    layer, given = fwpkm(), torch.randn(SUB_KEYS, dtype=torch.float64)
    assert torch.equal(layer.new_memory(sub_keys=given).sub_keys, given)
    assert same(
        bits(layer.new_memory(sub_keys="random", seed=4)), bits(Memory.random(4, 4, 3, seed=4, dtype=torch.float64))
    )
    assert torch.equal(layer.new_memory(sub_keys=given, seed=4).values, layer.new_memory(seed=4).values)


@pytest.mark.parametrize("name, shape", [("values", VALUES), ("sub_keys", SUB_KEYS)])
@pytest.mark.parametrize(
    "wrong", ["longer", "transposed", "flat", "scalar", "zero", "Random", "", "kept", 3, 0.0, True, [1.0]], ids=str
)
def test_a_wrong_start_names_its_argument(name, shape, wrong):
    t = torch.zeros(shape)
    tensors = dict(longer=t.repeat_interleave(2, 0), transposed=t.mT.contiguous(), flat=t.flatten(), scalar=t.sum())
    start = tensors.get(wrong, wrong) if isinstance(wrong, str) else wrong
    if wrong == "transposed" and name == "sub_keys":
        start = t.permute(1, 0, 2, 3)
    for make in (fwpkm().new_memory, fwpkm(keep_sub_keys=False).new_memory, lambda **o: Memory.random(4, 4, 3, **o)):
        with pytest.raises(ValueError, match=f"^{name}: "):
            make(**{name: start})


@pytest.mark.parametrize(
    "start", [dict(values="zeros"), dict(sub_keys="random"), dict(seed=0), dict(dtype=torch.float32)], ids=str
)
def test_nothing_else_can_be_asked_of_a_learned_initial_memory(start):
    layer = fwpkm(learned_initial_memory=True)
    with pytest.raises(ValueError, match=next(iter(start))):
        layer.new_memory(**start)


# ---------------------------------------------------------------------------------------------------- forget and reset
def given_values():
    return fwpkm().new_memory(values=torch.randn(VALUES, dtype=torch.float64), seed=1)


STARTS = {
    "random": lambda: Memory.random(4, 4, 3, seed=1, dtype=torch.float64),
    "random_without_a_seed": lambda: Memory.random(4, 4, 3, dtype=torch.float64),
    "random_float32": lambda: Memory.random(4, 4, 3, seed=1),
    "zeros": lambda: Memory.random(4, 4, 3, values="zeros", seed=1, dtype=torch.float64),
    "kept": lambda: fwpkm().new_memory(seed=1),
    "kept_zeros": lambda: fwpkm().new_memory(values="zeros"),
    "given_values": given_values,
    "given_sub_keys": lambda: fwpkm().new_memory(sub_keys=torch.randn(SUB_KEYS, dtype=torch.float64)),
    "given_float32": lambda: fwpkm(dtype=torch.float32).new_memory(values=torch.randn(VALUES)),
    "all_given": lambda: fwpkm().new_memory(
        values=torch.randn(VALUES, dtype=torch.float64), sub_keys=torch.randn(SUB_KEYS, dtype=torch.float64)
    ),
    "mlp": lambda: MLPMemory.random(4, 3, 5, seed=1, dtype=torch.float64),
}  # fmt: skip
STARTS_OF_ALL = pytest.mark.parametrize("start", STARTS)


def layer_for(memory):
    return (fwpkm if "values" in memory.tensors else fwmlp)(dtype=memory.dtype)


def through_a_file(memory, path):
    memory.save(path)
    return type(memory).load(path)


def twice_through_a_file(memory, path):
    return through_a_file(through_a_file(memory, path), path)


PATHS = {
    "itself": lambda memory, path: memory,
    "clone": lambda memory, path: memory.clone(),
    "deepcopy": lambda memory, path: copy.deepcopy(memory),
    "file": through_a_file,
    "clone_of_a_file": lambda memory, path: through_a_file(memory, path).clone(),
    "two_files": twice_through_a_file,
}


@STARTS_OF_ALL
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["reset", "forget"])
def test_a_memory_is_as_on_the_day_it_was_made(method, path, start, tmp_path):
    memory = STARTS[start]()
    layer, first = layer_for(memory), dict(zip(memory.tensors, bits(memory)))
    write(layer, memory)
    memory = PATHS[path](memory, tmp_path / "memory")
    for _ in range(2):
        write(layer, memory)
        written, places = dict(zip(memory.tensors, bits(memory))), addresses(memory)
        assert not any(torch.equal(first[name], written[name]) for name in first)
        assert getattr(memory, method)() in (None, memory)
        if method == "forget" and "values" in first:
            assert torch.equal(memory.values, first["values"]) and torch.equal(memory.sub_keys, written["sub_keys"])
        else:
            assert same(bits(memory), [*first.values()])
        assert addresses(memory) == places


@STARTS_OF_ALL
@pytest.mark.parametrize("method", ["reset", "forget"])
def test_forgetting_drops_what_is_pending(method, start):
    memory = STARTS[start]()
    layer, hidden = layer_for(memory), hidden_states(dtype=memory.dtype)
    first = bits(memory)
    layer(hidden, memory)
    getattr(memory, method)()
    assert memory.pending is None and same(bits(memory), first)
    with torch.no_grad():
        layer.stream(hidden[:, :2], memory)
        assert memory.pending_tokens == 2
        getattr(memory, method)()
        assert memory.pending_tokens == 0 and memory.flush() is None and same(bits(memory), first)
        layer.stream(hidden[:, :2], memory, chunk_size=5), getattr(memory, method)()
        layer.stream(hidden, memory, chunk_size=4)


@pytest.mark.parametrize("method", ["reset", "forget"])
def test_forgetting_drops_the_tail_of_a_carried_stream(method):
    layer, hidden = fwpkm(boundary="carry", lookahead=2), hidden_states()
    memory, fresh = layer.new_memory(seed=0), layer.new_memory(seed=0)
    with torch.no_grad():
        layer.stream(hidden[:, :6], memory)
    getattr(memory, method)()
    fresh = fresh if method == "reset" else layer.new_memory(seed=0, sub_keys=memory.sub_keys)
    assert same(reading(layer, memory, hidden), reading(layer, fresh, hidden))


@STARTS_OF_ALL
@pytest.mark.parametrize("method", ["reset", "forget"])
def test_a_frozen_view_is_not_forgotten_and_sees_that_its_memory_is(method, start):
    memory = STARTS[start]()
    frozen = memory.frozen()
    write(layer_for(memory), memory)
    written = bits(memory)
    with pytest.raises(RuntimeError, match="frozen"):
        getattr(frozen, method)()
    assert same(bits(memory), written)
    getattr(memory, method)()
    assert same(bits(frozen), bits(memory)) and not same(bits(frozen), written)


@pytest.mark.parametrize("method", ["reset", "forget"])
@pytest.mark.parametrize("path", PATHS)
@KINDS
def test_a_memory_of_given_tensors_has_no_first_day(kind, path, method, tmp_path):
    kept = STARTS["random" if kind == "pkm" else "mlp"]()
    memory = PATHS[path](type(kept)(*kept.tensors.values()), tmp_path / "memory")
    layer = layer_for(memory)
    with torch.no_grad():
        layer.stream(hidden_states(2), memory)
    written = bits(memory)
    with pytest.raises(RuntimeError, match=method):
        getattr(memory, method)()
    assert same(bits(memory), written) and memory.pending_tokens == 2, "refused, and untouched"


def test_reset_goes_back_to_the_sub_keys_of_the_first_day_and_not_to_the_layer_s():
    layer = fwpkm()
    memory = layer.new_memory(seed=0)
    first = bits(memory)
    write(layer, memory), write(layer, memory)
    assert same(bits(memory.reset()), first) and not torch.equal(layer.sub_keys, memory.sub_keys)


@pytest.mark.parametrize("method", ["reset", "forget"])
def test_a_memory_that_became_a_copy_of_another_still_has_its_own_first_day(method):
    layer = fwpkm()
    memory, other = layer.new_memory(values="zeros"), layer.new_memory(sub_keys="random")
    first = bits(memory)
    getattr(memory.copy_(write(layer, other)), method)()
    assert same(bits(memory), first if method == "reset" else [first[0], other.sub_keys])


@pytest.mark.parametrize("method", ["reset", "forget"])
def test_a_learned_memory_from_a_file_belongs_to_no_layer(tmp_path, method):
    layer = fwpkm(learned_initial_memory=True)
    memory = through_a_file(write(layer, layer.new_memory()), tmp_path / "memory")
    with pytest.raises(RuntimeError, match=method):
        getattr(memory, method)()


def test_reset_after_forget_is_the_first_day():
    layer = fwpkm()
    memory = layer.new_memory(values="zeros")
    first = bits(memory)
    write(layer, memory), memory.forget(), write(layer, memory)
    assert same(bits(memory.reset()), first)


def test_a_forgetful_memory_learns_like_a_new_one_with_its_sub_keys():
    layer, hidden = fwpkm(), hidden_states()
    memory = write(layer, layer.new_memory(values="zeros"))
    memory.forget()
    assert same(reading(layer, memory, hidden), reading(layer, layer.new_memory(values="zeros"), hidden))


def test_forgetting_leaves_torch_s_generator_alone():
    memory = write(fwpkm(), Memory.random(4, 4, 3, dtype=torch.float64))
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    memory.reset(), memory.forget()
    assert torch.equal(torch.rand(3), expected)


def test_a_backward_pass_through_what_was_forgotten_is_autograd_s_error():
    layer = fwpkm()
    memory = layer.new_memory()
    y = layer(hidden_states(), memory)
    memory.forget()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("written_by", ["commit", "stream", "nothing"])
def test_a_learned_memory_forgets_back_to_the_parameters(written_by):
    layer = fwpkm(learned_initial_memory=True, sparse_grad=False)
    memory, parameters = layer.new_memory(), [p.detach().clone() for p in layer.parameters()]
    if written_by == "commit":
        write(layer, memory)
    elif written_by == "stream":
        with torch.no_grad():
            layer.stream(hidden_states(7), memory)
    written = bits(memory)
    memory.forget()
    assert (
        memory.values is layer.initial_values and torch.equal(memory.sub_keys, written[1]) and not memory.pending_tokens
    )
    assert torch.equal(memory.sub_keys, layer.initial_sub_keys) == (written_by == "nothing")
    layer.zero_grad()
    write(layer, memory)
    assert layer.initial_values.grad.any()
    assert (layer.initial_sub_keys.grad is not None) == (written_by == "nothing")
    assert memory.values is not layer.initial_values
    assert same([p.detach() for p in layer.parameters()], parameters), "written into a copy"
    memory.reset()
    assert memory.values is layer.initial_values and memory.sub_keys is layer.initial_sub_keys


def test_a_learned_memory_forgets_back_to_parameters_that_were_trained_meanwhile():
    layer = fwpkm(learned_initial_memory=True, sparse_grad=False)
    memory = write(layer, layer.new_memory())
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    memory.forget()
    new = layer.new_memory()
    assert torch.equal(memory.values, new.values)


def test_a_frozen_view_of_a_learned_memory_sees_that_it_forgot():
    layer = fwpkm(learned_initial_memory=True)
    memory = write(layer, layer.new_memory())
    frozen = memory.frozen()
    memory.forget()
    assert frozen.values is memory.values and frozen.sub_keys is memory.sub_keys


@pytest.mark.parametrize("seed", [None, 7])
def test_an_mlp_forgets_by_a_reset(seed):
    memory = MLPMemory.random(4, 3, 5, seed=seed, dtype=torch.float64)
    first = bits(memory)
    for method in (memory.reset, memory.forget):
        write(fwmlp(), memory)
        assert not any(torch.equal(a, b) for a, b in zip(bits(memory), first))
        method()
        assert same(bits(memory), first)


# ---------------------------------------------------------------------------------------------- the memories of a model
class Model(nn.Module):
    """Layers in a row; each takes the memory of its name."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, hidden, memories, mask=None):
        for name, layer in self.layers.items():
            hidden = hidden + layer(hidden, memories[f"layers.{name}"], mask)
        return hidden


def mixed(dtype=torch.float64):
    return Model(first=fwpkm(dtype=dtype), second=fwmlp(dtype=dtype), third=fwpkm(heads=2, dtype=dtype))


NAMES = ["layers.first", "layers.second", "layers.third"]


def train_step(model, memories, hidden=None):
    model(hidden_states() if hidden is None else hidden, memories).sum().backward()
    memories.commit()


def test_a_model_s_memories_have_its_modules_names_in_their_order():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), mixed(), nn.ModuleDict(dict(z=fwpkm(), a=fwmlp())), fwpkm())
    memories = Memories.of(model)
    assert [*memories] == [*(f"1.{name}" for name in NAMES), "2.z", "2.a", "3"]
    assert [type(m) for m in memories.values()] == [Memory, MLPMemory, Memory, Memory, MLPMemory, Memory]
    for name, memory in memories.items():
        layer = model.get_submodule(name)
        assert [t.shape for t in memory.tensors.values()] == [t.shape for t in layer.new_memory().tensors.values()]
        assert not isinstance(layer, FwPKM) or torch.equal(memory.sub_keys, layer.sub_keys)
    assert [*Memories.of(fwpkm())] == [""] and not Memories.of(nn.Linear(2, 2))


def test_a_shared_layer_has_one_memory():
    layer = fwpkm()
    model = Model(a=layer, b=fwmlp(), c=layer)
    memories = Memories.of(model, seed=5)
    assert (
        [*memories] == ["layers.a", "layers.b"] == [n for n, m in model.named_modules() if isinstance(m, FwPKM | FwMLP)]
    )
    assert same(bits(memories["layers.b"]), bits(fwmlp().new_memory(seed=6)))


def test_each_layer_has_the_next_seed():
    model = mixed()
    memories = Memories.of(model, seed=5)
    for i, (name, memory) in enumerate(memories.items()):
        assert same(bits(memory), bits(model.get_submodule(name).new_memory(seed=5 + i)))
    assert same(all_bits(Memories.of(model, seed=5)), all_bits(memories))
    assert not same(all_bits(Memories.of(model, seed=6)), all_bits(memories))


def test_without_a_seed_torch_s_generator_gives_them():
    model = mixed()
    torch.manual_seed(3)
    memories = Memories.of(model)
    torch.manual_seed(3)
    assert same(all_bits(Memories.of(model)), all_bits(memories))
    assert not same(all_bits(Memories.of(model)), all_bits(memories))
    two = Memories.of(Model(a=fwpkm(), b=fwpkm()))
    assert not torch.equal(two["layers.a"].values, two["layers.b"].values)


def test_a_start_is_for_the_product_key_memories_and_sizes_are_for_all():
    model = Model(a=fwpkm(), b=fwmlp(), c=fwpkm())
    memories = Memories.of(model, values="zeros", dtype=torch.float32, device="cpu")
    assert {m.dtype for m in memories.values()} == {torch.float32}
    for name in ("layers.a", "layers.c"):
        assert not memories[name].values.any() and memories[name].sub_keys.any()
    assert all(memories["layers.b"].tensors[n].any() for n in ("w_up", "w_gate", "w_down"))


@pytest.mark.parametrize("layer", [fwpkm, fwmlp])
def test_a_start_that_no_layer_knows_is_refused(layer):
    with pytest.raises(TypeError, match="valeus"):
        Memories.of(Model(a=layer()), valeus="zeros")


@pytest.mark.parametrize("start", [dict(values="zero"), dict(values=torch.zeros(3, 3))], ids=str)
def test_a_wrong_start_for_a_model_names_its_argument(start):
    with pytest.raises(ValueError, match=next(iter(start))):
        Memories.of(mixed(), **start)


def test_memories_are_a_mapping():
    given = {"a": Memory.random(4, 4, 3), "b": MLPMemory.random(4, 3, 5)}
    memories = Memories(given)
    assert len(memories) == 2 and [*memories] == ["a", "b"] == [*memories.keys()]
    assert all(memories[name] is memory for name, memory in given.items())
    assert dict(**memories) == given and [*memories.items()] == [*given.items()]
    assert "a" in memories and "c" not in memories and memories.get("c") is None
    with pytest.raises(KeyError, match="c"):
        memories["c"]
    del given["a"]
    assert len(memories) == 2, "a mapping of its own"
    assert "a" in repr(memories) and "MLPMemory" in repr(memories)
    with pytest.raises(TypeError, match="b"):
        Memories({"a": memories["a"], "b": 3})


def test_memories_belong_to_no_module():
    model = mixed()
    model.memories = Memories.of(model)
    assert "memories" not in dict(model.named_modules()) and not any("memories" in name for name in model.state_dict())


def test_what_is_done_to_memories_is_done_to_each():
    model, hidden = mixed(), hidden_states()
    memories, twins = Memories.of(model, seed=0), Memories.of(model, seed=0)
    first = all_bits(memories)
    model(hidden, memories)
    assert all(m.pending is not None for m in memories.values())
    memories.rollback()
    assert all(m.pending is None for m in memories.values()) and same(all_bits(memories), first)
    model(hidden, memories), model(hidden, twins)
    memories.commit()
    for twin in twins.values():
        twin.commit()
    assert same(all_bits(memories), all_bits(twins))
    assert not any(torch.equal(a, b) for a, b in zip(all_bits(memories), first))
    with torch.no_grad():
        model(hidden, memories.streaming()), model(hidden, twins.streaming())
        assert {m.pending_tokens for m in memories.values()} == {2}
        memories.flush()
        for twin in twins.values():
            twin.flush()
    assert same(all_bits(memories), all_bits(twins)) and not any(m.pending_tokens for m in memories.values())
    sub_keys = memories["layers.third"].sub_keys.clone()
    memories.forget()
    assert torch.equal(memories["layers.third"].values, first[-2]) and torch.equal(
        memories["layers.third"].sub_keys, sub_keys
    )
    memories.reset()
    assert same(all_bits(memories), first)


def test_a_step_of_a_model_keeps_the_sub_keys_of_every_layer():
    model = mixed()
    memories = Memories.of(model)
    train_step(model, memories)
    for name in ("first", "third"):
        assert torch.equal(model.layers[name].sub_keys, memories[f"layers.{name}"].sub_keys)
    assert torch.equal(Memories.of(model)["layers.third"].sub_keys, memories["layers.third"].sub_keys)


def test_frozen_memories_are_read_and_never_written():
    model, hidden = mixed(), hidden_states()
    memories = Memories.of(model)
    before, frozen = all_bits(memories), memories.frozen()
    assert isinstance(frozen, Memories) and [*frozen] == NAMES
    y = model(hidden, frozen)
    y.sum().backward()
    frozen.commit()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model(hidden, frozen.streaming())
        model(hidden, memories.frozen().streaming(chunk_size="all"))
    for method in (frozen.reset, frozen.forget, lambda: frozen.copy_(memories)):
        with pytest.raises(RuntimeError, match="frozen"):
            method()
    assert same(all_bits(memories), before) and all(m.pending is None for m in memories.values())
    train_step(model, memories)
    assert same(all_bits(frozen), all_bits(memories)), "a view"
    assert not torch.equal(model(hidden, frozen), y)


def test_clones_are_independent_and_take_the_pending_tokens_along():
    model, hidden = mixed(), hidden_states()
    memories = Memories.of(model)
    with torch.no_grad():
        model(hidden[:, :2], memories.streaming())
        clones = memories.clone()
        assert [*clones] == NAMES and {m.pending_tokens for m in clones.values()} == {2}
        before = all_bits(memories)
        y = model(hidden[:, 2:], clones.streaming(flush=True))
        assert same(all_bits(memories), before) and not same(all_bits(clones), before)
        assert torch.equal(model(hidden[:, 2:], memories.streaming(flush=True)), y)
    assert same(all_bits(clones), all_bits(memories))
    assert {m.device.type for m in memories.clone(device="cpu").values()} == {"cpu"}


def test_memories_become_copies_in_the_same_tensors():
    model, hidden = mixed(), hidden_states()
    memories, others = Memories.of(model, seed=0), Memories.of(model, seed=50)
    places = [addresses(m) for m in memories.values()]
    with torch.no_grad():
        model(hidden[:, :2], others.streaming())
    model(hidden, memories)
    memories.copy_(others)
    assert same(all_bits(memories), all_bits(others)) and places == [addresses(m) for m in memories.values()]
    assert {m.pending_tokens for m in memories.values()} == {2} and all(m.pending is None for m in memories.values())
    memories.copy_(Memories({name: others[name] for name in reversed(NAMES)}))
    assert same(all_bits(memories), all_bits(others)), "by name"


@pytest.mark.parametrize("others", ["fewer", "more", "renamed", "other_shapes", "other_kind"])
def test_memories_of_another_model_are_not_copied(others):
    model = mixed()
    memories, other = Memories.of(model, seed=0), dict(Memories.of(model, seed=9))
    before = all_bits(memories)
    if others == "fewer":
        del other["layers.third"]
    elif others == "more":
        other["fourth"] = Memory.random(4, 4, 3)
    elif others == "renamed":
        other = dict(zip(["layers.first", "layers.second", "third"], other.values()))
    else:
        other["layers.third"] = Memory.random(5, 4, 3) if others == "other_shapes" else MLPMemory.random(4, 3, 5)
    with pytest.raises((ValueError, TypeError)):
        memories.copy_(Memories(other))
    assert same(all_bits(memories), before), "none of them"


@pytest.mark.parametrize("method", ["reset", "forget"])
def test_memories_one_of_which_was_given_are_refused_as_a_whole(method):
    model = Model(a=fwpkm(), b=fwpkm())
    start = Memories.of(model, seed=0)
    memories = Memories({"layers.a": start["layers.a"], "layers.b": Memory(*bits(start["layers.b"]))})
    train_step(model, memories)
    written = all_bits(memories)
    with pytest.raises(RuntimeError, match=method):
        getattr(memories, method)()
    assert same(all_bits(memories), written), "none of them"


def test_usage_of_the_product_key_memories():
    model = mixed()
    memories, details, hidden = Memories.of(model), {}, hidden_states()
    for name, memory in memories.items():
        _, details[name] = model.get_submodule(name)(hidden, memory, return_details=True)
    found = memories.usage(details)
    assert [*found] == ["layers.first", "layers.third"]
    for name, usage in found.items():
        assert usage == fwpkm_cuda.usage(details[name].indices, 16)
    assert memories.usage({name: details[name] for name in found}) == found, "an MLP has no slots"


def test_usage_of_a_call_that_used_one_of_the_layers():
    model = mixed()
    memories = Memories.of(model)
    _, details = model.layers["third"](hidden_states(), memories["layers.third"], return_details=True)
    assert memories.usage({"layers.third": details}) == {"layers.third": fwpkm_cuda.usage(details.indices, 16)}


# ----------------------------------------------------------------------------------------------------------- one file
def saved_and_loaded(memories, path):
    memories.save(path)
    loaded = Memories.load(path)
    assert isinstance(loaded, Memories) and [*loaded] == [*memories]
    assert [type(m) for m in loaded.values()] == [type(m) for m in memories.values()]
    return loaded


@pytest.mark.parametrize("T", [0, 1, 3, 5])
@pytest.mark.parametrize("chunk_size", [None, 4, "all"])
@torch.no_grad()
def test_memories_from_a_file_go_on_with_the_same_bits(tmp_path, T, chunk_size):
    model, hidden = mixed(), hidden_states()
    model.layers["carry"] = LAYERS["carry"]()
    memories = Memories.of(model)
    model(hidden[:, :T], memories.streaming(chunk_size=chunk_size))
    loaded = saved_and_loaded(memories, tmp_path / "memories")
    assert same(all_bits(loaded), all_bits(memories))
    assert [m.pending_tokens for m in loaded.values()] == [m.pending_tokens for m in memories.values()]
    y = [model(hidden[:, T:], m.streaming(chunk_size=chunk_size)) for m in (memories, loaded)]
    memories.flush(), loaded.flush()
    assert torch.equal(*y) and same(all_bits(loaded), all_bits(memories))


@torch.no_grad()
def test_pending_scans_are_saved_as_committed_and_kept(tmp_path):
    model = mixed()
    memories = Memories.of(model)
    model(hidden_states(), memories)
    loaded = saved_and_loaded(memories, tmp_path / "memories")
    assert same(all_bits(loaded), all_bits(memories)) and all(m.pending is None for m in memories.values())
    assert torch.equal(model.layers["third"].sub_keys, loaded["layers.third"].sub_keys)


@pytest.mark.parametrize("method", ["reset", "forget"])
def test_memories_from_a_file_know_their_first_day(tmp_path, method):
    model = mixed()
    memories = Memories.of(model, values="zeros")
    train_step(model, memories)
    loaded = saved_and_loaded(memories, tmp_path / "memories")
    getattr(memories, method)(), getattr(loaded, method)()
    assert same(all_bits(loaded), all_bits(memories)) and not loaded["layers.first"].values.any()


NAMES_OF_FILES = [
    "a", "a.values", "a.b", "values", "sub_keys", "a.0", "0", "1", "10", "01", "00", "1.0", "", ".", "..", "a.", ".a",
    "A", "a/b", "a b", "块", "слой.1", "\u00e9", "e\u0301", "🧠", '"', "\\", "\n", "__metadata__", "state", "b",
    "b.a.values", "pending.0", '"sha256":"', "start.values",
]  # fmt: skip


def test_names_in_a_file_may_be_any(tmp_path):
    assert len({*NAMES_OF_FILES}) == len(NAMES_OF_FILES)
    memories = Memories({name: Memory.random(2, 4, 3, seed=i) for i, name in enumerate(NAMES_OF_FILES)})
    loaded = saved_and_loaded(memories, tmp_path / "memories")
    for name in NAMES_OF_FILES:
        assert same(bits(loaded[name]), bits(memories[name])), name


@torch.no_grad()
def test_many_memories_in_a_file_do_not_mix(tmp_path):
    memories = Memories({f"layers.{i}": Memory.random(2, 4, i + 1, seed=i) for i in range(23)})
    for i, memory in enumerate(memories.values()):
        query, target = torch.randn(1, i % 4, 1, 4), torch.randn(1, i % 4, i + 1)
        memory.stream(query, target, topk=1 + i % 2, chunk_size=4 + i)
    loaded = saved_and_loaded(memories, tmp_path / "memories")
    assert same(all_bits(loaded), all_bits(memories))
    for i, name in enumerate(loaded):
        assert loaded[name].pending_tokens == i % 4
        for memory in (memories[name], loaded[name]):
            memory.flush()
        assert same(bits(loaded[name]), bits(memories[name])) and same(
            bits(loaded[name].reset()), bits(memories[name].reset())
        )
    assert same(bits(loaded["layers.11"]), bits(Memory.random(2, 4, 12, seed=11)))


def test_no_memories_are_a_file_too(tmp_path):
    assert len(saved_and_loaded(Memories({}), tmp_path / "memories")) == 0


@pytest.mark.parametrize(
    "single", [lambda: Memory.random(4, 4, 3), lambda: MLPMemory.random(4, 3, 5)], ids=KINDS.args[1]
)
def test_a_file_of_one_memory_is_not_one_of_many(tmp_path, single):
    path, memory = tmp_path / "memory", single()
    memory.save(path)
    with pytest.raises(ValueError, match=str(path)):
        Memories.load(path)
    Memories({"a": memory}).save(path)
    with pytest.raises(ValueError, match=str(path)):
        type(memory).load(path)


@pytest.mark.parametrize("content", [b"", b"memories" * 100, b"\xff" * 100])
def test_a_foreign_file_holds_no_memories(tmp_path, content):
    path = tmp_path / "memories"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        Memories.load(path)
    with pytest.raises(FileNotFoundError):
        Memories.load(tmp_path / "nothing")


@torch.no_grad()
def test_a_damaged_file_holds_no_memories(tmp_path):
    model = mixed()
    memories, path = Memories.of(model), tmp_path / "memories"
    model(hidden_states(2), memories.streaming())
    memories.save(path)
    data = path.read_bytes()
    for at in [*range(0, len(data), 97), len(data) - 1]:
        for damaged in (data[:at], data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :], data[:at] + data[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=str(path)):
                Memories.load(path)
    path.write_bytes(data + b"\0")
    with pytest.raises(ValueError, match=str(path)):
        Memories.load(path)
    path.write_bytes(data)
    assert same(all_bits(Memories.load(path)), all_bits(memories))


def test_two_memories_swapped_in_the_header_are_refused(tmp_path):
    path = tmp_path / "memories"
    Memories({"a": Memory.random(4, 4, 3, seed=0), "b": Memory.random(4, 4, 3, seed=1)}).save(path)
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    values = [name for name in header if name.endswith("values")]
    assert len(values) == 2
    offsets = [header[name]["data_offsets"] for name in values]
    for name, other in zip(values, reversed(offsets)):
        header[name]["data_offsets"] = other
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(ValueError, match=str(path)):
        Memories.load(path)


def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path, memories = tmp_path / "memories", Memories({"a": Memory.random(4, 4, 3)})
    memories.save(path)
    old = path.read_bytes()
    monkeypatch.setattr(fwpkm_cuda.storage, "_digest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        Memories({"b": Memory.random(4, 4, 3)}).save(path)
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["memories"]


def test_views_that_stream_are_not_saved(tmp_path):
    path = tmp_path / "memories"
    with pytest.raises(ANY_ERROR):
        Memories({"a": Memory.random(4, 4, 3)}).streaming().save(path)
    assert not [*tmp_path.iterdir()]


# ---------------------------------------------------------------------------------------------------------- streaming
STREAMS = [
    dict(), dict(flush=True), dict(chunk_size=2), dict(chunk_size=5, flush=True), dict(chunk_size="all"),
    dict(read_passes=3, flush=True), dict(read_passes=2, flush=True, chunk_size="all"), dict(read_passes=1),
]  # fmt: skip


def nothing_or_same(a, b):
    return a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("options", STREAMS, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@torch.no_grad()
def test_a_streaming_memory_makes_forward_a_stream(kind, options, masked):
    layer, hidden = LAYERS[kind](), hidden_states()
    memory = layer.new_memory()
    twin = memory.clone()
    mask = torch.rand(2, 8) > 0.4 if masked else None
    for cut in (slice(0, 5), slice(5, 8)):
        part = None if mask is None else mask[:, cut]
        y, details = layer(hidden[:, cut], memory.streaming(**options), part, return_details=True)
        expected, wanted = layer.stream(hidden[:, cut], twin, part, return_details=True, **options)
        assert torch.equal(y, expected) and memory.pending_tokens == twin.pending_tokens
        assert all(map(nothing_or_same, details, wanted)) and same(bits(memory), bits(twin))
    assert type(details) is type(wanted) and memory.pending is None
    memory.flush()
    assert isinstance(layer(hidden, memory.streaming(), chunk_size=None, read_passes=1), torch.Tensor), "and no details"


@KINDS
@torch.no_grad()
def test_a_frozen_memory_streams_and_stays(kind):
    layer, hidden = LAYERS[kind](), hidden_states()
    memory = layer.new_memory()
    before = bits(memory)
    y = layer(hidden, memory.frozen().streaming(flush=True))
    assert torch.equal(y, layer.stream(hidden, memory.frozen(), flush=True))
    assert same(bits(memory), before) and memory.pending_tokens == 0
    assert not torch.equal(y, layer(hidden, memory.streaming()))


@torch.no_grad()
def test_streaming_options_of_a_model_reach_every_layer():
    model, hidden = mixed(), hidden_states()
    for options in STREAMS:
        memories = Memories.of(model, seed=0)
        twins = memories.clone()
        y, h = model(hidden, memories.streaming(**options)), hidden
        for name, twin in twins.items():
            h = h + model.get_submodule(name).stream(h, twin, **options)
        assert torch.equal(y, h) and same(all_bits(memories), all_bits(twins))
        assert [m.pending_tokens for m in memories.values()] == [m.pending_tokens for m in twins.values()]


def test_streaming_commits_a_pending_scan_first():
    layer, hidden = fwpkm(), hidden_states()
    memory = layer.new_memory()
    view, expected = memory.streaming(), write(copy.deepcopy(layer), memory.clone(), hidden)
    layer(hidden, memory)
    with torch.no_grad():
        assert torch.equal(layer(hidden, view), layer.stream(hidden, expected))
    assert same(bits(memory), bits(expected))


@KINDS
def test_a_streaming_memory_refuses_gradients_as_a_stream_does(kind):
    layer = LAYERS[kind]()
    memory = layer.new_memory()
    before = bits(memory)
    with pytest.raises(RuntimeError, match="grad") as theirs:
        layer.stream(hidden_states(), memory)
    with pytest.raises(RuntimeError, match="grad") as ours:
        layer(hidden_states(), memory.streaming())
    assert str(ours.value) == str(theirs.value) and same(bits(memory), before)


@pytest.mark.parametrize(
    "match, view, call",
    [
        ("chunk_size", dict(), dict(chunk_size=2)),
        ("chunk_size", dict(chunk_size=2), dict(chunk_size=2)),
        ("chunk_size", dict(), dict(chunk_size="all")),
        ("read_passes", dict(flush=True), dict(read_passes=2)),
        ("read_passes", dict(read_passes=2), dict()),
        ("read_passes", dict(read_passes=0), dict()),
        ("chunk_size", dict(chunk_size=0), dict()),
        ("chunk_size", dict(chunk_size=2.0), dict()),
        ("chunk_size", dict(chunk_size="everything"), dict()),
    ],
)
@KINDS
@torch.no_grad()
def test_a_combination_that_makes_no_sense_names_its_argument(kind, match, view, call):
    layer = LAYERS[kind]()
    memory = layer.new_memory()
    before = bits(memory)
    with pytest.raises(ValueError, match=match):
        layer(hidden_states(), memory.streaming(**view), **call)
    assert same(bits(memory), before) and memory.pending is None and memory.pending_tokens == 0


@torch.no_grad()
def test_views_in_the_wrong_place_are_refused():
    layer, memory = fwpkm(), fwpkm().new_memory()
    with pytest.raises(TypeError, match="memory"):
        layer.stream(hidden_states(), memory.streaming())
    with pytest.raises(ANY_ERROR):
        memory.streaming().streaming()
    with pytest.raises(TypeError):
        memory.streaming(mask=None)
    with pytest.raises(TypeError, match="memory"):
        fwmlp()(hidden_states(), memory.streaming())
    with pytest.raises(TypeError, match="memory"):
        layer(hidden_states(), Memories({"a": memory}))


def test_a_view_may_be_used_again_and_follows_its_memory():
    layer, hidden = fwpkm(), hidden_states(3)
    memory, twin = layer.new_memory(seed=0), layer.new_memory(seed=0)
    view = memory.streaming()
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(layer(hidden, view), layer.stream(hidden, twin))
        memory.reset(), twin.reset()
        assert torch.equal(layer(hidden, view), layer.stream(hidden, twin))


USES = {
    "scan": lambda m: m,
    "streaming": lambda m: m.streaming(),
    "streaming_pairs": lambda m: m.streaming(chunk_size=2),
    "streaming_all": lambda m: m.streaming(chunk_size="all", flush=True, read_passes=2),
    "frozen": lambda m: m.frozen(),
    "frozen_streaming": lambda m: m.frozen().streaming(),
}


def test_a_model_compiles_with_every_view_of_its_memories():
    torch._dynamo.reset()
    model = Model(first=fwpkm(dtype=torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    memories = Memories.of(model, seed=0)
    twins = memories.clone()
    for name, view in [*USES.items(), *USES.items()]:
        hidden, before = hidden_states(6, dtype=torch.float32), all_bits(memories)
        with torch.no_grad():
            y, expected = compiled(hidden, view(memories)), model(hidden, view(twins))
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        memories.commit(), twins.commit()
        torch.testing.assert_close(all_bits(memories), all_bits(twins), rtol=1e-4, atol=1e-5)
        assert same(all_bits(memories), before) == ("frozen" in name), name
        assert not any(m.pending_tokens for m in memories.values())


def test_a_compiled_model_trains_with_memories_and_keeps_its_sub_keys():
    torch._dynamo.reset()
    model = Model(first=fwpkm(dtype=torch.float32), second=fwpkm(dtype=torch.float32))
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for seed in (0, 0, 1):
        memories = Memories.of(model, seed=seed)
        train_step(compiled, memories, hidden_states(dtype=torch.float32))
        for name, memory in memories.items():
            assert torch.equal(model.get_submodule(name).sub_keys, memory.sub_keys)
    assert counter.frame_count == 1


@REENTRANT
@pytest.mark.parametrize("use", ["scan", "frozen"])
def test_a_checkpointed_block_takes_memories_as_an_argument(use, reentrant):
    model = Model(first=fwpkm(), second=fwpkm())
    memories, hidden = Memories.of(model, seed=0), hidden_states().requires_grad_()
    twins, before = memories.clone(), all_bits(memories)
    checkpoint(model, hidden, USES[use](memories), use_reentrant=reentrant).sin().sum().backward()
    found = [hidden.grad, *(p.grad.clone() for p in model.parameters())]
    memories.commit()
    hidden.grad = None
    model.zero_grad()
    model(hidden, USES[use](twins)).sin().sum().backward()
    twins.commit()
    torch.testing.assert_close(found, [hidden.grad, *(p.grad for p in model.parameters())], rtol=1e-12, atol=1e-14)
    assert same(all_bits(memories), all_bits(twins)) and same(all_bits(memories), before) == (use == "frozen")


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@REENTRANT
@torch.no_grad()
def test_a_checkpointed_block_streams_where_no_gradient_is_asked_for(reentrant):
    model, hidden = Model(first=fwpkm(), second=fwpkm()), hidden_states()
    for view in (lambda m: m.streaming(), lambda m: m.frozen().streaming()):
        memories = Memories.of(model, seed=0)
        twins = memories.clone()
        y = checkpoint(model, hidden, view(memories), use_reentrant=reentrant)
        assert torch.equal(y, model(hidden, view(twins))) and same(all_bits(memories), all_bits(twins))


# ---------------------------------------------------------------------------------------------- one write per reading
ALL_KINDS = pytest.mark.parametrize("kind", LAYERS)


@pytest.mark.parametrize("T", [1, 2, 3, 8])
@ALL_KINDS
def test_all_of_a_scan_is_a_chunk_of_its_length(kind, T):
    layer = LAYERS[kind]()
    given = LAYERS[kind](chunk_size="all")
    given.load_state_dict(layer.state_dict())
    hidden = hidden_states(T)
    first = layer.new_memory().clone()
    results = []
    for used, options in ((layer, dict(chunk_size=T)), (layer, dict(chunk_size="all")), (given, {})):
        memory, h = first.clone(), hidden.clone().requires_grad_()
        y, details = used(h, memory, return_details=True, **options)
        (gradient,) = torch.autograd.grad(y.sin().sum(), h)
        memory.commit()
        results.append([y.detach(), gradient, details.losses, *bits(memory)])
    assert same(results[0], results[1]) and same(results[0], results[2])


@pytest.mark.parametrize("lengths", [(1,), (4, 1, 3), (2, 2, 2), (0, 3, 0, 5)], ids=str)
@ALL_KINDS
@torch.no_grad()
def test_all_of_a_stream_s_call_is_a_chunk_of_its_length(kind, lengths):
    layer = LAYERS[kind]()
    given = LAYERS[kind](chunk_size="all")
    given.load_state_dict(layer.state_dict())
    a = layer.new_memory().clone()
    b, c, d = a.clone(), a.clone(), a.clone()
    for T in lengths:
        hidden = hidden_states(T)
        y = layer.stream(hidden, a, chunk_size=max(T, 1))
        for other in (layer.stream(hidden, b, chunk_size="all"), given.stream(hidden, c), given(hidden, d.streaming())):
            assert torch.equal(other, y)
        assert all(same(bits(a), bits(x)) and x.pending_tokens == 0 for x in (b, c, d))


@KINDS
@torch.no_grad()
def test_all_writes_once_at_the_end_of_each_call(kind):
    layer, hidden = LAYERS[kind](), hidden_states()
    memory = layer.new_memory()
    before = bits(memory)
    y = layer.stream(hidden, memory, chunk_size="all")
    assert torch.equal(y, layer.stream(hidden, layer.new_memory().copy_(type(memory)(*before)), chunk_size=50))
    assert not same(bits(memory), before) and memory.flush() is None


@pytest.mark.parametrize("read_passes", [1, 2, 3])
@pytest.mark.parametrize("T", [0, 1, 2, 7])
@pytest.mark.parametrize("kind", ["pkm", "idw", "decay", "mlp"])
def test_all_may_be_read_several_times(kind, T, read_passes):
    layer, hidden = LAYERS[kind](), hidden_states(T)
    a = layer.new_memory()
    b, c = a.clone(), a.clone()
    y = layer(hidden, a, chunk_size="all", read_passes=read_passes)
    expected = layer(hidden, b, chunk_size=max(T, 1), read_passes=read_passes)
    with torch.no_grad():
        streamed = layer.stream(hidden, c, chunk_size="all", read_passes=read_passes, flush=True)
    a.commit(), b.commit()
    assert torch.equal(y, expected) and same(bits(a), bits(b))
    if kind == "mlp":
        torch.testing.assert_close([y, *bits(a)], [streamed, *bits(c)])
    else:
        assert torch.equal(y, streamed) and same(bits(a), bits(c))


@pytest.mark.parametrize("kind", ["pkm", "carry", "mlp"])
def test_all_of_nothing_writes_nothing(kind):
    layer = LAYERS[kind](chunk_size="all")
    memory = layer.new_memory()
    before, hidden = bits(memory), hidden_states(0)
    assert layer(hidden, memory).shape == (2, 0, WIDTH)
    memory.commit()
    with torch.no_grad():
        assert layer.stream(hidden, memory).shape == (2, 0, WIDTH) and memory.pending_tokens == 0
    assert same(bits(memory), before)


@KINDS
@torch.no_grad()
def test_all_while_tokens_wait_for_a_smaller_chunk_says_to_flush(kind):
    layer, hidden = LAYERS[kind](), hidden_states()
    memory = layer.new_memory()
    layer.stream(hidden[:, :2], memory)
    before = bits(memory)
    for call in (layer.stream, lambda h, m, chunk_size: layer(h, m.streaming(chunk_size=chunk_size))):
        for T in (0, 2, 3, 6):
            with pytest.raises(ValueError, match=r"chunk_size.*flush\(\)"):
                call(hidden[:, 2 : 2 + T], memory, chunk_size="all")
        assert same(bits(memory), before) and memory.pending_tokens == 2
    memory.flush()
    layer.stream(hidden[:, 2:], memory, chunk_size="all")
    assert memory.pending_tokens == 0


@KINDS
@torch.no_grad()
def test_all_may_end_the_chunk_that_waits(kind):
    layer, hidden = LAYERS[kind](), hidden_states(3)
    memory = layer.new_memory()
    twin = memory.clone()
    for cut, size in ((slice(0, 1), None), (slice(1, 3), "all")):
        y, expected = layer.stream(hidden[:, cut], memory, chunk_size=size), layer.stream(hidden[:, cut], twin)
        assert torch.equal(y, expected)
    assert same(bits(memory), bits(twin)) and memory.pending_tokens == 0


def test_a_layer_of_one_write_may_look_further_ahead():
    """As one that is told so in each call."""
    layer = fwpkm(boundary="carry", lookahead=2)
    given = fwpkm(boundary="carry", lookahead=2, chunk_size="all")
    given.load_state_dict(layer.state_dict())
    hidden, a = hidden_states(), layer.new_memory()
    b = a.clone()
    assert torch.equal(layer(hidden, a, chunk_size="all"), given(hidden, b))
    a.commit(), b.commit()
    assert same(bits(a), bits(b))


@torch.no_grad()
def test_a_reading_of_nothing_may_look_further_ahead():
    layer = fwpkm(boundary="carry", lookahead=2)
    memory = layer.new_memory()
    before = bits(memory)
    for options in (dict(), dict(chunk_size="all")):
        assert layer.stream(hidden_states(0), memory, **options).shape == (2, 0, WIDTH)
        assert layer(hidden_states(0), memory, **options).shape == (2, 0, WIDTH)
        memory.commit()
    assert same(bits(memory), before)


@torch.no_grad()
def test_a_carried_stream_may_change_to_all_and_back():
    layer, hidden = fwpkm(boundary="carry", lookahead=2), hidden_states(11)
    memory = layer.new_memory()
    twin = memory.clone()
    for cut, size, like in ((slice(0, 3), 3, 3), (slice(3, 8), "all", 5), (slice(8, 11), 3, 3)):
        assert torch.equal(
            layer.stream(hidden[:, cut], memory, chunk_size=size), layer.stream(hidden[:, cut], twin, chunk_size=like)
        )
        assert same(bits(memory), bits(twin))


@KINDS
@torch.no_grad()
def test_all_in_the_calls_of_a_memory(kind):
    memory = LAYERS[kind]().new_memory()
    query, target = tokens(5)
    query, options = (query, dict(topk=2)) if kind == "pkm" else (query.flatten(2), {})
    a, b, c = memory.clone(), memory.clone(), memory.clone()
    out = a.scan(query, target, chunk_size="all", **options).out
    assert torch.equal(out, b.scan(query, target, chunk_size=5, **options).out)
    assert torch.equal(out, c.stream(query, target, chunk_size="all", **options).out)
    a.commit(), b.commit()
    assert same(bits(a), bits(b)) and same(bits(a), bits(c)) and c.pending_tokens == 0


@pytest.mark.parametrize("wrong", ["All", "ALL", "al", "all ", "", "auto", "3", 0, -1, 2.0, True, ["all"]], ids=repr)
@KINDS
@torch.no_grad()
def test_no_other_word_is_a_chunk_size_of_a_layer(kind, wrong):
    make, layer, hidden = LAYERS[kind], LAYERS[kind](), hidden_states()
    memory = layer.new_memory()
    calls = [
        lambda: make(chunk_size=wrong),
        lambda: layer(hidden, memory, chunk_size=wrong),
        lambda: layer.stream(hidden, memory, chunk_size=wrong),
        lambda: layer(hidden, memory.streaming(chunk_size=wrong)),
        lambda: layer(hidden, memory.frozen(), chunk_size=wrong),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="chunk_size"):
            call()
    assert memory.pending is None and memory.pending_tokens == 0


@pytest.mark.parametrize("wrong", ["All", "", "3"], ids=repr)
@pytest.mark.parametrize("method", ["scan", "stream"])
@KINDS
@torch.no_grad()
def test_no_other_word_is_a_chunk_size_of_a_memory(kind, method, wrong):
    memory = LAYERS[kind]().new_memory()
    query, target = tokens()
    query, options = (query, dict(topk=2)) if kind == "pkm" else (query.flatten(2), {})
    with pytest.raises(ValueError, match=r"^chunk_size: "):
        getattr(memory, method)(query, target, chunk_size=wrong, **options)
    assert memory.pending is None and memory.pending_tokens == 0


@KINDS
def test_a_layer_of_one_write_says_so(kind):
    assert "chunk_size='all'" in repr(LAYERS[kind](chunk_size="all")) and "chunk_size=3" in repr(LAYERS[kind]())
    assert LAYERS[kind](chunk_size="all").options["chunk_size"] == "all"


@pytest.mark.full
@torch.no_grad()
def test_a_compiled_layer_of_one_write_takes_readings_of_any_length():
    torch._dynamo.reset()
    layer = fwpkm(chunk_size="all", dtype=torch.float32)
    compiled, memory = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True), layer.new_memory()
    twin = memory.clone()
    for T in (5, 7, 1, 4):
        hidden = hidden_states(T, dtype=torch.float32)
        for view in (lambda m: m, lambda m: m.streaming()):
            torch.testing.assert_close(compiled(hidden, view(memory)), layer(hidden, view(twin)), rtol=1e-4, atol=1e-5)
            memory.commit(), twin.commit()
            torch.testing.assert_close(bits(memory), bits(twin), rtol=1e-4, atol=1e-5)


@REENTRANT
def test_a_checkpointed_layer_of_one_write(reentrant):
    layer, hidden = fwpkm(chunk_size="all"), hidden_states().requires_grad_()
    memory = layer.new_memory()
    twin = memory.clone()
    for run, used in (
        (lambda h: checkpoint(layer, h, memory, use_reentrant=reentrant), memory),
        (lambda h: layer(h, twin), twin),
    ):
        run(hidden).sin().sum().backward()
        used.commit()
        used.gradient, hidden.grad = hidden.grad, None
    assert torch.equal(memory.gradient, twin.gradient) and same(bits(memory), bits(twin))


# ---------------------------------------------------------------------------------------------- options and defaults
def defaults(function):
    return {n: p.default for n, p in inspect.signature(function).parameters.items()}


def test_options_of_both_layers_have_the_same_defaults():
    pkm, mlp = defaults(FwPKM), defaults(FwMLP)
    shared = pkm.keys() & mlp.keys()
    assert {
        "key_dim",
        "value_dim",
        "chunk_size",
        "lookahead",
        "weight_decay",
        "grad_clip",
        "gate",
        "target_norm",
        "norm_eps",
    } < shared
    assert {n for n in shared if pkm[n] != mlp[n]} == {"lr"} and (pkm["lr"], mlp["lr"]) == (1.0, 0.1)
    assert mlp.keys() - pkm.keys() == {"hidden_units", "lookahead_target", "loss"}
    for method in ("forward", "stream"):
        assert defaults(getattr(FwPKM, method)) == defaults(getattr(FwMLP, method))


@pytest.mark.parametrize("memory", [Memory, MLPMemory, Memories])
def test_streaming_has_the_defaults_of_a_layer_s_stream(memory):
    stream, view = defaults(FwPKM.stream), defaults(memory.streaming)
    del view["self"]
    assert view == {n: stream[n] for n in ("chunk_size", "flush", "read_passes")}


def test_the_released_mlp_has_another_target_and_another_gate():
    assert defaults(FwMLP)["lookahead_target"] == "last" and defaults(FwMLP)["gate"] == "output_and_loss"
    plain, released = (make(WIDTH, **MLP_SIZES, dtype=torch.float64) for make in (FwMLP, FwMLP.released))
    spelled = fwmlp(lookahead_target="mean", gate="output", lr=0.1)
    assert released.options == spelled.options == plain.options | dict(lookahead_target="mean")
    for layer in (released, spelled):
        layer.load_state_dict(plain.state_dict())
    hidden = hidden_states()
    results = [reading(layer, layer.new_memory(seed=0), hidden) for layer in (plain, released, spelled)]
    assert same(results[1], results[2]) and not torch.equal(results[0][0], results[1][0])
    assert FwMLP.released(WIDTH, **MLP_SIZES, lookahead_target="last").options["lookahead_target"] == "last"
    assert FwMLP.released(WIDTH, device="meta").sizes == FwMLP(WIDTH, device="meta").sizes


@pytest.mark.parametrize("options", [dict(), dict(peer=True), dict(swilu=False, query_norm=False)], ids=str)
def test_a_pkm_without_a_bias_in_its_query(options):
    sizes = dict(key_dim=4, value_dim=WIDTH, heads=2, topk=2, num_sub_keys=4, dtype=torch.float64) | options
    layer, biased = PKM(WIDTH, query_bias=False, **sizes), PKM(WIDTH, **sizes)
    assert {*biased.state_dict()} - {*layer.state_dict()} == {"query_proj.bias"}
    biased.load_state_dict(layer.state_dict(), strict=False)
    x = hidden_states()
    with torch.no_grad():
        biased.query_proj.bias.zero_()
        assert torch.equal(layer(x), biased(x))
        biased.query_proj.bias.normal_()
        assert not torch.equal(layer(x), biased(x))
    layer(x).sin().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    assert not PKM(WIDTH, query_bias=False, **sizes).reset_parameters()
