"""What no operator accepts: every entry refuses it by name and leaves each of its inputs, bit for bit, as it was.

Entries are described once (`ENTRIES`): their tensors, the letters of their dimensions, the kind of each tensor. From
that come the wrong ranks, sizes, dtypes and devices. A message must name the argument, or another one that has a
dimension of the same letter, and say what was expected and what came."""

import itertools
import re
from collections.abc import Callable
from math import inf, nan
from typing import NamedTuple

import pytest
import torch
from contract import OPTIONS, Sizes, assert_same_bits, bits, functional, in_place, random, scan_inputs

import fwpkm_cuda

ops = torch.ops.fwpkm
REFUSED = (RuntimeError, ValueError, TypeError, NotImplementedError)
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
LONG_NAMES = {  # what torch calls a dtype in C++
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.int64: "Long",
    torch.int32: "Int",
    torch.int16: "Short",
    torch.uint8: "Byte",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


# ----------------------------------------------------------------------------------------------------------- entries
class Entry(NamedTuple):
    """One operator: how to call it with tensors by name and options by name."""

    call: Callable
    tensors: dict
    letters: dict  # of each tensor: one letter per dimension
    kinds: dict  # of each tensor: memory, activation, mask, index, int32, bytes or gradient
    options: dict
    free: str = ""  # letters whose size may be anything, and leading dimensions
    written: tuple = ()  # tensors written in place

    def run(self, tensors=None, **options):
        return self.call(**(tensors or self.fresh()), **(self.options | options))

    def fresh(self):
        return {name: None if x is None else x.clone() for name, x in self.tensors.items()}


SCAN_LETTERS = {
    "values": "SV",
    "sub_keys": "H2Pk",
    "query": "BTHK",
    "target": "BTV",
    "loss_weights": "BT",
    "mask": "BT",
}
SCAN_KINDS = dict(zip(SCAN_LETTERS, ["memory"] * 2 + ["activation"] * 3 + ["mask"], strict=True))
SAVED = ("list_indices", "list_scores", "places", "read_from", "key_versions", "open_rows", "open_keys")
BACKWARD_OPTIONS = OPTIONS | {"values_only": False, "grad_clip": 0.05, "need_dvalues": True}


def backward_tensors():
    """All arguments of chunk_scan_backward, of a scan in which everything moves and something is clipped."""
    inputs = scan_inputs()
    options = [BACKWARD_OPTIONS[name] for name in OPTIONS]
    out, _, weights, losses, addressing, rows, _, sub_keys, *saved = ops.chunk_scan(*inputs.values(), *options, True)
    outputs = {
        "dout": out,
        "dweights": weights,
        "dlosses": losses,
        "daddressing_loss": addressing,
        "dnew_rows": rows,
        "dnew_sub_keys": sub_keys,
    }
    gradients = {name: random(*x.shape, seed=i) for i, (name, x) in enumerate(outputs.items())}
    return gradients | inputs | {"new_rows": rows, "new_sub_keys": sub_keys} | dict(zip(SAVED, saved, strict=True))


def gather_tensors():
    generator = torch.Generator().manual_seed(3)
    return {
        "values": random(16, 5, seed=1),
        "indices": torch.randint(0, 16, (3, 4, 6), generator=generator, dtype=torch.int32),
        "weights": random(3, 4, 6, seed=2),
        "dout": random(3, 4, 5, seed=4),
    }


def pick(tensors, *names):
    return {name: tensors[name] for name in names}


def commit_with_scan(values, sub_keys, new_rows, new_slots, new_sub_keys, **options):
    scan = fwpkm_cuda.chunk_scan(**scan_inputs(), **OPTIONS)
    scan = scan._replace(new_rows=new_rows, new_slots=new_slots, new_sub_keys=new_sub_keys)
    return fwpkm_cuda.commit_(values, sub_keys, scan, **options)


def entries():
    inputs, gather = scan_inputs(), gather_tensors()
    scan = fwpkm_cuda.chunk_scan(**inputs, **OPTIONS)
    scores, indices = fwpkm_cuda.product_key_topk(inputs["query"], inputs["sub_keys"], 3)
    log = pick(inputs, "values", "sub_keys") | pick(scan._asdict(), "new_rows", "new_slots", "new_sub_keys")
    log_letters = {"values": "SV", "sub_keys": "H2Pk", "new_rows": "EV", "new_slots": "E", "new_sub_keys": "H2Pk"}
    log_kinds = dict.fromkeys(log_letters, "memory") | {"new_slots": "int32"}
    gather_letters = {"values": "SV", "indices": "BTR", "weights": "BTR", "dout": "BTV"}
    gather_kinds = dict.fromkeys(gather_letters, "memory") | {"indices": "index"}
    backward = backward_tensors()
    backward_letters = SCAN_LETTERS | {
        "dout": "BTV",
        "dweights": "BTHR",
        "dlosses": "BQ",
        "daddressing_loss": "W",
        "dnew_rows": "EV",
        "dnew_sub_keys": "H2Pk",
        "new_rows": "EV",
        "new_sub_keys": "H2Pk",
    }
    backward_letters = {name: backward_letters.get(name, "?" * x.dim()) for name, x in backward.items()}
    kinds = SCAN_KINDS | dict.fromkeys([name for name in backward if name.startswith("d")], "gradient")
    kinds |= dict.fromkeys(["new_rows", "new_sub_keys", "list_scores", "key_versions"], "memory")
    kinds |= dict.fromkeys(["list_indices", "places", "read_from"], "int32")
    kinds |= dict.fromkeys(["open_rows", "open_keys"], "bytes")
    score = {"score": "idw", "eps": 0.1}
    return {
        "product_key_topk": Entry(
            fwpkm_cuda.product_key_topk,
            pick(inputs, "query", "sub_keys"),
            pick(SCAN_LETTERS, "query", "sub_keys"),
            SCAN_KINDS,
            {"topk": 3, **score},
            free="BTP",
        ),
        "product_key_topk_backward": Entry(
            ops.product_key_topk_backward,
            {"dscores": torch.ones_like(scores), **pick(inputs, "query", "sub_keys"), "indices": indices},
            {"dscores": "BTHR", **pick(SCAN_LETTERS, "query", "sub_keys"), "indices": "BTHR"},
            {"dscores": "memory", **SCAN_KINDS, "indices": "int32"},
            score,
            free="P",
        ),
        "value_gather": Entry(
            fwpkm_cuda.value_gather,
            pick(gather, "values", "indices", "weights"),
            gather_letters,
            gather_kinds,
            options={},
            free="SV",
        ),
        "value_gather_dvalues": Entry(
            ops.value_gather_dvalues,
            pick(gather, "dout", "indices", "weights"),
            gather_letters,
            gather_kinds,
            {"num_slots": 16},
            free="V",
        ),
        "value_gather_dweights": Entry(
            ops.value_gather_dweights,
            pick(gather, "dout", "values", "indices"),
            gather_letters,
            gather_kinds,
            options={},
            free="SR",
        ),
        "chunk_scan": Entry(fwpkm_cuda.chunk_scan, inputs, SCAN_LETTERS, SCAN_KINDS, OPTIONS),
        "chunk_scan_": Entry(
            fwpkm_cuda.chunk_scan_, inputs, SCAN_LETTERS, SCAN_KINDS, OPTIONS, written=("values", "sub_keys")
        ),
        "chunk_scan_backward": Entry(ops.chunk_scan_backward, backward, backward_letters, kinds, BACKWARD_OPTIONS),
        "commit_": Entry(
            commit_with_scan,
            log,
            log_letters,
            log_kinds,
            {"lr": 0.5, "weight_decay": 0.1},
            written=("values", "sub_keys"),
        ),
        "raw-commit_": Entry(
            ops.commit_, log, log_letters, log_kinds, {"keep": 0.9, "writes": 3}, written=("values", "sub_keys")
        ),
    }


ENTRIES = entries()
SCANS = ("chunk_scan", "chunk_scan_")


# ------------------------------------------------------------------------------------------------------------ checks
def assert_refuses(run, tensors, names, came=()):
    """`run` raises, naming one of `names` and one of what `came`; every tensor keeps its bits."""
    before = {name: bits(x) for name, x in tensors.items() if x is not None and x.device.type == "cpu"}
    with pytest.raises(REFUSED) as caught:
        run()
    for name, old in before.items():
        assert bits(tensors[name]) == old, f"{name} changed although {caught.value}"
    message = str(caught.value)
    assert re.search(rf"\b({'|'.join(map(re.escape, names))})\b", message), f"names none of {names}: {message}"
    assert re.search(r"\b(expect|overflow|requires grad)", message, re.IGNORECASE), (
        f"says not what was expected: {message}"
    )
    assert not came or any(x in message for x in came), f"does not say that one of {came} came: {message}"


def relatives(entry, name, letters):
    """The argument itself, and those that have a dimension of one of these letters (P*P = S, K/2 = k)."""
    groups = [set("PS"), set("Kk")]
    letters = set(letters) | set().union(*(g for g in groups if g & set(letters)))
    return [name] + [n for n in entry.tensors if letters & set(entry.letters[n]) - set("2?")]


def shapes_of(tensors, names):
    return [f"({', '.join(map(str, tensors[n].shape))})" for n in names if tensors.get(n) is not None]


def each(*names):
    """(entry, tensor) for every tensor of the named entries, or of all."""
    return [pytest.param(key, name, id=f"{key}-{name}") for key in names or ENTRIES for name in ENTRIES[key].tensors]


def at(tensor, position, value):
    """A copy with one entry changed: the first, the last, or one inside."""
    copy = tensor.clone()
    flat = copy.view(-1)
    flat[{"first": 0, "inside": flat.numel() // 2, "last": -1}[position]] = value
    return copy


POSITIONS = ("first", "inside", "last")


@pytest.mark.parametrize("key", ENTRIES)
def test_the_good_input_is_accepted(key):
    """Else the tests below would pass for a wrong reason."""
    ENTRIES[key].run()


# ---------------------------------------------------------------------------------------------------- ranks and sizes
RANKS = {"scalar": lambda x: x.flatten()[0], "one-fewer": lambda x: x[0], "one-more": lambda x: x[None]}


def wrong_ranks():
    for key, entry in ENTRIES.items():
        for name, change in itertools.product(entry.tensors, RANKS):
            if (key, name) != ("product_key_topk", "query") or change == "scalar":  # it may have any leading dimensions
                yield pytest.param(key, name, change, id=f"{key}-{name}-{change}")


@pytest.mark.parametrize("key, name, change", list(wrong_ranks()))
def test_a_wrong_rank_is_refused(key, name, change):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    tensors[name] = RANKS[change](tensors[name])
    names = relatives(entry, name, entry.letters[name])
    assert_refuses(lambda: entry.run(tensors), tensors, names, [*shapes_of(tensors, names), "got a scalar"])


def wrong_sizes():
    for key, entry in ENTRIES.items():
        for name, x in entry.tensors.items():
            for dim, letter in enumerate(entry.letters[name]):
                if letter not in entry.free:
                    sizes = sorted({0, x.shape[dim] - 1, x.shape[dim] + 1} - {x.shape[dim], -1})
                    yield from (pytest.param(key, name, dim, n, id=f"{key}-{name}-dim{dim}-{n}") for n in sizes)


@pytest.mark.parametrize("key, name, dim, size", list(wrong_sizes()))
def test_a_wrong_size_is_refused(key, name, dim, size):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    x = tensors[name]
    x = torch.cat((x, x.narrow(dim, 0, 1)), dim) if size > x.shape[dim] else x.narrow(dim, 0, size)
    tensors[name] = x.clone()
    names = relatives(entry, name, entry.letters[name][dim])
    assert_refuses(lambda: entry.run(tensors), tensors, names, [*shapes_of(tensors, names), f"got K = {size}"])


@pytest.mark.parametrize("key", [key for key, entry in ENTRIES.items() if {"query", "sub_keys"} <= set(entry.tensors)])
def test_an_odd_key_dimension_is_refused(key):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    tensors["query"] = torch.cat((tensors["query"], tensors["query"][..., :1]), -1)
    assert_refuses(lambda: entry.run(tensors), tensors, ["query"], ["7"])


EMPTY = {"H": (("query", 2), ("sub_keys", 0)), "K": (("query", 3), ("sub_keys", 3))}
EMPTY |= {"V": (("values", 1), ("target", 2)), "P": (("values", 0), ("sub_keys", 2))}


@pytest.mark.parametrize("letter", EMPTY)
@pytest.mark.parametrize("key", SCANS)
def test_a_dimension_that_is_empty_everywhere_is_refused(key, letter):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    for name, dim in EMPTY[letter]:
        tensors[name] = tensors[name].narrow(dim, 0, 0).clone()
    names = [name for name, _ in EMPTY[letter]]
    assert_refuses(lambda: entry.run(tensors), tensors, [*names, "topk"], [*shapes_of(tensors, names), "got 3"])


def test_more_slots_than_int32_can_number_are_refused():
    sub_keys, query = torch.zeros(1, 2, 46341, 1), torch.zeros(1, 1, 1, 2)
    tensors = {"sub_keys": sub_keys, "query": query}
    assert_refuses(lambda: fwpkm_cuda.product_key_topk(query, sub_keys, 1), tensors, ["sub_keys"], ["46341"])
    values = torch.zeros(1, 1).expand(2**31, 1)
    indices, weights = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1)
    tensors = {"indices": indices, "weights": weights}
    assert_refuses(lambda: fwpkm_cuda.value_gather(values, indices, weights), tensors, ["values"], ["2147483648"])


@pytest.mark.parametrize("key", SCANS)
def test_more_reads_than_int32_can_number_are_refused(key):
    tensors = ENTRIES[key].fresh()
    tensors["query"] = tensors["query"][:1, :1].expand(2**16, 2**15, 2, 6)
    tensors["target"] = tensors["target"][:1, :1].expand(2**16, 2**15, 5)
    tensors |= {"loss_weights": None, "mask": None}
    watched = pick(tensors, "values", "sub_keys")
    assert_refuses(lambda: ENTRIES[key].run(tensors), watched, ["query"], [str(2**16 * 2**15 * 2 * 3)])


# --------------------------------------------------------------------------------------------------- dtypes, devices
WRONG_DTYPES = {
    "memory": [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool, torch.complex128],
    "activation": [torch.float32, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex128],
    "mask": [torch.uint8, torch.int64, torch.float32, torch.float64, torch.complex64],
    "index": [torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64, torch.complex64],
    "int32": [torch.int64, torch.int16, torch.uint8, torch.bool, torch.float32, torch.complex64],
    "bytes": [torch.int64, torch.int32, torch.bool, torch.float32, torch.complex64],
    "gradient": [torch.int64, torch.bool, torch.complex128],
}


def wrong_dtypes():
    for key, entry in ENTRIES.items():
        for name in entry.tensors:
            for dtype in WRONG_DTYPES[entry.kinds[name]]:
                yield pytest.param(key, name, dtype, id=f"{key}-{name}-{str(dtype).removeprefix('torch.')}")


@pytest.mark.parametrize("key, name, dtype", list(wrong_dtypes()))
def test_a_wrong_dtype_is_refused(key, name, dtype):
    """All floating point tensors of the good input are float64; a float32 memory makes the others wrong."""
    entry = ENTRIES[key]
    tensors = entry.fresh()
    tensors[name] = tensors[name].to(dtype)
    alike = [n for n in entry.tensors if entry.kinds[n] in ("memory", "activation")]
    names = [name, *alike] if dtype == torch.float32 and entry.kinds[name] == "memory" else [name]
    came = [LONG_NAMES[d] for d in (dtype, torch.float64 if len(names) > 1 else dtype)] + [str(dtype)]
    assert_refuses(lambda: entry.run(tensors), tensors, names, came)


@pytest.mark.parametrize("memory", [torch.float16, torch.bfloat16, torch.int32], ids=str)
@pytest.mark.parametrize("key", ENTRIES)
def test_a_memory_of_another_dtype_everywhere_is_refused(key, memory):
    entry = ENTRIES[key]
    alike = [n for n in entry.tensors if entry.kinds[n] in ("memory", "activation", "gradient")]
    tensors = entry.fresh()
    tensors |= {name: tensors[name].to(memory) for name in alike}
    assert_refuses(lambda: entry.run(tensors), tensors, alike, [LONG_NAMES[memory], str(memory)])


@pytest.mark.parametrize("name", ["query", "target", "loss_weights"])
@pytest.mark.parametrize("key", SCANS)
def test_an_activation_wider_than_the_memory_is_refused(key, name):
    """float64 beside a float32 memory: nothing is rounded behind the caller's back."""
    tensors = scan_inputs(dtype=torch.float32)
    tensors[name] = tensors[name].double()
    assert_refuses(lambda: ENTRIES[key].run(tensors), tensors, [name], ["Double", "float64"])


@pytest.mark.parametrize("where", ["meta", "cuda"] if torch.cuda.is_available() else ["meta"])
@pytest.mark.parametrize("key, name", each())
def test_a_tensor_on_another_device_is_refused(key, name, where):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    tensors[name] = tensors[name].to(where)
    assert_refuses(lambda: entry.run(tensors), tensors, list(entry.tensors), [where, "cpu", "CPU"])


@pytest.mark.parametrize("key, name", each())
def test_a_sparse_tensor_is_refused(key, name):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    others = {n: x for n, x in tensors.items() if n != name}
    before = {n: bits(x) for n, x in others.items()}
    tensors[name] = tensors[name].to_sparse()
    with pytest.raises(REFUSED, match=r"(?i)sparse"):
        entry.run(tensors)
    assert {n: bits(x) for n, x in others.items()} == before


@pytest.mark.parametrize(
    "key, name",
    [p for p in each("product_key_topk", "value_gather", *SCANS) if p.values[1] not in ("loss_weights", "mask")],
)
def test_none_for_a_tensor_is_refused_by_name(key, name):
    tensors = ENTRIES[key].fresh() | {name: None}
    assert_refuses(lambda: ENTRIES[key].run(tensors), tensors, [name])


# ----------------------------------------------------------------------------------------------------------- options
POSITIVE, FINITE = (0.0, -1.0, nan, inf, -inf), (nan, inf, -inf)
BAD_OPTIONS = {  # of all entries that have the option
    "topk": (0, -1, 5, 2**31, 2**32 + 2, 2**62, INT64.min),
    "chunk_size": (0, -1, INT32.min, INT64.min),
    "lookahead": (-1, INT32.min, INT64.min),
    "eps": POSITIVE,
    "temperature": POSITIVE,
    "lr": FINITE,
    "weight_decay": FINITE,
    "addressing_weight": FINITE,
    "grad_clip": (-1.0, *FINITE),
    "score": ("", "Dot", "dot ", "cosine"),
    "activation": ("", "gelu", "Softmax"),
    "write_rule": ("", "Paper", "both"),
    "boundary": ("", "Drop", "both"),
    "carried": (-1, 1, 2, 7, 8, 2**62, INT64.min),  # without "carry", only 0
    "num_slots": (-1, INT64.min),
    "keep": FINITE,
    "writes": (-1, INT64.min),
}


def bad_options():
    for key, entry in ENTRIES.items():
        for name in entry.options:
            for value in BAD_OPTIONS.get(name, ()):
                yield pytest.param(key, name, value, id=f"{key}-{name}={value!r}")


@pytest.mark.parametrize("key, name, value", list(bad_options()))
def test_a_bad_option_is_refused(key, name, value):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    came = [f"got '{value}'" if isinstance(value, str) else f"got {value}"] if not isinstance(value, float) else ["got"]
    assert_refuses(lambda: entry.run(tensors, **{name: value}), tensors, [name], came)


CARRIES = {  # options that exclude each other; what the message must name
    "lookahead-beyond-chunk": ({"lookahead": 4}, "lookahead"),
    "lookahead-far-beyond-chunk": ({"lookahead": 2**62}, "lookahead"),
    "carried-negative": ({"carried": -1}, "carried"),
    "carried-less-than-lookahead": ({"lookahead": 2, "carried": 1}, "carried"),
    "carried-more-than-lookahead": ({"lookahead": 2, "carried": 3}, "carried"),
    "carried-without-lookahead": ({"lookahead": 0, "carried": 1}, "carried"),
    "carried-more-than-T": ({"lookahead": 8, "chunk_size": 8, "carried": 8}, "carried"),
}


@pytest.mark.parametrize("case", CARRIES)
@pytest.mark.parametrize("key", SCANS)
def test_options_of_carry_that_exclude_each_other_are_refused(key, case):
    changes, name = CARRIES[case]
    tensors = ENTRIES[key].fresh()
    assert_refuses(
        lambda: ENTRIES[key].run(tensors, boundary="carry", **changes), tensors, [name], [f"got {changes[name]}"]
    )


UNREPRESENTABLE = {
    "lr": 1e39,
    "weight_decay": 1e39,
    "addressing_weight": 1e39,
    "eps": 1e-60,
    "temperature": 1e-60,
}  # infinite or zero in float32


@pytest.mark.parametrize("name, value", [*UNREPRESENTABLE.items(), ("eps", 1e60)], ids=str)
@pytest.mark.parametrize("key", SCANS)
def test_an_option_that_the_memory_cannot_represent_is_refused_by_name(key, name, value):
    """lr = 1e39 is infinite, and temperature = 1e-60 zero, for a float32 memory."""
    tensors = scan_inputs(dtype=torch.float32)
    changes = {"score": "idw", "lookahead": 0, name: value}
    assert_refuses(lambda: ENTRIES[key].run(tensors, **changes), tensors, [name])


@pytest.mark.parametrize("missing", ["topk", "chunk_size"])
@pytest.mark.parametrize("key", SCANS)
def test_an_option_without_a_default_must_be_given(key, missing):
    options = {name: x for name, x in OPTIONS.items() if name != missing}
    with pytest.raises(TypeError, match=missing):
        ENTRIES[key].call(**ENTRIES[key].fresh(), **options)


OTHER_OPTIONS = {  # for the backward pass: those of another scan, which the saved tensors contradict
    "topk": (1, 2, 4),
    "chunk_size": (1, 2, 4, 7, 100),
    "lookahead": (0, 2, 3, 2**62),
    "grad_clip": (None,),
    "boundary": ("carry",),
    "flush": (False,),
}


@pytest.mark.parametrize("name, value", [(k, x) for k, values in OTHER_OPTIONS.items() for x in values], ids=str)
def test_a_backward_pass_with_the_options_of_another_scan_is_refused(name, value):
    entry = ENTRIES["chunk_scan_backward"]
    tensors = entry.fresh()
    assert_refuses(lambda: entry.run(tensors, **{name: value}), tensors, list(tensors))


# ----------------------------------------------------------------------------------------------------------- numbers
NOT_FINITE = (nan, inf, -inf)


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["query", "target", "loss_weights", "sub_keys"])
@pytest.mark.parametrize("key", SCANS)
def test_a_number_that_is_not_finite_is_refused(key, name, position, value):
    """lookahead = 0, no mask: every entry is used."""
    entry = ENTRIES[key]
    tensors = entry.fresh() | {"mask": None}
    tensors[name] = at(tensors[name], position, value)
    assert_refuses(lambda: entry.run(tensors, lookahead=0), tensors, [name])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["query", "target", "loss_weights"])
@pytest.mark.parametrize("key", SCANS)
def test_a_half_precision_number_that_is_not_finite_is_refused(key, name, kind):
    tensors = scan_inputs(dtype=torch.float32) | {"mask": None}
    for position, value in itertools.product(POSITIONS, NOT_FINITE):
        bad = tensors | {name: at(tensors[name].to(kind), position, value)}
        assert_refuses(lambda bad=bad: ENTRIES[key].run(bad, lookahead=0), bad, [name])


PLACES_OF_QUERIES = {  # token, options: queries that are read although nothing is written for them
    "carried": (0, {"boundary": "carry", "carried": 1}),
    "unflushed-tail": (6, {"flush": False}),
    "without-a-pair": (2, {}),
    "masked": (0, {"chunk_size": 7}),
}


@pytest.mark.parametrize("case", PLACES_OF_QUERIES)
@pytest.mark.parametrize("key", SCANS)
def test_a_query_that_is_not_finite_is_refused_wherever_it_is(key, case):
    token, changes = PLACES_OF_QUERIES[case]
    tensors = ENTRIES[key].fresh()
    tensors["query"][1, token, 1, 2] = nan
    tensors["mask"][1, token] = False
    assert_refuses(lambda: ENTRIES[key].run(tensors, **changes), tensors, ["query"])


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("key", SCANS)
def test_a_row_that_is_not_finite_and_read_at_once_is_refused(key, value):
    entry = ENTRIES[key]
    tensors = entry.fresh() | {"mask": None}
    slot = fwpkm_cuda.chunk_scan(**tensors, **OPTIONS).indices[1, 0, 1, 0]
    tensors["values"][slot, 3] = value
    assert_refuses(lambda: entry.run(tensors), tensors, ["values"])


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_a_row_found_damaged_by_a_later_chunk_leaves_no_chunk_half_written(value):
    """The memory is as it was, or as whole chunks left it."""
    inputs = scan_inputs(Sizes(P=16), seed=4) | {"mask": None}
    reads = fwpkm_cuda.chunk_scan(**inputs, **OPTIONS).indices
    first, second = (set(reads[:, part].flatten().tolist()) for part in (slice(0, 3), slice(3, 5)))
    inputs["values"][min(second - first), 0] = value
    chunk = {n: x if x is None or n in ("values", "sub_keys") else x[:, :3] for n, x in inputs.items()}
    after = in_place(*chunk.values(), **OPTIONS)
    allowed = [[bits(inputs[n]) for n in ("values", "sub_keys")], [bits(after.values), bits(after.sub_keys)]]
    with pytest.raises(REFUSED, match=r"\bvalues\b"):
        fwpkm_cuda.chunk_scan_(**inputs, **OPTIONS)
    assert [bits(inputs[n]) for n in ("values", "sub_keys")] in allowed


DIVERGING = {  # finite numbers and options, with which one write overflows float32
    "huge-step": {"lr": 3e38},
    "huge-decay": {"lr": 1e19, "weight_decay": 1e20},
    "huge-addressing-weight": {"addressing_weight": 3e38, "lr": 1e3},
}


@pytest.mark.parametrize("chunk_size", [3, 7])
@pytest.mark.parametrize("case", DIVERGING)
def test_a_write_that_overflows_never_reaches_the_memory(case, chunk_size):
    """Also the last one of a call, which nobody reads in this call: the memory stays finite, or the call raises."""
    tensors = scan_inputs(dtype=torch.float32)
    tensors["target"] *= 100
    changes = DIVERGING[case] | {"chunk_size": chunk_size}
    assert_refuses(lambda: ENTRIES["chunk_scan_"].run(tensors, **changes), tensors, ["values", "sub_keys", *changes])


def test_an_overflow_in_a_later_chunk_leaves_no_chunk_half_written():
    """Numbers of 1e-20 and a step of 1e21; then targets of 1e18, whose loss float32 can hold but not their step."""
    inputs = scan_inputs(dtype=torch.float32) | {"mask": None}
    inputs["values"] *= 1e-20
    inputs["target"][:, :3] *= 1e-20
    inputs["target"][:, 3:] *= 1e18
    options = OPTIONS | {"lr": 1e21, "addressing_weight": 0.0, "values_only": True}
    chunk = {n: x if x is None or n in ("values", "sub_keys") else x[:, :3] for n, x in inputs.items()}
    after = in_place(*chunk.values(), **options)
    assert not torch.equal(after.values, inputs["values"])
    allowed = [[bits(inputs[n]) for n in ("values", "sub_keys")], [bits(after.values), bits(after.sub_keys)]]
    with pytest.raises(REFUSED, match=r"\bvalues\b"):
        fwpkm_cuda.chunk_scan_(**inputs, **options)
    assert [bits(inputs[n]) for n in ("values", "sub_keys")] in allowed


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", ["new_rows", "new_sub_keys"])
@pytest.mark.parametrize("key", ["commit_", "raw-commit_"])
def test_a_log_that_is_not_finite_is_not_committed(key, name, value):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    place = int((tensors["new_slots"] >= 0).nonzero()[-1])
    tensors[name][(place, 4) if name == "new_rows" else (1, 1, 3, 2)] = value
    assert_refuses(lambda: entry.run(tensors), tensors, [name])


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("name", ["query", "sub_keys"])
def test_a_search_refuses_numbers_that_are_not_finite(name, score, position, value):
    entry = ENTRIES["product_key_topk"]
    tensors = entry.fresh()
    tensors[name] = at(tensors[name], position, value)
    assert_refuses(lambda: entry.run(tensors, score=score), tensors, [name])


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", ["values", "weights"])
def test_a_gather_passes_numbers_that_are_not_finite_on_as_plain_torch_does(name, position, value):
    """It writes nothing, and a weight of zero does not hide an infinity."""
    tensors = gather_tensors()
    tensors["weights"][0, 0] = 0.0
    tensors[name] = at(tensors[name], position, value)
    values, indices, weights = (tensors[n] for n in ("values", "indices", "weights"))
    out, expected = fwpkm_cuda.value_gather(values, indices, weights), (weights.unsqueeze(-1) * values[indices]).sum(-2)
    torch.testing.assert_close(out, expected, equal_nan=True)


# ------------------------------------------------------------------------------------------- numbers nobody may use
# lookahead = 1, chunks of 3: tokens 2, 5 and 6 answer to nobody, and nobody answers to the targets of 0, 3 and 6
UNUSED = {
    "target-of-a-chunks-first-token": ("target", (1, 3), {}),
    "target-of-the-first-token": ("target", (0, 0), {}),
    "target-of-the-carried-token": ("target", (0, 0), {"boundary": "carry", "carried": 1}),
    "target-of-an-unflushed-tail": ("target", (1, 6), {"flush": False}),
    "gate-of-a-chunks-last-token": ("loss_weights", (1, 2), {}),
    "gate-of-the-last-token": ("loss_weights", (1, 6), {"boundary": "carry"}),
    "gate-of-an-unflushed-tail": ("loss_weights", (1, 6), {"flush": False, "lookahead": 0}),
    "gate-of-a-masked-token": ("loss_weights", (1, 1), {}),
}


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("case", UNUSED)
def test_a_number_nobody_uses_is_refused_or_without_effect(case, value):
    name, place, changes = UNUSED[case]
    clean, spoilt = scan_inputs(), scan_inputs()
    for tensors in (clean, spoilt):
        tensors["mask"][1, 1] = False
    spoilt[name][place] = value
    before = {n: bits(x) for n, x in spoilt.items()}
    try:
        found = functional(*spoilt.values(), **OPTIONS | changes)
        written = in_place(*spoilt.values(), **OPTIONS | changes)
    except RuntimeError as error:
        assert name in str(error)
    else:
        expected = functional(*clean.values(), **OPTIONS | changes)
        assert_same_bits(found, expected, case)
        assert_same_bits(written, expected, case)
    assert {n: bits(x) for n, x in spoilt.items()} == before


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("boundary", ["drop", "carry"])
@pytest.mark.parametrize("activation", [torch.float64, torch.bfloat16], ids=str)
def test_the_target_of_a_masked_token_may_be_anything(activation, boundary, value):
    """Same bits of outputs, gradients and memory as with another number, wherever in the sequence the token is."""
    inputs = scan_inputs(activation=activation)
    inputs["mask"] = torch.tensor([[0, 1, 1, 0, 1, 1, 0], [0, 0, 1, 1, 0, 1, 1]]).bool()
    spoilt = inputs | {"target": inputs["target"].clone()}
    spoilt["target"][:, 1:][~inputs["mask"][:, :-1]] = value
    options = OPTIONS | {"boundary": boundary, "values_only": False}
    assert_same_bits(in_place(*spoilt.values(), **options), in_place(*inputs.values(), **options))

    def gradients(inputs):
        leaves = {n: x if n == "mask" else x.detach().requires_grad_() for n, x in inputs.items()}
        scan = fwpkm_cuda.chunk_scan(**leaves, **options, sparse_grad=False)
        outputs = [x for x in scan if x.requires_grad]
        wanted = [x for n, x in leaves.items() if n != "mask"]
        found = torch.autograd.grad(outputs, wanted, [random(*x.shape, dtype=x.dtype) for x in outputs])
        return [*scan, *found]

    assert_same_bits(gradients(spoilt), gradients(inputs))


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
def test_a_row_of_the_log_that_holds_nothing_is_not_committed(value):
    entry = ENTRIES["commit_"]
    clean, spoilt = entry.fresh(), entry.fresh()
    spoilt["new_rows"][spoilt["new_slots"] < 0] = value
    for tensors in (clean, spoilt):
        entry.run(tensors)
    assert_same_bits([spoilt[n] for n in entry.written], [clean[n] for n in entry.written])


# ----------------------------------------------------------------------------------------------------------- indices
OUT_OF_RANGE = (-1, 16, 17, INT32.min, INT32.max)
BEYOND_INT32 = (2**31, 2**32, 2**32 + 1, -(2**31) - 1, INT64.min, INT64.max)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("value", OUT_OF_RANGE + BEYOND_INT32)
@pytest.mark.parametrize("key", ["value_gather", "value_gather_dvalues", "value_gather_dweights"])
def test_an_index_outside_the_slots_is_refused(key, value, position):
    entry = ENTRIES[key]
    for dtype in (torch.int32, torch.int64) if value in OUT_OF_RANGE else (torch.int64,):
        tensors = entry.fresh()
        tensors["indices"] = at(tensors["indices"].to(dtype), position, value)
        assert_refuses(lambda tensors=tensors: entry.run(tensors), tensors, ["indices"], [f"got {value}"])


SAVED_INDICES = {  # entry and tensor, the values it may not hold
    ("product_key_topk_backward", "indices"): OUT_OF_RANGE,
    ("commit_", "new_slots"): (-2, *OUT_OF_RANGE[1:]),
    ("raw-commit_", "new_slots"): (-2, *OUT_OF_RANGE[1:]),
    ("chunk_scan_backward", "list_indices"): (-1, 4, INT32.min, INT32.max),
    ("chunk_scan_backward", "places"): (-2, 84, INT32.min, INT32.max),
    ("chunk_scan_backward", "read_from"): (-2, 84, INT32.min, INT32.max),
}


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("key, name, value", [(*k, x) for k, values in SAVED_INDICES.items() for x in values])
def test_a_saved_index_out_of_range_is_refused(key, name, value, position):
    entry = ENTRIES[key]
    tensors = entry.fresh()
    tensors[name] = at(tensors[name], position, value)
    assert_refuses(lambda: entry.run(tensors), tensors, [name], [f"got {value}"])


@pytest.mark.parametrize("key", ["commit_", "raw-commit_"])
def test_a_slot_that_stands_twice_in_a_log_is_refused(key):
    tensors = ENTRIES[key].fresh()
    places = (tensors["new_slots"] >= 0).nonzero().flatten()
    tensors["new_slots"][places[-1]] = tensors["new_slots"][places[0]]
    assert_refuses(lambda: ENTRIES[key].run(tensors), tensors, ["new_slots"])


# ---------------------------------------------------------------------------------------------------- written in place
NOT_CONTIGUOUS = {
    "transposed": lambda x: x.transpose(0, -1).contiguous().transpose(0, -1),
    "every-second-column": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "rows-apart": lambda x: torch.cat((x, x), -1)[..., : x.shape[-1]],
}


@pytest.mark.parametrize("layout", NOT_CONTIGUOUS)
@pytest.mark.parametrize("name", ["values", "sub_keys"])
@pytest.mark.parametrize("key", ["chunk_scan_", "commit_", "raw-commit_"])
def test_a_memory_that_is_not_contiguous_is_not_written_in_place(key, name, layout):
    tensors = ENTRIES[key].fresh()
    tensors[name] = NOT_CONTIGUOUS[layout](tensors[name])
    came = [str(tensors[name].stride()), f"({', '.join(map(str, tensors[name].shape))})"]
    assert_refuses(lambda: ENTRIES[key].run(tensors), tensors, [name], came)


SHARING = {  # name: a tensor of its shape that shares memory with values or sub_keys
    "sub_keys-in-values": ("sub_keys", lambda t, x: t["values"].view(-1)[8 : 8 + x.numel()].view(x.shape)),
    "target-is-values": ("target", lambda t, x: t["values"].view(-1)[: x.numel()].view(x.shape)),
    "query-is-values": ("query", lambda t, x: t["values"].view(-1)[:6].expand_as(x)),
    "query-is-sub_keys": ("query", lambda t, x: t["sub_keys"].view(-1)[:6].expand_as(x)),
    "loss_weights-are-sub_keys": ("loss_weights", lambda t, x: t["sub_keys"].view(-1)[:14].view(x.shape)),
}


@pytest.mark.parametrize("chunk_size", [3, 7])
@pytest.mark.parametrize("case", SHARING)
def test_an_input_that_shares_memory_with_what_is_written_is_refused_or_as_good_as_a_copy(case, chunk_size):
    name, view = SHARING[case]
    tensors = ENTRIES["chunk_scan_"].fresh()
    tensors[name] = view(tensors, tensors[name])
    options = OPTIONS | {"chunk_size": chunk_size, "weight_decay": 0.1}
    expected = functional(*(x.clone() for x in tensors.values()), **options)
    before = {n: bits(x) for n, x in tensors.items()}
    try:
        fwpkm_cuda.chunk_scan_(**tensors, **options)
    except RuntimeError as error:
        assert name in str(error) or "values" in str(error)
        assert {n: bits(x) for n, x in tensors.items()} == before
    else:
        assert_same_bits((tensors["values"], tensors["sub_keys"]), (expected.values, expected.sub_keys), case)


@pytest.mark.parametrize("case", ["new_rows-in-values", "new_sub_keys-in-values", "sub_keys-in-values"])
def test_a_log_that_shares_memory_with_what_is_written_is_refused_or_as_good_as_a_copy(case):
    name = case.removesuffix("-in-values")
    entry = ENTRIES["raw-commit_"]
    tensors = entry.fresh()
    flat = tensors["values"].view(-1)
    if name == "new_rows":  # the rows that belong to slots 15, 14, ...: rows 0, 1, ... of the memory itself
        tensors["new_rows"] = tensors["values"][:8]
        tensors["new_slots"] = torch.arange(15, 7, -1, dtype=torch.int32) - torch.arange(8, dtype=torch.int32) % 2 * 8
    else:
        tensors[name] = flat[8:56].view(tensors[name].shape)
    copies = {n: x.clone() for n, x in tensors.items()}
    before = {n: bits(x) for n, x in tensors.items()}
    entry.run(copies)
    try:
        entry.run(tensors)
    except RuntimeError as error:
        assert name in str(error) or "values" in str(error)
        assert {n: bits(x) for n, x in tensors.items()} == before
    else:
        assert_same_bits([tensors[n] for n in entry.written], [copies[n] for n in entry.written], case)


@pytest.mark.parametrize("leaf", [True, False], ids=["leaf", "computed"])
@pytest.mark.parametrize("name", ["values", "sub_keys", "query", "target", "loss_weights"])
def test_an_input_that_requires_grad_is_not_scanned_in_place_while_grad_is_on(name, leaf):
    entry = ENTRIES["chunk_scan_"]
    tensors = entry.fresh()
    tensors[name] = tensors[name].requires_grad_() if leaf else tensors[name].requires_grad_() * 1
    assert_refuses(lambda: entry.run(tensors), tensors, [name])
    expected = in_place(*tensors.values(), **OPTIONS)
    with torch.no_grad():
        entry.run(tensors)
    assert_same_bits((tensors["values"], tensors["sub_keys"]), (expected.values, expected.sub_keys))


@pytest.mark.parametrize("name", ["values", "sub_keys"])
def test_a_memory_that_requires_grad_is_not_committed_while_grad_is_on(name):
    entry = ENTRIES["commit_"]
    tensors = entry.fresh()
    tensors[name].requires_grad_()
    assert_refuses(lambda: entry.run(tensors), tensors, [name])


@pytest.mark.parametrize("name", ["product_key_topk", "chunk_scan"])
def test_a_second_derivative_is_refused_loudly(name):
    """Both are differentiable once; the message says where to get more."""
    entry = ENTRIES[name]
    tensors = {n: x.requires_grad_() if x.is_floating_point() else x for n, x in entry.fresh().items()}
    result = entry.call(**tensors, **entry.options)[0]
    (gradient,) = torch.autograd.grad(result.square().sum(), tensors["query"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()
