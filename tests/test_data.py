"""Corpora, tokenizers, prepared tokens and the batches drawn from them."""

import dataclasses
import hashlib
import http.client
import io
import json
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jaxformer.data import corpora, datasets
from jaxformer.data.corpora import PythonTopics, TextFiles, TinyShakespeare
from jaxformer.data.datasets import RandomWindows, full_pass, prepare
from jaxformer.data.tokenizers import Bytes, Characters
from jaxformer.spec import InputError

TEXT = "naïve café — 数学 🦜\nzwölf Boxkämpfer\n" * 7


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def corpus(tmp_path, text=TEXT, name="text.txt"):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return TextFiles(str(path))


# --- tokenizers


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters()])
def test_text_survives_a_round_trip(tokenizer):
    tokenizer = tokenizer.fit([TEXT])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.max() < tokenizer.vocab_size and tokenizer.decode([]) == "" and len(tokenizer.encode("")) == 0
    assert tokenizer.byte_lengths()[ids].sum() == len(TEXT.encode())
    assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size
    assert tokenizer.decode([tokenizer.start]) == "\n"


def test_characters_are_numbered_by_code_point():
    tokenizer = Characters().fit(["ba", "c"])
    assert tokenizer == Characters("abc") and tokenizer.encode("cab").tolist() == [2, 0, 1] and tokenizer.start == 0
    assert Characters("xyz").fit(["abc"]) == Characters("xyz")


@pytest.mark.parametrize("wrong", ["é", "\x00", "\udcff", "🦜"])
def test_an_unknown_character_is_named(wrong):
    with pytest.raises(InputError, match=rf"U\+{ord(wrong):04X}\) at place 3 of the text is not among the 3"):
        Characters("abc").encode("ab" + wrong)


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character():
    assert Bytes().decode([104, 255, 105]) == "h\ufffdi"


# --- corpora


def test_a_folder_is_its_visible_files_in_order(tmp_path):
    for name, text in {"b.txt": "B", "a/z.md": "Z", "a/y.md": "Y", ".hidden": "-", ".git/x": "-"}.items():
        corpus(tmp_path / "folder", text, name)
    assert list(TextFiles(str(tmp_path / "folder")).documents()) == ["Y", "Z", "B"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert list(corpus(tmp_path, b"\xef\xbb\xbfhi").documents()) == ["hi"]


def test_text_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"bad.txt is not UTF-8 \(byte 2 is 0xff\)"):
        list(corpus(tmp_path, b"hi\xff", "bad.txt").documents())
    with pytest.raises(InputError, match="does not exist"):
        list(TextFiles(str(tmp_path / "nowhere")).documents())


def test_fingerprints_tell_boundaries_apart(tmp_path):
    a, b = corpus(tmp_path / "a", "x", "1"), corpus(tmp_path / "b", "xy", "1")
    corpus(tmp_path / "a", "yz", "2"), corpus(tmp_path / "b", "z", "2")
    folders = [TextFiles(str(tmp_path / n)).fingerprint() for n in "ab"]
    assert len({*folders, a.fingerprint(), b.fingerprint()}) == 4


def test_the_built_in_corpus_is_text():
    (text,) = PythonTopics().documents()
    assert len(text) > 400_000 and "def " in text


def test_tiny_shakespeare_is_the_published_one(data_directory, cache):
    prepared = prepare(TinyShakespeare(), Characters())
    train, valid = prepared.split(0.1)
    assert (len(prepared.tokens), prepared.tokenizer.vocab_size) == (1_115_394, 65)
    assert (len(train), len(valid)) == (1_003_854, 111_540) and prepared.tokens.dtype == np.uint8


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


def test_a_wrong_file_in_the_cache_is_named(monkeypatch, cache):
    cache.mkdir()
    (cache / "a.txt").write_bytes(b"old")
    with pytest.raises(InputError, match="remove it, or put the right file there"):
        fetch(monkeypatch, b"right")


# --- prepared tokens


@pytest.mark.parametrize("tokenizer", [Bytes(), Characters()])
def test_prepared_tokens_are_the_text(tmp_path, cache, tokenizer):
    prepared = prepare(corpus(tmp_path), tokenizer)
    assert prepared.tokenizer.decode(prepared.tokens) == TEXT
    assert isinstance(prepared.tokens, np.memmap) and not prepared.tokens.flags.writeable


def test_prepared_tokens_are_reused_until_the_text_changes(tmp_path, cache, monkeypatch):
    first = prepare(corpus(tmp_path), Characters())
    written = []
    write = datasets._write
    monkeypatch.setattr(datasets, "_write", lambda *a: (written.append(a), write(*a)))
    assert prepare(corpus(tmp_path), Characters()).manifest == first.manifest and not written
    prepare(corpus(tmp_path, TEXT + "more"), Characters())
    assert len(written) == 1
    prepare(corpus(tmp_path), Bytes())
    assert len(written) == 2


@pytest.mark.parametrize("name", ["tokens.bin", "manifest.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_tokens_are_prepared_anew(tmp_path, cache, name, damage, caplog):
    first = prepare(corpus(tmp_path), Characters())
    path = Path(first.tokens.filename).parent / name
    data = path.read_bytes()
    ids = np.array(first.tokens)
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(data[: len(data) // 2] if damage == "cut" else data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    again = prepare(corpus(tmp_path), Characters())
    assert np.array_equal(again.tokens, ids) and "is damaged" in caplog.text


def test_a_failed_preparation_leaves_nothing(tmp_path, cache):
    with pytest.raises(InputError):
        prepare(corpus(tmp_path, "abc"), Characters("ab"))
    assert list((cache / "tokens").iterdir()) == []
    with pytest.raises(InputError, match="is empty"):
        prepare(corpus(tmp_path, ""), Characters())
    assert len(prepare(corpus(tmp_path, ""), Bytes()).tokens) == 0


@pytest.mark.parametrize("ids", [[0, 29], [-1, 3]])
def test_ids_outside_the_vocabulary_are_refused(ids):
    with pytest.raises(InputError, match="must be at least 0 and less than vocab_size=29"):
        datasets.check_ids(np.array(ids), 29)
    datasets.check_ids(np.array([0, 28]), 29)


def test_a_manifest_says_what_the_file_holds(tmp_path, cache):
    prepared = prepare(corpus(tmp_path), Characters())
    manifest = json.loads((Path(prepared.tokens.filename).parent / "manifest.json").read_text())
    assert manifest["tokens"] == len(TEXT) and manifest["dtype"] == "uint8"
    assert manifest["sha256"]["tokens.bin"] == hashlib.sha256(np.asarray(prepared.tokens)).hexdigest()


# --- batches

TOKENS = np.arange(101, dtype=np.uint16)


def test_a_row_depends_on_seed_step_and_row_alone():
    draw = lambda seed, step, rows: RandomWindows().batch_at(TOKENS, 7, seed, step, np.array(rows))["tokens"]
    assert np.array_equal(draw(1, 2, [3, 5])[1], draw(1, 2, [5])[0])
    assert draw(1, 2, [3]).dtype == np.int32 and draw(1, 2, [3, 5]).shape == (2, 8)
    rows = {tuple(draw(seed, step, [row])[0]) for seed in range(3) for step in range(3) for row in range(3)}
    assert len(rows) > 20  # of 27; some fall together by chance
    assert (np.diff(draw(0, 0, range(50)), axis=1) == 1).all()


def test_windows_begin_anywhere_with_equal_chances():
    starts = np.concatenate(
        [RandomWindows().batch_at(TOKENS, 7, 0, s, np.arange(100))["tokens"][:, 0] for s in range(200)]
    )
    counts = np.bincount(starts, minlength=94)
    assert len(counts) == 94 and counts.min() > 0  # 101 − 7 beginnings, the first and the last among them
    assert ((counts - 20_000 / 94) ** 2 / (20_000 / 94)).sum() < 150  # χ² with 93 degrees: mean 93, deviation 14


def test_large_corpora_and_seeds():
    class Huge:
        def __len__(self):
            return 2**40

        def __getitem__(self, index):
            return index

    first = RandomWindows().batch_at(Huge(), 1, 2**32 - 1, 2**31, np.arange(7))  # type: ignore[arg-type]
    index = datasets._draws(2**32 - 1, 2**31, np.arange(1000)) % np.uint64(2**40)
    assert len(first["tokens"]) == 7 and index.max() > 2**39 and index.min() < 2**38


@pytest.mark.parametrize("n", [2, 7, 8, 9, 15, 57, 101])
def test_a_full_pass_predicts_each_token_once(n):
    tokens, seen = TOKENS[:n], []
    for batch in full_pass(tokens, 7, 3):
        assert batch["tokens"].shape == batch["segments"].shape == (3, 8)
        real = batch["segments"][:, 1:] > 0
        assert (batch["tokens"][:, 1:][real] == batch["tokens"][:, :-1][real] + 1).all()
        seen += batch["tokens"][:, 1:][real].tolist()
    assert seen == tokens[1:].tolist()


def test_the_split_is_by_fraction():
    prepared = datasets.Prepared(TOKENS, Bytes(), {})
    train, valid = prepared.split(0.1)
    assert (len(train), len(valid)) == (90, 11) and np.array_equal(np.concatenate([train, valid]), TOKENS)
    assert dataclasses.is_dataclass(prepared)
