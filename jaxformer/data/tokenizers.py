"""Tokenizers: text to ids and back. A fitted tokenizer is a spec like any other, stored as tokenizer.json of a run."""

from collections.abc import Iterable
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxformer.spec import InputError, Spec

T = TypeVar("T", bound="Bytes")


class Bytes(Spec):
    """The bytes of UTF-8, 256 ids; also the base of all tokenizers."""

    @property
    def vocab_size(self) -> int | None:
        """The number of ids; None while it depends on a corpus not yet seen."""
        return 256

    @property
    def start(self) -> int:
        """The id at which sampling without a prompt begins: a line break."""
        return ord("\n")

    def fit(self: T, documents: Iterable[str]) -> T:
        """The tokenizer with whatever it learns from text."""
        return self

    def encode(self, text: str) -> NDArray[np.uint32]:
        """Ids of the text. Raises InputError for a character that the tokenizer does not know."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD."""
        return np.asarray(ids, np.uint8).tobytes().decode("utf-8", "replace")

    def byte_lengths(self) -> NDArray[np.int64]:
        """How many bytes of UTF-8 each id stands for: [V]. Bits per byte compare tokenizers, nats per token do not."""
        return np.ones(256, np.int64)


class Characters(Bytes):
    """One id for each character of the corpus, in the order of their code points."""

    alphabet: str | None = None  # None: found in the corpus

    def check(self, at: str = "") -> None:
        if self.alphabet is not None and (not self.alphabet or list(self.alphabet) != sorted(set(self.alphabet))):
            raise ValueError(
                f"{at}alphabet={self.alphabet[:40]!r} must be distinct characters in the order of their code points; "
                "None takes those of the corpus"
            )

    @property
    def vocab_size(self) -> int | None:
        return None if self.alphabet is None else len(self.alphabet)

    @property
    def start(self) -> int:
        """A line break, or the first character if the corpus has none."""
        return max(0, self._fitted().find("\n"))

    def fit(self, documents: Iterable[str]) -> "Characters":
        if self.alphabet is not None:
            return self
        seen: set[str] = set()
        for document in documents:
            seen.update(document)
        return Characters("".join(sorted(seen)) or None)

    def encode(self, text: str) -> NDArray[np.uint32]:
        known, points = _code_points(self._fitted()), _code_points(text)
        ids = np.minimum(np.searchsorted(known, points), len(known) - 1)
        wrong = np.flatnonzero(known[ids] != points)
        if len(wrong):
            at = int(wrong[0])
            raise InputError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at place {at + 1} of the text is not among the "
                f"{len(known)} that the tokenizer knows; remove it"
            )
        return ids.astype(np.uint32)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return _code_points(self._fitted())[np.asarray(ids, np.int64)].tobytes().decode("utf-32-le", "surrogatepass")

    def byte_lengths(self) -> NDArray[np.int64]:
        return np.array([len(c.encode("utf-8", "surrogatepass")) for c in self._fitted()], np.int64)

    def _fitted(self) -> str:
        if self.alphabet is None:
            raise InputError("tokenizer.alphabet=None must be fitted to a corpus first; call fit")
        return self.alphabet


def _code_points(text: str) -> NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
