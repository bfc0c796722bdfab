"""experiments/README.md, its tables and pictures, of the runs of tiny.py: `python -m experiments report FOLDER`.

What the tables say is also in results.json beside the page, {configuration: {seed: {question: result}}}.
"""

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from experiments import configurations, gates, trace
from experiments.tiny import ONCE, once

HERE = Path(__file__).parent
READINGS = ("1", "2", "3", "4")


def collect(folder):
    """{configuration: {seed: dict(run facts, last line of the log, results)}} of all finished runs in a folder"""
    found = {}
    for file in sorted(Path(folder).glob("seed-*/*/results.json")):
        seed, name = file.parent.parent.name.removeprefix("seed-"), file.parent.name
        last = json.loads((file.parent / "log.jsonl").read_text().splitlines()[-1])
        facts = json.loads((file.parent / "run.json").read_text())
        found.setdefault(name, {})[seed] = dict(facts=facts, last=last, results=json.loads(file.read_text()))
    return {name: found[name] for name in configurations.ALL if name in found}


def figures(runs, name, question, *path):
    """One figure of each seed: `path` leads to it in the result of the question."""
    values = []
    for own in runs.get(name, {}).values():
        value = own["results"].get(question)
        for key in path:
            value = None if value is None else value.get(key)
        if value is not None:
            values.append(value)
    return values


def spread(values, form="{:.0f}"):
    """Mean, and the range of several seeds."""
    if not values:
        return "-"
    mean = form.format(sum(values) / len(values))
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))} to {form.format(max(values))})"


def percent(values):
    return spread([100 * value for value in values])


def table(heading, rows):
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def facts_of(runs):
    """Where, when and of which commits the figures are."""
    every = [(name, seed, own["facts"]) for name, seeds in runs.items() for seed, own in seeds.items()]
    of = lambda key: ", ".join(sorted({str(facts[key]) for _, _, facts in every}))
    commits = {}
    for name, _, facts in every:
        commits.setdefault(facts["commit"], {})[name] = None
    trained = "; ".join(f"{commit} ({', '.join(names)})" for commit, names in commits.items())
    minutes = sum(facts["seconds"] for _, _, facts in every) / 60
    seeds = ", ".join(sorted({seed for _, seed, _ in every}))
    return (
        f"`python -m experiments tiny`, {of('processor')}, a core for each run; torch {of('torch')}; {of('date')}; "
        f"seeds {seeds}; {minutes:.0f} core-minutes of training. Commits: {trained}. A dash: not run yet."
    )


# ------------------------------------------------------------------------------------------------------------- tables
def needle_table(runs):
    """The main configuration: lengths, and readings."""
    rows = []
    for length, samples in (("1,000", 100), ("4,000", 100), ("16,000", 20)):
        question = f"{length} tokens"
        shares = [percent(figures(runs, "main", question, n, "exact")) for n in READINGS]
        outside = percent(figures(runs, "main", question, "4", "outside"))
        candidate = percent(figures(runs, "main", question, "4", "candidate"))
        rows.append([length, samples, *shares, outside, candidate])
    kept = [percent(figures(runs, "main", "1,000 tokens, never reset", n, "exact")) for n in READINGS]
    rows.append(["1,000, never reset between samples", 50, *kept, "", ""])
    still = [percent(figures(runs, "main", "1,000 tokens, still sub-keys", n, "exact")) for n in READINGS]
    rows.append(["1,000, sub-keys still while it reads", 100, *still, "", ""])
    control = "1,000 tokens, key that stands nowhere"
    rows.append(
        ["1,000, asked for a key that stands nowhere", 50]
        + [percent(figures(runs, "main", control, n, "exact")) for n in READINGS]
        + ["", percent(figures(runs, "main", control, "4", "candidate"))]
    )
    heading = ["tokens", "samples", *(f"{n} reading{'s' * (n != '1')}" for n in READINGS)]
    return table([*heading, "4, outside of attention's reach", "4, a needle, right or wrong"], rows)


def once_table(runs):
    """Read once, written while it is read."""
    rows = []
    for length, samples in (("1,000", 100), ("4,000", 100), ("16,000", 20)):
        row = [length, samples]
        for chunk in (64, 256):
            for use in ONCE:
                row.append(percent(figures(runs, "main", once(length, chunk, use), "1", "exact")))
        rows.append(row)
    return table(["tokens", "samples", *(f"{chunk}{use}" for chunk in (64, 256) for use in ONCE)], rows)


def comparison(runs, names):
    """Other configurations at 1,000 tokens."""
    rows = []
    for name in names:
        last = [own["last"] for own in runs.get(name, {}).values()]
        gates = [m["gate"] for line in last for m in line["memories"].values() if "gate" in m]
        coverage = [m["usage"]["coverage"] for line in last for m in line["memories"].values() if "usage" in m]
        rows.append(
            [configurations.LABELS.get(name, name)]
            + [percent(figures(runs, name, "1,000 tokens", n, "exact")) for n in READINGS]
            + [percent([line["answered"] for line in last]), spread(gates, "{:.2f}"), spread(coverage, "{:.2f}")]
            + [runs.get(name, {}).get("0", {}).get("facts", {}).get("steps", "-")]
        )
    heading = ["configuration", *(f"{n} reading{'s' * (n != '1')}" for n in READINGS)]
    return table([*heading, "right in training", "gate", "slots read in a step", "steps"], rows)


def perplexity_table(runs):
    rows, corpora = [], list(configurations.TESTS)
    for name in configurations.TEXT:
        row = [configurations.LABELS.get(name, name)]
        for corpus in corpora:
            for way in ("live", "frozen"):
                row.append(spread(figures(runs, name, f"{corpus}, {way}", "perplexity"), "{:.2f}"))
        rows.append(row)
    for question, label in (("forgotten", "before each document forgotten"), ("from empty", "empty at first")):
        shown = spread(figures(runs, "text-fwpkm", f"{corpora[0]}, {question}", "perplexity"), "{:.2f}")
        rows.append([f"FwPKM, {label}", shown] + [""] * (2 * len(corpora) - 1))
    heading = [label + way for label in configurations.TESTS.values() for way in ("", ", frozen")]
    return table(["configuration", *heading], rows)


def domain_table(runs):
    rows = []
    for own in runs.get("text-fwpkm", {}).values():
        result = own["results"].get("domains")
        if result and not rows:
            names = ["nothing", *result["readings"]]
            for step, tested in enumerate(result["adapted"]):
                rows.append([", ".join(names[1 : step + 1]) or "nothing", *(f"{p:.2f}" for p in tested.values())])
            return table(["read so far", *(f"perplexity of {name}" for name in result["domains"])], rows)
    return "-"


# ----------------------------------------------------------------------------------------------------------- pictures
def recall_picture(runs, path):
    """Exact answers over readings, lengths beside configurations."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    lines = [(f"{length} tokens", "main", f"{length} tokens") for length in ("1,000", "4,000", "16,000")]
    _recall(left, runs, lines, "trained on 512 tokens, other wordings")
    best = max(
        (name for name in configurations.NEEDLES if name.startswith("fwmlp")),
        key=lambda name: max(figures(runs, name, "1,000 tokens", "4", "exact"), default=0),
    )
    others = ["main", "idw-paper", "lookahead0", best, "none"]
    names = [(configurations.LABELS.get(name, name), name, "1,000 tokens") for name in others]
    _recall(right, runs, names, "1,000 tokens")
    left.set_ylabel("needles found, all 6 digits right (%)")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _recall(axis, runs, lines, title):
    for label, name, question in lines:
        values = [[100 * v for v in figures(runs, name, question, n, "exact")] for n in READINGS]
        if all(values):
            means = [sum(own) / len(own) for own in values]
            axis.plot(range(1, 5), means, marker="o", label=label)
            axis.fill_between(range(1, 5), [min(own) for own in values], [max(own) for own in values], alpha=0.2)
    axis.set(title=title, xlabel="readings", xticks=range(1, 5), ylim=(-3, 103))
    axis.grid(alpha=0.3)
    axis.legend()


def perplexity_picture(runs, path):
    """Over the position in a document; and for the first of them what the memory takes away as it reads on."""
    figure, (axis, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    corpus = next(iter(configurations.TESTS))
    for name in configurations.TEXT:
        for way in ("live", "frozen"):
            curves = figures(runs, name, f"{corpus}, {way}", "curve")
            if curves and not (way == "frozen" and "fwpkm" not in name):
                label = configurations.LABELS.get(name, name) + ", frozen" * (way == "frozen")
                places, losses = [max(1.4 * at, 256) for at, _, _ in curves[0]], [loss for _, loss, _ in curves[0]]
                axis.plot(places, losses, "--" if way == "frozen" else "-", marker=".", label=label)
    axis.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)", xscale="log")
    axis.set_title(f"held-out documents of {corpus}")
    if axis.lines:
        axis.legend(fontsize=8)
    with_memory, without = (
        figures(runs, name, f"{corpus}, live", "first_documents") for name in ("text-fwpkm", "text-none")
    )
    for own, other in zip(*(found[0] if found else [] for found in (with_memory, without))):
        gained = [a - b for a, b in zip(own, other)]
        every = range(0, max(len(gained) - 7, 1), 8)  # 1,024 tokens
        means = [sum(gained[at : at + 8]) / len(gained[at : at + 8]) for at in every]
        right.plot([128 * at + 512 for at in every], means, marker=".", linewidth=0.8)
    right.axhline(0, color="black", linewidth=0.8)
    right.set(xlabel="position (tokens)", ylabel="loss with FwPKM - without (nats)", title="the first ten documents")
    for part in (axis, right):
        part.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# ----------------------------------------------------------------------------------------------------------- the page
def write(folder, page=HERE / "README.md"):
    """Renews what stands between the marks of the page, the pictures, and results.json. -> what it wrote"""
    runs, pictures = collect(folder), page.parent / "pictures"
    (page.parent / "results.json").write_text(json.dumps(runs, indent=1) + "\n")
    pictures.mkdir(exist_ok=True)
    recall_picture(runs, pictures / "recall.png")
    perplexity_picture(runs, pictures / "perplexity.png")
    for name, draw in (("gates", gates.picture), ("trace", trace.picture)):
        saved = Path(folder) / "seed-0" / "main" / f"{name}.json"
        draw(json.loads(saved.read_text()), pictures / f"{name}.png")
    parts = {
        "facts": facts_of(runs),
        "needles": needle_table(runs),
        "once": once_table(runs),
        "baselines": comparison(runs, configurations.NEEDLES),
        "rules": comparison(runs, ["main", *configurations.RULES]),
        "ablations": comparison(runs, ["main", "lookahead0", *configurations.ABLATIONS]),
        "attention": comparison(runs, ["main", *configurations.ATTENTION]),
        "perplexity": perplexity_table(runs),
        "domains": domain_table(runs),
    }
    text = page.read_text()
    for name, content in parts.items():
        mark = re.compile(rf"(<!-- begin: {name} -->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        if not mark.search(text):
            raise ValueError(f"{page}: expected a place for {name}: <!-- begin: {name} --> ... <!-- end: {name} -->")
        text = mark.sub(lambda found, own=content: f"{found[1]}\n{own}\n\n{found[2]}", text)
    page.write_text(text)
    return parts
