"""The judge itself: finite differences, closed forms and definitions it must satisfy."""

import pytest
import torch
from inputs import BASE, SCANS, leaves, memory, tokens
from torch.autograd import gradcheck

from fwpkm_cuda import reference


@pytest.mark.parametrize("name", SCANS)
def test_gradients_agree_with_finite_differences(name):
    """Through the whole scan, second-order terms of the sub-key step included."""
    options = BASE | dict(topk=2) | SCANS[name]
    inputs = leaves(*(memory(P=4, K=4, V=2) + tokens(B=1, T=9, K=4, V=2))[:5])

    def everything(*x):
        scan = reference.chunk_scan(*x, **options)
        return tuple(y for y in scan if y.is_floating_point() and y.numel())

    assert gradcheck(everything, inputs, fast_mode=True, atol=1e-5)


def test_slots_are_the_best_of_all_pairs():
    """Without ties the two-stage search finds the R best of all P*P slots."""
    _, sub_keys = memory(H=1, P=7, K=6)
    query = torch.randn(20, 1, 6, dtype=torch.float64)
    for score in ("dot", "idw"):
        s = reference.sub_scores(reference.similarities(query, sub_keys, score), score)
        every = (s[:, :, 0, :, None] + s[:, :, 1, None, :]).flatten(-2)
        reads = reference.product_key_topk(query, sub_keys, 5, score)
        best = every.topk(5, -1)
        assert torch.equal(reads.indices, best.indices)
        torch.testing.assert_close(reads.scores, best.values)


def test_weights_are_normalised_over_all_heads():
    weights = reference.read_weights(torch.randn(4, 3, 5))
    torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(4))


@pytest.mark.parametrize("write_rule", ["paper", "release"])
def test_values_follow_the_gradient_of_the_memory_loss(write_rule):
    """One chunk by hand: autograd's gradient of the summed half squared error, divided by N_read."""
    values, sub_keys = memory()
    query, target, gate, mask = tokens(T=6)
    scan = reference.chunk_scan(
        values, sub_keys, query, target, gate, mask, topk=3, chunk_size=6, write_rule=write_rule, lr=0.7
    )
    v = values.clone().requires_grad_()
    out = reference.value_gather(v, scan.indices.flatten(-2), scan.weights.flatten(-2))
    error = out[:, :-1] - target[:, 1:]
    loss = 0.5 * ((mask * gate)[:, :-1, None] * error.square()).sum()
    (gradient,) = torch.autograd.grad(loss, v)
    read_counts = torch.bincount(scan.indices.flatten(), minlength=36).clamp(min=1).unsqueeze(-1)
    kappa = 1.0 if write_rule == "paper" else mask[:, :-1].sum() / (2 * 5) * 3 * 2
    torch.testing.assert_close(scan.values, values - 0.7 * kappa * gradient / read_counts)


def test_addressing_loss_is_lowest_when_sub_keys_are_used_evenly():
    even = reference.Reads(None, None, torch.zeros(6, 1, 2, 1), torch.arange(6).view(6, 1, 1, 1).expand(6, 1, 2, 1))
    skewed = even._replace(sub_indices=torch.zeros(6, 1, 2, 1, dtype=torch.long))
    lowest = reference.addressing_loss(even, 6, 1.0)
    torch.testing.assert_close(lowest, -2 * torch.tensor(6.0).log())
    assert reference.addressing_loss(skewed, 6, 1.0) > lowest


def test_repeated_reading_sharpens_the_memory():
    """The same text read again is answered better: the reason for all of this."""
    values, sub_keys = memory(H=1, P=16, K=16, V=8)
    query, target = torch.randn(1, 64, 1, 16, dtype=torch.float64), torch.randn(1, 64, 8, dtype=torch.float64)
    losses = []
    for _ in range(4):
        scan = reference.chunk_scan(values, sub_keys, query, target, topk=4, chunk_size=16)
        values, sub_keys = scan.values, scan.sub_keys
        losses.append(scan.losses.mean().item())
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("boundary", ["drop", "carry"])
def test_a_stream_equals_one_call(boundary):
    options = dict(topk=3, chunk_size=5, lookahead=2, boundary=boundary)
    state = reference.Stream(*memory())
    inputs = tokens(T=23)
    whole = reference.chunk_scan(*state[:2], *inputs, **options)
    out = []
    for part in zip(*(x.split([1, 4, 7, 2, 9], 1) for x in inputs), strict=True):
        scan, state = reference.stream(state, *part, **options)
        out.append(scan.out)
    _, state = reference.flush(state, **options)
    torch.testing.assert_close(torch.cat(out, 1), whole.out)
    torch.testing.assert_close(state.values, whole.values)
    torch.testing.assert_close(state.sub_keys, whole.sub_keys)


def test_carry_writes_every_pair_but_the_last_lookahead():
    inputs = memory() + tokens(B=1, T=20)
    for boundary, pairs in (("drop", 4 * (5 - 2)), ("carry", 20 - 2)):
        scan = reference.chunk_scan(*inputs, topk=2, chunk_size=5, lookahead=2, boundary=boundary)
        assert scan.losses.shape == (1, pairs)
