"""Memories: the memories of a whole model, handed to it, committed, saved and dropped as one."""

import json
from collections.abc import Mapping

from . import storage
from .checks import described
from .fast_mlp import MLPMemory
from .layers import FastWeightLayer
from .memory import FastWeights, Memory, Streaming
from .statistics import usage

KIND = "memories of a model"  # in saved files
CLASSES = {memory.KIND: memory for memory in (Memory, MLPMemory)}


class Memories(Mapping):
    """{name: memory}, one for each fast-weight layer of a model; a name is the layer's in `model.named_modules()`.

    A model takes them as an argument and gives each layer its own: `layer(hidden, memories[name])`. The argument also
    says, once for all layers, what happens:

    model(ids, memories)                a differentiable scan; its writes wait for `memories.commit()`
    model(ids, memories.streaming())    in place: inference
    model(ids, memories.frozen())       a differentiable scan that writes nothing
    model(ids, memories.frozen().streaming())    only reading

    A value of yours like a single memory: it belongs to no module. `Memories(mapping)` holds the memories given;
    `Memories.of(model)` makes new ones. docs/memory.md."""

    def __init__(self, memories):
        self._memories = dict(memories)
        for name, memory in self._memories.items():
            if not isinstance(name, str):
                raise TypeError(f"memories: expected names, got {name!r}")
            if not isinstance(memory, (FastWeights, Streaming)):
                raise TypeError(f"memories[{name!r}]: expected a memory, got {described(memory)}")

    @classmethod
    def of(cls, model, *, seed=None, device=None, dtype=None, values=None):
        """New memories for the FwPKM and FwMLP layers of a model, in the order of its modules.

        seed: the first memory's; the next has the next number (None: each takes one from torch's generator; a learned
        initial memory needs none). Other arguments as of the layers' `new_memory`; values for FwPKM layers alone."""
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FastWeightLayer)}
        memories = {}
        for place, (name, layer) in enumerate(layers.items()):
            own = dict(device=device, dtype=dtype)
            if layer.MEMORY is Memory:
                own["values"] = values
            if seed is not None and getattr(layer, "initial_values", None) is None:
                own["seed"] = seed + place
            memories[name] = layer.new_memory(**own)
        return cls(memories)

    def __getitem__(self, name):
        return self._memories[name]

    def __iter__(self):
        return iter(self._memories)

    def __len__(self):
        return len(self._memories)

    def __repr__(self):
        return f"{type(self).__name__}({self._memories})"

    def _each(self, call):
        return type(self)({name: call(memory) for name, memory in self._memories.items()})

    # ------------------------------------------------------------------------------------------ what all of them do
    def commit(self):
        """Puts the pending scans into the memories."""
        for memory in self.values():
            memory.commit()

    def rollback(self):
        """Drops the pending scans."""
        for memory in self.values():
            memory.rollback()

    def flush(self):
        """Writes the pending tokens of every stream as a short chunk."""
        for memory in self.values():
            memory.flush()

    def reset(self):
        """All as on the day they were made, or an error and none."""
        for memory in self.values():
            memory._refuse_begin("reset", memory.NAMES)
        for memory in self.values():
            memory.reset()
        return self

    def forget(self):
        """Values as on the day they were made; sub-keys stay as they are. All of them, or an error and none."""
        for memory in self.values():
            memory._refuse_begin("forget", memory.CONTENT)
        for memory in self.values():
            memory.forget()
        return self

    def frozen(self):
        """Views that are read and never written."""
        return self._each(lambda memory: memory.frozen())

    def streaming(self, *, chunk_size=None, flush=False, read_passes=1):
        """The same memories, for layers that stream them in place of scanning them; options of the layers' `stream`."""
        options = dict(chunk_size=chunk_size, flush=flush, read_passes=read_passes)
        return self._each(lambda memory: memory.streaming(**options))

    def clone(self, device=None):
        """Independent copies, on `device` if given, with their pending tokens."""
        return self._each(lambda memory: memory.clone(device))

    def copy_(self, other):
        """Each becomes a copy of the memory of the same name, in the same tensors."""
        if other.keys() != self.keys():
            raise ValueError(f"other: expected memories {list(self)}, got {list(other)}")
        for name, memory in self.items():
            memory._refuse_copy(other[name])
        for name, memory in self.items():
            memory.copy_(other[name])
        return self

    def usage(self, details):
        """{name: Usage} of the reads in `details`, {name: Details} of a call; of product key memories."""
        slots = {name: self[name].num_slots for name in details if isinstance(self[name], Memory)}
        return {name: usage(details[name].indices, slots[name]) for name in slots}

    # ----------------------------------------------------------------------------------------------------------- files
    def save(self, path):
        """Writes all of them to one safetensors file, complete or not at all: see `Memory.save`."""
        tensors, states = {}, {}
        for place, (name, memory) in enumerate(self.items()):
            own, states[name] = memory._packed()
            tensors |= {f"{place}.{key}": tensor for key, tensor in own.items()}
        storage.write(path, tensors, {"state": json.dumps({"kind": KIND, "memories": states})})

    @classmethod
    def load(cls, path, device="cpu"):
        """The memories in a file of `save`. A file that is damaged, cut off or of another kind raises ValueError."""
        tensors, metadata = storage.read(path)
        with storage.reading(path):
            state = json.loads(metadata["state"])
            if state["kind"] != KIND:
                raise ValueError(f"expected {KIND}, got a {state['kind']!r}")
            memories = {}
            for place, (name, own) in enumerate(state["memories"].items()):
                prefix = f"{place}."
                own_tensors = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
                memories[name] = CLASSES[own["kind"]]._unpacked(own_tensors, own, device)
        return cls(memories)
