"""Ideas from papers, one class each outside the package, keep what the core promises: they train, resume to the same
bits, decode as the full pass, and go together."""

import dataclasses
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ideas import (
    Borrow,
    Differential,
    EveryLayer,
    ExpertChoice,
    Experts,
    FillInTheMiddle,
    GatedHeads,
    GatedLinear,
    HyperConnections,
    Latent,
    MaskedDiffusion,
    MultiToken,
    Unmasking,
)
from tiny import generate, loud

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, EncoderDecoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TextFiles
from jaxformer.data.tasks import Reverse
from jaxformer.data.tokenizers import Bytes
from jaxformer.declarations import draw, path_name, trained, updated
from jaxformer.generation.logits_processors import Temperature
from jaxformer.learning.objectives import NextToken, SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import MLP, LayerNorm, Loss
from jaxformer.model.masks import Causal, Places, Prefix, Window, places
from jaxformer.model.mixers import MultiHead
from jaxformer.model.positions import NoPosition, Rotary, Sinusoidal
from jaxformer.run.manifest import sha256
from jaxformer.run.step import Hyper, Recipe, init_state, train_step
from jaxformer.spec import InputError, checked

SIZES = {"d_model": 24, "n_layers": 4, "n_heads": 3, "d_ff": 11, "context_length": 23}
V, T = 29, 17
ONE_AT_A_TIME = {
    "cross-layer attention": Decoder(**SIZES, kernel=(Softmax(), Borrow())),
    "differential attention": Decoder(**SIZES, kernel=Differential(), position=Rotary(), mask=(Causal(), Window(5))),
    "latent attention": Decoder(**SIZES, mixer=Latent(), position=Rotary()),
    "gated heads": Decoder(**SIZES, mixer=GatedHeads(), bias=True),
    "gated linear attention": Decoder(**SIZES, mixer=GatedLinear()),
    "hyper-connections": Decoder(**SIZES, residual=HyperConnections()),
    "experts": Decoder(**SIZES, feed_forward=Experts()),
    "several tokens": MultiToken(**SIZES),
}
TOGETHER = {
    "layers share, connections, experts": Decoder(
        **SIZES, kernel=(Softmax(), Borrow()), residual=HyperConnections(), feed_forward=Experts()
    ),
    "three gated linear layers to one of attention": Decoder(
        **SIZES, mixer=(GatedLinear(), GatedLinear(), GatedLinear(), MultiHead()), position=Sinusoidal()
    ),
    "an encoder–decoder of latent attention": EncoderDecoder(**SIZES, mixer=Latent(), position=Rotary()),
}
DEFAULT = ("layers share, connections, experts",)
SOME = "masked diffusion", "experts"
MODELS = pytest.mark.parametrize(
    "model",
    [
        *(pytest.param(model, id=name, marks=pytest.mark.slow) for name, model in ONE_AT_A_TIME.items()),
        *(
            pytest.param(model, id=name, marks=() if name in DEFAULT else pytest.mark.rare)
            for name, model in TOGETHER.items()
        ),
    ],
)


def draws(*shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, V, shape, dtype=np.int32))


@MODELS
def test_cached_equals_the_full_pass(model):
    """Prompts of several lengths, padded; then token by token."""
    model = checked(dataclasses.replace(model, vocab_size=V))
    params = updated(jax.jit(model.init)(jax.random.key(0)), trained(loud(model), model.declared()))
    text, lengths = draws(3, T), np.array([9, 5, 7])
    memory = model.encode(params, text[:, :8], places(jnp.ones((3, 8), jnp.int32))).h if model.encodes else None
    forward = jax.jit(lambda ids, at, cache: model.hidden(params, ids, at, cache=cache, memory=memory)[:2])
    full, _ = forward(text, places(jnp.ones((3, T), jnp.int32)), None)
    segment = jnp.asarray((np.arange(9) < lengths[:, None]).astype(np.int32))
    h, cache = forward(text[:, :9], places(segment, jnp.zeros_like(segment)), model.cache(3, T))
    rows, one = jnp.arange(3), jnp.ones((3, 1), jnp.int32)
    for i, length in enumerate(lengths):
        np.testing.assert_allclose(h[i, :length], full[i, :length], atol=2e-4)
    for t in range(T - 9):
        at = jnp.asarray(lengths + t)
        h, cache = forward(text[rows, at][:, None], Places(at[:, None], one, one), cache)
        np.testing.assert_allclose(h[:, 0], full[rows, at], atol=2e-4)


def test_a_layer_that_borrows_has_no_cache():
    borrowing = dataclasses.replace(TOGETHER["layers share, connections, experts"], vocab_size=V).cache(3, T)
    assert borrowing["block1"] == {} and {"k", "v", "position"} <= borrowing["block0"].keys()


# --- training and resuming, from the outside


TEXT = "the quick brown fox jumps over the lazy dog, and the dog does not mind; " * 40
ADAMW = AdamW(Constant(1e-3))
RUNS = {
    **{name: (model, NextToken(), ADAMW, {}) for name, model in (ONE_AT_A_TIME | TOGETHER).items()},
    "early exit": (Decoder(**SIZES), EveryLayer(), ADAMW, {}),
    "fill in the middle": (Decoder(**SIZES), FillInTheMiddle(marks=(253, 254, 255)), ADAMW, {}),
    "masked diffusion": (Encoder(**SIZES), MaskedDiffusion(mask=255, special=(255,)), ADAMW, {}),
}
RUNS["an encoder–decoder of latent attention"] = (
    TOGETHER["an encoder–decoder of latent attention"],
    *(SequenceToSequence(), ADAMW, {"corpus": Reverse(examples=200, length=7), "sampling": Examples()}),
)


def marks(name):
    return () if name in DEFAULT else pytest.mark.slow if name in SOME else pytest.mark.rare


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks(n)) for n in RUNS])
def test_trains_and_resumes_to_the_same_bits(name, tmp_path):
    model, objective, optimizer, data = RUNS[name]
    (tmp_path / "text.txt").write_text(TEXT)
    data = {"corpus": TextFiles(str(tmp_path / "text.txt")), "tokenizer": Bytes(end_token=bool(data))} | data
    knobs = {"steps_per_call": 2, "log_every": 2, "eval_every": 6, "save_every": 3, "sample_tokens": 0}
    sampler = Unmasking(rounds=4) if name == "masked diffusion" else None
    config = Config(
        *(str(tmp_path / "run"), model, Data(**data, batch_size=4, window=T), objective, optimizer),
        *(Train(steps=6, ema_decay=0.9, **knobs), sampler),
    )
    run = jaxformer.train(config)
    jaxformer.train(config, {"train.steps": 3}, tmp_path / "again")
    assert sha256(jaxformer.train(config, directory=tmp_path / "again").state) == sha256(run.state)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row.get("split") == "train"]
    assert np.isfinite([row["loss"] for row in rows]).all() and train[-1]["loss"] < train[0]["loss"] + 1
    if isinstance(model.feed_forward, Experts) or isinstance(model, MultiToken):
        assert all(np.isfinite(list(row["losses"].values())).all() for row in rows)
        assert all(row["objective_loss"] > row["loss"] for row in train)
    if sampler:
        opened = jaxformer.open_run(tmp_path / "run")
        text = opened.sample("the quick", tokens=8, seed=3)
        assert text.startswith("the quick") and text == opened.sample("the quick", tokens=8, seed=3)


# --- losses of parts, and what no gradient moves


def batch():
    segments = (np.arange(T + 1) < np.array([[18], [11], [4], [15]])).astype(np.int32)
    return {"tokens": draws(4, T + 1), "segments": jnp.asarray(segments)}


def stepped(slices, model):
    recipe, hyper = Recipe(model, slices=slices), Hyper(np.uint32(1), np.int32(9), AdamW())
    state = init_state(recipe, hyper)
    return state, *jax.jit(train_step, static_argnums=0)(recipe, state, batch(), hyper)


@pytest.fixture(scope="module")
def experts():
    return Decoder(**(SIZES | {"n_layers": 2}), vocab_size=V, feed_forward=Experts(alpha=0.5))


def test_losses_and_state_of_parts_under_accumulation(experts):
    """The mean of a number of each row, and the next value of what is not trained, are those of the whole batch."""
    _, whole, row = stepped(1, experts)
    _, cut, same = stepped(2, experts)
    chex.assert_trees_all_close(row, same, rtol=1e-4)
    chex.assert_trees_all_close(whole.params, cut.params, atol=2e-5)
    assert float(row["losses"]["balance"]) > 2 * 0.9  # of each layer about 1
    expected = row["loss"] + 0.5 * row["losses"]["balance"]
    np.testing.assert_allclose(row["objective_loss"], expected, rtol=1e-5)


def test_what_is_not_trained_has_no_gradient_and_no_state(experts):
    state, after, _ = stepped(1, experts)
    bias = lambda tree: tree["decoder"]["layers"]["block0"]["feed_forward"]["bias"]
    moved = np.asarray(bias(after.params))
    assert bias(state.params).shape == (2, 4) and not bias(state.params).any()
    assert set(np.unique(np.abs(moved)).round(6)) <= {0.0, np.float32(0.001).round(6)} and moved.any()
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]
    assert any(name.endswith("feed_forward/up") for name in names)
    assert not any(name.endswith("/feed_forward/bias") for name in names)


def test_a_loss_is_a_mean_over_rows_weighed_by_their_tokens(experts):
    model, example = experts, NextToken().prepare(batch(), jax.random.key(0))
    params = loud(model)
    out = model.hidden(params, example.ids, example.at)
    weights = np.asarray(example.weights).sum(1)
    sums = NextToken().sums(model, params, example, jnp.ones(V))
    found = NextToken().report({name: float(value) for name, value in sums.items()})["losses"]["balance"]
    np.testing.assert_allclose(
        found, (np.asarray(out.losses["balance"].value) * weights).sum() / weights.sum(), rtol=1e-5
    )


def test_what_is_only_reported_changes_no_gradient():
    """A loss of weight 0, even one that is no number, and one of padding."""

    class Broken(MLP):
        def __call__(self, params, x, at, key):
            out = super().__call__(params, x, at, key)
            return out._replace(losses={"broken": Loss(jnp.log(-jnp.square(out.h).sum((1, 2))), 0.0)})

    model = Decoder(**(SIZES | {"n_layers": 1}), vocab_size=V, feed_forward=Broken())
    _, after, row = stepped(1, model)
    assert np.isnan(row["losses"]["broken"]) and "objective_loss" not in row
    chex.assert_tree_all_finite(after)


def test_sums_for_what_is_trained_are_refused():
    class Wrong(MLP):
        def __call__(self, params, x, at, key):
            return super().__call__(params, x, at, key)._replace(sums={"up": 0 * params["up"]})

    with pytest.raises(ValueError, match="decoder/layers/block0/feed_forward/up: a part gives sums for it"):
        stepped(1, Decoder(**(SIZES | {"n_layers": 1}), vocab_size=V, feed_forward=Wrong()))


# --- what is refused


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (Decoder(**SIZES, feed_forward=ExpertChoice()), "model.feed_forward=ExpertChoice looks ahead"),
        (Encoder(**SIZES, mixer=GatedLinear()), "model.mixer=GatedLinear sees the past alone, but the encoder's mask"),
        (EncoderDecoder(**SIZES, mixer=GatedLinear()), "model.mixer=GatedLinear sees the past alone"),
        (Decoder(**SIZES, mask=Prefix(), feed_forward=ExpertChoice()), "model.feed_forward=ExpertChoice looks ahead"),
        (Decoder(**SIZES, mixer=GatedLinear(), kernel=None), "model.kernel=None leaves no attention"),
        (Decoder(**SIZES, kernel=(Softmax(), Borrow()), mask=(Window(3), Causal())), "must see as far back as one"),
        (
            EncoderDecoder(**SIZES, mixer=GatedLinear(), encoder_mask=Causal(), position=Rotary()),
            "model.position=Rotary is not read by model.mixer=GatedLinear, MultiHead",
        ),
        (Decoder(**SIZES, mixer=Latent(turned=7), position=Rotary()), "model.position turns 7 of the 7 numbers"),
        (Decoder(**SIZES, mixer=Latent(), n_kv_heads=1), "model.n_kv_heads=1 is not read by model.mixer=Latent"),
        (Decoder(**SIZES, mixer=GatedLinear(), kernel=Differential()), "model.kernel=Differential is not read"),
        (Decoder(**SIZES, mixer=GatedLinear(), position=Rotary()), "model.position=Rotary is not read"),
    ],
    ids=lambda case: None if isinstance(case, str) else type(case).__name__,
)
def test_parts_that_do_not_go_together(model, sentence):
    with pytest.raises(ValueError, match=sentence):
        checked(model, "model.")


def test_mixers_of_an_encoder_decoder():
    model = EncoderDecoder(**SIZES, mixer=GatedLinear(), encoder_mixer=MultiHead())
    assert [k.mixer for s in ("encoder", "decoder") for k in checked(model, "model.").kinds(s)] == [
        MultiHead(),
        GatedLinear(),
    ]
    checked(Encoder(**SIZES, feed_forward=ExpertChoice()), "model.")
    checked(Decoder(**(SIZES | {"d_model": 25}), mixer=GatedLinear(), position=Sinusoidal(), head_width=8), "model.")


def test_no_position_is_not_set_in_vain():
    """Where no mixer reads positions; a part of one's own is, even if it is made of none."""

    class Own(NoPosition):
        pass

    checked(Decoder(**SIZES, mixer=GatedLinear(), position=NoPosition()), "model.")
    with pytest.raises(ValueError, match="position=Own is not read by"):
        checked(Decoder(**SIZES, mixer=GatedLinear(), position=Own()), "model.")


# --- by hand


@pytest.mark.parametrize("mask", [Causal(), (Causal(), Window(5))], ids=["one kind", "two kinds"])
def test_initializers_know_the_layer(mask):
    model = Decoder(**SIZES, vocab_size=V, kernel=Differential(), mask=mask)
    layers = jax.jit(model.init)(jax.random.key(0))["decoder"]["layers"]
    for i in range(4):
        block, turn = (f"block{i % 2}", i // 2) if isinstance(mask, tuple) else ("block0", i)
        start = layers[block]["attention"]["kernel_params"]["start"][turn]
        np.testing.assert_allclose(start, 0.8 - 0.6 * np.exp(-0.3 * i), rtol=1e-6)


class FirstValues(Softmax):
    """Values have half of the first layer's (after arXiv:2410.17897)."""

    def share(self, params, seen, below):
        first = below.get("v1", seen["v"])
        return {**seen, "v": (seen["v"] + first) / 2}, {"v1": first}


class FirstValuesOfAll(FirstValues):
    whole_stack = True


class Gathers(MultiHead):
    """Adds what the layers below have handed on, their inputs."""

    def __call__(self, params, parts, x, context):
        out, below = super().__call__(params, parts, x, context), context.below.get("inputs", jnp.zeros_like(x))
        return out._replace(h=out.h + below, handed={**out.handed, "inputs": x + below})


class GathersOfAll(Gathers):
    whole_stack = True


class Blends(Softmax):
    """What is seen below stays under the name that every kernel hands on."""

    shares = True

    def share(self, params, seen, below):
        mixed = {**seen, "v": (seen["v"] + below.get("seen", seen)["v"]) / 2}
        return mixed, {"seen": mixed}


@pytest.mark.parametrize(
    ("field", "alone", "together"),
    [("kernel", FirstValues(), FirstValuesOfAll()), ("mixer", Gathers(), GathersOfAll())],
)
def test_what_is_handed_on_to_nobody_is_refused(field, alone, together):
    """Where a group is one layer of several; a group of all of them gets it, and it changes what they say."""
    make = lambda n, part: Decoder(**(SIZES | {"n_layers": n}), vocab_size=V, **{field: part})
    plain = Softmax() if field == "kernel" else MultiHead()
    for part in (alone, (plain, alone)):
        told = r"layers hand on (v1|inputs), and nobody is above them .* of [12] of 4 layers; set whole_stack = True"
        with pytest.raises(InputError, match=told):
            make(4, part).init(jax.random.key(0))
    if field == "kernel":
        with pytest.raises(InputError, match="layers hand on what they see, and nobody is above them"):
            make(4, Blends()).init(jax.random.key(0))
        make(4, (Blends(), Blends())).init(jax.random.key(0))
    ids, at = jnp.arange(7)[None] % V, places(jnp.ones((1, 7), jnp.int32))
    said = {}
    for n in (1, 4):
        for part in (alone, together) if n == 1 else (together, (alone, alone, alone, alone)):
            model = checked(make(n, part))
            params = model.init(jax.random.key(0))
            said[n, part] = np.asarray(model.hidden(params, ids, at).h)
        one, two = [h for (m, _), h in said.items() if m == n]
        chex.assert_trees_all_close(one, two, rtol=1e-5, atol=1e-5)
    usual = checked(make(4, plain))
    assert np.abs(usual.hidden(usual.init(jax.random.key(0)), ids, at).h - said[4, together]).max() > 1e-3


class Unmet(NextToken):
    """Asks for an array that a tied head has not."""

    def nats(self, model, params, h, example, key):
        return super().nats(model, params, h + params["head_language"]["kernel"], example, key)


def test_a_mistake_of_ones_own_shows_before_anything_is_written(tmp_path):
    (tmp_path / "text.txt").write_text("abcdefg\n" * 90)
    data = Data(TextFiles(str(tmp_path / "text.txt")), tokenizer=Bytes(), batch_size=2)
    config = Config(str(tmp_path / "run"), Decoder(**SIZES), data, Unmet(), train=Train(steps=2))
    with pytest.raises(KeyError, match="head_language"):
        jaxformer.train(config)
    assert not (tmp_path / "run").exists()


class Even(Softmax):
    def check_sizes(self, dims, at):
        if dims["H"] % 2:
            raise ValueError(f"{at}n_heads={dims['H']} must be even")


def test_a_kernel_refuses_sizes():
    with pytest.raises(InputError, match=r"model.n_heads=3 must be even"):
        checked(Decoder(**SIZES, kernel=Even()), "model.")


def test_hyper_connections_begin_as_pre_norm():
    """All copies of the stream are alike, and the last norm does not see that there are four."""
    plain = Decoder(**SIZES, vocab_size=V, norm=LayerNorm(eps=1e-12))
    model = dataclasses.replace(plain, residual=HyperConnections())
    params, at = jax.jit(model.init)(jax.random.key(0)), places(jnp.ones((2, T), jnp.int32))
    a, b = (m.hidden(params, draws(2, T), at).h for m in (model, plain))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_matrices_of_a_batch_are_drawn_each_for_itself():
    model = Decoder(**SIZES, vocab_size=V, feed_forward=Experts(experts=5))
    box = model.declared()["decoder"]["layers"]["block0"]["feed_forward"]["up"]
    assert (str(box.letters), box.value.shape, box.fan_in) == ("LE|D->F", (4, 5, 24, 11), 24)
    few = dataclasses.replace(model, feed_forward=Experts(experts=3))
    of = lambda model: {"up": model.declared()["decoder"]["layers"]["block0"]["feed_forward"]["up"]}
    up = lambda model: draw(of(model), jax.random.key(0), lambda box: model.initializer(box, 1))["up"]
    np.testing.assert_array_equal(up(model)[:, :3], up(few))


def test_a_middle_is_moved_behind_marks():
    rows = np.asarray(draws(64, T + 1)) % 26
    example = FillInTheMiddle(marks=(26, 27, 28)).prepare({"tokens": jnp.asarray(rows)}, jax.random.key(0))
    turned = np.concatenate([example.ids, example.targets[:, -1:]], 1)
    some = turned[:, 0] == 26
    assert 0.25 < some.mean() < 0.75 and (turned[~some] == rows[~some]).all()
    for row, old in zip(turned[some], rows[some], strict=True):
        (suffix,), (middle,) = np.flatnonzero(row == 27), np.flatnonzero(row == 28)
        whole = [*row[1:suffix], *row[middle + 1 :], *row[suffix + 1 : middle]]
        assert whole == old[: T - 2].tolist()


def test_unmasking_fills_all_masks_and_keeps_the_prompt():
    model, objective = Encoder(**SIZES, vocab_size=V), MaskedDiffusion(mask=28, special=(28,), vocab_size=V)
    greedy = (checked(Temperature(0.0)),)
    drawn = generate(model, loud(model), [[1, 2, 3], [4]], 7, greedy, sampler=Unmasking(rounds=3), objective=objective)
    assert drawn.shape == (2, 7) and drawn.max() < 28


@pytest.mark.slow
def test_help_and_stored_config_know_a_strangers_part(tmp_path):
    """From the command line, in a process of its own."""
    config = "from jaxformer import Config, Decoder\nconfig = Config('run', Decoder(d_model=24, context_length=16))\n"
    (tmp_path / "config.py").write_text(config)
    command = [sys.executable, "-c", "from jaxformer.commands.main import main; main()", "train", "config.py"]
    command += [
        "--model.mixer=ideas:GatedLinear",
        "--model.feed_forward=ideas:Experts",
        "--model.feed_forward.experts=3",
        "--dry_run",
    ]
    path = ":".join([str(jaxformer.__path__[0]) + "/..", *sys.path])
    env = {"PYTHONPATH": path, "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"class": "ideas:GatedLinear"' in done.stdout and '"experts": 3' in done.stdout


def test_every_idea_keeps_the_plain_feed_forward_by_default():
    assert Decoder(**SIZES).feed_forward == MLP()
