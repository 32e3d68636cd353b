"""What is measured of a trained model, against NumPy and finite differences."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import decoder, hidden, log_softmax, loud

from jaxformer import Config, Data, Encoder, EncoderDecoder, build
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TextFiles
from jaxformer.data.datasets import Source
from jaxformer.data.tasks import Copy
from jaxformer.data.tokenizers import Characters
from jaxformer.declarations import is_declared, path_name
from jaxformer.lab.measures import (
    activations,
    before_training,
    differences_by_layer,
    estimate_loss,
    gradient_by_distance,
    gradient_norms,
    loss_by_position,
    nats,
    norms_by_layer,
    validation_rows,
)
from jaxformer.learning.objectives import Masked, PrefixLM
from jaxformer.model.baselines import GRU
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.masks import Causal, Prefix, Window, one_document
from jaxformer.model.mixers import ValueEmbeddings
from jaxformer.run.opened import Run
from jaxformer.run.plan import prepare_data
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError

T, WINDOWS = 13, 7
TOKENIZER = Characters("".join(map(chr, range(65, 65 + 28))), mask_token=True)
UNTIED = LanguageHead(tied=False, bias=True)
NARROW = {"d_model": 14, "n_heads": 2, "n_kv_heads": 1}


@pytest.fixture
def run_of(tmp_path):
    """Makes runs of a text whose validation split has WINDOWS windows and a part of one."""
    letters = np.random.default_rng(0).choice(list(TOKENIZER.alphabet), 10 * (T * WINDOWS + 5))
    (tmp_path / "text.txt").write_text("".join(letters))
    data = Data(TextFiles(str(tmp_path / "text.txt")), tokenizer=TOKENIZER, batch_size=3, window=T)

    def make(model, **fields):
        return Run(Config("run", model, data, **fields), TOKENIZER, TrainState(jnp.int32(0), loud(model), ()))

    return make


def test_losses_by_place_are_those_of_a_log_softmax_and_their_mean_that_of_the_evaluation(run_of):
    run = run_of(decoder(n_layers=2, head=UNTIED))
    rows = jnp.asarray(validation_rows(run, 1000))
    (source,) = prepare_data(run.config, run.tokenizer).valid
    assert rows.shape == (WINDOWS, T + 1) and (rows[:, 1:].ravel() == source.tokens[1 : 1 + WINDOWS * T]).all()
    h, _ = hidden(run.model, run.state.params, rows[:, :-1], one_document(T))
    expected = -np.take_along_axis(log_softmax(run.model.logits(run.state.params, h)), rows[:, 1:, None], -1)[..., 0]
    np.testing.assert_allclose(nats(run.model, run.state.params, rows), expected, rtol=1e-5, atol=1e-5)
    for count in (2, 5, 1000):  # batches are of 3
        np.testing.assert_allclose(loss_by_position(run, count), expected[:count].mean(0), rtol=1e-5)
    same = Source(source.tokens[: WINDOWS * T + 1], np.zeros(1, np.int64))
    assert loss_by_position(run).mean() == pytest.approx(run.evaluate(same)["loss"], rel=1e-6)


def test_nanogpts_estimate_is_the_mean_of_random_windows_of_each_split(run_of):
    run = run_of(decoder(n_layers=2, head=UNTIED))
    prepared, found = prepare_data(run.config, run.tokenizer), estimate_loss(run, 40)
    for split, source in (("train", prepared.train[0]), ("valid", prepared.valid[0])):
        rows = np.stack([source.tokens[i : i + T + 1] for i in range(len(source.tokens) - T)]).astype(np.int32)
        each = np.asarray(nats(run.model, run.state.params, jnp.asarray(rows[: len(rows) // 3 * 3]))).mean(1)
        assert abs(found[split] - each.mean()) < 4 * each.std() / (3 * 40) ** 0.5, split
    assert found == estimate_loss(run, 40) != estimate_loss(run, 40, seed=1)


def test_what_cannot_be_measured_is_refused(run_of):
    encoder = run_of(Encoder(**NARROW, context_length=T, vocab_size=29), objective=Masked())
    for measure in (loss_by_position, estimate_loss):
        with pytest.raises(InputError, match="run: its model sees what it should predict"):
            measure(encoder)
    both = run_of(EncoderDecoder(**NARROW, context_length=T, vocab_size=29))
    with pytest.raises(InputError, match="run: its model reads two texts"):
        activations(both, "decoder/out")
    run = run_of(decoder())
    data = dataclasses.replace(run.config.data, corpus=Copy(T, examples=29), sampling=Examples(joined=True))
    pairs = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    with pytest.raises(InputError, match="run: it is validated on examples"):
        validation_rows(dataclasses.replace(pairs, tokenizer=Characters("0123456789", end_token=True)), 3)


def test_a_split_without_a_whole_window_is_refused(run_of):
    run = run_of(decoder(context_length=100))
    wide = dataclasses.replace(run, config=dataclasses.replace(run.config, data=Data(run.config.data.corpus)))
    with pytest.raises(InputError, match="run: its validation split has no window of 101 tokens"):
        validation_rows(wide, 1)


REACH = {
    "tied": (decoder(n_layers=1, mask=Window(5), **NARROW), 5),
    "untied": (decoder(n_layers=2, mask=Window(4), head=UNTIED, **NARROW), 7),
    "value embeddings": (decoder(n_layers=1, mixer=ValueEmbeddings(), mask=Window(5), **NARROW), 5),
    "recurrent": (GRU(d_model=11, context_length=23, vocab_size=29), T),
}


@pytest.mark.parametrize(("model", "width"), REACH.values(), ids=REACH.keys())
def test_gradients_reach_as_far_as_the_model_sees_and_are_those_of_finite_differences(run_of, model, width):
    """The token of one place alone is moved; a tied head's table stays. What is added to values is not small."""
    run = run_of(model)
    louder = lambda path, a: 20 * a if path_name(path).endswith("embedding/gain") else a
    params = jax.tree_util.tree_map_with_path(louder, run.state.params)
    run = dataclasses.replace(run, state=run.state.replace(params=params))
    found = gradient_by_distance(run)
    assert found.shape == (T,) and (found[:width] > 0).all() and (found[width:] == 0).all()
    (row,), params = validation_rows(run, 1), run.state.params
    table = params["embedding"]["table"]
    size, step = table.shape[1], 0.01
    for distance in (0, 3):
        place = T - 1 - distance
        moved = table[row[place]][None] + step * jnp.concatenate([jnp.eye(size), -jnp.eye(size)])
        ids = np.repeat(row[None, :-1], 2 * size, 0)
        ids[:, place] = len(table) + np.arange(2 * size)
        body = dataclasses.replace(run.model, vocab_size=len(table) + 2 * size, head=())

        def more(box, a):
            """The token's own row for each that is moved, in what else the ids are looked up."""
            if "V" not in box.letters.all:
                return a
            axis = box.letters.all.index("V")
            return jnp.concatenate([a, jnp.repeat(a.take(row[place : place + 1], axis), 2 * size, axis)], axis)  # noqa: B023

        own = jax.tree.map(more, body.declared(), {n: params[n] for n in body.declared()}, is_leaf=is_declared)
        own["embedding"] = {**own["embedding"], "table": jnp.concatenate([table, moved])}
        h, _ = hidden(body, own, jnp.asarray(ids), one_document(T))
        up, down = -log_softmax(run.model.logits(params, h[:, -1]))[:, row[-1]].reshape(2, size)
        expected = np.linalg.norm((up - down) / (2 * step))
        assert gradient_by_distance(run, 1)[distance] == pytest.approx(expected, rel=5e-3)


def test_weights_of_attention_lie_in_the_order_of_layers(run_of):
    """Eleven windows twice: each layer looks as far back as its own. And the second eleven are the second."""
    kinds = 11
    run = run_of(decoder(n_layers=2 * kinds, mask=tuple(Window(1 + i) for i in range(kinds)), **NARROW))
    found = run.attention("HELLOWORLDZZTOPX")
    weights = found.weights
    assert found.tokens == list("HELLOWORLDZZT") and weights.shape == (2 * kinds, 2, T, T)
    back = np.arange(T)[:, None] - np.arange(T)
    for layer, weight in enumerate(weights):
        assert ((weight > 0) == ((back >= 0) & (back <= layer % kinds))).all(), layer
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    first = jax.tree.map(lambda a: a[:1], run.state.params["decoder"]["layers"])
    short = run_of(dataclasses.replace(run.config.model, n_layers=kinds))
    params = {**run.state.params, "decoder": {**run.state.params["decoder"], "layers": first}}
    half = dataclasses.replace(short, state=run.state.replace(params=params))
    np.testing.assert_allclose(half.attention("HELLOWORLDZZT").weights, weights[:kinds], atol=1e-6)


def test_weights_of_attention_are_triangular_where_nothing_later_is_seen(run_of):
    text = "ABCDEFG"
    encoder = run_of(Encoder(**NARROW, context_length=T, vocab_size=29), objective=Masked())
    both = encoder.attention(text).weights
    run = run_of(decoder(n_layers=4, mask=(Causal(), Window(2)), **NARROW))
    past = run.attention(text).weights
    assert (both > 0).all() and (np.triu(past, 1) == 0).all() and (past[::2] > 0).sum() == 2 * 2 * 7 * 8 / 2
    assert (np.tril(past[1::2], -2) == 0).all()
    recurrent = run_of(GRU(d_model=11, context_length=23, vocab_size=29))
    with pytest.raises(InputError, match="run: its layers record no weights of attention; a model with Softmax does"):
        recurrent.attention(text)


class Silent(Softmax):
    """A kernel that keeps its weights to itself."""

    def __call__(self, params, look, key, rate):
        return super().__call__(params, look, key, rate)._replace(activations={})


def test_layers_that_record_no_weights_are_left_out_and_the_others_keep_their_numbers(run_of):
    run = run_of(decoder(n_layers=6, kernel=(Silent(), Softmax(), Softmax()), **NARROW))
    found = run.attention("HELLO")
    assert found.layers == [1, 2, 4, 5] and found.weights.shape == (4, 2, 5, 5)
    ids = jnp.asarray([run.tokenizer.encode("HELLO")], jnp.int32)
    recorded = run.model.activations(run.state.params, ids, one_document(5))
    for i, (turn, block) in enumerate(((0, 1), (0, 2), (1, 1), (1, 2))):
        expected = recorded[f"decoder/layers/block{block}/attention/weights"][turn, 0]
        np.testing.assert_allclose(found.weights[i], expected, atol=1e-5)
    assert [axes.get_title() for axes in found.plot(4).axes] == ["layer 4, head 0", "layer 4, head 1"]
    assert len(found.plot().axes) == 8 and repr(found) == "<Attention of 4 layers, 2 heads: 5 tokens look at 5>"
    with pytest.raises(InputError, match="layer=3 must be one of 1, 2, 4, 5"):
        found.plot(3)


def test_an_encoder_decoder_looks_at_one_text_and_from_another_at_it(run_of):
    run = run_of(EncoderDecoder(**NARROW, n_layers=2, context_length=T, vocab_size=29))
    first, second = "HELLO", "WORLDLY"
    own, cross = run.attention(first), run.attention(first, second)
    assert (own.tokens, own.columns) == ([*first], [*first]) and (cross.tokens, cross.columns) == ([*second], [*first])
    source, ids = (jnp.asarray([run.tokenizer.encode(text)], jnp.int32) for text in (first, second))
    recorded = run.model.activations(run.state.params, ids, one_document(7), (source, one_document(5)))
    for found, name in ((own, "encoder/layers/block0/attention"), (cross, "decoder/layers/block0/cross_attention")):
        np.testing.assert_allclose(found.weights, recorded[f"{name}/weights"][:, 0], atol=1e-5)
        np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-5)


def test_pairs_that_are_joined_are_looked_at_together(run_of):
    """What is of the first text sees all of that, and nothing of the second."""
    run = run_of(decoder(n_layers=1, mask=Prefix(), **NARROW), objective=PrefixLM())
    data = dataclasses.replace(run.config.data, sampling=Examples(joined=True))
    joined = dataclasses.replace(run, config=dataclasses.replace(run.config, data=data))
    found = joined.attention("ABC", "DE")
    assert found.tokens == found.columns == [*"ABCDE"]
    seen = [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert ((found.weights > 0) == np.array(seen, bool)).all()
    assert (run.attention("ABC").weights > 0).all()  # a prefix, of which the second text is not there yet
    with pytest.raises(InputError, match="second: run was trained on pairs of texts: give a second one, too"):
        joined.attention("ABC")
    with pytest.raises(InputError, match="second: run was trained on single texts: leave the second out"):
        run.attention("ABC", "DE")
    for text, message in (("", "text: must not be empty"), ("a", "text: .*'a'")):
        with pytest.raises(InputError, match=message):
            run.attention(text)


def test_activations_are_those_of_windows_of_the_validation_split(run_of):
    run = run_of(decoder(n_layers=3))
    rows = jnp.asarray(validation_rows(run, 5))
    h, _ = hidden(run.model, run.state.params, rows[:, :-1], one_document(T))
    np.testing.assert_allclose(activations(run, "decoder/out", 5), h, rtol=1e-4, atol=1e-5)
    stream = activations(run, "decoder/layers/block0/after_feed_forward", 5)
    assert stream.shape == (3, 5, T, 84) and stream.dtype == np.float64
    with pytest.raises(InputError, match=r"activation 'decoder/in' is none of this model; it has .*decoder/out"):
        activations(run, "decoder/in")


def test_norms_and_differences_by_layer():
    """Tokens that are all alike differ by nothing, and those that have nothing in common by all but their mean."""
    values = np.random.default_rng(0).normal(2, 1, (3, 5, 7, 11))
    for layer, (norm, difference) in enumerate(zip(norms_by_layer(values), differences_by_layer(values), strict=True)):
        square = np.mean([[token @ token / 11 for token in text] for text in values[layer]])
        spread = np.mean([[np.var(text[:, i]) for i in range(11)] for text in values[layer]])
        assert norm**2 == pytest.approx(square) and difference**2 == pytest.approx(spread / square)
    alike = np.repeat(values[:, :, :1], 7, 2)
    np.testing.assert_allclose(differences_by_layer(alike), 0, atol=1e-12)
    apart = np.random.default_rng(1).normal(size=(3, 101, 7, 211))
    np.testing.assert_allclose(differences_by_layer(apart), np.sqrt(1 - 1 / 7), rtol=3e-3)


def test_norms_of_gradients_add_up_to_that_of_all(run_of):
    run = run_of(decoder(n_layers=3, bias=True, head=UNTIED))
    rows = jnp.asarray(validation_rows(run, 5))

    def loss(params):
        h = run.model.hidden(params, rows[:, :-1], one_document(T)).h
        return optax.softmax_cross_entropy_with_integer_labels(run.model.logits(params, h), rows[:, 1:]).mean()

    grads = jax.jit(jax.grad(loss))(run.state.params)
    found = gradient_norms(run, 5)
    total = np.sqrt(sum((value**2).sum() for value in found.values()))
    assert total == pytest.approx(float(optax.tree.norm(grads)), rel=1e-5)
    query = grads["decoder"]["layers"]["block0"]["attention"]["project"]["q"]
    expected = [np.linalg.norm(layer) for layer in query]
    np.testing.assert_allclose(found["decoder/layers/block0/attention/project/q"], expected, rtol=1e-4)
    assert found["embedding/table"].shape == () and len(found) == len(jax.tree.leaves(grads))


def test_before_training_a_run_has_the_parameters_of_its_seed(run_of):
    run = run_of(decoder())
    config = dataclasses.replace(run.config, train=dataclasses.replace(run.config.train, seed=7))
    first = before_training(dataclasses.replace(run, config=config)).state
    same, other = (build(run.config, {"train.seed": seed})[0].params for seed in (7, 8))
    chex.assert_trees_all_equal(first.params, same)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(first.params, other)
    assert int(first.step) == 0
