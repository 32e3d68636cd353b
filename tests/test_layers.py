"""Layers against ten lines of NumPy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jaxtyping import TypeCheckError

from jaxformer.model import layers
from jaxformer.model.kernels import Look, Softmax, Uniform, plain
from jaxformer.model.masks import Causal, Places, View, Window, one_document, places
from jaxformer.model.positions import Rotary, Sinusoidal

rng = np.random.default_rng(0)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def draws(*shape):
    return rng.normal(size=shape).astype(np.float32)


def j(*tree):
    """As JAX arrays, which signatures ask for."""
    return jax.tree.map(jnp.asarray, tree)


def test_layer_norm():
    x, scale, bias = draws(3, 5, 7), draws(7), draws(7)
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + bias
    close(layers.LayerNorm()(*j({"scale": scale, "bias": bias}, x)), expected)
    close(layers.LayerNorm(bias=False)(*j({"scale": scale}, x)), expected - bias)
    assert layers.LayerNorm(bias=False).params().keys() == {"scale"}


def test_rms_norm():
    x, scale = draws(3, 5, 7), draws(7)
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    close(layers.RMSNorm()(*j({"scale": scale}, x)), normed * scale)
    close(layers.RMSNorm(gain=False)(*j({}, x)), normed)
    assert layers.RMSNorm(gain=False).params() == {}
    with pytest.raises(ValueError, match=r"norm.one_plus=True needs a gain"):
        layers.RMSNorm(one_plus=True, gain=False).check("norm.")


def test_norms_compute_in_float32():
    x = jnp.asarray(draws(3, 5, 7) + 100, jnp.bfloat16)
    for norm in (layers.LayerNorm(bias=False), layers.RMSNorm(), layers.RMSNorm(gain=False)):
        out = norm({"scale": jnp.ones(7, jnp.bfloat16)}, x)
        assert out.dtype == jnp.bfloat16
        close(out.astype(np.float32), norm({"scale": jnp.ones(7)}, x.astype(np.float32)), 0.02)


def test_a_weighted_sum_has_gains_whose_gradients_are_summed_in_float32():
    a, b, x, y = draws(1)[0], draws(5, 1), draws(3, 5, 700), draws(3, 5, 700)
    close(layers.weighted(*zip(*j((a, b), (x, y)), strict=True)), a * x + b * y)
    half = jnp.ones((3, 5, 700), jnp.bfloat16)
    summed = jax.grad(lambda gain: layers.weighted((gain, half)).sum())(jnp.bfloat16(1))
    assert summed.dtype == jnp.bfloat16 and float(summed) == pytest.approx(half.size, rel=0.004)


def test_gelu():
    x = draws(3, 5)
    exact = 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    close(layers.GELU(approximate=False)(*j(x)), exact)
    close(layers.GELU()(*j(x)), 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


def test_relu_and_silu():
    x = draws(3, 5)
    close(layers.ReLU()(*j(x)), np.maximum(x, 0))
    close(layers.SiLU()(*j(x)), x / (1 + np.exp(-x)))


def token_wise(spec, params, x):
    return spec(*j(params, x), one_document(x.shape[1]), None).h


def test_gated_feed_forward():
    x, gate, up, down = draws(3, 5, 7), draws(7, 11), draws(7, 11), draws(11, 7)
    params = {"gate": gate, "up": up, "down": down}
    silu = lambda x: x / (1 + np.exp(-x))
    spec = layers.GatedFeedForward()
    close(token_wise(spec, params, x), (silu(x @ gate) * (x @ up)) @ down, 1e-4)
    assert {name: p.letters for name, p in spec.params().items()} == {"gate": "D->F", "up": "D->F", "down": "F->D"}
    a, b, c = draws(11), draws(11), draws(7)
    spec, biased = layers.GatedFeedForward(bias=True), params | {"gate_bias": a, "up_bias": b, "down_bias": c}
    close(token_wise(spec, biased, x), (silu(x @ gate + a) * (x @ up + b)) @ down + c, 1e-4)
    assert spec.params().keys() == biased.keys()


def test_feed_forward():
    x, up, down, b, c = draws(3, 5, 7), draws(7, 11), draws(11, 7), draws(11), draws(7)
    params = {"up": up, "down": down, "up_bias": b, "down_bias": c}
    spec = layers.MLP(layers.Identity(), bias=True)
    close(token_wise(spec, params, x), (x @ up + b) @ down + c, 1e-4)
    assert spec.params().keys() == params.keys()
    gelu, params = layers.GELU(), {"up": up, "down": down}
    close(token_wise(layers.MLP(), params, x), np.asarray(gelu(*j(x @ up))) @ down, 1e-4)


@pytest.mark.parametrize("norm", [layers.RMSNorm, layers.LayerNorm])
def test_a_gain_of_one_plus_what_is_learned(norm):
    x, gain = draws(3, 5, 7), draws(7)
    one, plus = norm(), norm(one_plus=True)
    begin = {name: p.init(jax.random.key(0), (7,), jnp.float32) for name, p in plus.params().items()}
    assert not begin["scale"].any()
    close(plus(*j(begin | {"scale": gain}, x)), one(*j(begin | {"scale": 1 + gain}, x)))
    small = {name: jnp.full_like(a, 0.003, jnp.bfloat16) for name, a in begin.items()}  # 1.003 is none in bfloat16
    exact = {name: a.astype(jnp.float32) for name, a in small.items()}
    assert jnp.array_equal(plus(small, jnp.asarray(x)), plus(exact, jnp.asarray(x)))


def test_linear():
    x, w = draws(3, 5, 7), draws(7, 2, 11)
    close(layers.linear(*j(x, w)), np.einsum("BTD,DHK->BTHK", x, w))


def test_dropout():
    x = jnp.ones((101, 103))
    assert layers.dropout(None, x, 0.3) is x and layers.dropout(jax.random.key(0), x, 0.0) is x
    y = layers.dropout(jax.random.key(0), x, 0.3)
    assert float((y == 0).mean()) == pytest.approx(0.3, abs=0.02)
    close(y[y != 0], 1 / 0.7)
    assert not jnp.array_equal(y, layers.dropout(jax.random.key(1), x, 0.3))


@pytest.mark.parametrize("shape", [(7,), (101, 103), (3, 2, 11, 13)])
def test_dropout_draws_what_jax_draws(shape):
    """Also where a rate lies between two of the numbers that are drawn, or is one of them."""
    keys = jax.random.split(jax.random.key(5), 3)
    drawn = jax.vmap(lambda key: jax.random.uniform(key, shape))(keys)
    last = np.float32(drawn.ravel()[-1])
    for share in (1 - 1e-7, 0.9, 0.5, 1e-4, last, np.nextafter(last, 1), np.nextafter(last, 0)):
        rate = 1 - float(share)
        kept = jax.vmap(lambda key, rate=rate: layers.dropout(key, jnp.ones(shape), rate) > 0)(keys)
        assert np.array_equal(kept, [jax.random.bernoulli(key, 1 - rate, shape) for key in keys])


@pytest.mark.exact
def test_a_mask_of_dropout_is_computed_by_itself():
    """In a scan, with its gradient: a call of its own, once for forward and backward."""

    def loss(x, key):
        body = lambda x, i: (layers.dropout(jax.random.fold_in(key, i), jnp.sin(x), 0.3), None)
        return jax.lax.scan(body, x, jnp.arange(5))[0].sum()

    text = jax.jit(jax.grad(loss)).lower(jnp.ones((101, 103)), jax.random.key(0)).compile().as_text()
    assert len(re.findall(r"= pred\[101,103\]\S* call\(", text)) == 1


def test_rotary():
    """Pairs of halves are turned by position · base^(−2i/K), as complex numbers."""
    x, position = draws(2, 3, 5, 14), rng.integers(0, 50, (2, 5))
    z = x[..., :7] + 1j * x[..., 7:]
    z = z * np.exp(1j * position[:, None, :, None] * 100.0 ** (-np.arange(0, 14, 2) / 14))
    out = Rotary(100.0).rotate({}, *j(x), Places(jnp.asarray(position), jnp.ones((2, 5), jnp.int32)))
    close(out, np.concatenate([z.real, z.imag], -1), 1e-4)


@pytest.mark.parametrize("width", [14, 7])
def test_sinusoidal(width):
    """Even places sin(p / base^(i/D)), odd ones the cosine of the same angle."""
    x, position = draws(2, 5, width), rng.integers(0, 50, (2, 5))
    expected = x.copy()
    for b, t, d in np.ndindex(x.shape):
        angle = position[b, t] / 100.0 ** ((d - d % 2) / width)
        expected[b, t, d] += np.cos(angle) if d % 2 else np.sin(angle)
    out = Sinusoidal(100.0).embed({}, *j(x), Places(jnp.asarray(position), jnp.ones((2, 5), jnp.int32)))
    close(out, expected, 1e-4)


def softmax_attention(q, k, v, mask):
    """[B, H, T, K] with G key/value heads, row by row."""
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[:3]):
        g = h // (q.shape[1] // k.shape[1])
        s = np.flatnonzero(mask[b, t])
        scores = k[b, g, s] @ q[b, h, t] / math.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max()) if len(s) else scores
        out[b, h, t] = weights @ v[b, g, s] / max(weights.sum(), 1e-30)
    return out


@pytest.mark.parametrize("rule", [Causal(), Window(3)])
def test_softmax_kernel(rule):
    q, k, v = draws(2, 6, 7, 5), draws(2, 3, 7, 5), draws(2, 3, 7, 5)
    segment = np.array([[1, 1, 1, 2, 2, 2, 2], [0, 0, 3, 3, 3, 0, 0]], np.int32)
    at = places(jnp.asarray(segment))
    p, s = np.asarray(at.position), segment
    mask = (s[:, :, None] == s[:, None]) & (p[:, None] <= p[:, :, None])
    if isinstance(rule, Window):
        mask &= p[:, None] > p[:, :, None] - 3
    (seen,) = j({"k": k, "v": v})
    out = Softmax()({}, Look(jnp.asarray(q), seen, seen, View(at, at, rule, 1)), None, 0.0).h
    real = (segment > 0)[:, None, :, None]
    close(out * real, softmax_attention(q, k, v, mask) * real)


def test_softmax_is_its_plain_form():
    """Grouped heads, masks of every row, and gradients."""
    q, k, v = j(draws(2, 6, 7, 5), draws(2, 3, 7, 5), draws(2, 3, 7, 5))
    at = one_document(7)
    view = View(at, at, Causal(), 6)
    fast = lambda q, k, v: Softmax()({}, Look(q, {}, {"k": k, "v": v}, view), None, 0.0).h
    written = lambda q, k, v: plain(q, *(jnp.repeat(a, 2, 1) for a in (k, v)), view.mask())
    (out, pull), (expected, pull_plain) = jax.vjp(fast, q, k, v), jax.vjp(written, q, k, v)
    close(out, expected)
    for a, b in zip(pull(q), pull_plain(q), strict=True):
        close(a, b)


def test_the_scale_of_scores_is_a_field():
    q, k, v = j(draws(2, 6, 7, 5), draws(2, 3, 7, 5), draws(2, 3, 7, 5))
    at = one_document(7)
    out = lambda kernel: kernel({}, Look(q, {}, {"k": k, "v": v}, View(at, at, Causal(), 6)), None, 0.0).h
    close(out(Softmax(scale=5**-0.5)), out(Softmax()))
    close(out(Softmax(scale=0.0)), out(Uniform()))
    assert jnp.abs(out(Softmax(scale=1.0)) - out(Softmax())).max() > 0.1


def test_scores_have_the_variance_of_one_product():
    """q·k of width 16 has variance 16; scores must have 1. Dividing by K^−½ instead trains, and stalls."""
    q, k = draws(2, 3, 101, 16), draws(2, 3, 101, 16)
    scores = Softmax().scores(*j({}, q, {}, {"k": k}))
    assert float(np.var(np.asarray(scores))) == pytest.approx(1, rel=0.05)


def test_a_query_that_sees_nothing_gets_zero():
    q = jnp.asarray(draws(1, 1, 2, 3))
    query, key = one_document(2), Places(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2), jnp.int32))
    seen = {"k": q, "v": q}
    out, pull = jax.vjp(lambda q: Softmax()({}, Look(q, seen, seen, View(query, key, Causal(), 1)), None, 0.0).h, q)
    assert (out == 0).all() and jnp.isfinite(pull(out + 1)[0]).all()


def test_dropout_of_attention_weights_keeps_their_mean():
    q, v = jnp.zeros((1, 1, 31, 2)), jnp.ones((1, 1, 31, 2))
    at, seen = one_document(31), {"k": q, "v": v}
    out = Softmax()({}, Look(q, seen, seen, View(at, at, Causal(), 1)), jax.random.key(0), 0.5).h
    assert float(out.std()) > 0.05 and float(out[0, 0, 15:].mean()) == pytest.approx(1, abs=0.1)


def test_places_count_within_segments():
    segment = jnp.array([[1, 1, 2, 2, 2, 0, 0], [0, 0, 1, 1, 3, 3, 3]])
    expected = [[0, 1, 0, 1, 2, 0, 1], [0, 1, 0, 1, 0, 1, 2]]
    assert places(segment).position.tolist() == expected


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        layers.linear(jnp.ones((3, 5)), jnp.ones((7, 2)))
    with pytest.raises(TypeCheckError):
        Softmax().scores({}, jnp.ones((2, 3, 5)), {}, {"k": jnp.ones((2, 3, 5, 7))})
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((3, 5)) + jnp.ones(5)
    assert tiny.SIZES["d_model"] % tiny.SIZES["n_heads"] == 0


@pytest.mark.parametrize("one_hot", [0, 29])  # sorted and in blocks; a product
@pytest.mark.parametrize(("dtype", "shape"), [("float32", (3, 13)), ("bfloat16", (3, 13)), ("float32", (1,))])
def test_sums_by_id_are_those_of_a_scatter(monkeypatch, one_hot, dtype, shape):
    """Blocks of 4 sorted rows: an id lies in one, at its end and the next one's beginning, or in all of several."""
    monkeypatch.setattr(layers, "ONE_HOT", one_hot)
    monkeypatch.setattr(layers, "BLOCK", 4)
    ids = jnp.asarray(rng.integers(2, 23, (2, *shape)))  # neither the first ids nor the last
    ids = jnp.where(rng.random((2, *shape)) < 0.4, 7, ids)
    rows = jnp.asarray(draws(2, *shape, 5), dtype)
    expected = np.zeros((2, 29, 5), np.float32)
    for i in range(2):
        np.add.at(expected[i], np.asarray(ids[i]), np.asarray(rows[i], np.float32))
    summed = lambda rows, ids: layers.sums_by_id(rows, ids, 29)
    close(summed(rows[0], ids[0]), expected[0])
    close(jax.vmap(summed)(rows, ids), expected)
    close(jax.lax.scan(lambda c, xs: (c + summed(*xs), None), jnp.zeros((29, 5)), (rows, ids))[0], expected.sum(0))


def gradients(table, ids, rows, lookup):
    """Of rows of tables, in a vmap of a scan of a rematerialised lookup."""

    def loss(table, ids, rows):
        one = jax.checkpoint(lambda table, xs: (table, (lookup(table, xs[0]) * xs[1]).sum()))
        return jax.lax.scan(one, table, (ids, rows))[1].astype(jnp.float32).sum()

    return jax.vmap(jax.grad(loss), (None, 0, 0))(table, ids, rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_a_lookup(monkeypatch, dtype):
    """On CPU to the bit those of the gather; elsewhere, of few ids and of many, without a scatter."""
    table, rows = jnp.asarray(draws(29, 5), dtype), jnp.asarray(draws(2, 7, 3, 11, 5), dtype)
    ids = jnp.asarray(rng.integers(0, 29, (2, 7, 3, 11)), jnp.int32)
    gather = lambda table, ids: table.astype(jnp.float32)[ids].astype(dtype)
    expected = gradients(table, ids, rows, gather)
    assert (layers.lookup(table, ids) == gather(table, ids)).all() and expected.dtype == dtype
    assert (gradients(table, ids, rows, layers.lookup) == expected).all()
    for one_hot in (0, 29):
        monkeypatch.setattr(layers, "ONE_HOT", one_hot)
        traced = jax.jit(lambda *a: gradients(*a, layers.lookup)).trace(table, ids, rows)
        found = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
        assert [p for p, text in found.items() if "stablehlo.scatter" in text] == ["cpu"]
        assert [p for p, text in found.items() if "stablehlo.sort" in text] == ["cuda", "tpu"] * (one_hot == 0)


def test_a_matrix_in_half_precision_multiplies_halves_with_float32_sums(monkeypatch):
    """Activations in float32; forwards and backwards, each a product of halves, whose transposed operand lies row by
    row."""
    x, w, g = draws(3, 5, 13), draws(13, 2, 7), draws(3, 5, 2, 7)
    half = lambda a: np.asarray(jnp.asarray(a).astype(jnp.bfloat16).astype(jnp.float32), np.float64)
    y, pull = jax.vjp(layers.linear, jnp.asarray(x), jnp.asarray(w).astype(jnp.bfloat16))
    by_x, by_w = pull(jnp.asarray(g))
    assert (y.dtype, by_x.dtype, by_w.dtype) == (jnp.float32, jnp.float32, jnp.bfloat16)
    close(y, np.einsum("BTD,DHK->BTHK", half(x), half(w)))
    close(by_x, np.einsum("BTHK,DHK->BTD", half(g), half(w)))
    np.testing.assert_allclose(
        by_w.astype(jnp.float32), np.einsum("BTD,BTHK->DHK", half(x), half(g)), rtol=2**-8, atol=1e-6
    )
    text = jax.jit(lambda x, w, g: jax.vjp(layers.linear, x, w)[1](g)).lower(x, w.astype(jnp.bfloat16), g).as_text()
    products = re.findall(
        r"dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>\) -> tensor<[\dx]+x(\w+)>", text
    )
    assert products == [("bf16", "bf16", "f32")] * 2 and text.count("LayoutConstraint") == 2


def test_products_of_halves_have_gradients_that_are_products_of_halves():
    """float32 sums, no product of float32; in float32 the einsum itself."""
    x, y, g = (jnp.asarray(draws(*shape)) for shape in ((3, 5, 7), (11, 7), (3, 5, 11)))

    def loss(product, dtype, x, y):
        out = product("BTD,VD->BTV", x.astype(dtype), y.astype(dtype))
        assert out.dtype == jnp.float32
        return (out * g).sum()

    plain = lambda *a: jnp.einsum(*a, preferred_element_type=jnp.float32)
    grads = lambda product, dtype: jax.grad(functools.partial(loss, product, dtype), (0, 1))
    operands = re.findall(
        r"(\w+)\[[\d,]*\] = dot_general", str(jax.make_jaxpr(grads(layers.product, "bfloat16"))(x, y))
    )
    assert operands == ["f32", "bf16", "bf16"]  # what is summed, and both gradients
    for a, b in zip(grads(layers.product, "bfloat16")(x, y), grads(plain, "float32")(x, y), strict=True):
        assert jnp.linalg.norm(a - b) < 1e-2 * jnp.linalg.norm(b)
    assert str(jax.make_jaxpr(grads(layers.product, "float32"))(x, y)) == str(
        jax.make_jaxpr(grads(plain, "float32"))(x, y)
    )
