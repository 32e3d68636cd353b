"""The loss in chunks of places: the sums and gradients of the loss at once, in a part of its memory."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ideas import MaskedDiffusion
from tiny import decoder, ids

from jaxformer import mesh
from jaxformer.declarations import Letters
from jaxformer.learning import chunks
from jaxformer.learning.objectives import NextToken, SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.heads import LanguageHead, MaskedLanguageHead
from jaxformer.model.layers import Loss, Out
from jaxformer.model.models import Model
from jaxformer.run.step import Hyper, Recipe, evaluate_batch, init_state, train_members, train_steps

B, T, D, V = 3, 13, 5, 29


class Layer(Model):
    """One layer between the embedding and the head, and a loss of its own; what an encoder reads is added up."""

    network = None

    def hidden(self, params, ids, at, key=None, cache=None, memory=None):
        h = jnp.tanh(params["embedding"]["table"][ids] @ params["matrix"])
        out = Out(h if memory is None else h + memory[:, None], losses={})
        return out.beside(out.h, Out(None, losses={"size": Loss((h * h).mean((1, 2)), 0.1)}))

    def encode(self, params, ids, at, key=None):
        return Out((params["embedding"]["table"][ids] * (at.segment > 0)[..., None]).sum(1))


class Focal(NextToken):
    """A stranger's: what is surely right counts less (arXiv:1708.02002), and a sum of its own."""

    def nats(self, model, params, h, example, key):
        found = super().nats(model, params, h, example, key)
        sure = jnp.exp(-found.plain)
        return found._replace(total=(1 - sure) ** 2 * found.plain, sums={"sure": (sure * example.weights).sum()})


class Drawn(NextToken):
    """A stranger's with draws."""

    def nats(self, model, params, h, example, key):
        kept = jnp.ones(h.shape) if key is None else jax.random.bernoulli(key, 0.5, h.shape)
        return super().nats(model, params, h * kept, example, key)


def batch(length=T):
    tokens = ids(B, length + 1, seed=3)
    lengths = np.array([length + 1, 9, 4])[:, None]
    segments = np.broadcast_to((np.arange(length + 1) < lengths).astype(np.int32), tokens.shape)
    return {"tokens": tokens, "segments": jnp.asarray(segments)}


PAIRS = batch() | {"source": batch(6)["tokens"], "source_segments": batch(6)["segments"]}
ROWS = {"tokens": batch()["tokens"]}  # without padding: places and weights are given once
MASK = {"mask": 3, "special": (3,), "vocab_size": V}
CASES = {
    "tied": (NextToken(), LanguageHead(), batch()),
    "untied, with a bias": (NextToken(), LanguageHead(tied=False, bias=True), ROWS),
    "scaled and capped": (NextToken(), LanguageHead(scaled=True, cap=3.0), batch()),
    "BERT's head": (NextToken(), MaskedLanguageHead(), batch()),
    "smoothing": (NextToken(label_smoothing=0.1), LanguageHead(), batch()),
    "z-loss": (NextToken(z_loss=0.01), LanguageHead(bias=True), ROWS),
    "two texts": (SequenceToSequence(label_smoothing=0.1), LanguageHead(), PAIRS),
    "weights that are no counts": (MaskedDiffusion(**MASK), LanguageHead(), batch()),
    "a stranger's": (Focal(), LanguageHead(), batch()),
}


def at_once(monkeypatch, places):
    """So many places of B rows; None: all."""
    monkeypatch.setattr(chunks, "MOST", 2**60 if places is None else places * B * V * 4)


def alike(one, other, rtol=1e-5):
    """To a part of the largest number of each array."""
    one, other = (jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (one, other))
    assert [path for path, _ in one] == [path for path, _ in other]
    for (path, a), (_, b) in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))


def parameters(head, seed=0):
    """As `Layer` has them, and one array that no loss reads."""
    sizes, rng = {"D": D, "V": V}, np.random.default_rng(seed)
    of_head = {name: tuple(sizes[c] for c in Letters.of(param.letters).all) for name, param in head.params().items()}
    shapes = {"embedding": {"table": (V, D)}, "matrix": (D, D), "unread": (7,), "head_language": of_head}
    draw = lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def losses(name, vmapped=False):
    """Sums and gradients of a case, under a factor, as `loss_scale` is; and the sums of an evaluation."""
    objective, head, given = CASES[name]
    model, example = Layer(D, T, V, head), objective.prepare(given, jax.random.key(1), jnp.int32(0))

    def loss(params):
        sums = objective.loss(model, params, example, jax.random.key(2))
        return 3 * sums.minimised, sums

    def found(params):
        sums = objective.sums(model, params, example, jnp.ones(V, jnp.int32))
        return jax.value_and_grad(loss, has_aux=True)(params), sums

    if not vmapped:
        return jax.jit(found)(parameters(head))
    both = jax.tree.map(lambda *a: jnp.stack(a), parameters(head), parameters(head, 1))
    return jax.jit(jax.vmap(found))(both)


@pytest.mark.parametrize("name", CASES)
def test_sums_and_gradients_are_those_of_the_loss_at_once(monkeypatch, name):
    """13 places, in chunks of 5 and a last one of 3."""
    at_once(monkeypatch, None)
    whole = losses(name)
    at_once(monkeypatch, 6)
    alike(losses(name), whole)


def test_the_gradient_of_a_chunk_fits_float16():
    """Of a row that 70,000 places of each chunk ask for; the sum of chunks is under the factor of the step."""
    h, table = jnp.ones((1, 140_000, 1), jnp.float16), jnp.ones((1, 1), jnp.float16)
    scale = chunks.loss_scale("float16", 140_000)

    def loss(table):
        of_chunk = lambda h, beside, key: ((h @ table).astype(jnp.float32).sum(), {}, {})
        return scale * chunks.in_chunks(of_chunk, 70_000, h, {}, None)[0]

    assert jax.grad(loss)(table).item() / scale == pytest.approx(140_000, rel=1e-3)  # to the digits of float16


def test_members_have_their_own(monkeypatch):
    """In chunks of one place."""
    at_once(monkeypatch, None)
    whole = losses("smoothing", vmapped=True)
    at_once(monkeypatch, 1)
    alike(losses("smoothing", vmapped=True), whole)


@pytest.mark.slow
def test_a_step_in_chunks_is_the_step_at_once(monkeypatch):
    """Of one run, of slices, of two runs together, and in half precision; evaluations, too."""
    model = decoder(n_layers=1, d_model=12, n_heads=2, n_kv_heads=None, head=LanguageHead(bias=True))
    recipe, seeds = Recipe(model, NextToken(label_smoothing=0.1), grad_norms=True), np.arange(2, dtype=np.uint32)
    buffer = jax.tree.map(lambda a: a[None], batch())
    both = jax.tree.map(lambda a: jnp.stack([a, a]), buffer)
    hyper = lambda seed=np.uint32(0): Hyper(seed, np.int32(9), AdamW(Constant(1e-2)))  # noqa: B008
    begin = lambda seed=np.uint32(0): init_state(recipe, hyper(seed))  # noqa: B008
    found = {}
    for places in (None, 4):
        at_once(monkeypatch, places)
        jax.clear_caches()
        of = found[places] = {}
        for slices in (1, 3):
            cut = dataclasses.replace(recipe, slices=slices)
            of[f"{slices} slices"] = train_steps(cut, begin(), buffer, np.int32(1), hyper())[1]
        of["evaluated"] = evaluate_batch(recipe, begin().params, batch(), np.int32(0), jnp.ones(V, jnp.int32))
        of["together"] = train_members(recipe, jax.vmap(begin)(seeds), both, np.int32(1), hyper(seeds))[1]
    alike(found[4], found[None])
    half = dataclasses.replace(recipe, compute_dtype="float16")
    _, found = train_steps(half, begin(), buffer, np.int32(1), hyper())
    alike({n: found[n] for n in ("loss", "grad_norms")}, {n: of["1 slices"][n] for n in ("loss", "grad_norms")}, 1e-2)


def test_each_chunk_has_draws_of_its_own(monkeypatch):
    """Places with the same hidden states and targets have other nats in another chunk."""
    at_once(monkeypatch, 4)
    model, params = Layer(D, 12, V), {"embedding": {"table": jax.random.normal(jax.random.key(0), (V, D))}}
    params["matrix"] = jnp.eye(D)
    example = NextToken().prepare({"tokens": jnp.zeros((B, 13), jnp.int32)}, jax.random.key(0))
    nats = Drawn()._summed(model, params, example, jax.random.key(1))[1].plain
    assert not np.allclose(nats[:, :4], nats[:, 4:8])
    evaluated = Drawn()._summed(model, params, example, None)[1].plain
    np.testing.assert_allclose(evaluated[:, :4], evaluated[:, 4:8], rtol=1e-6)


def test_no_gradient_is_made_where_none_is_asked_for(monkeypatch):
    """An evaluation has one product with the table, not three; neither keeps the logits of all places, nor has an
    argmax, whose loop XLA on CPU would take for the maximum, too."""
    at_once(monkeypatch, 1)
    model, objective = Layer(D, T, V), NextToken()
    params = {"embedding": {"table": jnp.ones((V, D))}, "matrix": jnp.eye(D)}
    example = objective.prepare(batch(), jax.random.key(0))
    loss = lambda params: objective.loss(model, params, example, None).minimised
    count = lambda f: str(jax.make_jaxpr(f)(params)).count("dot_general")
    assert count(loss) == 2 and count(jax.grad(loss)) > 4
    for f in (loss, jax.grad(loss)):
        assert f"{B},{T},{V}" not in (program := str(jax.make_jaxpr(f)(params))) and "argmax" not in program


def test_chunks_are_alike_where_that_is_possible():
    size = lambda places, share: chunks.chunk_size(places, share * chunks.MOST)
    found = [size(1024, 7), size(1024, 2), size(1021, 7), size(12, 5), size(13, 50), size(1, 3), size(1600, 99)]
    assert found == [128, 512, 146, 2, 1, 1, 100]


def test_accelerators_hold_more_logits_at_once(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert [chunks.chunk_size(1024, share * chunks.MOST) for share in (8, 17)] == [1024, 256]


@pytest.mark.parametrize(("backend", "least"), [("cpu", 2), ("gpu", 8)])
def test_two_chunks_are_one_on_a_cpu(monkeypatch, backend, least):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(chunks, "MOST", 4 * B * T * V // least)
    example, h = NextToken().prepare(ROWS, jax.random.key(0)), jnp.ones((B, T, D))
    found = [NextToken().chunk_size(Layer(D, T, vocabulary), h, example) for vocabulary in (V - least, V + least)]
    assert found[0] is None and found[1] is not None


def test_small_vocabularies_and_logits_that_are_there_already_are_left_whole():
    example = NextToken().prepare(ROWS, jax.random.key(0))
    assert NextToken().chunk_size(Layer(D, T, V), jnp.ones((B, T, D)), example) is None
    assert NextToken().chunk_size(Layer(D, T, 2**30), jnp.ones((B, T, D)), example) is not None
    assert NextToken().chunk_size(Layer(D, T, 2**30), (jnp.ones((B, T, D)), 0), example) is None


def test_chunks_are_of_the_logits_of_a_device(monkeypatch):
    """As a plan counts them; a vocabulary that the axis does not divide is whole on each."""
    example, h = NextToken().prepare(ROWS, jax.random.key(0)), jnp.ones((B, T, D))
    size = lambda vocabulary: NextToken().chunk_size(Layer(D, T, vocabulary), h, example)
    monkeypatch.setattr(chunks, "MOST", 2 * B * T * V)
    alone = [size(V), size(8 * V), size(8 * V + 1)]
    monkeypatch.setattr(mesh, "axis_sizes", lambda: {"data": 1, "fsdp": 1, "tensor": 8})
    assert [size(8 * V), size(64 * V), size(8 * V + 1)] == alone and alone[0] is None


@pytest.mark.slow
def test_a_step_with_a_large_vocabulary_takes_a_quarter_of_the_memory(monkeypatch):
    """The temporary memory of the compiled step, 4,096 tokens and GPT-2's vocabulary."""
    recipe = Recipe(decoder(vocab_size=50_257, n_layers=1, d_model=64, n_heads=2, n_kv_heads=None, context_length=128))
    hyper, tokens = (
        Hyper(np.uint32(0), np.int32(9), AdamW(Constant(1e-2))),
        {"tokens": np.zeros((1, 32, 129), np.int32)},
    )
    state = jax.eval_shape(lambda: init_state(recipe, hyper))

    def memory():
        jax.clear_caches()
        return (
            train_steps.lower(recipe, state, tokens, np.int32(1), hyper).compile().memory_analysis().temp_size_in_bytes
        )

    in_chunks = memory()
    monkeypatch.setattr(chunks, "MOST", 2**60)
    assert in_chunks < memory() / 4
