"""What one GPU is to show in half an hour at the paper's sizes: `python -m experiments paper FOLDER --device cuda`.

1. speed     training steps of the 12-layer model, 4,096 tokens a row: samples per second and peak memory without a
             memory, with each kind, and with the released module in place of ours (--release-dir)
2. training  rows with needles and text, for half of the time
3. needles   of what was trained: 4,096 tokens, 1 to 4 readings, then longer

Each part writes what it has as it goes, so that a run that is stopped has all until then, and goes on from there. On a
machine without a network give it the small backbone (the default) and corpora whose cache it has.
"""

import gc
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fwpkm_cuda
from experiments import configurations, niah
from experiments.backbone import language_model
from experiments.training import Trained, machine, optimizer, train


def sizes(backbone, shrunken):
    """The configuration of the plan; shrunken: the same in a minute on a CPU."""
    config = configurations.PAPER.changed(
        backbone=backbone, layout="window" if backbone == "small" else "gdn+swa", fwpkm=(2, 6, 10), accumulation=1,
        corpora=("anarchism", "austen", "bible"), vocabulary=configurations.MAIN.vocabulary, needle_rows=0.5,
        repeat_rows=0.1, needles=32, forget=0.25, warm_up=50, steps=1500, log_every=5, save_every=50,
    )  # fmt: skip
    if not shrunken:
        return config
    small = dict(key_dim=32, value_dim=32, num_sub_keys=16, chunk_size=32)
    return config.changed(
        hidden=48, heads=12, mlp=96, window=32, length=512, batch=2, steps=6, warm_up=2, log_every=1, needles=4,
        fwpkm_options=small, fwmlp_options=dict(key_dim=32, value_dim=32, hidden_units=64, chunk_size=32),
        pkm_options=dict(key_dim=32, value_dim=32, num_sub_keys=16, heads=1, topk=8), precision="float32",
    )  # fmt: skip


class Released(fwpkm_cuda.FwPKM):
    """The same layer around the released module, from a folder of the user's; for its speed."""

    folder = None

    def forward(self, hidden, memory, mask=None, *, return_details=False):
        from bench import release

        if not hasattr(self, "module"):
            self.module = [release.make(self.folder, *memory.tensors.values(), self.options["topk"], "idw")]
        query, value, gate = self.project(hidden)
        out = release.run(self.module[0], query, value, gate, self.options["chunk_size"])
        y = self.combine(out, value, gate)
        return (y, None) if return_details else y


def speed(config, device, seconds=20.0, words=32_000, released=None):
    """Training steps on random tokens, for so many seconds.

    -> samples_per_second, step_seconds (median), steps, peak_bytes, slow_parameters, fast_weights"""
    device = torch.device(device)
    torch.manual_seed(0)
    model = language_model(config, words).to(device)
    if released is not None:
        for layer in model.modules():
            if isinstance(layer, fwpkm_cuda.FwPKM):
                layer.__class__, layer.folder = Released, released
    memories, adam = fwpkm_cuda.Memories.of(model, seed=0), optimizer(model, config)
    ids = torch.randint(words, (config.batch, config.length + 1), device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = model(ids[:, :-1], memories)
        adam.zero_grad()
        F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten()).backward()
        adam.step()
        memories.commit()

    for _ in range(2):
        step()
    wait()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start, times = time.monotonic(), []
    while len(times) < 3 or (time.monotonic() - start < seconds and len(times) < 20):
        begin = time.monotonic()
        step()
        wait()
        times.append(time.monotonic() - begin)
    fwpkm_cuda.check()
    median = sorted(times)[len(times) // 2]
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    slow = sum(p.numel() for p in model.parameters())
    fast = sum(t.numel() for memory in memories.values() for t in memory.tensors.values())
    return dict(
        samples_per_second=config.batch / median, step_seconds=median, steps=len(times), peak_bytes=peak,
        slow_parameters=slow, fast_weights=fast,
    )  # fmt: skip


def plan(config, folder, device="cuda", minutes=30.0, release_dir=None, report=print):
    """All of it, of a configuration of `sizes`."""
    folder, start = Path(folder), time.monotonic()
    left = lambda: 60 * minutes - (time.monotonic() - start)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "speed.json"
    found = json.loads(file.read_text()) if file.exists() else dict(machine=machine(), samples={})
    memories = dict(configurations.PAPER_MEMORIES)
    if release_dir:
        memories["released"] = memories["fwpkm"]
    for name in ("fwpkm", "none", "released", "both", "pkm", "fwmlp"):
        if name in found["samples"] or name not in memories or left() < 60 * minutes * 0.6:
            continue
        own = config.changed(**(dict(fwpkm=()) | memories[name]))
        try:
            result = speed(own, device, 0.7 * minutes, released=release_dir if name == "released" else None)
        except torch.OutOfMemoryError as error:
            result = dict(error=str(error).splitlines()[0])
        gc.collect()
        torch.cuda.empty_cache()
        found["samples"][name] = result
        file.write_text(json.dumps(found, indent=1) + "\n")
        report(f"{name}: {result}")
    run_folder = folder / "run"
    train(config, run_folder, device, report, seconds=max(left() - 60 * minutes * 0.3, 1))
    run = Trained(run_folder, device)
    for length, count in ((config.length, 20), (4 * config.length, 10), (16 * config.length, 5)):
        if left() > 0:
            asked = niah.evaluate(run, run_folder / f"niah-{length}.jsonl", report, length=length, count=count)
            (run_folder / f"niah-{length}.json").write_text(json.dumps(asked, indent=1) + "\n")
