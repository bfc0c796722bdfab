"""How open the gates are and how evenly the slots are read, over a held-out text: `python -m experiments gates RUN`.

The picture shows the text itself, each token on the colour of its gate, a panel for each memory.
"""

import json
from pathlib import Path

import torch

import fwpkm_cuda
from experiments.perplexity import losses
from experiments.training import cut


def evaluate(run, file, documents, most=20_000, start="trained", shown=400, report=print):
    """-> {settings, text: the first tokens, memories: {name: gate, histogram, gates of the first tokens, usage, and
    random_usage of as many reads}}, also in `file`. See `picture`."""
    file = Path(file)
    settings = run.settings(most=most, start=start, shown=shown)
    if file.exists() and (saved := json.loads(file.read_text()))["settings"] == settings:
        return saved
    memories, seen, ids = run.memories(start), {name: [] for name in run.memories("empty")}, []

    def keep(inputs, details):
        ids.append(inputs[0])
        for name, own in details.items():
            seen[name].append(own)

    for _ in losses(run, cut(documents, most), memories, details=keep):
        pass
    ids = torch.cat(ids)[:shown]
    result = dict(settings=settings, text=[run.vocabulary.decode([i]) for i in ids.tolist()], memories={})
    for name, details in seen.items():
        own = result["memories"][name] = {}
        if details[0].gates is not None:
            gates = torch.cat([d.gates[0] for d in details])
            own["gate"], own["histogram"] = gates.mean().item(), fwpkm_cuda.gate_histogram(gates).tolist()
            own["gates"] = [round(gate, 3) for gate in gates[:shown].tolist()]
        if details[0].indices is not None:
            reads = torch.cat([d.indices.flatten() for d in details])
            slots = memories[name].num_slots
            own["usage"] = fwpkm_cuda.usage(reads, slots)._asdict()
            own["random_usage"] = fwpkm_cuda.random_usage(reads.numel(), slots)._asdict()
        report(f"{file.stem}: {name}: " + ", ".join(f"{k} {v}" for k, v in own.items() if k in ("gate", "usage")))
    file.write_text(json.dumps(result) + "\n")
    return result


def picture(result, path, width=100):
    """The text of `evaluate`, on the colours of its gates; no picture where there are none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    memories = {name: own["gates"] for name, own in result["memories"].items() if "gates" in own}
    if not memories:
        return
    rows, row, column = [], 0, 0  # (row, column, text) of each token
    for text in result["text"]:
        shown = text.replace("\n", "↵").replace("\t", " ")
        if column + len(shown) > width:
            row, column = row + 1, 0
        rows.append((row, column, shown))
        column += len(shown)
    figure, axes = pyplot.subplots(
        len(memories), 1, figsize=(width * 0.09, (row + 2) * 0.2 * len(memories)), squeeze=False, layout="constrained"
    )
    colours = pyplot.get_cmap("viridis")
    for axis, (name, gates) in zip(axes[:, 0], memories.items()):
        for (line, start, text), gate in zip(rows, gates):
            box = pyplot.Rectangle((start, -line - 0.35), len(text), 0.9, color=colours(gate), linewidth=0)
            axis.add_patch(box)
            ink = "black" if gate > 0.6 else "white"
            for place, character in enumerate(text):
                axis.text(start + place + 0.5, -line, character, family="monospace", fontsize=7, color=ink, ha="center")
        axis.set(xlim=(0, width), ylim=(-row - 1, 1), title=f"gate of {name}")
        axis.axis("off")
    bar = pyplot.cm.ScalarMappable(norm=pyplot.Normalize(0, 1), cmap=colours)
    figure.colorbar(bar, ax=axes[:, 0], label="gate")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
