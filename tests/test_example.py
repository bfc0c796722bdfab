"""examples/remember_text.py on small texts: what it prints, recalls and writes."""

import importlib.util
import json
import math
import random
import re
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "remember_text.py"
WORDS, ONCE, AGAIN, CONTEXT = 300, 1400, 300, 3
SMALL = ("--context", CONTEXT, "--sub-keys", 96, "--key-dim", 64, "--value-dim", 32, "--topk", 4, "--chunk-size", 32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Work this small is slower when it is shared out."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("remember_text", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """1,700 tokens: 1,400 random words, then the first 300 of them again."""
    draw = random.Random(1)
    words = [f" w{draw.randrange(WORDS)}" for _ in range(ONCE)]
    file = tmp_path_factory.mktemp("text") / "book.txt"
    file.write_text("".join(words + words[:AGAIN]))
    return file


@pytest.fixture
def run(example, book):
    def run(*arguments, passes=3, plot="none", file=book):
        return example.main([str(a) for a in (file, *SMALL, "--passes", passes, "--plot", plot, *arguments)])

    return run


def recalls(results):
    return [p["recall"] for p in results["passes"]]


def test_recall_rises_from_pass_to_pass(run):
    first, second, third = recalls(run())
    assert first < 0.2
    assert second > 0.9
    assert second <= third and third > 0.95


def test_first_pass_recalls_what_repeats(run):
    curve = run(passes=1)["passes"][0]["recall_by_position"]
    unseen, seen = curve[: int(100 * ONCE / (ONCE + AGAIN))], curve[-int(100 * AGAIN / (ONCE + AGAIN)) + 2 :]
    assert sum(unseen) / len(unseen) < 0.03
    assert sum(seen) / len(seen) > 0.7


def test_sharp_queries_stay_bounded_with_the_paper_rule_only(run):
    results = run("--sharpness", 16, passes=4)
    assert recalls(results)[-1] > recalls(results)[0] + 0.4
    assert all(math.isfinite(p["memory_loss"]) and p["memory_loss"] < 2 for p in results["passes"])
    assert all(p["largest_value"] < 10 for p in results["passes"])
    try:
        diverged = run("--sharpness", 16, "--write-rule", "release", passes=4)["passes"][-1]["largest_value"] > 100
    except SystemExit as error:
        diverged = "diverged" in str(error)
    assert diverged


def test_whole_text_writes_once_per_pass(run, capsys):
    first, second, _ = recalls(run("--whole-text"))
    assert first < 0.02
    assert second > 0.9
    assert f"{ONCE + AGAIN:,} tokens, 1 writes per pass" in capsys.readouterr().out


def test_calls_may_be_cut_anywhere(run, example, monkeypatch):
    whole = run(passes=2)
    monkeypatch.setattr(example, "CHUNKS_PER_CALL", 1)
    cut = run(passes=2)
    for a, b in zip(whole["passes"], cut["passes"], strict=True):
        assert a["recall_by_position"] == b["recall_by_position"]
        assert a["largest_value"] == b["largest_value"]
        assert a["memory_loss"] == pytest.approx(b["memory_loss"], rel=1e-6)


def test_asked_for_a_passage_it_names_the_place_that_wrote_it(run, book, capsys):
    start, length = 800, 20
    passage = re.findall(r" \w+", book.read_text())[start : start + length]
    asked = run("--ask", "".join(passage))["ask"]
    assert asked["found_at"] == [start]
    assert len(asked["tokens"]) == length - CONTEXT
    for i, token in enumerate(asked["tokens"]):
        by = token["written_by"][0]
        assert by["position"] == start + CONTEXT - 1 + i
        assert by["context"] == "".join(passage[i : i + CONTEXT])
        assert by["next"] == token["text"] == passage[i + CONTEXT]
        assert all(by["share"] > 1.5 * other["share"] for other in token["written_by"][1:])
    recalled = sum(token["recalled"] for token in asked["tokens"])
    assert recalled >= 0.9 * len(asked["tokens"])
    assert f"recalled: {recalled} of {len(asked['tokens'])}" in capsys.readouterr().out


def test_asking_writes_nothing(run, example, monkeypatch):
    memories = []

    def ask(memory, *arguments, real=example.ask):
        before = memory.values.clone(), memory.sub_keys.clone()
        asked = real(memory, *arguments)
        memories.append((before, (memory.values, memory.sub_keys)))
        return asked

    monkeypatch.setattr(example, "ask", ask)
    run("--addressing-weight", 1, passes=1)
    [(before, after)] = memories
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_passage_that_is_not_in_the_text(run):
    asked = run("--ask", " this is not in that text", passes=2)["ask"]
    assert asked["found_at"] == []
    assert [token["text"] for token in asked["tokens"]] == [" in", " that", " text"]
    assert not any(token["recalled"] for token in asked["tokens"])


def test_json_has_all_results(run, tmp_path):
    results = run("--json", tmp_path / "results.json", passes=2)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written == results
    assert set(written) == {"settings", "versions", "text", "guesses", "passes", "ask"}
    assert written["settings"]["chunk_size"] == 32
    assert written["settings"]["sub_keys"] == 96
    assert written["text"]["tokens"] == ONCE + AGAIN
    assert len(written["passes"]) == 2
    for p in written["passes"]:
        assert len(p.pop("recall_by_position")) == 100
        assert all(isinstance(value, int | float) and math.isfinite(value) for value in p.values())
        assert p["tokens_per_second_memory"] > p["tokens_per_second"] > 0
        assert 0 < p["slots_used"] <= 96 * 96
        reads = 4 * (ONCE + AGAIN)
        assert p["collisions_if_random"] == pytest.approx(1 - math.exp(-reads / 96**2), rel=1e-2)
        assert 1 - p["slots_used"] / reads <= p["collisions"] < 1


def test_plot_is_written(run, tmp_path):
    pytest.importorskip("matplotlib")
    run(passes=2, plot=tmp_path / "recall.png")
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_it_says_so(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run(passes=1, plot=tmp_path / "recall.png")
    assert not (tmp_path / "recall.png").exists()
    assert "No plot: matplotlib is not installed" in capsys.readouterr().out


def test_unknown_tokens_are_never_recalled(run):
    results = run("--vocabulary", 100)
    unknown = results["text"]["unknown"]
    assert results["text"]["vocabulary"] == 100
    assert unknown > 0.4
    assert recalls(results)[-1] < 1 - unknown + 0.01


def test_bytes(run):
    results = run("--bytes", "--context", 12, "--max-tokens", 3000)
    assert results["text"]["tokens"] == 3000
    assert results["text"]["vocabulary"] < 20
    assert recalls(results)[0] + 0.2 < recalls(results)[-1]


def test_default_text_is_the_standard_library(example):
    arguments = [str(a) for a in (*SMALL, "--max-tokens", 2000, "--passes", 2, "--plot", "none")]
    results = example.main(arguments)
    assert results["settings"]["files"][0].endswith("abc.py")
    assert results["text"]["tokens"] == 2000
    assert recalls(results)[1] > 0.8


def test_best_guess_on_a_text_counted_by_hand(example):
    ids = example.encode("abacab", ["<unknown>", "a", "b", "c"])
    assert example.best_guess(ids, 0) == (2 / 5, 1)  # b a c a b
    assert example.best_guess(ids, 1) == (4 / 5, 3)  # a: b c b; b: a; c: a
    assert example.best_guess(ids, 2) == (5 / 5, 5)
    ids = example.encode("abacab", ["<unknown>", "a", "c"])  # b is unknown
    assert example.best_guess(ids, 1) == (3 / 5, 3)


def test_queries_do_not_depend_on_where_a_text_is_cut(example):
    memory = example.Memory(torch.randint(0, 2, (50, 16)) * 2.0 - 1, *[None] * 3, context=4, sharpness=2.0, options={})
    ids = torch.randint(0, 50, (30,))
    query = memory.query(ids)
    assert torch.equal(query.abs(), torch.full((30, 16), 2.0))
    assert torch.equal(memory.query(ids[7:])[3:], query[10:])
    swapped = ids.clone()
    swapped[[20, 21]] = ids[[21, 20]]
    assert ids[20] == ids[21] or not torch.equal(memory.query(swapped)[21], query[21])


def test_progress_bar_only_when_asked_for(run, capsys):
    run(passes=1)
    assert capsys.readouterr().err == ""
    run("--progress", passes=1)
    assert "pass 1 [####" in capsys.readouterr().err


def test_errors_are_messages(run, tmp_path):
    with pytest.raises(SystemExit, match="give a longer passage"):
        run("--ask", " w1 w2 w3", passes=1)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(SystemExit, match="the text has 2 tokens; 5 are needed"):
        run(file=tmp_path / "short.txt")
    with pytest.raises(SystemExit, match="No such file"):
        run(file=tmp_path / "absent.txt")
    with pytest.raises(SystemExit):
        run(passes=0)
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="finds no CUDA GPU"):
            run("--device", "cuda")


# ------------------------------------------------------------------------------------ train_bytes.py and decode.py
@pytest.fixture
def load():
    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLE.with_name(f"{name}.py"))
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def test_train_bytes_prints_how_the_loss_falls(load, capsys):
    load("train_bytes").main(["--steps", "25", "--every", "8"])
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split()[1]) for line in lines] == [0, 8, 16, 24]
    losses = [float(re.search(r"  loss ([\d.]+)  ", line)[1]) for line in lines]
    assert losses[0] > 5 and losses[-1] < 0.65 * losses[0]
    for line in lines:
        layers = re.findall(r"layer (\d): memory loss ([\d.]+), gate ([\d.]+)", line)
        assert [i for i, _, _ in layers] == ["1", "3"]
        assert all(0 < float(loss) < 1 and 0 < float(gate) < 1 for _, loss, gate in layers)


def test_a_memory_saved_by_decode_goes_on_with_the_same_bits(load, tmp_path, capsys):
    file = tmp_path / "memory.safetensors"
    stayed, loaded, forgot = load("decode").main(["--file", str(file), "--context", "100", "--steps", "70"])
    assert stayed.shape == (1, 70, 32) and stayed.isfinite().all()
    assert torch.equal(stayed, loaded)
    assert (stayed - forgot).norm() > 0.01 * stayed.norm()
    printed = capsys.readouterr().out
    assert "read 100 tokens; the last 36 were written by flush()" in printed
    assert "decoded 70 tokens one by one; with the loaded memory the same bits: True" in printed
    assert file.is_file()


def test_decoding_is_a_stream_of_its_own_answers(load):
    example = load("decode")
    layer = example.fwpkm_cuda.FwPKM(hidden_size=8, key_dim=8, value_dim=8, num_sub_keys=16, chunk_size=4)
    memory, twin = layer.new_memory(seed=0), layer.new_memory(seed=0)
    token = torch.randn(1, 1, 8)
    answers = example.decode(layer, memory, token, 10)
    inputs = torch.cat([token, answers[:, :-1]], 1)
    with torch.no_grad():
        expected = inputs + layer.stream(inputs, twin)
    torch.testing.assert_close(answers, expected)
    torch.testing.assert_close(memory.values, twin.values)
    assert memory.pending_tokens == 2 and not torch.equal(memory.values, layer.new_memory(seed=0).values)
