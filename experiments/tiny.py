"""What `python -m experiments tiny` trains and asks: every configuration, every evaluation of it, for each seed.

A configuration's run is in FOLDER/seed-S/NAME; what it was asked is in results.json there, and what was asked already
is not asked again. Runs are made side by side, in processes of one thread each. report.py makes a page of them.
"""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

from experiments import configurations, continual, gates, niah, perplexity, trace
from experiments.needles import haystack
from experiments.training import Trained, documents, train

ROOT = Path(__file__).resolve().parents[1]


def say(text):
    print(text, flush=True)


# Each of these makes a function of a run (Trained), whose result is kept.
def needles(length, count=100, most=4, memory=None, **options):
    """memory: options of the memories, other than in training"""

    def evaluate(run):
        words = ["niah", length, *(f"{key}-{value}" for key, value in {**options, **(memory or {})}.items())]
        if memory:
            run = Trained(run.folder, run.device, memory)
        file = run.folder / f"{'-'.join(map(str, words))}.jsonl"
        return niah.evaluate(run, file, length=length, count=count, most=most, **options)

    return evaluate


def reading(corpus, way="live", start="trained", most=100_000):
    def evaluate(run):
        test = documents([corpus], run.vocabulary)[corpus][1]
        file = run.folder / f"perplexity-{corpus}-{way}-{start}.json"
        return perplexity.evaluate(run, file, test, most=most, way=way, start=start)

    return evaluate


def domains(run):
    return continual.evaluate(run, run.folder / "continual.json")


def gates_of(run):
    result = gates.evaluate(run, run.folder / "gates.json", run.held_out)
    return {name: {k: v for k, v in own.items() if k != "gates"} for name, own in result["memories"].items()}


def traced(run):
    hay = haystack(run.held_out, run.vocabulary, 1000, random.Random("1 1000 0"))
    result = trace.evaluate(run, run.folder / "trace.json", hay)
    return dict(answer=result["answer"], value=result["value"])


STILL = dict(addressing_weight=0.0)  # sub-keys do not move while it reads
SMALL = dict(lr=0.15)
ONCE = {"": None, ", small steps": SMALL, ", small steps, still sub-keys": SMALL | STILL}


def once(length, chunk, use):
    return f"{length} tokens, read once in chunks of {chunk}{use}"


FIRST = {"1,000 tokens": needles(1000)}
TEXT = {f"{corpus}, {way}": reading(corpus, way) for corpus in configurations.TESTS for way in ("live", "frozen")}
TEXT |= {
    "anarchism, forgotten": reading("anarchism", "forgotten"),
    "anarchism, from empty": reading("anarchism", start="empty"),
}
MAIN = FIRST | {
    "4,000 tokens": needles(4000),
    "16,000 tokens": needles(16000, 20),
    "1,000 tokens, never reset": needles(1000, 50, between="kept"),
    "1,000 tokens, key that stands nowhere": needles(1000, 50, control=True),
    **{
        once(f"{length:,}", chunk, use): needles(length, count, 1, memory, chunk_size=chunk)
        for length, count in ((1000, 100), (4000, 100), (16000, 20))
        for chunk in (64, 256)
        for use, memory in ONCE.items()
    },
    "1,000 tokens, still sub-keys": needles(1000, memory=STILL),
    "gates": gates_of,
    "trace": traced,
}
QUESTIONS = dict.fromkeys(configurations.ALL, FIRST) | {"main": MAIN}
QUESTIONS |= dict.fromkeys(configurations.TEXT, TEXT) | {"text-fwpkm": TEXT | {"domains": domains, "gates": gates_of}}
QUESTIONS |= dict.fromkeys(configurations.ATTENTION, FIRST | {"gates": gates_of})


def job(name, folder, device="cpu", report=print):
    """Trains a configuration, and asks it all of its questions. -> {question: result}"""
    config = configurations.ALL[name].changed(seed=int(Path(folder).parent.name.removeprefix("seed-")))
    start = time.monotonic()
    train(config, folder, device, report)
    run, file = Trained(folder, device), Path(folder) / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for question, evaluate in QUESTIONS[name].items():
        if question not in results:
            results[question] = evaluate(run)
            file.write_text(json.dumps(results, indent=1) + "\n")
    report(f"{name}: done in {time.monotonic() - start:.0f} s")
    return results


def everything(folder, names=None, seeds=1, jobs=None, device="cpu", report=say):
    """All jobs, `jobs` at a time (one for each core); their output is in FOLDER/seed-S/NAME.log. -> what failed"""
    folder, jobs = Path(folder), jobs or (os.cpu_count() if device == "cpu" else 1)
    waiting = [(seed, name) for seed in range(seeds) for name in names or configurations.ALL]
    total, running, failed, start = len(waiting), {}, [], time.monotonic()
    while waiting or running:
        while waiting and len(running) < jobs:
            seed, name = waiting.pop(0)
            own = folder / f"seed-{seed}" / name
            own.parent.mkdir(parents=True, exist_ok=True)
            with (own.parent / f"{name}.log").open("w") as log:
                command = [sys.executable, "-m", "experiments", "--device", device, "job", name, own.resolve()]
                running[seed, name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        time.sleep(1)
        for (seed, name), process in [*running.items()]:
            if process.poll() is not None:
                del running[seed, name]
                failed += [(seed, name)] * (process.returncode != 0)
                done = total - len(waiting) - len(running)
                state = "done" if process.returncode == 0 else f"FAILED, see {folder}/seed-{seed}/{name}.log"
                report(f"{time.monotonic() - start:6.0f} s  {done}/{total}  seed {seed} {name}: {state}")
    return failed
