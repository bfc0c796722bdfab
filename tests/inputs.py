"""Random memories and tokens for the tests, on the default device (conftest.py)."""

import pytest
import torch


def here(tensor):
    """On the device of the test."""
    return tensor.to(torch.get_default_device())


def drawn_on_the_cpu(draw):
    """torch.randn and the like, with the same numbers on every device."""

    def random(*arguments, requires_grad=False, **options):
        return here(draw(*arguments, **options, device="cpu")).requires_grad_(requires_grad)

    return random


randn, rand, randint = map(drawn_on_the_cpu, (torch.randn, torch.rand, torch.randint))


def memory(H=2, P=6, K=8, V=5, dtype=torch.float64):
    """values (P*P, V), sub_keys (H, 2, P, K/2)"""
    return randn(P * P, V, dtype=dtype), randn(H, 2, P, K // 2, dtype=dtype)


def tokens(B=2, T=11, H=2, K=8, V=5, dtype=torch.float64):
    """query (B, T, H, K), target (B, T, V), loss_weights (B, T), mask (B, T)"""
    query, target = randn(B, T, H, K, dtype=dtype), randn(B, T, V, dtype=dtype)
    return query, target, rand(B, T, dtype=dtype), rand(B, T) > 0.3


def needs_memory(gib):
    """Skips the test, and says so, when less memory is free on its device."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
    else:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 2**20
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory, there are {free:.0f}")


def leaves(*tensors):
    """Copies that require grad, where that is possible."""
    return [t.clone().requires_grad_(t.is_floating_point()) if t is not None else None for t in tensors]


def dense(t):
    return t.to_dense() if t.is_sparse else t


# How far the results of two devices may be apart, by dtype (of the memory, or of half-precision activations). The sums
# have the same terms in another order, and exp and log are not the same to the last bit.
TOLERANCE = {
    torch.float64: dict(rtol=1e-10, atol=1e-11),
    torch.float32: dict(rtol=2e-4, atol=5e-6),
    torch.bfloat16: dict(rtol=2**-6, atol=2e-4),
    torch.float16: dict(rtol=2**-9, atol=2e-4),
}

# One setting per option of a scan that changes the mathematics; names are test ids.
SCANS = {
    "default": dict(),
    "idw": dict(score="idw"),
    "release": dict(score="idw", write_rule="release"),
    "silu": dict(activation="silu", lr=0.05),
    "relu": dict(activation="relu", lr=0.05),
    "temperature": dict(temperature=0.5),
    "lr": dict(lr=0.3),
    "decay": dict(weight_decay=0.2, lr=0.5),
    "clip": dict(grad_clip=0.05, score="idw"),
    "keys_by_memory_loss": dict(values_only=False),
    "keys_by_memory_loss_idw": dict(values_only=False, score="idw", temperature=0.7),
    "keys_by_memory_loss_alone": dict(values_only=False, addressing_weight=0.0),
    "keys_by_memory_loss_silu": dict(values_only=False, activation="silu", lr=0.05),
    "fixed_keys": dict(addressing_weight=0.0),
    "lookahead0": dict(lookahead=0),
    "lookahead3": dict(lookahead=3),
    "lookahead_beyond_chunk": dict(lookahead=6),
    "carry": dict(boundary="carry"),
    "carry2_release": dict(boundary="carry", lookahead=2, write_rule="release", score="idw"),
    "carried": dict(boundary="carry", lookahead=2, carried=2, values_only=False),
    "unflushed": dict(flush=False),
    "unflushed_decay_clip_carry": dict(flush=False, weight_decay=0.1, grad_clip=0.1, boundary="carry", lookahead=2),
}
BASE = dict(topk=3, chunk_size=4)
# All options of the raw operators, in the order of their schema.
DEFAULTS = dict(
    topk=3, chunk_size=4, lookahead=1, score="dot", eps=1e-3, activation="softmax", temperature=1.0, lr=1.0,
    weight_decay=0.0, grad_clip=None, write_rule="paper", values_only=True, addressing_weight=1.0, boundary="drop",
    carried=0, flush=True,
)  # fmt: skip
