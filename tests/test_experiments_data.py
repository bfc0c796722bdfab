"""experiments/corpora.py and experiments/tokens.py on texts made here: nothing is fetched, and no network is needed."""

import base64
import gzip
import hashlib
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "experiments").is_dir(), reason="the tests run away from the source tree")
UNICODE = 'Ünï©ode ½ ² ٣ 文字 🧮\n\n\ttab \r\n "quoted" e\u0301 \ufeff\x00 x1y22'
WORDS = "the memory reads what a token wrote and writes what the next token is 12 3400".split()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """No test sees the caches of the machine, or its package manager."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FWPKM_EXPERIMENTS_CACHE", str(folder))
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    return folder


@pytest.fixture
def corpora(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from experiments import corpora

    return corpora


@pytest.fixture
def tokens(corpora):
    pytest.importorskip("tokenizers")
    from experiments import tokens

    return tokens


@pytest.fixture
def words(tokens):
    return tokens.Vocabulary.train([prose(number) for number in range(4)], 300)


def prose(seed, length=300):
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(length)) + f" document {seed}."


def write_files(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
    return f"files:{folder}"


# ----------------------------------------------------------------------------------------------------------- extract
def test_tidy_keeps_one_blank_and_one_empty_line(corpora):
    assert corpora.tidy(" a \t b\u00a0c\r\n\r\n \n\n  d\fe\rf \n") == "a b c\n\nd\ne\nf"
    assert corpora.tidy(" \n\t\n") == ""


def test_html_becomes_prose(corpora):
    page = """<!DOCTYPE html><html><head><title>gone</title><style>p {}</style></head><body>
    <div role="navigation"><div>gone</div>gone</div><nav>gone<nav>gone</nav>gone</nav>
    <h1>R&amp;D <a class="headerlink" href="#x">gone</a></h1><p>One
    two&nbsp;three &lt;four&gt; caf&eacute; &#8217;</p><br class="docnav"><script>gone("<p>")</script>
    <pre>int x;
    int  y;</pre><ul><li>a<li>b</ul><div class="x book-navigation y"><div>gone</div></div>end</body></html>"""
    assert corpora.html_text(page) == "R&D\n\nOne two three <four> café ’\n\nint x;\nint y;\n\na\nb\n\nend"


def test_pages_come_in_the_order_of_their_numbers(corpora, tmp_path):
    for name in ("de/sec1", "sec2", "sec10", "sec1"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.html").write_text(f"<p>{name} {'x' * 50}</p>")
    (tmp_path / "sec3.html").write_text("<p>short</p>")
    pages = corpora.html_pages(tmp_path, ".", 50, without=("de",))
    assert [page.split()[0] for page in pages] == ["sec1", "sec2", "sec10"]


def dictd_number(number):
    """In base 64, as a dictd index has it."""
    digits = ""
    while number or not digits:
        digits = chr(base64.b64encode(bytes([number % 64 << 2]))[0]) + digits
        number //= 64
    return digits


def write_dictionary(root, entries):
    folder = root / "usr/share/dictd"
    folder.mkdir(parents=True)
    data, index = b"", []
    for headwords, entry in entries:
        entry = entry.encode()
        index += [f"{word}\t{dictd_number(len(data))}\t{dictd_number(len(entry))}" for word in headwords]
        data += entry
    (folder / "small.dict.dz").write_bytes(gzip.compress(data))
    (folder / "small.index").write_text("\n".join(sorted(index)) + "\n")


def test_dictionary_documents_are_whole_entries(corpora, tmp_path):
    entries = [(["00-database-info"], "about the file"), (["00databaseshort"], "about it")]
    entries += [([f"w{i:03}", f"also{i:03}"], f"w{i:03} \\é\\ n.\n   1. meaning\n\n") for i in range(90)]
    write_dictionary(tmp_path, entries)
    expected = [f"w{i:03} \\é\\ n.\n1. meaning" for i in range(90)]
    documents = list(corpora.dictionary(tmp_path, "small", shortest=200))
    assert [entry for document in documents for entry in document.split("\n\n")] == expected
    assert len(documents) > 5 and all(198 <= len(document) < 250 for document in documents[:-1])


def pack_lzw(data, most_bits, clear_at=()):
    """What `compress` does; it also forgets its words before the bytes `clear_at`."""
    codes, word = [], b""
    known = {bytes([i]): i for i in range(256)}
    for at, byte in enumerate(data):
        longer = word + bytes([byte])
        if at in clear_at:
            codes += [known[word], 256]
            known, word = {bytes([i]): i for i in range(256)}, bytes([byte])
        elif longer in known:
            word = longer
        else:
            codes.append(known[word])
            if len(known) + 1 < 1 << most_bits:
                known[longer] = len(known) + 1  # 256 is the code that clears
            word = bytes([byte])
    stream, used, group, bits, size = 0, 0, 0, 9, 257  # as the reader sees it: a word behind
    previous = None
    for code in [*codes, known[word]]:
        stream |= code << used
        used += bits
        size = 257 if code == 256 else min(size + (previous is not None), 1 << most_bits)
        previous = None if code == 256 else code
        wanted = 9 if code == 256 else min(max(size.bit_length(), 9), most_bits)
        if wanted != bits or code == 256:
            used = group = group + -(-(used - group) // (8 * bits)) * 8 * bits
            bits = wanted
    return bytes([0x1F, 0x9D, 0x80 | most_bits]) + stream.to_bytes(-(-used // 8), "little")


@pytest.mark.parametrize("clear_at", [(), (1500, 2900)], ids=["whole", "cleared"])
@pytest.mark.parametrize("most_bits", [10, 11, 16])
def test_lzw_is_unpacked(corpora, most_bits, clear_at):
    data = b"aaaaaaaa" + prose(0, 900).encode() + bytes(range(256)) + prose(0, 900).encode()
    packed = pack_lzw(data, most_bits, clear_at)
    assert corpora.unpack_lzw(packed) == data and len(packed) < len(data)


def test_lzw_that_is_not_says_what_came(corpora):
    with pytest.raises(corpora.CorpusError, match=r"expected the bytes 1f 9d .* got 1f 8b 08"):
        corpora.unpack_lzw(b"\x1f\x8b\x08")
    with pytest.raises(corpora.CorpusError, match="expected a code up to 257, got 300"):
        corpora.unpack_lzw(b"\x1f\x9d\x90" + (300).to_bytes(2, "little"))


def test_the_bible_comes_by_books(corpora, tmp_path):
    text = "Title 1930.\nGe1:1 In the\nGe1:2 And\nGe2:1 Thus\n1Jn5:21 Little children\n2Jn1:1 The elder\n"
    (tmp_path / "usr/lib").mkdir(parents=True)
    (tmp_path / "usr/lib/bible.data").write_bytes(b"Header".ljust(99, b"\0") + pack_lzw(text.encode(), 16))
    assert list(corpora.PACKAGES["bible"].read(tmp_path)) == [
        "In the\nAnd\n\nThus",
        "Little children",
        "The elder",
    ]


def r_object(strings, version=3, kind=16):
    data = b"X\n" + struct.pack(">iii", version, 0x40201, 0x30500)
    data += struct.pack(">i", 5) + b"UTF-8" if version == 3 else b""
    data += struct.pack(">ii", kind, len(strings))
    for text in strings:
        encoded = b"" if text is None else text.encode()
        data += struct.pack(">ii", 0x40009, -1 if text is None else len(encoded)) + encoded
    return data


def rdb(*objects):
    return b"".join(struct.pack(">I", len(data)) + zlib.compress(data) for data in objects)


@pytest.mark.parametrize("version", [2, 3])
def test_an_r_database_gives_its_character_vectors(corpora, tmp_path, version):
    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    novels = ["EMMA", "", "handsome,  clever", None, "and rich"], ["Élinor"]
    objects = r_object(novels[0], version), r_object(["x"], version, kind=19), r_object(novels[1], version)
    (folder / "Rdata.rdb").write_bytes(rdb(*objects))
    assert list(corpora.PACKAGES["austen"].read(tmp_path)) == ["EMMA\n\nhandsome, clever\n\nand rich", "Élinor"]


def test_an_r_database_that_is_not_says_what_came(corpora):
    with pytest.raises(corpora.CorpusError, match="expected zlib data, got 42 5a 68 39"):
        list(corpora.rdb_objects(b"\0\0\0\1BZh9"))
    with pytest.raises(corpora.CorpusError, match="expected an object of 9 bytes, got 4"):
        list(corpora.rdb_objects(struct.pack(">I", 9) + zlib.compress(b"four")))
    with pytest.raises(corpora.CorpusError, match="expected X, a line feed"):
        corpora.r_strings(b"A\n" + bytes(20))


# ---------------------------------------------------------------------------------------------------------- packages
@pytest.fixture
def archive(corpora, monkeypatch):
    """A package "tiny" with two texts, and apt and dpkg that know it; what they were asked to do is in `asked`."""

    class Archive:
        version, deb, shown, asked, problem = "1.0", b"the package", "1.0", [], None

        def run(self, package, folder, *command):
            self.asked.append(command[:2])
            out, error = "", ""
            if command[0] == "apt-get":
                if command[-1] == f"tiny={self.version}" and not self.problem:
                    (Path(folder) / f"tiny_{self.version}_all.deb").write_bytes(self.deb)
                else:
                    error = self.problem or f"E: Version for {command[-1]} was not found"
            elif command[0] == "apt-cache" and self.shown:
                out = f"Package: tiny\nVersion: {self.shown}\nSHA256: {hashlib.sha256(self.deb).hexdigest()}\n"
            elif command[0] == "dpkg-deb":
                (Path(command[-1]) / "text").write_text(f"{self.version} one\f{self.version} two")
            return subprocess.CompletedProcess(command, bool(error), out, error)

        def read(self, root):
            yield from (root / "text").read_text().split("\f")

    archive = Archive()
    archive.asked = []
    package = corpora.Package("tiny", "1.0", hashlib.sha256(archive.deb).hexdigest(), "none", archive.read)
    monkeypatch.setitem(corpora.PACKAGES, "tiny", package)
    monkeypatch.setattr(corpora, "_run", archive.run)
    return archive


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_package_is_fetched_and_read_once(corpora, archive, cache):
    assert corpora.documents("tiny") == ["1.0 one", "1.0 two"]
    assert archive.asked == [("apt-get", "download"), ("dpkg-deb", "-x")]
    assert everything(cache) == ["packages/tiny_1.0_all.deb", f"texts/tiny_1.0_{corpora.EDITION}.txt"]
    assert corpora.documents("tiny") == ["1.0 one", "1.0 two"]
    assert len(archive.asked) == 2
    assert corpora.documents("tiny", cache=cache / "another") == ["1.0 one", "1.0 two"]
    assert len(archive.asked) == 4


def test_an_interruption_leaves_no_text(corpora, archive, cache, monkeypatch):
    def read(root):
        yield "half"
        raise KeyboardInterrupt

    whole = corpora.PACKAGES["tiny"]
    monkeypatch.setitem(corpora.PACKAGES, "tiny", whole._replace(read=read))
    with pytest.raises(KeyboardInterrupt):
        corpora.documents("tiny")
    assert everything(cache) == ["packages/tiny_1.0_all.deb"]
    monkeypatch.setitem(corpora.PACKAGES, "tiny", whole)
    assert corpora.documents("tiny") == ["1.0 one", "1.0 two"]


def test_an_interrupted_file_is_not_there(corpora, tmp_path):
    path = tmp_path / "folder" / "file"
    with pytest.raises(KeyboardInterrupt), corpora.replacing(path) as file:
        file.write(b"half")
        assert not path.exists()
        raise KeyboardInterrupt
    assert everything(tmp_path) == []


def test_a_wrong_digest_is_refused(corpora, archive, cache):
    expected, archive.deb = corpora.PACKAGES["tiny"].sha256, b"something else"
    got = hashlib.sha256(archive.deb).hexdigest()
    with pytest.raises(corpora.CorpusError, match=f"expected SHA-256 {expected}, got {got}"):
        corpora.documents("tiny")
    assert everything(cache) == []
    path = cache / "packages" / "tiny_1.0_all.deb"  # put there by hand
    path.write_bytes(archive.deb)
    with pytest.raises(corpora.CorpusError, match=f"Remove {path}"):
        corpora.documents("tiny")
    path.write_bytes(b"the package")
    assert corpora.documents("tiny") == ["1.0 one", "1.0 two"]
    assert archive.asked == [("apt-get", "download"), ("dpkg-deb", "-x")]


def test_another_version_is_taken_only_if_asked_for(corpora, archive, cache):
    archive.version = archive.shown = "2:1.1"
    with pytest.raises(
        corpora.CorpusError, match=r"expected version 1.0, .* has version 2:1.1 .*accept_other_versions"
    ):
        corpora.documents("tiny")
    assert corpora.documents("tiny", accept_other_versions=True) == ["2:1.1 one", "2:1.1 two"]
    assert "packages/tiny_2%3a1.1_all.deb" in everything(cache)


def test_the_locked_version_is_preferred(corpora, archive):
    archive.shown = "1.1"
    assert corpora.documents("tiny", accept_other_versions=True) == ["1.0 one", "1.0 two"]


@pytest.mark.parametrize("shown", [None, "1.0"], ids=["unknown", "known"])
def test_a_failed_download_says_why(corpora, archive, shown):
    archive.shown, archive.problem = shown, "E: Could not resolve host"
    with pytest.raises(corpora.CorpusError, match=r"Could not resolve host.*apt-get update.*tiny_1\.0_all.*files:PATH"):
        corpora.documents("tiny", accept_other_versions=True)


def test_without_apt_get_it_says_so(corpora):
    with pytest.raises(corpora.CorpusError, match=r"apt-get: expected this program.*anarchism.*files:PATH"):
        corpora.documents("anarchism")


def test_a_package_without_its_files_says_so(corpora, archive, monkeypatch):
    read = corpora.PACKAGES["devil"].read
    monkeypatch.setitem(corpora.PACKAGES, "tiny", corpora.PACKAGES["tiny"]._replace(read=read))
    with pytest.raises(corpora.CorpusError, match=r"tiny_1\.0_all\.deb: expected .*devil\.dict\.dz in it"):
        corpora.documents("tiny")
    monkeypatch.setitem(corpora.PACKAGES, "tiny", corpora.PACKAGES["tiny"]._replace(read=lambda root: [" \n"]))
    with pytest.raises(corpora.CorpusError, match="got no text at all"):
        corpora.documents("tiny")


def test_the_table_has_what_it_needs(corpora):
    for package in corpora.PACKAGES.values():
        assert len(bytes.fromhex(package.sha256)) == 32 and package.version and package.licence


# ------------------------------------------------------------------------------------------- files, names, the split
def test_files_and_folders(corpora, tmp_path):
    source = write_files(tmp_path / "a", part10="ten", part9="nine", empty=" \n")
    (tmp_path / "a" / "notes.md").write_bytes(b"\xef\xbb\xbfnotes \xff")
    (tmp_path / "a" / "other.py").write_text("not a text")
    (tmp_path / "single.py").write_text("named\r\nitself")
    assert corpora.documents(source) == ["notes \ufffd", "nine", "ten"]
    single = "named\r\nitself"
    assert corpora.documents(f"{source},{tmp_path / 'single.py'}") == ["notes \ufffd", "nine", "ten", single]
    assert corpora.documents([tmp_path / "single.py"]) == [single]
    with pytest.raises(corpora.CorpusError, match="nowhere: expected a text file or a folder"):
        corpora.documents("files:nowhere")
    (tmp_path / "b").mkdir()
    with pytest.raises(corpora.CorpusError, match="found no text"):
        corpora.documents(f"files:{tmp_path / 'b'}")


@pytest.mark.parametrize("name", ["anarchy", "hf:nothing", "hf:pg19:all", "hf:pg19:0", ""])
def test_an_unknown_name_lists_the_known_ones(corpora, name):
    with pytest.raises(ValueError, match=r"corpus: expected .*(anarchism, austen|fineweb-edu, lambada)"):
        corpora.documents(name)


def test_the_table_is_printed(corpora, tmp_path, capsys):
    source = write_files(tmp_path / "a", a="x" * 1000, b="y" * 10, c="z" * 20)
    corpora.main([source])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["corpus", "documents", "characters", "median", "longest", "licence"]
    assert row.split()[:5] == [source, "3", "1,030", "20", "1,000"]
    with pytest.raises(SystemExit):
        corpora.main(["files:nowhere"])
    assert "nowhere: expected" in capsys.readouterr().err


@pytest.mark.parametrize("count", [0, 1, 2, 3, 20, 101])
def test_the_split_is_of_whole_documents(corpora, count):
    documents = [f"{i}" for i in range(count)]
    training, test = corpora.split(documents)
    assert sorted(training + test, key=int) == documents and training == sorted(training, key=int)
    assert len(test) == (max(round(0.15 * count), 1) if count > 1 else 0)
    assert corpora.split(documents) == (training, test)
    places = corpora.split(range(count))
    assert [documents[i] for i in places[1]] == test
    for held_out in (0, 1):
        assert all(corpora.split(documents, held_out)) or count < 2


def test_the_split_is_drawn(corpora):
    assert corpora.split(range(20))[1] == [3, 12, 15]  # the same today and tomorrow, and in all versions of Python
    assert len({tuple(corpora.split(range(20), seed=seed)[1]) for seed in range(10)}) > 5


# --------------------------------------------------------------------------------------------------------- data sets
@pytest.fixture
def datasets(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return pytest.importorskip("datasets")


def test_rows_of_a_data_set_become_documents(corpora, datasets):
    rows = datasets.Dataset.from_list([{"text": f"text {i}", "ids": [i, i + 1]} for i in range(5)])
    assert list(corpora.from_dataset(rows, "text")) == [f"text {i}" for i in range(5)]
    assert list(corpora.from_dataset(rows, "text", limit=2)) == ["text 0", "text 1"]
    decode = lambda ids: "-".join(map(str, ids))
    assert list(corpora.from_dataset(rows, "ids", 2, decode)) == ["0-1", "1-2"]
    with pytest.raises(corpora.CorpusError, match=r"expected a column 'content', got 'text', 'ids'"):
        list(corpora.from_dataset(rows, "content"))
    with pytest.raises(corpora.CorpusError, match="expected text in the column 'ids', got list"):
        list(corpora.from_dataset(rows, "ids"))


@pytest.mark.parametrize("form", ["json", "parquet"])
def test_a_data_set_is_streamed_once(corpora, datasets, monkeypatch, tmp_path, cache, form):
    rows = [{"text": f"text {i}\fpage", "score": i} for i in range(7)]
    file = tmp_path / f"rows.{form}"
    if form == "json":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    local, asked = datasets.load_dataset, []

    def load_dataset(*name, **options):
        asked.append((name, options))
        return local(form, data_files=str(file), **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        assert corpora.documents("hf:fineweb-edu:3") == ["text 0\npage", "text 1\npage", "text 2\npage"]
    assert asked == [(("HuggingFaceFW/fineweb-edu", "sample-10BT"), {"split": "train", "streaming": True})]
    assert len(corpora.documents("hf:pg19")) == 7


def test_without_a_network_it_says_so(corpora, datasets, monkeypatch, cache):
    def load_dataset(*name, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        corpora.CorpusError, match=r"hf:lambada: .*cimec/lambada.*ConnectionError: no route.*files:PATH"
    ):
        corpora.documents("hf:lambada")
    assert not list(cache.rglob("*.txt"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(corpora.CorpusError, match="expected the package 'datasets': pip install datasets"):
        corpora.documents("hf:lambada")


def test_token_rows_are_read_by_chunks(corpora):
    class Array:  # as zarr's
        shape, chunks, reads = (7, 4), (3, 2), []

        def __getitem__(self, rows):
            self.reads.append((rows.start, rows.stop))
            return np.arange(28, dtype=np.uint16).reshape(7, 4)[rows]

    array = Array()
    decode = lambda ids: " ".join(map(str, ids))
    documents = list(corpora.from_dataset(corpora.token_rows(array, "tokens"), "tokens", 4, decode))
    assert documents == ["0 1 2 3", "4 5 6 7", "8 9 10 11", "12 13 14 15"]
    assert array.reads == [(0, 3), (3, 6)]


# ------------------------------------------------------------------------------------------------------------ tokens
def test_each_digit_is_a_token(words):
    assert len(words.digits) == len(set(words.digits)) == 10
    for text in ("0123456789", " 0123456789.", "x0123456789x", "year 0123456789\n"):
        found = [number for number in words.encode(text) if number in words.digits]
        assert found == words.digits
    ids = words.encode(" The secret number is 123456")
    assert ids[-6:].tolist() == words.digits[1:7]
    assert np.array_equal(ids, np.concatenate([words.encode(" The secret number is "), words.encode("123456")]))
    tokens = [words.decode([number]) for number in range(words.size)]
    assert [token for token in tokens if set(token) & set("0123456789")] == list("0123456789")


@pytest.mark.parametrize("text", [UNICODE, "", " ", "a", "<doc>", "x<doc>1<doc>", prose(9)])
def test_text_comes_back(words, text):
    ids = words.encode(text)
    assert ids.dtype == np.int32 and words.decode(ids) == text and 0 not in ids
    assert np.array_equal(words.encode_all([text])[0], ids)


def test_token_0_stands_between_documents(tokens):
    words = tokens.Vocabulary.train(["<doc> <doc>x<doc> a<doc>"] * 50 + [UNICODE], 300)
    assert words.separator == 0 and words.decode([0]) == "<doc>"
    assert 0 not in words.encode("<doc> <doc>x<doc>")


def test_a_vocabulary_has_the_size_asked_for(tokens, words):
    assert words.size == 300
    assert tokens.Vocabulary.train(["a"], 257).size == 257
    assert tokens.Vocabulary.train(["ab"], 300).size == 258  # the text has no more
    with pytest.raises(ValueError, match=r"size: expected at least 257, .* got 100"):
        tokens.Vocabulary.train(["a"], 100)


def test_a_vocabulary_is_saved_and_loaded(tokens, words, tmp_path):
    words.save(tmp_path / "new" / "words.json")
    again = tokens.Vocabulary.load(tmp_path / "new" / "words.json")
    assert again.digest == words.digest and again.digits == words.digits
    for text in (UNICODE, "<doc> 12"):
        assert np.array_equal(again.encode(text), words.encode(text))
    with pytest.raises(FileNotFoundError, match=r"expected a file, found none at .*nothing\.json"):
        tokens.Vocabulary.load(tmp_path / "nothing.json")


def test_batches_are_as_single_texts(tokens, words, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH", 1000)
    texts = [prose(i, length) for i, length in enumerate([1, 500, 3, 30, 400, 2])] + [""]
    assert words.encode_all([]) == []
    for ids, text in zip(words.encode_all(texts), texts, strict=True):
        assert ids.dtype == np.int32 and np.array_equal(ids, words.encode(text))


@pytest.mark.parametrize("form", ["normalizer", "metaspace"])
def test_texts_of_another_tokenizer_can_be_continued(tokens, tmp_path, form):
    """Two ways to put a blank before every text, and to take it away again."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    names = ["<unk>", "<s>", "▁", *"0123456789", *"abcdefghijklmnopqrstuvwxyz", "▁is"]
    merges = [("i", "s"), ("▁", "is")]
    names.append("is")
    other = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>"))
    if form == "normalizer":
        other.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        replace, strip = decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)
        other.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), strip])
    else:
        other.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        other.decoder = decoders.Metaspace(prepend_scheme="first", split=False)
    other.add_special_tokens(["<s>"])
    other.save(str(tmp_path / "tokenizer.json"))
    assert other.encode("12", add_special_tokens=False).tokens[0] == "▁"

    words = tokens.Vocabulary.load(tmp_path / "tokenizer.json")
    assert words.digits == list(range(3, 13)) and words.separator == 1
    whole = words.encode("id is 123456")
    assert np.array_equal(whole, np.concatenate([words.encode("id is "), words.encode("123456")]))
    for text in ("id is 123456", " is", "is"):
        assert words.decode(words.encode(text)) == text


def test_a_tokenizer_that_joins_digits_is_refused(tokens):
    from tokenizers import Tokenizer, models

    names = [*"0123456789", "10", "<unk>"]
    joined = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, [("1", "0")], unk_token="<unk>"))
    with pytest.raises(ValueError, match=r"expected a token for each digit of .*'2', '10', '<unk>'"):
        _ = tokens.Vocabulary(joined).digits
    with pytest.raises(ValueError, match="expected a token that separates documents"):
        _ = tokens.Vocabulary(joined).separator


def test_a_tokenizer_of_the_hub(tokens, words, monkeypatch):
    monkeypatch.setattr(tokens.tokenizers.Tokenizer, "from_pretrained", lambda name: words.tokenizer, raising=True)
    assert tokens.Vocabulary.load("hf:mistralai/Mistral-7B-v0.1").digest == words.digest

    def fail(name):
        raise OSError(f"no route to {name}")

    monkeypatch.setattr(tokens.tokenizers.Tokenizer, "from_pretrained", fail)
    with pytest.raises(RuntimeError, match=r"hf:a/b: expected a tokenizer .*OSError: no route to a/b.*network"):
        tokens.Vocabulary.load("hf:a/b")


# ------------------------------------------------------------------------------------------------- tokens of a corpus
def test_ids_of_a_corpus_are_kept(tokens, words, tmp_path, cache, monkeypatch):
    texts = {f"part{i}": prose(i, 40) for i in range(3)} | {"single": "x"}
    source = write_files(tmp_path / "a", **texts)
    arrays = tokens.encoded(source, words)
    assert [words.decode(ids) for ids in arrays] == list(texts.values())
    assert all(ids.dtype == np.int32 for ids in arrays)
    (file,) = cache.rglob("*.npz")
    made = file.stat().st_mtime_ns
    with monkeypatch.context() as patched:
        patched.setattr(tokens.Vocabulary, "encode_all", None)
        again = tokens.encoded(source, words)
    assert all(map(np.array_equal, again, arrays)) and file.stat().st_mtime_ns == made
    (tmp_path / "a" / "single.txt").write_text("y")  # other text, other vocabulary: other ids
    assert words.decode(tokens.encoded(source, words)[-1]) == "y"
    tokens.encoded(source, tokens.Vocabulary.train(texts.values(), 300))
    assert len(everything(cache)) == 3 and not list(cache.rglob("*.part"))


def test_interrupted_ids_are_not_kept(tokens, words, tmp_path, cache, monkeypatch):
    source = write_files(tmp_path / "a", a="text")

    def interrupt(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(tokens.np, "savez", interrupt)
        tokens.encoded(source, words)
    assert everything(cache) == []
    assert words.decode(tokens.encoded(source, words)[0]) == "text"


def test_held_out_documents_shape_no_token(corpora, tokens, tmp_path):
    texts = [prose(i, 100) for i in range(20)]
    places = corpora.split(range(20))[1]
    sources = []
    for rare in ("zyxwvu", "qponml"):
        for place in places:
            texts[place] = f"{rare} " * 500
        sources.append(write_files(tmp_path / rare, **{f"{i:02}": text for i, text in enumerate(texts)}))
    one, other = (tokens.vocabulary([source], 350) for source in sources)
    assert one.digest == other.digest
    assert len(one.encode("zyxwvu")) == 6
    assert len(one.encode(" memory")) == 1
    training = tokens.Vocabulary.train(corpora.split(texts)[0], 350)
    assert training.digest == one.digest


def test_a_vocabulary_is_kept(tokens, tmp_path, cache, monkeypatch):
    one, two = (write_files(tmp_path / n, **{f"{i}": prose(f"{n}{i}", 50) for i in range(4)}) for n in "ab")
    both = tokens.vocabulary([one, two], 300)
    assert tokens.vocabulary(one, 300).digest == tokens.vocabulary([one], 300).digest != both.digest
    assert tokens.vocabulary([one, two], 290).size == 290
    with monkeypatch.context() as patched:
        patched.setattr(tokens.Vocabulary, "train", None)
        assert tokens.vocabulary([one, two], 300).digest == both.digest
    files = len(everything(cache))
    (tmp_path / "a" / "0.txt").write_text("another text")
    (tmp_path / "a" / "1.txt").write_text("another text")
    tokens.vocabulary([one], 300)
    assert len(everything(cache)) == files + 1
