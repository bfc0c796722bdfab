"""Memory: fast weights as a value you hold, feed, copy, save and drop.

`FastWeights` is what any fast weights need to be trained and streamed: a scan whose writes wait for `commit`, a queue
of tokens that are read but not yet written, copies and files. `Memory` is the product key memory. (The dense baseline
is in fast_mlp.py, the memories of a whole model are in memories.py.) The mathematics is in ops.py; this file only keeps
the state between calls.
"""

import copy
import inspect
import json
import math
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from . import ops, pages, storage
from .checks import check_choice, check_whole, described


class Tokens(NamedTuple):
    """Tokens on their way into a memory; T of them in each of B rows."""

    query: Tensor  # (B, T, ...)
    target: Tensor  # (B, T, V)
    loss_weights: Tensor | None = None  # (B, T)
    mask: Tensor | None = None  # (B, T) bool

    def last(self, n):
        """Copies of the last n tokens; a view would keep all of them alive."""
        start = self.query.shape[1] - n
        return Tokens(*(None if x is None else x[:, start:].detach().clone() for x in self))

    @staticmethod
    def join(parts):
        return Tokens(*(None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True)))


REQUIRED = inspect.Parameter.empty
WHOLE = "all"  # a chunk_size: one write per reading


def scan_options(function):
    """{name: default or REQUIRED} of a scan's keyword arguments, without those that a stream sets itself."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ("carried", "flush")}


def check_chunk_size(chunk_size):
    if chunk_size != WHOLE and (type(chunk_size) is not int or chunk_size < 1):
        raise ValueError(f"chunk_size: expected a whole number, at least 1, or {WHOLE!r}, got {chunk_size!r}")


def with_whole_chunk(options, tokens):
    """The options, with chunk_size "all" replaced by the number of tokens that are read."""
    chunk_size = options.get("chunk_size")
    if not isinstance(chunk_size, str):
        return options
    check_chunk_size(chunk_size)
    # A chunk whose pairs are carried over its edge is at least as long as what is carried.
    least = options.get("lookahead", 1) if options.get("boundary") == "carry" else 1
    return options | {"chunk_size": max(tokens, least, 1)}


def in_backward_pass():
    """Activation checkpointing calls a module's forward a second time, inside of the backward pass."""
    return torch._C._current_graph_task_id() != -1


class FastWeights:
    """Weights that are written while they are read, and the state of the reading.

    Not a Parameter, not a buffer: it belongs to no module, optimizer, state_dict, DDP or FSDP, and `module.to(dtype)`
    does not reach it. Two ways to feed it:

    `scan`     a whole sequence, differentiably (training). Nothing is written: the result waits, as `pending`, until
               `commit()` puts it into the weights, or `rollback()` drops it. Every other method that reads or writes
               the weights commits first. The backward pass must come before that; if it is late, autograd says so.
    `stream`   the next tokens, in place (inference). A chunk is written when its last token has come; `pending_tokens`
               wait for the rest of theirs, and `flush()` writes them as a short chunk. Positions count from the last
               flush or reset, and the result does not depend on how a sequence is cut into calls.

    chunk_size "all" writes once per reading: after the last token of each call.

    Subclasses name their tensors and say how to scan and commit them."""

    KIND: ClassVar[str]  # in saved files
    NAMES: ClassVar[tuple[str, ...]]  # of the tensors
    CONTENT: ClassVar[tuple[str, ...]]  # the first of them, which hold what was read; the others say where
    PER_TOKEN: ClassVar[tuple[str, ...]]  # fields of a reading with a row for every token
    OPTIONS: ClassVar[dict]  # `scan_options` of the function that scans

    def __init__(self, tensors, seed=None):
        self._tensors = dict(zip(self.NAMES, tensors, strict=True))
        # How each tensor began: "random" (from the seed), "zeros", a tensor, or None (given, and not kept).
        given = None if seed is None else "random"
        self._start = {name: t if t.requires_grad else given for name, t in self._tensors.items()}
        self.seed = seed
        self.is_frozen = False
        self.pending = None
        self._keep = None
        self._drop_stream()

    def _drop_stream(self):
        self._queue: list[Tokens] = []
        self._queued = 0  # tokens of each row in it
        self._carried = 0  # leading tokens of the queue that belong to a chunk already written (boundary "carry")
        self._options = None  # of the queued tokens, and of a pending scan

    # ---------------------------------------------------------------------------------------- what a subclass provides
    @staticmethod
    def shapes(**sizes):
        """Of the tensors, in the order of NAMES; sizes are the words of `random`."""
        raise NotImplementedError

    def _scan(self, tokens, **options):
        """Reads and writes, differentiably; returns the new weights in its result and leaves the memory alone."""
        raise NotImplementedError

    def _scan_(self, tokens, **options):
        """The same in place, without derivatives."""
        raise NotImplementedError

    def _reading(self, scan):
        """Of the result of a `_scan`, what `_scan_` returns."""
        raise NotImplementedError

    def _commit(self, scan, **options):
        """Puts the new weights of a `_scan` into the memory."""
        raise NotImplementedError

    def _draw(self, name, generator):
        """Fills one tensor with the numbers of a fresh memory."""
        raise NotImplementedError

    @classmethod
    def _random(cls, sizes, seed, device, dtype, **start):
        """A memory of these sizes. start: {name of a tensor: "random" (the default), "zeros", or a tensor to copy}"""
        check_whole(**sizes)
        shapes = dict(zip(cls.NAMES, cls.shapes(**sizes), strict=True))
        for name, value in start.items():
            known = value in ("random", "zeros") if isinstance(value, str) else isinstance(value, Tensor)
            if not known or (isinstance(value, Tensor) and value.shape != shapes[name]):
                got = described(value) if isinstance(value, (Tensor, str)) else type(value).__name__
                raise ValueError(f"{name}: expected 'random', 'zeros' or a tensor of shape {shapes[name]}, got {got}")
        tensors = {name: pages.empty(shape, device, dtype) for name, shape in shapes.items()}
        seed = int(torch.randint(2**62, (), device="cpu")) if seed is None else seed
        memory = cls(*tensors.values(), seed=seed)
        for name, value in start.items():
            if isinstance(value, Tensor):
                value = tensors[name].copy_(value.detach()).clone()
            memory._start[name] = value
        return memory.reset()

    # ------------------------------------------------------------------------------------------------------- the state
    @property
    def tensors(self):
        """{name: tensor}: the weights, without what is pending. Frozen views share them."""
        return dict(self._tensors)

    @property
    def device(self):
        return self._tensors[self.NAMES[0]].device

    @property
    def dtype(self):
        return self._tensors[self.NAMES[0]].dtype

    @property
    def pending_tokens(self):
        """Tokens of each row that `stream` has read and nothing has written yet."""
        return self._queued - self._carried

    def __repr__(self):
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in self._tensors.items())
        state = [f"{self.pending_tokens} pending tokens"] if self.pending_tokens else []
        state += ["a scan to commit"] if self.pending is not None else []
        state += ["frozen"] if self.is_frozen else []
        return f"{type(self).__name__}({', '.join([shapes, str(self.dtype), str(self.device), *state])})"

    def _is_learned(self):
        """A learned initial memory is the layer's parameters until something is written; then it is a copy of them."""
        return any(t.requires_grad for t in self._tensors.values())

    @contextmanager
    def _owned(self):
        """Where the memory is written. If that fails, a learned initial memory is the parameters again."""
        before = dict(self._tensors)
        if self._is_learned():
            self._tensors.update({name: pages.copied(t) for name, t in self._tensors.items()})
        try:
            yield
        except BaseException:
            self._tensors.update(before)
            raise

    def _refuse_if_frozen(self, what):
        if self.is_frozen:
            raise RuntimeError(f"{what}: this memory is frozen; call it on the memory that it is a view of")

    # -------------------------------------------------------------------------------------------------------- training
    def scan(self, query, target, loss_weights=None, mask=None, *, keep=None, **options):
        """Reads a whole sequence and writes after each chunk, differentiably; the writes wait for `commit`.

        Shapes and options are those of the operator; returns its result. keep: {name: tensor} that the commit of this
        scan makes equal to the memory's tensors of these names.

        A scan that is already pending is committed first. The exception is a call from inside a backward pass, by
        activation checkpointing: it repeats the pending scan and writes nothing. In compiled code (torch.compile)
        `commit` must have been called before."""
        tokens = Tokens(query, target, loss_weights, mask)
        if self.is_frozen:
            return self._read(tokens, options)
        options = with_whole_chunk(options, query.shape[1])
        for name, kept in (keep or {}).items():
            if name not in self._tensors or kept.shape != self._tensors[name].shape:
                expected = ", ".join(f"{n} {tuple(t.shape)}" for n, t in self._tensors.items())
                raise ValueError(f"keep: expected tensors among {expected}, got {name} {tuple(kept.shape)}")
        if torch.compiler.is_compiling():
            if self.pending is not None:
                raise RuntimeError(
                    "scan: call commit() (or rollback()) on the memory before compiled code uses it again"
                )
        elif in_backward_pass():
            return self._repeat(tokens, options)
        else:
            self.commit()
        if self._queue:
            raise RuntimeError(f"scan: {self._waiting()} of a stream; call flush() (or reset()) before a scan")
        scan = self._scan(tokens, **options)
        self._watch(scan)
        self.pending = type(scan)(*(x.detach() for x in scan))
        self._options, self._keep = options, keep
        return scan

    def _watch(self, scan):
        """Lets the backward pass of `scan` fail if the memory has been written before it. Autograd notices by itself,
        except where non-reentrant activation checkpointing reads the memory again in place of saving it."""
        if not scan.out.requires_grad or torch.compiler.is_compiling():
            return
        versions = [(t, t._version) for t in self._tensors.values()]

        def check(_):
            if any(t._version != version for t, version in versions):
                raise RuntimeError(
                    "the memory has been modified by an inplace operation (commit) since the scan; call backward() "
                    "before commit(), and before the memory is used again"
                )

        scan.out.register_hook(check)

    def _repeat(self, tokens, options):
        if self.pending is None:
            raise RuntimeError(
                "scan: activation checkpointing repeats a scan that has already been committed or rolled back; call "
                "backward() before commit(), and before the memory is used again"
            )
        scan = self._scan(tokens, **options)
        # The same tokens, read from the same memory, give the same answers but for rounding; on a GPU another order of
        # rounding, somewhere before the layer, may also have led a few tokens to other slots.
        out, expected = scan.out.detach(), self.pending.out
        tolerance = 1e-4 if out.device.type == "cpu" else 1e-2
        if out.shape != expected.shape or (out - expected).norm() > tolerance * expected.norm():
            raise RuntimeError(
                "scan: activation checkpointing repeats a scan that is not the memory's last one; call backward() "
                "before the memory is used again"
            )
        return scan

    @torch.no_grad()
    def commit(self):
        """Puts the pending scan, if there is one, into the weights, in place. Raises their version counters."""
        if self.pending is not None:
            with self._owned():
                self._commit(self.pending, **self._options)
            for name, kept in (self._keep or {}).items():
                kept.copy_(self._tensors[name])
            self.rollback()

    def rollback(self):
        """Drops the pending scan, if there is one: the weights are as before it."""
        if self.pending is not None:
            self.pending = self._options = self._keep = None

    # ------------------------------------------------------------------------------------------------------- inference
    def stream(self, query, target, loss_weights=None, mask=None, **options):
        """Reads the next T tokens, and writes every chunk that they complete, in place.

        Shapes and options are those of the operator (boundary "carry": pairs across a chunk's edge are written too).
        Returns its reading of these T tokens; losses and addressing_loss are of the chunks written by this call. Raises
        if an input requires grad while grad mode is on. Options may change when nothing is pending; with "carry",
        chunk_size also while only the last `lookahead` tokens of a written chunk are."""
        tokens = Tokens(query, target, loss_weights, mask)
        if self.is_frozen:
            if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tokens):
                raise RuntimeError(
                    "stream: has no derivative, but an input requires grad; call it under torch.no_grad()"
                )
            with torch.no_grad():
                return self._reading(self._read(tokens, options))
        self.commit()
        options = with_whole_chunk(self._complete(options), self.pending_tokens + query.shape[1])
        chunk_size = options["chunk_size"]
        check_chunk_size(chunk_size)
        self._refuse_other_options(tokens, options)
        waiting = self.pending_tokens
        chunks, rest = (waiting + query.shape[1]) // chunk_size, (waiting + query.shape[1]) % chunk_size
        if chunks == 0:  # nothing is written: what waits need not be read again
            reading = self._scan_(tokens, **options, carried=0, flush=False)
            if query.shape[1]:
                self._queue.append(tokens.last(query.shape[1]))
                self._queued += query.shape[1]
        else:
            if self._queue:
                tokens = Tokens.join([*self._queue, tokens])
            with self._owned():
                reading = self._scan_(tokens, **options, carried=self._carried, flush=False)
            reading = reading._replace(**{name: getattr(reading, name)[:, waiting:] for name in self.PER_TOKEN})
            self._carried = options["lookahead"] if options.get("boundary") == "carry" else 0
            self._queued = rest + self._carried
            self._queue = [tokens.last(self._queued)] if self._queued else []
        self._options = options if self._queue else None
        return reading

    def flush(self):
        """Writes the pending tokens as a short chunk; the stream then begins anew at position 0.

        Returns the operator's reading of them, or None if nothing was pending. (With boundary "carry", the last tokens
        of a written chunk that only waited for later targets are dropped.)"""
        self._refuse_if_frozen("flush")
        self.commit()
        reading = None
        if self.pending_tokens:
            with torch.no_grad(), self._owned():
                reading = self._scan_(Tokens.join(self._queue), **self._options, carried=self._carried, flush=True)
        self._drop_stream()
        return reading

    @classmethod
    def _complete(cls, options):
        """All options of a stream, those not given at their defaults."""
        result = cls.OPTIONS | options
        for name, value in result.items():
            if name not in cls.OPTIONS:
                raise TypeError(f"{name}: not an option of a stream")
            if value is REQUIRED:
                raise TypeError(f"{name}: this option must be given")
        return result

    def _waiting(self):
        return f"{self.pending_tokens} tokens are pending" if self.pending_tokens else "a carried tail is pending"

    def _refuse_other_options(self, tokens, options):
        if not self._queue:
            return
        may_change = {"chunk_size"} if not self.pending_tokens else set()
        changed = [k for k in options if options[k] != self._options[k] and k not in may_change]
        if changed:
            k = changed[0]
            raise ValueError(
                f"{k}: expected {self._options[k]!r} as for the tokens before, got {options[k]!r}; {self._waiting()}: "
                "call flush() to change it"
            )
        for name, first, new in zip(Tokens._fields, self._queue[0], tokens, strict=True):
            if (first is None) != (new is None):
                raise ValueError(
                    f"{name}: must be given in every call of a stream, or in none; flush() begins a new one"
                )
            if new is not None and new.shape != (
                expected := (*first.shape[:1], tokens.query.shape[1], *first.shape[2:])
            ):
                raise ValueError(f"{name}: expected shape {expected}, got {tuple(new.shape)}; {self._waiting()}")
            if new is not None and (first.dtype, first.device) != (new.dtype, new.device):
                raise ValueError(
                    f"{name}: expected {first.dtype} on {first.device} as the tokens before, got {new.dtype} on "
                    f"{new.device}; {self._waiting()}"
                )

    def _read(self, tokens, options):
        """A scan whose only chunk never becomes full: it is read and not written."""
        if not torch.compiler.is_compiling():
            versions = [None if t.is_inference() else t._version for t in self._tensors.values()]
            if in_backward_pass() and self._versions not in (None, versions):
                raise RuntimeError(
                    "scan: activation checkpointing repeats the reading of a frozen memory that has been written "
                    "since; call backward() before the memory is written"
                )
            self._versions = versions
        too_large = tokens.query.shape[1] + options.get("lookahead", 1) + 1
        scan = self._scan(tokens, **options | dict(chunk_size=too_large, flush=False))
        self._watch(scan)
        return scan

    # -------------------------------------------------------------------------------------------- copies, reset, freeze
    def frozen(self):
        """A view that is read and never written: `scan` and `stream` leave the weights alone. It shares the tensors."""
        view = copy.copy(self)
        view.pending, view._keep, view.is_frozen = None, None, True
        view._versions = None  # of the tensors, at the last reading outside of a backward pass
        view._drop_stream()
        return view

    def clone(self, device=None):
        """An independent copy, on `device` if given, with the pending tokens."""
        self.commit()
        twin = copy.copy(self)
        device = self.device if device is None else torch.device(device)
        twin._tensors = dict(self._tensors)
        if device != self.device or not self._is_learned():
            twin._tensors = {name: pages.copied(t, device) for name, t in self._tensors.items()}
        twin._queue = [Tokens(*(None if x is None else x.to(device, copy=True) for x in part)) for part in self._queue]
        twin.is_frozen = False
        return twin

    @torch.no_grad()
    def copy_(self, other):
        """Becomes a copy of `other`, of the same shapes, in the same tensors; the pending tokens are copied as well."""
        self._refuse_copy(other)
        if other is self:
            return self
        self.rollback()
        source = other.clone(self.device)
        with self._owned():
            for name, t in self._tensors.items():
                t.copy_(source._tensors[name])
        self._queue, self._queued = source._queue, source._queued
        self._carried, self._options = source._carried, source._options
        return self

    def _refuse_copy(self, other):
        self._refuse_if_frozen("copy_")
        if type(other) is not type(self):
            raise TypeError(f"other: expected {type(self).__name__}, got {type(other).__name__}")
        for name, t in self._tensors.items():
            if other._tensors[name].shape != t.shape:
                raise ValueError(
                    f"other: expected {name} of shape {tuple(t.shape)}, got {tuple(other._tensors[name].shape)}"
                )

    def streaming(self, *, chunk_size=None, flush=False, read_passes=1):
        """`Streaming`: for a layer, that streams it in place of scanning it. Options as of the layer's `stream`."""
        return Streaming(self, dict(chunk_size=chunk_size, flush=flush, read_passes=read_passes))

    def reset(self):
        """Becomes what it was on the day it was made (the parameters, if they are learned): nothing written is left.

        What was drawn at random is drawn again from `seed`, in place: the same bits, on the same type of device."""
        return self._begin(self._refuse_begin("reset", self.NAMES))

    def forget(self):
        """Forgets what it has read and keeps where it would look for it: the sub-keys stay as they are.

        The values become those of the day it was made, as in `reset`. Of weights that have no addresses (an MLP's) it
        is `reset`."""
        return self._begin(self._refuse_begin("forget", self.CONTENT))

    def _refuse_begin(self, what, names):
        self._refuse_if_frozen(what)
        for name in names:
            if self._start[name] is None:
                raise RuntimeError(
                    f"{what}: the {name} of this memory are a tensor that was given; copy_() another memory into it"
                )
        return names

    @torch.no_grad()
    def _begin(self, names):
        self.rollback()
        self._drop_stream()
        generator = None if self.seed is None else torch.Generator(self.device).manual_seed(self.seed)
        for name in names:
            start = self._start[name]
            if isinstance(start, str):
                self._tensors[name].zero_() if start == "zeros" else self._draw(name, generator)
            elif start.requires_grad:
                self._tensors[name] = start.to(self.device)
            else:
                self._tensors[name].copy_(start)
        return self

    # ----------------------------------------------------------------------------------------------------------- files
    def save(self, path):
        """Writes weights, pending tokens and their options to a safetensors file, complete or not at all.

        A pending scan is committed first. A stream that goes on from the loaded file gives the same bits as one that
        was not interrupted."""
        tensors, state = self._packed()
        storage.write(path, tensors, {"state": json.dumps(state)})

    @classmethod
    def load(cls, path, device="cpu"):
        """The memory in a file of `save`. A file that is damaged, cut off or of another kind raises ValueError."""
        tensors, metadata = storage.read(path)
        with storage.reading(path):
            return cls._unpacked(tensors, json.loads(metadata["state"]), device)

    def _packed(self):
        """-> ({name: tensor}, what else there is to know, as of JSON)"""
        self.commit()
        tensors = dict(self._tensors)
        if self._queue:
            queue = Tokens.join(self._queue)._asdict()
            tensors |= {f"pending.{name}": x for name, x in queue.items() if x is not None}
        start = dict(self._start)
        for name, how in start.items():
            if isinstance(how, Tensor):
                start[name] = None if how.requires_grad else "kept"
            if start[name] == "kept":
                tensors[f"start.{name}"] = how
        state = {"kind": self.KIND, "seed": self.seed, "start": start, "carried": self._carried}
        return tensors, state | {"options": self._options}

    @classmethod
    def _unpacked(cls, tensors, state, device):
        if state["kind"] != cls.KIND:
            raise ValueError(f"expected a memory of kind {cls.KIND!r}, got {state['kind']!r}")
        memory = cls(*(pages.copied(tensors[name], device) for name in cls.NAMES), seed=state["seed"])
        for name in cls.NAMES:
            how = state["start"][name]
            check_choice("start", how, ("random", "zeros", "kept", None))
            memory._start[name] = pages.copied(tensors[f"start.{name}"], device) if how == "kept" else how
        queue = Tokens(*(tensors.get(f"pending.{name}") for name in Tokens._fields))
        if queue.query is not None:
            options, carried, queued = state["options"], state["carried"], queue.query.shape[1]
            if cls._complete(options) != options or not 0 <= carried <= queued:
                raise ValueError("the options of its pending tokens are not those of this version")
            memory._queue = [Tokens(*(None if x is None else x.to(device) for x in queue))]
            memory._queued, memory._carried, memory._options = queued, carried, options
        return memory


class Streaming(NamedTuple):
    """A memory in the place of a memory: a layer that is called with it streams, with these options.

    So a model says once, where its memories are handed in, how all of its layers use them."""

    memory: FastWeights
    options: dict  # of a layer's `stream`


class Memory(FastWeights):
    """A fast-weight product key memory: `values` (S, V) and `sub_keys` (H, 2, P, K/2) with S = P*P slots.

    float32 or float64, on one device. `Memory(values, sub_keys)` holds the tensors given, without a copy; `random`
    draws fresh ones. If they require grad (a learned initial memory), gradients of scans reach them until the first
    write, which goes into a copy. Options of `scan` and `stream` are those of `fwpkm_cuda.chunk_scan`; `scan` returns
    its `Scan`, `stream` the `Reading` of `fwpkm_cuda.chunk_scan_`. docs/memory.md."""

    KIND = "product key memory"
    NAMES = ("values", "sub_keys")
    CONTENT = ("values",)
    PER_TOKEN = ("out", "indices", "weights")
    OPTIONS = scan_options(ops.chunk_scan_)

    def __init__(self, values, sub_keys, seed=None):
        if values.dim() != 2 or sub_keys.dim() != 4 or sub_keys.shape[1] != 2:
            raise ValueError(
                f"values, sub_keys: expected shapes (S, V) and (H, 2, P, K/2), got {tuple(values.shape)} and "
                f"{tuple(sub_keys.shape)}"
            )
        if values.shape[0] != sub_keys.shape[2] ** 2:
            raise ValueError(f"values: expected P*P = {sub_keys.shape[2] ** 2} rows, got {values.shape[0]}")
        if values.dtype not in (torch.float32, torch.float64) or sub_keys.dtype != values.dtype:
            raise ValueError(f"values, sub_keys: expected float32 or float64, got {values.dtype} and {sub_keys.dtype}")
        if values.device != sub_keys.device:
            raise ValueError(f"values, sub_keys: expected one device, got {values.device} and {sub_keys.device}")
        super().__init__((values, sub_keys), seed)

    @classmethod
    def random(
        cls,
        num_sub_keys=512,
        key_dim=512,
        value_dim=512,
        heads=1,
        *,
        seed=None,
        values="random",
        sub_keys="random",
        device=None,
        dtype=torch.float32,
    ):
        """A fresh memory as the paper's: sub-keys uniform in +-1/sqrt(K), values normal with variance 1/V.

        num_sub_keys P (there are P*P slots), key_dim K (of each head, even), value_dim V, heads H. seed: None takes one
        from torch's generator. values, sub_keys: "random", "zeros", or a tensor that is copied (twice: `reset` goes
        back to it)."""
        sizes = dict(num_sub_keys=num_sub_keys, key_dim=key_dim, value_dim=value_dim, heads=heads)
        return cls._random(sizes, seed, device, dtype, values=values, sub_keys=sub_keys)

    @staticmethod
    def shapes(num_sub_keys, key_dim, value_dim, heads):
        if key_dim % 2:
            raise ValueError(f"key_dim: expected an even number, two halves of a query, got {key_dim}")
        return (num_sub_keys**2, value_dim), (heads, 2, num_sub_keys, key_dim // 2)

    @property
    def values(self):
        """(S, V), without what is pending"""
        return self._tensors["values"]

    @property
    def sub_keys(self):
        """(H, 2, P, K/2), without what is pending"""
        return self._tensors["sub_keys"]

    @property
    def num_slots(self):
        return self.values.shape[0]

    def _draw(self, name, generator):
        (draw_values if name == "values" else draw_sub_keys)(self._tensors[name], generator)

    def _scan(self, tokens, **options):
        return ops.chunk_scan(self.values, self.sub_keys, *tokens, **options)

    def _scan_(self, tokens, **options):
        values, sub_keys = (t.detach() for t in (self.values, self.sub_keys))
        return ops.chunk_scan_(values, sub_keys, *tokens, **options)

    def _reading(self, scan):
        return ops.Reading(*scan[: len(ops.Reading._fields)])

    def _commit(self, scan, lr=1.0, weight_decay=0.0, **_):
        ops.commit_(self.values, self.sub_keys, scan, lr=lr, weight_decay=weight_decay)


@torch.no_grad()
def draw_values(values, generator=None):
    """Fills rows (S, V) as the release does: normal with standard deviation 1/sqrt(V)."""
    return values.normal_(0, 1 / math.sqrt(values.shape[1]), generator=generator)


@torch.no_grad()
def draw_sub_keys(sub_keys, generator=None):
    """Fills sub-keys (H, 2, P, K/2) as the release does: uniform in +-1/sqrt(K)."""
    bound = 1 / math.sqrt(2 * sub_keys.shape[3])
    return sub_keys.uniform_(-bound, bound, generator=generator)
