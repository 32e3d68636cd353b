"""Faults in training: spoiled updates are skipped to the bit, counted, and end a run that has nothing else."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import decoder

import jaxformer
from jaxformer import Config, Data, Decoder, Train
from jaxformer.learning.guards import Diverged, Guard
from jaxformer.learning.objectives import NextToken
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.run import loop
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.reports import Reports
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps

FAULTS = 3, 4, 11, 57, 58, 59, 99  # steps, counted from 0


class Faulty(NextToken):
    """At some steps the loss, or the gradient alone, is no finite number."""

    steps: tuple[int, ...] = ()
    factor: str = "nan"

    def prepare(self, batch, key, step=None):
        example = super().prepare(batch, key, step)
        if step is None:
            return example
        bad = jnp.isin(step, jnp.asarray(self.steps, jnp.int32)) if self.steps else False
        factor = jnp.where(bad, float(self.factor), 1.0)
        return example._replace(weights=example.weights * factor, counted=example.weights)


GUARD = Guard()


def recipe(steps=FAULTS, guard=GUARD, factor="nan", **more):
    model = decoder(n_layers=1, d_model=12, n_heads=2, n_kv_heads=2, d_ff=5)
    return Recipe(model, Faulty(steps=steps, factor=factor), guard=guard, **more)


def hyper(steps=1000):
    return Hyper(np.uint32(5), np.int32(steps), AdamW(Constant(1e-2)), np.float32(0.9))


def buffer(n, seed=0):
    return {"tokens": np.random.default_rng(seed).integers(0, 29, (n, 3, 8), dtype=np.int32)}


@pytest.mark.parametrize("factor", ["nan", "inf", "1e30"])  # the last: a finite loss whose gradient's norm is not
def test_a_skipped_update_leaves_all_to_the_bit_but_the_step(factor):
    own, batches = recipe((2,), factor=factor), buffer(4)
    state, _ = train_steps(own, init_state(own, hyper()), batches, np.int32(2), hyper())
    before = jax.tree.map(np.array, state)
    rolled = {"tokens": np.roll(batches["tokens"], -2, 0)}
    after, rows = train_steps(own, state, rolled, np.int32(1), hyper())
    for name in ("params", "opt_state", "ema"):
        chex.assert_trees_all_equal(getattr(after, name), getattr(before, name))
    assert int(after.step) == 3 and int(after.skips.total) == int(after.skips.in_a_row) == 1
    assert rows["skipped"][0] == rows["skipped_in_a_row"][0] == 1
    assert np.isfinite(rows["loss"][0]) == (factor == "1e30")
    again, _ = train_steps(own, after, {"tokens": np.roll(batches["tokens"], -3, 0)}, np.int32(1), hyper())
    assert int(again.skips.in_a_row) == 0 and int(again.skips.total) == 1
    moved = jax.tree.map(lambda a, b: bool((np.asarray(a) != b).any()), again.params, before.params)
    assert any(jax.tree.leaves(moved))


def test_without_a_guard_the_parameters_are_lost():
    own = recipe((0,), guard=None)
    state, _ = train_steps(own, init_state(own, hyper()), buffer(1), np.int32(1), hyper())
    assert state.skips == () and not np.isfinite(state.params["embedding"]["table"]).all()


@pytest.mark.parametrize("slices", [1, 3])
def test_of_1000_steps_those_with_a_fault_are_skipped(slices):
    own, batches = recipe(slices=slices), buffer(200)
    state, seen = init_state(own, hyper()), []
    for _ in range(5):
        state, rows = train_steps(own, state, batches, np.int32(200), hyper())
        seen += rows["skipped"].tolist()
    assert np.flatnonzero(np.diff([0, *seen])).tolist() == [*FAULTS]
    assert int(state.skips.total) == len(FAULTS) and int(state.step) == 1000
    assert np.isfinite(state.params["embedding"]["table"]).all()


def test_a_clean_run_skips_nothing_and_is_one_without_a_guard():
    """But for rounding: XLA fuses the two programs otherwise."""
    guarded, free = recipe(()), recipe((), guard=None)
    a, rows = train_steps(guarded, init_state(guarded, hyper()), buffer(50), np.int32(50), hyper())
    b, _ = train_steps(free, init_state(free, hyper()), buffer(50), np.int32(50), hyper())
    assert rows["skipped"].tolist() == [0] * 50
    chex.assert_trees_all_close(a.replace(skips=()), b, atol=1e-5)


def test_a_spike_over_the_window_is_skipped_and_kept_out_of_it():
    guard = Guard(spike=6.0, window=10)
    own, batches = recipe((30,), guard, factor="3.0"), buffer(1)
    same = {"tokens": np.repeat(batches["tokens"], 40, 0)}
    slow = hyper()._replace(optimizer=AdamW(Constant(1e-5)))  # all losses are about alike
    state, rows = train_steps(own, init_state(own, slow), same, np.int32(40), slow)
    assert np.flatnonzero(np.diff([0, *rows["skipped"].tolist()])).tolist() == [30]
    assert int(state.skips.losses_seen) == 39 and float(state.skips.losses.max()) < 4
    # NumPy: the loss of step 30 and the window before it
    losses = np.asarray(rows["loss"], np.float64)
    assert losses[30] > losses[20:30].mean() + 6 * losses[20:30].std()


def test_no_spike_is_seen_before_the_window_is_full():
    own = recipe((5,), Guard(spike=6.0, window=10), factor="3.0")
    slow = hyper()._replace(optimizer=AdamW(Constant(1e-5)))
    same = {"tokens": np.repeat(buffer(1)["tokens"], 8, 0)}
    state, _ = train_steps(own, init_state(own, slow), same, np.int32(8), slow)
    assert int(state.skips.total) == 0


# --- in a run


def config(directory, steps, **train):
    model = Decoder(n_layers=1, n_heads=2, d_model=16, context_length=8)
    knobs = {"steps": 40, "steps_per_call": 5, "eval_every": 40, "save_every": 10, "sample_tokens": 0} | train
    return Config(str(directory), model, Data(batch_size=2), Faulty(steps=steps), AdamW(), Train(**knobs))


def rows_of(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_a_run_tells_what_it_skips_between_rows_too(tmp_path, caplog):
    run = jaxformer.train(config(tmp_path / "a", (12, 13, 27)))
    assert int(run.state.skips.total) == 3
    assert "from step 13 on 2 updates skipped (train.guard), 2 in all" in caplog.messages
    assert "from step 28 on 1 update skipped (train.guard), 3 in all" in caplog.messages
    assert [row["skipped"] for row in rows_of(tmp_path / "a") if row["split"] == "train"] == [0, 2, 3, 3]


def test_what_was_skipped_before_a_start_is_not_told_again(tmp_path, caplog):
    jaxformer.train(config(tmp_path / "a", (3,)), {"train.steps": 10})
    caplog.clear()
    jaxformer.train(config(tmp_path / "a", (3,)), {"train.steps": 20})
    assert not any("train.guard" in message for message in caplog.messages)


def test_a_run_that_diverges_at_its_end_is_not_finished(tmp_path):
    for _ in range(2):
        with pytest.raises(Diverged, match="4 updates in a row skipped, the last at step 40"):
            jaxformer.train(config(tmp_path / "a", tuple(range(36, 40)), guard=Guard(most=4)))
        assert (rows_of(tmp_path / "a")[-1]["step"], rows_of(tmp_path / "a")[-1]["split"]) == (40, "diverged")


@pytest.mark.parametrize(("in_flight", "saved", "skipped"), [(1, 20, 0), (2, 30, 8)])
def test_too_many_in_a_row_end_the_run_and_what_is_saved_is_good(tmp_path, monkeypatch, in_flight, saved, skipped):
    """On CPU they are known when the call is over; of accelerators a step is saved while the row is on its way."""

    class Accelerators(Reports):
        def __init__(self, *args):
            super().__init__(*args)
            assert self._ahead == 1
            self._ahead = in_flight

    monkeypatch.setattr(loop, "Reports", Accelerators)
    with pytest.raises(
        Diverged, match="4 updates in a row skipped, the last at step 26: the loss is nan, and the grad"
    ):
        jaxformer.train(config(tmp_path / "a", tuple(range(22, 40)), guard=Guard(most=4)))
    run = jaxformer.open_run(tmp_path / "a")
    assert (int(run.state.step), int(run.state.skips.total)) == (saved, skipped)
    assert all(np.isfinite(array).all() for array in jax.tree.leaves((run.state.params, run.state.opt_state)))


def test_a_gradient_is_named_only_where_the_parameters_are_as_they_were(tmp_path):
    """Steps 4 and 5 of the call have moved them."""
    with pytest.raises(Diverged, match="1 update in a row skipped, the last at step 3: the loss is nan; look at"):
        jaxformer.train(config(tmp_path / "a", (2,), guard=Guard(most=1)))


def test_the_command_ends_with_status_1_and_one_sentence(tmp_path, monkeypatch, capsys):
    from jaxformer.commands import main

    def fails(arguments):
        raise Diverged("runs/a: 4 updates in a row skipped")

    monkeypatch.setattr(main, "_command", lambda name: fails)
    assert main.run("train", ["x"]) == 1
    assert capsys.readouterr().err == "jaxformer: runs/a: 4 updates in a row skipped\n"


def test_a_checkpoint_from_before_guards_begins_with_none_skipped(tmp_path):
    own = recipe(())
    state, _ = train_steps(own, init_state(own, hyper()), buffer(2), np.int32(2), hyper())
    writer = CheckpointWriter(tmp_path / "checkpoints")
    writer.save(state.replace(skips=()), 2)
    writer.close()
    on_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_device), state)
    chex.assert_trees_all_equal(writer.restore(abstract, 2), state)
    spikes = dataclasses.replace(own, guard=Guard(spike=5.0, window=7))
    wider = abstract.replace(skips=jax.eval_shape(spikes.guard.begin))
    wider = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=on_device), wider)
    assert writer.restore(wider, 2).skips.losses.tolist() == [0.0] * 7
