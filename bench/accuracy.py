"""python -m bench accuracy: errors of the operators and their gradients, beside those of plain PyTorch.

    python -m bench accuracy [--device cpu|cuda] [--json FILE] [--markdown docs/accuracy.md] [--threads 2] [--quick]

Three computations are given the same numbers: `fwpkm_cuda`; `fwpkm_cuda.reference`, plain PyTorch with autograd, in
float32, its results rounded to the dtype of ours; and the same in float64, which is the truth. An error is a distance
from the truth divided by the truth's largest entry. Memories are float32; queries, targets and loss weights float32,
bfloat16 or float16.

Where rounding leads a token to another slot the results have nothing to do with each other. Such tokens are counted,
for ours and for PyTorch, and then drawn anew until all three read the same slots: leaving them out would not do, for
what they write others read. In a scan so are those whose R-th and next sub-key are all but equally similar, because the
addressing loss depends on which of the two is among the R.
"""

import json
from pathlib import Path

import torch

import fwpkm_cuda
from bench.timing import machine
from fwpkm_cuda import reference

R, GOAL = 8, 2.0
SIZES = dict(P=128, width=128, T=1024, C=256, seeds=2, blocks=8)  # blocks of T tokens: for the share of other slots
QUICK = dict(P=16, width=16, T=64, C=16, seeds=1, blocks=1)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCORES = {"dot": "paper", "idw": "release"}  # score: write rule; the default and the released configuration
SIDES = ("ours", "torch", "truth")
TIE = 3e-6  # relative: similarities that float32 may take for equal


# ------------------------------------------------------------------------------------------------- three computations
def functions(side):
    """product_key_topk, value_gather, chunk_scan of one side"""
    return fwpkm_cuda if side == "ours" else reference


def leaves(side, inputs):
    """Copies that require grad: float64 for the truth, else as they are."""
    return {
        name: x.detach().to(torch.float64 if side == "truth" else x.dtype).requires_grad_()
        for name, x in inputs.items()
    }


def wide(side, x):
    """PyTorch computes in float32 whatever the dtype of its inputs; ours does so by itself."""
    return x.float() if side == "torch" else x


def by_slot(reads, indices):
    """The reads of each token in the order of their slots, so that a swap of two is no difference."""
    return reads.gather(-1, indices.long().argsort(-1))


def topk(side, x, score):
    reads = functions(side).product_key_topk(wide(side, x["query"]), x["sub_keys"], R, score)
    scores, indices = reads[:2]
    return {"scores": by_slot(scores, indices)}, by_slot(indices, indices)


def gather(side, x, indices):
    return {"out": functions(side).value_gather(x["values"], indices, x["weights"])}, indices


def scan(side, x, score, chunk_size):
    values, sub_keys, *tokens = x.values()
    tokens = [wide(side, t) for t in tokens]
    options = dict(topk=R, chunk_size=chunk_size, score=score, write_rule=SCORES[score])
    if side == "ours":
        result = fwpkm_cuda.chunk_scan(values, sub_keys, *tokens, **options, sparse_grad=False)
        here = result.new_slots >= 0
        new_values = values.index_put((result.new_slots[here].long(),), result.new_rows[here])
        new_sub_keys = result.new_sub_keys
    else:
        result = reference.chunk_scan(values, sub_keys, *tokens, **options)
        new_values, new_sub_keys = result.values, result.sub_keys
    read = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    read[result.indices.flatten().long()] = True
    outputs = {"out": result.out, "losses": result.losses, "new values": new_values[read], "new sub_keys": new_sub_keys}
    return outputs, by_slot(result.indices, result.indices)


# ------------------------------------------------------------------------------------------------------------- inputs
def draw_memory(sizes, seed, device):
    memory = fwpkm_cuda.Memory.random(sizes["P"], sizes["width"], sizes["width"], seed=seed)
    return {"values": memory.values.to(device), "sub_keys": memory.sub_keys.to(device)}


class Draw:
    """Random numbers that are the same on every device."""

    def __init__(self, seed, device):
        self.generator, self.device = torch.Generator().manual_seed(seed), device

    def __call__(self, *shape, dtype=torch.float32):
        return torch.randn(*shape, generator=self.generator).to(self.device, dtype)


def draw_tokens(draw, sizes, dtype):
    T, width = sizes["T"], sizes["width"]
    return {
        "query": draw(1, T, 1, width, dtype=dtype) / 2,
        "target": draw(1, T, width, dtype=dtype),
        "loss_weights": draw(1, T, dtype=dtype).sigmoid(),
    }


def other_slots(f, inputs):
    """Which tokens read other slots than the truth: {side: (B, T) bool}"""
    with torch.no_grad():
        slots = {side: f(side, leaves(side, inputs))[1] for side in SIDES}
    return {side: (slots[side] != slots["truth"]).any(-1).any(-1) for side in SIDES[:2]}


def nearly_tied(inputs, score, chunk_size):
    """Which tokens of a scan have an R-th and a next sub-key that float32 cannot tell apart: (B, T) bool"""
    values, sub_keys, *tokens = leaves("truth", inputs).values()
    found = []
    with torch.no_grad():
        for query, target, gate in zip(*(t.split(chunk_size, 1) for t in tokens)):
            best = reference.similarities(query, sub_keys, score).sort(dim=-1, descending=True)[0]
            gap = best[..., R - 1] - best[..., R]
            found.append((gap < TIE * best.abs().amax(-1)).flatten(2).any(-1))
            options = dict(topk=R, chunk_size=chunk_size, score=score, write_rule=SCORES[score])
            *_, values, sub_keys = reference.chunk_scan(values, sub_keys, query, target, gate, **options)
    return torch.cat(found, 1)


def settled(f, inputs, draw, unclear=lambda inputs: False):
    """Draws queries anew until all sides read the same slots. -> how many tokens did not at first, per side"""
    first = different = other_slots(f, inputs)
    for _ in range(50):
        again = different["ours"] | different["torch"] | unclear(inputs)
        if not again.any():
            return {side: int(x.sum()) for side, x in first.items()}
        query = inputs["query"]
        inputs["query"] = torch.where(again[..., None, None], draw(*query.shape, dtype=query.dtype) / 2, query)
        different = other_slots(f, inputs)
    raise SystemExit("the slots that are read differ from float64's in every draw: this is no matter of rounding")


# ------------------------------------------------------------------------------------------------------------- errors
def results(f, side, inputs, upstream):
    """{name: tensor} of the outputs and of the gradients; rows of the memory that nothing reads are left out."""
    x = leaves(side, inputs)
    outputs, _ = f(side, x)
    if side != "truth":  # both have the dtype of ours, and so have the gradients that arrive
        outputs = {name: y.to(upstream[name].dtype) for name, y in outputs.items()}
    arriving = [upstream[name].to(y.dtype) for name, y in outputs.items()]
    gradients = torch.autograd.grad(list(outputs.values()), list(x.values()), arriving)
    found = outputs | {f"gradient of {name}": g for name, g in zip(x, gradients)}
    return {name: y.detach().double() for name, y in found.items()}


def errors(f, inputs, draw):
    """{name: {side: errors of all entries}}"""
    outputs, _ = f("ours", leaves("ours", inputs))
    upstream = {name: draw(*y.shape, dtype=y.dtype) for name, y in outputs.items()}
    mine, other, truth = (results(f, side, inputs, upstream) for side in SIDES)
    distance = lambda x, y: (x - y).abs() / y.abs().max()
    read = lambda name, y: y != 0 if name == "gradient of values" else ...  # other rows have no gradient
    return {
        name: {side: distance(x[name], y)[read(name, y)].flatten() for side, x in (("ours", mine), ("torch", other))}
        for name, y in truth.items()
    }


def summary(parts):
    """Of the errors of several draws: {name: {side: {"max", "p99"}}}"""
    of = lambda x: {"max": float(x.max()), "p99": float(x.kthvalue(max(1, round(0.99 * len(x))))[0])}
    return {
        name: {side: of(torch.cat([part[name][side] for part in parts])) for side in SIDES[:2]} for name in parts[0]
    }


# --------------------------------------------------------------------------------------------------------- operators
def measure_topk(score, dtype, sizes, device):
    f = lambda side, x: topk(side, x, score)
    parts, other, tokens = [], {"ours": 0, "torch": 0}, 0
    for seed in range(max(sizes["seeds"], sizes["blocks"])):
        draw = Draw(seed, device)
        query = draw_tokens(draw, sizes, dtype)["query"]
        inputs = {"query": query, "sub_keys": draw_memory(sizes, seed, device)["sub_keys"]}
        for side, count in settled(f, inputs, draw).items():
            other[side] += count
        tokens += query.shape[1]
        if seed < sizes["seeds"]:
            parts.append(errors(f, inputs, draw))
    return {"errors": summary(parts), "tokens": tokens, "other_slots": other}


def measure_gather(dtype, sizes, device):
    parts = []
    for seed in range(sizes["seeds"]):
        draw = Draw(seed, device)
        values = draw_memory(sizes, seed, device)["values"].to(dtype)
        indices = torch.randint(len(values), (sizes["T"], R), generator=draw.generator).to(device)
        inputs = {"values": values, "weights": draw(sizes["T"], R, dtype=dtype).softmax(-1)}
        parts.append(errors(lambda side, x, i=indices: gather(side, x, i), inputs, draw))
    return {"errors": summary(parts)}


def measure_scan(score, dtype, sizes, device):
    f = lambda side, x: scan(side, x, score, sizes["C"])
    parts, other, tokens = [], {"ours": 0, "torch": 0}, 0
    for seed in range(sizes["seeds"]):
        draw = Draw(seed, device)
        inputs = draw_memory(sizes, seed, device) | draw_tokens(draw, sizes, dtype)
        for side, count in settled(f, inputs, draw, lambda x: nearly_tied(x, score, sizes["C"])).items():
            other[side] += count
        tokens += sizes["T"]
        parts.append(errors(f, inputs, draw))
    return {"errors": summary(parts), "tokens": tokens, "other_slots": other}


def run(options):
    torch.set_num_threads(options.threads)
    sizes, device = QUICK if options.quick else SIZES, torch.device(options.device)
    report = {"machine": machine(options.threads), "sizes": sizes | {"R": R}, "cases": {}}
    if device.type == "cuda":
        report["machine"]["gpu"] = torch.cuda.get_device_name(device)
    cases = report["cases"]
    for score in SCORES:
        for name, dtype in DTYPES.items():
            cases[f"product_key_topk, {score}, {name}"] = measure_topk(score, dtype, sizes, device)
    cases["value_gather, float32"] = measure_gather(torch.float32, sizes, device)
    for score in SCORES:
        for name, dtype in DTYPES.items():
            cases[f"chunk_scan, {score}, {name}"] = measure_scan(score, dtype, sizes, device)
    return report


# --------------------------------------------------------------------------------------------------------- the report
def ratio(of):
    """How many times PyTorch's error ours is, by the worse of the two measures; 0 where there is none."""
    worst = [mine / other if other else float("inf") if mine else 0.0 for mine, other in
             ((of["ours"][m], of["torch"][m]) for m in ("max", "p99"))]  # fmt: skip
    return max(worst)


def rows(report):
    """(operator, result, dtype, errors) of all figures, the dtypes of a result together"""
    found = {}
    for case, x in report["cases"].items():
        operator, dtype = case.rsplit(", ", 1)
        for result, of in x["errors"].items():
            found.setdefault((operator, result), []).append((operator, result, dtype, of))
    return [row for same in found.values() for row in same]


def lines(report):
    """The report as text."""
    m = report["machine"]
    yield f"{m.get('gpu', m['processor'])}, torch {m['torch']}, commit {m['commit']}, {m['date']}"
    yield f"{'':58}{'max':>9}{'PyTorch':>9}{'p99':>9}{'PyTorch':>9}{'ratio':>7}"
    for operator, result, dtype, of in rows(report):
        figures = "".join(f"{of[side][m]:9.1e}" for m in ("max", "p99") for side in SIDES[:2])
        yield f"{operator:24}{result:25}{dtype:9}{figures}{ratio(of):7.2f}" + ("" if ratio(of) <= GOAL else "  NOT met")
    for case, x in report["cases"].items():
        if "tokens" in x:
            o = x["other_slots"]
            yield f"{case}: of {x['tokens']} tokens {o['ours']} read other slots than in float64; PyTorch {o['torch']}"
    yield goal(report)


def goal(report):
    missed = sum(ratio(of) > GOAL for *_, of in rows(report))
    return f"goal at most {GOAL:g} times PyTorch's error: met by {len(rows(report)) - missed} of {len(rows(report))}"


def section(report):
    """The figures of one device for the document, from its heading to its end."""
    m, s = report["machine"], report["sizes"]
    where = m.get("gpu") or f"{m['processor']}, {m['threads']} threads, {m['instruction_set']}"
    yield f"## {'CUDA' if 'gpu' in m else 'CPU'}"
    yield ""
    yield f"{where}; torch {m['torch']}, commit {m['commit']}, {m['date']}: `{m['command']}`."
    yield f"P={s['P']}, K=V={s['width']}, R={s['R']}, H=1, T={s['T']}, C={s['C']}; {s['seeds']} draws; {goal(report)}."
    operator = None
    for name, result, dtype, of in rows(report):
        if name != operator:
            operator = name
            yield from ("", f"### {name}", "")
            yield "| result | dtype | maximum | PyTorch's | 99 % | PyTorch's | ratio | at most 2 |"
            yield "|---|---|--:|--:|--:|--:|--:|---|"
        figures = " | ".join(f"{of[side][m]:.1e}" for m in ("max", "p99") for side in SIDES[:2])
        yield f"| {result} | {dtype} | {figures} | {ratio(of):.2f} | {'met' if ratio(of) <= GOAL else '**not met**'} |"
    yield from ("", "### Tokens that read other slots than in float64", "")
    yield from ("| operator, dtype | tokens | ours | PyTorch |", "|---|--:|--:|--:|")
    for case, x in report["cases"].items():
        if "tokens" in x:
            shares = " | ".join(f"{x['other_slots'][side] / x['tokens']:.3%}" for side in SIDES[:2])
            yield f"| {case} | {x['tokens']:,} | {shares} |"


INTRODUCTION = """# Accuracy

Errors of the operators and of their gradients, as distances from float64 divided by the largest entry, beside those of
plain PyTorch: `fwpkm_cuda.reference` and autograd in float32, results rounded to the dtype of ours. All are given the
same numbers. The memory is float32; dtype is that of query, target and loss weights. Ratio: ours to PyTorch's, of the
maxima or of the 99th percentiles, whichever is larger; the goal is at most 2. Gradients are those of all results of the
operator together, weighted at random. Rows of the memory that nothing reads are left out. `dot` goes with the paper's
write rule, `idw` with the release's.
"""


def write_markdown(path, report):
    """Puts the section of this report's device into the document and leaves the other device's."""
    new = "\n".join(section(report))
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    sections = {text.split("\n")[0]: f"## {text}".strip() for text in old} | {new.split("\n")[0][3:]: new}
    path.write_text("\n".join([INTRODUCTION, "\n\n".join(sections[name] for name in sorted(sections))]) + "\n")


def add_arguments(parser):
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--markdown", type=Path, help="write the tables into this document")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="small sizes: does it run?")


def main(options):
    report = run(options)
    print("\n".join(lines(report)))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
    if options.markdown:
        write_markdown(options.markdown, report)
