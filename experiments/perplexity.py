"""Perplexity of texts that are read in order, segment after segment, while the memories write: `python -m experiments
perplexity`.

Every token of a document is predicted exactly once, the first one from the separator before it. A segment begins
without what the token mixers knew of the last one, as in training: what is older than it is in the memories alone.

live        the memories read and write on, from document to document
forgotten   each document begins with the memories as they were before the first
frozen      the memories as they were before the first, only read
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from experiments.training import cut

WAYS = ("live", "forgotten", "frozen")


def segments(ids, length, separator):
    """A document (N,) as inputs and targets of at most `length` tokens; the targets are the document."""
    inputs = np.concatenate([[separator], ids[:-1]])
    for start in range(0, len(ids), length):
        yield inputs[start : start + length], ids[start : start + length]


@torch.no_grad()
def losses(run, documents, memories, way="live", length=None, chunk_size=None, details=None):
    """Yields (N,), the losses of a document's tokens in nats, document by document. Writes `memories`.

    details: a function that is given each segment's inputs (1, T), and {name of a memory: fwpkm_cuda's Details}."""
    if way not in WAYS:
        raise ValueError(f"way: expected one of {', '.join(WAYS)}, got {way!r}")
    length = run.config.length if length is None else length
    before = memories.clone() if way == "forgotten" else None
    used = (memories.frozen() if way == "frozen" else memories).streaming(chunk_size=chunk_size)
    for ids in documents:
        if before is not None:
            memories.copy_(before)
        found = []
        for inputs, targets in segments(ids, length, run.vocabulary.separator):
            inputs, targets = (torch.from_numpy(x).long().to(run.device)[None] for x in (inputs, targets))
            seen = None if details is None else {}
            logits = run.model(inputs, used, details=seen)
            found.append(F.cross_entropy(logits[0].float(), targets[0], reduction="none").cpu())
            if details is not None:
                details(inputs, seen)
        yield torch.cat(found).numpy()


def perplexity(run, documents, memories, **options):
    """Of all their tokens."""
    return math.exp(np.concatenate([*losses(run, documents, memories, **options)]).mean())


def evaluate(run, file, documents, report=print, most=100_000, start="trained", **options):
    """Reads the first `most` tokens of the documents. -> {perplexity, tokens, curve, first_documents}, also in `file`

    start             the memories before the first document: "empty" or "trained"
    curve             [(first token, mean loss, tokens)] over the position in a document, in parts that grow with it
    first_documents   of the first ten, the mean losses of equal parts of 128 tokens or a little more"""
    file = Path(file)
    settings = run.settings(**options, most=most, start=start)
    if file.exists() and (saved := json.loads(file.read_text()))["settings"] == settings:
        return saved
    documents = cut(documents, most)
    total, count, sums, first = 0.0, 0, {}, []
    for found in losses(run, documents, run.memories(start), **options):
        total, count = total + float(found.sum()), count + len(found)
        for at, part in parts(found):
            own = sums.setdefault(at, [0.0, 0])
            own[0], own[1] = own[0] + float(part.sum()), own[1] + len(part)
        if len(first) < 10:
            first.append([round(float(x.mean()), 4) for x in np.array_split(found, max(len(found) // 128, 1))])
        report(f"{file.stem}: {count} tokens, perplexity {math.exp(total / count):.2f}")
    result = dict(settings=settings, perplexity=math.exp(total / count), tokens=count)
    result |= dict(curve=[[at, s / n, n] for at, (s, n) in sums.items()], first_documents=first)
    file.write_text(json.dumps(result) + "\n")
    return result


def parts(found, first=512):
    """A document's losses in parts that end at 512, 1024, 2048, ... tokens."""
    start, end = 0, first
    while start < len(found):
        yield start, found[start:end]
        start, end = end, 2 * end
