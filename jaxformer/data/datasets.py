"""Prepared tokens in memory-mapped files, and the batches that are drawn from them."""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxformer.data.corpora import Corpus, cache_directory
from jaxformer.data.tokenizers import Bytes
from jaxformer.spec import InputError, Spec, dumps, from_json

log = logging.getLogger(__name__)

Tokens = NDArray[np.unsignedinteger]
Rows = NDArray[np.integer]
Batch = dict[str, NDArray[np.int32]]


# --- preparation


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A corpus as ids on disk."""

    tokens: Tokens
    tokenizer: Bytes
    manifest: dict[str, Any]  # fingerprints, counts, dtype, SHA-256

    def split(self, valid_fraction: float) -> tuple[Tokens, Tokens]:
        """Training tokens, and the last `valid_fraction` of the corpus for validation."""
        cut = int((1 - valid_fraction) * len(self.tokens))
        return self.tokens[:cut], self.tokens[cut:]


def prepare(corpus: Corpus, tokenizer: Bytes) -> Prepared:
    """The tokens of the corpus, from the cache if they are there and whole, else made and put there.

    Raises InputError for a corpus that is missing, empty or not to be read.
    """
    fingerprint = corpus.fingerprint()
    name = hashlib.sha256((fingerprint + dumps(tokenizer)).encode()).hexdigest()[:32]
    directory = cache_directory() / "tokens" / name
    if directory.is_dir():
        try:
            return _open(directory)
        except (OSError, ValueError, KeyError) as error:
            log.warning("%s is damaged (%s); preparing the corpus again", directory, error)
            shutil.rmtree(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".part-"))
    try:
        _write(corpus, tokenizer, fingerprint, part)
        os.rename(part, directory)
    except OSError:
        if not directory.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _open(directory)


def _write(corpus: Corpus, tokenizer: Bytes, fingerprint: str, directory: Path) -> None:
    tokenizer = tokenizer.fit(corpus.documents())
    if tokenizer.vocab_size is None:
        raise InputError(f"corpus {corpus} is empty; give one with text in it")
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    digest, count = hashlib.sha256(), 0
    with open(directory / "tokens.bin", "wb") as file:
        for document in corpus.documents():
            try:
                data = tokenizer.encode(document).astype(dtype).tobytes()
            except InputError as error:
                raise InputError(f"data.corpus={corpus}: {error}") from None
            digest.update(data)
            count += file.write(data) // dtype.itemsize
        file.flush()
        os.fsync(file.fileno())
    manifest = {
        "corpus_sha256": fingerprint,
        "tokens": count,
        "dtype": dtype.name,
        "sha256": {
            "tokenizer.json": hashlib.sha256(dumps(tokenizer).encode()).hexdigest(),
            "tokens.bin": digest.hexdigest(),
        },
    }
    (directory / "tokenizer.json").write_text(dumps(tokenizer), encoding="utf-8")
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _open(directory: Path) -> Prepared:
    manifest = json.loads((directory / "manifest.json").read_text())
    for name in ("tokenizer.json", "tokens.bin"):
        with open(directory / name, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != manifest["sha256"][name]:
                raise InputError(f"{name} is not what manifest.json says")
    path, tokenizer = directory / "tokens.bin", read_tokenizer(directory / "tokenizer.json")
    empty = path.stat().st_size == 0
    tokens: Tokens = np.empty(0, np.uint8) if empty else np.memmap(path, manifest["dtype"], "r")
    check_ids(tokens, tokenizer.vocab_size)
    return Prepared(tokens, tokenizer, manifest)


def read_tokenizer(path: Path) -> Bytes:
    """The tokenizer stored in a file. Raises InputError if it holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: no tokenizer can be read ({error}); restore the file") from None
    tokenizer = from_json(value, Bytes, str(path))
    if tokenizer.vocab_size is None:
        raise InputError(f"{path}: holds a tokenizer that was not fitted to a corpus; restore the file")
    return tokenizer


def check_ids(ids: NDArray[Any], vocab_size: int | None) -> None:
    """Raises InputError for an id that the model has no row for: JAX would take another row without a word."""
    if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.max() if ids.max() >= vocab_size else ids.min()
        raise InputError(f"token id {wrong} must be at least 0 and less than vocab_size={vocab_size}; encode anew")


# --- batches


class RandomWindows(Spec):
    """Windows that begin anywhere, each drawn for itself: a function of (seed, step, row) alone."""

    def batch_at(self, tokens: Tokens, length: int, seed: int, step: int, rows: Rows) -> Batch:
        """`tokens` int32[rows, length + 1]; row r of step s is the same whichever other rows are asked for."""
        first = _draws(seed, step, rows) % np.uint64(len(tokens) - length)
        return {"tokens": tokens[first.astype(np.int64)[:, None] + np.arange(length + 1)].astype(np.int32)}


def full_pass(tokens: Tokens, length: int, batch_size: int) -> Iterator[Batch]:
    """Batches of one shape in which every token but the very first is predicted exactly once, in order."""
    n_windows = -(-(len(tokens) - 1) // length)
    for first in range(0, n_windows, batch_size):
        start = np.arange(first, first + batch_size)[:, None] * length
        index = start + np.arange(length + 1)
        real = index < len(tokens)
        ids = np.where(real, tokens[np.minimum(index, len(tokens) - 1)], 0)
        yield {"tokens": ids.astype(np.int32), "segments": real.astype(np.int32)}


def _draws(seed: int, step: int, rows: Rows) -> NDArray[np.uint64]:
    """Uniform 64-bit numbers by a hash of (seed, step, row)."""
    h = np.zeros(1, np.uint64)
    for number in (np.array([seed]), np.array([step]), rows):
        h = _mix(h + number.astype(np.uint64))
    return h


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (doi:10.1145/2714064.2660195): one step of the generator from the state x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
