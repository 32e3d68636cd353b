"""Evaluation against a loop over windows, one by one, in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ideas import Unmasking
from test_tokenizers import word_piece
from tiny import SIZES, decoder, hidden, ids, log_softmax, loud

from jaxformer.config import Config, Data, Train
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import Characters, TokenizerFile
from jaxformer.generation.decode import LeftToRight
from jaxformer.generation.logits_processors import Temperature
from jaxformer.learning.objectives import Masked, NextToken
from jaxformer.model.masks import one_document
from jaxformer.model.models import Encoder
from jaxformer.run.opened import Run
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError

generate = functools.partial(LeftToRight(), NextToken())


def test_samples_are_the_text_of_prompt_and_continuation_together(tmp_path):
    """A tokenizer that sets spaces between its tokens sets one after the prompt; and texts end with their end."""
    word_piece().save(str(tmp_path / "tokenizer.json"))
    tokenizer = TokenizerFile(str(tmp_path / "tokenizer.json")).fit(())
    model = decoder(n_layers=2, vocab_size=7)
    run = Run(Config("run", model, Data()), tokenizer, TrainState(jnp.int32(5), loud(model), ()))
    ids = [1, *tokenizer.encode("play é").tolist()]
    new = generate(model, run.state.params, [ids] * 9, 8, (Temperature(1.0),), 3, end=2)
    expected = []
    for row in new.tolist():
        row = row[: row.index(2)] if 2 in row else row
        expected.append(tokenizer.decode([*ids, *row]))
    assert run.samples("play é", 8, 9, 3) == expected
    assert {len(text) for text in expected} != {len(expected[0])} and any("é play" in text for text in expected)


def test_a_sampler_of_a_strangers_draws_texts_of_an_encoder():
    tokenizer = Characters("abcdefghijklmnopqrstuvwxyz", mask_token=True)
    fields = {name: value for name, value in SIZES.items() if name != "vocab_size"}
    config = Config("run", Encoder(**fields), objective=Masked(), sampler=Unmasking(3))
    model = dataclasses.replace(config.model, vocab_size=27)
    run = Run(config, tokenizer, TrainState(jnp.int32(5), loud(model), ()))
    one, other = run.samples("abc", 7, 2)
    assert [one, other] == run.samples("abc", 7, 2) and one != other
    assert all(text.startswith("abc") and len(text) == 10 for text in (one, other))
    with pytest.raises(InputError, match="its model writes no text"):
        dataclasses.replace(run, config=dataclasses.replace(config, sampler=None)).samples("abc", 7)


@pytest.mark.parametrize("length", [2, 7, 50, 99])
def test_evaluation_is_the_mean_over_all_tokens_but_the_first(length):
    model = decoder(n_layers=2, dropout=0.5)
    params, tokens = loud(model), np.asarray(ids(length))
    nats = []
    for start in range(0, length - 1, 11):
        window = tokens[start : start + 12]
        h, _ = hidden(model, params, jnp.asarray(window[None, :-1]), one_document(len(window) - 1))
        log_p = log_softmax(model.logits(params, h)[0])
        nats += (-log_p[np.arange(len(window) - 1), window[1:]]).tolist()
    tokenizer = Characters("".join(map(chr, range(65, 90))) + "\u00e4\u00f6\u00fc\u732b")  # 1, 2 and 3 bytes
    run = Run(Config("run", model, Data(batch_size=3, window=11)), tokenizer, TrainState(jnp.int32(5), params, ()))
    row = run.evaluate(Source(tokens, np.zeros(1, np.int64)))
    assert (row["step"], row["split"], row["tokens"]) == (5, "valid", length - 1)
    assert row["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    n_bytes = len(tokenizer.decode(tokens[1:]).encode())
    assert row["bits_per_byte"] == pytest.approx(np.sum(nats) / n_bytes / np.log(2), rel=1e-5)


@pytest.fixture
def trained(tmp_path):
    """A run with rows, whose state is that of step 5."""
    (tmp_path / "metrics.jsonl").write_text(
        """{"step": 4, "split": "train", "loss": 3.25}
        {"step": 5, "split": "valid", "loss": 3.125}
        {"step": 6, "split": "train", "loss": 3.0}
        {"step": 6, "split": "valid", "loss": 2.5}
        """
    )
    model = decoder(n_layers=2)
    state = TrainState(jnp.int32(5), loud(model), ())
    config = Config(str(tmp_path), model, Data(batch_size=3, window=11), train=Train(steps=1000))
    return Run(config, Characters("".join(map(chr, range(65, 94)))), state)


def test_a_run_is_told_in_a_line(trained):
    count = sum(array.size for array in jax.tree.leaves(trained.state.params))
    where = trained.config.directory
    start = f"<Run {where}: Decoder, {count:,} parameters, step 5 of 1,000"
    assert repr(trained) == f"{start}, validation loss 3.1250>"
    elsewhere = dataclasses.replace(trained, config=dataclasses.replace(trained.config, directory="nowhere"))
    assert repr(elsewhere) == f"{start}>".replace(where, "nowhere")
    later = dataclasses.replace(trained, state=trained.state.replace(step=jnp.int32(7)))  # not evaluated since
    assert repr(later) == f"{start}>".replace("step 5", "step 7")


def test_the_curve_of_a_run_is_that_of_its_rows(trained):
    (axes,) = trained.plot().axes
    curves = {line.get_label(): line.get_xydata().tolist() for line in axes.get_lines()}
    assert curves == {"training": [[4, 3.25], [6, 3.0]], "validation": [[5, 3.125], [6, 2.5]]}
    assert axes.get_title() == trained.config.directory
    with pytest.raises(InputError, match=r"nowhere: there are no rows in metrics\.jsonl to plot; train first"):
        dataclasses.replace(trained, config=dataclasses.replace(trained.config, directory="nowhere")).plot()
