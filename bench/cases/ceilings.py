"""What this machine can do at best: copies, reads from the cache, matrix products, launches. Floors and percentages of
all other cases come from here, from the same run."""

import torch

import fwpkm_cuda
from bench.cases.case import Absent, Case, Setup, Work, bag
from fwpkm_cuda import reference

CALLS = 100  # of something too short to be measured by itself


def ceilings(s: Setup):
    gpu = s.device == "cuda"
    yield "copy", lambda: copy(s)
    for size in s.sizes.cached:
        yield f"reads of {size >> 10} KB", lambda size=size: cached_reads(s, size)
    yield "GEMM", lambda: gemm(s, torch.bfloat16 if gpu else torch.float32)
    if gpu:
        yield "GEMM, float32", lambda: gemm(s, torch.float32)
    yield "launch", lambda: launch(s)
    if gpu:
        yield "graph node", lambda: launch(s, in_a_graph=True)


def store(s: Setup, name, result):
    """Keeps the ceiling that a case gave, for the cases after it."""
    ms = [x["ms"]["median"] for x in result["contestants"].values() if "ms" in x]
    if not ms:
        return
    seconds = 1e-3 * min(ms)
    if name == "copy":
        s.ceilings["copy_bytes_per_second"] = result["bytes"] / seconds
    elif name.startswith("reads"):
        key = f"cached_bytes_per_second, {name.removeprefix('reads of ')}"
        s.ceilings[key] = result["bytes"] / seconds
    elif name == "GEMM":
        s.ceilings["gemm_flops_per_second"] = result["flops"] / seconds
    elif name == "GEMM, float32":
        s.ceilings["float32_gemm_flops_per_second"] = result["flops"] / seconds
    else:
        s.ceilings[name.replace(" ", "_") + "_seconds"] = seconds / CALLS


def copy(s: Setup):
    """Bytes read and bytes written both count."""
    source = torch.zeros(s.sizes.copied, dtype=torch.uint8, device=s.device)
    return Case(
        inputs=lambda: (source, torch.empty_like(source)),
        contestants={"torch": lambda: lambda x: x[1].copy_(x[0])},
        work=lambda x: Work(bytes=2 * source.numel()),
        most_sets=1,
    )


def cached_reads(s: Setup, size):
    """Rows of a table that fits the cache, read in random order again and again: what the better gather gets of it."""
    width, reads = s.sizes.width, 8
    values = s.randn(max(8, size // (4 * width)), width)
    tokens = max(64, min(16384, 32 * len(values) // reads))
    weights = s.rand(tokens, reads)
    return Case(
        inputs=lambda: s.slots("uniform", len(values), tokens, reads),
        contestants={
            "value_gather": lambda: lambda slots: fwpkm_cuda.value_gather(values, slots, weights),
            "embedding_bag": lambda: lambda slots: bag(values, slots, weights),
        },
        expected=lambda slots: reference.value_gather(values, slots.long(), weights),
        work=lambda slots: Work(bytes=slots.numel() * 4 * width),
        cold=False,
    )


def gemm(s: Setup, dtype):
    """On the GPU bfloat16, and float32 without TF32 (PyTorch's default)."""
    n = s.sizes.gemm
    return Case(
        inputs=lambda: (s.randn(n, n, dtype=dtype), s.randn(n, n, dtype=dtype)),
        contestants={"torch": lambda: lambda x: x[0] @ x[1]},
        work=lambda x: Work(flops=2 * n**3),
        most_sets=2,
    )


def launch(s: Setup, in_a_graph=False):
    """CALLS operators of PyTorch that do next to nothing, one after the other: what the host takes for each, or the GPU
    in a graph."""
    one = torch.zeros(1, device=s.device)

    def calls(x=None):
        for _ in range(CALLS):
            one.zero_()

    def replay():
        graph, _ = in_graph(calls)
        return lambda x: graph.replay()

    return Case(inputs=tuple, contestants={"torch": replay if in_a_graph else lambda: calls}, most_sets=1, cold=False)


def in_graph(function):
    """A CUDA graph of one call, warmed up on a stream of its own as PyTorch asks. -> graph, the call's result"""
    if not torch.cuda.is_available():
        raise Absent("CUDA graphs need a GPU")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result
