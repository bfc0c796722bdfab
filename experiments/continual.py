"""Memories that read one domain after the other: what they learn of each, and what is left of it later.

    python -m experiments continual RUN

The model is not trained any more. Its memories begin empty, read a part of the first domain, then of the second, and so
on, and of the first again. Before the first and after each, copies of them read on in a text of every domain, which
gives its perplexity.
"""

import json
from pathlib import Path

from experiments import corpora, tokens
from experiments.perplexity import losses, perplexity
from experiments.training import cut


def evaluate(run, file, names=("anarchism", "austen", "bible"), adapt=50_000, test=20_000, report=print):
    """-> {"domains", "adapted": one more than the readings, each {domain: perplexity}, "readings"}, also in `file`

    adapt, test: tokens of a domain, both from what training held out; the test's documents are not adapted to."""
    file = Path(file)
    settings = run.settings(names=names, adapt=adapt, test=test)
    if file.exists() and (saved := json.loads(file.read_text()))["settings"] == settings:
        return saved
    parts = {}
    for name in names:
        training, held_out = corpora.split(tokens.encoded(name, run.vocabulary))
        held_out = held_out or training  # a corpus of one document
        if len(held_out) > 1:
            reading, testing = corpora.split(held_out)
        else:  # its first half and its second half
            half = len(held_out[0]) // 2
            reading, testing = [held_out[0][:half]], [held_out[0][half:]]
        parts[name] = cut(reading, adapt), cut(testing, test)
    memories, adapted = run.memories("empty"), []
    readings = [*names, names[0]]
    for step, name in enumerate([None, *readings]):
        if name is not None:
            for _ in losses(run, parts[name][0], memories):
                pass
        tested = {other: perplexity(run, testing, memories.clone()) for other, (_, testing) in parts.items()}
        adapted.append(tested)
        report(f"{file.stem}: after {', '.join(readings[:step]) or 'nothing'}: {tested}")
    result = dict(settings=settings, domains=list(names), readings=readings, adapted=adapted)
    file.write_text(json.dumps(result, indent=1) + "\n")
    return result
