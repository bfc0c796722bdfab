"""product_key_topk against reference.py: selection, order, ties, gradients."""

import pytest
import torch
from inputs import leaves, memory, randint, randn
from torch.autograd import gradcheck

import fwpkm_cuda
from fwpkm_cuda import reference

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1, 1, 1, 2, 1), (7, 2, 6, 8, 3), (3, 1, 40, 34, 40), (33, 4, 65, 16, 8), (2, 1, 300, 6, 128)]


def shape_id(s):
    return "N{}-H{}-P{}-K{}-R{}".format(*s)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("score", ["dot", "idw"])
def test_scores_and_slots_match_the_reference(shape, score):
    N, H, P, K, R = shape
    _, sub_keys = memory(H, P, K)
    query = randn(N, H, K, dtype=torch.float64)
    scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, R, score)
    expected = reference.product_key_topk(query, sub_keys, R, score)
    torch.testing.assert_close(scores, expected.scores, rtol=1e-12, atol=1e-12)
    assert torch.equal(indices.long(), expected.indices)
    assert indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_is_as_good_as_float64s(dtype):
    """In float32 another slot may win only where scores are equal to float32's accuracy."""
    _, sub_keys = memory(2, 64, 64, dtype=torch.float32)
    query = randn(50, 2, 64).to(dtype)
    for score in ("dot", "idw"):
        scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 8, score)
        exact = reference.product_key_topk(query.double(), sub_keys.double(), 8, score)
        assert scores.dtype == torch.float32
        torch.testing.assert_close(scores.double(), exact.scores, rtol=2e-6, atol=2e-5)
        assert (indices == exact.indices).float().mean() > 0.99


def test_ties_go_to_the_smaller_sub_key_then_to_the_smaller_slot():
    """Small integers: every score is exact, so ties are too."""
    for seed in range(20):
        torch.manual_seed(seed)
        sub_keys = randint(-1, 2, (2, 2, 7, 3)).float()
        query = randint(-1, 2, (12, 2, 6)).float()
        scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 4)
        expected = reference.product_key_topk(query, sub_keys, 4)
        assert torch.equal(scores, expected.scores)
        assert torch.equal(indices.long(), expected.indices)


def test_all_sub_keys_equal():
    _, indices = fwpkm_cuda.product_key_topk(torch.ones(3, 1, 4), torch.ones(1, 2, 9, 2), 5)
    assert torch.equal(indices, torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32).expand(3, 1, 5))


def test_a_tokens_result_does_not_depend_on_the_rest_of_the_call():
    """The same bits for one token, an odd number of tokens and many: one order of summation over K."""
    _, sub_keys = memory(2, 37, 70, dtype=torch.float32)
    query = randn(101, 2, 70)
    for score in ("dot", "idw"):
        scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 5, score)
        for part in (query.split(1), query.split(3), query.split(34)):
            each = [fwpkm_cuda.product_key_topk(q, sub_keys, 5, score) for q in part]
            assert torch.equal(torch.cat([e[0] for e in each]), scores)
            assert torch.equal(torch.cat([e[1] for e in each]), indices)


@pytest.mark.parametrize("score", ["dot", "idw"])
def test_gradients_exist_and_are_exact(score):
    _, sub_keys = memory(2, 5, 6)
    query, sub_keys = leaves(randn(2, 4, 2, 6, dtype=torch.float64), sub_keys)
    assert gradcheck(lambda q, k: fwpkm_cuda.product_key_topk(q, k, 3, score)[0], (query, sub_keys))
    mine = torch.autograd.grad(fwpkm_cuda.product_key_topk(query, sub_keys, 3, score)[0].cos().sum(), (query, sub_keys))
    other = torch.autograd.grad(
        reference.product_key_topk(query, sub_keys, 3, score).scores.cos().sum(), (query, sub_keys)
    )
    for a, b in zip(mine, other, strict=True):
        assert b.abs().max() > 0.1
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_idw_gradient_is_regular_at_distance_zero():
    sub_keys = randn(1, 2, 4, 3, dtype=torch.float64)
    query = torch.cat((sub_keys[0, 0, 1], sub_keys[0, 1, 2])).view(1, 1, 6).requires_grad_()
    scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 1, "idw")
    (gradient,) = torch.autograd.grad(scores.sum(), query)
    assert indices.item() == 1 * 4 + 2
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_a_second_derivative_is_refused():
    query, sub_keys = leaves(randn(2, 1, 4), randn(1, 2, 3, 2))
    scores, _ = fwpkm_cuda.product_key_topk(query, sub_keys, 2)
    (gradient,) = torch.autograd.grad(scores.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="product_key_topk is differentiable once"):
        gradient.sum().backward()


def test_idw_ties_are_ties_of_the_distance():
    """eps = 1 and distances of 1e-4: float32's eps + distance^2 is 1 for all, the distances are not."""
    sub_keys = torch.tensor([2e-4, 0.0, 1e-4, 0.0]).view(1, 1, 4, 1).expand(1, 2, 4, 1).contiguous()
    query = torch.zeros(1, 1, 2)
    _, indices = fwpkm_cuda.product_key_topk(query, sub_keys, 3, "idw", 1.0)
    expected = reference.product_key_topk(query, sub_keys, 3, "idw", 1.0)
    assert torch.equal(indices.long(), expected.indices)
    assert torch.equal(indices.flatten(), torch.tensor([5, 6, 7], dtype=torch.int32)), "sub-keys 1, 3, 2, by slot"


@pytest.mark.cpu
def test_a_sum_of_scores_that_overflows_is_refused():
    with pytest.raises(RuntimeError, match="expected finite scores"):
        fwpkm_cuda.product_key_topk(torch.ones(1, 1, 2), torch.full((1, 2, 2, 1), 2e38), 1)


def test_the_backward_operator_refuses_indices_without_reads():
    query, sub_keys = randn(2, 1, 4), randn(1, 2, 3, 2)
    nothing = torch.zeros(2, 1, 0)
    with pytest.raises(RuntimeError, match="topk: expected 1 <= topk"):
        torch.ops.fwpkm.product_key_topk_backward(nothing, query, sub_keys, nothing.int(), "dot", 1e-3)
