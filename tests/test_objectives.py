"""Objectives: what they hide, what they ask for, and their sums against NumPy."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder, totals

from jaxformer.config import Config, Data
from jaxformer.data.batches import Examples, PackedDocuments, RandomWindows
from jaxformer.data.tokenizers import Bytes
from jaxformer.learning.objectives import (
    Classification,
    Contrastive,
    Masked,
    NextToken,
    PrefixLM,
    SequenceToSequence,
    SpanCorruption,
)
from jaxformer.learning.rows import composition, same_texts
from jaxformer.model import heads
from jaxformer.model.layers import Out
from jaxformer.model.masks import Bidirectional, Either, Local, Prefix, Window
from jaxformer.model.models import Encoder, EncoderDecoder, Model
from jaxformer.run.plan import filled, recipe_of
from jaxformer.run.step import evaluate_batch
from jaxformer.spec import InputError

rng = np.random.default_rng(0)
B, T, V = 5, 13, 29


def close(a, b, atol=1e-4):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def draws(*shape):
    return rng.normal(size=shape).astype(np.float32)


def integers(low, high, *shape):
    return rng.integers(low, high, shape, dtype=np.int32)


def j(tree):
    return jax.tree.map(jnp.asarray, tree)


class Rows(Model):
    """A hidden state is a row of the table, and is itself the logits."""

    network = None

    def hidden(self, params, ids, at, key=None, cache=None, memory=None):
        h = params["table"][ids]
        return Out(h if memory is None else h + memory[:, None])

    def encode(self, params, ids, at, key=None):
        return Out((params["source_table"][ids] * (at.segment > 0)[..., None]).sum(1))

    def logits(self, params, h):
        return h


ROWS, TABLES = Rows(V, T, V), {"table": draws(V, V), "source_table": draws(V, V)}
LENGTHS = jnp.asarray(integers(1, 7, V))


def prepared(objective, batch, key=0):
    return objective.prepare(j(batch), jax.random.key(key))


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def cross_entropy(logits, targets, smoothing=0.0):
    target = (1 - smoothing) * np.eye(logits.shape[-1])[targets] + smoothing / logits.shape[-1]
    return -(target * log_softmax(logits)).sum(-1)


SEGMENTS = np.array(
    [[1] * 14, [1] * 5 + [2] * 6 + [0] * 3, [0] * 3 + [3] * 11, [4, 5] * 1 + [6] * 12, [0] * 14], np.int32
)


# --- next tokens, of one text or of two


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.03])
def test_next_token(smoothing, z_loss):
    """Nats of the next token of the same document; smoothing and z-loss are of the loss alone."""
    objective, tokens = NextToken(smoothing, z_loss), integers(0, V, B, T + 1)
    example = prepared(objective, {"tokens": tokens, "segments": SEGMENTS})
    logits, targets = TABLES["table"][tokens[:, :-1]], tokens[:, 1:]
    weights = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)
    nats = cross_entropy(logits, targets, smoothing) + z_loss * np.log(np.exp(logits).sum(-1)) ** 2
    plain, weight, total = totals(objective.loss(ROWS, j(TABLES), example, None))
    close(total, (nats * weights).sum(), 1e-3)
    close(plain, (cross_entropy(logits, targets) * weights).sum(), 1e-3)
    assert weight == weights.sum() and bool(total != plain) == (smoothing > 0 or z_loss > 0)
    sums = objective.sums(ROWS, j(TABLES), example, LENGTHS)
    close(sums["nats"], (cross_entropy(logits, targets) * weights).sum(), 1e-3)
    assert sums["bytes"] == (np.asarray(LENGTHS)[targets] * weights).sum() and sums["weight"] == weights.sum()


def test_nats_of_chunks_are_those_of_the_whole():
    """Of hidden states and of the example, any stretch of the rows' places, with smoothing and z-loss."""
    objective = NextToken(0.2, 0.03)
    example = prepared(objective, {"tokens": integers(0, V, B, T + 1), "segments": SEGMENTS})
    h = ROWS.hidden(j(TABLES), example.ids, example.at).h
    whole = objective.nats(ROWS, j(TABLES), h, example, None)
    cut = lambda first, last: jax.tree.map(lambda a: a[:, first:last], (h, example))
    parts = [objective.nats(ROWS, j(TABLES), *cut(*ends), None) for ends in ((0, 5), (5, T))]
    for name in ("plain", "total", "right"):
        close(np.concatenate([getattr(part, name) for part in parts], 1), getattr(whole, name), 1e-5)


def test_sequence_to_sequence():
    """`exact` counts the texts each of whose tokens is the likeliest; rows of padding are no texts."""
    source, tokens = integers(0, V, B, 7), integers(0, V, B, T + 1)
    source_segments = np.array([[1] * 7, [1] * 3 + [0] * 4, [1] * 7, [1] * 7, [0] * 7], np.int32)
    segments = np.repeat([[1], [1], [1], [1], [0]], T + 1, 1).astype(np.int32)
    segments[2, 4:] = 0
    memory = (TABLES["source_table"][source] * (source_segments > 0)[..., None]).sum(1)
    for b in (0, 2):  # texts that follow greedily; the second one for as long as it lasts
        for t in range(T):
            tokens[b, t + 1] = (TABLES["table"][tokens[b, t]] + memory[b]).argmax()
    tokens[0, 8] = (tokens[0, 8] + 1) % V  # but for one token, and what follows from it
    tokens[2, 4:] = 0
    batch = {"source": source, "source_segments": source_segments, "tokens": tokens, "segments": segments}
    objective = SequenceToSequence()
    example = prepared(objective, batch)
    sums = objective.sums(ROWS, j(TABLES), example, LENGTHS)
    logits = TABLES["table"][tokens[:, :-1]] + memory[:, None]
    weights = (segments[:, 1:] > 0) & (segments[:, :-1] > 0)
    close(sums["nats"], (cross_entropy(logits, tokens[:, 1:]) * weights).sum(), 1e-2)
    assert sums["exact"] == 1 and sums["texts"] == 4 and sums["weight"] == weights.sum()
    assert objective.summary({n: float(x) for n, x in sums.items()})["exact"] == 0.25


def test_prefix_lm_by_chance():
    """The second part begins at any place of a document but its first, all equally likely."""
    n = 4000
    segments = np.repeat(np.array([[1] * 5 + [2] * 8 + [3] * 1]), n, 0).astype(np.int32)
    example = prepared(PrefixLM(), {"tokens": integers(0, V, n, T + 1), "segments": segments})
    parts, weights = np.asarray(example.at.part), np.asarray(example.weights)
    expected = (segments[:, 1:] == segments[:, :-1]).astype(np.float32)  # of the next token
    expected[:, :-1] *= parts[:, 1:]
    assert np.array_equal(weights[:, :-1], expected[:, :-1])
    assert (weights[:, [4, 12]] == 0).all()  # a document's first token is never predicted
    for first, last in ((0, 5), (5, 13)):
        own = parts[:, first:last]
        assert (np.diff(own, axis=1) >= 0).all() and (own[:, 0] == 0).all() and (own[:, -1] == 1).all()
        share = np.bincount((own == 0).sum(1), minlength=last - first)[1:] / n
        close(share, 1 / (last - first - 1), 0.03)


def test_prefix_lm_with_given_parts():
    parts = (np.arange(T + 1) > np.array([3, 4, 5, 6, 7])[:, None]).astype(np.int32)
    example = prepared(PrefixLM(), {"tokens": integers(0, V, B, T + 1), "segments": SEGMENTS, "parts": parts})
    inside = (SEGMENTS[:, 1:] == SEGMENTS[:, :-1]) & (SEGMENTS[:, 1:] > 0)
    assert np.array_equal(example.weights, inside * parts[:, 1:]) and np.array_equal(example.at.part, parts[:, :-1])


# --- masked tokens


@pytest.mark.parametrize("special", [(0, 5, 7, 28), (28, 7, 0, 5)], ids=["rising", "in any order"])
def test_masked(special):
    """15 %: of those 80 % the mask, 10 % any ordinary token, 10 % as they are; special ids and padding never."""
    objective, rows = Masked(share=0.15, mask=5, special=special, vocab_size=V), 4001
    tokens, segments = integers(0, V, rows, 211), np.ones((rows, 211), np.int32)
    segments[:, 190:] = 0
    example = prepared(objective, {"tokens": tokens, "segments": segments})
    ids, chosen = np.asarray(example.ids), np.asarray(example.weights) > 0
    ordinary = ~np.isin(tokens, special) & (segments > 0)
    assert np.array_equal(example.targets, tokens) and np.array_equal(ids[~chosen], tokens[~chosen])
    assert set(np.unique(example.weights)) == {0, 1} and not (chosen & ~ordinary).any()
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.005)
    new, old = ids[chosen], tokens[chosen]
    assert (new == 5).mean() == pytest.approx(0.8, abs=0.01)
    other = new[(new != 5) & (new != old)]  # a random token is the old one now and then
    assert len(other) / len(new) == pytest.approx(0.1 * 24 / 25, abs=0.01)
    share = np.bincount(other, minlength=V) / len(other)
    assert (share[list(special)] == 0).all()
    close(np.delete(share, special), 1 / 25, 0.012)
    assert not np.array_equal(ids, prepared(objective, {"tokens": tokens, "segments": segments}, key=1).ids)


def test_masked_takes_the_tokenizers_ids():
    special = {"mask": (5,), "start": (7,), "pad": (), "sentinels": (28, 0)}
    assert Masked().filled(special, V, T) == Masked(mask=5, special=(0, 5, 7, 28), vocab_size=V)
    assert Masked(mask=3, special=(1, 3), vocab_size=V).filled(special, V, T) == Masked(
        mask=3, special=(1, 3), vocab_size=V
    )
    with pytest.raises(ValueError, match="needs a mask token"):
        Masked().filled(special | {"mask": ()}, V, T)
    with pytest.raises(ValueError, match=r"objective.special=\(0, 1, 2\) are all ids; leave one out"):
        Masked(special=(0, 2)).filled(special | {"mask": (1,)}, 3, T)
    assert Masked(special=(0, 2)).filled(special | {"mask": (1,)}, 4, T).special == (0, 1, 2)


def test_sums_of_masked_tokens():
    objective = Masked(mask=5, special=(5,), vocab_size=V, share=0.4)
    tokens = integers(0, V, B, T)
    example = prepared(objective, {"tokens": tokens})
    logits, weights = TABLES["table"][np.asarray(example.ids)], np.asarray(example.weights)
    sums = objective.sums(ROWS, j(TABLES), example, LENGTHS)
    close(sums["nats"], (cross_entropy(logits, tokens) * weights).sum(), 1e-3)
    assert sums["right"] == ((logits.argmax(-1) == tokens) * weights).sum() and sums["weight"] == weights.sum() > 0


# --- missing spans

START, END, INNER, SENTINELS = 100, 101, 102, tuple(range(220, 102, -1))


def spans_missing(density=0.15, mean_span=3.0, several=True, sentinels=SENTINELS):
    return SpanCorruption(
        density=density, mean_span=mean_span, sentinels=sentinels, start=START, end=END, several=several
    )


@functools.partial(jax.jit, static_argnums=0)
def corrupted(objective, tokens, segments, key):
    return objective.prepare({"tokens": tokens, "segments": segments}, key)


def spans_of(example, row):
    """Document → source and target: {id: (list, list)}. All but a target's start must be predicted, nothing else."""
    source, of_source = (np.asarray(a)[row] for a in (example.source.ids, example.source.at.segment))
    ids, of_ids, targets, weights = (
        np.asarray(a)[row] for a in (example.ids, example.at.segment, example.targets, example.weights)
    )
    found = {}
    for s in np.unique(of_source[of_source > 0]):
        own = (of_ids == s) & (weights > 0)
        target = [*ids[of_ids == s][:1], *targets[own]]
        assert set(np.unique(weights)) <= {0, 1} and list(ids[own]) == target[:-1]
        assert (np.diff(np.flatnonzero(of_source == s)) == 1).all()
        found[int(s)] = source[of_source == s].tolist(), [int(i) for i in target]
    assert (weights[of_ids == 0] == 0).all() and set(np.unique(of_ids)) - {0} <= set(found)
    return found


def rebuilt(source, target):
    """The text, its number of missing tokens and of spans."""
    if not target:
        assert not set(source) & set(SENTINELS)
        return source, 0, 0
    assert target[0] == START and target[-1] == END and START not in source and END not in source
    marks = [i for i in target if i in SENTINELS]
    assert marks == list(SENTINELS[: len(marks)]) == [i for i in source if i in SENTINELS]
    missing, span = {}, []
    for i in target[1:-1]:
        if i in SENTINELS:
            span = missing[i] = []
        else:
            span.append(i)
    assert all(missing.values())  # no span is empty
    return [t for i in source for t in missing.get(i, [i])], len(target) - 2 - len(marks), len(marks)


WIDTH = 61
ROWS_OF_SPANS = [  # lengths of documents; the rest of the row is padding
    [61],
    [40],
    [20, 30],
    [7, 1, 2, 50],
    [1],
    [2],
    [3],
    [],
]


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 2.0), (0.3, 1.0), (0.9, 30.0)])
def test_span_corruption_can_be_undone(density, mean_span):
    """Each text is that of its source, its target's spans in place of the sentinels."""
    objective = spans_missing(density, mean_span)
    tokens, segments = integers(0, 97, 8, WIDTH), np.zeros((8, WIDTH), np.int32)
    for row, lengths in enumerate(ROWS_OF_SPANS):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, 1 + len(lengths)), lengths)
    segments[1] = np.roll(segments[1], 9)  # padding on both sides
    for key in range(20):
        example = corrupted(objective, jnp.asarray(tokens), jnp.asarray(segments), jax.random.key(key))
        for row, lengths in enumerate(ROWS_OF_SPANS):
            found, n, counts = spans_of(example, row), sum(lengths), np.zeros(2, int)
            for s in range(1, 1 + len(lengths)):
                text, *more = rebuilt(*found[s])
                assert text == tokens[row, segments[row] == s].tolist(), (key, row, s)
                counts += more
            missing, spans = counts
            most = n if len(lengths) > 1 else n - 1  # the first token of one text stays
            assert missing in (int(n * density), min(int(n * density) + 1, most)) if n else missing == 0
            drawn = min(max(round(missing / mean_span), 1), max(n - missing, 1)) if missing else 0
            if len(lengths) > 1:  # cut between documents, and where the row ends
                assert drawn <= spans <= drawn + len(lengths)
            else:
                assert spans == drawn


def packed(lengths):
    return np.repeat(np.arange(1, 1 + len(lengths), dtype=np.int32), lengths)


@pytest.mark.parametrize(
    ("density", "mean_span", "lengths"),
    [
        (0.15, 3.0, [50, 30, 48]),
        (0.15, 3.0, [3, 1, 2, 5, 8, 1, 13, 21, 40]),
        (0.02, 3.0, [20, 5]),
        (0.7, 2.0, [1, 1, 4, 2]),
        (0.9, 30.0, [1, 1]),
    ],
)
def test_every_document_misses_its_share(density, mean_span, lengths):
    """Chi-square over documents, of what is asked for of each; and the share of the whole row, more exactly."""
    rows, segments = 6000, packed(lengths)
    tokens = np.broadcast_to(integers(0, 97, 1, len(segments)), (rows, len(segments)))
    example = corrupted(spans_missing(density, mean_span), tokens, np.broadcast_to(segments, tokens.shape), KEY)
    asked = (np.asarray(example.weights) > 0) & (np.asarray(example.targets) < 97)
    of = np.asarray(example.at.segment)
    counts = np.stack([(asked & (of == s)).sum(1) for s in range(1, 1 + len(lengths))], 1)
    z = (counts.mean(0) - density * np.array(lengths)) / (counts.std(0) / rows**0.5)
    assert (z**2).sum() < len(lengths) + 4 * (2 * len(lengths)) ** 0.5, z
    assert counts.sum(1).mean() == pytest.approx(density * len(segments), abs=3 * 0.5 / rows**0.5)


KEY = jax.random.key(3)


@pytest.mark.parametrize("several", [False, True])
def test_every_token_is_as_likely_to_be_missing(several):
    """In rows of several documents; of one, the first stays. The number is right in the mean."""
    objective, free = SpanCorruption(density=0.27, mean_span=2.0), jnp.ones(11, bool)
    draw = jax.jit(jax.vmap(lambda key: objective.spans(key, free, jnp.bool_(several))))
    share = np.asarray(draw(jax.random.split(KEY, 20_000))).mean(0)
    assert share.mean() == pytest.approx(0.27, abs=0.001)
    if several:
        close(share, 0.27, 0.012)
    else:
        assert share[0] == 0 and share[-1] == 1  # and ends with a span, as T5


@pytest.mark.parametrize(("density", "mean_span"), [(0.15, 3.0), (0.5, 1.0), (0.93, 3.0)])
@pytest.mark.parametrize("lengths", [[2], [20], [61], [3] * 20, [1] * 37, [60, 1], [30, 1, 30]])
def test_nothing_is_lost_in_the_targets(density, mean_span, lengths):
    """In rows of one token each, where most is missing, where special ids cut spans: there is room for all of it."""
    several, n = len(lengths) > 1, sum(lengths)
    objective = spans_missing(density, mean_span, several, (*SENTINELS, INNER))
    tokens, segments, some = integers(0, 97, 30, n), packed(lengths), rng.random((30, n))
    tokens[10:20] = np.where(some[10:20] < 0.1, INNER, tokens[10:20])  # these stay where they are
    tokens[20:] = np.where((some[20:] < 0.4) | (np.arange(n) % 2 == 1), INNER, tokens[20:])
    segments = np.broadcast_to(segments, tokens.shape)
    for key in range(4):
        example = corrupted(objective, tokens, segments, jax.random.key(key))
        assert example.targets.shape[1] == objective.target_width(n) - 1
        position, real = np.asarray(example.at.position), np.asarray(example.at.segment) > 0
        assert position[real].max(initial=0) < objective.longest_target(n)
        for row in range(30):
            found, free, counts = spans_of(example, row), (tokens[row] != INNER).sum(), 0
            for s in range(1, 1 + len(lengths)):
                text, missing, _ = rebuilt(*found[s])
                assert text == tokens[row, segments[row] == s].tolist()
                counts += missing
            documents = len({int(s) for s in segments[row][tokens[row] != INNER]})
            whole = free if documents > 1 else max(free - 1, 0)
            assert counts in {min(int(free * density) + more, whole) for more in (0, 1)}


def test_targets_are_no_wider_than_need_be():
    """There are rows that fill them."""
    for several, lengths, missing in ((False, [40], 20), (True, [1] * 40, 20)):
        objective = spans_missing(0.5, 1.0, several)
        tokens, segments = integers(0, 97, 9, 40), np.broadcast_to(packed(lengths), (9, 40))
        example = corrupted(objective, tokens, segments, KEY)
        width = 4 * missing if several else 2 * missing + 2
        assert example.ids.shape[1] == width - 1 and (np.asarray(example.at.segment) > 0).all()


def test_special_tokens_are_never_missing():
    objective = spans_missing(0.5, several=False)
    tokens = integers(0, 97, 41, 31)
    tokens[:, 0], tokens[:, -1], tokens[:, 7] = START, END, SENTINELS[3]
    example = corrupted(objective, jnp.asarray(tokens), jnp.ones((41, 31), jnp.int32), jax.random.key(0))
    source = np.asarray(example.source.ids)
    assert (source[:, 0] == START).all() and ((source == END).sum(1) == 1).all()
    assert (np.asarray(example.targets) == START).sum() == 0  # it begins the targets, and comes from no text


def test_a_text_beside_special_ids_alone_is_one_text():
    """Its first token stays: of the other document nothing can be missing."""
    tokens = integers(0, 97, 50, 21)
    tokens[:, -1] = END
    example = corrupted(spans_missing(0.5), tokens, np.broadcast_to(packed([20, 1]), tokens.shape), KEY)
    assert np.array_equal(example.source.ids[:, 0], tokens[:, 0])


def test_spans_have_all_lengths_equally_often():
    """Three of six tokens in two spans: kept and lost are 1 + 2 or 2 + 1 each. The first token stays."""
    objective = SpanCorruption(density=0.5, mean_span=1.5)
    free = jnp.asarray([True, False, *[True] * 5, False])
    masks = jax.jit(jax.vmap(lambda key: objective.spans(key, free, jnp.bool_(False))))(
        jax.random.split(jax.random.key(0), 4000)
    )
    patterns, counts = np.unique(np.asarray(masks)[:, np.asarray(free)], axis=0, return_counts=True)
    assert not np.asarray(masks)[:, ~np.asarray(free)].any()
    assert ["".join("x" if m else "." for m in p) for p in patterns] == ["..x.xx", "..xx.x", ".x..xx", ".xx..x"]
    close(counts / 4000, 0.25, 0.03)


def test_composition():
    """All 15 ways in which 3 lengths add up to 7, equally often; zeros behind them."""
    draw = jax.vmap(lambda key: composition(key, jnp.int32(7), jnp.int32(3), 11))
    lengths = np.asarray(jax.jit(draw)(jax.random.split(jax.random.key(0), 6000)))
    ways, counts = np.unique(lengths, axis=0, return_counts=True)
    assert len(ways) == 15 and (ways.sum(1) == 7).all() and (ways[:, :3] > 0).all() and not ways[:, 3:].any()
    close(counts / 6000, 1 / 15, 0.015)
    assert not composition(KEY, jnp.int32(0), jnp.int32(1), 11).any()


def test_sentinels_run_out():
    """The last one stands for all further spans."""
    objective = spans_missing(0.5, 1.0, False, SENTINELS[:2])
    example = corrupted(objective, integers(0, 97, 1, 41), np.ones((1, 41), np.int32), jax.random.key(0))
    marks = [i for i in example.source.ids[0].tolist() if i in SENTINELS]
    assert marks[:2] == list(SENTINELS[:2]) and set(marks[2:]) == {SENTINELS[1]} and len(marks) == 20


SPECIAL = {"sentinels": SENTINELS, "start": (START,), "end": (END,)}


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("density", "mean_span"), [(0.5, 1.0), (0.75, 3.0), (0.8, 3.0), (0.9, 8.0)])
def test_targets_that_the_model_cannot_read_are_refused(density, mean_span, several):
    """By name, value, rule, remedy; with longer spans they can be read."""
    name = rf"objective.density={density} and objective.mean_span={mean_span} make targets of 66 tokens from rows of 64"
    with pytest.raises(ValueError, match=rf"{name}, more than data.window=64 .* or a larger mean_span"):
        SpanCorruption(density=density, mean_span=mean_span).filled(SPECIAL, 300, 64, several)
    fit = SpanCorruption(density=density, mean_span=4 * mean_span).filled(SPECIAL, 300, 64, several)
    assert fit.several == several and fit.longest_target(64) <= 65


@pytest.mark.parametrize(("several", "lengths"), [(False, [64]), (True, [2, 62])])
@pytest.mark.parametrize(("density", "mean_span"), [(0.3, 1.0), (0.8, 8.0)])
def test_as_many_sentinels_as_a_text_may_need(density, mean_span, several, lengths):
    """With one fewer they are refused; with just these none stands for two spans."""
    objective = SpanCorruption(density=density, mean_span=mean_span, several=several)
    n = objective.most_spans(64)
    with pytest.raises(ValueError, match=f"has {n - 1} sentinels, but up to {n} spans .*sentinels={n}, or a larger"):
        objective.filled(SPECIAL | {"sentinels": SENTINELS[: n - 1]}, 300, 64, several)
    filled = objective.filled(SPECIAL | {"sentinels": SENTINELS[:n]}, 300, 64, several)
    tokens = integers(0, 97, 700, 64)
    source = np.asarray(corrupted(filled, tokens, np.broadcast_to(packed(lengths), tokens.shape), KEY).source.ids)
    assert (source == SENTINELS[n - 1]).sum(1).max() == 1


def test_a_sentinel_stands_for_nothing_else():
    for twice in (SENTINELS[3], START, END):
        with pytest.raises(ValueError, match=rf"objective.sentinels=.*, {twice}\) must differ, and none be the start"):
            SpanCorruption(sentinels=(*SENTINELS, twice)).filled(SPECIAL, 300, 64)
    shared = SPECIAL | {"end": (START,)}
    assert SpanCorruption().filled(shared, 300, 64).end == START
    with pytest.raises(ValueError, match="must differ"):
        SpanCorruption(sentinels=(*SENTINELS, START)).filled(shared, 300, 64)


def test_whether_rows_hold_several_documents_is_the_samplings():
    model = EncoderDecoder(n_layers=1, n_heads=1, d_model=2, context_length=61)
    tokenizer = Bytes(end_token=True, sentinels=20)
    for sampling, several in ((RandomWindows(), False), (Examples(), False), (PackedDocuments(), True)):
        config = Config("run", model, Data(sampling=sampling), SpanCorruption())
        assert recipe_of(config, tokenizer, {}).objective.several is several  # pyright: ignore
    with pytest.raises(InputError, match=r"objective.several=False must be True: rows of data.sampling hold several"):
        recipe_of(dataclasses.replace(config, objective=SpanCorruption(several=False)), tokenizer, {})


# --- classes


def classifier(*own):
    return dataclasses.replace(ROWS, head=own)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_by_two_heads(smoothing):
    """Each head's mean over the texts, times their number; a row of padding counts nothing."""
    own = heads.ClassificationHead("tone", tuple("abc")), heads.BinaryHead("kind", tuple("ab"), heads.LastToken())
    model, objective = classifier(*own), Classification(smoothing)
    params = TABLES | {
        "head_classes_of_tone": {"kernel": draws(V, 3), "bias": draws(3)},
        "head_classes_of_kind": {"kernel": draws(V, 1), "bias": draws(1)},
    }
    tokens, labels = integers(0, V, B, T), {"tone": integers(0, 3, B), "kind": integers(0, 2, B)}
    segments = (np.arange(T) < np.array([13, 5, 1, 0, 7])[:, None]).astype(np.int32)
    batch = {"tokens": tokens, "segments": segments} | {f"labels_{n}": y for n, y in labels.items()}
    real = [b for b in range(B) if b != 3]
    texts = [TABLES["table"][tokens[b, segments[b] > 0]] for b in real]
    logits = {}
    for name, pooled in (("tone", [t.mean(0) for t in texts]), ("kind", [t[-1] for t in texts])):
        p = params[f"head_classes_of_{name}"]
        logits[name] = np.stack(pooled) @ p["kernel"] + p["bias"]
    logits["kind"] = np.pad(logits["kind"], ((0, 0), (1, 0)))  # of two classes, the first one's is 0
    example = prepared(objective, batch)
    plain, weight, total = totals(objective.loss(model, j(params), example, None))
    nats = {n: cross_entropy(z, labels[n][real], smoothing).sum() for n, z in logits.items()}
    if smoothing:  # of the sigmoid, which is the softmax of 0 and its logit
        assert nats["kind"] != pytest.approx(cross_entropy(logits["kind"], labels["kind"][real]).sum())
    close(total, sum(nats.values()))
    close(plain, sum(cross_entropy(z, labels[n][real]).sum() for n, z in logits.items()))
    assert weight == 4
    sums = {n: float(x) for n, x in objective.sums(model, j(params), example, LENGTHS).items()}
    summary = objective.summary(sums)
    right = {n: (z.argmax(1) == labels[n][real]).mean() for n, z in logits.items()}
    close(summary["loss"], sum(cross_entropy(z, labels[n][real]).mean() for n, z in logits.items()))
    close([summary["accuracy_tone"], summary["accuracy_kind"]], [right["tone"], right["kind"]])
    assert summary["examples"] == 4 and summary["accuracy"] == pytest.approx(np.mean(list(right.values())))


def test_classification_of_tokens():
    """Tokens without a label, and padding, count nothing; each text counts as one."""
    model, objective = classifier(heads.TokenClassificationHead("tag", tuple("abc"))), Classification()
    p = {"kernel": draws(V, 3), "bias": draws(3)}
    tokens, labels, segments = integers(0, V, B, T), integers(-1, 3, B, T), SEGMENTS[:, :T]
    example = prepared(objective, {"tokens": tokens, "segments": segments, "labels_tag": labels})
    params = j(TABLES | {"head_classes_of_tag": p})
    chosen = (segments > 0) & (labels >= 0)
    logits = (TABLES["table"][tokens] @ p["kernel"] + p["bias"])[chosen]
    nats = cross_entropy(logits, labels[chosen])
    plain, weight, total = totals(objective.loss(model, params, example, None))
    assert plain == total
    rows = np.nonzero(chosen)[0]
    close(total / weight, sum(nats[rows == row].mean() for row in set(rows)) / (segments > 0).any(1).sum())
    sums = objective.sums(model, params, example, LENGTHS)
    close(sums["nats of tag"], nats.sum(), 1e-3)
    assert sums["weight of tag"] == chosen.sum() and sums["right of tag"] == (logits.argmax(1) == labels[chosen]).sum()


def test_texts_without_a_label_count_nothing():
    model, objective = classifier(heads.ClassificationHead("tone", tuple("abc"))), Classification()
    params = j(TABLES | {"head_classes_of_tone": {"kernel": draws(V, 3), "bias": draws(3)}})
    batch = {"tokens": integers(0, V, B, T), "labels_tone": np.array([2, -1, 0, 1, -1], np.int32)}
    some = {n: a[[0, 2, 3]] for n, a in batch.items()}
    ratio = lambda batch: np.divide(*objective.loss(model, params, prepared(objective, batch), None)[:2])
    close(ratio(batch), ratio(some))
    sums = objective.sums(model, params, prepared(objective, batch), LENGTHS)
    assert sums["weight of tone"] == sums["weight"] == 3


def test_texts_with_a_label_of_one_column_count():
    """Of several classes a text is known where all are told, of tokens where one is."""
    tone, tags, tag = (
        head("x", tuple("abc"))
        for head in (heads.ClassificationHead, heads.MultiLabelHead, heads.TokenClassificationHead)
    )
    tone, tags, tag = (dataclasses.replace(h, column=n) for h, n in ((tone, "tone"), (tags, "tags"), (tag, "tag")))
    model, objective = classifier(tone, tags, tag), Classification()
    params = j(
        TABLES | {f"head_classes_of_{n}": {"kernel": draws(V, 3), "bias": draws(3)} for n in ("tone", "tags", "tag")}
    )
    labels = {"tone": np.full(B, -1), "tags": np.full((B, 3), -1), "tag": np.full((B, T), -1)}
    labels["tone"][0], labels["tags"][1], labels["tags"][2, 0], labels["tag"][3, 1] = 2, 1, 1, 0
    labels["tag"][4, 9] = 1  # of padding
    segments = (np.arange(T) < 7).astype(np.int32) * np.ones((B, 1), np.int32)
    batch = {"tokens": integers(0, V, B, T), "segments": segments} | {f"labels_{n}": y for n, y in labels.items()}
    assert objective.sums(model, params, prepared(objective, batch), LENGTHS)["weight"] == 3


# --- pairs

EMBEDS = dataclasses.replace(ROWS, head=heads.EmbeddingHead())


def pairs(n):
    source, tokens = integers(0, V, n, 7), integers(0, V, n, T)
    return {"source": source, "source_segments": 0 * source + 1, "tokens": tokens, "segments": 0 * tokens + 1}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_contrastive(smoothing):
    """The mean of both directions' cross-entropies of the pairs among all, of cosines over the temperature."""
    objective, batch = Contrastive(smoothing, temperature=0.3), pairs(B)
    vectors = [TABLES["table"][batch[n]].mean(1) for n in ("source", "tokens")]
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in vectors)
    scores = a @ b.T / 0.3
    nats = lambda smoothing: (
        cross_entropy(scores, np.arange(B), smoothing) + cross_entropy(scores.T, np.arange(B), smoothing)
    ).sum()
    example = prepared(objective, batch)
    plain, weight, total = totals(objective.loss(EMBEDS, j(TABLES), example, None))
    long = dataclasses.replace(EMBEDS, head=heads.EmbeddingHead(unit=False))
    close(totals(objective.loss(long, j(TABLES), example, None)), [plain, weight, total])
    close([total, plain], [nats(smoothing) / 2, nats(0) / 2])
    sums = objective.sums(EMBEDS, j(TABLES), example, LENGTHS)
    close(sums["nats"], nats(0) / 2)
    assert weight == B == sums["weight"] and sums["right"] == (scores.argmax(1) == np.arange(B)).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_padding_pairs_change_nothing(smoothing):
    """Neither loss, nor gradient, nor sums."""
    objective, batch = Contrastive(smoothing), pairs(B)
    for n in ("source_segments", "segments"):
        batch[n][[1, 4]] = 0
    some = {n: a[[0, 2, 3]] for n, a in batch.items()}
    outs = []
    for given in (batch, some):
        example = prepared(objective, given)
        value = lambda params, example=example: objective.loss(EMBEDS, params, example, None).minimised
        total, gradient = jax.value_and_grad(value)(j(TABLES))
        sums = objective.sums(EMBEDS, j(TABLES), example, LENGTHS)
        outs.append([total, gradient["table"], *sums.values()])
    for padded, alone in zip(*outs, strict=True):
        close(padded, alone, 1e-3)


def test_the_last_pairs_of_an_evaluation_are_told_from_as_many_others():
    """From those of the batch before, which count but once; where none is as wide, from their own batch's."""
    objective, first, last = Contrastive(), pairs(B), pairs(B)
    for array in last.values():
        array[1:] = 0
    wide = {n: np.pad(a, ((0, 0), (0, 2))) for n, a in last.items()}
    both = {n: np.concatenate([last[n][:1], a[1:]]) for n, a in first.items()}
    recipe = SimpleNamespace(objective=objective, model=EMBEDS, cast=lambda params: params)
    sums = lambda batch: evaluate_batch.__wrapped__(recipe, j(TABLES), j(batch), 0, LENGTHS)
    expected = sums(both | {"counted": np.arange(B) == 0})
    assert sums(both)["nats"] > expected["nats"] > 0
    found = [sums(batch) for batch in filled([first, last, wide])]
    assert [each["weight"] for each in found] == [B, 1, 1] and found[2]["nats"] == 0
    close([found[0]["nats"], found[1]["nats"]], [sums(first)["nats"], expected["nats"]])


def test_same_texts():
    """Of the same tokens in the same places; what padding holds does not count."""
    ids = np.array([[5, 7, 0], [5, 7, 9], [5, 7, 0], [5, 8, 0], [0, 5, 7]])
    segments = np.array([[1, 1, 0], [1, 1, 0], [1, 1, 1], [1, 1, 0], [0, 1, 1]])
    expected = np.eye(5, dtype=bool)
    expected[0, 1] = expected[1, 0] = True
    assert np.array_equal(same_texts(jnp.asarray(ids), jnp.asarray(segments)), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_duplicates_are_no_negatives(smoothing):
    """Against loops over the pairs: equal first texts, equal second ones, a pair twice, and padding."""
    n, objective = 7, Contrastive(smoothing, temperature=0.4)
    batch = pairs(n)
    batch["source"][3], batch["tokens"][4] = batch["source"][1], batch["tokens"][0]
    for name in ("source", "tokens"):
        batch[name][6] = batch[name][2]
    batch["segments"][[0, 4], -3:] = 0  # equal but for what the padding holds
    batch["tokens"][4, -3:] = (batch["tokens"][0, -3:] + 1) % V
    for name in ("source_segments", "segments"):
        batch[name][5] = 0
    same = {(1, 3), (0, 4), (2, 6)}
    real = [i for i in range(n) if i != 5]
    vectors = {}
    for name, own in (("source", "source_segments"), ("tokens", "segments")):
        mean = np.stack([TABLES["table"][batch[name][i]][batch[own][i] > 0].mean(0) for i in real])
        vectors[name] = dict(zip(real, mean / np.linalg.norm(mean, axis=1, keepdims=True), strict=True))
    total = plain = right = 0
    for a, b in (("source", "tokens"), ("tokens", "source")):
        for i in real:
            choices = [k for k in real if not {(i, k), (k, i)} & same]
            scores = np.array([vectors[a][i] @ vectors[b][k] / 0.4 for k in choices])
            own = choices.index(i)
            total += cross_entropy(scores[None], [own], smoothing)[0] / 2
            plain += cross_entropy(scores[None], [own])[0] / 2
            right += (scores.argmax() == own) * (a == "source")
    example = prepared(objective, batch)
    aside, weight, found = totals(objective.loss(EMBEDS, j(TABLES), example, None))
    close([found, aside], [total, plain])
    sums = objective.sums(EMBEDS, j(TABLES), example, LENGTHS)
    close(sums["nats"], plain)
    assert weight == sums["weight"] == 6 and sums["right"] == right


def test_a_perfect_encoder_has_no_loss():
    """Twelve questions about three cities, each question's vector its city's."""
    city = np.arange(12) % 3
    table = np.eye(V, dtype=np.float32)[np.r_[np.arange(12) % 3, :3, [0] * (V - 15)]]
    batch = {"source": np.arange(12, dtype=np.int32)[:, None], "tokens": (12 + city).astype(np.int32)[:, None]}
    batch |= {"source_segments": np.ones((12, 1), np.int32), "segments": np.ones((12, 1), np.int32)}
    objective = Contrastive()
    example, params = prepared(objective, batch), j({"table": table})
    _, weight, total = totals(objective.loss(EMBEDS, params, example, None))
    summary = objective.summary({n: float(x) for n, x in objective.sums(EMBEDS, params, example, LENGTHS).items()})
    assert float(total) / float(weight) < 1e-6 and summary["loss"] < 1e-6 and summary["accuracy"] == 1


# --- which models they take

SIZES = {"d_model": 12, "context_length": T, "vocab_size": V}
MODELS = {
    "decoder": decoder(),
    "prefix": decoder(mask=Prefix()),
    "leaky prefix": decoder(mask=Either((Prefix(), Local(3)))),
    "windows": decoder(mask=Window(3)),
    "both ways": decoder(mask=Bidirectional()),
    "encoder": Encoder(**SIZES),
    "pair": EncoderDecoder(**SIZES),
    "pair that sees ahead": EncoderDecoder(**SIZES, mask=Bidirectional()),
}


@pytest.mark.parametrize(
    ("objective", "fit"),
    [
        (NextToken(), {"decoder", "windows"}),
        (PrefixLM(), {"decoder", "windows", "prefix"}),
        (Masked(), {"encoder", "both ways", "prefix", "leaky prefix"}),
        (SequenceToSequence(), {"pair"}),
        (SpanCorruption(), {"pair"}),
        (Classification(), set()),
        (Contrastive(), set()),
    ],
    ids=lambda o: type(o).__name__,
)
def test_objectives_refuse_models_that_see_the_answer(objective, fit):
    def takes(model):
        try:
            objective.check_model(model)
        except ValueError:
            return False
        return True

    assert {name for name, model in MODELS.items() if takes(model)} == fit
