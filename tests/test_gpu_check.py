"""The check of a machine with a GPU (scripts/gpu_check.py), on a machine without one: steps that fail, crash, hang or
are killed lose nothing of the others, and the tests that it will run are there."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
pytestmark = pytest.mark.skipif(not SCRIPTS.is_dir(), reason="the tests run away from the source tree")


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("gpu_check")


def python(code):
    return [sys.executable, "-c", code]


def report_of(folder):
    return {(x["part"], x["step"]): x for x in json.loads((folder / "report.json").read_text())["steps"]}


# ---------------------------------------------------------------------------------------------------------- the tests
def test_all_tests_of_a_gpu_are_collected_where_there_is_one(gpu_check, tmp_path):
    """A mistake that only shows where PyTorch finds a GPU stops pytest there before its first test."""
    (tmp_path / "a_gpu.py").write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    command = [sys.executable, "-m", "pytest", "tests", "-m", "gpu", "-q", "--collect-only", "-p", "a_gpu"]
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert len(names) > 700
    steps = [step for part in gpu_check.parts(tmp_path, tmp_path).values() for step in part]
    run = {Path(word).name for step in steps for word in map(str, step.command or ()) if word.startswith("tests/")}
    assert {Path(name.split("::")[0]).name for name in names} == run


# ---------------------------------------------------------------------------------------------------------- its steps
def test_a_step_that_fails_hangs_or_is_missing_does_not_lose_the_others(gpu_check, tmp_path, capsys):
    step = gpu_check.Step
    todo = {
        "one": [
            step("good", python("import os; print(os.environ['WORD'])"), environment={"WORD": "seen"}, keep=True),
            step("bad", python("print('why'); raise SystemExit(3)"), together=True),
            step("crashes", python("import os; os.abort()"), together=True),
            step("hangs", python("print('here', flush=True); import time; time.sleep(60)"), 2, together=True),
        ],
        "two": [
            step("no tool", None, note="not found"),
            step("last", python("print('========= ERROR SUMMARY: 0 errors')")),
        ],
    }
    begin = time.monotonic()
    assert not gpu_check.check(todo, {"gpu": "a GPU"}, tmp_path, budget=100)
    assert time.monotonic() - begin < 30
    steps = report_of(tmp_path)
    results = {"good": "passed", "bad": "failed", "crashes": "failed", "hangs": "timed out", "no tool": "missing"}
    assert {name: x["result"] for (_, name), x in steps.items()} == results | {"last": "passed"}
    assert steps["one", "good"]["tail"] == ["seen"] and steps["one", "bad"]["tail"] == ["why"]
    assert steps["one", "hangs"]["tail"] == ["here"] and steps["one", "bad"]["exit_status"] == 3
    assert steps["one", "crashes"]["exit_status"] == -signal.SIGABRT
    assert steps["two", "last"]["summary"] == "ERROR SUMMARY: 0 errors"
    assert "======== one, hangs: timed out\nhere" in (tmp_path / "output.log").read_text()
    assert not list((tmp_path / "running").iterdir())
    assert "timed out" in capsys.readouterr().out


def test_the_budget_ends_and_another_call_goes_on(gpu_check, tmp_path):
    count, waits = tmp_path / "count", f"import os, time; time.sleep(0 if os.path.exists('{tmp_path}/go') else 60)"
    todo = {
        "a": [gpu_check.Step("quick", python(f"open({str(count)!r}, 'a').write('x')"))],
        "b": [gpu_check.Step("long", python(waits))],
        "c": [gpu_check.Step("late", python("pass"))],
    }  # fmt: skip
    begin = time.monotonic()
    assert not gpu_check.check(todo, {}, tmp_path / "first", budget=8)
    assert time.monotonic() - begin < 12
    first = report_of(tmp_path / "first")
    assert [x["result"] for x in first.values()] == ["passed", "timed out", "not run"]
    assert first["c", "late"]["note"] == "no time was left"
    (tmp_path / "go").touch()
    assert gpu_check.check(todo, {}, tmp_path / "second", budget=60, before=first.values())
    assert [x["result"] for x in report_of(tmp_path / "second").values()] == ["passed"] * 3
    assert count.read_text() == "x"


def test_nothing_runs_after_a_failed_build(gpu_check, tmp_path):
    ran = tmp_path / "ran"
    todo = {
        "build": [gpu_check.Step("library", python("raise SystemExit(1)"), first=True)],
        "tests": [gpu_check.Step("tests", python(f"open({str(ran)!r}, 'w')"))],
    }
    assert not gpu_check.check(todo, {}, tmp_path, budget=60)
    steps = report_of(tmp_path)
    assert not ran.exists() and [x["result"] for x in steps.values()] == ["failed", "not run"]
    assert steps["tests", "tests"]["note"] == "library failed"


def test_what_is_known_outlives_a_kill(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r})\n"
        "import gpu_check as g\nfrom pathlib import Path\n"
        "step = lambda name, code: g.Step(name, [sys.executable, '-c', code])\n"
        "long = step('long', 'print(2, flush=True); import time; time.sleep(60)')\n"
        "todo = {'a': [step('done', 'print(1)')], 'b': [long]}\n"
        f"g.check(todo, {{}}, Path({str(tmp_path)!r}), budget=100)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, start_new_session=True)
    running, end = tmp_path / "running" / "b-long.log", time.monotonic() + 30
    while time.monotonic() < end and not (running.is_file() and running.read_text()):
        time.sleep(0.05)
    process.kill()
    process.wait()
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["passed"] is None and [x["result"] for x in written["steps"]] == ["passed"]
    assert running.read_text() == "2\n" and "a, done: passed\n1" in (tmp_path / "output.log").read_text()


@pytest.mark.parametrize("body, result", [("pass", "passed"), ("pytest.skip()", "failed")], ids=["runs", "skips all"])
def test_pytest_must_have_passed_something(gpu_check, tmp_path, body, result):
    (tmp_path / "test_it.py").write_text(f"import pytest\ndef test_it(): {body}\n")
    step = gpu_check.pytest("it", tmp_path / "test_it.py", marker="not gpu")
    assert gpu_check.check({"tests": [step]}, {}, tmp_path / "out", budget=100) == (result == "passed")
    record = report_of(tmp_path / "out")["tests", "it"]
    assert record["result"] == result
    assert record["counts"] == {"passed": int(result == "passed"), "failed": 0, "skipped": int(result != "passed")}


def test_the_inputs_of_a_test_that_failed_are_kept(gpu_check, tmp_path):
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_it.py").write_text(
        "import torch\n"
        "def test_it():\n"
        "    inputs, big = [torch.arange(3), None], torch.empty(1 << 20)\n"
        "    assert not inputs[0].any()\n"
    )
    gpu_check.check(
        {"t": [gpu_check.pytest("it", tmp_path / "test_it.py", marker="not gpu")]}, {}, tmp_path, budget=100
    )
    with zipfile.ZipFile(tmp_path / "inputs.zip") as archive:
        (name,) = archive.namelist()
        archive.extract(name, tmp_path)
    kept = torch.load(tmp_path / name)
    assert list(kept) == ["test_it.inputs.0"] and kept["test_it.inputs.0"].tolist() == [0, 1, 2]


def test_the_sanitizer_wraps_pytest_or_is_missing(gpu_check, monkeypatch):
    monkeypatch.setattr(gpu_check, "tool", lambda name: f"/bin/{name}")
    step = gpu_check.sanitizer("memcheck", "large", "tests/x.py", limit=100)
    assert step.command[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"] and "pytest" in step.command
    assert "kns=fwpkm" in step.command and step.environment == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert "kns=fwpkm" not in gpu_check.sanitizer("initcheck", "large", limit=100).command
    monkeypatch.setattr(gpu_check, "tool", lambda name: None)
    assert gpu_check.sanitizer("memcheck", "large", limit=100).command is None
    assert [gpu_check.architecture(x) for x in ([8, 0], [8, 6], [9, 0], [10, 0], [12, 0])] == [
        "80-real", "86-real", "90a-real", "100a-real", "120-real",
    ]  # fmt: skip


def test_without_a_gpu_it_says_so_and_exits_2(gpu_check, tmp_path):
    assert "lists none" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": None})
    assert "for the CPU only" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": None, "driver_version": "580"})
    assert "for CUDA 13.0" in gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": "13.0", "driver_version": "580"})
    assert not gpu_check.why_no_gpu({"torch": "2.13.0", "cuda": "13.0", "gpu": "a GPU"})
    if gpu_check.machine().get("gpu"):
        return
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "nothing was checked" in done.stderr and not (tmp_path / "report.json").exists()


def test_neither_an_environment_nor_a_network_is_needed():
    """`make gpu-check` runs the script with the Python that is there."""
    command = ["make", "-n", "--no-print-directory", "gpu-check", "PYTHON=a-python"]
    environment = {name: x for name, x in os.environ.items() if not name.startswith("MAKE")}  # of the make around us
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines() == ["a-python scripts/gpu_check.py "]


# ------------------------------------------------------------------------------------------------------- a rehearsal
@pytest.mark.full
def test_a_rehearsal(tmp_path):
    """All of it, end to end, with the CUDA operators on the CPU in place of the GPU, without a network, and with tools
    that stand in for NVIDIA's; and once more, with one that finds something."""
    from test_simt import missing
    from test_simt_ops import built

    if missing():
        pytest.skip(missing())
    tools = tmp_path / "bin"
    tools.mkdir()
    shift = 'while [ "${1#-}" != "$1" ]; do shift 2; done'  # all options have a value
    (tools / "compute-sanitizer").write_text(
        f"#!/bin/sh\ntool=$2\n{shift}\n\"$@\"\nstatus=$?\necho '========= ERROR SUMMARY: 0 errors'\n"
        '[ "$FOUND" = "$tool" ] && exit 86\nexit $status\n'
    )
    (tools / "ncu").write_text('#!/bin/sh\ncase "$*" in *--import*) echo "a,table";; esac\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "PIP_NO_INDEX": "1"}
    command = [sys.executable, SCRIPTS / "gpu_check.py", "--rehearse", built("simt_ops"), "--jobs", "2"]
    command += ["--budget", "1500", "--kit", tmp_path / "no-kit"]
    done = subprocess.run([*command, "--out", tmp_path / "a"], env=environment, capture_output=True, text=True)
    steps = report_of(tmp_path / "a")
    assert done.returncode == 0, (done.stdout[-3000:], {k: x["result"] for k, x in steps.items()})
    assert {"output.log", "report.json", "bench.json", "accuracy.json", "counters.zip"} <= {
        x.name for x in (tmp_path / "a").iterdir()
    }
    command += ["--add-to", tmp_path / "a" / "report.json", "--out", tmp_path / "b"]
    report = json.loads((tmp_path / "a" / "report.json").read_text())
    report["steps"] = [x for x in report["steps"] if x["part"] != "racecheck"]
    (tmp_path / "a" / "report.json").write_text(json.dumps(report))
    done = subprocess.run(command, env=environment | {"FOUND": "racecheck"}, capture_output=True, text=True)
    again = report_of(tmp_path / "b")
    assert done.returncode == 1 and again.keys() == steps.keys()
    assert {k[0] for k, x in again.items() if x["result"] == "failed"} == {"racecheck"}
