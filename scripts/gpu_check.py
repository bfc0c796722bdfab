#!/usr/bin/env python3
"""Checks and measures on a GPU what can be checked and measured nowhere else. docs/gpu-day.md is the plan.

    scripts/gpu_check.py [PART ...] [--out FOLDER] [--budget 540] [--add-to REPORT] [--kit FOLDER] [--build] [--jobs 6]
    scripts/gpu_check.py --list

Without names all parts, in the order of --list: first what says whether the numbers are right, then what they cost.
Each step of a part is a process of its own with a time limit, and none outlasts the budget (seconds, for all). What is
known so far is in FOLDER at any moment: report.json (results, versions, clocks), output.log (what finished steps
printed), running/ (what the others print), inputs.zip (tensors of failed tests), the benchmarks' JSON files. A step
that fails, crashes the GPU's context or hangs loses nothing of the others. --add-to: the report of an earlier call;
what passed there is not repeated, so that the same command goes on where the budget ended.

FOLDER is by default $OUT, else build/gpu-check. Nothing is installed and no network is needed: the package is read from
python/, its library from the kit (`make gpu-kit`; wheels and the released code there are used as peers), else from
where it is installed; --build builds it for this machine's GPU. --rehearse LIBRARY: everything without a GPU, with the
CUDA operators that tests/simt builds for the CPU.
Exit status: 0 all passed, 1 something did not, 2 no GPU to check with.
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
import zipfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "build" / "gpu-kit"
LIBRARY = "libfwpkm_cuda_ops.so"
TAIL = 40  # lines of output kept in the report
MOST_INPUTS = 12 << 20  # bytes of failed tests' tensors
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
    limit: int = 540  # seconds
    note: str = ""
    environment: dict | None = None  # added to ours
    junit: bool = False  # pytest: its counts are read
    keep: bool = False  # the end of the output goes into the report, also if the step passes
    together: bool = False  # may run beside its neighbours of the same kind
    first: bool = False  # without it the others mean nothing


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
    facts["commit"] = commit()
    facts["date"] = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return facts


def commit():
    """What `make gpu-kit` wrote down, for a tree may travel without its history; else what git says."""
    written = KIT / "commit"
    return written.read_text().strip() if written.is_file() else answer(["git", "describe", "--always", "--dirty"])


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


def tool(name):
    """A program of the CUDA toolkit, None where it is missing."""
    folders = [os.environ[x] for x in ("CUDA_HOME", "CUDA_PATH") if x in os.environ] + ["/usr/local/cuda"]
    places = [os.environ.get("PATH", "")] + [f"{x}/{sub}" for x in folders for sub in ("bin", "compute-sanitizer")]
    return shutil.which(name, path=os.pathsep.join(places))


# ------------------------------------------------------------------------------------------------------- the parts
COMPILES = "compile or inductor"  # tests that wait for torch.compile
# The sanitizers' tests: a scan of the size at which all of its kernels are at work, and small shapes of all options.
LARGE = "tests/test_large_shapes.py"
SMALL = ["tests/test_gpu.py", "-k", "cpu_and_gpu_agree and float32 or beside_the_tensors or overflow"]


def pytest(name, *words, limit=300, marker="gpu", **more):
    # A test that hangs shows where, before it is killed.
    command = [sys.executable, "-m", "pytest", "-m", marker, "-q", "-ra", "-p", "no:cacheprovider"]
    return Step(name, [*command, "-o", f"faulthandler_timeout={limit - 10}", *words], limit, junit=True, **more)


def sanitizer(tool_name, name, *words, limit, **more):
    program = tool("compute-sanitizer")
    if program is None:
        return Step(name, None, note="compute-sanitizer not found: it comes with the CUDA toolkit")
    command = [program, "--tool", tool_name, "--error-exitcode", "86", "--report-api-errors", "no"]
    # Our kernels alone; but what is initialised can only be known of all of them.
    command += [] if tool_name == "initcheck" else ["--kernel-name", "kns=fwpkm"]
    step = pytest(name, *words, limit=limit, **more)
    # PyTorch's allocator would hide where a tensor ends.
    return step._replace(command=command + step.command, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def python(name, *words, limit=100, **more):
    return Step(name, [sys.executable, *words], limit, **more)


def parts(out, kit, rehearsal=False):
    """{part: its steps}. A rehearsal takes few of the tests, for every CUDA thread is a fiber there, and benchmarks of
    the CPU."""
    files = sorted(path.name for path in (ROOT / "tests").glob("test_*.py"))
    of_a_gpu = [x for x in files if re.search(r'"device"|mark\.gpu', (ROOT / "tests" / x).read_text())]
    of_a_gpu = [x for x in of_a_gpu if f"tests/{x}" != LARGE and not (rehearsal and x == "test_bench.py")]
    compiling = [x for x in of_a_gpu if "torch.compile" in (ROOT / "tests" / x).read_text()]
    few = " and (the_reference or matches or opcheck_value or output_and_loss or dot)" if rehearsal else ""
    marker = dict(marker="not cpu") if rehearsal else {}
    release = ["--release-dir", kit / "release"] if (kit / "release").is_dir() else []
    where = ["--device", "cpu", "--quick"] if rehearsal else ["--device", "cuda"]
    ops = ["bench", "ops", *where, *release, "--json", out / "bench.json"]
    predictions = ROOT / "bench" / "results" / "predictions-h200.json"
    profile = ["bench", "profile", "--json", out / "profile.json"]
    report = ["-m", "fwpkm_cuda"]
    if rehearsal:
        report = ["-c", "import fwpkm_cuda; print(fwpkm_cuda.__version__)"]  # that library has no report of a build
        ops += ["--cases", "score_topk"]
        profile = ["bench", "profile", "--report", ROOT / "bench" / "results" / "h200-profile.json"]
    one = "h1k8-idw"  # of the large shapes
    two = one if rehearsal else f"{one} or h2k32"
    counters = [ROOT / "scripts" / "gpu_counters.py", out / "counters.zip"]
    variants = {x.stem: {"FWPKM_LIBRARY": str(x)} for x in sorted(kit.glob("variant-*.so"))}
    return {
        "smoke": [
            python("report", *report, limit=60, keep=True, first=True),
            python("ceilings", "-m", "bench", "ops", *where, "--cases", "ceilings", limit=60, keep=True),
            pytest("operators", "tests/test_value_gather.py", "tests/test_product_key_topk.py",
                   "tests/test_chunk_scan.py", "-k", "the_reference", limit=100, **marker),
        ],
        "shapes": [pytest("large shapes", LARGE, limit=100, **marker)],
        "memcheck": [
            sanitizer("memcheck", "large", LARGE, "-k", two, limit=120, **marker),
            sanitizer("memcheck", "small", *SMALL, limit=120, **marker),
        ],
        "tests": [
            pytest(x, f"tests/{x}", "-k", f"not ({COMPILES}){few}", limit=240, together=True, **marker)
            for x in of_a_gpu
        ],
        "compile": [
            pytest(f"{x}, compiled", f"tests/{x}", "-k", COMPILES, limit=240, together=True, **marker)
            for x in compiling
        ],
        "racecheck": [
            sanitizer("racecheck", "large", LARGE, "-k", one, limit=150, **marker),
            sanitizer("racecheck", "small", *SMALL, limit=120, **marker),
        ],
        "initcheck": [sanitizer("initcheck", "large", LARGE, "-k", one, limit=150, **marker)],
        "bench": [
            python("ops", "-m", *ops, limit=400, keep=True),
            python("predictions", "-m", "bench", "compare", predictions, out / "bench.json", keep=True),
        ],
        "profile": [python("kernels", "-m", *profile, limit=120, keep=True)],
        "variants": [
            step
            for name, library in variants.items()
            for step in (
                pytest(f"{name}, large shapes", LARGE, limit=100, environment=library),
                python(f"{name}, kernels", "-m", "bench", "profile", "--json", out / f"profile-{name}.json", limit=120,
                       keep=True, environment=library),
            )
        ],
        "counters": [
            python(f"{case}, {kernels}", *counters, case, "--kernels", kernels, "--count", count, limit=120)
            for case, kernels, count in (
                ("training", "filter|read_tokens|sum_pieces|sum_columns|move_entries", "6"),
                ("training", "token_gradients", "1"),
                ("inference", ".*", "16"),
            )
        ],
        "accuracy": [
            python("accuracy", "-m", "bench", "accuracy", *where, "--json", out / "accuracy.json", limit=200, keep=True)
        ],
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------------ their running
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


class Running:
    """A step that has been started."""

    def __init__(self, part, step, out, limit, environment):
        self.step, self.out, self.begin = step, out, time.monotonic()
        self.end = self.begin + limit
        self.record = {"part": part, "step": step.name, "command": " ".join(map(str, step.command))}
        name = re.sub(r"\W+", "-", f"{part} {step.name}")
        self.output, self.junit = out / "running" / f"{name}.log", out / "running" / f"{name}.xml"
        self.inputs = out / "running" / f"{name}-inputs"
        self.output.parent.mkdir(parents=True, exist_ok=True)
        words = ["--junitxml", self.junit] if step.junit else []
        environment = os.environ | environment | {"FWPKM_KEEP_INPUTS": str(self.inputs)} | (step.environment or {})
        with open(self.output, "w") as file:
            # A session of its own, so that what it started ends with it.
            self.process = subprocess.Popen(
                [*step.command, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def finished(self):
        """Whether it has ended, or has just been ended because its time was up."""
        if self.process.poll() is not None:
            self.record["result"] = "passed" if self.process.returncode == 0 else "failed"
        elif time.monotonic() >= self.end:
            self.kill()
            self.record["result"] = "timed out"
        else:
            return False
        return True

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()

    def close(self):
        """Its record; its output and its tensors are put to those of the others."""
        self.kill()  # what it left running
        record = self.record
        record |= {"seconds": round(time.monotonic() - self.begin, 1), "exit_status": self.process.returncode}
        text = self.output.read_text(errors="replace")
        if self.step.junit:
            record["counts"] = counts(self.junit)
            if record["result"] == "passed" and not record["counts"].get("passed"):  # all skipped
                record["result"] = "failed"
        if summary := re.findall(r"^=+ (\w* ?SUMMARY: .*)", text, re.MULTILINE):  # compute-sanitizer's
            record["summary"] = summary[-1]
        if self.step.keep or record["result"] != "passed":
            record["tail"] = text.splitlines()[-TAIL:]
        with open(self.out / "output.log", "a") as log:
            log.write(f"\n======== {record['part']}, {self.step.name}: {record['result']}\n{text}")
        self.pack_inputs()
        self.output.unlink()
        self.junit.unlink(missing_ok=True)
        return record

    def pack_inputs(self):
        path = self.out / "inputs.zip"
        for file in sorted(self.inputs.glob("*")) if self.inputs.is_dir() else ():
            if (path.stat().st_size if path.is_file() else 0) + file.stat().st_size < MOST_INPUTS:
                with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
                    archive.write(file, f"{self.record['part']}/{file.name}")
        shutil.rmtree(self.inputs, ignore_errors=True)


def check(todo, facts, out, *, budget, jobs=6, environment=None, before=()):
    """Runs {part: steps}, writes the report after each step. `before`: records of an earlier report. -> all passed"""
    end = time.monotonic() + budget
    done = {(x["part"], x["step"]): x for x in before if x["result"] == "passed"}
    records, running, broken = [], [], ""

    def write(passed=None):  # None: not at the end yet
        out.mkdir(parents=True, exist_ok=True)
        report = {"machine": facts, "passed": passed, "steps": records}
        (out / "report.json.new").write_text(json.dumps(report, indent=1) + "\n")
        (out / "report.json.new").replace(out / "report.json")

    def settle(most):
        """Waits until at most so many steps are running."""
        nonlocal broken
        while len(running) > most:
            for x in [x for x in running if x.finished()]:
                running.remove(x)
                records.append(x.close())
                show(records[-1])
                if x.step.first and records[-1]["result"] != "passed":
                    broken = f"{x.step.name} {records[-1]['result']}"
                write()
            time.sleep(0.05)

    def show(record):
        print(line(record), flush=True)
        if record["result"] != "passed":
            print("\n".join("    " + x for x in record.get("tail", ())[-12:]), flush=True)

    write()
    try:
        for part, steps in todo.items():
            for step in steps:
                settle(jobs - 1 if step.together and all(x.step.together for x in running) else 0)
                left = end - time.monotonic()
                reason = broken or ("no time was left" if left < 5 else "")
                if (part, step.name) in done:
                    records.append(done[part, step.name])
                elif step.command is None or reason:
                    result = "not run" if reason else "missing"
                    records.append({"part": part, "step": step.name, "result": result, "note": reason or step.note})
                    show(records[-1])
                else:
                    running.append(Running(part, step, out, min(step.limit, left), environment or {}))
            settle(0)
    finally:
        for x in running:
            x.kill()
    passed = all(x["result"] == "passed" for x in records)
    write(passed)
    return passed


def line(x):
    number = ", ".join(f"{n} {what}" for what, n in x.get("counts", {}).items() if n)
    notes = "; ".join(filter(None, (number, x.get("summary", ""), x.get("note", ""))))
    return f"{x['part']:12}{x['step']:36}{x['result']:12}{x.get('seconds', 0):7.1f}  {notes}".rstrip()


# ---------------------------------------------------------------------------------------------------------- the whole
def environment(facts, kit, library, wheels):
    """What lets every step find the package, its library and the peers, and name the commit."""
    paths = [str(ROOT / "python"), wheels, os.environ.get("PYTHONPATH")]
    found = {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"}
    found["FWPKM_COMMIT"] = facts["commit"]
    return found | ({"FWPKM_LIBRARY": str(library)} if library else {})


def unpacked_wheels(kit, folder):
    """The kit's wheels in a folder of their own; None without any."""
    wheels = sorted(str(x) for x in (kit / "wheels").glob("*.whl"))
    install = ["-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", folder, *wheels]
    return str(folder) if wheels and subprocess.run([sys.executable, *install]).returncode == 0 else None


def build(facts, library):
    """The library for this GPU, with what this machine has: no installation, no network."""
    folder = ROOT / "build" / "gpu"
    settings = ["-DFWPKM_WITH_CUDA=ON", f"-DFWPKM_CUDA_ARCHS={architecture(facts['capability'])}"]
    settings += ["-DFWPKM_WITH_PYBIND=OFF", f"-DPython_EXECUTABLE={sys.executable}"]
    commands = (
        ["cmake", "-S", ROOT, "-B", folder, "-GNinja", *settings], ["cmake", "--build", folder],
        ["cmake", "-E", "make_directory", library.parent], ["cmake", "-E", "copy", folder / LIBRARY, library],
    )  # fmt: skip
    script = " && ".join(" ".join(f"'{x}'" for x in command) for command in commands)
    return Step("library", ["bash", "-c", script], 400, note=settings[1], first=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART")
    parser.add_argument("--list", action="store_true", help="the parts and their steps, and nothing else")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build" / "gpu-check"))
    parser.add_argument("--budget", type=float, default=540, help="seconds for everything")
    parser.add_argument("--add-to", type=Path, help="a report: what passed there is not repeated")
    parser.add_argument("--kit", type=Path, default=KIT, help="the folder that `make gpu-kit` has filled")
    parser.add_argument("--build", action="store_true", help="build the library for this GPU first")
    parser.add_argument("--jobs", type=int, default=6, help="test files at the same time")
    parser.add_argument("--rehearse", type=Path, metavar="LIBRARY", help="without a GPU")
    options = parser.parse_args()
    begin, out, kit = time.monotonic(), options.out.resolve(), options.kit.resolve()
    todo = parts(out, kit, rehearsal=bool(options.rehearse))
    if unknown := set(options.parts) - set(todo):
        parser.error(f"expected some of {', '.join(todo)}, got {', '.join(sorted(unknown))}")
    todo = {name: steps for name, steps in todo.items() if not options.parts or name in options.parts}
    if options.list:
        for name, steps in todo.items():
            print(f"{name}: " + ", ".join(f"{x.name} ({x.limit} s)" for x in steps))
        return
    facts = machine()
    if options.rehearse:
        facts["rehearsal"] = "the CUDA operators on the CPU"
    elif reason := why_no_gpu(facts):
        print(f"gpu-check: {reason}; nothing was checked", file=sys.stderr)
        sys.exit(2)
    where = facts.get("rehearsal") or f"{facts['gpu']}, driver {facts.get('driver_version')}"
    print(f"{where}, torch {facts['torch']}, commit {facts['commit']}", flush=True)
    library = options.rehearse or (kit / LIBRARY if options.build or (kit / LIBRARY).is_file() else None)
    if options.build:
        todo = {"build": [build(facts, library)]} | todo
    before = json.loads(options.add_to.read_text())["steps"] if options.add_to else ()
    with tempfile.TemporaryDirectory() as folder:
        found = environment(facts, kit, library and library.resolve(), unpacked_wheels(kit, folder))
        found |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if options.rehearse else {}
        budget = options.budget - (time.monotonic() - begin)
        passed = check(todo, facts, out, budget=budget, jobs=options.jobs, environment=found, before=before)
    sys.exit(not passed)


if __name__ == "__main__":
    main()
