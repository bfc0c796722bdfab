#!/usr/bin/env python3
"""Builds for this machine's GPU and checks everything that needs one: tests, compute-sanitizer, quick benchmarks.

    scripts/gpu_check.py [--parts tests,sanitizer,bench] [--installed] [--limit 900] [--cases EXPR] [--report FILE]

Every part is a process with a time limit of its own, and the report is written after each of them: one that fails,
crashes or hangs does not lose the others. Exit status: 0 all passed, 1 something did not, 2 no GPU to check with.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("tests", "sanitizer", "bench")
CASES = "the_reference or half_precision"  # pytest -k for the sanitizer: small, and all kernels run
TAIL = 60  # lines of output kept
SMI = ("driver_version", "memory.total", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")
PROBE = """
import json, platform, torch
facts = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()}
if torch.cuda.is_available():
    gpu = torch.cuda.get_device_properties(0)
    facts |= {"gpu": gpu.name, "capability": [gpu.major, gpu.minor], "uuid": str(gpu.uuid)}
print(json.dumps(facts))
"""


class Step(NamedTuple):
    name: str
    command: list | None  # None: it cannot run here, for the reason in `note`
    note: str = ""
    environment: dict | None = None  # added to ours
    junit: Path | None = None  # where pytest writes its counts
    keep: bool = False  # the output, also if it passes
    first: bool = False  # True: without it the others mean nothing


# ----------------------------------------------------------------------------------------------------- the machine
def answer(command):
    """What a command prints, "" if it cannot."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine():
    """GPU (absent without one), driver, clocks, versions, commit, date."""
    facts = json.loads(answer([sys.executable, "-c", PROBE]) or "{}")
    uuid = ["-i", "GPU-" + facts["uuid"]] if "uuid" in facts else []
    ask = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    lines = answer([*ask, *uuid]).splitlines() or answer(ask).splitlines()  # MIG slices are not found by their UUID
    if lines:
        facts |= dict(zip(SMI, (x.strip() for x in lines[0].split(",")), strict=False))
    facts["commit"] = answer(["git", "describe", "--always", "--dirty"])
    facts["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return facts


def why_no_gpu(facts):
    if "gpu" in facts:
        return ""
    if "torch" not in facts:
        return f"{sys.executable} cannot import torch"
    if "driver_version" not in facts:
        return "no NVIDIA GPU found on this machine (nvidia-smi lists none)"
    built = f"for CUDA {facts['cuda']}" if facts["cuda"] else "for the CPU only"
    return f"there is an NVIDIA GPU, but torch {facts['torch']}, built {built}, cannot use it"


def architecture(capability):
    """The value of FWPKM_CUDA_ARCHS for one GPU: Hopper and data-centre Blackwell have features of their own."""
    number = 10 * capability[0] + capability[1]
    return f"{number}a-real" if number in (90, 100, 103) else f"{number}-real"


def find_sanitizer():
    folders = [os.environ[x] for x in ("CUDA_HOME", "CUDA_PATH") if x in os.environ] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", "")] + [
        f"{folder}/{sub}" for folder in folders for sub in ("bin", "compute-sanitizer")
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


# ------------------------------------------------------------------------------------------------------- the parts
def steps(parts, facts, folder, *, installed, limit, cases, benchmarks):
    python = [sys.executable, "-m"]
    # A test that hangs shows where, before it is killed.
    pytest = [*python, "pytest", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    pytest += ["-o", f"faulthandler_timeout={max(1, limit - 10)}"]
    if not installed:
        options = {"FWPKM_CUDA_ARCHS": architecture(facts["capability"]), "FWPKM_WITH_CUDA": "ON"}
        install = [*python, "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", "."]
        yield Step("build", install, f"for {options['FWPKM_CUDA_ARCHS']}", options, first=True)
    if "tests" in parts:
        junit = folder / "tests.xml"
        yield Step("tests", [*pytest, "--junitxml", junit], junit=junit)
    if "sanitizer" in parts:
        program = find_sanitizer()
        for tool in ("memcheck", "racecheck", "initcheck"):
            if program is None:
                yield Step(tool, None, "compute-sanitizer not found: it comes with the CUDA toolkit")
                continue
            junit = folder / f"{tool}.xml"
            command = [program, "--tool", tool, "--error-exitcode", "86"]
            # Our kernels alone; but what is initialised can only be known of all of them.
            command += [] if tool == "initcheck" else ["--kernel-name", "kns=fwpkm"]
            # PyTorch asks the runtime things that may fail; and its allocator would hide where a tensor ends.
            command += ["--report-api-errors", "no", *pytest, "-k", cases, "--junitxml", junit]
            yield Step(tool, command, f"-k {cases}", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, junit)
    if "bench" in parts:
        yield Step("accuracy", [*python, "bench", "accuracy", "--device", "cuda"], keep=True)
        command = [*python, "bench", "ops", "--device", "cuda", "--quick", "--json", benchmarks]
        yield Step("benchmarks", command, keep=True)


def counts(junit):
    """{"passed", "failed", "skipped"} of pytest's report, {} if it wrote none."""
    try:
        suites = ElementTree.parse(junit).getroot().iter("testsuite")
    except (OSError, ElementTree.ParseError):
        return {}
    of = lambda suite, *names: sum(int(suite.get(name, 0)) for name in names)
    sums = [(of(x, "tests"), of(x, "failures", "errors"), of(x, "skipped")) for x in suites]
    tests, failed, skipped = map(sum, zip(*sums, strict=True))
    return {"passed": tests - failed - skipped, "failed": failed, "skipped": skipped}


def run(step, limit):
    """The record of one step."""
    record = {"part": step.name, "result": "missing", "seconds": 0.0, "note": step.note}
    if step.command is None:
        return record
    record["command"] = " ".join(map(str, step.command))
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        # A session of its own, so that what it started ends with it.
        process = subprocess.Popen(
            step.command, cwd=ROOT, env=os.environ | (step.environment or {}), stdin=subprocess.DEVNULL, stdout=output,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            record["result"] = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            record["result"] = "timed out"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        record |= {"seconds": round(time.monotonic() - begin, 1), "exit_status": process.returncode}
        output.seek(0)
        text = output.read()
    if step.junit:
        record["counts"] = counts(step.junit)
        if record["result"] == "passed" and not record["counts"].get("passed"):  # all skipped
            record["result"] = "failed"
    if summary := re.findall(r"^=+ (\w* ?SUMMARY: .*)", text, re.MULTILINE):  # compute-sanitizer's
        record["summary"] = summary[-1]
    if step.keep or record["result"] != "passed":
        record["tail"] = text.splitlines()[-TAIL:]
    return record


def check(todo, facts, limit, report):
    """Runs the steps, writes the report after each. -> whether all passed"""

    def write(passed=None):  # None: not at the end yet
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps({"machine": facts, "passed": passed, "parts": records}, indent=1) + "\n")

    records, broken = [], False
    for step in todo:
        if broken:
            record = {"part": step.name, "result": "not run", "seconds": 0.0, "note": "the build failed"}
        else:
            print(f"{step.name} {step.note}".rstrip() + " ...", flush=True)
            record = run(step, limit)
        record["ok"] = record["result"] == "passed"
        broken |= step.first and not record["ok"]
        records.append(record)
        write()
        if not record["ok"]:
            print("\n".join(record.get("tail", ())), flush=True)
    passed = all(x["ok"] for x in records)
    write(passed)
    print(table(records))
    return passed


def table(records):
    lines = [f"{'part':12}{'result':12}{'seconds':>9}"]
    for x in records:
        number = ", ".join(f"{n} {what}" for what, n in x.get("counts", {}).items() if n)
        notes = "; ".join(filter(None, (number, x.get("summary", ""), x["note"])))
        lines.append(f"{x['part']:12}{x['result']:12}{x['seconds']:9.1f}  {notes}".rstrip())
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="of " + ",".join(PARTS))
    parser.add_argument("--installed", action="store_true", help="the package is installed: do not build")
    parser.add_argument("--limit", type=int, default=900, help="seconds for each part")
    parser.add_argument("--cases", default=CASES, help="pytest -k for the sanitizer, which is slow")
    parser.add_argument("--report", type=Path, default=ROOT / "bench" / "results" / "gpu-check.json")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: expected some of {','.join(PARTS)}, got {','.join(sorted(unknown))}")
    facts = machine()
    if reason := why_no_gpu(facts):
        print(f"gpu-check: {reason}; nothing was checked", file=sys.stderr)
        sys.exit(2)
    print(f"{facts['gpu']}, driver {facts.get('driver_version')}, torch {facts['torch']}, commit {facts['commit']}")
    with tempfile.TemporaryDirectory() as folder:
        todo = steps(
            parts, facts, Path(folder), installed=options.installed, limit=options.limit, cases=options.cases,
            benchmarks=options.report.with_name(options.report.stem + "-bench.json"),
        )  # fmt: skip
        sys.exit(not check(todo, facts, options.limit, options.report))


if __name__ == "__main__":
    main()
