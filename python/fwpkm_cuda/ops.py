"""torch.ops.fwpkm from Python: functions with documented shapes, shapes for tracing, derivatives.

Schemas and kernels are C++ (csrc/library.cpp, csrc/cpu, csrc/cuda), so that programs without Python see them. Here are
the fake kernels (torch.compile, torch.export), the autograd formulas, and what in-place operators owe to autograd.

Letters: B batch, T tokens, H heads, K key dimension (two halves of K/2), P sub-keys per half, S = P*P slots, R slots
read per head, V value dimension, C chunk size, L lookahead. The memory (`values`, `sub_keys`) is float32 or float64;
activations (`query`, `target`, `loss_weights`) are of its dtype or bfloat16 or float16.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_ops = torch.ops.fwpkm


class Scan(NamedTuple):
    """Result of `chunk_scan`. W writes, Q pairs per row, E places of the log (one per read of a writing chunk)."""

    out: Tensor  # (B, T, V)       what was read; dtype of query
    indices: Tensor  # (B, T, H, R)    slots read, int32, by falling score
    weights: Tensor  # (B, T, H, R)    their weights
    losses: Tensor  # (B, Q)          memory loss of each pair, in the order of the writes
    addressing_loss: Tensor  # (W,)            addressing loss of each write
    new_rows: Tensor  # (E, V)          rows the writes made; zeros where a place holds none
    new_slots: Tensor  # (E,)            slot whose newest row stands at this place, or -1; int32
    new_sub_keys: Tensor  # (H, 2, P, K/2)


class Reading(NamedTuple):
    """Result of `chunk_scan_`: the first five fields of `Scan`."""

    out: Tensor
    indices: Tensor
    weights: Tensor
    losses: Tensor
    addressing_loss: Tensor


# -------------------------------------------------------------------------------------------------------- functions
def product_key_topk(query, sub_keys, topk, score="dot", eps=1e-3):
    """The R best of P*P slots for each head of each token, without looking at more than 2*P sub-keys.

    query (..., H, K), sub_keys (H, 2, P, K/2) -> scores (..., H, R), indices (..., H, R) int32, by falling score.
    A slot i*P + j scores s_0[i] + s_1[j], with s_p[j] = <query_p, k_pj> ("dot") or -ln(eps + |query_p - k_pj|^2)
    ("idw"). Ties go to the smaller sub-key, where products or distances are equal, then to the smaller slot, where sums
    are. 1 <= topk <= P. Differentiable once with respect to query and sub_keys (the slots are constants).

    Equivalent to `reference.product_key_topk`; docs/mathematics.md, section 2."""
    return _ops.product_key_topk(query, sub_keys, topk, score, eps)


def value_gather(values, indices, weights, sparse_grad=False):
    """out = sum_r weights[..., r] * values[indices[..., r]].

    values (S, V), indices (..., R) int32 or int64, weights (..., R) of the dtype of values -> (..., V). The gradient of
    values is dense, or with sparse_grad a sparse COO tensor with one row per read. Differentiable any number of times
    with respect to values and weights. An index outside [0, S) is an error.

    Equivalent to `(weights.unsqueeze(-1) * values[indices]).sum(-2)`, or to embedding_bag with per_sample_weights."""
    return _ops.value_gather(values, indices, weights, sparse_grad)


def chunk_scan(
    values,
    sub_keys,
    query,
    target,
    loss_weights=None,
    mask=None,
    *,
    topk,
    chunk_size,
    lookahead=1,
    score="dot",
    eps=1e-3,
    activation="softmax",
    temperature=1.0,
    lr=1.0,
    weight_decay=0.0,
    grad_clip=None,
    write_rule="paper",
    values_only=True,
    addressing_weight=1.0,
    boundary="drop",
    carried=0,
    flush=True,
    sparse_grad=True,
) -> Scan:
    """Reads every token with the memory of its chunk and writes the memory after each chunk, differentiably.

    values (S, V), sub_keys (H, 2, P, K/2), query (B, T, H, K), target (B, T, V), loss_weights (B, T) or None, mask
    (B, T) bool or None (True: the token counts in the memory loss) -> `Scan`. Nothing given is changed: new versions of
    rows are returned, and `commit_` puts them into a memory.

    topk             slots read per head, R <= P
    chunk_size       tokens of each row between two writes, C
    lookahead        token x should be answered by target[x + L]
    score, eps       "dot" or "idw", as in `product_key_topk`
    activation       weights from scores / temperature: "softmax" jointly over H*R, or elementwise "silu" or "relu"
    lr, weight_decay, grad_clip     w <- w - lr (clip(g) + weight_decay w); grad_clip None or the largest |g|.
                     Weight decay is the one thing that touches every row: at commit, or in place at every chunk.
                     (A differentiable scan multiplies a row, at each read, once for every write it has missed.)
    write_rule       "paper": each row's gradient divided by N_read; "release": times (N/M) R H / N_read
    values_only      True: sub-keys follow the addressing loss alone; False: the memory loss as well
    addressing_weight               weight of the addressing loss (0: none)
    boundary         pairs (x, x + L) across a chunk's edge: "drop" leaves them out, "carry" writes them with the later
                     chunk, which reads the last L tokens again (needs L <= C)
    carried          leading tokens that belong to the chunk before the call ("carry": 0 or L); no outputs for them
    flush            False: a partial last chunk is read but not written
    sparse_grad      gradient of values: sparse COO, one row per read (zeros but at a slot's first read), or dense

    Gradients of out, weights, losses, addressing_loss, new_rows and new_sub_keys with respect to query, target,
    loss_weights, sub_keys and values are exact (once); slots, N_read, mask and the cut of the top-k are constants.
    Forward-mode derivatives (torch.func.jvp) are not supported. Memory: the log new_rows has one row per read,
    B*T*H*R*V numbers (zeros where two reads of a chunk share a row), plus one copy of sub_keys per write.

    Equivalent to `reference.chunk_scan`; docs/mathematics.md, sections 2 to 5."""
    result = _ops.chunk_scan(
        values, sub_keys, query, target, loss_weights, mask, topk, chunk_size, lookahead, score, eps, activation,
        temperature, lr, weight_decay, grad_clip, write_rule, values_only, addressing_weight, boundary, carried, flush,
        sparse_grad,
    )  # fmt: skip
    return Scan(*result[: len(Scan._fields)])


def chunk_scan_(
    values,
    sub_keys,
    query,
    target,
    loss_weights=None,
    mask=None,
    *,
    topk,
    chunk_size,
    lookahead=1,
    score="dot",
    eps=1e-3,
    activation="softmax",
    temperature=1.0,
    lr=1.0,
    weight_decay=0.0,
    grad_clip=None,
    write_rule="paper",
    values_only=True,
    addressing_weight=1.0,
    boundary="drop",
    carried=0,
    flush=True,
) -> Reading:
    """`chunk_scan` that writes `values` and `sub_keys` in place and keeps no log: for inference.

    The same bits as `chunk_scan` followed by `commit_`. A stream is fed call by call with flush=False: give the pending
    tokens (a partial chunk; with "carry" the last L tokens before it, and carried=L) again in front of the new ones;
    what they read comes out the same. Raises if an input requires grad while grad mode is on. NaN or infinity in query,
    or in a target or loss weight that a pair uses, raises before anything is written; should the memory itself diverge
    during a call, it raises before that chunk is written, and the chunks before it stay."""
    return Reading(
        *_ops.chunk_scan_(
            values, sub_keys, query, target, loss_weights, mask, topk, chunk_size, lookahead, score, eps, activation,
            temperature, lr, weight_decay, grad_clip, write_rule, values_only, addressing_weight, boundary, carried,
            flush,
        )
    )  # fmt: skip


def commit_(values, sub_keys, scan: Scan, *, lr=1.0, weight_decay=0.0) -> None:
    """Puts the newest rows and the sub-keys of a `chunk_scan` into the memory, in place.

    values (S, V) and sub_keys (H, 2, P, K/2) as they were given to the scan; lr and weight_decay as there (weight decay
    also shrinks the rows that were not read). Raises the version counters: a backward pass through the scan must come
    first, or it fails loudly."""
    keep = 1.0 - lr * weight_decay
    _ops.commit_(
        values, sub_keys, scan.new_rows.detach(), scan.new_slots, scan.new_sub_keys.detach(), keep,
        scan.addressing_loss.shape[0],
    )  # fmt: skip


# ----------------------------------------------------------------------------------------- fake kernels: shapes only
def _one_device(**tensors):
    """Tensors of two devices reach the fake kernels when one is a meta tensor, and while tracing."""
    (first, like), *others = ((name, t) for name, t in tensors.items() if t is not None)
    for name, t in others:
        if t.device != like.device:
            raise RuntimeError(f"{name}: expected the device of {first} ({like.device}), got {t.device}")


@torch.library.register_fake("fwpkm::product_key_topk")
def _(query, sub_keys, topk, score="dot", eps=1e-3):
    _one_device(sub_keys=sub_keys, query=query)
    shape = (*query.shape[:-1], topk)
    return sub_keys.new_empty(shape), sub_keys.new_empty(shape, dtype=torch.int32)


@torch.library.register_fake("fwpkm::product_key_topk_backward")
def _(dscores, query, sub_keys, indices, score, eps):
    _one_device(sub_keys=sub_keys, query=query, indices=indices, dscores=dscores)
    return torch.empty_like(query, memory_format=torch.contiguous_format), sub_keys.new_empty(sub_keys.shape)


@torch.library.register_fake("fwpkm::value_gather")
def _(values, indices, weights, sparse_grad=False):
    _one_device(values=values, indices=indices, weights=weights)
    return values.new_empty((*indices.shape[:-1], values.shape[1]))


@torch.library.register_fake("fwpkm::value_gather_dvalues")
def _(dout, indices, weights, num_slots):
    _one_device(dout=dout, indices=indices, weights=weights)
    return dout.new_empty((num_slots, dout.shape[-1]))


@torch.library.register_fake("fwpkm::value_gather_dweights")
def _(dout, values, indices):
    _one_device(values=values, dout=dout, indices=indices)
    return values.new_empty(indices.shape)


def _scan_outputs(values, sub_keys, query, chunk_size, lookahead, boundary, carried, flush):
    """Shapes of chunk_scan's outputs (csrc/ops/chunk_scan.h `schedule`, in closed form for symbolic T)."""
    B, T, H, K = query.shape
    V, half = values.shape[1], sub_keys.shape[3]
    own = T - carried
    writes = (own + chunk_size - 1) // chunk_size if flush else own // chunk_size
    written = own if flush else writes * chunk_size  # tokens of the writing chunks
    if boundary == "drop":
        tokens, rest = written, written - own // chunk_size * chunk_size
        full = own // chunk_size
        pairs = full * max(chunk_size - lookahead, 0) + torch.sym_max(rest - lookahead, 0)
    else:
        some = torch.sym_min(writes, 1)
        first = torch.sym_min(written, chunk_size)
        tokens = written + some * carried + lookahead * (writes - some)
        pairs = some * torch.sym_max(carried + first - lookahead, 0) + written - first
    return B, own, H, V, half, writes, pairs, tokens, own - written


def _keys_move(lr, weight_decay, values_only, addressing_weight):
    return addressing_weight != 0 or not values_only or lr * weight_decay != 0


@torch.library.register_fake("fwpkm::chunk_scan")
def _(
    values, sub_keys, query, target, loss_weights, mask, topk, chunk_size, lookahead, score, eps, activation,
    temperature, lr, weight_decay, grad_clip, write_rule, values_only, addressing_weight, boundary, carried, flush,
    sparse_grad=True,
):  # fmt: skip
    _one_device(values=values, sub_keys=sub_keys, query=query, target=target, loss_weights=loss_weights, mask=mask)
    moves = _keys_move(lr, weight_decay, values_only, addressing_weight)
    B, own, H, V, half, writes, pairs, tokens, tail = _scan_outputs(
        values, sub_keys, query, chunk_size, lookahead, boundary, carried, flush
    )
    places, saved = B * tokens * H * topk, B * (tokens + tail)
    clips = 0 if grad_clip is None else 1
    new, ints, keys = values.new_empty, torch.int32, sub_keys.shape
    return (
        query.new_empty((B, own, V)),
        new((B, own, H, topk), dtype=ints),
        new((B, own, H, topk)),
        new((B, pairs)),
        new((writes,)),
        new((places, V)),
        new((places,), dtype=ints),
        new(keys),
        new((saved, H, 2, topk), dtype=ints),
        new((saved, H, 2, topk)),
        new((saved, H, topk), dtype=ints),
        new((saved, H, topk), dtype=ints),
        new((torch.sym_max(writes - 1, 0) * 2 * H * keys[2] if moves else 0, half)),
        new((places * clips, (V + 7) // 8), dtype=torch.uint8),
        new((writes * clips if moves else 0, *keys[:3], (half + 7) // 8), dtype=torch.uint8),
    )


@torch.library.register_fake("fwpkm::chunk_scan_")
def _(
    values, sub_keys, query, target, loss_weights, mask, topk, chunk_size, lookahead, score, eps, activation,
    temperature, lr, weight_decay, grad_clip, write_rule, values_only, addressing_weight, boundary, carried, flush,
):  # fmt: skip
    _one_device(values=values, sub_keys=sub_keys, query=query, target=target, loss_weights=loss_weights, mask=mask)
    B, own, H, V, _, writes, pairs, _, _ = _scan_outputs(
        values, sub_keys, query, chunk_size, lookahead, boundary, carried, flush
    )
    new = values.new_empty
    return (
        query.new_empty((B, own, V)),
        new((B, own, H, topk), dtype=torch.int32),
        new((B, own, H, topk)),
        new((B, pairs)),
        new((writes,)),
    )


@torch.library.register_fake("fwpkm::chunk_scan_backward")
def _(
    dout, dweights, dlosses, daddressing_loss, dnew_rows, dnew_sub_keys, values, sub_keys, query, target, loss_weights,
    mask, new_rows, new_sub_keys, list_indices, list_scores, places, read_from, key_versions, open_rows, open_keys,
    topk, chunk_size, lookahead, score, eps, activation, temperature, lr, weight_decay, grad_clip, write_rule,
    values_only, addressing_weight, boundary, carried, flush, need_dvalues,
):  # fmt: skip
    _one_device(
        values=values,
        sub_keys=sub_keys,
        query=query,
        target=target,
        loss_weights=loss_weights,
        mask=mask,
        dout=dout,
        dweights=dweights,
        dlosses=dlosses,
        daddressing_loss=daddressing_loss,
        dnew_rows=dnew_rows,
        dnew_sub_keys=dnew_sub_keys,
        new_rows=new_rows,
        new_sub_keys=new_sub_keys,
        list_indices=list_indices,
        list_scores=list_scores,
        places=places,
        read_from=read_from,
        key_versions=key_versions,
        open_rows=open_rows,
        open_keys=open_keys,
    )
    reads = places.numel() if need_dvalues else 0
    weights = values if loss_weights is None else loss_weights
    return (
        query.new_empty(query.shape),
        target.new_empty(target.shape),
        weights.new_empty((0 if loss_weights is None else query.shape[0], query.shape[1])),
        sub_keys.new_empty(sub_keys.shape),
        values.new_empty((reads,), dtype=torch.int64),
        values.new_empty((reads, values.shape[1])),
    )


@torch.library.register_fake("fwpkm::commit_")
def _(values, sub_keys, new_rows, new_slots, new_sub_keys, keep=1.0, writes=0):
    _one_device(values=values, sub_keys=sub_keys, new_rows=new_rows, new_slots=new_slots, new_sub_keys=new_sub_keys)
    return None


# --------------------------------------------------------------------------------------------------------- autograd
def _topk_setup(ctx, inputs, output):
    query, sub_keys, _, ctx.score, ctx.eps = inputs
    ctx.save_for_backward(query, sub_keys, output[1])
    ctx.mark_non_differentiable(output[1])


def _topk_backward(ctx, dscores, _):
    query, sub_keys, indices = ctx.saved_tensors
    dquery, dsub_keys = _ops.product_key_topk_backward(dscores, query, sub_keys, indices, ctx.score, ctx.eps)
    return dquery, dsub_keys, None, None, None


torch.library.register_autograd("fwpkm::product_key_topk", _topk_backward, setup_context=_topk_setup)


def _gather_setup(ctx, inputs, output):
    *tensors, ctx.sparse_grad = inputs
    ctx.save_for_backward(*tensors)


def _gather_backward(ctx, dout):
    values, indices, weights = ctx.saved_tensors
    dvalues = dweights = None
    if ctx.needs_input_grad[0] and ctx.sparse_grad:
        rows = (weights.unsqueeze(-1) * dout.unsqueeze(-2)).flatten(0, -2)
        dvalues = torch.sparse_coo_tensor(indices.reshape(1, -1).long(), rows, values.shape, check_invariants=False)
    elif ctx.needs_input_grad[0]:
        dvalues = _ops.value_gather_dvalues(dout, indices, weights, values.shape[0])
    if ctx.needs_input_grad[2]:
        dweights = _ops.value_gather_dweights(dout, values, indices)
    return dvalues, None, dweights, None


torch.library.register_autograd("fwpkm::value_gather", _gather_backward, setup_context=_gather_setup)


# The derivatives of a trilinear form are each other's derivatives.
def _dvalues_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _dvalues_backward(ctx, grad):
    dout, indices, weights = ctx.saved_tensors
    return (
        _ops.value_gather(grad, indices, weights) if ctx.needs_input_grad[0] else None,
        None,
        _ops.value_gather_dweights(dout, grad, indices) if ctx.needs_input_grad[2] else None,
        None,
    )


torch.library.register_autograd("fwpkm::value_gather_dvalues", _dvalues_backward, setup_context=_dvalues_setup)


def _dweights_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _dweights_backward(ctx, grad):
    dout, values, indices = ctx.saved_tensors
    return (
        _ops.value_gather(values, indices, grad) if ctx.needs_input_grad[0] else None,
        _ops.value_gather_dvalues(dout, indices, grad, values.shape[0]) if ctx.needs_input_grad[1] else None,
        None,
    )


torch.library.register_autograd("fwpkm::value_gather_dweights", _dweights_backward, setup_context=_dweights_setup)


def _scan_setup(ctx, inputs, output):
    tensors, ctx.options, ctx.sparse_grad = inputs[:6], inputs[6:-1], inputs[-1]
    new_rows, new_slots, new_sub_keys, *saved = output[5:]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, new_rows, new_sub_keys, *saved)
    ctx.mark_non_differentiable(output[1], new_slots, *saved)


def _scan_backward(ctx, dout, _, dweights, dlosses, daddressing_loss, dnew_rows, __, dnew_sub_keys, *___):
    saved = ctx.saved_tensors  # once: activation checkpointing computes it again at every access
    values, loss_weights = saved[0], saved[4]
    need_dvalues = ctx.needs_input_grad[0]
    dquery, dtarget, dloss_weights, dsub_keys, slots, rows = _ops.chunk_scan_backward(
        dout, dweights, dlosses, daddressing_loss, dnew_rows, dnew_sub_keys, *saved, *ctx.options,
        need_dvalues,
    )  # fmt: skip
    dvalues = None
    if need_dvalues and ctx.sparse_grad:
        dvalues = torch.sparse_coo_tensor(slots.unsqueeze(0), rows, values.shape, check_invariants=False)
    elif need_dvalues:
        dvalues = torch.zeros_like(values).index_add_(0, slots, rows)
    if loss_weights is None:
        dloss_weights = None
    return dvalues, dsub_keys, dquery, dtarget, dloss_weights, *[None] * (len(ctx.options) + 2)


torch.library.register_autograd("fwpkm::chunk_scan", _scan_backward, setup_context=_scan_setup)


def _differentiable_once(name):
    def backward(ctx, *grads):
        raise RuntimeError(
            f"fwpkm::{name} is differentiable once; for higher derivatives differentiate fwpkm_cuda.reference.{name}"
        )

    torch.library.register_autograd(f"fwpkm::{name}_backward", backward)


_differentiable_once("product_key_topk")
_differentiable_once("chunk_scan")


# --------------------------------------------------------------------------------------- in-place ops and autograd
# register_autograd refuses operators that mutate; what autograd must know of them is said here: they have no
# derivative, and what they wrote is a new version (in inference mode too, where a stale backward pass would otherwise
# go unnoticed).
_library = torch.library.Library("fwpkm", "IMPL")


def _register_in_place(name, op):
    argument_names = [argument.name for argument in op._schema.arguments]

    def autograd(keyset, *args):
        if torch.is_grad_enabled():
            for argument, value in zip(argument_names, args, strict=False):
                if isinstance(value, Tensor) and value.requires_grad:
                    raise RuntimeError(
                        f"fwpkm::{name} writes in place and has no derivative, but {argument} requires grad: "
                        "call it under torch.no_grad(), or use chunk_scan and commit_"
                    )
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def new_version(keyset, *args):
        with torch._C._AutoDispatchBelowADInplaceOrView():
            result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        for written in args[:2]:
            torch.autograd.graph.increment_version(written)
        return result

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    _library.impl(name, new_version, "ADInplaceOrView", with_keyset=True)


_register_in_place("chunk_scan_", _ops.chunk_scan_.default)
_register_in_place("commit_", _ops.commit_.default)
