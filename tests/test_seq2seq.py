"""The experiment of sequence to sequence: two old mistakes, and what it says of them."""

import dataclasses
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import ids, loud

import jaxformer
from jaxformer import Config, Data, EncoderDecoder, Train
from jaxformer.config import execute, resolve
from jaxformer.data.batches import Examples
from jaxformer.data.tasks import Reverse
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.objectives import SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.layers import XavierUniform
from jaxformer.model.masks import Bidirectional, Causal, one_document
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
            assert row.config == config == rows[right].config
            assert dict(row.overrides) == dict(rows[right].overrides) | changes


def test_an_offset_of_positions_is_a_rotation():
    """Of each pair of a sine and a cosine, by an angle of the offset alone, in NumPy."""
    from jaxformer.model.positions import Sinusoidal

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
