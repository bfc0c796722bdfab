#!/usr/bin/env python3
"""Runs the tests against one wheel under several versions of PyTorch, away from the source tree.

    scripts/test_matrix.py [arguments of pytest; default: tests -q]

MATRIX lists the environments, "TORCH[:PYTHON]" each, PYTHON defaulting to the one that runs this script:
    MATRIX="2.11.0:python3.12 2.13.0:python3.11 newest" scripts/test_matrix.py
One wheel is built: with the module _C where all environments have this Python's version, else the wheel for all
Pythons, without _C. Every environment is a fresh venv that is deleted afterwards (with CUDA: about 5 GB). The result is
printed and written to docs/test-matrix.md.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "docs" / "test-matrix.md"
DEFAULT = "2.11.0 2.13.0 newest"
COLUMNS = ("torch", "CUDA of torch", "python", "passed", "failed", "skipped", "seconds")
FACTS = "import fwpkm_cuda, torch; print(torch.__version__, torch.version.cuda or 'none', fwpkm_cuda.__file__)"


def ask(python, code, **options):
    return subprocess.check_output([python, "-c", code], text=True, **options).strip()


def python_version(python):
    return ask(python, "import platform; print(platform.python_version())")


def build_wheel(folder, with_module):
    environment = dict(os.environ, FWPKM_WITH_PYBIND="1" if with_module else "0")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.check_call(command, env=environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


def run(torch, python, wheel, pytest_arguments, folder):
    """One row of the table."""
    venv = folder / "venv"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        subprocess.check_call([python, "-m", "venv", venv])
        requirement = "torch" if torch == "newest" else f"torch=={torch}"
        subprocess.check_call([venv / "bin/pip", "install", "-q", requirement, f"{wheel}[test,examples]"])
        for copied in ("tests", "examples"):
            shutil.copytree(ROOT / copied, folder / copied, ignore=shutil.ignore_patterns("__pycache__"))
        version, cuda, location = ask(venv / "bin/python", FACTS, cwd=folder, env=environment).split(maxsplit=2)
        assert Path(location).is_relative_to(venv), f"tests would run against {location}"
        begin = time.monotonic()
        command = [venv / "bin/python", "-m", "pytest", *pytest_arguments, "--junitxml", folder / "result.xml"]
        subprocess.run(command, cwd=folder, env=environment)
        seconds = time.monotonic() - begin
        suite = ElementTree.parse(folder / "result.xml").getroot().find("testsuite")
        tests, skipped = int(suite.get("tests")), int(suite.get("skipped"))
        failed = int(suite.get("failures")) + int(suite.get("errors"))
        return (version, cuda, python_version(python), tests - failed - skipped, failed, skipped, round(seconds))
    except (OSError, subprocess.CalledProcessError, AssertionError) as error:
        print(error, file=sys.stderr)
        return (torch, "", python_version(python), 0, "did not run", 0, 0)
    finally:
        shutil.rmtree(folder)


def table(rows):
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(pytest_arguments):
    entries = [entry.partition(":") for entry in os.environ.get("MATRIX", DEFAULT).split()]
    entries = [(torch, python or sys.executable) for torch, _, python in entries]
    own = python_version(sys.executable).rpartition(".")[0]
    with_module = all(python_version(python).rpartition(".")[0] == own for _, python in entries)
    with tempfile.TemporaryDirectory() as temporary:
        temporary = Path(temporary)
        wheel = build_wheel(temporary / "wheel", with_module)
        rows = []
        for i, entry in enumerate(entries):
            (folder := temporary / str(i)).mkdir()
            rows.append(run(*entry, wheel, pytest_arguments, folder))
            print(table(rows), flush=True)
        heading = (
            "# Test matrix\n\n"
            f"Written by `scripts/test_matrix.py`: one wheel, installed into fresh environments, `pytest "
            f"{' '.join(pytest_arguments)}` outside the source tree.\n\n"
            f"Wheel `{wheel.name}`, {time.strftime('%Y-%m-%d')}, {platform.system()} {platform.machine()}, "
            f"{os.cpu_count()} cores.\n"
        )
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(f"{heading}\n{table(rows)}\n")
    return 0 if all(row[COLUMNS.index("failed")] == 0 for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["tests", "-q"]))
