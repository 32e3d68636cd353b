"""The decoder: its layers by hand, wirings, recomputation, dtypes (what each part may see: test_families.py)."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import SIZES, B, T, block, decoder, hidden, ids, loud, mixed

from jaxformer import Config, Data, EncoderDecoder
from jaxformer.data.batches import Examples
from jaxformer.data.tables import Table
from jaxformer.declarations import Param, Slot
from jaxformer.generation.decode import LeftToRight
from jaxformer.keys import fold
from jaxformer.lab.probe import small
from jaxformer.learning.objectives import Classification, Masked
from jaxformer.model import blocks, cache
from jaxformer.model.heads import ClassificationHead, FirstToken, LanguageHead
from jaxformer.model.kernels import ValueResidual
from jaxformer.model.layers import MLP, GatedFeedForward, LayerNorm, OneLayer, ReLU, RMSNorm, Tanh, ZeroOutputs, dropout
from jaxformer.model.masks import Bidirectional, Causal, Prefix, Window, one_document
from jaxformer.model.models import Decoder, Embedding, Encoder
from jaxformer.model.positions import NoPosition, Rotary, Sinusoidal
from jaxformer.model.residuals import PostNorm, PreNorm, ReZero, UNet
from jaxformer.spec import InputError, checked


def close(a, b, atol=1e-5):
    np.testing.assert_allclose(a, b, atol=atol, rtol=1e-5)


def test_kinds_of_layers_alternate():
    """A tuple of masks repeats over the layers: with windows of 1 everywhere nothing moves between tokens."""
    text = ids(B, T)
    changed = text.at[:, 0].set((text[:, 0] + 1) % 29)
    for mask, moves in (((Window(1), Window(1)), False), ((Window(1), Causal()), True)):
        model = decoder(n_layers=6, mask=mask)
        params = loud(model)
        assert params["decoder"]["layers"]["block1"]["attention"]["project"]["q"].shape == (3, 84, 6, 14)
        a, b = (hidden(model, params, t, one_document(T))[0][:, 1:] for t in (text, changed))
        assert bool(jnp.abs(a - b).max() > 1e-3) == moves


@pytest.mark.parametrize(
    "mask",
    [pytest.param(Causal(), marks=pytest.mark.slow), (Window(3), Causal(), Window(5))],
    ids=["one kind", "three kinds"],
)
def test_scanned_and_unrolled_layers_agree_with_dropout_on(mask):
    model = decoder(n_layers=6, mask=mask, dropout=0.3)
    params, text, key = loud(model), ids(B, T), jax.random.key(2)
    groups = model.n_layers // len(model.kinds("decoder"))  # unrolled in part, with a rest, all, and more than all
    ways = [dataclasses.replace(model, unroll=n) for n in (1, 4, groups, groups + 1)]
    outs = [hidden(way, params, text, one_document(T), key)[0] for way in ways]
    for out in outs[1:]:
        close(outs[0], out)
    assert jnp.abs(outs[0] - hidden(model, params, text, one_document(T))[0]).max() > 0.1  # dropout is on


@pytest.mark.parametrize("mask", [Causal(), (Causal(), Window(3))], ids=["one kind", "two kinds"])
def test_scanned_layers_equal_blocks_applied_by_hand(mask):
    """Each layer with a key of its own, whichever kind it is."""
    model = decoder(dropout=0.3, mask=mask, n_layers=4)
    kinds = model.kinds("decoder")
    params, text, key, at = loud(model), ids(B, T), jax.random.key(2), one_document(T)
    decoder_params = params["decoder"]
    x = params["embedding"]["table"][text] + decoder_params["position"]["table"][None, :T]
    x = dropout(fold(key, model.n_layers, blocks.EMBED), x, 0.3)
    for i in range(model.n_layers):
        which, kind = i // len(kinds), i % len(kinds)
        layer = jax.tree.map(lambda a, at=which: a[at], decoder_params["layers"][f"block{kind}"])
        x = block(kinds[kind], layer, x, at, fold(key, i))
    close(model.norm(decoder_params["norm"], x), hidden(model, params, text, at, key)[0], 2e-5)


@pytest.mark.parametrize(("position", "equivariant"), [(NoPosition(), True), (Sinusoidal(), False)])
def test_attention_without_positions_knows_no_order(position, equivariant):
    """Tokens in another order have the same hidden states in that order."""
    model = Encoder(**SIZES, position=position)
    params, text, order = loud(model), ids(B, T), np.random.default_rng(3).permutation(T)
    a, b = (hidden(model, params, t, one_document(T))[0] for t in (text, text[:, order]))
    assert bool(jnp.abs(a[:, order] - b).max() < 1e-4) == equivariant


def test_post_norm_by_hand():
    """norm(x + f(x)) twice a block, and no norm at the end."""
    model = decoder(residual=PostNorm(), position=NoPosition())
    params, text, at = loud(model), ids(B, T), one_document(T)
    assert "norm" not in params["decoder"]
    x = params["embedding"]["table"][text]
    for i in range(model.n_layers):
        layer = jax.tree.map(lambda a, i=i: a[i], params["decoder"]["layers"]["block0"])
        h = mixed(model.kinds("decoder")[0], layer["attention"], x, at)
        x = model.norm(layer["norm_attention"], x + h)
        x = model.norm(layer["norm_feed_forward"], x + model.feed_forward(layer["feed_forward"], x, at, None).h)
    close(x, hidden(model, params, text, at)[0], 2e-5)


class Thrice(PreNorm):
    """A stranger's rule, with three norms for each branch."""

    n_norms = 3

    def after(self, stream, h, site):
        return stream + site.norms[2](site.norms[1](h))


def test_a_rule_has_as_many_norms_as_it_asks_for():
    model = decoder(residual=Thrice(), n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    names = {"norm_attention", "norm_attention_out", "norm_attention_2"}
    assert {n for n in params["decoder"]["layers"]["block0"] if n.startswith("norm_attention")} == names
    layer = jax.tree.map(lambda a: a[0], params["decoder"]["layers"]["block0"])
    found = model.activations(params, text, at)
    x = found["decoder/embedded"]
    h = mixed(model.kinds("decoder")[0], layer["attention"], model.norm(layer["norm_attention"], x), at)
    after = found["decoder/layers/block0/after_attention"][0]
    close(after, x + model.norm(layer["norm_attention_2"], model.norm(layer["norm_attention_out"], h)), 2e-5)


class Unknown(MLP):
    def params(self):
        return {**super().params(), "more": Param("Q->D")}


def test_a_letter_without_a_size_is_told_with_its_part():
    with pytest.raises(ValueError, match=r"feed_forward: Param\('Q->D'\) has letters of no known size, \['Q'\]; give "):
        decoder(feed_forward=Unknown()).declared()


def test_a_model_that_sees_its_answers_writes_no_text():
    assert decoder().writes and decoder(mask=Prefix()).writes and not decoder(mask=Bidirectional()).writes
    with pytest.raises(ValueError, match="must have a decoder with a LanguageHead"):
        LeftToRight().check_model(Masked(), decoder(mask=Bidirectional()))


def test_one_token_type_is_that_of_both_texts_and_learns_from_both():
    model = decoder(embedding=Embedding(token_types=1), n_layers=1)
    params, text, at = loud(model), ids(B, T), one_document(T)
    both = at._replace(part=(jnp.arange(T) > 5)[None].astype(jnp.int32))
    found = [
        jax.grad(lambda p, at=at: (model.hidden(p, text, at)[0] ** 2).sum())(params)["embedding"]["parts"]
        for at in (at, both)
    ]
    close(found[0], found[1], 1e-3)
    assert jnp.abs(found[0]).max() > 1


@pytest.mark.parametrize("residual", [PreNorm(), PostNorm()], ids=["pre", "post"])
@pytest.mark.parametrize("feed_forward", [MLP(ReLU()), GatedFeedForward()], ids=["relu", "gated"])
def test_every_wiring_is_causal_and_trains(residual, feed_forward):
    model = decoder(residual=residual, feed_forward=feed_forward, position=Sinusoidal(), n_layers=2)
    params, text = loud(model), ids(1, T)

    @jax.jit
    def gradients(params):
        def loss(params, table):
            h = model.hidden(params | {"embedding": {"table": table}}, jnp.arange(T)[None], one_document(T))[0]
            return h[0, 6, 3]  # a norm makes the sum of all places the same

        return jax.grad(loss, (0, 1))(params, params["embedding"]["table"])

    of_params, of_table = gradients(params)
    size = jnp.abs(of_table).sum(-1)
    assert (size[7:] == 0).all() and (size[3:7] > 1e-7).all() and text.shape == (1, T)
    for path, gradient in jax.tree_util.tree_flatten_with_path(of_params["decoder"])[0]:
        assert jnp.abs(gradient).max() > 0, path


def test_logits_are_capped():
    plain, capped = decoder(), decoder(head=LanguageHead(cap=5.0))
    params = loud(plain)
    h = 9 * hidden(plain, params, ids(B, T), one_document(T))[0]
    logits = np.asarray(plain.logits(params, h))
    assert np.abs(logits).max() > 10
    close(capped.logits(params, h), 5 * np.tanh(logits / 5))


def loss_of(model, text):
    return lambda params: (model.hidden(params, text, one_document(T), jax.random.key(0))[0] ** 2).sum()


@pytest.mark.parametrize(
    ("unroll", "policies"),
    [
        (1, ["everything_saveable", "dots_saveable", "nothing_saveable"]),
        pytest.param(2, ["nothing_saveable"], marks=pytest.mark.slow),
    ],
)
def test_recomputation_changes_memory_and_no_gradient(unroll, policies):
    """What is kept for the backward pass, by policy; with the same dropout masks in both passes."""
    text, saved, gradients, working = ids(B, T), {}, {}, {}
    for remat in (None, *policies):
        model = decoder(remat=remat, dropout=0.3, unroll=unroll, n_layers=4)
        params = loud(model)
        compiled = jax.jit(jax.grad(loss_of(model, text))).lower(params).compile()
        gradients[remat], working[remat] = compiled(params), compiled.memory_analysis().temp_size_in_bytes
        residuals = jax.eval_shape(lambda p, m=model: jax.vjp(loss_of(m, text), p)[1], params)
        saved[remat] = sum(a.size for a in jax.tree.leaves(residuals))
        jax.tree.map(lambda a, b: close(a, b, 1e-3), gradients[remat], gradients[None])
    assert [saved[remat] for remat in policies] == sorted((saved[remat] for remat in policies), reverse=True)
    assert len({saved[remat] for remat in policies}) == len(policies)
    assert saved["nothing_saveable"] < 0.6 * saved[None] and working["nothing_saveable"] < 0.9 * working[None]


def test_one_more_dropout_upstream_leaves_the_others_masks():
    """An ablation differs in its idea only: a layer's key depends on seed, step, layer and site alone."""
    key, x = jax.random.key(2), jnp.ones((B, T, 84))
    masks = [dropout(fold(key, layer, blocks.FEED), x, 0.5) for layer in (3, 3, 4)]
    assert jnp.array_equal(masks[0], masks[1]) and not jnp.array_equal(masks[0], masks[2])


def test_logits_tied_and_not():
    text, at = ids(B, T), one_document(T)
    tied, own = decoder(), decoder(head=LanguageHead(tied=False))
    params = loud(own)
    h, _ = hidden(own, params, text, at)
    close(own.logits(params, h), np.asarray(h) @ np.asarray(params["head_language"]["kernel"]))
    close(tied.logits(params, h), np.asarray(h) @ np.asarray(params["embedding"]["table"]).T)
    assert "head_language" not in loud(tied)
    assert (
        tied.logits(jax.tree.map(lambda a: a.astype(jnp.bfloat16), params), h.astype(jnp.bfloat16)).dtype == "float32"
    )


def test_half_precision_flows_through():
    model = decoder(dropout=0.1, position=Rotary(), norm=RMSNorm(), bias=True, feed_forward=MLP(bias=True))
    params = loud(model)
    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), params)
    out, cache = hidden(model, half, ids(B, T), one_document(T), jax.random.key(0), model.cache(B, T, jnp.bfloat16))
    assert out.dtype == jnp.bfloat16 and cache["block0"]["k"].dtype == jnp.bfloat16
    plain, _ = hidden(model, params, ids(B, T), one_document(T))
    close(hidden(model, half, ids(B, T), one_document(T))[0].astype(np.float32), plain, 0.2)


def test_biases_count():
    model = decoder(bias=True, feed_forward=MLP(bias=True), norm=LayerNorm())
    params = loud(model)
    text, at = ids(B, T), one_document(T)
    plain, _ = hidden(model, params, text, at)
    for name in ("q_bias", "v_bias", "o_bias"):  # softmax does not see a shift of all keys
        project = params["decoder"]["layers"]["block0"]["attention"]["project"]
        changed = jax.tree.map(lambda a: a, params)
        changed["decoder"]["layers"]["block0"]["attention"]["project"] = project | {name: 2 * project[name]}
        assert jnp.abs(hidden(model, changed, text, at)[0] - plain).max() > 1e-3, name


@pytest.mark.parametrize("fields", [{}, {"bias": True, "head": LanguageHead(tied=False), "position": Rotary()}])
def test_parameters_of_gpt2(fields):
    """124,439,808 as published, with biases; without a compile, by shapes alone."""
    model = decoder(
        **{"vocab_size": 50257, "d_model": 768, "n_layers": 12, "n_heads": 12, "n_kv_heads": None, "d_ff": None},
        **{"context_length": 1024, "feed_forward": MLP(bias=True), "bias": True} | fields,
    )
    count = sum(a.size for a in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
    assert count == 124_439_808 + (50257 * 768 - 1024 * 768 if fields else 0)


def test_the_model_needs_a_vocabulary():
    with pytest.raises(ValueError, match="vocab_size=None must be set"):
        decoder(vocab_size=None).declared()


def test_declarations_are_traced_once_and_each_caller_has_a_tree_of_its_own(monkeypatch):
    asked = []
    network = Decoder.network
    monkeypatch.setattr(Decoder, "network", lambda model: asked.append(model) or network(model))
    first, second = (decoder(d_ff=37).declared() for _ in range(2))
    assert len(asked) == 1
    chex.assert_trees_all_equal_structs(first, second)
    first["embedding"].clear()
    assert decoder(d_ff=37).declared()["embedding"] == second["embedding"] != {}
    assert decoder(d_ff=41).declared() != second and len(asked) == 2


def test_new_numbers_of_the_same_structure_compile_nothing():
    model = decoder()
    params = loud(model)
    counted = jax.jit(chex.assert_max_traces(lambda p, i: model.hidden(p, i, one_document(T))[0], n=1))
    for seed in (1, 2):
        counted(params, ids(B, T, seed=seed))


def test_a_rolling_cache_keeps_the_newest_whatever_the_order_of_the_row():
    """Of several tokens for one slot the newest stays; which one a scatter would write last is not defined."""
    slots = cache.PLACE | {"v": Slot("BGSK")}
    empty = cache.empty(slots, {"B": 1, "G": 1, "S": 3, "K": 1}, jnp.float32)
    position = jnp.array([[6, 5, 4, 3, 2, 1, 0]])
    new = {
        "position": position,
        "segment": jnp.ones_like(position),
        "v": position.astype(jnp.float32)[:, None, :, None],
    }
    _, written = cache.update(empty, new, slots)
    assert written["position"].tolist() == [[6, 4, 5]] and written["v"].ravel().tolist() == [6, 4, 5]


NO_MATRIX = {"initializer": ZeroOutputs(), "output_projection": False}  # attention does not end with one


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"initializer": ZeroOutputs(), "residual": ReZero()}, "both begin at zero, and no layer would ever learn"),
        ({"initializer": ZeroOutputs(), "feed_forward": OneLayer()}, "feed_forward=OneLayer has an activation behind"),
        *(
            ({"residual": residual, **more}, f"residual.{branch}=False leaves nothing of the stream but what .*{what}")
            for residual, more, branch, what in (
                (PreNorm(attention=False), {"initializer": ZeroOutputs()}, "attention", "ZeroOutputs"),
                (UNet(feed_forward=False), {"initializer": ZeroOutputs()}, "feed_forward", "ZeroOutputs"),
                (ReZero(attention=False), {}, "attention", "ReZero"),
                (PreNorm(attention=False, feed_forward=False), NO_MATRIX, "feed_forward", "ZeroOutputs"),
            )
        ),
        ({"kernel": ValueResidual(), "remat": "nothing_saveable"}, "all of them are one"),
    ],
)
def test_parts_that_would_have_no_effect_together_are_refused(fields, sentence):
    with pytest.raises(InputError, match=sentence):
        checked(decoder(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {"feed_forward": OneLayer(Tanh())},
        {"residual": ReZero(start=1.0)},
        {"residual": PostNorm()},
        {"residual": PreNorm(cross_attention=False)},
        {"residual": PreNorm(attention=False), "output_projection": False},
    ],
)
def test_what_learns_from_zeros_is_not_refused(fields):
    checked(decoder(initializer=ZeroOutputs(), **fields))
    checked(decoder(residual=PreNorm(attention=False)))


def test_remat_is_of_use_where_one_of_two_stacks_repeats():
    """And a check of a model leaves it out where that makes one group of it."""
    sizes = {"d_model": 14, "context_length": 8, "n_heads": 2, "remat": "nothing_saveable"}
    checked(EncoderDecoder(**sizes, n_layers=2, n_encoder_layers=4, mask=(Window(4), Causal())))
    deep = Decoder(**sizes, n_layers=8, mask=(Window(4), Window(4), Window(4), Causal()))
    assert small(Config("run", checked(deep), Data())).model.remat is None


def test_a_first_token_that_sees_no_other_is_no_text():
    causal = decoder(head=ClassificationHead("kind", ("a", "b"), pooling=FirstToken()))
    with pytest.raises(ValueError, match="pooling=FirstToken has seen no other token"):
        Classification().check_model(causal)
    Classification().check_model(dataclasses.replace(causal, mask=Bidirectional()))


@pytest.mark.parametrize(
    ("objective", "head", "sentence"),
    [
        (Masked(), LanguageHead(), "objective=Masked must have an Encoder"),
        (Classification(), ClassificationHead("kind", ("a", "b"), pooling=FirstToken()), "has seen no other token"),
    ],
)
def test_a_prefix_of_rows_without_two_texts_is_causal(objective, head, sentence):
    model = Encoder(**SIZES | {"n_layers": 1}, head=head, mask=Prefix())
    config = lambda **data: Config("run", model, Data(**data), objective)
    with pytest.raises(InputError, match=rf"model\.mask is causal .* data\.sampling=RandomWindows; .*{sentence}"):
        checked(config())
    checked(config(corpus=Table("a.csv", target="b"), sampling=Examples(joined=True)))
    checked(dataclasses.replace(config(), model=dataclasses.replace(model, mask=Bidirectional())))


def test_one_token_type_tells_no_parts():
    """As of models that have one for both texts of a pair."""
    assert [decoder(embedding=Embedding(token_types=n)).tells_parts for n in range(3)] == [False, False, True]
