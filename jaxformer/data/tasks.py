"""Synthetic tasks: pairs of texts that follow a rule, for a model that should find it."""

import functools
from collections.abc import Iterator

import numpy as np

from jaxformer.data.corpora import Corpus, Piece, cut, name_class
from jaxformer.data.hashes import Hashes, mix, permuted
from jaxformer.spec import InputError

SYMBOLS = "0123456789abcdefghijklmnopqrstuvwxyz"


class Copy(Corpus):
    """Symbols, and the same again; also the base of all tasks.

    Example i depends on `seed` and i alone, so that more examples leave the first ones as they were.
    """

    length: int = 10  # symbols in the first text, at most
    shortest: int | None = None  # fewest symbols, each length as often; None: all have `length`
    symbols: int = 10  # how many different symbols there are: 0 to 9, then a to z
    examples: int = 10_000  # how many examples there are
    seed: int = 0  # another seed gives other examples

    texts = 2
    aligned = True

    @property
    def least(self) -> int:
        """The fewest symbols of a first text."""
        return self.length if self.shortest is None else self.shortest

    @functools.cached_property
    def hashed(self) -> Hashes:
        """uint64[1]: what the draws of every example begin with."""
        return mix(mix(np.array([self.seed], np.uint64)))

    def check(self, at: str = "") -> None:
        if not 1 <= self.least <= self.length:
            raise ValueError(f"{at}shortest={self.shortest} must lie between 1 and {at}length={self.length}")
        if not 1 <= self.symbols <= len(SYMBOLS):
            raise ValueError(f"{at}symbols={self.symbols} must lie between 1 and {len(SYMBOLS)}")
        if self.examples < 2:
            raise ValueError(f"{at}examples={self.examples} must be at least 2, one to train on and one to validate")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"{at}seed={self.seed} must be at least 0 and less than 2**32")

    def documents(self) -> Iterator[str]:
        for source, target in self.pairs():
            yield source
            yield target

    def pieces(self) -> Iterator[Piece]:
        for number, document in enumerate(self.documents()):
            yield from cut([document], ("example", number // 2 + 1))

    def pairs(self) -> Iterator[tuple[str, str]]:
        """First and second text of each example."""
        for number in self.blocks():
            draws = mix(mix(self.hashed + number)[:, None] + np.arange(self.length + 1, dtype=np.uint64))
            lengths = self.least + (draws[:, 0] % np.uint64(self.length + 1 - self.least)).astype(int)
            for row, length in zip(draws[:, 1:], lengths, strict=True):
                text = self.drawn(row[:length])
                yield text, self.answer(text)

    def blocks(self) -> Iterator[Hashes]:
        """The numbers of the examples, in blocks that are hashed together."""
        for first in range(0, self.examples, 4096):
            yield np.arange(first, min(first + 4096, self.examples), dtype=np.uint64)

    def drawn(self, numbers: np.ndarray) -> str:
        """The first text, from a random number uint64 for each of its symbols."""
        return "".join(SYMBOLS[i] for i in numbers % np.uint64(self.symbols))

    def answer(self, text: str) -> str:
        return text

    def at(self, path: str) -> Corpus:
        more = " --data.corpus.text=COLUMN --data.corpus.target=COLUMN"
        raise InputError(f"{type(self).__name__} is made up; {name_class(path, 'data.corpus=Table', more)}")


class Reverse(Copy):
    """Symbols, and the same from the last to the first."""

    def answer(self, text: str) -> str:
        return text[::-1]


class Sort(Copy):
    """Symbols, and the same in their order."""

    def answer(self, text: str) -> str:
        return "".join(sorted(text))


class Alternating(Copy):
    """1 0 1 0 … or 0 1 0 1 …, and what each symbol is followed by: the same shifted by one."""

    symbols: int = 2

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.symbols != 2 or self.seed:
            raise ValueError(
                f"{at}symbols={self.symbols} and {at}seed={self.seed} must be 2 and 0, as there are two such texts of "
                "each length; leave them out"
            )

    def pairs(self) -> Iterator[tuple[str, str]]:
        for i in range(self.examples):
            text = "".join(SYMBOLS[(i + j + 1) % 2] for j in range(self.length + 1))
            length = self.least + i // 2 % (self.length + 1 - self.least)
            yield text[:length], text[1 : length + 1]


class Translation(Copy):
    """Sentences of a made-up language, as "the old cat sees the big red dog", and what they are in another one.

    Each word has its translation but the article, which is that of its noun's gender; and adjectives stand behind
    their noun, not before it. The dictionary is always the same, so that another seed has other sentences alone.
    """

    length: int = 9  # words of a sentence, at most: two articles, two nouns, a verb, adjectives
    shortest: int | None = 6  # fewest words, each number as often; None: all sentences have `length`
    symbols: int = 36  # how many nouns there are, how many adjectives, and how many verbs

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.least < 5:
            field = "length" if self.shortest is None else "shortest"
            raise ValueError(f"{at}{field}={self.least} must be at least 5: two articles, two nouns and a verb")

    def pairs(self) -> Iterator[tuple[str, str]]:
        for i in range(self.examples):
            draws = mix(mix(self.hashed + np.uint64(i)) + np.arange(self.length, dtype=np.uint64)).tolist()
            adjectives = self.least - 5 + draws[0] % (self.length + 1 - self.least)
            first = draws[1] % (adjectives + 1)
            words = [number % self.symbols for number in draws[2 : 5 + adjectives]]
            parts = self.phrase(words[1 : 2 + first]), dictionary("verbs")[words[0]], self.phrase(words[2 + first :])
            source, target = (" ".join(texts) for texts in zip(*parts, strict=True))
            yield source, target

    @staticmethod
    def phrase(words: list[int]) -> tuple[str, str]:
        """An article, adjectives and a noun, given by their numbers, the noun's first: in both languages."""
        noun, said = dictionary("nouns")[words[0]]
        adjectives = [dictionary("adjectives")[i] for i in words[1:]]
        source = [ARTICLE, *(word for word, _ in adjectives), noun]
        target = [ARTICLES[words[0] % len(ARTICLES)], said, *(word for _, word in adjectives)]
        return " ".join(source), " ".join(target)


ARTICLE, ARTICLES = "ta", ("el", "un")  # of the first language; of the second, for nouns of even and of odd numbers
KINDS = "nouns", "adjectives", "verbs"


@functools.cache
def dictionary(kind: str) -> list[tuple[str, str]]:
    """The words of a kind in both languages: two syllables, in the second language an s behind them."""
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    count, n = len(SYMBOLS), len(syllables)
    numbers = np.arange(2 * count, dtype=np.uint64) + np.uint64(2 * count * KINDS.index(kind))
    words = [syllables[i // n] + syllables[i % n] for i in permuted(numbers, n * n, np.array([0], np.uint64)).tolist()]
    return [(word, said + "s") for word, said in zip(words[:count], words[count:], strict=True)]


class Addition(Copy):
    """Two numbers of `length` digits at most, as "12+345", and their sum.

    No two examples have the same numbers, until there are no others left.
    """

    length: int = 3  # digits of a number, at most
    shortest: int | None = None  # fewest digits of a number, all numbers as often; None: 1

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.symbols != 10:
            raise ValueError(f"{at}symbols={self.symbols} must be 10, the digits")
        if self.length > 18:
            raise ValueError(f"{at}length={self.length} must be at most 18 digits")

    def pairs(self) -> Iterator[tuple[str, str]]:
        least = 0 if self.shortest in (None, 1) else 10 ** (int(self.shortest or 1) - 1)
        n = 10**self.length - least
        keys = mix(self.hashed + np.arange(2, dtype=np.uint64)[:, None])
        for number in self.blocks():
            turn, place = np.divmod(number, np.uint64(n))  # in each of n turns a place has another second number
            places = place, (place + turn) % np.uint64(n)
            drawn = (permuted(x, n, key).tolist() for x, key in zip(places, keys, strict=True))
            for a, b in zip(*drawn, strict=True):
                yield f"{a + least}+{b + least}", str(a + b + 2 * least)


class Recall(Copy):
    """A symbol, then noise of other symbols, and the first symbol again. It stood as many places back as the first text
    has symbols."""

    length: int = 100
    shortest: int | None = 1

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.symbols >= len(SYMBOLS):
            raise ValueError(f"{at}symbols={self.symbols} must be less than {len(SYMBOLS)}: the others are the noise")

    def drawn(self, numbers: np.ndarray) -> str:
        noise = SYMBOLS[self.symbols :]
        first = SYMBOLS[int(numbers[0] % np.uint64(self.symbols))]
        return first + "".join(noise[i] for i in numbers[1:] % np.uint64(len(noise)))

    def answer(self, text: str) -> str:
        return text[0]
