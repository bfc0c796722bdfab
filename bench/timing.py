"""How the benchmarks measure: repeated runs, memory, on which machine. The one place of it, for CPU and GPU."""

import datetime
import os
import platform
import resource
import subprocess
import sys
import time

SMI = ("driver_version", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem")


def summary(times):
    """Of times in ms."""
    t = sorted(times)
    at = lambda share: t[min(len(t) - 1, int(share * len(t)))]
    return {"min": t[0], "q1": at(0.25), "median": at(0.5), "q3": at(0.75), "max": t[-1], "repeats": len(t)}


def milliseconds(function, repeats=9, warm_up=1):
    """`summary` of the wall time of function(), in ms."""
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
    return {name: summary(t) for name, t in times.items()}


# --------------------------------------------------------------------------------------------------- a device's clock
class CpuMeter:
    """Wall time. No memory: the allocator and the operators keep what is freed, so one call shows nothing; bench/cpu.py
    gives every contestant a process of its own for that."""

    cache_bytes = 32 << 20  # inputs that go round should be larger
    counts_memory = False

    def milliseconds(self, function, cold=True, head_start=None):
        """(of one call, None). The rest means something on a GPU only: inputs that go round are all there is on a
        CPU."""
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start), None

    def release(self):
        """Gives back what was freed."""

    def facts(self):
        return {}


class CudaMeter:
    """CUDA events, and PyTorch's allocator, which serves the operators as well."""

    counts_memory = True
    most_head_start = 50.0  # ms

    def __init__(self):
        import torch

        self.cuda = torch.cuda
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cache_bytes = getattr(properties, "L2_cache_size", 64 << 20)
        size = max(256 << 20, 4 * self.cache_bytes)
        self._filler = torch.empty(size, dtype=torch.uint8, device="cuda")
        self._start, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cycles = 1.0  # of a waiting kernel, a millisecond
        for cycles in (1_000_000, 10_000_000):  # the first loads it
            self._cycles = cycles / self._timed(lambda cycles=cycles: torch.cuda._sleep(cycles))[0]

    def _timed(self, function):
        self._start.record()
        begin = time.perf_counter()
        result = function()
        host = 1e3 * (time.perf_counter() - begin)
        self._end.record()
        self._end.synchronize()
        del result
        return self._start.elapsed_time(self._end), host

    def milliseconds(self, function, cold=True, head_start=None):
        """(of one call, of the host for it). The first is from the first kernel's start to the last one's end.

        `cold`: with nothing of use in the L2 cache, and with a head start of so many ms for the host (at most
        most_head_start; None: as long as a call takes that is not counted): a kernel waits before the first one, so
        that the host's gaps between launches do not count. Otherwise right after a call that is not counted, with no
        head start: whoever is slower counts."""
        if not cold:
            function()
            return self._timed(function)
        if head_start is None:
            self.cuda.synchronize()
            head_start = self._timed(function)[1]
        self._filler.zero_()
        self.cuda._sleep(int(self._cycles * min(1.5 * head_start + 0.05, self.most_head_start)))
        return self._timed(function)

    def bytes_in_use(self):
        self.cuda.synchronize()
        return self.cuda.memory_allocated()

    def forget_peak(self):
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()

    def peak_bytes(self):
        self.cuda.synchronize()
        return self.cuda.max_memory_allocated()

    def release(self):
        self.cuda.synchronize()
        self.cuda.empty_cache()

    def facts(self):
        """Name and clocks of the GPU."""
        import torch

        properties = self.cuda.get_device_properties(self.cuda.current_device())
        facts = {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "gpu_l2_bytes": self.cache_bytes,
            "multiprocessors": properties.multi_processor_count,
            "cuda": torch.version.cuda,
        }
        return facts | gpu_state(f"GPU-{properties.uuid}")


def gpu_state(uuid):
    """Driver and clocks as nvidia-smi knows them; {} where it cannot be asked."""
    ask = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader"]
    for command in ([*ask, "-i", uuid], ask):  # parts of a GPU are not found by their UUID
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if lines := done.stdout.splitlines():
            return dict(zip(SMI, (x.strip() for x in lines[0].split(",")), strict=False))
    return {}


def meter_of(device):
    return CudaMeter() if device == "cuda" else CpuMeter()


def in_turn(meter, functions, seconds, least=3, most=100, cold=True, calls=1):
    """{name: `summary`} of functions called in turn, each until it took `seconds` in all: `least` to `most` times, but
    fewer of one that takes several times `seconds` by itself. A time is that of one of `calls` in a row; "host": the
    median of what the host took for it, where that is another time."""

    def in_a_row(function):
        return lambda: [function() for _ in range(calls)]

    times, hosts, left = {name: [] for name in functions}, {name: [] for name in functions}, list(functions)
    while left:
        for name in tuple(left):
            ms, host = meter.milliseconds(in_a_row(functions[name]), cold, max(hosts[name], default=None))
            times[name].append(ms / calls)
            hosts[name] += [] if host is None else [host]
            count, spent = len(times[name]), 1e-3 * sum(times[name]) * calls
            if count >= most or (count >= least and spent >= seconds) or spent >= 5 * least * seconds:
                left.remove(name)
    host_of = lambda name: {"host": summary(hosts[name])["median"] / calls} if hosts[name] else {}
    return {name: summary(t) | host_of(name) for name, t in times.items()}


def memory_of(meter, function):
    """-> result, {"peak_bytes", "retained_bytes"} of one call, above what was there before it; {} if `meter` cannot
    count them.

    Retained is what is still there when the call ends, its result included; of a function that has `after_forward`
    (a hook), what is there when it calls it: what a training step keeps for its backward pass."""
    if not meter.counts_memory:
        return function(), {}
    held = []
    if hasattr(function, "after_forward"):
        function.after_forward = lambda: held.append(meter.bytes_in_use())
    before = meter.bytes_in_use()
    meter.forget_peak()
    result = function()
    held.append(meter.bytes_in_use())
    peak = meter.peak_bytes()
    if hasattr(function, "after_forward"):
        function.after_forward = None
    above = lambda x: max(0, x - before)
    return result, {"peak_bytes": above(peak), "retained_bytes": above(held[0])}


# ------------------------------------------------------------------------------------------------ process and machine
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


def machine(threads, meter=None):
    """What a figure is worth nothing without; with a `CudaMeter` also the GPU."""
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
        # A tree that travelled without its history is told its commit.
        "commit": os.environ.get("FWPKM_COMMIT") or subprocess.run(git, capture_output=True, text=True).stdout.strip(),
        "date": datetime.date.today().isoformat(),
        "command": "python -m bench " + " ".join(sys.argv[1:]),
    } | (meter.facts() if meter else {})
