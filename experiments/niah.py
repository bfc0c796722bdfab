"""Needle in a haystack, as in the paper: a text with five statements is read n times, then one of them is asked for.

n readings are n - 1 readings of the text and one of text and question. Each is written once, at its end
(`chunk_size="all"`), or while it is read (`chunk_size=C`). Six digits are decoded greedily from the last reading, and
nothing is written meanwhile. So after one reading that is written once, the first digit comes from a memory that has
not been written yet: a guess.

Between the samples the memories are made "empty" (trained sub-keys, no values) or "trained" (as training left them), or
"kept": never reset, as in the paper, so that every sample is read into what is left of those before.
"""

import json
import math
import random
from pathlib import Path

import torch

from experiments import corpora
from experiments.needles import DIGITS, haystack

BETWEEN = ("empty", "trained", "kept")


@torch.no_grad()
def read(model, memories, ids, chunk_size, cache=None):
    """Reads the next tokens (T,), in place. -> logits of the last (words,)"""
    return model(ids[None], memories.streaming(chunk_size=chunk_size), cache=cache, last_only=True)[0, -1]


@torch.no_grad()
def decode(model, memories, logits, cache, tokens=DIGITS):
    """The most likely continuation, token by token; the memories are only read."""
    frozen, found = memories.frozen().streaming(), []
    while True:
        found.append(int(logits.argmax()))
        if len(found) == tokens:
            return found
        logits = model(torch.tensor([found[-1:]], device=logits.device), frozen, cache=cache)[0, -1]


@torch.no_grad()
def readings(run, memories, text, question, most, chunk_size="all"):
    """Reads (L,) `most` times and answers (Q,) after each of them, as if it had been the last.

    -> for each n from 1 on, the answer's ids and the memories as the answer left them; `memories` are as after `most`
    readings of the text alone. The reading of text and question is that of the text, gone on from a copy."""
    whole = len(text) + len(question)
    chunk_size = whole if chunk_size == "all" else chunk_size
    for _ in range(most):
        cache = run.model.new_cache()
        read(run.model, memories, text, chunk_size, cache)
        asked = memories.clone()
        logits = read(run.model, asked, question, chunk_size, cache)
        asked.flush()
        memories.flush()
        yield decode(run.model, asked, logits, cache), asked


def reach(config):
    """Tokens before itself that a token can see through attention and convolutions alone; None: all."""
    if config.backbone != "small" or config.layout != "window":
        return None
    return config.layers * (config.window - 1 + max(config.convolution - 1, 0))


def scored(answer, hay):
    """What is right about an answer (text), beside the needles of its haystack."""
    value = hay.values[0]
    return dict(
        exact=answer == value,
        digits=sum(a == b for a, b in zip(answer, value)) / DIGITS,
        first=answer[:1] == value[:1],
        candidate=answer in hay.values,
        right_for_another=answer in hay.values[1:],
    )


def samples(
    run, *, first=0, length=1000, most=4, count=100, between="empty", chunk_size="all", seed=1, needles=5, control=False
):
    """Yields a dict for each sample from `first` to `count` - 1 and each number of readings.

    Sample s is the same text for every model and every n. "kept" memories have read all samples before, from 0 on."""
    if between not in BETWEEN:
        raise ValueError(f"between: expected one of {', '.join(BETWEEN)}, got {between!r}")
    documents, device = run.held_out, run.device
    seen = reach(run.config)
    # Never reset: every number of readings has a history of its own.
    kept = {n: run.memories("trained") for n in range(1, most + 1)} if between == "kept" else {}
    for sample in range(first, count):
        rng = random.Random(f"{seed} {length} {sample}")
        hay = haystack(documents, run.vocabulary, length, rng, needles, answerable=not control)
        text, question = (torch.from_numpy(x).long().to(device) for x in (hay.ids, hay.question))
        back = len(hay.ids) + len(hay.question) - hay.ends[0]  # from the question's last token to the needle's
        about = dict(sample=sample, value=hay.values[0], tokens_back=back, inside=seen is None or back <= seen)
        for n in range(1, most + 1) if kept else [most]:
            memories = kept[n] if kept else run.memories(between, seed=sample)
            for done, (ids, after) in enumerate(readings(run, memories, text, question, n, chunk_size), 1):
                if kept:
                    kept[n] = after
                if not kept or done == n:
                    answer = run.vocabulary.decode(ids)
                    yield about | dict(readings=done, answer=answer) | scored(answer, hay)


def summary(results):
    """{readings: {figure: share}}; `outside` is of the needles that attention alone cannot see from the question."""
    found = {}
    for n in sorted({r["readings"] for r in results}):
        own = [r for r in results if r["readings"] == n]
        share = lambda name, of=own: sum(r[name] for r in of) / len(of) if of else None
        outside = [r for r in own if not r["inside"]]
        found[n] = {name: share(name) for name in ("exact", "digits", "first", "candidate")}
        found[n] |= dict(outside=share("exact", outside), samples=len(own), samples_outside=len(outside))
    return found


def evaluate(run, file, report=print, **options):
    """`samples`, each written to `file` (JSON lines) as it comes; what is there already is not done again. -> summary

    A never-reset memory has to begin at the first sample, all others go on where they were stopped."""
    file = Path(file)
    settings = json.dumps(run.settings(options=options), sort_keys=True)
    text = file.read_text() if file.exists() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()  # without half a line
    if lines and lines[0] != settings:
        raise ValueError(f"{file}: results of other settings are there: {lines[0]}")
    most, count = options.get("most", 4), options.get("count", 100)
    done = [json.loads(line) for line in lines[1:]]
    whole = len(done) // most
    if options.get("between") == "kept" and whole < count:
        whole = 0
    done = done[: whole * most]
    with corpora.replacing(file) as out:
        out.write("".join(line + "\n" for line in [settings, *map(json.dumps, done)]).encode())
    with file.open("a") as out:
        for result in samples(run, first=whole, **options):
            done.append(result)
            out.write(json.dumps(result) + "\n")
            if len(done) % most == 0:
                out.flush()
                exact = {n: f"{s['exact']:.0%}" for n, s in summary(done).items()}
                report(f"{file.stem}: {len(done) // most}/{count} samples, exact by readings {exact}")
    return summary(done)


def mcnemar(a, b):
    """Two results over the same samples: how often only one of them is right, and the exact two-sided p of that.

    a, b: {(sample, readings): right}"""
    only_a = sum(a[key] and not b[key] for key in a.keys() & b.keys())
    only_b = sum(b[key] and not a[key] for key in a.keys() & b.keys())
    n, k = only_a + only_b, min(only_a, only_b)
    p = min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)
    return dict(only_first=only_a, only_second=only_b, p=p)
