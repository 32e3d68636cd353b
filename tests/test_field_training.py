"""Kinds of fault that were reported of other trainers: each with the right value here, on small inputs."""

import dataclasses
import functools
import json
import os
import re
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import decoder, log_softmax, loud

import jaxformer
from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TextFiles
from jaxformer.declarations import by_path, path_name
from jaxformer.learning.objectives import NextToken, SequenceToSequence
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.learning.schedules import WSD, Constant
from jaxformer.model.layers import MLP
from jaxformer.model.masks import Places
from jaxformer.model.models import EncoderDecoder
from jaxformer.model.positions import Learned, Rotary
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.metrics import CLOCK
from jaxformer.run.starts import changed_sources, last_seeds
from jaxformer.run.step import Hyper, Recipe, init_state, train_step
from jaxformer.spec import InputError

pytestmark = pytest.mark.slow

T = 13


class Clipped(SGD):
    """Nothing but clipping, so that its scale is seen in the update; Adam would hide it."""

    limit: float = 1.0

    def transform(self, declared, step, steps):
        return optax.chain(optax.clip_by_global_norm(self.limit), super().transform(declared, step, steps))


def hyper(optimizer, steps=20, **fields):
    return Hyper(np.uint32(5), np.int32(steps), optimizer, **fields)


def batch(rows=6):
    tokens = np.random.default_rng(0).integers(0, 29, (rows, T + 1), dtype=np.int32)
    lengths = np.array([13, 2, 14, 4, 3, 11])[:rows, None]  # so that slices have unequal numbers of tokens
    return {"tokens": tokens, "segments": (np.arange(T + 1) < lengths).astype(np.int32)}


def stepped(recipe, state, batch, hyper):
    return jax.jit(functools.partial(train_step, recipe))(state, batch, hyper)


def distance(a, b):
    return float(optax.tree.norm(jax.tree.map(jnp.subtract, a, b)))


# --- updates


@pytest.mark.parametrize("slices", [1, 2, 6])
def test_the_accumulated_gradient_is_clipped_once(slices):
    """Clipping each slice's gradient, or the running sum, gives the last slices more weight (transformers #986,
    lingua #59). By NumPy: the update is −rate · g · min(1, limit / |g|), g of the whole batch."""
    recipe = Recipe(decoder(n_layers=2), slices=slices)
    state = init_state(recipe, hyper(SGD(Constant(1.0))))
    free, row = stepped(dataclasses.replace(recipe, slices=1), state, batch(), hyper(SGD(Constant(1.0))))
    norm = float(row["grad_norm"])
    for limit in (norm / 7, norm * 7):
        how = hyper(Clipped(Constant(1.0), limit))
        found, row = stepped(recipe, init_state(recipe, how), batch(), how)
        factor = min(1, limit / norm)
        expected = jax.tree.map(lambda a, b, f=factor: a + f * (b - a), state.params, free.params)
        assert distance(found.params, expected) < 1e-4 * factor * norm
        assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-4)  # of before clipping


@pytest.mark.parametrize(
    "schedule",
    [Constant(0.1), WSD(0.1, 0.0, 3)],
    ids=lambda s: type(s).__name__,
)
def test_the_rate_that_is_logged_is_the_one_that_was_used(schedule):
    """Logged after the scheduler has moved on, it is that of the next step (transformers #35942); a warm-up from 0
    wastes the first update, a decay to 0 the last (transformers #34754, gpt-neox #1373)."""
    recipe, how = Recipe(decoder(n_layers=1)), hyper(SGD(schedule), steps=11)
    state, rates = init_state(recipe, how), []
    for _ in range(11):
        before = state.params
        state, row = stepped(recipe, state, batch(), how)
        rates.append(float(row["learning_rate"]))
        assert distance(state.params, before) == pytest.approx(rates[-1] * float(row["grad_norm"]), rel=1e-3)
    assert min(rates) > 0 and max(rates) == pytest.approx(0.1)


def test_what_decays_is_told_by_meaning_and_not_by_the_number_of_axes():
    """Norms and biases of stacked layers have two axes, as matrices have (salesforce/jaxformer #28, minGPT #23): a
    batch of which nothing is learned moves what decays by −rate · decay, and nothing else."""
    model = decoder(n_layers=2, bias=True, feed_forward=MLP(bias=True), position=Learned())
    recipe, how = Recipe(model), hyper(AdamW(Constant(0.5), weight_decay=0.25))
    state = init_state(recipe, how).replace(params=loud(model))
    empty = batch() | {"segments": np.zeros((6, T + 1), np.int32)}
    found, row = stepped(recipe, state, empty, how)
    assert row["weight"] == 0
    decayed = []
    for (path, a), b in zip(
        jax.tree_util.tree_flatten_with_path(state.params)[0], jax.tree.leaves(found.params), strict=True
    ):
        if not np.array_equal(a, b):
            decayed.append(path_name(path))
            np.testing.assert_allclose(b, np.asarray(a) * (1 - 0.5 * 0.25), rtol=1e-5)
    layer = "decoder/layers/block0"
    names = [f"{layer}/attention/project/{name}" for name in "qkvo"] + [
        f"{layer}/feed_forward/{n}" for n in ("up", "down")
    ]
    assert sorted(decayed) == sorted([*names, "embedding/table"])


# --- averages


def test_an_average_in_half_precision_moves_by_less_than_a_bfloat16():
    """With a memory of 0.9999 a step is 1/10000 of the difference, which bfloat16 rounds away: the average would stay
    where it was for ever (sd_dreambooth_extension #1415, ema-pytorch #18)."""
    recipe = Recipe(decoder(n_layers=1), compute_dtype="bfloat16")
    how = hyper(SGD(Constant(0.5)), ema_decay=np.float32(0.9999))
    state = init_state(recipe, how).replace(step=jnp.int32(1_000_000))
    found, _ = stepped(recipe, state, batch(), how)
    assert {a.dtype.name for a in jax.tree.leaves(found.ema)} == {"float32"}
    moved, way = distance(found.ema, state.ema), distance(found.params, state.params)
    assert way > 0.01 and moved == pytest.approx(1e-4 * way, rel=0.05)


def test_products_of_halves_are_those_of_matrices_alone():
    """The stream, norms, attention and the tied head are float32; parameters, too, and their moments."""
    recipe, how = Recipe(decoder(n_layers=2), product_dtype="bfloat16"), hyper(AdamW(Constant(0.01)))
    cast = by_path(jax.eval_shape(recipe.cast, init_state(recipe, how).params))
    halves = {path.rpartition("/")[2] for path, a in cast.items() if a.dtype == jnp.bfloat16}
    assert halves == {"q", "k", "v", "o", "up", "down"} and cast["embedding/table"].dtype == jnp.float32
    found, row = stepped(recipe, init_state(recipe, how), batch(), how)
    other = stepped(dataclasses.replace(recipe, product_dtype=None), init_state(recipe, how), batch(), how)[1]
    assert {a.dtype.name for a in jax.tree.leaves((found.params, found.opt_state))} <= {"float32", "int32"}
    assert 0 < abs(row["loss"] - other["loss"]) < 1e-2 * other["loss"]
    traced = jax.jit(lambda s: train_step(recipe, s, jax.tree.map(jnp.asarray, batch()), how)).trace(
        init_state(recipe, how)
    )
    operands = re.findall(r"dot_general.*: \(tensor<[\dx]+x(\w+)>, tensor<[\dx]+x(\w+)>", traced.lower().as_text())
    assert set(operands) == {("bf16", "bf16"), ("f32", "f32")}


def test_a_resumed_average_and_the_parameters_are_their_own(tmp_path):
    """Saved as one, both go on from the average (yolov5 #310, YOLOX #1318); with a counter of its own, that is not
    saved, its memory begins anew and it forgets all (lightly-train #892)."""
    recipe = Recipe(decoder(n_layers=1, dropout=0.2))
    how = hyper(AdamW(Constant(0.01)), ema_decay=np.float32(0.99))
    state = init_state(recipe, how)
    for i in range(7):
        if i == 4:
            writer = CheckpointWriter(tmp_path / "checkpoints")
            writer.save(state, i)
            writer.wait()
            kept = writer.restore(jax.tree.map(jnp.zeros_like, state), i)
            writer.close()
        state, _ = stepped(recipe, state, batch(), how)
    for _ in range(3):
        kept, _ = stepped(recipe, kept, batch(), how)
    chex.assert_trees_all_equal(kept, state)
    assert distance(kept.ema, kept.params) > 0.01


# --- half precision


def test_slices_add_up_in_float32():
    """Accumulated in bfloat16, small gradients vanish beside the sum (DeepSpeed #1800, Megatron-LM #372): 96 slices
    are as near to the whole in float32 as one is."""
    model = decoder(n_layers=1, d_model=12)
    tokens = {"tokens": np.random.default_rng(3).integers(0, 29, (96, T + 1), dtype=np.int32)}
    params, found = loud(model), {}
    for dtype, slices in (("float32", 1), ("bfloat16", 1), ("bfloat16", 96)):
        recipe = Recipe(model, compute_dtype=dtype, slices=slices)
        how = hyper(SGD(Constant(1.0)))
        state, _ = stepped(recipe, init_state(recipe, how).replace(params=params), tokens, how)
        found[dtype, slices] = jax.tree.map(jnp.subtract, state.params, params)
    size = float(optax.tree.norm(found["float32", 1]))
    errors = [distance(found["bfloat16", n], found["float32", 1]) / size for n in (1, 96)]
    assert errors[0] < 0.01 and errors[1] < 1.2 * errors[0]


@pytest.mark.parametrize("slices", [1, 2])
def test_many_tokens_do_not_overflow_float16(slices):
    """The gradient of a frequent token's row is a sum over all tokens, and float16 ends at 65,504: the norm would be
    infinite and clipping make every parameter NaN (fairseq #512, #4293)."""
    model = Decoder(vocab_size=11, d_model=8, n_layers=1, n_heads=2, d_ff=16, context_length=128)
    draw = np.random.default_rng(0)
    tokens = np.where(draw.random((1400, 129)) < 0.95, 3, draw.integers(0, 11, (1400, 129))).astype(np.int32)
    found = []
    for dtype in ("float32", "float16"):
        recipe, how = Recipe(model, compute_dtype=dtype, slices=slices), hyper(SGD(Constant(1.0)))
        state = init_state(recipe, how)
        after, row = stepped(recipe, state, {"tokens": tokens}, how)
        found.append((jax.tree.map(jnp.subtract, after.params, state.params), float(row["grad_norm"])))
    assert np.isfinite(found[1][1]) and found[1][1] == pytest.approx(found[0][1], rel=0.01)
    assert distance(found[0][0], found[1][0]) < 0.01 * found[0][1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rotary_angles_are_not_of_half_precision(dtype):
    """In bfloat16 the position 8,191 is 8,192, and an angle of a thousand is wrong by turns (gpt-neox #1003,
    transformers #25681, #29285): at far positions no number is off by more than its own rounding."""
    rng, position = np.random.default_rng(0), np.array([0, 1, 257, 4099, 8191, 30011])
    x = jnp.asarray(rng.normal(size=(1, 2, len(position), 14)), dtype)
    at = Places(jnp.asarray(position[None], jnp.int32), jnp.ones((1, len(position)), jnp.int32))
    found = Rotary().rotate({}, x, at)
    angle = position[:, None] * 10_000.0 ** (-np.arange(0, 14, 2) / 14)
    a, b = np.split(np.asarray(x, np.float64), 2, -1)
    expected = np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)
    assert found.dtype == dtype
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=0.012)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.rare), "float16"])
def test_a_source_of_padding_alone_gives_no_nan(dtype):
    """A softmax over nothing but −inf is NaN, and so is its gradient, which spreads to every parameter (burn #4697,
    pytorch #131060): here cross-attention to such a source gives 0, and its neighbours learn as if they were alone."""
    model = EncoderDecoder(vocab_size=29, d_model=12, n_layers=1, n_heads=3, d_ff=11, context_length=17)
    recipe, how = Recipe(model, SequenceToSequence(), compute_dtype=dtype), hyper(SGD(Constant(1.0)))
    state = init_state(recipe, how).replace(params=loud(model))
    source = np.random.default_rng(2).integers(0, 29, (6, 7), dtype=np.int32)
    real = batch() | {"source": source, "source_segments": np.ones((6, 7), np.int32)}
    for name, first in (("source_segments", 0), ("segments", 0)):  # row 0 has no source; then no target either
        real[name] = np.array(real[name])
        real[name][first] = 0
        found, row = stepped(recipe, state, real, how)
        assert np.isfinite(row["loss"]) and np.isfinite(row["grad_norm"]) and row["grad_norm"] > 0
        chex.assert_tree_all_finite(found.params)
    alone, _ = stepped(recipe, state, {name: a[1:] for name, a in real.items()}, how)
    assert distance(alone.params, found.params) < {"float32": 1e-4}.get(dtype, 0.02) * float(row["grad_norm"])


# --- losses


def test_smoothing_and_z_loss_leave_ignored_tokens_out():
    """The uniform part of a smoothed loss took ignored tokens in, in the sum and in what it is divided by
    (pytorch #73205, tinygrad #3570). By NumPy, over the real tokens alone; what stands in padding changes nothing."""
    model = decoder(n_layers=1)
    recipe = Recipe(model, NextToken(label_smoothing=0.3, z_loss=0.02), slices=2)
    how = hyper(SGD(Constant(1.0)))
    state = init_state(recipe, how).replace(params=loud(model))
    found, row = stepped(recipe, state, batch(), how)
    example = recipe.objective.prepare(jax.tree.map(jnp.asarray, batch()), jax.random.key(0))
    h = jax.jit(model.hidden)(state.params, example.ids, example.at).h
    logits = np.asarray(model.logits(state.params, h), np.float64)
    log_p = log_softmax(logits)
    right = np.take_along_axis(log_p, np.asarray(example.targets)[..., None], -1)[..., 0]
    z = np.log(np.exp(logits).sum(-1))
    each = -(0.7 * right + 0.3 * log_p.mean(-1)) + 0.02 * z**2
    real = batch()["segments"][:, 1:] > 0
    assert float(row["objective_loss"]) == pytest.approx(each[real].mean(), rel=1e-5)
    assert float(row["loss"]) == pytest.approx(-right[real].mean(), rel=1e-5)
    other = batch()
    other["tokens"] = np.where(other["segments"] > 0, other["tokens"], 28 - other["tokens"])
    same, _ = stepped(recipe, state, other, how)
    chex.assert_trees_all_equal(same.params, found.params)


# --- directories


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "own"))
    (tmp_path / "own").mkdir()
    (tmp_path / "text.txt").write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(60)))
    return tmp_path


def config(directory, steps=4, **fields):
    return Config(
        directory=str(directory),
        data=Data(corpus=TextFiles("text.txt"), batch_size=2, window=7),
        model=Decoder(n_layers=1, n_heads=1, d_model=6, d_ff=5, context_length=11),
        train=Train(steps=steps, steps_per_call=2, log_every=1, eval_every=2, save_every=2, sample_tokens=0),
        **fields,
    )


def test_a_tilde_is_the_users_home(home, monkeypatch):
    """A folder of the name ~ in the working directory is not what was asked for (transformers #10628,
    pytorch-lightning #19058, #19059); no shell expands it behind --directory=, and a corpus has it expanded."""
    monkeypatch.setenv("SCRATCH", str(home / "scratch"))
    jaxformer.train(config("~/runs/a"))
    run = jaxformer.train(config("x", init_from="~/runs/a"), directory="$SCRATCH/b")
    assert sorted(path.name for path in home.iterdir() if path.is_dir()) == ["own", "scratch"]
    assert (home / "own" / "runs" / "a" / "metrics.jsonl").exists()
    assert run.config.directory == str(home / "scratch" / "b")
    assert int(jaxformer.open_run("~/runs/a", step=2).state.step) == 2
    jaxformer.train(config("~/runs/a"))  # goes on, which is nothing


@pytest.mark.parametrize("name", ["Läufe/a b#%20 {x}]", 'it\'s:"so"'])
def test_a_runs_path_is_nothing_but_a_name(home, name):
    """A blank ended a name (cromwell #7441): such names are names, and the run is found again."""
    jaxformer.train(config(name, steps=2))
    jaxformer.train(config(name, steps=6))
    assert sorted(path.name for path in Path(name, "checkpoints").iterdir())[-2:] == ["4", "6"]
    run = jaxformer.open_run(name, step="best")
    assert np.isfinite(run.evaluate()["loss"]) and len(run.sample("1 ", tokens=3)) == 5


@pytest.mark.parametrize("name", ["runs [1]/a", "run*", "why?", "back\\slash"])
def test_a_path_that_would_be_read_as_a_pattern_is_refused(home, name):
    """With brackets in the path every checkpoint was saved and none found again (tensorflow #34290, #35489): so it is
    by Orbax, and the run is refused before it has trained for nothing: one that was moved there, too, which would
    delete what it has saved for what nobody can read. It can be opened, but for a backslash."""
    with pytest.raises(InputError, match="give a path without"):
        jaxformer.train(config(name))
    assert [path.name for path in home.iterdir() if path.is_dir() and path.name != "own"] == []
    jaxformer.train(config("plain", steps=2))
    Path(name).parent.mkdir(exist_ok=True)
    shutil.move("plain", name)
    with pytest.raises(InputError, match="give a path without"):
        jaxformer.train(config(name, steps=6))
    if "\\" not in name:
        assert np.isfinite(jaxformer.open_run(name).evaluate()["loss"])


def test_a_run_goes_on_where_it_was_moved_and_behind_links(home):
    """Paths kept in the state pointed at the old place, and a link was replaced by a folder: here a run whose folder
    of checkpoints lies on another disk, and which was moved, goes on to the bits of one that was left alone."""
    for name, ends in (("alone", (2, 6)), ("first", (2,))):
        for steps in ends:
            jaxformer.train(config(name, steps))
    shutil.move("first/checkpoints", "disk")
    os.symlink(home / "disk", "first/checkpoints")
    shutil.move("first", "second")
    jaxformer.train(config("second", 6))
    assert Path("second/checkpoints").is_symlink() and Path("disk/6").is_dir() and not Path("first").exists()
    hashes = [jaxformer.open_run(name).inspect()["state_sha256"] for name in ("alone", "second")]
    assert hashes[0] == hashes[1]
    rows = [
        [json.loads(line) for line in Path(n, "metrics.jsonl").read_text().splitlines()] for n in ("alone", "second")
    ]
    plain = lambda row: {k: v for k, v in row.items() if k not in CLOCK}
    assert [*map(plain, rows[0])] == [*map(plain, rows[1])]


def test_half_a_line_in_the_record_of_starts_costs_no_other(home, monkeypatch):
    """A state that breaks off was read as none, without a word (speculators #739, transformers #35782): the next start
    was written behind the half line, and both were lost, with the seeds trained together and the code of then."""
    jaxformer.train(config("run", 2))
    path = Path("run/starts.jsonl")
    whole = path.read_text()
    path.write_text(whole + whole[: len(whole) // 2])
    assert last_seeds("run") == (0,)
    jaxformer.train(config("run", 4))
    assert last_seeds("run") == (0,) and changed_sources(config("run", 4)) == []
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[0])["step"] == 0 and json.loads(lines[2])["step"] == 2
    path.write_text("half a l")
    assert last_seeds("run") == ()
