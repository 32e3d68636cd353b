"""Objectives, schedules and optimizers against NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from tiny import B, T, decoder, ids, loud, totals

from jaxformer.declarations import Declared, Letters
from jaxformer.learning.objectives import NextToken
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WSD, Constant, InverseSquareRoot, WarmupCosine, WarmupLinear
from jaxformer.model.masks import Places
from jaxformer.spec import InputError, checked


def reference_loss(model, params, tokens, weights):
    at = Places(jnp.arange(T)[None], jnp.ones((1, T), jnp.int32))
    h, _ = tiny.hidden(model, params, tokens[:, :-1], at)
    logits = np.asarray(model.logits(params, h), np.float64)
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    nats = -np.log(np.take_along_axis(p, np.asarray(tokens)[:, 1:, None], -1))[..., 0]
    return (nats * weights).sum(), weights.sum()


def test_next_token_loss():
    model = decoder()
    params, tokens = loud(model), ids(B, T + 1)
    objective = NextToken()
    for length in (T, 5):
        batch = {"tokens": tokens}
        weights = np.broadcast_to(np.arange(T) < length, (B, T))
        if length < T:
            batch["segments"] = jnp.broadcast_to((jnp.arange(T + 1) <= length).astype(jnp.int32)[None], tokens.shape)
        example = objective.prepare(batch, jax.random.key(0))
        nats, weight, total = totals(objective.loss(model, params, example, None))
        np.testing.assert_allclose((total, weight), reference_loss(model, params, tokens, weights), rtol=1e-5)
        assert nats == total


def test_nothing_is_predicted_across_documents():
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [0, 3, 3, 3, 3, 3, 4]])
    example = NextToken().prepare({"tokens": jnp.zeros_like(segments), "segments": segments}, jax.random.key(0))
    assert example.weights.tolist() == [[1, 1, 0, 1, 0, 0], [0, 1, 1, 1, 1, 0]]


def test_warmup_and_cosine():
    """PyTorch's peer writes it so: (i + 1) / 101 of the peak, then half a cosine."""
    rate = WarmupCosine(1e-3, 1e-4, 100)
    for i in (0, 50, 99, 100, 1050, 1999, 2000, 3000):
        done = min(max(i - 100, 0) / 1900, 1)
        cosine = 1e-4 + 0.5 * (1 + np.cos(np.pi * done)) * 9e-4
        expected = 1e-3 * (i + 1) / 101 if i < 100 else cosine
        assert float(rate(jnp.int32(i), jnp.int32(2000))) == pytest.approx(expected, rel=1e-5)
    assert float(Constant(0.3)(jnp.int32(7), jnp.int32(9))) == pytest.approx(0.3)


def test_warmup_and_line():
    rate = WarmupLinear(1e-3, 1e-4, 100)
    for i in (0, 99, 100, 1050, 1999, 2000, 3000):
        expected = 1e-3 * (i + 1) / 101 if i < 100 else max(1e-4, 1e-3 - 9e-4 * (i - 100) / 1900)
        assert float(rate(jnp.int32(i), jnp.int32(2000))) == pytest.approx(expected, rel=1e-5)


def test_wsd():
    """Of 1,900 steps after the warm-up the last 380 decay; before them a longer run is the same."""
    rate = WSD(1e-3, 1e-4, 100, decay=0.2)
    for i in (0, 99, 100, 1000, 1619, 1620, 1810, 1999, 2000, 2500):
        expected = 1e-3 * (i + 1) / 101 if i < 100 else 1e-3 - 9e-4 * np.clip((i - 1620) / 380, 0, 1)
        assert float(rate(jnp.int32(i), jnp.int32(2000))) == pytest.approx(expected, rel=1e-4)
        if i <= 1620:
            assert float(rate(jnp.int32(i), jnp.int32(9000))) == pytest.approx(expected, rel=1e-4)
    assert float(WSD(1e-3, decay=1.0)(jnp.int32(1050), jnp.int32(2000))) == pytest.approx(5e-4, rel=1e-4)


def test_inverse_square_root():
    """Equation 3 of arXiv:1706.03762 as it is written, whatever the number of steps."""
    for width, warmup in ((512, 4000), (83, 1), (7, 131)):
        rate = InverseSquareRoot((width * warmup) ** -0.5, warmup)
        for step in (1, 2, warmup, warmup + 1, 3 * warmup, 100_000):
            expected = width**-0.5 * np.minimum(np.float64(step) ** -0.5, step * np.float64(warmup) ** -1.5)
            for steps in (5, 200_000):
                assert float(rate(jnp.int32(step - 1), jnp.int32(steps))) == pytest.approx(expected, rel=1e-5)
    rates = [float(InverseSquareRoot(1e-3, 11)(jnp.int32(i), jnp.int32(50))) for i in range(50)]
    assert np.argmax(rates) == 10 and rates[10] == pytest.approx(1e-3) and rates[43] == pytest.approx(5e-4)
    assert InverseSquareRoot(warmup_steps=11).notice(11) is None
    assert "longer than a run of 10 steps" in (InverseSquareRoot(warmup_steps=11).notice(10) or "")
    for wrong, message in ((InverseSquareRoot(peak=0.0), "peak=0.0"), (InverseSquareRoot(1.0, 0), "warmup_steps=0")):
        with pytest.raises(InputError, match=message):
            checked(wrong)


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adamw(clip):
    """Three updates of a matrix, which decays, and a bias, which does not."""
    rng = np.random.default_rng(0)
    params = {"w": rng.normal(size=(3, 5)), "b": rng.normal(size=7)}
    grads = [{name: rng.normal(size=a.shape) for name, a in params.items()} for _ in range(3)]
    spec = AdamW(Constant(0.01), b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.1, clip=clip)
    shape = lambda a: jax.ShapeDtypeStruct(a.shape, "float32")
    box = lambda letters, a: Declared(shape(a), Letters.of(letters), "->" in letters, None, 0, True, None, (0, 1))
    transform = spec.transform({"w": box("D->F", params["w"]), "b": box("D", params["b"])}, jnp.int32(0), jnp.int32(9))
    found = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    state = transform.init(found)
    m, v = ({name: np.zeros_like(a) for name, a in params.items()} for _ in range(2))
    for t, g in enumerate(grads, 1):
        updates, state = transform.update(jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), g), state, found)
        found = jax.tree.map(jnp.add, found, updates)
        norm = np.sqrt(sum((a**2).sum() for a in g.values()))
        for name in params:
            a = g[name] if clip is None else g[name] * min(1, clip / norm)
            m[name] = 0.9 * m[name] + 0.1 * a
            v[name] = 0.99 * v[name] + 0.01 * a**2
            step = m[name] / (1 - 0.9**t) / (np.sqrt(v[name] / (1 - 0.99**t)) + 1e-8)
            params[name] = params[name] - 0.01 * (step + (0.1 * params[name] if name == "w" else 0))
    chex.assert_trees_all_close(found, params, atol=1e-5)
