"""Random memories and tokens for the tests."""

import pytest
import torch


def memory(H=2, P=6, K=8, V=5, dtype=torch.float64):
    """values (P*P, V), sub_keys (H, 2, P, K/2)"""
    return torch.randn(P * P, V, dtype=dtype), torch.randn(H, 2, P, K // 2, dtype=dtype)


def tokens(B=2, T=11, H=2, K=8, V=5, dtype=torch.float64):
    """query (B, T, H, K), target (B, T, V), loss_weights (B, T), mask (B, T)"""
    query, target = torch.randn(B, T, H, K, dtype=dtype), torch.randn(B, T, V, dtype=dtype)
    return query, target, torch.rand(B, T, dtype=dtype), torch.rand(B, T) > 0.3


def needs_memory(gib):
    """Skips the test, and says so, when less memory is free."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:")) / 2**20
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free memory, there are {free:.0f}")


def leaves(*tensors):
    """Copies that require grad, where that is possible."""
    return [t.clone().requires_grad_(t.is_floating_point()) if t is not None else None for t in tensors]


def dense(t):
    return t.to_dense() if t.is_sparse else t


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
