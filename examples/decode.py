"""Reads a context into a memory, saves it, and goes on token by token: with the memory, and with the file of it.

    python examples/decode.py [--file memory.safetensors]

The layer is untrained: it shows the calls of inference, and that a loaded memory goes on with the same bits.
"""

import argparse

import torch

import fwpkm_cuda


@torch.no_grad()
def decode(layer, memory, hidden, steps):
    """The layer's answers, each of them the next input; what it reads, it also writes."""
    answers = []
    for _ in range(steps):
        hidden = hidden + layer.stream(hidden, memory)
        answers.append(hidden)
    return torch.cat(answers, 1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="memory.safetensors")
    parser.add_argument("--context", type=int, default=300)
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    layer = fwpkm_cuda.FwPKM(hidden_size=32, key_dim=32, value_dim=32, num_sub_keys=32, chunk_size=64)
    memory = layer.new_memory(seed=0)
    context, token = torch.randn(1, options.context, 32), torch.randn(1, 1, 32)
    with torch.no_grad():
        layer.stream(context, memory)  # in place: every 64 tokens are written, the rest of them waits
    waiting = memory.pending_tokens
    memory.flush()  # the end of the context: what waits is written as well
    memory.save(options.file)
    print(f"read {options.context} tokens; the last {waiting} were written by flush(); saved to {options.file}")
    stayed = decode(layer, memory, token, options.steps)
    loaded = decode(layer, fwpkm_cuda.Memory.load(options.file), token, options.steps)
    forgot = decode(layer, memory.reset(), token, options.steps)
    print(f"decoded {options.steps} tokens one by one; with the loaded memory the same bits: {stayed.equal(loaded)}")
    print(f"with a memory that never read the context, they differ by {(stayed - forgot).norm() / stayed.norm():.1%}")
    return stayed, loaded, forgot


if __name__ == "__main__":
    main()
