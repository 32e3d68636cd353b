"""Decoding against the naive loop, and processors against NumPy."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import outside
import pytest
from tiny import decoder, generate, hidden, ids, log_softmax, loud

from jaxformer.generation import decode, logits_processors
from jaxformer.generation.decode import MANY, LeftToRight, Request, choose, row_keys
from jaxformer.generation.logits_processors import (
    LogitsProcessor,
    MinP,
    RepetitionPenalty,
    Temperature,
    Text,
    TopK,
    TopP,
)
from jaxformer.learning.objectives import NextToken, PrefixLM
from jaxformer.model import cache
from jaxformer.model.baselines import GRU, LSTM, Bigram
from jaxformer.model.heads import LanguageHead
from jaxformer.model.masks import Causal, Window, one_document
from jaxformer.model.models import Decoder, Embedding
from jaxformer.model.positions import Rotary

MODELS = [
    decoder(n_layers=2),
    decoder(n_layers=2, position=Rotary(), mask=(Window(4), Causal())),
    decoder(n_layers=2, position=outside.LearnedPace(), kernel=outside.SinkWithStatistic()),
]


def penalised(logits, said, penalty):
    """Of one text, as transformers has it."""
    logits = np.array(logits)
    for token in set(said):
        logits[token] = logits[token] * penalty if logits[token] < 0 else logits[token] / penalty
    return logits


def naive(model, params, prompt, tokens, row, seed, temperature, penalty=None):
    """Every token from a full pass. A text that fills the context goes on from its last half."""
    text, said = prompt[-model.context_length :], [*prompt]
    for t in range(tokens):
        if len(text) > model.context_length:
            text = text[-(model.context_length // 2) :]
        h, _ = hidden(model, params, jnp.array([text], jnp.int32), one_document(len(text)))
        uniform = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), row), t))
        logits = model.logits(params, h)[0, -1]
        logits = logits if penalty is None else jnp.asarray(penalised(logits, said, penalty))
        cold = int(logits.argmax()) if temperature == 0 else int(choose(uniform[None], logits[None] / temperature)[0])
        text.append(cold)
        said.append(text[-1])
        yield text[-1]


@pytest.mark.parametrize("model", MODELS, ids=["learned", "rotary, window", "outside"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_generation_equals_the_naive_loop(model, temperature):
    params = loud(model)
    prompts = [ids(3).tolist(), ids(5, seed=2).tolist(), ids(2, seed=3).tolist()]
    out = generate(model, params, prompts, 6, (Temperature(temperature),), 11)
    for row, prompt in enumerate(prompts):
        assert out[row].tolist() == list(naive(model, params, prompt, 6, row, 11, temperature))


@pytest.mark.parametrize("length", [1, 22, 23, 40])
def test_a_text_that_fills_the_context_goes_on_from_its_last_half(length):
    model = MODELS[0]
    params, prompt = loud(model), ids(length).tolist()
    out = generate(model, params, [prompt], 40, (Temperature(0.7),), 3)
    assert out[0].tolist() == list(naive(model, params, prompt, 40, 0, 3, 0.7))


@pytest.mark.parametrize("rows", [2, MANY])
def test_the_cache_grows_with_the_text(rows):
    """A text that passes every size of the cache has the probabilities of one full pass: with a window that rolls from
    the first size on, one that begins to in the second, and heads that share keys."""
    masks = Window(50), Window(100), Causal()
    model = decoder(n_layers=6, context_length=300, position=Rotary(), mask=masks, n_kv_heads=2, n_heads=6)
    params, prompts = loud(model), [ids(7).tolist(), ids(3).tolist()] * (rows // 2)
    request = Request(NextToken(), model, params, prompts, 290, row_keys(3, 0, rows))
    new, found = (np.concatenate(arrays, 1) for arrays in zip(*LeftToRight()(request), strict=True))
    h, _ = hidden(model, params, jnp.array([[*prompts[0], *new[0]]], jnp.int32), one_document(297))
    expected = log_softmax(model.logits(params, h)[0, 6:-1])[np.arange(290), new[0]]
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4)
    assert len({*new[0].tolist()}) > 5
    assert np.array_equal(generate(model, params, prompts, 70, (), 3, stretch=3), new[:, :70])


def test_places_are_kept_once_for_all_layers_of_a_kind():
    """To write one costs as much as to write keys."""
    model = decoder(n_layers=6, mask=(Window(4), Causal()))
    kept = [{name: {*slots} for name, slots in group.items()} for group in model.apart(model.cache(3, 11))]
    first, other = ({"block0": slots, "block1": slots} for slots in ({"k", "v", *cache.PLACE}, {"k", "v"}))
    assert kept == [first, other, other]


@pytest.mark.parametrize("model", [Bigram, GRU, LSTM, Decoder], ids=lambda model: model.__name__)
def test_what_a_cache_holds_besides_places_stays(model):
    """A state of each layer, or nothing: texts that are longer than the first size of the cache."""
    sizes = {"context_length": 90, "vocab_size": 29} | ({} if model is Bigram else {"d_model": 14, "n_layers": 1})
    model = model(**sizes, kernel=None, n_heads=2) if model is Decoder else model(**sizes)
    params, prompts = loud(model), [ids(7).tolist(), ids(3).tolist()]
    request = Request(NextToken(), model, params, prompts, 80, row_keys(3, 0, 2))
    new, found = (np.concatenate(arrays, 1) for arrays in zip(*LeftToRight()(request), strict=True))
    h, _ = hidden(model, params, jnp.array([[*prompts[0], *new[0]]], jnp.int32), one_document(87))
    expected = log_softmax(model.logits(params, h)[0, 6:-1])[np.arange(80), new[0]]
    np.testing.assert_allclose(found[0], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("objective", [NextToken(), PrefixLM()], ids=["one text", "a second"])
def test_what_is_drawn_has_the_token_type_of_training(objective):
    """That of the one text or, behind a prefix, of the second."""
    model = decoder(n_layers=1, embedding=Embedding(token_types=2))
    params, second = loud(model), isinstance(objective, PrefixLM)
    parts = params["embedding"]["parts"]
    other = {**params, "embedding": {**params["embedding"], "parts": parts.at[1].set(parts[1][::-1])}}
    drawn = [generate(model, own, [[1, 2, 3]], 12, objective=objective).tolist() for own in (params, other)]
    assert (drawn[0] != drawn[1]) == second
    assert drawn[0] != generate(model, params, [[1, 2, 3]], 12, objective=NextToken(), second=not second).tolist()


def test_a_repetition_penalty_is_of_the_whole_text():
    """Of what the model no longer sees, too; in stretches of any length; of each row apart."""
    model = MODELS[0]
    params, prompt = loud(model), ids(22).tolist()
    how = (RepetitionPenalty(1.7), Temperature(0.7))
    out = generate(model, params, [prompt], 40, how, 3)
    assert out[0].tolist() == list(naive(model, params, prompt, 40, 0, 3, 0.7, 1.7))
    assert out[0].tolist() != generate(model, params, [prompt], 40, how[1:], 3)[0].tolist()
    assert np.array_equal(generate(model, params, [prompt], 40, how, 3, stretch=7), out)


class NoRepeatedPair(LogitsProcessor):
    """A stranger's: no two tokens follow one another twice."""

    reads_text = True

    def __call__(self, logits, text=None):
        row, last = jnp.arange(len(logits))[:, None], text.real.sum(1) - 1
        again = (text.ids[:, :-1] == text.ids[row[:, 0], last][:, None]) & text.real[:, 1:]
        return logits.at[row, text.ids[:, 1:]].add(jnp.where(again, -jnp.inf, 0))


def test_a_strangers_processor_reads_the_text():
    model = MODELS[0]
    params, prompts = loud(model), [ids(22).tolist(), ids(3, seed=2).tolist()]
    pairs = lambda row: list(itertools.pairwise(row))
    for new, prompt in zip(generate(model, params, prompts, 40, (NoRepeatedPair(),)).tolist(), prompts, strict=True):
        found = pairs([*prompt, *new])[len(prompt) - 1 :]
        assert len(set(found)) == 40 and not set(found) & set(pairs(prompt))
    free = generate(model, params, prompts, 40)
    assert len({*pairs(free[0].tolist())}) < 39  # which the model would repeat


def test_log_probabilities_are_those_of_the_model():
    """Before any processor."""
    model = MODELS[0]
    params, prompt = loud(model), ids(4).tolist()
    how = (Temperature(0.5), TopK(3))
    request = Request(NextToken(), model, params, [prompt], 18, row_keys(3, 0, 1), how)
    drawn = list(LeftToRight()(request))
    new, found = (np.concatenate(arrays, 1)[0] for arrays in zip(*drawn, strict=True))
    h, _ = hidden(model, params, jnp.array([[*prompt, *new]], jnp.int32), one_document(22))
    expected = log_softmax(model.logits(params, h)[0, 3:-1])[np.arange(18), new]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_context_shorter_than_the_models():
    """A model trained on windows of 7 never saw more: what follows depends on at most 7 tokens."""
    model = MODELS[0]
    params, prompt = loud(model), ids(11).tolist()
    changed = [(prompt[0] + 1) % 29, *prompt[1:]]
    a, b = (generate(model, params, [p], 20, (), 3, context=7) for p in (prompt, changed))
    assert np.array_equal(a, b) and not np.array_equal(a, generate(model, params, [changed], 20, (), 3))


def test_a_row_ends_with_its_end():
    """Cut at the first end; what comes before is as if there were none; and nothing is drawn once all rows ended."""
    model = MODELS[0]
    params, prompts = loud(model), [ids(4).tolist(), ids(4, seed=2).tolist(), ids(4, seed=3).tolist()]
    free = generate(model, params, prompts, 40, (), 5)  # past the context of 23: in several goes
    end = next(token for token in free[0, :12].tolist() if token not in free[1, :30])
    out = generate(model, params, prompts, 40, (), 5, end=end)
    for row, plain in zip(out.tolist(), free.tolist(), strict=True):
        at = plain.index(end) if end in plain else 40
        assert row[: at + 1] == plain[: at + 1] and set(row[at:]) <= {end}
    alone = generate(model, params, prompts[:1], 10_000, (), 5, end=end)  # far beyond what it would take to draw
    assert alone.shape[1] < 100 and alone[0].tolist() == out[0, : alone.shape[1]].tolist() and alone[0, -1] == end


def test_more_samples_and_more_tokens_leave_the_first_ones_as_they_were():
    model = MODELS[0]
    params, prompt = loud(model), ids(4).tolist()
    few = generate(model, params, [prompt] * 2, 9, (), 5)
    many = generate(model, params, [prompt] * 5, 30, (), 5)
    assert np.array_equal(many[:2, :9], few) and len({tuple(row) for row in many.tolist()}) == 5
    assert not np.array_equal(generate(model, params, [prompt] * 2, 9, (), 6), few)
    assert generate(model, params, [prompt], 0).shape == (1, 0)


def test_other_lengths_and_temperatures_compile_nothing(monkeypatch):
    model = MODELS[0]
    params = loud(model)
    for name, static in (("_prefill", (0, 1)), ("_decode", (0, 1))):
        once = chex.assert_max_traces(getattr(decode, name).__wrapped__, n=1)
        monkeypatch.setattr(decode, name, jax.jit(once, static_argnums=static))
    generate(model, params, [ids(5).tolist()], 5, (Temperature(0.5),))
    generate(model, params, [ids(8).tolist()], 9, (Temperature(0.9),), 3)


def test_a_repetition_penalty_against_numpy():
    rng = np.random.default_rng(0)
    logits, text, real = rng.normal(size=(3, 7)), rng.integers(0, 7, (3, 5)), rng.random((3, 5)) < 0.6
    out = RepetitionPenalty(1.3)(jnp.float32(logits), Text(jnp.asarray(text), jnp.asarray(real)))
    expected = [
        penalised(*row, 1.3) for row in zip(logits, (a[b] for a, b in zip(text, real, strict=True)), strict=True)
    ]
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert (RepetitionPenalty(1.3)(jnp.float32(logits)) == jnp.float32(logits)).all()  # nothing is known to be said


def test_processors():
    logits = np.log(np.array([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25]], np.float32))
    kept = lambda processor: np.isfinite(processor(jnp.asarray(logits))).tolist()
    assert kept(TopK(2)) == [[False, True, True, False], [True, True, False, False]]
    assert kept(TopK(9)) == [[True] * 4] * 2
    assert kept(TopP(0.4))[0] == [False, True, False, False]
    assert kept(TopP(0.41))[0] == [False, True, True, False]
    assert kept(TopP(0.95))[0] == [True] * 4 and kept(TopP(1.0)) == [[True] * 4] * 2
    assert kept(MinP(0.5))[0] == [False, True, True, True] and kept(MinP(0.51))[0] == [False, True, True, False]
    assert kept(MinP(1.0)) == [[False, True, False, False], [True] * 4] and kept(MinP(0.0)) == [[True] * 4] * 2
    assert kept(TopP(1e-6)) == [[False, True, False, False], [True, False, False, False]]
    flat = jnp.asarray(np.random.default_rng(0).normal(size=(2, 50_257)).astype(np.float32))
    assert np.isfinite(TopP(1.0)(flat)).all()
    np.testing.assert_allclose(Temperature(0.5)(jnp.asarray(logits)), logits * 2)
    assert kept(Temperature(0.0)) == [[False, True, False, False], [True, False, False, False]]


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
@pytest.mark.parametrize("levels", [3, 30, 1000])
def test_top_k_and_top_p_against_a_sort(monkeypatch, levels, backend):
    """Of equally likely tokens those of lower id are kept, as a stable sort has them; on a GPU, of blocks of 5."""
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(logits_processors, "BLOCK", 5)
    assert ("sort" in str(jax.make_jaxpr(lambda: TopK(17)(jnp.zeros((1, 211))))())) is (backend == "gpu")
    rng = np.random.default_rng(0)
    logits = (rng.integers(0, levels, (6, 211)) * 5 / levels).astype(np.float32)
    logits[0, 3:] = -np.inf
    order = np.argsort(-logits, axis=-1, kind="stable")
    falling = np.take_along_axis(logits, order, -1).astype(np.float64)
    chances = np.exp(falling) / np.exp(falling).sum(-1, keepdims=True)
    before = chances.cumsum(-1) - chances
    for k, p in ((1, 0.013), (2, 0.1), (17, 0.517), (210, 0.93)):
        for processor, kept in ((TopK(k), np.arange(211)[None] < k), (TopP(p), before < p)):
            expected = np.zeros(logits.shape, bool)
            np.put_along_axis(expected, order, np.broadcast_to(kept, logits.shape), -1)
            out = processor(jnp.asarray(logits))
            assert np.array_equal(np.isfinite(out), expected & np.isfinite(logits)), processor


def test_a_draw_never_takes_what_cannot_come():
    """However sums round: of 4,000 draws among 5,003 tokens, of which three may come."""
    logits = jnp.full((1, 5_003), -jnp.inf).at[0, jnp.array([0, 2_011, 5_000])].set(jnp.array([0.0, -8.0, 0.5]))
    numbers = jax.random.uniform(jax.random.key(0), (4, 1000))
    drawn = np.concatenate([jax.jit(choose)(some, jnp.broadcast_to(logits, (1000, 5_003))) for some in numbers])
    assert {*drawn.tolist()} <= {0, 2_011, 5_000} and abs((drawn == 0).mean() - 0.3775) < 0.02
    assert choose(numbers[0, :1], jnp.full((1, 7), -jnp.inf))[0] == 0  # nothing may


@pytest.mark.slow
def test_draws_follow_the_distribution():
    """The frequencies of 4,000 tokens of a model that says the same everywhere."""
    model = decoder(n_layers=1, vocab_size=5, head=LanguageHead(tied=False), position=Rotary())
    params = loud(model)
    params = {
        **params,
        "head_language": {"kernel": jnp.zeros((84, 5)).at[0].set(jnp.log(jnp.array([1, 2, 3, 4, 6.0])))},
    }
    params["decoder"] = {**params["decoder"], "norm": {"scale": jnp.zeros(84), "bias": jnp.zeros(84).at[0].set(1)}}
    out = generate(model, params, [[0]] * 100, 40, (), 1)
    share = np.bincount(out.ravel(), minlength=5) / out.size
    np.testing.assert_allclose(share, np.array([1, 2, 3, 4, 6]) / 16, atol=0.025)
    cut = generate(model, params, [[0]] * 100, 40, (TopK(2),), 1)
    assert set(cut.ravel().tolist()) == {3, 4}
