"""The tools around the CUDA kernels, without a GPU: the parser of ptxas' output, and the order of a GPU check."""

import importlib
import json
import struct
import subprocess
import sys
import time
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


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


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


def python(code):
    return [sys.executable, "-c", code]


def test_a_part_that_fails_hangs_or_is_missing_does_not_lose_the_others(gpu_check, tmp_path, capsys):
    step, report = gpu_check.Step, tmp_path / "results" / "report.json"
    todo = [
        step("good", python("import os; print(os.environ['WORD'])"), environment={"WORD": "seen"}, keep=True),
        step("bad", python("print('why'); raise SystemExit(3)")),
        step("hangs", python("print('here', flush=True); import time; time.sleep(60)")),
        step("no tool", None, "not found"),
        step("last", python("print('========= ERROR SUMMARY: 0 errors')")),
    ]
    begin = time.monotonic()
    assert not gpu_check.check(todo, {"gpu": "a GPU"}, 5, report)
    assert time.monotonic() - begin < 30
    written = json.loads(report.read_text())
    assert written["passed"] is False and written["machine"]["gpu"] == "a GPU"
    parts = {x["part"]: x for x in written["parts"]}
    results = ["passed", "failed", "timed out", "missing", "passed"]
    assert [x["result"] for x in parts.values()] == results
    assert [name for name, x in parts.items() if x["ok"]] == ["good", "last"]
    assert parts["good"]["tail"] == ["seen"] and parts["bad"]["tail"] == ["why"] and parts["hangs"]["tail"] == ["here"]
    assert parts["bad"]["exit_status"] == 3 and parts["last"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert "hangs       timed out" in capsys.readouterr().out


def test_nothing_runs_after_a_failed_build(gpu_check, tmp_path):
    todo = [
        gpu_check.Step("build", python("raise SystemExit(1)"), first=True),
        gpu_check.Step("tests", python(f"open({str(tmp_path / 'ran')!r}, 'w')")),
    ]
    assert not gpu_check.check(todo, {}, 60, tmp_path / "report.json")
    assert not (tmp_path / "ran").exists()
    results = [x["result"] for x in json.loads((tmp_path / "report.json").read_text())["parts"]]
    assert results == ["failed", "not run"]


@pytest.mark.parametrize("body, result", [("pass", "passed"), ("pytest.skip()", "failed")], ids=["runs", "skips all"])
def test_pytest_must_have_passed_something(gpu_check, tmp_path, body, result):
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it(): {body}\n")
    junit = tmp_path / "it.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tmp_path, "--junitxml", junit]
    record = gpu_check.run(gpu_check.Step("tests", command, junit=junit), 300)
    assert record["result"] == result
    assert record["counts"] == {"passed": int(result == "passed"), "failed": 0, "skipped": int(result != "passed")}


def test_the_parts_of_a_gpu_check(gpu_check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: "/bin/compute-sanitizer")
    options = dict(limit=100, cases="few", benchmarks=tmp_path / "bench.json")
    todo = list(gpu_check.steps(gpu_check.PARTS, {"capability": [9, 0]}, tmp_path, installed=False, **options))
    names = ["build", "tests", "memcheck", "racecheck", "initcheck", "accuracy", "benchmarks"]
    assert [x.name for x in todo] == names
    assert todo[0].environment == {"FWPKM_CUDA_ARCHS": "90a-real", "FWPKM_WITH_CUDA": "ON"} and todo[0].first
    assert todo[-1].command[2:5] == ["bench", "ops", "--device"]
    (tests,) = gpu_check.steps(["tests"], {}, tmp_path, installed=True, **options)
    assert tests.name == "tests"
    monkeypatch.setattr(gpu_check, "find_sanitizer", lambda: None)
    missing = list(gpu_check.steps(["sanitizer"], {}, tmp_path, installed=True, **options))
    assert [x.command for x in missing] == [None] * 3
    assert [gpu_check.architecture(x) for x in ([8, 0], [8, 6], [10, 0], [12, 0])] == [
        "80-real", "86-real", "100a-real", "120-real",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so_and_exits_2(gpu_check, tmp_path):
    assert "lists none" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": None})
    assert "for the CPU only" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": None, "driver_version": "580"})
    assert "for CUDA 13.0" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": "13.0", "driver_version": "580"})
    assert not gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": "13.0", "gpu": "a GPU"})
    if gpu_check.machine().get("gpu"):
        return
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--report", tmp_path / "report.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing was checked" in done.stderr and not (tmp_path / "report.json").exists()
