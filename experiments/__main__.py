"""python -m experiments: trains language models with memories and asks them. See experiments/README.md."""

import argparse
import json
import os
import random
import sys

import torch

from experiments import configurations, continual, gates, niah, paper, perplexity, tiny, trace
from experiments.config import Config
from experiments.needles import haystack
from experiments.tokens import file_name
from experiments.training import Trained, documents, train


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m experiments", description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch: a model this small is slower on more")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, call, text):
        own = commands.add_parser(name, help=text, description=text)
        own.set_defaults(call=call)
        return own

    own = command("train", run_train, "trains a configuration into a run folder, or goes on with it")
    own.add_argument("configuration", help="a name in configurations.py, or a JSON file of one")
    own.add_argument("folder")
    own.add_argument("--set", nargs="*", default=[], metavar="NAME=JSON", help="for instance steps=100")

    own = command("niah", run_niah, "needle in a haystack")
    own.add_argument("run")
    own.add_argument("--length", type=int, default=1000)
    own.add_argument("--readings", type=int, default=4)
    own.add_argument("--count", type=int, default=100)
    own.add_argument("--between", choices=niah.BETWEEN, default="empty")
    own.add_argument("--chunk-size", type=chunk_size, default="all")
    own.add_argument("--control", action="store_true", help="asks for a key that stands nowhere")
    own.add_argument("--memory", nargs="*", default=[], metavar="NAME=JSON", help="as addressing_weight=0")

    own = command("perplexity", run_perplexity, "perplexity of held-out text, read in order")
    own.add_argument("run")
    own.add_argument("--corpus", action="append", help="by default those of the training")
    own.add_argument("--way", choices=perplexity.WAYS, default="live")
    own.add_argument("--start", choices=("empty", "trained"), default="trained")
    own.add_argument("--most", type=int, default=100_000, help="tokens")

    own = command("continual", run_continual, "adapts to one domain after the other; what is kept?")
    own.add_argument("run")
    own.add_argument("--domains", nargs="+", default=["anarchism", "austen", "bible"])
    own.add_argument("--adapt", type=int, default=50_000, help="tokens of each domain")
    own.add_argument("--test", type=int, default=20_000, help="tokens of each domain")

    own = command("gates", run_gates, "gates over a text, and how evenly slots are read")
    own.add_argument("run")

    own = command("trace", run_trace, "which slots gave an answer, and what wrote them")
    own.add_argument("run")
    own.add_argument("--length", type=int, default=1000)
    own.add_argument("--readings", type=int, default=2)
    own.add_argument("--sample", type=int, default=0)

    own = command("tiny", run_tiny, "trains and asks all small configurations")
    own.add_argument("folder", nargs="?", default="runs/tiny")
    own.add_argument("--seeds", type=int, default=1)
    own.add_argument("--jobs", type=int, help="at a time; by default as many as there are cores")
    own.add_argument("--only", nargs="+", metavar="NAME", help="configurations")

    own = command("report", run_report, "renews experiments/README.md from the runs of `tiny`")
    own.add_argument("folder", nargs="?", default="runs/tiny")

    own = command("paper", run_paper, "speed, training and needles at the paper's sizes, in so many minutes")
    own.add_argument("folder")
    own.add_argument("--minutes", type=float, default=30)
    own.add_argument("--backbone", choices=("small", "qwen3-next"), default="small")
    own.add_argument("--shrunken", action="store_true", help="small sizes: does the plan run?")
    own.add_argument("--release-dir", help="the released repository, to be measured beside")

    own = command("job", run_job, "one configuration of `tiny`, in FOLDER/seed-S/NAME")
    own.add_argument("configuration")
    own.add_argument("folder")

    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    return options.call(options)


def settings(items):
    """{name: value} of NAME=JSON; what is no JSON is a text."""
    found = {}
    for name, value in (item.split("=", 1) for item in items):
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found


def chunk_size(text):
    return text if text == "all" else int(text)


def configuration(name):
    named = configurations.ALL | configurations.PAPERS
    return named[name] if name in named else Config.load(name)


def run_train(options):
    config = configuration(options.configuration).changed(**settings(options.set))
    if "LOCAL_RANK" in os.environ:  # torchrun
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()
    train(config, options.folder, options.device)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def run_niah(options):
    run = Trained(options.run, options.device, settings(options.memory))
    asked = dict(length=options.length, most=options.readings, count=options.count, between=options.between)
    asked |= dict(chunk_size=options.chunk_size, control=options.control)
    name = "-".join(["niah", str(options.length), options.between, str(options.chunk_size), *options.memory])
    file = run.folder / f"{name}{'-control' * options.control}.jsonl"
    print(json.dumps(niah.evaluate(run, file, **asked), indent=1))


def held_out(run, corpora_):
    """{corpus: held-out documents} of the corpora named, or of the run's own"""
    if not corpora_:
        return {name: test for name, (_, test) in run.documents.items()}
    return {name: test for name, (_, test) in documents(corpora_, run.vocabulary).items()}


def run_perplexity(options):
    run = Trained(options.run, options.device)
    for name, test in held_out(run, options.corpus).items():
        file = run.folder / f"perplexity-{file_name(name)}-{options.way}-{options.start}.json"
        found = perplexity.evaluate(run, file, test, most=options.most, way=options.way, start=options.start)
        print(f"{name}: perplexity {found['perplexity']:.2f} of {found['tokens']} tokens")


def run_continual(options):
    run = Trained(options.run, options.device)
    continual.evaluate(run, run.folder / "continual.json", options.domains, options.adapt, options.test)


def run_gates(options):
    run = Trained(options.run, options.device)
    result = gates.evaluate(run, run.folder / "gates.json", run.held_out)
    gates.picture(result, run.folder / "gates.png")


def run_trace(options):
    run = Trained(options.run, options.device)
    rng = random.Random(f"1 {options.length} {options.sample}")
    hay = haystack(run.held_out, run.vocabulary, options.length, rng)
    result = trace.evaluate(run, run.folder / "trace.json", hay, options.readings)
    trace.picture(result, run.folder / "trace.png")


def run_tiny(options):
    failed = tiny.everything(options.folder, options.only, options.seeds, options.jobs, options.device)
    return 1 if failed else 0


def run_report(options):
    from experiments import report  # needs matplotlib

    report.write(options.folder)


def run_paper(options):
    config = paper.sizes(options.backbone, options.shrunken)
    paper.plan(config, options.folder, options.device, options.minutes, options.release_dir)


def run_job(options):
    tiny.job(options.configuration, options.folder, options.device, lambda text: print(text, flush=True))


if __name__ == "__main__":
    sys.exit(main())
