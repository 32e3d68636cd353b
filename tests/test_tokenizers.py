"""Tokenizers: exact round trips, special ids, stored forms."""

import dataclasses
import json

import numpy as np
import pytest
import tokenizers as library

from jaxformer.data.corpora import PythonTopics
from jaxformer.data.tokenizers import (
    BPE,
    Bytes,
    Characters,
    NoTokenizer,
    Subwords,
    TokenizerFile,
    Unknown,
    read_tokenizer,
)
from jaxformer.learning.objectives import Masked
from jaxformer.spec import InputError, checked, dumps

TEXT = "naïve café — 数学 🦜\nzwölf Boxkämpfer\r\n\t  e\u0301 <|endoftext|>\x00'll  \n\n x" * 7
ALL = [Bytes(), Bytes(end_token=True), Characters(), Characters(end_token=True), BPE(300)]


@pytest.fixture(scope="module")
def topics():
    return BPE(1000).fit(PythonTopics())


@pytest.mark.parametrize("tokenizer", ALL)
def test_text_survives_a_round_trip(tokenizer):
    tokenizer = tokenizer.fit([TEXT])
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.max() < tokenizer.vocab_size and tokenizer.decode([]) == "" and len(tokenizer.encode("")) == 0
    assert tokenizer.byte_lengths()[ids].sum() == len(TEXT.encode())
    assert len(tokenizer.byte_lengths()) == tokenizer.vocab_size
    if tokenizer.end is None:
        assert tokenizer.decode([tokenizer.start]) == "\n" and tokenizer.padding == 0 and tokenizer.prefix == ()
    else:
        assert tokenizer.start == tokenizer.end == tokenizer.padding and tokenizer.end not in ids
        assert tokenizer.prefix == (tokenizer.start,) and tokenizer.suffix == ()
        assert tokenizer.decode([tokenizer.end, *ids, tokenizer.end]) == TEXT
        assert tokenizer.byte_lengths()[tokenizer.end] == 0


@pytest.mark.parametrize("tokenizer", ALL)
def test_a_fitted_tokenizer_is_stored_and_read_back(tokenizer, tmp_path):
    fitted = tokenizer.fit([TEXT])
    (tmp_path / "tokenizer.json").write_text(dumps(fitted), encoding="utf-8")
    assert read_tokenizer(tmp_path / "tokenizer.json") == fitted == fitted.fit(["other"])
    assert TokenizerFile(str(tmp_path / "tokenizer.json")).fit(()) == fitted


def test_ids_without_a_tokenizer_are_numbers(tmp_path):
    ids = NoTokenizer(29, end_id=28)
    assert ids.encode(" 3 28\n07").tolist() == [3, 28, 7] and ids.encode("").tolist() == []
    assert ids.decode([3, 28, 7]) == "3 7" and ids.byte_lengths() is None and ids.start == ids.end == ids.padding == 28
    assert NoTokenizer(29).start == 0 and NoTokenizer(29).end is None
    (tmp_path / "tokenizer.json").write_text(dumps(ids))
    assert read_tokenizer(tmp_path / "tokenizer.json") == ids == ids.fit(["text"])
    for wrong in ("29", "-1", "The", "\u0663", "9" * 5000):
        with pytest.raises(InputError, match=r"is not an id: data\.tokenizer=NoTokenizer reads numbers less than 29"):
            ids.encode(f"3 {wrong}")
    for wrong in (NoTokenizer(0), NoTokenizer(29, 29), NoTokenizer(29, -1)):
        with pytest.raises(InputError, match="must be"):
            checked(wrong)


def test_characters_are_numbered_by_code_point():
    tokenizer = Characters().fit(["ba", "c"])
    assert tokenizer == Characters("abc") and tokenizer.encode("cab").tolist() == [2, 0, 1] and tokenizer.start == 0
    assert Characters("xyz").fit(["abc"]) == Characters("xyz")


@pytest.mark.parametrize("wrong", ["é", "\x00", "\udcff", "🦜", "d"])
def test_an_unknown_character_is_named(wrong):
    with pytest.raises(InputError, match=rf"character .* \(U\+{ord(wrong):04X}, line 2\) is not known to the"):
        Characters("\nabc").encode("a\nb" + wrong)


def test_unknown_characters_are_named_all_at_once():
    """In the order of the text, each once, with its first line; no more than one can read."""
    with pytest.raises(Unknown) as error:
        Characters("\nabc").encode("ab\nzya\nzx\n🦜")
    named = "'z' (U+007A, line 2), 'y' (U+0079, line 2), 'x' (U+0078, line 3), '🦜' (U+1F99C, line 4)"
    assert str(error.value).startswith(f"characters {named} are not known to the tokenizer; remove them, or train with")
    assert "data.tokenizer=Bytes or BPE" in str(error.value) and "data.tokenizer.unknown_token=true" in str(error.value)
    for count in (50, 51, 1234):
        with pytest.raises(Unknown) as error:
            Characters("abc").encode("".join(chr(0x4E00 + i) for i in range(count)))
        assert str(error.value).count("U+") == 50
        assert (f"and {count - 50:,} more are not" in str(error.value)) == (count > 50)


def test_an_id_for_unknown_characters(tmp_path):
    """Behind the others, which stay where they were; it is never predicted by Masked, nor are bytes known of it."""
    fields = {"end_token": True, "mask_token": True, "sentinels": 2}
    plain, more = (Characters("abc", **fields, unknown_token=unknown) for unknown in (False, True))
    assert (plain.vocab_size, more.vocab_size, more.start, more.end) == (7, 8, 3, 3)
    assert more.special == plain.special | {"others": (7,)} and "others" not in plain.special
    assert more.encode("ab\u732bcz").tolist() == [0, 1, 7, 2, 7] and more.encode("cab").tolist() == [2, 0, 1]
    assert more.decode([3, 0, 4, 7, 5, 6, 2, 3]) == "a\ufffdc" and more.unknown("z") == {} != plain.unknown("z")
    assert more.byte_lengths() is None and plain.byte_lengths() is not None
    assert Characters(unknown_token=True).fit(["ab"]).encode("b?").tolist() == [1, 2]
    assert 7 in Masked().filled(more.special, 8, 9).special
    stored = tmp_path / "tokenizer.json"
    stored.write_text(dumps(more))
    assert read_tokenizer(stored) == more
    fields = json.loads(dumps(plain))
    del fields["unknown_token"]  # as runs have it that began before there was one
    stored.write_text(json.dumps(fields))
    assert read_tokenizer(stored) == plain


def test_bytes_that_are_no_utf8_decode_to_the_replacement_character():
    assert Bytes().decode([104, 255, 105]) == "h\ufffdi"


# --- BPE


def test_the_vocabulary_of_bpe_is_declared(topics):
    assert BPE(50257).vocab_size == 50257 and topics.vocab_size == 1000
    small = BPE(50257).fit(["abc"])
    assert small.vocab_size == 50257 and small.encode("abc").max() < 300 and small.decode([50256]) == ""


def test_bpe_merges_what_is_frequent(topics):
    (text,) = PythonTopics().documents()
    assert 2.5 < len(text) / len(topics.encode(text)) < 5
    assert len(topics.encode(" the")) == len(topics.encode(" class")) == 1


def test_bpe_is_learned_the_same_way_every_time(topics):
    assert BPE(1000).fit(PythonTopics()) == topics


def test_the_pieces_of_a_corpus_have_the_ids_of_the_whole(topics):
    (text,) = PythonTopics().documents()
    pieces = list(PythonTopics())
    assert len(pieces) > 20
    assert np.array_equal(np.concatenate([topics.encode(piece) for piece in pieces]), topics.encode(text))


def test_bpe_learns_from_an_even_sample():
    """About a fourth of the pieces where a fourth of the characters is allowed; as many odd ones, such as the second
    texts of pairs, as even ones."""
    pieces = [chr(97 + i // 20) + chr(97 + i % 20) + "!" for i in range(400)]
    vocabulary = json.loads(BPE(700, sample=300).fit(pieces).definition)["model"]["vocab"]
    found = [i for i, piece in enumerate(pieces) if piece[:2] in vocabulary]
    assert 96 <= len(found) <= 104 and 46 <= sum(i % 2 for i in found) <= 54 and 20 <= sum(i < 100 for i in found) <= 30
    assert all(piece[:2] in json.loads(BPE(700).fit(pieces).definition)["model"]["vocab"] for piece in pieces)


def test_what_is_dropped_is_told_in_the_librarys_language():
    with pytest.raises(InputError, match=r"drop='.*' must be a regular expression of Oniguruma"):
        checked(BPE(300, drop="(?P<name>x)"))


def test_half_of_a_surrogate_pair_is_refused(topics):
    with pytest.raises(InputError, match="half of a surrogate pair"):
        topics.encode("a\ud800")


# --- files of others


def definition(model, tokens, **fields):
    found = library.Tokenizer(model)
    for name, value in fields.items():
        setattr(found, name, value)
    found.add_special_tokens(tokens)
    return found


def word_piece():
    vocabulary = {"[UNK]": 0, "[CLS]": 1, "[SEP]": 2, "[PAD]": 3, "play": 4, "##ing": 5, "é": 6}
    found = definition(
        library.models.WordPiece(vocabulary, unk_token="[UNK]"),
        ["[UNK]", "[CLS]", "[SEP]", "[PAD]"],
        pre_tokenizer=library.pre_tokenizers.Whitespace(),
        decoder=library.decoders.WordPiece(),
    )
    found.post_processor = library.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    found.enable_truncation(2)
    found.enable_padding(length=9)
    return found


def metaspace():
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocabulary |= {"▁": 259, "h": 260, "i": 261, "▁h": 262}
    model = library.models.BPE(vocabulary, [("▁", "h")], byte_fallback=True, unk_token="<unk>")
    steps = [library.decoders.Replace("▁", " "), library.decoders.ByteFallback(), library.decoders.Fuse()]
    steps.append(library.decoders.Strip(" ", 1, 0))
    return definition(
        model,
        ["<s>", "</s>", "<unk>"],
        pre_tokenizer=library.pre_tokenizers.Metaspace(),
        decoder=library.decoders.Sequence(steps),
    )


def test_any_tokenizer_json(tmp_path):
    path = str(tmp_path / "tokenizer.json")
    word_piece().save(path)
    bert = TokenizerFile(path).fit(())
    assert isinstance(bert, Subwords) and TokenizerFile(path).vocab_size == bert.vocab_size == 7
    assert (bert.start, bert.end, bert.padding, bert.prefix, bert.suffix) == (1, 2, 3, (1,), (2,))
    assert bert.encode("playing é play").tolist() == [4, 5, 6, 4]  # not cut, not padded, nothing added
    assert bert.decode([1, 4, 5, 6, 2, 3]) == "playing é"
    assert bert.byte_lengths() is None and not bert.piecewise  # an unknown word may have any length
    metaspace().save(path)
    llama = TokenizerFile(path).fit(())
    assert (llama.start, llama.end, llama.padding, llama.prefix) == (0, 1, 1, (0,))
    assert llama.encode("hi é").tolist() == [262, 261, 259, 3 + 0xC3, 3 + 0xA9]
    assert llama.decode(llama.encode("hi é")) == "hi é"
    assert llama.byte_lengths()[llama.encode("hi é")].sum() == len(" hi é".encode())
    assert not llama.piecewise
    chat = metaspace()
    chat.add_tokens(["<|im_end|>"])  # no special one, as some models have it
    chat.save(path)
    own = TokenizerFile(path, end_token="<|im_end|>").fit(())
    assert (own.start, own.end, own.size) == (0, 263, 264)
    assert 263 not in own.encode("<|im_end|>") and own.decode([262, 263]) == "h"  # no text, from now on


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "holds no tokenizer (no JSON object)"),
        ('{"model": {}}', "holds no tokenizer"),
        ('{"class": "os:system"}', "is no spec of jaxformer"),
        (dumps(BPE()), "was not fitted"),
        (dumps(TokenizerFile("x")), "was not fitted"),
        (dumps(Characters()), "was not fitted"),
        (dumps(Subwords("{", 3, "a")), "definition is none that the library tokenizers can read"),
        (definition(library.models.BPE(), []).to_str(), "no usual start token"),
    ],
)
def test_a_file_that_holds_no_tokenizer_is_named(tmp_path, text, message):
    path = tmp_path / "tokenizer.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as error:
        TokenizerFile(str(path)).fit(())
    assert str(path) in str(error.value) and message in str(error.value) and "\n" not in str(error.value)


def test_special_tokens_must_exist(tmp_path):
    path = tmp_path / "tokenizer.json"
    word_piece().save(str(path))
    with pytest.raises(InputError, match=r"end_token='<eos>' must be a token of .*; None if it has none"):
        TokenizerFile(str(path), end_token="<eos>").fit(())
    path.write_text(dumps(Characters("abc")))
    with pytest.raises(InputError, match=r"end_token='a' must be None: .* is a run's, with its own"):
        TokenizerFile(str(path), end_token="a").fit(())


def test_what_a_library_cannot_encode_is_refused(tmp_path):
    model = library.models.WordLevel({"a": 0, "<s>": 1}, unk_token="<unk>")
    definition(model, ["<s>"], pre_tokenizer=library.pre_tokenizers.Whitespace()).save(str(tmp_path / "a.json"))
    tokenizer = TokenizerFile(str(tmp_path / "a.json")).fit(())
    assert tokenizer.encode("a a").tolist() == [0, 0] and tokenizer.end is None and tokenizer.prefix == ()
    with pytest.raises(InputError, match="the tokenizer cannot encode the text"):
        tokenizer.encode("a b")


def test_ids_are_the_same_whatever_writes_dialogues():
    """And whichever tokens are special: what fine-tuning changes need not cost the embedding."""
    own, bpe = metaspace(), BPE(300).fit(["abc"])
    own.add_tokens(["<|im_end|>"])
    plain = Subwords(own.to_str(), 264, "<s>", "</s>")
    own.add_special_tokens(["<|im_end|>"])
    own.post_processor = library.processors.BertProcessing(("</s>", 1), ("<s>", 0))
    chat = Subwords(own.to_str(), 270, "<s>", "<|im_end|>", chat_template="{{ messages }}")
    own.normalizer = library.normalizers.Lowercase()
    lower = dataclasses.replace(plain, definition=own.to_str())
    assert plain.same_ids(chat) and chat.same_ids(plain) and plain != chat
    assert not plain.same_ids(lower) and not plain.same_ids(bpe) and not Bytes().same_ids(bpe)
    assert Bytes().same_ids(Bytes()) and not Bytes().same_ids(Bytes(end_token=True)) and not bpe.same_ids(Bytes())


def test_added_tokens_count_their_bytes():
    found = BPE(300).fit(["abc"])
    added = library.Tokenizer.from_str(found.definition)
    added.add_tokens(["日本語"])
    more = dataclasses.replace(found, definition=added.to_str(), size=301)
    ids = more.encode("a日本語")
    assert len(ids) == 2 and more.byte_lengths()[ids].tolist() == [1, 9]


@pytest.mark.parametrize("wrong", [BPE(256), BPE(sample=0), Characters("ba"), Characters("")])
def test_bad_values(wrong):
    with pytest.raises(InputError, match="must be"):
        checked(wrong)
