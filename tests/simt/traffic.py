"""Whether the CUDA kernels touch what they must and nothing else: run with FWPKM_LIBRARY naming the library of
simt_traffic, by ../test_simt_ops.py.

A gather has its exact bytes. A scan and its gradient have no pass over the memory: with four times as many slots they
load and store hardly more, and all of it together is less than one such pass.
"""

import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from inputs import memory, tokens
from kernel_traffic import Counter

import fwpkm_cuda

torch.manual_seed(0)
torch.set_num_threads(1)
counter = Counter(fwpkm_cuda.library_path())


def gather(N=40, R=4, V=64):
    values = torch.randn(1000, V)
    slots = torch.randperm(1000)[: N * R].view(N, R).int()
    weights = torch.rand(N, R)
    counter.launches()
    out = fwpkm_cuda.value_gather(values, slots, weights)
    (launch,) = counter.launches()
    assert launch.loaded == 4 * (N * R * V + 2 * N * R), launch  # rows, slots and weights
    assert launch.loaded_by_blocks >= launch.loaded
    assert launch.stored == launch.stored_sectors == out.nbytes, launch


def scan(P, V=64):
    """(what one pass over the memory would load, what the launches do load and store), by function"""
    values, sub_keys = memory(1, P, 8, V, torch.float32)
    inputs = [t if t.dtype == torch.bool else t.float() for t in tokens(1, 16, 1, 8, V)]
    options = dict(topk=2, chunk_size=8, score="idw", values_only=False)
    leaves = [t.requires_grad_() for t in (values.clone(), sub_keys.clone(), *inputs[:3])]
    counter.launches()
    result = fwpkm_cuda.chunk_scan(*leaves, inputs[3], **options, sparse_grad=True)
    forward = counter.launches()
    (result.out.sum() + result.losses.sum()).backward()
    backward = counter.launches()
    with torch.no_grad():
        fwpkm_cuda.chunk_scan_(values, sub_keys, *inputs, **options)
    in_place = counter.launches()
    both = {"chunk_scan": forward, "chunk_scan_backward": backward, "chunk_scan_": in_place}
    return values.nbytes, {name: sum(x.loaded + x.stored for x in launches) for name, launches in both.items()}


gather()
(_, few), (one_pass, many) = scan(64), scan(128)
for name in few:
    assert 0 < few[name] <= many[name] < 2 * few[name], (name, few, many)
    assert many[name] < one_pass / 2, (name, many, one_pass)
    print(name, "touches", many[name], "bytes of a memory of", one_pass)
