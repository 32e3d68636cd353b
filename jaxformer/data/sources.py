"""Documents as ids: what batches are drawn from, and how they are split."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxformer.data.hashes import mix
from jaxformer.spec import InputError

Tokens = NDArray[np.unsignedinteger]


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """Documents as ids, one after another."""

    tokens: Tokens  # [N]
    starts: NDArray[np.int64]  # [documents]: where each begins
    padding: int = 0  # the id that fills rows
    shared: int = 0  # tokens of a document that are the next one's as well: 1 where its end is the other's start
    sha256: str = ""  # of the ids, before any split
    prefix: int = 0  # ids before each document
    texts: int = 1  # documents that make an example
    examples: bool = False  # rows are made of these, not of the text as a whole
    labels: Mapping[str, NDArray[np.int32]] = dataclasses.field(default_factory=dict)  # column -> [examples, ...]
    picked: NDArray[np.int64] | None = None  # where documents end, if not all of them are there
    answers: NDArray[np.uint8] | None = None  # [N]: 1 of tokens that are to be predicted, else 0; None: all are

    @property
    def ends(self) -> NDArray[np.int64]:
        """[documents]: where each ends."""
        if self.picked is not None:
            return self.picked
        return np.append(self.starts[1:], len(self.tokens) - self.shared)[: len(self.starts)] + self.shared

    @functools.cached_property
    def sizes(self) -> NDArray[np.int64]:
        """[examples, texts]: how many tokens each has."""
        return (self.ends - self.starts).reshape(-1, self.texts)

    @functools.cached_property
    def joined_sizes(self) -> NDArray[np.int64]:
        """[examples, 1]: those of all texts in one row, without what stands before the later ones."""
        return self.sizes.sum(1, keepdims=True) - self.prefix * (self.texts - 1)

    @functools.cached_property
    def longest(self) -> dict[bool, list[int]]:
        """The size of the longest of each of an example's texts (False), or of all in one row (True)."""
        most = lambda sizes: sizes.max(0, initial=0).tolist()
        return {False: most(self.sizes), True: most(self.joined_sizes)}

    @property
    def n_examples(self) -> int:
        return len(self.starts) // self.texts

    @property
    def n_tokens(self) -> int:
        return len(self.tokens) if self.picked is None else int(self.sizes.sum())

    def example(self, number: int, of: NDArray[Any] | None = None) -> list[NDArray[Any]]:
        """The texts of an example; or what they have of another array of all tokens, as `answers`."""
        values, first = self.tokens if of is None else of, number * self.texts
        starts, sizes = self.starts[first : first + self.texts], self.sizes[number]
        return [values[start : start + size] for start, size in zip(starts, sizes, strict=True)]

    def pick(self, numbers: NDArray[np.int64]) -> "Source":
        """The examples of these numbers alone."""
        documents = (numbers[:, None] * self.texts + np.arange(self.texts)).ravel()
        labels = {name: values[numbers] for name, values in self.labels.items()}
        return dataclasses.replace(
            self, starts=np.asarray(self.starts)[documents], picked=self.ends[documents], labels=labels
        )

    def split(self, valid_fraction: float, seed: int | None = None) -> "tuple[Source, Source]":
        """Two parts, the second of which is `valid_fraction` of the whole: of the tokens, from the end.

        With a seed, documents or examples that are drawn, of each class of the first column as many as are its share;
        of few documents, of which that is less than one, the end all the same. Without a seed the last examples.
        """
        several = self.n_examples > 1 and round(valid_fraction * self.n_examples) > 0
        if self.examples or (seed is not None and several):
            return self._split_examples(valid_fraction, seed)
        at = int((1 - valid_fraction) * len(self.tokens))
        first, last = (int(np.searchsorted(self.starts, at, side)) for side in ("left", "right"))
        rest = self.starts[last:] - at
        if at < len(self.tokens):
            rest = np.concatenate([np.zeros(1, np.int64), rest])  # the document that is cut continues
        here, there = (None, None) if self.answers is None else (self.answers[:at], self.answers[at:])
        one = dataclasses.replace(self, tokens=self.tokens[:at], starts=self.starts[:first], answers=here)
        return one, dataclasses.replace(self, tokens=self.tokens[at:], starts=rest, answers=there)

    def _split_examples(self, valid_fraction: float, seed: int | None) -> "tuple[Source, Source]":
        numbers = np.arange(self.n_examples)
        count = min(max(1, round(valid_fraction * len(numbers))), max(len(numbers) - 1, 0))
        if seed is None:
            chosen = numbers[len(numbers) - count :]
        else:
            order = np.argsort(mix(mix(np.array([seed], np.uint64)) + numbers.astype(np.uint64)))
            for labels in list(self.labels.values())[:1]:  # class after class, from which evenly many are taken
                _, stratum = np.unique(labels, axis=0, return_inverse=True)
                order = order[np.argsort(stratum.ravel()[order], kind="stable")]
            chosen = order[((np.arange(count) + 0.5) * len(numbers) / max(count, 1)).astype(np.int64)]
        valid = np.zeros(len(numbers), bool)
        valid[chosen] = True
        return self.pick(numbers[~valid]), self.pick(numbers[valid])


def check_ids(ids: NDArray[Any], vocab_size: int | None) -> None:
    """Raises InputError for an id that the model has no row for: JAX would take another row without a word."""
    if vocab_size is not None and ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        wrong = ids.max() if ids.max() >= vocab_size else ids.min()
        raise InputError(
            f"token id {wrong} must be at least 0 and less than vocab_size={vocab_size}; encode anew, or set "
            "the vocab_size of data.tokenizer"
        )
