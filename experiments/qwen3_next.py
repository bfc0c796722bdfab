"""The paper's language model: Qwen3-Next of transformers (5.24 or later) with dense MLPs, and with memories.

Tokens are mixed by gated delta nets (GDN), by attention, or by attention in every fourth layer and GDN in the others:

    "gdn"       GDN
    "gdn+swa"   GDN, and attention to the last `window` tokens
    "gdn+fa"    GDN, and full attention
    "fa"        full attention

A FwPKM or FwMLP stands in front of a layer's token mixer, in the residual stream; a PKM in place of its MLP. All else
is transformers', and no code is copied from there. Called like any model of backbone.py.

Time and memory of GDN grow with T, of a window with T * window. A text in one piece never has a T x T mask; a piece
that comes after others has one of bools, T x (tokens that attention sees). Attention gets the window as transformers'
`sliding_window`, as its flash attention takes it: `model.model.set_attn_implementation("flash_attention_2")`.
torch.compile makes one graph of a model with FwPKM and PKM; with checkpointing, or FwMLP, graphs break at the memories.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, Qwen3NextConfig, Qwen3NextModel
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer
from transformers.utils.versions import require_version

import fwpkm_cuda
from experiments.backbone import attend, fast_memory, name_memories, read

require_version("transformers>=5.24.0")  # earlier ones have another name for `cache`, and ignore this one

NO_MASKS = {"full_attention": None, "linear_attention": None}  # else transformers makes some for some attentions


def windowed(module, query, key, value, attention_mask, sliding_window=None, **_):
    """`attend`, as transformers calls it: query (B, H, T, D), key and value (B, H / n, N, D) -> (B, T, H, D)."""
    n = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(n, 1) for x in (key, value))
    return attend(query, key, value, sliding_window).transpose(1, 2), None


AttentionInterface.register("windowed", windowed)


def layer_types(layout, layers):
    """The token mixer of each layer, in transformers' words."""
    if layout not in ("gdn", "gdn+swa", "gdn+fa", "fa"):
        raise ValueError(f"layout: expected 'gdn', 'gdn+swa', 'gdn+fa' or 'fa' for Qwen3-Next, got {layout!r}")
    attends = [layout == "fa" or (layout != "gdn" and i % 4 == 3) for i in range(layers)]
    return ["full_attention" if here else "linear_attention" for here in attends]


def settings(config, words):
    """transformers' configuration. hidden 768 and 12 heads give the paper's 4 heads of keys and 8 of GDN, 64 wide."""
    heads, width = config.heads, config.hidden // config.heads
    return Qwen3NextConfig(
        vocab_size=words, hidden_size=config.hidden, intermediate_size=config.mlp, num_hidden_layers=config.layers,
        layer_types=layer_types(config.layout, config.layers), num_experts=0, tie_word_embeddings=True,
        num_attention_heads=heads, num_key_value_heads=next(heads // n for n in (3, 2, 1) if heads % n == 0),
        linear_num_key_heads=max(2 * heads // 3, 1), linear_num_value_heads=max(2 * heads // 3, 1), head_dim=width,
        linear_key_head_dim=width, linear_value_head_dim=width, linear_conv_kernel_dim=4, use_cache=False,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, partial_rotary_factor=0.25),
        attn_implementation="windowed",
    )  # fmt: skip


class Layer(Qwen3NextDecoderLayer):
    """memory, token mixer, MLP: each adds to the residual stream"""

    def forward(self, x, *, cache=None, **options):
        if self.checkpointing and self.training and cache is None:
            reentrant = isinstance(self.memory, fwpkm_cuda.FwMLP)  # whose scan can be repeated in no other way
            return checkpoint(partial(self.mix, **options), x, use_reentrant=reentrant)
        return self.mix(x, cache=cache, **options)

    def mix(self, x, memories, details, **options):
        if self.memory is not None:
            x = read(self.memory, x, memories, details)
        return super().forward(x, **options)


class Qwen3Next(nn.Module):
    """The state dict has the names of a `Qwen3NextForCausalLM` with tied embeddings, and those of the memory layers."""

    def __init__(self, config, words):
        super().__init__()
        self.window, self.is_windowed = config.window, config.layout == "gdn+swa"
        self.model = Qwen3NextModel(settings(config, words))  # initialises its weights
        for i, layer in enumerate(self.model.layers):
            layer.__class__ = Layer  # the same weights, with more around them
            layer.checkpointing, layer.memory = config.checkpointing, fast_memory(config, i)
            if i in config.pkm:
                layer.mlp = fwpkm_cuda.PKM(config.hidden, **config.pkm_options)
        name_memories(self)

    def new_cache(self):
        attention = (lambda: DynamicSlidingWindowLayer(self.window)) if self.is_windowed else DynamicLayer
        make = {"full_attention": attention, "linear_attention": LinearAttentionLayer}
        cache = Cache([make[kind]() for kind in self.model.config.layer_types])
        cache.position = 0  # transformers asks an attention layer, and "gdn" has none
        return cache

    def forward(self, ids, memories, *, cache=None, restricted=False, details=None, last_only=False):
        position, T = 0 if cache is None else cache.position, ids.shape[1]
        x = self.model(
            ids, attention_mask=NO_MASKS, position_ids=torch.arange(position, position + T, device=ids.device)[None],
            cache=cache, sliding_window=self.window if self.is_windowed or restricted else None,
            memories=memories, details=details,
        ).last_hidden_state  # fmt: skip
        if cache is not None:
            cache.position += T
        return F.linear(x[:, -1:] if last_only else x, self.model.embed_tokens.weight)
