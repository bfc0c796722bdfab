"""The configurations by name: the small ones that `python -m experiments tiny` trains, and the paper's.

Each says only what makes it differ from the configuration it is compared with."""

from experiments.config import Config

MAIN = Config(
    steps=350,  # it begins to find answers after some 220
    final_lr=1e-3,
    fwpkm_options=dict(key_dim=64, value_dim=64, num_sub_keys=256, chunk_size=64, score="idw", write_rule="release"),
    fwmlp_options=dict(key_dim=64, value_dim=64, hidden_units=256, chunk_size=64),
    pkm_options=dict(key_dim=64, value_dim=128, num_sub_keys=64, heads=2, topk=16, query_bias=False),
)


def main(**options):
    """`main` with other options of its memory."""
    return MAIN.changed(fwpkm_options=options)


# Needles: does a memory find them, and what does it need?
NEEDLES = {
    "main": MAIN,
    "none": MAIN.changed(fwpkm=()),
    "lookahead0": main(lookahead=0),
    **{f"fwmlp-{lr}": MAIN.changed(fwpkm=(), fwmlp=(2,), fwmlp_options=dict(lr=lr)) for lr in (0.03, 0.1, 0.3, 1.0)},
}
# How it is read and written.
RULES = {
    "idw-paper": main(write_rule="paper"),
    "dot-release": main(score="dot"),
    "dot-paper": main(score="dot", write_rule="paper"),
    "still-keys": main(addressing_weight=0.0),
}
# The paper's ablations, lookahead 0 being one of them.
ABLATIONS = {
    "h1k32": main(topk=32),
    "h4k8": main(heads=4),
    "no-target-norm": main(target_norm=None),
    "no-addressing-loss": main(addressing_weight=0.0, values_only=False),
    "no-gate": main(gate="none"),
    "gate-not-in-loss": main(gate="output"),
}
ATTENTION = {
    "full": MAIN.changed(layout="full"),
    "pswa": MAIN.changed(layout="full", restricted=0.9),
}
# Text: what it is for where nothing is hidden. Values are kept from step to step, as they are in use.
_TEXT = MAIN.changed(
    corpora=("anarchism", "austen", "bible", "gcide"),
    corpus_tokens=1_500_000,
    needle_rows=0.2,
    repeat_rows=0.2,
    steps=500,
    final_lr=3e-4,
    forget=0.0,
    fwpkm=(),
    fwpkm_options=dict(num_sub_keys=512),
)
TEXT = {
    "text-none": _TEXT,
    "text-pkm": _TEXT.changed(pkm=(1,)),
    "text-fwpkm": _TEXT.changed(fwpkm=(2,)),
    "text-both": _TEXT.changed(pkm=(1,), fwpkm=(2,)),
}
TESTS = {"anarchism": "long text", "gcide": "dictionary", "handbook": "another domain"}

ALL = NEEDLES | RULES | ABLATIONS | ATTENTION | TEXT
LABELS = {
    "main": "FwPKM",
    "none": "no memory",
    "lookahead0": "lookahead 0",
    **{name: f"FwMLP, step size {name[6:]}" for name in NEEDLES if name.startswith("fwmlp")},
    "idw-paper": "idw, paper's rule",
    "dot-release": "dot, released rule",
    "dot-paper": "dot, paper's rule",
    "still-keys": "sub-keys still in training",
    "h1k32": "1 head x 32 reads",
    "h4k8": "4 heads x 8 reads",
    "no-target-norm": "targets not normalised",
    "no-addressing-loss": "no addressing loss, the memory loss moves sub-keys",
    "no-gate": "no gate",
    "gate-not-in-loss": "gate not in the memory loss",
    "full": "full attention",
    "pswa": "full attention, restricted in training",
    "text-none": "no memory",
    "text-pkm": "PKM",
    "text-fwpkm": "FwPKM",
    "text-both": "PKM and FwPKM",
}


# ---------------------------------------------------------------------------------------------------- the paper's sizes
PAPER = Config(
    backbone="qwen3-next",
    layers=12,
    hidden=768,
    heads=12,
    mlp=2304,
    window=512,
    fwpkm=(),
    corpora=("hf:fineweb-edu", "hf:longcrawl64"),
    vocabulary="hf:mistralai/Mistral-7B-v0.1",
    length=4096,
    accumulation=16,  # 128 rows a step on one process; on 4 processes 4
    needle_rows=0.0,
    repeat_rows=0.0,
    steps=20_000,
    lr=1e-3,
    final_lr=1e-4,
    warm_up=100,
    forget=0.0,
    precision="bfloat16",
    fwpkm_options=dict(score="idw", write_rule="release"),
    fwmlp_options=dict(lookahead_target="mean", gate="output"),
)
PAPER_MEMORIES = {
    "none": {},
    "pkm": dict(pkm=(2, 6, 10)),
    "fwpkm": dict(fwpkm=(2, 6, 10)),
    "both": dict(pkm=(6,), fwpkm=(2, 10)),
    "fwmlp": dict(fwmlp=(2, 6, 10)),
}
PAPERS = {
    f"paper-{layout}-{memory}": PAPER.changed(layout=layout, **layers)
    for layout in ("gdn", "gdn+swa", "gdn+fa", "fa")
    for memory, layers in PAPER_MEMORIES.items()
}
PAPERS |= {f"{name}-pswa": PAPERS[name].changed(restricted=0.9) for name in PAPERS if "fa-fwpkm" in name}
