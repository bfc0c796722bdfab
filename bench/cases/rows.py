"""Rows of the memory by number: reading them, adding to them, putting new ones in their place."""

import torch

import fwpkm_cuda
from bench import peers
from bench.cases.case import Case, Setup, Work, bag
from fwpkm_cuda import reference

R = 8


# ------------------------------------------------------------------------------------------------------------ reading
def gather(s: Setup):
    """value_gather, by reads, by distribution, by size of the table."""
    for reads in s.sizes.reads:
        for distribution in s.sizes.distributions:
            yield f"{reads} reads, {distribution}", lambda r=reads, d=distribution: one_gather(s, r, d, s.sizes.P)
    reads = s.sizes.reads[len(s.sizes.reads) // 2]
    for P in s.sizes.slots:
        yield f"{reads} reads, uniform, P={P}", lambda P=P: one_gather(s, reads, "uniform", P)


def draw_reads(s: Setup, reads, distribution, num_slots):
    """slots (N, R) int32, weights (N, R)"""
    return s.slots(distribution, num_slots, reads // R, R), s.rand(reads // R, R)


def one_gather(s: Setup, reads, distribution, P):
    width = s.sizes.width
    values, _ = s.memory(P, width, width)

    def work(x):
        slots = x[0]
        rows = slots.unique().numel()
        moved = rows * width * 4 + slots.numel() * 8 + len(slots) * width * 4
        return Work(bytes=moved, facts={"reads": reads, "distinct": rows, "all_reads_bytes": reads * width * 4})

    def fbgemm():
        read = peers.fbgemm_table(s, values)
        return lambda x: read(*x)

    return Case(
        inputs=lambda: draw_reads(s, reads, distribution, P * P),
        contestants={
            "ours": lambda: lambda x: fwpkm_cuda.value_gather(values, *x),
            "embedding_bag": lambda: lambda x: bag(values, *x),
            "compiled": lambda: compiled_gather(s, values),
            "fbgemm": fbgemm,
        },
        expected=lambda x: reference.value_gather(values, x[0].long(), x[1]),
        work=work,
        tolerance=1e-5,
    )


def compiled_gather(s: Setup, values):
    function = peers.compiled(s, lambda slots, weights: (weights.unsqueeze(-1) * values[slots]).sum(-2))
    return lambda x: function(x[0].long(), x[1])


# ------------------------------------------------------------------------------------------------------------- adding
def segments(s: Setup):
    """value_gather_dvalues with rows of 16 bytes: what it costs to bring the reads of each slot together."""
    for reads in s.sizes.segments:
        for distribution in s.sizes.distributions:
            yield f"{reads} reads, {distribution}", lambda r=reads, d=distribution: one_segments(s, r, d)


def one_segments(s: Setup, reads, distribution, V=4):
    num_slots = s.sizes.P**2

    def inputs():
        return *draw_reads(s, reads, distribution, num_slots), s.randn(reads // R, V)

    def index_add(x):
        slots, weights, dout = x
        moved = (weights.unsqueeze(-1) * dout.unsqueeze(1)).flatten(0, 1)
        return dout.new_zeros(num_slots, V).index_add_(0, slots.flatten(), moved)

    def sort_and_count(x):
        ordered, order = x[0].flatten().sort(stable=True)
        return ordered.unique_consecutive(return_counts=True), order

    def work(x):
        return Work(
            bytes=reads * 8 + reads // R * V * 4 + num_slots * V * 4,
            facts={"reads": reads, "distinct": x[0].unique().numel()},
        )

    return Case(
        inputs=inputs,
        contestants={
            "ours": lambda: lambda x: torch.ops.fwpkm.value_gather_dvalues(x[2], x[0], x[1], num_slots),
            "index_add_": lambda: index_add,
            "sort and counts": lambda: sort_and_count,
            "torch.sort alone": lambda: lambda x: x[0].flatten().sort(stable=True),
        },
        expected=lambda x: index_add([x[0], x[1].double(), x[2].double()]),
        work=work,
        unlike={
            "sort and counts": "a stable sort and the slots' counts, no sums",
            "torch.sort alone": "a part of it; on a GPU CUB's radix sort, of 32 bits with 64-bit places",
        },
        tolerance=1e-4,
    )


# ---------------------------------------------------------------------------------------------------------- replacing
def commit(s: Setup):
    """commit_: the rows of one chunk's log go into the memory."""
    reads = s.sizes.batch * s.sizes.chunk * R
    for distribution in s.sizes.distributions:
        yield f"{reads} reads, {distribution}", lambda d=distribution: one_commit(s, reads, d)


def one_commit(s: Setup, reads, distribution):
    P, width = s.sizes.P, s.sizes.width
    memory, sub_keys = s.memory(P, width, width)

    def inputs():
        """A log as chunk_scan leaves it: a slot's new row stands at its first read."""
        slots = s.slots(distribution, P * P, reads // R, R).flatten()
        ordered, order = slots.sort(stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        new_slots = torch.full_like(slots, -1)
        new_slots[order[first]] = ordered[first]
        return new_slots, s.randn(reads, width)

    def ours():
        values, keys = s.copies((memory, sub_keys))

        def call(x):
            torch.ops.fwpkm.commit_(values, keys, x[1], x[0], sub_keys)
            return values

        return call

    def index_copy():
        values = memory.clone()

        def call(x):
            places = (x[0] >= 0).nonzero().squeeze(1)
            return values.index_copy_(0, x[0][places].long(), x[1][places])

        return call

    def expected(x):
        values = memory.clone()
        values[x[0][x[0] >= 0].long()] = x[1][x[0] >= 0]
        return values

    def work(x):
        rows = int((x[0] >= 0).sum())
        return Work(
            bytes=2 * rows * width * 4 + reads * 4 + 2 * sub_keys.numel() * 4, facts={"reads": reads, "distinct": rows}
        )

    return Case(
        inputs=inputs,
        contestants={"ours": ours, "index_copy_": index_copy},
        expected=expected,
        work=work,
        tolerance=1e-6,
        most_sets=4,
    )
