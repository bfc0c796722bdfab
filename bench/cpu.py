"""python -m bench cpu: speed and memory on the CPU, beside a dense baseline and, if it is there, the released code.

    python -m bench cpu [--json FILE] [--release-dir DIR] [--threads 2] [--quick]

B=1, T=2048, C=512, P=512 (262,144 slots), K=V=512, R=8, H=1, float32. Every contestant runs in a process of its own, is
checked against `fwpkm_cuda.reference` or its peer first, and is given the same numbers. Times are the best of several
runs; memory is the highest resident size above what the inputs and the memory took.
"""

import itertools
import json
import subprocess
import sys

import torch
import torch.nn.functional as F

import fwpkm_cuda
from bench import release
from bench.dense_baseline import dense_scan
from bench.timing import machine, milliseconds, milliseconds_in_turn, peak_resident_bytes, resident_bytes

C, R, K, V = 512, 8, 512, 512
CONTESTANTS = ("ours in place", "ours", "dense baseline", "release")
LENGTHS = (512, 2048, 8192, 32768)
GRIDS = (128, 256, 512, 1024)


def make(T, P, seed=0, width=V):
    """values, sub_keys, query, target, loss_weights"""
    draw = torch.Generator().manual_seed(seed)
    new = lambda *shape: torch.randn(*shape, generator=draw)
    memory = fwpkm_cuda.Memory.random(P, K, width, seed=seed)
    return memory.values, memory.sub_keys, new(1, T, 1, K) / 4, new(1, T, width), new(1, T).sigmoid()


# -------------------------------------------------------------------------------------- one contestant, one process
def contestant(name, mode, score, T, P, release_dir, calls=1):
    """() -> out: one call of it for T tokens, forward only or with the backward pass of (out * r).sum().

    With `calls` it goes round so many different inputs."""
    values, sub_keys, *tokens = make(T * calls, P)
    options = dict(topk=R, chunk_size=C, score=score)
    inputs = itertools.cycle([[x.contiguous() for x in call] for call in zip(*(t.split(T, 1) for t in tokens))])
    module = release.make(release_dir, values, sub_keys, R, score).train(mode == "train") if name == "release" else None

    def forward(query, target, gate):
        if name == "ours in place":
            return fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, gate, write_rule="release", **options).out
        if name == "ours":
            scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, gate, write_rule="release", **options)
            forward.commit = lambda: fwpkm_cuda.commit_(values, sub_keys, scan)
            return scan.out
        if name == "dense baseline":
            out, new_values, new_sub_keys = dense_scan(values, sub_keys, query, target, gate, **options)
            forward.commit = lambda: (values.copy_(new_values.detach()), sub_keys.copy_(new_sub_keys.detach()))
            return out
        return release.run(module, query, target, gate, C)

    forward.commit = lambda: None

    def call():
        if mode == "eval":
            with torch.no_grad():
                out = forward(*next(inputs))
                forward.commit()
            return out
        query, target, gate = (x.detach().requires_grad_() for x in next(inputs))
        out = forward(query, target, gate)
        (out * target.detach()).sum().backward()
        forward.commit()
        return out.detach()

    return call


def check(call, score, T, P):
    """The first call against the operators in place, which the tests hold against the reference."""
    values, sub_keys, *tokens = make(T, P)
    expected = fwpkm_cuda.chunk_scan_(
        values, sub_keys, *tokens, topk=R, chunk_size=C, score=score, write_rule="release"
    )
    error = float((call() - expected.out).norm() / expected.out.norm())
    if not error < 1e-2:  # rounding leads some of 16,384 reads to other slots
        raise SystemExit(f"it does not compute what the operators compute: relative difference {error:.1e}")
    return error


def measure_one(name, mode, score, T, P, calls, repeats, release_dir, threads):
    """Of this process: times and memory of one contestant; a time is that of `calls` calls, each of other tokens."""
    torch.set_num_threads(threads)
    error = check(
        contestant(name, mode, score, min(T, 2 * C), min(P, 128), release_dir), score, min(T, 2 * C), min(P, 128)
    )
    call = contestant(name, mode, score, T, P, release_dir, calls)
    before = resident_bytes()
    call()
    peak = max(0, peak_resident_bytes() - before)
    return {
        "ms": milliseconds(lambda: [call() for _ in range(calls)], repeats, warm_up=0),
        "peak_bytes": peak,
        "error": error,
    }


def in_a_process(*arguments):
    command = [sys.executable, "-m", "bench", "cpu", "--one", json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments[0]}: {(done.stderr.strip() or 'failed').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------ the operators
def measure_reads(T, P, repeats):
    """value_gather and a read-write of every token, per read, beside embedding_bag on the same rows."""
    values, sub_keys, query, target, gate = make(T, P)
    draw = torch.Generator().manual_seed(1)
    indices = torch.randint(P * P, (T, R), generator=draw, dtype=torch.int32)
    weights = torch.rand(T, R, generator=draw)
    bag = lambda: F.embedding_bag(indices, values, per_sample_weights=weights, mode="sum")
    torch.testing.assert_close(fwpkm_cuda.value_gather(values, indices, weights), bag(), rtol=1e-4, atol=1e-4)
    gather = lambda: fwpkm_cuda.value_gather(values, indices, weights)
    result = milliseconds_in_turn({"value_gather": gather, "embedding_bag": bag}, 30 * repeats, 3)
    for grad, sparse in (("dense", False), ("sparse", True)):
        leaf = values.clone().requires_grad_()
        peer = lambda s=sparse, v=leaf: F.embedding_bag(indices, v, mode="sum", sparse=s).sum().backward()
        ours = lambda s=sparse, v=leaf: fwpkm_cuda.value_gather(v, indices, weights, s).sum().backward()
        for name, f in ((f"value_gather, {grad} gradient", ours), (f"embedding_bag, {grad} gradient", peer)):
            leaf.grad = None
            result[name] = milliseconds(lambda f=f, v=leaf: (setattr(v, "grad", None), f()), repeats)
    options = dict(topk=R, chunk_size=C)
    scan = lambda: fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, gate, **options)
    result["chunk_scan_"] = milliseconds(scan, repeats)
    result["of it product_key_topk"] = milliseconds(lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R), repeats)
    result["embedding_bag and index_add_"] = milliseconds(
        lambda: bag_and_index_add(values, indices, weights, target), repeats
    )
    before = values.clone()
    scan = fwpkm_cuda.chunk_scan_(values, sub_keys, query, target, gate, **options)
    changed = int((values != before).any(-1).sum())
    assert changed <= scan.indices.unique().numel(), "a row that was not read has changed"
    return {"ms": result, "rows_changed": changed, "rows": P * P, "reads": T * R}


def bag_and_index_add(values, indices, weights, target):
    """The traffic of a scan with nothing else to it: a chunk reads its rows, then its tokens add a vector to theirs."""
    for ids, factors, rows in zip(indices.split(C), weights.split(C), target[0].split(C)):
        F.embedding_bag(ids, values, per_sample_weights=factors, mode="sum")
        values.index_add_(0, ids.flatten(), rows.repeat_interleave(R, 0), alpha=1e-6)


def measure_search(T, P, repeats):
    """product_key_topk beside its two matrix products alone, and beside eager PyTorch."""
    _, sub_keys, query, _, _ = make(T, P, width=2)
    halves = query.view(T, 2, K // 2).transpose(0, 1).contiguous()
    outs = [torch.empty(T, P) for _ in range(2)]
    keys = [k.T for k in sub_keys[0]]

    def eager(score):
        s = torch.stack([torch.mm(q, k) for q, k in zip(halves, keys)], 1)
        if score == "idw":
            square = halves.square().sum(-1).T.unsqueeze(-1) + sub_keys[0].square().sum(-1)
            s = -(1e-3 + (square - 2 * s).clamp(min=0)).log()
        best, ids = s.topk(R, -1)
        z, place = (best[:, 0, :, None] + best[:, 1, None, :]).flatten(1).topk(R, -1)
        return z, (ids[:, 0, :, None] * P + ids[:, 1, None, :]).flatten(1).gather(1, place)

    result = {"gemm": milliseconds(lambda: [torch.mm(q, k, out=o) for q, k, o in zip(halves, keys, outs)], repeats, 3)}
    for score in ("dot", "idw"):
        ours = lambda score=score: fwpkm_cuda.product_key_topk(query, sub_keys, R, score)
        torch.testing.assert_close(ours()[0].view(T, R), eager(score)[0], rtol=1e-3, atol=1e-3)
        result[f"product_key_topk, {score}"] = milliseconds(ours, repeats, 3)
        result[f"matmul + topk + combine, {score}"] = milliseconds(lambda score=score: eager(score), repeats, 3)
    return {"ms": result}


# ------------------------------------------------------------------------------------------------ the report
def log_bytes(T):
    return T * R * V * 4  # new_rows: one row per read


def run(options):
    T, P, repeats = (1024, 128, 3) if options.quick else (2048, 512, 9)
    names = [n for n in CONTESTANTS if n != "release" or options.release_dir]
    report = {"machine": machine(options.threads), "scans": {}, "per_token": {}, "reads": {}, "search": None}
    process = lambda *case: in_a_process(*case, options.release_dir, options.threads)
    for score in ("idw", "dot"):
        for mode in ("eval", "train"):
            for name in names:
                if (name, mode) != ("ours in place", "train"):
                    slow = name in ("dense baseline", "release")
                    result = process(name, mode, score, T, P, 1, min(3, repeats) if slow else repeats)
                    report["scans"][f"{name}, {mode}, {score}"] = result
    lengths = (C, T) if options.quick else LENGTHS
    for length in lengths:  # the same tokens, cut into more or fewer calls: else a short call finds its rows in a cache
        for name, mode in (("ours in place", "eval"), ("ours", "train")):
            result = process(name, mode, "dot", length, P, lengths[-1] // length, repeats)
            report["per_token"][f"{name}, {mode}, T={length}"] = 1e3 * result["ms"]["min"] / lengths[-1]
    torch.set_num_threads(options.threads)
    for grid in (64, 128) if options.quick else GRIDS:
        report["reads"][f"P={grid}"] = measure_reads(T, grid, repeats)
    report["search"] = measure_search(T, P, 3 * repeats)
    return report


def lines(report):
    """The report as text."""
    m = report["machine"]
    yield f"{m['processor']}, {m['threads']} threads, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    yield f"{'':34}{'ms':>9}{'median':>9}{'MB above memory':>17}{'slower than ours':>18}"
    for case, x in report["scans"].items():
        _, mode, score = case.split(", ")
        fastest = report["scans"][f"{'ours in place' if mode == 'eval' else 'ours'}, {mode}, {score}"]["ms"]["min"]
        ms, peak = x["ms"], x["peak_bytes"] / 1e6
        yield f"{case:34}{ms['min']:9.1f}{ms['median']:9.1f}{peak:17.0f}{ms['min'] / fastest:17.1f}x"
    yield ""
    for case, us in report["per_token"].items():
        yield f"{case:34}{us:9.2f} us per token"
    yield ""
    for grid, x in report["reads"].items():
        yield f"{grid}: a scan of {x['reads']} reads changes {x['rows_changed']} of {x['rows']} rows; ns per read:"
        for name, ms in x["ms"].items():
            yield f"    {name:34}{1e6 * ms['min'] / x['reads']:9.1f}"
    yield ""
    gemm = report["search"]["ms"]["gemm"]["min"]
    for name, ms in report["search"]["ms"].items():
        yield f"{name:34}{ms['min']:9.2f} ms{ms['min'] / gemm:9.2f} x the matrix products alone"
    yield ""
    yield from goals(report)


def goals(report):
    """What the project set out to reach, and whether this run did."""
    scans, search = report["scans"], report["search"]["ms"]
    ms = lambda case: scans[case]["ms"]["min"]
    verdict = lambda met: "met" if met else "NOT met"
    for mode, ours in (("eval", "ours in place"), ("train", "ours")):
        peer = f"release, {mode}, idw"
        if peer in scans:
            ratio = ms(peer) / ms(f"{ours}, {mode}, idw")
            yield f"{mode}: {ratio:.0f}x the release; goal 40x {verdict(ratio >= 40)}, 100x {verdict(ratio >= 100)}"
    ours = scans["ours, train, dot"]
    beyond = ours["peak_bytes"] / 1e9 - report["log_bytes"] / 1e9
    yield f"training step: {beyond:.2f} GB beyond memory and log; goal 0.3 GB {verdict(beyond <= 0.3)}"
    for name in ("ours in place, eval", "ours, train"):
        times = [us for case, us in report["per_token"].items() if case.startswith(name)]
        spread = max(times) / min(times)
        yield f"{name}: time per token within a factor {spread:.2f} over all lengths; goal 1.3 {verdict(spread <= 1.3)}"
    for grid, x in report["reads"].items():
        ratio = x["ms"]["embedding_bag"]["min"] / x["ms"]["value_gather"]["min"]
        yield f"{grid}: value_gather {ratio:.2f}x as fast as embedding_bag; goal 1 {verdict(ratio >= 1)}"
    best = lambda x, name: x["ms"][name]["min"]
    # More slots mean more distinct rows, fewer of them in a cache: a peer with the same traffic shows how much that is.
    # The search scores 2*P sub-keys per token: the square root of the slots.
    per_read = {name: lambda x, name=name: best(x, name) for name in ("embedding_bag", "embedding_bag and index_add_")}
    per_read["value_gather"] = lambda x: best(x, "value_gather")
    per_read["chunk_scan_ but for its search"] = lambda x: best(x, "chunk_scan_") - best(x, "of it product_key_topk")
    first, *_, last = report["reads"].values() if len(report["reads"]) > 1 else [*report["reads"].values()] * 2
    growth = {name: of(last) / of(first) for name, of in per_read.items()}
    for name, peer in (
        ("value_gather", "embedding_bag"),
        ("chunk_scan_ but for its search", "embedding_bag and index_add_"),
    ):
        text = f"{growth[name]:.2f}x from the smallest to the largest P, {peer} {growth[peer]:.2f}x"
        yield f"{name}: {text}; goal no more {verdict(growth[name] <= growth[peer])}"
    for score in ("dot", "idw"):
        top = search[f"product_key_topk, {score}"]["min"]
        gemm, eager = top / search["gemm"]["min"], search[f"matmul + topk + combine, {score}"]["min"] / top
        yield (
            f"product_key_topk, {score}: {gemm:.2f}x the matrix products, goal 1.5 {verdict(gemm <= 1.5)}; "
            f"{eager:.2f}x as fast as eager, goal 1.3 {verdict(eager >= 1.3)}"
        )


def add_arguments(parser):
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--release-dir", help="folder of the released FwPKM repository, to run it beside")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")
    parser.add_argument("--one", help="(internal) measure one contestant")


def main(options):
    if options.one:
        print(json.dumps(measure_one(*json.loads(options.one))))
        return
    report = run(options)
    report["log_bytes"] = log_bytes(1024 if options.quick else 2048)
    print("\n".join(lines(report)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
