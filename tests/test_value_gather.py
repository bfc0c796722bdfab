"""value_gather against embedding arithmetic in plain PyTorch; its derivatives of first and second order."""

import pytest
import torch
from inputs import dense, leaves, needs_memory, randint, randn
from torch.autograd import gradcheck, gradgradcheck

import fwpkm_cuda
from fwpkm_cuda import reference

pytestmark = pytest.mark.usefixtures("device")

SHAPES = [(1, 1, 1, 1), (9, 3, 7, 4), (5, 2, 1, 17), (40, 6, 130, 33), (12, 1, 5, 64)]


def make(shape, dtype=torch.float64, index_dtype=torch.int32):
    S, N, R, V = shape
    values, weights = randn(S, V, dtype=dtype), randn(N, R, dtype=dtype)
    return values, randint(0, S, (N, R)).to(index_dtype), weights


def shape_id(s):
    return "S{}-N{}-R{}-V{}".format(*s)


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_matches_the_reference(shape, index_dtype):
    values, indices, weights = make(shape, index_dtype=index_dtype)
    out = fwpkm_cuda.value_gather(values, indices, weights)
    torch.testing.assert_close(out, reference.value_gather(values, indices.long(), weights), rtol=1e-12, atol=1e-12)


def test_float32_is_within_twice_the_error_of_embedding_bag():
    values, indices, weights = make((500, 60, 32, 96), torch.float32, torch.int64)
    exact = reference.value_gather(values.double(), indices, weights.double())
    ours = (fwpkm_cuda.value_gather(values, indices, weights) - exact).abs().max()
    bag = torch.nn.functional.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")
    assert ours <= 2 * (bag - exact).abs().max()


@pytest.mark.parametrize("sparse_grad", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_gradients_match_the_reference(shape, sparse_grad):
    values, indices, weights = make(shape)
    ours, other = leaves(values, weights), leaves(values, weights)
    a = torch.autograd.grad(fwpkm_cuda.value_gather(ours[0], indices, ours[1], sparse_grad).cos().sum(), ours)
    b = torch.autograd.grad(reference.value_gather(other[0], indices.long(), other[1]).cos().sum(), other)
    assert a[0].is_sparse == sparse_grad
    for x, y in zip(a, b, strict=True):
        assert y.abs().max() > 0
        torch.testing.assert_close(dense(x), y, rtol=1e-11, atol=1e-12)


def test_gradcheck_and_gradgradcheck():
    values, indices, weights = make((6, 4, 3, 5))
    values, weights = leaves(values, weights)
    op = lambda v, w: fwpkm_cuda.value_gather(v, indices, w)
    assert gradcheck(op, (values, weights))
    assert gradgradcheck(op, (values, weights))


def test_second_derivative_through_a_sparse_gradient():
    """d/dweights of a function of dL/dvalues, with the gradient of values sparse and dense."""
    values, indices, weights = make((6, 4, 3, 5))
    results = []
    for sparse_grad in (False, True):
        v, w = leaves(values, weights)
        (dv,) = torch.autograd.grad(
            fwpkm_cuda.value_gather(v, indices, w, sparse_grad).square().sum(), v, create_graph=True
        )
        results.append(torch.autograd.grad(dense(dv).square().sum(), (v, w)))
    for a, b in zip(*results, strict=True):
        assert dense(b).abs().max() > 0
        torch.testing.assert_close(dense(a), dense(b), rtol=1e-11, atol=1e-12)


def test_a_sparse_gradient_has_one_row_per_slot_read():
    values, indices, weights = make((9, 40, 3, 5))  # 120 reads
    (values,) = leaves(values)
    out = fwpkm_cuda.value_gather(values, indices, weights, sparse_grad=True)
    (gradient,) = torch.autograd.grad(out.sum(), values)
    assert gradient.is_coalesced()
    assert torch.equal(gradient.indices()[0], indices.unique().long())


def test_value_dot_is_the_derivative_by_the_weights():
    values, indices, _ = make((6, 4, 3, 5))
    values, vector = leaves(values, randn(4, 5, dtype=values.dtype))
    for sparse_grad in (False, True):
        out = fwpkm_cuda.value_dot(values, indices, vector, sparse_grad)
        expected = (vector.unsqueeze(-2) * values[indices.long()]).sum(-1)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        found = torch.autograd.grad(out.cos().sum(), (values, vector))
        assert found[0].is_sparse == sparse_grad
        for a, b in zip(found, torch.autograd.grad(expected.cos().sum(), (values, vector)), strict=True):
            torch.testing.assert_close(dense(a), b, rtol=1e-11, atol=1e-12)
    assert gradgradcheck(lambda v, x: fwpkm_cuda.value_dot(v, indices, x), (values, vector))


def test_leading_dimensions_are_kept():
    values = randn(9, 4)
    out = fwpkm_cuda.value_gather(values, torch.zeros(2, 3, 1, 5, dtype=torch.int32), torch.ones(2, 3, 1, 5))
    assert out.shape == (2, 3, 1, 4)
    torch.testing.assert_close(out, 5 * values[0].expand(2, 3, 1, 4))


def test_rows_that_are_not_read_do_not_matter():
    values, indices, weights = make((50, 4, 3, 7))
    expected = fwpkm_cuda.value_gather(values, indices, weights)
    unread = torch.ones(50, dtype=torch.bool).index_fill(0, indices.flatten().long(), False)
    values[unread] = torch.nan
    assert torch.equal(fwpkm_cuda.value_gather(values, indices, weights), expected)


@pytest.mark.full
def test_more_than_2_to_the_31_elements():
    """Rows beyond 2^31 elements are read and their gradients written where they belong."""
    S, V = 2**24 + 8, 128
    needs_memory(10)  # for 8 GiB of values, then of gradients
    values = torch.zeros(S, V)
    values[-1] = 3
    indices = torch.tensor([[S - 1, 0]])
    weights = torch.ones(1, 2, requires_grad=True)
    out = fwpkm_cuda.value_gather(values, indices, weights)
    assert torch.equal(out, torch.full((1, V), 3.0))
    out.sum().backward()
    assert torch.equal(weights.grad, torch.tensor([[3.0 * V, 0.0]]))
    del values, out
    gradient = torch.ops.fwpkm.value_gather_dvalues(torch.ones(1, V), indices, weights.detach(), S)
    assert torch.equal(gradient[-1], torch.ones(V)) and torch.equal(gradient[0], torch.ones(V))
    assert gradient[1:-1].min() == gradient[1:-1].max() == 0
