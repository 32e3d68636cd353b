"""The command that kills a run and resumes it: it finds nothing where nothing is lost, and names what differs."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

import jaxformer
from jaxformer import Config, Data, Decoder, Train
from jaxformer.commands import main
from jaxformer.data.corpora import TextFiles
from jaxformer.lab.interruptions import Interruption, Trial
from jaxformer.lab.verify_resume import (
    batches_sha256,
    differing_arrays,
    differing_checkpoints,
    differing_configs,
    differing_rows,
    lost,
    verify_resume,
)
from jaxformer.spec import InputError

CONFIG = """
from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TextFiles

config = Config(
    directory="run",
    data=Data(TextFiles("text.txt"), batch_size=3, window=13),
    model=Decoder(n_layers=1, n_heads=2, d_model=14, context_length=17, dropout=0.2),
    train=Train(steps=400, steps_per_call=7, log_every=5, eval_every=60, save_every=30, sample_tokens=20),
)
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder with a text and a config; commands run in it, on programs compiled as users have them."""
    (tmp_path / "text.txt").write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(300)))
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("XLA_FLAGS")
    return tmp_path


def test_a_checkpoint_that_a_signal_made_may_stand_for_an_older_one():
    inf = float("inf")
    assert differing_checkpoints({660: inf, 700: 1.5}, {681: inf, 700: 1.5}) is None
    for other in ({660: inf, 700: 1.6}, {700: 1.5}, {640: inf, 700: 1.5}, {660: inf, 699: 1.5}, {660: inf, 701: 1.5}):
        assert "{660: inf, 700: 1.5}, then" in str(differing_checkpoints({660: inf, 700: 1.5}, other))


@pytest.mark.slow
@pytest.mark.parametrize(("arguments", "runs"), [(["--kills=5"], 1), (["--kills=3", "--signals=3", "--seeds=2"], 2)])
def test_kills_leave_no_trace(home, arguments, runs):
    """As a user runs it: one object on stdout, progress on stderr, and the folder is gone."""
    environment = os.environ | {"TMPDIR": str(home / "temporary")}
    (home / "temporary").mkdir()
    command = [sys.executable, "-m", "jaxformer", "verify_resume", "config.py", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found, sent = json.loads(done.stdout), int(arguments[0][-1]) + (3 if runs == 2 else 1)
    assert found["identical"] and found["difference"] is found["directory"] is None
    assert [each["signal"] for each in found["interruptions"]].count("SIGKILL") == int(arguments[0][-1])
    assert len(found["interruptions"]) == sent and f"{sent} of {sent}: SIG" in done.stderr
    assert {each["signal"] for each in found["interruptions"]} > {"SIGKILL"}
    assert max(each["saved"] for each in found["interruptions"]) > 0
    assert sum("rows: 87, alike" in each for each in found["findings"]) == runs
    assert list((home / "temporary").glob("verify_resume*")) == []


@pytest.mark.slow
def test_what_differs_is_told_and_kept(home):
    """A config that is another one at each start: status 1, the first difference, and both runs."""
    (home / "config.py").write_text(CONFIG + "import os, dataclasses\n" + NOT_PURE)
    command = [sys.executable, "-m", "jaxformer", "verify_resume", "config.py", "--kills=1", "--signals=0"]
    done = subprocess.run([*command, "--directory=kept"], capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "different: config: optimizer.clip is 1.0, then 0.5; both runs are in kept" in done.stdout
    assert (home / "kept" / "straight" / "config.json").is_file() and (home / "kept" / "resumed.log").is_file()


NOT_PURE = """
if "resumed" in "".join(os.sys.argv):
    config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, clip=0.5))
"""

# --- what is compared

ROWS = [
    {"step": 5, "split": "train", "loss": 2.5, "seconds": 1.0, "tokens_per_second": 9},
    {"step": 10, "split": "train", "loss": 2.25, "seconds": 2.0, "tokens_per_second": 9},
    {"step": 10, "split": "valid", "loss": None, "seconds": 2.0},
]


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (lambda rows: [row | {"seconds": 7.0} for row in rows], None),
        (lambda rows: [rows[0], rows[1] | {"loss": 2.26}, rows[2]], "rows: step 10, train: loss is 2.25, then 2.26"),
        (lambda rows: [*rows[:2], rows[2] | {"loss": 1.0}], "rows: step 10, valid: loss is None, then 1.0"),
        (lambda rows: [rows[0] | {"z": 1}, *rows[1:]], "rows: step 5, train: z is nothing, then 1"),
        (
            lambda rows: [rows[0], rows[2]],
            "rows: step 10, train in the straight run, step 10, valid in its place in the resumed run",
        ),
        (lambda rows: rows[:2], "rows: step 10, valid in the straight run, none in its place in the resumed run"),
        (lambda rows: [*rows, rows[1]], "rows: step 10, train is there twice in the resumed run"),
        (lambda rows: [*rows, "{"], "rows: none in the straight run, 1 torn line in its place in the resumed run"),
    ],
)
def test_rows_that_differ(tmp_path, change, difference):
    """Altered, missing, doubled, torn; but not for what they say of time."""
    for name, rows in (("one", ROWS), ("other", change(ROWS))):
        (tmp_path / name).mkdir()
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    found = differing_rows(tmp_path / "one", tmp_path / "other")
    assert found is None if difference is None else found and difference in found


def floats(*values):
    return np.array(values, np.float32).reshape(2, 3)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({}, None),
        ({"b": floats(1, 2, 9, 4, np.nan, 8)}, "b[0, 2] is 3.0, then 9.0; 2 numbers of 6 "),
        ({"b": floats(1, 2, 3, 4, np.nan, -0.0)}, "b[1, 2] is 0.0, then -0.0; 1 number of 6"),
        ({"b": np.zeros((3, 2), np.float32)}, "b is float32[2, 3], then float32[3, 2]"),
        ({"c": np.zeros(2)}, "c is none, then float64[2]"),
        ({"step": np.int32(8)}, "step[] is 7, then 8"),
    ],
)
def test_arrays_that_differ(change, difference):
    """By their bits: a NaN is like itself, and 0 is unlike −0."""
    state = {"b": floats(1, 2, 3, 4, np.nan, 0), "step": np.int32(7)}
    found = differing_arrays(state, state | change)
    assert found is None if difference is None else found and difference in found


def test_a_checkpoint_that_was_lost():
    """The start behind an interruption tells; not one that never came, nor one that found more."""
    killed = Interruption("SIGKILL", "saving", 50, 40, 1, 3.0)
    early = dataclasses.replace(killed, saved=-1, starts=0)
    assert lost([early, killed], [{"step": 0}, {"step": 40}]) is None
    assert lost([early, killed], [{"step": 0}, {"step": 50}]) is None
    assert lost([early, killed], [{"step": 0}]) is None
    assert "step 40 was saved; the next start began at step 20" in str(
        lost([early, killed], [{"step": 0}, {"step": 20}, {"step": 40}])
    )


def test_batches_and_configs_of_stored_runs(home):
    """Another seed is another config and other batches; another learning rate has the same ones."""
    data = Data(TextFiles("text.txt"), batch_size=3, window=13)
    train = Train(steps=2, steps_per_call=1, eval_every=5, save_every=5, sample_tokens=0)
    config = Config("a", Decoder(n_layers=1, n_heads=2, d_model=14, context_length=17), data, train=train)
    jaxformer.train(config)
    jaxformer.train(config, {"optimizer.clip": 0.5}, "b")
    jaxformer.train(config, {"train.seed": 1}, "c")
    a, b, c = (batches_sha256(home / name) for name in "abc")
    assert a == b != c
    assert differing_configs(home / "a", home / "a") is None
    assert differing_configs(home / "a", home / "b") == "config: optimizer.clip is 1.0, then 0.5"
    (home / "text.txt").write_text("1 plus 0 is 1\n" * 300)
    with pytest.raises(InputError, match=r"data\.corpus has SHA-256"):
        batches_sha256(home / "a")


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nowhere.py", "config 'nowhere.py' is neither a file nor a preset"),
        ("config.py --train.stepz=5", "did you mean steps?"),
        ("config.py --optimiser=SGD", "unrecognized arguments: --optimiser=SGD"),
        ("config.py --optimizer=SDG", "optimizer='SDG' must be one of"),
        ("config.py --kills=-1", "kills=-1 must be how many"),
        ("config.py --kills=0 --signals=0", "kills=0 and signals=0 interrupt nothing"),
        ("config.py --seeds=0", "seeds=0 must be how many"),
        ("config.py --directory=.", "directory='.' must be empty or new"),
    ],
)
def test_mistakes_are_told_in_a_sentence(home, capsys, arguments, message):
    before = sorted(home.rglob("*"))
    assert main.run("verify_resume", arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.count("\n") == 1
    assert sorted(home.rglob("*")) == before


def test_its_processes_import_what_it_imports(home, monkeypatch):
    (home / "their_position.py").write_text(
        "from jaxformer.model.positions import NoPosition\n\n\nclass TheirPosition(NoPosition):\n    pass\n"
    )
    seen = []
    monkeypatch.setattr(Trial, "straight", lambda trial: seen.append(trial.command) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.run("verify_resume", ["config.py", "--import=their_position", "--model.position=TheirPosition"])
    assert "--import=their_position" in seen[0]


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_runs_that_cannot_be_compared_stay(home, monkeypatch, trained, there):
    """Unlike those of a config that cannot be trained; a folder that was there stays, too, empty."""

    def refuse(*_):
        raise InputError("the corpus has changed")

    monkeypatch.setattr(Trial, "straight", lambda trial: (1.0, 2.0, 0.1) if trained else refuse())
    monkeypatch.setattr(Trial, "interrupted", lambda *_: iter(()))
    monkeypatch.setattr("jaxformer.lab.verify_resume._checks", refuse)
    kept = home / f"kept{trained}{there}"
    if there:
        kept.mkdir()
    with pytest.raises(InputError, match="the corpus has changed"):
        verify_resume("config.py", directory=kept)
    assert kept.exists() == (trained or there)


def test_a_config_in_python_is_refused():
    config = Config("none", Decoder(n_layers=1, n_heads=2, d_model=14, context_length=17))
    with pytest.raises(InputError, match="another process reads it"):
        verify_resume(config)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="must not be among overrides"):
        verify_resume("quickstart", {"directory": "x"})
