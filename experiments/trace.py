"""Who wrote the answer: for each decoded token and memory, the slots it read, and what wrote these slots.

    python -m experiments trace RUN

A slot's last writers are the tokens that read it in the last chunk that was written with it: at token x it was taught
the value of token x + lookahead. So each slot speaks for the tokens that follow its writers; [HIT] marks a slot that
speaks for the right one, and the consensus is what all slots of all memories together speak for most, by share.
"""

import json
from collections import Counter, defaultdict
from pathlib import Path

import torch

import fwpkm_cuda
from experiments.training import fast_layers

CONTEXT = 10  # tokens shown before and after a writer


class Writers:
    """Of each memory and slot, who last wrote it: {(name, slot): [(position in `ids`, share of the token's read)]}."""

    def __init__(self, lookahead):
        self.lookahead, self.of, self.ids = lookahead, {}, []

    def read(self, ids, details, chunk_size):
        """A text (T,) that was read from position 0 of a chunk on, and written to its end."""
        start = len(self.ids)
        self.ids += ids.tolist()
        for name, own in details.items():
            indices, weights = own.indices[0].flatten(1).tolist(), own.weights[0].flatten(1).tolist()  # (T, H * R)
            for first in range(0, len(ids), chunk_size):
                last = min(first + chunk_size, len(ids)) - self.lookahead  # later tokens have no target in this chunk
                written = defaultdict(list)
                for x in range(first, last):
                    for slot, weight in zip(indices[x], weights[x]):
                        written[slot].append((start + x, weight))
                self.of.update({(name, slot): writers for slot, writers in written.items()})

    def of_slot(self, name, slot, vocabulary, most=3):
        """-> [{position, share, context, says}], the writers with the largest shares first"""
        writers = sorted(self.of.get((name, slot), []), key=lambda writer: -writer[1])
        total = sum(share for _, share in writers)
        found = []
        for position, share in writers[:most]:
            said = position + self.lookahead
            found.append(
                dict(
                    position=position,
                    share=share / total if total else 0.0,
                    before=vocabulary.decode(self.ids[max(said - CONTEXT, 0) : said]),
                    says=vocabulary.decode(self.ids[said : said + 1]),
                    after=vocabulary.decode(self.ids[said + 1 : said + 1 + CONTEXT]),
                )
            )
        return found


@torch.no_grad()
def trace(run, hay, readings=2):
    """Reads the haystack and asks, as niah.py does with one write per reading; follows every read of the answer.

    -> {answer, value, tokens: [{token, right, consensus, memories: {name: [slot, share, hit, writers]}}]}"""
    model, vocabulary, memories = run.model, run.vocabulary, run.memories("empty")
    layers = [layer for layer in fast_layers(model).values() if isinstance(layer, fwpkm_cuda.FwPKM)]
    if not layers or len(layers) < len(memories):
        raise ValueError("trace: expected a run whose memories are those of FwPKM")
    (lookahead,) = {layer.options["lookahead"] for layer in layers}
    writers = Writers(lookahead)
    text, question = (torch.from_numpy(x).long().to(run.device) for x in (hay.ids, hay.question))
    for n in range(readings):
        ids = text if n < readings - 1 else torch.cat([text, question])
        cache, details = model.new_cache(), {}
        reading = memories.streaming(chunk_size="all")
        logits = model(ids[None], reading, cache=cache, details=details, last_only=True)
        if n < readings - 1:
            writers.read(ids, details, len(ids))
    last = lambda own: own._replace(indices=own.indices[:, -1:], weights=own.weights[:, -1:])
    read = {name: last(own) for name, own in details.items()}
    before = Writers(lookahead)  # the first digit is read before the last reading is written
    before.of, before.ids = dict(writers.of), list(writers.ids)
    writers.read(ids, details, len(ids))
    frozen, tokens = memories.frozen().streaming(), []
    for digit in hay.values[0]:
        token = int(logits[0, -1].argmax())
        known = before if not tokens else writers
        tokens.append(dict(token=vocabulary.decode([token]), right=digit) | _explained(read, known, vocabulary, digit))
        read = {}
        logits = model(torch.tensor([[token]], device=run.device), frozen, cache=cache, details=read)
    answer = "".join(t["token"] for t in tokens)
    return dict(answer=answer, value=hay.values[0], key=hay.keys[0], readings=readings, tokens=tokens)


def _explained(details, writers, vocabulary, digit):
    votes, memories = Counter(), {}
    for name, own in details.items():
        rows = []
        for slot, share in zip(own.indices.flatten().tolist(), own.weights.flatten().tolist()):
            known = writers.of_slot(name, slot, vocabulary)
            for writer in known:
                votes[writer["says"]] += share * writer["share"] / len(details)
            hit = bool(known) and known[0]["says"] == digit
            rows.append(dict(slot=slot, share=share, hit=hit, writers=known))
        memories[name] = sorted(rows, key=lambda row: -row["share"])
    return dict(consensus=votes.most_common(3), memories=memories)


def text_of(result, slots=4):
    """For people."""
    lines = [f"asked for {result['key']}: answered {result['answer']}, right is {result['value']}"]
    for token in result["tokens"]:
        consensus = ", ".join(f"{says!r} {votes:.0%}" for says, votes in token["consensus"])
        lines.append(
            f"\n{token['token']!r}" + ("" if token["token"] == token["right"] else f" (right: {token['right']!r})")
        )
        lines.append(f"  the slots together: {consensus or 'never written'}")
        for name, rows in token["memories"].items():
            for row in rows[:slots]:
                hit = "[HIT]" if row["hit"] else "     "
                who = "never written"
                if row["writers"]:
                    best = row["writers"][0]
                    said = f"{best['before']}[{best['says']}]{best['after']}".replace("\n", "↵")
                    who = f"token {best['position']:>6} ({best['share']:.0%} of its last write): ...{said}..."
                lines.append(f"  {hit} {name} slot {row['slot']:>6} {row['share']:4.0%}  {who}")
    return "\n".join(lines)


def picture(result, path, slots=4, context=34):
    """For each digit the slots with the largest shares: where in the text their last writer stood, and what it said."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = []  # (digit, its colour) or (share, position, before, says, after, hit)
    for token in result["tokens"]:
        right = token["token"] == token["right"]
        heading = f"{token['token']}" + ("" if right else f" (right: {token['right']})")
        votes = ", ".join(f"{says!r} {share:.0%}" for says, share in token["consensus"])
        rows.append((f"answer {heading}      all slots together: {votes}", "green" if right else "red"))
        for name, read in token["memories"].items():
            for row in read[:slots]:
                best = (
                    row["writers"][0]
                    if row["writers"]
                    else dict(position="-", before="", says="never written", after="")
                )
                before, says, after = (best[k].replace("\n", "↵") for k in ("before", "says", "after"))
                rows.append(
                    (name, row["share"], best["position"], before[-context:], says, after[:context], row["hit"])
                )
    size = (66 + 2 * context) * 0.068, 0.21 * len(rows) + 0.6  # a character of the font is 0.067 inches wide
    figure, axis = pyplot.subplots(figsize=size, layout="constrained")
    font = dict(family="monospace", fontsize=8, va="center")
    for line, row in enumerate(rows):
        if len(row) == 2:
            axis.text(0, -line, row[0], color=row[1], weight="bold", **font)
            continue
        name, share, position, before, says, after, hit = row
        axis.text(2, -line, f"{share:4.0%} of the answer of {name}, last written at token {position}", **font)
        axis.text(62 + context, -line, before, ha="right", color="grey", **font)
        box = dict(boxstyle="square,pad=0.1", linewidth=0, facecolor="palegreen" if hit else "mistyrose")
        axis.text(63 + context, -line, says, bbox=box, **font)
        axis.text(64 + context + len(says), -line, after, color="grey", **font)
    axis.set(xlim=(0, 66 + 2 * context), ylim=(-len(rows), 1))
    axis.axis("off")
    answered = f"answered {result['answer']} (right: {result['value']})"
    title = f"ID-{result['key']}: {answered} after {result['readings']} readings"
    axis.set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def evaluate(run, file, hay, readings=2, report=print):
    """`trace`, as JSON in `file` and as text beside it."""
    result = trace(run, hay, readings)
    Path(file).write_text(json.dumps(result, indent=1) + "\n")
    Path(file).with_suffix(".txt").write_text(text_of(result) + "\n")
    report(text_of(result))
    return result
