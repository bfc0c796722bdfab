"""Saved memories: they go on where they stopped, and a damaged file is an error and never a memory."""

import json
import os
import pickle
import random

import pytest
import safetensors.torch
import torch
from inputs import memory as random_memory
from inputs import tokens as random_tokens

import fwpkm_cuda
from fwpkm_cuda import Memory, MLPMemory

OPTIONS = dict(topk=3, chunk_size=4)
MUTATIONS = 1000


def make(dtype=torch.float32):
    torch.manual_seed(2)
    return Memory(*random_memory(dtype=dtype)), random_tokens(dtype=dtype)


def piece(tokens, start, stop):
    return [None if x is None else x[:, start:stop] for x in tokens]


def bits(memory):
    """The tensors and the pending tokens, as bytes."""
    parts = [*memory.tensors.values(), *(x for part in memory._queue for x in part if x is not None)]
    return [t.detach().clone().view(torch.uint8) if t.dtype != torch.bool else t.clone() for t in parts]


def same(a, b):
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("options", [dict(), dict(boundary="carry", lookahead=2), dict(score="idw", grad_clip=0.1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cut", [0, 3, 4, 6])
def test_a_loaded_memory_goes_on_with_the_same_bits(tmp_path, options, dtype, cut):
    memory, tokens = make(dtype)
    memory.stream(*piece(tokens, 0, cut), **OPTIONS, **options)
    memory.save(tmp_path / "memory")
    loaded = Memory.load(tmp_path / "memory")
    assert loaded.pending_tokens == memory.pending_tokens and same(bits(loaded), bits(memory))
    for m in (memory, loaded):
        m.out = m.stream(*piece(tokens, cut, 11), **OPTIONS, **options).out
        m.flush()
    assert torch.equal(memory.out, loaded.out) and same(bits(loaded), bits(memory))


@torch.no_grad()
def test_a_pending_scan_is_saved_as_committed(tmp_path):
    memory, tokens = make()
    memory.scan(*tokens, **OPTIONS)
    memory.save(tmp_path / "memory")
    assert memory.pending is None and same(bits(Memory.load(tmp_path / "memory")), bits(memory))


def test_the_seed_is_saved(tmp_path):
    memory = Memory.random(4, 4, 3, seed=11)
    before = bits(memory)
    memory.values.zero_()
    memory.save(tmp_path / "memory")
    assert same(bits(Memory.load(tmp_path / "memory").reset()), before)


def test_bfloat16_tokens_wait_in_a_file(tmp_path):
    memory, tokens = make()
    tokens = [x.bfloat16() if x.is_floating_point() else x for x in tokens]
    with torch.no_grad():
        memory.stream(*piece(tokens, 0, 3), **OPTIONS)
    memory.save(tmp_path / "memory")
    assert same(bits(Memory.load(tmp_path / "memory")), bits(memory))


def test_other_programs_can_read_the_tensors(tmp_path):
    memory, _ = make()
    memory.save(tmp_path / "memory.safetensors")
    tensors = safetensors.torch.load_file(tmp_path / "memory.safetensors")
    assert torch.equal(tensors["values"], memory.values) and torch.equal(tensors["sub_keys"], memory.sub_keys)


# ------------------------------------------------------------------------------------------------------ damaged files
def mutate(data, generator):
    """A different sequence of bytes."""
    data = bytearray(data)
    kind = generator.randrange(6)
    at = generator.randrange(len(data))
    if kind == 0:
        data[at] ^= 1 << generator.randrange(8)
    elif kind == 1:  # the header is a small part of the file
        data[generator.randrange(min(len(data), 700))] = generator.randrange(256)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + generator.randint(1, 50)]
    elif kind == 4:
        data[at:at] = generator.randbytes(generator.randint(1, 50))
    else:
        other = generator.randrange(len(data))
        data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


@torch.no_grad()
def test_a_thousand_damaged_files_are_refused(tmp_path):
    memory, tokens = make()
    memory.stream(*piece(tokens, 0, 7), **OPTIONS)
    path = tmp_path / "memory"
    memory.save(path)
    original, before = path.read_bytes(), bits(memory)
    generator, refused = random.Random(0), 0
    while refused < MUTATIONS:
        damaged = mutate(original, generator)
        if damaged == original:
            continue
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=str(path)):
            memory.copy_(Memory.load(path))
        refused += 1
    assert same(bits(memory), before)


def edited(path, change):
    """The file with its header changed by `change`, and otherwise in order."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def metadata(name, value):
    return lambda header: header["__metadata__"].__setitem__(name, value)


EDITS = {
    "another_option": lambda h: metadata("state", h["__metadata__"]["state"].replace('"lr": 1.0', '"lr": 2.0'))(h),
    "another_digest": metadata("sha256", "0" * 64),
    "no_digest": lambda h: h["__metadata__"].pop("sha256"),
    "no_state": lambda h: h["__metadata__"].pop("state"),
    "a_later_format": metadata("format", "fwpkm_cuda memory 2"),
    "no_metadata": lambda h: h.pop("__metadata__"),
    "another_shape": lambda h: h["values"].__setitem__("shape", [5, 36]),
    "another_dtype": lambda h: h["values"].__setitem__("dtype", "I32"),
    "a_tensor_less": lambda h: h.pop("sub_keys"),
    "swapped": lambda h: h.update(values=h["sub_keys"], sub_keys=h["values"]),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_header_is_refused(tmp_path, name):
    memory, tokens = make()
    with torch.no_grad():
        memory.stream(*piece(tokens, 0, 3), **OPTIONS)
    path = tmp_path / "memory"
    memory.save(path)
    original = path.read_bytes()
    edited(path, EDITS[name])
    assert path.read_bytes() != original
    with pytest.raises(ValueError, match=str(path)):
        Memory.load(path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.mark.parametrize("name", ["empty", "text", "pickle", "torch", "safetensors", "other_kind", "huge_header"])
def test_another_kind_of_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file"
    if name == "torch":
        torch.save({"values": torch.ones(4, 2), "evil": Evil()}, path)
    elif name == "safetensors":
        safetensors.torch.save_file({"values": torch.ones(4, 2), "sub_keys": torch.ones(1, 2, 2, 2)}, path)
    elif name == "other_kind":
        MLPMemory.random(4, 3, 5).save(path)
    else:
        contents = {"empty": b"", "text": b"values" * 100, "pickle": pickle.dumps(Evil()), "huge_header": b"\xff" * 100}
        path.write_bytes(contents[name])
    with pytest.raises(ValueError, match=str(path)):
        Memory.load(path)
    assert not (tmp_path / "unpickled").exists()


def test_no_file_is_the_system_s_own_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Memory.load(tmp_path / "nothing")


def test_a_file_of_other_sizes_leaves_the_memory(tmp_path):
    memory, _ = make()
    Memory(*random_memory(P=5)).save(tmp_path / "other")
    before = bits(memory)
    with pytest.raises(ValueError, match=r"values.*36, 5.*25, 5"):
        memory.copy_(Memory.load(tmp_path / "other"))
    assert same(bits(memory), before)


# ------------------------------------------------------------------------------------------------------------ writing
def test_a_failed_save_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    memory, _ = make()
    path = tmp_path / "memory"
    memory.save(path)
    old = path.read_bytes()
    memory.values.zero_()
    monkeypatch.setattr(fwpkm_cuda.storage, "_digest", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        memory.save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["memory"]


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    memory, _ = make()
    memory.save(tmp_path / "memory")
    (tmp_path / "other").touch()
    assert (tmp_path / "memory").stat().st_mode == (tmp_path / "other").stat().st_mode
    assert sorted(os.listdir(tmp_path)) == ["memory", "other"]
