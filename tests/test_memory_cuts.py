"""A stream cut anywhere ends in the same bits: 1,024 tokens in one call, in single tokens and in 200 random ways."""

import random

import pytest
import torch
from inputs import memory as random_memory
from inputs import rand, randn

import fwpkm_cuda
from fwpkm_cuda import Memory, reference

pytestmark = pytest.mark.usefixtures("device")

T, CHUNK, H, P, K, V = 1024, 64, 1, 16, 8, 16
OPTIONS = dict(topk=4, chunk_size=CHUNK)
CUTS = 50  # random ones per setting; 4 settings, and the two extremes
SETTINGS = [
    pytest.param(dict(boundary=boundary, score=score, lookahead=lookahead), id=f"{boundary}-{score}")
    for boundary, score, lookahead in [("drop", "dot", 1), ("drop", "idw", 3), ("carry", "dot", 2), ("carry", "idw", 1)]
]


def make(dtype=torch.float32, B=1):
    """(values, sub_keys), (query, target, loss_weights, mask)"""
    torch.manual_seed(5)
    values, sub_keys = random_memory(H, P, K, V, dtype)
    tokens = (randn(B, T, H, K, dtype=dtype), randn(B, T, V, dtype=dtype), rand(B, T, dtype=dtype))
    return (values / 4, sub_keys), (*tokens, rand(B, T) > 0.2)


def random_cut(generator):
    """Lengths of calls that add up to T: mixes of single tokens, odd pieces and several chunks at a time."""
    longest = generator.choice([1, 3, 20, CHUNK, CHUNK + 1, 3 * CHUNK, T])
    sizes, left = [], T
    while left:
        sizes.append(min(left, generator.randint(0 if longest > 1 else 1, longest)))
        left -= sizes[-1]
    return sizes


def run(tensors, tokens, sizes, options):
    """Everything that can be seen of a stream: what each token read, the losses, and the memory."""
    memory = Memory(*(t.clone() for t in tensors))
    readings, start = [], 0
    for size in sizes:
        piece = (None if x is None else x[:, start : start + size] for x in tokens)
        readings.append(memory.stream(*piece, **OPTIONS, **options))
        start += size
    pending = memory.pending_tokens
    last = memory.flush()
    seen = [torch.cat([getattr(r, name) for r in readings], 1) for name in Memory.PER_TOKEN]
    written = readings if last is None else [*readings, last]
    seen += [torch.cat([r.losses for r in written], 1), torch.cat([r.addressing_loss for r in written])]
    return [*seen, memory.values, memory.sub_keys], pending


@pytest.mark.parametrize("options", SETTINGS)
@torch.no_grad()
def test_every_cut_gives_the_same_bits(options):
    tensors, tokens = make()
    tokens = [x[:, : T - 5] for x in tokens]  # so that a partial chunk is left for flush
    expected, pending = run(tensors, tokens, [T - 5], options)
    assert pending == CHUNK - 5
    generator = random.Random(str(options))
    cuts = [[1] * (T - 5), *(random_cut(generator) for _ in range(CUTS))]
    for sizes in cuts:
        seen, still_pending = run(tensors, tokens, sizes, options)
        assert still_pending == pending
        for a, b in zip(seen, expected, strict=True):
            assert torch.equal(a, b), sizes


@pytest.mark.parametrize("options", SETTINGS)
@torch.no_grad()
def test_a_stream_is_what_the_reference_streams(options):
    tensors, tokens = make(torch.float64, B=2)
    sizes = random_cut(random.Random(1))
    seen, _ = run(tensors, tokens, sizes, options)
    state, results, start = reference.Stream(*tensors), [], 0
    for size in sizes:
        piece = (x[:, start : start + size] for x in tokens)
        result, state = reference.stream(state, *piece, **OPTIONS, **options)
        results.append(result)
        start += size
    result, state = reference.flush(state, **OPTIONS, **options)
    expected = [torch.cat([getattr(r, name) for r in results], 1) for name in Memory.PER_TOKEN]
    expected += [torch.cat([r.losses for r in (*results, result)], 1)]
    expected += [torch.cat([r.addressing_loss for r in (*results, result)]), state.values, state.sub_keys]
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("score", ["dot", "idw"])
def test_a_scan_and_its_commit_give_the_bits_of_a_stream(score):
    tensors, tokens = make()
    with torch.no_grad():
        streamed, _ = run(tensors, tokens, [T], dict(score=score))
    memory = Memory(*(t.clone() for t in tensors))
    query = tokens[0].clone().requires_grad_()
    scan = memory.scan(query, *tokens[1:], **OPTIONS, score=score)
    assert torch.equal(memory.values, tensors[0]) and torch.equal(memory.sub_keys, tensors[1])
    scan.out.sum().backward()
    assert query.grad.abs().sum() > 0
    memory.commit()
    seen = [scan.out, scan.indices, scan.weights, scan.losses, scan.addressing_loss, memory.values, memory.sub_keys]
    assert all(torch.equal(a, b) for a, b in zip(seen, streamed, strict=True))


@torch.no_grad()
def test_half_precision_tokens_may_be_cut_as_well():
    tensors, tokens = make()
    tokens = [x.bfloat16() if x.is_floating_point() else x for x in tokens]
    expected, _ = run(tensors, tokens, [T], {})
    seen, _ = run(tensors, tokens, [1, 62, 130, T - 193], {})
    assert all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))
    assert expected[0].dtype == torch.bfloat16 and fwpkm_cuda.usage(expected[1], P * P).coverage > 0.5
