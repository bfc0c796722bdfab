"""Slow-weight product key memory: one search over all tokens, one read of many rows, and the gradients of both."""

import torch

import fwpkm_cuda
from bench import peers
from bench.cases.case import Case, Setup, Work, bag
from bench.cases.search import eager_search
from fwpkm_cuda import reference


def pkm(s: Setup):
    tokens, H, R = s.sizes.pkm
    title = f"{tokens} tokens h{H} r{R}"
    for distribution in s.sizes.distributions:
        yield f"{title}, read, {distribution}", lambda d=distribution: lookup(s, tokens, H * R, d, backward=False)
    yield f"{title}, read and its gradients, uniform", lambda: lookup(s, tokens, H * R, "uniform", backward=True)
    for train in (False, True):
        what = "search and read" + (" and their gradients" if train else "")
        yield f"{title}, {what}", lambda train=train: layer(s, tokens, H, R, train)


def lookup(s: Setup, tokens, reads, distribution, backward):
    """value_gather of given slots; its gradients are those of values (dense) and of the weights."""
    P, width = s.sizes.P, s.sizes.width
    values, _ = s.memory(P, width, width)

    def inputs():
        weights = s.rand(tokens, reads)
        return s.slots(distribution, P * P, tokens, reads), weights, s.randn(tokens, width)

    def contestant(read):
        def forward(x):
            return read(values, x[0], x[1])

        def both(x):
            with torch.enable_grad():
                leaves = values.detach().requires_grad_(), x[1].detach().requires_grad_()
                out = read(leaves[0], x[0], leaves[1])
            return out.detach(), *torch.autograd.grad(out, leaves, x[2])

        return lambda: both if backward else forward

    def fbgemm():
        read = peers.fbgemm_table(s, values)
        return lambda x: read(x[0], x[1])

    def work(x):
        rows = x[0].unique().numel()
        moved = rows * width * 4 + 8 * x[0].numel() + 4 * tokens * width
        if backward:  # rows and the gradient of out again; those of values (all of them: it is dense) and weights
            moved += rows * width * 4 + 4 * tokens * width + values.numel() * 4 + 12 * x[0].numel()
        facts = {"reads": x[0].numel(), "distinct": rows, "all_reads_bytes": 4 * width * x[0].numel()}
        return Work(bytes=moved, facts=facts)

    contestants = {"ours": contestant(fwpkm_cuda.value_gather), "embedding_bag": contestant(bag)}
    if not backward:
        contestants["fbgemm"] = fbgemm
    return Case(
        inputs=inputs,
        contestants=contestants,
        expected=contestant(chunked_gather)(),
        work=work,
        tolerance=1e-4,
        most_sets=3,
    )


def chunked_gather(values, slots, weights):
    """The reference, a few tokens at a time: it has a copy of every row that is read."""
    parts = zip(slots.long().split(512), weights.split(512))
    return torch.cat([reference.value_gather(values, *part) for part in parts])


def layer(s: Setup, tokens, H, R, train, small=False):
    """Search, softmax per head, read: of PKM, all but its projections."""
    P, K, V = (max(R, 12), 16, 8) if small else (max(R, s.sizes.P), s.sizes.width, s.sizes.width)
    values, sub_keys = s.memory(P, K, V, H)

    def contestant(find, read):
        def forward(values, sub_keys, query):
            scores, slots = find(query, sub_keys)[:2]
            return read(values, slots.flatten(-2), scores.softmax(-1).flatten(-2))

        def both(x):
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (values, sub_keys, x[0])]
                out = forward(*leaves)
            return out.detach(), *torch.autograd.grad(out, leaves, x[1])

        return both if train else lambda x: forward(values, sub_keys, x[0])

    ours = lambda query, keys: fwpkm_cuda.product_key_topk(query, keys, R)
    eager = lambda query, keys: eager_search(query, keys, R, "dot")

    def package():
        module = peers.product_key_memory(s, V, P, H, R, K)

        def call(x):
            with torch.set_grad_enabled(train):
                tokens = x[1].unsqueeze(0).detach().requires_grad_(train)
                out = module(tokens)
            if not train:
                return out
            return torch.autograd.grad(out, [tokens, module.values.weight, module.keys], x[1].unsqueeze(0))

        return call

    def work(x):
        slots = fwpkm_cuda.product_key_topk(x[0], sub_keys, R)[1]
        rows = slots.unique().numel()
        moved = x[0].numel() * 4 + rows * V * 4 + 8 * slots.numel() + 4 * tokens * V
        flops = 2 * tokens * H * P * K
        if train:
            moved += 2 * x[0].numel() * 4 + (rows + values.shape[0]) * V * 4 + 8 * slots.numel() + 4 * tokens * V
        return Work(moved, flops, 1 if s.device == "cpu" else 6, {"reads": slots.numel(), "distinct": rows})

    few = min(tokens, 64)
    return Case(
        inputs=lambda: (s.randn(tokens, H, K), s.randn(tokens, V)),
        contestants={
            "ours": lambda: contestant(ours, fwpkm_cuda.value_gather),
            "our search, embedding_bag": lambda: contestant(ours, bag),
            "eager": lambda: contestant(eager, bag),
            "product-key-memory": package,
        },
        expected=contestant(lambda query, keys: reference.product_key_topk(query, keys, R)[:2], gather_rows),
        work=work,
        unlike={"product-key-memory": "another layer: its own projection and norm"},
        checked=None if small else layer(s, few, H, R, train, small=True),
        most_sets=2,
    )


def gather_rows(values, slots, weights):
    return reference.value_gather(values, slots.long(), weights)
