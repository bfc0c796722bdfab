"""python -m bench profile: every kernel of a scan on a GPU, its stream, begin and time; where nothing runs.

    python -m bench profile [--cases "training;inference"] [--json FILE] [--plots FOLDER] [--calls 7]
    python -m bench profile --report FILE [--plots FOLDER]     what an earlier run has written
    ncu --profile-from-start off ... python -m bench profile --once --cases training

The host gets a head start (a kernel that waits), so that times are the GPU's and not the host's. Two streams: `both` is
the time in which both run something, `idle` that in which nothing runs. --once: one call between cudaProfilerStart and
cudaProfilerStop, for a profiler from outside.
"""

import json
import re
import tempfile
from pathlib import Path

import torch

import fwpkm_cuda
from bench import timing
from bench.cases import scan
from bench.cases.case import SIZES, Setup

WAIT_CYCLES = 40_000_000  # some 20 ms


# ---------------------------------------------------------------------------------------------------------- the cases
def training(s, B, chunks, name="h1k8"):
    shape = scan.shape_of(s, name, B, chunks * s.sizes.chunk)
    step, tokens = scan.trained(s, shape), scan.draw(s, shape)
    return lambda: step(tokens), chunks


def inference(s, chunks):
    shape = scan.shape_of(s, "h1k8", 1, chunks * s.sizes.chunk)
    call, tokens = scan.in_place(s, shape), scan.draw(s, shape)
    return lambda: call(tokens), chunks


def one_chunk(s, tokens):
    shape = scan.shape_of(s, "h1k8", 1, tokens, tokens)
    call, tokens = scan.in_place(s, shape), scan.draw(s, shape)
    return lambda: call(tokens), 1


def decoding(s, options):
    shape = scan.shape_of(s, "h1k8", 1, 1)
    call, tokens = scan.in_place(s, shape, **options), scan.draw(s, shape)
    return lambda: call(tokens), 1


def rival(s, chunks=4):
    P, width, B, _, C, R = s.sizes.rival
    shape = scan.Shape(B, chunks * C, C, P, width, width, 1, R, torch.bfloat16)
    step, tokens = scan.trained(s, shape), scan.draw(s, shape)
    return lambda: step(tokens), chunks


def search(s, tokens, R=8, score="dot"):
    _, sub_keys = s.memory(max(R, s.sizes.P), s.sizes.width, 2)
    query = s.randn(tokens, 1, s.sizes.width)
    return lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R, score), 1


def gather(s, reads, R=8):
    values, _ = s.memory(s.sizes.P, s.sizes.width, s.sizes.width)
    slots, weights = s.slots("uniform", len(values), reads // R, R), s.rand(reads // R, R)
    return lambda: fwpkm_cuda.value_gather(values, slots, weights), 1


CASES = {
    "training": lambda s: training(s, s.sizes.batch, 4),
    "training, h4k8": lambda s: training(s, s.sizes.batch, 2, "h4k8"),
    "training, h1k32": lambda s: training(s, s.sizes.batch, 2, "h1k32"),
    "training, B=1": lambda s: training(s, 1, 4),
    "inference": lambda s: inference(s, 8),
    "inference, one chunk": lambda s: one_chunk(s, s.sizes.long),
    "rival": rival,
    "decode, read": lambda s: decoding(s, dict(flush=False)),
    "decode, read and written": lambda s: decoding(s, dict(chunk_size=1)),
    "search, few tokens": lambda s: search(s, s.sizes.search[1]),
    "search": lambda s: search(s, s.sizes.search[2]),
    "search, idw": lambda s: search(s, s.sizes.search[2], score="idw"),
    "search, R=32": lambda s: search(s, s.sizes.search[2], R=32),
    "search, many tokens": lambda s: search(s, s.sizes.search[-1]),
    "gather, few reads": lambda s: gather(s, s.sizes.reads[1]),
    "gather": lambda s: gather(s, s.sizes.reads[-1]),
}


# ---------------------------------------------------------------------------------------------------------- measuring
def shortened(name):
    """Of a kernel: without namespaces, parameters and return type."""
    name = re.sub(r"\(anonymous namespace\)::|\w+::|^void ", "", name)
    return re.sub(r"\(int\)|\(bool\)", "", name).split("(")[0][:80]


def launches(function, calls, filler):
    """[[(kernel, stream, begin, end) of a launch, in us from the end of the wait] of a call]"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            filler.zero_()
            torch.cuda._sleep(WAIT_CYCLES)
            function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kinds = ("kernel", "gpu_memset", "gpu_memcpy")
    events = sorted((x for x in events if x.get("cat") in kinds), key=lambda x: x["ts"])
    found = []
    for x in events:
        if "spin" in x["name"]:
            found.append([])
            zero = x["ts"] + x["dur"]
        elif found and x["ts"] >= zero - 1 and "FillFunctor<unsigned char>" not in x["name"]:
            begin = x["ts"] - zero
            found[-1].append((shortened(x["name"]), x["args"].get("stream", 0), begin, begin + x["dur"]))
    return found


def covered(intervals):
    """The length of their union."""
    total, end = 0.0, float("-inf")
    for a, b in sorted(intervals):
        total += max(0.0, b - max(a, end))
        end = max(end, b)
    return total


def measured(function, chunks, calls, filler):
    """The record of a case: the call whose length is the median, and the mean time of each kernel in all calls."""
    for _ in range(3):
        function()
    found = [x for x in launches(function, calls, filler) if x]
    length = lambda call: max(x[3] for x in call) - min(x[2] for x in call)
    call = sorted(found, key=length)[len(found) // 2]
    streams = {x[1]: [y[2:] for y in call if y[1] == x[1]] for x in call}
    busy = {str(stream): covered(spans) for stream, spans in streams.items()}
    kernels = {}
    for name, _, begin, end in (x for call in found for x in call):
        count, total = kernels.get(name, (0, 0.0))
        kernels[name] = count + 1, total + end - begin
    all_of_it = covered([x[2:] for x in call])
    return {
        "chunks": chunks,
        "us": length(call),
        "launches": len(call),
        "busy_us": busy,
        "both_us": sum(busy.values()) - all_of_it,
        "idle_us": length(call) - all_of_it,
        "kernels": {n: {"launches": c / len(found), "us": t / c} for n, (c, t) in kernels.items()},
        "timeline": [(n, s, round(a, 2), round(b, 2)) for n, s, a, b in call],
    }


def lines(name, x):
    n = x["chunks"]
    yield (
        f"{name}: {x['us'] / n:.1f} us a chunk, {x['launches'] / n:.1f} launches; both streams {x['both_us'] / n:.1f}, "
        f"idle {x['idle_us'] / n:.1f}"
    )
    for kernel, k in sorted(x["kernels"].items(), key=lambda item: -item[1]["launches"] * item[1]["us"]):
        per_chunk = k["launches"] * k["us"] / n
        yield f"  {per_chunk:9.1f} us a chunk = {k['launches'] / n:5.2f} x {k['us']:8.2f}  {kernel}"


def picture(path, title, timeline, begin, end):
    """Two lines of bars, one for each stream, of what runs between two points of time (us)."""
    from matplotlib import pyplot as plt

    streams = sorted({stream for _, stream, _, _ in timeline})
    figure, axes = plt.subplots(figsize=(16, 1.2 + 1.3 * len(streams)), layout="constrained")
    colours = {}
    for name, stream, a, b in timeline:
        if b < begin or a > end:
            continue
        length, a, b = b - a, max(a, begin), min(b, end)
        kernel, row = name.split("<")[0], len(streams) - 1 - streams.index(stream)
        colour = colours.setdefault(kernel, plt.get_cmap("tab20")(len(colours) % 20))
        axes.barh(row, b - a, left=a - begin, height=0.85, color=colour, edgecolor="white", linewidth=0.5)
        if b - a > 0.02 * (end - begin):
            axes.text((a + b) / 2 - begin, row, f"{kernel}\n{length:.0f} us", ha="center", va="center", fontsize=7,
                      rotation=0 if b - a > 0.07 * (end - begin) else 90)  # fmt: skip
    axes.set(yticks=[], xlim=(0, end - begin), xlabel="us", title=title)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw(report, folder):
    """A picture of each case: of its whole call, or of the longer half of what four chunks or more do."""
    folder.mkdir(parents=True, exist_ok=True)
    m = report["machine"]
    for name, x in report["cases"].items():
        timeline, file = x["timeline"], re.sub(r"\W+", "-", name)
        end = max(b for *_, b in timeline)
        part = (
            end / x["chunks"] if x["chunks"] > 2 else end
        )  # one chunk: forward and backward chunks take about as long
        title = f"{name}: {m['gpu']}, commit {m['commit']}, {m['date']};"
        starts = {"forward": end * 0.2, "backward": end * 0.7} if name.startswith("training") else {"": 0.4 * end}
        for word, start in starts.items():
            begin = start if x["chunks"] > 2 else 0
            picture(
                folder / f"{file}{'-' * bool(word)}{word}.png",
                f"{title} {word}".rstrip("; "),
                timeline,
                begin,
                begin + part,
            )
            if x["chunks"] <= 2:
                break


def add_arguments(parser):
    parser.add_argument("--cases", help="some of " + ", ".join(CASES) + "; separated by semicolons")
    parser.add_argument("--calls", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path, help="draw PNG files into this folder; needs matplotlib")
    parser.add_argument("--report", type=Path, help="show this report, and measure nothing")
    parser.add_argument("--once", action="store_true", help="one call for another profiler")


def main(options):
    if options.report:
        report = json.loads(options.report.read_text())
        print("\n".join(line for name, x in report["cases"].items() for line in lines(name, x)))
        if options.plots:
            draw(report, options.plots)
        return
    chosen = options.cases.split(";") if options.cases else list(CASES)
    if unknown := set(chosen) - set(CASES):
        raise SystemExit(f"--cases: no {', '.join(sorted(unknown))}")
    meter = timing.meter_of("cuda")
    report = {"machine": timing.machine(2, meter), "cases": {}}
    filler = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for name in chosen:
        s = Setup("cuda", SIZES["cuda", False], meter)
        function, chunks = CASES[name](s)
        if options.once:
            for _ in range(2):
                function()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            function()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            continue
        report["cases"][name] = measured(function, chunks, options.calls, filler)
        print("\n".join(lines(name, report["cases"][name])), flush=True)
        del function, s
        torch.cuda.empty_cache()
        if options.json:
            options.json.write_text(json.dumps(report) + "\n")
    if options.plots:
        draw(report, options.plots)
