"""python -m bench capability: what run-time dispatch of the CPU loops pays, each instruction set in its own process.

2 threads, float32, P=512, K=V=512, R=8, T=2048; best of 9 runs.
"""

import json
import os
import subprocess
import sys

from bench.timing import machine, milliseconds


def measure():
    """Times of this process, in ms; FWPKM_CPU_CAPABILITY chose its instruction set."""
    import torch

    import fwpkm_cuda

    torch.set_num_threads(2)
    torch.manual_seed(0)
    P, K, V, R, T, C = 512, 512, 512, 8, 2048, 512
    values, sub_keys = torch.randn(P * P, V) / V**0.5, (torch.rand(1, 2, P, K // 2) * 2 - 1) / K**0.5
    query, target = torch.randn(1, T, 1, K), torch.randn(1, T, V)
    scores, indices = fwpkm_cuda.product_key_topk(query, sub_keys, R)
    weights = scores.softmax(-1)
    options = dict(topk=R, chunk_size=C)

    def train():
        q, t = query.clone().requires_grad_(), target.clone().requires_grad_()
        fwpkm_cuda.chunk_scan(values, sub_keys, q, t, **options).out.sum().backward()

    memory = values.clone(), sub_keys.clone()
    cases = {
        "product_key_topk dot": lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R),
        "product_key_topk idw": lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R, "idw"),
        "value_gather": lambda: fwpkm_cuda.value_gather(values, indices, weights),
        "chunk_scan_": lambda: fwpkm_cuda.chunk_scan_(*memory, query, target, **options),
        "chunk_scan + backward": train,
    }
    return {name: milliseconds(case)["min"] for name, case in cases.items()}


def add_arguments(parser):
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--measure", action="store_true", help="(internal) measure this process")


def main(options):
    if options.measure:
        print(json.dumps(measure()))
        return
    results = {}
    for capability in ("baseline", "avx2", "avx512"):
        environment = dict(os.environ, FWPKM_CPU_CAPABILITY=capability)
        command = [sys.executable, "-m", "bench", "capability", "--measure"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        results[capability] = json.loads(done.stdout.splitlines()[-1])
    report = {"machine": machine(2), "ms": results}
    m = report["machine"]
    print(f"{m['processor']}, 2 threads, commit {m['commit']}; ms, and times faster than baseline")
    for case in results["baseline"]:
        row = [results[c][case] for c in results]
        print(f"{case:24}" + "".join(f"{ms:9.1f} ({row[0] / ms:4.1f}x)" for ms in row))
    if options.json:
        with open(options.json, "w") as file:
            json.dump(report, file, indent=1)
