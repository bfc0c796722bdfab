"""Texts to train on and to test with: `documents(NAME)` is a list of documents, each a string.

    python -m experiments.corpora anarchism files:~/books      # fetches them; how many documents, how long

    anarchism austen bible gcide linux handbook jargon devil   a Debian package, fetched by apt-get and not installed
    files:PATH[,PATH...]                                       files of your own, and *.txt and *.md of folders
    hf:NAME[:LIMIT]                                            a data set of the Hugging Face hub, see `HUB`

A package is one version with one SHA-256: `PACKAGES`. Packages and their texts lie in the cache folder
(FWPKM_EXPERIMENTS_CACHE, else fwpkm-experiments in $XDG_CACHE_HOME or ~/.cache); none is part of this repository.
"""

import argparse
import contextlib
import gzip
import hashlib
import itertools
import os
import random
import re
import statistics
import string
import struct
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

EDITION = 1  # of the texts: count up when a text is extracted in another way
BETWEEN_DOCUMENTS = "\f"  # in the cached text; no document has one


class CorpusError(RuntimeError):
    """A corpus cannot be had: what was expected, what came instead, and what to do."""


class OtherVersion(CorpusError):
    """The archive has another version of the package: `archive`."""

    def __init__(self, message, archive):
        super().__init__(message)
        self.archive = archive


# ------------------------------------------------------------------------------------------------------------- cache
def cache_folder(cache=None) -> Path:
    if cache := cache or os.environ.get("FWPKM_EXPERIMENTS_CACHE"):
        return Path(cache).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fwpkm-experiments"


@contextlib.contextmanager
def replacing(path):
    """A binary file to write; it becomes `path` when all is written, so that an interruption leaves no half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as file:
        try:
            yield file
        except BaseException:
            os.unlink(file.name)
            raise
    os.replace(file.name, path)


def _cached(path, extract: Callable[[], Iterable[str]]) -> list[str]:
    if not path.exists():
        texts = [text.replace(BETWEEN_DOCUMENTS, "\n") for text in extract()]
        texts = [text for text in texts if text.strip()]
        if not texts:
            raise CorpusError(f"{path.stem}: expected documents, got no text at all")
        with replacing(path) as file:
            file.write(BETWEEN_DOCUMENTS.join(texts).encode("utf-8", "replace"))
    return path.read_bytes().decode().split(BETWEEN_DOCUMENTS)


# ----------------------------------------------------------------------------------------------------------- extract
def tidy(text) -> str:
    """Runs of blanks become one, runs of empty lines become one, no blank at either end of a line."""
    text = re.sub(r"\r\n?|\f", "\n", text)
    text = re.sub(r"[^\S\n]+", " ", text)
    text = re.sub(r" ?\n ?", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Text(HTMLParser):
    NOT_TEXT = frozenset("head script style nav footer svg".split())
    NOT_PROSE = frozenset("navigation search banner book-navigation docnav headerlink".split())  # class, id or role
    LINES = frozenset("br div li tr dt dd section article header".split())
    WITHOUT_END = frozenset("area base br col embed hr img input link meta source track wbr".split())
    PARAGRAPHS = frozenset("p h1 h2 h3 h4 h5 h6 pre ul ol dl table blockquote hr".split())

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.parts = []
        self.skipped, self.depth = None, 0  # the element left out, and how many of its kind are open
        self.preformatted = 0

    def handle_starttag(self, tag, attributes):
        if self.skipped:
            self.depth += tag == self.skipped
            return
        names = {name for key, value in attributes if key in ("class", "id", "role") for name in (value or "").split()}
        if tag not in self.WITHOUT_END and (tag in self.NOT_TEXT or names & self.NOT_PROSE):
            self.skipped, self.depth = tag, 1
            return
        self.preformatted += tag == "pre"
        self.line_break(tag)

    def handle_startendtag(self, tag, attributes):
        if not self.skipped:
            self.line_break(tag)

    def handle_endtag(self, tag):
        if self.skipped:
            self.depth -= tag == self.skipped
            if not self.depth:
                self.skipped = None
            return
        self.preformatted = max(self.preformatted - (tag == "pre"), 0)
        self.line_break(tag)

    def handle_data(self, data):
        if not self.skipped:
            self.parts.append(data if self.preformatted else re.sub(r"\s+", " ", data))

    def line_break(self, tag):
        if tag in self.PARAGRAPHS:
            self.parts.append("\n\n")
        elif tag in self.LINES:
            self.parts.append("\n")


def html_text(page) -> str:
    """The prose of a page: without navigation, and with a line for each paragraph."""
    parser = _Text()
    parser.feed(page)
    parser.close()
    return tidy("".join(parser.parts))


def _natural(path):
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", path.as_posix()))]


def html_pages(root, folder, shortest, without=()) -> Iterator[str]:
    """A document per page; pages of fewer than `shortest` characters are lists of links, or empty."""
    for path in sorted((root / folder).rglob("*.html"), key=_natural):
        if not set(path.relative_to(root / folder).parts) & set(without):
            text = html_text(path.read_text("utf-8", "replace"))
            if len(text) >= shortest:
                yield text


def _dictd_number(digits) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + (string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/").index(digit)
    return number


def dictionary(root, name, shortest=16_000) -> Iterator[str]:
    """Entries of a dictd dictionary in their order. One is a few lines, so that a document is as many whole entries as
    make `shortest` characters."""
    folder = root / "usr/share/dictd"
    data = gzip.decompress((folder / f"{name}.dict.dz").read_bytes())
    places = set()  # several headwords may lead to one entry
    for line in (folder / f"{name}.index").read_text("utf-8", "replace").splitlines():
        headword, start, length = line.split("\t")[:3]
        if not headword.startswith(("00-", "00database")):  # about the file
            places.add((_dictd_number(start), _dictd_number(length)))
    document = ""
    for start, length in sorted(places):
        document += tidy(data[start : start + length].decode("utf-8", "replace")) + "\n\n"
        if len(document) >= shortest:
            yield document.strip()
            document = ""
    if document:
        yield document.strip()


def unpack_lzw(data) -> bytes:
    """What `compress` packed (a .Z file)."""
    if data[:2] != b"\x1f\x9d" or not data[2] & 0x80:
        raise CorpusError(f"LZW data: expected the bytes 1f 9d and block mode, got {data[:3].hex(' ')}")
    clear, most_bits = 256, data[2] & 31
    single = [bytes([byte]) for byte in range(256)] + [b""]
    words, bits, previous, out = list(single), 9, b"", []
    at = group = 24  # in bits; codes of one width come in groups of 8, and the last group is filled up

    while at + bits <= 8 * len(data):
        code = int.from_bytes(data[at >> 3 : (at >> 3) + 4], "little") >> (at & 7) & ((1 << bits) - 1)
        at += bits
        if code == clear:
            words, previous = list(single), b""
        else:
            if code > len(words) or (code == len(words) and not previous):
                raise CorpusError(f"LZW data: expected a code up to {len(words)}, got {code}")
            word = words[code] if code < len(words) else previous + previous[:1]
            if previous and len(words) < 1 << most_bits:
                words.append(previous + word[:1])
            out.append(word)
            previous = word
        wanted = 9 if code == clear else min(max(len(words).bit_length(), 9), most_bits)
        if wanted != bits or code == clear:
            at = group = group + -(-(at - group) // (8 * bits)) * 8 * bits
            bits = wanted
    return b"".join(out)


def bible_books(text) -> Iterator[str]:
    """Lines "Ge1:2 And the earth ..." -> a document per book: a verse per line, an empty line before a chapter."""
    book = chapter = None
    lines = []
    for name, number, verse in re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", text, re.M):
        if name != book and lines:
            yield tidy("\n".join(lines))
            lines = []
        if (name, number) != (book, chapter):
            lines.append("")
        book, chapter = name, number
        lines.append(verse)
    if lines:
        yield tidy("\n".join(lines))


def _bible(root) -> Iterator[str]:
    data = (root / "usr/lib/bible.data").read_bytes()
    # A header with the places at which reading may begin, the first of them after the 3 bytes that begin LZW data.
    return bible_books(unpack_lzw(data[data.index(b"\x1f\x9d") :]).decode("utf-8", "replace"))


def r_strings(data) -> list[str] | None:
    """An R object as R's serialize() writes it; None if it is not a character vector."""
    version = struct.unpack_from(">i", data, 2)[0] if data[:2] == b"X\n" else None
    if version not in (2, 3):
        raise CorpusError(f"R object: expected X, a line feed and version 2 or 3, got {data[:6].hex(' ')}")
    at = 14
    if version == 3:
        at += 4 + struct.unpack_from(">i", data, at)[0]  # name of the native encoding
    flags, count = struct.unpack_from(">ii", data, at)
    if flags & 255 != 16:
        return None
    at += 8
    strings = []
    for _ in range(count):
        length = struct.unpack_from(">i", data, at + 4)[0]  # -1: missing
        at += 8
        strings.append(data[at : at + max(length, 0)].decode("utf-8", "replace"))
        at += max(length, 0)
    return strings


def rdb_objects(data) -> Iterator[bytes]:
    """The objects of an R lazy-load database (.rdb): each 4 bytes of length, then zlib."""
    while data:
        (length,) = struct.unpack_from(">I", data)
        unpacker = zlib.decompressobj()
        try:
            unpacked = unpacker.decompress(data[4:])
        except zlib.error as error:
            raise CorpusError(f"R database: expected zlib data, got {data[4:8].hex(' ')} ({error})") from None
        if len(unpacked) != length:
            raise CorpusError(f"R database: expected an object of {length} bytes, got {len(unpacked)}")
        yield unpacked
        data = unpacker.unused_data


def _novels(root) -> Iterator[str]:
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    for lines in map(r_strings, rdb_objects(data)):
        if lines:
            yield tidy("\n".join(lines))


# ---------------------------------------------------------------------------------------------------------- packages
class Package(NamedTuple):
    name: str
    version: str
    sha256: str
    licence: str
    read: Callable[[Path], Iterable[str]]  # the unpacked package -> documents

    @property
    def file(self):
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


PACKAGES = {
    "anarchism": Package(
        "anarchism",
        "15.3-3",
        "cf21c10948b00e923c62eb31c39a3390413fa26c5ee0e3b925feb0ec7fe42948",
        "GPL-2",
        partial(html_pages, folder="usr/share/doc/anarchism/html", shortest=5000),
    ),
    "austen": Package(
        "r-cran-janeaustenr",
        "1.0.0-1",
        "df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
        "texts public domain, package MIT",
        _novels,
    ),
    "bible": Package(
        "bible-kjv-text",
        "4.38",
        "d61b6aad4c51ba9e2800b825325fa6a09e99a0d02a9bb6dc4724fcc4995a1b7a",
        "text public domain, file free with its legend",
        _bible,
    ),
    "gcide": Package(
        "dict-gcide",
        "0.48.5+nmu2",
        "7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
        "GPL-2+",
        partial(dictionary, name="gcide"),
    ),
    "linux": Package(
        "linux-doc-6.1",
        "6.1.176-1",
        "0d843674607703b9ef8c1db5e715c38ed52ff23574feabfe0d961d552126859f",
        "GPL-2",
        partial(html_pages, folder="usr/share/doc/linux-doc-6.1/html", shortest=2000, without=("translations",)),
    ),
    "handbook": Package(
        "debian-handbook",
        "11.20220922",
        "3d5dbeac1f1afc9c094eab9d0f701f6ecff99c4927d5a4794cf6c85678134faa",
        "GPL-2+ or CC-BY-SA-3.0",
        partial(html_pages, folder="usr/share/doc/debian-handbook/html/en-US", shortest=2000),
    ),
    "jargon": Package(
        "dict-jargon",
        "4.4.7-3.1",
        "405f8168d7994ed2cb71407bb95493daec2e9aa66fc0461dafa74a9d6728a8c1",
        "public domain",
        partial(dictionary, name="jargon"),
    ),
    "devil": Package(
        "dict-devil",
        "1.0-13.1",
        "6a535684def2a1f70cd42da16d12d43f0e9dc3e54e4a329178eebab3170e3154",
        "public domain",
        partial(dictionary, name="devil"),
    ),
}


def _run(package, folder, *command) -> subprocess.CompletedProcess:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ | {"LC_ALL": "C"})
    except FileNotFoundError:
        raise CorpusError(
            f"{command[0]}: expected this program, to fetch the Debian package {package.name}, but it is not on this"
            " system. Work on Debian or Ubuntu, or with texts of your own: files:PATH"
        ) from None


def check_digest(file, expected, path):
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != expected:
        raise CorpusError(
            f"{file.name}: expected SHA-256 {expected}, got {got}: another file, or not all of it. Remove {path} if it"
            " is there and try again, or put the right file there"
        )


def _version_of_archive(package) -> Package | None:
    shown = _run(package, None, "apt-cache", "show", "--no-all-versions", package.name).stdout
    fields = dict(re.findall(r"^(Version|SHA256): (\S+)$", shown, re.M))
    return package._replace(version=fields["Version"], sha256=fields["SHA256"]) if len(fields) == 2 else None


def fetch(package, folder) -> Path:
    """The package's file in `folder`, from there or by apt-get, with the right SHA-256."""
    path = folder / package.file
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as new:
            done = _run(package, new, "apt-get", "download", f"{package.name}={package.version}")
            files = list(Path(new).glob("*.deb"))
            if not files:
                raise _not_fetched(package, path, done.stderr.strip() or "no file came")
            check_digest(files[0], package.sha256, path)
            os.replace(files[0], path)
    check_digest(path, package.sha256, path)
    return path


def _not_fetched(package, path, problem) -> CorpusError:
    wanted = f"{package.name}: expected version {package.version}"
    own = f"put the file of the expected version at {path}, or work with texts of your own: files:PATH"
    archive = _version_of_archive(package)
    if archive is None or archive.version == package.version:
        return CorpusError(f"{wanted}, but apt-get download failed: {problem}. Try `apt-get update`, or {own}")
    return OtherVersion(
        f"{wanted}, but the archive has version {archive.version} ({problem}). accept_other_versions=True"
        f" (--accept-other-versions) takes that; figures made with it may differ. Or {own}",
        archive,
    )


def _from_package(name, cache, accept_other_versions) -> list[str]:
    folder = cache / "packages"

    def text(package):
        return cache / "texts" / f"{name}_{package.version}_{EDITION}.txt"

    def extract():
        file = fetch(package, folder)
        with tempfile.TemporaryDirectory() as root:
            done = _run(package, None, "dpkg-deb", "-x", str(file), root)
            if done.returncode:
                raise CorpusError(f"{file}: expected a Debian package, but dpkg-deb -x failed: {done.stderr.strip()}")
            try:
                yield from package.read(Path(root))
            except FileNotFoundError as error:
                raise CorpusError(f"{file.name}: expected {error.filename} in it, which is not there") from error

    package = PACKAGES[name]
    if not text(package).exists():
        try:
            fetch(package, folder)
        except OtherVersion as error:
            if not accept_other_versions:
                raise
            package = error.archive
    return _cached(text(package), extract)


# --------------------------------------------------------------------------------------------------- files, the hub
def _from_files(paths) -> list[str]:
    texts = []
    for path in map(Path, paths):
        path = path.expanduser()
        if not path.exists():
            raise CorpusError(f"{path}: expected a text file or a folder of *.txt and *.md, found nothing there")
        files = [path]
        if path.is_dir():
            files = sorted((p for p in path.rglob("*") if p.suffix in (".txt", ".md")), key=_natural)
        texts += [file.read_bytes().decode("utf-8-sig", "replace") for file in files]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise CorpusError(f"{', '.join(map(str, paths))}: expected text files (*.txt, *.md in folders), found no text")
    return texts


class HubSet(NamedTuple):
    path: str
    configuration: str | None
    split: str
    column: str  # of text, or of token ids


HUB = {
    "fineweb-edu": HubSet("HuggingFaceFW/fineweb-edu", "sample-10BT", "train", "text"),
    "lambada": HubSet("cimec/lambada", "plain_text", "train", "text"),  # whole novels; the test part is short passages
    "pg19": HubSet("emozilla/pg19", None, "train", "text"),
    "longcrawl64": HubSet("clankur/longcrawl64", None, "heldout", "tokens"),
}
HUB_LIMIT = 1000  # documents, without :LIMIT


def from_dataset(rows, column, limit=None, decode=None) -> Iterator[str]:
    """The documents in a column of the rows (dicts) of a data set: texts, or token ids that `decode` makes a text."""
    for row in itertools.islice(rows, limit):
        if column not in row:
            raise CorpusError(f"data set: expected a column {column!r}, got {', '.join(map(repr, row))}")
        text = row[column]
        if not isinstance(text, str):
            if decode is None:
                raise CorpusError(f"data set: expected text in the column {column!r}, got {type(text).__name__}")
            text = decode(text)
        yield text


def token_rows(array, column) -> Iterator[dict]:
    """Rows of a two-dimensional zarr array, in the order of its chunks: each is read once."""
    for start in range(0, array.shape[0], array.chunks[0]):
        for ids in array[start : start + array.chunks[0]]:
            yield {column: ids}


def _from_hub(name, limit) -> Iterator[str]:
    """LongCrawl64 is assumed to be what its public mirror says: a zarr array (documents, 65,536) of 16-bit ids of
    GPT-2's tokens, and complete in the held-out part only. Not yet tried with the hub itself."""
    source, decode = HUB[name], None
    try:
        if name == "longcrawl64":
            import zarr

            from experiments.tokens import Vocabulary

            array = zarr.open_array(f"hf://datasets/{source.path}/{source.split}.zarr", mode="r")
            rows, decode = token_rows(array, source.column), Vocabulary.load("hf:openai-community/gpt2").decode
        else:
            import datasets

            rows = datasets.load_dataset(source.path, source.configuration, split=source.split, streaming=True)
        yield from from_dataset(rows, source.column, limit, decode)
    except ImportError as error:
        raise CorpusError(f"hf:{name}: expected the package {error.name!r}: pip install {error.name}") from error
    except CorpusError:
        raise
    except Exception as error:  # the hub's libraries raise many kinds
        raise CorpusError(
            f"hf:{name}: expected the data set {source.path} of the Hugging Face hub, got {type(error).__name__}:"
            f" {error}. Is there a network? Without one: a Debian corpus ({', '.join(PACKAGES)}) or files:PATH"
        ) from error


# --------------------------------------------------------------------------------------------------------- documents
def documents(name, cache=None, accept_other_versions=False) -> list[str]:
    """The documents of a corpus.  name: see above, or a list of paths"""
    if not isinstance(name, str):
        return _from_files(list(name))
    kind, _, rest = name.partition(":")
    if kind == "files":
        return _from_files(rest.split(","))
    if kind == "hf":
        name, _, limit = rest.partition(":")
        if name in HUB and re.fullmatch(r"([1-9]\d*)?", limit):
            limit = int(limit or HUB_LIMIT)
            path = cache_folder(cache) / "texts" / f"hf-{name}_{limit}_{EDITION}.txt"
            return _cached(path, partial(_from_hub, name, limit))
        raise ValueError(f"corpus: expected hf:NAME or hf:NAME:LIMIT, NAME one of {', '.join(HUB)}, got {kind}:{rest}")
    if name in PACKAGES:
        return _from_package(name, cache_folder(cache), accept_other_versions)
    raise ValueError(f"corpus: expected one of {', '.join(PACKAGES)}, files:PATH or hf:NAME, got {name!r}")


def split(documents, held_out=0.15, seed=0) -> tuple[list, list]:
    """(training, test), by whole documents and in their order. Two documents or more: at least one in each part.

    What is drawn are places in the list: of the same corpus as ids (tokens.py) the same documents are held out."""
    documents = list(documents)
    draw = random.Random(seed)  # random() is the same in all versions of Python
    order = sorted(range(len(documents)), key=[draw.random() for _ in documents].__getitem__)
    count = min(max(round(held_out * len(documents)), 1), max(len(documents) - 1, 0))
    test = set(order[:count])
    return (
        [document for i, document in enumerate(documents) if i not in test],
        [document for i, document in enumerate(documents) if i in test],
    )


def licence(name) -> str:
    return PACKAGES[name].licence if name in PACKAGES else "see its owner"


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m experiments.corpora", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="+", help="a corpus")
    parser.add_argument("--cache", help="folder for packages and texts")
    parser.add_argument("--accept-other-versions", action="store_true", help="packages as the archive has them today")
    options = parser.parse_args(arguments)
    print(f"{'corpus':20} {'documents':>9} {'characters':>11} {'median':>8} {'longest':>9}  licence")
    for name in options.name:
        try:
            texts = documents(name, options.cache, options.accept_other_versions)
        except (CorpusError, ValueError) as error:
            parser.exit(1, f"{error}\n")
        lengths = [len(text) for text in texts]
        print(
            f"{name:20} {len(lengths):9,} {sum(lengths):11,} {statistics.median_low(lengths):8,} {max(lengths):9,}"
            f"  {licence(name)}"
        )


if __name__ == "__main__":
    main()
