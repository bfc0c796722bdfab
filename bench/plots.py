"""PNG files of a report of `python -m bench ops`: time against tokens, reads and slots; floors; memory against T."""

import re

SERIES = {"ours": "tab:green", "ours, graph": "tab:olive", "eager": "tab:red", "embedding_bag": "tab:blue",
          "dense baseline": "tab:red", "fbgemm": "tab:purple", "release": "tab:orange"}  # fmt: skip


def series(report, pattern, need="ms"):
    """{contestant: [(x, record, figures)]} of the cases whose name matches; the pattern's group is x."""
    found = {}
    for case, record in report["cases"].items():
        if match := re.fullmatch(pattern, case):
            for name, x in record["contestants"].items():
                if name in SERIES and need in x:
                    found.setdefault(name, []).append((int(match[1]), record, x))
    return found


def against(figure_of, axes, found, xlabel, ylabel, title):
    for name, points in found.items():
        points.sort(key=lambda p: p[0])
        axes.plot([p[0] for p in points], [figure_of(*p) for p in points], "o-", color=SERIES[name], label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(places := sorted({x for points in found.values() for x, *_ in points}), places)
    axes.set(yscale="log", xlabel=xlabel, ylabel=ylabel, title=title)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()


def floors(report, axes):
    """The share of its floor that our contestant of each case reaches."""
    bars = []
    for case, record in report["cases"].items():
        x = record["contestants"].get("ours", {})
        if record["floor_ms"] and "ms" in x:
            bars.append((case, 100 * record["floor_ms"] / x["ms"]["median"]))
    names, shares = zip(*reversed(bars)) if bars else ((), ())
    axes.barh(range(len(names)), shares, color="tab:green")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set(xlabel="% of the floor (copy bandwidth or matrix products of this run)", xlim=(0, 100))
    axes.grid(True, axis="x", alpha=0.3)
    return len(names)


def draw(report, folder):
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("--plots: matplotlib is not installed (pip install fwpkm-cuda[bench])") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    m = report["machine"]
    where = f"{m.get('gpu') or m['processor']}, commit {m['commit']}, {m['date']}"
    us = lambda x, record, figures: 1e3 * figures["ms"]["median"]
    mb = lambda x, record, figures: figures["peak_bytes"] / 1e6
    pictures = {
        "tokens": (us, r"score_topk, M=(\d+) H=1 R=8 dot float32", "tokens", "us", "product-key search"),
        "reads": (us, r"gather, (\d+) reads, uniform", "reads", "us", "value_gather"),
        "slots": (us, r"gather, \d+ reads, uniform, P=(\d+)", "P; there are P*P slots", "us", "value_gather"),
        "stream": (us, r"layer_infer, h1k8 .*, P=(\d+)", "P; there are P*P slots", "us", "a stream, in place"),
        "memory": (mb, r"memory, h1k8 B=1 T=(\d+) .*", "T", "MB", "peak memory of a training step"),
    }
    for file, (figure_of, pattern, *texts) in pictures.items():
        if found := series(report, pattern, "peak_bytes" if figure_of is mb else "ms"):
            figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
            against(figure_of, axes, found, *texts)
            figure.suptitle(where, fontsize=7)
            figure.savefig(folder / f"{file}.png", dpi=150)
            pyplot.close(figure)
    figure, axes = pyplot.subplots(layout="constrained")
    count = floors(report, axes)
    figure.set_size_inches(9, 1 + 0.18 * count)
    figure.suptitle(where, fontsize=7)
    figure.savefig(folder / "floors.png", dpi=150)
    pyplot.close(figure)
