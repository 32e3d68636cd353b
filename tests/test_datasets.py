"""Prepared tokens: the ids of the text, kept, verified, and gone on with after a kill."""

import dataclasses
import errno
import hashlib
import importlib
import io
import linecache
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import test_tokenizers

import jaxformer
from jaxformer import Config, Data, Train
from jaxformer.data import datasets, files
from jaxformer.data.corpora import (
    PIECE,
    Corpus,
    JSONLines,
    Mixture,
    Parquet,
    Piece,
    TextFiles,
    TextLines,
    TinyShakespeare,
    TokenFile,
)
from jaxformer.data.datasets import encode, fitted, prepare
from jaxformer.data.dialogues import PythonQuestions
from jaxformer.data.sources import Source, check_ids
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import BPE, Bytes, Characters, NoTokenizer, TokenizerFile
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.baselines import Bigram
from jaxformer.run.manifest import sha256
from jaxformer.spec import InputError

TEXT = "naïve café — 数学 🦜\nzwölf Boxkämpfer\n" * 7


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def corpus(tmp_path, text=TEXT, name="text.txt"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return TextFiles(str(tmp_path / name))


class Restless(TextFiles):
    """Another text once it has been read."""

    def pieces(self):
        yield from super().pieces()
        corpus(Path(self.path).parent, TEXT + "more")


class Documents(Corpus):
    some: tuple[str, ...]

    def documents(self):
        yield from self.some


class Judged(Corpus):
    """One text or two of each example, and its class; by default a document without an id is none."""

    some: tuple[str, ...]
    classes: tuple[str, ...]
    each: int = 1

    @property
    def texts(self):
        return self.each

    def documents(self):
        yield from self.some

    def label_values(self):
        return {"class": list(self.classes)} if self.classes else {}


class Aligned(Judged):
    aligned = True


def whole(prepared):
    """All ids, of training and validation."""
    return np.concatenate([s.tokens for pair in zip(prepared.train, prepared.valid, strict=True) for s in pair])


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters(), BPE(300)])
def test_prepared_tokens_are_the_text(tmp_path, cache, tokenizer):
    prepared = prepare(corpus(tmp_path), tokenizer)
    assert prepared.tokenizer.decode(whole(prepared)) == TEXT
    (source,) = prepared.train
    assert isinstance(source.tokens, np.memmap) and not source.tokens.flags.writeable
    assert source.tokens.dtype == (np.uint16 if isinstance(tokenizer, BPE) else np.uint8)


def test_documents_have_boundaries(cache):
    texts = ("one", "", "three" * PIECE, "4")
    prepared = prepare(Documents(texts), Bytes(end_token=True), Documents(("x",)))
    (source,) = prepared.train
    documents = [tokens.tolist() for tokens in np.split(source.tokens, source.starts[1:])]
    assert documents == [[256, *b"one"], [256, *b"three" * PIECE], [256, *b"4", 256]] and source.shared == 1
    assert source.padding == 256 and prepared.manifest["documents"] == 3
    same = encode(Documents(texts), Bytes(end_token=True))
    assert np.array_equal(same.tokens, source.tokens) and np.array_equal(same.starts, source.starts)


@pytest.mark.parametrize("fraction", [0.1, 0.34, 0.5, 0.99])
def test_the_split_cuts_tokens_and_documents(fraction):
    source = Source(np.arange(100), np.array([0, 10, 50, 66, 90]), 7)
    train, valid = source.split(fraction)
    at = int((1 - fraction) * 100)
    assert np.array_equal(train.tokens, np.arange(at)) and np.array_equal(valid.tokens, np.arange(at, 100))
    boundaries = {*train.starts.tolist(), *(valid.starts + at).tolist()}
    assert boundaries == {0, 10, 50, 66, 90, at} and valid.starts[0] == 0 and train.padding == valid.padding == 7


def test_one_document_is_cut_whatever_its_share():
    train, valid = Source(np.arange(100), np.array([0])).split(0.6, seed=0)
    assert np.array_equal(train.tokens, np.arange(40)) and np.array_equal(valid.tokens, np.arange(40, 100))


class Framed(Bytes):
    """The start is 1, the end 2."""

    start, end = 1, 2


def test_starts_and_ends_of_their_own(cache):
    same = encode(Documents(("a", "", "bc")), Framed())
    assert same.tokens.tolist() == [1, 97, 2, 1, 98, 99, 2] and same.starts.tolist() == [0, 3] and same.shared == 0


def test_a_validation_corpus_of_its_own(tmp_path, cache):
    prepared = prepare(corpus(tmp_path), Characters(), corpus(tmp_path, TEXT[:30], "valid.txt"))
    assert prepared.tokenizer.decode(prepared.train[0].tokens) == TEXT
    assert prepared.tokenizer.decode(prepared.valid[0].tokens) == TEXT[:30]
    with pytest.raises(InputError, match=r"data.valid=.*: character '!' \(U\+0021, .*valid.txt, line 1\) is not known"):
        prepare(corpus(tmp_path), Characters(), corpus(tmp_path, "!", "valid.txt"))


KNOWN = Characters("\n abcdefghijklmnopqrstuvwxyz")


def test_unknown_characters_of_a_corpus_are_named_all_at_once(tmp_path, cache):
    """Wherever they stand: in any file and piece of it, each with the place where it is first."""
    folder = tmp_path / "folder"
    folder.mkdir()
    corpus(folder, "word\n" * PIECE + "!\n" * PIECE + "?", "a")
    corpus(folder, "one\n!\n", "b")
    corpus(folder, "one\ntwo #\n?", "c")
    a, c = folder / "a", folder / "c"
    first = f"'!' (U+0021, {a}, line {PIECE + 1}), '?' (U+003F, {a}, line {2 * PIECE + 1})"
    for found in (prepare, encode):
        with pytest.raises(InputError) as error:
            found(TextFiles(str(folder)), KNOWN)
        assert f"characters {first}, '#' (U+0023, {c}, line 2) are not known" in str(error.value)
    assert list((cache / "tokens").iterdir()) == []


def test_unknown_characters_of_records_are_named_with_their_line(tmp_path, cache):
    """The line of the file, whatever breaks there are in a text of one."""
    for name, text in {
        "a.txt": "one\n\ntwo !\n",
        "a.jsonl": '\n{"text": "one"}\n{"text": "two\\n!"}\n',
        "a.csv": 'text\n"one\ntwo"\n"three\n!"\n',
    }.items():
        corpus(tmp_path, text, name)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 300 + ["two\n!"]}), tmp_path / "a.parquet")
    mixture = Mixture((Documents(("one",)), Documents(("one", "a\nb\n!"))), (1.0, 1.0))
    for found, place in (
        (TextLines(str(tmp_path / "a.txt")), f"{tmp_path}/a.txt, line 3"),
        (JSONLines(str(tmp_path / "a.jsonl")), f"{tmp_path}/a.jsonl, line 3"),
        (Table(str(tmp_path / "a.csv")), f"{tmp_path}/a.csv, line 4"),
        (Parquet(str(tmp_path / "a.parquet")), f"{tmp_path}/a.parquet, row 301, line 2"),
        (mixture, "document 2, line 3"),
    ):
        with pytest.raises(InputError) as error:
            prepare(found, KNOWN)
        assert f"character '!' (U+0021, {place}) is not known" in str(error.value)


def test_the_parts_of_a_mixture_share_a_tokenizer(tmp_path, cache):
    mixture = Mixture((corpus(tmp_path, "abab" * 9, "1"), corpus(tmp_path, "bcbc" * 5, "2")), (1.0, 3.0))
    prepared = prepare(mixture, Characters(), valid_fraction=0.25)
    assert prepared.tokenizer == Characters("abc") and prepared.weights == (0.25, 0.75)
    assert [len(source.tokens) for source in prepared.train] == [27, 15]
    assert prepared.tokenizer.decode(prepared.valid[1].tokens) == "bcbcb"[1:] + "c"


def test_ids_that_lie_ready_are_taken_as_they_are(tmp_path, cache):
    ids = np.array([5, 6, 256, 7, 256, 256, 8], np.uint16)
    (tmp_path / "train.bin").write_bytes(ids.tobytes())
    train = TokenFile(str(tmp_path / "train.bin"))
    (source,) = prepare(train, Bytes(end_token=True), train).train
    assert np.array_equal(source.tokens, ids) and source.starts.tolist() == [0, 2, 4, 5]
    same = encode(train, Bytes(end_token=True))
    assert np.array_equal(same.tokens, ids) and same.starts.tolist() == [0, 2, 4, 5] and same.shared == 1
    with pytest.raises(InputError, match="token id 256 must be at least 0 and less than vocab_size=256"):
        encode(train, Bytes())
    with pytest.raises(InputError, match=r"train.bin.*token id 256 must be at least 0 and less than vocab_size=256"):
        prepare(TokenFile(str(tmp_path / "train.bin")), Bytes())
    assert encode(Documents(("x",)), Bytes()).starts.tolist() == [0]


def test_ids_of_another_dtype_are_refused(tmp_path, cache):
    """Read as uint16, an id of 128,000 would be two of the vocabulary."""
    ids = np.array([128_000, 7, 65_536], np.uint32)
    ids.tofile(tmp_path / "train.bin")
    wrong, tokenizer = TokenFile(str(tmp_path / "train.bin")), NoTokenizer(128_256)
    assert wrong.ids().max() < tokenizer.vocab_size
    for read in (encode, prepare):
        with pytest.raises(InputError, match=r"ids up to 128255 do not fit into uint16; .* data.corpus.dtype=uint32"):
            read(wrong, tokenizer)
        read(wrong, NoTokenizer(65_536))  # which are all that fit
    right = dataclasses.replace(wrong, dtype="uint32")
    assert encode(right, tokenizer).tokens.tolist() == whole(prepare(right, tokenizer)).tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("corpus", "wrong"),
    [
        (
            Judged(("good", "", "bad"), ("1", "0", "1")),
            r"2 documents with ids .* as labels, {'class': 3}; with aligned",
        ),
        (Aligned(("good", "bad"), ("1", "0", "1")), "2 documents with ids must be 1 for"),
        (Aligned(("a", "b", "c"), (), 2), "3 documents with ids must be 2 for"),
        (Judged(("a", "", "b", "c", "", "d"), (), 2), "document 2, line 1: a text of an example has no id"),
        (Aligned(("good", "", "bad"), ("1", "0", "1")), None),
        (Aligned(("a", "", "b", "c", "", "d"), ("0", "1", "1"), 2), None),
        (Judged(("good", "bad"), ("1", "0")), None),
    ],
)
def test_no_text_or_label_moves_to_another_example(cache, corpus, wrong):
    for read in (
        lambda: encode(corpus, Bytes(), datasets.classes_of(corpus)),
        lambda: prepare(corpus, Bytes(), corpus, examples=True).train[0],
    ):
        if wrong:
            with pytest.raises(InputError, match=wrong):
                read()
            continue
        source = read()
        texts = [Bytes().decode(text) for i in range(source.n_examples) for text in source.example(i)]
        assert texts == list(corpus.some) and all(len(v) == source.n_examples for v in source.labels.values())


# --- the cache


def test_ids_without_a_tokenizer_train_and_sample_as_numbers(tmp_path, caplog):
    """As nanoGPT's train.bin and val.bin: id i + 1 follows id i, and 28 ends."""
    for name, count in (("train", 40), ("val", 5)):
        np.tile(np.arange(29, dtype=np.uint16), count).tofile(tmp_path / f"{name}.bin")
    train, valid = (TokenFile(str(tmp_path / f"{name}.bin")) for name in ("train", "val"))
    data = Data(train, valid, tokenizer=NoTokenizer(29, end_id=28), batch_size=5)
    train = Train(steps=40, steps_per_call=10, eval_every=20, save_every=20, sample_tokens=3)
    model, optimizer = Bigram(context_length=7), AdamW(Constant(1.0), weight_decay=0.0)
    config = Config(str(tmp_path / "run"), model, data, optimizer=optimizer, train=train)
    caplog.set_level(logging.INFO)
    jaxformer.train(config, {"train.steps": 20})
    resumed = jaxformer.train(config)  # which was stopped, and goes on
    whole = jaxformer.train(config, directory=tmp_path / "whole")
    assert sha256(resumed.state) == sha256(whole.state)
    run = jaxformer.open_run(tmp_path / "run")
    found = run.evaluate()
    assert found["loss"] < 0.1 and found["tokens"] == 5 * 29 - 1 and found["bits_per_byte"] is None
    assert run.evaluate(str(tmp_path / "val.bin"))["loss"] == found["loss"]
    assert run.sample("25 26", temperature=0.0) == "25 26 27" and run.sample(tokens=3, temperature=0.0) == "0 1 2"
    assert "0 1 2" in caplog.messages  # shown at the evaluations
    with pytest.raises(InputError, match=r"prompt: 'The' is not an id: .* train with data\.tokenizer=TokenizerFile"):
        run.sample("The ")
    with pytest.raises(InputError, match=r"holds ids, no text to learn from; give the data\.tokenizer of its ids, or"):
        jaxformer.train(config, {"data.tokenizer": Characters()}, tmp_path / "other")


def test_prepared_tokens_are_reused_until_the_text_changes(tmp_path, cache, monkeypatch):
    first = prepare(corpus(tmp_path), BPE(300))
    written = []
    write = datasets._write
    monkeypatch.setattr(datasets, "_write", lambda *a: (written.append(a), write(*a))[1])
    fits = []
    monkeypatch.setattr(BPE, "fit", lambda self, texts, fit=BPE.fit: (fits.append(self), fit(self, texts))[1])
    assert prepare(corpus(tmp_path), BPE(300)).manifest == first.manifest and not written and not fits
    prepare(corpus(tmp_path, TEXT + "more"), BPE(300))
    assert len(written) == len(fits) == 1
    prepare(corpus(tmp_path), Bytes())
    assert len(written) == 2


def test_a_table_that_is_named_otherwise_is_read_otherwise(tmp_path, cache):
    """TSV does not quote: the same bytes are another text."""
    (tmp_path / "q.csv").write_text('text\n"a"\n')
    before = list(whole(prepare(Table(str(tmp_path / "q.csv")), Bytes())))
    os.rename(tmp_path / "q.csv", tmp_path / "q.tsv")
    after = list(whole(prepare(Table(str(tmp_path / "q.tsv")), Bytes())))
    assert ord('"') not in before and ord('"') in after


@pytest.mark.parametrize("name", ["tokens.bin", "documents.bin", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_tokens_are_prepared_anew(tmp_path, cache, name, damage, caplog):
    before = np.array(whole(prepare(corpus(tmp_path), Characters())))
    pattern = "tokenizers/*.json" if name == "tokenizer.json" else f"tokens/*/{name}"
    (path,) = cache.glob(pattern)
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    elif damage == "flip" and name == "tokenizer.json":
        path.write_bytes(data.replace(b"\\u6570", b"\\u6571"))  # still a tokenizer, but another
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    again = prepare(corpus(tmp_path), Characters())
    assert np.array_equal(whole(again), before)
    assert path.read_bytes() == data and ("is damaged" in caplog.text or name == "tokenizer.json")


def test_a_failed_preparation_leaves_nothing(tmp_path, cache):
    with pytest.raises(InputError, match=r"data.corpus=TextFiles\(path='.*text.txt'\): character 'c'"):
        prepare(corpus(tmp_path, "abc"), Characters("ab"))
    assert list((cache / "tokens").iterdir()) == []
    for tokenizer in (Characters(), BPE(300)):
        with pytest.raises(InputError, match="the corpus is empty"):
            prepare(corpus(tmp_path, ""), tokenizer)
    assert len(whole(prepare(corpus(tmp_path, ""), Bytes()))) == 0


def test_a_tokenizer_that_is_not_piecewise_is_given_whole_documents(tmp_path, cache):
    test_tokenizers.metaspace().save(str(tmp_path / "tokenizer.json"))
    texts = ("hi hi\n" * PIECE, "hi")
    same = encode(Documents(texts), TokenizerFile(str(tmp_path / "tokenizer.json")).fit(()))
    documents = [tokens.tolist() for tokens in np.split(same.tokens, same.starts[1:])]
    tokenizer = TokenizerFile(str(tmp_path / "tokenizer.json")).fit(())
    assert documents == [[0, *tokenizer.encode(text), 1] for text in texts]
    prepared = prepare(Documents(texts), tokenizer, Documents(("x",)))
    assert np.array_equal(prepared.train[0].tokens, same.tokens)


@pytest.mark.parametrize("progress", ["", "{", "5", '{"pieces": 3}', None])
def test_progress_that_the_files_do_not_hold_is_no_progress(tmp_path, cache, progress):
    """Junk, or more than there is: the preparation starts anew."""
    first = prepare(corpus(tmp_path), Bytes())
    ids, (directory,) = np.array(whole(first)), (cache / "tokens").iterdir()
    part = directory.with_suffix(".part")
    shutil.rmtree(directory)
    part.mkdir()
    (part / "tokens.bin").write_bytes(b"abc")
    (part / "documents.bin").write_bytes(bytes(8))
    done = '{"pieces": 1, "tokens": 4, "documents": 1, "inside": true, "itemsize": 1}'
    (part / "progress.json").write_text(done if progress is None else progress)
    assert np.array_equal(whole(prepare(corpus(tmp_path), Bytes())), ids)


def test_ids_are_made_anew_when_code_of_the_users_changes(tmp_path, cache, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from jaxformer.data.corpora import Corpus\n\n\nclass Mine(Corpus):\n    def fingerprint(self):\n"
    code += "        return 'x'\n\n    def documents(self):\n        yield 'TEXT'\n"
    found = []
    for text in ("one", "other", "one"):
        (tmp_path / "my_corpus.py").write_text(code.replace("TEXT", text))
        linecache.clearcache()
        module = importlib.reload(importlib.import_module("my_corpus"))
        found.append(Bytes().decode(whole(prepare(module.Mine(), Bytes()))))
    assert found == ["one", "other", "one"] and len(list((cache / "tokens").iterdir())) == 2


@pytest.mark.parametrize("where", ["a part of a mixture", "the base of a class", "what the base of a class imports"])
def test_a_tokenizer_is_learned_anew_when_code_changes(tmp_path, cache, monkeypatch, where):
    """Which is neither that of the corpus's own class: the fingerprint is of the file alone."""
    corpus(tmp_path, "abc")
    monkeypatch.syspath_prepend(tmp_path)
    code = (
        "from jaxformer.data.corpora import Piece, TextFiles\n\n\nclass Base(TextFiles):\n    def read(self, path):\n"
    )
    (tmp_path / "my_own.py").write_text("from my_base import Base\n\n\nclass Mine(Base):\n    pass\n")
    found = []
    for text in ("xy", "z"):
        (tmp_path / "my_text.py").write_text(f"def text():\n    return {text!r}\n")
        own = f"        yield Piece({text!r}, True, ('line', 1))\n"
        if "imports" in where:
            own = "        yield Piece(text(), True, ('line', 1))\n"
            importlib.reload(importlib.import_module("my_text"))
        (tmp_path / "my_base.py").write_text("from my_text import text\n" + code + own)
        linecache.clearcache()
        base, own = (importlib.reload(importlib.import_module(name)) for name in ("my_base", "my_own"))
        path = str(tmp_path / "text.txt")
        mine = own.Mine(path) if "base" in where else Mixture((base.Base(path), Documents(("a",))), (1.0, 1.0))
        found.append(fitted(Characters(), mine).alphabet)
    assert found == (["xy", "z"] if "base" in where else ["axy", "az"])


def test_what_an_answer_is_belongs_to_the_marks(cache):
    """The text is the same, the template of another mind about who speaks."""
    turns = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    begun = turns + "{% if add_generation_prompt %}assistant: {% endif %}"
    marks = [prepare(PythonQuestions(template=each), Bytes()).train[0].answers.sum() for each in (turns, begun)]
    assert marks[0] > marks[1] > 0


class Marked(Corpus):
    """Questions, each with its answer behind it, without the ids between documents."""

    marked = True

    def documents(self):
        yield from ("why" + "so",) * 2

    def pieces(self):
        for _ in self.documents():
            yield from (Piece("why", False, answer=False), Piece("so", True))


def test_an_end_has_the_mark_of_its_own_document(cache):
    source = encode(Marked(), Framed())
    assert source.tokens.tolist() == [1, *b"whyso", 2] * 2 and source.answers.tolist() == [0, 0, 0, 0, 1, 1, 1] * 2
    for read in (encode, prepare):
        with pytest.raises(InputError, match="answers are marked, and Bytes ends a document with the id that begins"):
            read(Marked(), Bytes(end_token=True))


def test_a_tokenizer_of_text_that_changed_is_not_kept(tmp_path, cache):
    corpus(tmp_path)
    with pytest.raises(InputError, match="changed while it was read"):
        fitted(Characters(), Restless(str(tmp_path / "text.txt")))
    assert not (cache / "tokenizers").exists()


def test_a_disk_that_fails_for_a_while_damages_nothing(tmp_path, cache, monkeypatch):
    prepare(corpus(tmp_path), Bytes())
    (directory,) = (cache / "tokens").iterdir()
    before = {path: path.read_bytes() for path in directory.iterdir()}

    def fails(*args):
        if str(getattr(args[0], "name", args[0])).endswith("tokens.bin"):
            raise OSError(errno.EIO, "Input/output error", "tokens.bin")
        return digest(*args)

    digest = hashlib.file_digest
    for owner, name, kind in ((hashlib, "file_digest", InputError), (np, "memmap", OSError)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fails)
            with pytest.raises(kind, match="Input/output error"):
                prepare(corpus(tmp_path), Bytes())
    assert before == {path: path.read_bytes() for path in directory.iterdir()}


def test_a_disk_that_fails_for_a_while_costs_no_work(tmp_path, cache, monkeypatch, caplog):
    """What was encoded is kept, and the rest is read once the disk is well."""

    class Failing(io.FileIO):
        def read(self, size=-1):
            raise OSError(errno.EIO, "Input/output error")

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(datasets, "SAVE_EVERY", 1000)
    (tmp_path / "folder").mkdir()
    texts = ["".join(f"{name} {i}\n" for i in range(2000)) for name in "ab"]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / "folder" / f"{name}.txt").write_text(text)
    lines = TextLines(str(tmp_path / "folder"), suffixes=(".txt",))
    with monkeypatch.context() as patch:
        failing = lambda path, *a, **k: (Failing if path.name == "b.txt" else open)(path, *a, **k)
        patch.setattr(files, "open", failing, raising=False)
        with pytest.raises(InputError, match=r"b\.txt cannot be read: Input/output error"):
            prepare(lines, Bytes())
    assert Bytes().decode(whole(prepare(lines, Bytes()))) == "".join(texts).replace("\n", "")
    assert "resuming the preparation of the corpus" in caplog.text


def test_what_is_killed_at_its_very_end_goes_on(tmp_path, cache, monkeypatch, caplog):
    def killed(path):
        raise KeyboardInterrupt

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(datasets, "SAVE_EVERY", 1)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "file_sha256", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(corpus(tmp_path), Bytes())
    assert Bytes().decode(whole(prepare(corpus(tmp_path), Bytes()))) == TEXT
    assert "resuming the preparation of the corpus" in caplog.text
    (directory,) = (cache / "tokens").iterdir()
    assert not (directory / "progress.json").exists()


def test_a_corpus_that_changes_while_it_is_read_is_refused(tmp_path, cache):
    corpus(tmp_path)
    with pytest.raises(InputError, match="changed while it was read"):
        prepare(Restless(str(tmp_path / "text.txt")), Bytes())
    assert list((cache / "tokens").iterdir()) == []


KILLED = """
import sys, time
from jaxformer.data import datasets
from jaxformer.data.corpora import TextFiles
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import BPE
datasets.SAVE_EVERY = 40_000
encode = datasets._encoded
def slowly(pieces, tokenizer):
    for found in encode(pieces, tokenizer):
        time.sleep(float(sys.argv[2]))
        yield found
datasets._encoded = slowly
datasets.prepare(TextFiles(sys.argv[1]), BPE(300))
"""


def test_a_killed_preparation_goes_on_where_it_stopped(tmp_path, cache):
    """Killed three times, in the midst of long documents and between short ones: the same files at the end."""
    rng = np.random.default_rng(0)
    for i in range(6):
        words = rng.integers(0, 1000, 30_000 if i % 2 else 3)
        (tmp_path / "folder").mkdir(exist_ok=True)
        (tmp_path / "folder" / f"{i}.txt").write_text("".join(f"{n} ünits\n" for n in words), encoding="utf-8")
    run = [sys.executable, "-c", KILLED, str(tmp_path / "folder")]
    seen = []
    for _ in range(3):
        process = subprocess.Popen([*run, "0.02"], stderr=subprocess.PIPE, text=True)
        while True:
            progress = [path.read_text() for path in (cache / "tokens").glob("*.part/progress.json")]
            if progress and progress[0] not in seen:
                break
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        seen += [path.read_text() for path in (cache / "tokens").glob("*.part/progress.json")]
    assert len(set(seen)) == 3
    done = subprocess.run([*run, "0"], capture_output=True, text=True, check=True)
    (resumed,) = (cache / "tokens").iterdir()
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in resumed.iterdir()}
    assert files.keys() == {"tokens.bin", "documents.bin", "manifest.json"} and "Traceback" not in done.stderr
    shutil.rmtree(cache)
    subprocess.run([*run, "0"], capture_output=True, check=True)
    (fresh,) = (cache / "tokens").iterdir()
    assert fresh.name == resumed.name
    assert files == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in fresh.iterdir()}


def test_two_processes_prepare_a_corpus_once(tmp_path, cache):
    corpus(tmp_path, TEXT * 2000)
    run = [sys.executable, "-c", "import logging; logging.basicConfig(level=20)\n" + KILLED, str(tmp_path / "text.txt")]
    processes = [subprocess.Popen([*run, "0.03"], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("waiting for it" in error for error in errors) == 1
    (directory,) = (cache / "tokens").iterdir()
    assert os.path.getsize(directory / "documents.bin") == 8


# --- ids


@pytest.mark.parametrize("ids", [[0, 29], [-1, 3]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(InputError, match="must be at least 0 and less than vocab_size=29"):
        check_ids(np.array(ids), 29)
    check_ids(np.array([0, 28]), 29)


def test_tiny_shakespeare_is_the_published_one(data_directory, cache):
    prepared = prepare(TinyShakespeare(), Characters())
    (train,), (valid,) = prepared.train, prepared.valid
    assert prepared.tokenizer.vocab_size == 65 and train.tokens.dtype == np.uint8
    assert (len(train.tokens), len(valid.tokens)) == (1_003_854, 111_540)
