"""The benchmarks run, their baseline computes what it should, and their report has what it promises."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import memory as random_memory

from fwpkm_cuda import reference

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "bench").is_dir(), reason="the tests run away from the source tree")


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("score", ["dot", "idw"])
def test_the_dense_baseline_is_the_reference(score, train, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.dense_baseline import dense_scan

    torch.manual_seed(0)
    values, sub_keys = random_memory(1, 5, 6, 4)
    query, target = torch.randn(2, 11, 1, 6, dtype=torch.float64), torch.randn(2, 11, 4, dtype=torch.float64)
    gate = torch.rand(2, 11, dtype=torch.float64)
    options = dict(topk=3, chunk_size=4, score=score)
    leaves = [x.requires_grad_(train) for x in (values, sub_keys, query, target, gate)]
    with torch.set_grad_enabled(train):
        found = dense_scan(*leaves, **options)
        scan = reference.chunk_scan(*leaves, write_rule="release", **options)
    expected = (scan.out, scan.values, scan.sub_keys)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-8)
    if train:
        ours, theirs = (torch.autograd.grad(out[0].sin().sum(), leaves) for out in (found, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_one_contestant_is_measured_in_a_process():
    case = json.dumps(["ours", "train", "dot", 64, 16, 3, 2, None, 1])
    command = [sys.executable, "-m", "bench", "cpu", "--one", case]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["ms"]["min"] <= result["ms"]["median"] <= result["ms"]["max"] and result["ms"]["repeats"] == 2
    assert 0 <= result["error"] < 1e-2 and result["peak_bytes"] >= 0


def test_the_report_names_machine_goals_and_figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import cpu
    from bench.timing import machine

    torch.manual_seed(0)
    ms = lambda x: {"min": x, "median": x, "max": x, "repeats": 1}
    one = lambda x: {"ms": ms(x), "peak_bytes": 10**8, "error": 0.0}
    scans = {}
    for score in ("idw", "dot"):
        for mode in ("eval", "train"):
            scans |= {f"ours, {mode}, {score}": one(2.0), f"release, {mode}, {score}": one(90.0)}
        scans[f"ours in place, eval, {score}"] = one(1.0)
    report = {
        "machine": machine(1),
        "scans": scans,
        "per_token": {f"{n}, T={t}": 5.0 for n in ("ours in place, eval", "ours, train") for t in (512, 1024)},
        "reads": {"P=8": cpu.measure_reads(16, 8, 1)},
        "search": cpu.measure_search(16, 16, 1),
        "log_bytes": cpu.log_bytes(2048),
    }
    text = "\n".join(cpu.lines(report))
    assert "eval: 90x the release; goal 40x met, 100x NOT met" in text
    assert "train: 45x the release; goal 40x met" in text
    assert "0.07 GB beyond memory and log; goal 0.3 GB met" in text
    assert report["machine"]["commit"] and report["machine"]["command"].startswith("python -m bench")
    json.dumps(report)


def test_a_folder_that_is_not_the_release_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import release

    with pytest.raises(SystemExit, match="expected the released repository"):
        release.load(tmp_path)


def test_accuracy_is_a_table_with_a_section_per_device(tmp_path):
    document, figures = tmp_path / "accuracy.md", tmp_path / "accuracy.json"
    document.write_text("# Old\n\n## CPU\n\nold figures\n\n## CUDA\n\nanother machine's\n")
    command = [sys.executable, "-m", "bench", "accuracy", "--quick", "--json", figures, "--markdown", document]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    text, report = document.read_text(), json.loads(figures.read_text())
    assert "old figures" not in text and text.count("\n## CPU\n") == 1 and "## CUDA\n\nanother machine's" in text
    assert "goal at most 2 times PyTorch's error: met by" in text and "goal at most 2" in done.stdout
    assert len(report["cases"]) == 13 and report["machine"]["commit"]
    for case, x in report["cases"].items():
        assert f"### {case.rsplit(', ', 1)[0]}\n" in text
        for result, of in x["errors"].items():
            half = "float16" in case and result != "scores"
            assert all(0 <= e < (1e-2 if half else 1e-5) for side in of.values() for e in side.values()), (case, result)


def test_tokens_that_read_other_slots_are_counted_and_drawn_anew(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import accuracy

    draw = accuracy.Draw(0, torch.device("cpu"))
    inputs = {"query": draw(1, 5, 1, 4), "sub_keys": draw(1, 2, accuracy.R + 1, 2)}
    before = inputs["query"].clone()

    def f(side, x):  # one side that is wrong about the third token for as long as it is the first that was drawn
        found = accuracy.topk(side, x, "dot")[1].clone()
        found[0, 2] += side == "ours" and torch.equal(x["query"][0, 2], before[0, 2])
        return None, found

    assert accuracy.settled(f, inputs, draw) == {"ours": 1, "torch": 0}
    changed = (inputs["query"] != before).flatten(2).any(-1)
    assert changed.tolist() == [[False, False, True, False, False]]


def test_nearly_equal_sub_keys_at_the_cut_are_noticed(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import accuracy

    R = accuracy.R
    keys = torch.arange(R + 2.0).view(1, 1, -1, 1).repeat(1, 2, 1, 2)
    keys[0, 1, 1] = keys[0, 1, 2] + 1e-6  # of the ten, the eighth and the ninth most similar to a positive query
    inputs = {"values": torch.zeros((R + 2) ** 2, 3), "sub_keys": keys, "query": torch.ones(1, 2, 1, 4)}
    inputs["query"][0, 0, 0, 2:] = -1  # the first token turns the order round: its cut is elsewhere
    inputs |= {"target": torch.zeros(1, 2, 3), "loss_weights": torch.ones(1, 2)}
    assert accuracy.nearly_tied(inputs, "dot", 2).tolist() == [[False, True]]
