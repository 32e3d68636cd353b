"""Text as it is written: whole characters, and nothing of a stop text."""

import numpy as np
import pytest

from jaxformer.data.tokenizers import BPE, Bytes, Characters
from jaxformer.generation.texts import Writing

TEXT = "añb 猫猫 of\n\n🙂 and é. "
TOKENIZERS = [Bytes(end_token=True), BPE(280).fit([TEXT]), Characters(unknown_token=True).fit([TEXT])]
each = pytest.mark.parametrize("tokenizer", TOKENIZERS, ids=["bytes", "bpe", "characters"])


def pieces(writing, ids):
    """What each token adds to the text, until it has ended."""
    for token in ids:
        if writing.finish_reason is None:
            before = writing.text
            writing.add(token)
            assert writing.text.startswith(before)
            yield writing.text[len(before) :]


@each
def test_pieces_are_whole_characters_and_together_what_is_decoded(tokenizer):
    ids = tokenizer.encode(TEXT * 3).tolist()
    for before in (0, 1, 5, 6, 9):  # behind half a character, too
        writing = Writing(tokenizer, ids[:before])
        found = list(pieces(writing, ids[before:]))
        writing.finish("length")
        head = tokenizer.decode(ids[:before])
        whole = tokenizer.decode(ids)
        expected = whole.removeprefix(head) if whole.startswith(head) else tokenizer.decode(ids[before:])
        assert writing.text == expected and writing.finish_reason == "length" and writing.ids == ids[before:]
        assert len([piece for piece in found if piece]) > 5
    assert "\ufffd" not in "".join(pieces(Writing(tokenizer), ids))


@each
def test_any_ids_are_written_as_they_are_decoded(tokenizer):
    """Bytes that are no UTF-8 become U+FFFD; the end token ends."""
    rng = np.random.default_rng(0)
    special = {id for group in tokenizer.special.values() for id in group}
    for _ in range(50):
        ids = [
            i for i in rng.integers(0, tokenizer.vocab_size, 30).tolist() if i not in special and tokenizer.decode([i])
        ]
        writing = Writing(tokenizer)
        list(pieces(writing, ids))
        writing.finish("length")
        assert writing.text == tokenizer.decode(ids)
    if tokenizer.end is not None:
        writing = Writing(tokenizer)
        list(pieces(writing, [*ids, tokenizer.end, *ids]))
        assert (writing.text, writing.finish_reason) == (tokenizer.decode(ids), "end")
        assert writing.ids == [*ids, tokenizer.end]


@each
@pytest.mark.parametrize(
    "stop", [("\n\n",), ("猫猫 x", " of\n"), ("猫 猫", "🙂 and é!", "and"), ("ñ", "z"), ("nowhere",)]
)
def test_a_text_ends_before_the_first_stop_text(tokenizer, stop):
    writing, out = Writing(tokenizer, stop=stop), ""
    places = [at for text in stop if (at := TEXT.find(text)) >= 0]
    expected = TEXT[: min(places)] if places else TEXT
    for piece in pieces(writing, tokenizer.encode(TEXT).tolist()):
        out += piece
        assert expected.startswith(out)
    if not places:
        assert writing.finish_reason is None
        writing.finish("length")
    assert (writing.text, writing.finish_reason) == (expected, "stop" if places else "length")
    assert tokenizer.decode(writing.ids).startswith(expected)


def test_what_was_held_back_is_shown_at_the_end():
    tokenizer = Bytes(end_token=True)
    for reason in ("end", "length"):
        writing = Writing(tokenizer, stop=("bcd",))
        assert list(pieces(writing, b"abc")) == ["a", "", ""]
        writing.add(256) if reason == "end" else writing.finish("length")
        assert (writing.text, writing.finish_reason) == ("abc", reason)
    writing = Writing(tokenizer, stop=("\ufffd",))  # half a character at the end, and that is a stop text
    list(pieces(writing, b"ab\xc3"))
    writing.finish("length")
    assert (writing.text, writing.finish_reason) == ("ab", "stop")
