"""A small language model to try memories in: short convolution, attention, SwiGLU, and memories at chosen layers.

`language_model(config)` is the way to any model. All of them are called alike:

    logits = model(ids, memories, cache=None, restricted=False, details=None, last_only=False)

    ids         (B, T) int64
    memories    fwpkm_cuda.Memories of the model, as they are (scan), streaming() or frozen(); {} if it has none
    cache       model.new_cache() for a text that comes in pieces: what the token mixers keep of what came before
    restricted  full attention sees no more than config.window tokens in this call
    details     a dict that takes {name of the memory: fwpkm_cuda's Details}
    last_only   logits of the last token alone, (B, 1, words), in place of (B, T, words)
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fwpkm_cuda


def language_model(config, words):
    """The model of a configuration, for a vocabulary of so many words."""
    if config.backbone == "small":
        return Small(config, words)
    from experiments.qwen3_next import Qwen3Next

    return Qwen3Next(config, words)


def fast_memory(config, i):
    """The fast-weight layer in front of the token mixer of layer i, or None."""
    if i in config.fwpkm:
        return fwpkm_cuda.FwPKM(config.hidden, **config.fwpkm_options)
    return fwpkm_cuda.FwMLP(config.hidden, **config.fwmlp_options) if i in config.fwmlp else None


def read(fast, hidden, memories, details):
    """What a fast-weight layer adds to the residual stream."""
    if details is None:
        return hidden + fast(hidden, memories[fast.name])
    y, details[fast.name] = fast(hidden, memories[fast.name], return_details=True)
    return hidden + y


def name_memories(model):
    """Each fast-weight layer learns the name of its memory in `fwpkm_cuda.Memories.of(model)`."""
    for name, module in model.named_modules():
        if isinstance(module, (fwpkm_cuda.FwPKM, fwpkm_cuda.FwMLP)):
            module.name = name


def norm(hidden):
    """On the CPU PyTorch has one kernel for it, and five for an RMSNorm."""
    return nn.LayerNorm(hidden, bias=False)


class Cache:
    """What the token mixers keep of the tokens before."""

    def __init__(self, layers):
        self.position = 0
        self.layers = [{} for _ in range(layers)]


def rotations(position, tokens, size, device):
    """RoPE's (cos, sin) for heads of `size` numbers, (tokens, size / 2) each, the first token at `position`."""
    frequencies = 10000 ** (-torch.arange(0, size, 2, device=device, dtype=torch.float32) / size)
    angles = torch.arange(position, position + tokens, device=device)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, rotation):
    """x (B, T, ..., D)"""
    cos, sin = (y.to(x.dtype).view(len(y), *[1] * (x.dim() - 3), -1) for y in rotation)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)


def attend(query, key, value, window=None):
    """Causal attention of the last T of N tokens; each sees itself and window - 1 before it, or all (None).

    query (B, H, T, D), key and value (B, H, N, D). Without earlier tokens (T == N) a window is cut into blocks, each of
    which sees itself and the one before: time and memory grow with T * window."""
    T, N = query.shape[2], key.shape[2]
    if T == N and (window is None or T <= window):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    if T == 1 and (window is None or N <= window):
        return F.scaled_dot_product_attention(query, key, value)
    distance = lambda rows, columns: rows[:, None] - columns[None]
    if T != N:
        back = distance(torch.arange(N - T, N), torch.arange(N)).to(query.device)
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask=(back >= 0) & (back < (N if window is None else window))
        )
    B, H, _, D = query.shape
    blocks = -(-T // window)
    if blocks * window > T:
        query, key, value = (F.pad(x, (0, 0, 0, blocks * window - T)) for x in (query, key, value))
    split = lambda x: x.reshape(B * H, blocks, window, D).transpose(0, 1)  # (blocks, B * H, window, D)
    before = lambda x: F.pad(x[:-1], (0, 0, 0, 0, 0, 0, 1, 0))
    query, key, value = (split(x) for x in (query, key, value))
    key, value = (torch.cat([before(x), x], 2) for x in (key, value))
    back = distance(torch.arange(window), torch.arange(-window, window)).to(query.device)
    mask = ((back >= 0) & (back < window)).repeat(blocks, 1, 1, 1)
    mask[0, :, :, :window] = False  # before the first token
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return out.transpose(0, 1).reshape(B, H, blocks * window, D)[:, :, :T]


class Attention(nn.Module):
    def __init__(self, hidden, heads):
        super().__init__()
        self.heads, self.head_size = heads, hidden // heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x, window, rotation, state=None):
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1))
        query_key = rotate(F.layer_norm(qkv[:, :, :2], qkv.shape[-1:]), rotation)
        query, key, value = (y.transpose(1, 2) for y in (*query_key.unbind(2), qkv[:, :, 2]))
        if state is not None:
            if "key" in state:
                key, value = torch.cat([state["key"], key], 2), torch.cat([state["value"], value], 2)
            first = 0 if window is None else max(key.shape[2] - window + 1, 0)
            state["key"], state["value"] = key[:, :, first:], value[:, :, first:]
        return self.out(attend(query, key, value, window).transpose(1, 2).flatten(2))


class Convolution(nn.Module):
    """Each channel's own causal filter of a few taps: what a token's neighbours were, for the memory's query."""

    def __init__(self, hidden, taps):
        super().__init__()
        self.weight = nn.Parameter((torch.rand(hidden, 1, taps) * 2 - 1) / 2)

    def forward(self, x, state=None):
        x, before = x.mT, self.weight.shape[2] - 1
        if state is not None and "inputs" in state:
            x = torch.cat([state["inputs"], x], 2)
        else:
            x = F.pad(x, (before, 0))
        if state is not None:
            state["inputs"] = x[:, :, x.shape[2] - before :]
        return F.conv1d(x, self.weight.to(x.dtype), groups=x.shape[1]).mT


class SwiGLU(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.up = nn.Linear(hidden, 2 * inner, bias=False)
        self.out = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.out(F.silu(gate) * up)


class Layer(nn.Module):
    """convolution, fast-weight memory, attention, MLP: each adds to the residual stream"""

    def __init__(self, config, i):
        super().__init__()
        hidden = config.hidden
        self.window = config.window if config.layout == "window" else None
        self.restricted_window = config.window
        self.convolution = Convolution(hidden, config.convolution) if config.convolution else None
        self.convolution_norm = norm(hidden) if config.convolution else None
        self.memory = fast_memory(config, i)
        self.attention_norm, self.attention = norm(hidden), Attention(hidden, config.heads)
        self.mlp_norm = norm(hidden)
        is_pkm = i in config.pkm
        self.mlp = fwpkm_cuda.PKM(hidden, **config.pkm_options) if is_pkm else SwiGLU(hidden, config.mlp)

    def forward(self, x, memories, rotation, state=None, restricted=False, details=None):
        if self.convolution is not None:
            x = x + self.convolution(self.convolution_norm(x), state)
        if self.memory is not None:
            x = read(self.memory, x, memories, details)
        window = self.restricted_window if restricted else self.window
        x = x + self.attention(self.attention_norm(x), window, rotation, state)
        return x + self.mlp(self.mlp_norm(x))


class Small(nn.Module):
    def __init__(self, config, words):
        super().__init__()
        if config.layout not in ("window", "full"):
            raise ValueError(f"layout: expected 'window' or 'full' for the small backbone, got {config.layout!r}")
        self.checkpointing = config.checkpointing
        self.embed = nn.Embedding(words, config.hidden)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.layers))
        self.norm = norm(config.hidden)
        nn.init.normal_(self.embed.weight, std=0.02)
        for layer in self.layers:
            for module in (layer.attention, layer.mlp):
                for name, weight in module.named_parameters():
                    if isinstance(module, (Attention, SwiGLU)):
                        shrink = (2 * config.layers) ** -0.5 if name == "out.weight" else 1.0
                        nn.init.normal_(weight, std=0.02 * shrink)
        name_memories(self)

    def new_cache(self):
        return Cache(len(self.layers))

    def forward(self, ids, memories, *, cache=None, restricted=False, details=None, last_only=False):
        x = self.embed(ids) * self.embed.embedding_dim**0.5
        position = 0 if cache is None else cache.position
        rotation = rotations(position, ids.shape[1], self.layers[0].attention.head_size, ids.device)
        for i, layer in enumerate(self.layers):
            state = None if cache is None else cache.layers[i]
            if self.checkpointing and self.training and cache is None:
                reentrant = isinstance(layer.memory, fwpkm_cuda.FwMLP)  # whose scan can be repeated in no other way
                x = checkpoint(layer, x, memories, rotation, None, restricted, details, use_reentrant=reentrant)
            else:
                x = layer(x, memories, rotation, state, restricted, details)
        if cache is not None:
            cache.position += ids.shape[1]
        x = self.norm(x[:, -1:] if last_only else x)
        return x @ self.embed.weight.T
