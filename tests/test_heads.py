"""Heads against NumPy; a text's vector and its logits do not depend on the padding beside it."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder, loud

from jaxformer.declarations import Param
from jaxformer.generation.predict import predict
from jaxformer.model import heads
from jaxformer.model.layers import GELU, Identity, LayerNorm, ReLU, Tanh
from jaxformer.model.masks import Bidirectional, places

rng = np.random.default_rng(0)
B, T, D, V, M, N = 3, 13, 7, 29, 11, 5
CLASSES = tuple("abcde")
REAL = np.zeros((B, T), bool)
REAL[0, 4:9], REAL[1, :6], REAL[2, 8:] = True, True, True


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def draws(*shape):
    return rng.normal(size=shape).astype(np.float32)


def filled(spec, **sizes):
    """Parameters of a head or pooling, by its letters."""
    sizes = {"D": D, "V": V} | sizes
    return {
        name: draws(*(({**sizes, **p.sizes})[letter] for letter in p.letters.replace("->", "")))
        for name, p in spec.params().items()
    }


def j(*tree):
    return jax.tree.map(jnp.asarray, tree)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


# --- over the vocabulary


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_language_head(tied, bias, scaled, cap):
    head = heads.LanguageHead(tied, bias, scaled, cap)
    p, h, table = filled(head), draws(B, T, D), draws(V, D)
    assert p.keys() == ({"bias"} if bias else set()) | (set() if tied else {"kernel"})
    logits = h * (D**-0.5 if scaled else 1) @ (table.T if tied else p["kernel"]) + (p["bias"] if bias else 0)
    close(head(*j(p, h, table)), logits if cap is None else cap * np.tanh(logits / cap))


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_the_same_where_products_are_padded(monkeypatch, tied):
    """Of many rows on a GPU, to a multiple of ALIGNED; gradients, too."""
    head, (h, table, g) = heads.LanguageHead(tied), j(draws(B, T, D), draws(V, D), draws(B, T, V))
    (p,) = j(filled(head))
    run = lambda: jax.value_and_grad(lambda *a: (head(*a) * g).sum(), (0, 1, 2))(p, h, table)
    padded = lambda: "pad[" in str(jax.make_jaxpr(lambda: head(p, h, table))())
    plain, before = run(), padded()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(heads, "ALIGNED", 8)
    for a, b in zip(jax.tree.leaves(run()), jax.tree.leaves(plain), strict=True):
        close(a, b)
    few = "pad[" in str(jax.make_jaxpr(lambda: head(p, h[:1, :7], table))())
    assert (before, padded(), few) == (False, True, False)


def test_masked_language_head():
    """As BERT: a layer, GELU, a norm, the tied table and a bias."""
    head = heads.MaskedLanguageHead()
    p, h, table = filled(head), draws(B, T, D), draws(V, D)
    assert {n: a.shape for n, a in p.items()} == {
        **{"between": (D, D), "between_bias": (D,), "norm_scale": (D,), "norm_bias": (D,), "bias": (V,)}
    }
    x = gelu(h @ p["between"] + p["between_bias"])
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12) * p["norm_scale"] + p["norm_bias"]
    close(head(*j(p, h, table)), x @ table.T + p["bias"], 1e-4)
    assert head.activation == GELU(approximate=False) and head.norm == LayerNorm(eps=1e-12)


def test_a_models_head_is_its_own():
    """The parameters lie under the head's name, and `logits` finds them."""
    model = decoder(head=(heads.LanguageHead(tied=False, bias=True, cap=3.0), heads.EmbeddingHead(width=M)), n_layers=1)
    params, h = loud(model), draws(B, T, 84)
    assert params["head_embedding"]["kernel"].shape == (84, M)
    own = jax.tree.map(np.asarray, params["head_language"])
    close(model.logits(params, jnp.asarray(h)), 3 * np.tanh((h @ own["kernel"] + own["bias"]) / 3), 1e-4)


# --- one vector


def attended(h, p):
    return softmax(h @ p["query"]) @ h


POOLINGS = [
    (heads.MeanPooling(), lambda h, p: h.mean(0)),
    (heads.FirstToken(), lambda h, p: h[0]),
    (heads.LastToken(), lambda h, p: h[-1]),
    (heads.MaxPooling(), lambda h, p: h.max(0)),
    (heads.AttentionPooling(), attended),
]
each_pooling = pytest.mark.parametrize(("pooling", "f"), POOLINGS, ids=lambda x: type(x).__name__)


@each_pooling
def test_poolings(pooling, f):
    """Each row is as its own tokens alone, with padding on either side or both; a row without any gives numbers."""
    p, h = filled(pooling), draws(B, T, D) - 3
    out = pooling(*j(p, h, REAL))
    close(out, np.stack([f(h[b, REAL[b]], p) for b in range(B)]))
    assert jnp.isfinite(pooling(*j(p, h, 0 * REAL > 0))).all()


@each_pooling
def test_poolings_in_half_precision(pooling, f):
    p, h = filled(pooling), draws(B, T, D)
    out = pooling(*jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (p, h)), jnp.asarray(REAL))
    assert out.dtype == jnp.bfloat16
    close(np.asarray(out, np.float32), np.stack([f(h[b, REAL[b]], p) for b in range(B)]), 0.1)


@pytest.mark.parametrize("activation", [Identity(), Tanh()], ids=["linear", "tanh"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("width", [None, M])
def test_embedding_head(activation, unit, width):
    head = heads.EmbeddingHead(heads.AttentionPooling(), width, activation, unit)
    p, h = filled(head), draws(B, T, D)
    x = np.stack([attended(h[b, REAL[b]], p) for b in range(B)])
    if width is not None:
        x = x @ p["kernel"] + p["bias"]
        x = np.tanh(x) if activation == Tanh() else x
    out = np.asarray(head(*j(p, h, REAL)))
    close(out, x / np.linalg.norm(x, axis=1, keepdims=True) if unit else x)
    assert out.shape == (B, width or D)


def test_the_vector_of_no_token_has_a_gradient():
    """Of a row of padding the mean is 0, which has no direction."""
    head, h = heads.EmbeddingHead(), draws(B, T, D)
    real = jnp.asarray(REAL).at[1].set(False)
    gradient = jax.grad(lambda h: (head({}, h, real)[0] ** 3).sum())(jnp.asarray(h))
    assert jnp.isfinite(gradient).all() and jnp.abs(gradient[0]).max() > 0


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_is_the_same_where_no_label_is_looked_up(monkeypatch, smoothing):
    """As on accelerators, where a scatter would be a pass over the gradients of all logits."""
    logits, labels = 3 * draws(B, T, V), rng.integers(0, V, (B, T))
    if not smoothing:
        logits[0, 0, (labels[0, 0] + 1) % V] = -np.inf
    none = labels.copy()
    none[1, 1] = V
    given = j(logits, labels, draws(B, T))

    def run():
        return jax.value_and_grad(lambda z, y, g: (heads.cross_entropy(z, y, smoothing) * g).sum())(*given)

    of_none = lambda: np.isnan(heads.cross_entropy(*j(logits, none), smoothing))
    scatters = lambda: "scatter" in str(jax.make_jaxpr(lambda: run())())
    plain, before, nowhere = run(), scatters(), of_none()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert np.array_equal(of_none(), nowhere) and nowhere.sum() == 1
    for a, b in zip(run(), plain, strict=True):
        assert jnp.isfinite(a).all()
        close(a, b, 1e-6)
    assert (before, scatters()) == (True, False)


# --- classes


def cross_entropy(logits, labels, smoothing):
    target = (1 - smoothing) * np.eye(logits.shape[-1])[labels] + smoothing / logits.shape[-1]
    return -(target * np.log(softmax(logits))).sum(-1)


def binary(logits, labels, smoothing):
    target = (1 - smoothing) * labels + smoothing / 2
    return -(target * np.log(sigmoid(logits)) + (1 - target) * np.log(1 - sigmoid(logits)))


CLASSIFIERS = [  # head, shape of logits, of labels, number of labels, nats, probabilities, right
    (heads.ClassificationHead, (B, N), (B,), N, cross_entropy, softmax, lambda z, y: z.argmax(-1) == y),
    (
        *(heads.BinaryHead, (B, 1), (B,), 2, lambda z, y, s: binary(z[..., 0], y, s)),
        *(lambda z: np.concatenate([1 - sigmoid(z), sigmoid(z)], -1), lambda z, y: (z[..., 0] > 0) == y),
    ),
    (
        *(heads.MultiLabelHead, (B, N), (B, N), 2, lambda z, y, s: binary(z, y, s).sum(-1)),
        *(sigmoid, lambda z, y: ((z > 0) == y).all(-1)),
    ),
    (heads.TokenClassificationHead, (B, T, N), (B, T), N, cross_entropy, softmax, lambda z, y: z.argmax(-1) == y),
]
each_classifier = pytest.mark.parametrize("case", CLASSIFIERS, ids=lambda case: case[0].__name__)


def classifier(case, **fields):
    return case[0](classes=CLASSES[: 2 if case[0] is heads.BinaryHead else N], **fields)


@each_classifier
@pytest.mark.parametrize("hidden", [None, M])
@pytest.mark.parametrize("activation", [Tanh(), ReLU()], ids=["tanh", "relu"])
def test_logits_of_classes(case, hidden, activation):
    """One layer or two behind the pooling, or behind each token."""
    head = classifier(case, hidden=hidden, activation=activation, pooling=heads.MaxPooling())
    p, h = filled(head), draws(B, T, D)
    x = h if case[0] is heads.TokenClassificationHead else np.stack([h[b, REAL[b]].max(0) for b in range(B)])
    if hidden is not None:
        x = x @ p["between"] + p["between_bias"]
        x = np.tanh(x) if activation == Tanh() else np.maximum(x, 0)
    logits = head(*j(p, h, REAL))
    close(logits, x @ p["kernel"] + p["bias"], 1e-4)
    assert logits.shape == case[1] and logits.dtype == jnp.float32 and head.name == "classes_of_label"


@each_classifier
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_nats_of_classes(case, smoothing):
    _, of_logits, of_labels, n, nats, _, _ = case
    head, z, y = classifier(case), 2 * draws(*of_logits), rng.integers(0, n, of_labels)
    close(head.nats(*j(z, y), smoothing), nats(z, y, smoothing))


@each_classifier
def test_probabilities_and_what_is_right(case):
    _, of_logits, of_labels, n, _, probabilities, right = case
    head, z = classifier(case), draws(101, *of_logits)
    y = rng.integers(0, n, (101, *of_labels))
    y[:50] = (z[:50] > 0) if of_labels == of_logits else (z[:50, ..., 0] > 0) if n == 2 else z[:50].argmax(-1)
    close(head.probabilities(*j(z)), probabilities(z))
    out = np.asarray(head.right(*j(z, y)))
    assert np.array_equal(out, right(z, y)) and out[:50].all() and not out[50:].all()
    if case[0] is not heads.MultiLabelHead:
        close(head.probabilities(*j(z)).sum(-1), 1)


def test_the_likeliest_of_equals_is_the_first():
    logits = rng.integers(0, 3, (101, N)).astype(np.float32)
    for label in range(N):
        labels = np.full(101, label)
        assert np.array_equal(heads.is_likeliest(*j(labels, logits)), logits.argmax(-1) == labels)
    assert not heads.is_likeliest(jnp.arange(2), jnp.full((2, 2), jnp.nan)).any()


def test_what_heads_say_of_a_text():
    """In words; and of each kind the labels that a row of T tokens has."""
    chances, known = np.array([0.1, 0.6, 0.7], np.float32), {"label": ("a", "b", "c")}
    named = dict(zip("abc", chances.tolist(), strict=True))
    for case, labels, answer in zip(
        [heads.ClassificationHead, heads.MultiLabelHead], [(), (3,)], ["c", ["b", "c"]], strict=True
    ):
        head = case().with_classes(known)
        assert head.classes == tuple("abc") and head.with_classes({"label": ("x",)}) == head
        assert head.label_shapes(T) == {"label": labels}
        assert head.answer(chances) == {"label": answer, "label probabilities": named}
    tags = heads.TokenClassificationHead("tag").with_classes({"tag": ("x", "y")})
    assert tags.label_shapes(T) == {"tag": (T,)} and tags.answer(np.eye(2)[[1, 0, 0]]) == {"tag": ["y", "x", "x"]}
    assert heads.ClassificationHead().with_classes({}).classes is None
    vector = draws(M)
    assert heads.EmbeddingHead().answer(vector) == {"embedding": vector.tolist()}
    assert heads.LanguageHead().says(jnp.zeros((B, T, V))) is None
    assert heads.EmbeddingHead().label_shapes(T) == heads.LanguageHead().label_shapes(T) == {}


class Share(heads.Head):
    """A stranger's: how much of the row is text, and how large a row of the embedding is."""

    @property
    def name(self):
        return "share"

    def given(self, params, real):
        return real, params["embedding"]["table"]

    def __call__(self, params, h, real, table):
        return jnp.stack([real.mean(1), jnp.broadcast_to(table[0, 0], len(real))], 1)

    def says(self, out):
        return out[:, 0]

    def answer(self, said):
        return {"share": float(said)}


def test_heads_and_poolings_without_their_methods_are_refused():
    for cls, missing in ((heads.Head, "__call__, name"), (heads.Pooling, "__call__")):
        with pytest.raises(ValueError, match=f"{cls.__name__} is abstract until it defines {missing};"):
            cls()


def test_each_token_of_a_text_is_answered_whatever_the_others():
    model = decoder(head=heads.TokenClassificationHead("tag", ("x", "y")), n_layers=1, mask=Bidirectional())
    params = loud(model)
    short, long = predict(model, params, [[1, 2, 3, 4, 5], list(range(1, 19))], None, 17)
    assert [len(answer["tag"]) for answer in (short, long)] == [5, 17]
    assert predict(model, params, [[1, 2, 3, 4, 5]], None, 17) == [short]


def test_a_strangers_head_answers_for_itself():
    model = decoder(head=(heads.LanguageHead(), Share(), heads.EmbeddingHead()), n_layers=1)
    params, texts = loud(model), [[1, 2, 3, 4, 5, 6, 7, 8], [5, 6]]
    long, short = predict(model, params, texts, None, 23)
    assert set(long) == {"share", "embedding"} and short["share"] == pytest.approx(long["share"] / 4)
    real = jnp.asarray(REAL.astype(np.int32))
    found = model.activations(params, jnp.zeros((B, T), jnp.int32), places(real))
    close(found["head_share/out"][:, 0], REAL.mean(1))
    close(found["head_share/out"][:, 1], params["embedding"]["table"][0, 0])
    assert {"head_language/out", "head_embedding/out"} <= set(found) and model.writes
    assert not dataclasses.replace(model, head=Share()).writes


def test_dropout_before_the_last_layer():
    head = heads.ClassificationHead(classes=CLASSES, dropout=0.5)
    p, h = filled(head), draws(B, T, D)
    plain, outs = head(*j(p, h, REAL)), [head(*j(p, h, REAL), jax.random.key(i)) for i in range(300)]
    assert jnp.abs(outs[0] - plain).max() > 0.1
    close(np.mean(outs, 0), plain, 0.35)


def test_logits_of_classes_keep_what_half_precision_would_round():
    head = heads.ClassificationHead(classes=CLASSES, pooling=heads.FirstToken())
    p, h = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), (filled(head), draws(B, T, D)))
    first = np.stack([np.asarray(h[b, REAL[b].argmax()], np.float32) for b in range(B)])
    whole = first @ np.asarray(p["kernel"], np.float32) + np.asarray(p["bias"], np.float32)
    found = head(p, h, jnp.asarray(REAL))
    assert found.dtype == jnp.float32
    close(found, whole)


class Scaled(heads.MeanPooling):
    """A stranger's, with a name that heads have, too."""

    def params(self):
        return {"kernel": Param("D->D")}


@pytest.mark.parametrize(
    "head", [heads.EmbeddingHead(Scaled(), M), heads.ClassificationHead(classes=CLASSES, pooling=Scaled())]
)
def test_a_pooling_with_a_name_of_its_head_is_refused(head):
    assert heads.EmbeddingHead(Scaled()).params().keys() == {"kernel"}
    with pytest.raises(ValueError, match="Scaled declares kernel, as its head does"):
        head.params()


def test_heads_refuse():
    for n, cls in ((3, heads.BinaryHead), (None, heads.ClassificationHead)):
        with pytest.raises(ValueError, match=r"must be two classes|are not known"):
            cls(classes=n and CLASSES[:n]).params()
    with pytest.raises(ValueError, match="must differ"):
        heads.ClassificationHead(classes=("a", "b", "a")).check()
    with pytest.raises(ValueError, match="several of different columns"):
        decoder(head=(heads.ClassificationHead(), heads.BinaryHead())).check()
