"""The CUDA kernels on the CPU: csrc/kernels compiled by the host compiler, every CUDA thread a fiber (tests/simt).

Three builds of one program: plain, under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer,
which takes every CUDA thread for a thread. They are kept in build/simt, or in FWPKM_SIMT_BUILD_DIR.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import FULL

ROOT = Path(__file__).parent.parent
BUILD = Path(os.environ.get("FWPKM_SIMT_BUILD_DIR", ROOT / "build" / "simt"))
SEEDS = 200 if FULL else 20
MUTANT_SEEDS = 100 if FULL else 20
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1", "UBSAN_OPTIONS": "halt_on_error=1"}

# What the harness must say of the kernels and calls of tests/simt/broken.cpp, and which builds say it.
BROKEN = {
    "missing_barrier": ("tsan", "data race"),
    "shuffle_as_fence": ("tsan", "data race"),
    "two_blocks_add": ("tsan", "data race"),
    "missing_fence": ("tsan", "data race"),
    "divergent_barrier": ("plain", "broken.cpp:28 but thread"),
    "return_before_barrier": ("plain", "returned while thread"),
    "shuffle_outside_mask": ("plain", "which is not in its mask"),
    "different_masks": ("plain", "do not exist or have returned|meets"),
    "mask_of_returned_lane": ("plain", "names lanes 0x00000008 that do not exist or have returned"),
    "deadlock": ("plain", "deadlock"),
    "endless_spin": ("plain", "a million switches at atomics"),
    "write_beyond_array": ("asan", "heap-buffer-overflow"),
    "write_beyond_shared": ("asan", "use-after-poison"),
    "misaligned_pack": ("plain asan tsan", "misaligned address"),
    "misaligned_copy": ("plain asan tsan", "misaligned address"),
    "static_shared": ("plain", "static shared memory, more than 48 KiB"),
    "shared_beyond_launch": ("plain", "takes 101 bytes of dynamic shared memory, its launch gave 100"),
    "shared_beyond_device": ("plain", "more than the device has"),
    "shared_beyond_what_is_known": ("plain", "returned -2"),  # allow_shared says no
    "shared_not_allowed": ("plain", "returned 1$"),  # cudaErrorInvalidValue
    "no_blocks": ("plain", "returned 9$"),  # cudaErrorInvalidConfiguration
    "many_threads": ("plain", "returned 9$"),
    "large_grid": ("plain", "returned 9$"),
    "capture_synchronises_stream": ("plain", "returned 900"),  # cudaErrorStreamCaptureUnsupported
    "capture_synchronises_device": ("plain", "returned 900"),
    "capture_makes_stream": ("plain", "returned 900"),
    "capture_makes_event": ("plain", "returned 900"),
    "capture_unjoined": ("plain", "returned 904"),  # cudaErrorStreamCaptureUnjoined
    "capture_unjoined_again": ("plain", "returned 904"),
    "capture_waits_for_others": ("plain", "returned 905"),  # cudaErrorStreamCaptureIsolation
}


def tool(name):
    """A program of the environment that runs the tests, or of PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")


def cuda_include():
    """The toolkit's headers: types only, nothing of them needs a GPU."""
    compilers = [os.environ.get("CUDACXX"), tool("nvcc")]
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(shutil.which(c) or c).resolve().parent.parent for c in compilers if c] + [
        Path(h) for h in homes if h
    ]
    return next((f / "include" for f in folders if (f / "include" / "vector_types.h").is_file()), None)


def missing():
    """Why these tests cannot run here, or None."""
    if not (ROOT / "csrc").is_dir():
        return "the tests run away from the source tree"
    if platform.machine() != "x86_64":
        return "the fibers of tests/simt are written for x86-64"
    if not cuda_include():
        return "no CUDA headers (vector_types.h) beside nvcc, in CUDA_HOME or in /usr/local/cuda"
    if not tool("cmake") or not tool("ninja"):
        return "cmake and ninja are needed to build tests/simt"
    return None


reason = missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))


def build(*settings, target="all"):
    """Brings a target of tests/simt up to date."""
    environment = dict(os.environ, PATH=f"{Path(tool('ninja')).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    source = ["-S", ROOT / "tests" / "simt", "-B", BUILD, "-G", "Ninja", f"-DCUDA_INCLUDE={cuda_include()}", *settings]
    for command in (source, ["--build", BUILD, "-j", "2", "--target", target]):
        result = subprocess.run([tool("cmake"), *command], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, result.stdout + result.stderr


@pytest.fixture(scope="module")
def programs():
    """{"plain": ..., "asan": ..., "tsan": ...}, brought up to date."""
    build()
    return {name: BUILD / f"simt_{name}" for name in ("plain", "asan", "tsan")}


def run(program, *words):
    result = subprocess.run(
        [program, *map(str, words)],
        capture_output=True,
        text=True,
        errors="replace",
        env=dict(os.environ, **SANITIZERS),
        timeout=1200,
    )
    output = result.stdout + result.stderr
    if "unexpected memory mapping" in output:
        pytest.skip("this kernel's address space layout is not one that ThreadSanitizer knows")
    return result.returncode, output


def run_each(program, command, seeds, names):
    """What the program prints of each case, one process per case; fails unless all end well."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda name: run(program, command, seeds, name), names))
    wrong = [output for code, output in results if code != 0]
    assert not wrong, "\n".join(wrong)
    return [output for _, output in results]


def cases(programs, small=False):
    names = run(programs["plain"], "list")[1].split()
    return [name for name in names if name.startswith("small_") or not small]


def test_every_case_under_many_schedules(programs):
    """Bit for bit what a plain loop gives."""
    names = cases(programs)
    assert len(names) > 30
    run_each(programs["plain"], "check", SEEDS, names)


def test_address_and_undefined_behaviour_sanitizers(programs):
    run_each(programs["asan"], "check", SEEDS if FULL else 2, cases(programs))


def test_thread_sanitizer(programs):
    run_each(programs["tsan"], "check", 10 if FULL else 2, cases(programs, small=True))


@pytest.mark.parametrize("name", ["right_barrier", "right_fence", "right_shared", "right_capture"])
def test_right_kernels_pass(programs, name):
    for program in programs.values():
        code, output = run(program, "broken", name)
        assert code == 0 and "returned 0" in output, output


@pytest.mark.parametrize("name", BROKEN)
def test_broken_kernels_are_reported(programs, name):
    builds, words = BROKEN[name]
    for build in builds.split():
        code, output = run(programs[build], "broken", name)
        assert re.search(words, output, re.MULTILINE), output
        assert code != 0 or "returned" in words, output


def mutation_scores(programs, build, seeds):
    """{barrier: schedules in which its absence was noticed}, over all small cases."""
    scores = {}
    for output in run_each(programs[build], "mutate", seeds, cases(programs, small=True)):
        for line in output.splitlines():
            barrier, _, noticed = line.rpartition(" ")
            scores[barrier] = scores.get(barrier, 0) + int(noticed)
    return scores


def test_every_barrier_is_needed(programs, capsys):
    """Without any one of them a result differs, or ThreadSanitizer finds a race."""
    plain = mutation_scores(programs, "plain", MUTANT_SEEDS)
    races = mutation_scores(programs, "tsan", 2)
    assert plain.keys() == races.keys() and plain
    with capsys.disabled():
        if FULL:
            for barrier, wrong in plain.items():
                print(f"\n{barrier}: wrong in {wrong} schedules, race in {races[barrier]} of 2 or more", end="")
    unnoticed = [barrier for barrier in plain if not plain[barrier] and not races[barrier]]
    assert not unnoticed


def test_every_barrier_of_the_kernels_is_reached(programs):
    """A barrier that no small case reaches would be left out of the test above."""
    reached = set(mutation_scores(programs, "plain", 1))
    kernels = ROOT / "csrc" / "kernels"
    written = {
        f"{path.name}:{number}"
        for path in kernels.glob("*.cuh")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "__syncthreads(" in line or "__syncwarp(" in line
    }
    assert written <= reached, written - reached
