"""torch.ops.fwpkm from Python: thin functions with documented shapes.

Schemas and kernels are C++ (csrc/library.cpp, csrc/cpu, csrc/cuda), so that programs without Python see them; what
PyTorch must know of them besides is in registration.py.

Letters: B batch, T tokens, H heads, K key dimension (two halves of K/2), P sub-keys per half, S = P*P slots, R slots
read per head, V value dimension, C chunk size, L lookahead. The memory (`values`, `sub_keys`) is float32 or float64;
activations (`query`, `target`, `loss_weights`) are of its dtype or bfloat16 or float16.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import registration as registration  # the operators are complete when this module is
from .checks import check_finite, check_whole

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
    values is dense, or with sparse_grad a sparse COO tensor with one row per slot read. Differentiable any number of
    times with respect to values and weights. An index outside [0, S) is an error.

    Equivalent to `(weights.unsqueeze(-1) * values[indices]).sum(-2)`, or to embedding_bag with per_sample_weights."""
    return _ops.value_gather(values, indices, weights, sparse_grad)


def value_dot(values, indices, vector, sparse_grad=False):
    """out[..., r] = <vector, values[indices[..., r]]>: the derivative of `value_gather` by its weights, on its own.

    values (S, V), indices (..., R) int32 or int64, vector (..., V) of the dtype of values -> (..., R). Gradients as
    `value_gather`.

    Equivalent to `(vector.unsqueeze(-2) * values[indices]).sum(-1)`."""
    return _ops.value_gather_dweights(vector, values, indices, sparse_grad)


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
    Neither torch.func.jvp nor torch.func.grad is supported. Memory: the log new_rows has one row per read,
    B*T*H*R*V numbers (zeros where two reads of a chunk share a row), plus one copy of sub_keys per write.

    Equivalent to `reference.chunk_scan`; docs/mathematics.md, sections 2 to 5."""
    result = _ops.chunk_scan(
        values, sub_keys, query, target, loss_weights, mask, topk, chunk_size, lookahead, score, eps, activation,
        temperature, lr, weight_decay, grad_clip, write_rule, values_only, addressing_weight, boundary, carried, flush,
        sparse_grad,
    )  # fmt: skip
    return Scan(*result[: len(Scan._fields)])


def check_scan_options(*, topk, **options):
    """Raises what `chunk_scan_` raises for these options, whatever the memory and the tokens: it is called without."""
    check_whole(topk=topk, chunk_size=options["chunk_size"])
    check_whole(at_least=0, lookahead=options.get("lookahead", 1))
    numbers = ("eps", "temperature", "lr", "weight_decay", "addressing_weight", "grad_clip")
    check_finite(**{name: options[name] for name in numbers if options.get(name) is not None})
    new = partial(torch.empty, device="cpu")
    try:
        with torch.no_grad():
            chunk_scan_(new(topk * topk, 1), new(1, 2, topk, 1), new(1, 0, 1, 2), new(1, 0, 1), topk=topk, **options)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


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


# What kernels report: the bits of csrc/kernels/errors.cuh.
REPORTS = {
    1: "indices out of range: nothing was read or written there, and the results they touch are NaN",
    2: "scores, targets or rows that were NaN or infinite: their tokens got NaN and were left out of every write",
    4: "writes that would have overflowed: the old numbers were kept",
    8: "several rows of one slot in commit_: the last one was written",
}


def check(device=None) -> None:
    """Raises RuntimeError if CUDA kernels have met values that are wrong since the last call, and says which.

    Kernels do not stop for a wrong value, because nobody waits for them: they give NaN, write nothing that is not
    finite, and note the kind of error on their device. This call waits until all work queued on `device` (default: the
    current CUDA device) is done, and clears the note. On the CPU a wrong value raises at once, and there is never
    anything to report."""
    if device is None:
        device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    where = torch.empty(0, device=device)
    errors = _ops.take_errors(where)
    if errors:
        found = "; ".join(text for bit, text in REPORTS.items() if errors & bit)
        raise RuntimeError(f"check: kernels on {where.device} met {found}")
