"""The step is a pure function: of K steps and of one, of slices and of the whole, of many members and of one."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import B, T, decoder, loud, totals

from jaxformer.keys import PURPOSES, fold, key_for, random_bits, threefry
from jaxformer.learning.objectives import Classification, Contrastive, NextToken
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.baselines import TokenEmbedding
from jaxformer.model.heads import (
    BinaryHead,
    ClassificationHead,
    EmbeddingHead,
    LanguageHead,
    TokenClassificationHead,
)
from jaxformer.model.layers import MLP
from jaxformer.model.positions import Learned
from jaxformer.run.inspection import jaxprs
from jaxformer.run.step import Hyper, Recipe, evaluate_batch, init_state, train_members, train_step, train_steps

pytestmark = pytest.mark.exact

RECIPE = Recipe(decoder(n_layers=2, dropout=0.2))
OPTIMIZER = AdamW(learning_rate=WarmupCosine(1e-2, 1e-3, 2))


def hyper(seed=5, **fields):
    return Hyper(np.uint32(seed), np.int32(20), dataclasses.replace(OPTIMIZER, **fields))


def batches(n, rows=B):
    tokens = np.random.default_rng(0).integers(0, 29, (n, rows, T + 1), dtype=np.int32)
    lengths = np.array([13, 9, 14, 4, 8, 11])[:rows, None]
    segments = np.broadcast_to((np.arange(T + 1) < lengths).astype(np.int32), tokens.shape)
    return {"tokens": tokens, "segments": segments}


def at(i, buffer):
    return jax.tree.map(lambda a: a[i], buffer)


def test_k_steps_in_a_call_equal_single_steps_bit_for_bit():
    buffer = batches(7)
    single = jax.jit(functools.partial(train_step, RECIPE))
    state, losses = init_state(RECIPE, hyper()), []
    for i in range(5):
        state, row = single(state, at(i, buffer), hyper())
        losses.append(float(row["loss"]))
    fused, metrics = train_steps(RECIPE, init_state(RECIPE, hyper()), buffer, np.int32(5), hyper())
    chex.assert_trees_all_equal(state, fused)
    assert metrics["loss"][:5].tolist() == losses and np.isnan(metrics["loss"][5:]).all()
    assert int(fused.step) == 5
    cut, _ = train_steps(RECIPE, init_state(RECIPE, hyper()), buffer, np.int32(2), hyper())
    cut, _ = train_steps(RECIPE, cut, jax.tree.map(lambda a: np.roll(a, -2, 0), buffer), np.int32(3), hyper())
    chex.assert_trees_all_equal(cut, fused)


def test_a_new_count_seed_or_rate_compiles_nothing():
    once = jax.jit(chex.assert_max_traces(train_steps.__wrapped__, n=1), static_argnums=0)
    once(RECIPE, init_state(RECIPE, hyper()), batches(7), np.int32(5), hyper())
    other = hyper(6, learning_rate=WarmupCosine(3e-4, 1e-5, 2), weight_decay=0.0)
    once(RECIPE, init_state(RECIPE, other), batches(7), np.int32(3), other._replace(steps=np.int32(50)))


def test_accumulation_equals_the_full_batch():
    """Slices of unequal numbers of tokens, dropout off; Adam would hide a wrong scale, so the gradient is compared."""
    whole = dataclasses.replace(RECIPE, model=dataclasses.replace(RECIPE.model, dropout=0.0))
    rows, states = [], []
    for slices in (1, 6):
        recipe = dataclasses.replace(whole, slices=slices)
        state, row = train_steps(recipe, init_state(recipe, hyper()), batches(1, 6), np.int32(1), hyper())
        states.append(state.params)
        rows.append({name: float(a[0]) for name, a in row.items()})
    for params, row in zip(states[1:], rows[1:], strict=True):
        assert row == pytest.approx(rows[0], rel=1e-5)
        chex.assert_trees_all_close(params, states[0], atol=2e-5)


def casts(jaxpr, shape):
    """How many times float32 of a shape is made bfloat16."""
    found = 0
    for equation in jaxpr.eqns:
        inner = sum(casts(each, shape) for each in jaxprs(equation.params.values()))
        found += inner * equation.params.get("length", 1)
        if equation.primitive.name == "convert_element_type" and equation.params["new_dtype"] == jnp.bfloat16:
            found += (equation.invars[0].aval.shape, equation.invars[0].aval.dtype) == (shape, jnp.float32)
    return found


@pytest.mark.parametrize("dtypes", [("bfloat16", None), ("float32", "bfloat16")], ids=str)
def test_weights_are_cast_once_whatever_the_number_of_slices(dtypes):
    recipe = dataclasses.replace(RECIPE, slices=3, compute_dtype=dtypes[0], product_dtype=dtypes[1])
    state, batch = init_state(recipe, hyper()), at(0, batches(1, 6))
    jaxpr = jax.make_jaxpr(train_step, static_argnums=0)(recipe, state, batch, hyper()).jaxpr
    shapes = [a.shape for a in jax.tree.leaves(state.params) if a.ndim > 2]
    assert len(shapes) > 5 and sum(casts(jaxpr, shape) for shape in {*shapes}) == len(shapes)


@pytest.mark.slow
def test_a_population_equals_its_members():
    buffer = batches(6)
    hypers = [hyper(s, learning_rate=WarmupCosine(r, 1e-4, 2)) for s, r in ((1, 1e-3), (2, 3e-3), (3, 1e-2))]
    stacked = jax.tree.map(lambda *a: jnp.stack([jnp.asarray(x) for x in a]), *hypers)
    states = jax.vmap(functools.partial(init_state, RECIPE))(stacked)
    states, _ = jax.vmap(lambda s, h: train_steps(RECIPE, s, buffer, np.int32(6), h))(states, stacked)
    for i, one in enumerate(hypers):
        solo, _ = train_steps(RECIPE, init_state(RECIPE, one), buffer, np.int32(6), one)
        chex.assert_trees_all_close(at(i, states).params, solo.params, atol=1e-5)


def test_one_batch_is_memorised():
    recipe = Recipe(decoder(n_layers=2))
    buffer = jax.tree.map(lambda a: np.broadcast_to(a, (100, *a.shape[1:])), batches(1))
    fast = hyper(learning_rate=WarmupCosine(1e-2, 1e-3, 10), weight_decay=0.0)._replace(steps=np.int32(200))
    state, first = train_steps(recipe, init_state(recipe, fast), buffer, np.int32(100), fast)
    state, last = train_steps(recipe, state, buffer, np.int32(100), fast)
    assert 3 < float(first["loss"][0]) < 4 and float(last["loss"][-1]) < 0.02
    sums = evaluate_batch(recipe, state.params, at(0, buffer), np.int32(0), np.full(29, 2.0, np.float32))
    assert float(sums["nats"] / sums["weight"]) < 0.02
    assert float(sums["weight"]) == float(sums["bytes"]) / 2 == 12 + 8 + 13


def test_metrics():
    recipe = Recipe(decoder(n_layers=2))
    _, row = train_steps(recipe, init_state(recipe, hyper()), batches(2), np.int32(2), hyper())
    assert row.keys() == {"loss", "weight", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row"}
    assert row["weight"].tolist() == [12 + 8 + 13] * 2 and row["weight"].dtype == "float32"
    assert float(row["loss"][0]) == pytest.approx(np.log(29), abs=0.1)
    assert float(row["learning_rate"][0]) == pytest.approx(1e-2 / 3)
    state = init_state(recipe, hyper())

    def loss(params):
        sums = evaluate_batch(recipe, params, at(0, batches(2)), np.int32(0), np.ones(29, np.float32))
        return sums["nats"] / sums["weight"]

    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(jax.grad(loss)(state.params))))
    assert float(row["grad_norm"][0]) == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("slices", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_a_batch_of_which_nothing_is_learned_says_so(slices):
    """It has no loss, a weight of 0, and an update that leaves all as it is; its neighbours are as ever."""
    recipe = Recipe(decoder(n_layers=2), NextToken(label_smoothing=0.1), slices=slices)
    buffer, same = batches(2), hyper(weight_decay=0.0)
    buffer["segments"] = np.array(buffer["segments"])
    buffer["segments"][0] = np.arange(T + 1) % 2 + 1  # every token a document of its own
    before = jax.tree.map(np.array, init_state(recipe, same).params)
    state, row = train_steps(recipe, init_state(recipe, same), buffer, np.int32(1), same)
    chex.assert_trees_all_equal(state.params, before)
    assert np.isnan(row["loss"][0]) and np.isnan(row["objective_loss"][0])
    assert row["weight"][0] == 0 and row["grad_norm"][0] == 0
    _, row = train_steps(recipe, state, buffer, np.int32(2), same)
    assert row["weight"].tolist() == [0, 12 + 8 + 13] and np.isfinite([row["loss"][1], row["objective_loss"][1]]).all()


def test_weights_of_less_than_one_are_weights():
    """They change neither loss nor gradient, however little they come to: powers of two to the bit."""
    recipe, batch = Recipe(TokenEmbedding(d_model=17, context_length=T, vocab_size=29)), at(0, batches(1))
    step = jax.jit(functools.partial(train_step, recipe))
    found = []
    for weight in (1.0, 2.0**-10):
        weights = {"weights": np.full(batch["tokens"].shape, weight, np.float32)}
        state, row = step(init_state(recipe, hyper()), batch | weights, hyper())
        found.append((state.params, row["loss"], row["grad_norm"]))
    chex.assert_trees_all_equal(*found)
    assert float(row["weight"]) == 33 / 2**10


REGULARIZED = [
    NextToken(label_smoothing=0.2),
    pytest.param(NextToken(z_loss=0.03), marks=pytest.mark.slow),
    pytest.param(Classification(label_smoothing=0.2), marks=pytest.mark.slow),
    pytest.param(Contrastive(label_smoothing=0.2), marks=pytest.mark.slow),
]
HEADS = (
    ClassificationHead("a", tuple("xyz")),
    BinaryHead("b", tuple("no")),
    TokenClassificationHead("c", tuple("uvw")),
    EmbeddingHead(),
    LanguageHead(),
)


@pytest.mark.parametrize("objective", REGULARIZED, ids=lambda o: f"{type(o).__name__}-z{getattr(o, 'z_loss', 0.0)}")
def test_losses_are_plain_and_gradients_the_objectives(objective):
    """`loss` is that of the objective without smoothing and z-loss, `objective_loss` what is minimised: of a batch, of
    its slices, of seeds together."""
    model = TokenEmbedding(d_model=17, context_length=T, vocab_size=29, head=HEADS)
    draw = np.random.default_rng(1)
    batch = at(0, batches(1, 6)) | {
        "labels_a": np.array([0, 2, 1, -1, 1, 0], np.int32),
        "labels_b": np.array([1, 0, 1, 0, -1, 0], np.int32),
        "labels_c": draw.integers(-1, 3, (6, T + 1), dtype=np.int32),
        "source": draw.integers(0, 29, (6, 5), dtype=np.int32),
        "source_segments": np.ones((6, 5), np.int32),
    }
    params = loud(model)

    def minimised(objective, params, batch):
        _, weight, total = totals(objective.loss(model, params, objective.prepare(batch, jax.random.key(0)), None))
        return total / weight

    value_and_grad = jax.jit(jax.value_and_grad(minimised, 1), static_argnums=0)
    loss, grads = value_and_grad(objective, params, batch)
    plain, _ = value_and_grad(type(objective)(), params, batch)
    assert abs(plain - loss) > 1e-3
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    expected = {"loss": float(plain), "objective_loss": float(loss), "grad_norm": norm}
    recipe = Recipe(model, objective)
    for slices in (1,) if isinstance(objective, Contrastive) else (1, 3):
        own = dataclasses.replace(recipe, slices=slices)
        start = init_state(own, hyper()).replace(params=params)
        _, row = jax.jit(functools.partial(train_step, own))(start, batch, hyper())
        assert {name: float(row[name]) for name in expected} == pytest.approx(expected, rel=1e-4), slices
    stack = lambda tree: jax.tree.map(lambda a: jnp.stack([jnp.asarray(a)] * 2), tree)
    buffer = jax.tree.map(lambda a: np.stack([a[None]] * 2), batch)
    seeds = hyper()._replace(seed=np.array([5, 6], np.uint32))
    _, row = train_members(
        recipe, stack(init_state(recipe, hyper()).replace(params=params)), buffer, np.int32(1), seeds
    )
    for name, value in expected.items():
        np.testing.assert_allclose(row[name], [[value]] * 2, rtol=1e-4)


def test_the_gradients_norm_of_every_parameter_and_layer():
    recipe = Recipe(decoder(n_layers=2), grad_norms=True)
    plain = dataclasses.replace(recipe, grad_norms=False)
    state, row = train_steps(recipe, init_state(recipe, hyper()), batches(2), np.int32(1), hyper())
    same, _ = train_steps(plain, init_state(plain, hyper()), batches(2), np.int32(1), hyper())
    chex.assert_trees_all_close(state, same, atol=1e-6)
    norms = {name: np.asarray(a[0]) for name, a in row["grad_norms"].items()}
    assert norms["decoder/layers/block0/attention/project/q"].shape == (2,) and norms["embedding/table"].shape == ()
    assert np.sqrt(sum((a**2).sum() for a in norms.values())) == pytest.approx(float(row["grad_norm"][0]), rel=1e-5)

    def loss(params):
        sums = evaluate_batch(recipe, params, at(0, batches(2)), np.int32(0), np.ones(29, np.float32))
        return sums["nats"] / sums["weight"]

    up = jax.grad(loss)(init_state(plain, hyper()).params)["decoder"]["layers"]["block0"]["feed_forward"]["up"]
    expected = np.sqrt((np.asarray(up) ** 2).sum((1, 2)))
    np.testing.assert_allclose(norms["decoder/layers/block0/feed_forward/up"], expected, rtol=1e-4)


@pytest.mark.slow
def test_the_moving_average():
    averaged = hyper()._replace(ema_decay=np.float32(0.3))
    state, means = init_state(RECIPE, averaged), None
    chex.assert_trees_all_equal(state.ema, state.params)
    for step in range(4):
        decay = min(0.3, (1 + step) / (10 + step))
        means = jax.tree.map(np.asarray, state.ema)
        state, _ = train_steps(RECIPE, state, batches(2), np.int32(1), averaged)
        means = jax.tree.map(lambda mean, new, d=decay: d * mean + (1 - d) * np.asarray(new), means, state.params)
        chex.assert_trees_all_close(state.ema, means, atol=1e-6)
    assert state.eval_params(RECIPE, OPTIMIZER) is state.ema and decay == 0.3
    plain, _ = train_steps(RECIPE, init_state(RECIPE, hyper()), batches(2), np.int32(1), hyper())
    assert plain.eval_params(RECIPE, OPTIMIZER) is plain.params and not jax.tree.leaves(plain.ema)


@pytest.mark.slow
def test_dropout_differs_by_seed_step_and_slice():
    flat = Recipe(dataclasses.replace(RECIPE.model, dropout=0.5))
    same = {"tokens": np.broadcast_to(batches(1)["tokens"][:, :1], (2, 2, T + 1))}  # one row, four times
    frozen = lambda seed: hyper(seed, learning_rate=WarmupCosine(1e-30, 1e-30, 0), weight_decay=0.0)
    start = init_state(flat, frozen(1)).params
    found = []
    for seed, slices in ((1, 1), (2, 1), (1, 2)):
        recipe = dataclasses.replace(flat, slices=slices)
        state = init_state(recipe, frozen(1)).replace(params=jax.tree.map(jnp.copy, start))
        _, row = train_steps(recipe, state, same, np.int32(2), frozen(seed))
        found += row["loss"].tolist()
    assert len(set(found)) == 6


@pytest.mark.slow
def test_compute_dtype():
    """Parameters, softmax and loss stay float32, and the losses stay near."""
    losses = []
    for dtype in ("float32", "bfloat16"):
        recipe = dataclasses.replace(RECIPE, compute_dtype=dtype)
        state, row = train_steps(recipe, init_state(recipe, hyper()), batches(4), np.int32(4), hyper())
        assert {a.dtype.name for a in jax.tree.leaves(state.params)} == {"float32"} and row["loss"].dtype == "float32"
        losses.append(row["loss"])
    np.testing.assert_allclose(*losses, atol=0.05)
    assert not np.array_equal(*losses)


@pytest.mark.slow
def test_gradients_in_half_precision_are_those_of_full():
    """A frequent token's row and the biases are sums over all tokens, which bfloat16 itself cannot hold."""
    feed_forward = MLP(bias=True)
    model = decoder(n_layers=2, context_length=512, bias=True, feed_forward=feed_forward, position=Learned())
    params = jax.jit(model.init)(jax.random.key(0))
    tokens = np.where(np.random.default_rng(0).random((17, 512)) < 0.9, 3, np.arange(512)[None] % 29).astype(np.int32)
    found = []
    for dtype in ("float32", "bfloat16"):
        recipe = Recipe(model, compute_dtype=dtype)
        sums = functools.partial(evaluate_batch, recipe)
        loss = lambda p, sums=sums: sums(p, {"tokens": tokens}, 0, np.ones(29, np.float32))["nats"] / tokens.size
        found.append(jax.grad(loss)(params))
    paths = jax.tree_util.tree_flatten_with_path(found[0])[0]
    for (path, full), half in zip(paths, jax.tree.leaves(found[1]), strict=True):
        if "k_bias" not in str(path):  # softmax does not see it: its gradient is 0
            assert jnp.linalg.norm(half - full) < 0.03 * jnp.linalg.norm(full), path


@pytest.mark.parametrize(
    ("key", "counter", "bits"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_bits_of_its_authors(key, counter, bits):
    """Known answers of Random123."""
    found = threefry(*jax.tree.map(jnp.uint32, (*key, *counter)))
    assert tuple(int(word) for word in found) == bits


@pytest.mark.parametrize("shape", [(), (7,), (11, 13), (2, 3, 5, 7), (3, 0, 2)])
def test_random_bits_are_those_of_jax(shape):
    keys = jax.random.split(jax.random.key(3), 5)
    assert np.array_equal(
        jax.vmap(lambda key: random_bits(key, shape))(keys), [jax.random.bits(k, shape) for k in keys]
    )
    program = lambda key: jax.jit(random_bits, static_argnums=1).lower(key, shape).compile().as_text()
    other = jax.random.key(3, impl="rbg")
    assert np.array_equal(random_bits(other, shape), jax.random.bits(other, shape))
    with jax.threefry_partitionable(False):
        assert np.array_equal(random_bits(keys[0], shape), jax.random.bits(keys[0], shape))
    assert "while" not in program(keys[0])


def test_keys():
    assert fold(None, 1, 2) is None
    keys = [key_for(seed, step, purpose) for seed in (0, 1) for step in (0, 1) for purpose in PURPOSES]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == len(keys)
    expected = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), 3), PURPOSES.index("dropout"))
    assert (jax.random.key_data(key_for(7, 3, "dropout")) == jax.random.key_data(expected)).all()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_the_step_lowers_for_accelerators(platform):
    recipe = dataclasses.replace(RECIPE, compute_dtype="bfloat16")
    state = jax.eval_shape(lambda: init_state(recipe, hyper()))
    traced = train_steps.trace(recipe, state, batches(3), np.int32(3), hyper())
    assert "stablehlo.while" in traced.lower(lowering_platforms=(platform,)).as_text()
