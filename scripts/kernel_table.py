#!/usr/bin/env python3
"""Writes docs/kernel-table.md: registers, shared memory, stack and spills of every CUDA kernel, as ptxas reports them;
how many warps that leaves room for, and how many instructions it has.

    scripts/kernel_table.py [--archs "80-real;90a-real"] [--check] [--output FILE] [--jobs 2]

Device code only, with the flags that CMake gives the library; nothing is built or installed, and no GPU is needed.
Architectures: --archs, else FWPKM_CUDA_ARCHS, else the default. --check writes nothing and fails when a kernel
spills that is not in SPILLS, or could not be launched: see Kernel.too_large.
"""

import argparse
import json
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "kernel-table.md"

# Kernels that may spill, and why: {"name without template arguments": "reason"}.
FOR_OCCUPANCY = (
    "some variants; ptxas holds them to a number of registers with which one more block fits. With launch bounds "
    "(threads, 1) it takes more registers and spills nothing. Which is faster has not been measured"
)
MEASURED = (
    "launch bounds hold it to the registers with which another block fits; with a block less, and hardly a spill, it "
    "was slower on an H200 (in a chunk of training: sum_pieces 169 us instead of 144, read_tokens 54 instead of 47, "
    "token_gradients 100 instead of 94)"
)
SPILLS = dict.fromkeys(("add_to_query", "checked_reads", "key_factors"), FOR_OCCUPANCY)
SPILLS |= dict.fromkeys(("sum_pieces", "read_tokens", "token_gradients"), MEASURED)


COLUMNS = (
    "kernel", "architecture", "registers", "shared", "spill stores", "spill loads", "stack", "threads", "warps",
    "instructions",
)  # fmt: skip


class Multiprocessor(NamedTuple):
    """The CUDA programming guide's table of compute capabilities."""

    warps: int
    blocks: int
    shared: int  # bytes


REGISTERS = 1 << 16  # of a block, on every architecture; a warp has them in units of 256, four warps at a time
STATIC_SHARED = 48 << 10  # of a block, without asking for more
LARGE, SMALL = Multiprocessor(64, 32, 164 << 10), Multiprocessor(48, 24, 100 << 10)
MULTIPROCESSORS = {
    "sm_80": LARGE,
    "sm_86": SMALL._replace(blocks=16),
    "sm_89": SMALL,
    "sm_90": LARGE._replace(shared=228 << 10),
    "sm_100": LARGE._replace(shared=228 << 10),
    "sm_120": SMALL,
}


class Kernel(NamedTuple):
    name: str  # mangled
    arch: str  # "sm_90a"
    registers: int | None  # None: a function that was not inlined; it counts for its callers
    shared: int  # static, bytes
    spill_stores: int
    spill_loads: int
    stack: int
    threads: int = 0  # of its largest block
    instructions: int = 0

    @property
    def spills(self):
        return self.spill_stores + self.spill_loads > 0

    @property
    def warps_by_registers(self):
        return REGISTERS // (-(-self.registers * 32 // 256) * 256) // 4 * 4

    @property
    def too_large(self):
        """Why its largest blocks could not be launched; "" if they can."""
        if self.threads > 32 * self.warps_by_registers:
            return f"{self.registers} registers of {self.threads} threads, more than {REGISTERS:,}"
        if self.shared > STATIC_SHARED:
            return f"{self.shared} bytes of static shared memory, more than {STATIC_SHARED:,}"
        return ""

    @property
    def warps(self):
        """Of its largest blocks, at once on a multiprocessor; dynamic shared memory left aside. "-": unknown."""
        room, warps = MULTIPROCESSORS.get(self.arch.rstrip("af")), self.threads // 32
        if room is None:
            return "-"
        shared = -(-(self.shared + 1024) // 128) * 128  # a block's own KB included
        return min(room.blocks, room.warps // warps, self.warps_by_registers // warps, room.shared // shared) * warps


def parse(text, arch):
    """The kernels in what `ptxas -v` printed for one architecture."""
    found, entries = {}, set()
    name = None
    for line in text.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            entries.add(match[1])
        elif match := re.search(r"Function properties for (\S+)", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            stack, stores, loads = map(int, match.groups())
            found[name] = Kernel(name, arch, None, 0, stores, loads, stack)
        elif (match := re.search(r"Used (\d+) registers", line)) and name in entries:
            shared = re.search(r"(\d+) bytes smem", line)
            found[name] = found[name]._replace(registers=int(match[1]), shared=int(shared[1]) if shared else 0)
    return list(found.values())


def sections(elf):
    """{name: contents} of a 64-bit ELF file"""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    names = elf[headers[of_names][4] :]
    return {
        names[name : names.index(b"\0", name)].decode(): elf[at : at + length] for name, _, _, _, at, length in headers
    }


def largest_block(attributes):
    """Threads, of a section .nv.info.KERNEL: attributes, each a format, a number, and 16 bits or so many bytes."""
    at = 0
    while at < len(attributes):
        form, attribute, value = struct.unpack_from("<BBH", attributes, at)
        if (form, attribute) == (4, 5):  # maximal size of a block: x, y, z
            x, y, z = struct.unpack_from("<3I", attributes, at + 4)
            return x * y * z
        at += 4 + (value if form == 4 else 0)
    return 1024


def with_code(kernels, elf):
    """The same, with what is read from their machine code."""
    found = sections(elf)
    return [
        kernel._replace(
            threads=largest_block(found[f".nv.info.{kernel.name}"]),
            instructions=len(found[f".text.{kernel.name}"]) // 16,
        )
        if kernel.registers is not None
        else kernel
        for kernel in kernels
    ]


def demangled(names):
    """{mangled: demangled}"""
    names = sorted(set(names))
    done = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.splitlines(), strict=True))


def shortened(name, limit=100):
    """`kernel<T, 4>` of a demangled function: without return type, namespaces and arguments."""
    name = name.replace("(anonymous namespace)", "").replace("> >", ">>").replace("> >", ">>")
    name = re.sub(r"\((?:bool|int|unsigned int|long|unsigned long)\)(-?\d)", r"\1", name)  # (int)4
    depth, end = 0, len(name)
    for i, c in enumerate(name):  # the arguments begin at the first parenthesis outside of <>
        depth += (c == "<") - (c == ">" and name[i - 1] != "-")
        if c == "(" and depth == 0:
            end = i
            break
    name = re.sub(r"(?:\w*::)+", "", name[:end])
    depth = 0
    for i in range(len(name) - 1, -1, -1):  # and the return type ends at the last space outside of <>
        depth += (name[i] == ">") - (name[i] == "<")
        if name[i] == " " and depth == 0:
            name = name[i + 1 :]
            break
    return name if len(name) <= limit else name[: limit - 1] + "…"


def excused(short):
    return SPILLS.get(short.split("<")[0])


# -------------------------------------------------------------------------------------------------------- compiling
def configured(folder, archs):
    """The compilations of CUDA files that CMake would do, as in compile_commands.json; and nvcc's version."""
    options = [f"-DFWPKM_TORCH_DIR={os.environ['FWPKM_TORCH_DIR']}"] if "FWPKM_TORCH_DIR" in os.environ else []
    options += [f"-DFWPKM_CUDA_ARCHS={archs}"] if archs else []
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        + ["-DFWPKM_WITH_CUDA=ON", "-DFWPKM_WITH_PYBIND=OFF", *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stdout)
    commands = json.loads((folder / "compile_commands.json").read_text())
    version = re.search(r"CUDA (\S+) \[", done.stdout)
    return [x for x in commands if x["file"].endswith(".cu")], version[1]


def device_commands(compilation, folder):
    """One (file, architecture, command) for each architecture of a compilation: device code alone, with ptxas -v."""
    file = Path(compilation["file"]).relative_to(ROOT)
    words = [w for w in shlex.split(compilation["command"]) if w != "-c"]
    targets = [w for w in words if w.startswith("--generate-code=")]
    words = [w for w in words if w not in targets]
    output = words.index("-o") + 1
    for target in targets:
        arch, codes = re.fullmatch(r"--generate-code=arch=(\w+),code=\[(.*)\]", target).groups()
        for code in codes.split(","):
            if code.startswith("sm_"):  # the others are PTX, which ptxas does not see
                cubin = f"{folder}/{'_'.join(file.parts)}.{code}"
                flags = ["-cubin", "-Xptxas=-v", f"--generate-code=arch={arch},code=[{code}]"]
                yield file, code, [*words[:output], cubin, *words[output + 1 :], *flags]


def compiled(file, machine, command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{file} for {machine}:\n{done.stdout}")
    return file, with_code(parse(done.stdout, machine), Path(command[command.index("-o") + 1]).read_bytes())


def measure(archs, jobs):
    """{file: its kernels}, nvcc's version"""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        compilations, version = configured(Path(folder), archs)
        work = [command for x in compilations for command in device_commands(x, folder)]
        files = {}
        for file, kernels in pool.map(lambda x: compiled(*x), work):
            files.setdefault(file, []).extend(kernels)
    return files, version


# ------------------------------------------------------------------------------------------------------ the report
def table(files, version):
    """The document's lines, and the kernels in it that spill without an excuse or cannot be launched."""
    names = demangled(kernel.name for kernels in files.values() for kernel in kernels)
    inexcusable, seen = [], set()
    total = len({k.name for kernels in files.values() for k in kernels if k.registers is not None})
    lines = ["# Registers, shared memory and spills of the CUDA kernels", ""]
    lines += [
        f"nvcc {version}, `make kernel-table`: {total} kernels, one row for each architecture. Sizes in bytes, shared"
    ]
    lines += [
        'memory without the dynamic part. Those that spill come first, in bold; registers "-": a function not inlined.',
        "Warps: so many fit on a multiprocessor with that, in the largest blocks that the kernel is made for.",
    ]
    for file, kernels in sorted(files.items()):
        rows = []
        for k in kernels:
            short = shortened(names[k.name])
            if k.registers is None:
                row = (short, k.arch, "-", *k[3:7], "-", "-", "-")
            else:
                row = (short, *k[1:7], k.threads, k.warps, k.instructions)
            if k in seen:  # a template that several files use
                continue
            seen.add(k)
            if k.registers is not None and k.too_large:
                inexcusable.append(f"{file}: {short} on {k.arch}: {k.too_large}")
            if k.spills and not excused(short):
                inexcusable.append(f"{file}: {short} on {k.arch}: {k.spill_stores} and {k.spill_loads} bytes spilled")
            name = f"**`{short}`**" if k.spills else f"`{short}`"
            rows.append((name, *row[1:]))
        if rows:
            lines += ["", f"## {file}", ""]
            lines += ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "--:|" * (len(COLUMNS) - 2)]
            lines += ["| " + " | ".join(map(str, row)) + " |" for row in sorted(rows, key=str)]
    if SPILLS:
        lines += ["", "## Why some spill", "", *(f"* `{name}`: {reason}" for name, reason in sorted(SPILLS.items()))]
    return lines, inexcusable


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=os.environ.get("FWPKM_CUDA_ARCHS"), help="as FWPKM_CUDA_ARCHS")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail if a kernel spills without a reason or is too large"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--jobs", type=int, default=int(os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))))
    options = parser.parse_args()
    lines, inexcusable = table(*measure(options.archs, options.jobs))
    if not options.check:
        options.output.write_text("\n".join(lines) + "\n")
    print("\n".join(inexcusable) or "no kernel spills without a reason, and all can be launched")
    sys.exit(bool(options.check and inexcusable))


if __name__ == "__main__":
    main()
