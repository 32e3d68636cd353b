"""Tokenizers: text to ids and back. A fitted tokenizer is a spec like any other, stored as tokenizer.json of a run."""

import abc
import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from jaxformer.data.corpora import Piece
from jaxformer.data.definitions import (
    NAMED,
    Ids,
    canonical,
    check_lost,
    deciding,
    encoded,
    is_special,
    library_of,
    refuse_special,
    special_ids,
    special_tokens,
    whole,
)
from jaxformer.data.files import located, read_json
from jaxformer.spec import InputError, Spec, from_json


class Unknown(InputError):
    """Text has characters that the tokenizer does not know; each is named, with the place where it first stands."""

    def __init__(self, places: Mapping[str, str]) -> None:
        named = [f"{c!r} (U+{ord(c):04X}, {place})" for c, place in itertools.islice(places.items(), NAMED)]
        more = f" and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
        what, are, them = ("character", "is", "it") if len(places) == 1 else ("characters", "are", "them")
        super().__init__(
            f"{what} {', '.join(named)}{more} {are} not known to the tokenizer; remove {them}, or train with "
            "data.tokenizer=Bytes or BPE, which know every character, or with data.tokenizer.unknown_token=true"
        )


class Tokenizer(Spec):
    """Text to ids and back."""

    piecewise = True  # the ids of a document are those of its pieces, one after another

    @property
    def learns(self) -> bool:
        """Whether `fit` reads the corpus."""
        return False

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int | None:
        """The number of ids; None while it depends on a corpus not yet seen."""

    @property
    @abc.abstractmethod
    def start(self) -> int:
        """The id at which a text without a prompt begins."""

    @property
    def end(self) -> int | None:
        """The id that ends each document, and each sample; None if there is none."""
        return None

    @property
    def padding(self) -> int:
        """The id that fills rows. Segments hide it from the model."""
        return 0 if self.end is None else self.end

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        """The ids that stand for no text, by what they are for; none where there is no such id."""
        end = () if self.end is None else (self.end,)
        return {"start": end and (self.start,), "end": end, "padding": (), "mask": (), "sentinels": ()}

    @property
    def special_tokens(self) -> dict[str, int]:
        """Special ids by the names under which chat templates know them."""
        return {} if self.end is None else {END_OF_TEXT: self.end}

    @property
    def added_tokens(self) -> dict[str, int]:
        """Ids that are no special ones, by the names by which they are found in any text before it is split."""
        return {}

    @property
    def chat_template(self) -> str | None:
        """Jinja2 that writes dialogues, as a published model has one; None: it has none."""
        return None

    @property
    def prefix(self) -> tuple[int, ...]:
        """The ids that stand before each document, and before a prompt: the start, if documents have an end."""
        return () if self.end is None else (self.start,)

    @property
    def suffix(self) -> tuple[int, ...]:
        """The ids that stand after each document; none where the start of the next is the end."""
        return () if self.end is None or self.end == self.start else (self.end,)

    def fit(self, texts: Iterable[str]) -> "Tokenizer":
        """The tokenizer with whatever it learns from text, which may be read twice."""
        return self

    def same_ids(self, other: "Tokenizer") -> bool:
        """Whether text has the same ids in the other tokenizer, names of special tokens aside."""
        return self == other

    def document(self, text: str) -> list[int]:
        """The ids of a text by itself, from its start to its end, if it has these."""
        return [*self.prefix, *self.encode(text).tolist(), *(() if self.end is None else (self.end,))]

    @abc.abstractmethod
    def encode(self, text: str) -> Ids:
        """Ids of the text, special ones never. Raises InputError for text that the tokenizer cannot encode."""

    def encode_within(self, text: str, first: int, last: int, special: bool) -> Ids:
        """Ids of a stretch of a text in which special tokens stand by their names; `special`: it is one of them."""
        stretch = text[first:last]
        return np.array([self.special_tokens[stretch]], np.uint32) if special else self.encode(stretch)

    def unknown(self, text: str) -> dict[str, int]:
        """The characters for which `encode` raises Unknown, in the text's order, and where each first stands."""
        return {}

    @abc.abstractmethod
    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        """Text of the ids; special ones have none, and bytes that are no UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def byte_lengths(self) -> NDArray[np.int64] | None:
        """How many bytes of UTF-8 each id stands for, [V]; None if ids do not say, as that of an unknown word.

        Bits per byte compare tokenizers, nats per token do not.
        """

    def _unfitted(self, *_: Any, **__: Any) -> NoReturn:
        raise InputError(f"data.tokenizer={type(self).__name__} must be fitted to a corpus first; call fit")


class Unfitted(Tokenizer):
    """What `fit` makes a tokenizer of another class from: it has no ids yet."""

    @property
    def start(self) -> int:
        self._unfitted()

    encode = decode = byte_lengths = Tokenizer._unfitted


# --- ids alone


class NoTokenizer(Tokenizer):
    """Ids that stand for no known text, as those of a `TokenFile`.

    As text they are numbers: "464 262".
    """

    vocab_size: int = 0  # how many ids there are, such as GPT-2's 50257  # pyright: ignore
    end_id: int | None = None  # that ends each document, as GPT-2's 50256; None if there is none

    def check(self, at: str = "") -> None:
        if not 1 <= self.vocab_size <= 1 << 32:
            raise ValueError(f"{at}vocab_size={self.vocab_size} must be at least 1, at most 2**32; GPT-2's is 50257")
        if self.end_id is not None and not 0 <= self.end_id < self.vocab_size:
            raise ValueError(f"{at}end_id={self.end_id} must be less than {at}vocab_size={self.vocab_size}, or None")

    @property
    def start(self) -> int:
        """The end or, without one, 0."""
        return self.end_id or 0

    @property
    def end(self) -> int | None:
        return self.end_id

    def encode(self, text: str) -> Ids:
        for word in text.split():
            if not (word.isascii() and word.isdecimal() and len(word) < 12 and int(word) < self.vocab_size):
                raise InputError(
                    f"{word!r} is not an id: data.tokenizer=NoTokenizer reads numbers less than {self.vocab_size}, "
                    "such as '464 262', and no text; give those, or train with data.tokenizer=TokenizerFile, which "
                    "reads text"
                )
        return np.array(text.split(), np.uint32)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return " ".join(str(i) for i in np.asarray(ids, np.int64).tolist() if i != self.end_id)

    def byte_lengths(self) -> None:
        return None


# --- bytes and characters


class Plain(Tokenizer):
    """Ids of bytes or characters, and behind them special ones: the base of both."""

    end_token: bool = dataclasses.field(default=False, kw_only=True)  # adds an id that begins and ends each document
    mask_token: bool = dataclasses.field(default=False, kw_only=True)  # adds an id that hides tokens (for Masked)
    sentinels: int = dataclasses.field(default=0, kw_only=True)  # ids for missing spans (for SpanCorruption)

    def check(self, at: str = "") -> None:
        if self.sentinels < 0:
            raise ValueError(f"{at}sentinels={self.sentinels} must be at least 0; 100 is usual")

    @property
    @abc.abstractmethod
    def n_ordinary(self) -> int:
        """How many ids stand for text."""

    @property
    def n_special(self) -> int:
        return self.end_token + self.mask_token + self.sentinels

    @property
    def vocab_size(self) -> int | None:
        return self.n_ordinary + self.n_special

    @property
    def end(self) -> int | None:
        return self.n_ordinary if self.end_token else None

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        first = self.n_ordinary + self.end_token
        mask = (first,) if self.mask_token else ()
        first += len(mask)
        return super().special | {"mask": mask, "sentinels": tuple(range(first, first + self.sentinels))}


class Bytes(Plain):
    """The bytes of UTF-8, 256 ids."""

    @property
    def n_ordinary(self) -> int:
        return 256

    @property
    def start(self) -> int:
        """The end token or, without one, a line break."""
        return ord("\n") if self.end is None else self.end

    def encode(self, text: str) -> Ids:
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        found = np.asarray(ids, np.int64)
        return found[found < 256].astype(np.uint8).tobytes().decode("utf-8", "replace")

    def byte_lengths(self) -> NDArray[np.int64]:
        return np.array([1] * 256 + [0] * self.n_special, np.int64)


class Characters(Plain):
    """One id for each character of the corpus, in the order of their code points."""

    alphabet: str | None = None  # the characters that it knows; None: those of the corpus
    unknown_token: bool = dataclasses.field(default=False, kw_only=True)  # adds an id for all other characters

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.alphabet is not None and (not self.alphabet or list(self.alphabet) != sorted(set(self.alphabet))):
            raise ValueError(
                f"{at}alphabet={self.alphabet[:40]!r} must be distinct characters in the order of their code points; "
                "None takes those of the corpus"
            )

    @property
    def learns(self) -> bool:
        return self.alphabet is None

    @property
    def vocab_size(self) -> int | None:
        return None if self.alphabet is None else super().vocab_size

    @property
    def n_ordinary(self) -> int:
        return len(self._fitted())

    @property
    def n_special(self) -> int:
        return super().n_special + self.unknown_token

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        return super().special | ({"others": (self._unknown_id,)} if self.unknown_token else {})

    @property
    def _unknown_id(self) -> int:
        """Behind the other special ids."""
        return self.n_ordinary + self.n_special - 1

    @property
    def start(self) -> int:
        """The end token or, without one, a line break, or the first character if the corpus has none."""
        return max(0, self._fitted().find("\n")) if self.end is None else self.end

    def fit(self, texts: Iterable[str]) -> "Characters":
        if not self.learns:
            return self
        seen = np.zeros(0x110000, bool)
        for text in texts:
            seen[_code_points(text)] = True
        found = np.flatnonzero(seen).astype(np.uint32).tobytes().decode("utf-32-le", "surrogatepass")
        if not found:
            raise InputError("data.tokenizer=Characters: the corpus is empty; give one with text in it")
        return dataclasses.replace(self, alphabet=found)

    def encode(self, text: str) -> Ids:
        known, points = _id_of_each_code_point(self._fitted()), _code_points(text)
        ids = known[np.minimum(points, len(known) - 1)]
        wrong = ids == len(known)
        if not wrong.any():
            return ids
        if not self.unknown_token:
            raise Unknown({c: Piece(text, True).place(at) for c, at in self.unknown(text).items()})
        return np.where(wrong, np.uint32(self._unknown_id), ids)

    def unknown(self, text: str) -> dict[str, int]:
        if self.unknown_token:
            return {}
        known, points = _id_of_each_code_point(self._fitted()), _code_points(text)
        wrong = np.flatnonzero(known[np.minimum(points, len(known) - 1)] == len(known))
        _, first = np.unique(points[wrong], return_index=True)
        return {text[at]: at for at in np.sort(wrong[first]).tolist()}

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        found, known = np.asarray(ids, np.int64), _code_points(self._fitted())
        if self.unknown_token:
            known = np.append(known, np.full(self.n_special, ord("\ufffd"), np.uint32))
            found = found[(found < self.n_ordinary) | (found == self._unknown_id)]
        return known[found[found < len(known)]].tobytes().decode("utf-32-le", "surrogatepass")

    def byte_lengths(self) -> NDArray[np.int64] | None:
        if self.unknown_token:
            return None
        lengths = [len(c.encode("utf-8", "surrogatepass")) for c in self._fitted()]
        return np.array(lengths + [0] * self.n_special, np.int64)

    def _fitted(self) -> str:
        if self.alphabet is None:
            self._unfitted()
        return self.alphabet


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


@functools.lru_cache(maxsize=4)
def _id_of_each_code_point(alphabet: str) -> Ids:
    """[largest code point + 2]; its own length stands for characters that the alphabet lacks."""
    points = _code_points(alphabet)
    table = np.full(int(points[-1]) + 2, int(points[-1]) + 2, np.uint32)
    table[points] = np.arange(len(points), dtype=np.uint32)
    return table


# --- of the library `tokenizers`


class Subwords(Tokenizer):
    """What the library `tokenizers` makes of a definition in its own format; fitted, or read from a file."""

    definition: str  # JSON
    size: int  # ids, some of which may never occur
    start_token: str
    end_token: str | None = None
    padding_token: str | None = None
    mask_token: str | None = None
    sentinel_tokens: tuple[str, ...] = ()
    chat_template: str | None = None  # pyright: ignore[reportIncompatibleMethodOverride]

    def check(self, at: str = "") -> None:
        try:
            library = library_of(self.definition)
        except InputError:
            raise
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{at}definition is none that the library tokenizers can read ({error})") from None
        if self.size < library.get_vocab_size():
            raise ValueError(f"{at}size={self.size} must be at least {library.get_vocab_size()}, the tokens defined")
        special = special_ids(library)
        for name in ("start_token", "end_token", "padding_token", "mask_token", "sentinel_tokens"):
            token = getattr(self, name)
            for one in token if isinstance(token, tuple) else (token,):
                if one is not None and library.token_to_id(one) not in special:
                    raise ValueError(
                        f"{at}{name}={one!r} must be a special token of the tokenizer; None if it has none"
                    )

    @property
    def piecewise(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether words are split as in GPT-2, with nothing before the text and no normal form."""
        parts = json.loads(self.definition)
        splits = parts.get("pre_tokenizer") or {}
        if splits.get("type") != "ByteLevel" or not splits.get("use_regex", True):  # else tokens go across spaces
            return False
        return not splits.get("add_prefix_space") and not parts.get("normalizer")

    @property
    def vocab_size(self) -> int:
        return self.size

    @property
    def start(self) -> int:
        return library_of(self.definition).token_to_id(self.start_token)

    @property
    def end(self) -> int | None:
        return None if self.end_token is None else library_of(self.definition).token_to_id(self.end_token)

    @property
    def padding(self) -> int:
        if self.padding_token is None:
            return super().padding
        return library_of(self.definition).token_to_id(self.padding_token)

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        named = {"start": self.start_token, "end": self.end_token, "padding": self.padding_token}
        names = {name: () if token is None else (token,) for name, token in named.items()}
        names |= {"mask": () if self.mask_token is None else (self.mask_token,), "sentinels": self.sentinel_tokens}
        library = library_of(self.definition)
        found = {name: tuple(library.token_to_id(token) for token in tokens) for name, tokens in names.items()}
        rest = special_ids(library) - {i for ids in found.values() for i in ids}
        return found | {"others": tuple(sorted(rest))}

    @property
    def special_tokens(self) -> dict[str, int]:
        return special_tokens(self.definition)

    @property
    def added_tokens(self) -> dict[str, int]:
        found = library_of(self.definition).get_added_tokens_decoder()
        return {token.content: i for i, token in found.items() if not token.special}

    def same_ids(self, other: Tokenizer) -> bool:
        """Whatever is put around a text, or writes dialogues, and whichever of its tokens are special."""
        return isinstance(other, Subwords) and deciding(self.definition) == deciding(other.definition)

    def encode(self, text: str) -> Ids:
        found = encoded(library_of(self.definition), text)
        ids = np.array(found.ids, np.uint32)
        if (wrong := is_special(self.definition)[ids]).any():
            refuse_special(library_of(self.definition).id_to_token(int(ids[wrong.argmax()])))
        check_lost(self.definition, text)
        return ids

    def encode_within(self, text: str, first: int, last: int, special: bool) -> Ids:
        """The library's own of the whole text, as what stands before a stretch may decide about its ids. A token across
        the ends of two stretches is of the second."""
        ids, places = whole(self.definition, text)
        return ids[(first <= places) & (places < last)]

    def decode(self, ids: Iterable[int] | NDArray[np.integer]) -> str:
        return library_of(self.definition).decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def byte_lengths(self) -> NDArray[np.int64] | None:
        """Exact for bytes as in GPT-2, and to the space before a text where unknown characters fall back to bytes."""
        parts = json.loads(self.definition)
        of_bytes = '"ByteLevel"' in json.dumps(parts.get("decoder"))
        if not (of_bytes or parts["model"].get("byte_fallback")):
            return None
        library, lengths = library_of(self.definition), np.zeros(self.size, np.int64)
        special, added = special_ids(library), library.get_added_tokens_decoder()
        for token, i in library.get_vocab().items():
            if i in special:
                continue
            if of_bytes and i not in added:
                lengths[i] = len(token)
            elif token.startswith("<0x") and token.endswith(">"):
                lengths[i] = 1
            else:
                lengths[i] = len(token.replace("▁", " ").encode())
        return lengths


class BPE(Unfitted):
    """Byte-pair encoding of the bytes of UTF-8 (arXiv:1508.07909), words split as in GPT-2; learned from the corpus.

    The vocabulary is declared, so that a model can be planned before the corpus is read; a small corpus may leave ids
    unused. Id 0 begins and ends each document.
    """

    vocab_size: int = 8192  # how many ids there are  # pyright: ignore
    sample: int = 100_000_000  # about how many characters it learns from, spread over the corpus; they bound the memory
    mask_token: bool = False  # adds an id that hides tokens (for Masked)
    sentinels: int = 0  # ids for missing spans (for SpanCorruption)
    lowercase: bool = False  # reads all text in lower case
    drop: str | None = None  # a regular expression: what it matches is left out of all text; None: nothing

    def check(self, at: str = "") -> None:
        if self.sentinels < 0:
            raise ValueError(f"{at}sentinels={self.sentinels} must be at least 0; 100 is usual")
        if self.drop is not None:
            import tokenizers

            try:
                tokenizers.Regex(self.drop)
            except Exception as error:  # the library raises no other
                raise ValueError(
                    f"{at}drop={self.drop!r} must be a regular expression of Oniguruma ({error})"
                ) from None
        least = 257 + self.mask_token + self.sentinels
        if not least <= self.vocab_size <= 1 << 20:
            raise ValueError(
                f"{at}vocab_size={self.vocab_size} must be at least {least} (bytes and special ids), at most {1 << 20}"
            )
        if self.sample < 1:
            raise ValueError(f"{at}sample={self.sample} must be at least 1 character")

    @property
    def learns(self) -> bool:
        return True

    @property
    def start(self) -> int:
        return 0

    @property
    def end(self) -> int:
        return 0

    @property
    def special(self) -> dict[str, tuple[int, ...]]:
        mask = (1,) if self.mask_token else ()
        first = 1 + len(mask)
        return super().special | {"mask": mask, "sentinels": tuple(range(first, first + self.sentinels))}

    def fit(self, texts: Iterable[str]) -> Subwords:
        import tokenizers

        total = sum(map(len, texts))
        if not total:
            raise InputError("data.tokenizer=BPE: the corpus is empty; give one with text in it")
        share = (1 << 64) // -(-total // self.sample)
        sample = (text for i, text in enumerate(texts) if i * GOLDEN % (1 << 64) < share)
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
        library.decoder = tokenizers.decoders.ByteLevel()  # pyright: ignore
        forms: list[Any] = [tokenizers.normalizers.Lowercase()] if self.lowercase else []
        if self.drop is not None:
            forms.insert(0, tokenizers.normalizers.Replace(tokenizers.Regex(self.drop), " "))
        if forms:
            library.normalizer = tokenizers.normalizers.Sequence(forms)  # pyright: ignore
        mask, sentinels = MASK if self.mask_token else None, tuple(f"<extra_id_{i}>" for i in range(self.sentinels))
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT, *filter(None, [mask]), *sentinels],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(sample, trainer)
        special = END_OF_TEXT, END_OF_TEXT, None, mask, sentinels
        return Subwords(canonical(library.to_str()), self.vocab_size, *special)


class TokenizerFile(Unfitted):
    """A `tokenizer.json`: of the library `tokenizers`, as most published models have one, or of another run.

    Tokens that begin, end and pad are found by their usual names; those of other names must be given.
    """

    path: str  # a tokenizer.json
    start_token: str | None = None  # begins each document; None: found by its usual name
    end_token: str | None = None  # ends each document; None: found by its usual name
    padding_token: str | None = None  # fills rows; None: found by its usual name
    mask_token: str | None = None  # hides a token; None: found by its usual name

    @property
    def vocab_size(self) -> int | None:
        return self.fit(()).vocab_size

    def fit(self, texts: Iterable[str]) -> Tokenizer:
        path = located(self.path)
        value = read_json(path)
        given = {name: getattr(self, name) for name in SPECIAL}
        if isinstance(value, dict) and "class" in value:
            for name, token in given.items():
                if token is not None:
                    raise InputError(f"data.tokenizer.{name}={token!r} must be None: {path} is a run's, with its own")
            return read_tokenizer(path)
        return defined(json.dumps(value), path, **given)


def defined(definition: str, path: Path, **given: str | None) -> Subwords:
    """Of a definition of the library's, read from `path`; special tokens that are not given are found by their usual
    names."""
    try:
        import tokenizers

        library = tokenizers.Tokenizer.from_str(canonical(definition))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path}: holds no tokenizer ({error}); give another file") from None
    for name, token in given.items():
        if token is not None and library.token_to_id(token) is None:
            raise InputError(f"data.tokenizer.{name}={token!r} must be a token of {path}; None if it has none")
    library.add_special_tokens([token for token in given.values() if token is not None])  # they keep their ids
    special = {library.id_to_token(i) for i in special_ids(library)}
    usual = lambda name, names: given[name] or next((token for token in names if token in special), None)
    end = usual("end_token", ENDS)
    start = usual("start_token", STARTS) or end
    if start is None:
        names = ", ".join(sorted(map(str, special))) or "none"
        raise InputError(f"{path}: no usual start token is among {names}; give data.tokenizer.start_token")
    size = max(library.get_vocab(with_added_tokens=True).values()) + 1
    others = usual("padding_token", PADDINGS), usual("mask_token", MASKS)
    sentinels = tuple(itertools.takewhile(special.__contains__, (f"<extra_id_{i}>" for i in itertools.count())))
    return Subwords(canonical(library.to_str()), size, start, end, *others, sentinels)


SPECIAL = ("start_token", "end_token", "padding_token", "mask_token")
END_OF_TEXT = "<|endoftext|>"
GOLDEN = 0x9E3779B97F4A7C15  # 2⁶⁴ over the golden ratio: multiples of it, mod 2⁶⁴, are spread evenly and have no period
STARTS = ("<s>", "[CLS]", "<bos>", "<|begin_of_text|>", "<|startoftext|>", END_OF_TEXT)
ENDS = ("</s>", "[SEP]", "<eos>", "<|end_of_text|>", END_OF_TEXT)
MASK = "<mask>"
MASKS = (MASK, "[MASK]")
PADDINGS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>")


# --- stored tokenizers


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer stored in a run. Raises InputError if the file holds none."""
    tokenizer = from_json(read_json(path), Tokenizer, str(path))
    if tokenizer.learns or isinstance(tokenizer, TokenizerFile):
        raise InputError(f"{path}: holds a tokenizer that was not fitted to a corpus; restore the file")
    return tokenizer
