"""Texts that a run has not seen: evaluated as its own corpus reads them, and answered one by one."""

import csv
import dataclasses
import gzip
import json
import logging

import jax.numpy as jnp
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from tiny import SIZES, decoder, loud

from jaxformer import Config, Data, Encoder, EncoderDecoder
from jaxformer.data.batches import Examples, PackedDocuments
from jaxformer.data.corpora import (
    Corpus,
    JSONLines,
    Mixture,
    Parquet,
    PythonTopics,
    TextFiles,
    TextLines,
    TinyShakespeare,
    TokenFile,
)
from jaxformer.data.tables import Table
from jaxformer.data.tasks import Addition, Reverse
from jaxformer.data.tokenizers import Bytes, Characters
from jaxformer.learning.objectives import Classification, Contrastive, NextToken, SequenceToSequence
from jaxformer.model.heads import ClassificationHead, EmbeddingHead, MultiLabelHead
from jaxformer.run.opened import Run
from jaxformer.run.plan import prepare_data
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError

SIZE = {name: size for name, size in SIZES.items() if name != "vocab_size"} | {"n_layers": 2}
TOKENIZER = Bytes(end_token=True)
TEXTS = ["eins zwei", "drei\nvier", "fünf", "sechs sieben acht"]


def run_of(corpus, model=None, objective=None, sampling=None, valid=None, tokenizer=TOKENIZER):
    model = model or decoder(n_layers=2, vocab_size=None)
    data = Data(corpus, valid, tokenizer=tokenizer, sampling=sampling or PackedDocuments(), batch_size=3)
    config = Config("run", model, data, objective or NextToken())
    whole = Run(config, tokenizer, TrainState(jnp.int32(5), {}, ()))
    return dataclasses.replace(whole, state=TrainState(jnp.int32(5), loud(whole.model), ()))


def put(path, text):
    path.write_bytes(text.encode())
    return str(path)


def write_csv(path, *rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return str(path)


# --- evaluation


def lines(path, texts):
    return TextLines(put(path / "a.txt", "\n\n".join(text.replace("\n", " ") for text in texts)))


def json_lines(path, texts):
    rows = [json.dumps({"body": text, "text": "another"}) for text in texts]
    return JSONLines(put(path / "a.jsonl", "\n".join(rows)), field="body")


def table(path, texts):
    rows = [(str(i), text) for i, text in enumerate(texts)]
    return Table(
        write_csv(path / "a.csv", *rows, ("one cell",)), "second", columns=("first", "second"), malformed="skip"
    )


def parquet(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({"body": texts, "n": [1] * len(texts)}), path / "a.parquet")
    return Parquet(str(path / "a.parquet"), column="body")


def token_file(path, texts):
    ids = np.array([i for text in texts for i in [256, *text.encode()]] + [256], np.uint32)
    (path / "a.bin").write_bytes(ids.tobytes())
    return TokenFile(str(path / "a.bin"), dtype="uint32")


@pytest.mark.parametrize("write", [lines, json_lines, table, parquet, token_file])
def test_a_file_is_read_as_the_runs_own_corpus_is(tmp_path, write):
    """Of the same documents the loss is that of a corpus to validate on, to the bit; read as plain text it is not."""
    (tmp_path / "own").mkdir()
    own, other = write(tmp_path / "own", ["ein Wort", "noch eins"]), write(tmp_path, TEXTS)
    run = run_of(own, valid=other)
    expected = run.evaluate(*prepare_data(run.config, run.tokenizer).valid) | {"split": other.path}
    assert run.evaluate(other.path) == expected and expected["tokens"] > 40
    assert run.evaluate(run.corpus_of({"data.corpus.path": other.path})) == expected
    plain = run_of(PythonTopics())
    fields = {f"data.corpus.{field.name}": getattr(other, field.name) for field in dataclasses.fields(other)}
    named = plain.corpus_of(fields | {"data.corpus": type(other).__name__})
    assert named == other and plain.evaluate(named) == expected
    if write is not token_file:
        with pytest.raises(InputError) if write is parquet else pytest.MonkeyPatch.context():
            assert plain.evaluate(other.path)["loss"] != expected["loss"]


class Hat(Corpus):
    """A stranger's, which knows of no file."""

    def documents(self):
        yield "rabbit"


def test_at_is_the_same_kind_of_text_elsewhere():
    for corpus in (
        PythonTopics(),
        TinyShakespeare(),
        TextFiles("x"),
        Mixture((PythonTopics(), TextFiles("x")), (1, 2)),
    ):
        assert corpus.at("y") == TextFiles("y")
    run, a, b, c = run_of(TextLines("x")), JSONLines("a", "body"), JSONLines("b", "body"), JSONLines("c")
    assert Mixture((a, b), (1, 2)).at("y") == JSONLines("y", "body")
    for corpus, message in (
        (
            Mixture((a, b, c), (1, 1, 1)),
            "Mixture has parts of several kinds; name the class that reads the file, as by --data",
        ),
        (Hat(), "Hat is read from no file; name the class .* --data.corpus=JSONLines --data.corpus.path=y"),
        (Reverse(), "Reverse is made up; .* as by --data.corpus=Table --data.corpus.path=y --data.corpus.text=COLUMN"),
    ):
        with pytest.raises(InputError, match=message):
            corpus.at("y")
        other = dataclasses.replace(run, config=dataclasses.replace(run.config, data=Data(corpus)))
        with pytest.raises(InputError, match=f"file='y': {message}"):
            other.evaluate("y")
    row = run.evaluate(Hat())
    assert row["split"] == "Hat" and row["tokens"] == len("rabbit") + 1


def test_only_the_corpus_may_be_another():
    run = run_of(TextLines("x"))
    for overrides, message in (
        ({"data.corpus": "JSONLines"}, "data.corpus.path must be given, as --data.corpus.path=VALUE"),
        ({"data.corpus.pth": "y"}, "data.corpus.pth: TextLines has no such field; did you mean path?"),
        ({"data.corpos": "TextFiles"}, "data.corpos: Data has no such field; did you mean corpus?"),
        ({"data.corpus": "TextLine"}, "data.corpus='TextLine' must be one of"),
        ({"data.corpus": "TokenFile", "data.corpus.path": "y", "data.corpus.dtype": "int8"}, "dtype='int8' must be"),
        ({"data.batch_size": "3"}, "data.batch_size=3 is as it was in training; only data.corpus may differ"),
        ({"model.n_layers": "3", "data.corpus.path": "y"}, "model.n_layers=3 is as it was in training"),
    ):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            run.corpus_of(overrides)
    assert run.corpus_of({"data.corpus.field": "b", "data.corpus.path": "y", "data.corpus": "JSONLines"}) == JSONLines(
        "y", "b"
    )


def test_what_a_run_was_not_trained_on_is_refused(tmp_path):
    pairs = Table(write_csv(tmp_path / "p.csv", ("text", "other", "class"), ("a", "b", "1")), target="other")
    with pytest.raises(InputError, match="was trained on single texts, and these are pairs; leave the target out"):
        run_of(TextLines("x")).evaluate(pairs)
    model = EncoderDecoder(**SIZE)
    run = run_of(Reverse(), model, SequenceToSequence(), Examples())
    with pytest.raises(InputError, match="was trained on pairs of texts, and these are single ones"):
        run.evaluate(PythonTopics())
    head = ClassificationHead("class", classes=("0", "1"))
    single = dataclasses.replace(pairs, target=None, labels=("class",))
    run = run_of(single, Encoder(**SIZE, head=head), Classification(), Examples())
    run = dataclasses.replace(run, classes={"class": ("0", "1")})
    assert run.evaluate(single.path)["examples"] == 1
    with pytest.raises(InputError, match=r"labels of the column 'class', and a batch has no labels_class; name the"):
        run.evaluate(dataclasses.replace(single, labels=()))
    with pytest.raises(InputError, match=r"labels_class must have the shape \(\) in a row, but has \(2,\)"):
        run.evaluate(dataclasses.replace(single, several=("class",)))


# --- answers


def classifier(corpus, joined=False, head=None, tokenizer=TOKENIZER):
    head = head or ClassificationHead("long", classes=("no", "yes"))
    model = Encoder(**SIZE, head=head)
    return run_of(corpus, model, Classification(), Examples(joined=joined), tokenizer=tokenizer)


def places(rows):
    return [{name: row[name] for name in ("file", "line", "row", "example") if name in row} for row in rows]


def said(rows):
    return [row["long probabilities"]["yes"] for row in rows]


def alone(run, texts, seconds=None):
    """What is said of each text by itself."""
    return pytest.approx(
        [said(run.predict([text], None if seconds is None else [seconds[i]]))[0] for i, text in enumerate(texts)],
        abs=1e-5,
    )


OWN = Table("own.csv", "word", labels=("long",), separator=";")


@pytest.mark.parametrize("name", ["q.csv", "q.csv.gz", "q.jsonl", "q.tsv", "Q.CSV", "q.JSONL.GZ"])
def test_each_row_of_a_table_is_answered_with_its_line(tmp_path, name):
    """By the columns of the run's own; whether there are labels or not; a cell may hold a line break."""
    kind = name.lower().removesuffix(".gz")
    run, words = classifier(OWN), ["eins", "zwei\ndrei" if kind == "q.csv" else "zwei", "vier"]
    for labels in (["no", "?", ""], None):
        cells = [words] if labels is None else [words, labels]
        names = ["word"] if labels is None else ["word", "long"]
        if kind == "q.jsonl":
            text = "\n".join(json.dumps(dict(zip(names, row, strict=True))) for row in zip(*cells, strict=True))
        elif kind == "q.tsv":
            text = "\n".join("\t".join(row) for row in [names, *zip(*cells, strict=True)])
        else:
            write_csv(tmp_path / "plain", names, *zip(*cells, strict=True))
            text = (tmp_path / "plain").read_bytes().decode()
        data = gzip.compress(text.encode()) if name.lower().endswith(".gz") else text.encode()
        (tmp_path / name).write_bytes(data)
        rows = run.predict_file(str(tmp_path / name))
        first = 1 if kind == "q.jsonl" else 2
        after = 5 if kind == "q.csv" else first + 2
        assert places(rows) == [{"line": first}, {"line": first + 1}, {"line": after}]
        assert said(rows) == alone(run, words) and len(set(said(rows))) == 3


def test_each_line_that_is_not_blank_is_answered_with_its_line(tmp_path):
    run = classifier(OWN)
    rows = run.predict_file(put(tmp_path / "q.txt", "eins\n\nword, long\n  \nzwei drei"))
    assert places(rows) == [{"line": 1}, {"line": 3}, {"line": 5}]
    assert said(rows) == alone(run, ["eins", "word, long", "zwei drei"])
    with pytest.raises(InputError, match=r"file='.*q.txt': holds no text to be answered"):
        run.predict_file(put(tmp_path / "q.txt", "\n \n"))


def test_names_tell_how_a_file_is_read(tmp_path):
    """By the fields of the run's own corpus where it has files of that name, else by a table's defaults."""
    run = classifier(JSONLines("own.jsonl", "body"))
    path = put(tmp_path / "q.jsonl", '{"text": "a", "body": "eins"}\n\n{"body": null}\n{"body": "zwei"}')
    assert said(run.predict_file(path)) == alone(run, ["eins", "zwei"])
    assert places(run.predict_file(path)) == [{"line": 1}, {"line": 4}]
    path = write_csv(tmp_path / "q.csv", ("body", "text"), ("eins", "zwei"))
    assert said(run.predict_file(path)) == alone(run, ["zwei"])
    (tmp_path / "q.csv.gz").write_bytes(gzip.compress((tmp_path / "q.csv").read_bytes()))
    assert said(run.predict_file(f"{path}.gz")) == alone(run, ["zwei"])
    run = classifier(Parquet("own.parquet", "body"))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["eins", "zwei"]}), tmp_path / "q.parquet")
    rows = run.predict_file(str(tmp_path / "q.parquet"))
    assert said(rows) == alone(run, ["eins", "zwei"]) and places(rows) == [{"row": 1}, {"row": 2}]


def test_several_files_are_named(tmp_path):
    run, folder = classifier(OWN), tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "b.csv", ("long", "word"), ("no", "drei"))
    put(folder / "a.jsonl", '{"word": "eins"}\n{"word": "zwei"}')
    put(folder / "readme.txt", "no question")
    rows = run.predict_file(str(folder))
    a, b = str(folder / "a.jsonl"), str(folder / "b.csv")
    assert places(rows) == [{"file": a, "line": 1}, {"file": a, "line": 2}, {"file": b, "line": 2}]
    assert said(rows) == alone(run, ["eins", "zwei", "drei"])
    assert run.predict(run.corpus_of({"data.corpus.path": str(folder)})) == rows
    lines = tmp_path / "lines"
    lines.mkdir()
    put(lines / "a", "eins"), put(lines / "b.txt", "\nzwei")
    assert places(run.predict_file(str(lines))) == [
        {"file": str(lines / "a"), "line": 1},
        {"file": str(lines / "b.txt"), "line": 2},
    ]


def test_a_class_is_named_where_names_of_files_do_not_tell(tmp_path):
    run = classifier(OWN)
    path = write_csv(tmp_path / "q.csv", ("question", "word"), ("eins", "-"), ("zwei", "-"))
    fields = {"data.corpus": "Table", "data.corpus.path": path, "data.corpus.text": "question"}
    rows = run.predict(run.corpus_of(fields))
    assert said(rows) == alone(run, ["eins", "zwei"]) and places(rows) == [{"line": 2}, {"line": 3}]
    with pytest.raises(InputError, match=r"q.csv: no column 'q' among 'question', 'word'"):
        run.predict(run.corpus_of(fields | {"data.corpus.text": "q"}))
    put(tmp_path / "document.txt", "eins\nzwei")
    rows = run.predict(TextFiles(str(tmp_path / "document.txt")))
    assert said(rows) == alone(run, ["eins\nzwei"]) and places(rows) == [{"line": 1}]


def test_malformed_rows_are_left_out_and_told_if_the_table_says_so(tmp_path, caplog):
    path = write_csv(tmp_path / "q.csv", ("word", "long"), ("eins", "no"), ("zwei",), ("drei", ""))
    with pytest.raises(InputError, match=r"q.csv, line 3: 1 cells, but there are 2 columns; fix the row"):
        classifier(OWN).predict_file(path)
    run = classifier(dataclasses.replace(OWN, malformed="skip"))
    with caplog.at_level(logging.WARNING):
        rows = run.predict_file(path)
    assert places(rows) == [{"line": 2}, {"line": 4}] and said(rows) == alone(run, ["eins", "drei"])
    assert "1 malformed rows left out, the first in line 3" in caplog.text


def test_pairs_that_are_joined_are_answered_by_both_texts(tmp_path):
    run = classifier(Table("own.csv", "word", "other", labels=("long",)), joined=True)
    path = write_csv(tmp_path / "q.csv", ("other", "word"), ("eins", "zwei"), ("drei\n", "vier"), ("fünf", "sechs"))
    rows = run.predict_file(path)
    assert places(rows) == [{"line": 2}, {"line": 3}, {"line": 5}]
    assert said(rows) == alone(run, ["zwei", "vier", "sechs"], ["eins", "drei\n", "fünf"])
    with pytest.raises(InputError, match="no column 'other' among 'word'"):
        run.predict_file(write_csv(tmp_path / "q.csv", ("word",), ("eins",)))
    with pytest.raises(InputError, match=r"was trained on pairs of texts; give a table of both, as data.corpus=Table"):
        run.predict_file(put(tmp_path / "q.txt", "eins\nzwei"))
    run = classifier(Addition(), joined=True)
    with pytest.raises(InputError, match=r"data.corpus.text=COLUMN data.corpus.target=COLUMN"):
        run.predict_file(write_csv(tmp_path / "q.csv", ("text", "target"), ("eins", "zwei")))


class Doubtful(Corpus):
    """Second texts of characters that no one knows, and is not asked for."""

    texts = 2

    def documents(self):
        yield from ("1", "?", "2", "??")


def test_pairs_apart_are_answered_by_the_first_text(tmp_path):
    own = Table("own.csv", "word", "other")
    run = run_of(own, Encoder(**SIZE, head=EmbeddingHead(width=7)), Contrastive(), Examples())
    path = write_csv(tmp_path / "q.csv", ("other", "word"), ("eins", "zwei"), ("drei", "vier"))
    rows = run.predict_file(path)
    for row, text in zip(rows, ["zwei", "vier"], strict=True):
        assert row["embedding"] == pytest.approx(run.predict([text])[0]["embedding"], abs=1e-5)
    only = write_csv(tmp_path / "q.csv", ("word",), ("zwei",), ("vier",))
    assert [row["line"] for row in run.predict_file(only)] == [2, 3]
    tokenizer = Characters("0123456789", end_token=True)
    run = run_of(Reverse(), EncoderDecoder(**SIZE), SequenceToSequence(), Examples(), tokenizer=tokenizer)
    assert len(run.predict(Doubtful())) == 2
    task = Reverse(4, examples=3, seed=1)
    found = run.predict(task)
    assert places(found) == [{"example": i} for i in (1, 2, 3)]
    assert [row["text"] for row in found] == run.answers([source for source, _ in task.pairs()])


def test_answers_of_unknown_characters_name_the_lines(tmp_path):
    run = classifier(OWN, tokenizer=Characters("adefilnorsuvwxz", end_token=True))
    path = write_csv(tmp_path / "q.csv", ("word", "long"), ("eins", "no"), ("z\nwei!", "yes"), ("ab", ""), ("!", ""))
    with pytest.raises(InputError) as error:
        run.predict_file(path)
    assert f"file={path!r}: characters '\\n' (U+000A, {path}, line 3), '!' (U+0021, {path}, line 3), " in str(
        error.value
    )
    assert f"'b' (U+0062, {path}, line 5) are not known to the tokenizer; remove them" in str(error.value)


def test_a_label_named_as_a_place_is_still_said(tmp_path):
    run = classifier(OWN, head=MultiLabelHead("line", classes=("a", "b")))
    (row,) = run.predict_file(put(tmp_path / "q.txt", "eins"))
    assert set(row) == {"line", "line probabilities"} and isinstance(row["line"], list)
