"""Evaluation against a loop over windows, one by one, in NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder, hidden, ids, loud

from jaxformer.config import Config, Data
from jaxformer.data.datasets import Source
from jaxformer.data.tokenizers import Characters
from jaxformer.model.masks import one_document
from jaxformer.run.opened import Run
from jaxformer.run.step import TrainState


@pytest.mark.parametrize("length", [2, 7, 50, 99])
def test_evaluation_is_the_mean_over_all_tokens_but_the_first(length):
    model = decoder(n_layers=2, dropout=0.5)
    params, tokens = loud(model), np.asarray(ids(length))
    nats = []
    for start in range(0, length - 1, 11):
        window = tokens[start : start + 12]
        h, _ = hidden(model, params, jnp.asarray(window[None, :-1]), one_document(len(window) - 1))
        logits = np.asarray(model.logits(params, h)[0], np.float64)
        top = logits.max(-1, keepdims=True)
        log_p = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        nats += (-log_p[np.arange(len(window) - 1), window[1:]]).tolist()
    tokenizer = Characters("".join(map(chr, range(65, 90))) + "\u00e4\u00f6\u00fc\u732b")  # 1, 2 and 3 bytes
    run = Run(Config("run", model, Data(batch_size=3, window=11)), tokenizer, TrainState(jnp.int32(5), params, ()))
    row = run.evaluate(Source(tokens, np.zeros(1, np.int64)))
    assert (row["step"], row["split"], row["tokens"]) == (5, "valid", length - 1)
    assert row["loss"] == pytest.approx(np.mean(nats), rel=1e-5)
    assert row["perplexity"] == pytest.approx(np.exp(np.mean(nats)), rel=1e-4)
    n_bytes = len(tokenizer.decode(tokens[1:]).encode())
    assert row["bits_per_byte"] == pytest.approx(np.sum(nats) / n_bytes / np.log(2), rel=1e-5)
