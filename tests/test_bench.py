"""The benchmarks run, their baseline computes what it should, and their report has what it promises."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

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


# ------------------------------------------------------------------------------------------------------ bench ops
@pytest.fixture
def ops(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import ops

    return ops


def ops_options(**changes):
    options = dict(device="cpu", quick=True, cases=None, json=None, plots=None, release_dir=None, slow_peers=False)
    options |= dict(threads=1)
    return SimpleNamespace(**options | changes)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


ON_A_GPU = [pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []


@pytest.mark.parametrize("kind", ["cpu", *ON_A_GPU])
def test_every_case_runs_and_is_right(ops, kind, tmp_path, capsys, threads):
    from bench import plots
    from bench.cases import FAMILIES
    from bench.cases.case import SIZES

    report = ops.run(ops_options(device=kind), sizes=SIZES[kind, True].short, say=ops.say)
    assert not list(ops.failures(report))
    text = capsys.readouterr().out
    for family in FAMILIES:
        cases = ops.of_family(report, family)
        assert cases and all(case in text for case in cases), family
    for case, record in report["cases"].items():
        for name, x in record["contestants"].items():
            assert "failed" not in x, (case, name, x["failed"])
            assert ("absent" in x) or x["ms"]["min"] <= x["ms"]["median"] <= x["ms"]["max"], (case, name)
            compared = "error" in x or "unlike" in x or "absent" in x or record["family"] == "ceilings"
            assert compared, (case, name)
        if record["family"] not in ("ceilings", "addressing"):
            assert record["bytes"] > 0 and record["floor_ms"] > 0, case
    assert {"copy_bytes_per_second", "gemm_flops_per_second", "launch_seconds"} <= set(report["ceilings"])
    assert ("only with --device cuda" in "\n".join(ops.goals.lines(report))) == (kind == "cpu")
    json.dumps(report)
    pytest.importorskip("matplotlib")
    plots.draw(report, tmp_path)
    pictures = {"tokens", "reads", "slots", "stream", "floors"} | ({"memory"} if kind == "cuda" else set())
    assert pictures == {p.stem for p in tmp_path.iterdir()}


def test_a_wrong_or_missing_contestant_is_named_and_not_timed(ops, threads):
    from bench import timing
    from bench.cases.case import SIZES, Absent, Case, Setup

    def absent():
        raise Absent("not installed")

    def breaks(x):
        raise MemoryError("too much")

    case = Case(
        inputs=lambda: torch.ones(3),
        contestants={
            "ours": lambda: lambda x: x + 1,
            "ours, wrong": lambda: lambda x: x + 1.1,
            "nan": lambda: lambda x: x * torch.nan,
            "breaks": lambda: breaks,
            "missing": lambda: absent(),
            "part": lambda: lambda x: x,
        },
        expected=lambda x: x + 1,
        unlike={"part": "half of it"},
    )
    record = ops.measure(Setup("cpu", SIZES["cpu", True].short, timing.CpuMeter()), case)
    found = record["contestants"]
    assert found["ours"]["error"] == 0 and found["ours"]["ms"]["repeats"] >= 1
    assert found["missing"] == {"absent": "not installed"} and found["breaks"]["failed"] == "MemoryError: too much"
    for name in ("ours, wrong", "nan"):
        assert "not what the reference computes" in found[name]["failed"] and "ms" not in found[name]
    report = {"cases": {"a case": record | {"family": "gather"}}, "ceilings": {}, "device": "cpu"}
    assert [name for _, name, _ in ops.failures(report)] == ["ours, wrong"]
    text = "\n".join(ops.plain(report, "gather"))
    assert "FAILED: not what" in text and "not installed" in text and "* part: half of it" in text


def test_the_size_that_is_timed_is_checked_where_nothing_is_aligned(ops, threads):
    """The kernels of large work, which no size that the reference can compute reaches."""
    from bench import timing
    from bench.cases.case import SIZES, Case, Setup

    def case(error, offset):
        def ours(x):
            assert all(t.data_ptr() % 16 == 4 * offset for t in x)
            return x[0] + error

        small = Case(lambda: torch.ones(3), {"ours": lambda: lambda x: x}, expected=lambda x: x)
        made = {"ours": lambda: ours, "ours, fewer": lambda: lambda x: x[0] * 2, "peer": lambda: lambda x: x[0] + error}
        return Case(lambda: (torch.ones(8), torch.zeros(5)), made, expected=lambda x: x[0], checked=small)

    setup = Setup("cpu", SIZES["cpu", True].short, timing.CpuMeter())
    good = ops.measure(setup, case(0.0, 0), case(0.0, 1))["contestants"]
    assert "ms" in good["ours"] and "failed" not in good["ours"]
    bad = ops.measure(setup, case(0.0, 0), case(1.0, 1))["contestants"]
    assert "other bits" in bad["ours"]["failed"] and "ms" not in bad["ours"]
    assert setup.memory(4, 8, 6)[0].data_ptr() % 16 == 0
    off = Setup("cpu", SIZES["cpu", True].short, timing.CpuMeter(), offset=1)
    for a, b in zip(setup.memory(4, 8, 6), off.copies(off.memory(4, 8, 6)), strict=True):
        assert torch.equal(a, b) and b.data_ptr() % 16 == 4


class FakeLayer(torch.nn.Module):
    """The interface of sparse-delta-memory's layer; remembers what it was asked for."""

    made = []  # noqa: RUF012

    def __init__(self, args, layer_id):
        super().__init__()
        self.args, self.weight = args, torch.nn.Parameter(torch.full((args.dim,), torch.nan))
        self.calls, self.gradients = [], []
        self.made.append(self)

    def init_weights(self):
        torch.nn.init.ones_(self.weight)

    def forward(self, x):
        assert x.dtype == self.weight.dtype and not self.weight.isnan().any()
        self.calls.append(tuple(x.shape))
        out = x * self.weight
        out.register_hook(lambda gradient: self.gradients.append(tuple(gradient.shape)))
        return out, "the state after the last token"


class BreakingLayer(FakeLayer):
    def forward(self, x):
        raise RuntimeError("there is no nvcc")


@pytest.fixture
def beside_the_rival(ops, monkeypatch, threads):
    """What a report says of sparse-delta-memory, and the report: with a stand-in for its layer, or without any."""
    from bench.cases.case import SIZES

    def run(layer, slow_peers=True, compiled=True):
        of = lambda **arguments: SimpleNamespace(**arguments)
        module = SimpleNamespace(SparseDeltaMemory=layer, SparseDeltaMemoryArgs=of) if layer else None
        monkeypatch.setitem(sys.modules, "sparse_delta_memory", module)
        FakeLayer.made.clear()
        sizes = dataclasses.replace(SIZES["cpu", True].short, compiled=compiled)
        report = ops.run(ops_options(cases="rival", slow_peers=slow_peers), sizes=sizes)
        (record,) = ops.of_family(report, "rival").values()
        return record["contestants"]["sparse-delta-memory"], report

    return run


def test_the_rival_s_layer_is_made_and_called_with_its_shape(ops, beside_the_rival):
    found, report = beside_the_rival(FakeLayer)
    assert found["ms"]["repeats"] >= 1 and "another update rule" in found["unlike"]
    (layer,) = FakeLayer.made
    # P, width, B, T, C, R: 16, 24, 2, 32, 8, 12
    expected = dict(dim=24, slots_per_head=256, num_writes=12, num_reads=12, chunk_size=8)
    assert vars(layer.args) == expected and layer.weight.dtype == torch.bfloat16
    assert set(layer.calls) == set(layer.gradients) == {(2, 32, 24)} and len(layer.calls) == len(layer.gradients)
    text = "\n".join(ops.plain(report, "rival"))
    assert "sparse-delta-memory *" in text and "* sparse-delta-memory: another update rule" in text


@pytest.mark.parametrize(
    ("layer", "options", "result", "why"),
    [
        (FakeLayer, dict(slow_peers=False), "absent", "no --slow-peers"),
        (FakeLayer, dict(compiled=False), "absent", "left out of a quick run"),
        (None, {}, "absent", "not installed"),
        (BreakingLayer, {}, "failed", "RuntimeError: there is no nvcc"),
    ],
    ids=["not asked for", "quick", "not installed", "breaks"],
)
def test_a_rival_that_does_not_run_is_named_with_the_reason(ops, beside_the_rival, layer, options, result, why):
    found, report = beside_the_rival(layer, **options)
    assert found[result] == why and "ms" not in found
    assert len(FakeLayer.made) == (layer is BreakingLayer), "what is left out is not even made"
    assert why in "\n".join(ops.plain(report, "rival")) and not list(ops.failures(report))


def test_a_peer_that_came_without_what_it_needs_says_so(ops, tmp_path, monkeypatch):
    from bench import peers
    from bench.cases.case import Absent

    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "peer_without_triton.py").write_text("print('a page'); import no_such_triton")
    (tmp_path / "peer_of_another_torch.py").write_text("raise OSError('libtorch.so')")
    for name, why in {
        "no_such_peer": "not installed",
        "no_such_peer.operators": "not installed",
        "peer_without_triton": "does not load here: no module no_such_triton",
        "peer_of_another_torch": "does not load here: OSError",
    }.items():
        with pytest.raises(Absent, match=f"^{why}$"):
            peers.package(name)


def test_a_stable_sort_stands_beside_the_segments(ops, threads):
    from bench import timing
    from bench.cases import rows
    from bench.cases.case import SIZES, Setup

    sizes = SIZES["cpu", True].short
    report = ops.run(ops_options(cases="segments"), sizes=sizes)
    for record in ops.of_family(report, "segments").values():
        found = record["contestants"]["torch.sort alone"]
        assert found["ms"]["repeats"] >= 1 and "a part of it" in found["unlike"]
    _, make = list(rows.segments(Setup("cpu", sizes, timing.CpuMeter())))[-1]
    case = make()
    x = case.inputs()  # hot-8: every slot often
    ordered, places = case.contestants["torch.sort alone"]()(x)
    slots = x[0].flatten().tolist()
    assert places.tolist() == sorted(range(len(slots)), key=slots.__getitem__) and ordered.dtype == torch.int32


class FakeMeter:
    """Counts bytes that its function takes and gives back."""

    counts_memory, in_use, peak = True, 100, 0

    def take(self, size):
        self.in_use += size
        self.peak = max(self.peak, self.in_use)

    def bytes_in_use(self):
        return self.in_use

    def forget_peak(self):
        self.peak = self.in_use

    def peak_bytes(self):
        return self.peak


def test_retained_memory_is_what_waits_for_the_backward_pass(ops):
    from bench import timing

    meter = FakeMeter()

    class Step:
        after_forward = None

        def __call__(self):
            meter.take(40)  # saved
            meter.take(7)
            meter.take(-7)
            if self.after_forward:
                self.after_forward()
            meter.take(20)
            meter.take(-57)
            return "answer"

    plain = Step()
    rounds = ops.Round(lambda x: plain(), [None])
    assert timing.memory_of(meter, rounds) == ("answer", {"peak_bytes": 60, "retained_bytes": 3})
    meter.in_use, step = 100, Step()
    assert timing.memory_of(meter, step) == ("answer", {"peak_bytes": 60, "retained_bytes": 40})
    assert step.after_forward is None


def test_slots_are_drawn_as_their_distribution_says(ops):
    from bench import timing
    from bench.cases import scan
    from bench.cases.case import SIZES, Setup

    s = Setup("cpu", SIZES["cpu", True], timing.CpuMeter())
    share = {}
    for name in ("uniform", "zipf-0.5", "zipf-1.0", "hot-8"):
        slots = s.slots(name, 1024, 4096, 8)
        assert slots.shape == (4096, 8) and slots.dtype == torch.int32 and 0 <= slots.min() and slots.max() < 1024
        share[name] = float(slots.flatten().bincount().max()) / slots.numel()
    assert share["uniform"] < 0.003 < 0.012 < share["zipf-0.5"] < 0.03 < 0.1 < share["zipf-1.0"] < 0.16
    assert share["hot-8"] == 0.125 and len(s.slots("hot-8", 1024, 64, 8).unique()) == 8

    hot = scan.shape_of(s, "h1k8", 2, 64, 16, distribution="hot-8")
    reading = scan.fwpkm_cuda.chunk_scan_(
        *(t.clone() for t in scan.memory_of(s, hot)), *scan.draw(s, hot), **hot.options()
    )
    assert len(reading.indices.unique()) == 8, "a stream asks for the same slots, whatever is written"
    indices = torch.tensor([[[[0, 1]], [[1, 2]], [[0, 5]]]])
    assert scan.usage(indices, 1) == (6, 2, 4)  # 1 and 0 are read again


def times(median, spread=0.0):
    return {"min": median, "q1": median * (1 - spread), "median": median, "q3": median * (1 + spread), "max": median,
            "repeats": 9}  # fmt: skip


def gpu_report(ms, bytes=10**6):
    """A report with these medians: {case: {contestant: ms}}"""
    figures = lambda x: {"ms": times(x), "peak_bytes": 10**9, "retained_bytes": 10**8, "error": 0.0}
    cases = {
        case: {
            "family": case.split(",")[0],
            "bytes": bytes,
            "flops": 0,
            "floor_ms": 0.001,
            "per": 8,
            "facts": {"distinct": 40000, "row_bytes": 10**6},
            "contestants": {name: figures(x) for name, x in contestants.items()},
        }
        for case, contestants in ms.items()
    }
    command = "python -m bench ops --device cuda"
    machine = dict(
        gpu="NVIDIA H200", processor="-", threads=2, torch="2.13.0", commit="abc", date="today", command=command
    )
    return {"device": "cuda", "ceilings": {"copy_bytes_per_second": 1e12}, "machine": machine, "cases": cases}


TRAIN = "layer_train, h1k8 B=8 T=4096 C=512, "


def test_goals_are_met_missed_or_not_measured(ops):
    ms = {
        "gather, 32768 reads, uniform": {"ours": 0.00125},
        "gather, 131072 reads, uniform": {"ours": 0.00200},
        "score_topk, M=4096 H=1 R=8 dot float32": {"ours": 0.1, "eager": 2.0, "matrix products alone": 0.02},
        TRAIN + "uniform": {"ours": 2.0, "ours without commit": 1.6, "release": 44.0},
        TRAIN + "hot-8": {"ours": 2.8},
        "update, log, uniform": {"ours": 0.005, "ours, read only": 0.002},
        "decode, h1k8, read and written": {"ours, graph": 0.009},
        "decode, h1k8, read": {"ours": 0.1, "ours, graph": 0.011},
    }
    text = "\n".join(ops.goals.lines(gpu_report(ms)))
    for line in (
        "gather of many rows, of the copy bandwidth: 50 %, goal at least 80 % NOT met",
        "write with a log, of the copy bandwidth: 66.7 %, goal at least 75 % NOT met",
        "search, to its matrix products alone: 5x, goal at most 3x NOT met",
        "search, as fast as eager PyTorch: 20x, goal at least 10x met",
        "training, forward and backward, a chunk: 200 us, goal at most 230 us met",
        "training, as fast as the release: 22x, goal at least 18x met",
        "a decoded token in a CUDA graph: 11 us, goal at most 10 us NOT met",
        "retained memory of training, less than the release's: 1x, goal at least 8x NOT met",
        "slots that all tokens read, to uniform slots: 1.4x, goal at most 1.5x met",
        "inference, a chunk: not measured",
        "the rival's shape, peak memory: not measured",
    ):
        assert line in text.splitlines(), text


def test_two_reports_are_compared(ops, tmp_path, monkeypatch, capsys):
    from bench import __main__ as command

    ms = {"gather, 1 read": {"ours": 1.0, "peer": 2.0}, "decode": {"ours": 1.0}, "gone": {"ours": 1.0}}
    old, new = gpu_report(ms), gpu_report(ms | {"new": {"ours": 1.0}})
    del new["cases"]["gone"]
    new["cases"]["gather, 1 read"]["contestants"]["ours"]["ms"] = times(0.5)
    new["cases"]["gather, 1 read"]["contestants"]["peer"]["ms"] = times(2.2)
    new["cases"]["decode"]["contestants"]["ours"]["ms"] = times(1.2, spread=0.3)  # not clear of the old ones
    for name, report in (("old", old), ("new", new)):
        (tmp_path / name).write_text(json.dumps(report))
    monkeypatch.setattr(sys, "argv", ["bench", "compare", str(tmp_path / "old"), str(tmp_path / "new")])
    command.main()
    text = capsys.readouterr().out
    assert "0.50  faster" in text and "1.10  slower" in text and "1 faster, 1 slower, 1 about as before" in text
    assert "not in new: gone: ours" in text and "not in old: new: ours" in text and "NOT the same" not in text


def test_the_table_takes_its_place_in_a_document(ops, tmp_path, monkeypatch):
    from bench import __main__ as command
    from bench import table

    ms = {
        TRAIN + "uniform": {"ours": 1.84, "release": 55.2},
        "decode, h1k8, read and written": {"ours, graph": 0.02},
        "decode, h1k8, read": {"ours, graph": 0.00951, "eager": 0.2},
    }
    (tmp_path / "report.json").write_text(json.dumps(gpu_report(ms)))
    document = tmp_path / "README.md"
    document.write_text(f"# Speed\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    monkeypatch.setattr(sys, "argv", ["bench", "table", str(tmp_path / "report.json"), "--write", str(document)])
    command.main()
    command.main()  # again: nothing changes
    text = document.read_text()
    assert text.startswith("# Speed\n" + table.BEGIN) and text.endswith(table.END + "\nafter\n") and "old" not in text
    assert (
        "NVIDIA H200; torch 2.13.0, commit abc, today: `python -m bench ops --device cuda`; P=512, K=V=512, float32."
        in text
    )
    assert "| training step of 8 x 4096 tokens, h1k8 | 1.84 ms | 0% | 1,000 MB | release 55.2 ms (30x) |" in text
    assert "| a decoded token in a CUDA graph | 9.51 us | 11% | 1,000 MB | eager 200 us (21x) |" in text
    document.write_text("no place for it")
    with pytest.raises(SystemExit, match="once each"):
        command.main()


def test_the_prediction_is_of_cases_that_exist(ops):
    from bench import compare
    from bench.cases import FAMILIES
    from bench.cases.case import SIZES

    path = ROOT / "bench" / "results" / "predictions-h200.json"
    prediction = json.loads(path.read_text())
    sizes = SimpleNamespace(device="cuda", sizes=SIZES["cuda", False])
    known = {f"{family}, {name}" for family, of in FAMILIES.items() for name, _ in of(sizes)}
    assert set(prediction["cases"]) <= known
    assert all(x["launches"] > 0 for x in prediction["cases"].values())
    assert "0 faster, 0 slower" in "\n".join(compare.lines(prediction, prediction))
    assert "not measured" not in "\n".join(ops.goals.lines(prediction))
