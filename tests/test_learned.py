"""Each objective from a table to what the run says of a text: tiny runs, opened again, warm starts between them."""

import json

import chex
import numpy as np
import pytest

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, EncoderDecoder, Train
from jaxformer.commands.main import run as run_command
from jaxformer.commands.predict import predict as predict_command
from jaxformer.data.batches import Examples, PackedDocuments
from jaxformer.data.corpora import TextLines
from jaxformer.data.sources import Source
from jaxformer.data.tables import Table
from jaxformer.data.tasks import Alternating, Reverse
from jaxformer.data.tokenizers import Characters, TokenizerFile
from jaxformer.learning.objectives import (
    Classification,
    Contrastive,
    Masked,
    NextToken,
    PrefixLM,
    SequenceToSequence,
    SpanCorruption,
)
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.baselines import GRU
from jaxformer.model.heads import (
    BinaryHead,
    ClassificationHead,
    EmbeddingHead,
    LanguageHead,
    MaskedLanguageHead,
    MultiLabelHead,
    TokenClassificationHead,
)
from jaxformer.model.layers import XavierUniform
from jaxformer.model.masks import Prefix
from jaxformer.model.models import Embedding
from jaxformer.model.positions import RelativeBias
from jaxformer.run.manifest import sha256
from jaxformer.run.opened import Run
from jaxformer.spec import InputError

SIZE = {"d_model": 24, "n_heads": 2, "n_layers": 1, "d_ff": 31, "context_length": 29, "position": RelativeBias(8, 11)}
SIZE |= {"initializer": XavierUniform(0.2)}
SPECIAL = Characters(end_token=True, mask_token=True, sentinels=4)
ADAM = AdamW(Constant(5e-3), weight_decay=0.0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Tables of words: their first letter, which vowels they have, whether they are long; and the same in capitals."""
    path = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(96):
        word = "".join(rng.choice(list("abeiou"), rng.integers(2, 9)))
        vowels = [v for v in "aeiou" if v in word]
        rows.append(
            {"word": word, "upper": word.upper(), "long": int(len(word) > 5), "vowels": vowels, "first": word[0]}
        )
    (path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "lines.txt").write_text("".join(f"{row['word']} is {row['upper']}\n" for row in rows))
    return path


def table(home, **fields):
    return Table(str(home / "words.jsonl"), "word", **fields)


def run_of(home, name, model, objective, corpus, steps=60, data=None, **fields):
    data = {"tokenizer": SPECIAL, "sampling": Examples(), "batch_size": 16} | (data or {})
    train = Train(steps=steps, eval_every=steps, save_every=steps, steps_per_call=5, log_every=5)
    config = Config(str(home / name), model, Data(corpus, **data), objective, ADAM, train, **fields)
    jaxformer.train(config)
    return jaxformer.open_run(home / name)


def last(home, name):
    return json.loads((home / name / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.slow
def test_sequence_to_sequence(home):
    """What is said to be exact is what greedy decoding writes, on texts that it has not seen."""
    model = EncoderDecoder(**SIZE, embedding=Embedding(scaled=True))
    run = run_of(home, "alternating", model, SequenceToSequence(), Alternating(9, 4, examples=64), 700)
    assert last(home, "alternating")["exact"] == 1 and last(home, "alternating")["loss"] < 0.05
    assert run.answers(["10101", "0101", "1010101"]) == ["01010", "1010", "0101010"]
    assert run.predict(["0101"]) == [{"text": "1010"}] and run.sample("0101", temperature=0) == "1010"
    half = {"valid_fraction": 0.5}
    reverse = run_of(home, "reverse", model, SequenceToSequence(), Reverse(3, symbols=3, examples=64), 100, half)
    (source,) = run_data(reverse)
    pairs = [[reverse.tokenizer.decode(ids) for ids in source.example(i)] for i in range(source.n_examples)]
    exact = np.mean([reverse.answers([first])[0] == second for first, second in pairs])
    assert 0 < exact < 1 and reverse.evaluate()["exact"] == pytest.approx(exact)


def run_data(run):
    from jaxformer.run.plan import prepare_data

    return prepare_data(run.config, run.tokenizer, run.classes).valid


@pytest.mark.slow
def test_classes_of_every_kind_at_once(home, capsys):
    heads = ClassificationHead("first"), BinaryHead("long", hidden=13), MultiLabelHead("vowels")
    labels = {"labels": ("first", "long", "vowels"), "several": ("first", "vowels")}
    with pytest.raises(InputError, match=r"'first' is str|labels_first must have the shape"):
        run_of(home, "wrong", Encoder(**SIZE, head=heads), Classification(), table(home, **labels))
    one = {"labels": ("first", "long")}
    run = run_of(home, "classes", Encoder(**SIZE, head=heads[:2]), Classification(), table(home, **one), 300)
    row = last(home, "classes")
    assert {"accuracy", "accuracy_first", "accuracy_long"} < row.keys() and row["examples"] == 10
    assert run.classes == {"first": ("a", "b", "e", "i", "o", "u"), "long": ("0", "1")}
    whole = run.evaluate(str(home / "words.jsonl"))
    assert whole["examples"] == 96 and whole["accuracy"] > 0.9
    rows = [json.loads(line) for line in (home / "words.jsonl").read_text().splitlines()]
    found = run.predict([row["word"] for row in rows])
    right = {name: np.mean([str(a[name]) == b[name] for a, b in zip(rows, found, strict=True)]) for name in run.classes}
    assert right == {name: pytest.approx(whole[f"accuracy_{name}"]) for name in run.classes}
    assert sum(found[0]["first probabilities"].values()) == pytest.approx(1, abs=1e-5)
    predict_command(str(home / "classes"), text=rows[0]["word"], json=True)
    assert json.loads(capsys.readouterr().out)["first"] == found[0]["first"]
    (home / "some.txt").write_text(f"{rows[0]['word']}\n\n{rows[1]['word']}\n")
    predict_command(str(home / "classes"), file=str(home / "some.txt"))
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["first"] for line in lines] == [row["first"] for row in found[:2]]
    assert [json.loads(line)["line"] for line in lines] == [1, 3]
    (home / "some.csv").write_text(f"n,question\n1,{rows[0]['word']}\n2,{rows[1]['word']}\n")
    other = ["--data.corpus=Table", f"--data.corpus.path={home / 'some.csv'}", "--data.corpus.text", "question"]
    assert run_command("predict", [str(home / "classes"), *other]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["line"], row["first"]) for row in lines] == [(2, found[0]["first"]), (3, found[1]["first"])]
    with pytest.raises(InputError, match="its model writes no text"):
        run.sample()
    with pytest.raises(InputError, match="character 'z'"):
        run.predict(["z"])


@pytest.mark.slow
def test_several_labels(home):
    head = MultiLabelHead("vowels")
    corpus = table(home, labels=("vowels",), several=("vowels",))
    run = run_of(home, "vowels", Encoder(**SIZE, head=head), Classification(), corpus, 120)
    assert run.predict(["abob"])[0]["vowels"] == ["a", "o"] and last(home, "vowels")["accuracy"] > 0.6


@pytest.mark.slow
def test_masked_then_classes(home):
    """The encoder is taken, heads are not; and the special ids are those of the first run."""
    size = SIZE | {"n_layers": 2}
    masked = run_of(home, "masked", Encoder(**size, head=MaskedLanguageHead()), Masked(), table(home), 40)
    assert {"loss", "accuracy", "tokens"} < last(home, "masked").keys()
    assert masked.recipe.objective.mask == masked.tokenizer.special["mask"][0]
    data = {"tokenizer": TokenizerFile(str(home / "masked" / "tokenizer.json"))}
    more = {"data": data, "init_from": str(home / "masked")}
    model = Encoder(**size, head=BinaryHead("long"))
    tuned = run_of(home, "tuned", model, Classification(), table(home, labels=("long",)), 5, **more)
    report = json.loads((home / "tuned" / "init_from.json").read_text())
    assert "encoder/layers/block0/attention/project/q" in report["taken"] and "embedding/table" in report["taken"]
    assert set(report["not_taken"]) == {"head_classes_of_long/bias", "head_classes_of_long/kernel"}
    assert all(name.startswith("head_language") for name in report["unused"]) and tuned.tokenizer == masked.tokenizer


@pytest.mark.slow
def test_span_corruption_then_answers(home):
    """Packed lines with missing spans; then pairs. Everything is taken."""
    model = EncoderDecoder(**SIZE)
    lines = TextLines(str(home / "lines.txt"))
    run_of(home, "spans", model, SpanCorruption(), lines, 40, {"sampling": PackedDocuments()})
    assert last(home, "spans")["loss"] < 3.5 and last(home, "spans")["tokens"] > 20
    data = {"tokenizer": TokenizerFile(str(home / "spans" / "tokenizer.json"))}
    corpus = table(home, target="upper")
    run_of(home, "upper", model, SequenceToSequence(), corpus, 5, data, init_from=str(home / "spans"))
    report = json.loads((home / "upper" / "init_from.json").read_text())
    assert not report["not_taken"] and not report["unused"] and 0 <= last(home, "upper")["exact"] <= 1


@pytest.mark.slow
def test_pairs_that_belong_together(home):
    model = Encoder(**SIZE, head=EmbeddingHead(width=11))
    run = run_of(home, "pairs", model, Contrastive(), table(home, target="upper"), 150)
    assert last(home, "pairs")["accuracy"] > 0.5
    vectors = [np.array(row["embedding"]) for row in run.predict(["abobob", "ABOBOB", "EIEIEI"])]
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] and np.linalg.norm(vectors[0]) == pytest.approx(
        1, abs=1e-5
    )


def test_a_prefix_and_its_answer(home):
    model = Decoder(**SIZE, mask=Prefix())
    data = {"sampling": Examples(joined=True)}
    run = run_of(home, "prefix", model, PrefixLM(), table(home, target="upper"), 10, data)
    (valid,) = run_data(run)
    answers = sum(valid.sizes[:, 1] - 1)  # of the second texts, with their ends
    assert last(home, "prefix")["tokens"] == answers and valid.n_examples == 10
    assert isinstance(run.sample("ab", 5), str)


@pytest.mark.slow
def test_a_recurrent_baseline(home):
    run = run_of(home, "gru", GRU(24, 29), NextToken(), table(home), 20)
    assert last(home, "gru")["loss"] < 3 and isinstance(run.sample("ab", 40), str)


@pytest.mark.slow
def test_buckets_do_not_depend_on_calls_or_interruptions(home):
    model, states = Encoder(**SIZE, head=BinaryHead("long"), dropout=0.1), []
    data = Data(table(home, labels=("long",)), tokenizer=SPECIAL, sampling=Examples(False, 3, 4), batch_size=4)
    for name, calls, stops in (("b1", 1, (23,)), ("b2", 7, (23,)), ("b3", 7, (6, 23))):
        for steps in stops:
            train = Train(steps=steps, eval_every=50, save_every=6, steps_per_call=calls, best_by="accuracy")
            run = jaxformer.train(Config(str(home / name), model, data, Classification(), ADAM, train))
        states.append(run.state)
    assert sha256(states[1]) == sha256(states[2])
    chex.assert_trees_all_close(states[0].params, states[1].params, atol=1e-5)  # other programs, the same batches


@pytest.mark.parametrize(
    ("objective", "model", "corpus", "message"),
    [
        (NextToken(), Encoder(**SIZE), {}, "objective=NextToken must have a decoder whose masks are causal"),
        (NextToken(), Decoder(**SIZE, mask=Prefix()), {}, "objective=NextToken must have a decoder whose masks"),
        (Masked(), Decoder(**SIZE), {}, "objective=Masked must have an Encoder"),
        (Classification(), Encoder(**SIZE), {}, "model.head must be, or hold, a ClassificationHead; it is language"),
        (SequenceToSequence(), Decoder(**SIZE), {}, "objective=SequenceToSequence must have an EncoderDecoder"),
        (SequenceToSequence(), EncoderDecoder(**SIZE), {}, "data.corpus: .*and a batch has no source, source_seg"),
        (Contrastive(), Encoder(**SIZE, head=EmbeddingHead()), {}, "and a batch has no source, source_segments"),
        (Classification(), Encoder(**SIZE, head=BinaryHead("long")), {}, "the classes of the column 'long' are not"),
        (Classification(), Encoder(**SIZE, head=BinaryHead("first")), {"labels": ("first",)}, "must be two classes"),
        (Masked(), Encoder(**SIZE), {}, "objective=Masked needs a mask token"),
        (Masked(mask=99), Encoder(**SIZE), {}, "objective.mask and objective.special: 99 must be"),
        (SpanCorruption(), EncoderDecoder(**SIZE), {}, "objective=SpanCorruption needs sentinels"),
        (
            SpanCorruption(sentinels=(1,), mean_span=1.0),
            EncoderDecoder(**SIZE),
            {},
            "has 1 sentinels, but up to 5 spans",
        ),
        (Masked(mask=1), Encoder(**SIZE), {"target": "upper"}, "objective=Masked reads one text, but examples"),
        (Classification(), Encoder(**SIZE, head=TokenClassificationHead("long")), {"labels": ("long",)}, "each token"),
        (Contrastive(), Encoder(**SIZE, head=EmbeddingHead()), {"batch_size": 1}, "compares the rows of a batch"),
    ],
)
def test_what_does_not_go_together(home, objective, model, corpus, message):
    data = {"tokenizer": Characters(end_token=True), "batch_size": corpus.pop("batch_size", 16)}
    with pytest.raises(InputError, match=message):
        run_of(home, "never", model, objective, table(home, **corpus), data=data)
    assert not (home / "never").exists()


def test_a_batch_without_what_the_objective_needs(home):
    """In a loop of one's own, and in an evaluation."""
    data = Data(table(home, labels=("long",)), tokenizer=SPECIAL, sampling=Examples())
    config = Config(str(home / "never"), Encoder(**SIZE, head=BinaryHead("long")), data, Classification(), ADAM)
    state, step, batch_at = jaxformer.build(config)
    batch = batch_at(0)
    for name, needed in (("tokens", "tokens"), ("labels_long", "labels of the column 'long'")):
        with pytest.raises(InputError, match=f"objective=Classification needs {needed}, and a batch has no {name}; "):
            step(state, {other: array for other, array in batch.items() if other != name})
    with pytest.raises(InputError, match=r"labels_long: 2 must be less than 2, how many classes model.head has"):
        step(state, batch | {"labels_long": 2 + 0 * batch["labels_long"]})
    run = Run(config, SPECIAL.fit(["abeiou"]), state, {"long": ("0", "1")})
    with pytest.raises(InputError, match="labels of the column 'long', and a batch has no labels_long"):
        run.evaluate(Source(np.zeros(9, np.int64), np.zeros(1, np.int64)))


def test_batches_of_a_loop_of_ones_own(home):
    data = Data(table(home, target="upper"), tokenizer=SPECIAL, sampling=Examples())
    model, slices = EncoderDecoder(**SIZE), Train(accumulation=4)
    config = Config(str(home / "never"), model, data, SequenceToSequence(), ADAM, train=slices)
    state, step, batch_at = jaxformer.build(config)
    batch = batch_at(0)
    with pytest.raises(InputError, match=r"token id 999 must be at least 0 and less than vocab_size"):
        step(state, batch | {"source": 999 + 0 * batch["source"]})
    for rows in (1, 6):
        with pytest.raises(InputError, match=f"a batch of {rows} rows must be a multiple of train.accumulation=4"):
            step(state, {name: array[:rows] for name, array in batch.items()})


def test_best_by_must_be_there(home):
    data = Data(table(home, labels=("long",)), tokenizer=SPECIAL, sampling=Examples())
    config = Config(str(home / "never"), Encoder(**SIZE, head=BinaryHead("long")), data, Classification(), ADAM)
    with pytest.raises(InputError, match=r"train.best_by='f1' must be a number of the evaluation: loss, accuracy"):
        jaxformer.train(config, {"train.best_by": "f1"})
    assert not (home / "never").exists()


@pytest.mark.slow
def test_a_language_head_beside_classes_writes(home):
    heads = LanguageHead(), ClassificationHead("first")
    run = run_of(home, "both", Decoder(**SIZE, head=heads), Classification(), table(home, labels=("first",)), 5)
    assert isinstance(run.sample("ab", 5), str) and set(run.predict(["ab"])[0]) == {"first", "first probabilities"}
