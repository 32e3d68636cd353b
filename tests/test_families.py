"""Families × objectives × positions × masks × kernels: what must hold for every pair of them, and of a stranger's.

The combinations are generated: every part that exists is in some of them, and each pair in at least one. They run
operation by operation, as each operation compiles once for all; the compiled model must agree with that.
"""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from tiny import SIZES, ids, loud

from jaxformer.learning import objectives
from jaxformer.model import heads, kernels, masks, mixers, models, positions, residuals
from jaxformer.model.masks import Places, places
from jaxformer.spec import checked, known_specs

T = 13
MADE = {  # parts whose fields have no default, or one too large for these texts
    "Local": lambda cls: cls(5),
    "Window": lambda cls: cls(4),
    "Both": lambda cls: cls((masks.Prefix(), masks.Local(6))),
    "Either": lambda cls: cls((masks.Window(3), masks.Prefix())),
    "Learned": lambda cls: cls(),
    "RelativeBias": lambda cls: cls(8, 6),
    "SoftCapped": lambda cls: cls(2.0),
    "Rotary": lambda cls: cls(100.0, 3 / 7, 2.0),
}
SPECIAL = {"mask": (28,), "start": (27,), "end": (27,), "sentinels": (23, 24, 25, 26)}
HEADS = heads.LanguageHead(), heads.ClassificationHead("x", ("a", "b", "c")), heads.EmbeddingHead(width=5)


def instances(base, module):
    """One of every class of a kind: the package's and the stranger's."""
    classes = {base, *known_specs(base)}
    ours = [c for c in classes if c.__module__ in (module.__name__, outside.__name__)]
    ours = [c for c in ours if not (c.abstract or inspect.isabstract(c))]
    return [MADE.get(c.__name__, lambda c: c())(c) for c in sorted(ours, key=lambda c: c.__name__)]


FACTORS = {
    "family": [models.Decoder, models.Encoder, models.EncoderDecoder],
    "objective": instances(objectives.Objective, objectives),
    "position": instances(positions.Position, positions),
    "mask": instances(masks.Mask, masks),
    "kernel": instances(kernels.Kernel, kernels),
}


def model_of(family, position, mask, kernel, **more):
    fields = SIZES | {"n_layers": 2, "head": HEADS, "context_length": 2 * T} | more
    if isinstance(kernel, kernels.ValueResidual):  # in company
        fields |= {"mixer": mixers.ValueEmbeddings(), "residual": residuals.InputInjection()}
    return family(position=position, mask=mask, kernel=kernel, **fields)


def allowed(combination):
    """Whether the objective takes such a model."""
    family, objective, *parts = combination
    try:
        objective.check_model(model_of(family, *parts))
    except ValueError:
        return False
    return True


def all_pairs(combinations):
    """A few of the combinations in which all pairs of parts occur that occur in any: greedily, the best one next."""
    pairs = lambda c: set(itertools.combinations(enumerate(c), 2))
    missing = set().union(*map(pairs, combinations))
    chosen = []
    while missing:
        best = max(combinations, key=lambda c: len(pairs(c) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


EVERY = list(filter(allowed, itertools.product(*FACTORS.values())))
PAIRS = all_pairs(EVERY)
NAMES = lambda part: getattr(part, "__name__", type(part).__name__)


def cases(chosen, slow=()):
    """What runs by default, and what besides where slow tests do: one in 15 of the rest, the others being rare."""
    name = lambda c: "-".join(map(NAMES, c))
    found = [pytest.param(*c, id=name(c)) for c in chosen]
    rest = [c for c in slow if c not in chosen]
    found += [
        pytest.param(*c, id=name(c), marks=[pytest.mark.rare, pytest.mark.slow][i % 15 == 0])
        for i, c in enumerate(rest)
    ]
    return pytest.mark.parametrize(("family", *(("objective",) if len(found[0].values) == 5 else ()), *PARTS), found)


PARTS = ["position", "mask", "kernel"]
MODELS = list(dict.fromkeys((c[0], *c[2:]) for c in PAIRS))  # the objective does not matter to what a token sees
ALL_MODELS = list(dict.fromkeys((c[0], *c[2:]) for c in EVERY))


@functools.cache
def weights(model):
    return loud(model)


def segment_rows(*rows):
    return jnp.asarray(np.array(rows, np.int32))


def places_of(segment):
    """Places whose documents have a first part of two tokens."""
    at = places(segment)
    return at._replace(part=(at.position >= 2).astype(jnp.int32))


def memory_of(model, params, text, segment):
    return model.encode(params, text[:, ::-1], places(segment[:, ::-1])).h if model.encodes else None


def run(model, params, text, segment, cache=None):
    return model.hidden(params, text, places_of(segment), None, cache, memory_of(model, params, text, segment))


def close(a, b, atol=2e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-4)


def test_every_part_and_every_pair_is_there():
    for i, (name, parts) in enumerate(FACTORS.items()):
        assert {c[i] for c in PAIRS} == set(parts), name
    found = set().union(*(set(itertools.combinations(enumerate(c), 2)) for c in EVERY))
    assert found == set().union(*(set(itertools.combinations(enumerate(c), 2)) for c in PAIRS))
    assert len(PAIRS) < len(EVERY) / 8


@cases(MODELS, ALL_MODELS)
def test_what_a_token_sees(family, position, mask, kernel):
    """Padding on either side and other documents of a packed row change nothing; nor does what comes later, under a
    causal mask; nor a later answer, under a prefix mask. All as rows of one batch."""
    model = checked(model_of(family, position, mask, kernel))
    params, text = weights(model), np.array(ids(1, T, seed=3))
    first, second = text[0, :6], text[0, 6:11]
    rows = np.zeros((5, T), np.int32)
    rows[0, :11] = text[0, :11]  # packed, then padding
    rows[1, :6], rows[2, T - 5 :] = first, second  # each alone, padded on the right, and on the left
    rows[3] = rows[0]
    rows[3, 5] = (rows[3, 5] + 1) % 29  # the last token of the first document, of its second part, is another
    rows[4] = rows[0]
    rows[4, 1] = (rows[4, 1] + 1) % 29  # a token of its first part is another
    segment = np.zeros((5, T), np.int32)
    segment[[0, 3, 4], :6], segment[[0, 3, 4], 6:11] = 1, 2
    segment[1, :6], segment[2, T - 5 :] = 1, 2
    source = np.where(segment == 0, 0, np.array(ids(1, T, seed=4))[0][:T])
    source[2, T - 5 :] = source[0, 6:11]
    with jax.disable_jit():
        memory = model.encode(params, jnp.asarray(source), places(jnp.asarray(segment))).h if model.encodes else None
        h = model.hidden(params, jnp.asarray(rows), places_of(jnp.asarray(segment)), memory=memory).h
    h = np.asarray(h)
    assert np.isfinite(h).all()
    close(h[0, :6], h[1, :6])
    close(h[0, 6:11], h[2, T - 5 :])
    if not model.sees_answers:
        close(h[3, :5], h[0, :5])
    if not model.sees_ahead:
        close(h[4, 0], h[0, 0])
    near = mask.span(T) < 6
    assert near or np.abs(h[4, 5] - h[0, 5]).max() > 1e-4  # the last token does see the second
    assert np.abs(h[3, 5] - h[0, 5]).max() > 1e-3


@cases(PAIRS)
def test_compiled_and_scanned_as_one_by_one(family, objective, position, mask, kernel):
    """The loss of the objective: layers in a compiled scan, against layers unrolled, operation by operation."""
    objective = objective.filled(SPECIAL, 29, T + 1)
    model = model_of(family, position, mask, kernel)
    segment = np.ones((3, T + 1), np.int32)
    segment[0, 7:], segment[1, 10:] = 2, 0
    batch = {"tokens": ids(3, T + 1, high=22), "segments": segment, "labels_x": jnp.array([0, 2, 1])}
    batch |= {"source": ids(3, T, seed=5, high=22), "source_segments": segment[:, :T]}
    example = _prepared(objective, {name: jnp.asarray(a) for name, a in batch.items()})
    params = weights(model)
    loss = lambda params, key: objective.loss(model, params, example, key)
    nats, weight, *_ = jax.jit(loss)(params, None)
    with jax.disable_jit():
        unrolled, same, *_ = loss(params, None)
    assert float(weight) == float(same) > 0 and np.isfinite(float(nats))
    close(nats, unrolled, 1e-3)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(objective, batch):
    return objective.prepare(batch, jax.random.key(1))


DECODERS = [c for c in MODELS if c[0] is not models.Encoder and not c[2].sees_answers]
ALL_DECODERS = [c for c in ALL_MODELS if c[0] is models.Decoder and not c[2].sees_answers]


@cases(DECODERS, ALL_DECODERS)
def test_cached_decoding_equals_the_full_pass(family, position, mask, kernel):
    """A ragged prefill that holds every first part, then token by token, then several at once; short rows have gaps."""
    model = model_of(family, position, mask, kernel)
    params, text = weights(model), ids(3, T)
    segment = (np.arange(T) < np.array([9, 13, 6])[:, None]).astype(np.int32)
    segment[2, 9:] = 1  # a short prompt, padding beside the longer ones, then its continuation
    position_ = jnp.where(segment > 0, jnp.cumsum(segment, 1) - 1, -1)
    at = Places(position_, jnp.asarray(segment), (position_ >= 2).astype(jnp.int32))
    with jax.disable_jit():
        source = ids(3, 5, seed=8), places(jnp.ones((3, 5), jnp.int32))
        memory = model.encode(params, *source).h if model.encodes else None
        full = model.hidden(params, text, at, memory=memory).h
        cache, outs, start = model.cache(3, T), [], 0
        for size in (9, 1, 1, 2):
            piece = slice(start, start + size)
            cut = jax.tree.map(lambda a, piece=piece: a[:, piece], at)
            h, cache, *_ = model.hidden(params, text[:, piece], cut, None, cache, memory)
            outs.append(h)
            start += size
    close(jnp.concatenate(outs, 1) * segment[..., None], full * segment[..., None], 1e-5)


def test_the_memory_is_needed():
    model = model_of(models.EncoderDecoder, positions.NoPosition(), masks.Causal(), kernels.Softmax())
    with pytest.raises(ValueError, match="need the memory that `encode` returns"):
        model.hidden(weights(model), ids(2, T), places(jnp.ones((2, T), jnp.int32)))


@pytest.mark.parametrize("mask", [masks.Causal(), masks.Prefix()], ids=NAMES)
def test_no_gradient_reaches_a_later_token(mask):
    """By gradient, through an encoder–decoder with every stream on, on weights that hide nothing."""
    model = model_of(models.EncoderDecoder, positions.RelativeBias(8, 6), mask, kernels.SoftCapped(2.0))
    params, at = weights(model), places_of(jnp.ones((1, T), jnp.int32))
    memory = model.encode(params, ids(1, 5), places(jnp.ones((1, 5), jnp.int32))).h

    def one_number(table):  # of the seventh token; each id is another, so that a row of the table is a place
        given = params | {"embedding": {"table": table}}
        return model.hidden(given, jnp.arange(T)[None], at, memory=memory)[0][0, 6, 3]

    size = jnp.abs(jax.jit(jax.grad(one_number))(params["embedding"]["table"])).sum(-1)
    assert (size[7:] == 0).all() and (size[2:7] > 1e-7).all() and (size[:2] > 1e-7).all()
