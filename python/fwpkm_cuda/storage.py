"""Tensors in a safetensors file that knows when it has been damaged.

safetensors itself notices a broken header, not a changed number. The metadata of these files holds the SHA-256 of the
whole file, computed with 64 zeros in its place: any changed byte, wherever it is, is an error.
"""

import hashlib
import json
import os
import struct
import tempfile
from contextlib import contextmanager
from pathlib import Path

import safetensors
import safetensors.torch

FORMAT = "fwpkm_cuda memory 2"
_UNSIGNED = b"0" * 64
_FIELD = b'"sha256":"'
_LARGEST_HEADER = 1 << 20  # of the files written here; a damaged length must not allocate


class DamagedFile(ValueError):
    """The file is not one that `write` has left behind."""


def write(path, tensors, metadata):
    """Writes {name: tensor} and {name: str} to `path`: complete, or not at all if an error or a crash comes between."""
    path = Path(path)
    metadata = {"format": FORMAT, **metadata, "sha256": _UNSIGNED.decode()}
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        safetensors.torch.save_file(tensors, temporary, metadata)
        with open(temporary, "r+b") as file:
            place, header = _digest_place(file, path)
            digest = _digest(file, header, place)
            file.seek(place)
            file.write(digest.encode())
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are private, a saved memory is an ordinary file
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def read(path):
    """-> ({name: tensor} on the CPU, {name: str}) of a file of `write`. Raises DamagedFile, or OSError."""
    path = Path(path)
    with open(path, "rb") as file:
        place, header = _digest_place(file, path)
        expected = header[place : place + 64]
        if _digest(file, header, place).encode() != expected:
            raise DamagedFile(f"{path}: damaged: the contents do not match their SHA-256")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except safetensors.SafetensorError as error:
        raise DamagedFile(f"{path}: not a valid safetensors file: {error}") from error
    return tensors, {name: text for name, text in metadata.items() if name not in ("format", "sha256")}


@contextmanager
def reading(path):
    """Where the contents of a file are made into something: what is missing or wrong there is the file's fault."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedFile(f"{path}: {error}") from error


def _digest_place(file, path):
    """(offset of the digest's 64 characters, the bytes of the file up to the end of its header)"""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
    if not 0 < length <= _LARGEST_HEADER:
        raise DamagedFile(f"{path}: not a file of a saved memory (no safetensors header)")
    header = prefix + file.read(length)
    try:
        metadata = json.loads(header[8:])["__metadata__"]
        known = metadata["format"] == FORMAT
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if len(header) != 8 + length or not known:
        raise DamagedFile(f"{path}: not a file of a saved memory (expected format {FORMAT!r} in its metadata)")
    place = header.find(_FIELD) + len(_FIELD)
    if header.count(_FIELD) != 1 or len(header) < place + 64:
        raise DamagedFile(f"{path}: damaged: no SHA-256 in its metadata")
    return place, header


def _digest(file, header, place):
    """SHA-256 of the whole file with zeros for a digest; `file` stands behind the header."""
    digest = hashlib.sha256(header[:place] + _UNSIGNED + header[place + 64 :])
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
