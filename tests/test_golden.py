"""Parity with the released FwPKM code: every array of every golden file of a bare memory, for the reference and for the
operators. (Files of whole layers: test_golden_layers.py.)

Left out: asis_grad_*, which record a bug of the release (its saved weights were overwritten before the backward pass),
and outer_loss, the sum of output * r."""

import itertools
import math
from functools import partial

import pytest
import torch
from golden_files import FOLDER, GOLDEN, SHIPPED, assert_close, load
from released_stream import Queue, equals_our_stream, released_stream

import fwpkm_cuda
from fwpkm_cuda import reference

pytestmark = pytest.mark.usefixtures("device")

FWPKM = [golden for golden in GOLDEN if golden.config["kind"] == "fwpkm"]
STREAM = [golden for golden in FWPKM if golden.config["mode"] == "stream"]
CHUNKED = [golden for golden in FWPKM if golden.config["mode"] != "stream"]
SHIPPED_STREAM = [
    golden
    for golden in map(load, sorted(SHIPPED.glob("*.npz")))
    if golden.config["kind"] == "fwpkm" and golden.config["mode"] == "stream"
]

OUTER = ("values0", "keys0", "q", "ref_v", "gates")  # the outer gradients of a file, in the order of Golden.inputs


def outer_gradients(golden):
    """full_grad_* where present, else grad_*; not the latter for values_only=False, where they lack a term."""
    gradients = {name: golden.arrays.get(f"full_grad_{name}") for name in OUTER}
    if golden.config["values_only"]:
        gradients = {name: golden.arrays.get(f"grad_{name}") if g is None else g for name, g in gradients.items()}
    return {name: g for name, g in gradients.items() if g is not None}


# --------------------------------------------------------------------------------------------------- implementations
def operators(values, sub_keys, *inputs, **options):
    """`chunk_scan` and `commit_`, with the interface of `reference.chunk_scan`."""
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, *inputs, **options)
    values, sub_keys = values.detach().clone(), sub_keys.detach().clone()
    with torch.no_grad():
        fwpkm_cuda.commit_(values, sub_keys, scan, lr=options["lr"], weight_decay=options["weight_decay"])
    return reference.Scan(*scan[:5], values, sub_keys)


def operators_in_place(values, sub_keys, *inputs, **options):
    """`chunk_scan_`, with the interface of `reference.chunk_scan`; no gradients."""
    values, sub_keys = values.clone(), sub_keys.clone()
    scan = fwpkm_cuda.chunk_scan_(values, sub_keys, *inputs, **options)
    return reference.Scan(*scan[:5], values, sub_keys)


IMPLEMENTATIONS = {
    "reference": reference.chunk_scan,
    "operators": operators,
    "operators_in_place": operators_in_place,
}
DIFFERENTIABLE = {
    "reference": reference.chunk_scan,
    "operators": operators,
    "operators_dense_gradient": partial(operators, sparse_grad=False),
}


def cases(goldens, implementations):
    return [pytest.param(g, f, id=f"{g.stem}-{name}") for g in goldens for name, f in implementations.items()]


# ----------------------------------------------------------------------------------------------------------- checks
def assert_slots(golden, actual, expected):
    """The same slots in the same order, where the scores are further apart than their error; else the same sets."""
    gaps = [gap for gap in (golden.config["min_select_gap"], golden.config["min_order_gap"]) if gap is not None]
    if min(gaps, default=math.inf) <= golden.tolerance["scores"]:
        actual, expected = actual.sort(-1).values, expected.sort(-1).values
    assert torch.equal(actual.long(), expected.long()), "indices differ"


def assert_reads(golden, out, indices, weights):
    a, tolerance = golden.arrays, golden.tolerance["outputs"]
    assert_slots(golden, indices, a["indices"])
    assert_close("scores", weights, a["scores"], tolerance)
    assert_close("output", out, a["output"], tolerance, golden.rounding)


def assert_memory(golden, values, sub_keys):
    a, tolerance = golden.arrays, golden.tolerance["outputs"]
    assert_close("keys1", sub_keys.reshape(a["keys1"].shape), a["keys1"], tolerance, golden.rounding)
    assert_close("values1", values, a["values1"], tolerance, golden.rounding)


@pytest.mark.cpu
# ------------------------------------------------------------------------------------------------------- chunk mode
def test_the_folder_holds_fwpkm_files():
    assert FWPKM, f"no golden file of kind fwpkm in {FOLDER}"


@pytest.mark.parametrize("golden, scan", cases(CHUNKED, IMPLEMENTATIONS))
def test_reads_losses_and_memory_match_the_release(golden, scan):
    with torch.no_grad():
        result = scan(*golden.inputs(), write_rule="release", **golden.options)
    assert_reads(golden, result.out, result.indices, result.weights)
    assert_memory(golden, result.values, result.sub_keys)
    a, tolerance = golden.arrays, golden.tolerance["outputs"]
    for name, actual in (("losses", result.losses), ("addr_loss", result.addressing_loss.mean())):
        if name in a:
            assert_close(name, actual, a[name], tolerance)
    assert golden.config["addr_loss"] or not result.addressing_loss.any()


@pytest.mark.parametrize("golden, scan", cases([g for g in CHUNKED if "grad_norm_values" in g.arrays], IMPLEMENTATIONS))
def test_sizes_of_the_fast_gradients_match_the_release(golden, scan):
    """grad_norm_*: the mean over the chunks of |G|, before clipping and without weight decay.

    No function returns G, so each chunk is also written with a huge step, and G = (old - new) / step; huge, so that the
    old memory costs G no digits. Its own step then leads to the next chunk."""
    options = dict(golden.options, write_rule="release")
    huge = 2.0**20
    bare = dict(options, lr=huge, weight_decay=0.0, grad_clip=None)
    values, sub_keys, *inputs = golden.inputs()
    norms = []
    with torch.no_grad():
        for start in range(0, golden.config["T"], options["chunk_size"]):
            chunk = [None if x is None else x[:, start : start + options["chunk_size"]] for x in inputs]
            moved = scan(values, sub_keys, *chunk, **bare)
            pairs = ((sub_keys, moved.sub_keys), (values, moved.values))
            norms.append(torch.stack([((old.double() - new.double()) / huge).norm() for old, new in pairs]))
            result = scan(values, sub_keys, *chunk, **options)
            values, sub_keys = result.values, result.sub_keys
    for name, norm in zip(("grad_norm_keys", "grad_norm_values"), torch.stack(norms).mean(0), strict=True):
        assert_close(name, norm, golden.arrays[name], golden.tolerance["outputs"])


@pytest.mark.parametrize("golden, scan", cases(filter(outer_gradients, CHUNKED), DIFFERENTIABLE))
def test_outer_gradients_match_the_release(golden, scan):
    inputs = golden.inputs()
    leaves = {name: x.requires_grad_() for name, x in zip(OUTER, inputs, strict=False) if x is not None}
    result = scan(*inputs, write_rule="release", **golden.options)
    assert_reads(golden, result.out.detach(), result.indices, result.weights.detach())
    expected = outer_gradients(golden)
    loss = (result.out * golden.arrays["r"]).sum()
    actual = torch.autograd.grad(loss, [leaves[name] for name in expected])
    for (name, gradient), found in zip(expected.items(), actual, strict=True):
        found = (found.to_dense() if found.is_sparse else found).reshape(gradient.shape)
        assert_close(f"gradient of {name}", found, gradient, golden.tolerance["gradients"], golden.rounding)


# ------------------------------------------------------------------------------------------------------ stream mode
def calls(golden):
    """query, target, loss_weights, mask of each call of a stream file."""
    return cut(golden.inputs()[2:], golden.config["segments"])


def cut(inputs, segments):
    """The inputs of each call, None for those that are None."""
    parts = (itertools.repeat(None) if x is None else x.split(segments, 1) for x in inputs)
    return zip(*parts, strict=False)  # the repeated None have no end


@torch.no_grad()
def assert_stream(golden, feed, state):
    """Runs `feed(state, *inputs) -> (Scan, next state)` over the calls of a stream file and compares every array.

    bfloat16: the memory is rounded after every call, as the release does when it stores its parameters."""
    a, tolerance = golden.arrays, golden.tolerance["outputs"]
    reads = []
    for i, inputs in enumerate(calls(golden)):
        result, state = feed(state, *inputs)
        if golden.config["dtype"] == "bfloat16":
            state = state._replace(**{k: getattr(state, k).bfloat16().float() for k in ("values", "sub_keys")})
        reads.append((result.out, result.indices, result.weights))
        updated = bool(a["updated_in_seg"][i])
        assert updated == bool(result.addressing_loss.numel()) == (f"losses_seg{i}" in a), f"update in call {i}"
        if updated:
            assert_close(f"losses_seg{i}", result.losses, a[f"losses_seg{i}"], tolerance)
        expected = a["addr_loss_seg"][i].nan_to_num()
        address_loss = result.addressing_loss.mean() if updated else torch.zeros(())
        assert_close(f"addr_loss_seg[{i}]", address_loss, expected, tolerance)
        queued = 0 if state.query is None else state.query.shape[1]
        assert queued == int(a["queue_len_after_seg"][i]), f"queue after call {i}"
        for name, memory in (("keys", state.sub_keys), ("values", state.values)):
            expected = a[f"{name}_norm_after_seg"][i]
            assert_close(f"{name}_norm_after_seg[{i}]", memory.double().norm(), expected, tolerance)
    assert_reads(golden, *(torch.cat(x, 1) for x in zip(*reads, strict=True)))
    assert_memory(golden, state.values, state.sub_keys)
    fields = {"q": "query", "hyp_v": "prediction", "ref_v": "target", "gates": "loss_weights", "mask": "mask"}
    for name, field in fields.items():
        if f"queue_{name}" in a and (field != "prediction" or hasattr(state, field)):
            expected = a[f"queue_{name}"]
            left = getattr(state, field).reshape(expected.shape)
            assert_close(f"queue_{name}", left, expected, tolerance if name == "hyp_v" else 0.0)


@pytest.mark.parametrize("golden", [pytest.param(g, id=g.stem) for g in STREAM])
def test_released_stream_matches_every_array(golden):
    assert_stream(golden, partial(released_stream, **golden.options), Queue(*golden.inputs()[:2]))


def our_stream(golden, scan, boundary):
    return partial(reference.stream, scan=scan, boundary=boundary, write_rule="release", **golden.options)


@pytest.mark.parametrize("golden, scan", cases([g for g in STREAM if equals_our_stream(g.config)], IMPLEMENTATIONS))
def test_our_stream_matches_every_array_where_the_schedules_agree(golden, scan):
    feed = our_stream(golden, scan, equals_our_stream(golden.config))
    assert_stream(golden, feed, reference.Stream(*golden.inputs()[:2]))


@pytest.mark.cpu
# ---------------------------------------------------------------------------------------- where the schedules agree
def test_schedules_agree_on_three_of_the_eight_shipped_streams():
    """Those whose calls are one chunk each; in the others some update ends a longer or a shorter piece."""
    boundaries = {tuple(g.config["segments"]): equals_our_stream(g.config) for g in SHIPPED_STREAM}
    assert boundaries == {
        (5, 1, 9, 3, 1, 1, 1, 12, 8): None,
        (6, *[1] * 20): None,
        (7, 1, 1, 10, 2): None,
        (43, 3, 16): None,
        (8, 8, 4, 4, 1, 7): None,
        (8, 8, 8, 8, 8): "carry",
        (8, 8, 8, 8): "carry",
        (16, 16, 16): "carry",
    }


@pytest.mark.parametrize(
    "golden", [pytest.param(g, id=g.stem) for g in SHIPPED_STREAM if equals_our_stream(g.config) is None]
)
@pytest.mark.parametrize("boundary", ["drop", "carry"])
@torch.no_grad()
def test_our_stream_differs_where_the_schedules_do(golden, boundary):
    state = reference.Stream(*golden.inputs()[:2])
    for inputs in calls(golden):
        _, state = our_stream(golden, reference.chunk_scan, boundary)(state, *inputs)
    expected = golden.arrays["values1"]
    assert (state.values - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.cpu
@pytest.mark.parametrize(
    "chunk_size, lookahead, segments, boundary",
    [
        (8, 1, (8, 16, 8), "carry"),  # later calls may hold several chunks
        (8, 1, (8, 8, 6), "carry"),  # the rest waits: 1 + 6 tokens are less than a chunk
        (8, 1, (8, 8, 7), None),  # 1 + 7 tokens are updated, though no chunk is full
        (8, 1, (16,), None),  # the first piece takes 9 tokens
        (8, 1, (4, 4), None),  # the piece that is counted is half a chunk
        (8, 0, (16, 3), "drop"),  # without a lookahead the first piece is a chunk
        (8, 0, (3, 16), None),
        (8, 2, (3, 4), "drop"),  # no update at all
    ],
)
def test_schedules_agree_when_each_updating_piece_is_one_chunk(chunk_size, lookahead, segments, boundary):
    assert equals_our_stream({"chunk": chunk_size, "lookahead": lookahead, "segments": segments}) == boundary


@pytest.mark.cpu
@pytest.mark.parametrize("masked", [False, True], ids=["no_mask", "mask"])
@pytest.mark.parametrize("chunk_size, lookahead, tokens", [(2, 0, 5), (2, 1, 5), (3, 0, 6), (3, 1, 6), (3, 2, 6)])
@torch.no_grad()
def test_agreement_is_decided_right_for_every_short_schedule(chunk_size, lookahead, tokens, masked):
    """All ways to cut a few tokens into calls: our stream equals the release's just where the predicate says so."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values, sub_keys = draw(9, 3), draw(1, 2, 3, 2)
    mask = torch.arange(tokens).expand(2, -1) > torch.tensor([[-1], [1]]) if masked else None
    sequence = (draw(2, tokens, 1, 4), draw(2, tokens, 3), draw(2, tokens).sigmoid(), mask)
    options = {"topk": 2, "chunk_size": chunk_size, "lookahead": lookahead, "score": "idw", "activation": "softmax"}
    options |= {
        "temperature": 1.0,
        "lr": 0.5,
        "weight_decay": 0.1,
        "grad_clip": None,
        "values_only": True,
        "addressing_weight": 1.0,
    }

    def run(feed, state, segments):
        """Everything that can be seen of a stream, in one list."""
        seen = []
        for inputs in cut(sequence, segments):
            result, state = feed(state, *inputs)
            queued = 0 if state.query is None else state.query.shape[1]
            seen += [*result, torch.tensor(queued)]
        return seen

    def same(a, b):
        return all(x.shape == y.shape and torch.allclose(x, y, rtol=0, atol=1e-9) for x, y in zip(a, b, strict=True))

    for new_call in itertools.product([False, True], repeat=tokens - 1):
        edges = [0, *itertools.compress(range(1, tokens), new_call), tokens]
        segments = [end - begin for begin, end in itertools.pairwise(edges)]
        released = run(partial(released_stream, **options), Queue(values, sub_keys), segments)
        ours = partial(reference.stream, write_rule="release", **options)
        start = reference.Stream(values, sub_keys)
        agrees = {b for b in ("drop", "carry") if same(run(partial(ours, boundary=b), start, segments), released)}
        boundary = equals_our_stream({"chunk": chunk_size, "lookahead": lookahead, "segments": segments})
        assert boundary in agrees if boundary else not agrees, f"calls of {segments}: {boundary}, equal with {agrees}"
