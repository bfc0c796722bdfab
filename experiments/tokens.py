"""Texts as token ids: a byte-level BPE in which every digit is a token of its own.

    words = vocabulary(["anarchism"], 1024)           # trained on the documents that `corpora.split` does not hold out
    training, test = corpora.split(encoded("anarchism", words))

Needs the package tokenizers.
"""

import hashlib
import json
import re
import string
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from experiments import corpora

EDITION = 1  # of the cached files: count up when the same text becomes other ids
DIGITS = list(string.digits)
SEPARATOR = "<doc>"
SEPARATORS = (SEPARATOR, "<s>", "<|begin_of_text|>", "<|endoftext|>", "</s>")  # the first that a vocabulary has
BATCH = 1 << 20  # characters encoded at a time: the encoder's own objects take far more memory than the ids


class Vocabulary:
    """Token 0 is "<doc>", which stands between documents: no text gives it, not even the text "<doc>".

    A text that ends before a digit, or with white space before one, can be continued by the ids of digits:
    encode(" is ") + encode("12") == encode(" is 12")."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokenizer.encode_special_tokens = True  # that is, as the characters they are written with

    @classmethod
    def train(cls, texts, size) -> "Vocabulary":
        """Of `size` tokens; fewer if the texts have no more to join."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if size < 1 + len(alphabet):
            raise ValueError(f"size: expected at least {1 + len(alphabet)}, <doc> and all bytes, got {size}")
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=[SEPARATOR], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path) -> "Vocabulary":
        """A file of `save`, or of another tokenizer (tokenizer.json), or "hf:OWNER/NAME" of the Hugging Face hub.

        Where other tokenizers put a blank before every text they no longer do, so that texts can be continued; their
        token 0 is their own, see `separator`."""
        path = str(path)
        if not path.startswith("hf:"):
            if not Path(path).is_file():
                raise FileNotFoundError(f"vocabulary: expected a file, found none at {path}")
            return cls(_without_first_blank(tokenizers.Tokenizer.from_file(path)))
        try:
            tokenizer = tokenizers.Tokenizer.from_pretrained(path[3:])
        except Exception as error:  # the hub's client raises many kinds
            raise RuntimeError(
                f"{path}: expected a tokenizer of the Hugging Face hub, got {type(error).__name__}: {error}. Is there a"
                " network, and does the model's owner ask for a log-in? Without a network: a tokenizer.json by its path"
            ) from error
        return cls(_without_first_blank(tokenizer))

    def save(self, path):
        with corpora.replacing(Path(path)) as file:
            file.write(self._json.encode())

    @property
    def _json(self):
        return self.tokenizer.to_str()

    @property
    def size(self) -> int:
        return self.tokenizer.get_vocab_size()

    @cached_property
    def digest(self) -> str:
        return hashlib.sha256(self._json.encode()).hexdigest()

    @cached_property
    def separator(self) -> int:
        """The id that stands between documents: 0, or what another tokenizer has for it."""
        for name in SEPARATORS:
            if (number := self.tokenizer.token_to_id(name)) is not None:
                return number
        raise ValueError(f"vocabulary: expected a token that separates documents, one of {', '.join(SEPARATORS)}")

    @cached_property
    def digits(self) -> list[int]:
        """The ids of "0" to "9"."""
        for text in ("0123456789", "9876543210 ", " 1000", "is 77."):
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            found = [self.tokenizer.id_to_token(number) for number in ids]
            if [token for token in found if token in DIGITS] != [
                character for character in text if character in DIGITS
            ]:
                raise ValueError(f"vocabulary: expected a token for each digit of {text!r}, got {found}")
        return [self.tokenizer.token_to_id(digit) for digit in DIGITS]

    def encode(self, text) -> np.ndarray:
        """(T,) int32"""
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_all(self, texts) -> list[np.ndarray]:
        texts, arrays = list(texts), []
        batch, characters = [], 0
        for number, text in enumerate(texts):
            batch.append(text)
            characters += len(text)
            if characters >= BATCH or number == len(texts) - 1:
                encodings = self.tokenizer.encode_batch_fast(batch, add_special_tokens=False)
                arrays += [np.array(encoding.ids, np.int32) for encoding in encodings]
                batch, characters = [], 0
        return arrays

    def decode(self, ids) -> str:
        return self.tokenizer.decode([int(number) for number in ids], skip_special_tokens=False)


def _without_first_blank(tokenizer):
    """The same tokens, but " a" for the text " a" and "a" for "a": many tokenizers write both as " a"."""
    state = json.loads(tokenizer.to_str())
    before = json.dumps(state)

    def parts(name, key):
        step = state.get(name) or {}
        return step[key] if step.get("type") == "Sequence" else [step]

    for step in parts("pre_tokenizer", "pretokenizers") + parts("decoder", "decoders"):
        if step.get("type") == "Metaspace":
            step["prepend_scheme"] = "never"
    for name, key, kind in (("normalizer", "normalizers", "Prepend"), ("decoder", "decoders", "Strip")):
        step = state.get(name) or {}
        if step.get("type") == kind:
            state[name] = None
        elif step.get("type") == "Sequence":
            step[key] = [part for part in step[key] if part["type"] != kind]
    return tokenizer if json.dumps(state) == before else tokenizers.Tokenizer.from_str(json.dumps(state))


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:20]


def file_name(corpus_name) -> str:
    name = corpus_name if isinstance(corpus_name, str) else ",".join(map(str, corpus_name))
    return re.sub(r"[^\w.-]+", "_", name)[:60]


def encoded(corpus_name, vocabulary, cache=None, accept_other_versions=False) -> list[np.ndarray]:
    """The ids of each document of the corpus, (T,) int32; from the cache if they are of these texts and tokens."""
    texts = corpora.documents(corpus_name, cache, accept_other_versions)
    digest = _digest(vocabulary.digest, *texts)
    path = corpora.cache_folder(cache) / "tokens" / f"{file_name(corpus_name)}_{digest}_{EDITION}.npz"
    if not path.exists():
        arrays = vocabulary.encode_all(texts)
        with corpora.replacing(path) as file:
            np.savez(file, ids=np.concatenate(arrays), lengths=np.array([len(ids) for ids in arrays]))
    with np.load(path) as saved:
        return np.split(saved["ids"], np.cumsum(saved["lengths"])[:-1])


def vocabulary(corpus_names, size, cache=None, accept_other_versions=False) -> Vocabulary:
    """Trained on the training part of these corpora, as `corpora.split` gives it without options; from the cache if it
    is of these texts. Held-out documents shape no token."""
    corpus_names = [corpus_names] if isinstance(corpus_names, str) else list(corpus_names)
    parts = [corpora.split(corpora.documents(name, cache, accept_other_versions))[0] for name in corpus_names]
    texts = [text for part in parts for text in part]
    names = "+".join(map(file_name, corpus_names))[:60]
    path = corpora.cache_folder(cache) / "vocabularies" / f"{names}_{size}_{_digest(*texts)}_{EDITION}.json"
    if not path.exists():
        Vocabulary.train(texts, size).save(path)
    return Vocabulary.load(path)
