"""The recorded inputs and outputs of the released FwPKM code, and how exactly they must be met.

The files (golden/README.md describes them) are those of the folder FWPKM_GOLDEN_DIR, by default the shipped ones. What
is tested follows from the `config` and the arrays inside a file, never from its name."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from inputs import here

SHIPPED = Path(__file__).parent / "golden"
FOLDER = Path(os.environ.get("FWPKM_GOLDEN_DIR", SHIPPED))

# Largest error allowed, in parts of the largest entry of an array; about 10 times what the reference reaches.
TOLERANCE = {
    "float32": {"outputs": 1e-5, "gradients": 2e-5, "scores": 5e-6},
    "float64": {"outputs": 1e-14, "gradients": 3e-14, "scores": 1e-12},
    "float64, entropy in float32": {"outputs": 1e-6, "gradients": 1e-6, "scores": 1e-6},
    "bfloat16": {"outputs": 1e-5, "gradients": 2e-5, "scores": 5e-6},  # the work is in float32, see BFLOAT16_ROUNDING
    "bfloat16 stream": {"outputs": 8e-3, "gradients": 8e-3, "scores": 8e-3},  # its memory is rounded after every call
}
ON_A_GPU = 4.0  # times that: other orders of summation than the reference's on the CPU
SMALLEST = 1e-3  # what counts as the largest entry of an array of (nearly) zeros
BFLOAT16_ROUNDING = 2**-8  # of each entry: the error of one rounding to bfloat16


# ------------------------------------------------------------------------------------------------------ golden files
class Golden(NamedTuple):
    stem: str
    config: dict
    on_the_cpu: dict

    @property
    def arrays(self):
        """{name: tensor} on the device of the test."""
        return {name: here(x) for name, x in self.on_the_cpu.items()}

    @property
    def tolerance(self):
        kind = self.config["dtype"]
        if kind == "bfloat16" and self.config["mode"] == "stream":
            kind = "bfloat16 stream"
        if kind == "float64" and not self.config["entropy64"]:
            kind = "float64, entropy in float32"
        return TOLERANCE[kind]

    @property
    def rounding(self):
        """Of the arrays that the release stored in the dtype of its parameters or inputs."""
        return BFLOAT16_ROUNDING if self.config["dtype"] == "bfloat16" else 0.0

    @property
    def options(self):
        """The config in the words of `chunk_scan`."""
        c = self.config
        return {
            "topk": c["topk"],
            "chunk_size": c["chunk"],
            "lookahead": c["lookahead"],
            "score": {"idw": "idw", "dot_product": "dot"}[c["score"]],
            "activation": c["nonlinear"],
            "temperature": c["temperature"],
            "lr": c["lr"],
            "weight_decay": c["weight_decay"],
            "grad_clip": 1.0 if c["grad_clip"] else None,
            "values_only": c["values_only"],
            "addressing_weight": c["addr_weight"] if c["addr_loss"] else 0.0,
        }

    def inputs(self):
        """values, sub_keys, query, target, loss_weights, mask in the shapes of `chunk_scan`; fresh tensors."""
        a, heads = self.arrays, self.config["heads"]
        return [
            a["values0"].clone(),
            a["keys0"].clone().view(heads, 2, self.config["n_subkeys"], -1),
            a["q"].clone().unflatten(-1, (heads, -1)),
            a["ref_v"].clone(),
            a["gates"].clone() if "gates" in a else None,
            a["mask"] > 0 if "mask" in a else None,
        ]


def load(path):
    with np.load(path, allow_pickle=False) as file:
        config = json.loads(str(file["config"]))
        arrays = {name: torch.from_numpy(np.array(file[name])) for name in file.files if name != "config"}
    return Golden(path.stem, config, arrays)


GOLDEN = [load(path) for path in sorted(FOLDER.glob("*.npz"))]


# ----------------------------------------------------------------------------------------------------------- checks
def assert_close(name, actual, expected, tolerance, rounding=0.0):
    """|actual - expected| <= tolerance * max|expected| + rounding * |expected|, in every entry."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
    if not expected.numel():
        return
    actual, expected = actual.detach().double(), expected.detach().double()
    largest = expected.abs().max().clamp(min=SMALLEST)
    error = (actual - expected).abs()
    tolerance *= 1.0 if actual.is_cpu else ON_A_GPU
    allowed = tolerance * largest + rounding * expected.abs()
    message = f"{name}: error {float(error.max() / largest):.1e} of the largest entry, allowed {tolerance:.1e}"
    assert bool((error <= allowed).all()), message + (f" and {rounding:.1e} of each entry" if rounding else "")
