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
