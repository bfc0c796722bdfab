"""What a run is made of: `Config`, a name in configurations.py or a JSON file, and afterwards in its run folder."""

import dataclasses
import json
import typing
from dataclasses import dataclass, field
from pathlib import Path


def _checked(name, value, kind):
    """The value as its annotation has it: a list is a tuple there, a whole number may be a float."""
    if typing.get_origin(kind) is tuple and isinstance(value, (tuple, list)):
        return tuple(_checked(name, part, typing.get_args(kind)[0]) for part in value)
    if kind is float and type(value) is int:
        return float(value)
    kinds = () if typing.get_origin(kind) is tuple else typing.get_args(kind) or (kind,)
    if type(value) not in kinds:
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
    return value


@dataclass(frozen=True)
class Config:
    """Sizes in tokens where nothing else is said; layers count from 0."""

    # ---- the model
    backbone: str = "small"  # backbone.py; "qwen3-next": qwen3_next.py
    layout: str = "window"  # small: "window" or "full" attention; qwen3-next: "gdn", "gdn+swa", "gdn+fa", "fa"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    mlp: int = 384
    window: int = 32  # that sliding-window attention sees, and full attention in restricted steps
    convolution: int = 4  # taps of the short convolution of the small backbone; 0: none
    fwpkm: tuple[int, ...] = (2,)  # layers with a fast-weight memory in front of the token mixer
    fwmlp: tuple[int, ...] = ()  # ... with the dense baseline in its place
    pkm: tuple[int, ...] = ()  # layers whose MLP is a product key memory
    fwpkm_options: dict = field(default_factory=dict)  # of fwpkm_cuda.FwPKM
    fwmlp_options: dict = field(default_factory=dict)  # of fwpkm_cuda.FwMLP
    pkm_options: dict = field(default_factory=dict)  # of fwpkm_cuda.PKM
    # ---- what it reads
    corpora: tuple[str, ...] = ("anarchism",)  # corpora.py
    corpus_tokens: int = 0  # at most so many of each corpus; 0: all
    vocabulary: int | str = 1024  # size of a BPE of these corpora, or a tokenizer of the hub
    length: int = 512
    batch: int = 8  # rows of each process that are read at a time
    accumulation: int = 1  # such batches in a step; each is written before the next
    needle_rows: float = 0.7  # share of rows with statements that come back later
    repeat_rows: float = 0.15  # share of rows that say the same passage twice; the others are plain text
    needles: int = 8  # statements in a row with needles, each said twice; fewer if they are long
    # ---- training
    steps: int = 700
    lr: float = 3e-3
    final_lr: float = 3e-4
    warm_up: int = 50  # steps
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    forget: float = 0.25  # share of the steps that begin with empty values
    restricted: float = 0.0  # share of the steps in which full attention sees `window` tokens (pSWA)
    precision: str = "float32"  # "bfloat16": autocast; memories stay float32
    checkpointing: bool = False  # of activations, layer by layer
    compile: bool = False
    seed: int = 0
    log_every: int = 25  # steps
    save_every: int = 200  # steps; a run that is stopped goes on from the last one

    def __post_init__(self):
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _checked(f.name, getattr(self, f.name), f.type))
        inside = [i for kind in (self.fwpkm, self.fwmlp, self.pkm) for i in kind]
        if any(not 0 <= i < self.layers for i in inside) or set(self.fwpkm) & set(self.fwmlp):
            raise ValueError(f"fwpkm, fwmlp, pkm: expected layers below {self.layers}, one fast memory each")

    def changed(self, **changes):
        """Another configuration; a dict of options changes the options named in it."""
        for name, value in changes.items():
            if isinstance(value, dict):
                changes[name] = getattr(self, name) | value
        return dataclasses.replace(self, **changes)

    def save(self, path):
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path):
        values = json.loads(Path(path).read_text())
        unknown = values.keys() - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"{path}: no settings of a run: {', '.join(sorted(unknown))}")
        return cls(**values)
