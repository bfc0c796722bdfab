"""chunk_scan, chunk_scan_ and commit_ against reference.py, option by option; promises of the design."""

import pytest
import torch
from inputs import BASE, DEFAULTS, SCANS, dense, leaves, memory, needs_memory, tokens
from torch.autograd import gradcheck

import fwpkm_cuda
from fwpkm_cuda import reference

pytestmark = pytest.mark.usefixtures("device")

DIFFERENTIABLE = ("out", "weights", "losses", "addressing_loss", "values", "sub_keys")


def apart(options):
    return {name: options[name] for name in ("lr", "weight_decay") if name in options}


def committed(values, sub_keys, scan, options):
    values, sub_keys = values.clone(), sub_keys.clone()
    fwpkm_cuda.commit_(values, sub_keys, fwpkm_cuda.Scan(*(x.detach() for x in scan)), **apart(options))
    return values, sub_keys


def final_memory(values, scan, options):
    """The memory after the scan as a differentiable function of its outputs."""
    keep = 1 - options.get("lr", 1.0) * options.get("weight_decay", 0.0)
    here = scan.new_slots >= 0
    decayed = values * keep ** scan.addressing_loss.shape[0]
    return decayed.index_put((scan.new_slots[here].long(),), scan.new_rows[here]), scan.new_sub_keys


@pytest.fixture(params=SCANS, ids=str)
def case(request):
    options = BASE | SCANS[request.param]
    return memory() + tokens(T=14), options


def test_outputs_and_memory_match_the_reference(case):
    inputs, options = case
    before = [x.clone() for x in inputs]
    expected = reference.chunk_scan(*inputs, **options)
    scan = fwpkm_cuda.chunk_scan(*inputs, **options)
    values, sub_keys = committed(inputs[0], inputs[1], scan, options)
    assert torch.equal(scan.indices.long(), expected.indices)
    for name in ("out", "weights", "losses", "addressing_loss"):
        torch.testing.assert_close(getattr(scan, name), getattr(expected, name), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(values, expected.values, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(sub_keys, expected.sub_keys, rtol=1e-11, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), "a differentiable scan writes nothing"


def test_in_place_gives_the_bits_of_scan_and_commit(case):
    inputs, options = case
    scan = fwpkm_cuda.chunk_scan(*inputs, **options)
    values, sub_keys = committed(inputs[0], inputs[1], scan, options)
    v, k = inputs[0].clone(), inputs[1].clone()
    reading = fwpkm_cuda.chunk_scan_(v, k, *inputs[2:], **options)
    assert torch.equal(v, values) and torch.equal(k, sub_keys)
    assert all(torch.equal(a, b) for a, b in zip(reading, scan, strict=False))


@pytest.mark.parametrize("sparse_grad", [True, False], ids=["sparse", "dense"])
def test_gradients_of_everything_match_the_reference(case, sparse_grad):
    inputs, options = case
    ours, other = leaves(*inputs[:5]), leaves(*inputs[:5])
    scan = fwpkm_cuda.chunk_scan(*ours, inputs[5], **options, sparse_grad=sparse_grad)
    expected = reference.chunk_scan(*other, inputs[5], **options)
    memory_after = final_memory(ours[0], scan, options)
    mine = dict(zip(DIFFERENTIABLE, (*(getattr(scan, n) for n in DIFFERENTIABLE[:4]), *memory_after), strict=True))
    for names in (("out",), ("losses",), ("addressing_loss", "weights"), ("values",), ("sub_keys",), DIFFERENTIABLE):
        factors = {n: torch.randn_like(mine[n]) for n in names}
        a = torch.autograd.grad(
            sum((mine[n] * factors[n]).sum() for n in names), ours, retain_graph=True, materialize_grads=True,
            allow_unused=True,
        )  # fmt: skip
        b = torch.autograd.grad(
            sum((getattr(expected, n) * factors[n]).sum() for n in names), other, retain_graph=True,
            materialize_grads=True, allow_unused=True,
        )  # fmt: skip
        for x, y, name in zip(a, b, ("values", "sub_keys", "query", "target", "loss_weights"), strict=True):
            torch.testing.assert_close(
                dense(x), y, rtol=1e-9, atol=1e-10, msg=lambda m, n=name, ns=names: f"d{ns}/d{n}: {m}"
            )


def test_every_gradient_exists():
    """With everything on, no gradient of out may vanish: a missing term would show as zero or None."""
    inputs = leaves(*(memory() + tokens(T=14)[:3]))
    scan = fwpkm_cuda.chunk_scan(*inputs, **BASE, values_only=False, sparse_grad=False)
    for name, gradient in zip(
        "values sub_keys query target loss_weights".split(), torch.autograd.grad(scan.out.sum(), inputs), strict=True
    ):
        assert gradient.abs().max() > 1e-3, name


@pytest.mark.parametrize("score", ["dot", "idw"])
@pytest.mark.parametrize("values_only", [True, False], ids=["values_only", "keys_too"])
def test_gradcheck(score, values_only):
    inputs = leaves(*(memory(H=2, P=4, K=4, V=3) + tokens(B=1, T=7, K=4, V=3)[:3]))
    mask = torch.tensor([[True, True, False, True, True, True, True]])

    def everything(*x):
        scan = fwpkm_cuda.chunk_scan(
            *x, mask, topk=2, chunk_size=3, score=score, values_only=values_only, lr=0.5, sparse_grad=False
        )
        return (*(getattr(scan, n) for n in DIFFERENTIABLE[:4]), *final_memory(x[0], scan, {}))

    assert gradcheck(everything, inputs, fast_mode=False, atol=1e-6)


def test_backward_can_run_twice_on_a_retained_graph():
    inputs = leaves(*(memory() + tokens()[:3]))
    scan = fwpkm_cuda.chunk_scan(*inputs, **BASE, sparse_grad=False)
    first = torch.autograd.grad(scan.out.square().sum(), inputs, retain_graph=True)
    second = torch.autograd.grad(scan.out.square().sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_commit_before_the_backward_pass_fails_loudly():
    values, sub_keys = memory()
    query, target = leaves(*tokens()[:2])
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **BASE)
    fwpkm_cuda.commit_(values, sub_keys, scan)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        scan.out.sum().backward()


def test_a_second_derivative_is_refused():
    values, sub_keys = memory()
    query, target = leaves(*tokens()[:2])
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **BASE)
    (gradient,) = torch.autograd.grad(scan.out.square().sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="chunk_scan is differentiable once"):
        gradient.sum().backward()


def test_in_place_refuses_inputs_that_require_grad():
    values, sub_keys = memory()
    query, target = leaves(*tokens()[:2])
    before = values.clone()
    with pytest.raises(RuntimeError, match="query requires grad"):
        fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, **BASE)
    assert torch.equal(values, before)
    with torch.no_grad():
        fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, **BASE)
    assert not torch.equal(values, before)


def test_in_place_operators_raise_the_version_counters():
    values, sub_keys = memory()
    versions = values._version, sub_keys._version
    fwpkm_cuda.chunk_scan_(values, sub_keys, *tokens()[:2], **BASE)
    assert values._version > versions[0] and sub_keys._version > versions[1]
    with torch.inference_mode():
        fwpkm_cuda.chunk_scan_(values.clone(), sub_keys.clone(), *tokens()[:2], **BASE)


def test_gradient_of_values_is_sparse_with_one_row_per_read():
    values, sub_keys = leaves(*memory())
    query, target, *_ = tokens(B=2, T=9)
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **BASE)
    scan.out.sum().backward()
    assert values.grad.is_sparse and values.grad._nnz() == 2 * 9 * 2 * 3
    read = scan.indices.unique()
    assert torch.equal(values.grad.coalesce().indices()[0], read.long()), "only slots that were read have gradients"


# ---------------------------------------------------------------------------------------------------- promises
def test_only_rows_that_are_read_matter():
    """NaN in every row that is never read: nothing sees it, forward, backward or at commit."""
    values, sub_keys = memory(P=9)
    activations = tokens(T=10)
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, *activations, **BASE)
    unread = torch.ones(81, dtype=torch.bool).index_fill(0, scan.indices.flatten().long(), False)
    assert unread.sum() > 3
    poisoned = values.masked_fill(unread.unsqueeze(-1), torch.nan)
    inputs = leaves(poisoned, sub_keys, *activations[:3])
    again = fwpkm_cuda.chunk_scan(*inputs, activations[3], **BASE)
    assert torch.equal(again.out, scan.out) and torch.equal(again.new_rows, scan.new_rows)
    again.out.sum().backward()
    assert all(dense(x.grad).isfinite().all() for x in inputs)
    fwpkm_cuda.commit_(poisoned, sub_keys, again)
    assert torch.equal(poisoned.isnan().all(-1), unread) and torch.equal(poisoned.isnan().any(-1), unread)


def test_places_of_the_log_without_a_row_are_zero():
    values, sub_keys = memory(P=3)
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, *tokens(T=20), **BASE)
    assert scan.new_slots.shape[0] == scan.new_rows.shape[0] == 2 * 20 * 2 * 3
    newest = scan.new_slots[scan.new_slots >= 0]
    assert torch.equal(newest.sort().values, scan.indices.unique()), "each slot's newest row stands in one place"
    read = scan.indices.view(2, 20, -1)
    written = sum(len(read[:, c : c + 4].unique()) for c in range(0, 20, 4))
    assert int((scan.new_rows != 0).any(-1).sum()) == written


@pytest.mark.parametrize("score", ["dot", "idw"])
def test_bits_do_not_depend_on_threads_or_repetition(score):
    inputs = memory(H=2, P=20, K=16, V=40, dtype=torch.float32) + tokens(B=2, T=200, K=16, V=40, dtype=torch.float32)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 2):
            torch.set_num_threads(n)
            x = leaves(*inputs[:5])
            scan = fwpkm_cuda.chunk_scan(
                *x, inputs[5], topk=8, chunk_size=64, score=score, values_only=False, sparse_grad=False
            )
            results.append((*scan, *torch.autograd.grad(scan.out.square().sum(), x)))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_deterministic_mode_changes_nothing():
    """It also fills fresh memory with NaN: an output that is not written would show."""
    inputs = memory(dtype=torch.float32) + tokens(T=14, dtype=torch.float32)
    for options in SCANS.values():
        plain = fwpkm_cuda.chunk_scan(*inputs, **BASE | options)
        torch.use_deterministic_algorithms(True)
        try:
            again = fwpkm_cuda.chunk_scan(*inputs, **BASE | options)
        finally:
            torch.use_deterministic_algorithms(False)
        assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("boundary", ["drop", "carry"])
@pytest.mark.parametrize(
    "options", [dict(), dict(score="idw", weight_decay=0.1, values_only=False)], ids=["dot", "idw"]
)
def test_a_stream_ends_in_the_same_bits_however_it_is_cut(boundary, options):
    options = dict(topk=4, chunk_size=7, lookahead=2, boundary=boundary) | options
    memory0 = memory(P=10, V=9, dtype=torch.float32)
    activations = tokens(T=40, V=9, dtype=torch.float32)

    def scan_(values, sub_keys, *x, **o):
        values, sub_keys = values.clone(), sub_keys.clone()
        reading = fwpkm_cuda.chunk_scan_(values, sub_keys, *x, **o)
        return reference.Scan(*reading, values, sub_keys)

    whole = scan_(*memory0, *activations, **options)
    for cuts in ([1] * 40, [40], [7] * 5 + [5], [3, 20, 1, 1, 15], [39, 1], [6, 1, 33]):
        state, out = reference.Stream(*memory0), []
        for part in zip(*(x.split(cuts, 1) for x in activations), strict=True):
            result, state = reference.stream(state, *part, scan=scan_, **options)
            out.append(result.out)
        _, state = reference.flush(state, scan=scan_, **options)
        assert torch.equal(torch.cat(out, 1), whole.out)
        assert torch.equal(state.values, whole.values) and torch.equal(state.sub_keys, whole.sub_keys)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_activations_with_a_float32_memory(dtype):
    memory0 = memory(dtype=torch.float32)
    query, target, gate, mask = tokens(T=14, dtype=torch.float32)
    half = [x.to(dtype) for x in (query, target, gate)]
    ours, other = leaves(*half), leaves(*(x.float() for x in half))
    scan = fwpkm_cuda.chunk_scan(*memory0, *ours, mask, **BASE)
    expected = fwpkm_cuda.chunk_scan(*memory0, *other, mask, **BASE)
    assert scan.out.dtype == dtype and scan.weights.dtype == scan.losses.dtype == torch.float32
    assert torch.equal(scan.out, expected.out.to(dtype)) and torch.equal(scan.new_rows, expected.new_rows)
    a = torch.autograd.grad(scan.losses.sum(), ours)
    b = torch.autograd.grad(expected.losses.sum(), other)
    for x, y in zip(a, b, strict=True):
        assert x.dtype == dtype and torch.equal(x, y.to(dtype))


@pytest.mark.cpu
# ------------------------------------------------------------------------------------------- defects that once were
def test_the_backward_operator_refuses_places_of_an_empty_log():
    inputs = memory() + tokens(T=3)
    options = tuple((DEFAULTS | dict(flush=False)).values())
    saved = list(torch.ops.fwpkm.chunk_scan(*inputs, *options))
    saved[11] = torch.zeros_like(saved[11])  # read_from: -1 = values
    with pytest.raises(RuntimeError, match="read_from: expected numbers in"):
        torch.ops.fwpkm.chunk_scan_backward(
            torch.ones_like(saved[0]), *[None] * 5, *inputs, saved[5], *saved[7:], *options, False
        )


@pytest.mark.cpu
def test_a_large_step_behind_a_loss_of_zero_does_not_reach_the_memory():
    """The error's square underflows in float32, the error times its weight and the learning rate overflows."""
    values, sub_keys = torch.zeros(4, 2), torch.zeros(1, 2, 2, 1)
    query, target = torch.zeros(1, 2, 1, 2), torch.full((1, 2, 2), 1e-23)
    with pytest.raises(RuntimeError, match="values: expected finite rows"):
        fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, torch.full((1, 2), 3e38), topk=1, chunk_size=2, lr=1e30)
    assert torch.equal(values, torch.zeros(4, 2))


def test_a_lazy_copy_of_the_memory_is_written_alone():
    values, sub_keys = memory()
    copies = torch._lazy_clone(values), torch._lazy_clone(sub_keys)
    before = values.clone(), sub_keys.clone()
    fwpkm_cuda.chunk_scan_(*copies, *tokens(), **BASE)
    assert torch.equal(values, before[0]) and torch.equal(sub_keys, before[1])
    assert not torch.equal(copies[0], values)


def test_second_order_terms_survive_a_tiny_temperature():
    inputs = [x.float() for x in memory() + tokens(T=9)[:2]]
    query, sub_keys = leaves(inputs[2], inputs[1])
    options = BASE | dict(values_only=False, temperature=1e-23)
    scan = fwpkm_cuda.chunk_scan(inputs[0], sub_keys, query, inputs[3], **options)
    for gradient in torch.autograd.grad(scan.out.sum(), (query, sub_keys)):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("write_rule", ["paper", "release"])
def test_every_nonzero_byte_of_a_mask_is_true(write_rule):
    inputs = memory() + tokens(T=9)
    odd = (inputs[5].to(torch.uint8) * 2).view(torch.bool)
    a = fwpkm_cuda.chunk_scan(*inputs, **BASE, write_rule=write_rule)
    b = fwpkm_cuda.chunk_scan(*inputs[:5], odd, **BASE, write_rule=write_rule)
    assert torch.equal(a.new_rows, b.new_rows) and torch.equal(a.losses, b.losses)


@pytest.mark.full
def test_a_memory_of_more_than_2_to_the_31_elements():
    """P = 4096 sub-keys: rows of slots beyond 2^31 elements are read, logged, written and differentiated."""
    P, V = 4096, 136
    needs_memory(11)  # for 8.5 GiB of values
    values, sub_keys = torch.zeros(P * P, V), torch.zeros(1, 2, P, 2)
    sub_keys[0, :, -1] = 1  # every query below reads the last slot, and ties the first ones
    query, target = leaves(torch.ones(1, 6, 1, 4), torch.ones(1, 6, V))
    options = dict(topk=2, chunk_size=3, addressing_weight=0.0)
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **options)
    assert (scan.indices == P * P - 1).any(-1).all()
    small = reference.chunk_scan(  # the same reads on the last and first sub-keys alone
        torch.zeros(9, V), sub_keys[:, :, [0, 1, -1]], query, target, **options
    )
    torch.testing.assert_close(scan.out, small.out)
    ours = torch.autograd.grad(scan.out.sum(), (query, target))
    for a, b in zip(ours, torch.autograd.grad(small.out.sum(), (query, target)), strict=True):
        torch.testing.assert_close(a, b)
    fwpkm_cuda.commit_(values, sub_keys, scan)
    torch.testing.assert_close(values[-1], small.values[-1])
    assert values[-1].abs().max() > 0
    again = fwpkm_cuda.chunk_scan_(values, sub_keys, query.detach(), target.detach(), **options)
    assert (again.losses < scan.losses).all()
