"""Implementations of attention: each equals the formula, with gradients; which is chosen, and what is refused."""

import dataclasses
import re
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from ideas import Borrow, GatedLinear
from jax._src.cudnn import fused_attention_stablehlo as stablehlo
from tiny import SIZES, decoder, ids, loud

from jaxformer import EncoderDecoder
from jaxformer.config import resolve
from jaxformer.learning.objectives import NextToken
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model import blocks, implementations
from jaxformer.model.blocks import Stack
from jaxformer.model.implementations import Asked, Auto, Blocked, CuDNN, Plain
from jaxformer.model.kernels import SoftCapped, Softmax, Uniform, ValueResidual
from jaxformer.model.layers import RMSNorm
from jaxformer.model.masks import Bidirectional, Both, Causal, Either, Local, Prefix, Window, one_document, places
from jaxformer.model.mixers import MultiHead
from jaxformer.model.positions import ALiBi, NoPosition, RelativeBias, Rotary
from jaxformer.model.residuals import Parallel
from jaxformer.run import plan
from jaxformer.run.inspection import model_flops
from jaxformer.run.plan import planned_recipe
from jaxformer.run.step import Hyper, Recipe, init_state, train_step
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


def values(model, params, dtype=jnp.float32, segments=PACKED):
    """A scalar of the hidden states of packed rows, and its gradients."""
    rows, length = segments.shape
    at = places(segments, jnp.broadcast_to(jnp.int32(jnp.arange(length) > 6)[None], segments.shape))
    weights = jnp.cos(jnp.arange(84.0))[None, None] * (segments > 0)[..., None]

    def loss(params):
        h = model.hidden(jax.tree.map(lambda a: a.astype(dtype), params), ids(rows, length), at).h
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


@pytest.mark.parametrize(("rows", "length", "size"), [(1, 2, 1), (2, 13, 5), (5, 17, 16), (1, 19, 6)])
@pytest.mark.parametrize("kind", ["causal, learned", "window, rotary, one key head", "local, relative, soft-capped"])
def test_blocked_equals_plain_with_gradients_of_other_shapes(kind, rows, length, size):
    """A block for each token, one of a token less than the row, even and odd rests; a document that ends early."""
    model = decoder(**({"n_layers": 1} | KINDS[kind]))
    segments = jnp.ones((rows, length), jnp.int32).at[0, length - length // 3 :].set(2)
    params = loud(model)
    both = [values(m, params, segments=segments) for m in (model, as_blocked(model, size))]
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(both[0][1]))
    chex.assert_trees_all_close(both[1], both[0], rtol=1e-5, atol=1e-5 * scale)


def test_blocked_looks_at_what_a_layer_below_hands_on():
    """Of which it knows no axis to cut, so that every block looks at all of it."""
    model = decoder(n_layers=2, n_heads=2, n_kv_heads=None, kernel=(Softmax(), Borrow()))
    params = loud(model)
    (plain, wanted), (blocked, found) = (values(m, params) for m in (model, as_blocked(model, 7)))
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


@pytest.mark.parametrize("length", [11, 3])
def test_blocked_crosses_texts_of_other_lengths(length):
    """A decoder of 23 tokens that looks at another text, longer or shorter than a block, and one with a cache."""
    sizes = {"n_layers": 1, "n_heads": 2, "d_model": 14, "context_length": T, "vocab_size": 29}
    model = EncoderDecoder(**sizes)
    blocked = dataclasses.replace(as_blocked(model, 5), cross_kernel=Softmax(implementation=Blocked(5)))
    params, source = loud(model), (ids(2, length, seed=5), one_document(length))

    def h(model, params):
        memory = model.encode(params, *source).h
        out = model.hidden(params, ids(2, T), one_document(T), memory=memory)
        cached = model.hidden(params, ids(2, T), one_document(T), memory=memory, cache=model.cache(2, T))
        return out.h, cached.h

    def gradients(model):
        weights = jnp.cos(jnp.arange(14.0))[None, None]
        return jax.jit(jax.grad(lambda params: sum((a * weights).sum() for a in h(model, params))))(params)

    chex.assert_trees_all_close(jax.jit(h, static_argnums=0)(blocked, params), h(model, params), rtol=1e-4, atol=1e-4)
    wanted = gradients(model)
    scale = max(float(jnp.abs(a).max()) for a in jax.tree.leaves(wanted))
    chex.assert_trees_all_close(gradients(blocked), wanted, rtol=1e-5, atol=1e-5 * scale)


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


@pytest.mark.parametrize("kernel", [Softmax(), ValueResidual()], ids=["softmax", "values of the first layer, too"])
def test_keys_that_no_query_sees_are_not_read(kernel):
    """NaN in what a mask hides reaches nothing: it is cut off before the product. Plain multiplies it by 0."""
    model = as_blocked(decoder(n_layers=1, mask=Window(4), feed_forward=None, kernel=kernel), 6)
    x = loud(model)
    text = ids(1, T).at[0, 0].set(28)
    spoiled = x["embedding"] | {"table": x["embedding"]["table"].at[28].set(jnp.nan)}
    text = jnp.where((jnp.arange(T) > 0)[None] & (text == 28), 0, text)
    h = model.hidden({**x, "embedding": spoiled}, text, one_document(T)).h
    assert jnp.isnan(h[0, :4]).all() and jnp.isfinite(h[0, 12:]).all()


def test_products_count_whatever_the_implementation():
    model = decoder(n_layers=1)
    texts = {"tokens": jax.ShapeDtypeStruct((2, T + 1), jnp.int32)}
    plain, blocked = (model_flops(Recipe(m), texts) for m in (model, as_blocked(model, 7)))
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
    for mixer in (None, Same()):
        both = EncoderDecoder(**SIZES, n_encoder_layers=2, encoder_mixer=mixer)
        assert ("a part of your own" in both.implemented(256)[1]) == (mixer is not None)


class Same(MultiHead):
    """A stranger's, by its module alone."""


# --- cuDNN: its call is not made here, but all that leads to it


@pytest.fixture
def hopper(monkeypatch):
    """As on a GPU of compute capability 9.0."""
    monkeypatch.setattr(implementations, "_no_cudnn", lambda: None)
    monkeypatch.setattr(implementations, "_capability", lambda: (9, 0))


HALF = Asked(1024, dtype="bfloat16", whole=True)
REFUSED = {
    "train.compute_dtype=float32 must be one of bfloat16, float16": {"dtype": "float32"},
    "dropout=0.1 of weights is not in it": {"dropout": 0.1},
    "SoftCapped changes the formula": {"changed": "SoftCapped"},
    "the mask Prefix must be Causal, Window or Bidirectional": {"masks": (Causal(), Prefix())},
    "rows have padding or several documents": {"whole": False},
    "rows of 1023 tokens must have an even number of them": {"tokens": 1023},
    "heads 12 wide must be a multiple of 8, of at most 256": {"width": 12},
    "heads 264 wide must be a multiple of 8, of at most 256": {"width": 264},
}


@pytest.mark.parametrize(("reason", "asked"), REFUSED.items(), ids=REFUSED)
def test_what_cudnn_refuses(hopper, reason, asked):
    assert CuDNN().refuses(HALF) is None
    assert CuDNN().refuses(HALF._replace(masks=(Window(4), Bidirectional()), width=256)) is None
    assert CuDNN().refuses(HALF._replace(**asked)) == reason


def test_there_is_no_cudnn_here():
    with pytest.raises(ValueError, match=r"^implementation=CuDNN: it needs an NVIDIA GPU; this is cpu"):
        CuDNN().chosen(HALF)
    with pytest.raises(InputError, match=r"^model.kernel.implementation=CuDNN: it needs an NVIDIA GPU; this is cpu"):
        planned_recipe(resolve("configs/quickstart.py", {"model.kernel.implementation": "CuDNN"}))


def test_auto_takes_cudnn_for_all_that_it_can_do(hopper, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    sizes = {"head_width": 8, "context_length": 1024}
    again = "layers with the same mask are in one turn of the scan, which was never run"
    for fields, name, why in (
        ({}, CuDNN, "it can do what is asked"),
        ({"position": Rotary(0.5), "mask": (Causal(), Window(7)), "n_layers": 2}, CuDNN, "it can do what is asked"),
        ({"position": ALiBi()}, Plain, "not CuDNN: ALiBi changes the formula"),
        ({"mixer": (MultiHead(), GatedLinear()), "n_layers": 2}, CuDNN, "it can do what is asked"),
        ({"mask": (Causal(), Window(7)), "n_layers": 2, "unroll": 9}, CuDNN, "it can do what is asked"),
        ({"n_layers": 4, "unroll": 2}, Plain, f"not CuDNN: 2 {again}"),
        ({"position": (Rotary(), NoPosition()), "n_layers": 2}, Plain, f"not CuDNN: 2 {again}"),
        ({"mask": (Causal(), Causal(), Window(7)), "n_layers": 3}, Plain, f"not CuDNN: 2 {again}"),
        ({"kernel": SoftCapped()}, Plain, "not CuDNN: SoftCapped changes the formula"),
        ({"kernel": outside.SinkWithStatistic()}, Plain, "not CuDNN: SinkWithStatistic changes the formula"),
    ):
        found, told = decoder(**(sizes | fields)).implemented(1024, "bfloat16", True)
        assert type(found.kernel.implementation) is name and told == f"{name.__name__} ({why})"


def test_rows_are_known_to_be_whole():
    """By objectives, of a batch without segments; by what a config gives its batches."""
    rows = {"tokens": jnp.zeros((2, T + 1), jnp.int32)}
    assert NextToken.one_document and NextToken().prepare(rows, jax.random.key(0)).at.rows.whole
    packed = NextToken().prepare(rows | {"segments": rows["tokens"]}, jax.random.key(0))
    assert not packed.at.rows.whole
    asked = []
    config = resolve("configs/quickstart.py", {})
    model = SimpleNamespace(implemented=lambda *a: asked.append(a))
    for changes in ({}, {"data.sampling": "PackedDocuments"}, {"objective": "PrefixLM"}):
        plan.implemented(resolve("configs/quickstart.py", changes), model)
    assert asked == [(config.window, "float32", whole) for whole in (True, False, False)]


def calls(monkeypatch):
    """Computes by XLA what would be cuDNN's; the arguments of each call."""
    found = []

    def attention(q, k, v, *, implementation, scale=None, is_causal=False, local_window_size=None):
        found.append((q.shape, k.shape, implementation, is_causal, local_window_size))
        return original(q, k, v, scale=scale, is_causal=is_causal, local_window_size=local_window_size)

    original = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", attention)
    return found


SLOW = [pytest.param(mask, marks=pytest.mark.slow) for mask in (Causal(), Bidirectional())]


@pytest.mark.parametrize("mask", [Window(5), *SLOW], ids=lambda mask: type(mask).__name__)
def test_cudnn_equals_plain_where_it_is_called(monkeypatch, mask):
    """With gradients; rows with segments, odd rows and a cache are computed by the formula; dropout is refused."""
    kernel = Softmax(scale=0.3)
    plain = decoder(n_layers=1, head_width=8, kernel=kernel, mask=mask)
    fused = dataclasses.replace(plain, kernel=dataclasses.replace(kernel, implementation=CuDNN()))
    params, found = jax.tree.map(lambda a: a / 3, loud(plain)), calls(monkeypatch)

    def loss(model, at, length, key=None):
        def of(params):
            halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
            return (model.hidden(halves, ids(3, length), at, key).h.astype(jnp.float32) ** 2).sum()

        return jax.grad(of)(params)

    for a, b in zip(*(jax.tree.leaves(loss(m, one_document(22), 22)) for m in (plain, fused)), strict=True):
        assert jnp.linalg.norm(a - b) <= 2e-2 * jnp.linalg.norm(a) + 1e-6
    window = (4, 0) if isinstance(mask, Window) else None
    assert found and set(found) == {((3, 22, 6, 8), (3, 22, 2, 8), "cudnn", mask.causal, window)}
    found.clear()
    for at, length in ((places(jnp.ones((3, 22), jnp.int32)), 22), (one_document(T), T)):
        chex.assert_trees_all_equal(*(loss(m, at, length) for m in (plain, fused)))
    fused.hidden(params, ids(3, 22), one_document(22))  # float32
    halves = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    with pytest.raises(ValueError, match=r"^implementation=CuDNN: dropout=0.1 of weights is not in it"):
        dataclasses.replace(fused, dropout=0.1).hidden(halves, ids(3, 22), one_document(22), jax.random.key(0))
    if mask.causal:
        fused.hidden(halves, ids(3, 22), one_document(22), cache=fused.cache(3, T))
    assert not found


@pytest.mark.parametrize(
    "fields",
    [{"mask": Prefix()}, {"position": ALiBi()}, {"position": RelativeBias()}, {"kernel": SoftCapped(cap=1.0)}],
    ids=str,
)
def test_cudnn_computes_no_formula_but_its_own(monkeypatch, fields):
    """A model by itself, which no plan refuses."""
    plain = decoder(n_layers=1, head_width=8, **fields)
    fused = dataclasses.replace(plain, kernel=dataclasses.replace(plain.kernel, implementation=CuDNN()))
    params, found = jax.tree.map(lambda a: (a / 3).astype(jnp.bfloat16), loud(plain)), calls(monkeypatch)
    chex.assert_trees_all_equal(*(m.hidden(params, ids(3, 22), one_document(22)).h for m in (plain, fused)))
    assert not found


def test_what_cudnn_does_not_take_is_computed_block_by_block(monkeypatch):
    """An evaluation's long rows, which have padding: no [T, T], as in training."""
    plain = decoder(n_layers=1, head_width=8)
    fused = dataclasses.replace(plain, kernel=Softmax(implementation=CuDNN()))
    params, at = loud(plain), places(jnp.ones((3, T), jnp.int32))
    monkeypatch.setattr(implementations, "PADDED", 5)
    of = lambda model: lambda params: model.hidden(params, ids(3, T), at).h
    np.testing.assert_allclose(of(fused)(params), of(plain)(params), rtol=1e-4, atol=1e-5)
    texts = [jax.jit(of(model)).lower(params).compile().as_text() for model in (plain, fused)]
    assert [f",{T},{T}]" in text for text in texts] == [True, False]


def test_a_step_for_cuda_calls_cudnn_and_multiplies_halves_alone(hopper, monkeypatch):
    """Lowered, not compiled: attention is one call and one for the gradient, nothing is [T, T]."""
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)
    fields = {"head_width": 8, "n_layers": 2, "context_length": 38, "remat": "dots_with_no_batch_dims_saveable"}
    recipe = Recipe(decoder(**fields, kernel=Softmax(implementation=CuDNN())), compute_dtype="bfloat16")
    hyper = Hyper(np.uint32(0), np.int32(9), AdamW(Constant(1e-2)))
    state = jax.eval_shape(lambda: init_state(recipe, hyper))
    traced = jax.jit(lambda s: train_step(recipe, s, {"tokens": jnp.zeros((2, 39), jnp.int32)}, hyper)).trace(state)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    names = re.findall(r"__cudnn\$\w+", text)
    assert sorted(set(names)) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"] and "x38x38x" not in text
    operands = re.findall(r"dot_general.*: \(tensor<(?:\d+x)*(\w+)>, tensor<(?:\d+x)*(\w+)>\)", text)
    assert len(operands) > 12 and set(operands) == {("bf16", "bf16")}


@pytest.mark.parametrize(("flags", "says"), [("--xla_gpu_deterministic_ops=true", True), ("", False)])
def test_each_gradient_of_cudnn_says_that_it_is_deterministic(hopper, monkeypatch, flags, says):
    """Of several layers in a turn of the scan; lowered, not compiled."""
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setenv("XLA_FLAGS", flags)
    model = decoder(head_width=8, n_layers=4, unroll=2, context_length=38, kernel=Softmax(implementation=CuDNN()))
    model, told = model.implemented(38, "bfloat16", True)
    assert told == "CuDNN (as asked)"
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loud(model))
    loss = lambda params: model.hidden(params, ids(2, 38), one_document(38)).h.astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    calls = [line for line in text.splitlines() if "__cudnn$fmhaSoftmaxBackward" in line]
    assert calls and all(("force_deterministic" in call) is says for call in calls)


def test_a_gpus_scan_keeps_what_cudnn_gives(hopper, monkeypatch):
    """Lowered, not compiled: attention is called once for each layer, and not again for the gradient."""
    monkeypatch.setattr(stablehlo, "check_cudnn_version", lambda: 91300)
    monkeypatch.setattr(stablehlo, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    fields = {"head_width": 8, "n_layers": 3, "unroll": None, "context_length": 38}
    model = decoder(**fields, kernel=Softmax(implementation=CuDNN()))
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), loud(model))
    loss = lambda params: model.hidden(params, ids(2, 38), one_document(38)).h.astype(jnp.float32).sum()
    text = jax.jit(jax.grad(loss)).trace(params).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"__cudnn\$fmhaSoftmax\b(?!B)", text)) == len(re.findall("fmhaSoftmaxBackward", text)) == 1


def test_several_layers_in_a_turn_are_refused_where_jax_cannot_be_told(hopper, monkeypatch):
    monkeypatch.setattr(implementations, "_says_deterministic", lambda: False)
    asked = HALF._replace(repeated=2)
    assert CuDNN().refuses(asked) == "2 layers with the same mask are in one turn of the scan, which XLA fails at"


def test_layers_are_laid_out_by_the_device(monkeypatch):
    """(groups in a turn, what is kept): unrolled up to 12 on a CPU and to 8 on a GPU, but for calls of cuDNN; a GPU's
    scan keeps products and what these calls give."""
    fused, products = Softmax(implementation=CuDNN()), blocks._products_and_attention
    for backend, fields, n_layers, found in (
        ("cpu", {}, 12, (12, None)),
        ("cpu", {}, 13, (1, None)),
        ("gpu", {}, 8, (8, None)),
        ("gpu", {}, 9, (1, products)),
        ("gpu", {"unroll": 9}, 9, (9, None)),
        ("gpu", {"kernel": fused}, 8, (1, products)),
        ("gpu", {"remat": "everything_saveable"}, 8, (1, jax.checkpoint_policies.everything_saveable)),
        ("tpu", {}, 8, (1, None)),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        model = decoder(**({"unroll": None} | fields))
        stack = Stack(model.kinds("decoder"), n_layers, unroll=model.unroll, remat=model.remat)
        assert stack._laid_out(n_layers) == found


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
