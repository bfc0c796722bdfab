"""How a memory is used: which slots are read, how evenly, and how open the gates are.

Every figure of `Usage` depends on how many reads it was taken over: compare it with `random_usage` of the same number
of reads, not with 0 or 1.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Usage(NamedTuple):
    """SEMANTICS of the released code: its names are collision_ratio, coverage_ratio and kld."""

    collision: float  # share of all reads that hit a slot which is read more than once
    coverage: float  # share of all slots that are read
    kl: float  # Kullback-Leibler divergence of the reads' distribution over the slots from the uniform one, in nats


def read_counts(indices, num_slots) -> Tensor:
    """How often each slot is read.  indices (any shape, integers in [0, S)) -> (S,) int64"""
    indices = indices.reshape(-1)
    if len(indices):
        for slot in map(int, indices.aminmax()):
            if not 0 <= slot < num_slots:
                raise ValueError(f"indices: expected slots in [0, {num_slots}), got {slot}")
    return torch.bincount(indices, minlength=num_slots)


def usage(indices, num_slots) -> Usage:
    """`Usage` of the reads `indices` (any shape, integers in [0, S)) of a memory of S slots; zeros without reads."""
    counts = read_counts(indices, num_slots)
    counts = counts[counts > 0].double()
    reads = counts.sum()
    if not reads:
        return Usage(0.0, 0.0, 0.0)
    share = counts / reads
    return Usage(
        float(counts[counts > 1].sum() / reads),
        len(counts) / num_slots,
        float((share * (share * num_slots).log()).sum()),
    )


def random_usage(num_reads, num_slots) -> Usage:
    """What `usage` is on average if every read hits one of S slots at random, independently of the others.

    As many reads as slots, both many: 0.632, 0.632, 0.574."""
    n, p = num_reads, 1 / num_slots
    if n == 0:
        return Usage(0.0, 0.0, 0.0)
    if num_slots == 1:
        return Usage(float(n > 1), 1.0, 0.0)
    missed = math.log1p(-p)  # of one read missing a given slot
    # A slot's count c is binomial; far from the mean its probability is nothing.
    mean = n * p
    width = 12 * math.sqrt(mean) + 40
    c = torch.arange(max(1, math.floor(mean - width)), min(n, math.ceil(mean + width)) + 1, dtype=torch.float64)
    log_choices = math.lgamma(n + 1) - torch.lgamma(c + 1) - torch.lgamma(n - c + 1)
    probability = (log_choices + c * math.log(p) + (n - c) * missed).exp()
    kl = num_slots * float((probability * (c / n) * (c / mean).log()).sum())
    return Usage(-math.expm1((n - 1) * missed), -math.expm1(n * missed), kl)


def gate_histogram(gates, bins=10) -> Tensor:
    """Share of the gates in each of `bins` equal parts of [0, 1].  gates (any shape) -> (bins,) float64, sum 1"""
    gates = gates.detach().reshape(-1).double()
    place = (gates * bins).long().clamp(0, bins - 1)
    return torch.bincount(place, minlength=bins).double() / max(len(gates), 1)
