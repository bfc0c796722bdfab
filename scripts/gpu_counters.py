#!/usr/bin/env python3
"""Nsight Compute on one call of a case of `python -m bench profile`: counters of kernels, samples by instruction.

    scripts/gpu_counters.py ARCHIVE.zip CASE [--kernels "filter|gather"] [--count 40]

Adds two tables to the archive: details (speed of light, occupancy, stalls, instructions) and source (machine code with
samples; 1 MB a launch before it is packed). Clocks stay as they are.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = (
    "SpeedOfLight", "LaunchStats", "Occupancy", "WarpStateStats", "MemoryWorkloadAnalysis", "SourceCounters",
    "SchedulerStats", "InstructionStats",
)  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("case")
    parser.add_argument("--kernels", default=".*", help="a regular expression of their names")
    parser.add_argument("--count", type=int, default=40, help="launches at most")
    options = parser.parse_args()
    ncu = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if ncu is None:
        sys.exit("ncu not found: it comes with the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        command = [ncu, "--profile-from-start", "off", "--clock-control", "none", "--kernel-name"]
        command += [f"regex:^({options.kernels})$", "--launch-count", str(options.count), "-o", report]
        command += [x for section in SECTIONS for x in ("--section", section)]
        command += [sys.executable, "-m", "bench", "profile", "--once", "--cases", options.case]
        subprocess.run(command, cwd=ROOT, check=True)
        name = re.sub(r"\W+", "-", f"{options.case} {options.kernels}").strip("-")
        for page in ("details", "source"):
            done = subprocess.run([ncu, "--import", report, "--csv", "--page", page], capture_output=True, check=True)
            with zipfile.ZipFile(options.archive, "a", zipfile.ZIP_DEFLATED) as archive:
                archive.writestr(f"{name}.{page}.csv", done.stdout)


if __name__ == "__main__":
    main()
