"""What the library `tokenizers` makes of a definition, the text of a tokenizer.json."""

import functools
import itertools
import json
import re
from collections.abc import Iterable
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from jaxformer.spec import InputError

Ids = NDArray[np.uint32]
NAMED = 50  # at most, of characters that are not known


def canonical(definition: str) -> str:
    """The same JSON in one form, without what would cut or pad texts."""
    if not isinstance(json.loads(definition), dict):
        raise ValueError("no JSON object")
    return json.dumps(json.loads(definition) | {"truncation": None, "padding": None}, ensure_ascii=False)


def deciding(definition: str) -> dict[str, Any]:
    """What of a definition decides about the ids of a text."""
    parts = {name: part for name, part in json.loads(definition).items() if name not in ("post_processor", "decoder")}
    free = {"special": None, "normalized": None}  # special tokens are found before text is normalized
    return parts | {"added_tokens": [token | free for token in parts.get("added_tokens", ())]}


def special_ids(library: Any) -> set[int]:
    return {i for i, token in library.get_added_tokens_decoder().items() if token.special}


@functools.lru_cache(maxsize=8)
def library_of(definition: str, special: bool = False) -> Any:
    """`special`: the text "<|endoftext|>" is the token of this name, and no text."""
    try:
        import tokenizers
    except ImportError:
        raise InputError("this tokenizer needs the package tokenizers; pip install tokenizers") from None
    parts = json.loads(definition)
    if parts["model"].get("dropout"):  # of merges (arXiv:1910.13267): other ids of the same text every time
        definition = json.dumps(parts | {"model": parts["model"] | {"dropout": None}})
    library = tokenizers.Tokenizer.from_str(definition)
    library.encode_special_tokens = not special
    return library


def encoded(library: Any, text: str, offsets: bool = False) -> Any:
    """What the library makes of a text; with the offsets of its tokens it takes longer."""
    encode = library.encode_batch if offsets else library.encode_batch_fast
    try:
        (found,) = encode([text], add_special_tokens=False)
    except TypeError:
        raise InputError("the text holds half of a surrogate pair, which is no character; remove it") from None
    except Exception as error:  # as for an unknown word where no token stands for those
        raise InputError(f"the tokenizer cannot encode the text ({error}); give another one") from None
    return found


@functools.lru_cache(maxsize=16)
def whole(definition: str, text: str) -> tuple[Ids, NDArray[np.int64]]:
    """Ids of a text in which special tokens stand by their names, and the place of the last character of each."""
    found = encoded(library_of(definition, True), text, True)
    ids, never, named = np.array(found.ids, np.uint32), is_special(definition), special_tokens(definition)
    parts = re.split(f"({any_of(named).pattern})", text)
    written = [name for name in parts[1::2] if never[named[name]]]
    special = [library_of(definition).id_to_token(int(i)) for i in ids[never[ids]]]
    if special != written:
        refuse_special(next(a or b for a, b in itertools.zip_longest(special, written, fillvalue="") if a != b))
    for part in parts[::2]:
        check_lost(definition, part)
    places = np.array([max(start, end - 1) for start, end in found.offsets], np.int64)
    return ids, np.minimum(np.maximum.accumulate(places), len(text) - 1)


def any_of(names: Iterable[str]) -> re.Pattern[str]:
    """The longest of them; nothing where there are none."""
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def refuse_special(token: str) -> NoReturn:
    raise InputError(
        f"the text holds {token!r}, which the tokenizer takes for its special token; remove it, or give another "
        "tokenizer"
    )


def check_lost(definition: str, text: str) -> None:
    if lost := _lost(definition, text):
        raise InputError(
            f"the tokenizer has no token for {', '.join(map(repr, sorted(lost)[:NAMED]))}, nor one for unknown "
            "characters, and would leave them out; remove them, or give another tokenizer"
        )


@functools.lru_cache(maxsize=4)
def special_tokens(definition: str) -> dict[str, int]:
    library = library_of(definition)
    return {library.id_to_token(i): i for i in sorted(special_ids(library))}


@functools.lru_cache(maxsize=4)
def is_special(definition: str) -> NDArray[np.bool_]:
    """[largest id + 1]: whether it is that of a special token, other than the one for what is unknown. A model that has
    the token among its words would find it in text."""
    library, model = library_of(definition), json.loads(definition)["model"]
    unknown = model.get("unk_token")
    if model.get("unk_id") is not None:
        unknown = model["vocab"][model["unk_id"]][0]
    found = np.zeros(max(library.get_vocab().values(), default=0) + 1, bool)
    found[[i for i in special_ids(library) if library.id_to_token(i) != unknown]] = True
    return found


@functools.lru_cache(maxsize=4)
def _alphabet(definition: str) -> frozenset[str] | None:
    """The characters that have a token, of a model that passes over all others; None of any other model."""
    from tokenizers.pre_tokenizers import ByteLevel

    parts = json.loads(definition)
    model = parts["model"]
    if model.get("type") != "BPE" or model.get("unk_token") is not None:
        return None
    if model.get("byte_fallback") and all(f"<0x{i:02X}>" in model["vocab"] for i in range(256)):
        return None
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    tokens = (token.removeprefix(before).removesuffix(after) for token in model["vocab"])
    known = frozenset(token for token in tokens if len(token) == 1)
    of_bytes = '"ByteLevel"' in json.dumps([parts.get("pre_tokenizer"), parts.get("normalizer")])
    return None if of_bytes and known.issuperset(ByteLevel.alphabet()) else known


def _lost(definition: str, text: str) -> set[str]:
    """The characters that would have no id, as the model sees them."""
    known = _alphabet(definition)
    if known is None:
        return set()
    library, found = library_of(definition), set[str]()
    added = [token.content for token in library.get_added_tokens_decoder().values() if not token.special]
    for part in any_of(added).split(text):
        if library.normalizer is not None:
            part = library.normalizer.normalize_str(part)
        if library.pre_tokenizer is not None:
            part = "".join(word for word, _ in library.pre_tokenizer.pre_tokenize_str(part))
        found.update(part)
    return found - known
