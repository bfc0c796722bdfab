"""Trains a byte-level language model with two FwPKM layers on the source text of Python's standard library.

    python examples/train_bytes.py [--steps 200]

What a training loop needs: memories that are made once and handed to the model, and a commit after each step. One of
the four MLPs is a PKM. There is no attention: what came before the last four bytes reaches the model only through a
memory. It shows the loop, not what memories are good for: 200 steps of so small a model are too few for that.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from torch import nn

import fwpkm_cuda


class Model(nn.Module):
    def __init__(self, width=64, layers=4, with_memory=(1, 3), with_pkm=(2,)):
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(torch.randn(256, width) / width**0.5, freeze=False)
        self.window = nn.Conv1d(width, width, 4)
        sizes = dict(key_dim=32, value_dim=width, num_sub_keys=32)
        self.fwpkm = nn.ModuleDict({str(i): fwpkm_cuda.FwPKM(width, **sizes, chunk_size=64) for i in with_memory})
        mlp = lambda: nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        pkm = lambda: fwpkm_cuda.PKM(width, **sizes, heads=2, topk=8)
        self.mlps = nn.ModuleList(pkm() if i in with_pkm else mlp() for i in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))

    def forward(self, ids, memories):
        hidden, details = self.embed(ids), {}
        hidden = hidden + self.window(nn.functional.pad(hidden.mT, (3, 0))).mT
        for i, (norm, mlp) in enumerate(zip(self.norms, self.mlps)):
            if str(i) in self.fwpkm:
                y, details[i] = self.fwpkm[str(i)](hidden, memories[str(i)], return_details=True)
                hidden = hidden + y
            hidden = hidden + mlp(norm(hidden))
        return hidden @ self.embed.weight.T, details


def train(model, memories, steps, batch=4, length=256):
    """-> for each step the loss, and {layer: (memory loss, gate)}"""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("[a-z]*.py"))[:30]
    text = torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8).long()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        ids = torch.stack([text[start : start + length + 1] for start in torch.randint(len(text) - length, (batch,))])
        logits, details = model(ids[:, :-1], memories)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for memory in memories.values():
            memory.commit()
        yield loss.item(), {i: (d.losses.mean().item(), d.gates.mean().item()) for i, d in details.items()}


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=20, help="print every so many steps")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # a model this small is slower when it is shared out
    model = Model()
    memories = {i: layer.new_memory() for i, layer in model.fwpkm.items()}  # once: they outlive every step
    for step, (loss, layers) in enumerate(train(model, memories, options.steps)):
        if step % options.every == 0 or step == options.steps - 1:
            figures = [f"layer {i}: memory loss {m:.3f}, gate {g:.3f}" for i, (m, g) in layers.items()]
            print(f"step {step:4d}  loss {loss:.3f}  " + "; ".join(figures))


if __name__ == "__main__":
    main()
