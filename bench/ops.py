"""python -m bench ops: every public operator against floors and peers of the same run, on the CPU or a GPU.

    python -m bench ops [--device cpu|cuda] [--quick] [--cases gather,decode] [--json FILE] [--plots FOLDER]
                        [--release-dir DIR] [--slow-peers] [--threads 2]

What a case computes, and who else computes it, is in bench/cases. Each contestant is held against
`fwpkm_cuda.reference` before it is timed (at a smaller size where the reference needs too much memory), and its answer
must be right; ours must also have the same bits at the size that is timed when nothing is 16-byte aligned, where other
kernels are at work. Inputs go round and are larger than the cache; on a GPU the cache is overwritten before each call,
and CUDA events give the time, with the host a call ahead (host: what it took). Bytes and FLOPs are those that no
implementation can do without, counted in the case; %copy: of the bandwidth of a plain copy, measured in the same run;
%floor: of the time that the copy bandwidth and the matrix products' rate leave. Peak and retained memory: above what
was there before the call; of a training step retained is what waits for its backward pass. Only on a GPU: `python -m
bench cpu` measures memory on the CPU.

Peers, each where it is installed: PyTorch (eager, torch.compile), bench/dense_baseline.py, fbgemm-gpu,
product-key-memory, fast-weight-product-key-memory; the released code from a folder you name; with --slow-peers
sparse-delta-memory (NOTES.md, "Peers").
"""

import dataclasses
import json
import sys
import time
from pathlib import Path

import torch

import fwpkm_cuda
from bench import goals, plots, timing
from bench.cases import FAMILIES, ceilings
from bench.cases.case import SIZES, Absent, Setup, difference, placed, tensors_of


# ---------------------------------------------------------------------------------------------------------- measuring
def call_on(function, x):
    """function with one set of inputs; `load`: what it does with them before the clock starts."""
    if hasattr(function, "load"):
        function.load(x)
    return function(x)


class Round:
    """A contestant going round the sets of inputs."""

    def __init__(self, function, sets):
        self.function, self.sets, self.turn = function, sets, -1
        if hasattr(function, "after_forward"):
            self.after_forward = None

    def __call__(self):
        if hasattr(self, "after_forward"):
            self.function.after_forward = self.after_forward
        self.turn = (self.turn + 1) % len(self.sets)
        return self.function(self.sets[self.turn])


def inputs_of(setup, case):
    """As many sets as it takes to leave the cache."""
    sets = [case.inputs()]
    size = sum(t.numel() * t.element_size() for t in tensors_of(sets[0]))
    count = min(case.most_sets, max(2, 1 + 2 * setup.meter.cache_bytes // max(size, 1)))
    return sets + [case.inputs() for _ in range(min(count, case.most_sets) - 1)]


def checked(case):
    """Who computes what the reference computes: {contestant: error, or why it is out}"""
    reference = case.checked or case
    if reference.expected is None:
        return {name: {} for name in case.contestants}
    x = reference.inputs()
    expected, verdicts = reference.expected(x), {}
    for name in case.contestants:
        if name in case.unlike:  # its answer is not compared: it need not run at the smaller size
            verdicts[name] = {"unlike": case.unlike[name]}
            continue
        try:
            found = call_on(reference.contestants[name](), x)
        except Absent as reason:
            verdicts[name] = {"absent": str(reason)}
            continue
        except Exception as error:
            verdicts[name] = {"failed": of_error(error)}
            continue
        error = difference(found, expected)
        verdicts[name] = {"error": error}
        if not error < case.tolerance:
            verdicts[name]["failed"] = f"not what the reference computes: relative difference {error:.1e}"
    return verdicts


def differing(case, twin, x):
    """{contestant: why it is out} of ours that have other bits in `twin`, the same case with nothing 16-byte aligned,
    at the size that is timed. Left out where the reference has checked that size."""
    found, off = {}, placed(x, 1)
    for name in case.contestants if case.checked else ():
        if not name.startswith("ours"):
            continue
        try:
            pairs = zip(
                tensors_of(call_on(case.contestants[name](), x)), tensors_of(call_on(twin.contestants[name](), off))
            )
            same = all(torch.equal(a, b) for a, b in pairs)
        except Absent:
            continue
        except Exception as error:
            found[name] = {"failed": of_error(error)}
            continue
        if not same:
            found[name] = {"failed": "other bits where nothing is 16-byte aligned"}
    return found


def of_error(error):
    return (f"{type(error).__name__}: {error}".splitlines() or [""])[0][:200]


def measure(setup, case, twin=None):
    """The record of one case. twin: see `differing`."""
    contestants, rounds = checked(case), {}
    sets = inputs_of(setup, case)
    if twin:
        for name, verdict in differing(case, twin, sets[0]).items():
            contestants[name] = verdict
        setup.meter.release()
    work = case.work(sets[0])
    record = {"bytes": work.bytes, "flops": work.flops, "facts": work.facts, "per": case.per}
    record["floor_ms"] = floor_ms(setup, work)
    for name, verdict in contestants.items():
        if "absent" in verdict or "failed" in verdict:
            continue
        try:
            rounds[name] = Round(case.contestants[name](), sets)
            _, memory = timing.memory_of(setup.meter, rounds[name])
            verdict |= {} if hasattr(rounds[name].function, "is_graph") else memory  # which holds what it needs
            for _ in sets[1:]:  # whatever is made on first use is made now
                rounds[name]()
        except Absent as reason:
            rounds.pop(name, None)
            verdict["absent"] = str(reason)
        except Exception as error:  # too little memory, or a compiler that is missing
            rounds.pop(name, None)
            verdict["failed"] = of_error(error)
        if name not in rounds:  # the exception, which held on to what it had, is gone
            setup.meter.release()
    sizes = setup.sizes
    times = timing.in_turn(setup.meter, rounds, sizes.seconds, least=sizes.least, cold=case.cold, calls=case.calls)
    for name, ms in times.items():
        contestants[name]["ms"] = ms
    try:
        fwpkm_cuda.check(setup.device)
    except RuntimeError as error:
        for name in contestants:
            if name.startswith("ours"):
                contestants[name]["failed"] = of_error(error)
    record["contestants"] = contestants
    return record


def floor_ms(setup, work):
    """What bytes and matrix products take at the rates of this run; None before these are known."""
    limits = [
        (work.bytes, setup.ceilings.get("copy_bytes_per_second")),
        (work.flops * work.products, setup.ceilings.get("gemm_flops_per_second")),
    ]
    times = [1e3 * amount / rate for amount, rate in limits if amount and rate]
    return max(times) if times else None


def attempted(setup, make, make_twin):
    """`measure`, or the record of a case that could not even begin."""
    try:
        return measure(setup, make(), make_twin())
    except Exception as error:
        failed = {"ours": {"failed": of_error(error)}}
        return {"bytes": 0, "flops": 0, "facts": {}, "per": 1, "floor_ms": None, "contestants": failed}


def run(options, sizes=None, say=lambda text, report: None):
    """-> the report. `say` is called with each case before it is measured, and with each family when it is complete."""
    torch.set_num_threads(options.threads)
    sizes = sizes or SIZES[options.device, options.quick]
    setup = Setup(options.device, sizes, timing.meter_of(options.device), options.release_dir, options.slow_peers)
    off = dataclasses.replace(setup, offset=1)
    chosen = options.cases.split(",") if options.cases else list(FAMILIES)
    if unknown := set(chosen) - set(FAMILIES):
        raise SystemExit(f"--cases: expected some of {','.join(FAMILIES)}, got {','.join(sorted(unknown))}")
    report = {
        "device": options.device,
        "quick": options.quick,
        "machine": timing.machine(options.threads, setup.meter),
        "ceilings": setup.ceilings,
        "cases": {},
    }
    begin = time.monotonic()
    with torch.no_grad():
        for family, of in FAMILIES.items():
            if family not in chosen and family != "ceilings":
                continue
            for (name, make), (_, make_twin) in zip(of(setup), of(off), strict=True):
                say(f"{family}, {name}", report)
                record = attempted(setup, make, make_twin) | {"family": family}
                report["cases"][f"{family}, {name}"] = record
                if family == "ceilings":
                    ceilings.store(setup, name, record)
                setup.meter.release()
            report["seconds"] = round(time.monotonic() - begin, 1)
            say(family, report)
    at_the_end = setup.meter.facts().get("clocks.sm")
    report["machine"] |= {"clocks.sm at the end": at_the_end} if at_the_end else {}
    return report


# ---------------------------------------------------------------------------------------------------------- the report
HEADS = (
    "contestant",
    "median",
    "q1..q3",
    "host",
    "per chunk",
    "GB/s",
    "%copy",
    "%floor",
    "x ours",
    "peak MB",
    "kept MB",
)


def duration(ms):
    return f"{ms:.2f} ms" if ms >= 1 else f"{1e3 * ms:.1f} us"


def row(report, record, name):
    """A contestant's figures as text, in the order of HEADS."""
    x, copy = record["contestants"][name], report["ceilings"].get("copy_bytes_per_second")
    for why in ("absent", "failed"):
        if why in x:
            return [name, x[why] if why == "absent" else f"FAILED: {x[why]}"]
    ms = x["ms"]
    rate = record["bytes"] / (1e-3 * ms["median"])
    ours = record["contestants"].get("ours", {}).get("ms")
    whole = "unlike" not in x  # a part of the work has no share of what the work needs
    return [
        name + ("" if whole else " *"),
        duration(ms["median"]),
        f"{duration(ms['q1'])}..{duration(ms['q3'])}",
        duration(ms["host"]) if "host" in ms else "",
        duration(ms["median"] / record["per"]) if record["per"] > 1 else "",
        f"{rate / 1e9:.1f}" if record["bytes"] and whole else "",
        f"{rate / copy:.0%}" if copy and record["bytes"] and whole else "",
        f"{record['floor_ms'] / ms['median']:.0%}" if record["floor_ms"] and whole else "",
        f"{ms['median'] / ours['median']:.2f}" if ours else "",
        *(f"{x[key] / 1e6:.1f}" if key in x else "" for key in ("peak_bytes", "retained_bytes")),
    ]


def of_family(report, family):
    return {name: x for name, x in report["cases"].items() if x["family"] == family}


def title(name, record):
    facts = record["facts"]
    more = [f"{facts[key]:,} {word}" for key, word in (("reads", "reads"), ("distinct", "distinct")) if key in facts]
    return f"{name}" + (f"  ({', '.join(more)})" if more else "")


def notes(report, family):
    """Why an answer was not compared, once each."""
    found = {}
    for record in of_family(report, family).values():
        found |= {name: x["unlike"] for name, x in record["contestants"].items() if "unlike" in x and "ms" in x}
    return [f"* {name}: {why}" for name, why in found.items()]


def plain(report, family):
    """A family's table as lines of text."""
    widths = (34, 11, 23, 11, 11, 8, 7, 8, 8, 10, 10)
    line = lambda cells: "".join(f"{c:<{w}}" if i == 0 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(cells, widths)))
    yield line(("", *HEADS[1:]))
    for name, record in of_family(report, family).items():
        yield title(name, record)
        for contestant in record["contestants"]:
            cells = row(report, record, contestant)
            cells[0] = "  " + cells[0]
            yield (line(cells) if len(cells) > 2 else f"{cells[0]:<36}{cells[1]}").rstrip()
    yield from notes(report, family)


def say(text, report):
    """Progress on a terminal, and the table of each family when it is complete: with rich in colours."""
    if sys.stderr.isatty():
        print("\r\033[K" + ("" if text in FAMILIES else f"{text} ..."), end="", file=sys.stderr, flush=True)
    if text not in FAMILIES:
        return
    lines = ["", *plain(report, text)]
    try:
        from rich.console import Console
    except ImportError:
        print("\n".join(lines), flush=True)
        return
    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        style = "bold" if line.startswith(text) else "green" if line.startswith("  ours") else None
        console.print(line, style="red" if "FAILED" in line else style, markup=False)


def heading(report):
    m = report["machine"]
    where = m.get("gpu") or f"{m['processor']}, {m['threads']} threads, {m['instruction_set']}"
    return f"{where}; torch {m['torch']}, commit {m['commit']}, {m['date']}"


def failures(report):
    """Of ours: (case, contestant, why)"""
    for name, record in report["cases"].items():
        for contestant, x in record["contestants"].items():
            if contestant.startswith("ours") and "failed" in x:
                yield name, contestant, x["failed"]


def write(report, path):
    with open(path, "w") as file:
        json.dump(report, file, indent=1)


def add_arguments(parser):
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--quick", action="store_true", help="fewer and, on the CPU, smaller cases: under two minutes")
    parser.add_argument("--cases", help="some of " + ",".join(FAMILIES))
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--plots", type=Path, help="draw PNG files into this folder; needs matplotlib")
    parser.add_argument("--release-dir", help="folder of the released FwPKM repository, to run it beside")
    parser.add_argument("--slow-peers", action="store_true", help="also the peer that compiles for minutes, on a GPU")
    parser.add_argument("--threads", type=int, default=2)


def main(options):
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: PyTorch finds no GPU")

    def after(text, report):
        say(text, report)
        if options.json and text in FAMILIES:  # what is measured stays, whatever happens after it
            write(report, options.json)

    report = run(options, say=after)
    print("\n".join(["", heading(report), *goals.lines(report)]))
    if options.json:
        write(report, options.json)
    if options.plots:
        plots.draw(report, options.plots)
    failed = list(failures(report))
    for name, contestant, why in failed:
        print(f"FAILED: {name}: {contestant}: {why}", file=sys.stderr)
    sys.exit(bool(failed))
