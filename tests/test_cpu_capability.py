"""The vector loops of every instruction set this machine has compute the same: each runs in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

ORDER = ["baseline", "avx2", "avx512"]
PROGRAM = """
import ctypes, json, torch, fwpkm_cuda
from fwpkm_cuda import reference
errors = {}
for dtype in (torch.float32, torch.float64):
    torch.manual_seed(0)
    B, T, H, P, K, V = 2, 50, 2, 37, 70, 83   # nothing here is a multiple of a vector
    values, sub_keys = torch.randn(P * P, V).to(dtype), torch.randn(H, 2, P, K // 2).to(dtype)
    query, target = (torch.randn(B, T, *n).to(dtype).requires_grad_() for n in ((H, K), (V,)))
    options = dict(topk=5, chunk_size=16, score="idw", values_only=False, grad_clip=0.2)
    scan = fwpkm_cuda.chunk_scan(values, sub_keys, query, target, **options)
    gradients = torch.autograd.grad(scan.out.square().sum(), (query, target))
    q, t = (x.detach().double().requires_grad_() for x in (query, target))
    exact = reference.chunk_scan(values.double(), sub_keys.double(), q, t, **options)
    expected = torch.autograd.grad(exact.out.square().sum(), (q, t))
    errors[str(dtype)] = max(
        float((a.double() - b).abs().max() / b.abs().max())
        for a, b in zip((scan.out, scan.losses, *gradients), (exact.out, exact.losses, *expected))
    )
capability = ctypes.CDLL(fwpkm_cuda.library_path()).fwpkm_cpu_capability
capability.restype = ctypes.c_char_p
print(json.dumps([capability().decode(), errors]))
"""


def run(capability):
    environment = dict(os.environ, FWPKM_CPU_CAPABILITY=capability)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("capability", ORDER)
def test_results_agree_with_the_reference(capability):
    chosen, errors = run(capability)
    assert ORDER.index(chosen) <= ORDER.index(capability), "the variable can only lower it"
    assert capability != "baseline" or chosen == "baseline"
    assert errors["torch.float32"] < 2e-5 and errors["torch.float64"] < 1e-12
