"""The streaming mode of the released FwPKM code, on the pieces of `fwpkm_cuda.reference`.

The package does not offer this mode: what it computes depends on how a sequence is cut into calls. It is written out
here because the golden stream files were made with it, and `equals_our_stream` says when both schedules agree."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fwpkm_cuda.reference import (
    Reads,
    Scan,
    addressing_loss,
    product_key_topk,
    read_weights,
    step,
    value_gather,
    value_gradient,
)


class Queue(NamedTuple):
    """The fast weights and the tokens that wait. The fields that `reference.Stream` has too mean the same."""

    values: Tensor
    sub_keys: Tensor
    query: Tensor | None = None  # (B, queued, H, K), detached, as the four below
    prediction: Tensor | None = None  # (B, queued, V)  what was read when the token came; kept, never used
    target: Tensor | None = None
    loss_weights: Tensor | None = None
    mask: Tensor | None = None


def pieces(tokens, queued, chunk_size, lookahead):
    """How a call cuts its tokens: fill the queue up to C + L first, then chunks of C tokens, then the rest."""
    if queued >= chunk_size + lookahead:
        raise ValueError(f"the queue must be shorter than {chunk_size + lookahead} tokens, it has {queued}")
    first = min(chunk_size + lookahead - queued, tokens)
    full, rest = divmod(tokens - first, chunk_size)
    return [size for size in (first, *[chunk_size] * full, rest) if size]


def released_stream(
    state,
    query,
    target,
    loss_weights=None,
    mask=None,
    *,
    topk,
    chunk_size,
    lookahead,
    score,
    activation,
    temperature,
    values_only,
    addressing_weight,
    **step_options,
):
    """Feeds T more tokens to a Queue. -> (Scan of these tokens and of the updates they caused, next Queue)

    Each piece is (a) read with the weights of that moment, which gives its output; (b) appended to the queue; (c) if
    the queue now holds at least C tokens, the weights are updated once and the queue keeps its last L tokens.

    step_options: lr, weight_decay, grad_clip. No gradients. The released layer stores the weights in the dtype of its
    parameters after each call; a caller who wants this rounds `values` and `sub_keys` of the returned Queue."""
    values, sub_keys = state.values.detach(), state.sub_keys.detach()
    queue = list(state[2:])
    read = partial(_read, topk=topk, score=score, activation=activation, temperature=temperature)
    answers, losses, addressing = [], [query.new_zeros(query.shape[0], 0)], []
    start, queued = 0, 0 if state.query is None else state.query.shape[1]
    for size in pieces(query.shape[1], queued, chunk_size, lookahead):
        piece = slice(start, start + size)
        reads, weights, out = read(values, sub_keys, query[:, piece])
        answers.append((out, reads.indices, weights))
        new = (query[:, piece], out, *(None if x is None else x[:, piece] for x in (target, loss_weights, mask)))
        queue = [_append(old, x) for old, x in zip(queue, new, strict=True)]
        if queue[0].shape[1] >= chunk_size:
            values, sub_keys, memory_loss, address_loss = _update(
                values, sub_keys, queue, (reads, weights), read, lookahead, values_only, addressing_weight, step_options
            )
            losses.append(memory_loss)
            addressing.append(address_loss)
            queue = [None if x is None else x[:, x.shape[1] - lookahead :] for x in queue]
        start += size
    joined = [torch.cat(x, 1) for x in (*zip(*answers, strict=True), losses)]
    addressing = torch.stack(addressing) if addressing else values.new_zeros(0)
    return Scan(*joined, addressing, values, sub_keys), Queue(values, sub_keys, *queue)


def _read(values, sub_keys, query, *, topk, score, activation, temperature):
    reads = product_key_topk(query, sub_keys, topk, score)
    weights = read_weights(reads.scores, activation, temperature)
    return reads, weights, value_gather(values, reads.indices.flatten(-2), weights.flatten(-2))


def _append(old, new):
    return new if old is None else torch.cat((old, new), 1)


def _update(values, sub_keys, queue, last_piece, read, lookahead, values_only, addressing_weight, step_options):
    """One gradient step from the u = queue - L tokens that have a target. -> values, sub_keys, losses, addressing loss

    Everything is read again with the present weights, and the addressing loss is over these u tokens. But the reads
    that N_read counts are those of the last piece alone, and without a mask N is the size of that piece."""
    query, _, target, loss_weights, mask = queue
    B, u = query.shape[0], query.shape[1] - lookahead
    last_reads, last_weights = last_piece
    with torch.enable_grad():
        keys = sub_keys.detach().requires_grad_()
        reads, weights, out = read(values, keys, query[:, :u])
        difference = out - target[:, lookahead:]
        w = torch.ones_like(difference[..., 0])
        for factor in (loss_weights, mask):
            w = w if factor is None else w * factor[:, :u]
        losses = w * difference.square().mean(-1)
        address_loss = addressing_loss(reads, sub_keys.shape[2], addressing_weight)
        key_loss = address_loss if values_only else address_loss + losses.mean() / 2
        (key_gradient,) = torch.autograd.grad(key_loss, keys)
    num_samples = last_weights[..., 0, 0].numel() if mask is None else int((mask[:, :u] > 0).sum())
    # N_read counts the reads of the last piece: it stands behind the tokens that are summed over
    counted = Reads(*(torch.cat(x, 1) for x in zip(reads, last_reads, strict=True)))
    kappa = num_samples / (B * u) * last_weights[0, 0].numel()
    error = (w.unsqueeze(-1) * difference).detach()
    value_grad = value_gradient(values, counted, weights.detach(), error, slice(u, None), kappa)
    values, sub_keys = step(values, value_grad, **step_options), step(sub_keys, key_gradient, **step_options)
    return values, sub_keys, losses.detach(), address_loss.detach()


def equals_our_stream(config):
    """The `boundary` with which `reference.stream` computes what the release computes for these calls, or None.

    Our stream writes chunk c, the positions [cC, (c+1)C), when its last token has come. N_read counts the reads of the
    chunk's C tokens and (without a mask) N = B*C. The release updates at the end of a piece, counts the reads of that
    piece, and has N = B * its size. So both agree if and only if every piece that ends in an update is exactly one
    chunk: C tokens which end at a multiple of C. For L > 0 this means: the first call has C tokens (in a longer one the
    first piece takes C + L), the others a multiple of C, or so few that no update follows. For L = 0 every call that
    completes a chunk must begin at the start of one.

    The rest then agrees too. U is the queue without its last L tokens: the last L tokens of the chunk before and all
    but L of this one, which are the pairs of "carry"; both re-read it with the weights before this write, take the
    addressing loss over it, and with a mask set N to its true entries. Without a lookahead, or without an update,
    nothing is carried and "drop" says the same. "drop" never fits an update with L > 0: its addressing loss is over all
    tokens of the chunk.

    This is a statement about all inputs; special ones (a step size of zero, no slot read twice) may agree by chance."""
    chunk_size, lookahead = config["chunk"], config["lookahead"]
    position, queued, updated = 0, 0, False
    for tokens in config["segments"]:
        for size in pieces(tokens, queued, chunk_size, lookahead):
            position, queued = position + size, queued + size
            if queued >= chunk_size:
                if size != chunk_size or position % chunk_size:
                    return None
                queued, updated = lookahead, True
    return "carry" if updated and lookahead else "drop"
