"""The CUDA operators on the CPU: csrc/cuda, wrappers and kernels, compiled by the host compiler (tests/simt) into a
library that registers them for CPU tensors. The tests of the operators run with it in place of the real library.

Left out: what is marked `cpu`, for a wrong value does not raise in the CUDA code; and what takes long where every CUDA
thread is a fiber."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from test_simt import BUILD, ROOT, build, missing

reason = missing()
pytestmark = pytest.mark.skipif(reason is not None, reason=str(reason))

# Test file: which of its tests (as pytest's -k). All of them together take five minutes of a core.
RUNS = {
    "test_value_gather.py": "",
    "test_product_key_topk.py": "",
    "test_chunk_scan.py": "not gradcheck and not threads",
    "test_golden.py": "operators and not dense",
    "test_golden_layers.py": "test_layer_matches or pkm",
    "test_memory_cuts.py": "half or (streams and (drop-dot or carry-idw)) or give_the_bits_of_a_stream",
    "test_layers.py": "(composition and output_and_loss) or option or stream or learned or read_passes or frozen",
    "test_gpu.py": "not agree or float32 or default",
    "test_large_shapes.py": "h1k8-idw or h2k32",
}
# With the launches of a GPU: work that is large there, one head and two, 8 reads and 32.
LAUNCHED = "h1k8-idw or h2k8-idw-keys or h1k32-idw or h2k32-dot-keys"
# Under AddressSanitizer and UndefinedBehaviorSanitizer: sizes of buffers are the wrappers' business.
SANITIZED = {
    "test_value_gather.py": "",
    "test_product_key_topk.py": "not exact",
    "test_chunk_scan.py": "(reference or in_place) and not gradcheck and not threads",
    "test_gpu.py": "not agree or float32 or default",
}


def built(target):
    """Brings a variant of the library up to date and returns its path."""
    build(f"-DFWPKM_TORCH_DIR={Path(torch.__file__).parent}", target=target)
    return BUILD / f"libfwpkm_{target}.so"


def python(library, *words, **environment):
    """Runs Python with the library in place of the real one, on a machine that has no GPU; returns what it printed."""
    environment = dict(
        os.environ, FWPKM_LIBRARY=str(library), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", **environment
    )
    result = subprocess.run(
        [sys.executable, *words], env=environment, cwd=ROOT, capture_output=True, text=True, errors="replace"
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
    return result.stdout


def run(library, file, selection, **environment):
    words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not cpu", "-k", selection]
    assert " passed" in python(library, *words, Path(__file__).parent / file, **environment)


@pytest.fixture(scope="module")
def runs(request):
    """{file: its run}, all that are selected at the same time: each has one thread."""
    path = built("simt_ops")
    files = [
        x.callspec.params["file"] for x in request.session.items if x.name.startswith("test_the_cuda_operators_pass")
    ]
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield {file: pool.submit(run, path, file, RUNS[file]) for file in files}


@pytest.mark.parametrize("file", RUNS)
def test_the_cuda_operators_pass(runs, file):
    runs[file].result()


def test_every_cuda_operator_is_in_the_library():
    """Under the key of the CPU: no file of csrc/cuda registers its operators in another way than binding/stream.h's."""
    sources = [path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu")]
    names = [name for text in sources for name in re.findall(r'm\.impl\("(\w+)"', text)]
    code = (
        "import torch, fwpkm_cuda\n"
        f"for name in {names}:\n"
        "    print(name, *map(int, [torch._C._dispatch_has_kernel_for_dispatch_key('fwpkm::' + name, key)"
        " for key in ('CPU', 'CUDA')]))"
    )
    assert len(names) >= 4
    assert python(built("simt_ops"), "-c", code).splitlines() == [f"{name} 1 0" for name in names]


def test_every_wait_between_streams_is_there_and_needed():
    # What is freed or new holds rubbish, and not what the same call has left there.
    words = python(built("simt_ops"), ROOT / "tests" / "simt" / "streams.py", MALLOC_PERTURB_="85")
    assert words.count("needs its waits") == 3 and words.count("may fail at any of") == 3


def test_operators_can_be_captured():
    words = python(built("simt_ops"), ROOT / "tests" / "simt" / "capture.py")
    assert words.count("can be captured") == 2 and words.count("cannot be captured is noticed") == 1


def test_every_device_has_room_for_the_largest_shapes():
    assert python(built("simt_ops"), ROOT / "tests" / "simt" / "limits.py").count("the same bits on every device") == 10


def test_no_kernel_passes_over_the_memory():
    assert python(built("simt_traffic"), ROOT / "tests" / "simt" / "traffic.py").count("bytes of a memory") == 3


@pytest.mark.full
def test_large_work_with_the_launches_of_a_gpu():
    run(built("simt_launched"), "test_large_shapes.py", LAUNCHED)


@pytest.mark.full
def test_every_device_has_room_for_the_launches_of_a_gpu():
    words = python(built("simt_launched"), ROOT / "tests" / "simt" / "limits.py")
    assert words.count("the same bits on every device") == 10


@pytest.mark.full
@pytest.mark.parametrize("file", SANITIZED)
def test_the_cuda_operators_under_sanitizers(file):
    compiler = os.environ.get("CXX", "c++")
    paths = [
        subprocess.run([compiler, f"-print-file-name=lib{name}.so"], capture_output=True, text=True, check=True).stdout
        for name in ("asan", "ubsan")
    ]
    options = {"ASAN_OPTIONS": "detect_leaks=0", "LD_PRELOAD": " ".join(path.strip() for path in paths)}
    run(built("simt_ops_asan"), file, SANITIZED[file], **options)
