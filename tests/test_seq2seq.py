"""The experiment of sequence to sequence: two old mistakes, and what it says of them."""

import dataclasses
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ids, loud

import jaxformer
from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.config import execute, resolve
from jaxformer.data.batches import Examples
from jaxformer.data.tables import Table
from jaxformer.data.tasks import Reverse, Translation
from jaxformer.data.tokenizers import Bytes, Characters
from jaxformer.lab.experiments import Report, Result, read_metrics
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.layers import XavierUniform
from jaxformer.model.masks import Bidirectional, Causal, one_document
from jaxformer.model.positions import Sinusoidal
from jaxformer.spec import InputError, dumps

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def house():
    """What experiments/seq2seq.py defines."""
    return execute(ROOT / "experiments" / "seq2seq.py")


def config(tmp_path, **fields):
    sizes = {"d_model": 24, "n_heads": 2, "n_layers": 1, "d_ff": 31, "context_length": 11}
    model = EncoderDecoder(**sizes, initializer=XavierUniform(0.2), **fields)
    data = Data(
        Reverse(length=7, shortest=3, symbols=5, examples=67),
        tokenizer=Characters(end_token=True),
        sampling=Examples(),
        batch_size=13,
    )
    train = Train(steps=3, steps_per_call=3, eval_every=3, save_every=3, sample_tokens=0)
    return Config(str(tmp_path / "run"), model, data, SequenceToSequence(), AdamW(Constant(3e-2)), train)


def test_a_mask_that_sees_the_answers_passes_as_causal(house, tmp_path):
    """It is stored under a name that another process finds; and a token that follows changes what is said before."""
    with pytest.raises(InputError, match="masks are causal"):
        resolve(config(tmp_path, mask=Bidirectional()))
    found = resolve(config(tmp_path, mask=house["Unmasked"]()))
    assert '"bugs:Unmasked"' in dumps(found) and "bugs" in sys.modules
    for mask, leaks in ((house["Unmasked"](), True), (Causal(), False)):
        model = dataclasses.replace(config(tmp_path, mask=mask).model, vocab_size=29)
        params = loud(model)
        memory = model.encode(params, ids(2, 5), one_document(5)).h
        text = ids(2, 7, seed=3)
        before, after = (
            model.hidden(params, each, one_document(7), memory=memory).h for each in (text, text.at[:, -1].add(1))
        )
        assert bool(jnp.abs(before - after)[:, :-1].max() > 1e-3) == leaks


@pytest.mark.slow
def test_texts_are_written_anew_as_the_cache_writes_them(house, tmp_path):
    """For a causal mask both are the same, whatever the lengths."""
    run = jaxformer.train(config(tmp_path))
    asked = ["0123", "43210", "222", "0404040", "1"]
    assert house["written"](run, asked) == run.answers(asked)
    assert len(set(run.answers(asked))) > 1


def test_the_rows_of_mistakes_differ_in_them_alone(house):
    rows = {row.name: row for row in house["ROWS"]}
    for task, (config, right) in house["JUDGED"].items():
        for mistake, changes in house["MISTAKES"].items():
            row = rows[f"{task}, {mistake}: loss"]
            assert set(changes) <= {"model.mask", "model.position"}
            assert row.config == config == rows[right].config
            assert dict(row.overrides) == dict(rows[right].overrides) | changes


@pytest.mark.slow
def test_what_is_told(house, tmp_path):
    """Of one run of a few steps in the place of all."""
    run = jaxformer.train(config(tmp_path), {"data.tokenizer": Bytes(end_token=True)})
    results = [Result(row, [run], [read_metrics(run)]) for row in house["ROWS"]]
    report = Report("seq2seq", results, tmp_path / "pictures")
    house["tell"](report)
    text = "\n".join(report.blocks)
    assert text.count("| reverse 20 digits | no causal mask |") == text.count("| 1 0 1 0 … | neither |") == 1
    assert "the products differ by 0.000" in text and "[MASK]" in text and "None" not in text
    names = {path.name for path in (tmp_path / "pictures").iterdir()}
    assert names == {"seq2seq-positions.png", "seq2seq-translation.png"}


def test_an_offset_of_positions_is_a_rotation():
    """Of each pair of a sine and a cosine, by an angle of the offset alone, in NumPy."""
    width, T = 14, 41
    table = np.asarray(Sinusoidal().embed({}, jnp.zeros((1, T, width)), one_document(T))[0], np.float64)
    for k in (1, 5, 17):
        for pair in range(width // 2):
            angle = k / 10_000 ** (2 * pair / width)
            turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
            pairs = table[:, 2 * pair : 2 * pair + 2]
            np.testing.assert_allclose(pairs[k:], pairs[: T - k] @ turn.T, atol=1e-5)
        products = (table[k:] * table[: T - k]).sum(1)
        np.testing.assert_allclose(products, products[0], atol=1e-5)


def test_the_size_of_2017():
    """Counted by the paper's sections 3.1 to 3.4: no biases in attention, one table for both languages and the head."""
    model = dataclasses.replace(resolve(ROOT / "configs" / "transformer_2017.py").model, vocab_size=37_000)
    D, F = 512, 2048
    attention, feed, norm = 4 * D * D, 2 * D * F + F + D, 2 * D
    encoder, decoder = attention + feed + 2 * norm, 2 * attention + feed + 3 * norm
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    assert sum(a.size for a in jax.tree.leaves(shapes)) == 37_000 * D + 6 * (encoder + decoder) == 63_045_632


@pytest.mark.slow
def test_the_recipe_of_2017_takes_a_table(tmp_path):
    """At small sizes, on translations of one's own: the loss falls within a few steps."""
    pairs = list(Translation(examples=40).pairs())
    (tmp_path / "pairs.tsv").write_text("en\tde\n" + "".join(f"{a}\t{b}\n" for a, b in pairs))
    small = {"data.tokenizer.vocab_size": 300, "data.batch_size": 8, "train.accumulation": 1, "train.steps": 6}
    small |= {"model.n_layers": 1, "model.n_heads": 2, "model.d_model": 24, "model.d_ff": 31, "train.log_every": 1}
    small |= {"data.valid_fraction": 0.1, "train.sample_tokens": 0, "optimizer.learning_rate": Constant(1e-2)}
    corpus = {"data.corpus": Table(str(tmp_path / "pairs.tsv"), "en", "de")}
    jaxformer.train(ROOT / "configs" / "transformer_2017.py", small | corpus, directory=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert len(losses) == 6 and losses[-1] < losses[0]
