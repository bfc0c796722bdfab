"""experiments/: the small model, its rows and needles, training, and what is asked of a trained run.

One tiny run is trained for all tests, on a text made here: nothing is fetched, and no network is needed."""

import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import socket
import string
import sys
import traceback
from itertools import accumulate, chain, count, pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed

import fwpkm_cuda
from fwpkm_cuda import Memories

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "experiments").is_dir():
    pytest.skip("the tests run away from the source tree", allow_module_level=True)
pytest.importorskip("tokenizers")
pytest.importorskip("matplotlib")
sys.path.insert(0, str(ROOT))

from experiments import (  # noqa: E402
    backbone,
    configurations,
    continual,
    corpora,
    gates,
    needles,
    niah,
    paper,
    perplexity,
    report,
    tiny,
    tokens,
    trace,
    training,
)
from experiments.__main__ import main  # noqa: E402
from experiments.config import Config  # noqa: E402

SIZES = dict(key_dim=16, value_dim=16, num_sub_keys=8, topk=4, chunk_size=16, score="idw", write_rule="release")
TINY = Config(
    layers=3, hidden=32, heads=2, mlp=48, window=8, fwpkm=(0, 2), fwpkm_options=SIZES, vocabulary=400, length=128,
    fwmlp_options=dict(key_dim=16, value_dim=16, hidden_units=24, chunk_size=16),
    pkm_options=dict(key_dim=16, value_dim=16, num_sub_keys=8, heads=1, topk=4, query_bias=False),
    batch=4, needles=2, steps=30, lr=1e-2, final_lr=1e-3, warm_up=4, log_every=5, save_every=10,
)  # fmt: skip
STATED = " ".join(before + after for before, after in (*needles.WORDINGS, needles.TEST)).replace("KEY", " ")
MADE = "mato rilu teng opal sive bront kel undra fos hilm atice por wenda lus girt".split()
QUIET = dict(report=lambda line: None)


@pytest.fixture(scope="module", autouse=True)
def alone(tmp_path_factory):
    """No test sees the caches of the machine. One thread: work this small is slower when it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FWPKM_EXPERIMENTS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


def write_corpus(folder, documents, seed=0):
    """Sentences of made words and of the words that statements are made of; no digits."""
    draw = random.Random(seed)
    words = MADE * 3 + re.findall(r"[A-Za-z]+", STATED)
    for number in range(documents):
        sentences = (" ".join(draw.choices(words, k=draw.randint(4, 12))).capitalize() for _ in range(90))
        (folder / f"{number}.txt").write_text(". ".join(sentences) + ".")
    return f"files:{folder}"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=13)


@pytest.fixture(scope="module")
def config(corpus):
    return TINY.changed(corpora=(corpus,))


@pytest.fixture(scope="module")
def run_folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    training.train(config, folder, **QUIET)
    return folder


@pytest.fixture
def run(run_folder):
    return training.Trained(run_folder)


@pytest.fixture(scope="module")
def vocabulary(config):
    return training.vocabulary_of(config)


@pytest.fixture(scope="module")
def documents(config, vocabulary):
    """All of the corpus, as ids."""
    return tokens.encoded(config.corpora[0], vocabulary)


def bits(memories):
    """Copies of all tensors of memories."""
    return [t.detach().clone() for m in memories.values() for t in m.tensors.values()]


def same(a, b):
    return len(a) == len(b) and all(map(torch.equal, a, b))


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


# ------------------------------------------------------------------------------------------------------ configuration
def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = TINY.changed(corpora=("a", "b"), vocabulary="hf:a/b", betas=(0.8, 0.9), fwpkm_options=dict(gate="none"))
    config.save(tmp_path / "config.json")
    assert Config.load(tmp_path / "config.json") == config


def test_whole_numbers_are_numbers():
    assert Config(lr=1) == Config(lr=1.0) and type(Config(lr=1).lr) is float


def test_changed_options_leave_the_others_and_the_original_alone():
    changed = TINY.changed(steps=7, fwpkm_options=dict(topk=2))
    assert changed.fwpkm_options == SIZES | dict(topk=2) and changed.steps == 7 and changed.hidden == TINY.hidden
    assert TINY.fwpkm_options == SIZES and TINY.steps == 30


def test_no_setting_has_an_unknown_name(tmp_path):
    (tmp_path / "config.json").write_text('{"steps": 3, "stops": 4, "laters": 2}')
    with pytest.raises(ValueError, match=r"config\.json: no settings of a run: laters, stops"):
        Config.load(tmp_path / "config.json")
    for make in (Config, TINY.changed):
        with pytest.raises(TypeError, match="stops"):
            make(stops=4)


@pytest.mark.parametrize(
    "setting",
    [
        dict(steps=1.5), dict(steps="3"), dict(steps=True), dict(steps=None), dict(compile=1), dict(precision=32),
        dict(lr="high"), dict(fwpkm_options=[]), dict(vocabulary=1.0), dict(fwpkm=2), dict(fwpkm=("2",)),
        dict(fwpkm=(0.5,)), dict(corpora="anarchism"), dict(corpora=(1,)), dict(betas=("a", "b")),
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_of_another_type_is_refused(setting):
    with pytest.raises((ValueError, TypeError)):
        Config(**setting)


@pytest.mark.parametrize("layers", [dict(fwpkm=(4,)), dict(fwmlp=(-1,), fwpkm=()), dict(pkm=(9,)), dict(fwmlp=(2,))])
def test_memories_stand_in_layers_that_are_there_and_alone(layers):
    with pytest.raises(ValueError, match="expected layers below 4, one fast memory each"):
        Config(**layers)


def test_every_configuration_comes_back_from_its_file_and_is_there_once(tmp_path):
    named = configurations.ALL | configurations.PAPERS
    for name, config in named.items():
        config.save(tmp_path / "config.json")
        assert Config.load(tmp_path / "config.json") == config
        assert [other for other in named if named[other] == config] == [name]


@pytest.mark.parametrize("name", configurations.ALL, ids="of {}".format)  # "full" alone is a mark of conftest.py
def test_every_small_configuration_has_a_model_that_learns(name):
    config = configurations.ALL[name]
    model = backbone.language_model(config, 50)
    memories, ids = Memories.of(model, values="zeros", seed=0), torch.randint(50, (1, 140))
    assert len(memories) == len(config.fwpkm) + len(config.fwmlp)
    logits = model(ids, memories, restricted=config.restricted > 0)
    F.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
    assert logits.shape == (1, 140, 50)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_layout_that_is_not_says_so():
    with pytest.raises(ValueError, match="layout: expected 'window' or 'full' for the small backbone, got 'gdn'"):
        backbone.language_model(TINY.changed(layout="gdn"), 50)


# ---------------------------------------------------------------------------------------------------------- attention
def dense_attention(query, key, value, window=None):
    T, N = query.shape[2], key.shape[2]
    back = torch.arange(N - T, N)[:, None] - torch.arange(N)
    seen = (back >= 0) & (back < (N if window is None else window))
    scores = query @ key.mT / query.shape[-1] ** 0.5
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ value


ATTENDED = [
    *[(T, T, window) for T in (1, 5, 8, 9, 16, 23) for window in (None, 1, 4, 8, 30)],
    *[(T, 9, window) for T in (1, 2, 5, 8) for window in (None, 1, 4, 8, 9, 30)],
]


@pytest.mark.parametrize(("T", "N", "window"), ATTENDED)
def test_attention_is_dense_masked_attention(T, N, window):
    leaves = [torch.randn(2, 3, n, 4, dtype=torch.float64, requires_grad=True) for n in (T, N, N)]
    found, expected = backbone.attend(*leaves, window), dense_attention(*leaves, window)
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(y.sin().sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [1, 3, 8])
def test_a_token_sees_its_window_and_nothing_else(window):
    T = 20
    query, key, value = (torch.randn(1, 1, T, 4) for _ in range(3))
    before = backbone.attend(query, key, value, window)
    for x in range(T):
        changed = value.index_add(2, torch.tensor([x]), torch.ones(1, 1, 1, 4))
        differs = (backbone.attend(query, key, changed, window) != before).any(-1)[0, 0].nonzero().flatten().tolist()
        assert differs == [*range(x, min(x + window, T))]


def test_rotations_turn_pairs_by_their_position():
    cos, sin = backbone.rotations(5, 3, 8, "cpu")
    assert all(map(torch.equal, (cos, sin), (x[5:] for x in backbone.rotations(0, 8, 8, "cpu"))))
    x = torch.randn(2, 3, 4, 8)
    turned = backbone.rotate(x, (cos, sin))
    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.complex(cos, sin)[:, None]
    torch.testing.assert_close(turned, torch.cat([as_complex.real, as_complex.imag], -1))
    angles = torch.arange(5, 8.0)[:, None] * 10000 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(cos, angles.cos())


def test_rotated_products_depend_on_the_distance_alone():
    query, key = torch.randn(2, 1, 1, 8)
    turn = lambda x, at: backbone.rotate(x[None], backbone.rotations(at, 1, 8, "cpu"))
    near, far = ((turn(query, at) * turn(key, at + 3)).sum() for at in (0, 70))
    torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------- the model, in one pass
WORDS = 50
CARRY = dict(fwpkm_options=dict(boundary="carry"))
MEMORIES = {
    "none": dict(fwpkm=()),
    "fwpkm": dict(),
    "carry": CARRY,
    "lookahead0": dict(fwpkm_options=dict(lookahead=0)),
    "dot-paper": dict(fwpkm_options=dict(score="dot", write_rule="paper")),
    "fwmlp": dict(fwpkm=(), fwmlp=(1,)),
    "pkm": dict(pkm=(0, 1)),
}
SHORT = dict(chunk_size=4)
KINDS = pytest.mark.parametrize("kind", MEMORIES)
LAYOUTS = pytest.mark.parametrize("layout", ["window", "full"])


def small_model(kind="fwpkm", **changes):
    """With weights of a size that lets every part of it be seen, and chunks of 4 tokens."""
    config = TINY.changed(fwpkm_options=SHORT, fwmlp_options=SHORT, window=6).changed(**MEMORIES[kind])
    model = backbone.language_model(config.changed(**changes), WORDS)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def filled_memories(model):
    """The same every time."""
    return Memories.of(model, seed=3)


def some_ids(T=23, B=2):
    return torch.randint(WORDS, (B, T), generator=torch.Generator().manual_seed(1))


READ = {
    "scan": lambda model, ids: model(ids, filled_memories(model)),
    "stream": lambda model, ids: model(ids, filled_memories(model).streaming()),
    "stream of one write": lambda model, ids: model(ids, filled_memories(model).streaming(chunk_size="all")),
    "frozen": lambda model, ids: model(ids, filled_memories(model).frozen()),
    "pieces": lambda model, ids: in_pieces(model, ids, filled_memories(model).streaming(), (5, 1, 8, 3)),
}


def in_pieces(model, ids, memories, sizes, **options):
    cache = model.new_cache()
    return torch.cat([model(part, memories, cache=cache, **options) for part in ids.split(sizes, 1)], 1)


@torch.no_grad()
def seen_too_early(model, read):
    """The places whose change is seen before them; the logits of the place itself must change."""
    ids, found = some_ids(T=17), []
    before = read(model, ids)
    for j in range(ids.shape[1]):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % WORDS
        after = read(model, changed)
        assert (after[:, j] != before[:, j]).any()
        found += [] if torch.equal(after[:, :j], before[:, :j]) else [j]
    return found


@KINDS
@pytest.mark.parametrize(
    ("read", "layout"), [*((read, "window") for read in READ), ("scan", "full"), ("pieces", "full")]
)
def test_no_token_is_seen_before_its_place(read, kind, layout):
    assert seen_too_early(small_model(kind, layout=layout), READ[read]) == []


def leak_of_values(monkeypatch):
    """The target of token x, the value of token x + 1, is there at token x."""
    project = fwpkm_cuda.FwPKM.project

    def leaks(self, hidden):
        projected = project(self, hidden)
        return projected._replace(value=projected.value.roll(-1, 1))

    monkeypatch.setattr(fwpkm_cuda.FwPKM, "project", leaks)


def leak_of_writes(monkeypatch):
    """What a text has written is there when it is read."""
    streaming = Memories.streaming
    monkeypatch.setattr(Memories, "streaming", lambda self: streaming(self, read_passes=2, flush=True))


def leak_of_attention(monkeypatch):
    monkeypatch.setattr(backbone, "attend", lambda q, k, v, window: F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("leak", [leak_of_values, leak_of_writes, leak_of_attention])
def test_a_leak_that_is_planted_is_found(leak, monkeypatch):
    model = small_model()
    leak(monkeypatch)
    assert len(seen_too_early(model, READ["stream"])) > 10


@torch.no_grad()
def test_what_is_beyond_reach_without_a_memory():
    model = small_model("none", layers=2, window=4, convolution=3)
    reach = niah.reach(TINY.changed(fwpkm=(), layers=2, window=4, convolution=3))
    assert reach == 10
    ids = some_ids(T=20)
    before = model(ids, {}, last_only=True)
    for back in range(20):
        changed = ids.clone()
        changed[:, -1 - back] = (changed[:, -1 - back] + 1) % WORDS
        assert torch.equal(model(changed, {}, last_only=True), before) == (back > reach)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["none", "fwpkm", "fwmlp"])
def test_restricted_full_attention_is_window_attention(kind):
    full, window = (small_model(kind, layout=layout) for layout in ("full", "window"))
    window.load_state_dict(full.state_dict())
    ids, read = some_ids(), lambda model, **options: model(some_ids(), filled_memories(model), **options)
    assert torch.equal(read(full, restricted=True), read(window))
    assert torch.equal(read(window, restricted=True), read(window))
    assert not torch.equal(read(full), read(window))
    pieces = [in_pieces(m, ids, filled_memories(m), (9, 1, 13), restricted=m is full) for m in (full, window)]
    assert torch.equal(*pieces)


@torch.no_grad()
def test_details_have_the_names_of_the_memories():
    model, details = small_model(), {}
    memories = filled_memories(model)
    model(some_ids(), memories, details=details)
    assert details.keys() == memories.keys() == {"layers.0.memory", "layers.2.memory"}
    assert all(own.indices.shape == (2, 23, 1, 4) for own in details.values())


# ------------------------------------------------------------------------------------------------ the model, in pieces
PIECES = {"words": (1,) * 23, "mixed": (3, 7, 1, 1, 11), "windows": (6, 6, 6, 5), "prompt": (20, 1, 1, 1)}


@torch.no_grad()
@pytest.mark.parametrize("writes", [False, True], ids=["frozen", "writing"])
@LAYOUTS
@KINDS
def test_a_text_in_pieces_is_read_as_in_one(kind, layout, writes):
    model, ids = small_model(kind, layout=layout), some_ids()
    fresh = lambda: (lambda memories: memories if writes else memories.frozen())(filled_memories(model))
    whole_memories = fresh()
    whole = model(ids, whole_memories.streaming())
    for sizes in PIECES.values():
        memories = fresh()
        pieces = in_pieces(model, ids, memories.streaming(), sizes)
        torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
        torch.testing.assert_close(bits(memories), bits(whole_memories), rtol=0, atol=1e-5)
    last = model(ids, fresh().streaming(), cache=model.new_cache(), last_only=True)
    torch.testing.assert_close(last, whole[:, -1:])


@torch.no_grad()
def test_a_new_cache_knows_nothing_of_another():
    model, ids = small_model("none"), some_ids()
    first, second = model.new_cache(), model.new_cache()
    before = model(ids[:, :9], {}, cache=first)
    assert (first.position, second.position) == (9, 0)
    assert torch.equal(model(ids[:, :9], {}, cache=second), before)
    assert not torch.equal(model(ids[:, :9], {}, cache=first), before)
    assert (first.position, second.position) == (18, 9)


@torch.no_grad()
def test_the_cache_of_a_window_stays_small():
    model, cache = small_model("none"), None
    cache = model.new_cache()
    for part in some_ids(60).split(7, 1):
        model(part, {}, cache=cache)
    assert all(state["key"].shape[2] == model.layers[0].window - 1 for state in cache.layers)


# ------------------------------------------------------------------------------------------------------------ haystack
def hay_of(documents, vocabulary, length=300, seed=0, **options):
    return needles.haystack(documents, vocabulary, length, random.Random(seed), **options)


def statements_of(hay, vocabulary):
    before, after = needles.TEST
    texts = [f"{before.replace('KEY', key)}{value}{after}" for key, value in zip(hay.keys, hay.values)]
    return texts, [vocabulary.encode(text) for text in texts]


def without_needles(hay, vocabulary):
    """-> the text that the needles were put into, and the place of each needle in it"""
    lengths = [len(ids) for ids in statements_of(hay, vocabulary)[1]]
    own = np.ones(len(hay.ids), bool)
    for place, length in zip(hay.places, lengths):
        own[place : place + length] = False
    return hay.ids[own], [int(own[:place].sum()) for place in hay.places]


def stands_in(part, document):
    return part.astype(np.int32).tobytes() in document.astype(np.int32).tobytes()  # enough: no two ids share bytes


@pytest.mark.parametrize("seed", range(5))
def test_a_haystack_has_each_statement_once(documents, vocabulary, seed):
    hay = hay_of(documents, vocabulary, seed=seed)
    texts, ids = statements_of(hay, vocabulary)
    whole = vocabulary.decode(hay.ids)
    assert len(hay.ids) == 300 and hay.ids.dtype == np.int32
    assert [whole.count(text) for text in texts] == [1] * 5 and len(re.findall(r"\d{6}", whole)) == 5
    for place, own in zip(hay.places, ids):
        assert np.array_equal(hay.ids[place : place + len(own)], own)
    assert vocabulary.decode(hay.question) == f" The secret number for ID-{hay.keys[0]} is "
    assert len({*hay.keys}) == len({*hay.values}) == 5


@pytest.mark.parametrize("seed", range(5))
def test_needles_stand_between_words_of_one_text(documents, vocabulary, seed):
    hay = hay_of(documents, vocabulary, seed=seed)
    text, depths = without_needles(hay, vocabulary)
    assert any(stands_in(text, document) for document in documents)
    assert all(vocabulary.decode(text[depth:])[:1].isspace() for depth in depths)
    assert all(0 < depth < len(text) for depth in depths)


def distance_from_uniform(shares):
    """Kolmogorov and Smirnov's: the largest difference between the share of numbers below x, and x."""
    ordered, n = np.sort(shares), len(shares)
    return max((np.arange(1, n + 1) / n - ordered).max(), (ordered - np.arange(n) / n).max())


def test_needles_stand_everywhere_alike(documents, vocabulary):
    asked, others = [], []
    for seed in range(400):
        text, depths = without_needles(hay := hay_of(documents, vocabulary, seed=seed, needles=3), vocabulary)
        asked.append(depths[0] / len(text))
        others += [depth / len(text) for depth in depths[1:]]
    assert len(hay.ids) == 300
    one_in_1000 = 1.95
    assert distance_from_uniform(asked) < one_in_1000 / 400**0.5
    assert distance_from_uniform(others) < one_in_1000 / 800**0.5
    assert distance_from_uniform(np.sqrt(asked)) > 2 * one_in_1000 / 400**0.5  # a quarter too few in the first half


def test_a_haystack_is_that_of_its_random_numbers(documents, vocabulary):
    one, again, other = (hay_of(documents, vocabulary, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(one.ids, again.ids) and one[2:] == again[2:]
    assert not np.array_equal(one.ids, other.ids) and one.keys != other.keys


@pytest.mark.parametrize("seed", range(5))
def test_the_control_asks_for_a_key_that_stands_nowhere(documents, vocabulary, seed):
    hay, answerable = (hay_of(documents, vocabulary, seed=seed, answerable=a) for a in (False, True))
    before, _ = needles.TEST
    (key,) = re.fullmatch(before.replace("KEY", "(....)"), vocabulary.decode(hay.question)).groups()
    assert key not in vocabulary.decode(hay.ids) and key not in hay.keys
    assert np.array_equal(hay.ids, answerable.ids)


def test_a_long_haystack_is_of_all_documents(documents, vocabulary):
    short = [ids[:200] for ids in documents]
    text, _ = without_needles(hay_of(short, vocabulary, length=700), vocabulary)
    assert stands_in(text, np.concatenate(short)) and not any(stands_in(text, document) for document in documents)


def test_a_haystack_has_to_fit(documents, vocabulary):
    whole = sum(map(len, documents))
    assert len(hay_of(documents, vocabulary, length=whole).ids) == whole
    with pytest.raises(ValueError, match=f"length: expected at most {whole}, all held-out tokens, got {whole + 1}"):
        hay_of(documents, vocabulary, length=whole + 1)
    with pytest.raises(ValueError, match="length: expected more than 100 tokens for 9 needles"):
        hay_of(documents, vocabulary, length=100, needles=9)


# ---------------------------------------------------------------------------------------------------- rows to train on
NEEDLES = dict(needle_rows=1.0, repeat_rows=0.0)
REPEATS = dict(needle_rows=0.0, repeat_rows=1.0)
TEXT = dict(needle_rows=0.0, repeat_rows=0.0)


@pytest.fixture
def rows(documents, vocabulary, config):
    return lambda rank=0, processes=1, **changes: needles.Rows(
        documents, vocabulary, config.changed(**changes), rank, processes
    )


def test_rows_have_their_shapes(rows):
    ids, answers = rows().batch(0)
    assert ids.shape == (4, 129) and ids.dtype == np.int64
    assert answers.shape == (4, 128) and answers.dtype == bool


@pytest.fixture
def keys_of_letters(monkeypatch):
    """So that a row can be read: the text itself has neither digits nor three capital letters in a row."""
    monkeypatch.setattr(needles, "KEY_CHARACTERS", string.ascii_uppercase)


def stated(ids, vocabulary):
    """[(key, number, first token of the number)] of the statements in a row, as they come."""
    text = vocabulary.decode(ids)
    ends = [*accumulate(len(vocabulary.decode([token])) for token in ids)]
    assert ends[-1] == len(text)
    return [
        (re.findall("[A-Z]{3,}", text[: number.start()])[-1], number[0], ends.index(number.start()) + 1)
        for number in re.finditer(r"\d+", text)
    ]


def needle_rows(rows, vocabulary, steps, **changes):
    """(ids, answers, statements) of each row"""
    for batch in map(rows(**NEEDLES | changes).batch, range(steps)):
        yield from ((ids, answers, stated(ids, vocabulary)) for ids, answers in zip(*batch))


def test_digits_of_what_has_been_said_before_are_marked_and_nothing_else(rows, vocabulary, keys_of_letters):
    for ids, answers, found in needle_rows(rows, vocabulary, steps=20):
        said, expected = set(), np.zeros(129, bool)
        for key, number, at in found:
            expected[at : at + len(number)] = (key, number) in said
            said.add((key, number))
        assert len(found) == 2 * len(said) and len(said) in (1, 2)
        assert np.array_equal(answers, expected[1:])
        assert np.isin(ids[1:][answers], vocabulary.digits).all() and answers.sum() >= 4


def test_rows_have_as_many_needles_as_have_room(rows, vocabulary, keys_of_letters):
    numbers = [len(found) for *_, found in needle_rows(rows, vocabulary, steps=20, length=300)]
    assert numbers == [4] * 80
    numbers = [len(found) for *_, found in needle_rows(rows, vocabulary, steps=20, needles=99)]
    assert min(numbers) >= 2 and max(numbers) >= 6 and not any(n % 2 for n in numbers)
    assert {len(found) for *_, found in needle_rows(rows, vocabulary, steps=2, length=12)} == {0}


def test_some_rows_have_one_wording_and_some_wordings_are_not_of_the_list(rows, vocabulary, keys_of_letters):
    sides = re.compile(r"(.{3})[A-Z]{3,5}(.*?)\d+(.)", re.DOTALL)
    alike, listed = [], []
    for ids, _, found in needle_rows(rows, vocabulary, steps=50, length=300):
        text = vocabulary.decode(ids)
        alike.append(len({*sides.findall(text)}) == 1)
        for key, number, _ in {found[0], found[1]}:
            listed.append(any(f"{b.replace('KEY', key)}{number}{a}" in text for b, a in needles.WORDINGS))
    assert 0.05 < np.mean(alike) < 0.95 and 0.05 < 1 - np.mean(listed) < 0.95


def test_every_wording_of_the_list_is_used_and_never_that_of_the_test(rows, vocabulary, keys_of_letters):
    whole = "".join(vocabulary.decode(ids) for ids, *_ in needle_rows(rows, vocabulary, steps=60))
    for before, after in needles.WORDINGS:
        assert re.search(re.escape(before).replace("KEY", "[A-Z]{3,5}") + r"\d{4,8}" + re.escape(after), whole), before
    assert "for ID-" not in whole and needles.TEST not in needles.WORDINGS


@pytest.mark.parametrize("length", [127, 128])
def test_repeated_rows_say_their_passage_twice(rows, length):
    ids, answers = rows(**REPEATS, length=length).batch(3)
    half = -(-(length + 1) // 2)
    assert np.array_equal(ids[:, half:], ids[:, : length + 1 - half]) and not answers.any()
    assert np.array_equal(ids[:, :half], rows(**TEXT, length=length).batch(3)[0][:, :half])


def test_rows_of_text_go_on_from_step_to_step(rows, documents, vocabulary):
    batches = [rows(**TEXT).batch(step) for step in range(40)]
    assert not any(answers.any() for _, answers in batches)
    made = rows(**TEXT)
    assert len(made.text) == sum(len(ids) + 1 for ids in documents) and set(map(len, documents)) <= {
        *np.diff(np.flatnonzero(made.text == vocabulary.separator), prepend=-1) - 1
    }
    endless = np.concatenate([made.text] * 3)
    for row in range(4):
        text = np.concatenate([ids[row] for ids, _ in batches])
        assert np.array_equal(text, endless[made.starts[row] :][: len(text)])


def test_all_rows_of_all_processes_begin_in_places_of_their_own(rows):
    made = [rows(rank, 3) for rank in range(3)]
    starts = [start for one in made for start in one.starts]
    assert [start * 12 // len(made[0].text) for start in starts] == [*range(12)]


def test_kinds_of_rows_have_their_shares(rows):
    counts = dict(needles=0, repeats=0, text=0)
    made = rows(needle_rows=0.5, repeat_rows=0.3)
    for ids, answers in map(made.batch, range(150)):
        for row, own in zip(ids, answers):
            repeats = np.array_equal(row[65:], row[:64])
            counts["needles" if own.any() else "repeats" if repeats else "text"] += 1
    for kind, share in dict(needles=0.5, repeats=0.3, text=0.2).items():
        assert abs(counts[kind] / 600 - share) < 3.3 * (share * (1 - share) / 600) ** 0.5


def test_a_batch_is_that_of_its_seed_rank_and_step(rows):
    batch = lambda step=5, **options: rows(**NEEDLES, **options).batch(step)
    used = rows(**NEEDLES)
    for step in range(5):
        used.batch(step)
    assert all(map(np.array_equal, used.batch(5), batch()))
    for other in (batch(step=6), batch(seed=1), batch(rank=1, processes=2)):
        assert all((a != b).any() for a, b in zip(other[0], batch()[0]))


def test_rows_have_to_fit(rows):
    with pytest.raises(ValueError, match=r"length: expected less than \d+, all tokens of the corpora"):
        rows(length=10**6)


# ------------------------------------------------------------------------------------------------------------ training
def new_run(config, folder):
    folder.mkdir(parents=True, exist_ok=True)
    return training.Run(config, folder)


def trained_run(config, folder):
    run = new_run(config, folder)
    run.train(**QUIET)
    return run


def stopped_run(config, folder, step):
    """That is interrupted before this step."""
    run = new_run(config, folder)
    train_step = run.train_step

    def next_step():
        if run.step == step:
            raise KeyboardInterrupt
        return train_step()

    run.train_step = next_step
    with pytest.raises(KeyboardInterrupt):
        run.train(**QUIET)


RESULTS = ("model.safetensors", "memories.safetensors")


def assert_same_run(folder, expected, *more_memories):
    assert (folder / "model.safetensors").read_bytes() == (expected / "model.safetensors").read_bytes()
    for name in ("memories.safetensors", *more_memories):
        ours, theirs = (Memories.load(f / name) for f in (folder, expected))
        assert ours.keys() == theirs.keys() and same(bits(ours), bits(theirs)), name
        assert [m.seed for m in ours.values()] == [m.seed for m in theirs.values()]
    assert log_of(folder) == log_of(expected)


def test_a_run_learns_and_leaves_what_it_promises(run_folder):
    log = log_of(run_folder)
    assert log[-1]["loss"] < log[0]["loss"] - 0.5
    assert [line["step"] for line in log] == [5, 10, 15, 20, 25, 30]
    assert {path.name for path in run_folder.iterdir()} >= {"config.json", "log.jsonl", "run.json", *RESULTS}
    assert not (run_folder / "checkpoint").exists()
    facts = json.loads((run_folder / "run.json").read_text())
    assert facts["steps"] == 30 and facts["processes"] == 1 and facts["torch"] == torch.__version__
    for memory in log[-1]["memories"].values():
        assert 0 < memory["gate"] < 1 and 0 < memory["gradient"] and 0 < memory["usage"]["coverage"] <= 1
        assert sum(memory["gates"]) == pytest.approx(1, abs=1e-3)


def test_the_rate_warms_up_and_falls():
    config = TINY.changed(steps=100, lr=1.0, final_lr=0.1, warm_up=10)
    rates = [training.learning_rate(config, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == pytest.approx(1, abs=0.03)
    assert all(a > b for a, b in pairwise(rates[10:])) and rates[-1] == pytest.approx(0.1, abs=1e-3)
    assert rates[50] == pytest.approx(0.55)


def test_no_more_of_a_corpus_is_read_than_asked_for(config, documents, tmp_path):
    reads = lambda most: new_run(config.changed(corpus_tokens=most), tmp_path).rows.text
    training_documents = corpora.split(documents)[0]
    assert len(reads(0)) == sum(len(ids) + 1 for ids in training_documents)
    read, first = reads(len(training_documents[0]) + 100), training_documents[0]
    assert len(read) == len(first) + 100 + 2 and stands_in(first, read)


def test_what_is_drawn_for_a_step_has_its_share_and_is_drawn_again():
    draw = lambda what, seed=0, share=0.3: [
        training.drawn(TINY.changed(seed=seed), what, step, share) for step in range(2000)
    ]
    assert abs(np.mean(draw("forget")) - 0.3) < 3.3 * (0.21 / 2000) ** 0.5
    assert draw("forget") == draw("forget") and not any(draw("forget", share=0.0)) and all(draw("forget", share=1.0))
    for other in (draw("restricted"), draw("forget", seed=1)):
        assert abs(np.mean(np.array(other) & np.array(draw("forget"))) - 0.09) < 0.025  # as if independent


def test_vectors_and_tables_of_keys_do_not_decay():
    model = small_model(pkm=(1,), fwmlp=(1,))
    decays, stays = training.optimizer(model, TINY).param_groups
    assert decays["weight_decay"] == TINY.weight_decay and stays["weight_decay"] == 0
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = [{names[id(p)].split(".")[-1] for p in group["params"]} for group in (decays, stays)]
    assert kinds[0] == {"weight"} and kinds[1] == {"weight", "bias", "values", "sub_keys"}
    assert len(decays["params"]) + len(stays["params"]) == len(names)
    assert all(p.dim() == 2 for p in decays["params"])


ALL_KINDS = dict(fwpkm=(0,), fwmlp=(2,), pkm=(1,), restricted=0.5, layout="full", steps=9, save_every=4, log_every=2)
ALL_KINDS |= dict(accumulation=2, length=96, batch=1)


@pytest.fixture(scope="module")
def mixed(config):
    """Every kind of memory, and steps with restricted attention."""
    return config.changed(**ALL_KINDS)


@pytest.fixture(scope="module")
def whole_run(mixed, tmp_path_factory):
    return trained_run(mixed, tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("stops", [(3,), (4,), (7,), (5, 8)], ids=str)
def test_a_run_that_was_stopped_goes_on_with_the_same_bits(mixed, whole_run, tmp_path, stops):
    for step in stops:
        stopped_run(mixed, tmp_path, step)
    assert (tmp_path / "checkpoint").exists() == (stops[-1] >= 4) and not (tmp_path / "run.json").exists()
    run = trained_run(mixed, tmp_path)
    assert_same_run(tmp_path, whole_run.folder)
    ours, theirs = (r.optimizer.state_dict()["state"] for r in (run, whole_run))
    assert ours.keys() == theirs.keys()
    assert all(same([*ours[i].values()], [*theirs[i].values()]) for i in ours)


def test_a_log_has_the_same_lines_after_a_stop_between_two_of_them(mixed, tmp_path):
    config = mixed.changed(log_every=3, steps=6)  # and a checkpoint after 4
    trained_run(config, tmp_path / "whole")
    stopped_run(config, tmp_path / "stopped", 5)
    trained_run(config, tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_half_a_checkpoint_is_not_used(mixed, whole_run, tmp_path, monkeypatch):
    def interrupt(state, file):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    stopped_run(mixed, tmp_path, 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.torch, "save", interrupt)
        trained_run(mixed, tmp_path)  # to the checkpoint after 8
    assert (tmp_path / "checkpoint.new" / "training.pt").exists()
    run = new_run(mixed, tmp_path)
    assert run.step == 4
    run.train(**QUIET)
    assert_same_run(tmp_path, whole_run.folder)


def test_there_is_a_checkpoint_at_every_moment(mixed, tmp_path, monkeypatch):
    rename = Path.rename

    def interrupt(path, target):
        if path.name == "checkpoint.new":
            raise KeyboardInterrupt
        return rename(path, target)

    stopped_run(mixed, tmp_path, 5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", interrupt)
        trained_run(mixed, tmp_path)  # to the checkpoint after 8
    assert new_run(mixed, tmp_path).step in (4, 8)


def test_a_finished_run_is_left_alone(config, run_folder, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in run_folder.iterdir()}
    monkeypatch.setattr(training, "Run", None)
    training.train(config, run_folder)
    assert {path: path.stat().st_mtime_ns for path in run_folder.iterdir()} == before


def test_another_configuration_does_not_go_on_with_a_run(config, run_folder):
    with pytest.raises(ValueError, match="a run with another configuration is there"):
        training.train(config.changed(seed=1), run_folder)
    assert Config.load(run_folder / "config.json") == config


def test_a_run_whose_time_is_up_can_be_asked_and_goes_on(mixed, whole_run, tmp_path, monkeypatch):
    for seconds in (0, 4):
        with monkeypatch.context() as patch:
            patch.setattr(training, "time", SimpleNamespace(monotonic=count().__next__))  # a second at every look
            training.train(mixed, tmp_path, seconds=seconds, **QUIET)
        run = training.Trained(tmp_path)
        assert run.facts["steps"] == new_run(mixed, tmp_path).step == seconds // 2
        assert len([*niah.samples(run, **ASKED)]) == 6
    training.train(mixed, tmp_path, **QUIET)
    assert_same_run(tmp_path, whole_run.folder)
    assert not (tmp_path / "checkpoint").exists() and training.Trained(tmp_path).facts["steps"] == 9


def test_a_step_has_the_mean_gradient_of_its_batches_each_written_before_the_next(config, tmp_path):
    config = config.changed(accumulation=3, batch=1, clip=1e9, forget=0.0)
    run, other = new_run(config, tmp_path), new_run(config, tmp_path)
    run.train_step()
    for number in range(3):
        ids = torch.from_numpy(other.rows.batch(number)[0])
        logits = other.model(ids[:, :-1], other.memories)
        (F.cross_entropy(logits[0], ids[0, 1:]) / 3).backward()
        other.memories.commit()
    torch.testing.assert_close(*([p.grad for p in r.model.parameters()] for r in (run, other)))
    assert same(bits(run.memories), bits(other.memories))


def first_step(config, folder):
    run = new_run(config, folder)
    figures = run.train_step()
    return figures, [p.grad for p in run.model.parameters()], bits(run.memories)


def test_checkpointed_activations_give_the_same_gradients(mixed, tmp_path):
    plain, checkpointed = (first_step(mixed.changed(checkpointing=on), tmp_path) for on in (False, True))
    assert checkpointed[0]["loss"] == plain[0]["loss"]
    torch.testing.assert_close(checkpointed[1:], plain[1:])
    assert checkpointed[0]["memories"].keys() == plain[0]["memories"].keys() and len(plain[0]["memories"]) == 2


def test_training_in_bfloat16_has_memories_in_float32(mixed, tmp_path):
    run = trained_run(mixed.changed(precision="bfloat16", steps=3), tmp_path)
    assert {t.dtype for t in bits(run.memories)} == {torch.float32} == {p.dtype for p in run.model.parameters()}
    single = trained_run(mixed.changed(steps=3), tmp_path / "float32")
    losses = [log_of(r.folder)[-1]["loss"] for r in (run, single)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.01)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_a_compiled_run(config, tmp_path, monkeypatch, backend):
    monkeypatch.setattr(training.torch, "compile", functools.partial(torch.compile, backend=backend))
    torch._dynamo.reset()
    short = config.changed(layers=1, fwpkm=(0,), steps=2, length=96, batch=2, log_every=1)
    compiled, plain = (trained_run(short.changed(compile=on), tmp_path / str(on)) for on in (True, False))
    for a, b in zip(*(log_of(r.folder) for r in (compiled, plain))):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
    torch.testing.assert_close(bits(compiled.memories), bits(plain.memories), rtol=0.01, atol=1e-3)


def test_a_model_without_memories_is_a_run_as_well(config, tmp_path):
    run = trained_run(config.changed(fwpkm=(), steps=2), tmp_path)
    config.changed(fwpkm=(), steps=2).save(tmp_path / "config.json")
    assert len(run.memories) == 0 and log_of(tmp_path)[-1]["memories"] == {}
    assert len(training.Trained(tmp_path).memories("trained")) == 0


# ------------------------------------------------------------------------------------------------------- two processes
RANKS = 2


def ranks(rank, folder, config):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=RANKS)
    run = trained_run(config, folder / "whole")
    stopped_run(config, folder / "stopped", 2)
    trained_run(config, folder / "stopped")
    found = dict(model=run.model.state_dict(), memories=bits(run.memories), rows=run.rows.batch(0)[0].tolist())
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def command(rank, folder, config):
    main(["train", str(folder / "tiny.json"), str(folder / "command")])
    return {}


def process(rank, folder, config, torchrun):
    torch.set_num_threads(1)
    os.environ.update(torchrun, RANK=str(rank), LOCAL_RANK=str(rank))
    for work in (ranks, command):
        try:
            found = work(rank, folder, config)
        except BaseException:
            found = traceback.format_exc()
        torch.save(found, folder / f"{work.__name__}{rank}")
    os._exit(0)  # see test_distributed.py


@pytest.fixture(scope="module")
def two_processes(config, vocabulary, tmp_path_factory):
    """what(name) -> the folder, and what each process computed; they are started once."""
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    folder, context = tmp_path_factory.mktemp("ranks"), multiprocessing.get_context("spawn")
    short = config.changed(steps=3, save_every=1, log_every=1, length=96, batch=1, accumulation=2)
    short.save(folder / "tiny.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(RANKS), LOCAL_WORLD_SIZE=str(RANKS))
    torchrun |= dict(TORCHELASTIC_RUN_ID="none", OMP_NUM_THREADS="1")
    processes = [
        context.Process(target=process, args=(rank, folder, short, torchrun), daemon=True) for rank in range(RANKS)
    ]
    for p in processes:
        p.start()
    for p in processes:
        p.join(240)

    def what(name):
        found = [torch.load(folder / f"{name}{rank}", weights_only=True) for rank in range(RANKS)]
        failed = [f for f in found if isinstance(f, str)]
        assert not failed, failed[0]
        return folder, found

    return what


def test_processes_share_slow_weights_and_have_memories_of_their_own(two_processes):
    folder, (first, second) = two_processes("ranks")
    assert first["rows"] != second["rows"]
    slow = {name for name in first["model"] if not name.endswith("memory.sub_keys")}
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in slow)
    assert all((a - b).norm() > 1e-3 * a.norm() for a, b in zip(first["memories"], second["memories"], strict=True))
    files = {path.name for path in (folder / "whole").iterdir()}
    assert files == {"log.jsonl", "run.json", *RESULTS, "memories-1.safetensors"}
    assert json.loads((folder / "whole/run.json").read_text())["processes"] == 2
    assert len(log_of(folder / "whole")) == 3
    saved = [Memories.load(folder / "whole" / name) for name in ("memories.safetensors", "memories-1.safetensors")]
    assert same(bits(saved[0]), first["memories"]) and same(bits(saved[1]), second["memories"])


def test_processes_that_were_stopped_go_on_with_the_same_bits(two_processes):
    folder, _ = two_processes("ranks")
    assert_same_run(folder / "stopped", folder / "whole", "memories-1.safetensors")


def test_processes_of_torchrun_train_one_run(two_processes):
    folder, _ = two_processes("command")
    assert json.loads((folder / "command/run.json").read_text())["processes"] == 2
    assert_same_run(folder / "command", folder / "whole", "memories-1.safetensors")


# ------------------------------------------------------------------------------------------------------- a trained run
def test_a_trained_run_has_the_sub_keys_of_its_memories(run, config, vocabulary):
    trained, empty = run.memories("trained"), run.memories("empty")
    layers = training.fast_layers(run.model)
    assert layers.keys() == trained.keys() == empty.keys() and len(layers) == 2
    torch.manual_seed(config.seed)
    untrained = training.fast_layers(backbone.language_model(config, vocabulary.size))
    for name, layer in layers.items():
        assert torch.equal(layer.sub_keys, trained[name].sub_keys)
        assert torch.equal(layer.sub_keys, empty[name].sub_keys)
        assert not torch.equal(layer.sub_keys, untrained[name].sub_keys)
        assert trained[name].values.any() and not empty[name].values.any()
    assert not run.model.training
    with pytest.raises(ValueError, match="start: expected 'empty' or 'trained', got 'kept'"):
        run.memories("kept")


def test_a_trained_run_holds_out_what_it_has_not_read(run, corpus, documents):
    assert [*map(len, run.held_out)] == [*map(len, corpora.split(documents)[1])] and len(run.held_out) == 2
    assert run.documents.keys() == {corpus}


def test_a_trained_run_may_have_other_options(run_folder):
    run = training.Trained(run_folder, fwpkm_options=dict(addressing_weight=0.0))
    assert {m.options["addressing_weight"] for m in training.fast_layers(run.model).values()} == {0.0}
    assert run.config.fwpkm_options == SIZES | dict(addressing_weight=0.0)


# ---------------------------------------------------------------------------------------------------------------- niah
ASKED = dict(length=150, most=2, count=3, needles=2)
BETWEEN = pytest.mark.parametrize("between", niah.BETWEEN)
CHUNKS = pytest.mark.parametrize("chunk_size", [16, "all"])


@pytest.fixture
def outspoken(run):
    """Answers of a model that has hardly been trained are all alike; this one's are not."""
    with torch.no_grad():
        for p in run.model.layers.parameters():
            p.add_(0.5 * torch.randn_like(p))
    return run


def question_of(run, sample=0, seed=1, length=150, **options):
    """The haystack of a sample, and its text and question as tensors."""
    rng = random.Random(f"{seed} {length} {sample}")
    hay = needles.haystack(run.held_out, run.vocabulary, length, rng, **dict(needles=2) | options)
    return hay, torch.from_numpy(hay.ids).long(), torch.from_numpy(hay.question).long()


@torch.no_grad()
def slow_answer(run, memories, text, question, n, chunk_size, slots=None):
    """n - 1 readings of the text and one of text and question, each from its beginning, then greedy decoding.

    slots: a list that takes, for each token of the answer, {name of a memory: the slots it came from}"""
    for _ in range(n - 1):
        run.model(text[None], memories.streaming(chunk_size=chunk_size, flush=True))
    cache, answer, details = run.model.new_cache(), [], {}
    ids, reading = torch.cat([text, question])[None], memories.streaming(chunk_size=chunk_size, flush=True)
    for _ in range(6):
        logits = run.model(ids, reading, cache=cache, details=details)
        answer.append(int(logits[0, -1].argmax()))
        if slots is not None:
            slots.append({name: sorted(own.indices[0, -1].flatten().tolist()) for name, own in details.items()})
        ids, reading = torch.tensor([answer[-1:]]), memories.frozen().streaming()
    return answer


@CHUNKS
def test_readings_are_what_they_say(outspoken, chunk_size):
    _, text, question = question_of(outspoken)
    found = [*niah.readings(outspoken, outspoken.memories(), text, question, 3, chunk_size)]
    for n, (answer, after) in enumerate(found, 1):
        memories = outspoken.memories()
        assert slow_answer(outspoken, memories, text, question, n, chunk_size) == answer
        torch.testing.assert_close(bits(after), bits(memories), rtol=1e-4, atol=1e-5)
        assert not any(m.pending_tokens for m in after.values())
    assert len({tuple(answer) for answer, _ in found}) > 1 and len({*found[0][0]}) > 1


@CHUNKS
@BETWEEN
def test_samples_are_asked_as_they_say(outspoken, between, chunk_size):
    found = [*niah.samples(outspoken, **ASKED, between=between, chunk_size=chunk_size)]
    assert [(r["sample"], r["readings"]) for r in found] == [(s, n) for s in range(3) for n in (1, 2)]
    start = "trained" if between == "kept" else between
    kept = {n: outspoken.memories(start) for n in (1, 2)}
    for result in found:
        hay, text, question = question_of(outspoken, result["sample"])
        n = result["readings"]
        memories = kept[n] if between == "kept" else outspoken.memories(start)
        answer = outspoken.vocabulary.decode(slow_answer(outspoken, memories, text, question, n, chunk_size))
        assert (result["answer"], result["value"]) == (answer, hay.values[0])
        assert result.items() >= niah.scored(answer, hay).items()


@torch.no_grad()
def test_nothing_is_written_while_an_answer_is_decoded(outspoken):
    memories, cache, ids = outspoken.memories(), outspoken.model.new_cache(), question_of(outspoken)[1][:37]
    logits = niah.read(outspoken.model, memories, ids, 16, cache)
    before = bits(memories)
    assert len(niah.decode(outspoken.model, memories, logits, cache)) == 6
    assert same(bits(memories), before) and {m.pending_tokens for m in memories.values()} == {5}
    assert cache.position == 37 + 5


def test_asking_changes_no_trained_run(run):
    before = [t.clone() for t in run.model.state_dict().values()]
    assert len([*niah.samples(run, **ASKED, between="kept")]) == 6
    assert same([*run.model.state_dict().values()], before)


@BETWEEN
def test_samples_do_not_depend_on_how_many_there_are(outspoken, between):
    ask = lambda **options: [*niah.samples(outspoken, **ASKED | options, between=between)]
    whole = ask(most=3)
    assert ask(count=2, most=3) == [r for r in whole if r["sample"] < 2]
    assert ask(most=1) == [r for r in whole if r["readings"] == 1]


def test_the_control_asks_the_same_text_for_nothing(outspoken):
    ask = lambda **options: [*niah.samples(outspoken, **ASKED, **options)]
    plain, control = ask(), ask(control=True)
    assert [r["value"] for r in control] == [r["value"] for r in plain]
    assert [r["answer"] for r in control] != [r["answer"] for r in plain]
    _, _, question = question_of(outspoken, answerable=False)
    assert not torch.equal(question, question_of(outspoken)[2])


def test_an_answer_is_scored_beside_its_needles():
    hay = SimpleNamespace(values=["123456", "129956", "654321"])
    score = lambda answer: [*niah.scored(answer, hay).values()]
    assert [*niah.scored("", hay)] == ["exact", "digits", "first", "candidate", "right_for_another"]
    assert score("123456") == [True, 1, True, True, False]
    assert score("129956") == [False, 4 / 6, True, True, True]
    assert score("654321") == [False, 0, False, True, True]
    assert score("x12345") == [False, 0, False, False, False]
    assert score("") == [False, 0, False, False, False]


def test_a_summary_has_shares_by_readings():
    keys = ("readings", "exact", "digits", "first", "candidate", "inside")
    table = [(1, 0, 0.5, 1, 0, 1), (1, 1, 1.0, 1, 1, 0), (1, 0, 0.0, 0, 1, 0), (2, 1, 1.0, 1, 1, 1)]
    assert niah.summary([dict(zip(keys, line)) for line in table]) == {
        1: dict(exact=1 / 3, digits=0.5, first=2 / 3, candidate=2 / 3, outside=0.5, samples=3, samples_outside=2),
        2: dict(exact=1, digits=1, first=1, candidate=1, outside=None, samples=1, samples_outside=0),
    }


def ask_into(run, file, **options):
    return niah.evaluate(run, file, **QUIET, **ASKED | options)


@pytest.fixture
def asked_once(run, tmp_path):
    """A file of results, and their summary."""
    return tmp_path / "once.jsonl", ask_into(run, tmp_path / "once.jsonl")


def test_results_are_written_and_summed_up(run, asked_once):
    file, summary = asked_once
    results = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert results == [*niah.samples(run, **ASKED)] and summary == niah.summary(results)
    assert {s["samples"] for s in summary.values()} == {3}


def test_results_that_are_there_are_not_made_again(run, asked_once, monkeypatch):
    file, summary = asked_once
    monkeypatch.setattr(niah, "readings", None)
    assert ask_into(run, file) == summary


@BETWEEN
def test_results_go_on_where_they_were_stopped(run, tmp_path, between):
    whole, file = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    summary = ask_into(run, whole, between=between)
    for lines in (0, 1, 2, 5, 6):  # the first has the settings, a sample has two
        file.write_text("".join(whole.read_text().splitlines(keepends=True)[:lines]))
        assert ask_into(run, file, between=between) == summary
        assert file.read_text() == whole.read_text()


def test_results_go_on_after_half_a_line(run, asked_once):
    file, summary = asked_once
    whole = file.read_text()
    file.write_text(whole[: whole.rindex('"exact"')])
    assert ask_into(run, file) == summary
    assert file.read_text() == whole


def test_going_on_does_not_make_the_first_samples_again(run, asked_once, monkeypatch):
    file, _ = asked_once
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:5]))  # two of three samples
    readings, made = niah.readings, []
    monkeypatch.setattr(niah, "readings", lambda *arguments: made.append(1) or readings(*arguments))
    ask_into(run, file)
    assert len(made) == 1


def test_results_are_in_the_file_while_the_next_are_made(run, asked_once, monkeypatch):
    """As a run that is killed would leave them."""
    file, _ = asked_once
    half = "".join(file.read_text().splitlines(keepends=True)[:5])
    file.write_text(half)
    readings, seen = niah.readings, []
    monkeypatch.setattr(niah, "readings", lambda *arguments: seen.append(file.read_text()) or readings(*arguments))
    ask_into(run, file)
    assert all(text.startswith(half) for text in seen)


@pytest.mark.parametrize("other", [dict(length=160), dict(chunk_size=16), dict(control=True), dict(between="kept")])
def test_results_of_other_settings_are_kept_apart(run, asked_once, other):
    file, _ = asked_once
    before = file.read_text()
    with pytest.raises(ValueError, match="results of other settings are there"):
        ask_into(run, file, **other)
    assert file.read_text() == before


def test_memories_between_samples_are_one_of_three(run):
    with pytest.raises(ValueError, match="between: expected one of empty, trained, kept, got 'none'"):
        next(niah.samples(run, **ASKED, between="none"))


@pytest.mark.parametrize(
    ("right", "expected"),
    [
        ([(1, 0)] * 5 + [(0, 1)] + [(1, 1)] * 7 + [(0, 0)] * 2, (5, 1, 2 * (1 + 6) / 64)),
        ([(1, 0)] * 2 + [(0, 1)] * 8, (2, 8, 2 * (1 + 10 + 45) / 1024)),
        ([(0, 1)] * 6, (0, 6, 2 / 64)),
        ([(1, 0), (0, 1)], (1, 1, 1.0)),
        ([(1, 1), (0, 0)], (0, 0, 1.0)),
        ([], (0, 0, 1.0)),
    ],
)
def test_mcnemar(right, expected):
    a, b = ({(i, 1): bool(pair[which]) for i, pair in enumerate(right)} for which in (0, 1))
    found = niah.mcnemar(a | {(99, 1): True}, b | {(98, 1): True})  # that only one of them has
    assert (found["only_first"], found["only_second"]) == expected[:2]
    assert found["p"] == pytest.approx(expected[2])


# ---------------------------------------------------------------------------------------------------------- perplexity
@pytest.fixture
def texts(run):
    """Three short documents, none of which is a whole number of segments or chunks."""
    return [run.held_out[0][:300], run.held_out[1][:70], run.held_out[1][200:201]]


@torch.no_grad()
def slow_losses(run, document, memories):
    """Token by token, in segments of 128."""
    found, before, cache = [], run.vocabulary.separator, None
    for at, token in enumerate(document.tolist()):
        cache = run.model.new_cache() if at % 128 == 0 else cache
        logits = run.model(torch.tensor([[before]]), memories.streaming(), cache=cache)[0, 0]
        found.append(float(-logits.log_softmax(-1)[token]))
        before = token
    return found


def slow_losses_of_all(run, texts, way):
    memories, found = run.memories("trained"), []
    for document in texts:
        if way == "forgotten":
            memories = run.memories("trained")
        found.append(slow_losses(run, document, memories.frozen() if way == "frozen" else memories))
    return found


@pytest.mark.parametrize("way", perplexity.WAYS)
def test_every_token_is_predicted_once(outspoken, texts, way):
    found = [*perplexity.losses(outspoken, texts, outspoken.memories("trained"), way)]
    expected = slow_losses_of_all(outspoken, texts, way)
    assert [*map(len, found)] == [300, 70, 1]
    for ours, theirs in zip(found, expected):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    memories = outspoken.memories("trained")
    whole = perplexity.perplexity(outspoken, texts, memories, way=way)
    assert whole == pytest.approx(math.exp(sum(chain(*expected)) / 371), rel=1e-3)


def test_memories_are_read_as_the_way_says(outspoken, texts):
    start, found, after = outspoken.memories("trained"), {}, {}
    for way in perplexity.WAYS:
        memories = start.clone()
        found[way] = [*perplexity.losses(outspoken, texts, memories, way)]
        after[way] = same(bits(memories), bits(start))
    assert after["frozen"] and not after["live"]
    first, second = ([found[way][document] for way in perplexity.WAYS] for document in (0, 1))
    assert np.array_equal(first[0], first[1]) and not np.array_equal(first[0], first[2])
    assert not np.array_equal(second[0], second[1])
    alone = perplexity.losses(outspoken, texts[1:2], start.clone())
    assert np.array_equal(second[1], next(alone))


def test_segments_are_of_any_length_and_chunks_too(outspoken, texts):
    memories = lambda: outspoken.memories("trained")
    read = lambda **options: np.concatenate([*perplexity.losses(outspoken, texts, memories(), **options)])
    assert len(read(length=50)) == len(read(chunk_size="all")) == len(read(length=1)) == 371
    assert not np.allclose(read(length=50), read()) and not np.allclose(read(chunk_size="all"), read())
    seen = []
    read(length=50, details=lambda inputs, details: seen.append((inputs.shape[1], [*details])))
    assert [n for n, _ in seen] == [50] * 6 + [50, 20] + [1] and {tuple(d) for _, d in seen} == {(*memories(),)}
    with pytest.raises(ValueError, match="way: expected one of live, forgotten, frozen, got 'dead'"):
        read(way="dead")


def test_documents_are_cut_to_a_number_of_tokens():
    documents = [np.arange(5), np.arange(7), np.arange(3)]
    lengths = lambda most: [*map(len, training.cut(documents, most))]
    assert [lengths(n) for n in (0, 3, 5, 6, 12, 14, 99)] == [[], [3], [5], [5, 1], [5, 7], [5, 7, 2], [5, 7, 3]]


def test_parts_of_a_document_double():
    parts = lambda n, **options: [(at, len(part)) for at, part in perplexity.parts(np.arange(n), **options)]
    assert parts(3000) == [(0, 512), (512, 512), (1024, 1024), (2048, 952)]
    assert parts(512) == [(0, 512)] and parts(513) == [(0, 512), (512, 1)] and parts(0) == []
    assert parts(9, first=2) == [(0, 2), (2, 2), (4, 4), (8, 1)]
    assert np.array_equal(np.concatenate([part for _, part in perplexity.parts(np.arange(1500))]), np.arange(1500))


def test_a_perplexity_is_written_with_its_curve(run, tmp_path):
    file = tmp_path / "perplexity.json"
    result = perplexity.evaluate(run, file, run.held_out, most=1100, start="empty", **QUIET)
    cut = training.cut(run.held_out, 1100)
    expected = perplexity.perplexity(run, cut, run.memories("empty"))
    assert result["perplexity"] == pytest.approx(expected, rel=1e-5) and result["tokens"] == 1100
    assert sum(n for _, _, n in result["curve"]) == 1100
    assert sum(loss * n for _, loss, n in result["curve"]) / 1100 == pytest.approx(math.log(expected), rel=1e-5)
    assert len(result["first_documents"]) == len(cut)
    assert json.loads(file.read_text()) == result


def test_a_perplexity_that_is_there_is_not_computed_again(run, tmp_path, monkeypatch):
    ask = lambda **options: perplexity.evaluate(run, tmp_path / "p.json", run.held_out, most=60, **QUIET, **options)
    result, other = ask(), ask(way="frozen")
    assert result["perplexity"] != other["perplexity"]
    with monkeypatch.context() as patch:
        patch.setattr(perplexity, "losses", None)
        assert ask(way="frozen") == other
    assert ask() == result


def test_a_run_that_went_on_is_asked_anew(mixed, tmp_path):
    ask = lambda run: (
        perplexity.evaluate(run, tmp_path / "p.json", run.held_out, most=60, **QUIET)["perplexity"],
        gates.evaluate(run, tmp_path / "g.json", run.held_out, most=60, **QUIET)["memories"],
    )
    training.train(mixed, tmp_path / "run", seconds=0, **QUIET)
    before = ask(training.Trained(tmp_path / "run"))
    training.train(mixed, tmp_path / "run", **QUIET)
    after = ask(training.Trained(tmp_path / "run"))
    assert before[0] != after[0] and before[1] != after[1]


# ----------------------------------------------------------------------------------------------------------- continual
@pytest.fixture
def domains(tmp_path, corpus):
    """Of many documents, and of two: of one that is held out."""
    (tmp_path / "other").mkdir()
    return corpus, write_corpus(tmp_path / "other", documents=2, seed=9)


def test_what_is_left_of_one_domain_after_another(run, domains, tmp_path):
    file = tmp_path / "continual.json"
    evaluate = lambda: continual.evaluate(run, file, domains, adapt=300, test=100, **QUIET)
    result = evaluate()
    assert result["readings"] == [*domains, domains[0]] and len(result["adapted"]) == 4
    assert all(tested.keys() == {*domains} for tested in result["adapted"])
    first, second = run.held_out if domains[0] == run.config.corpora[0] else ([], [])
    reading, testing = corpora.split([first, second])
    memories = run.memories("empty")
    assert result["adapted"][0][domains[0]] == perplexity.perplexity(run, [testing[0][:100]], memories)
    memories = run.memories("empty")
    perplexity.perplexity(run, [reading[0][:300]], memories)
    assert result["adapted"][1][domains[0]] == perplexity.perplexity(run, [testing[0][:100]], memories)
    assert json.loads(file.read_text()) == result == evaluate()


# --------------------------------------------------------------------------------------------------------------- gates
def test_gates_and_reads_over_a_text(run, tmp_path):
    result = gates.evaluate(run, tmp_path / "gates.json", run.held_out, most=300, shown=100, **QUIET)
    text = np.concatenate([[run.vocabulary.separator], run.held_out[0][:99]])
    assert "".join(result["text"]) == run.vocabulary.decode(text)
    details = {}
    first = torch.from_numpy(np.concatenate([[run.vocabulary.separator], run.held_out[0][:127]]))[None]
    with torch.no_grad():
        run.model(first, run.memories("trained").streaming(), details=details)
    for name, own in result["memories"].items():
        assert own["gates"] == pytest.approx(details[name].gates[0, :100].tolist(), abs=6e-4)
        assert 0 < own["gate"] < 1 and sum(own["histogram"]) == pytest.approx(1)
        assert 0 < own["usage"]["coverage"] <= 1
        assert own["random_usage"] == fwpkm_cuda.random_usage(300 * 4, 64)._asdict()
    assert result["memories"].keys() == {"layers.0.memory", "layers.2.memory"}
    assert json.loads((tmp_path / "gates.json").read_text()) == result
    assert gates.evaluate(run, tmp_path / "gates.json", None, most=300, shown=100, **QUIET) == result


@pytest.mark.parametrize("memories", [1, 2])
def test_gates_make_a_picture(tmp_path, memories):
    text = [" one", "\n", " two", "\t", "�", "<doc>"] * 8
    own = dict(gate=0.5, gates=[i / 48 for i in range(48)])
    gates.picture(dict(text=text, memories={f"m{i}": own for i in range(memories)}), tmp_path / "gates.png", width=40)
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("changes", [dict(fwpkm=()), dict(fwpkm_options=dict(gate="none"))], ids=["no memory", "none"])
def test_a_run_without_gates_has_its_figures_and_no_picture(config, tmp_path, changes, monkeypatch):
    monkeypatch.setattr(gates, "evaluate", functools.partial(gates.evaluate, most=200))
    training.train(config.changed(**changes, steps=1), tmp_path / "run", **QUIET)
    main(["gates", str(tmp_path / "run")])
    assert (tmp_path / "run/gates.json").exists()


# --------------------------------------------------------------------------------------------------------------- trace
LETTERS = SimpleNamespace(decode=lambda ids: "".join("abcdefghijklmnopqrstuvwxyz"[i] for i in ids))


def reads(*slots, weights=None):
    """What a memory of one head says of a text whose tokens read these slots."""
    indices = torch.tensor(slots)[None, :, None]
    weights = torch.full(indices.shape, 1 / indices.shape[-1]) if weights is None else weights
    return SimpleNamespace(indices=indices, weights=weights)


def test_writers_of_a_slot_are_those_of_its_last_write():
    writers = trace.Writers(lookahead=1)
    details = dict(m=reads((1, 2), (1, 3), (2, 3), (9, 9), (1, 4), (7, 7)))
    writers.read(torch.arange(6), details, 4)  # chunks abcd, ef; d and f have no next token in theirs
    assert writers.of == {
        ("m", 1): [(4, 0.5)], ("m", 2): [(0, 0.5), (2, 0.5)], ("m", 3): [(1, 0.5), (2, 0.5)], ("m", 4): [(4, 0.5)],
    }  # fmt: skip
    writers.read(torch.arange(10, 13), dict(m=reads((3, 5), (3, 6), (3, 8))), 16)
    assert writers.of["m", 3] == [(6, 0.5), (7, 0.5)] and writers.of["m", 2] == [(0, 0.5), (2, 0.5)]
    assert LETTERS.decode(writers.ids) == "abcdefklm"
    assert [(w["before"], w["says"], w["after"]) for w in writers.of_slot("m", 3, LETTERS)] == [
        ("abcdefk", "l", "m"), ("abcdefkl", "m", ""),
    ]  # fmt: skip


@pytest.mark.parametrize(("lookahead", "says"), [(0, "c"), (1, "d"), (3, "f")])
def test_a_writer_speaks_for_the_token_that_it_looked_ahead_to(lookahead, says):
    writers = trace.Writers(lookahead)
    writers.read(torch.arange(8), dict(m=reads(*[(i, i) for i in range(8)])), 8)
    assert writers.of_slot("m", 2, LETTERS)[0]["says"] == says
    assert max(slot for _, slot in writers.of) == 7 - lookahead


def test_the_largest_shares_of_a_slot_come_first():
    writers = trace.Writers(1)
    weights = torch.tensor([0.2, 0.5, 0.1, 0.2, 0.9]).view(1, 5, 1, 1)
    writers.read(torch.arange(5), dict(m=reads(*[(7,)] * 5, weights=weights)), 5)
    best = writers.of_slot("m", 7, LETTERS, most=2)
    assert [w["position"] for w in best] == [1, 0] and [w["share"] for w in best] == pytest.approx([0.5, 0.2])
    assert writers.of_slot("m", 8, LETTERS) == []


def test_a_hit_is_a_slot_that_speaks_for_the_right_token():
    writers = trace.Writers(1)
    writers.read(torch.arange(4), dict(m=reads((1,), (2,), (3,), (4,))), 4)  # 1 says b, 2 says c, 3 says d
    own = reads((2, 3, 4), weights=torch.tensor([0.3, 0.6, 0.1]).view(1, 1, 1, 3))
    found = trace._explained(dict(m=own), writers, LETTERS, "c")
    rows = found["memories"]["m"]
    assert [(row["slot"], row["hit"]) for row in rows] == [(3, False), (2, True), (4, False)]
    assert [row["share"] for row in rows] == pytest.approx([0.6, 0.3, 0.1]) and rows[2]["writers"] == []
    assert found["consensus"] == [("d", pytest.approx(0.6)), ("c", pytest.approx(0.3))]


def test_two_memories_that_agree_are_as_sure_as_one():
    writers = trace.Writers(1)
    writers.read(torch.arange(4), dict(m=reads((1,), (2,), (3,), (4,)), n=reads((1,), (2,), (3,), (4,))), 4)
    own = reads((2,))
    (says, share), *_ = trace._explained(dict(m=own, n=own), writers, LETTERS, "c")["consensus"]
    assert says == "c" and share == pytest.approx(1)


def test_slots_that_were_written_have_writers(outspoken):
    memories, details = outspoken.memories(), {}
    _, text, _ = question_of(outspoken)
    with torch.no_grad():
        outspoken.model(text[None], memories.streaming(chunk_size=64, flush=True), details=details)
    writers = trace.Writers(1)
    writers.read(text, details, 64)
    for name, memory in memories.items():
        changed = memory.values.any(-1).nonzero().flatten().tolist()
        assert changed == sorted(slot for own, slot in writers.of if own == name)


@pytest.mark.parametrize("readings", [1, 2, 3])
def test_a_trace_is_of_the_answer_that_is_given(outspoken, tmp_path, readings):
    hay, text, question = question_of(outspoken)
    result = trace.evaluate(outspoken, tmp_path / "trace.json", hay, readings, **QUIET)
    decode, slots = outspoken.vocabulary.decode, []
    answer = slow_answer(outspoken, outspoken.memories(), text, question, readings, "all", slots)
    assert [token["token"] for token in result["tokens"]] == [decode([token]) for token in answer]
    assert "".join(token["right"] for token in result["tokens"]) == result["value"] == hay.values[0]
    read, positions = [*text.tolist() * readings, *question.tolist()], []
    for token, own in zip(result["tokens"], slots, strict=True):
        for name, rows in token["memories"].items():
            assert sorted(row["slot"] for row in rows) == own[name] and len(rows) == 4
            assert sum(row["share"] for row in rows) == pytest.approx(1, abs=1e-5)
            assert all(a["share"] >= b["share"] for a, b in pairwise(rows))
        writers = [writer for rows in token["memories"].values() for row in rows for writer in row["writers"]]
        assert all(writer["says"] == decode([read[writer["position"] + 1]]) for writer in writers)
        positions.append([writer["position"] for writer in writers])
    last = (readings - 1) * len(text)  # the first digit is read before the last reading is written
    assert max(positions[0], default=-1) < last <= max(positions[1]) and bool(positions[0]) == (readings > 1)
    assert json.loads((tmp_path / "trace.json").read_text())["tokens"][0]["memories"].keys() == {*outspoken.memories()}
    assert f"asked for {hay.keys[0]}: answered" in (tmp_path / "trace.txt").read_text()


def test_a_trace_makes_a_picture(run, tmp_path):
    trace.picture(trace.trace(run, question_of(run)[0], readings=1), tmp_path / "trace.png")
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------------------------------------- command line
def test_a_run_is_trained_from_a_file_or_a_name(config, tmp_path, capsys):
    config.save(tmp_path / "tiny.json")
    train = ["train", str(tmp_path / "tiny.json"), str(tmp_path / "run")]
    main([*train, "--set", "steps=2", "log_every=1", 'fwpkm_options={"topk": 2}'])
    assert len(log_of(tmp_path / "run")) == 2 and "text" in capsys.readouterr().out
    assert Config.load(tmp_path / "run/config.json") == config.changed(steps=2, log_every=1, fwpkm_options=dict(topk=2))
    small = {name: getattr(config, name) for name in ("layers", "hidden", "heads", "mlp", "corpora", "vocabulary")}
    small |= dict(steps=1, batch=1, length=128, needles=2, fwpkm=())
    main(["train", "main", str(tmp_path / "named"), "--set", *(f"{k}={json.dumps(v)}" for k, v in small.items())])
    assert (tmp_path / "named/run.json").exists()


@pytest.fixture
def copied(run_folder, tmp_path):
    """The trained run, to leave files in."""
    return Path(shutil.copytree(run_folder, tmp_path / "tiny"))


def test_needles_from_the_command_line(copied, capsys):
    ask = ["niah", str(copied), "--length", "250", "--readings", "2", "--count", "1"]
    main([*ask, "--between", "trained"])
    main([*ask, "--control", "--chunk-size", "16", "--memory", "addressing_weight=0"])
    assert '"exact"' in capsys.readouterr().out
    files = {path.name for path in copied.glob("niah*")}
    assert files == {"niah-250-trained-all.jsonl", "niah-250-empty-16-addressing_weight=0-control.jsonl"}
    settings = json.loads((copied / "niah-250-empty-16-addressing_weight=0-control.jsonl").read_text().splitlines()[0])
    assert settings["memory"]["addressing_weight"] == 0 and settings["options"]["chunk_size"] == 16


def test_perplexity_from_the_command_line(copied, capsys):
    main(["perplexity", str(copied), "--most", "200", "--way", "frozen"])
    assert re.search(r"perplexity \d+\.\d\d of 200 tokens", capsys.readouterr().out)
    (file,) = copied.glob("perplexity*.json")
    assert json.loads(file.read_text())["tokens"] == 200


def test_domains_from_the_command_line(copied, domains):
    main(["continual", str(copied), "--domains", *domains, "--adapt", "100", "--test", "50"])
    assert len(json.loads((copied / "continual.json").read_text())["adapted"]) == 4


def test_gates_from_the_command_line(copied, monkeypatch):
    monkeypatch.setattr(gates, "evaluate", functools.partial(gates.evaluate, most=200, shown=50))
    main(["gates", str(copied)])
    assert (copied / "gates.json").exists() and (copied / "gates.png").stat().st_size > 1000


def test_a_trace_from_the_command_line(copied, capsys):
    main(["trace", str(copied), "--length", "250", "--readings", "2", "--sample", "3"])
    assert "asked for" in capsys.readouterr().out
    assert len(json.loads((copied / "trace.json").read_text())["tokens"]) == 6


# -------------------------------------------------------------------------------------------------- tiny and its page
def test_the_page_has_the_figures_of_all_finished_runs(run, config, tmp_path):
    for seed, exact in ((0, 0.5), (1, 0.75)):
        folder = tmp_path / f"seed-{seed}" / "main"
        shutil.copytree(run.folder, folder)
        share = dict(exact=exact, outside=None, candidate=1.0)
        results = {"1,000 tokens": {str(n): share for n in range(1, 5)}}
        results |= {"anarchism, live": dict(perplexity=20.0 + seed, curve=[[0, 3.0, 10]], first_documents=[[3.0]])}
        (folder / "results.json").write_text(json.dumps(results))
        gates.evaluate(run, folder / "gates.json", run.held_out, most=100, shown=20, **QUIET)
        trace.evaluate(run, folder / "trace.json", question_of(run)[0], **QUIET)
    page = tmp_path / "page" / "README.md"
    page.parent.mkdir()
    page.write_text((ROOT / "experiments/README.md").read_text())
    report.write(tmp_path, page)
    first = page.read_text()
    assert "| 1,000 | 100 | 62 (50 to 75) | 62 (50 to 75) |" in first and "seeds 0, 1;" in first
    assert (
        json.loads((page.parent / "results.json").read_text())["main"]["1"]["results"]["1,000 tokens"]["4"]["exact"]
        == 0.75
    )
    drawn = {path.name for path in (page.parent / "pictures").iterdir()}
    assert drawn == set(re.findall(r"pictures/(\w+\.png)", first))
    report.write(tmp_path, page)
    assert page.read_text() == first
    page.write_text("no places")
    with pytest.raises(ValueError, match="expected a place for facts"):
        report.write(tmp_path, page)


def test_a_job_asks_what_was_not_asked_yet(config, tmp_path, monkeypatch):
    asked = []
    questions = {"a": lambda run: asked.append("a") or 1, "b": lambda run: asked.append("b") or 2}
    monkeypatch.setattr(configurations, "ALL", dict(own=config.changed(steps=1)))
    monkeypatch.setattr(tiny, "QUESTIONS", dict(own=questions))
    folder = tmp_path / "seed-3" / "own"
    assert tiny.job("own", folder, **QUIET) == dict(a=1, b=2) and Config.load(folder / "config.json").seed == 3
    (folder / "results.json").write_text(json.dumps(dict(a=5)))
    assert tiny.job("own", folder, **QUIET) == dict(a=5, b=2) and asked == ["a", "b", "b"]


def test_everything_says_what_failed(tmp_path):
    lines = []
    assert tiny.everything(tmp_path, ["no such configuration"], jobs=1, report=lines.append) == [
        (0, "no such configuration")
    ]
    assert "FAILED" in lines[0] and "KeyError" in (tmp_path / "seed-0/no such configuration.log").read_text()


# ------------------------------------------------------------------------------------------------- the paper's sizes
def test_the_plan_for_a_gpu_runs_shrunken_and_goes_on_where_it_was_stopped(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "speed", functools.partial(paper.speed, words=300))
    config = paper.sizes("small", shrunken=True).changed(corpora=(corpus,), vocabulary=300, layers=4, fwpkm=(1, 2))
    config = config.changed(length=128, needles=2, steps=2)
    layers = dict(none={}, fwpkm=dict(fwpkm=(1, 2)), both=dict(pkm=(1,), fwpkm=(2,)))
    monkeypatch.setattr(configurations, "PAPER_MEMORIES", layers)
    asked = []
    monkeypatch.setattr(niah, "evaluate", lambda run, file, report, **options: asked.append(options) or {})
    paper.plan(config, tmp_path, "cpu", minutes=1, **QUIET)
    measured = json.loads((tmp_path / "speed.json").read_text())["samples"]
    assert measured.keys() == layers.keys() and all(m["samples_per_second"] > 0 for m in measured.values())
    assert measured["fwpkm"]["fast_weights"] == 2 * (16**2 * 32 + 2 * 16 * 16) and measured["none"]["fast_weights"] == 0
    assert json.loads((tmp_path / "run/run.json").read_text())["steps"] == 2
    assert [options["length"] for options in asked] == [128, 512, 2048]
    monkeypatch.setattr(paper, "speed", None)
    monkeypatch.setattr(training, "Run", None)
    paper.plan(config, tmp_path, "cpu", minutes=1, **QUIET)


# ------------------------------------------------------------------------------------------------------------ learning
@pytest.mark.full
def test_a_second_reading_finds_the_needle(tmp_path, monkeypatch):
    """What the paper is about, in minutes: 400 steps, then 30 needles in 1,000 tokens."""
    monkeypatch.delenv("FWPKM_EXPERIMENTS_CACHE")  # the text is that of the machine
    try:
        corpora.documents("anarchism")
    except corpora.CorpusError as error:
        pytest.skip(str(error))
    training.train(configurations.MAIN.changed(steps=400), tmp_path / "main")
    run = training.Trained(tmp_path / "main")
    asked = dict(length=1000, most=2, count=30, between="empty", chunk_size="all")
    found = niah.evaluate(run, tmp_path / "niah.jsonl", **asked)
    assert found[2]["exact"] - found[1]["exact"] >= 0.30, found
