"""Trains a language model with memories: `python -m experiments train`, or `train(config, folder)`.

A run folder holds config.json, log.jsonl (a line every `log_every` steps), and at the end model.safetensors (slow
weights and trained sub-keys), memories.safetensors (fast weights as training left them) and run.json (commit, machine,
seconds). A run that was stopped goes on from `checkpoint/`, with the bits that it would have had.

With torchrun, each process reads rows of its own into memories of its own; gradients are averaged.
"""

import contextlib
import json
import math
import os
import platform
import random
import shutil
import subprocess
import time
from datetime import datetime, timezone
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F

import fwpkm_cuda
from experiments import corpora, tokens
from experiments.backbone import language_model
from experiments.config import Config
from experiments.needles import Rows


def vocabulary_of(config):
    if isinstance(config.vocabulary, int):
        return tokens.vocabulary(config.corpora, config.vocabulary)
    return tokens.Vocabulary.load(config.vocabulary)


def documents(names, vocabulary):
    """{corpus: (documents to train on, held-out documents)}, each a list of ids"""
    return {name: corpora.split(tokens.encoded(name, vocabulary)) for name in names}


def machine():
    """What a figure has to be read with."""

    def git(*words):
        found = subprocess.run(["git", "-C", Path(__file__).parent, *words], capture_output=True, text=True)
        return found.stdout.strip()

    commit = git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), processor)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return dict(
        commit=commit, processor=processor, cores=os.cpu_count(), gpu=gpu, torch=torch.__version__,
        date=datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip


def cut(documents, most):
    """The first documents, and the beginning of one more, that make `most` tokens."""
    taken = []
    for ids in documents:
        if most <= 0:
            break
        taken.append(ids[:most])
        most -= len(taken[-1])
    return taken


def learning_rate(config, step):
    """Warm-up, then a cosine from lr to final_lr."""
    done = step / max(config.steps, 1)
    wave = config.final_lr + (config.lr - config.final_lr) * (1 + math.cos(math.pi * done)) / 2
    return min(1, (step + 1) / max(config.warm_up, 1)) * wave


def drawn(config, what, step, share):
    """Whether a share of the steps has something: the same on every process, and after a resume."""
    return random.Random(f"{what} {config.seed} {step}").random() < share


class Run:
    """A model in training, and all that a checkpoint has to hold."""

    def __init__(self, config, folder, device="cpu"):
        self.config, self.folder, self.device = config, Path(folder), torch.device(device)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.processes = dist.get_world_size() if dist.is_initialized() else 1
        torch.manual_seed(config.seed)
        self.vocabulary = vocabulary_of(config)
        training = []
        for own, _ in documents(config.corpora, self.vocabulary).values():
            training += cut(own, config.corpus_tokens) if config.corpus_tokens else own
        self.rows = Rows(training, self.vocabulary, config, self.rank, self.processes)
        self.model = language_model(config, self.vocabulary.size).to(self.device)
        self.memories = fwpkm_cuda.Memories.of(self.model, values="zeros", seed=config.seed + 1000 * self.rank)
        self.optimizer = optimizer(self.model, config)
        self.step, self.figures = 0, []  # of the steps since the last line of the log
        for folder in (self.checkpoint, self.folder / "checkpoint.old"):  # the old one, where a stop came in between
            if folder.exists():
                self._resume(folder)
                break
        self.trained = torch.compile(self.model) if config.compile else self.model
        if self.processes > 1:
            self.trained = torch.nn.parallel.DistributedDataParallel(self.trained)

    @property
    def checkpoint(self):
        return self.folder / "checkpoint"

    def _memory_file(self, folder):
        return folder / (f"memories-{self.rank}.safetensors" if self.rank else "memories.safetensors")

    def save_checkpoint(self):
        """Complete or not at all: the next one is written beside the last."""
        new, old = self.folder / "checkpoint.new", self.folder / "checkpoint.old"
        if self.rank == 0:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        barrier()
        self.memories.save(self._memory_file(new))
        if self.rank == 0:
            state = dict(model=self.model.state_dict(), optimizer=self.optimizer.state_dict(), step=self.step)
            torch.save(state | dict(figures=self.figures), new / "training.pt")
        barrier()
        if self.rank == 0:
            if self.checkpoint.exists():  # else the old one is the only one
                shutil.rmtree(old, ignore_errors=True)
                self.checkpoint.rename(old)
            new.rename(self.checkpoint)
            shutil.rmtree(old, ignore_errors=True)
        barrier()

    def _resume(self, folder):
        state = torch.load(folder / "training.pt", map_location=self.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.figures = state["step"], state["figures"]
        self.memories = fwpkm_cuda.Memories.load(self._memory_file(folder), self.device)

    def save(self, seconds):
        self.memories.save(self._memory_file(self.folder))
        if self.rank == 0:
            weights = {name: t.detach().cpu().contiguous() for name, t in self.model.state_dict().items()}
            safetensors.torch.save_file(weights, self.folder / "model.safetensors")
            facts = machine() | dict(steps=self.step, seconds=round(seconds, 1), processes=self.processes)
            (self.folder / "run.json").write_text(json.dumps(facts, indent=1) + "\n")
        barrier()
        if self.rank == 0 and self.step == self.config.steps:
            shutil.rmtree(self.checkpoint, ignore_errors=True)

    def train_step(self):
        """One step. -> figures of this process, of the last batch in it"""
        config = self.config
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if drawn(config, "forget", self.step, config.forget):
            self.memories.forget()
        self.optimizer.zero_grad()
        for part in range(config.accumulation):
            last = part == config.accumulation - 1
            with contextlib.nullcontext() if last or self.processes == 1 else self.trained.no_sync():
                read = self._read(self.step * config.accumulation + part)
        norms = {name: gradient_norm(layer) for name, layer in fast_layers(self.model).items()}
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.clip).item()
        self.optimizer.step()
        self.step += 1
        memories = {name: own | dict(gradient=norms[name]) for name, own in read.pop("memories").items()}
        return read | dict(lr=rate, gradient=norm, memories=memories)

    def _read(self, number):
        """Gradients of one batch, and its writes. -> its figures"""
        config, details = self.config, {}
        ids, answers = (torch.from_numpy(x).to(self.device) for x in self.rows.batch(number))
        restricted = drawn(config, "restricted", self.step, config.restricted)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            logits = self.trained(ids[:, :-1], self.memories, restricted=restricted, details=details)
        logits, targets = logits.float(), ids[:, 1:]
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        (losses.mean() / config.accumulation).backward()
        self.memories.commit()
        fwpkm_cuda.check()
        with torch.no_grad():
            right = (logits[answers].argmax(-1) == targets[answers]).float()
            return dict(
                loss=losses.mean().item(),
                text=losses[~answers].mean().item(),
                answer=losses[answers].mean().item() if answers.any() else None,
                answered=right.mean().item() if answers.any() else None,
                memories={name: memory_figures(own, self.memories[name]) for name, own in details.items()},
            )

    def train(self, report=print, seconds=None):
        """To the last step, or for so many seconds, with a line of the log and a report every so many; saves the run.

        A run whose time is up can be asked, and can go on."""
        config, log = self.config, self.folder / "log.jsonl"
        done = log.read_text().splitlines() if log.exists() else []
        kept = [line for line in done if json.loads(line)["step"] <= self.step]  # none from after the checkpoint
        before = json.loads(kept[-1])["seconds"] if kept else 0.0
        barrier()
        if self.rank == 0:
            log.write_text("".join(line + "\n" for line in kept))
        start = time.monotonic()
        while self.step < config.steps and not time_is_up(start, seconds):
            self.figures.append(self.train_step())
            if self.step % config.log_every == 0 or self.step == config.steps:
                line = dict(step=self.step, seconds=round(before + time.monotonic() - start, 1)) | mean(self.figures)
                self.figures = []
                if self.rank == 0:
                    with log.open("a") as file:
                        file.write(json.dumps(line) + "\n")
                    report(line_of(line, config.steps))
            if self.step % config.save_every == 0 and self.step < config.steps:
                self.save_checkpoint()
        if self.step < config.steps:
            self.save_checkpoint()
        self.save(before + time.monotonic() - start)


def time_is_up(start, seconds):
    """By the clock of the first process, for all of them."""
    if seconds is None:
        return False
    answer = [time.monotonic() - start >= seconds]
    if dist.is_initialized():
        dist.broadcast_object_list(answer)
    return answer[0]


def barrier():
    if dist.is_initialized():
        dist.barrier()


def optimizer(model, config):
    """AdamW; no weight decay for vectors, nor for the tables of product keys."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and not n.endswith(("values", "sub_keys"))]
    others = [p for p in model.parameters() if all(p is not m for m in matrices)]
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def fast_layers(model):
    return {m.name: m for m in model.modules() if isinstance(m, (fwpkm_cuda.FwPKM, fwpkm_cuda.FwMLP))}


def gradient_norm(module):
    squares = [p.grad.float().square().sum() for p in module.parameters() if p.grad is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0


def memory_figures(details, memory):
    """Of one call: losses, gates, and how evenly the slots are read, beside what random reads would give."""
    figures = dict(loss=details.losses.mean().item() if details.losses.numel() else 0.0)
    if details.gates is not None:
        histogram = fwpkm_cuda.gate_histogram(details.gates)
        figures |= dict(gate=details.gates.mean().item(), gates=[round(share, 4) for share in histogram.tolist()])
    if details.indices is not None:
        used = fwpkm_cuda.usage(details.indices, memory.num_slots)
        floor = fwpkm_cuda.random_usage(details.indices.numel(), memory.num_slots)
        figures |= dict(addressing=details.addressing_loss.mean().item() if details.addressing_loss.numel() else 0.0)
        figures |= dict(usage=used._asdict(), random_usage=floor._asdict())
    return figures


def mean(figures):
    """Of a list of equal nested dicts of numbers, lists of numbers and None."""
    first = figures[0]
    if isinstance(first, dict):
        return {key: mean([f[key] for f in figures]) for key in first}
    if isinstance(first, list):
        return [mean([f[i] for f in figures]) for i in range(len(first))]
    numbers = [f for f in figures if f is not None]
    return round(sum(numbers) / len(numbers), 6) if numbers else None


def line_of(line, steps):
    """A line of the log for people."""
    answered = "" if line["answered"] is None else f"  answers {line['answered']:6.1%}"
    memories = "".join(
        f"  {name}: loss {m['loss']:.3f}" + (f" gate {m['gate']:.2f}" if "gate" in m else "")
        for name, m in line["memories"].items()
    )
    return f"{line['step']:5d}/{steps} {line['seconds']:6.0f} s  text {line['text']:.3f}{answered}{memories}"


def train(config, folder, device="cpu", report=print, seconds=None):
    """Trains, or goes on with, the run of this folder, for so many seconds at most. A finished run is left alone."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = folder / "config.json"
    if settings.exists() and Config.load(settings) != config:
        raise ValueError(f"{folder}: a run with another configuration is there: {settings}")
    facts = folder / "run.json"
    if not facts.exists() or json.loads(facts.read_text())["steps"] < config.steps:
        barrier()
        if not dist.is_initialized() or dist.get_rank() == 0:
            config.save(settings)
        Run(config, folder, device).train(report, seconds)


class Trained:
    """A finished run: its model in eval mode, vocabulary, documents, and `memories(...)` to read with.

    fwpkm_options: for the evaluation, in place of those of the training."""

    def __init__(self, folder, device="cpu", fwpkm_options=None):
        self.folder, self.device = Path(folder), torch.device(device)
        self.config = Config.load(self.folder / "config.json").changed(fwpkm_options=fwpkm_options or {})
        self.facts = json.loads((self.folder / "run.json").read_text())
        self.vocabulary = vocabulary_of(self.config)
        self.documents = documents(self.config.corpora, self.vocabulary)
        self.model = language_model(self.config, self.vocabulary.size)
        self.model.load_state_dict(safetensors.torch.load_file(self.folder / "model.safetensors"))
        self.model.to(self.device).eval()

    def settings(self, **options):
        """What a result of this run depends on, as of JSON."""
        own = dict(run=self.folder.name, steps=self.facts["steps"], memory=self.config.fwpkm_options)
        return json.loads(json.dumps(own | options))

    @property
    def held_out(self):
        return [ids for _, test in self.documents.values() for ids in test]

    def memories(self, start="empty", seed=0):
        """Memories as they begin: "empty" (trained sub-keys, no values), or "trained" (as training left them)."""
        if start == "trained":
            return fwpkm_cuda.Memories.load(self.folder / "memories.safetensors", self.device)
        if start != "empty":
            raise ValueError(f"start: expected 'empty' or 'trained', got {start!r}")
        return fwpkm_cuda.Memories.of(self.model, values="zeros", seed=seed)
