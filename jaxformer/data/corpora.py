"""Corpora: where text comes from, as a sequence of documents."""

import abc
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxformer.data.files import decoded, fetch, file_sha256, is_binary, lines, located, once, plain_name, visible_files
from jaxformer.spec import InputError, Spec, counted

PIECE = 16_384  # characters that are encoded at once
CACHES = ("__pycache__", "node_modules", "venv")  # folders that programs fill


class Piece(NamedTuple):
    """A stretch of a document, short enough to be encoded at once."""

    text: str
    ends: bool  # it is the last of its document
    line: int = 1  # of the document, where it begins
    record: tuple[str, int] | None = None  # what of its file the document is, as ("line", 7); None: all of it
    path: str = ""  # of the file
    answer: bool = True  # its tokens are to be predicted, in a corpus that is `marked`
    special: bool = False  # the text is the name of a special token
    whole: str = ""  # the text that it is a stretch of and is encoded within; "": it is encoded by itself
    at: int = 0  # where in `whole` it begins

    def place(self, at: int = 0) -> str:
        """Where a character of the text stands, as "notes.txt, line 7"; in a record that is a line, that line."""
        unit, number = self.record or ("", 0)
        breaks = self.text.count("\n", 0, at)
        lines = [] if unit == "line" else [f"line {self.line + breaks}"]
        return ", ".join([self.path] * bool(self.path) + [f"{unit} {number}"] * bool(unit) + lines)


class Corpus(Spec):
    """Text. A subclass yields its documents, in the same order every time, or their pieces if they may be long.

    Where rows are examples, each is as many documents, one behind the other, as it has `texts`, and may have labels.
    """

    texts = 1  # of an example
    aligned = False  # True: each document is a text of an example, even one without an id
    marked = False  # True: pieces say what of a document is to be predicted
    framed = True  # False: pieces hold the special tokens that begin and end documents, and no other ones are put there

    @abc.abstractmethod
    def documents(self) -> Iterator[str]:
        """Raises InputError for text that is missing or cannot be read."""

    def pieces(self) -> Iterator[Piece]:
        """The documents, long ones in several pieces; the text alone decides where they are cut."""
        for number, document in enumerate(self.documents(), 1):
            yield from cut([document], ("document", number))

    def pieces_for(self, tokenizer: Any) -> Iterator[Piece]:
        """The pieces that a tokenizer is given one by one: whole documents, if it does not encode piece by piece."""
        return self.pieces() if tokenizer.piecewise else joined(self.pieces())

    def questions(self) -> Iterator[tuple[Piece, ...]]:
        """The texts of each example, whole, with their places; a document without text is none."""
        documents = (piece for piece in joined(self.pieces()) if self.aligned or piece.text.strip())
        return zip(*[documents] * self.texts, strict=False)

    def at(self, path: str) -> "Corpus":
        """The same kind of text, read from another file or folder. Raises InputError if it is read from none."""
        if "path" not in {field.name for field in dataclasses.fields(self)}:
            raise InputError(f"{type(self).__name__} is read from no file; {name_class(path)}")
        return dataclasses.replace(self, path=path)

    def asked(self, pairs: bool) -> "Corpus":
        """The corpus as one to be answered: without labels, and without second texts unless pairs are."""
        return self

    def __iter__(self) -> Iterator[str]:
        return (piece.text for piece in self.pieces() if not piece.special)

    def summary(self) -> str | None:
        """What a run says of it before it is read: of a folder which files, and what is left out."""
        return None

    def fingerprint(self) -> str:
        """SHA-256 of the documents and their boundaries."""
        digest = hashlib.sha256()
        for document in self.documents():
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()

    def ids(self) -> np.ndarray | None:
        """The ids themselves, where a file holds them already."""
        return None

    def label_values(self) -> "dict[str, list[str | tuple[str, ...]]]":
        """Column → the class of each example, or all of its classes."""
        return {}

    def parts(self) -> tuple[tuple["Corpus", float], ...]:
        """The corpora that this one mixes, and their shares of the rows: itself alone, unless it is a mixture."""
        return ((self, 1.0),)

    def part_names(self) -> tuple[str, ...]:
        """What these are called where each is told apart."""
        return (type(self).__name__,)


class NoCorpus(Corpus):
    """No text at all: of a run whose parameters were imported. Files that it is asked about are read as plain text."""

    def documents(self) -> Iterator[str]:
        raise InputError("data.corpus=NoCorpus has no text: name a file, or another corpus")

    def at(self, path: str) -> Corpus:
        return TextFiles(path)


class PythonTopics(Corpus):
    """Python's own help texts, about 0.46 MB, in every CPython. They differ between Python's versions."""

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics[name] for name in sorted(topics))

    def at(self, path: str) -> Corpus:
        return TextFiles(path)


class TopicParagraphs(Corpus):
    """Paragraphs of some of Python's help texts, each labelled `topic` with the name of its text.

    A paragraph is what stands between blank lines, of `words` words or more; one that stands in several is that of the
    first. They differ between Python's versions.
    """

    topics: tuple[str, ...] = (  # names of help texts, which are the classes
        "compound",
        "debugger",
        "formatstrings",
        "specialnames",
        "string-methods",
        "types",
    )
    words: int = 8  # how many words a paragraph has at least

    aligned = True

    def check(self, at: str = "") -> None:
        if len(set(self.topics)) != len(self.topics) or len(self.topics) < 2:
            raise ValueError(f"{at}topics={self.topics} must be two or more, all different")
        if self.words < 1:
            raise ValueError(f"{at}words={self.words} must be at least 1; 8 leaves out headings")

    def documents(self) -> Iterator[str]:
        return iter(self._paragraphs())

    def label_values(self) -> dict[str, list[str | tuple[str, ...]]]:
        return {"topic": list(self._paragraphs().values())}

    def at(self, path: str) -> Corpus:
        return TextLines(path)

    def _paragraphs(self) -> dict[str, str]:
        """Paragraph → topic, in order."""
        from pydoc_data.topics import topics

        found: dict[str, str] = {}
        for name in self.topics:
            if name not in topics:
                raise InputError(f"topics: {name!r} must be one of Python's topics, {', '.join(sorted(topics))}")
            for paragraph in topics[name].split("\n\n"):
                if len(paragraph.split()) >= self.words:
                    found.setdefault(" ".join(paragraph.split()), name)
        return found


class TextFiles(Corpus):
    """UTF-8 files, each a document: one, or all of a folder and its subfolders in the order of their paths.

    What ends in .gz or .zst is decompressed. Of a folder, links to others are followed, what is hidden is left out and,
    where no `suffixes` say which files to read, what is binary. The fingerprint has the names of the files that are
    read, not what chose them.
    """

    path: str  # a file or a folder
    suffixes: tuple[str, ...] = dataclasses.field(default=(), kw_only=True, repr=False)  # of files, before .gz; (): all
    skip: tuple[str, ...] = dataclasses.field(default=CACHES, kw_only=True, repr=False)  # names of folders to leave out

    def check(self, at: str = "") -> None:
        for suffix in self.suffixes:
            if not suffix.startswith("."):
                raise ValueError(f"{at}suffixes={self.suffixes} must each begin with a dot, such as .py; () reads all")

    def documents(self) -> Iterator[str]:
        return (piece.text for piece in joined(self.pieces()))

    def pieces(self) -> Iterator[Piece]:
        for path in self.files():
            name, number = str(path), 1
            for piece in self.read(path):
                record = piece.record or (None if number == 1 else ("document", number))
                yield piece._replace(record=record, path=name)
                number += piece.ends

    def read(self, path: Path) -> Iterator[Piece]:
        """The documents of one file."""
        return cut(decoded(path))

    def files(self) -> list[Path]:
        root = located(self.path)
        if not self.path or not root.exists():
            where = "" if root.is_absolute() else f" in {Path.cwd()}"
            raise InputError(f"corpus {self.path!r} does not exist{where}; give the path of a file or folder")
        if root.is_file():
            return [root]
        if not root.is_dir():
            raise InputError(f"corpus {self.path!r} is no regular file, which could be read again; copy it to one")
        found, left = self._of_folder(root)
        if not found:
            kinds, more = " or ".join(self.suffixes) or "visible text", f" (left out: {left})" if left else ""
            raise InputError(f"corpus {self.path!r} holds no {kinds} file{more}; give another folder")
        return found

    def _of_folder(self, root: Path) -> tuple[list[Path], str]:
        """The files to read, and what is left out, in words."""
        visible, hidden, skipped = visible_files(root, self.skip)
        suffixes = tuple(suffix.lower() for suffix in self.suffixes)
        named = lambda path: plain_name(path).lower().endswith(suffixes)
        found = [path for path in visible if (named(path) if suffixes else not is_binary(path))]
        others, names = sorted({*visible} - {*found}), sorted({path.name for path in skipped})
        found = once(found)
        what = (
            f"{counted(len(others), 'file')} not {' or '.join(suffixes)}"
            if suffixes
            else counted(len(others), "binary file")
        )
        reasons = [f"{what}, such as {others[0].relative_to(root)}"] if others else []
        reasons += [counted(len(hidden), "hidden file")] if hidden else []
        reasons += [f"folders called {', '.join(names)}"] if names else []
        return found, "; ".join(reasons)

    def summary(self) -> str | None:
        root = located(self.path)
        if not root.is_dir():
            return None
        files, left = self._of_folder(root)
        size = sum(path.stat().st_size for path in files)
        amount = f"{size / 1e6:,.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
        return f"{self.path}: reads {counted(len(files), 'file')}, {amount}" + (f"; leaves out: {left}" if left else "")

    def fingerprint(self) -> str:
        """SHA-256 over class, fields, and the names and contents of the files, wherever their folder lies."""
        root = located(self.path)
        name = lambda path: path.relative_to(root).as_posix() if path != root else path.name[len(plain_name(path)) :]
        files = [(name(path), file_sha256(path)) for path in self.files()]
        fields = f"{type(self).__module__}.{dataclasses.replace(self, path='')!r}"
        return hashlib.sha256(json.dumps([fields, files]).encode()).hexdigest()


class TextLines(TextFiles):
    """Files of which each line is a document; empty ones are none."""

    def read(self, path: Path) -> Iterator[Piece]:
        for number, line in enumerate(lines(path), 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip("\r")
            except UnicodeDecodeError as error:
                raise InputError(f"{path}, line {number} is not UTF-8 ({error.reason}); convert the file") from None
            if text.strip():
                yield from cut([text], ("line", number))


class Clozes(TextLines):
    """Lines of a title and a text, asked for their proper names: pairs of the title with some words, and what follows.

    Of `Ada Byron. Ada was born in London.` with two words the pair is ` Ada Byron: born in` and `London`. What is
    learned so, from several sides, can be asked for (spans of names, arXiv:2002.08909; arXiv:2309.14316). Names are up
    to three words with a capital, of longer ones each three. Left out are months, what has a word of the title, and the
    first word of a sentence (a dot and a space end one, in `St. Louis`, too).
    """

    words: tuple[int, ...] = (2, 6)  # how many words before a name are shown: a pair for each

    texts = 2
    aligned = True

    def check(self, at: str = "") -> None:
        super().check(at)
        if not self.words or min(self.words) < 1:
            raise ValueError(f"{at}words={self.words} must be numbers of at least 1; (2, 6) shows two, and six")

    def asked(self, pairs: bool) -> TextLines:
        return TextLines(self.path, suffixes=self.suffixes, skip=self.skip)

    def read(self, path: Path) -> Iterator[Piece]:
        for document in joined(super().read(path)):
            for text in itertools.chain.from_iterable(self._pairs(document.text)):
                yield from cut([text], document.record)

    def _pairs(self, text: str) -> Iterator[tuple[str, str]]:
        if not (parts := TITLE.match(text)):
            return
        title, rest = parts.groups()
        for name in NAME.finditer(rest):
            if {*title.split()} & {*name[0].split()} or name[0] in MONTHS:
                continue
            before = rest[: name.start()].split()
            for count in sorted({min(n, len(before)) for n in self.words}):
                yield f" {title}: {' '.join(before[-count:])}", name[0]


TITLE = re.compile(r"(.*?\w\w)\. (.*)")  # initials end no title
NAME = re.compile(r"(?<!^)(?<!\. )(?<![\w.])[A-Z][\w'’-]+(?: [A-Z][\w'’-]+){0,2}")
MONTHS = {"January", "February", "March", "April", "May", "June"} | {
    *("July", "August", "September", "October", "November", "December")
}


class JSONLines(TextFiles):
    """Files of one JSON object per line, each a document: the string in `field`. A null is no document."""

    field: str = "text"  # the key of the text
    suffixes: tuple[str, ...] = dataclasses.field(default=(".jsonl", ".ndjson"), kw_only=True, repr=False)

    def read(self, path: Path) -> Iterator[Piece]:
        for number, text in json_lines(path, self.field, str | None, "a string"):
            yield from cut([text or ""], ("line", number))


class Parquet(TextFiles):
    """Parquet files, each row a document: the string in a column. A null is no document. Needs pyarrow."""

    column: str = "text"  # the column of the text
    suffixes: tuple[str, ...] = dataclasses.field(default=(".parquet",), kw_only=True, repr=False)

    def read(self, path: Path) -> Iterator[Piece]:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise InputError('data.corpus=Parquet needs pyarrow; pip install "jaxformer[parquet]"') from None
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                if self.column not in file.schema_arrow.names:
                    raise InputError(f"{path}: no column {self.column!r}; it has {', '.join(file.schema_arrow.names)}")
                kind = file.schema_arrow.field(self.column).type
                if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
                    raise InputError(f"{path}: column {self.column!r} holds {kind}; it must hold strings")
                batches = file.iter_batches(256, columns=[self.column])
                rows = (text for batch in batches for text in batch.column(0).to_pylist())
                for number, text in enumerate(rows, 1):
                    yield from cut([text or ""], ("row", number))
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path} cannot be read ({error}); restore the file") from None


class TokenFile(Corpus):
    """A file of ids, one after another as nanoGPT's `train.bin` holds them; its documents end with the end token."""

    path: str  # the file of ids
    dtype: Literal["uint8", "uint16", "uint32"] = "uint16"  # of each id

    def documents(self) -> Iterator[str]:
        raise InputError(
            f"corpus {self.path!r} holds ids, no text to learn from; give the data.tokenizer of its ids, or how many "
            "there are, as NoTokenizer(vocab_size=50257)"
        )

    def fingerprint(self) -> str:
        self.ids()
        return hashlib.sha256(f"{self.dtype} {file_sha256(located(self.path))}".encode()).hexdigest()

    def ids(self) -> np.memmap:
        path, dtype = located(self.path), np.dtype(self.dtype)
        if not path.is_file():
            raise InputError(f"corpus {self.path!r} is no file; give the path of a file of ids")
        size = path.stat().st_size
        if not size or size % dtype.itemsize:
            remedy = "give its dtype" if size else "give a file of ids"
            raise InputError(f"corpus {self.path!r} has {size} bytes, which are no {dtype} ids; {remedy}")
        return np.memmap(path, dtype, "r")


class Mixture(Corpus):
    """Several corpora. Each gives its share of the rows of batches, whatever its size."""

    corpora: tuple[Corpus, ...]  # their classes, as TextFiles,JSONLines
    weights: tuple[float, ...]  # the share of each in the rows of a batch, as 0.7,0.3
    names: tuple[str, ...] | None = None  # what they are called in evaluations; None: as their files or classes

    def check(self, at: str = "") -> None:
        if not self.corpora:
            raise ValueError(f"{at}corpora must not be empty; give two or more")
        if len(self.corpora) != len(self.weights):
            raise ValueError(
                f"{at}weights={self.weights} must be as many as {at}corpora, which are {len(self.corpora)}"
            )
        if min(self.weights) < 1e-4 * sum(self.weights) or min(self.weights) <= 0:
            raise ValueError(f"{at}weights={self.weights} must each be at least 1/10,000 of all; leave a corpus out")
        if any(len(corpus.parts()) > 1 for corpus in self.corpora):
            raise ValueError(f"{at}corpora must not be mixtures themselves; give all corpora in one")
        if self.names is not None and (len(set(self.names)) != len(self.corpora) or not all(self.names)):
            raise ValueError(
                f"{at}names={self.names} must be one for each of {at}corpora, all different; None gives some"
            )

    @property
    def texts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return max(corpus.texts for corpus in self.corpora)

    @property
    def marked(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(corpus.marked for corpus in self.corpora)

    def documents(self) -> Iterator[str]:
        for corpus in self.corpora:
            yield from corpus.documents()

    def pieces(self) -> Iterator[Piece]:
        for corpus in self.corpora:
            yield from corpus.pieces()

    def questions(self) -> Iterator[tuple[Piece, ...]]:
        for corpus in self.corpora:
            yield from corpus.questions()

    def at(self, path: str) -> Corpus:
        """What all the parts would read there, if that is one thing."""
        first, *others = (corpus.at(path) for corpus in self.corpora)
        if any(other != first for other in others):
            raise InputError(f"Mixture has parts of several kinds; {name_class(path)}")
        return first

    def asked(self, pairs: bool) -> "Mixture":
        return dataclasses.replace(self, corpora=tuple(corpus.asked(pairs) for corpus in self.corpora))

    def fingerprint(self) -> str:
        return hashlib.sha256("\n".join(corpus.fingerprint() for corpus in self.corpora).encode()).hexdigest()

    def parts(self) -> tuple[tuple[Corpus, float], ...]:
        return tuple(
            (corpus, weight / sum(self.weights)) for corpus, weight in zip(self.corpora, self.weights, strict=True)
        )

    def part_names(self) -> tuple[str, ...]:
        if self.names is not None:
            return self.names
        paths = [getattr(corpus, "path", "") for corpus in self.corpora]
        own = [plain_name(Path(p)).split(".")[0] or type(c).__name__ for p, c in zip(paths, self.corpora, strict=True)]
        found: list[str] = []
        for name in own:
            numbered = (f"{name}_{i}" for i in itertools.count(1))
            found.append(name if own.count(name) == 1 else next(n for n in numbered if n not in {*own, *found}))
        return tuple(found)


class TinyShakespeare(Corpus):
    """The 1,115,394 characters of tinyshakespeare.txt, in $JAXFORMER_DATA or the cache, else downloaded once."""

    def documents(self) -> Iterator[str]:
        yield from TextFiles(str(fetch("tinyshakespeare.txt", TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256))).documents()

    def at(self, path: str) -> Corpus:
        return TextFiles(path)


TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def name_class(path: str, example: str = "data.corpus=JSONLines", more: str = "") -> str:
    """The end of a sentence about a file of which it is not known how to read it."""
    return f"name the class that reads the file, as by --{example} --data.corpus.path={path}{more}"


def json_lines(path: Path, field: str, kind: Any, kind_name: str) -> Iterator[tuple[int, Any]]:
    """The number of each line that is not blank, and what its object has in a field. Raises InputError for others."""
    for number, line in enumerate(lines(path), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
            if not isinstance(value, kind):
                raise ValueError(f"{field!r} is {type(value).__name__}, not {kind_name}")
            json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            none = f"no object with {field!r}"
            known = {KeyError: none, TypeError: none, UnicodeEncodeError: "half of a surrogate pair"}
            reason = known.get(type(error), error)
            raise InputError(f"{path}, line {number}: {reason}; fix the line, or leave it out") from None
        yield number, value


def cut(chunks: Iterable[str], record: tuple[str, int] | None = None) -> Iterator[Piece]:
    """The pieces of one document that comes in chunks of any size; `record` tells what of its file it is.

    They end at a line break, or else before a space, that stands alone between two other characters: where byte-level
    tokenizers split in any case, so that the ids are those of the whole document. Text that has none within a piece,
    as some languages, is cut all the same, at the cost of a token at the seam.
    """
    rest, line = "", 1
    for chunk in chunks:
        text, at = rest + chunk, 0
        while len(text) - at > PIECE:
            end = _boundary(text, at)
            yield Piece(text[at:end], False, line, record)
            line += text.count("\n", at, end)
            at = end
        rest = text[at:]
    yield Piece(rest, True, line, record)


def joined(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """Whole documents, of their pieces."""
    document: list[Piece] = []
    for piece in pieces:
        document.append(piece)
        if piece.ends:
            yield document[0]._replace(text="".join(part.text for part in document), ends=True)
            document = []


def _boundary(text: str, start: int) -> int:
    for mark, skip in (("\n", 1), (" ", 0)):
        end = start + PIECE
        while (end := text.rfind(mark, start + PIECE // 2, end)) > 0:
            if not (text[end - 1].isspace() or text[end + 1].isspace()):
                return end + skip
    return start + PIECE
