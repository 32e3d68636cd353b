"""Saves before evaluations, signals between batches, rows without a gap; what is evaluated, and what is told."""

import dataclasses
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import Mixture, TextFiles
from jaxformer.learning.optimizers import SGD, AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.run import loop, peaks, plan, reports
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter
from jaxformer.run.inspection import model_flops
from jaxformer.run.manifest import read_manifest, sha256
from jaxformer.run.members import Members
from jaxformer.run.metrics import CLOCK, Rows
from jaxformer.run.signals import ENDING, Interrupted, Received, collected
from jaxformer.run.starts import last_start
from jaxformer.spec import InputError

SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 14, "d_ff": 11, "context_length": 7}
TRAIN = Train(steps=20, steps_per_call=5, log_every=5, eval_every=10, save_every=10, sample_tokens=0)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    (path / "text.txt").write_text("".join(f"{i} and {i}\n" for i in range(211)))
    (path / "other.txt").write_text("".join(f"{i * i} is {i} x {i}\n" for i in range(67)))
    return path


def text(home, **train):
    data = Data(TextFiles(str(home / "text.txt")), batch_size=3)
    return Config(
        "none", Decoder(**SIZES), data, optimizer=AdamW(Constant(3e-3)), train=dataclasses.replace(TRAIN, **train)
    )


def rows(directory, split=None):
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in row.items() if n not in CLOCK} for row in found if split in (None, row["split"])]


def saved(directory):
    return Checkpoints(directory / "checkpoints").steps()


@pytest.fixture
def received(monkeypatch):
    """The signals of a run, to which a test may add."""
    found = Received()

    class Context:
        def __enter__(self):
            found.clear()
            return found

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(loop, "collected", Context)
    return found


@pytest.fixture
def batches(monkeypatch):
    """Counts the batches that evaluations take; `at` maps such a count to what is called then."""
    calls = {"count": 0}
    evaluated = plan.evaluate_batch

    def counted(*arguments):
        calls["count"] += 1
        calls.get("at", {}).get(calls["count"], lambda: None)()
        return evaluated(*arguments)

    monkeypatch.setattr(plan, "evaluate_batch", counted)
    return calls


# --- saves, signals, and rows


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXFORMER_CACHE", str(home / "cache"))
        jaxformer.train(text(home), directory=directory)
    return directory


def test_what_is_due_is_saved_before_the_evaluation(home, whole, tmp_path, batches):
    """A process that dies in an evaluation has lost nothing: its step is on disk, and the evaluation is made up for."""

    class Killed(BaseException):
        pass

    def die():
        writers[0].wait()
        raise Killed

    writers, init = [], CheckpointWriter.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "__init__", lambda self, *a: (writers.append(self), init(self, *a))[1])
        batches["at"] = {1: die}
        with pytest.raises(Killed):
            jaxformer.train(text(home), directory=tmp_path / "run")
    assert saved(tmp_path / "run") == [10] and rows(tmp_path / "run", "valid") == []
    jaxformer.train(text(home), directory=tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    assert sha256(jaxformer.open_run(tmp_path / "run").state) == sha256(jaxformer.open_run(whole).state)
    assert Checkpoints(tmp_path / "run" / "checkpoints").rank(10) == rows(whole, "valid")[0]["loss"]


@pytest.mark.parametrize("step", [10, 20])
def test_a_signal_ends_an_evaluation_between_two_batches(home, whole, tmp_path, received, batches, step):
    """The last one of a run, too; when the run goes on, it is made first, and the rows are those of a whole run."""
    per_pass = 11
    before = per_pass * (step // 10 - 1)
    batches["at"] = {before + 3: lambda: received.append(signal.SIGTERM)}
    with pytest.raises(Interrupted, match=f"SIGTERM at step {step}"):
        jaxformer.train(text(home), directory=tmp_path / "run")
    assert before + 3 <= batches["count"] <= before + 4 and saved(tmp_path / "run")[-1] == step
    assert [row["step"] for row in rows(tmp_path / "run", "valid")] == [10, 20][: step // 10 - 1]
    batches["at"] = {}
    jaxformer.train(text(home), directory=tmp_path / "run")
    assert rows(tmp_path / "run") == rows(whole)
    count = batches["count"]
    jaxformer.train(text(home), directory=tmp_path / "run")
    assert batches["count"] == count  # nothing is left to do


def test_a_signal_in_an_evaluation_saves_a_step_that_was_not_due(home, tmp_path, received, batches):
    config = text(home, save_every=1000)
    batches["at"] = {2: lambda: received.append(signal.SIGUSR1)}
    with pytest.raises(Interrupted, match="SIGUSR1 at step 10"):
        jaxformer.train(config, directory=tmp_path / "run")
    assert saved(tmp_path / "run") == [10]
    run = jaxformer.train(config, directory=tmp_path / "run")
    assert int(run.state.step) == 20 and [row["step"] for row in rows(tmp_path / "run", "valid")] == [10, 20]


def test_a_signal_ends_a_sample(home, tmp_path, received, monkeypatch):
    """200 tokens are drawn in stretches; after one of them nothing more is."""
    drawn, decode = [], jaxformer.generation.decode._decode
    monkeypatch.setattr(
        "jaxformer.generation.decode._decode",
        lambda *a: (drawn.append(1), received.append(signal.SIGHUP), decode(*a))[2],
    )
    config = text(home, sample_tokens=200)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, context_length=211))
    with pytest.raises(Interrupted, match="SIGHUP at step 10"):
        jaxformer.train(config, {"data.window": 7}, directory=tmp_path / "run")
    assert len(drawn) == 1 and saved(tmp_path / "run") == [10]


def test_signals_are_collected_unless_they_were_ignored(monkeypatch):
    assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1} == set(ENDING)
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with collected() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGUSR1, signal.SIGTERM] and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_slurm_end_a_command_at_once(signum):
    """Before there is anything to save, with the status of the signal; one that is ignored stays so."""
    code = "import os, sys; from jaxformer.commands import main; sys.argv = ['x', 'nothing']; "
    code += f"main.run = lambda *a: os.kill(os.getpid(), {int(signum)}) or 7; main.main()"
    for ignored, status in ((False, 128 + signum), (True, 7)):
        first = f"import signal; signal.signal({int(signum)}, signal.SIG_IGN); " if ignored else ""
        assert subprocess.run([sys.executable, "-c", first + code], check=False).returncode == status


@pytest.mark.parametrize("lost", ["manifest", "metrics"])
def test_a_rank_that_was_lost_is_told_from_the_row(home, whole, tmp_path, batches, lost):
    """A process may die between the row and the checkpoint's rank; without the row the step is evaluated again."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    manifest = read_manifest(run / "checkpoints" / "20")
    dataclasses.replace(manifest, rank=None).write(run / "checkpoints" / "20")
    if lost == "metrics":
        kept = [
            line
            for line in (run / "metrics.jsonl").read_text().splitlines()
            if '"step": 20, "split": "valid"' not in line
        ]
        (run / "metrics.jsonl").write_text("\n".join(kept) + "\n")
    jaxformer.train(text(home), directory=run)
    assert read_manifest(run / "checkpoints" / "20") == manifest and rows(run) == rows(whole)
    assert (batches["count"] > 0) == (lost == "metrics")


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_a_first_save_that_was_cut_short_is_none(home, tmp_path, monkeypatch, seeds):
    """Killed between Orbax's commit and the manifest, of the first run or the second: all begin anew."""
    jaxformer.train(text(home, steps=5), {"train.seed": 7}, tmp_path / "source")
    config = dataclasses.replace(text(home), init_from=str(tmp_path / "source"))
    whole = jaxformer.train_seeds(config, seeds, directory=tmp_path / "whole")
    from jaxformer.run.manifest import Manifest

    class Killed(BaseException):
        pass

    write = Manifest.write
    with monkeypatch.context() as patch:

        def die(self, directory):
            if f"seed-{seeds[-1]}" in str(directory):
                raise Killed
            write(self, directory)

        patch.setattr(Manifest, "write", die)
        with pytest.raises((Killed, OSError)):
            jaxformer.train_seeds(config, seeds, directory=tmp_path / "run")
    again = jaxformer.train_seeds(config, seeds, directory=tmp_path / "run")
    assert [sha256(run.state) for run in again] == [sha256(run.state) for run in whole]


def test_a_run_that_goes_on_deletes_what_kills_left_of_its_files(home, whole, tmp_path):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    names = {path.name for path in tmp_path.iterdir()}
    (tmp_path / "metrics.jsonl.57.part").write_text("half")
    jaxformer.train(text(home), directory=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_run_that_fails_before_its_first_step_leaves_the_directory_free(home, tmp_path, monkeypatch, caplog):
    """As one that has not enough memory, and is tried with another model, batch or writer."""

    def fail(self, *more):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(Members, "call", fail)
    for width in (14, 16):
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
            jaxformer.train(text(home), {"model.d_model": width}, tmp_path)
        assert (tmp_path / "metrics.jsonl").read_text() == "" and "begins anew" not in caplog.text
        for name in ("tensorboard", "wandb", "base.orbax-checkpoint-tmp"):
            (tmp_path / name).mkdir(exist_ok=True)


def test_a_warm_start_needs_finite_parameters(home, tmp_path):
    config = text(home, steps=5, save_every=5)
    run = jaxformer.train(config, directory=tmp_path / "bad")
    writer = CheckpointWriter(tmp_path / "bad" / "checkpoints", 1)
    writer.save(jax.tree.map(lambda a: a * np.nan if a.dtype == np.float32 else a, run.state), 6)
    writer.close()
    shutil.rmtree(tmp_path / "bad" / "checkpoints" / "5")
    with pytest.raises(InputError, match="has no parameters of finite numbers; take another run or checkpoint"):
        jaxformer.train(dataclasses.replace(config, init_from=str(tmp_path / "bad")), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_finds_the_best_saves_it(home, tmp_path):
    run = jaxformer.train(text(home, save_every=1000), directory=tmp_path / "run")
    losses = {row["step"]: row["loss"] for row in rows(tmp_path / "run", "valid")}
    assert losses[20] < losses[10] and saved(tmp_path / "run") == [10, 20]
    for step, loss in losses.items():
        assert read_manifest(tmp_path / "run" / "checkpoints" / str(step)).rank == loss
    assert int(jaxformer.open_run(tmp_path / "run", step="best").state.step) == 20 == int(run.state.step)


def test_an_evaluation_that_asks_for_nothing_ranks_nothing(home, tmp_path, monkeypatch):
    """Where `best_by` is not in its row; the run goes on."""
    monkeypatch.setattr(Members, "evaluate", lambda *_: [{"loss": np.nan, "tokens": 0}])
    jaxformer.train(text(home), {"train.best_by": "bits_per_byte"}, directory=tmp_path / "run")
    assert saved(tmp_path / "run")[-1] == 20 and [row["tokens"] for row in rows(tmp_path / "run", "valid")] == [0, 0]
    assert all(read_manifest(path).rank in (None, np.inf) for path in (tmp_path / "run" / "checkpoints").iterdir())


# --- what is evaluated


def test_a_part_of_the_split_is_evaluated_along_the_way(home, whole, tmp_path, batches):
    """The same part each time; the whole at the end, in a row of its own, and by `evaluate`; the part ranks."""
    config = text(home)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, valid_tokens=130))
    run = jaxformer.train(config, directory=tmp_path / "run")
    found = rows(tmp_path / "run")
    assert [(row["step"], row["split"]) for row in found if row["split"] != "train"] == [
        (10, "valid"),
        (20, "valid"),
        (20, "valid_full"),
    ]
    part, last, full = (row for row in found if row["split"] != "train")
    assert 130 - 7 < part["tokens"] == last["tokens"] <= 130
    assert full["tokens"] == rows(whole, "valid")[-1]["tokens"] > 200
    assert full["loss"] == rows(whole, "valid")[-1]["loss"] != last["loss"]
    again = run.evaluate()
    assert (again["split"], again["loss"], again["tokens"]) == ("valid_full", full["loss"], full["tokens"])
    assert Checkpoints(tmp_path / "run" / "checkpoints").best() == (20, last["loss"])
    with pytest.raises(InputError, match="valid_tokens=0 must be at least 1"):
        jaxformer.train(config, {"data.valid_tokens": 0}, directory=tmp_path / "none")


def mixed(home, **fields):
    parts = TextFiles(str(home / "text.txt")), TextFiles(str(home / "other.txt"))
    data = Data(Mixture(parts, (0.95, 0.05), **fields), batch_size=3)
    return dataclasses.replace(text(home), data=data)


def test_each_corpus_of_a_mixture_is_validated_apart(home, tmp_path):
    run = jaxformer.train(mixed(home), {"train.best_by": "loss_other"}, directory=tmp_path / "run")
    row = rows(tmp_path / "run", "valid")[-1]
    assert list(row)[2:] == [
        *("loss", "bits_per_byte", "tokens", "loss_text", "bits_per_byte_text", "tokens_text"),
        *("loss_other", "bits_per_byte_other", "tokens_other"),
    ]
    prepared = plan.prepare_data(run.config, run.tokenizer)
    for name, source in zip(("text", "other"), prepared.valid, strict=True):
        alone = run.evaluate(source)
        assert (
            row[f"loss_{name}"] == pytest.approx(alone["loss"], rel=1e-6) and row[f"tokens_{name}"] == alone["tokens"]
        )
        assert row[f"bits_per_byte_{name}"] == pytest.approx(alone["bits_per_byte"], rel=1e-6)
    assert row["loss"] == pytest.approx(0.95 * row["loss_text"] + 0.05 * row["loss_other"], rel=1e-6)
    assert row["tokens"] == row["tokens_text"] + row["tokens_other"]
    assert abs(row["loss_text"] - row["loss_other"]) > 0.1  # so that another mean would be another number
    assert Checkpoints(tmp_path / "run" / "checkpoints").best()[1] in [
        r["loss_other"] for r in rows(tmp_path / "run", "valid")
    ]
    (tmp_path / "tiny.txt").write_text("a" * 19)
    parts = TextFiles(str(home / "text.txt")), TextFiles(str(tmp_path / "tiny.txt"))
    tiny = dataclasses.replace(mixed(home), data=Data(Mixture(parts, (0.9, 0.1)), batch_size=3, valid_fraction=0.05))
    with pytest.raises(InputError, match="best_by='loss_tiny' is of a part that has nothing to validate on"):
        jaxformer.train(tiny, {"train.best_by": "loss_tiny"}, directory=tmp_path / "none")
    with pytest.raises(InputError, match=r"best_by='loss_third' must be a number of the evaluation: .*loss_other"):
        jaxformer.train(mixed(home), {"train.best_by": "loss_third"}, directory=tmp_path / "none")


def test_the_parts_of_a_mixture_have_names():
    twice = TextFiles("a/web.jsonl.gz"), TextFiles("b/web.txt"), TextFiles("c")
    weights = 1.0, 1.0, 1.0
    assert Mixture(twice, weights).part_names() == ("web_1", "web_2", "c")
    others = TextFiles("a/x.txt"), TextFiles("b/x.txt"), TextFiles("x_1.txt")
    assert Mixture(others, weights).part_names() == ("x_2", "x_3", "x_1")
    assert Mixture(twice, weights, ("x", "y", "z")).part_names() == ("x", "y", "z")
    with pytest.raises(ValueError, match="must be one for each"):
        Mixture(twice, weights, ("x", "y", "x")).check()


def test_members_of_a_mixture_are_evaluated_as_each_alone(home, tmp_path):
    jaxformer.train_seeds(mixed(home), [0, 1], directory=tmp_path / "both")
    jaxformer.train(mixed(home), {"train.seed": 1}, tmp_path / "one")
    for row, other in zip(rows(tmp_path / "both" / "seed-1", "valid"), rows(tmp_path / "one", "valid"), strict=True):
        assert row == pytest.approx(other, abs=1e-5)


# --- what is told


def test_the_first_loss_that_is_not_finite_is_told_with_its_step(home, tmp_path, caplog):
    """And of the checkpoints the newest finite one is opened, unless another is named."""
    config = dataclasses.replace(text(home, eval_every=1000, save_every=5, keep=9), optimizer=SGD(Constant(1e3)))
    with pytest.MonkeyPatch.context() as patch:  # the first steps are sound
        patch.setattr(SGD, "transform", lambda self, declared, *at: jax_sgd(self.learning_rate(*at)))
        jaxformer.train(config, directory=tmp_path / "run")
    losses = [row["loss"] for row in rows(tmp_path / "run", "train")]
    assert losses[0] is not None and losses[-1] is None
    told = [r.getMessage() for r in caplog.records if "no finite number" in r.getMessage()]
    assert len(told) == 1 and re.match(r"step 9: the loss is (nan|inf), no finite number", told[0])
    caplog.clear()
    assert int(jaxformer.open_run(tmp_path / "run").state.step) == 5
    assert [int(m) for m in re.findall(r"checkpoints.(\d+) holds parameters that are no finite", caplog.text)] == [
        20,
        15,
        10,
    ]
    caplog.clear()
    assert int(jaxformer.open_run(tmp_path / "run", step=15).state.step) == 15
    assert "15 holds parameters that are no finite numbers" in caplog.text


@pytest.mark.parametrize("gone", [shutil.rmtree, lambda path: path.rename(path.with_name("moved"))])
def test_a_directory_that_is_deleted_or_moved_in_the_midst_ends_the_run(home, tmp_path, monkeypatch, gone):
    """And is not begun anew without its config."""
    write = Rows.write

    def then_gone(self, **row):
        write(self, **row)
        if row["step"] == 4:
            gone(tmp_path / "run")

    monkeypatch.setattr(Rows, "write", then_gone)
    with pytest.raises(OSError, match=r"metrics.jsonl was deleted or moved while the run wrote to it"):
        jaxformer.train(text(home, log_every=2, save_every=9), directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_gone_when_it_is_saved_to_ends_the_run(home, tmp_path, monkeypatch):
    """With no row before: no mistake of the config's."""
    save = CheckpointWriter.save
    gone = lambda self, *args: (shutil.rmtree(tmp_path / "run"), save(self, *args))[1]
    monkeypatch.setattr(CheckpointWriter, "save", gone)
    with pytest.raises(OSError, match=r"run was deleted or moved while the run trained") as error:
        jaxformer.train(text(home, save_every=4), directory=tmp_path / "run")
    assert not isinstance(error.value, FileNotFoundError)


def test_a_trace_counts_as_no_training(home, tmp_path, monkeypatch):
    """To begin and to end one takes time."""
    late, clock = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + sum(late))
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_: late.append(1e6))
    run = jaxformer.train(text(home, log_every=1), directory=tmp_path / "run", profile=(2, 4))
    lines = Path(run.config.directory, "metrics.jsonl").read_text().splitlines()
    assert 0 < json.loads(lines[-1])["seconds"] < 1e6 and len(late) == 3


def jax_sgd(rate):
    """Steps that are small up to the seventh, and then are not."""
    import optax

    def update(grads, count, params=None):
        factor = jax.numpy.where(count < 7, 1e-3, jax.numpy.inf)
        return jax.tree.map(lambda g: -factor * g, grads), count + 1

    return optax.GradientTransformation(lambda params: jax.numpy.int32(0), update)


def test_nothing_but_infinite_checkpoints_is_said(home, tmp_path, caplog):
    config = text(home, eval_every=1000, save_every=20, keep=1)
    run = jaxformer.train(config, directory=tmp_path / "run")
    writer = CheckpointWriter(tmp_path / "run" / "checkpoints", 1)
    bad = jax.tree.map(lambda a: a * np.nan if a.dtype == np.float32 else a, run.state)
    writer.save(bad, 21)
    writer.close()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "20")
    assert math.isnan(float(jax.tree.leaves(jaxformer.open_run(tmp_path / "run").state.params)[0].ravel()[0]))
    assert "has no checkpoint of finite numbers: the newest is taken" in caplog.text


def test_a_batch_of_which_nothing_is_asked_is_told_once(caplog):
    """And not as a loss that is no number."""
    told = reports.Reports.__new__(reports.Reports)
    told._told, told._seeds, told._most = set(), [4, 5], np.inf
    losses = np.array([[1.0, np.nan, 2.0, np.inf], [1.0, 2.0, 2.0, 2.0]])
    weights = np.array([[7.0, 0.0, 7.0, 7.0, 7.0], [7.0, 7.0, 0.0, 7.0, 7.0]])
    for _ in range(2):
        told._warn(40, losses, weights)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "step 42 of seed 4",
        "step 44 of seed 4",
    ]
    assert "all weights are 0" in caplog.messages[0] and "the loss is inf" in caplog.messages[1]


def test_without_a_terminal_no_minute_is_silent(home, tmp_path, caplog, monkeypatch):
    """A line of loss, speed and time left every so many seconds, in evaluations as well."""
    assert reports.QUIET < 60
    monkeypatch.setattr(reports, "QUIET", 0.01)
    caplog.set_level(logging.INFO, "jaxformer")
    jaxformer.train(text(home, steps=400, eval_every=200), directory=tmp_path / "run")
    lines = [m for m in caplog.messages if re.match(r"step \d+ of 400: ", m)]
    numbers = r"loss \d\.\d{4}, [\d,]+ tokens/s, \d+:\d\d:\d\d of training left"
    doing = r"(; (compiling|evaluating|saving))?"
    assert all(re.fullmatch(rf"step \d+ of 400: ({numbers}|no step is done yet){doing}", line) for line in lines)
    assert any("left" in line for line in lines)
    shown = reports.Reports([dataclasses.replace(text(home, steps=400), directory=str(tmp_path))], 0, jax.devices())
    shown.pause("compiling")
    shown.close()
    shown._say()
    assert caplog.messages[-1] == "step 0 of 400: no step is done yet; compiling"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_full_disk_leaves_no_file_and_no_writer_open(home, tmp_path):
    configs = [dataclasses.replace(text(home, steps=400), directory=str(tmp_path / name)) for name in "ab"]
    [(tmp_path / name).mkdir() for name in "ab"]
    shown, closed = reports.Reports(configs, 0, jax.devices()), []
    for name, run in zip("ab", shown._runs, strict=True):
        run._file.close()
        run._file = open("/dev/full", "w")  # noqa: SIM115
        run._file.write("a row")
        run._sinks[name] = types.SimpleNamespace(close=lambda name=name: closed.append(name))
    with pytest.raises(OSError, match="No space left"):
        shown.close()
    assert sorted(closed) == ["a", "b"] and all(run._file.closed for run in shown._runs)


def test_runs_of_two_threads_that_end_in_turn_leave_the_handlers_as_they_were():
    own = logging.getLogger("jaxformer")
    before = own.handlers, own.propagate, own.level, logging.getLogger().handlers
    first, second = reports.shown(), reports.shown()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert (own.handlers, own.propagate, own.level, logging.getLogger().handlers) == before


def test_the_lines_are_for_no_terminal(home, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shown = reports.Reports([dataclasses.replace(text(home), directory=str(tmp_path))], 0, jax.devices())
    assert shown._lines is None
    shown.close()


def test_rows_tell_the_share_of_the_peak_and_of_the_host(home, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(peaks, "peak_flops", lambda devices, dtype: {"float32": 1e9}[dtype])
    monkeypatch.setattr(reports, "peak_memory", lambda devices: 77 * len(devices))
    config = text(home)
    with caplog.at_level(logging.INFO):
        jaxformer.train(config, directory=tmp_path / "run")
    assert "peak       0.001 TFLOP/s of float32 products, measured" in caplog.messages
    assert last_start(tmp_path / "run")["peak_flops"] == 1e9
    found = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    run = jaxformer.open_run(tmp_path / "run")
    recipe = plan.recipe_of(run.config, run.tokenizer, run.classes)
    a_token = model_flops(recipe, {"tokens": jax.ShapeDtypeStruct((3, 8), "int32")}) / (3 * 7)
    for row in (row for row in found if row["split"] == "train"):
        assert row["mfu"] == pytest.approx(row["tokens_per_second"] * a_token / 1e9, rel=1e-3, abs=1e-4)
        assert 0 <= row["host"] <= 1 and row["peak_memory"] == 77
    assert not any(CLOCK - {"seconds"} & row.keys() for row in found if row["split"] != "train")


class Call:
    """What a call gives, which the device is through with at a time."""

    def __init__(self, clock, done):
        self.is_ready = lambda: clock[0] >= done


def test_a_device_is_idle_from_when_it_was_last_seen_at_work(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(reports.time, "perf_counter", lambda: clock[0])
    idle = reports.Idle()
    idle.begin()
    steps = (  # began, returned, done, looks; idle in all
        (1.0, 1.5, 9.0, (5.0, 7.0), 1.5),  # the first one
        (8.0, 8.5, 12.0, (10.0, 11.0, 13.0), 1.5),  # dispatched while the device works
        (14.0, 14.5, 20.0, (), 5.0),  # since 11.0
        (18.0, 21.0, 30.0, (), 8.0),  # it came to its end in the dispatch
        (40.0, 44.0, 44.0, (45.0,), 27.0),  # comes back done, as of a device that works in the dispatch
        (46.0, 48.0, 48.0, (), 29.0),
    )
    for began, returned, done, looks, total in steps:
        clock[0] = began
        idle.look()
        clock[0] = returned
        idle.called(began, Call(clock, done))
        assert idle.seconds == total
        for clock[0] in looks:
            idle.look()
    idle.begin()
    assert idle.seconds == 0


class Awaited(Call):
    """Is waited for when somebody takes its numbers."""

    def __init__(self, clock, done):
        super().__init__(clock, done)
        self._wait = lambda: clock.__setitem__(0, max(clock[0], done))

    def __array__(self, dtype=None, copy=None):
        self._wait()
        return np.full((), 7)


def test_a_device_works_until_what_is_waited_for_is_there(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(reports.time, "perf_counter", lambda: clock[0])
    idle = reports.Idle()
    idle.begin()
    for began, done, idle_in_all in ((1.0, 9.0, 1.0), (10.0, 12.0, 2.0)):
        clock[0] = began
        out = Awaited(clock, done)
        idle.called(began, out)
        assert idle.fetched({"loss": out}) == {"loss": 7} and clock[0] == done
        assert idle.seconds == idle_in_all


def test_speed_is_of_the_calls_that_are_done(home, tmp_path, monkeypatch):
    """Calls that come back done are told at once; those of an accelerator with the next one in flight."""
    clock = [0.0]
    monkeypatch.setattr(reports.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(peaks, "peak_flops", lambda devices, dtype: None)
    for backend, told in (("cpu", [10, 10]), ("gpu", [0, 5])):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        shown = reports.Reports([dataclasses.replace(text(home), directory=str(tmp_path))], 0, jax.devices())
        for call, speed in enumerate(told, 1):
            _, rows = shown.timed(lambda: (clock.__setitem__(0, clock[0] + 10), {"loss": jnp.ones(1)}))
            shown.add(call, 1, 100, 0, rows)
            assert shown._speed == speed
        shown.close()
