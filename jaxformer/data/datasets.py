"""Corpora as ids on disk: encoded by all cores, in bounded memory if the tokenizer takes pieces, and memory-mapped."""

import collections
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from jaxformer.data.corpora import Corpus, Piece, TextFiles
from jaxformer.data.files import cache_directory, file_sha256, of_machine, plain_name, write
from jaxformer.data.locks import locked
from jaxformer.data.sources import Source, check_ids
from jaxformer.data.tables import Fold, Table
from jaxformer.data.tokenizers import Ids, Tokenizer, Unknown, read_tokenizer
from jaxformer.spec import InputError, counted, dumps
from jaxformer.user_code import modules, source

log = logging.getLogger(__name__)

FORMAT = 4  # to be raised by a change that makes other ids of the same text
FILES = "tokens.bin", "documents.bin", "answers.bin"  # ids; where documents begin; whether each id is to be predicted
CHANGED = "changed while it was read; start again"
SAVE_EVERY = 1 << 26  # characters after which a killed preparation need not start anew


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a run trains on and is validated on."""

    train: tuple[Source, ...]
    weights: tuple[float, ...]  # each source's share of the rows
    valid: tuple[Source, ...]
    valid_weights: tuple[float, ...]
    valid_names: tuple[str, ...]
    tokenizer: Tokenizer  # fitted
    classes: Mapping[str, tuple[str, ...]]  # column of a table -> the names of its classes
    manifest: dict[str, Any]  # fingerprints and counts


def prepare(
    corpus: Corpus,
    tokenizer: Tokenizer,
    valid: Corpus | None = None,
    valid_fraction: float = 0.1,
    split_seed: int | None = None,
    examples: bool = False,
    classes: Mapping[str, tuple[str, ...]] | None = None,
) -> Prepared:
    """A corpus as ids, and what it is validated on: `valid` or, if None, a part of each corpus (`Source.split`).

    Ids are taken from the cache if they are there and whole, else made and put there. With `examples` the rows of
    tables are kept as such, with their labels; `classes` are those of columns that are known already. Raises
    InputError for a corpus that is missing, empty or not to be read.
    """
    prints = fingerprints(corpus, valid)
    tokenizer = fitted(tokenizer, corpus, prints["corpus_sha256"])
    known = (classes_of(corpus) | dict(classes or {})) if examples else None
    sources = _prepare_parts(corpus, prints["corpus_sha256"], tokenizer, "data.corpus", known)
    if valid is None:
        pairs = [source.split(valid_fraction, split_seed) for source in sources]
        trains, valids = tuple(train for train, _ in pairs), tuple(rest for _, rest in pairs)
    else:
        trains, valids = sources, _prepare_parts(valid, prints["valid_sha256"], tokenizer, "data.valid", known)
    manifest = prints | {
        "ids_sha256": [source.sha256 for source in (trains if valid is None else trains + valids)],
        "train_tokens": sum(source.n_tokens for source in trains),
        "valid_tokens": sum(source.n_tokens for source in valids),
        "documents": sum(len(source.starts) for source in sources),
        "classes": known or {},
    }
    judged = corpus if valid is None else valid
    weights, valid_weights = (tuple(weight for _, weight in each.parts()) for each in (corpus, judged))
    return Prepared(trains, weights, valids, valid_weights, judged.part_names(), tokenizer, known or {}, manifest)


def classes_of(corpus: Corpus) -> dict[str, tuple[str, ...]]:
    """The classes that the columns of a table hold, in their order as text."""
    found: dict[str, set[str]] = {}
    for part, _ in corpus.parts():
        for name, values in part.label_values().items():
            of_column = found.setdefault(name, set())
            for value in values:
                of_column.update((value,) if isinstance(value, str) else value)
    return {name: tuple(sorted(values)) for name, values in found.items()}


def _labels(corpus: Corpus, classes: Mapping[str, tuple[str, ...]], field: str) -> dict[str, NDArray[np.int32]]:
    """The number of each example's class, [examples], or for each class whether it has it, [examples, classes]."""
    found: dict[str, NDArray[np.int32]] = {}
    for name, values in corpus.label_values().items():
        if name not in classes:
            raise InputError(f"{field}={corpus}: has labels of {name!r}, but data.corpus has none; give both the same")
        index = {value: i for i, value in enumerate(classes[name])}
        several = any(isinstance(value, tuple) for value in values)
        labels = np.zeros((len(values), len(index)) if several else len(values), np.int32)
        for i, value in enumerate(values):
            each = (value,) if isinstance(value, str) else value
            if unknown := [v for v in each if v not in index]:
                raise InputError(
                    f"{field}={corpus}: example {i + 1} has {name}={unknown[0]!r}, which must be one of "
                    f"{', '.join(classes[name])}; fix the row, or give it to the data to train on"
                )
            if several:
                labels[i, [index[v] for v in each]] = 1
            else:
                labels[i] = index[each[0]]
        found[name] = labels
    return found


def fingerprints(corpus: Corpus, valid: Corpus | None) -> dict[str, Any]:
    return {"corpus_sha256": corpus.fingerprint(), "valid_sha256": None if valid is None else valid.fingerprint()}


def fitted(tokenizer: Tokenizer, corpus: Corpus, fingerprint: str | None = None) -> Tokenizer:
    """The tokenizer as `fit` makes it from the corpus, or as the cache kept it."""
    if not tokenizer.learns:
        return tokenizer.fit(())
    fingerprint = fingerprint or corpus.fingerprint()
    name = _name(corpus, fingerprint, tokenizer)
    path = cache_directory() / "tokenizers" / f"{name}.json"
    with _alone(name):
        with contextlib.suppress(OSError, ValueError):
            if file_sha256(path) == path.with_suffix(".sha256").read_text():
                return read_tokenizer(path)
        log.info("fitting %s to the corpus", type(tokenizer).__name__)
        found = tokenizer.fit(corpus)
        if corpus.fingerprint() != fingerprint:
            raise InputError(f"data.corpus={corpus}: {CHANGED}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, dumps(found))
        write(path.with_suffix(".sha256"), file_sha256(path))
    return found


def encode(corpus: Corpus, tokenizer: Tokenizer, classes: Mapping[str, tuple[str, ...]] | None = None) -> Source:
    """The ids of a corpus in memory; with classes, as examples."""
    if told := corpus.summary():
        log.info("%s", told)
    ready, answers = _ready(corpus, tokenizer), None
    if ready is None:
        tokens, starts, answers = _in_memory(corpus, tokenizer)
    else:
        tokens, starts = ready, np.concatenate([np.empty(0, np.int64), *_starts(ready, tokenizer)])
    source = Source(tokens, starts, tokenizer.padding, _shared(corpus, tokenizer), answers=answers)
    return _as_examples(source, corpus, tokenizer, classes, "corpus")


def _ready(corpus: Corpus, tokenizer: Tokenizer) -> NDArray[Any] | None:
    """The ids that a corpus holds already. Raises InputError if they cannot be the tokenizer's: another dtype reads two
    small ids where one large one stands."""
    ids, last = corpus.ids(), (tokenizer.vocab_size or 1) - 1
    if ids is not None and last > np.iinfo(ids.dtype).max:
        raise InputError(
            f"ids up to {last} do not fit into {ids.dtype}; give the dtype of the file, as data.corpus.dtype=uint32, "
            "or the data.tokenizer of its ids"
        )
    return ids


def _in_memory(corpus: Corpus, tokenizer: Tokenizer) -> tuple[Ids, NDArray[np.int64], NDArray[np.uint8] | None]:
    ids, marks, starts, count = [np.empty(0, np.uint32)], [np.empty(0, np.uint8)], list[int](), 0
    for found, answer, begins, _ in _framed(corpus.pieces_for(tokenizer), corpus, tokenizer, False):
        if begins:
            starts.append(count)
        ids.append(found)
        marks.append(np.full(len(found), answer, np.uint8))
        count += len(found)
    ids.append(_last(corpus, tokenizer, len(starts)))
    return np.concatenate(ids), np.array(starts, np.int64), np.concatenate(marks) if corpus.marked else None


def ids_of(piece: Piece, tokenizer: Tokenizer) -> Ids:
    """Those of its text, or that of the special token which it names."""
    if piece.whole:
        return tokenizer.encode_within(piece.whole, piece.at, piece.at + len(piece.text), piece.special)
    return tokenizer.encode(piece.text)


def check_known(pieces: Iterable[Piece], tokenizer: Tokenizer) -> None:
    """Raises Unknown for characters that the tokenizer does not know, with the place of each."""
    places: dict[str, str] = {}
    for piece in pieces:
        for character, at in ({} if piece.special else tokenizer.unknown(piece.text)).items():
            if character not in places:
                places[character] = piece.place(at)
    if places:
        raise Unknown(places)


# --- on disk


def _prepare_parts(
    corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, field: str, classes: Mapping[str, tuple[str, ...]] | None
) -> tuple[Source, ...]:
    found = []
    for part, _ in corpus.parts():
        own = fingerprint if part is corpus else part.fingerprint()
        found.append(_as_examples(_prepare(part, own, tokenizer, field), part, tokenizer, classes, field))
    return tuple(found)


def _as_examples(
    source: Source, corpus: Corpus, tokenizer: Tokenizer, classes: Mapping[str, tuple[str, ...]] | None, field: str
) -> Source:
    """The source with labels of these classes; None: its documents are text and no more."""
    if classes is None:
        return source
    labels, n = _labels(corpus, classes, field), len(source.starts)
    rows = {name: len(values) for name, values in labels.items()}
    if n % corpus.texts or {*rows.values()} - {n // corpus.texts}:
        raise InputError(
            f"{field}={corpus}: {counted(n, 'document')} with ids must be {corpus.texts} for each example, and as "
            f"many examples as labels, {rows or 'none'}; with aligned = True in the class, those without an id count"
        )
    more = {"texts": corpus.texts, "prefix": len(tokenizer.prefix), "examples": True}
    return dataclasses.replace(source, **more, labels=labels)


def _prepare(corpus: Corpus, fingerprint: str, tokenizer: Tokenizer, field: str) -> Source:
    """The ids of one corpus, memory-mapped. What a killed process left unfinished is gone on with."""
    name = _name(corpus, fingerprint, tokenizer)
    directory = cache_directory() / "tokens" / name
    part = directory.with_suffix(".part")
    with _alone(name):
        if directory.exists():
            try:
                return _open(directory, corpus, fingerprint, tokenizer)
            except (OSError, ValueError, KeyError, TypeError) as error:
                if of_machine(error):
                    raise
                log.warning("%s is damaged (%s); preparing the corpus again", directory, error)
                shutil.rmtree(directory) if directory.is_dir() else directory.unlink()
        part.mkdir(parents=True, exist_ok=True)
        try:
            ids = _ready(corpus, tokenizer)
            dtype = _write(corpus, tokenizer, part) if ids is None else _scan(ids, tokenizer, part)
            if corpus.fingerprint() != fingerprint:
                raise InputError(CHANGED)
        except InputError as error:
            if not of_machine(error):
                shutil.rmtree(part)
            raise InputError(f"{field}={corpus}: {error}") from None
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(error.filename or part)) from error
        files = [part / name for name in FILES if (part / name).exists()]
        manifest = {"dtype": dtype.name, "sha256": {path.name: file_sha256(path) for path in files}}
        write(part / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        (part / "progress.json").unlink(missing_ok=True)
        os.rename(part, directory)
        return _open(directory, corpus, fingerprint, tokenizer)


def _name(corpus: Corpus, fingerprint: str, tokenizer: Tokenizer) -> str:
    """What decides about ids: the text, how a table is read, the tokenizer, and the code of both."""
    code: list[Any] = [FORMAT]
    kinds = [Path(plain_name(Path(part.path))).suffix.lower() for part, _ in corpus.parts() if isinstance(part, Table)]
    code += kinds if {*kinds} - {".csv"} else []  # which the fingerprint of one file does not have
    if any(isinstance(part, Fold) and part.malformed == "skip" for part, _ in corpus.parts()):
        code.append("malformed rows count")  # which they did not always
    with contextlib.suppress(metadata.PackageNotFoundError):
        code.append(metadata.version("tokenizers"))
    if corpus.marked and not isinstance(corpus, TextFiles):
        code.append(dumps(corpus))  # what an answer is, the fingerprint of the text does not tell
    parts = corpus, *(part for part, _ in corpus.parts()), tokenizer
    code += filter(None, map(source, map(sys.modules.get, modules(*parts))))
    return hashlib.sha256(json.dumps([fingerprint, dumps(tokenizer), code]).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _alone(name: str) -> Iterator[None]:
    """While another process prepares the same, this one waits."""
    taken = lambda: log.info("another process prepares this corpus; waiting for it")
    with locked(cache_directory() / "locks" / name, taken):
        yield


def _open(directory: Path, corpus: Corpus, fingerprint: str, tokenizer: Tokenizer) -> Source:
    manifest = json.loads((directory / "manifest.json").read_text())
    for name, digest in manifest["sha256"].items():
        if file_sha256(directory / name) != digest:
            raise InputError(f"{name} is not what manifest.json says")
    tokens, digest = _ready(corpus, tokenizer), fingerprint
    if tokens is None:
        digest = manifest["sha256"]["tokens.bin"]
        tokens = _mapped(directory / "tokens.bin", np.dtype(manifest["dtype"]))
    starts = _mapped(directory / "documents.bin", np.dtype(np.int64))
    answers = _mapped(directory / "answers.bin", np.dtype(np.uint8)) if corpus.marked else None
    return Source(tokens, starts, tokenizer.padding, _shared(corpus, tokenizer), digest, answers=answers)


def _mapped(path: Path, dtype: np.dtype) -> NDArray[Any]:
    return np.memmap(path, dtype, "r") if path.stat().st_size else np.empty(0, dtype)


def _scan(ids: NDArray[Any], tokenizer: Tokenizer, part: Path) -> np.dtype:
    with open(part / "documents.bin", "wb") as file:
        for starts in _starts(ids, tokenizer):
            file.write(starts.tobytes())
    return ids.dtype


def _starts(ids: NDArray[Any], tokenizer: Tokenizer) -> Iterator[NDArray[np.int64]]:
    """Where the documents of ids in a file begin: behind each end, or with it if it is a start, too."""
    yield np.zeros(1, np.int64)
    for at in range(0, len(ids), 1 << 24):
        block = np.asarray(ids[at : at + (1 << 24)])
        check_ids(block, tokenizer.vocab_size)
        if tokenizer.end is not None:
            shared = int(tokenizer.end == tokenizer.start)
            starts = np.flatnonzero(block == tokenizer.end) + at + 1 - shared
            yield starts[(starts > 0) & (starts < len(ids) - shared)].astype(np.int64)


def _write(corpus: Corpus, tokenizer: Tokenizer, part: Path) -> np.dtype:
    """Encodes the corpus into tokens.bin, documents.bin and, of a marked one, answers.bin, from where progress.json
    says."""
    assert tokenizer.vocab_size is not None
    dtype, done = np.min_scalar_type(tokenizer.vocab_size - 1), _progress(part)
    if done["pieces"]:
        log.info("resuming the preparation of the corpus after %s tokens", f"{done['tokens']:,}")
    bar = tqdm(desc="tokenizing", unit="char", unit_scale=True, disable=None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        names = FILES if corpus.marked else FILES[:2]
        tokens, documents, *answers = files = [stack.enter_context(open(part / name, "ab")) for name in names]
        for file, size in zip(
            files, (done["tokens"] * dtype.itemsize, done["documents"] * 8, done["tokens"]), strict=False
        ):
            file.truncate(size)
        unsaved = 0

        def told() -> Iterator[Piece]:
            nonlocal unsaved
            for piece in itertools.islice(corpus.pieces_for(tokenizer), done["pieces"], None):
                bar.update(len(piece.text))
                unsaved += len(piece.text)
                yield piece

        for ids, answer, begins, inside in _framed(told(), corpus, tokenizer, done["inside"]):
            check_ids(ids, tokenizer.vocab_size)
            if begins:
                documents.write(np.int64(done["tokens"]).tobytes())
            tokens.write(ids.astype(dtype).tobytes())
            for file in answers:
                file.write(bytes([answer]) * len(ids))
            done = {
                "pieces": done["pieces"] + 1,
                "tokens": done["tokens"] + len(ids),
                "documents": done["documents"] + begins,
                "inside": inside,
            }
            if unsaved >= SAVE_EVERY:
                unsaved = 0
                for file in files:
                    file.flush()
                    os.fsync(file.fileno())
                write(part / "progress.json", json.dumps(done | {"itemsize": dtype.itemsize}))
        tokens.write(_last(corpus, tokenizer, done["documents"]).astype(dtype).tobytes())
    return dtype


def _progress(part: Path) -> dict[str, Any]:
    """What a killed process says that it had done, or nothing if the files do not hold it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        done = json.loads((part / "progress.json").read_text())
        sizes = done["tokens"] * done["itemsize"], done["documents"] * 8, done["tokens"]
        there = [(part / name, size) for name, size in zip(FILES, sizes, strict=True) if (part / name).exists()]
        if len(there) > 1 and all(path.stat().st_size >= size for path, size in there):
            return {name: done[name] for name in ("pieces", "tokens", "documents", "inside")}
    return {"pieces": 0, "tokens": 0, "documents": 0, "inside": False}


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[tuple[Piece, Ids]]:
    """The pieces with their ids, in order, encoded by as many threads as there are cores."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        ahead: collections.deque[tuple[Piece, Future[Ids]]] = collections.deque()
        for piece in pieces:
            ahead.append((piece, pool.submit(ids_of, piece, tokenizer)))
            if len(ahead) > 8 * cores:
                first, future = ahead.popleft()
                yield first, future.result()
        for piece, future in ahead:
            yield piece, future.result()


def _known(encoded: Iterable[tuple[Piece, Ids]], corpus: Corpus, tokenizer: Tokenizer) -> Iterator[tuple[Piece, Ids]]:
    """What is encoded; of a corpus with unknown characters all are named, not those of one piece alone."""
    try:
        yield from encoded
    except Unknown:
        check_known(corpus.pieces(), tokenizer)
        raise


def _framed(
    pieces: Iterable[Piece], corpus: Corpus, tokenizer: Tokenizer, inside: bool
) -> Iterator[tuple[Ids, bool, bool, bool]]:
    """The ids of pieces, between those that stand before and after a document; whether they are to be predicted;
    whether a document begins with them; whether it continues.

    A document without an id is none, unless the corpus is aligned. Raises InputError where an id that two documents
    share would have the mark of one.
    """
    if corpus.marked and _shared(corpus, tokenizer):
        raise InputError(
            f"answers are marked, and {type(tokenizer).__name__} ends a document with the id that begins the next; set "
            "framed = False in the class, so that its pieces hold that id"
        )
    before, after = (np.array(ids if corpus.framed else (), np.uint32) for ids in (tokenizer.prefix, tokenizer.suffix))
    for piece, ids in _known(_encoded(pieces, tokenizer), corpus, tokenizer):
        begins = not inside and (corpus.aligned or len(ids) > 0)
        inside = inside or begins
        ends = inside and piece.ends
        inside = inside and not piece.ends
        if piece.ends and not ends and corpus.texts > 1:  # the texts behind it would move to other examples
            raise InputError(
                f"{piece.place()}: a text of an example has no id; set aligned = True in the corpus's class"
            )
        whole = np.concatenate([before if begins else before[:0], ids, after if ends else after[:0]])
        yield whole, piece.answer, begins, inside


def _shared(corpus: Corpus, tokenizer: Tokenizer) -> int:
    return int(corpus.framed and tokenizer.end is not None and tokenizer.end == tokenizer.start)


def _last(corpus: Corpus, tokenizer: Tokenizer, documents: int) -> Ids:
    """The end of the last document, where ends are shared."""
    return np.array(tokenizer.prefix if _shared(corpus, tokenizer) and documents else (), np.uint32)
