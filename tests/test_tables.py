"""Tables and synthetic tasks: rows as examples, what is wrong with a row, labels, splits."""

import csv
import dataclasses
import itertools
import json
import logging

import numpy as np
import pytest

from jaxformer.data import tasks
from jaxformer.data.datasets import classes_of, encode, prepare
from jaxformer.data.tables import Fold, Halves, Table
from jaxformer.data.tokenizers import BPE, Bytes, Characters
from jaxformer.spec import InputError, checked, known_specs

ROWS = [("a b", "x, y", "1"), ('say "hi"', "two\nlines", "0"), ("café", "tab\tinside", "1"), ("z", " w ", "2")]


def written(path, rows=ROWS, header=("text", "answer", "class")):
    """A file in the format that its name tells."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows))
    elif path.suffix == ".tsv":
        lines = [
            "\t".join(header),
            *("\t".join(cell.replace("\t", " ").replace("\n", " ") for cell in r) for r in rows),
        ]
        path.write_text("\n".join(lines))
    else:
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([header, *rows])
    return path


def table(path, **fields):
    return checked(Table(str(path), **({"target": "answer", "labels": ("class",)} | fields)))


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.jsonl"])
def test_formats_hold_the_same(tmp_path, name):
    corpus = table(written(tmp_path / name))
    clean = (lambda text: text.replace("\t", " ").replace("\n", " ")) if name == "t.tsv" else str
    assert [row.texts for row in corpus.rows()] == [(clean(a), clean(b)) for a, b, _ in ROWS]
    assert list(corpus.documents()) == [clean(text) for row in ROWS for text in row[:2]]
    assert corpus.label_values() == {"class": ["1", "0", "1", "2"]} and classes_of(corpus) == {"class": ("0", "1", "2")}


def test_no_line_of_names(tmp_path):
    (tmp_path / "t.tsv").write_text("where?\there\nwho?\tme\n")
    corpus = Table(str(tmp_path / "t.tsv"), "question", "answer", columns=("question", "answer"))
    assert [row.texts for row in corpus.rows()] == [("where?", "here"), ("who?", "me")]
    with pytest.raises(InputError, match=r"columns=.* must name the column 'text'"):
        checked(Table("x", columns=("a",)))


def test_a_folder_of_tables(tmp_path):
    written(tmp_path / "b.jsonl", ROWS[:1])
    written(tmp_path / "a.csv", ROWS[1:])
    assert [row.labels for row in table(tmp_path).rows()] == [("0",), ("1",), ("2",), ("1",)]


BAD = [
    ("t.csv", "text,class\na,1\nb\nc,2\n", 3, "1 cells, but there are 2 columns"),
    ("t.csv", "text,class\na,1\n,0\nc,2\n", 3, "'text' is empty"),
    ("t.csv", "text,class\na,1\nb, \nc,2\n", 3, "'class' is empty"),
    ("t.csv", b"text,class\na,1\n\xff\xfe,0\nc,2\n", 3, "'text' is not UTF-8"),
    ("t.csv", 'text,class\n"a\nb",1\nb\nc,2\n', 4, "1 cells"),
    ("t.tsv", "text\tclass\na\t1\nb\tc\t0\nc\t2\n", 3, "3 cells"),
    ("t.jsonl", '{"text":"a","class":1}\n{"text":\n{"text":"c","class":2}', 2, "no JSON object"),
    ("t.jsonl", '{"text":"a","class":1}\n[1]\n{"text":"c","class":2}', 2, "no JSON object"),
    ("t.jsonl", '{"text":"a","class":1}\n{"text":3,"class":1}\n{"text":"c","class":2}', 2, "'text' is int"),
    ("t.jsonl", '{"text":"a","class":1}\n{"text":"b"}\n{"text":"c","class":2}', 2, "'class' is missing"),
    ("t.jsonl", '{"text":"a","class":1}\n{"text":"b","class":1.5}\n{"text":"c","class":2}', 2, "'class' is float"),
    ("t.jsonl", '{"text":"a","class":1}\n{"text":"\\ud800","class":1}\n{"text":"c","class":2}', 2, "is not UTF-8"),
]


@pytest.mark.parametrize(("name", "content", "line", "reason"), BAD)
def test_a_malformed_row_is_told_with_file_line_and_reason(tmp_path, caplog, name, content, line, reason):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match="fix the row, or leave it out by data") as error:
        list(Table(str(path), labels=("class",)).rows())
    assert f"{path}, line {line}: " in str(error.value) and reason in str(error.value)
    corpus = Table(str(path), labels=("class",), malformed="skip")
    with caplog.at_level(logging.WARNING):
        rows = [row.labels for row in corpus.rows()]
    assert rows == [("1",), ("2",)] and "1 malformed rows left out, the first in line" in caplog.text
    source = encode(corpus, Bytes(), classes_of(corpus))
    assert source.n_examples == 2 and source.labels["class"].tolist() == [0, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,klass\na,1\n", "no column 'class' among 'text', 'klass'"),
        ("text,class,class\na,1,2\n", "more than one column 'class'"),
    ],
)
def test_columns_must_be_there(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=message):
        list(Table(str(tmp_path / "t.csv"), labels=("class",), malformed="skip").rows())


@pytest.mark.parametrize(("content", "line"), [('text\na\n"b"x\nc\n', 3), ('text\na\nb\n"c\nd\n', 4)])
def test_quotes_that_do_not_match_end_it(tmp_path, content, line):
    """Where the next row begins is not known then."""
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(InputError, match=rf"t.csv, line {line}: .*; fix the quotes"):
        list(Table(str(tmp_path / "t.csv"), malformed="skip").rows())


def test_long_cells_are_texts(tmp_path):
    text = "word\n" * 40_000
    assert [row.texts for row in Table(str(written(tmp_path / "t.csv", [(text, "", "")]))).rows()] == [(text,)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": ("y", "y")}, "labels=.* must differ"),
        ({"columns": ("text", "text")}, "columns=.* must differ"),
        ({"several": ("y",)}, "several=.* must be among labels"),
        ({"separator": ""}, "separator='' must hold a character"),
        ({"malformed": "warn"}, "malformed='warn' must be stop or skip"),
    ],
)
def test_tables_refuse(fields, message):
    with pytest.raises(InputError, match=message):
        checked(Table("x", **fields))


def test_rows_of_text_are_split_as_text(tmp_path):
    """Windows know no examples: labels or not, nothing that is validated on is trained on."""
    corpus = Table(str(written(tmp_path / "t.csv")), labels=("class",))
    (train,), (valid,) = (p := prepare(corpus, Bytes(), None, 0.5)).train, p.valid
    assert len(train.tokens) + len(valid.tokens) == len(encode(corpus, Bytes()).tokens) and not train.labels


def test_other_names_are_refused(tmp_path):
    (tmp_path / "t.txt").write_text("text\na\n")
    with pytest.raises(InputError, match=r"must end in .csv, .tsv, .jsonl, .ndjson"):
        list(Table(str(tmp_path / "t.txt")).rows())


def test_several_classes_in_a_cell(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text":"a","tags":["x","y"]}\n{"text":"b","tags":"y; z"}\n{"text":"c","tags":[]}\n')
    corpus = checked(Table(str(path), labels=("tags",), several=("tags",), separator=";"))
    assert corpus.label_values() == {"tags": [("x", "y"), ("y", "z"), ()]}
    source = encode(corpus, Bytes(), classes_of(corpus))
    assert source.labels["tags"].tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]


def test_a_class_that_training_has_not(tmp_path):
    train, valid = table(written(tmp_path / "a.csv")), table(written(tmp_path / "b.csv", [("q", "r", "9")]))
    with pytest.raises(InputError, match=r"data.valid=.*example 1 has class='9', which must be one of 0, 1, 2"):
        prepare(train, Bytes(), valid, examples=True)


def test_examples_are_what_their_ids_say(tmp_path):
    """Two documents for each, with and without ids that begin and end them; none is lost if it has no id."""
    corpus = table(written(tmp_path / "t.csv"))
    for tokenizer in (Bytes(), Bytes(end_token=True)):
        source = prepare(corpus, tokenizer, corpus, examples=True).train[0]
        assert source.texts == 2 and source.n_examples == 4 and source.labels["class"].tolist() == [1, 0, 1, 2]
        for number, row in enumerate(ROWS):
            for ids, text in zip(source.example(number), row[:2], strict=True):
                assert ids.tolist() == tokenizer.document(text)
        part = source.pick(np.array([1, 3]))
        assert [ids.tolist() for ids in part.example(1)] == [tokenizer.document(text) for text in ROWS[3][:2]]
        assert part.labels["class"].tolist() == [0, 2] and part.n_tokens == part.sizes.sum()


def test_a_split_keeps_each_classs_share(tmp_path):
    rows = [(f"text {i}", "", "ab"[i % 10 < 3]) for i in range(200)]
    corpus = Table(str(written(tmp_path / "t.csv", rows)), labels=("class",))
    found = []
    for seed in (0, 1):
        prepared = prepare(corpus, Bytes(), None, 0.2, seed, True)
        (train,), (valid,) = prepared.train, prepared.valid
        assert np.bincount(train.labels["class"]).tolist() == [112, 48]
        assert np.bincount(valid.labels["class"]).tolist() == [28, 12]
        texts = [
            {bytes(part.example(i)[0].astype(np.uint8)) for i in range(part.n_examples)} for part in (train, valid)
        ]
        assert not texts[0] & texts[1] and len(texts[0] | texts[1]) == 200
        found.append(texts[1])
        again = prepare(corpus, Bytes(), None, 0.2, seed, True).valid[0]
        assert np.array_equal(again.starts, valid.starts)
    assert 0 < len(found[0] & found[1]) < 40
    last = prepare(corpus, Bytes(), None, 0.2, examples=True).valid[0]
    assert last.starts.tolist() == encode(corpus, Bytes(), classes_of(corpus)).starts[160:].tolist()


# --- tasks


@pytest.mark.parametrize("task", [t for t in (tasks.Copy, *known_specs(tasks.Copy)) if t is not tasks.Translation])
def test_a_task_is_a_function_of_its_fields(task):
    seed = 0 if task is tasks.Alternating else 4
    pairs = list(checked(task(length=7, shortest=3, examples=5000, seed=seed)).pairs())
    assert len(pairs) == 5000 and list(task(length=7, shortest=3, examples=50, seed=seed).pairs()) == pairs[:50]
    if task is not tasks.Alternating:
        assert list(task(length=7, shortest=3, examples=50, seed=5).pairs()) != pairs[:50]
        assert len(set(pairs)) > 4000
    answer = {
        "Copy": lambda a: a,
        "Reverse": lambda a: a[::-1],
        "Sort": lambda a: "".join(sorted(a)),
        "Alternating": lambda a: a.translate(str.maketrans("01", "10")),
        "Addition": lambda a: str(sum(map(int, a.split("+")))),
        "Recall": lambda a: a[0],
    }[task.__name__]
    for source, target in pairs:
        assert target == answer(source)
        assert all(3 <= len(part) <= 7 for part in source.split("+"))
    lengths = np.bincount([len(source.split("+")[0]) for source, _ in pairs], minlength=8)[3:]
    assert task is tasks.Addition or (lengths > 800).all()


def test_sums_come_again_only_after_all_others():
    """So that those for validation are none of those for training."""
    pairs = list(tasks.Addition(length=2, shortest=2, examples=90**2 + 700).pairs())
    numbers = np.array([[int(number) for number in source.split("+")] for source, _ in pairs])
    assert len({*pairs[: 90**2]}) == 90**2 and pairs[90**2 :] == pairs[:700]
    for column in numbers[: 90**2].T:
        assert (np.bincount(column, minlength=100)[10:] == 90).all()
    assert len({*tasks.Addition(length=18, examples=10_000).pairs()}) == 10_000
    first, second = numbers[:90].T
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.3 and (np.diff(first) > 0).any() and (np.diff(first) < 0).any()


def test_symbols_are_drawn_evenly():
    text = "".join(source for source, _ in tasks.Copy(length=20, symbols=13, examples=2000).pairs())
    counts = np.array([text.count(symbol) for symbol in tasks.SYMBOLS[:13]])
    assert counts.sum() == 40_000 and abs(counts - 40_000 / 13).max() < 250


def test_what_is_recalled_stands_in_noise_of_other_symbols():
    asked = set("01234")
    for text, answer in tasks.Recall(length=11, shortest=1, symbols=5, examples=500).pairs():
        assert answer == text[0] and answer in asked and not asked & set(text[1:])


def test_a_translation_follows_its_rules():
    """Read off the texts alone: a dictionary, adjectives behind their noun, an article that its noun decides."""
    pairs = list(checked(tasks.Translation(length=11, shortest=5, symbols=7, examples=3000, seed=3)).pairs())
    assert list(tasks.Translation(length=11, shortest=5, symbols=7, examples=50, seed=3).pairs()) == pairs[:50]
    assert list(tasks.Translation(length=11, shortest=5, symbols=7, examples=50, seed=4).pairs()) != pairs[:50]
    said, articles, lengths = {}, {}, np.zeros(12, int)
    for source, target in pairs:
        words, answer = source.split(), target.split()
        lengths[len(words)] += 1
        assert len(words) == len(answer) and words[0] == tasks.ARTICLE
        second = words.index(tasks.ARTICLE, 1)
        noun, verb = second - 2, second - 1  # places of the first phrase's noun and of the verb
        order = [noun, *range(1, noun), verb, len(words) - 1, *range(second + 1, len(words) - 1)]
        for place, word in zip(order, [w for w in answer if w not in tasks.ARTICLES], strict=True):
            assert said.setdefault(words[place], word) == word
        for place, article in ((noun, answer[0]), (len(words) - 1, answer[second])):
            assert articles.setdefault(words[place], article) == article
    assert len(said) == len(set(said.values())) == 3 * 7 and not set(said) & set(said.values())
    assert sorted(articles.values()) == ["el"] * 4 + ["un"] * 3
    assert lengths[:5].sum() == 0 and abs(lengths[5:] - 3000 / 7).max() < 80


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (tasks.Recall(symbols=36), "symbols=36 must be less than 36: the others are the noise"),
        (tasks.Translation(shortest=4), "shortest=4 must be at least 5: two articles"),
        (tasks.Translation(length=4, shortest=None), "length=4 must be at least 5: two articles"),
        (tasks.Copy(shortest=11), "shortest=11 must lie between 1 and length=10"),
        (tasks.Sort(symbols=37), "symbols=37 must lie between 1 and 36"),
        (tasks.Reverse(examples=1), "examples=1 must be at least 2"),
        (tasks.Addition(symbols=2), "symbols=2 must be 10"),
        (tasks.Copy(seed=-1), "seed=-1 must be at least 0"),
        (tasks.Alternating(seed=1), "symbols=2 and seed=1 must be 2 and 0"),
    ],
)
def test_tasks_refuse(task, message):
    with pytest.raises(InputError, match=message):
        checked(task)


def test_a_task_is_prepared_like_any_corpus():
    prepared = prepare(tasks.Reverse(length=5, examples=40), Characters(end_token=True), examples=True)
    (train,), (valid,) = prepared.train, prepared.valid
    assert (train.n_examples, valid.n_examples) == (36, 4)
    first, second = (prepared.tokenizer.decode(ids) for ids in valid.example(3))
    assert second == first[::-1] and len(first) == 5


# --- parts of tables


def numbered(tmp_path, count=23):
    rows = [(f"text {i}", f"answer {i}", str(i % 2)) for i in range(count)]
    return written(tmp_path / "n.csv", rows), rows


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_are_a_partition_and_what_is_put_aside_is_not_read(tmp_path, folds):
    path, rows = numbered(tmp_path)
    of = lambda fold, inside: Fold(str(path), labels=("class",), fold=fold, folds=folds, inside=inside)
    own = [list(of(fold, True).documents()) for fold in range(folds)]
    assert (
        sorted(itertools.chain(*own)) == sorted(row[0] for row in rows) and max(map(len, own)) - min(map(len, own)) <= 1
    )
    for fold in range(folds):
        rest = of(fold, False)
        assert sorted([*rest.documents(), *own[fold]]) == sorted(row[0] for row in rows)
        assert rest.label_values()["class"] == [row[2] for row in rows if row[0] not in own[fold]]
        assert len({rest.fingerprint(), of(fold, True).fingerprint(), of((fold + 1) % folds, False).fingerprint()}) == 3


def test_a_malformed_row_keeps_its_number_among_the_folds(tmp_path, caplog):
    """Whether it is one depends on which columns are read, and what is put aside must not."""
    path = written(tmp_path / "n.csv", [(f"text {i}", "answer", "" if i == 3 else "a") for i in range(23)])
    of = lambda inside, **fields: [*Fold(str(path), inside=inside, malformed="skip", **fields).documents()]
    rest, aside = of(False, labels=("class",)), of(True, labels=("class",))
    assert set(of(True)) == set(aside) and set(of(False)) == {*rest, "text 3"}
    assert sum("malformed" in message for message in caplog.messages) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fold": 5}, "fold=5 must be at least 0 and less than data.corpus.folds=5"),
        ({"fold": -1}, "fold=-1 must be at least 0"),
        ({"folds": 1}, "folds=1 must be at least 2"),
    ],
)
def test_folds_have_rules(fields, message):
    with pytest.raises(InputError, match=message):
        checked(Fold("x.csv", **fields), "data.corpus.")


TWEETS = [
    "one two three four",
    "a",
    "Two  spaces and\na line",
    "see http://t.co/x now @you then go",
    "café is not ascii",
    "a     gap",
    "",
]


def test_halves_are_the_text_and_teach_a_tokenizer_the_same(tmp_path):
    texts = [text for text in TWEETS if text] * 3
    path = written(tmp_path / "h.csv", [(text, "b", "1") for text in texts])
    whole, halves = Fold(str(path), folds=7), Halves(str(path), folds=7)
    pairs = [row.texts for row in halves.rows()]
    assert halves.texts == 2 and [a + b for a, b in pairs] == list(whole.documents())
    assert pairs[0] == ("a", "") and ("one two", " three four") in pairs
    assert {("a     gap", ""), ("see http://t.co/x now @you then", " go")} < set(pairs)
    assert source_lengths(halves) == len(pairs)
    tokenizer = BPE(300, drop=r"https?://\S+|@\w+")
    assert tokenizer.fit(whole) == tokenizer.fit(halves)
    asked = halves.asked(pairs=False)
    assert type(asked) is Table and asked.texts == 1 and len(list(asked.rows())) == len(texts)


def source_lengths(corpus):
    return encode(corpus, Bytes(), {}).n_examples


def test_another_file_has_all_its_rows(tmp_path):
    """What is put aside is of one table: a file to be judged or answered is read whole."""
    path = written(tmp_path / "h.csv", [(f"text {i}", "b", "1") for i in range(11)])
    fold, halves = Fold("x.csv", labels=("class",), folds=5), Halves("x.csv", folds=5)
    other = fold.at(str(path))
    assert other == Table(str(path), labels=("class",)) and len(list(other.rows())) == 11
    assert len(list(dataclasses.replace(fold, path=str(path)).asked(False).rows())) == 8
    assert halves.at(str(path)).texts == 2 and len(list(checked(halves.at(str(path))).rows())) == 11
    with pytest.raises(InputError, match="folds=1 must be at least 2"):
        checked(Fold("x.csv", folds=1))


def test_halves_have_no_labels_and_no_second_text():
    for fields in ({"labels": ("class",)}, {"target": "answer"}):
        with pytest.raises(InputError, match="halves are the pairs"):
            checked(Halves("x.csv", **fields))
