"""Usage of slots and gates: counted by hand, and against random reads."""

import math

import pytest
import torch

from fwpkm_cuda import gate_histogram, random_usage, read_counts, usage


def test_read_counts():
    indices = torch.tensor([[3, 0, 3], [1, 3, 0]], dtype=torch.int32)
    assert read_counts(indices, 5).tolist() == [2, 1, 0, 3, 0]
    assert read_counts(indices.long(), 5).dtype == torch.int64
    with pytest.raises(ValueError, match=r"\[0, 3\), got 3"):
        read_counts(indices, 3)
    with pytest.raises(ValueError, match="got -1"):
        read_counts(torch.tensor([-1, 2]), 3)


def test_usage_counted_by_hand():
    found = usage(torch.tensor([0, 0, 0, 2, 5, 5, 7, 1]), 8)
    assert found.collision == 5 / 8 and found.coverage == 5 / 8
    shares = [3 / 8, 1 / 8, 2 / 8, 1 / 8, 1 / 8]
    assert found.kl == pytest.approx(sum(p * math.log(p * 8) for p in shares))


def test_usage_at_its_extremes():
    assert usage(torch.arange(16), 16) == pytest.approx((0, 1, 0))
    collapsed = usage(torch.zeros(100, dtype=torch.int64), 16)
    assert collapsed == pytest.approx((1, 1 / 16, math.log(16)))
    assert usage(torch.zeros(0, 4, dtype=torch.int32), 16) == random_usage(0, 16) == (0, 0, 0)
    assert random_usage(1, 1) == (0, 1, 0) and random_usage(9, 1) == (1, 1, 0)
    assert random_usage(1, 16) == pytest.approx((0, 1 / 16, math.log(16)))


@pytest.mark.parametrize(
    "reads, expected",
    [
        (2**18, (0.632, 0.632, 0.573)),  # one read per slot
        (2**15, (0.1175, 0.1175, 2.164)),  # a chunk of 8 sequences
        (2**12, (0.0155, 0.0155, 4.170)),  # a chunk of one
        (2**20, (0.982, 0.982, 0.133)),
    ],
)
def test_random_use_of_the_paper_s_memory(reads, expected):
    floor = random_usage(reads, 512 * 512)
    assert floor == pytest.approx(expected, abs=6e-4)
    torch.manual_seed(reads)
    assert usage(torch.randint(512 * 512, (reads,)), 512 * 512) == pytest.approx(tuple(floor), abs=0.01)


@pytest.mark.parametrize("reads, slots", [(1, 5), (2, 3), (7, 4), (40, 9)])
def test_random_use_of_small_memories(reads, slots):
    """The mean of many draws."""
    torch.manual_seed(0)
    draws = [usage(torch.randint(slots, (reads,)), slots) for _ in range(3000)]
    assert torch.tensor(draws).mean(0).tolist() == pytest.approx(list(random_usage(reads, slots)), abs=0.02)


def test_gate_histogram():
    gates = torch.tensor([[0.0, 0.05, 0.1], [0.55, 0.999, 1.0]])
    shares = gate_histogram(gates)
    assert (shares * 6).tolist() == pytest.approx([2, 1, 0, 0, 0, 1, 0, 0, 0, 2])
    assert gate_histogram(gates, bins=2).tolist() == pytest.approx([0.5, 0.5])
    assert gate_histogram(torch.empty(0)).sum() == 0
    assert gate_histogram(torch.rand(100).bfloat16().requires_grad_()).sum() == pytest.approx(1)
