"""Positions, masks, kernels, wirings and initializers against NumPy, or by the property that defines them."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ideas import Borrow
from tiny import SIZES, B, T, block, crossed, decoder, generate, hidden, ids, loud, mixed

from jaxformer import config as config_lib
from jaxformer.declarations import by_path, is_declared, path_name, updated
from jaxformer.generation.logits_processors import Temperature
from jaxformer.learning.objectives import NextToken
from jaxformer.model import layers
from jaxformer.model.baselines import LSTM
from jaxformer.model.heads import ClassificationHead, EmbeddingHead, FirstToken, LanguageHead, MaskedLanguageHead
from jaxformer.model.kernels import Look, SoftCapped, Softmax, Uniform, ValueResidual
from jaxformer.model.layers import (
    GELU,
    MLP,
    GatedFeedForward,
    LayerNorm,
    NoNorm,
    OneLayer,
    ReLU,
    RMSNorm,
    SquaredReLU,
    Tanh,
    ZeroOutputs,
)
from jaxformer.model.masks import (
    Bidirectional,
    Both,
    Causal,
    Either,
    Local,
    Places,
    Prefix,
    View,
    Window,
    one_document,
    places,
)
from jaxformer.model.mixers import ValueEmbeddings
from jaxformer.model.models import Decoder, Embedding, Encoder, EncoderDecoder
from jaxformer.model.positions import ALiBi, Learned, NoPosition, RelativeBias, Rotary, Sinusoidal
from jaxformer.model.residuals import (
    FeedForwardFirst,
    InputInjection,
    Parallel,
    PostNorm,
    PreNorm,
    ReZero,
    SandwichNorm,
    UNet,
)
from jaxformer.spec import checked

rng = np.random.default_rng(0)


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def draws(*shape):
    return rng.normal(size=shape).astype(np.float32)


def count(model):
    return sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


# --- positions


def turned(x, position, base, width, scaling):
    """The first `width` numbers of [..., T, K], halves paired, as complex numbers that turn."""
    z = x[..., : width // 2] + 1j * x[..., width // 2 : width]
    z = z * np.exp(1j * position[..., None] / scaling * base ** (-np.arange(0, width, 2) / width))
    return np.concatenate([z.real, z.imag, x[..., width:]], -1)


@pytest.mark.parametrize(
    ("rotary", "width"), [(Rotary(), 14), (Rotary(100.0, 3 / 7, 4.0), 6), (Rotary(500.0, 1.0, 0.5), 14)]
)
def test_rotary_turns_a_share_of_each_head(rotary, width):
    x, position = draws(2, 3, 5, 14), rng.integers(0, 50, (2, 5))
    out = rotary.rotate({}, jnp.asarray(x), Places(jnp.asarray(position), jnp.ones((2, 5), jnp.int32)))
    close(out, turned(x, position[:, None], rotary.base, width, rotary.scaling), 1e-4)
    assert np.array_equal(out[..., width:], x[..., width:])


def test_rotary_refuses_odd_widths():
    for fraction in (0.5, 1 / 3):
        with pytest.raises(ValueError, match="must be even"):
            Rotary(fraction=fraction).check_width(14, "")
    Rotary(fraction=3 / 7).check_width(14, "")


def published_slopes(n):
    """As the paper's own code: a geometric row that begins with its ratio; the gaps are filled from the next power."""
    if math.log2(n).is_integer():
        start = 2 ** -(2 ** -(math.log2(n) - 3))
        return [start * start**i for i in range(n)]
    power = 2 ** math.floor(math.log2(n))
    return published_slopes(power) + published_slopes(2 * power)[0::2][: n - power]


@pytest.mark.parametrize("n_heads", [1, 2, 6, 8, 12, 16])
def test_alibi(n_heads):
    """[H, T, S]: minus slope times distance, on either side."""
    at = Places(jnp.asarray([[3, 4, 5, 9]]), jnp.ones((1, 4), jnp.int32))
    bias = ALiBi().bias({}, View(at, at, Bidirectional(), n_heads), {}, {})
    distance = np.abs(np.subtract.outer([3, 4, 5, 9], [3, 4, 5, 9]))
    close(bias[0], -np.asarray(published_slopes(n_heads))[:, None, None] * distance)
    if n_heads == 8:
        close(-bias[0, :, 0, 1], 0.5 ** np.arange(1, 9))


def published_bucket(relative, bidirectional, buckets, longest):
    """T5's `_relative_position_bucket`; `relative` is the key's position less the query's."""
    n, first = -relative, 0
    if bidirectional:
        buckets //= 2
        first = buckets if n < 0 else 0
        n = abs(n)
    n, exact = max(n, 0), buckets // 2
    if n < exact:
        return first + n
    far = math.log(n / exact + 1e-7) / math.log(longest / exact) * (buckets - exact)
    return first + min(exact + int(far), buckets - 1)


@pytest.mark.parametrize("mask", [Causal(), Prefix()], ids=["causal", "both ways"])
@pytest.mark.parametrize(("buckets", "longest"), [(32, 128), (8, 29)])
def test_relative_bias(mask, buckets, longest):
    """The table's row of T5's bucket, at [H, T, S]; compiled and not."""
    spec, table = RelativeBias(buckets, longest), draws(buckets, 3)
    query, key = np.array([[0, 150, 300]]), np.arange(301)[None]
    one = lambda p: Places(jnp.asarray(p), jnp.ones(p.shape, jnp.int32))
    view = View(one(query), one(key), mask, 3)
    f = np.vectorize(lambda relative: published_bucket(relative, not mask.causal, buckets, longest))
    expected = table[f(key[0][None] - query[0][:, None])]  # [T, S, H]
    for bias in (spec.bias, jax.jit(lambda p, *more: spec.bias(p, view, *more))):
        arguments = ({"table": jnp.asarray(table)}, view, {}, {}) if bias == spec.bias else ({"table": table}, {}, {})
        assert np.array_equal(np.moveaxis(np.asarray(bias(*arguments))[0], 0, -1), expected)


def test_relative_bias_is_one_table_of_all_layers():
    params = loud(decoder(position=RelativeBias(8, 20)))["decoder"]
    assert params["position"]["table"].shape == (8, 6) and set(params["layers"]["block0"]["attention"]) == {"project"}


@pytest.mark.parametrize(
    ("position", "relative"),
    [(Rotary(100.0, 3 / 7, 2.0), True), (ALiBi(), True), (RelativeBias(8, 20), True), (Sinusoidal(), False)],
    ids=lambda p: type(p).__name__,
)
def test_scores_depend_on_differences_of_positions(position, relative):
    """A text that begins at another position is the same text; the positions count, all the same."""
    model = decoder(position=position, n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    plain, _ = hidden(model, params, text, at)
    shifted, _ = hidden(model, params, text, at._replace(position=at.position + 17))
    spread, _ = hidden(model, params, text, at._replace(position=2 * at.position))
    assert (np.abs(plain - shifted).max() < 1e-3) == relative and np.abs(plain - spread).max() > 1e-2


# --- masks


SEGMENT = np.array([[1] * 7 + [2] * 5 + [0], [0, 0, *[3] * 4, *[7] * 4, 4, 5, 5]], np.int32)
POSITION = np.array([[*range(7), *range(5), 0], [0, 1, *range(4), *range(4), 0, 0, 1]])
PART = np.array([[0, 0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 1]], np.int32)
RULES = [  # rule, whether position t sees position s of that part, slots of a text of 31 tokens
    (Bidirectional(), lambda t, s, part: True, 31),
    (Causal(), lambda t, s, part: s <= t, 31),
    (Prefix(), lambda t, s, part: s <= t or part == 0, 31),
    (Local(3), lambda t, s, part: -3 < t - s < 3, 3),
    (Window(3), lambda t, s, part: t - 3 < s <= t, 3),
    (Window(1), lambda t, s, part: s == t, 1),
    (Window(37), lambda t, s, part: t - 37 < s <= t, 31),
    (Both((Prefix(), Local(3))), lambda t, s, part: abs(t - s) < 3 and (s <= t or part == 0), 3),
    (Both((Causal(), Bidirectional())), lambda t, s, part: s <= t, 31),
    (Either((Window(2), Prefix())), lambda t, s, part: s <= t or part == 0, 31),
    (Either((Window(2), Window(5))), lambda t, s, part: t - 5 < s <= t, 5),
    (
        Either((Window(4), Both((Prefix(), Local(2))))),
        lambda t, s, part: t - 4 < s <= t or (s == t + 1 and not part),
        4,
    ),
]


@pytest.mark.parametrize(("rule", "sees", "span"), RULES, ids=lambda part: getattr(part, "__name__", str(part)))
def test_masks(rule, sees, span):
    """By hand for each pair; padding and other documents are never seen; what is seen of the past is still cached."""
    segment, part = jnp.asarray(SEGMENT), jnp.asarray(PART)
    at = places(segment, part)
    assert np.array_equal(at.position, POSITION)
    mask = np.asarray(jnp.broadcast_to(View(at, at, rule, 5).mask(), (2, 1, 13, 13)))[:, 0]
    for b, t, s in np.ndindex(mask.shape):
        seen = SEGMENT[b, t] == SEGMENT[b, s] and sees(POSITION[b, t], POSITION[b, s], PART[b, s])
        assert mask[b, t, s] == seen, (b, t, s)
    back = (POSITION[:, :, None] - POSITION[:, None])[mask]
    assert rule.causal == (back.min() >= 0) and rule.span(31) == span > back.max()
    assert rule.reads_part == ("Prefix" in str(rule))


def test_a_prefix_without_parts_is_causal():
    at = places(jnp.asarray(SEGMENT))
    assert jnp.array_equal(View(at, at, Prefix(), 5).mask(), View(at, at, Causal(), 5).mask())


@pytest.mark.parametrize("rule", [Prefix(), Both((Prefix(), Local(5)))], ids=["prefix", "local prefix"])
def test_cached_decoding_behind_a_prefix(rule):
    """The prefix at once, then token by token, which are of the second part without saying so."""
    model = decoder(mask=rule, n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    whole = at._replace(part=(at.position > 6).astype(jnp.int32))
    full, _ = hidden(model, params, text, whole)
    first = jax.tree.map(lambda a: jnp.broadcast_to(a[:, :7], (B, 7)), whole)
    h, cache = hidden(model, params, text[:, :7], first, None, model.cache(B, T))
    outs = [h]
    for t in range(7, 11):
        own = Places(*(jnp.full((B, 1), n) for n in (t, 1)))
        h, cache = hidden(model, params, text[:, t : t + 1], own, None, cache)
        outs.append(h)
    close(jnp.concatenate(outs, 1), full[:, :11])


def test_rows_that_are_alike_may_be_given_once_to_a_cached_prefix():
    model = decoder(mask=Prefix(), n_layers=1)
    params, text = loud(model), ids(B, T)
    cached, _ = hidden(model, params, text, one_document(T), None, model.cache(B, T))
    close(cached, hidden(model, params, text, one_document(T))[0])


@pytest.mark.parametrize(
    ("mask", "answers"),
    [
        (Causal(), False),
        (Prefix(), False),
        ((Prefix(), Window(3)), False),
        (Both((Prefix(), Local(3))), False),
        (Bidirectional(), True),
        (Local(3), True),
        ((Prefix(), Local(3)), True),
        (Either((Prefix(), Local(3))), True),
    ],
    ids=str,
)
def test_who_sees_answers(mask, answers):
    """Whether a token of the second part sees one behind itself that is of the second part too."""
    assert decoder(mask=mask, n_layers=2).sees_answers == answers


# --- kernels


def attention(q, k, v, mask, scores=lambda x: x):
    """[B, H, T, K] with G key/value heads, row by row; `scores` of the scaled products."""
    out = np.zeros_like(q)
    for b, h, t in np.ndindex(q.shape[:3]):
        g, s = h // (q.shape[1] // k.shape[1]), np.flatnonzero(mask[b, t])
        powers = np.exp(scores(k[b, g, s] @ q[b, h, t] / math.sqrt(q.shape[-1])))
        out[b, h, t] = powers / powers.sum() @ v[b, g, s]
    return out


@pytest.mark.parametrize(
    ("kernel", "scores"),
    [(Softmax(), lambda x: x), (SoftCapped(0.7), lambda x: 0.7 * np.tanh(x / 0.7)), (Uniform(), np.zeros_like)],
    ids=lambda k: type(k).__name__,
)
def test_kernels(kernel, scores):
    q, k, v = 3 * draws(2, 6, 13, 5), draws(2, 3, 13, 5), draws(2, 3, 13, 5)
    at = places(jnp.asarray(SEGMENT))
    mask = (SEGMENT[:, :, None] == SEGMENT[:, None]) & (POSITION[:, None] <= POSITION[:, :, None])
    seen = kernel.remember({}, jnp.asarray(k), jnp.asarray(v), at, None)
    out = kernel({}, Look(jnp.asarray(q), seen, seen, View(at, at, Causal(), 6)), None, 0.0).h
    close(out, attention(q, k, v, mask, scores))


def test_uniform_attention_has_values_alone():
    model = decoder(kernel=Uniform(), bias=True)
    assert set(loud(model)["decoder"]["layers"]["block0"]["attention"]["project"]) == {"v", "v_bias", "o", "o_bias"}
    assert set(model.cache(B, T)["block0"]) == {"position", "segment", "v"}
    params, text = loud(model), ids(B, T)
    full, _ = hidden(model, params, text, one_document(T))
    cached, _ = hidden(model, params, text, one_document(T), None, model.cache(B, T))
    close(full, cached)


def own_layer(params, stack="decoder", block=0, layer=0):
    """The arrays of one layer."""
    return jax.tree.map(lambda a: a[layer], params[stack]["layers"][f"block{block}"])


def test_norms_are_of_the_queries_and_keys_that_there_are():
    model = decoder(n_layers=2, n_heads=2, n_kv_heads=None, kernel=(Softmax(), Borrow()), qk_norm=RMSNorm())
    layers = model.declared()["decoder"]["layers"]
    assert [sorted(n for n in layers[f"block{i}"]["attention"] if "norm" in n) for i in range(2)] == [
        ["norm_k", "norm_q"],
        ["norm_q"],
    ]
    assert np.isfinite(hidden(model, loud(model), jnp.arange(7)[None], one_document(7))[0]).all()
    uniform = by_path(decoder(kernel=Uniform(), qk_norm=RMSNorm()).declared())
    assert not any("attention/norm_" in path for path in uniform)


@pytest.mark.parametrize("head_width", [None, 22])
@pytest.mark.parametrize("qk_norm", [NoNorm(), RMSNorm()], ids=["plain", "normed"])
def test_attention_by_hand(head_width, qk_norm):
    """Queries and keys of each head are normed, then turned; heads may be wider than D / H."""
    model = decoder(qk_norm=qk_norm, head_width=head_width, position=Rotary(100.0), n_layers=1)
    p, x, position = own_layer(loud(model))["attention"], draws(B, T, 84), np.arange(T)
    w, K = p["project"], head_width or 14
    assert w["q"].shape == (84, 6, K) and w["k"].shape == (84, 2, K) and w["o"].shape == (6, K, 84)
    qkv = {n: np.einsum("BTD,DHK->BHTK", x, w[n]) for n in "qkv"}
    for n in "qk":
        if qk_norm == RMSNorm():
            qkv[n] = (
                qkv[n] / np.sqrt((qkv[n] ** 2).mean(-1, keepdims=True) + 1e-6) * np.asarray(p[f"norm_{n}"]["scale"])
            )
        qkv[n] = turned(qkv[n], position, 100.0, K, 1)
    h = attention(*(qkv[n] for n in "qkv"), np.tril(np.ones((B, T, T))))
    out = mixed(model.kinds("decoder")[0], p, jnp.asarray(x), one_document(T))
    close(out, np.einsum("BHTK,HKD->BTD", h, w["o"]), 1e-3)


@pytest.mark.parametrize("head_width", [11, 14])
@pytest.mark.parametrize("qkv_bias", [None, False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("projected", [False, True])
def test_biases_and_the_output_projection_by_hand(head_width, qkv_bias, bias, projected):
    """Without a projection heads stand side by side, and zeros behind them if they are narrower than D together."""
    fields = {"head_width": head_width, "qkv_bias": qkv_bias, "bias": bias, "output_projection": projected}
    model = decoder(position=NoPosition(), n_layers=1, **fields)
    p, x = own_layer(loud(model))["attention"], draws(B, T, 84)
    own = "qkv" * (bias if qkv_bias is None else qkv_bias) + "o" * (bias and projected)
    w = p["project"]
    assert set(w) == {*"qkv", *"o" * projected, *(f"{n}_bias" for n in own)}
    qkv = {n: np.einsum("BTD,DHK->BTHK", x, w[n]) + np.asarray(w.get(f"{n}_bias", 0)) for n in "qkv"}
    h = attention(*(a.swapaxes(1, 2) for a in qkv.values()), np.tril(np.ones((B, T, T))))
    h = h.swapaxes(1, 2).reshape(B, T, -1)
    if projected:
        h = h @ np.asarray(w["o"]).reshape(-1, 84) + np.asarray(w.get("o_bias", 0))
    out = mixed(model.kinds("decoder")[0], p, jnp.asarray(x), one_document(T))
    close(out, np.pad(h, ((0, 0), (0, 0), (0, 84 - h.shape[-1]))), 1e-3)


def test_heads_side_by_side_must_fit():
    with pytest.raises(ValueError, match=r"leaves the heads side by side, 90 numbers, more than model.d_model=84"):
        decoder(head_width=15, output_projection=False).check("model.")
    decoder(head_width=14, output_projection=False).check("model.")


# --- values


def test_values_mixed_with_the_first_layers():
    """One kernel is that of a group of all layers; mixed 1 to 0 it is Softmax, and else each layer has some of the
    first one's."""
    model, plain = decoder(kernel=ValueResidual(), n_layers=3), decoder(kernel=(Softmax(),) * 3, n_layers=3)
    assert len(model.kinds("decoder")) == 3 and checked(model, "model.") == model
    params, text, at = loud(plain), ids(B, T), one_document(T)
    first = updated(jax.jit(model.init)(jax.random.key(0)), params)  # mixed half and half

    def mixed_by(mix):
        own = jax.tree.map(lambda a: a, first)
        for i in range(3):
            own["decoder"]["layers"][f"block{i}"]["attention"]["kernel_params"]["mix"] = jnp.array([mix[i]])
        return model.activations(own, text, at)

    found = mixed_by([(1.0, 0.0)] * 3)
    close(found["decoder/out"], hidden(plain, params, text, at)[0])
    other = mixed_by([(1.0, 0.0), (1.0, 0.0), (0.5, -2.0)])
    value = lambda layer, found: np.asarray(found[f"decoder/layers/block{layer}/attention/v"])
    close(value(2, other), 0.5 * value(2, found) - 2 * value(0, found), 1e-4)
    assert (first["decoder"]["layers"]["block1"]["attention"]["kernel_params"]["mix"] == 0.5).all()


def test_values_with_an_embedding_of_their_ids():
    model, plain = decoder(mixer=ValueEmbeddings(), n_layers=2), decoder(n_layers=2)
    params, text, at = loud(model), ids(B, T), one_document(T)
    own = params["decoder"]["layers"]["block0"]["attention"]["embedding"]
    assert own["table"].shape == (2, 29, 2, 14) and own["gain"].shape == (2, 2)
    value = lambda params, model: model.activations(params, text, at)["decoder/layers/block0/attention/v"][0]
    more = np.einsum("BTGK,G->BGTK", np.asarray(own["table"])[0][text], np.asarray(own["gain"])[0])
    close(value(params, model), value(params, plain) + more, 1e-4)
    box = model.declared()["decoder"]["layers"]["block0"]["attention"]["embedding"]["table"]
    assert str(box.letters) == "L|VGK" and layers.is_embedding(box) and not box.decay
    begins = model.init(jax.random.key(0))["decoder"]["layers"]["block0"]["attention"]["embedding"]
    assert float(begins["table"].std()) == pytest.approx(0.02, rel=0.05) and (begins["gain"] == 1).all()
    assert model.summary() == {"attention": "Softmax with value embeddings"}


def test_what_has_no_values_or_no_first_layer_is_refused():
    with pytest.raises(ValueError, match=r"model.mixer=ValueEmbeddings needs values, and KeysAlone looks at none"):
        checked(decoder(mixer=ValueEmbeddings(), kernel=KeysAlone()), "model.")
    with pytest.raises(ValueError, match=r"model.cross_kernel=ValueResidual needs what other layers hand on"):
        checked(EncoderDecoder(**SIZES, cross_kernel=ValueResidual()), "model.")


class KeysAlone(Softmax):
    projections = ("q", "k")


# --- the parts of small recipes together


RECIPE = decoder(
    **{"embedding": Embedding(normed=True), "position": Rotary(), "norm": RMSNorm(gain=False), "n_kv_heads": 3},
    **{"qk_norm": RMSNorm(gain=False), "kernel": Softmax(scale=0.12), "residual": UNet(), "mixer": ValueEmbeddings()},
    **{"feed_forward": MLP(SquaredReLU()), "head": LanguageHead(tied=False, cap=15.0), "n_layers": 6},
)


def test_the_recipe_packs_caches_and_unrolls():
    """Two documents in a row are two rows; token by token is all at once; a scan is its layers, with gradients."""
    params, text = loud(RECIPE), ids(1, T)
    segment = jnp.asarray(np.repeat([[1, 2]], [6, T - 6], 1).astype(np.int32))
    row = hidden(RECIPE, params, text, places(segment))[0]
    alone = [hidden(RECIPE, params, t, one_document(t.shape[1]))[0] for t in (text[:, :6], text[:, 6:])]
    close(row, jnp.concatenate(alone, 1), 1e-4)
    full, (h, cache) = hidden(RECIPE, params, text, one_document(T))[0], (None, RECIPE.cache(1, T))
    outs, ones = [], jnp.ones((1, T), jnp.int32)
    for start, end in ((0, 9), (9, 11), (11, 12), (12, 13)):
        at = Places(jnp.arange(start, end)[None], ones[:, start:end])
        h, cache = hidden(RECIPE, params, text[:, start:end], at, None, cache)
        outs.append(h)
    close(jnp.concatenate(outs, 1), full, 1e-4)
    example = NextToken().prepare({"tokens": ids(B, T + 1)}, jax.random.key(0))
    loss = lambda model: jax.grad(lambda p: NextToken().loss(model, p, example, None).minimised)
    a, b = (jax.jit(loss(dataclasses.replace(RECIPE, unroll=n)))(params) for n in (1, 6))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(x, y, 1e-3 * float(jnp.abs(y).max()))


def test_the_recipe_has_gains_and_tables_alone_beside_its_matrices():
    declared = jax.tree_util.tree_flatten_with_path(RECIPE.declared(), is_leaf=is_declared)[0]
    names = {path_name(path).removeprefix("decoder/layers/block0/") for path, box in declared if not box.letters.into}
    own = {"attention/embedding/table", "attention/embedding/gain", "residual_enter/x", "residual_enter/x0"}
    assert names == own | {"embedding/table", "decoder/residual_begin/skip"}


def test_the_recipe_in_half_precision():
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loud(RECIPE))
    example = NextToken().prepare({"tokens": ids(B, T + 1)}, jax.random.key(0))
    found = jax.eval_shape(lambda p: RECIPE.hidden(p, example.ids, example.at).h, half)
    assert found.dtype == jnp.bfloat16
    grads = jax.jit(jax.grad(lambda p: NextToken().loss(RECIPE, p, example, None).minimised))(half)
    assert all(a.dtype == jnp.bfloat16 and jnp.isfinite(a).all() for a in jax.tree.leaves(grads))


# --- wirings


def rms(scale, x):
    x = np.asarray(x)
    return jnp.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(scale["scale"]))


BRANCHES = ("attention", "cross_attention", "feed_forward")


@pytest.mark.parametrize("wiring", [PreNorm, PostNorm, SandwichNorm])
@pytest.mark.parametrize("off", [None, *BRANCHES])
def test_wirings_by_hand(wiring, off):
    """x + f(n(x)), n(x + f(x)), x + n'(f(n(x))); of the branch that is off, without the first x."""
    residual = wiring() if off is None else wiring(**{off: False})
    model = EncoderDecoder(
        **{"vocab_size": 29, "d_model": 15, "n_heads": 3, "d_ff": 11, "context_length": T, "n_layers": 1},
        **{"position": NoPosition(), "norm": RMSNorm(), "residual": residual},
    )
    p, at, kind = own_layer(loud(model)), one_document(T), model.kinds("decoder")[0]
    x, source = jnp.asarray(draws(2, T, 15)), jnp.asarray(draws(2, 7, 15))
    _, memory = crossed(kind, p["cross_attention"], x, at, source)
    out = block(kind, p, x, at, memory=memory)
    branches = {
        "attention": lambda h: mixed(kind, p["attention"], h, at),
        "cross_attention": lambda h: crossed(kind, p["cross_attention"], h, at, source)[0],
        "feed_forward": lambda h: model.feed_forward(p["feed_forward"], h, at, None).h,
    }
    for name, f in branches.items():
        norm = lambda h, name=name: rms(p[f"norm_{name}"], h)
        kept = 0 if name == off else x
        if wiring is PreNorm:
            x = kept + f(norm(x))
        elif wiring is PostNorm:
            x = norm(kept + f(x))
        else:
            x = kept + rms(p[f"norm_{name}_out"], f(norm(x)))
    close(out, x, 1e-4)
    assert ("norm" in loud(model)["decoder"]) == (wiring is not PostNorm)


def test_branches_in_parallel_by_hand():
    """Both read the stream as the layer found it, also in the second layer."""
    model = decoder(residual=Parallel(), norm=RMSNorm(), position=NoPosition(), n_layers=2)
    params, text, at, kind = loud(model), ids(B, T), one_document(T), model.kinds("decoder")[0]
    x = params["embedding"]["table"][text]
    for layer in range(2):
        p = own_layer(params, layer=layer)
        seen = mixed(kind, p["attention"], rms(p["norm_attention"], x), at)
        x = x + seen + model.feed_forward(p["feed_forward"], rms(p["norm_feed_forward"], x), at, None).h
    close(rms(params["decoder"]["norm"], x), hidden(model, params, text, at)[0], 1e-3)


@pytest.mark.parametrize("family", [Decoder, EncoderDecoder], ids=lambda f: f.__name__)
def test_the_feed_forward_may_come_first_by_hand(family):
    """Then attention, then, where there is one, attention to the other text."""
    sizes = SIZES | {"norm": RMSNorm(), "position": NoPosition(), "n_layers": 1}
    model = family(**sizes, residual=FeedForwardFirst())
    params, text, at = loud(model), ids(B, T), one_document(T)
    memory = model.encode(params, text, at).h if model.encodes else None
    p, kind, x = own_layer(params), model.kinds("decoder")[0], params["embedding"]["table"][text]
    x = x + model.feed_forward(p["feed_forward"], rms(p["norm_feed_forward"], x), at, None).h
    x = x + mixed(kind, p["attention"], rms(p["norm_attention"], x), at)
    out = model.hidden(params, text, at, memory=memory, recorded=True)
    given = {name: a for name, a in out.activations.items() if "/after_" in name}
    close(x, next(a for name, a in given.items() if name.endswith("after_attention"))[0], 1e-3)
    last = x
    if memory is not None:
        last = next(a for name, a in given.items() if name.endswith("after_cross_attention"))[0]
        assert float(jnp.abs(last - x).max()) > 1e-2
    close(rms(params["decoder"]["norm"], last), out.h, 1e-3)


def layer_by_layer(model, params, ids):
    """A function (x, layer) -> x of each layer as PreNorm has it, the embedded input, and a function of the end."""
    kind, at = dataclasses.replace(model, residual=PreNorm()).kinds("decoder")[0], one_document(ids.shape[1])
    apply = lambda x, layer: block(kind, own_layer(params, layer=layer), x, at)
    return apply, params["embedding"]["table"][ids], lambda x: rms(params["decoder"]["norm"], x)


@pytest.mark.parametrize("n_layers", [2, 4, 5])
@pytest.mark.parametrize("residual", [InputInjection(), UNet()], ids=lambda r: type(r).__name__)
def test_what_is_added_before_a_layer_by_hand(residual, n_layers):
    """λ·x + λ₀·x₀; before it, in the U-net, s·(what the opposite layer gave): 0 → 4 and 1 → 3 of five layers."""
    model = decoder(residual=residual, norm=RMSNorm(), position=NoPosition(), n_layers=n_layers)
    params, text = loud(model), ids(B, T)
    apply, x0, end = layer_by_layer(model, params, text)
    own, skips, gave = params["decoder"]["layers"]["block0"]["residual_enter"], (n_layers - 1) // 2, []
    x = x0
    for layer in range(n_layers):
        if isinstance(residual, UNet) and layer >= n_layers - skips:
            opposite = n_layers - 1 - layer
            x = x + params["decoder"]["residual_begin"]["skip"][opposite] * gave[opposite]
        x = apply(own["x"][layer] * x + own["x0"][layer] * x0, layer)
        gave.append(x)
    close(end(x), hidden(model, params, text, one_document(T))[0], 1e-3)
    assert ("residual_begin" in params["decoder"]) == (isinstance(residual, UNet) and skips > 0)


@pytest.mark.parametrize("residual", [InputInjection(), UNet(), ReZero(start=1.0)], ids=lambda r: type(r).__name__)
def test_rules_that_begin_as_pre_norm(residual):
    model = decoder(residual=residual)
    first = model.init(jax.random.key(0))
    params = updated(first, loud(decoder()))  # the rule's own as they begin
    if isinstance(residual, UNet):
        params["decoder"]["residual_begin"]["skip"] *= 0
    text, at = ids(B, T), one_document(T)
    close(hidden(model, params, text, at)[0], hidden(decoder(), loud(decoder()), text, at)[0])


def test_branches_that_are_added_in_a_learned_measure():
    """x + α·f(norm(x)), nothing at first."""
    model = decoder(residual=ReZero(), norm=RMSNorm(), position=NoPosition(), n_layers=1)
    params, at, kind = loud(model), one_document(T), model.kinds("decoder")[0]
    p, x = own_layer(params), params["embedding"]["table"][ids(B, T)]
    y = x + p["residual_attention"]["alpha"] * mixed(kind, p["attention"], rms(p["norm_attention"], x), at)
    fed = model.feed_forward(p["feed_forward"], rms(p["norm_feed_forward"], y), at, None).h
    close(block(kind, p, x, at), y + p["residual_feed_forward"]["alpha"] * fed, 1e-3)
    close(block(kind, own_layer(model.init(jax.random.key(0))), x, at), x, 0)


def test_unused_attention_has_a_norm_that_learns_and_matrices_that_do_not():
    unused = config_lib.execute(Path(__file__).parent.parent / "experiments" / "tiny.py")["AttentionUnused"]
    model = decoder(residual=unused(), position=NoPosition(), n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    size = lambda params: (hidden(model, params, text, at)[0] ** 3).sum()
    found = jax.tree.map(lambda g: np.abs(g).max(), own_layer(jax.grad(size)(params)))
    assert all(g == 0 for g in jax.tree.leaves(found["attention"])) and found["norm_attention"]["scale"] > 1e-3
    alone = [hidden(model, params, text[:, [i]], one_document(1))[0] for i in range(T)]
    close(jnp.concatenate(alone, 1), hidden(model, params, text, at)[0], 1e-4)


def test_no_norm():
    model = decoder(norm=NoNorm(), position=NoPosition(), n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    assert set(params["decoder"]) == {"layers"} and set(own_layer(params)) == {"attention", "feed_forward"}
    p, x = own_layer(params), params["embedding"]["table"][text]
    x = x + mixed(model.kinds("decoder")[0], p["attention"], x, at)
    close(x + model.feed_forward(p["feed_forward"], x, at, None).h, hidden(model, params, text, at)[0], 1e-3)


@pytest.mark.parametrize("residual", [PreNorm(), PostNorm()], ids=["pre", "post"])
def test_a_block_may_be_attention_alone(residual):
    model = decoder(feed_forward=None, residual=residual, norm=RMSNorm(), n_layers=1)
    p, x, at, kind = own_layer(loud(model)), jnp.asarray(draws(B, T, 84)), one_document(T), model.kinds("decoder")[0]
    assert set(p) == {"attention", "norm_attention"}
    f = lambda h: mixed(kind, p["attention"], h, at)
    norm = lambda h: rms(p["norm_attention"], h)
    close(block(kind, p, x, at), x + f(norm(x)) if residual == PreNorm() else norm(x + f(x)), 1e-4)


def test_a_block_may_have_no_attention():
    """Then a token's hidden state is its own affair; the cache is empty, and decoding goes on all the same."""
    model = decoder(kernel=None, n_layers=2)
    params, text = loud(model), ids(B, T)
    layer = params["decoder"]["layers"]["block0"]
    assert set(layer) == {"feed_forward", "norm_feed_forward"} and model.n_residuals == 2
    changed = text.at[:, 3].set((text[:, 3] + 1) % 29)
    a, b = (hidden(model, params, each, one_document(T))[0] for each in (text, changed))
    assert (jnp.abs(a - b).max((0, 2)) > 1e-3).tolist() == [i == 3 for i in range(T)]
    assert model.cache(B, T) == {"block0": {}}
    written = text[0].tolist()
    for _ in range(3):
        h, _ = hidden(model, params, jnp.asarray([written]), one_document(len(written)))
        written.append(int(model.logits(params, h[0, -1]).argmax()))
    assert generate(model, params, [text[0].tolist()], 3, (Temperature(0.0),))[0].tolist() == written[T:]
    with pytest.raises(ValueError, match="leave nothing of a block"):
        checked(decoder(kernel=None, feed_forward=None))


def test_only_branches_that_are_there_count_as_residuals():
    assert (decoder().n_residuals, decoder(feed_forward=None).n_residuals) == (10, 5)
    both = EncoderDecoder(**SIZES, n_encoder_layers=7, position=NoPosition())
    assert both.n_residuals == 15 and dataclasses.replace(both, feed_forward=None).n_residuals == 10


@pytest.mark.parametrize("bias", [False, True])
def test_one_layer(bias):
    """f(x·W + b), and no F."""
    model = decoder(feed_forward=OneLayer(Tanh(), bias=bias), n_layers=1)
    p, x = own_layer(loud(model))["feed_forward"], draws(B, T, 84)
    assert {name: a.shape for name, a in p.items()} == {"kernel": (84, 84)} | ({"bias": (84,)} if bias else {})
    close(
        model.feed_forward(p, jnp.asarray(x), one_document(T), None).h,
        np.tanh(x @ np.asarray(p["kernel"]) + np.asarray(p.get("bias", 0))),
    )
    assert OneLayer().activation == ReLU()


def test_parts_alternate_over_the_layers():
    """Two kernels, one mask and three feed-forwards make six kinds."""
    kernels, feeds = (Softmax(), Uniform()), (MLP(ReLU()), GatedFeedForward(), MLP(Tanh(), bias=True))
    model = decoder(kernel=kernels, feed_forward=feeds, n_layers=6, position=NoPosition())
    kinds = model.kinds("decoder")
    assert [(k.parts.kernel, k.parts.mask, k.feed_forward) for k in kinds] == [
        (kernels[i % 2], Causal(), feeds[i % 3]) for i in range(6)
    ]
    params, text, at = loud(model), ids(B, T), one_document(T)
    x = params["embedding"]["table"][text]
    for i in range(6):
        p = own_layer(params, block=i)
        assert ("q" in p["attention"]["project"]) == (i % 2 == 0) and ("gate" in p["feed_forward"]) == (i % 3 == 1)
        x = block(kinds[i], p, x, at)
    close(model.norm(params["decoder"]["norm"], x), hidden(model, params, text, at)[0], 1e-4)
    assert decoder(mask=(Causal(), Window(3)), n_layers=4).kinds("decoder")[1].parts.mask == Window(3)


def test_positions_may_differ_by_layer():
    """Local and global bases alternate; equal ones share what they own, others do not."""
    local, far = Rotary(base=100.0), Rotary(base=5000.0)
    two, at, text = decoder(n_layers=4, position=(local, far)), one_document(T), ids(B, T)
    params = loud(two)
    x = params["embedding"]["table"][text]
    for i in range(4):
        only = decoder(n_layers=4, position=(local, far)[i % 2])
        x = block(only.kinds("decoder")[0], own_layer(params, block=i % 2, layer=i // 2), x, at)
    close(two.norm(params["decoder"]["norm"], x), hidden(two, params, text, at)[0], 1e-4)
    assert [kind.parts.position for kind in two.kinds("decoder")] == [local, far]
    several = decoder(n_layers=4, position=(RelativeBias(), Learned())).init(jax.random.key(0))["decoder"]
    assert {"position0", "position1"} < several.keys() and several["position1"]["table"].shape == (23, 84)
    assert "position" in decoder(n_layers=4, position=(RelativeBias(), RelativeBias())).declared()["decoder"]


def test_a_layer_has_the_parameters_of_its_own_position():
    model = decoder(n_layers=4, position=(RelativeBias(8, 6), RelativeBias(12, 9)))
    params, text, at = loud(model), ids(B, T), one_document(T)
    own = params["decoder"]["position1"]["table"]
    assert own.shape == (12, 6) and params["decoder"]["position0"]["table"].shape == (8, 6)
    changed = {**params, "decoder": {**params["decoder"], "position1": {"table": 2 * own}}}
    a, b = (model.activations(each, text, at) for each in (params, changed))
    first, second = (f"decoder/layers/block{i}/after_attention" for i in range(2))
    assert (a[first][0] == b[first][0]).all() and jnp.abs(a[second][0] - b[second][0]).max() > 1e-3


class Drops(PreNorm):
    """What attention gives is dropped; its norm is kept."""

    def after(self, stream, h, site):
        return site.norms[0](stream) if site.branch == "attention" else super().after(stream, h, site)


def test_a_residual_rule_may_ignore_a_branch():
    model = decoder(residual=Drops(), position=NoPosition(), n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    changed = text.at[:, 3].set((text[:, 3] + 1) % 29)
    a, b = (hidden(model, params, each, at)[0] for each in (text, changed))
    assert (jnp.abs(a - b).max((0, 2)) > 1e-3).tolist() == [i == 3 for i in range(T)]
    grads = jax.grad(lambda p: (model.hidden(p, text, at).h ** 2).sum())(params)["decoder"]["layers"]["block0"]
    assert not any(a.any() for a in jax.tree.leaves(grads["attention"])) and grads["norm_attention"]["scale"].any()


@pytest.mark.parametrize("fields", [{}, {"scaled": True}, {"normed": True}, {"token_types": 2}, None], ids=str)
def test_the_embedded_input(fields):
    """√D · token + part + position, then the norm."""
    fields = {"scaled": True, "normed": True, "token_types": 2} if fields is None else fields
    model = decoder(n_layers=1, position=Learned(), norm=LayerNorm(), embedding=Embedding(**fields))
    params, text = loud(model), ids(2, T)
    x = np.asarray(params["embedding"]["table"])[text] * (84**0.5 if "scaled" in fields else 1)
    at = places(jnp.asarray(SEGMENT), jnp.asarray(PART))
    bare = x + np.asarray(params["decoder"]["position"]["table"])[POSITION]
    for part, shown in ((PART, at), (0 * PART, at._replace(part=None))):
        expected = bare + (np.asarray(params["embedding"]["parts"])[part] if "token_types" in fields else 0)
        if "normed" in fields:
            norm = jax.tree.map(np.asarray, params["decoder"]["norm_embedding"])
            expected = expected - expected.mean(-1, keepdims=True)
            expected = expected / np.sqrt((expected**2).mean(-1, keepdims=True) + 1e-5) * norm["scale"] + norm["bias"]
        close(model.activations(params, text, shown)["decoder/embedded"], expected, 1e-4)


@pytest.mark.parametrize(
    ("activation", "f"),
    [
        (layers.SquaredReLU(), lambda x: np.maximum(x, 0) ** 2),
        (layers.Square(), np.square),
        (layers.Tanh(), np.tanh),
        (layers.Sigmoid(), lambda x: 1 / (1 + np.exp(-x))),
        (layers.Identity(), lambda x: x),
    ],
    ids=lambda a: type(a).__name__,
)
def test_activations(activation, f):
    x = 3 * draws(3, 5)
    close(activation(jnp.asarray(x)), f(x))


# --- initializers

D, F, H, G, K, V, C, L = 96, 211, 5, 1, 17, 401, 101, 31
CUT = 0.87962566103423978  # the deviation of a standard normal cut off at ± 2
FANS = {  # what goes in and what comes out of each matrix
    **{"q": (D, H * K), "k": (D, G * K), "v": (D, G * K), "o": (H * K, D)},
    **{"up": (D, F), "gate": (D, F), "down": (F, D), "kernel": (D, V), "bias": (D, V)},
}


def both(limit):
    """Standard deviation and bound of uniform numbers."""
    return limit / 3**0.5, limit


@pytest.mark.parametrize(
    ("initializer", "matrix", "bias", "table"),
    [
        (layers.TorchUniform(), lambda i, o: both(i**-0.5), lambda i: both(i**-0.5), (1, 9)),
        (layers.XavierUniform(), lambda i, o: both((6 / (i + o)) ** 0.5), None, (0.02, 1)),
        (layers.LeCunNormal(0.3), lambda i, o: (i**-0.5, 2 * i**-0.5 / CUT), None, (0.3, 3)),
        (layers.TruncatedNormal(0.1), lambda i, o: (0.1 * CUT, 0.2), None, (0.1 * CUT, 0.2)),
        (layers.Normal(0.1), lambda i, o: (0.1, 1), None, (0.1, 1)),
    ],
    ids=lambda i: type(i).__name__,
)
def test_initializers(initializer, matrix, bias, table):
    """Deviation and bound of every array, from what its matrix takes in and gives out."""
    model = decoder(
        **{"d_model": D, "d_ff": F, "n_heads": H, "n_kv_heads": G, "head_width": K, "vocab_size": V, "n_layers": L},
        **{
            "context_length": C,
            "bias": True,
            "feed_forward": GatedFeedForward(bias=True),
            "embedding": Embedding(token_types=503),
        },
        **{"head": LanguageHead(tied=False, bias=True), "initializer": initializer},
    )
    for path, array in jax.tree_util.tree_flatten_with_path(model.init(jax.random.key(3)))[0]:
        path, array = jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(array)
        group, name = path.split("/")[-2:]
        matrix_name = name.removesuffix("_bias")
        if "norm" in group:
            assert (array == (name == "scale")).all(), path
        elif name in ("table", "parts"):
            close_to(array, *table, path)
        elif name.endswith("bias") and bias is None:
            assert (array == 0).all(), path
        else:
            close_to(array, *(bias(FANS[matrix_name][0]) if name.endswith("bias") else matrix(*FANS[name])), path)


def close_to(array, deviation, bound, path):
    error = 0.03 if array.size > 10_000 else 0.1
    assert array.std() == pytest.approx(deviation, rel=error), path
    assert abs(array.mean()) < 6 * deviation / array.size**0.5 and np.abs(array).max() <= bound * (1 + 1e-6), path


def test_only_what_writes_to_the_residual_stream_begins_smaller():
    """Attention's and feed-forward's last matrices, by √(2 · layers); not the head's layer, also from D to D."""
    model = Encoder(vocab_size=29, d_model=96, n_layers=8, n_heads=6, context_length=7, head=MaskedLanguageHead())
    params = model.init(jax.random.key(0))
    block = params["encoder"]["layers"]["block0"]
    for array, std in (
        (block["attention"]["project"]["o"], 0.005),
        (block["feed_forward"]["down"], 0.005),
        (block["feed_forward"]["up"], 0.02),
        (params["head_language"]["between"], 0.02),
    ):
        assert float(array.std()) == pytest.approx(std, rel=0.03)


@pytest.mark.parametrize("family", [Decoder, EncoderDecoder], ids=lambda f: f.__name__)
@pytest.mark.parametrize("biased", [False, True])
def test_outputs_that_begin_at_zero(family, biased):
    """Every layer is the identity, and every id as likely as another; the rest begins as it would."""
    sizes = SIZES | {"n_layers": 2, "bias": biased, "feed_forward": MLP(bias=biased)}
    classes = ClassificationHead("x", ("a", "b", "c"))
    base = layers.TorchUniform() if biased else layers.LeCunNormal(scale=0.8)
    model = family(**sizes, head=(LanguageHead(tied=False, bias=biased), classes), initializer=ZeroOutputs(base))
    params, text, at = model.init(jax.random.key(0)), ids(B, T), one_document(T)
    memory = model.encode(params, text, at).h if model.encodes else None
    out = model.hidden(params, text, at, memory=memory, recorded=True)
    for stack in model.stacks:
        block, embedded = params[stack]["layers"]["block0"], out.activations.get(f"{stack}/embedded")
        mixers = [block[name] for name in ("attention", "cross_attention") if name in block]
        assert len(mixers) == (1 if stack != "decoder" or family is Decoder else 2)
        assert not any(mixer["project"]["o"].any() for mixer in mixers) and not block["feed_forward"]["down"].any()
        if embedded is not None:
            given = [a for n, a in out.activations.items() if n.startswith(f"{stack}/layers") and "/after_" in n]
            assert len(given) == len(model.kinds(stack)[0].branches)
            assert all((a == embedded[None]).all() for a in given)
    assert not model.logits(params, out.h).any()
    assert not model.read(params, classes, out.h, jnp.ones((B, T), bool)).any()
    like = dataclasses.replace(model, initializer=base).init(jax.random.key(0))
    zeros = []
    for (path, a), b in zip(jax.tree_util.tree_flatten_with_path(params)[0], jax.tree.leaves(like), strict=True):
        if (a != b).any():
            assert not a.any()
            zeros.append(path_name(path).split("/")[-1])
    matrices = ["o", "down", "kernel"] if not biased else ["o", "o_bias", "down", "down_bias", "kernel", "bias"]
    assert set(zeros) == set(matrices)


def test_the_first_loss_of_a_zero_head_is_that_of_even_chances():
    model = decoder(head=LanguageHead(tied=False, cap=15.0), initializer=ZeroOutputs())
    example = NextToken().prepare({"tokens": ids(B, T + 1)}, jax.random.key(0))
    sums = NextToken().loss(model, model.init(jax.random.key(0)), example, None)
    assert float(sums.nats / sums.weight) == pytest.approx(math.log(29), rel=1e-6)


def test_matrices_of_recurrent_layers_write_to_no_stream():
    model = LSTM(vocab_size=29, d_model=13, context_length=7, initializer=ZeroOutputs())
    params = model.init(jax.random.key(0))
    assert (
        all(group["kernel"].any() for group in params["layers"].values())
        and not params["head_language"]["kernel"].any()
    )


# --- sizes of published models


def test_parameters_of_t5():
    """T5-small: 60,506,624."""
    model = EncoderDecoder(
        **{"vocab_size": 32128, "d_model": 512, "d_ff": 2048, "n_layers": 6, "n_heads": 8, "context_length": 512},
        **{"position": RelativeBias(), "norm": RMSNorm(), "feed_forward": MLP(ReLU())},
        head=LanguageHead(scaled=True),
    )
    assert count(model) == 60_506_624


@pytest.mark.parametrize(
    ("head", "parameters"),
    [(MaskedLanguageHead(), 109_514_298), (EmbeddingHead(FirstToken(), 768, Tanh(), unit=False), 109_482_240)],
    ids=["masked language", "pooler"],
)
def test_parameters_of_bert(head, parameters):
    model = Encoder(
        **{
            "vocab_size": 30522,
            "d_model": 768,
            "n_layers": 12,
            "n_heads": 12,
            "context_length": 512,
            "embedding": Embedding(normed=True, token_types=2),
        },
        **{"norm": LayerNorm(eps=1e-12), "residual": PostNorm(), "bias": True, "head": head},
        feed_forward=MLP(GELU(False), bias=True),
    )
    assert count(model) == parameters


def test_parameters_of_the_first_transformer():
    """The base model's two stacks: torch.nn.Transformer() has 44,140,544, two last norms among them that it lacks."""
    model = EncoderDecoder(
        **{"vocab_size": 37000, "d_model": 512, "d_ff": 2048, "n_layers": 6, "n_heads": 8, "context_length": 512},
        **{"position": Sinusoidal(), "residual": PostNorm(), "bias": True, "embedding": Embedding(scaled=True)},
        feed_forward=MLP(ReLU(), bias=True),
    )
    assert count(model) - 37000 * 512 == 44_140_544 - 2 * 2 * 512
