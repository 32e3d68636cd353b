"""Optimizers by groups of parameters: against NumPy, in every family, resumed, frozen, refused."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import B, T, decoder, loud

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, EncoderDecoder, Train
from jaxformer.commands import main
from jaxformer.config import resolve
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TextFiles
from jaxformer.data.tasks import Copy
from jaxformer.data.tokenizers import Bytes, Characters
from jaxformer.declarations import Declared, Letters, by_path, selected, trained
from jaxformer.learning.adafactor import Adafactor
from jaxformer.learning.by_depth import ByDepth
from jaxformer.learning.groups import Everything, Group, Groups, Hidden, Lettered, Path
from jaxformer.learning.muon import Muon, NewtonSchulz, PolarExpress, orthogonalized
from jaxformer.learning.objectives import Masked, NextToken, SequenceToSequence
from jaxformer.learning.optimizers import BLOCK, SGD, AdamW, Frozen, GradNorm, Lion, clip_by_global_norm, global_norm
from jaxformer.learning.schedule_free import ScheduleFree
from jaxformer.learning.schedules import Constant, Product, WarmupCosine
from jaxformer.model.baselines import LSTM
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import NoNorm
from jaxformer.model.masks import Causal, Window
from jaxformer.model.models import Embedding
from jaxformer.run.manifest import sha256
from jaxformer.run.step import Hyper, Recipe, init_state, train_members, train_steps
from jaxformer.spec import InputError, checked

SIZES = {"L": 2, "E": 3, "D": 10, "H": 2, "G": 1, "K": 3, "F": 26, "V": 7}
STEP, STEPS = jnp.int32(0), jnp.int32(9)


def declared(**letters):
    """Boxes by name: declared(up="L|D->F")."""

    def box(text):
        own = Letters.of(text)
        shape = jax.ShapeDtypeStruct(tuple(SIZES[letter] for letter in own.all), "float32")
        return Declared(shape, own, bool(own.into), None, 0, True, None, (0, 1))

    return {name: box(text) for name, text in letters.items()}


def drawn(boxes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=box.value.shape) for name, box in boxes.items()}


def updates(optimizer, boxes, params, grads):
    """What several gradients make of the parameters, one after another; and the last state."""
    transform = optimizer.transform(boxes, STEP, STEPS)
    params = jax.tree.map(jnp.float32, params)
    state = transform.init(params)
    for g in grads:
        change, state = transform.update(jax.tree.map(jnp.float32, g), state, params)
        params = jax.tree.map(jnp.add, params, change)
    return params, state


# --- against NumPy

MATRICES = {"up": "LE|D->F", "down": "L|F->D", "q": "L|D->HK", "o": "L|HK->D", "gain": "L|D->D"}


def polynomials(x, coefficients, safety=1.0):
    x = x / (safety * np.linalg.norm(x))
    for a, b, c in coefficients:
        x = a * x + (b * (x @ x.T) + c * (x @ x.T) @ (x @ x.T)) @ x
    return x


def reference_muon(box, p, grads, heads=False, adam=False, cautious=False, nesterov=True, **how):
    """One matrix after another, as PyTorch's Muon has them."""
    how = how or {"coefficients": [(3.4445, -4.7750, 2.0315)] * 5}
    batch, into, out = box.letters
    lead = np.prod([SIZES[x] for x in batch], dtype=int)
    mean, p = np.zeros_like(p), p.copy()
    for g in grads:
        mean = 0.95 * mean + 0.05 * g
        look = 0.95 * mean + 0.05 * g if nesterov else mean
        change = np.zeros_like(look).reshape(lead, *p.shape[len(batch) :])
        for i, one in enumerate(look.reshape(change.shape)):
            axis = (into + out).find("H") if heads else -1
            for slot in [...] if axis < 0 else [(slice(None),) * axis + (j,) for j in range(SIZES["H"])]:
                n_in = np.prod([SIZES[x] for x in into if not (heads and x == "H")], dtype=int)
                x = one[slot].reshape(n_in, -1)
                scale = 0.2 * max(x.shape) ** 0.5 if adam else max(1, x.shape[1] / x.shape[0]) ** 0.5
                change[i][slot] = (scale * polynomials(x, **how)).reshape(one[slot].shape)
        change = change.reshape(p.shape)
        p -= 0.02 * (change + 0.1 * np.where((change * p >= 0) | (not cautious), p, 0))
    return p


PE = [
    (8.28721201814563 / 1.01, -23.595886519098837 / 1.01**3, 17.300387312530933 / 1.01**5),
    (4.107059111542203 / 1.01, -2.9478499167379106 / 1.01**3, 0.5448431082926601 / 1.01**5),
]
KINDS = {
    "as it is": (Muon(), {}),
    "heads": (Muon(heads=True), {"heads": True}),
    "scale of Adam, no Nesterov": (
        Muon(adjust_lr="match_rms_adamw", nesterov=False),
        {"adam": True, "nesterov": False},
    ),
    "cautious": (Muon(cautious=True), {"cautious": True}),
    "Polar Express": (Muon(coefficients=PolarExpress(), steps=2), {"coefficients": PE, "safety": 1.01}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_muon(kind):
    optimizer, how = KINDS[kind]
    optimizer = dataclasses.replace(optimizer, learning_rate=Constant(0.02))
    boxes = declared(**MATRICES)
    params, grads = drawn(boxes), [drawn(boxes, seed) for seed in (1, 2)]
    found, state = updates(optimizer, boxes, params, grads)
    for name, box in boxes.items():
        expected = reference_muon(box, params[name], [g[name] for g in grads], **how)
        np.testing.assert_allclose(found[name], expected, atol=2e-5, err_msg=name)
    assert jax.tree.map(np.shape, state) == jax.tree.map(np.shape, params)  # one array for each, and no more


@pytest.mark.parametrize("coefficients", [NewtonSchulz(), PolarExpress()])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 17, 17), (2, 13, 89)])
def test_singular_values_end_near_one(coefficients, dtype, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    found = np.asarray(orthogonalized(jnp.asarray(x), coefficients(5), coefficients.safety, dtype))
    values = np.linalg.svd(found, compute_uv=False)
    assert found.dtype == np.float32 and values.min() > 0.6 and values.max() < 1.25
    if dtype == "float32":
        expected = [polynomials(each, coefficients(5), coefficients.safety) for each in x.astype(np.float64)]
        np.testing.assert_allclose(found, np.stack(expected), atol=1e-4)


def test_accelerators_multiply_each_polynomials_own_result(monkeypatch):
    """What a GPU or TPU rounds in products of float32 adds up in the powers of x·xᵀ."""
    x, coefficients = jnp.ones((2, 13, 89)), NewtonSchulz()(5)
    program = lambda: str(jax.make_jaxpr(lambda: orthogonalized(x, coefficients))())
    wide = lambda: sum("f32[2,13,89] = dot_general" in line for line in program().splitlines())
    here = wide()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (here, wide()) == (1, 5)


def test_polar_express_converges():
    """Eight steps bring values of 10⁻³ to 1; further ones are all the last polynomial."""
    x = np.diag([1.0, 0.3, 1e-2, 2e-3]).astype(np.float32)[None]
    for steps in (8, 11):
        coefficients = PolarExpress()(steps)
        assert len(coefficients) == steps and coefficients[7:] == ((1.875, -1.25, 0.375),) * (steps - 7)
        np.testing.assert_allclose(orthogonalized(jnp.asarray(x), coefficients, 1.01)[0], np.eye(4), atol=2e-3)


def test_lion():
    """Two updates of a matrix, which decays, and a gain, which does not."""
    boxes = declared(w="L|D->F", scale="L|D")
    params, grads = drawn(boxes), [drawn(boxes, seed) for seed in (1, 2)]
    found, _ = updates(Lion(Constant(0.01), b1=0.8, b2=0.9, weight_decay=0.5), boxes, params, grads)
    for name, box in boxes.items():
        p, m = params[name], 0
        for g in grads:
            p = p - 0.01 * (np.sign(0.8 * m + 0.2 * g[name]) + 0.5 * p * box.decay)
            m = 0.9 * m + 0.1 * g[name]
        np.testing.assert_allclose(found[name], p, atol=1e-6)


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor(relative):
    """Algorithms 4 and 5 of arXiv:1804.04235, for one matrix after another."""
    boxes = declared(up="LE|D->F", q="L|D->HK", scale="L|D", table="VD")
    params, grads = drawn(boxes), [drawn(boxes, seed) for seed in (1, 2, 3)]
    for g in grads:  # a row and a column without a gradient
        g["up"][..., 0, :], g["up"][..., 0] = 0, 0
    optimizer = Adafactor(Constant(0.1), threshold=0.9, relative=relative, weight_decay=0.2)
    found, state = updates(optimizer, boxes, params, grads)
    for name, box in boxes.items():
        n = int(np.prod([SIZES[letter] for letter in box.letters.batch]))
        split = (lambda a, n=n: a.reshape(n, 10, -1)) if box.letters.into else (lambda a, n=n: a.reshape(n, 1, -1))
        for i in range(n):
            p, v, rows, columns = split(params[name])[i].copy(), 0, 0, 0
            for t, g in enumerate(grads, 1):
                g, keep = split(g[name])[i], 1 - t**-0.8
                squares = g**2 + 1e-30
                v = keep * v + (1 - keep) * squares
                rows, columns = (keep * a + (1 - keep) * squares.mean(ax) for a, ax in ((rows, 1), (columns, 0)))
                u = g / np.sqrt(np.outer(rows, columns) / rows.mean() if box.letters.into else v)
                u /= max(1, np.sqrt((u**2).mean()) / 0.9)
                size = max(1e-3, np.sqrt((p**2).mean())) if relative else 1
                p -= 0.1 * (size * u + 0.2 * p * box.decay)
            np.testing.assert_allclose(split(found[name])[i], p, atol=1e-5, err_msg=name)
    kept = {name: sum(a.size for a in own.values()) for name, own in state.moments.items()}
    assert kept == {"up": 6 * (10 + 26), "q": 2 * (10 + 6), "scale": 20, "table": 70}


def test_schedule_free():
    """Algorithm 1 of arXiv:2405.15682, over plain gradient descent whose rate warms up."""
    boxes = declared(w="L|D->F", scale="L|D")
    params, grads = drawn(boxes), [drawn(boxes, seed) for seed in range(1, 5)]
    optimizer = ScheduleFree(Constant(2.0), SGD(WarmupCosine(0.1, 0.01, 2, shortens=False)), b1=0.7, weight_power=1.5)
    y, z, x = (jax.tree.map(np.array, params) for _ in range(3))
    state, found, weights, rates = None, jax.tree.map(jnp.float32, params), 0, []
    for t, g in enumerate(grads):
        transform = optimizer.transform(boxes, jnp.int32(t), STEPS)
        state = transform.init(found) if state is None else state
        change, state = transform.update(jax.tree.map(jnp.float32, g), state, found)
        found = jax.tree.map(jnp.add, found, change)
        rates.append(2 * float(WarmupCosine(0.1, 0.01, 2, shortens=False)(jnp.int32(t), STEPS)))
        weights += max(rates) ** 1.5
        for name in boxes:
            z[name] = z[name] - rates[-1] * g[name]
            x[name] += max(rates) ** 1.5 / weights * (z[name] - x[name])
            y[name] = 0.3 * z[name] + 0.7 * x[name]
    assert rates[3] < rates[2] and float(optimizer.rate(jnp.int32(3), STEPS)) == pytest.approx(rates[3])
    chex.assert_trees_all_close(found, y, atol=1e-5)
    chex.assert_trees_all_close(optimizer.eval_params(state, found), x, atol=1e-5)


# --- groups


def test_the_first_group_that_has_an_array_moves_it():
    boxes = {"layers": declared(up="L|D->F", bias="L|F", o="L|HK->D"), "head": declared(kernel="D->V")}
    boxes |= {"embedding": declared(table="VD")}
    rates = {"up": 1 * 2 * 0.1, "o": 3 * 2 * 0.01, "bias": 5 * 2 * 0.001, "table": 5 * 2 * 0.001, "kernel": 1 * 2 * 1.0}
    groups = (
        Group(Lettered(("D->F", "F->D")), SGD(Constant(0.1))),
        Group(Hidden(), SGD(Constant(0.01)), factor=3.0),
        Group(Path("head/*"), SGD(Constant(1.0))),
        Group(Everything(), SGD(Product((Constant(0.001), Constant(1.0)))), factor=5.0),
    )
    optimizer = Groups(Constant(2.0), groups, clip=None)
    grads = jax.tree.map(lambda box: jnp.ones(box.value.shape), boxes, is_leaf=lambda x: isinstance(x, Declared))
    transform = optimizer.transform(boxes, STEP, STEPS)
    change, state = transform.update(grads, transform.init(grads), grads)
    assert by_path(change).keys() == by_path(boxes).keys() and len(state) == 4
    for path, a in by_path(change).items():
        np.testing.assert_allclose(a, -rates[path.split("/")[1]], rtol=1e-6, err_msg=path)
    assert float(optimizer.rate(STEP, STEPS)) == pytest.approx(0.2)
    clipped = dataclasses.replace(optimizer, clip=0.5).transform(boxes, STEP, STEPS)
    less, _ = clipped.update(grads, clipped.init(grads), grads)
    norm = np.sqrt(sum(a.size for a in jax.tree.leaves(grads)))
    chex.assert_trees_all_close(less, jax.tree.map(lambda a: a * 0.5 / norm, change), rtol=1e-5)


@pytest.mark.parametrize("limit", [0.5, 1e4])
def test_the_norm_by_blocks_clips_as_optax_does(limit):
    rng = np.random.default_rng(0)
    tree = {"blocks": rng.normal(size=(17, 257, 263)), "short": rng.normal(size=(5,)), "whole": np.ones((16, BLOCK))}
    wanted = np.sqrt(sum((a / 3).ravel() @ (a / 3).ravel() for a in tree.values()))
    grads = jax.tree.map(jnp.float32, tree)
    norm = jax.jit(global_norm)(grads, jnp.float32(3))
    assert float(norm) == pytest.approx(wanted, rel=1e-6)
    own, mean = clip_by_global_norm(limit), jax.tree.map(lambda a: a / 3, grads)
    reference = optax.clip_by_global_norm(limit).update(mean, optax.EmptyState())[0]
    told = lambda of: own.update(mean, own.init(mean), grad_norm=of and GradNorm(of, norm))[0]
    chex.assert_trees_all_close(told(mean), reference, rtol=1e-5)
    chex.assert_trees_all_close(told(None), reference, rtol=1e-5)
    chex.assert_trees_all_equal(told(jax.tree.map(jnp.copy, mean)), told(None))  # of something else
    assert (limit < wanted) == bool((told(mean)["whole"] < mean["whole"]).all())


class Scaled(AdamW):
    """What it clips is not what the step has the norm of."""

    def transform(self, declared, step, steps):
        return optax.chain(optax.scale(1e-3), super().transform(declared, step, steps))


class ClippedByOptax(AdamW):
    def transform(self, declared, step, steps):
        rest = AdamW(eps=self.eps, clip=None).transform(declared, step, steps)
        return optax.chain(optax.scale(1e-3), optax.clip_by_global_norm(self.clip), rest)


def test_a_clip_is_by_the_norm_of_what_it_is_given():
    found = []
    for optimizer in (Scaled(eps=1e-2, clip=0.5), ClippedByOptax(eps=1e-2, clip=0.5)):
        recipe, own = Recipe(decoder(n_layers=1)), hyper(optimizer)
        state, rows = train_steps(recipe, init_state(recipe, own), batches(2), np.int32(2), own)
        found.append(state.params)
    assert rows["grad_norm"][0] > 0.5
    chex.assert_trees_all_close(*found, rtol=1e-5, atol=1e-7)


def test_one_group_of_everything_is_its_optimizer_to_the_bit():
    recipe, alone = Recipe(decoder(n_layers=2)), AdamW(WarmupCosine(1e-2, 1e-3, 2))
    found = []
    for optimizer in (alone, Groups(groups=(Group(Everything(), alone),), clip=None)):
        state, rows = train_steps(
            recipe, init_state(recipe, hyper(optimizer)), batches(3), np.int32(3), hyper(optimizer)
        )
        found.append((state.params, rows))
    chex.assert_trees_all_equal(*found)


def test_rates_by_depth():
    """Of layers stacked two apart, of what is below and above; and of an encoder's stack by its own depth."""
    boxes = {
        "embedding": declared(table="VD"),
        "decoder": {"layers": declared(up="L|D->F"), "end": declared(gain="D")},
        "encoder": {"layers": declared(up="L|D->F")},
        "head": declared(kernel="D->V"),
    }
    up = boxes["decoder"]["layers"]["up"]
    boxes["decoder"]["layers"]["up"] = up.replace(layers=(1, 2))  # the layers 1 and 3, of four
    grads = jax.tree.map(lambda box: jnp.ones(box.value.shape), boxes, is_leaf=lambda x: isinstance(x, Declared))
    optimizer = ByDepth(Constant(2.0), SGD(Constant(0.5)), decay=0.5)
    transform = optimizer.transform(boxes, STEP, STEPS)
    change, _ = transform.update(grads, transform.init(grads), grads)
    rates = {path: np.unique(-np.asarray(a).reshape(len(a), -1), axis=1)[:, 0] for path, a in by_path(change).items()}
    np.testing.assert_allclose(rates["decoder/layers/up"], [0.25, 1.0])
    np.testing.assert_allclose(rates["encoder/layers/up"], [0.5, 1.0])
    for path, rate in (("embedding/table", 0.0625), ("decoder/end/gain", 1.0), ("head/kernel", 1.0)):
        np.testing.assert_allclose(rates[path], rate, err_msg=path)
    still = dataclasses.replace(optimizer, still=2).transform(boxes, STEP, STEPS)
    change, _ = still.update(grads, still.init(grads), grads)
    assert not np.any(change["embedding"]["table"]) and not np.any(change["decoder"]["layers"]["up"][0])
    assert not np.any(change["encoder"]["layers"]["up"]) and np.all(change["decoder"]["layers"]["up"][1])
    averaged = ScheduleFree(Constant(2.0), dataclasses.replace(optimizer, still=2)).transform(boxes, STEP, STEPS)
    params = jax.tree.map(lambda a: jnp.linspace(0.7, 0.9, a.size).reshape(a.shape), grads)
    moved, state = params, averaged.init(params)
    for _ in range(5):
        change, state = averaged.update(grads, state, moved)
        moved = jax.tree.map(jnp.add, moved, change)
    of = lambda tree: (tree["embedding"]["table"], tree["decoder"]["layers"]["up"][0], tree["encoder"])
    chex.assert_trees_all_equal(of(moved), of(params))  # to the bit
    assert float(optimizer.rate(STEP, STEPS)) == 1.0
    assert not by_path(dataclasses.replace(optimizer, still=2).frozen(boxes))["embedding/table"].trained
    assert by_path(dataclasses.replace(optimizer, still=2).frozen(boxes))["decoder/layers/up"].trained
    with pytest.raises(ValueError, match="still=5 must be at most 4, the layers of the model"):
        dataclasses.replace(optimizer, still=5).check_declared(boxes)


def test_depths_are_those_of_the_model():
    """Tables of positions and the norm of the embedding lie in the stack and are below its first layer; layers that are
    left out, as frozen ones are, count."""
    model = decoder(n_layers=4, mask=(Window(4), Causal()), embedding=Embedding(normed=True))
    boxes = trained(model.declared(), model.declared())
    rates = lambda optimizer, boxes: {
        path: np.unique(-np.asarray(a).reshape(len(a), -1), axis=1)[:, 0] for path, a in changes(optimizer, boxes)
    }
    optimizer = ByDepth(optimizer=SGD(Constant(1.0)), decay=0.5)
    found = rates(optimizer, boxes)
    for path in ("embedding/table", "decoder/position/table", "decoder/norm_embedding/scale"):
        np.testing.assert_allclose(found[path], 1 / 16, err_msg=path)
    np.testing.assert_allclose(found["decoder/layers/block0/attention/project/q"], [1 / 8, 1 / 2])
    np.testing.assert_allclose(found["decoder/norm/scale"], 1)
    some = selected(boxes, boxes, lambda path, _: "block1" not in path)
    again = rates(optimizer, some)
    assert all((again[path] == found[path]).all() for path in again)
    frozen = by_path(dataclasses.replace(optimizer, still=1).frozen(boxes))
    assert {path for path, box in frozen.items() if not box.trained} == {
        path for path in frozen if path.startswith(("embedding/", "decoder/position/", "decoder/norm_embedding/"))
    }


def test_rates_that_depend_on_layers_elsewhere_are_refused():
    """A group without layers does not know how many the model has, nor does what moves when all of them are frozen."""
    model = decoder(n_layers=4, norm=NoNorm())
    boxes = trained(model.declared(), model.declared())
    layers = Path("decoder/layers/*")
    for wrong in (
        Groups(groups=(Group(layers, SGD()), Group(Everything(), ByDepth(SGD())))),
        ByDepth(optimizer=Groups(groups=(Group(layers, Frozen()), Group(Everything(), SGD())))),
    ):
        with pytest.raises(
            ValueError, match=r"ByDepth moves .*, whose rate .* many layers .* put ByDepth around Groups"
        ):
            wrong.check_declared(boxes)
    for right in (
        Groups(groups=(Group(layers, ByDepth(SGD())), Group(Everything(), SGD()))),
        ByDepth(optimizer=Groups(groups=(Group(layers, SGD()), Group(Everything(), SGD())))),
        ByDepth(decay=1.0, optimizer=Groups(groups=(Group(layers, Frozen()), Group(Everything(), SGD())))),
    ):
        right.check_declared(boxes)


def test_the_head_alone_is_trained_where_all_layers_stay():
    model = decoder(n_layers=4, head=LanguageHead(tied=False))
    boxes = trained(model.declared(), model.declared())
    optimizer = ByDepth(optimizer=SGD(Constant(1.0)), still=4)
    optimizer.check_declared(boxes)
    own = optimizer.frozen(boxes)
    found = dict(changes(optimizer, trained(own, own)))
    assert {path.split("/")[0] for path in found} == {"decoder", "head_language"} and "decoder/norm/scale" in found
    assert not any("layers" in path or "position" in path for path in found)
    assert all((np.asarray(a) == -1).all() for a in found.values())


def test_what_is_above_a_short_stack_moves():
    model = EncoderDecoder(d_model=12, context_length=T, vocab_size=29, n_encoder_layers=2, n_layers=4)
    boxes = by_path(ByDepth(still=3).frozen(model.declared()))
    assert boxes["encoder/norm/scale"].trained and boxes["decoder/norm/scale"].trained
    assert not any(box.trained for path, box in boxes.items() if path.startswith(("encoder/layers", "embedding")))


@pytest.mark.parametrize(
    "optimizer",
    [
        Groups(groups=(Group(Hidden(), ByDepth(still=2)), Group())),
        ByDepth(optimizer=Groups(groups=(Group(Path("embedding/*"), AdamW()), Group())), still=1),
    ],
)
def test_a_group_may_be_left_without_arrays(optimizer):
    model = decoder(n_layers=2)
    optimizer.check_declared(trained(model.declared(), model.declared()))
    own = optimizer.frozen(model.declared())
    assert np.isfinite([np.asarray(a).sum() for _, a in changes(optimizer, trained(own, own))]).all()


def changes(optimizer, boxes):
    ones = jax.tree.map(lambda box: jnp.ones(box.value.shape), boxes, is_leaf=lambda x: isinstance(x, Declared))
    transform = optimizer.transform(boxes, STEP, STEPS)
    return by_path(transform.update(ones, transform.init(ones), ones)[0]).items()


def test_refusals():
    model = decoder(n_layers=2)
    own = trained(model.declared(), model.declared())
    for optimizer, sentence in (
        (Muon(), "optimizer=Muon is for matrices, and decoder/.* is none .letters are L|D.; give it another"),
        (Groups(groups=(Group(Hidden(), Muon()),)), "none has decoder/"),
        (Groups(groups=(Group(), Group(Hidden(), Muon()))), "no array is left for Hidden()"),
        (Groups(groups=(Group(Path("emb"), Muon()), Group())), "no array is left for Path(pattern='emb')"),
        (Groups(groups=(Group(Path("embedding/*"), Muon()), Group())), "and embedding/table is none"),
    ):
        with pytest.raises(ValueError, match=sentence.replace("(", ".").replace(")", ".")):
            optimizer.check_declared(own)
    for wrong, sentence in (
        (Groups(groups=()), "at least one"),
        (Groups(groups=(Group(factor=0.0),)), "groups.0.factor=0.0 must be more than 0"),
        (Groups(clip=0.0), "clip=0.0"),
        (Muon(momentum=1.0), "momentum=1.0"),
        (Muon(steps=0), "steps=0"),
        (Muon(weight_decay=-1.0), "weight_decay=-1.0"),
        (Lion(b1=1.0), "b1=1.0"),
        (Adafactor(least=0.0), "least=0.0"),
        (ByDepth(decay=0.0), "decay=0.0 must be more than 0"),
        (ScheduleFree(b1=0.0), "b1=0.0 must be more than 0"),
        (ScheduleFree(optimizer=ScheduleFree()), "optimizer=ScheduleFree averages by itself"),
        (Constant(warmup_steps=-1), "warmup_steps=-1"),
    ):
        with pytest.raises(InputError, match=sentence):
            checked(wrong)


# --- in training


def hyper(optimizer, steps=20):
    return Hyper(np.uint32(5), np.int32(steps), optimizer)


def batches(n):
    return {"tokens": np.random.default_rng(0).integers(0, 29, (n, B, T + 1), dtype=np.int32)}


FAST = WarmupCosine(1.0, 0.1, 10)
LEARNERS = {
    "Muon": Groups(FAST, (Group(Hidden(), Muon(Constant(0.05))), Group(Everything(), AdamW(Constant(1e-2))))),
    "Lion": Lion(WarmupCosine(2e-3, 2e-4, 10), weight_decay=0.0),
    "Adafactor": Adafactor(WarmupCosine(0.1, 0.01, 10)),
    "schedule-free": ScheduleFree(optimizer=AdamW(Constant(1e-2, 10), b1=0.0, weight_decay=0.0)),
}


@pytest.mark.parametrize(
    "name", ["Muon", *(pytest.param(name, marks=pytest.mark.rare) for name in ("Lion", "Adafactor", "schedule-free"))]
)
def test_one_batch_is_memorised(name):
    recipe, how = Recipe(decoder(n_layers=2)), hyper(LEARNERS[name], 150)
    buffer = jax.tree.map(lambda a: np.broadcast_to(a, (150, *a.shape[1:])), batches(1))
    _, rows = train_steps(recipe, init_state(recipe, how), buffer, np.int32(150), how)
    assert 3 < float(rows["loss"][0]) < 4 and float(rows["loss"][-1]) < 0.05
    assert float(rows["learning_rate"][9]) == pytest.approx(float(LEARNERS[name].rate(jnp.int32(9), jnp.int32(150))))


FREEZES = Groups(groups=(Group(Path("decoder/layers/*"), Frozen()), Group(Everything(), AdamW(Constant(1e-2)))))


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.rare)])
def test_frozen_arrays_stay_to_the_bit_and_cost_nothing(dtype):
    model = decoder(n_layers=2)
    recipe = Recipe(model, compute_dtype=dtype, grad_norms=True)

    def trained_by(optimizer, count):
        own = hyper(optimizer)._replace(ema_decay=np.float32(0.3))
        return train_steps(recipe, init_state(recipe, own, loud(model)), batches(2), np.int32(count), own)

    (state, rows), (_, whole), first = trained_by(FREEZES, 2), trained_by(AdamW(), 1), loud(model)
    for tree in (state.params, state.ema):
        chex.assert_trees_all_equal(tree["decoder"]["layers"], first["decoder"]["layers"])
        assert not np.array_equal(tree["embedding"]["table"], first["embedding"]["table"])
    np.testing.assert_allclose(rows["loss"][0], whole["loss"][0], rtol=1e-6)  # frozen matrices, too, are cast
    names = rows["grad_norms"].keys()
    assert not any("layers" in name for name in names) and names < whole["grad_norms"].keys()
    total = np.sqrt(sum(float((a[0] ** 2).sum()) for a in rows["grad_norms"].values()))
    assert float(rows["grad_norm"][0]) == pytest.approx(total, rel=1e-5)
    assert float(rows["learning_rate"][0]) == pytest.approx(1e-2)
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    assert count(state.opt_state) == 2 * (count(first) - count(first["decoder"]["layers"])) + 1


def test_seeds_and_numbers_are_traced():
    """Of seeds together each is as alone; another rate compiles nothing."""
    recipe, optimizer = Recipe(decoder(n_layers=2)), LEARNERS["Muon"]
    once = jax.jit(chex.assert_max_traces(train_members.__wrapped__, n=1), static_argnums=0)
    for factor in (1.0, 0.5):
        own = dataclasses.replace(optimizer, learning_rate=WarmupCosine(factor, 0.1 * factor, 10))
        both = hyper(own)._replace(seed=np.array([5, 6], np.uint32))
        states = [init_state(recipe, both._replace(seed=seed)) for seed in both.seed]
        stack = lambda *trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)
        found, _ = once(recipe, stack(*states), stack(batches(2), batches(2)), np.int32(2), both)
        alone, _ = train_steps(recipe, states[0], batches(2), np.int32(2), hyper(own))
        chex.assert_trees_all_close(jax.tree.map(lambda a: a[0], found.params), alone.params, atol=1e-4)


TINY = {"n_layers": 2, "n_heads": 2, "d_model": 14, "d_ff": 11, "context_length": 7}
PAIRS = Data(Copy(5, 2, examples=61), tokenizer=Characters(end_token=True), sampling=Examples(), batch_size=3)
FAMILIES = {
    "decoder": (Decoder(**TINY), NextToken(), None),
    "encoder": (Encoder(**TINY), Masked(), None),
    "encoder–decoder": (EncoderDecoder(**TINY), SequenceToSequence(), PAIRS),
    "baseline": (LSTM(d_model=14, n_layers=2, context_length=7), NextToken(), None),
}


def config(tmp_path, family, optimizer):
    model, objective, data = FAMILIES[family]
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)
    tokenizer = Bytes() if family != "encoder" else Characters(mask_token=True)
    data = data or Data(TextFiles(str(tmp_path / "text.txt")), tokenizer=tokenizer, batch_size=3)
    train = Train(steps=6, steps_per_call=2, log_every=2, eval_every=6, save_every=3, sample_tokens=0)
    return Config(str(tmp_path / "run"), model, data, objective, optimizer, train)


STEADY = dataclasses.replace(LEARNERS["Muon"], learning_rate=Constant(1.0))  # the same whatever the length of the run
PARTLY = Groups(
    groups=(
        Group(Path("embedding/*"), Frozen()),
        Group(Lettered(("D->HK", "HK->D")), ScheduleFree(optimizer=Muon(Constant(0.05)))),
        Group(Hidden(), Adafactor(Constant(0.1))),
        Group(Everything(), ScheduleFree(optimizer=Lion(Constant(1e-3)))),
    )
)
RUNS = {"Muon": ("decoder", STEADY), "frozen": ("decoder", FREEZES), "schedule-free in groups": ("decoder", PARTLY)}
RARE = {f"Muon, {family}": (family, STEADY) for family in FAMILIES if family != "decoder"}
RARE |= {
    f"{name}, {family}": (family, optimizer)
    for name, optimizer in {
        "Lion": Lion(Constant(1e-3)),
        "Adafactor": Adafactor(Constant(0.1)),
        "schedule-free": ScheduleFree(),
    }.items()
    for family in FAMILIES
}
SLOW = "frozen", "Muon, encoder–decoder", "Lion, encoder", "Adafactor, encoder–decoder", "schedule-free, decoder"
RUNS |= RARE


def marks(name):
    return pytest.mark.slow if name in SLOW else pytest.mark.rare if name in RARE else ()


@pytest.mark.parametrize("name", [pytest.param(name, marks=marks(name)) for name in RUNS])
def test_trains_and_resumes_to_the_same_bits(name, tmp_path):
    own = config(tmp_path, *RUNS[name])
    run = jaxformer.train(own)
    jaxformer.train(own, {"train.steps": 3}, tmp_path / "again")
    assert sha256(jaxformer.train(own, directory=tmp_path / "again").state) == sha256(run.state)
    opened = jaxformer.open_run(tmp_path / "run")
    assert opened.config.optimizer == run.config.optimizer and sha256(opened.state) == sha256(run.state)


def test_what_is_evaluated_is_what_the_optimizer_says(tmp_path):
    """In a run, opened again, of seeds together, and as the beginning of another run."""
    own = config(tmp_path, "decoder", PARTLY)
    run = jaxformer.train(own)
    (z,) = (state.z for state in run.state.opt_state[3:])
    assert {*by_path(z)} == {path for path in by_path(run.state.params) if "norm" in path or "position" in path}
    of = lambda tree: tree["decoder"]["norm"]["scale"]
    np.testing.assert_allclose(of(run.eval_params), (of(run.state.params) - 0.1 * of(z)) / 0.9, rtol=1e-6)
    frozen = run.state.params["embedding"]["table"]
    np.testing.assert_array_equal(run.eval_params["embedding"]["table"], frozen)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    told = [row["loss"] for row in rows if row["split"] == "valid" and row["step"] == 6]
    opened = jaxformer.open_run(tmp_path / "run")
    assert opened.evaluate()["loss"] == pytest.approx(told[0], rel=1e-6)
    trained_with = dataclasses.replace(own, optimizer=AdamW())
    without = dataclasses.replace(opened, config=trained_with)
    assert without.evaluate()["loss"] != pytest.approx(told[0], rel=1e-6)
    together = jaxformer.train_seeds(own, (own.train.seed, 7), directory=tmp_path / "seeds")
    rows = [json.loads(line) for line in (tmp_path / "seeds" / "seed-0" / "metrics.jsonl").read_text().splitlines()]
    assert [r["loss"] for r in rows if r["split"] == "valid"][-1] == pytest.approx(told[0], rel=1e-3)
    chex.assert_trees_all_close(together[0].eval_params, run.eval_params, atol=1e-3)
    again = dataclasses.replace(own, init_from=str(tmp_path / "run"))
    state, step, batch_at = jaxformer.build(dataclasses.replace(again, directory=str(tmp_path / "again")))
    chex.assert_trees_all_equal(state.params, run.eval_params)
    chex.assert_trees_all_close(
        state.eval_params(run.recipe, PARTLY), run.eval_params, rtol=1e-5
    )  # its average begins there, too
    step(state, batch_at(0))  # donates each array once


def test_one_average_is_enough(tmp_path):
    own = config(tmp_path, "decoder", PARTLY)
    with pytest.raises(InputError, match=r"averages by itself; put ByDepth inside: ScheduleFree.optimizer=ByDepth"):
        checked(ByDepth(optimizer=ScheduleFree()))
    with pytest.raises(InputError, match="must be None: optimizer=Groups averages by itself"):
        resolve(own, {"train.ema_decay": 0.9})
    assert resolve(dataclasses.replace(own, optimizer=FREEZES), {"train.ema_decay": 0.9}).train.ema_decay == 0.9


def test_the_command_line(tmp_path, capfd, monkeypatch):
    """A mistake ends with one sentence and status 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 20)
    sizes = ["--data.corpus=TextFiles", "--data.corpus.path=text.txt", "--model.n_layers=2", "--directory=out"]
    for given, sentence in (
        (["--optimizer=Muon"], "optimizer=Muon is for matrices"),
        (["--optimizer=Frozen"], "optimizer=Frozen freezes every parameter"),
        (["--optimizer=Groups", "--optimizer.groups=Group", "--optimizer.groups.0.which=Hidden"], "none has "),
    ):
        assert main.run("train", ["quickstart", *sizes, *given]) == 2
        assert sentence in capfd.readouterr().err and not (tmp_path / "out").exists()
    found = resolve("quickstart", {"optimizer": "Groups", "optimizer.groups.0.optimizer.heads": "true"})
    hidden, rest = Groups().groups
    heads = dataclasses.replace(hidden, optimizer=dataclasses.replace(hidden.optimizer, heads=True))
    assert found.optimizer == Groups(groups=(heads, rest))
    path = {"optimizer": "Groups", "optimizer.groups": "Group,Group", "optimizer.groups.0.which": "Path"}
    path |= {"optimizer.groups.0.which.pattern": "embedding/*", "optimizer.groups.0.optimizer": "Frozen"}
    assert resolve("quickstart", path).optimizer.groups[0] == Group(Path("embedding/*"), Frozen())
    assert resolve(found, {"optimizer": "AdamW"}).optimizer == AdamW()
    slow = resolve("shakespeare_cpu", {"optimizer.learning_rate.peak": 0.5})
    assert resolve(slow, {"optimizer": "Groups"}).optimizer == Groups()  # a rate is no factor
