"""Tables: files whose rows are examples, with texts and labels in named columns."""

import contextlib
import csv
import dataclasses
import itertools
import json
import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from jaxformer.data.corpora import Corpus, Piece, TextFiles, TextLines, cut
from jaxformer.data.files import lines, plain_name
from jaxformer.spec import InputError

log = logging.getLogger(__name__)

Labels = str | tuple[str, ...]
TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")


class Row(NamedTuple):
    """One example."""

    texts: tuple[str, ...]
    labels: tuple[Labels, ...]  # one for each column of labels
    line: int  # of the file, where it begins


class Malformed(ValueError):
    """Why a row cannot be used."""


Cells = tuple[int, Mapping[str, Any] | Malformed]  # a line, and the row that begins there, or what is wrong with it


class Table(TextFiles):
    """CSV, TSV or JSON-lines files, or a folder of them, told apart by their names; each row an example.

    CSV may quote its cells (RFC 4180), TSV may not. Read as plain text, each text of a row is a document.
    """

    text: str = "text"  # the column of the text
    target: str | None = None  # the column of a second text, such as an answer or a translation; None: none
    labels: tuple[str, ...] = ()  # the columns of classes
    several: tuple[str, ...] = ()  # those of labels whose cells hold several classes
    separator: str = "|"  # what stands between several classes; JSON may hold a list
    columns: tuple[str, ...] | None = None  # names of the columns; None: they are the first line
    malformed: Literal["stop", "skip"] = "stop"  # what happens at a row that cannot be used; skip counts and tells them
    suffixes: tuple[str, ...] = dataclasses.field(default=TABLES, kw_only=True, repr=False)

    aligned = True

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.columns is not None:
            for name in self._columns():
                if name not in self.columns:
                    raise ValueError(f"{at}columns={self.columns} must name the column {name!r}")
        if not self.separator:
            raise ValueError(f"{at}separator='' must hold a character; '|' is usual")
        for name, values in (("labels", self.labels), ("columns", self.columns or ())):
            if len(set(values)) != len(values):
                raise ValueError(f"{at}{name}={values} must differ; leave out what comes twice")
        if not set(self.several) <= set(self.labels):
            raise ValueError(f"{at}several={self.several} must be among {at}labels={self.labels}")

    @property
    def texts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 1 if self.target is None else 2

    def plain(self) -> "Table":
        """What a kind of table is but for its own fields."""
        return Table(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Table)})

    def asked(self, pairs: bool) -> "Table":
        return dataclasses.replace(self, labels=(), several=(), target=self.target if pairs else None)

    def label_values(self) -> dict[str, list[Labels]]:
        found: dict[str, list[Labels]] = {name: [] for name in self.labels}
        if not found:
            return found
        for row in self.rows(quiet=True):
            for name, value in zip(self.labels, row.labels, strict=True):
                found[name].append(value)
        return found

    def read(self, path: Path) -> Iterator[Piece]:
        for row in self._rows_of(path):
            for text in row.texts:
                yield from cut([text], ("line", row.line))

    def rows(self, quiet: bool = False) -> Iterator[Row]:
        """The examples of all files, in order."""
        for path in self.files():
            yield from self._rows_of(path, quiet)

    def _rows_of(self, path: Path, quiet: bool = False) -> Iterator[Row]:
        name, skipped, first = plain_name(path).lower(), 0, ""
        if not name.endswith(TABLES):
            raise InputError(f"{path} must end in {', '.join(TABLES)}, which tell how to read it; rename it")
        for line, found in self._cells(path, name):
            try:
                if isinstance(found, Malformed):
                    raise found
                yield self._row(found, line)
            except Malformed as error:
                if self.malformed == "stop":
                    raise InputError(
                        f"{path}, line {line}: {error}; fix the row, or leave it out by data.corpus.malformed=skip"
                    ) from None
                skipped, first = skipped + 1, first or f"line {line}: {error}"
        if skipped and not quiet:
            log.warning("%s: %d malformed rows left out, the first in %s", path, skipped, first)

    def _cells(self, path: Path, name: str) -> Iterator[Cells]:
        return self._json(path) if name.endswith((".jsonl", ".ndjson")) else self._csv(path, name.endswith(".tsv"))

    def _row(self, cells: Mapping[str, Any], line: int) -> Row:
        texts = tuple(_text(cells, name) for name in ([self.text] if self.target is None else [self.text, self.target]))
        labels: list[Labels] = []
        for name in self.labels:
            value = cells.get(name)
            if name not in self.several:
                labels.append(_label(value, name))
                continue
            if isinstance(value, str):
                value = [part for part in value.split(self.separator) if part.strip()]
            if not isinstance(value, list):
                kind = "missing" if value is None else type(value).__name__
                raise Malformed(f"{name!r} is {kind}; it must be a list")
            labels.append(tuple(sorted({_label(item, name) for item in value})))
        return Row(texts, tuple(labels), line)

    def _columns(self) -> list[str]:
        return [self.text, *([] if self.target is None else [self.target]), *self.labels]

    def _csv(self, path: Path, tabs: bool) -> Iterator[Cells]:
        how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
        text = (line.decode("utf-8", "surrogateescape") + "\n" for line in lines(path))
        first = next(text, "")
        csv.field_size_limit(2**31 - 1)  # of a cell: longer texts than 128 KiB are texts
        reader = csv.reader(itertools.chain([first.removeprefix("\ufeff")] if first else [], text), **how)
        names = self.columns
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                break
            except csv.Error as error:  # where the next row begins is not known: no row can be left out
                raise InputError(f"{path}, line {line}: {error}; fix the quotes, or the ends of lines") from None
            if names is None:
                names = tuple(name.strip() for name in row)
                self._check_names(path, names)
            elif len(row) == len(names):
                yield line, dict(zip(names, row, strict=True))
            elif row:  # an empty line is no row
                yield line, Malformed(f"{len(row)} cells, but there are {len(names)} columns")

    def _check_names(self, path: Path, names: tuple[str, ...]) -> None:
        for name in self._columns():
            if names.count(name) != 1:
                reason = "no column" if name not in names else "more than one column"
                raise InputError(
                    f"{path}: {reason} {name!r} among {', '.join(map(repr, names))}; give text, target and labels the "
                    "names of columns, or the names as columns=(...) if the first line does not hold them"
                )

    def _json(self, path: Path) -> Iterator[Cells]:
        for number, line in enumerate(lines(path), 1):
            if not line.strip():
                continue
            value: Any = None
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(line)
            yield number, value if isinstance(value, dict) else Malformed("no JSON object")


class Fold(Table):
    """A table without every fifth of its rows, or these alone: what is left out, nothing can be chosen on.

    The folds of all numbers are the whole table, as in cross-validation. Rows are counted anew in each file, malformed
    ones too: which columns are read does not move a row to another fold.
    """

    fold: int = 0  # the number of the fold, from 0
    folds: int = 5  # how many folds there are
    inside: bool = False  # True: the held-out fold alone; False: all rows but it

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.folds < 2 - self.inside:
            raise ValueError(f"{at}folds={self.folds} must be at least 2; 5 is usual")
        if not 0 <= self.fold < self.folds:
            raise ValueError(f"{at}fold={self.fold} must be at least 0 and less than {at}folds={self.folds}")

    def at(self, path: str) -> Table:
        """All rows of another file: it has no part in the folds of this one."""
        return dataclasses.replace(self.plain(), path=path)

    def _cells(self, path: Path, name: str) -> Iterator[Cells]:
        for number, cells in enumerate(super()._cells(path, name)):
            if (number % self.folds == self.fold) == self.inside:
                yield cells


class Halves(Fold):
    """The halves of each text as a pair, for contrastive learning: parts of a text belong together (arXiv:2006.03659).

    They are cut at the middle one of the spaces between words of ASCII letters, and are the text together, so that a
    tokenizer learns the same of them as of whole texts. A text without such a space has an empty second half. A
    fifth of the rows is left out, as by `Fold`; `folds=1, inside=True` takes all.
    """

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.target is not None or self.labels:
            raise ValueError(
                f"{at}target={self.target!r} and {at}labels={self.labels} must be None and (): halves are the pairs"
            )

    @property
    def texts(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return 2

    def at(self, path: str) -> Table:
        return dataclasses.replace(self, path=path, fold=0, folds=1, inside=True)

    def asked(self, pairs: bool) -> Table:
        """Whole texts, as those are that a run answers."""
        return self.plain().asked(pairs)

    def _rows_of(self, path: Path, quiet: bool = False) -> Iterator[Row]:
        for row in super()._rows_of(path, quiet):
            (text,) = row.texts
            spaces = [found.start(1) for found in SPACE.finditer(text)]
            at = spaces[len(spaces) // 2] if spaces else len(text)
            yield row._replace(texts=(text[:at], text[at:]))


SPACE = re.compile(r"(?<!\S)[a-zA-Z]+( )(?=[a-zA-Z]+(?!\S))")


def asked_in(path: str, own: Corpus) -> tuple[Corpus, ...]:
    """How texts to be answered are read from a file, or from those of a folder, each by its name.

    What is named as a corpus's own files are is read as those; other tables as such; anything else has a text in each
    line that is not blank. In a folder with tables only these are read. Raises InputError for what is not there.
    """
    files = TextFiles(path).files()
    of_own = tuple(map(str.lower, own.suffixes)) if isinstance(own, TextFiles) else ()
    tables = [file for file in files if plain_name(file).lower().endswith((*of_own, *TABLES))]

    def kind(file: Path) -> Corpus:
        name = plain_name(file).lower()
        if name.endswith(of_own):
            return own.at(str(file))
        return (Table if name.endswith(TABLES) else TextLines)(str(file))

    return tuple(kind(file) for file in tables or files)


def _text(cells: Mapping[str, Any], name: str) -> str:
    text = cells.get(name)
    if not isinstance(text, str):
        raise Malformed(f"{name!r} is {'missing' if text is None else type(text).__name__}; it must be a text")
    return _checked(text, name)


def _label(value: Any, name: str) -> str:
    if isinstance(value, bool | int) or (isinstance(value, float) and value.is_integer()):
        value = str(int(value))
    if not isinstance(value, str):
        raise Malformed(f"{name!r} is {'missing' if value is None else type(value).__name__}; it must be a class")
    return _checked(value, name).strip()


def _checked(text: str, name: str) -> str:
    if not text.strip():
        raise Malformed(f"{name!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Malformed(f"{name!r} is not UTF-8") from None
    return text
