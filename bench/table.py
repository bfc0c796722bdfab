"""python -m bench table: the speed table of the README from a report of `python -m bench ops`.

    python -m bench table REPORT.json [--write README.md]

With --write it takes the place of what stands between the lines BEGIN and END (below) of that file.
"""

import json
from pathlib import Path

from bench import goals

BEGIN, END = "<!-- begin: python -m bench table -->", "<!-- end: python -m bench table -->"

# What, the beginning of the case's name, whether a chunk's time is meant, and columns: our contestant, then peers.
ROWS = (
    ("product-key search, 4096 tokens, R=8", "score_topk, M=4096 H=1 R=8 dot float32", ("ours", "eager")),
    ("product-key search, one head of R=32", "score_topk, M=4096 H=1 R=32", ("ours", "eager")),
    ("read of 32,768 rows", "gather, 32768 reads, uniform", ("ours", "embedding_bag", "fbgemm")),
    ("read of 131,072 rows", "gather, 131072 reads, uniform", ("ours", "embedding_bag", "fbgemm")),
    ("training step of 8 x 4096 tokens, h1k8", "layer_train, h1k8 B=8", ("ours", "dense baseline", "release")),
    ("training step of 8 x 4096 tokens, h4k8", "layer_train, h4k8 B=8", ("ours", "dense baseline", "release")),
    ("training step of 8 x 4096 tokens, h1k32", "layer_train, h1k32 B=8", ("ours", "dense baseline", "release")),
    ("inference over 4096 tokens", "layer_infer, h1k8 B=1 T=4096", ("ours", "dense baseline", "release")),
    ("inference over 131,072 tokens", "layer_infer, h1k8 B=1 T=131072 C=512", ("ours", "dense baseline", "release")),
    ("... in one chunk", "layer_infer, h1k8 B=1 T=131072 C=131072", ("ours", "dense baseline", "release")),
    ("a decoded token in a CUDA graph", "decode, h1k8, read", ("ours, graph", "eager")),
    (
        "slow-weight PKM: read of 4.2 million rows",
        "pkm, 32768 tokens h4 r32, read, uniform",
        ("ours", "embedding_bag", "fbgemm"),
    ),
)


def duration(ms):
    return f"{ms:,.0f} ms" if ms >= 100 else f"{ms:.3g} ms" if ms >= 1 else f"{1e3 * ms:.3g} us"


def cells(report, what, case, names):
    """A row, or None without ours."""
    unless = ("written",) if case.startswith("decode") else ()
    found = {name: goals.contestant(report, case, name, unless) for name in names}
    record, ours = found[names[0]] or (None, None)
    if ours is None:
        return None
    peers = [
        f"{name} {duration(x[1]['ms']['median'])} ({x[1]['ms']['median'] / ours['ms']['median']:.2g}x)"
        for name, x in found.items()
        if x and name != names[0]
    ]
    floor = f"{record['floor_ms'] / ours['ms']['median']:.0%}" if record["floor_ms"] else ""
    memory = f"{ours['peak_bytes'] / 1e6:,.0f} MB" if "peak_bytes" in ours else ""
    return what, duration(ours["ms"]["median"]), floor, memory, "; ".join(peers)


def lines(report):
    m = report["machine"]
    where = m.get("gpu") or f"{m['processor']}, {m['threads']} threads"
    sizes = "; P=512, K=V=512, float32" if report["device"] == "cuda" else ""
    yield f"{where}; torch {m['torch']}, commit {m['commit']}, {m['date']}: `{m['command']}`{sizes}."
    yield ""
    yield "| | time | of the floor | memory | others |"
    yield "|---|--:|--:|--:|---|"
    for row in ROWS:
        if found := cells(report, *row):
            yield f"| {' | '.join(found)} |"


def write(path, report):
    """Puts the table between the two lines, and leaves everything else."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{path}: expected the lines '{BEGIN}' and '{END}', once each")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(before + "\n".join([BEGIN, *lines(report), END]) + after)


def add_arguments(parser):
    parser.add_argument("report")
    parser.add_argument("--write", type=Path, help="put it into this file")


def main(options):
    with open(options.report) as file:
        report = json.load(file)
    if options.write:
        write(options.write, report)
    else:
        print("\n".join(lines(report)))
