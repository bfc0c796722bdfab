"""The tools around the CUDA kernels: the parser of ptxas' output. (Of a GPU check: test_gpu_check.py.)"""

import importlib
import struct
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="the tests run away from the source tree")

# Of nvcc 13.0. The second kernel spills; the last entry is a function that was not inlined.
PTXAS = """\
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function '_ZN5fwpkm7kernels12count_digitsINS0_16OrderedListsSizeEEEvPKiiiiPi' for 'sm_80'
ptxas info    : Function properties for _ZN5fwpkm7kernels12count_digitsINS0_16OrderedListsSizeEEEvPKiiiiPi
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 384 bytes cmem[0]
ptxas info    : Compile time = 58.630 ms
ptxas info    : Compiling entry function '_ZN5fwpkm7kernels6gatherINS0_10LaunchSizeELb0EfiEEvPKT1_PKT2_S5_llllPS3_Pj' for 'sm_80'
ptxas info    : Function properties for _ZN5fwpkm7kernels6gatherINS0_10LaunchSizeELb0EfiEEvPKT1_PKT2_S5_llllPS3_Pj
    8 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 64 registers, used 0 barriers, 8 bytes cumulative stack size
ptxas info    : Function properties for __internal_trig_reduction_slowpathd
    40 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
"""  # noqa: E501


@pytest.fixture
def kernel_table(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("kernel_table")


def elf(sections):
    """A 64-bit ELF file with no more than its sections."""
    contents = {**sections, ".shstrtab": b"\0".join(name.encode() for name in (*sections, ".shstrtab", ""))}
    data, headers, name_at = bytes(64), b"", 0
    for name, content in contents.items():
        headers += struct.pack("<IIQQQQIIQQ", name_at, 0, 0, 0, len(data), len(content), 0, 0, 0, 0)
        data, name_at = data + content, name_at + len(name) + 1
    counts = struct.pack("<HHH", 64, len(contents), len(contents) - 1)
    return data[:0x28] + struct.pack("<Q", len(data)) + bytes(10) + counts + data[0x40:] + headers


def test_registers_and_spills_are_read_from_ptxas(kernel_table):
    kernels = kernel_table.parse(PTXAS, "sm_80")
    assert [x[1:7] for x in kernels] == [
        ("sm_80", 32, 1024, 0, 0, 0), ("sm_80", 64, 0, 8, 12, 8), ("sm_80", None, 0, 0, 0, 40),
    ]  # fmt: skip
    assert [x.spills for x in kernels] == [False, True, False]


def test_block_and_instructions_are_read_from_machine_code(kernel_table):
    kernels = kernel_table.parse(PTXAS, "sm_80")
    first, second = (x.name for x in kernels[:2])
    bounds = struct.pack("<BBHBBH3I", 3, 0x1B, 128, 4, 5, 12, 64, 2, 1)
    file = elf({f".text.{first}": bytes(160), f".nv.info.{first}": bounds, f".text.{second}": bytes(32),
                f".nv.info.{second}": bounds[:4]})  # fmt: skip
    found = kernel_table.with_code(kernels, file)
    assert [(x.threads, x.instructions) for x in found] == [(128, 10), (1024, 2), (0, 0)]


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "warps"),
    [
        ("sm_90a", 32, 0, 256, 64),
        ("sm_90a", 64, 0, 256, 32),  # registers
        ("sm_90a", 65, 0, 256, 24),  # of a warp in units of 256
        ("sm_90a", 32, 41040, 256, 40),  # five blocks of 41 KB
        ("sm_80", 32, 41040, 256, 24),
        ("sm_90a", 16, 0, 32, 32),  # blocks
        ("sm_86", 16, 0, 32, 16),
        ("sm_89", 40, 0, 512, 48),
        ("sm_100f", 64, 0, 256, 32),
        ("sm_75", 64, 0, 256, "-"),  # not in the table
    ],
)
def test_warps_that_fit(kernel_table, arch, registers, shared, threads, warps):
    kernel = kernel_table.Kernel("k", arch, registers, shared, 0, 0, 0, threads, 100)
    assert kernel.warps == warps


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "reason"),
    [
        (64, 0, 1024, ""),
        (65, 0, 1024, "65 registers of 1024 threads"),  # 72, as a warp has them
        (72, 0, 896, ""),
        (80, 0, 768, ""),
        (81, 0, 768, "81 registers of 768 threads"),  # 88: room for 23 warps, and so for 20
        (255, 48 << 10, 256, ""),
        (32, (48 << 10) + 1, 256, "49153 bytes of static shared memory"),
    ],
)
@pytest.mark.parametrize("arch", ["sm_80", "sm_75", "sm_120"])
def test_a_kernel_that_cannot_be_launched_is_reported(kernel_table, arch, registers, shared, threads, reason):
    kernel = kernel_table.Kernel("k", arch, registers, shared, 0, 0, 0, threads, 100)
    assert kernel.too_large.startswith(reason) and bool(kernel.too_large) == bool(reason)
    inexcusable = kernel_table.table({Path("a.cu"): [kernel]}, "13.0")[1]
    assert inexcusable == ([f"a.cu: k on {arch}: {kernel.too_large}"] if reason else [])


def test_a_spill_needs_a_reason(kernel_table, monkeypatch):
    files = {Path("a.cu"): [x._replace(threads=256, instructions=9) for x in kernel_table.parse(PTXAS, "sm_80")]}
    monkeypatch.setattr(kernel_table, "SPILLS", {})
    lines, inexcusable = kernel_table.table(files, "13.0")
    assert "| **`gather<LaunchSize, false, float, int>`** | sm_80 | 64 | 0 | 8 | 12 | 8 | 256 | 32 | 9 |" in lines
    assert "| `count_digits<OrderedListsSize>` | sm_80 | 32 | 1024 | 0 | 0 | 0 | 256 | 64 | 9 |" in lines
    assert len(inexcusable) == 1 and "gather<LaunchSize, false, float, int> on sm_80" in inexcusable[0]
    monkeypatch.setattr(kernel_table, "SPILLS", {"gather": "eight bytes, once per block"})
    lines, inexcusable = kernel_table.table(files, "13.0")
    assert not inexcusable and "* `gather`: eight bytes, once per block" in lines


def test_names_of_kernels_are_short(kernel_table):
    short = kernel_table.shortened
    assert short("void fwpkm::kernels::f<fwpkm::A, (int)4, float, fwpkm::Rows<double> >(float const*, int)") == (
        "f<A, 4, float, Rows<double>>"
    )
    assert short("fwpkm::kernels::(anonymous namespace)::g(int*)") == "g"
    assert short("void f<&a::b>(int (*)(long))") == "f<&b>"
    assert len(short("void f<" + "x" * 500 + ">()")) == 100


def test_every_architecture_of_a_file_is_compiled_apart(kernel_table):
    file = kernel_table.ROOT / "csrc/cuda/errors.cu"
    targets = (
        '"--generate-code=arch=compute_80,code=[compute_80,sm_80]" "--generate-code=arch=compute_90a,code=[sm_90a]"'
    )
    compilation = {"file": str(file), "command": f"nvcc -O3 {targets} -x cu -c {file} -o errors.cu.o"}
    found = list(kernel_table.device_commands(compilation, "/out"))
    assert [(str(name), arch) for name, arch, _ in found] == [("csrc/cuda/errors.cu", a) for a in ("sm_80", "sm_90a")]
    for _, arch, command in found:
        assert command[:6] == ["nvcc", "-O3", "-x", "cu", str(file), "-o"] and command[6].startswith("/out/")
        assert command[7:] == ["-cubin", "-Xptxas=-v", f"--generate-code=arch=compute_{arch[3:]},code=[{arch}]"]
