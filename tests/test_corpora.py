"""Corpora and files: what is read, in which order, in which pieces; and what is said of what cannot be read."""

import errno
import gzip
import hashlib
import http.client
import io
import itertools
import os
import urllib.error
import urllib.request

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from jaxformer.data import corpora, files
from jaxformer.data.corpora import (
    PIECE,
    Clozes,
    Corpus,
    JSONLines,
    Mixture,
    Parquet,
    PythonTopics,
    TextFiles,
    TextLines,
    TokenFile,
    TopicParagraphs,
    cut,
)
from jaxformer.data.tables import Table
from jaxformer.spec import InputError, checked

TEXT = "naïve café — 数学 🦜\nzwölf Boxkämpfer\n" * 7


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(folder, name, data):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return str(path)


def texts(corpus):
    return list(corpus.documents())


# --- text files


def test_a_folder_is_its_visible_files_in_order(tmp_path):
    for name, text in {"b.txt": "B", "a/z.md": "Z", "a/y.md": "Y", ".hidden": "-", ".git/x": "-"}.items():
        put(tmp_path / "folder", name, text)
    assert texts(TextFiles(str(tmp_path / "folder"))) == ["Y", "Z", "B"]


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


def sources(folder):
    """A folder as programmers have them."""
    for name in ("main.py", "pkg/tool.py", "pkg/notes.MD"):
        put(folder, name, name)
    for name in (".git/config", "pkg/__pycache__/tool.txt", "node_modules/x/index.js", "venv/a.py", ".env", "pkg/.b"):
        put(folder, name, "-")
    put(folder, "logo.png", PNG)
    put(folder, "packed.gz", gzip.compress(PNG))
    return str(folder)


CACHES = "folders called .git, __pycache__, node_modules, venv"


@pytest.mark.parametrize(
    ("fields", "read", "told"),
    [
        (
            {},
            ["main.py", "pkg/notes.MD", "pkg/tool.py"],
            f"reads 3 files, 0.0 kB; leaves out: 2 binary files, such as logo.png; 2 hidden files; {CACHES}",
        ),
        (
            {"suffixes": (".PY",)},
            ["main.py", "pkg/tool.py"],
            f"reads 2 files, 0.0 kB; leaves out: 3 files not .py, such as logo.png; 2 hidden files; {CACHES}",
        ),
        ({"suffixes": (".md", ".js"), "skip": ()}, ["-", "pkg/notes.MD"], "folders called .git"),
    ],
)
def test_what_is_read_of_a_folder_and_what_is_left_out(tmp_path, fields, read, told):
    corpus = TextFiles(sources(tmp_path / "folder"), **fields)
    assert texts(corpus) == read and corpus.summary().endswith(told)
    assert TextFiles(str(tmp_path / "folder" / "main.py")).summary() is None


def test_linked_folders_are_read_once_and_loops_end(tmp_path):
    for name, text in {"folder/a.txt": "A", "else/b.txt": "B", "else/sub/c.txt": "C"}.items():
        put(tmp_path, name, text)
    (tmp_path / "folder" / "more").symlink_to(tmp_path / "else")
    (tmp_path / "folder" / "twice").symlink_to(tmp_path / "else" / "sub")
    (tmp_path / "else" / "loop").symlink_to(tmp_path / "folder")
    corpus = TextFiles(str(tmp_path / "folder"))
    (tmp_path / "folder" / "first").symlink_to(tmp_path / "folder" / "real")
    put(tmp_path, "folder/real/d.txt", "D")  # keeps its name
    (tmp_path / "folder" / "a_again.txt").symlink_to(tmp_path / "folder" / "a.txt")
    (tmp_path / "folder" / "0_first.txt").symlink_to(tmp_path / "folder" / "a.txt")
    put(tmp_path, "node_modules/e.txt", "E")
    (tmp_path / "folder" / "x").symlink_to(tmp_path / "node_modules")
    assert texts(corpus) == ["A", "B", "C", "D"]
    assert corpus.summary().endswith("leaves out: folders called x")
    names = [str(path.relative_to(tmp_path)) for path in corpus.files()]
    assert names[0] == "folder/a.txt" and names[-1] == "folder/real/d.txt"


def test_a_link_may_name_what_a_file_is(tmp_path):
    """As in the cache of the Hugging Face hub, whose files have names without a suffix, and links with one."""
    put(tmp_path, "folder/blobs/0a1b", "A")
    (tmp_path / "folder" / "text.txt").symlink_to(tmp_path / "folder" / "blobs" / "0a1b")
    for suffixes in ((".txt",), ()):
        corpus = TextFiles(str(tmp_path / "folder"), suffixes=suffixes)
        assert texts(corpus) == ["A"] and [path.name for path in corpus.files()] == ["text.txt"]


def test_names_need_not_be_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/folder/caf\xe9.txt"
    os.mkdir(tmp_path / "folder")
    with open(name, "w") as file:
        file.write("A")
    corpus = TextFiles(str(tmp_path / "folder"))
    assert texts(corpus) == ["A"] and len(corpus.fingerprint()) == 64


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    put(tmp_path / "folder", "a.txt", "A")
    put(tmp_path / "folder", "shut/b.txt", "B")
    scan = os.scandir

    def refused(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(InputError, match="shut cannot be read: Permission denied"):
        texts(TextFiles(str(tmp_path / "folder")))


def test_what_chose_the_files_is_not_in_the_fingerprint(tmp_path):
    folder = sources(tmp_path / "folder")
    everything = TextFiles(folder)
    assert everything.fingerprint() == TextFiles(folder, suffixes=(".py", ".md")).fingerprint()
    assert everything.fingerprint() != TextFiles(folder, suffixes=(".py",)).fingerprint()
    with pytest.raises(InputError, match=r"suffixes=\('py',\) must each begin with a dot, such as .py"):
        checked(TextFiles(folder, suffixes=("py",)))


def test_binary_files_are_left_out_of_folders_and_damaged_text_is_not(tmp_path):
    folder = tmp_path / "folder"
    put(folder, "logo.png", PNG)
    with pytest.raises(InputError, match=r"no visible text file \(left out: 1 binary file, such as logo.png\)"):
        texts(TextFiles(str(folder)))
    with pytest.raises(InputError, match=r"logo.png is not UTF-8 .*; convert it, or leave it out, as by data.corpus"):
        texts(TextFiles(str(folder / "logo.png")))
    with pytest.raises(InputError, match=r"logo.png is not UTF-8"):  # it was asked for
        texts(TextFiles(str(folder), suffixes=(".png",)))
    put(folder, "zero.txt", "a\0b")  # is UTF-8, and was always read
    assert texts(TextFiles(str(folder))) == ["a\0b"]
    for name, data in (("latin.txt", "é".encode("latin-1")), ("wide.txt", "ab".encode("utf-16"))):
        put(folder, name, data)
        with pytest.raises(InputError, match=f"{name} is not UTF-8"):
            texts(TextFiles(str(folder)))
        (folder / name).unlink()


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(TextFiles(put(tmp_path, "a", b"\xef\xbb\xbfhi"))) == ["hi"]


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 20])
def test_characters_may_lie_across_chunks(monkeypatch, size):
    data = b"\xef\xbb\xbf" + TEXT.encode()
    starts = [0, *range(3 + size, len(data), size), len(data)]
    chunks = [data[a:b] for a, b in itertools.pairwise(starts)]
    monkeypatch.setattr(files, "_chunks", lambda path: iter(chunks))
    assert "".join(files.decoded("a")) == TEXT


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"hi\xff", r"bad.txt is not UTF-8 \(byte 2 is 0xff\)"),
        (b"\xef\xbb\xbfhi\xff", r"\(byte 5 is 0xff\)"),
        (b"hi\xe2\x82", r"\(byte 2 is 0xe2\)"),
        (b"a" * ((1 << 20) - 1) + b"\xe2\x82\xff", r"\(byte 1048575 is 0xe2\)"),
        (b"a" * (1 << 20) + b"\xff", r"\(byte 1048576 is 0xff\)"),
    ],
)
def test_what_is_not_utf8_is_named(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        texts(TextFiles(put(tmp_path, "bad.txt", data)))


def test_missing_corpora_are_named(tmp_path):
    (tmp_path / "folder").mkdir()
    for corpus, message in (
        (TextFiles(str(tmp_path / "nowhere")), "does not exist"),
        (TextFiles(""), "does not exist"),
        (JSONLines(str(tmp_path / "folder")), "holds no .jsonl or .ndjson file"),
        (TextFiles(str(tmp_path / "folder")), "holds no visible text file; give another folder"),
    ):
        with pytest.raises(InputError, match=message):
            texts(corpus)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.txt.zst"])
def test_compressed_files_are_their_text(tmp_path, name):
    data = TEXT.encode()
    if name.endswith(".gz"):
        data = gzip.compress(data)
    elif name.endswith(".zst"):  # of two frames, as tools that compress in parallel write
        compressor = zstandard.ZstdCompressor(write_checksum=True)
        data = b"".join(compressor.compress(part) for part in (data[:100], data[100:]))
    path = put(tmp_path, name, data)
    assert texts(TextFiles(path)) == [TEXT]
    if name != "a.txt":
        for damaged, message in ((data[:-20], "cannot be read"), (data[:20] + b"junk" + data[24:], "a.txt")):
            put(tmp_path, name, damaged)
            with pytest.raises(InputError, match=message):
                texts(TextFiles(path))


# --- JSON lines and Parquet


def test_json_lines(tmp_path):
    lines = b'{"text": "one", "n": 1}\n\n{"text": null}\n{"body": "-", "text": "\\u00e9\\n2"}'
    for name, data in (("b.jsonl", lines), ("a.jsonl.zst", zstandard.compress(b'{"text": "zero"}\n'))):
        put(tmp_path / "folder", name, data)
    put(tmp_path / "folder", "readme.txt", "no corpus")
    assert texts(JSONLines(str(tmp_path / "folder"))) == ["zero", "one", "", "é\n2"]
    assert texts(JSONLines(put(tmp_path, "c.jsonl", '{"body": "x"}'), field="body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "Expecting property name"),
        (b'{"body": "x"}', "no object with 'text'"),
        (b'["text"]', "no object with 'text'"),
        (b"7", "no object with 'text'"),
        (b'{"text": 7}', "'text' is int, not a string"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b'{"text": "\xff"}', "codec can't decode"),
        (b"[" * 100_000, ""),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    with pytest.raises(InputError) as error:
        texts(JSONLines(put(tmp_path, "a.jsonl", b'{"text": "fine"}\n' + line + b'\n{"text": "fine"}')))
    assert "a.jsonl, line 2: " in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_parquet(tmp_path):
    table = pyarrow.table({"text": ["one", None, TEXT] * 200, "n": list(range(600))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert texts(Parquet(str(tmp_path))) == ["one", "", TEXT] * 200
    bad = pyarrow.StringArray.from_buffers(1, *pyarrow.array([b"\xff\xfe"]).buffers()[1:])
    (tmp_path / "bad").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": bad}), tmp_path / "bad" / "c.parquet")
    for corpus, message in (
        (Parquet(str(tmp_path), column="body"), "no column 'body'; it has text, n"),
        (Parquet(str(tmp_path), column="n"), "column 'n' holds int64; it must hold strings"),
        (Parquet(put(tmp_path, "b.parquet", "junk")), "b.parquet cannot be read"),
        (Parquet(str(tmp_path / "bad")), "c.parquet cannot be read"),
    ):
        with pytest.raises(InputError, match=message):
            texts(corpus)


# --- pieces


def prose(rng, length):
    """Words of 1 to 9 characters between single and repeated spaces and line breaks."""
    marks = [" ", " ", " ", "\n", "\n\n", "  ", "\t", "\r\n"]
    words = ("é" * int(rng.integers(1, 9)) + marks[rng.integers(len(marks))] for _ in range(length))
    return "".join(words)


def test_pieces_are_the_text_and_do_not_depend_on_how_it_was_read():
    rng = np.random.default_rng(0)
    text = prose(rng, 30_000)
    whole = list(cut([text]))
    assert "".join(piece.text for piece in whole) == text
    assert [piece.ends for piece in whole] == [False] * (len(whole) - 1) + [True]
    assert all(PIECE // 2 < len(piece.text) <= PIECE for piece in whole[:-1]) and len(whole) > 5
    for size in (7, 1000, PIECE, PIECE + 1):
        assert list(cut(text[i : i + size] for i in range(0, len(text), size))) == whole
    assert all(piece.text[-1] == "\n" and not piece.text[-2].isspace() for piece in whole[:-1])


def test_text_without_a_place_to_cut_is_cut_all_the_same():
    for text in ("a" * (3 * PIECE + 5), " " * (2 * PIECE + 1), "a" * PIECE, ""):
        pieces = list(cut([text]))
        assert "".join(piece.text for piece in pieces) == text and max(len(piece.text) for piece in pieces) <= PIECE
    assert [len(p.text) for p in cut(["ab " * PIECE])][:2] == [PIECE - 2, PIECE - 1]  # before a space


# --- fingerprints


def test_fingerprints_tell_apart_what_differs_and_nothing_else(tmp_path, cache):
    a, b = tmp_path / "a", tmp_path / "b"
    put(a, "1", "x"), put(a, "2", "yz"), put(b, "1", "xy"), put(b, "2", "z")
    same = tmp_path / "elsewhere"
    put(same, "1", "x"), put(same, "2", "yz")
    lines = put(tmp_path, "c.jsonl", '{"text": "x", "body": "x"}')
    prints = [c.fingerprint() for c in (TextFiles(str(a)), TextFiles(str(b)), TextFiles(str(a / "1")))]
    prints += [JSONLines(lines).fingerprint(), JSONLines(lines, field="body").fingerprint()]
    prints += [TextFiles(lines).fingerprint(), PythonTopics().fingerprint()]
    assert len(set(prints)) == len(prints)
    assert TextFiles(str(same)).fingerprint() == prints[0]
    plain, packed = put(tmp_path, "same.txt", "x"), put(tmp_path, "same.txt.gz", "x")
    assert TextFiles(plain).fingerprint() == TextFiles(str(a / "1")).fingerprint() != TextFiles(packed).fingerprint()


def test_fingerprints_are_those_of_runs_of_before(tmp_path):
    """Before there were `suffixes` and `skip`."""
    put(tmp_path, "f/1", "x"), put(tmp_path, "f/sub/2.txt", "yz")
    table = put(tmp_path, "c.jsonl", '{"text": "x", "label": "a"}')
    found = (TextFiles(str(tmp_path / "f")), TextLines(str(tmp_path / "f/sub")), JSONLines(table), Table(table, "text"))
    assert [corpus.fingerprint()[:16] for corpus in found] == [
        "48812750b02ff690",
        "1902b0d16d21671b",
        "010899ba68806580",
        "f611c2d1bc35d25e",
    ]


class Two(Corpus):
    first: str = ""
    second: str = ""

    def documents(self):
        yield from (self.first, self.second)


def test_a_strangers_corpus_has_a_fingerprint_of_its_documents():
    assert Two("x", "yz").fingerprint() != Two("xy", "z").fingerprint() == Two("xy", "z").fingerprint()


def test_the_hash_of_a_large_file_is_kept_until_the_file_changes(tmp_path, cache, monkeypatch):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 26)
    reads = []
    digest = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: (reads.append(a), digest(*a))[1])
    first = files.file_sha256(path)
    assert files.file_sha256(path) == first == hashlib.sha256(bytes(1 << 26)).hexdigest() and len(reads) == 1
    with open(path, "r+b") as file:
        file.write(b"x")
    assert files.file_sha256(path) != first and len(reads) == 2

    def fails(self, **how):
        raise OSError(errno.EIO, "Input/output error", str(self))

    monkeypatch.setattr(type(path), "read_text", fails)  # of what is kept
    assert files.file_sha256(path) != first and len(reads) == 3


# --- mixtures and ids


def test_mixtures(tmp_path):
    a, b = (TextFiles(put(tmp_path, name, name)) for name in "ab")
    mixture = Mixture((a, b), (3, 1))
    assert texts(mixture) == ["a", "b"] and [weight for _, weight in mixture.parts()] == [0.75, 0.25]
    assert mixture.fingerprint() != Mixture((b, a), (3, 1)).fingerprint()
    for wrong, message in (
        (Mixture((a, b), (1.0,)), "must be as many as"),
        (Mixture((), ()), "corpora must not be empty"),
        (Mixture((a, b), (1.0, 0.00009)), "must each be at least 1/10,000"),
        (Mixture((a, b), (1.0, 0.0)), "must each be at least"),
        (Mixture((mixture, b), (1.0, 1.0)), "must not be mixtures themselves"),
    ):
        with pytest.raises(InputError, match=message):
            checked(wrong)


def test_token_files(tmp_path):
    ids = np.array([3, 50256, 7], np.uint16)
    corpus = TokenFile(put(tmp_path, "train.bin", ids.tobytes()))
    assert corpus.ids().tolist() == ids.tolist()
    assert corpus.fingerprint() != TokenFile(corpus.path, "uint8").fingerprint()
    for wrong, message in (
        (TokenFile(corpus.path, "uint32"), "has 6 bytes, which are no uint32 ids"),
        (TokenFile(put(tmp_path, "empty.bin", "")), "has 0 bytes, which are no uint16 ids; give a file of ids"),
        (TokenFile(str(tmp_path)), "is no file"),
    ):
        with pytest.raises(InputError, match=message):
            wrong.ids()


def test_what_is_no_regular_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="is no regular file"):
        texts(TextFiles(str(tmp_path / "pipe")))
    with pytest.raises(InputError, match="holds ids, no text to learn from"):
        list(TokenFile("train.bin"))


def test_the_built_in_corpus_is_text():
    (text,) = PythonTopics().documents()
    assert len(text) > 400_000 and "def " in text


# --- downloads


class Download(io.BytesIO):
    """Stands in for the network."""

    opened = 0

    def read(self, n=-1):
        data = super().read(n)
        if not data and getattr(self, "breaks", None):
            raise self.breaks
        return data


def fetch(monkeypatch, data, expected=b"right", breaks=None):
    def urlopen(url, timeout):
        Download.opened += 1
        if data is None:
            raise urllib.error.URLError("no network")
        download = Download(data)
        download.breaks = breaks
        return download

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.delenv("JAXFORMER_DATA", raising=False)
    return corpora.fetch("a.txt", "https://example.org/a", hashlib.sha256(expected).hexdigest())


def test_a_download_is_made_once(monkeypatch, cache):
    Download.opened = 0
    assert fetch(monkeypatch, b"right").read_bytes() == b"right"
    assert fetch(monkeypatch, None) == cache / "a.txt" and Download.opened == 1


@pytest.mark.parametrize(
    ("data", "breaks"),
    [
        (None, None),
        (b"rig", ConnectionResetError("connection reset")),
        (b"rig", http.client.IncompleteRead(b"rig")),
        (b"", http.client.BadStatusLine("rubbish")),
        (b"wrong", None),
    ],
)
def test_a_download_that_fails_leaves_nothing(monkeypatch, cache, data, breaks):
    with pytest.raises(InputError, match=r"a.txt could not be downloaded .*; put it at .*cache.a.txt"):
        fetch(monkeypatch, data, breaks=breaks)
    assert list(cache.iterdir()) == []


def test_a_published_file_is_found_in_a_folder_named_from_home(tmp_path, monkeypatch, cache):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAXFORMER_DATA", "~/data")
    path = put(tmp_path / "data", "a.txt", "right")
    assert str(corpora.fetch("a.txt", "https://example.org/a", hashlib.sha256(b"right").hexdigest())) == path


def test_a_wrong_file_in_the_cache_is_named(monkeypatch, cache):
    cache.mkdir()
    (cache / "a.txt").write_bytes(b"old")
    with pytest.raises(InputError, match="remove it, or put the right file there"):
        fetch(monkeypatch, b"right")


def test_what_was_half_written_goes(tmp_path, monkeypatch):
    """At once where writing fails; what a killed process left when it is looked for, and nothing else."""
    for name in ("mine.part", "config.json.5x.part", "config.json.57.part", "config.json"):
        (tmp_path / name).write_text("before")
    files.remove_parts(tmp_path)
    kept = {"mine.part", "config.json.5x.part", "config.json"}
    assert {path.name for path in tmp_path.iterdir()} == kept

    def full(descriptor):
        raise OSError("no space left")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        files.write(tmp_path / "config.json", "after")
    assert {path.name for path in tmp_path.iterdir()} == kept
    assert (tmp_path / "config.json").read_text() == "before"


def test_lines_are_found_across_chunks(monkeypatch):
    for data in (b"a\nbb\n\nccc", b"a\nbb\n\nccc\n", b"", b"\n"):
        expected = data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]
        for size in (1, 2, 9):
            monkeypatch.setattr(files, "_chunks", lambda _, s=size, d=data: (d[i : i + s] for i in range(0, len(d), s)))
            assert list(files.lines("x")) == expected


# --- texts made of texts


def test_paragraphs_of_topics_are_those_of_the_texts_and_know_theirs():
    from pydoc_data.topics import topics

    corpus = checked(TopicParagraphs(topics=("debugger", "specialnames", "customization"), words=11))
    paragraphs, labels = texts(corpus), corpus.label_values()["topic"]
    assert len(paragraphs) == len(labels) == len(set(paragraphs)) > 100
    plain = {name: " ".join(topics[name].split()) for name in corpus.topics}
    for paragraph, label in zip(paragraphs, labels, strict=True):
        assert paragraph in plain[label] and len(paragraph.split()) >= 11
        earlier = corpus.topics[: corpus.topics.index(label)]
        assert not any(paragraph in topics[name].split("\n\n") for name in earlier)
    assert "customization" not in labels  # it is a part of specialnames
    assert list(dict.fromkeys(labels)) == ["debugger", "specialnames"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"topics": ("types",)}, "must be two or more, all different"),
        ({"topics": ("types", "types")}, "must be two or more, all different"),
        ({"words": 0}, "words=0 must be at least 1"),
    ],
)
def test_topics_have_rules(fields, message):
    with pytest.raises(InputError, match=message):
        checked(TopicParagraphs(**fields))


def test_an_unknown_topic_is_told():
    with pytest.raises(InputError, match="topics: 'nothing' must be one of Python's topics, assert"):
        texts(TopicParagraphs(topics=("types", "nothing")))


def test_names_are_asked_for_from_the_words_before_them(tmp_path):
    """But those of the title, months, and first words of sentences; a line without a title is left out."""
    line = "Ada K. Byron. Ada Byron was born in London, on 3 May 1815. Paris saw her with Mary Fairfax Greig ."
    (tmp_path / "lives.txt").write_text(f"{line}\nno title here\n")
    asked = Clozes(str(tmp_path / "lives.txt"), words=(2, 9))
    assert [tuple(piece.text for piece in pair) for pair in asked.questions()] == [
        (" Ada K. Byron: born in", "London"),
        (" Ada K. Byron: Ada Byron was born in", "London"),
        (" Ada K. Byron: her with", "Mary Fairfax Greig"),
        (" Ada K. Byron: London, on 3 May 1815. Paris saw her with", "Mary Fairfax Greig"),
    ]
    assert all(piece.record == ("line", 1) for pair in asked.questions() for piece in pair)
    assert list(asked.asked(False)) == [line, "no title here"]
    with pytest.raises(InputError, match=r"words=\(0,\) must be numbers of at least 1"):
        checked(Clozes("x.txt", words=(0,)))
