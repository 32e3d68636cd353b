"""Properties of the models from before the transformers, and their equations in NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import generate, hidden, ids, loud

from jaxformer.declarations import Letters, map_declared
from jaxformer.keys import fold
from jaxformer.learning.objectives import NextToken
from jaxformer.model.baselines import GRU, LSTM, RNN, Bigram, Rows, TokenEmbedding
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import TorchUniform, dropout
from jaxformer.model.masks import Places, one_document, places
from jaxformer.overrides import override
from jaxformer.spec import checked, dumps, from_json, to_json

B, T, V, D, L = 3, 13, 29, 7, 5
SIZES = {"d_model": D, "context_length": 23, "vocab_size": V}
RECURRENT = {cls.__name__: cls(**SIZES, n_layers=L) for cls in (RNN, GRU, LSTM)}
MODELS = {
    "Bigram": Bigram(context_length=23, vocab_size=V),
    "TokenEmbedding": TokenEmbedding(**SIZES),
    **RECURRENT,
}
each = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS.keys())
each_recurrent = pytest.mark.parametrize("model", RECURRENT.values(), ids=RECURRENT.keys())


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def cut(at, *where):
    return Places(*(a[:, slice(*where)] for a in (at.position, at.segment)))


# --- what every model promises


@each
def test_nothing_sees_the_future(model):
    """By gradient, through the whole model; a recurrent one sees all of the past, the others the token alone."""
    params, text = loud(model), jnp.arange(T)[None]  # the ids are all different: a row of the table is a place
    out = lambda table: model.hidden(params | {"embedding": {"table": table}}, text, one_document(T))[0][0, 6].sum()
    size = np.asarray(jnp.abs(jax.jit(jax.grad(out))(params["embedding"]["table"])).sum(-1))
    assert (size[7:] == 0).all() and size[6] > 1e-6
    assert ((size[3:6] > 1e-6) == isinstance(model, RNN)).all()


@each
def test_packed_documents_are_as_each_alone(model):
    params, text = loud(model), ids(B, T)
    segment = jnp.broadcast_to(1 + jnp.arange(T) // 5, (B, T))
    packed, _ = hidden(model, params, text, places(segment))
    for start in (0, 5):
        alone, _ = hidden(model, params, text[:, start : start + 5], one_document(5))
        close(packed[:, start : start + 5], alone)


@each
def test_padding_on_either_side_and_between_changes_nothing(model):
    params, text = loud(model), ids(B, T)
    for kept in (np.arange(4, 9), np.array([2, 3, 6, 7, 10])):
        alone, _ = hidden(model, params, text[:, kept], one_document(5))
        segment = np.zeros((B, T), np.int32)
        segment[:, kept] = 1
        position = np.maximum(np.cumsum(segment, 1) - 1, 0) * segment  # that of padding is 0
        padded, _ = hidden(model, params, text, Places(jnp.asarray(position), jnp.asarray(segment)))
        close(padded[:, kept], alone)


@each
def test_cached_decoding_equals_the_full_pass(model):
    """A ragged prefill, whose padding counts from 0 again, then token by token, then several at once."""
    params, text = loud(model), ids(B, T)
    lengths = np.array([9, 7, 5])[:, None]
    behind = np.broadcast_to(np.arange(9, T), (B, T - 9))
    prompt = places(jnp.asarray(np.arange(9) < lengths, jnp.int32))
    position = jnp.concatenate([prompt.position, jnp.asarray(behind - 9 + lengths)], 1)
    at = Places(position, jnp.pad(prompt.segment, ((0, 0), (0, T - 9)), constant_values=1))
    full, none = hidden(model, params, text, at)
    assert none is None
    cache, outs, start = model.cache(B, 23), [], 0
    assert all(a.shape == (L, B, D) for a in jax.tree.leaves(cache))
    for size in (9, 1, 1, 2):
        piece = text[:, start : start + size]
        h, cache = hidden(model, params, piece, cut(at, start, start + size), None, cache)
        chex.assert_trees_all_equal_shapes_and_dtypes(cache, model.cache(B, 23))
        outs.append(h)
        start += size
    real = np.asarray(at.segment)[..., None]
    close(jnp.concatenate(outs, 1) * real, full * real)
    alone, _ = hidden(model, params, jnp.delete(text[2:], slice(5, 9), axis=1), one_document(T - 4))
    close(full[2:][:, real[2, :, 0] > 0], alone)


@each
def test_every_parameter_gets_a_gradient(model):
    params, text = jax.jit(model.init)(jax.random.key(0)), ids(B, T)
    example = NextToken().prepare({"tokens": text}, jax.random.key(0))
    NextToken().check_model(model)
    loss = lambda params: NextToken().loss(model, params, example, None).minimised
    nats, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert abs(nats / B / (T - 1) - np.log(V)) < 1
    for g in jax.tree.leaves(gradient):
        assert jnp.isfinite(g).all() and jnp.abs(g).max() > 0


def test_gradients_in_half_precision_are_close():
    """Of 400 tokens: summed in bfloat16, they would be 7 % off."""
    text = ids(1, 400)
    out = lambda p: model.hidden(p, text, one_document(400))[0].astype(jnp.float32).sum()
    model = dataclasses.replace(RECURRENT["LSTM"], n_layers=2)
    params, gradient = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loud(model)), jax.jit(jax.grad(out))
    full = gradient(jax.tree.map(lambda a: a.astype(jnp.float32), params))["layers"]
    half = gradient(params)["layers"]
    error = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
    assert np.mean(jax.tree.leaves(jax.tree.map(error, full, half))) < 0.02


@each
def test_the_dtype_is_that_of_the_parameters_and_the_cache_keeps_its_own(model):
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loud(model))
    h, cache = hidden(model, params, ids(B, T), one_document(T), None, model.cache(B, T, jnp.float32))
    assert h.dtype == jnp.bfloat16 and {a.dtype for a in jax.tree.leaves(cache)} <= {jnp.dtype(jnp.float32)}
    assert model.logits(params, h).dtype == jnp.float32


@pytest.mark.parametrize("name", ["Bigram", "RNN", "LSTM"])
def test_generation(name):
    model = MODELS[name]
    params = loud(model)
    new = generate(model, params, [[1, 2, 3]], 5)
    assert new.shape == (1, 5) and (new >= 0).all() and (new < V).all()
    both = generate(model, params, [[1, 2, 3], [4, 5, 6, 7, 8]], 5)
    np.testing.assert_array_equal(both[:1], new)  # beside a longer prompt, too


@each
def test_specs_survive_storage_and_take_the_vocabulary_of_a_tokenizer(model):
    assert from_json(to_json(model), type(model), "here") == checked(model) == model
    assert dumps(model)
    later = dataclasses.replace(dataclasses.replace(model, vocab_size=None), vocab_size=31)
    params = jax.eval_shape(checked(later).init, jax.random.key(0))
    assert params["embedding"]["table"].shape == (31, 31 if isinstance(model, Bigram) else D)
    assert model.generates and not model.encodes and not model.sees_ahead


def test_parameter_counts():
    head = V * D + D * V + V
    expected = {
        "Bigram": V * V,
        "TokenEmbedding": head,
        "RNN": head + L * (2 * D * D + D),
        "GRU": head + L * (6 * D * D + 4 * D),
        "LSTM": head + L * (8 * D * D + 4 * D),
    }
    for name, model in MODELS.items():
        leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        assert sum(a.size for a in leaves) == expected[name], name


# --- each by its equations


def test_bigram_logits_are_rows_of_the_table():
    model, text = MODELS["Bigram"], ids(B, T)
    params = loud(model)
    assert list(params) == ["embedding"]
    h, _ = hidden(model, params, text, one_document(T))
    np.testing.assert_array_equal(model.logits(params, h), np.asarray(params["embedding"]["table"])[text])
    assert not model.for_decoding(params)["head_language"]  # which is no table: it would never be read
    capped = dataclasses.replace(model, head=Rows(cap=0.5))
    close(capped.logits(params, h), 0.5 * np.tanh(np.asarray(h) / 0.5))


def test_token_embedding_by_hand():
    model, text = MODELS["TokenEmbedding"], ids(B, T)
    params = loud(model)
    head = params["head_language"]
    h, _ = hidden(model, params, text, one_document(T))
    by_hand = np.asarray(params["embedding"]["table"])[text] @ np.asarray(head["kernel"]) + np.asarray(head["bias"])
    close(model.logits(params, h), by_hand)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rnn(p, x, h, _):
    h = np.tanh(x @ p["i"]["kernel"] + p["i"]["bias"] + h @ p["h"]["kernel"])
    return h, _


def gru(p, x, h, _):
    given = lambda gate: x @ p[f"i{gate}"]["kernel"] + p[f"i{gate}"]["bias"]
    r = sigmoid(given("r") + h @ p["hr"]["kernel"])
    z = sigmoid(given("z") + h @ p["hz"]["kernel"])
    n = np.tanh(given("n") + r * (h @ p["hn"]["kernel"] + p["hn"]["bias"]))
    return (1 - z) * n + z * h, _


def lstm(p, x, h, c):
    sums = {g: x @ p[f"i{g}"]["kernel"] + h @ p[f"h{g}"]["kernel"] + p[f"h{g}"]["bias"] for g in "ifgo"}
    c = sigmoid(sums["f"]) * c + sigmoid(sums["i"]) * np.tanh(sums["g"])
    return sigmoid(sums["o"]) * np.tanh(c), c


@pytest.mark.parametrize(("name", "step"), [("RNN", rnn), ("GRU", gru), ("LSTM", lstm)])
def test_recurrent_layers_by_hand(name, step):
    model, text = RECURRENT[name], ids(B, T)
    params = loud(model)
    x = np.asarray(params["embedding"]["table"])[text]
    for layer in range(L):
        own = jax.tree.map(lambda a, layer=layer: np.asarray(a[layer]), params["layers"])
        h, c, out = np.zeros((B, D)), np.zeros((B, D)), []
        for t in range(T):
            h, c = step(own, x[:, t], h, c)
            out.append(h)
        x = np.stack(out, 1)
    close(hidden(model, params, text, one_document(T))[0], x)
    found = model.activations(params, text, one_document(T))
    assert found["layers/out"].shape == (L, B, T, D)
    close(found["layers/out"][-1], x)


# --- what recurrent models declare, and their dropout


@each_recurrent
def test_declarations(model):
    declared = model.declared()["layers"]
    params = jax.jit(model.init)(jax.random.key(0))["layers"]
    for name, group in declared.items():
        if name.startswith("h"):
            w = np.asarray(params[name]["kernel"])
            close(w @ w.swapaxes(1, 2), np.broadcast_to(np.eye(D), (L, D, D)))
            assert jnp.abs(w[0] - w[1]).max() > 0.1
        else:
            assert 0.8 < jnp.abs(params[name]["kernel"]).max() * D**0.5 <= 1
        assert (group["kernel"].letters, group["kernel"].decay, group["kernel"].fan_in) == (
            Letters("L", "D", "D"),
            True,
            D,
        )
        if "bias" in group:
            assert (group["bias"].letters, group["bias"].decay, group["bias"].fan_in) == (
                Letters("L", "", "D"),
                False,
                D,
            )
    map_declared(lambda box: box.sizes(), model.declared())


@pytest.mark.parametrize("bias", [1.0, -0.5, None])
def test_the_first_bias_of_forget_gates(bias):
    """Theirs alone; without one they are drawn as the other gates' biases."""
    model = dataclasses.replace(RECURRENT["LSTM"], forget_bias=bias, initializer=TorchUniform())
    own = {
        gate: np.asarray(value["bias"])
        for gate, value in model.init(jax.random.key(0))["layers"].items()
        if gate[0] == "h"
    }
    for gate, values in own.items():
        fixed = gate == "hf" and bias is not None
        assert (values == bias).all() if fixed else 0.3 < np.abs(values).max() * D**0.5 <= 1


@each_recurrent
def test_dropout_changes_training_only(model):
    params, text, at, key = loud(model), ids(B, T), one_document(T), jax.random.key(2)
    plain, _ = hidden(model, params, text, at, key)
    dropping = dataclasses.replace(model, dropout=0.3)
    np.testing.assert_array_equal(hidden(dropping, params, text, at)[0], plain)
    h, _ = hidden(dropping, params, text, at, key)
    zero = np.asarray(h == 0).mean()
    assert 0.2 < zero < 0.4 and jnp.abs(h - plain).max() > 0.01
    # by hand, a layer at a time: what each is given, and what the last one gives
    x = params["embedding"]["table"][text]
    for layer in range(L):
        one = jax.tree.map(lambda a, layer=layer: a[layer : layer + 1], params["layers"])
        x = dropout(fold(key, layer), x, 0.3)
        table = {"embedding": {"table": x.reshape(B * T, D)}, "layers": one}
        single = dataclasses.replace(model, n_layers=1, vocab_size=B * T, head=())
        x, _ = hidden(single, params | table, jnp.arange(B * T).reshape(B, T), at)
    close(dropout(fold(key, L), x, 0.3), h)


@pytest.mark.parametrize(
    ("model", "path", "value", "words"),
    [
        (MODELS["Bigram"], "d_model", 8, "model.d_model=8 must be None"),
        (MODELS["Bigram"], "head", LanguageHead(), "must be Rows"),
        (MODELS["GRU"], "head", Rows(), "model.head=Rows reads logits, and GRU gives hidden states; take LanguageHead"),
        (MODELS["Bigram"], "head.bias", True, "model.head.tied"),
        (MODELS["Bigram"], "context_length", 0, "model.context_length=0"),
        (MODELS["TokenEmbedding"], "d_model", 0, "model.d_model=0"),
        (MODELS["RNN"], "n_layers", 0, "model.n_layers=0"),
        (MODELS["GRU"], "dropout", 1.0, "model.dropout=1.0"),
        (MODELS["LSTM"], "dropout", -0.1, "model.dropout=-0.1"),
    ],
)
def test_impossible_values_are_refused(model, path, value, words):
    with pytest.raises(ValueError, match=words):
        checked(override(model, path, value), "model.")
