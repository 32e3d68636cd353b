"""Batches, drawn from prepared tokens: each row a function of the seed and the row's number alone."""

# pyright: reportIncompatibleVariableOverride=false

import abc
import bisect
import dataclasses
import functools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jaxformer.data.corpora import Clozes, Corpus
from jaxformer.data.hashes import Hashes, mix, permuted
from jaxformer.data.sources import Source
from jaxformer.spec import InputError, Spec, counted

Batch = dict[str, NDArray[np.int32]]
PERIOD = 10_000  # rows, or turns of buckets, after which those who take turns begin anew


class RowSize(NamedTuple):
    """How many tokens a row has: the `window` that the model sees at once, of each of which something `lookahead`
    places on is asked for (1 of a decoder, 0 where tokens are asked for themselves)."""

    window: int
    lookahead: int = 1

    @property
    def tokens(self) -> int:
        return self.window + self.lookahead


class Sampling(Spec):
    """How rows are drawn from a source."""

    whole_documents = False  # True: rows are made of documents, so that a source may be split between any two
    examples = False  # True: rows are examples, with their labels
    several = False  # True: rows may hold several documents, each a segment
    joined = False  # True: of two texts, the second follows the first in one row
    n_buckets = 1  # how many `buckets` there are at most
    bucket_steps = 1  # steps after which another bucket may have its turn

    def check_corpus(self, corpus: Corpus, valid: Corpus | None, at: str) -> None:
        """Raises ValueError if rows are not to be drawn from such corpora; `at` is "data."."""
        if corpus.texts > 1:
            raise ValueError(
                f"{at}corpus={type(corpus).__name__} has examples of two texts; {at}sampling must be Examples"
            )

    def buckets(self, source: Source, size: RowSize) -> tuple[Source, ...]:
        """Parts of the source whose rows have a width of their own: a batch has rows of one of them."""
        return (source,)

    def shapes(self, corpus: Corpus, size: RowSize) -> dict[str, tuple[int, ...]]:
        """The largest shape that a row of each array of a batch may have; labels are left out."""
        names = ["tokens", *["segments"] * self.whole_documents, *["weights"] * corpus.marked]
        return dict.fromkeys(names, (size.tokens,))

    @abc.abstractmethod
    def check_source(self, source: Source, size: RowSize) -> None:
        """Raises InputError if no row of this size can be drawn."""

    def count_cut(self, source: Source, size: RowSize) -> int:
        """How many examples are longer than a row."""
        return 0

    @abc.abstractmethod
    def rows(self, source: Source, size: RowSize, key: Hashes, numbers: Hashes) -> Batch:
        """`tokens` int32[rows, size.tokens] and, where they matter, `segments` and `weights` of that shape.

        `numbers`, uint64[rows], count all rows ever drawn of this source; `key`, uint64[1], is made of the seed and the
        source.
        """

    @abc.abstractmethod
    def full_pass(self, source: Source, size: RowSize, batch_size: int, share: float = 1.0) -> Iterator[Batch]:
        """Batches in order, those of a bucket of one shape, in which each token, but for the `lookahead` first, is
        asked for exactly once; or a share of their rows, spread over them."""


class RandomWindows(Sampling):
    """Windows that begin anywhere, each drawn for itself, across the boundaries of documents."""

    def check_source(self, source: Source, size: RowSize) -> None:
        if len(source.tokens) < size.tokens:
            raise InputError(f"{counted(len(source.tokens), 'token')}, but a row has {size.tokens}")

    def rows(self, source: Source, size: RowSize, key: Hashes, numbers: Hashes) -> Batch:
        first = mix(mix(key) + numbers) % np.uint64(len(source.tokens) - size.tokens + 1)
        return self._windows(source, size, first.astype(np.int64))

    def full_pass(self, source: Source, size: RowSize, batch_size: int, share: float = 1.0) -> Iterator[Batch]:
        n_windows = -(-(len(source.tokens) - size.lookahead) // size.window)
        for rows in _spread(n_windows, batch_size, share):
            yield self._windows(source, size, rows * size.window, padded=True)

    def _windows(self, source: Source, size: RowSize, first: NDArray[np.int64], padded: bool = False) -> Batch:
        index = first[:, None] + np.arange(size.tokens)
        marks = lambda index: {} if source.answers is None else {"weights": source.answers[index].astype(np.int32)}
        if not padded:
            return {"tokens": source.tokens[index].astype(np.int32)} | marks(index)
        real = index < len(source.tokens)
        index = np.minimum(index, len(source.tokens) - 1)
        tokens = np.where(real, source.tokens[index].astype(np.int32), source.padding)
        found = {"tokens": tokens, "segments": real.astype(np.int32)}
        return found | {name: array * real for name, array in marks(index).items()}


class ShuffledWindows(RandomWindows):
    """Windows side by side, in another order in every epoch: in an epoch each token is asked for once, but for fewer
    than a window's at the corpus's ends."""

    def rows(self, source: Source, size: RowSize, key: Hashes, numbers: Hashes) -> Batch:
        n_windows, spare = divmod(len(source.tokens) - size.lookahead, size.window)
        epoch, place = numbers // np.uint64(n_windows), numbers % np.uint64(n_windows)
        keys = mix(mix(key) + epoch)
        offset = mix(keys) % np.uint64(spare + 1)
        first = permuted(place, n_windows, keys) * np.uint64(size.window) + offset
        return self._windows(source, size, first.astype(np.int64))


class Examples(Sampling):
    """Rows of one example each, padded on the right, in another order in every epoch.

    With several buckets, examples of about the same length come together, so that less is padding: buckets are as
    large as one another, each as wide as its longest example, to a multiple of 8, and a bucket has its turn for
    `bucket_steps` steps. Texts longer than the window are cut.

    A row of two texts has `source`, `source_segments` int32[rows, S] besides; where they are `joined`, as for a
    decoder or for a classifier of pairs, the second text follows the first, and `parts` tells them apart. Labels are
    `labels_COLUMN`.
    """

    joined: bool = False  # a sentence pair is one sequence: the second text follows the first
    n_buckets: int = 1  # how many widths of rows there are
    bucket_steps: int = 10  # how many steps a bucket has its turn

    whole_documents = True
    examples = True

    def check(self, at: str = "") -> None:
        if not 1 <= self.n_buckets <= PERIOD:
            raise ValueError(
                f"{at}n_buckets={self.n_buckets} must lie between 1 and {PERIOD}; with more, some get no turn"
            )
        if self.bucket_steps < 1:
            raise ValueError(f"{at}bucket_steps={self.bucket_steps} must be at least 1; 10 is usual")

    def check_corpus(self, corpus: Corpus, valid: Corpus | None, at: str) -> None:
        if len(corpus.parts()) > 1:
            raise ValueError(f"{at}sampling=Examples draws from one corpus; {at}corpus={type(corpus).__name__}")
        if valid is not None and valid.texts != corpus.texts:
            raise ValueError(f"{at}valid must have as many texts in an example as {at}corpus: {corpus.texts}")
        if self.joined and corpus.texts == 1:
            raise ValueError(f"{at}sampling.joined=True joins two texts; {at}corpus has one, False leaves it alone")
        if valid is None and isinstance(corpus, Clozes) and len(set(corpus.words)) > 1:
            raise ValueError(
                f"{at}valid=None would ask for names that are trained on: {at}corpus.words={corpus.words} has a pair "
                "for each number, and a split parts them; give Clozes of other lines, or one number of words"
            )

    def shapes(self, corpus: Corpus, size: RowSize) -> dict[str, tuple[int, ...]]:
        found = super().shapes(corpus, size) | ({"parts": (size.tokens,)} if self.joined else {})
        if corpus.texts == 2 and not self.joined:
            found |= {"source": (size.window,), "source_segments": (size.window,)}
        return found

    def buckets(self, source: Source, size: RowSize) -> tuple[Source, ...]:
        return _buckets(source, max(1, min(self.n_buckets, source.n_examples)))

    def check_source(self, source: Source, size: RowSize) -> None:
        if not source.n_examples:
            raise InputError("no example")

    def count_cut(self, source: Source, size: RowSize) -> int:
        sizes = source.joined_sizes if self.joined else source.sizes
        room = np.array([size.tokens] if sizes.shape[1] == 1 else [size.window, size.tokens])
        return int((sizes > room).any(1).sum())

    def rows(self, source: Source, size: RowSize, key: Hashes, numbers: Hashes) -> Batch:
        count = np.uint64(source.n_examples)
        keys = mix(mix(key) + numbers // count)
        return self._examples(source, size, permuted(numbers % count, int(count), keys).astype(np.int64))

    def full_pass(self, source: Source, size: RowSize, batch_size: int, share: float = 1.0) -> Iterator[Batch]:
        for bucket in self.buckets(source, size):
            for numbers in _spread(bucket.n_examples, batch_size, share):
                yield self._examples(bucket, size, numbers)

    def _examples(self, source: Source, size: RowSize, numbers: NDArray[np.int64]) -> Batch:
        """The examples of these numbers; those past the last are padding."""
        batch: Batch = {}
        for name, width in self._widths(source, size).items():
            batch[name] = np.full((len(numbers), width), source.padding, np.int32)
            batch["segments" if name == "tokens" else f"{name}_segments"] = np.zeros_like(batch[name])
        if source.answers is not None:
            batch["weights"] = np.zeros_like(batch["tokens"])
        if self.joined:
            batch["parts"] = np.zeros_like(batch["tokens"])
        inside = numbers < source.n_examples
        join = lambda two: [np.concatenate([two[0], two[1][source.prefix :]])]
        for row, number in zip(np.flatnonzero(inside), numbers[inside], strict=True):
            texts = source.example(int(number))
            marks = [] if source.answers is None else source.example(int(number), source.answers)
            if self.joined and len(texts) == 2:
                batch["parts"][row, len(texts[0]) :] = 1
                texts, marks = join(texts), marks and join(marks)
            for name, text in zip(("tokens", "source"), reversed(texts), strict=False):
                text = text[: batch[name].shape[1]]
                batch[name][row, : len(text)] = text
                batch["segments" if name == "tokens" else f"{name}_segments"][row, : len(text)] = 1
            for mark in marks[-1:]:
                mark = mark[: batch["weights"].shape[1]]
                batch["weights"][row, : len(mark)] = mark
        for name, labels in source.labels.items():
            batch[f"labels_{name}"] = np.zeros((len(numbers), *labels.shape[1:]), np.int32)
            batch[f"labels_{name}"][inside] = labels[numbers[inside]]
        return batch

    def _widths(self, source: Source, size: RowSize) -> dict[str, int]:
        longest = source.longest[self.joined]
        if len(longest) == 1:
            return {"tokens": _rounded(longest[0], size.tokens)}
        return {"source": _rounded(longest[0], size.window), "tokens": _rounded(longest[1], size.tokens)}


def _spread(count: int, batch_size: int, share: float) -> Iterator[NDArray[np.int64]]:
    """The numbers 0 … count − 1, or a share of them in even distances but at least one, in batches; the last is filled
    up with `count`, past the end."""
    kept = min(count, max(1, int(count * share)))
    numbers = np.arange(kept) * count // max(kept, 1)
    for first in range(0, kept, batch_size):
        some = numbers[first : first + batch_size]
        yield np.pad(some, (0, batch_size - len(some)), constant_values=count)


def _rounded(size: int, most: int) -> int:
    return min(max(2, -(-size // 8) * 8), most)


@functools.lru_cache(maxsize=8)
def _buckets(source: Source, count: int) -> tuple[Source, ...]:
    order = np.argsort(source.sizes.sum(1), kind="stable")
    return tuple(source.pick(np.sort(part)) for part in np.array_split(order, count))


class PackedDocuments(Sampling):
    """Rows of whole documents beside each other, each a segment, in another order in every epoch: nothing is seen or
    predicted across a boundary.

    A document longer than a row is cut into rows; the pieces are packed best fit, the longest first
    (arXiv:2404.10830), so that next to nothing is padding. Each token of a document, but for the `lookahead` first, is
    asked for once per epoch.
    """

    whole_documents = True
    several = True

    def check_source(self, source: Source, size: RowSize) -> None:
        if not len(_plan(source, size).ends):
            raise InputError(f"{counted(len(source.tokens), 'token')}, of which no document has {size.lookahead + 1}")

    def rows(self, source: Source, size: RowSize, key: Hashes, numbers: Hashes) -> Batch:
        plan = _plan(source, size)
        n_rows = np.uint64(len(plan.ends))
        keys = mix(mix(key) + numbers // n_rows)
        return plan.batch(source, size, permuted(numbers % n_rows, int(n_rows), keys).astype(np.int64))

    def full_pass(self, source: Source, size: RowSize, batch_size: int, share: float = 1.0) -> Iterator[Batch]:
        plan = _plan(source, size)
        for rows in _spread(len(plan.ends), batch_size, share):
            yield plan.batch(source, size, rows)


class _Plan(NamedTuple):
    """Which pieces of documents stand in which row."""

    first: NDArray[np.int64]  # [pieces]: where each begins, row after row
    size: NDArray[np.int64]  # [pieces]: its tokens
    ends: NDArray[np.int64]  # [rows]: how many pieces stand in this row and those before

    def batch(self, source: Source, size: RowSize, rows: NDArray[np.int64]) -> Batch:
        """The rows of these numbers; those past the last are padding."""
        ids = np.full((len(rows), size.tokens), source.padding, np.int32)
        segments, weights = np.zeros_like(ids), np.zeros_like(ids)
        for i, row in enumerate(rows):
            at = 0
            pieces = range(self.ends[row - 1] if row else 0, self.ends[row]) if row < len(self.ends) else ()
            for number, piece in enumerate(pieces, 1):
                first, count = self.first[piece], self.size[piece]
                ids[i, at : at + count] = source.tokens[first : first + count]
                segments[i, at : at + count] = number
                if source.answers is not None:
                    weights[i, at : at + count] = source.answers[first : first + count]
                at += count
        found = {"tokens": ids, "segments": segments}
        return found if source.answers is None else found | {"weights": weights}


@functools.lru_cache(maxsize=64)
def _plan(source: Source, size: RowSize) -> _Plan:
    sizes = source.ends - source.starts
    starts, sizes = source.starts[sizes > size.lookahead], sizes[sizes > size.lookahead]
    n_pieces = -(-(sizes - size.lookahead) // size.window)  # neighbours share the tokens that one of them asks for
    place = np.arange(n_pieces.sum()) - np.repeat(np.cumsum(n_pieces) - n_pieces, n_pieces)
    first = np.repeat(starts, n_pieces) + place * size.window
    counts = np.minimum(np.repeat(sizes, n_pieces) - place * size.window, size.tokens)
    row = pack(counts, size.tokens)
    order = np.argsort(row, kind="stable")
    return _Plan(first[order], counts[order], np.cumsum(np.bincount(row)))


def pack(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The row of each piece: the longest first, each in the fullest row that has room, else in a new one."""
    row, n_rows = np.zeros(len(sizes), np.int64), 0
    order = np.argsort(-sizes, kind="stable")
    room: dict[int, list[NDArray[np.int64]]] = {}  # rows that have just so much room
    rooms: list[int] = []  # the keys of `room`, rising

    def fill(pieces: NDArray[np.int64], size: int, rows: NDArray[np.int64], space: int) -> NDArray[np.int64]:
        """Fills one row after another with pieces of a size; returns those that are left over."""
        per_row = space // size
        here, over = pieces[: per_row * len(rows)], pieces[per_row * len(rows) :]
        row[here] = rows[np.arange(len(here)) // per_row]
        full, rest = divmod(len(here), per_row)
        leave(rows[:full], space - per_row * size)
        leave(rows[full : full + 1], space - rest * size)
        leave(rows[full + 1 :], space)
        return over

    def leave(rows: NDArray[np.int64], space: int) -> None:
        if space and len(rows):
            if space not in room:
                bisect.insort(rooms, space)
            room.setdefault(space, []).append(rows)

    for pieces in np.split(order, np.flatnonzero(np.diff(sizes[order])) + 1) if len(order) else []:
        size = int(sizes[pieces[0]])
        while len(pieces) and (at := bisect.bisect_left(rooms, size)) < len(rooms):
            space = rooms.pop(at)
            pieces = fill(pieces, size, np.concatenate(room.pop(space)), space)
        new = -(-len(pieces) // (capacity // size))
        fill(pieces, size, np.arange(n_rows, n_rows + new), capacity)
        n_rows += new
    return row


# --- mixtures


@dataclasses.dataclass(frozen=True)
class Batches:
    """The batches of a run, over one source or a mixture of several."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]  # each source's share of the rows
    sampling: Sampling
    size: RowSize
    batch_size: int
    seed: int

    def at(self, step: int, rows: NDArray[np.integer] | None = None) -> Batch:
        """The batch of a step, or some of its rows; row r of a step is the same whichever others are asked for."""
        rows = np.arange(self.batch_size) if rows is None else rows
        buckets = self._buckets
        if len(buckets) > 1:
            return self._of_bucket(buckets, step, rows)
        numbers = (int(step) * self.batch_size + rows.astype(np.int64)).astype(np.uint64)
        whose, counts = _turns(self.weights)
        turn = (numbers % np.uint64(len(whose))).astype(np.int64)
        parts: list[tuple[NDArray[np.bool_], Batch]] = []
        for i, source in enumerate(self.sources):
            here = whose[turn] == i
            if here.any():
                own = numbers[here] // np.uint64(len(whose)) * counts[i, -1] + counts[i, turn[here]]
                parts.append((here, self.sampling.rows(source, self.size, self._key(i), own)))
        if any(source.answers is not None for source in self.sources):  # all of text that is no dialogue is learned
            parts = [(here, {"weights": np.ones_like(part["tokens"])} | part) for here, part in parts]
        batch = {name: np.empty((len(rows), *a.shape[1:]), a.dtype) for name, a in parts[0][1].items()}
        for here, part in parts:
            for name, array in part.items():
                batch[name][here] = array
        return batch

    def same_shapes(self, step: int) -> int:
        """How many batches from this step on have the same shapes."""
        every = self.sampling.bucket_steps
        return every - step % every if len(self._buckets) > 1 else 1 << 31

    @property
    def _buckets(self) -> tuple[Source, ...]:
        return self.sampling.buckets(self.sources[0], self.size)

    def _of_bucket(self, buckets: tuple[Source, ...], step: int, rows: NDArray[np.integer]) -> Batch:
        """A batch of the bucket whose turn it is; each has as many as its share of the examples."""
        turn, place = divmod(int(step), self.sampling.bucket_steps)
        whose, counts = _turns(tuple(bucket.n_examples for bucket in buckets))
        round_, turn = divmod(turn, len(whose))
        i = int(whose[turn])
        own = (round_ * int(counts[i, -1]) + int(counts[i, turn])) * self.sampling.bucket_steps + place
        numbers = (own * self.batch_size + rows.astype(np.int64)).astype(np.uint64)
        return self.sampling.rows(buckets[i], self.size, self._key(i), numbers)

    def _key(self, number: int) -> Hashes:
        """That of a source, or of a bucket."""
        return mix(mix(np.array([self.seed], np.uint64)) + np.uint64(number))


@functools.lru_cache(maxsize=16)
def _turns(weights: tuple[float, ...], period: int = PERIOD) -> tuple[NDArray[np.int64], Hashes]:
    """Whose turn each row of a period is, and how many rows each source had before each of them (and in all).

    At every row each source has had its share to within one row: of those that would not overtake their share, the
    one whose next row falls due first has its turn (proportionate progress, doi:10.1007/BF01940883).
    """
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.array([[0, 1]], np.uint64)
    exact = np.array(weights) / sum(weights) * period
    quota = np.floor(exact + 1e-9).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: period - quota.sum()]] += 1
    whose, counts = np.zeros(period, np.int64), np.zeros((len(weights), period + 1), np.uint64)
    taken = np.zeros(len(weights), np.int64)
    for n in range(period):
        due = -(-(taken + 1) * period // np.maximum(quota, 1))
        whose[n] = np.where(taken * period < quota * (n + 1), due, 2 * period).argmin()
        taken[whose[n]] += 1
        counts[:, n + 1] = taken
    return whose, counts
