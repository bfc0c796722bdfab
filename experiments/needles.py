"""Statements of a number for a key: hidden in a text and asked for (the test), and said twice in rows of training text.

The test's sentence is the paper's; training never sees it, only `WORDINGS`."""

import random
import string
from functools import cache
from typing import NamedTuple

import numpy as np

TEST = (" The secret number for ID-KEY is ", ".")
DIGITS = 6  # of the test's numbers
WORDINGS = (
    (" The code of KEY was ", "."),
    (" Order KEY: ", ";"),
    (" You can call room KEY at ", "."),
    (" (see file KEY, page ", ")"),
    (" The price of item KEY is ", " pounds."),
    (" Box KEY weighs ", " grams."),
    (" For KEY the answer is ", "."),
    (" Passport-KEY: ", ","),
    (" In the year of KEY they counted ", " votes."),
    (" Ticket no-KEY has the value ", "!"),
)
KEY_CHARACTERS = string.ascii_uppercase + string.digits


def draw(rng, characters, least, most):
    return "".join(rng.choices(characters, k=rng.randint(least, most)))


# ----------------------------------------------------------------------------------------------------------- the test
class Haystack(NamedTuple):
    ids: np.ndarray  # (L,) int32: the text with its needles
    question: np.ndarray  # (Q,) int32
    values: list[str]  # of the needles, the one that is asked for first
    keys: list[str]
    places: list[int]  # of the needles' first tokens, in the same order
    ends: list[int]  # of the tokens behind them


def haystack(documents, vocabulary, length, rng, needles=5, answerable=True):
    """`length` tokens with needles at random places, between words, and the question for one of them.

    The text is of one of the documents that are long enough, or else of all of them, one after the other.
    answerable=False asks for a key that stands nowhere."""
    long = [ids for ids in documents if len(ids) >= length] or [np.concatenate(documents)]
    if len(long[0]) < length:
        raise ValueError(f"length: expected at most {len(long[0])}, all held-out tokens, got {length}")
    keys = set()
    while len(keys) < needles + 1:
        keys.add(draw(rng, KEY_CHARACTERS, 4, 4))
    keys = sorted(keys)
    rng.shuffle(keys)
    values = [draw(rng, string.digits, DIGITS, DIGITS) for _ in range(needles)]
    before, after = TEST
    statements = [vocabulary.encode(f"{before.replace('KEY', k)}{v}{after}") for k, v in zip(keys, values)]
    ids = long[rng.randrange(len(long))]
    room = length - sum(map(len, statements))
    if room < needles:
        raise ValueError(f"length: expected more than {length} tokens for {needles} needles")
    start = rng.randrange(len(ids) - room + 1)
    text = ids[start : start + room]
    between_words = np.flatnonzero(_begins_word(vocabulary)[text[1:]]) + 1
    cuts = sorted(int(rng.choice(between_words if len(between_words) else range(room))) for _ in range(needles))
    order = list(range(needles))
    rng.shuffle(order)  # which of them stands at which cut
    pieces, places, at = [], [0] * needles, 0
    for cut, needle in zip(cuts, order):
        pieces += [text[at:cut], statements[needle]]
        places[needle] = sum(map(len, pieces[:-1]))
        at = cut
    pieces.append(text[at:])
    asked = keys[0] if answerable else keys[needles]
    question = vocabulary.encode(before.replace("KEY", asked))
    ends = [place + len(ids) for place, ids in zip(places, statements)]
    return Haystack(np.concatenate(pieces), question, values, keys[:needles], places, ends)


@cache
def _begins_word(vocabulary):
    """(words,) bool: which tokens begin with white space"""
    return np.array([vocabulary.decode([token])[:1].isspace() for token in range(vocabulary.size)])


# -------------------------------------------------------------------------------------------------------- training rows
class Rows:
    """Batches of text, some of its rows with statements that come back, some with a passage that is said twice.

    Row b reads the corpus from a place of its own on (a row with needles, or said twice, drops what does not fit); so a
    memory that is kept from step to step reads on. A batch depends on (seed, rank, step) alone: a run that is resumed
    sees what it would have seen."""

    def __init__(self, documents, vocabulary, config, rank=0, processes=1):
        rng = random.Random(f"order {config.seed}")
        documents = list(documents)
        rng.shuffle(documents)
        separator = np.array([vocabulary.separator], np.int32)
        self.text = np.concatenate([part for ids in documents for part in (ids, separator)])
        if len(self.text) <= config.length:
            raise ValueError(f"length: expected less than {len(self.text)}, all tokens of the corpora")
        rows = config.batch * processes
        self.starts = [
            rng.randrange(len(self.text)) // rows + len(self.text) * (rank * config.batch + row) // rows
            for row in range(config.batch)
        ]
        self.vocabulary, self.config, self.rank = vocabulary, config, rank

    def batch(self, step):
        """-> ids (B, T + 1) int64, and (B, T) bool: which targets ids[:, 1:] are digits of a statement said before"""
        config, width = self.config, self.config.length + 1
        ids, answers = np.zeros((config.batch, width), np.int64), np.zeros((config.batch, width), bool)
        for row in range(config.batch):
            rng = random.Random(f"row {config.seed} {self.rank} {step} {row}")
            text = self.text.take(
                range(self.starts[row] + step * width, self.starts[row] + (step + 1) * width), mode="wrap"
            )
            kind = rng.random()
            if kind < config.needle_rows:
                ids[row], answers[row] = self._with_needles(text, rng)
            elif kind < config.needle_rows + config.repeat_rows:
                ids[row] = np.concatenate([text[: -(-width // 2)]] * 2)[:width]
            else:
                ids[row] = text
        return ids, answers[:, 1:]

    def _wording(self, rng):
        """One of the list, or a few words of the texts before the key and a few behind it."""
        if rng.random() < 0.9:
            return rng.choice(WORDINGS)
        pieces = []
        for least, most in ((2, 6), (1, 4)):
            tokens = rng.randint(least, most)
            start = rng.randrange(len(self.text) - tokens)
            pieces.append(" ".join(self.vocabulary.decode(self.text[start : start + tokens]).split()))
        first, second = pieces
        return f" {first}{rng.choice((' ', '-', ' no '))}KEY {second} ", rng.choice((".", ",", ";", "!", ")"))

    def _with_needles(self, text, rng):
        statements, room = [], len(text)
        alike = rng.random() < 0.25  # one wording for all of the row: only the key tells the statements apart
        before, after = self._wording(rng)
        for _ in range(self.config.needles):
            if not alike:
                before, after = self._wording(rng)
            key, value = draw(rng, KEY_CHARACTERS, 3, 5), draw(rng, string.digits, 4, 8)
            head = self.vocabulary.encode(before.replace("KEY", key))
            tail = self.vocabulary.encode(value + after)
            if room < 2 * len(head) + 2 * len(tail):
                break
            room -= 2 * len(head) + 2 * len(tail)
            statements.append((np.concatenate([head, tail]), slice(len(head), len(head) + len(value))))
        order = [*range(len(statements))] * 2
        rng.shuffle(order)
        cuts = sorted(rng.randrange(room + 1) for _ in order)
        pieces, marks, said, at = [], [], set(), 0
        for cut, number in zip(cuts, order):
            ids, digits = statements[number]
            mark = np.zeros(len(ids), bool)
            mark[digits] = number in said
            said.add(number)
            pieces += [text[at:cut], ids]
            marks += [np.zeros(cut - at, bool), mark]
            at = cut
        pieces.append(text[at:room])
        marks.append(np.zeros(room - at, bool))
        return np.concatenate(pieces), np.concatenate(marks)
