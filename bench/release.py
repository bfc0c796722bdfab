"""Runs the released FwPKM code, from a folder that the user names.

Its embedding bag has a backward pass for GPUs alone (Triton). On the CPU an equal function in PyTorch takes its place,
and `triton` is stood in for if it is missing. Nothing else is changed, and on a GPU nothing at all.
"""

import importlib
import sys
import types
from contextlib import contextmanager
from pathlib import Path

import torch


def embedding_bag_backward(indices, weight, per_sample_weights, grad):
    moved = (per_sample_weights.unsqueeze(-1) * grad.unsqueeze(1)).flatten(0, 1)
    dweight = torch.zeros_like(weight).index_add_(0, indices.flatten(), moved)
    rows = weight.index_select(0, indices.flatten()).view(*indices.shape, -1)
    return dweight, (rows * grad.unsqueeze(1)).sum(-1)


@contextmanager
def triton_or_a_stand_in():
    """For the time of the import only: PyTorch itself asks whether there is a Triton."""
    names = ("triton", "triton.language")
    importlib.import_module("torch._dynamo")  # comes with what the release imports; it asks, and must hear the truth
    try:
        importlib.import_module("triton")
        names = ()
    except ImportError:
        triton, language = map(types.ModuleType, names)
        triton.jit, triton.language, language.constexpr = (lambda f: f), language, int
        sys.modules |= dict(zip(names, (triton, language)))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def load(folder, device="cpu"):
    """The released class FastWeightProductKeyMemory, for one kind of device in a process."""
    package = Path(folder) / "src" / "models" / "fwpkm"
    if not (package / "fwpkm.py").is_file():
        raise SystemExit(
            f"--release-dir: expected the released repository, with src/models/fwpkm/fwpkm.py, in {folder}"
        )
    released = types.ModuleType("released_fwpkm")
    released.__path__ = [str(package)]
    sys.modules["released_fwpkm"] = released
    with triton_or_a_stand_in():
        wrapper = importlib.import_module("released_fwpkm.xformer_embeddingbag_grad_wrapper")
        if device == "cpu":
            wrapper.embedding_bag_bw_rev_indices = embedding_bag_backward
        return importlib.import_module("released_fwpkm.fwpkm").FastWeightProductKeyMemory


def make(folder, values, sub_keys, topk, score):
    """A released memory with these weights."""
    module = load(folder, values.device.type)(
        mem_k_dim=2 * sub_keys.shape[3],
        mem_v_dim=values.shape[1],
        mem_heads=sub_keys.shape[0],
        mem_topk=topk,
        mem_n_subkeys=sub_keys.shape[2],
        qk_score_type={"dot": "dot_product", "idw": "idw"}[score],
    )
    with torch.no_grad():
        module.keys.copy_(sub_keys.reshape(module.keys.shape))
        module.values.copy_(values)
    return module.to(values.device)


def run(module, query, target, loss_weights, chunk_size):
    """-> out (B, T, V); train() and eval() as the release does them, the memory is written in place"""
    result = module(q=query.flatten(2), ref_v=target, chunk_size=chunk_size, gates=loss_weights)
    return result["output"]
