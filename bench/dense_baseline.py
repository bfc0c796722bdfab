"""The chunk scan as dense autograd code computes it: the baseline, in plain PyTorch.

What the released implementation does, written for speed where that needs no sparsity: every chunk makes a dense
gradient for the whole table of values and a new table from it, and autograd goes through all of them. One head,
softmax, the write rule of the release, boundary "drop". `fwpkm_cuda.reference` judges it (tests/test_bench.py).
"""

import torch


class Bag(torch.autograd.Function):
    """out = sum_r weights[:, r] * values[indices[:, r]], with a gradient of values that can be differentiated again."""

    @staticmethod
    def forward(ctx, values, indices, weights):
        ctx.save_for_backward(values, indices, weights)
        return torch.nn.functional.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")

    @staticmethod
    def backward(ctx, dout):
        values, indices, weights = ctx.saved_tensors
        dvalues = BagGradient.apply(dout, indices, weights, values.shape[0]) if ctx.needs_input_grad[0] else None
        dweights = None
        if ctx.needs_input_grad[2]:
            dweights = torch.einsum("nrv,nv->nr", values[indices], dout)
        return dvalues, None, dweights


class BagGradient(torch.autograd.Function):
    """The dense gradient of a Bag's values: linear in dout and in weights."""

    @staticmethod
    def forward(ctx, dout, indices, weights, num_slots):
        ctx.save_for_backward(dout, indices, weights)
        moved = (weights.unsqueeze(-1) * dout.unsqueeze(1)).flatten(0, 1)
        return dout.new_zeros(num_slots, dout.shape[1]).index_add_(0, indices.flatten(), moved)

    @staticmethod
    def backward(ctx, g):
        dout, indices, weights = ctx.saved_tensors
        ddout = torch.nn.functional.embedding_bag(indices, g, per_sample_weights=weights, mode="sum")
        return ddout, None, torch.einsum("nrv,nv->nr", g[indices], dout), None


def search(query, sub_keys, topk, score, eps=1e-3):
    """query (N, K), sub_keys (2, P, K/2) -> sub-scores (N, 2, P), scores (N, R), slots (N, R)"""
    q = query.unflatten(-1, (2, -1)).transpose(0, 1)
    if score == "dot":
        s = torch.bmm(q, sub_keys.mT)
    else:
        square = q.square().sum(-1, keepdim=True) + sub_keys.square().sum(-1).unsqueeze(1)
        s = -(eps + (square - 2 * torch.bmm(q, sub_keys.mT)).clamp(min=0)).log()
    best, ids = s.topk(topk, -1)
    sums = (best[0].unsqueeze(-1) + best[1].unsqueeze(-2)).flatten(-2)
    slots = (ids[0].unsqueeze(-1) * sub_keys.shape[1] + ids[1].unsqueeze(-2)).flatten(-2)
    z, place = sums.topk(topk, -1)
    return s, z, slots.gather(-1, place)


def addressing_loss(s, topk):
    threshold = s.topk(topk, -1).values[..., -1:]
    pbar = s.masked_fill(s < threshold, -torch.inf).softmax(-1).mean(1)
    return (pbar * (pbar + 1e-8).log()).sum()


def dense_scan(
    values, sub_keys, query, target, loss_weights, *, topk, chunk_size, score, lr=1.0, addressing_weight=1.0
):
    """values (S, V), sub_keys (1, 2, P, K/2), query (B, T, 1, K), target (B, T, V), loss_weights (B, T) ->
    out (B, T, V), values, sub_keys. Under no_grad as the release in eval mode, else differentiable as in train mode."""
    train, outs = torch.is_grad_enabled(), []
    B, T = query.shape[:2]
    for start in range(0, T, chunk_size):
        part = slice(start, min(start + chunk_size, T))
        q, t, g = query[:, part, 0], target[:, part], loss_weights[:, part]
        n, pairs = q.shape[1], q.shape[1] - 1
        with torch.enable_grad():
            v = values if values.requires_grad else values.detach().requires_grad_()
            k = sub_keys if sub_keys.requires_grad else sub_keys.detach().requires_grad_()
            s, z, slots = search(q.flatten(0, 1), k[0], topk, score)
            out = Bag.apply(v, slots, z.softmax(-1)).unflatten(0, (B, n))
            loss = (g[:, :pairs] * (out[:, :pairs] - t[:, 1:]).square().mean(-1)).mean() / 2
            (dv,) = torch.autograd.grad(loss, v, create_graph=train, retain_graph=True)
            (dk,) = torch.autograd.grad(
                addressing_weight * addressing_loss(s, topk), k, create_graph=train, retain_graph=train
            )
            counts = torch.bincount(slots.flatten(), minlength=values.shape[0]).clamp(min=1).to(dv.dtype)
            values = v - lr * (dv * (B * n * values.shape[1] * topk) / counts.unsqueeze(-1))
            sub_keys = k - lr * dk
        if not train:
            out, values, sub_keys = out.detach(), values.detach(), sub_keys.detach()
        outs.append(out)
    return torch.cat(outs, 1), values, sub_keys
