"""Implementations of attention: each equals the formula, with gradients; which is chosen, and what is refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from tiny import decoder, ids, loud

from jaxformer import EncoderDecoder
from jaxformer.config import resolve
from jaxformer.model.implementations import Auto, Blocked, Plain
from jaxformer.model.kernels import SoftCapped, Softmax, Uniform
from jaxformer.model.layers import RMSNorm
from jaxformer.model.masks import Bidirectional, Both, Causal, Either, Local, Prefix, Window, one_document, places
from jaxformer.model.positions import ALiBi, RelativeBias, Rotary
from jaxformer.model.residuals import Parallel
from jaxformer.run.inspection import model_flops
from jaxformer.run.plan import planned_recipe
from jaxformer.run.step import Recipe
from jaxformer.spec import InputError

T = 23
PACKED = jnp.array([[1] * 5 + [2] * 11 + [3] * 3 + [0] * 4, [1] * T, [1] * 2 + [2] * 18 + [0] * 3])
KINDS = {
    "causal, learned": {},
    "window, rotary, one key head": {"mask": Window(4), "position": Rotary(0.5), "n_kv_heads": 1, "head_width": 14},
    "local, relative, soft-capped": {"mask": Local(6), "position": RelativeBias(8, 16), "kernel": SoftCapped(2.0)},
    "both ways, slopes, normed": {"mask": Bidirectional(), "position": ALiBi(), "qk_norm": RMSNorm()},
    "prefix or window": {"mask": Either((Prefix(), Window(3))), "residual": Parallel()},
    "prefix and local, uniform": {"mask": Both((Prefix(), Local(5))), "kernel": Uniform()},
    "by turns": {"mask": (Window(3), Causal()), "kernel": (Softmax(scale=0.3), SoftCapped(1.0)), "n_layers": 4},
    "a stranger's": {"kernel": outside.SinkWithStatistic(), "position": outside.LearnedPace()},
}


class Doubled(Softmax):
    """A stranger's that overrides the whole."""

    def __call__(self, params, look, key, rate):
        return super().__call__(params, look, key, rate)


def as_blocked(model, size):
    kernels = model.kernel if isinstance(model.kernel, tuple) else (model.kernel,)
    new = tuple(dataclasses.replace(kernel, implementation=Blocked(size)) for kernel in kernels)
    return dataclasses.replace(model, kernel=new if isinstance(model.kernel, tuple) else new[0])


def values(model, params, dtype=jnp.float32):
    """A scalar of the hidden states of packed rows, and its gradients."""
    at = places(PACKED, jnp.broadcast_to(jnp.int32(jnp.arange(T) > 6)[None], PACKED.shape))
    weights = jnp.cos(jnp.arange(84.0))[None, None] * (PACKED > 0)[..., None]

    def loss(params):
        h = model.hidden(jax.tree.map(lambda a: a.astype(dtype), params), ids(3, T), at).h
        return (h.astype(jnp.float32) * weights).sum() / 100

    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize("size", [7, pytest.param(3, marks=pytest.mark.slow), pytest.param(22, marks=pytest.mark.slow)])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_blocked_equals_plain_with_gradients(fields, size):
    """On packed rows with padding, of a prime length; 7 of 23 leaves a rest, 3 puts several blocks into a group."""
    model = decoder(**({"n_layers": 1} | fields))
    params = loud(model)
    (plain, wanted), (blocked, found) = (values(m, params) for m in (model, as_blocked(model, size)))
    np.testing.assert_allclose(blocked, plain, rtol=1e-5)
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.slow
def test_blocked_equals_plain_in_bfloat16():
    model = decoder(n_layers=1)
    params = jax.tree.map(lambda a: a / 3, loud(model))
    (_, wanted), (_, found) = (values(m, params, jnp.bfloat16) for m in (model, as_blocked(model, 7)))
    for a, b in zip(jax.tree.leaves(wanted), jax.tree.leaves(found), strict=True):
        assert jnp.linalg.norm(a - b) <= 2e-2 * jnp.linalg.norm(a) + 1e-6


def test_blocked_crosses_texts_of_other_lengths():
    """A decoder of 23 tokens that looks at 11 of another text, and one with a cache."""
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 14, "context_length": T, "vocab_size": 29}
    model = EncoderDecoder(**sizes)
    blocked = dataclasses.replace(as_blocked(model, 5), cross_kernel=Softmax(implementation=Blocked(5)))
    params, source = loud(model), (ids(2, 11, seed=5), one_document(11))

    def h(model):
        memory = model.encode(params, *source).h
        out = model.hidden(params, ids(2, T), one_document(T), memory=memory)
        cached = model.hidden(params, ids(2, T), one_document(T), memory=memory, cache=model.cache(2, T))
        return out.h, cached.h

    chex.assert_trees_all_close(jax.jit(h, static_argnums=0)(blocked), h(model), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.exact
def test_memory_grows_with_the_length_not_with_its_square():
    def temporary(model, length):
        at, params = one_document(length), jax.eval_shape(model.init, jax.random.key(0))
        loss = lambda params, ids: model.hidden(params, ids, at).h.sum()
        lowered = jax.jit(jax.grad(loss)).lower(params, jax.ShapeDtypeStruct((1, length), jnp.int32))
        return lowered.compile().memory_analysis().temp_size_in_bytes

    model = decoder(n_layers=1, d_model=16, n_heads=4, n_kv_heads=4, d_ff=16, context_length=8192)
    blocked = as_blocked(model, 64)
    assert temporary(blocked, 8192) / temporary(blocked, 512) <= 16**1.15
    assert temporary(blocked, 2048) < temporary(model, 2048) / 4
    window = as_blocked(dataclasses.replace(model, mask=Window(64)), 64)
    assert temporary(window, 8192) < temporary(blocked, 8192)


def test_keys_that_no_query_sees_are_not_read():
    """NaN in what a mask hides reaches nothing: it is cut off before the product. Plain multiplies it by 0."""
    model = as_blocked(decoder(n_layers=1, mask=Window(4), feed_forward=None), 6)
    x = loud(model)
    text = ids(1, T).at[0, 0].set(28)
    spoiled = x["embedding"] | {"table": x["embedding"]["table"].at[28].set(jnp.nan)}
    text = jnp.where((jnp.arange(T) > 0)[None] & (text == 28), 0, text)
    h = model.hidden({**x, "embedding": spoiled}, text, one_document(T)).h
    assert jnp.isnan(h[0, :4]).all() and jnp.isfinite(h[0, 12:]).all()


def test_products_count_whatever_the_implementation():
    model = decoder(n_layers=1)
    texts = {"tokens": jax.ShapeDtypeStruct((2, T + 1), jnp.int32)}
    params = jax.eval_shape(model.init, jax.random.key(0))
    plain, blocked = (model_flops(Recipe(m), params, texts) for m in (model, as_blocked(model, 7)))
    assert plain == blocked > 0


def test_what_auto_chooses():
    backend = jax.default_backend()
    for fields, tokens, name, why in (
        ({}, 255, Plain, "rows of 255 tokens"),
        ({}, 256, Blocked, "rows of 256 tokens"),
        ({"dropout": 0.1}, 256, Plain, "dropout=0.1 of weights is drawn for all queries at once"),
        ({"kernel": outside.SinkWithStatistic()}, 256, Plain, "a part of your own"),
        ({"position": outside.TurnPerLayer(), "head_width": 14}, 256, Plain, "a part of your own"),
        ({"kernel": Softmax(implementation=Blocked(9))}, 8, Blocked, "as asked"),
    ):
        found, told = decoder(**fields).implemented(tokens)
        assert backend == "cpu" and type(found.kernel.implementation) is name and told == f"{name.__name__} ({why})"
    assert decoder().kernel.implementation == Auto()  # a model by itself


def test_one_asked_for_by_name_is_never_replaced():
    small = {"model.kernel.implementation": "Blocked", "model.dropout": 0.1}
    with pytest.raises(InputError, match=r"^model.kernel.implementation=Blocked: dropout=0.1 of weights is drawn"):
        planned_recipe(resolve("configs/quickstart.py", small))
    kernel = Doubled(implementation=Blocked())
    with pytest.raises(
        ValueError, match=r"model.kernel.implementation: Doubled computes itself, in its __call__; leave"
    ):
        decoder(kernel=kernel).implemented(300)
    model = as_blocked(decoder(n_layers=1, dropout=0.1), 7)  # by itself, too
    text = loud(model), ids(1, T), one_document(T)
    with pytest.raises(ValueError, match=r"implementation=Blocked: dropout=0.1 of weights"):
        model.hidden(*text, jax.random.key(0))
