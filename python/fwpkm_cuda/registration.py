"""What PyTorch must know of the operators besides their C++ kernels.

Fake kernels (shapes for torch.compile and torch.export), the autograd formulas, and what operators that write in place
owe to autograd. Letters as in ops.py.
"""

import torch
from torch import Tensor

_ops = torch.ops.fwpkm


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
def _(dout, values, indices, sparse_grad=False):
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


def _dvalues(dout, indices, weights, num_slots, sparse):
    if not sparse:
        return _ops.value_gather_dvalues(dout, indices, weights, num_slots)
    slots, place = indices.long().unique(return_inverse=True)
    rows = _ops.value_gather_dvalues(dout, place, weights, slots.numel())
    shape = (num_slots, dout.shape[-1])
    return torch.sparse_coo_tensor(slots.unsqueeze(0), rows, shape, check_invariants=False, is_coalesced=True)


def _gather_backward(ctx, dout):
    values, indices, weights = ctx.saved_tensors
    dvalues = dweights = None
    if ctx.needs_input_grad[0]:
        dvalues = _dvalues(dout, indices, weights, values.shape[0], ctx.sparse_grad)
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
    *tensors, ctx.sparse_grad = inputs
    ctx.save_for_backward(*tensors)


def _dweights_backward(ctx, grad):
    dout, values, indices = ctx.saved_tensors
    return (
        _ops.value_gather(values, indices, grad) if ctx.needs_input_grad[0] else None,
        _dvalues(dout, indices, grad, values.shape[0], ctx.sparse_grad) if ctx.needs_input_grad[1] else None,
        None,
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
        # In a fixed order by construction: PyTorch adds rows with atomics on a GPU.
        ones = rows.new_ones(len(rows), 1)
        dvalues = _ops.value_gather_dvalues(rows, slots.unsqueeze(1), ones, values.shape[0])
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
