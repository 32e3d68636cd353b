"""Kinds of fault that users of other libraries reported of text, tokenizers, drawing, evaluation and answers."""

import csv
import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers as library
from test_other_texts import SIZE, TOKENIZER, run_of
from test_tokenizers import definition, metaspace
from tiny import hidden, log_softmax, loud

from jaxformer import Encoder, EncoderDecoder
from jaxformer.data.batches import Batches, Examples, PackedDocuments, RowSize
from jaxformer.data.corpora import Corpus, JSONLines, TextLines, cut
from jaxformer.data.datasets import classes_of, encode, prepare
from jaxformer.data.tables import Table
from jaxformer.data.tasks import Reverse
from jaxformer.data.tokenizers import BPE, Bytes, Characters, TokenizerFile
from jaxformer.generation.decode import Drawn, choose
from jaxformer.generation.logits_processors import Temperature
from jaxformer.learning.objectives import Classification, NextToken, SequenceToSequence
from jaxformer.model.heads import ClassificationHead, LanguageHead
from jaxformer.model.masks import one_document
from jaxformer.run import opened
from jaxformer.run.checks import checked_data
from jaxformer.run.plan import prepare_data
from jaxformer.spec import InputError

pytestmark = pytest.mark.slow

TEXTS = ("a", "abcabca", "abc", "aabbccaabbcc", "cc", "bcaabcab", "cba")


class Documents(Corpus):
    texts_: tuple[str, ...]

    def documents(self):
        yield from self.texts_


def stored(path, tokenizer):
    tokenizer.save(str(path / "tokenizer.json"))
    return TokenizerFile(str(path / "tokenizer.json")).fit(())


def byte_level(path, use_regex=True, alphabet=None):
    """Merges learned from a line break between two letters."""
    found = library.Tokenizer(library.models.BPE())
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    found.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=260, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet or [], show_progress=False
    )
    found.train_from_iterator(["x\ny"] * 9, trainer)
    return stored(path, found)


# --- text


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_only_line_feeds_end_lines(tmp_path, mark):
    """What Python's splitlines takes for an end of line, too, is text (datasets #3729)."""
    text, path = f"one{mark}two", tmp_path / "a"
    path.write_text(f"{text}\nthree\n", encoding="utf-8")
    assert list(TextLines(str(path)).documents()) == [text, "three"]
    for name, row in (("a.csv", text), ("a.tsv", text), ("a.jsonl", json.dumps({"text": text}, ensure_ascii=False))):
        lines = [row, '{"text": "three"}'] if name == "a.jsonl" else ["text", row, "three"]
        (tmp_path / name).write_text("\n".join(lines), encoding="utf-8")
        rows = list(Table(str(tmp_path / name)).rows())
        assert [each.texts for each in rows] == [(text,), ("three",)] and rows[1].line == len(lines)
    assert list(JSONLines(str(tmp_path / "a.jsonl")).documents()) == [text, "three"]


@pytest.mark.parametrize("name", ["t.csv", "t.tsv"])
def test_cells_are_texts_whatever_they_look_like(tmp_path, name):
    """Neither missing, nor numbers, nor truth values (datasets #4467)."""
    cells = ["null", "NA", "nan", "None", "N/A", "007", "1e5", "True", "1.0", "-"]
    with open(tmp_path / name, "w", newline="") as file:
        csv.writer(file, delimiter="," if name == "t.csv" else "\t").writerows(
            [("text", "y"), *zip(cells, cells, strict=True)]
        )
    corpus = Table(str(tmp_path / name), labels=("y",))
    assert list(corpus.documents()) == cells and corpus.label_values() == {"y": cells}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_tables_from_windows(tmp_path, name):
    """A byte order mark is no part of the first column's name, nor a carriage return of the last cell (pandas #4793,
    tfjs #1393)."""
    tab = "\t" if name == "t.tsv" else ","
    header = f'"y"{tab}text' if name == "t.csv" else f"y{tab}text"
    lines = [header, *(f"{y}{tab}{text}" for y, text in (("1", "a"), ("0", "b ")))]
    if name == "t.jsonl":
        lines = ['{"y": 1, "text": "a"}', '{"y": 0, "text": "b "}']
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "".join(line + "\r\n" for line in lines).encode())
    rows = list(Table(str(tmp_path / name), labels=("y",)).rows())
    assert [(row.texts, row.labels) for row in rows] == [(("a",), ("1",)), (("b ",), ("0",))]


@pytest.mark.parametrize(("size", "dtype"), [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_the_largest_id_fits_the_file(size, dtype):
    """Ids of special tokens count; none is taken modulo 2¹⁶ (LLM-Shearing #65, open-instruct #1862)."""
    tokenizer = Characters("".join(map(chr, range(0x10000, 0x10000 + size - 1))), end_token=True)
    prepared = prepare(
        Documents((tokenizer.alphabet[-1] + tokenizer.alphabet[0],)), tokenizer, Documents(("\U00010000",))
    )
    assert prepared.train[0].tokens.tolist() == [size - 1, size - 2, 0, size - 1]
    assert prepared.train[0].tokens.dtype == dtype and tokenizer.vocab_size == size


def test_examples_on_both_sides_are_told(tmp_path, caplog):
    """Rows that come several times are trained on and validated on (datasets #4261)."""
    words = [f"word {i % 30}" for i in range(60)] + [f"other {i}" for i in range(60)]
    for texts, told in ((words, True), (sorted(set(words)), False)):
        (tmp_path / "t.csv").write_text("\n".join(["text", *texts]))
        run = run_of(Table(str(tmp_path / "t.csv")), sampling=Examples())
        prepared = prepare_data(run.config)
        train, valid = (
            {tuple(map(bytes, s.example(i))) for i in range(s.n_examples)} for s in (*prepared.train, *prepared.valid)
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            checked_data(run.config)
        assert bool(train & valid) == told
        assert (f"valid: {len(train & valid)} of 12 examples have the texts of" in caplog.text) == told


# --- tokenizers


def test_ids_are_the_same_every_time(tmp_path):
    """A tokenizer.json that says to leave out merges by chance (tokenizers #644)."""
    fitted = BPE(400).fit(["the cat sat on the mat with the hat " * 50])
    parts = json.loads(fitted.definition)
    parts["model"]["dropout"] = 0.5
    (tmp_path / "tokenizer.json").write_text(json.dumps(parts))
    drawn = TokenizerFile(str(tmp_path / "tokenizer.json")).fit(())
    text = "the cat sat on the mat"
    for _ in range(5):
        assert np.array_equal(drawn.encode(text), fitted.encode(text))


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((piece, -3.0) for piece in "</s>▁a")]
    return definition(
        library.models.Unigram(pieces, unk_id=0), ["<unk>", "</s>"], pre_tokenizer=library.pre_tokenizers.Metaspace()
    )


def word_level():
    words = {"<unk>": 0, "</s>": 1, "a": 2}
    splits = library.pre_tokenizers.WhitespaceSplit()
    return definition(library.models.WordLevel(words, unk_token="<unk>"), ["<unk>", "</s>"], pre_tokenizer=splits)


@pytest.mark.parametrize("make", [unigram, word_level])
def test_text_never_ends_a_document(tmp_path, make):
    """Markup such as </s>, which a model has among its words, is not the end token (sentencepiece #777, tokenizers
    #1263); unknown words stay what they are."""
    tokenizer = stored(tmp_path, make())
    assert tokenizer.end == 1 and 0 in tokenizer.encode("a b a <unk>").tolist()
    with pytest.raises(InputError, match="the text holds '</s>', which the tokenizer takes for its special token"):
        tokenizer.encode("a </s> a")
    assert metaspace().encode("h</s>").ids and 1 not in stored(tmp_path, metaspace()).encode("h </s>").tolist()


def test_no_character_is_left_out_without_a_word(tmp_path):
    """A BPE that has neither all bytes nor a token for what is unknown (tokenizers #517)."""
    few = byte_level(tmp_path)
    assert few.decode(few.encode("y\nx")) == "y\nx"
    with pytest.raises(InputError, match="has no token for 'a', 'b', nor one for unknown characters"):
        few.encode("xbay")
    whole = byte_level(tmp_path, alphabet=library.pre_tokenizers.ByteLevel.alphabet())
    assert whole.decode(whole.encode("xbay\u732b")) == "xbay\u732b"
    plain = definition(library.models.BPE({"<s>": 0, "x": 1, "y</w>": 2}, [], end_of_word_suffix="</w>"), ["<s>"])
    plain.add_tokens(["猫"])
    plain = stored(tmp_path, plain)
    assert plain.encode("xy猫").tolist() == [1, 2, 3]
    with pytest.raises(InputError, match="has no token for 's', nor one"):
        plain.encode("xsy")
    assert metaspace().token_to_id("é") is None and stored(tmp_path, metaspace()).encode("é").size == 3  # by its bytes


@pytest.mark.parametrize("use_regex", [True, False])
def test_tokens_that_go_across_lines_are_not_cut(tmp_path, use_regex):
    """A long document has the ids of the whole where a tokenizer merges across spaces."""
    tokenizer = byte_level(tmp_path, use_regex, library.pre_tokenizers.ByteLevel.alphabet())
    text = "x\ny" * 9000
    assert len(list(cut([text]))) > 1
    assert encode(Documents((text,)), tokenizer).tokens[1:-1].tolist() == tokenizer.encode(text).tolist()
    assert (len(tokenizer.encode("x\ny")) == 1) == (not use_regex)


# --- drawing


def test_a_prompt_is_not_repeated(tmp_path, monkeypatch):
    """Bytes drawn behind those of "é" that are no UTF-8 make all of them undecodable: what is drawn is shown, and the
    prompt as it was (llm-foundry #384)."""
    tokenizer = stored(tmp_path, metaspace())
    run = run_of(Documents(("x",)), tokenizer=tokenizer)
    assert tokenizer.decode([*tokenizer.encode("hi é"), 3 + 0xE9]) == "hi \ufffd\ufffd\ufffd"
    for drawn, text in (([3 + 0xE9, 260], "hi é\ufffdh"), ([262, 260], "hi é hh"), ([261, 1, 261], "hi éi")):
        monkeypatch.setattr(opened.LeftToRight, "__call__", lambda *_, drawn=drawn: [Drawn(np.array([drawn] * 2))])
        assert run.samples("hi é", 2, 2) == [text] * 2


@pytest.mark.parametrize("temperature", [1e-44, 1.2e-38, 2e-38, 1e-37, 1e-35, 1e-29, 1e-8])
def test_very_low_temperatures_take_the_likeliest(temperature):
    """Quotients are not infinite, so that no less likely token is drawn (vllm #1623, #2937)."""
    logits = jnp.asarray(np.random.default_rng(0).permutation(np.arange(-30.0, 30.0, 0.5)).astype(np.float32))[None]
    for run in (lambda f: f, jax.jit):
        out = run(lambda t, x: t(x))(Temperature(temperature), logits)
        assert np.isfinite(out).any() and not np.isposinf(out).any() and not np.isnan(out).any()
        assert choose(jnp.array([0.9]), out)[0] == logits[0].argmax()


def test_texts_that_are_cut_are_told(tmp_path, caplog):
    """Of a text longer than the window the rest is not read: that is said (sentence-transformers #4060)."""
    head = ClassificationHead("y", classes=("0", "1"))
    classifier = run_of(Table("own.csv"), Encoder(**SIZE, head=head), Classification(), Examples())
    tokenizer = Characters("0123456789", end_token=True)
    answering = run_of(Reverse(), EncoderDecoder(**SIZE), SequenceToSequence(), Examples(), tokenizer=tokenizer)
    width = classifier.config.window
    with caplog.at_level(logging.WARNING):
        for count in (width - 2, width - 1):  # and the start and the end
            caplog.clear()
            classifier.predict(["1", "1" * count, "1"])
            answering.predict(["1" * count])
            run_of(Documents(("x",))).samples("1" * (count + 1), 1)
            told = [
                f"{n} texts are longer than data.window={width}, and are cut" for n in ("1 of 3", "1 of 1", "1 of 1")
            ]
            assert [record.getMessage() for record in caplog.records] == told[: 3 * (count == width - 1)]


# --- evaluation and answers


def test_the_end_is_learned_where_it_fills_rows_too():
    """Padding with the end token hides no end (trl #976)."""
    tokenizer = Characters("abc", end_token=True)
    source = encode(Documents(TEXTS), tokenizer, {})
    assert source.padding == tokenizer.end
    for sampling in (Examples(), Examples(n_buckets=3), PackedDocuments()):
        ends = asked = 0
        for batch in sampling.full_pass(source, RowSize(17), 3):
            example = NextToken().prepare({name: jnp.asarray(a) for name, a in batch.items()}, jax.random.key(0))
            ends += int((example.weights * (example.targets == tokenizer.end)).sum())
            asked += int(example.weights.sum())
        assert ends == len(TEXTS) and asked == sum(map(len, TEXTS)) + ends
    (batch,) = (
        Batches((encode(Reverse(5, 2, 3, 9), Bytes(end_token=True), {}),), (1.0,), Examples(), RowSize(9), 9, 0).at(0),
    )
    example = SequenceToSequence().prepare({name: jnp.asarray(a) for name, a in batch.items()}, jax.random.key(0))
    assert (example.weights * (example.targets == 256)).sum(1).tolist() == [1.0] * 9


@pytest.mark.parametrize("sampling", [Examples(), Examples(n_buckets=3), PackedDocuments()], ids=str)
def test_the_loss_is_that_of_all_tokens_whatever_the_batches(sampling):
    """Batches of unequal weight, the last of fewer rows (transformers #16716, #24839, #41898)."""
    tokenizer = Characters("abc", end_token=True)
    run = run_of(Documents(TEXTS), sampling=sampling, tokenizer=tokenizer)
    nats = []
    for text in TEXTS:
        ids = np.array(tokenizer.document(text))
        h, _ = hidden(run.model, run.state.params, jnp.asarray(ids[None, :-1], jnp.int32), one_document(len(ids) - 1))
        nats += (-log_softmax(run.model.logits(run.state.params, h)[0])[np.arange(len(ids) - 1), ids[1:]]).tolist()
    for batch_size in (1, 2, 3, 5, 7):
        row = sized(run, batch_size).evaluate(encode(Documents(TEXTS), tokenizer, {} if sampling.examples else None))
        assert row["tokens"] == len(nats) and row["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
        assert row["bits_per_byte"] == pytest.approx(np.sum(nats) / sum(map(len, TEXTS)) / np.log(2), rel=1e-5)


def sized(run, batch_size):
    data = dataclasses.replace(run.config.data, batch_size=batch_size)
    return dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))


def test_accuracy_is_that_of_all_examples(tmp_path):
    """Rows that fill the last batch are neither right nor wrong (transformers #16716)."""
    path = tmp_path / "t.csv"
    path.write_text("\n".join(["text,y", *(f"{text},{len(text) % 2}" for text in TEXTS)]))
    corpus = Table(str(path), labels=("y",))
    head = ClassificationHead("y", classes=("0", "1"))
    run = run_of(corpus, Encoder(**SIZE, head=head), Classification(), Examples(n_buckets=2))
    chances = [row["y probabilities"] for row in run.predict(TEXTS)]
    nats = [-np.log(chance[str(len(text) % 2)]) for text, chance in zip(TEXTS, chances, strict=True)]
    right = [chance[str(len(text) % 2)] > 0.5 for text, chance in zip(TEXTS, chances, strict=True)]
    assert 0 < sum(right) < len(right)
    for batch_size in (1, 2, 3, 5):
        row = sized(run, batch_size).evaluate(encode(corpus, TOKENIZER, classes_of(corpus)))
        assert row["examples"] == len(TEXTS) and row["loss"] == pytest.approx(np.mean(nats), rel=1e-4)
        assert row["accuracy"] == pytest.approx(np.mean(right))


def test_an_answer_does_not_depend_on_others():
    """Padding of what is read beside a longer text is not attended to (transformers #17195, trl #975)."""
    tokenizer = Characters("0123456789", end_token=True)
    model = EncoderDecoder(**SIZE, head=LanguageHead(tied=False))
    run = run_of(Reverse(), model, SequenceToSequence(), Examples(), tokenizer=tokenizer)
    state = dataclasses.replace(run.state, params=loud(run.model, 5))  # whose answers hang on what is read
    run = dataclasses.replace(run, state=state)
    texts = ["1", "0123456789012345", "27", "18281828", "314"]
    alone = [run.answers([text], 8)[0] for text in texts]
    assert len(set(alone)) > 1
    for batch_size in (2, 3, 5):
        assert sized(run, batch_size).answers(texts, 8) == alone
