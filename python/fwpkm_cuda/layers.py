"""Modules for a model: `FwPKM` and its dense baseline `FwMLP` (fast weights), and `PKM` (slow weights).

FwPKM and FwMLP hold slow weights only: what they turn hidden states into, for a memory that the caller passes in.
Letters as in ops.py; docs/fwpkm.md, docs/fwmlp.md, docs/pkm.md.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import fast_mlp, ops
from .checks import check_choice, check_whole, described
from .fast_mlp import MLPMemory
from .memory import Memory, Streaming, check_chunk_size, draw_sub_keys, draw_values, with_whole_chunk

LARGE = 1 << 30  # tokens: stands for a reading of any length where options are checked
GATE_OUTPUTS = 8  # whose mean is the gate, as in the released checkpoints


def at_least_float32(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), in float32; weight starts at 0, where weight decay keeps it."""

    def __init__(self, size, eps=1e-6, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size, device=device, dtype=dtype))

    def forward(self, x):
        dtype = torch.promote_types(torch.promote_types(x.dtype, self.weight.dtype), torch.float32)
        weight = 1 + self.weight.to(dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight, self.eps).to(self.weight.dtype)


def normalize(x, kind):
    """Over the last dimension, in float32: "zscore" (x - mean) / (std + 1e-6) with the unbiased std, "l2" or None."""
    x = at_least_float32(x)
    if x.numel() == 0:  # where std() warns
        return x
    if kind == "zscore":
        return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)
    if kind == "l2":
        return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
    check_choice("kind", kind, (None,))
    return x


def table_dtype(dtype):
    """Of the tables of a layer of this dtype (None: torch's default)."""
    return torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)


class Float32Tables(nn.Module):
    """A module whose parameters TABLES stay float32 (or float64) under `.to(bfloat16)` and `.half()`.

    Steps of a low-precision table are lost in its rounding, and a scan needs its memory in float32."""

    TABLES = ()

    def _apply(self, fn, recurse=True):
        tables = [table for name in self.TABLES if (table := getattr(self, name, None)) is not None]

        def keep(t):
            moved = fn(t)
            is_table = any(t is table or t is table.grad for table in tables)
            return t.to(moved.device) if is_table and moved.dtype in (torch.bfloat16, torch.float16) else moved

        return super()._apply(keep, recurse)


class Projected(NamedTuple):
    """What a layer makes of hidden states."""

    query: Tensor  # (B, T, H, K), or (B, T, Q) of an MLP
    value: Tensor  # (B, T, V)  normalised; target of the memory, and mixed into the layer's output
    gate: Tensor | None  # (B, T)  in (0, 1)


class Details(NamedTuple):
    """What happened in a call, for logs; `losses` and `addressing_loss` are of the chunks that it wrote."""

    gates: Tensor | None  # (B, T)
    losses: Tensor  # (B, Q)  memory loss of each pair
    addressing_loss: Tensor | None  # (W,)            FwPKM only, as the two below
    indices: Tensor | None  # (B, T, H, R)    slots read
    weights: Tensor | None  # (B, T, H, R)


class FastWeightLayer(Float32Tables):
    """The layer around fast weights: projections, gate, memory, output. Subclasses choose the memory."""

    MEMORY = None  # class of the memory
    PER_WRITE = ("losses",)  # fields of its readings that have entries for every write

    def __init__(self, hidden_size, query_size, *, sizes, gate, target_norm, norm_eps, options, device, dtype):
        super().__init__()
        check_whole(hidden_size=hidden_size, **sizes)
        check_chunk_size(options["chunk_size"])
        check_choice("gate", gate, ("output_and_loss", "output", "none"))
        check_choice("target_norm", target_norm, ("zscore", "l2", None))
        value_size = sizes["value_dim"]
        if target_norm == "zscore" and value_size == 1:
            raise ValueError("value_dim: expected at least 2 with target_norm 'zscore', got 1")
        self.hidden_size, self.sizes, self.options = hidden_size, sizes, options
        self.gate, self.target_norm = gate, target_norm
        new = dict(device=device, dtype=dtype)
        self.query_norm = RMSNorm(hidden_size, norm_eps, **new)
        self.query_proj = nn.Linear(hidden_size, query_size, **new)
        self.value_norm = RMSNorm(hidden_size, norm_eps, **new)
        self.value_proj = nn.Linear(hidden_size, value_size, **new)
        if gate != "none":
            self.gate_norm = RMSNorm(hidden_size, norm_eps, **new)
            self.gate_proj = nn.Linear(hidden_size, GATE_OUTPUTS, **new)
        self.out_norm = RMSNorm(value_size, norm_eps, **new)
        self.out_proj = nn.Linear(value_size, hidden_size, **new)

    def extra_repr(self):
        settings = self.sizes | dict(gate=self.gate, target_norm=self.target_norm) | self.options
        return ", ".join(f"{k}={v!r}" for k, v in settings.items())

    def new_memory(self, *, seed=None, device=None, dtype=None, **start):
        """A fresh memory for this layer, on its device and float32 (of a float64 layer: float64) by default.

        seed: of its random numbers, by default one of torch's generator."""
        weight = self.query_proj.weight
        device = weight.device if device is None else device
        dtype = torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype
        return self.MEMORY.random(**self.sizes, seed=seed, device=device, dtype=dtype, **start)

    def project(self, hidden) -> Projected:
        """(B, T, hidden_size) -> query, value and gate"""
        value = normalize(self.value_proj(self.value_norm(hidden)), self.target_norm)
        gate = None
        if self.gate != "none":
            gate = at_least_float32(self.gate_proj(self.gate_norm(hidden))).mean(-1).sigmoid()
        return Projected(self.query_proj(self.query_norm(hidden)), value, gate)

    def combine(self, out, value, gate):
        """What the memory answered, mixed with the token's own value -> (B, T, hidden_size)"""
        if gate is None:
            mixed = out + value
        else:
            mixed = gate.unsqueeze(-1) * out + (1 - gate).unsqueeze(-1) * value
        return self.out_proj(self.out_norm(mixed))

    def forward(self, hidden, memory, mask=None, *, chunk_size=None, read_passes=1, return_details=False):
        """Reads and writes a whole sequence, differentiably; the writes wait for `memory.commit()`.

        hidden (B, T, hidden_size), mask (B, T) bool or None (True: the token counts in the memory loss) ->
        (B, T, hidden_size), to be added to the residual stream; with return_details also `Details`, without a graph.
        In place of a memory, `memory.streaming(...)` makes this call a `stream` with the options given there.

        The memory is the same in train and eval mode; give `memory.frozen()` to leave it alone. A later call (outside a
        backward pass) commits for you; compiled code needs `memory.commit()` before it is called again.

        chunk_size    in place of the layer's own; "all": one write, after the last token of the call
        read_passes   reads and writes the sequence n times in a row, and returns the answers of the last time;
                      differentiable through all of them, so T must be a multiple of chunk_size, and boundary "drop\""""
        if isinstance(memory, Streaming):
            if chunk_size is not None or read_passes != 1:
                raise ValueError("chunk_size, read_passes: expected as arguments of memory.streaming() in this call")
            return self.stream(hidden, memory.memory, mask, **memory.options, return_details=return_details)
        options = self._check_call(hidden, memory, mask, chunk_size, read_passes)
        projected = self.project(hidden)
        passes, T = read_passes, hidden.shape[1]
        options = with_whole_chunk(options, T)
        tokens = self._tokens(projected, mask)
        if passes > 1:
            if T % options["chunk_size"] or options.get("boundary") == "carry":
                raise ValueError(
                    f"read_passes: {passes} differentiable passes need boundary 'drop' and a multiple of chunk_size "
                    f"{options['chunk_size']} tokens, got {T} (stream() with flush=True reads any number)"
                )
            tokens = [None if x is None else torch.cat([x] * passes, 1) for x in tokens]
        reading = memory.scan(*tokens, **options, **self._scan_options())
        return self._answer(self._last(reading, T), projected, return_details)

    def stream(self, hidden, memory, mask=None, *, chunk_size=None, flush=False, read_passes=1, return_details=False):
        """Reads the next tokens and writes the memory in place: for inference, under torch.no_grad().

        Shapes as `forward`. How a sequence is cut into calls makes no difference but for the rounding of the linear
        layers (none for the same queries and values: see Memory.stream). flush=True also writes a partial last chunk,
        as does `memory.flush()` at the end of a context. read_passes: reads the tokens n times, each time to the end
        and with a flush, and returns the answers of the last time."""
        options = self._check_call(hidden, memory, mask, chunk_size, read_passes)
        if read_passes > 1 and not flush:
            raise ValueError("read_passes: more than one pass needs flush=True")
        if read_passes > 1 and memory.pending_tokens:
            raise ValueError(f"read_passes: {memory.pending_tokens} tokens are pending; call memory.flush() before")
        projected = self.project(hidden)
        written = []
        for _ in range(read_passes):
            reading = memory.stream(*self._tokens(projected, mask), **options)
            rest = memory.flush() if flush and not memory.is_frozen else None
            written += [reading] if rest is None else [reading, rest]
        reading = reading._replace(**{k: torch.cat([getattr(x, k) for x in written], -1) for k in self.PER_WRITE})
        return self._answer(reading, projected, return_details)

    def _check_call(self, hidden, memory, mask, chunk_size, read_passes):
        """-> the options of the call"""
        check_whole(read_passes=read_passes)
        is_tensor = isinstance(hidden, Tensor) and hidden.is_floating_point()
        if not is_tensor or hidden.dim() != 3 or hidden.shape[2] != self.hidden_size:
            raise ValueError(
                f"hidden: expected floating-point numbers of shape (B, T, {self.hidden_size}), got {described(hidden)}"
            )
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != hidden.shape[:2]:
                raise ValueError(f"mask: expected bool of shape {tuple(hidden.shape[:2])}, got {described(mask)}")
        if not isinstance(memory, self.MEMORY):
            raise TypeError(f"memory: expected a {self.MEMORY.__name__}, got {type(memory).__name__}")
        for (name, t), shape in zip(memory.tensors.items(), self.MEMORY.shapes(**self.sizes), strict=True):
            if t.shape != shape:
                raise ValueError(f"memory: expected {name} of shape {shape} for this layer, got {tuple(t.shape)}")
        if chunk_size is None:
            return self.options
        check_chunk_size(chunk_size)
        return self.options | {"chunk_size": chunk_size}

    def _scan_options(self):
        """Of `memory.scan` and not of `memory.stream`."""
        return {}

    def _tokens(self, projected, mask):
        query, value, gate = projected
        return [query, value, gate if self.gate == "output_and_loss" else None, mask]

    def _last(self, reading, T):
        """The answers of the last T tokens."""
        return reading._replace(out=reading.out[:, -T:] if T else reading.out)

    def _answer(self, reading, projected, return_details):
        y = self.combine(reading.out, projected.value, projected.gate)
        if not return_details:
            return y
        fields = (projected.gate, *(getattr(reading, name, None) for name in Details._fields[1:]))
        return y, Details(*(None if x is None else x.detach() for x in fields))


def check_reads(topk, num_sub_keys, key_dim, value_dim, heads):
    check_whole(topk=topk, num_sub_keys=num_sub_keys, key_dim=key_dim, value_dim=value_dim, heads=heads)
    Memory.shapes(num_sub_keys, key_dim, value_dim, heads)
    if topk > num_sub_keys:
        raise ValueError(f"topk: expected at most num_sub_keys = {num_sub_keys}, got {topk}")


class FwPKM(FastWeightLayer):
    """Fast-weight product key memory as a layer: y = layer(hidden, memory), with memory = layer.new_memory().

    Defaults are the paper's sizes. Slow weights of the layer (its state_dict): query_proj, value_proj, gate_proj,
    out_proj, each with a norm, and the trained sub-keys. The memory is not among them.

    hidden_size        of the residual stream
    key_dim, value_dim, heads, topk, num_sub_keys    K per head, V, H, R, P
    chunk_size         C: tokens between two writes; "all": one write per call
    gate               "output_and_loss": y mixes answer and own value, and the memory loss is weighted, both by the
                       gate; "output": only the mix; "none": answer + value
    target_norm        of the values: "zscore", "l2" or None
    query_norm         of the two halves of each head's query: "zscore", "l2" or None
    norm_eps           of the RMSNorms
    keep_sub_keys      the buffer `sub_keys` (H, 2, P, K/2), in the state_dict, is where new memories have their
                       sub-keys from; in train() mode the commit of a scan leaves the memory's in it. Without it (and
                       without learned_initial_memory) new memories draw sub-keys at random, and what training has made
                       of them is in the memory alone
    learned_initial_memory   new memories begin as parameters of the layer, `initial_values` and `initial_sub_keys`,
                       which get gradients from the scans before the first commit; else as random numbers
    sparse_grad        their gradient for values: sparse COO (as torch.optim.SparseAdam takes it), or dense
    All others are options of the scan: see `fwpkm_cuda.chunk_scan`."""

    MEMORY = Memory
    TABLES = ("initial_values", "initial_sub_keys", "sub_keys")
    PER_WRITE = ("losses", "addressing_loss")

    def __init__(
        self,
        hidden_size,
        *,
        key_dim=512,
        value_dim=512,
        heads=1,
        topk=8,
        num_sub_keys=512,
        chunk_size=512,
        lookahead=1,
        score="dot",
        eps=1e-3,
        activation="softmax",
        temperature=1.0,
        lr=1.0,
        weight_decay=0.0,
        grad_clip=None,
        write_rule="paper",
        values_only=True,
        addressing_weight=1.0,
        boundary="drop",
        gate="output_and_loss",
        target_norm="zscore",
        query_norm=None,
        norm_eps=1e-6,
        keep_sub_keys=True,
        learned_initial_memory=False,
        sparse_grad=True,
        device=None,
        dtype=None,
    ):
        options = dict(
            topk=topk, chunk_size=chunk_size, lookahead=lookahead, score=score, eps=eps, activation=activation,
            temperature=temperature, lr=lr, weight_decay=weight_decay, grad_clip=grad_clip, write_rule=write_rule,
            values_only=values_only, addressing_weight=addressing_weight, boundary=boundary,
        )  # fmt: skip
        sizes = dict(num_sub_keys=num_sub_keys, key_dim=key_dim, value_dim=value_dim, heads=heads)
        check_reads(topk, **sizes)
        ops.check_scan_options(**with_whole_chunk(options, LARGE))
        check_choice("query_norm", query_norm, ("zscore", "l2", None))
        if query_norm == "zscore" and key_dim == 2:
            raise ValueError("key_dim: expected at least 4 with query_norm 'zscore', got 2")
        super().__init__(
            hidden_size, heads * key_dim, sizes=sizes, gate=gate, target_norm=target_norm, norm_eps=norm_eps,
            options=options, device=device, dtype=dtype,
        )  # fmt: skip
        self.query_norm_kind, self.heads, self.sparse_grad = query_norm, heads, sparse_grad
        self.initial_values = self.initial_sub_keys = sub_keys = None
        new = dict(device=device, dtype=table_dtype(dtype))
        value_shape, key_shape = Memory.shapes(**sizes)
        if learned_initial_memory:
            self.initial_values = nn.Parameter(draw_values(torch.empty(value_shape, **new)))
            self.initial_sub_keys = nn.Parameter(draw_sub_keys(torch.empty(key_shape, **new)))
        elif keep_sub_keys:
            sub_keys = draw_sub_keys(torch.empty(key_shape, **new))
        self.register_buffer("sub_keys", sub_keys)

    @classmethod
    def released(cls, hidden_size, **changes):
        """The configuration of the paper's experiments, as the released code computes it.

        512 x 512 slots, K = V = 512, 1 head x 8 reads, chunks of 512, lookahead 1, step size 1, inverse-distance
        scores, the released write rule (write_rule="release"), z-scored targets, the gate in output and loss."""
        return cls(hidden_size, **(dict(score="idw", write_rule="release") | changes))

    def extra_repr(self):
        return f"{super().extra_repr()}, query_norm={self.query_norm_kind!r}"

    def new_memory(self, *, seed=None, device=None, dtype=None, values=None, sub_keys=None) -> Memory:
        """A fresh memory for this layer, on its device and float32 (of a float64 layer: float64) by default.

        seed      of its random numbers, by default one of torch's generator
        values    (S, V) to begin with: "random" (the default), "zeros", or a tensor, which is copied
        sub_keys  (H, 2, P, K/2): by default those that the layer keeps, else "random"; or a tensor, which is copied

        With learned_initial_memory it is the layer's parameters, until the first write makes a copy of them (and
        nothing else can be asked for)."""
        if self.initial_values is not None:
            if any(x is not None for x in (seed, device, dtype, values, sub_keys)):
                raise ValueError(
                    "seed, device, dtype, values, sub_keys: a learned initial memory is where the layer is (see "
                    "Memory.clone)"
                )
            return Memory(self.initial_values, self.initial_sub_keys)
        values = "random" if values is None else values
        if sub_keys is None:
            kept = self.sub_keys
            sub_keys = "random" if kept is None or kept.is_meta else kept
        return super().new_memory(seed=seed, device=device, dtype=dtype, values=values, sub_keys=sub_keys)

    def project(self, hidden):
        query, value, gate = super().project(hidden)
        query = query.unflatten(-1, (self.heads, -1))
        if self.query_norm_kind is not None:
            query = normalize(query.unflatten(-1, (2, -1)), self.query_norm_kind).flatten(-2).to(query.dtype)
        return Projected(query, value, gate)

    def _scan_options(self):
        keep = {"sub_keys": self.sub_keys} if self.training and self.sub_keys is not None else None
        return {"sparse_grad": self.sparse_grad, "keep": keep}

    def _last(self, reading, T):
        if reading.out.shape[1] == T:
            return reading
        return reading._replace(**{k: getattr(reading, k)[:, -T:] for k in Memory.PER_TOKEN})


class FwMLP(FastWeightLayer):
    """The same layer around a fast-weight MLP: the dense baseline. y = layer(hidden, memory).

    The paper's sizes: 512 -> 2304 -> 512, chunks of 512, step size 0.1, all six tensors written by the gradient of the
    mean loss. key_dim Q, value_dim V, hidden_units N; lookahead_target, loss: see `fast_mlp.mlp_loss`; the others, with
    the same defaults, as in `FwPKM`, so that the two are comparable."""

    MEMORY = MLPMemory

    def __init__(
        self,
        hidden_size,
        *,
        key_dim=512,
        value_dim=512,
        hidden_units=2304,
        chunk_size=512,
        lookahead=1,
        lookahead_target="last",
        loss="mse",
        lr=0.1,
        weight_decay=0.0,
        grad_clip=None,
        gate="output_and_loss",
        target_norm="zscore",
        norm_eps=1e-6,
        device=None,
        dtype=None,
    ):
        options = dict(
            chunk_size=chunk_size, lookahead=lookahead, lookahead_target=lookahead_target, loss=loss, lr=lr,
            weight_decay=weight_decay, grad_clip=grad_clip,
        )  # fmt: skip
        fast_mlp.check_options(**with_whole_chunk(options, LARGE))
        super().__init__(
            hidden_size, key_dim, sizes=dict(key_dim=key_dim, value_dim=value_dim, hidden_units=hidden_units),
            gate=gate, target_norm=target_norm, norm_eps=norm_eps, options=options, device=device, dtype=dtype,
        )  # fmt: skip

    @classmethod
    def released(cls, hidden_size, **changes):
        """The baseline of the paper's experiments, as the released code computes it: its target is the mean of a
        token's own value and the next one, and the gate does not weight the loss."""
        return cls(hidden_size, **(dict(lookahead_target="mean", gate="output") | changes))


class PKM(Float32Tables):
    """Slow-weight product key memory: a layer in place of a model's MLP, trained by the outer optimizer.

    (..., input_dim) -> (..., output_dim). Each head reads the `topk` best of num_sub_keys^2 slots (dot scores, softmax
    per head), the heads' answers are added.

    key_dim, value_dim, heads, topk, num_sub_keys    K per head, V, H, R, P
    query_norm     RMSNorm over all H*K numbers of the query
    query_bias     of the linear map that makes the query
    swilu          output = W (answer * silu(W' x)); else W answer
    gated          output times sigmoid(w x)
    peer           single-neuron experts instead of values (PEER): answer = sum a gelu(<x, u_s>) v_s, of output_dim =
                   value_dim = input_dim, and nothing behind it
    sparse_grad    gradients of the tables of values as sparse COO tensors (torch.optim.SparseAdam), or dense ones

    Parameters: sub_keys (H, 2, P, K/2), values (P*P, V) (PEER: up_values and values), float32 in any case, and the
    projections query_proj, out_proj, swilu_proj, gate_proj."""

    TABLES = ("sub_keys", "values", "up_values")

    def __init__(
        self,
        input_dim,
        output_dim=None,
        *,
        key_dim=512,
        value_dim=512,
        heads=4,
        topk=32,
        num_sub_keys=512,
        query_norm=True,
        query_bias=True,
        swilu=True,
        gated=False,
        peer=False,
        norm_eps=1e-6,
        sparse_grad=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        output_dim = input_dim if output_dim is None else output_dim
        if peer:
            if output_dim != input_dim:
                raise ValueError(f"output_dim: expected input_dim = {input_dim} of the PEER variant, got {output_dim}")
            value_dim, swilu = input_dim, False
        check_whole(input_dim=input_dim, output_dim=output_dim)
        check_reads(topk, num_sub_keys, key_dim, value_dim, heads)
        self.heads, self.topk, self.sparse_grad = heads, topk, sparse_grad
        table = dict(device=device, dtype=table_dtype(dtype))
        new = dict(device=device, dtype=dtype)
        self.sub_keys = nn.Parameter(torch.empty(heads, 2, num_sub_keys, key_dim // 2, **table))
        self.values = nn.Parameter(torch.empty(num_sub_keys**2, value_dim, **table))
        self.up_values = nn.Parameter(torch.empty_like(self.values)) if peer else None
        self.query_proj = nn.Linear(input_dim, heads * key_dim, bias=query_bias, **new)
        self.query_norm = nn.RMSNorm(heads * key_dim, norm_eps, **new) if query_norm else None
        self.out_proj = None if peer else nn.Linear(value_dim, output_dim, **new)
        self.swilu_proj = nn.Linear(input_dim, value_dim, **new) if swilu else None
        self.gate_proj = nn.Linear(input_dim, 1, **new) if gated else None
        self.reset_parameters()

    def reset_parameters(self):
        """As the release: keys uniform in +-1/sqrt(K), values normal with variance 1/V, projections normal."""
        draw_sub_keys(self.sub_keys)
        for table in (self.values, self.up_values):
            if table is not None:
                draw_values(table)
        nn.init.xavier_uniform_(self.query_proj.weight)
        if self.out_proj is not None:
            output_dim = self.out_proj.out_features
            nn.init.normal_(self.out_proj.weight, std=output_dim**-0.5)
            if self.swilu_proj is not None:
                nn.init.normal_(self.swilu_proj.weight, std=output_dim**-0.5)
        if self.gate_proj is not None:
            nn.init.normal_(self.gate_proj.weight, std=self.gate_proj.in_features**-0.5)

    def forward(self, x, return_indices=False):
        """(..., input_dim) -> (..., output_dim); with return_indices also the slots read, (..., H, R) int32"""
        query = self.query_proj(x)
        if self.query_norm is not None:
            query = self.query_norm(query)
        scores, indices = ops.product_key_topk(query.unflatten(-1, (self.heads, -1)), self.sub_keys, self.topk)
        weights, slots = scores.softmax(-1).flatten(-2), indices.flatten(-2)
        if self.up_values is not None:
            projection = ops.value_dot(self.up_values, slots, x.to(self.up_values.dtype), self.sparse_grad)
            weights = weights * F.gelu(projection)
        y = ops.value_gather(self.values, slots, weights, self.sparse_grad).to(query.dtype)
        if self.swilu_proj is not None:
            y = y * F.silu(self.swilu_proj(x))
        if self.out_proj is not None:
            y = self.out_proj(y)
        if self.gate_proj is not None:
            y = self.gate_proj(x).sigmoid() * y
        return (y, indices) if return_indices else y
