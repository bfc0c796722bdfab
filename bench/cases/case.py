"""What a case of the operators' benchmark is made of: sizes by device, inputs, comparison with the reference."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench.timing import CpuMeter, CudaMeter

DISTRIBUTIONS = ("uniform", "zipf-0.5", "zipf-1.0", "hot-8")


class Absent(Exception):
    """A contestant that is not on this machine, or that has no such configuration; the message says why."""


# -------------------------------------------------------------------------------------------------------------- sizes
@dataclass(frozen=True)
class Sizes:
    """Letters as everywhere: B batch, T tokens, C chunk, P sub-keys per half, K = V width, R reads per head."""

    P: int = 512
    width: int = 512
    search: tuple = (1, 512, 4096, 32768, 131072)  # tokens
    reads: tuple = (4096, 32768, 131072)
    segments: tuple = (32768, 131072, 1048576)  # reads
    slots: tuple = (128, 256, 512, 1024)  # P of the sweep over slots
    batch: int = 8
    length: int = 4096  # T
    chunk: int = 512
    configurations: tuple = ("h1k8", "h4k8", "h1k32")
    distributions: tuple = DISTRIBUTIONS
    long: int = 131072  # T of the long inference
    rival: tuple = (192, 768, 2, 8192, 128, 64)  # P, width, B, T, C, R
    pkm: tuple = (32768, 4, 32)  # tokens, H, R
    lengths: tuple = (512, 1024, 2048, 4096)  # T of the sweep of memory
    copied: int = 4 << 30  # bytes
    cached: tuple = (8 << 20, 32 << 20)
    gemm: int = 8192
    seconds: float = 0.4  # a contestant's time
    least: int = 3  # repeats
    compiled: bool = True  # with torch.compile

    @property
    def short(self):
        """The least of everything that the named configurations allow: whether a case runs."""
        return Sizes(
            32, 32, (1, 24), (64,), (64,), (8,), 2, 48, 16, self.configurations[:1], ("uniform", "hot-8"), 64,
            (16, 24, 2, 32, 8, 12), (16, 2, 4), (16, 32), 1 << 16, (1 << 16,), 64, 0.0, 1, False,
        )  # fmt: skip


SIZES = {
    ("cuda", False): Sizes(),
    ("cuda", True): Sizes(
        search=(1, 4096), reads=(32768, 131072), segments=(131072,), slots=(512,), distributions=("uniform", "hot-8"),
        lengths=(512, 4096), seconds=0.08, compiled=False,
    ),
    ("cpu", False): Sizes(
        P=256, width=256, search=(1, 256, 2048), reads=(1024, 8192, 32768), segments=(8192, 65536),
        slots=(64, 128, 256, 512), batch=2, length=1024, chunk=256, long=8192, rival=(64, 96, 2, 512, 64, 32),
        pkm=(1024, 4, 16), lengths=(256, 512, 1024, 2048), copied=256 << 20, cached=(1 << 20,), gemm=1024, seconds=0.3,
    ),
    ("cpu", True): Sizes(
        P=64, width=128, search=(1, 512), reads=(8192,), segments=(8192,), slots=(32, 64), batch=2, length=512,
        chunk=128, distributions=("uniform", "hot-8"), long=2048, rival=(32, 64, 2, 128, 32, 16), pkm=(256, 4, 8),
        lengths=(256, 512), copied=64 << 20, cached=(1 << 20,), gemm=512, seconds=0.04, compiled=False,
    ),
}  # fmt: skip


@dataclass
class Setup:
    """What all cases of a run share."""

    device: str
    sizes: Sizes
    meter: CpuMeter | CudaMeter
    release_dir: str | None = None
    slow_peers: bool = False  # those that compile for minutes
    ceilings: dict = field(default_factory=dict)  # bytes and FLOPs per second, seconds; filled by the first family
    seed: int = 0
    offset: int = 0  # elements from a 16-byte boundary to the memory, and to what is made of it

    def __post_init__(self):
        self.generator = torch.Generator(self.device).manual_seed(self.seed)
        self._memory = {}

    def randn(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator, device=self.device).to(dtype)

    def rand(self, *shape):
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def memory(self, P, K, V, H=1):
        """values (P*P, V), sub_keys (H, 2, P, K/2) of a fresh memory, always the same: whoever writes makes a copy."""
        if (P, K, V, H) not in self._memory:
            self._memory = {}  # of one size at a time
            draw = torch.Generator(self.device).manual_seed(self.seed)
            values = torch.randn(P * P, V, generator=draw, device=self.device).mul_(V**-0.5)
            sub_keys = (torch.rand(H, 2, P, K // 2, generator=draw, device=self.device) * 2 - 1) / K**0.5
            self._memory[P, K, V, H] = (values, sub_keys) if not self.offset else self.copies((values, sub_keys))
        return self._memory[P, K, V, H]

    def copies(self, tensors):
        """Of the same structure as `tensors`; a contestant that writes works on copies."""
        return placed(tensors, self.offset)

    def slots(self, distribution, num_slots, tokens, reads):
        """Random slots (tokens, reads), int32. Zipf: the n-th most frequent slot is read in proportion to n^-a."""
        if distribution == "hot-8":
            first = torch.randint(8, (tokens, 1), generator=self.generator, device=self.device)
            return ((first + torch.arange(reads, device=self.device)) % 8 * (num_slots // 8)).int()
        if distribution == "uniform":
            drawn = torch.randint(num_slots, (tokens, reads), generator=self.generator, device=self.device)
            return drawn.int()
        exponent = float(distribution.removeprefix("zipf-"))
        share = torch.arange(1, num_slots + 1, dtype=torch.float64, device=self.device).pow(-exponent).cumsum(0)
        points = torch.rand(tokens, reads, generator=self.generator, device=self.device, dtype=torch.float64)
        rank = torch.searchsorted(share / share[-1], points).clamp_(max=num_slots - 1)
        return torch.randperm(num_slots, generator=self.generator, device=self.device)[rank].int()


# --------------------------------------------------------------------------------------------------------------- case
class Work(NamedTuple):
    """What has to be done at least, whoever does it."""

    bytes: float = 0  # of device memory, each byte once
    flops: float = 0  # of matrix products
    # Of these, how many times as many the tensor cores need for float32 results; on the CPU they are done in float32.
    products: int = 1
    facts: dict = {}  # noqa: RUF012  distinct slots and the like, for the report


@dataclass
class Case:
    """One configuration: how its inputs are drawn, who is to compute what, and who knows the answer.

    A contestant is made by a function without arguments, which may raise `Absent`, and is then called with one set of
    inputs at a time. `checked` is a case of the same kind that the reference can compute, when this one is too large:
    its contestants' first answers are held against its `expected`."""

    inputs: Callable[[], Any]
    contestants: dict[str, Callable[[], Callable]]
    expected: Callable[[Any], Iterable[torch.Tensor]] | None = None
    work: Callable[[Any], Work] = lambda x: Work()
    unlike: dict = field(default_factory=dict)  # {contestant: why its answer is not compared}
    checked: "Case | None" = None
    tolerance: float = 1e-3
    per: int = 1  # chunks of a call: times are also given for one of them
    most_sets: int = 8
    cold: bool = True
    calls: int = 1  # in a row, for a time: of something too short to be timed by itself


def tensors_of(x):
    if isinstance(x, torch.Tensor):
        return [x]
    return [t for part in x for t in tensors_of(part)] if isinstance(x, tuple | list) else []


def placed(x, offset):
    """Copies of the tensors in (nested, named) tuples, each so many elements off a 16-byte boundary."""
    if isinstance(x, torch.Tensor):
        room = torch.empty(x.numel() + 16, dtype=x.dtype, device=x.device)
        return room[offset : offset + x.numel()].view(x.shape).copy_(x)
    if isinstance(x, tuple | list):
        parts = [placed(part, offset) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return x


def difference(found, expected):
    """The largest relative difference of numbers, or share of integers that are not the same, of all tensors that were
    found; a contestant may leave out the last ones."""
    worst, answers = 0.0, tensors_of(found)
    if not answers:
        raise ValueError("there is no answer")
    for a, b in zip(answers, tensors_of(expected)):
        if b.is_floating_point():
            a, b = a.detach().double(), b.detach().double()
            error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        else:
            error = float((a != b).double().mean())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def bag(values, slots, weights):
    """value_gather in PyTorch"""
    return F.embedding_bag(slots, values, per_sample_weights=weights, mode="sum")
