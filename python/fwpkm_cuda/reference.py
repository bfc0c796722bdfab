"""The specification in plain PyTorch: what every operator of fwpkm_cuda must compute.

Written to be read, not to be fast: dense tensors, one autograd graph, any device, float32 or float64. Every kernel is
judged by these functions, and every gradient by autograd (float64 gradcheck) through them.

Letters: B batch, T tokens, H heads, K key dimension (two halves of K/2), P sub-keys per half, S = P*P slots, R slots
read per head, V value dimension, C chunk size, L lookahead. Slot = i0*P + i1, with i0, i1 the sub-keys of the halves.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG_FLOOR = 1e-8  # inside the logarithm of the addressing loss


class Reads(NamedTuple):
    """Product-key search of N tokens (N stands for any leading dimensions)."""

    scores: Tensor  # (N, H, R)     falling
    indices: Tensor  # (N, H, R)     slots, int64
    sub_scores: Tensor  # (N, H, 2, R)  the R best scores of each half, falling
    sub_indices: Tensor  # (N, H, 2, R)  and their sub-keys


class Scan(NamedTuple):
    """What `chunk_scan` returns. W = number of chunks written, Q = number of (query, target) pairs per batch row."""

    out: Tensor  # (B, T, V)
    indices: Tensor  # (B, T, H, R)
    weights: Tensor  # (B, T, H, R)
    losses: Tensor  # (B, Q)   memory loss of each pair, in the order of the writes
    addressing_loss: Tensor  # (W,)  addressing loss of each write
    values: Tensor  # (S, V)   the memory after the last write
    sub_keys: Tensor  # (H, 2, P, K/2)


# ------------------------------------------------------------------------------------------------------------- read
def similarities(query, sub_keys, score="dot"):
    """<q_p, k_pj> ("dot") or -|q_p - k_pj|^2 ("idw").  (N,H,K), (H,2,P,K/2) -> (N,H,2,P)"""
    q = query.unflatten(-1, (2, -1))
    if score == "dot":
        return torch.einsum("...hpk,hpjk->...hpj", q, sub_keys)
    return -(q.unsqueeze(-2) - sub_keys).square().sum(-1)


def sub_scores(similarity, score="dot", eps=1e-3):
    """s[p,j] = <q_p, k_pj> ("dot") or -ln(eps + |q_p - k_pj|^2) ("idw")"""
    return similarity if score == "dot" else -(eps - similarity).log()


def product_key_topk(query, sub_keys, topk, score="dot", eps=1e-3) -> Reads:
    """The R most similar sub-keys of each half, then the R best of the R*R sums z = s_0[i] + s_1[j] at slot i*P + j.

    Equal similarities go to the smaller sub-key, then equal sums to the smaller slot."""
    similarity, ids = similarities(query, sub_keys, score).sort(dim=-1, descending=True, stable=True)
    s, ids = sub_scores(similarity[..., :topk], score, eps), ids[..., :topk]
    z = (s[..., 0, :, None] + s[..., 1, None, :]).flatten(-2)
    slots = (ids[..., 0, :, None] * sub_keys.shape[2] + ids[..., 1, None, :]).flatten(-2)
    by_slot = slots.argsort(-1)
    best = by_slot.gather(-1, z.gather(-1, by_slot).argsort(dim=-1, descending=True, stable=True)[..., :topk])
    return Reads(z.gather(-1, best), slots.gather(-1, best), s, ids)


def read_weights(scores, activation="softmax", temperature=1.0):
    """a = f(z / temperature): softmax jointly over all H*R reads of a token, or elementwise silu or relu."""
    x = scores / temperature
    if activation == "softmax":
        return x.flatten(-2).softmax(-1).view_as(x)
    return x * x.sigmoid() if activation == "silu" else x.relu()


def value_gather(values, indices, weights):
    """out = sum_r weights[r] values[indices[r]].  (S,V), (...,R'), (...,R') -> (...,V)"""
    return (weights.unsqueeze(-1) * values[indices]).sum(-2)


# ------------------------------------------------------------------------------------------------------------ write
def memory_error(out, target, loss_weights=None, mask=None, lookahead=1):
    """e_x = w_x (out_x - target_{x+L}) and l_x = w_x |out_x - target_{x+L}|^2 / V, with w_x = mask_x loss_weight_x.

    out, target (B,n,V) -> e (B,u,V), l (B,u) of the u = max(n - L, 0) pairs, and how many of them the mask keeps"""
    u = max(out.shape[1] - lookahead, 0)
    difference = out[:, :u] - target[:, lookahead:]
    w = torch.ones_like(difference[..., 0]) if loss_weights is None else loss_weights[:, :u].to(difference.dtype)
    counting = w.numel()
    if mask is not None:  # a masked token may have anything, NaN too, for a target and a loss weight
        w = w.masked_fill(~mask[:, :u], 0)
        difference = difference.masked_fill(~mask[:, :u, None], 0)
        counting = int(mask[:, :u].sum())
    return w.unsqueeze(-1) * difference, w * difference.square().mean(-1), counting


def value_gradient(values, reads, weights, error, counted, kappa):
    """G[s] = kappa / max(N_read(s), 1) * sum_{x,r: slot = s} a[x,r] e[x].

    reads.indices, weights (B,n,H,R); error (B,u,V) of the first u tokens; N_read counts reads of tokens `counted`"""
    u = error.shape[1]
    moved = weights[:, :u].flatten(-2).unsqueeze(-1) * error.unsqueeze(-2)  # (B, u, H*R, V)
    total = torch.zeros_like(values).index_add(0, reads.indices[:, :u].flatten(), moved.reshape(-1, values.shape[1]))
    read_counts = torch.bincount(reads.indices[:, counted].flatten(), minlength=values.shape[0])
    return kappa / read_counts.clamp(min=1).to(values.dtype).unsqueeze(-1) * total


def addressing_loss(reads, num_sub_keys, weight):
    """weight * sum_{p,j} Pbar[p,j] ln(Pbar[p,j] + 1e-8): minus the entropy of the mean address of both halves.

    Pbar = mean over all tokens and heads of the softmax over the R chosen sub-keys (temperature 1). 0 without rows."""
    s, ids = reads.sub_scores.flatten(0, -4), reads.sub_indices.flatten(0, -4)  # (rows, H, 2, R)
    if s.numel() == 0:
        return s.new_zeros(())
    rows = s.shape[0] * s.shape[1]
    half = torch.arange(2, device=s.device).view(2, 1) * num_sub_keys
    pbar = s.new_zeros(2 * num_sub_keys).index_add(0, (ids + half).flatten(), s.softmax(-1).flatten()) / rows
    return weight * (pbar * (pbar + LOG_FLOOR).log()).sum()


def step(weight, gradient, lr, weight_decay, grad_clip):
    """w <- w - lr (clip(g) + weight_decay w)"""
    if grad_clip is not None:
        gradient = gradient.clamp(-grad_clip, grad_clip)
    return weight - lr * (gradient + weight_decay * weight)


# ------------------------------------------------------------------------------------------------------------- scan
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
) -> Scan:
    """Reads every token with the memory of its chunk, and writes the memory after each chunk.

    values (S,V), sub_keys (H,2,P,K/2), query (B,T,H,K), target (B,T,V), loss_weights (B,T) or None, mask (B,T) bool or
    None. Token x is answered by out[x] = sum a V and should have been answered by target[x+L]; this pair is written by
    the chunk that holds x+L. "drop": pairs that cross a chunk's edge are left out. "carry": a chunk re-reads the last L
    tokens of the chunk before it, so that none is lost; they are not counted in N_read again.
    Per chunk of n own tokens, U = its pairs, M = |U|, N = B*n (with a mask: its true entries in U):

        values     V <- V - lr (clip(G) + weight_decay V),  G of `value_gradient` with kappa = 1 ("paper") or N/M R H
                   ("release"), 0 without pairs
        sub-keys   K <- K - lr (clip(dA/dK) + weight_decay K),  A = addressing loss over all tokens of the chunk
                   ("carry": over U); values_only=False: A + sum l_x / (2M), values constant in it

    carried: how many leading tokens belong to the chunk before (only "carry"); they get no row in out, indices and
    weights. flush=False leaves a partial last chunk read but unwritten. Gradients of all outputs are exact."""
    (B, T), P, L = query.shape[:2], sub_keys.shape[2], lookahead
    if boundary == "carry" and L > chunk_size:
        raise ValueError(f"lookahead: expected at most chunk_size = {chunk_size} with boundary 'carry', got {L}")
    optimizer = dict(lr=lr, weight_decay=weight_decay, grad_clip=grad_clip)
    differentiable = torch.is_grad_enabled()
    parts, addressing = [], []
    for start in range(carried, max(T, carried + 1), chunk_size):  # at least once, so that outputs have their shapes
        stop = min(start + chunk_size, T)
        writes = start < stop and (flush or stop - start == chunk_size)
        again = 0 if not writes else carried if start == carried else L if boundary == "carry" else 0
        q, t, g, m = (None if x is None else x[:, start - again : stop] for x in (query, target, loss_weights, mask))
        with torch.enable_grad():  # the sub-keys' gradient is autograd's, also under no_grad
            keys = sub_keys if sub_keys.requires_grad else sub_keys.detach().requires_grad_()
            reads = product_key_topk(q, keys, topk, score, eps)
            weights = read_weights(reads.scores, activation, temperature)
            out = value_gather(values, reads.indices.flatten(-2), weights.flatten(-2))
            error, losses, counting = memory_error(out, t, g, m, L if writes else t.shape[1])
            if writes:
                pairs = losses.numel()
                rows = slice(losses.shape[1] if boundary == "carry" else None)
                address_loss = addressing_loss(Reads(*(x[:, rows] for x in reads)), P, addressing_weight)
                key_loss = address_loss + 0 * keys.sum()  # so that it has a gradient in any case
                if not values_only and pairs:
                    values_constant = losses.sum() / (2 * pairs)  # autograd is asked for the sub-keys alone
                    key_loss = key_loss + values_constant
                (key_gradient,) = torch.autograd.grad(key_loss, keys, create_graph=differentiable)
                kappa = 1.0 if write_rule == "paper" else topk * q.shape[2] / max(pairs, 1)
                if write_rule == "release":
                    kappa *= B * (stop - start) if mask is None else counting
                gradient = value_gradient(values, reads, weights, error, slice(again, None), kappa if pairs else 0.0)
        result = (out[:, again:], reads.indices[:, again:], weights[:, again:], losses)
        parts.append(result if differentiable else [x.detach() for x in result])
        if writes:
            addressing.append(address_loss if differentiable else address_loss.detach())
            values = step(values, gradient if differentiable else gradient.detach(), **optimizer)
            sub_keys = step(sub_keys, key_gradient, **optimizer)
    joined = [torch.cat(x, 1) for x in zip(*parts, strict=True)]
    return Scan(*joined, torch.stack(addressing) if addressing else values.new_zeros(0), values, sub_keys)


# ----------------------------------------------------------------------------------------------------------- stream
class Stream(NamedTuple):
    """A memory that is fed call by call: fast weights and the tokens that are read but not yet written."""

    values: Tensor
    sub_keys: Tensor
    query: Tensor | None = None  # (B, pending, H, K), detached, as the three below
    target: Tensor | None = None
    loss_weights: Tensor | None = None
    mask: Tensor | None = None
    carried: int = 0  # how many of the pending tokens were counted by an earlier chunk ("carry")


def stream(state, query, target, loss_weights=None, mask=None, *, scan=chunk_scan, **options):
    """Feeds T more tokens; a chunk is written as soon as it is full. -> (Scan of the new tokens, next Stream)

    `scan` is the function that does the work (this module's `chunk_scan`, or an operator with its interface)."""
    new = (query, target, loss_weights, mask)
    if state.query is not None:
        if any((a is None) != (b is None) for a, b in zip(state[2:6], new, strict=True)):
            raise ValueError("loss_weights and mask must be given in every call of a stream, or in none")
        new = tuple(None if a is None else torch.cat((a, b), 1) for a, b in zip(state[2:6], new, strict=True))
    pending = 0 if state.query is None else state.query.shape[1]
    result = scan(state.values, state.sub_keys, *new, carried=state.carried, flush=False, **options)
    read_before = pending - state.carried
    result = result._replace(**{k: getattr(result, k)[:, read_before:] for k in ("out", "indices", "weights")})
    full, rest = divmod(new[0].shape[1] - state.carried, options["chunk_size"])
    carried = state.carried
    if full:
        carried = options.get("lookahead", 1) if options.get("boundary") == "carry" else 0
    keep = new[0].shape[1] - rest - carried if full else 0
    queue = (None if x is None else x[:, keep:].detach() for x in new)
    return result, Stream(result.values, result.sub_keys, *queue, carried)


def flush(state, *, scan=chunk_scan, **options):
    """Writes the pending tokens as a short chunk; a carried tail alone is dropped. -> (Scan, empty Stream)"""
    if state.query is None:
        raise ValueError("flush: nothing was streamed")
    result = scan(state.values, state.sub_keys, *state[2:6], carried=state.carried, flush=True, **options)
    return result, Stream(result.values, result.sub_keys)
