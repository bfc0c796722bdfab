"""What the tests of bad input and of edge cases share: inputs, options, comparisons of bits and of numbers."""

from typing import NamedTuple

import torch
from inputs import here

import fwpkm_cuda
from fwpkm_cuda import reference

NAMES = ("values", "sub_keys", "query", "target", "loss_weights", "mask")  # of a scan's inputs, in order
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # of one entry, when an activation is rounded


class Sizes(NamedTuple):
    """Two heads, five values and no size that equals another by chance, but the ones that may be confused safely."""

    B: int = 2
    T: int = 7
    H: int = 2
    K: int = 6
    P: int = 4
    V: int = 5


def random(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator("cpu").manual_seed(seed)
    return here(torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu").to(dtype))


def scan_inputs(sizes=None, dtype=torch.float64, activation=None, seed=0):
    """The six inputs of a scan by name, drawn at random; a mask with about a third of false entries."""
    B, T, H, K, P, V = sizes or Sizes()
    shapes = {
        "values": (P * P, V),
        "sub_keys": (H, 2, P, K // 2),
        "query": (B, T, H, K),
        "target": (B, T, V),
        "loss_weights": (B, T),
    }
    memory = ("values", "sub_keys")
    inputs = {
        name: random(*shape, seed=10 * seed + i, dtype=dtype if name in memory else activation or dtype)
        for i, (name, shape) in enumerate(shapes.items())
    }
    return inputs | {"mask": random(B, T, seed=10 * seed + 9) > -0.5}


OPTIONS = {  # of the raw operator chunk_scan_, in its order
    "topk": 3,
    "chunk_size": 3,
    "lookahead": 1,
    "score": "dot",
    "eps": 1e-3,
    "activation": "softmax",
    "temperature": 1.0,
    "lr": 0.5,
    "weight_decay": 0.0,
    "grad_clip": None,
    "write_rule": "paper",
    "values_only": True,
    "addressing_weight": 1.0,
    "boundary": "drop",
    "carried": 0,
    "flush": True,
}


# --------------------------------------------------------------------------------------------------- implementations
def commit(values, sub_keys, scan, options):
    """What `commit_` makes of copies of the memory."""
    values, sub_keys = values.detach().clone(), sub_keys.detach().clone()
    decay = {name: options[name] for name in ("lr", "weight_decay") if name in options}
    with torch.no_grad():
        fwpkm_cuda.commit_(values, sub_keys, scan, **decay)
    return values, sub_keys


def functional(values, sub_keys, *inputs, **options):
    """`chunk_scan` and `commit_` with the interface of `reference.chunk_scan`."""
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, *inputs, **options)
    return reference.Scan(*scan[:5], *commit(values, sub_keys, scan, options))


@torch.no_grad()
def in_place(values, sub_keys, *inputs, **options):
    """`chunk_scan_` on copies of the memory, with the interface of `reference.chunk_scan`."""
    values, sub_keys = values.detach().clone(), sub_keys.detach().clone()
    return reference.Scan(*fwpkm_cuda.chunk_scan_(values, sub_keys, *inputs, **options), values, sub_keys)


# ------------------------------------------------------------------------------------------------------- comparisons
def bits(tensor):
    """The bytes of a tensor's entries: NaN equals NaN, 0.0 differs from -0.0."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()


def assert_same_bits(actual, expected, context=""):
    """Equal shapes, dtypes and bits of two tensors, or of two sequences of tensors or None."""
    if isinstance(expected, torch.Tensor):
        assert actual.shape == expected.shape, f"{context}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
        assert actual.dtype == expected.dtype, f"{context}: dtype {actual.dtype}, not {expected.dtype}"
        if bits(actual) != bits(expected):
            a, e = (x.detach().flatten() for x in (actual, expected))
            where = [i for i in range(len(a)) if bits(a[i]) != bits(e[i])]
            raise AssertionError(
                f"{context}: {len(where)} of {len(a)} entries differ in their bits, first at flat position {where[0]}: "
                f"{a[where[0]].item()!r}, not {e[where[0]].item()!r}"
            )
        return
    names = getattr(expected, "_fields", range(len(expected)))
    for name, a, e in zip(names, actual, expected, strict=True):
        assert (a is None) == (e is None), f"{context} {name}"
        if e is not None:
            assert_same_bits(a, e, f"{context} {name}".strip())


def assert_close(name, actual, expected, tolerance, rounding=0.0, smallest=1e-2):
    """|actual - expected| <= tolerance * max(|expected|, smallest) + rounding * (|expected| + 1e-4), in every entry."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    allowed = tolerance * expected.abs().max().clamp(min=smallest) + rounding * (expected.abs() + 1e-4)
    error = (actual - expected).abs()
    worst = int((error - allowed).nan_to_num(nan=float("inf")).argmax())
    found, wanted = float(actual.flatten()[worst]), float(expected.flatten()[worst])
    assert bool((error <= allowed).all()), f"{name}: {found!r}, not {wanted!r}, at flat position {worst}"
