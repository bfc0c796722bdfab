"""What run-time dispatch of the CPU loops pays: the same cases with each instruction set, each in a process of its own.

python bench/cpu_capability.py [--json FILE]     2 threads, float32, P=512, K=V=512, R=8, T=2048; best of 9 runs
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time


def best_ms(function, repeats=9):
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times)


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
    return {
        "product_key_topk dot": best_ms(lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R)),
        "product_key_topk idw": best_ms(lambda: fwpkm_cuda.product_key_topk(query, sub_keys, R, "idw")),
        "value_gather": best_ms(lambda: fwpkm_cuda.value_gather(values, indices, weights)),
        "chunk_scan_": best_ms(lambda: fwpkm_cuda.chunk_scan_(*memory, query, target, **options)),
        "chunk_scan + backward": best_ms(train),
    }


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write the results to this file")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure()))
        return
    results = {}
    for capability in ("baseline", "avx2", "avx512"):
        environment = dict(os.environ, FWPKM_CPU_CAPABILITY=capability)
        output = subprocess.run(
            [sys.executable, __file__, "--measure"], env=environment, capture_output=True, text=True, check=True
        ).stdout
        results[capability] = json.loads(output.splitlines()[-1])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    report = {"processor": processor(), "commit": commit, "command": "python bench/cpu_capability.py", "ms": results}
    print(f"{processor()}, 2 threads, commit {commit}; ms, and times faster than baseline")
    for case in results["baseline"]:
        row = [results[c][case] for c in results]
        print(f"{case:24}" + "".join(f"{ms:9.1f} ({row[0] / ms:4.1f}x)" for ms in row))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(report, file, indent=1)


if __name__ == "__main__":
    main()
