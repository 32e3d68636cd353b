"""Seeds trained together: each is the run that it would be alone, whatever interrupts them."""

import contextlib
import dataclasses
import json
import shutil
import signal
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

import jaxformer
from jaxformer import Config, Data, Decoder, Encoder, EncoderDecoder, Train
from jaxformer.commands.train import train as train_command
from jaxformer.data.batches import Batches, Examples, PackedDocuments
from jaxformer.data.corpora import TextFiles
from jaxformer.data.locks import locked
from jaxformer.data.tables import Table
from jaxformer.data.tasks import Copy
from jaxformer.data.tokenizers import Characters
from jaxformer.learning.guards import Diverged
from jaxformer.learning.objectives import Classification, SequenceToSequence
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.heads import BinaryHead
from jaxformer.run import beginning, loop
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.manifest import Manifest, sha256
from jaxformer.run.members import Members
from jaxformer.run.metrics import CLOCK
from jaxformer.run.plan import prepare_data
from jaxformer.run.reports import Reports
from jaxformer.run.signals import Interrupted, Received
from jaxformer.run.starts import last_start
from jaxformer.spec import InputError

SEEDS = 5, 0, 3
SIZES = {"n_layers": 1, "n_heads": 2, "d_model": 14, "d_ff": 11, "context_length": 7, "dropout": 0.2}
TRAIN = Train(steps=23, steps_per_call=5, log_every=3, eval_every=100, save_every=20, sample_tokens=0)
ADAM = AdamW(Constant(3e-3))
EXAMPLES = Data(batch_size=3, tokenizer=Characters(end_token=True), sampling=Examples())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    path = tmp_path_factory.mktemp("home")
    (path / "text.txt").write_text("".join(f"{i} and {i}\n" for i in range(61)))
    (path / "table.csv").write_text("text,odd\n" + "".join(f"{i * i},{i % 2}\n" for i in range(61)))
    return path


def text(home):
    data = Data(TextFiles(str(home / "text.txt")), batch_size=3)
    return Config("none", Decoder(**SIZES), data, optimizer=ADAM, train=TRAIN)


def classes(home):
    data = dataclasses.replace(EXAMPLES, corpus=Table(str(home / "table.csv"), labels=("odd",)))
    model = Encoder(**SIZES | {"dropout": 0.0}, head=BinaryHead("odd"), feed_forward=None)
    train = dataclasses.replace(TRAIN, ema_decay=0.9)
    return Config("none", model, data, Classification(), ADAM, train)


def pairs(home):
    data = dataclasses.replace(EXAMPLES, corpus=Copy(5, 2, examples=61))
    return Config("none", EncoderDecoder(**SIZES), data, SequenceToSequence(), ADAM, TRAIN)


@pytest.fixture(scope="module")
def whole(home):
    """Seeds that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXFORMER_CACHE", str(home / "cache"))
        jaxformer.train_seeds(text(home), SEEDS, directory=home / "whole")
    return home / "whole"


def opened(directory, seeds=SEEDS):
    """What a later process finds."""
    return [jaxformer.open_run(directory / f"seed-{seed}") for seed in seeds]


def digests(runs):
    return {run.config.train.seed: sha256(run.state) for run in runs}


def saved(directory, seeds=SEEDS):
    return digests(opened(directory, seeds))


def files(directory):
    return [path for path in directory.rglob("*") if path.is_file()]


def rows(run, clock=False):
    found = [json.loads(line) for line in (Path(run.config.directory) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if clock or name not in CLOCK} for row in found]


@pytest.mark.parametrize(
    "of", [text, pytest.param(classes, marks=pytest.mark.slow), pytest.param(pairs, marks=pytest.mark.rare)]
)
def test_a_member_is_its_run_alone(home, tmp_path, of):
    """State and evaluations but for rounding, with dropout or a moving average; the same rows; and it is opened."""
    often = {"train.eval_every": 11}
    together = jaxformer.train_seeds(of(home), SEEDS, often, tmp_path)
    assert saved(tmp_path) == digests(together)
    for seed, run in zip(SEEDS, together, strict=True):
        alone = jaxformer.train(of(home), often | {"train.seed": seed}, tmp_path / f"alone-{seed}")
        chex.assert_trees_all_close(run.state, alone.state, atol=1e-5, rtol=0)
        for row, other in zip(rows(run), rows(alone), strict=True):
            assert list(row) == list(other) and row.pop("split") == other.pop("split")
            assert row == pytest.approx(other, abs=1e-5)
    apart = jax.tree.map(lambda a, b: float(abs(a - b).max()), *(run.state.params for run in together[:2]))
    assert max(jax.tree.leaves(apart)) > 0.01


def test_interrupted_seeds_end_as_if_nothing_had_been(home, whole, tmp_path):
    jaxformer.train_seeds(text(home), SEEDS, {"train.steps": 13}, tmp_path)
    runs = jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)
    assert digests(runs) == saved(tmp_path) == saved(whole)
    for run, other in zip(runs, opened(whole), strict=True):
        assert [row for row in rows(run) if row["step"] != 13] == rows(other)


def test_members_killed_before_all_recorded_their_start(home, whole, tmp_path, monkeypatch):
    """They begin together all the same, as if nothing had been."""
    record_start = beginning.record_start

    def killed(config, *more):
        if config.train.seed != SEEDS[0]:
            raise KeyboardInterrupt
        record_start(config, *more)

    with monkeypatch.context() as patch:
        patch.setattr(beginning, "record_start", killed)
        with pytest.raises(KeyboardInterrupt):
            jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)
    jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)
    last = [last_start(tmp_path / f"seed-{seed}")["seeds"] for seed in SEEDS]
    assert last == [list(SEEDS)] * 3
    assert saved(tmp_path) == saved(whole)


def emptied(path):
    for file in files(path):
        file.write_bytes(b"")


@pytest.mark.parametrize("damage", [pytest.param(shutil.rmtree, marks=pytest.mark.slow), emptied])
def test_a_member_that_lost_its_newest_checkpoint_takes_the_others_back(home, whole, tmp_path, damage):
    """To the newest step of all; interrupted once more on the way, when some were ahead of what was saved."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    damage(tmp_path / "seed-0" / "checkpoints" / "23")
    jaxformer.train_seeds(text(home), SEEDS, {"train.steps": 22, "train.save_every": 1}, tmp_path)
    assert [int(run.state.step) for run in opened(tmp_path)] == [22] * 3
    assert digests(jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)) == saved(tmp_path) == saved(whole)


def test_a_finished_seed_is_not_deleted_for_one_that_lost_its_checkpoint(home, whole, tmp_path):
    """As where the last step alone was saved."""
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for seed in SEEDS:
        shutil.rmtree(tmp_path / f"seed-{seed}" / "checkpoints" / "20")
    shutil.rmtree(tmp_path / "seed-0" / "checkpoints")
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path) if path.name != "lock"}
    with pytest.raises(InputError, match=r"seed-0/checkpoints has lost the checkpoint of step 23, which .*seed-5/"):
        jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_a_seed_that_another_process_trains_keeps_all_as_they_are(home, tmp_path):
    with (
        locked(tmp_path / "seed-0" / "lock", lambda: None),
        pytest.raises(InputError, match=r"seed-0' is being trained"),
    ):
        jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path)
    assert {path.name for path in files(tmp_path)} == {"lock"}


def test_the_first_save_of_seeds_is_on_disk_before_a_row_follows(home, tmp_path, monkeypatch):
    """However long it takes: what has no row behind it was cut short, and begins anew."""
    write, evaluate, found = Manifest.write, Members.evaluate, []

    def slowly(self, directory):
        time.sleep(0.3 * ("seed-3" in str(directory)))
        write(self, directory)

    def looking(self, *more):
        found.append([Checkpoints(tmp_path / f"seed-{seed}" / "checkpoints").steps() for seed in SEEDS])
        return evaluate(self, *more)

    monkeypatch.setattr(Manifest, "write", slowly)
    monkeypatch.setattr(Members, "evaluate", looking)
    jaxformer.train_seeds(text(home), SEEDS, {"train.steps": 5}, tmp_path)
    assert found == [[[5], [5], [5]]]


@pytest.mark.slow
def test_seeds_may_be_added(home, whole, tmp_path):
    """To finished ones, which are left as they are; each goes on with those that it began with."""
    for path in (tmp_path / "more", tmp_path / "plain"):
        shutil.copytree(whole, path)
    before = {path: path.stat().st_mtime_ns for path in files(tmp_path / "more") if path.name != "lock"}
    jaxformer.train_seeds(text(home), [7], {"train.steps": 13}, tmp_path / "more")
    runs = jaxformer.train_seeds(text(home), [5, 7, 0, 3], directory=tmp_path / "more")
    assert list(digests(runs)) == [5, 7, 0, 3] and digests(runs) == saved(tmp_path / "more", [5, 7, 0, 3])
    assert before == {path: path.stat().st_mtime_ns for path in before}
    longer = {"train.steps": 29}
    runs = jaxformer.train_seeds(text(home), [7, *SEEDS], longer, tmp_path / "more")
    plain = jaxformer.train_seeds(text(home), SEEDS, longer, tmp_path / "plain")
    alone = jaxformer.train(text(home), longer | {"train.seed": 7}, tmp_path / "alone")
    assert digests(runs) == digests([alone, *plain])


def test_seconds_go_on_where_training_does(home, tmp_path):
    """Those of training so far: along the rows they never fall, and a run that goes on adds to what it has."""
    jaxformer.train_seeds(text(home), SEEDS, {"train.steps": 13}, tmp_path)
    for path in tmp_path.glob("*/metrics.jsonl"):
        found = [json.loads(line) for line in path.read_text().splitlines()]
        late = [row | {"seconds": row["seconds"] + 1e6} for row in found]
        path.write_text("".join(json.dumps(row) + "\n" for row in late))
    for run in jaxformer.train_seeds(text(home), SEEDS, directory=tmp_path):
        seconds = [row["seconds"] for row in rows(run, clock=True)]
        assert len(seconds) == 9 and seconds == sorted(seconds) and 1e6 < seconds[0] < seconds[-1]


@pytest.mark.parametrize("now", [SEEDS[:-1], SEEDS])
def test_seeds_that_go_on_with_fewer_are_told(home, tmp_path, caplog, now):
    """A program of another width has other bits."""
    jaxformer.train_seeds(text(home), SEEDS, {"train.steps": 13}, tmp_path)
    caplog.clear()
    jaxformer.train_seeds(text(home), now, directory=tmp_path)
    told = f"other than at the run's last start: seeds {[*SEEDS]} then, {[*now]} now"
    assert (told in caplog.text) == (now != SEEDS)


def test_no_row_counts_compilation_as_training(home, tmp_path, monkeypatch):
    """Of rows of another width, too, that come when others have trained."""
    pause, events, paused = Reports.pause, {}, []

    def noting(name, method):
        def noted(self, state, buffer, *count):
            events.setdefault(buffer["tokens"].shape, []).append((name, paused[-1]))
            return method(self, state, buffer, *count)

        monkeypatch.setattr(Members, name, noted)

    noting("compile", Members.compile)
    noting("call", Members.call)
    monkeypatch.setattr(Reports, "pause", lambda self, doing: paused.append(doing) or pause(self, doing))
    rows = "".join(f"{10 ** (i % 3 // 2 * 13)},{i % 2}\n" for i in range(61))  # of 1 and, a third, of 14 characters
    (tmp_path / "table.csv").write_text("text,odd\n" + rows)
    buckets = {"data.sampling.n_buckets": 2, "data.sampling.bucket_steps": 1, "model.context_length": 17}
    jaxformer.train(classes(tmp_path), buckets | {"train.steps": 8}, tmp_path / "run")
    assert [own[0] for own in events.values()] == [("compile", "compiling")] * 2
    assert {name for own in events.values() for name, _ in own[1:]} == {"call"}


@pytest.mark.parametrize("of", [text, classes, pairs])
def test_tokens_are_those_that_models_see(home, of):
    """Without padding, and without the last of a row, which is asked for and no more."""
    config = of(home)
    if of is text:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, sampling=PackedDocuments()))
    members = Members([config], prepare_data(config))
    buffer, seen = members.buffer(0), 0
    for i in range(3):
        batch = {name: jnp.asarray(array[i]) for name, array in buffer.items()}
        example = config.objective.prepare(batch, jax.random.key(0))
        at = [example.at, *([example.source.at] if example.source else [])]
        seen += sum(int((places.segment > 0).sum()) for places in at)
    assert members.real_tokens(buffer, 3) == seen > 0


def test_seeds_that_diverge_keep_no_others_from_training(home, tmp_path, monkeypatch):
    """Those that train apart from them; what ended them is raised at the end."""
    trained, found = [], iter([Diverged("first"), [None, None], Diverged("last")])

    def train(configs, *_):
        trained.append([config.train.seed for config in configs])
        if isinstance(result := next(found), Diverged):
            raise result
        return result

    monkeypatch.setattr(loop, "groups", lambda configs: [[0], [1, 2], [3]])
    monkeypatch.setattr(loop, "_train", train)
    with pytest.raises(Diverged, match="first"):
        jaxformer.train_seeds(text(home), [5, 7, 0, 3], directory=tmp_path)
    assert trained == [[5], [7, 0], [3]]


def test_of_a_call_that_makes_few_steps_few_batches_are_drawn(home, monkeypatch):
    config = classes(home)
    sampling = dataclasses.replace(config.data.sampling, n_buckets=2, bucket_steps=3)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, sampling=sampling))
    members, drawn, at = Members([config], prepare_data(config)), [], Batches.at
    monkeypatch.setattr(Batches, "at", lambda self, step: drawn.append(step) or at(self, step))
    buffer = members.buffer(7)
    assert drawn == [7, 8] and {len(array) for array in buffer.values()} == {TRAIN.steps_per_call}
    assert all((array[1] == array[i]).all() for array in buffer.values() for i in range(2, 5))


@pytest.mark.slow
def test_seeds_begin_with_another_run(home, whole, tmp_path):
    """Each with its parameters, and from then on as alone."""
    warm = {"train.steps": 5, "init_from": str(whole / "seed-0")}
    together = jaxformer.train_seeds(text(home), SEEDS, warm, tmp_path / "together")
    for seed, run in zip(SEEDS[:2], together, strict=False):
        alone = jaxformer.train(text(home), warm | {"train.seed": seed}, tmp_path / f"alone-{seed}")
        chex.assert_trees_all_close(run.state, alone.state, atol=1e-5, rtol=0)
        assert (Path(run.config.directory) / "init_from.json").is_file()


@pytest.mark.parametrize("seeds", [(5,), SEEDS], ids=["one", "several"])
def test_a_signal_behind_the_last_step_is_heard(home, tmp_path, monkeypatch, seeds):
    """The state is saved, and whoever would train something next is stopped; on a finished run, too."""
    received = Received()
    monkeypatch.setattr(loop, "collected", lambda: contextlib.nullcontext(received))
    evaluate = Members.evaluate
    monkeypatch.setattr(Members, "evaluate", lambda *a: received.append(signal.SIGTERM) or evaluate(*a))
    for _ in range(2):
        with pytest.raises(Interrupted, match="SIGTERM at step 5"):
            jaxformer.train_seeds(text(home), seeds, {"train.steps": 5}, tmp_path)
    assert [int(run.state.step) for run in opened(tmp_path, seeds)] == [5] * len(seeds)


@pytest.mark.parametrize(
    ("of", "seeds", "overrides", "message"),
    [
        (text, [], {}, r"seeds=\[\] must be one or more, each once"),
        (text, [2, 0, 2], {}, r"seeds=\[2, 0, 2\] must be one or more, each once"),
        (text, [0, -1], {}, "train.seed=-1 must be at least 0"),
        (classes, [0, 1], {"data.sampling.n_buckets": 2}, r"n_buckets=2 gives every seed rows of another width"),
        (text, [0, 9], {}, "seed-9' holds something that is no run"),
    ],
)
def test_refused_seeds_leave_nothing_behind(home, tmp_path, of, seeds, overrides, message):
    (tmp_path / "seed-9").mkdir()
    (tmp_path / "seed-9" / "notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        jaxformer.train_seeds(of(home), seeds, overrides, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_seeds_by_the_command_line(home, tmp_path, monkeypatch):
    """As many as it says, from the config's on."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "config.py").write_text(
        f"from pathlib import Path\nfrom test_members import text\nconfig = text(Path({str(home)!r}))\n"
    )
    arguments = [f"--directory={tmp_path / 'run'}", "--train.seed=8", "--train.steps=5"]
    train_command([str(tmp_path / "config.py"), "--seeds=3", *arguments])
    seeds = {run.config.train.seed: int(run.state.step) for run in opened(tmp_path / "run", [8, 9, 10])}
    assert seeds == {8: 5, 9: 5, 10: 5} and len(list((tmp_path / "run").iterdir())) == 3
