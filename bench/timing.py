"""How the benchmarks measure: repeated runs, memory of the process, and what machine it was."""

import datetime
import os
import platform
import resource
import subprocess
import sys
import time


def milliseconds(function, repeats=9, warm_up=1):
    """{"min", "median", "max", "repeats"} of the wall time of function(), in ms."""
    return milliseconds_in_turn({"": function}, repeats, warm_up)[""]


def milliseconds_in_turn(functions, repeats=9, warm_up=1):
    """{name: `milliseconds`} of functions called in turn: a machine that changes its pace changes it for all."""
    times = {name: [] for name in functions}
    for i in range(warm_up + repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warm_up:
                times[name].append(1e3 * (time.perf_counter() - start))
    summary = lambda t: {"min": t[0], "median": t[len(t) // 2], "max": t[-1], "repeats": repeats}
    return {name: summary(sorted(t)) for name, t in times.items()}


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_resident_bytes():
    """Of the process since it began: measure one thing per process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def machine(threads):
    """What a figure is worth nothing without."""
    import torch

    import fwpkm_cuda

    git = ["git", "describe", "--always", "--dirty"]
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "fwpkm_cuda": fwpkm_cuda.__version__,
        "commit": subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
    }
