#!/usr/bin/env python3
"""Writes docs/kernel-traffic.md: how many bytes of global memory the launches of the benchmark's main cases move.

    scripts/kernel_traffic.py [--output FILE]

Counted, not measured: the CUDA kernels run on the CPU (tests/simt), where every load and store of theirs is seen
(tests/simt/traffic.cpp). Needs what tests/test_simt_ops.py needs; no GPU.
"""

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from kernel_table import shortened

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "kernel-traffic.md"


class Launch(NamedTuple):
    kernel: str
    blocks: int
    threads: int  # of a block
    loaded_by_blocks: int  # bytes, all in sectors but `stored`
    loaded: int
    stored: int
    stored_sectors: int


class Counter:
    """Of the library of simt_traffic, which this process has loaded in place of the real one."""

    def __init__(self, library):
        symbols = subprocess.run(["nm", "--demangle", library], capture_output=True, text=True, check=True).stdout
        lines = [line.split(" ", 2) for line in symbols.splitlines() if line[0] != " "]
        self.names = {int(address, 16): name for address, _, name in lines}
        self.library = ctypes.CDLL(str(library))
        self.launches()

    def launches(self):
        """Those since the last call."""
        with tempfile.NamedTemporaryFile("r") as file:
            assert self.library.simt_traffic(file.name.encode()) == 0
            rows = [[int(x) for x in line.split()] for line in file]
        return [Launch(shortened(self.names[place]), *numbers) for place, *numbers in rows]


def cases(counter):
    """(title, launches) of what bench/cases/scan.py calls layer_train, layer_infer and decode."""
    from bench.cases import scan
    from bench.cases.case import SIZES, Setup

    s = Setup("cpu", SIZES["cuda", False], None)
    shape = scan.shape_of(s, "h1k8", s.sizes.batch, 2 * s.sizes.chunk)
    step, forward = scan.trained(s, shape, commit=False), []
    step.after_forward = lambda: forward.extend(counter.launches())
    tokens = scan.draw(s, shape)
    counter.launches()
    step(tokens)
    yield "Training, B = 8, two chunks of 512 tokens: forward", forward
    yield "Training, the same: backward", counter.launches()

    for title, length, options in (
        ("Inference, B = 1, two chunks of 512 tokens", 2 * s.sizes.chunk, {}),
        ("A decoded token, read", 1, dict(flush=False)),
    ):
        shape = scan.shape_of(s, "h1k8", 1, length)
        tokens, call = scan.draw(s, shape), scan.in_place(s, shape, **options)
        counter.launches()
        call(tokens)
        yield title, counter.launches()


def table(launches):
    """A line for each kernel, in the order of their first launches; bytes of one launch, on average."""
    by_kernel = {}
    for launch in launches:
        by_kernel.setdefault(launch.kernel, []).append(launch)
    lines = ["| kernel | launches | blocks | threads | loaded by blocks | loaded | stored | in sectors |"]
    lines += ["|---|--:|--:|--:|--:|--:|--:|--:|"]

    def line(name, count, blocks, threads, *numbers):
        return f"| {name} | {count} | {blocks} | {threads} | " + " | ".join(f"{x / 1e6:.2f}" for x in numbers) + " |"

    for name, group in by_kernel.items():
        mean = [sum(numbers) / len(group) for numbers in zip(*(x[3:] for x in group))]
        lines.append(line(f"`{name}`", len(group), max(x.blocks for x in group), group[0].threads, *mean))
    all_numbers = (sum(numbers) for numbers in zip(*(x[3:] for x in launches)))
    lines.append(line("all launches", len(launches), "", "", *all_numbers))
    return lines


TEXT = """# What the CUDA kernels load and store

`make kernel-traffic`: 512 x 512 slots, one head, 8 reads, K = V = 512, float32, the tokens of the benchmark's uniform
cases; MB of global memory in one launch, counted on the CPU. Loads in sectors of 32 bytes, each

* once for every block that asks for it ("by blocks"): what a multiprocessor must be given if its L1 cache keeps what
  the block asks for again (the filter of the search does so with some sub-keys, when L1 has forgotten them).
* once for the launch: what must come from L2 or memory.

Stored bytes, and those of the sectors that they lie in, each once. The first of two chunks, before which no row has
been written, is part of the means. PyTorch's own kernels (zeros, copies) are not counted.
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    sys.path.extend((str(ROOT), str(ROOT / "tests")))
    from test_simt_ops import built, reason

    if reason:
        sys.exit(reason)
    library = built("simt_traffic")
    os.environ["FWPKM_LIBRARY"] = str(library)  # before fwpkm_cuda is imported
    lines = TEXT.splitlines()
    for title, launches in cases(Counter(library)):
        lines += ["", f"## {title}", "", *table(launches)]
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
