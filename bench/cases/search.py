"""The product-key search.

There is no public operator for the top-k of a row, or for the combination of two lists: PyTorch's top-k and matrix
products stand beside the search as parts of it.
"""

import torch

import fwpkm_cuda
from bench import peers
from bench.cases.case import Case, Setup, Work
from fwpkm_cuda import reference

EPS = 1e-3


def eager_search(query, sub_keys, topk, score):
    """The search in plain PyTorch: query (N, H, K), sub_keys (H, 2, P, K/2) -> scores (N, H, R), slots (N, H, R)"""
    q = query.to(sub_keys.dtype).unflatten(-1, (2, -1)).permute(1, 2, 0, 3)  # (H, 2, N, K/2)
    s = q @ sub_keys.mT
    if score == "idw":
        square = q.square().sum(-1, keepdim=True) + sub_keys.square().sum(-1).unsqueeze(-2)
        s = -(EPS + (square - 2 * s).clamp(min=0)).log()
    best, ids = s.topk(topk, -1)
    sums = (best[:, 0, :, :, None] + best[:, 1, :, None, :]).flatten(-2)
    slots = (ids[:, 0, :, :, None] * sub_keys.shape[2] + ids[:, 1, :, None, :]).flatten(-2)
    z, place = sums.topk(topk, -1)
    return z.transpose(0, 1), slots.gather(-1, place).transpose(0, 1)


def score_topk(s: Setup):
    for tokens in s.sizes.search:
        yield name(tokens), lambda tokens=tokens: search(s, tokens)
    tokens = s.sizes.search[len(s.sizes.search) // 2]  # 4096 on a GPU
    other = (dict(R=32), dict(H=4), dict(score="idw"), dict(dtype=torch.bfloat16))
    for change in other:
        yield name(tokens, **change), lambda change=change: search(s, tokens, **change)


def name(tokens, H=1, R=8, score="dot", dtype=torch.float32):
    return f"M={tokens} H={H} R={R} {score} {str(dtype).removeprefix('torch.')}"


def search(s: Setup, tokens, H=1, R=8, score="dot", dtype=torch.float32, small=False):
    """Queries like those of a model; the memory has the score's dtype, float32."""
    P, K = (max(R, 32), 32) if small else (max(R, s.sizes.P), s.sizes.width)
    _, sub_keys = s.memory(P, K, 2, H)

    def inputs():
        return s.randn(tokens, H, K, dtype=dtype)

    def products():
        q = lambda x: x.float().unflatten(-1, (2, -1)).permute(1, 2, 0, 3)
        return lambda x: q(x) @ sub_keys.mT

    def top():
        similarities = s.randn(H, 2, tokens, P)
        return lambda x: similarities.topk(R, -1)

    def work(x):
        read = x.numel() * x.element_size() + sub_keys.numel() * 4
        return Work(
            bytes=read + 8 * tokens * H * R,
            flops=2 * tokens * H * P * K,
            # A float32 sub-key is three bfloat16 numbers. So is a float32 query: of nine products six count.
            products=1 if s.device == "cpu" else 3 if dtype == torch.bfloat16 else 6,
        )

    eager = lambda x: eager_search(x, sub_keys, R, score)
    return Case(
        inputs=inputs,
        contestants={
            "ours": lambda: lambda x: fwpkm_cuda.product_key_topk(x, sub_keys, R, score),
            "eager": lambda: eager,
            "compiled": lambda: peers.compiled(s, eager),
            "matrix products alone": products,
            "torch.topk alone": top,
        },
        expected=lambda x: reference.product_key_topk(x.to(sub_keys.dtype), sub_keys, R, score)[:2],
        work=work,
        tolerance=2e-3,  # rounding may swap two slots
        unlike=dict.fromkeys(("matrix products alone", "torch.topk alone"), "a part of the search"),
        checked=None if small else search(s, min(tokens, 256), H, R, score, dtype, small=True),
    )
