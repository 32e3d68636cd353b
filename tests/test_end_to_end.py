"""The commands as a user runs them: in processes, killed and started again."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

import jaxformer
from jaxformer.commands import main
from jaxformer.commands.main import COMMANDS
from jaxformer.run.directory import has_checkpoint
from jaxformer.run.inspection import human
from jaxformer.run.manifest import sha256
from jaxformer.run.metrics import CLOCK

ROOT = Path(__file__).parent.parent
CONFIG = """
from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TextFiles

config = Config(
    directory="run",
    data=Data(corpus=TextFiles("text.txt"), batch_size=3, window=13),
    model=Decoder(n_layers=2, n_heads=2, d_model=14, context_length=17, dropout=0.2),
    train=Train(steps=700, steps_per_call=7, log_every=5, eval_every=300, save_every=110, sample_tokens=20),
)
"""


DIGITS = "9" * 5000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and a config."""
    path = tmp_path_factory.mktemp("home")
    (path / "text.txt").write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(300)), encoding="utf-8")
    (path / "config.py").write_text(CONFIG)
    (path / "notes").mkdir()
    (path / "notes" / "todo.txt").write_text("not a run")
    return path


def command(home, name, *arguments, prefix=()):
    script = str(ROOT / "scripts" / f"{name}.py")
    environment = os.environ | {"JAXFORMER_CACHE": str(home / "cache")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*prefix, sys.executable, script, *map(str, arguments)], cwd=home, env=environment, **pipes)


def finish(process, status=0):
    out, err = process.communicate(timeout=300)
    assert process.returncode == status, err
    assert "Traceback" not in err, err
    return out, err


def rows(home, run):
    lines = [json.loads(line) for line in (home / run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in lines]


def inspect(home, run):
    out, _ = finish(command(home, "inspect_run", *run.split(), "--json"))
    return json.loads(out)


def wait_for_step(home, run, step, process):
    """Until metrics.jsonl has a row of that step or a later one."""
    path = home / run / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        if lines and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.005)
    raise AssertionError(f"the process ended before step {step}: {process.communicate()}")


@pytest.fixture(scope="module")
def whole(home):
    """A run that nothing interrupted."""
    _, err = finish(command(home, "train", "config.py"))
    return inspect(home, "run") | {"rows": rows(home, "run"), "err": err}


def test_a_run_says_what_it_does(home, whole):
    for text in ("device", "parameters", "39 tokens; 7 steps per call", "Softmax", "float32", "compiled in"):
        assert text in whole["err"]
    assert whole["err"].count("validation loss") == 3 and "\r" not in whole["err"]  # no bar without a terminal
    assert [row["step"] for row in whole["rows"] if row["split"] == "train"] == list(range(5, 701, 5))
    valid = [row for row in whole["rows"] if row["split"] == "valid"]
    assert [row["step"] for row in valid] == [300, 600, 700] and valid[-1]["loss"] < 1.8
    assert list(whole["rows"][0]) == ["step", "split", "loss", "grad_norm", "learning_rate", "skipped"]
    assert list(valid[0]) == ["step", "split", "loss", "bits_per_byte", "tokens"]
    names = {path.name for path in (home / "run").iterdir()}
    assert names == {
        "config.json",
        "tokenizer.json",
        "data.json",
        "metrics.jsonl",
        "starts.jsonl",
        "checkpoints",
        "lock",
    }
    (start,) = map(json.loads, (home / "run" / "starts.jsonl").read_text().splitlines())
    assert start["step"] == 0 and start["versions"]["jax"] and start["devices"]


@pytest.mark.parametrize(
    "signum",
    [
        pytest.param(signal.SIGINT, marks=pytest.mark.rare),
        pytest.param(signal.SIGTERM, marks=pytest.mark.slow),
        signal.SIGKILL,
    ],
)
def test_an_interrupted_run_ends_as_if_nothing_had_been(home, whole, signum):
    """Twice interrupted, dropout on: the same bits in the whole state, the same rows, none twice and none missing."""
    run = f"run-{signum.name}"
    for step in (150, 400):
        process = command(home, "train", "config.py", f"--directory={run}")
        wait_for_step(home, run, step, process)
        process.send_signal(signum)
        if signum == signal.SIGKILL:
            process.communicate()
        else:
            _, err = finish(process, 128 + signum)
            assert "the state is saved" in err
            stopped = json.loads((home / run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
            assert stopped - 5 <= max(int(p.name) for p in (home / run / "checkpoints").iterdir()) <= stopped + 14
    finish(command(home, "train", "config.py", f"--directory={run}"))
    assert inspect(home, run)["state_sha256"] == whole["state_sha256"]
    assert rows(home, run) == whole["rows"]
    assert len((home / run / "starts.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
def test_other_calls_and_layouts_give_the_same_parameters(home, monkeypatch):
    """One step a call, saved elsewhere, evaluated elsewhere: the same bits, of programs compiled as users have them."""
    monkeypatch.delenv("XLA_FLAGS")
    other = ["--train.steps_per_call=1", "--train.save_every=90", "--train.eval_every=1000", "--train.log_every=100"]
    finish(command(home, "train", "config.py", "--directory=run-seven"))
    finish(command(home, "train", "config.py", "--directory=run-other", *other))
    assert inspect(home, "run-other")["state_sha256"] == inspect(home, "run-seven")["state_sha256"]


def test_a_finished_run_does_nothing(home, whole):
    before = {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*") if path.name != "lock"}
    _, err = finish(command(home, "train", "config.py"))
    assert "is finished: it has made 700 steps" in err
    assert before == {path: path.stat().st_mtime_ns for path in (home / "run").rglob("*") if path.name != "lock"}


@pytest.mark.slow
def test_a_run_may_go_on_for_longer_with_a_notice(home, whole):
    finish(command(home, "train", "config.py", "--directory=run-short", "--train.steps=110", "--train.log_every=1"))
    _, err = finish(command(home, "train", "config.py", "--directory=run-short", "--train.steps=120"))
    assert "train.steps was 110 and is 120 from here on" in err
    assert [row["step"] for row in rows(home, "run-short") if row["split"] == "train"][-3:] == [110, 115, 120]


@pytest.mark.slow
def test_a_strangers_module_trains_goes_on_and_is_sampled_from_elsewhere(home, whole, tmp_path):
    """Without --import the run is not opened, and nothing that it names is imported."""
    text = (home / "config.py").read_text().replace("dropout=0.2", "position=Decay(rate=0.3)")
    module = "from jaxformer.model.positions import NoPosition\n\n\nclass Decay(NoPosition):\n    rate: float = 0.5\n\n"
    module += "    def bias(self, params, view, new, seen):\n        return -self.rate * view.distance()\n"
    (home / "my_parts.py").write_text(module)
    (home / "mine.py").write_text("from my_parts import Decay\n" + text)
    (home / "sub").mkdir()
    shutil.copy(home / "mine.py", home / "sub")  # which names a module of the working directory
    inspected = [sys.executable, "-P", "-m", "jaxformer", "inspect", "sub/mine.py"]
    subprocess.run(inspected, cwd=home, check=True, capture_output=True)
    for steps in (20, 30):
        finish(command(home, "train", "mine.py", "--directory=run-mine", f"--train.steps={steps}"))
    (tmp_path / "my_parts.py").write_text(module)
    _, err = finish(command(tmp_path, "sample", home / "run-mine"), 2)
    assert "class='my_parts:Decay' is no spec" in err and "--import=my_parts" in err
    out, _ = finish(command(tmp_path, "sample", home / "run-mine", "--import=my_parts", "--tokens=9"))
    assert len(out) == 10
    _, err = finish(command(tmp_path, "sample", home / "run-mine", "--import=nowhere"), 2)
    assert "--import=nowhere: ModuleNotFoundError" in err


# --- sampling, evaluation, inspection


def test_samples(home, whole):
    arguments = ["run", "--prompt=2 plus ", "--tokens=30", "--temperature=0.8", "--top_k=9", "--top_p=0.9", "--seed=4"]
    three, err = finish(command(home, "sample", *arguments, "--samples=3"))
    two, _ = finish(command(home, "sample", *arguments, "--samples=2"))
    assert err == ""
    parts = three.removesuffix("\n").split("\n---------------\n")
    assert [len(part) for part in parts] == [37] * 3 and all(part.startswith("2 plus ") for part in parts)
    assert three.startswith(two.removesuffix("\n")) and len(set(parts)) == 3


def test_sampling_needs_the_run_alone(home, whole, tmp_path):
    """Elsewhere, without the corpus, without the config file; and beyond the context of 17."""
    shutil.copytree(home / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "checkpoints" / "700")
    process = command(tmp_path, "sample", "copy", "--tokens=50", "--temperature=0")
    out, _ = finish(process)
    assert len(out) == 51 and not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_evaluate(home, whole):
    out, _ = finish(command(home, "evaluate", "run", "--json"))
    row = json.loads(out)
    assert row.keys() == {"step", "split", "loss", "perplexity", "bits_per_byte", "tokens"}
    assert (row["step"], row["split"], row["loss"]) == (700, "valid", whole["rows"][-1]["loss"])
    n_tokens = len((home / "text.txt").read_text())
    assert row["tokens"] == n_tokens - int(0.9 * n_tokens) - 1
    (home / "part.txt").write_text((home / "text.txt").read_text()[-row["tokens"] - 1 :])
    out, _ = finish(command(home, "evaluate", "run", "--file=part.txt", "--json"))
    assert json.loads(out) == row | {"split": "part.txt"}
    (home / "part.jsonl").write_text(json.dumps({"body": (home / "part.txt").read_text()}))
    other = ["--data.corpus=JSONLines", "--data.corpus.path", "part.jsonl", "--data.corpus.field=body"]
    out, _ = finish(command(home, "evaluate", "run", *other, "--json"))
    assert json.loads(out) == row | {"split": "part.jsonl"}
    out, _ = finish(command(home, "evaluate", "run", "--step=best"))
    best = min((row for row in whole["rows"] if row["split"] == "valid"), key=lambda row: row["loss"])
    assert f"step            {best['step']}\n" in out and f"{best['loss']:.4f}" in out


def test_inspect(home, whole):
    assert whole["step"] == 700 and sum(row["count"] for row in whole["table"]) == whole["n_params"]
    config = inspect(home, "config.py")
    assert config["step"] is config["state_sha256"] is None
    assert (config["table"], config["n_params"]) == (whole["table"], whole["n_params"])
    out, _ = finish(command(home, "inspect_run", "run"))
    assert "L|HK->D" in out and whole["params_sha256"] in out
    run = jaxformer.open_run(home / "run")
    assert sha256(run.state.params) == whole["params_sha256"]


def test_the_installed_command_is_the_same(home, whole):
    program = Path(sys.executable).parent / "jaxformer"
    done = subprocess.run([program, "inspect", "run", "--json"], cwd=home, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["state_sha256"] == whole["state_sha256"]
    for arguments in ([], ["nonsense"]):
        done = subprocess.run([program, *arguments], capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (2, "") and "jaxformer --help" in done.stderr


def test_the_page_of_help():
    done = subprocess.run([sys.executable, "-m", "jaxformer", "--help"], capture_output=True, text=True, check=True)
    for name in COMMANDS:
        assert re.search(rf"^  {name} +[A-Z]\w+s .*", done.stdout, re.MULTILINE)
    assert "jaxformer train quickstart\n" in done.stdout and "docs" in done.stdout and done.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("arguments", ["presets", "--help", "sample --help"])
def test_output_that_cannot_be_written_is_told_and_ends_with_status_1(monkeypatch, arguments):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "jaxformer", *arguments.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (1, "jaxformer: writing: No space left on device\n")


@pytest.mark.parametrize(
    ("arguments", "status"), [("presets >&-", 0), ("nonsense 2>&-", 2), ("new mine <&- >&- 2>&-", 2)]
)
def test_a_stream_that_is_closed_is_as_if_nobody_read_it(arguments, status):
    done = subprocess.run(f"{sys.executable} -m jaxformer {arguments}", shell=True, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
def test_a_closed_terminal_keeps_the_status():
    """The sentence that the state is saved cannot be written then."""
    code = """
    from jaxformer.commands import main
    from jaxformer.run.signals import Interrupted
    def run(*_):
        raise Interrupted(1, 5)
    main.run = run
    main.main("train")
    """
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", textwrap.dedent(code)], stderr=full).returncode == 129


# --- mistakes


@pytest.mark.parametrize(("number", "status"), [(errno.EROFS, 2), (errno.EACCES, 2), (errno.ENOSPC, 1)])
def test_a_folder_that_cannot_be_written_to_is_a_mistake_and_a_full_disk_is_none(monkeypatch, capsys, number, status):
    def fails(arguments):
        raise OSError(number, "no", "runs/a")

    monkeypatch.setattr(main, "_command", lambda name: fails)
    assert main.run("train", []) == status and "jaxformer: runs/a: no" in capsys.readouterr().err


def listing(home):
    return sorted(str(path) for path in home.rglob("*") if not {"cache", "__pycache__"} & set(path.parts))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train", "usage: jaxformer train CONFIG"),
        ("train nowhere.py", "config 'nowhere.py' is neither a file nor a preset; `jaxformer presets` lists"),
        ("train quikstart", "config 'quikstart' is neither a file nor a preset; did you mean the preset quickstart?"),
        ("trian config.py", "'trian' is no command; did you mean train?"),
        ("new config.py", "config.py exists already; give another name"),
        ("new own.py quikstart", "did you mean quickstart?"),
        (
            "train config.py --directory=new --data.corpus=notes",
            "data.corpus='notes' is a path, and must be a class; give --data.corpus=TextFiles --data.corpus.path=notes",
        ),
        ("train exits.py", "exits.py, line 1: SystemExit: 3"),
        ("train two_lines.py", "two_lines.py, line 1: ValueError: x y"),
        ("train config.py --directory=text.txt/x", "Not a directory; check the path"),
        (
            "train config.py --directory=new --train.steps=99999999999",
            "train.steps=99999999999 must be less than 2**31",
        ),
        (
            "train config.py --directory=new --data.tokenizer.alphabet=abc",
            "data.corpus=TextFiles(path='text.txt'): char",
        ),
        ("train broken.py", "broken.py, line 2: NameError"),
        ("train syntax.py", "syntax.py, line 1"),
        ("train misspelt.py", "misspelt.py, line 2: Decoder has no field n_layer; did you mean n_layers?"),
        ("train text.txt", "text.txt, line 1"),
        ("train empty.py", "empty.py: must define `config`"),
        ("train config.py --directory=new --model.n_layer=3", "did you mean n_layers?"),
        ("train config.py --directory=new --model.n_layers=x", "model.n_layers='x' must be a whole number"),
        ("train config.py --directory=new --model.n_heads=4", "model.n_heads=4 must divide model.d_model=14; 2 does"),
        ("train config.py --directory=new --steps=4", "no such field; did you mean --train.steps?"),
        ("train config.py --directory=new --model.bias --train.steps=5", "'--model.bias' must be --field.path=value"),
        ("train config.py --directory=new stray", "'stray' must be --field.path=value"),
        ("train config.py --directory=new --data.window=18", "data.window=18 must be at most model.context_length=17"),
        ("train config.py --directory=new --data.corpus.path=nowhere.txt", "corpus 'nowhere.txt' does not exist"),
        ("train config.py --directory=new --data.corpus.path=empty.txt", "is empty"),
        (
            "train config.py --directory=new --data.sampling=PackedDocuments --data.corpus.path=one.txt",
            "no document has 2",
        ),
        (
            "train config.py --directory=new --model.position=nowhere:Part",
            "model.position=nowhere:Part: ModuleNotFound",
        ),
        ("train config.py --directory=new --model.position=json:dumps", "model.position='json:dumps' must be one of"),
        ("train config.py --directory=new --model.position=Rotry", "model.position='Rotry' must be one of "),
        ("train config.py --directory=new --model.norm=Rotary", "model.norm='Rotary' must be one of LayerNorm, "),
        (
            "train config.py --directory=new --data.corpus=JSONLines",
            "data.corpus.path must be given, as --data.corpus.path=VALUE",
        ),
        ("train config.py --directory=new --init_from=nowhere", "'nowhere' holds no run"),
        ("train config.py --directory=new --init_from=run/checkpoints/17", "step=17 must be one of the checkpoints"),
        ("train config.py --directory=new --seeds=0", "seeds=0 must be how many are trained together"),
        ("train config.py --directory=new --seeds=x", "seeds=x must be how many are trained together"),
        *(
            (f"train config.py --directory=new {two}", "profile, seeds and dry_run must not be given together")
            for two in ("--seeds=2 --profile=3:5", "--seeds=2 --dry_run", "--dry_run --profile=3:5")
        ),
        *(
            (f"train config.py --directory=new {field}", message)  # Python reads no number of so many digits
            for field, message in (
                (f"--seeds={DIGITS}", f"{DIGITS} must be how many are trained together"),
                (f"--simulate_devices={DIGITS}", f"{DIGITS} must be how many devices"),
                (f"--init_from=checkpoints/{DIGITS}", f"{DIGITS}/config.json: File name too long"),
                (f"--writers=LossCurve --writers.{DIGITS}.x=3", "writers has 1 parts"),
            )
        ),
        ("train config.py --directory=new --profile=3", "profile=3 must be START:STOP"),
        ("train config.py --directory=new --profile=5:5", "profile=5:5 must be START:STOP with"),
        ("train config.py --directory=new --profile=5:701", "profile=5:701 must be START:STOP with"),
        ("train config.py --directory=new --dry_run --model.n_layers=0", "model.n_layers=0 must be at least 1"),
        (
            "train config.py --directory=new --model.remat=all",
            "model.remat='all' must be nothing_saveable, dots_saveable, ",
        ),
        ("train config.py --directory=new --model.head.cap=0", "model.head.cap=0.0 must be more than 0"),
        ("train config.py --directory=new --train.ema_decay=1", "train.ema_decay=1.0 must lie between 0 and 1"),
        ("train config.py --directory=new --writers=WandB --writers.0.mode=off", "writers.0.mode='off' must be online"),
        ("train config.py --directory=new --writers=WandB,WandB", "writers=(WandB, WandB) must differ"),
        ("plan config.py --devices=0", "devices=0 must be at least 1"),
        ("check config.py --devices=0", "devices=0 must be at least 2"),
        ("sample run --prompt_file=nowhere", "prompt_file='nowhere' is no file"),
        ("sample run --prompt_file=short.txt --prompt=x", "prompt_file='short.txt' must not be given beside prompt"),
        ("sample run --min_p=2", "min_p=2.0 must be at least 0 and at most 1"),
        ("train config.py --directory=new --data.corpus.path=short.txt", "tokens, but a row has 14"),
        ("train config.py --directory=new --data.corpus.path=latin1.txt", "latin1.txt is not UTF-8 (byte 3 is 0xe9)"),
        ("train config.py --directory=new --model.vocab_size=5", "model.vocab_size=5 must be 17, the tokenizer's"),
        ("train config.py --directory=notes", "directory='notes' holds something that is no run"),
        ("train config.py --directory=text.txt", "directory='text.txt' is a file"),
        ("train config.py --model.d_model=28", "holds another run: model.d_model was 14 and is 28"),
        (
            "train config.py --model=Bigram",
            "another run: model was Decoder and is Bigram; model.d_model was 14 and is None; model.head was Lang",
        ),
        ("train config.py --train.seed=1 --train.steps=9", "holds another run: train.seed was 0 and is 1"),
        ("sample nowhere", "'nowhere' holds no run"),
        ("sample run --prompt=é", "prompt: character 'é' (U+00E9, line 1) is not known to the tokenizer"),
        ("sample run --temperature=-1", "temperature=-1.0 must be at least 0"),
        ("sample run --temperature=nan", "temperature=nan must be a finite number"),
        ("sample run --step=" + "9" * 5000, "must be one of the checkpoints of run: "),
        ("sample damaged", "tokenizer.json: holds a tokenizer that was not fitted"),
        ("sample long", "config.json: cannot be read"),
        ("sample other", "was saved with other shapes than those of this config and tokenizer"),
        ("train config.py --directory=damaged --train.steps=900", "tokenizer that was not fitted"),
        ("sample run --top_k=0", "top_k=0 must be at least 1"),
        ("sample run --top_p=2", "top_p=2.0 must be more than 0 and at most 1"),
        ("sample run --samples=0", "samples=0 must be at least 1"),
        ("sample run --tokens=-1", "tokens=-1 must be at least 0"),
        ("sample run --step=17", "step=17 must be one of the checkpoints of run: "),
        ("sample run --tokns=3", "unrecognized arguments: --tokns=3; jaxformer sample --help lists what there is"),
        ("sample run --top_k=1.5", "argument --top_k: invalid int value: '1.5'"),
        ("sample", "the following arguments are required: run"),
        ("evaluate run --json=true", "argument --json: ignored explicit argument 'true'"),
        ("sample run --import=exits", "--import=exits: SystemExit: 3; fix the module"),
        ("train config.py --directory=new --model.position=exits:Part", "model.position=exits:Part: SystemExit: 3"),
        ("train config.py --directory=new --data.valid=TextFiles --data.valid.path=empty.txt", "data.valid=TextFiles("),
        ("train config.py --directory=new --data.valid_fraction=1e-9", "or a larger data.valid_fraction"),
        ("train config.py --directory=run-notgz --data.corpus.path=text.gz", "text.gz cannot be read: Not a gzipped"),
        ("train config.py --directory=notes --dry_run", "directory='notes' holds something that is no run"),
        (
            "train config.py --directory=new --dry_run --init_from=nowhere",
            "init_from='nowhere': 'nowhere' holds no run",
        ),
        ("evaluate run --file=nowhere.txt", "file='nowhere.txt': corpus 'nowhere.txt' does not exist in "),
        (
            "evaluate run --file=short.txt",
            "file='short.txt': characters 'o' (U+006F, short.txt, line 1), 'h' (U+0068, short.txt",
        ),
        ("evaluate run --file=empty.txt", "empty.txt: 0 tokens"),
        ("evaluate run --file=one.txt", "one.txt: 1 token cannot"),
        ("evaluate run --file=one.txt --data.corpus=TextLines", "file='one.txt' must not be given beside data.corpus;"),
        ("evaluate run --data.corpus=TextLines", "data.corpus.path must be given, as --data.corpus.path=VALUE"),
        ("evaluate run --data.corpus TextLines --data.corpus.pth one.txt", "no such field; did you mean path?"),
        ("evaluate run --data.corpos=TextLines", "data.corpos: Data has no such field; did you mean corpus?"),
        ("evaluate run --data.corpus=exits:Part", "data.corpus=exits:Part: SystemExit: 3; fix the module"),
        ("evaluate run --model.n_layers=3", "model.n_layers=3 is as it was in training; only data.corpus may differ"),
        ("evaluate run --data.corpus", "'--data.corpus' must be --field.path=value"),
        ("evaluate run --datacorpus=TextLines", "unrecognized arguments: --datacorpus=TextLines"),
        ("sample run --data.corpus=TextLines", "unrecognized arguments: --data.corpus=TextLines"),
        ("predict run --file=one.txt --text=1", "predict needs --text TEXT"),
        ("predict run --file=one.txt --data.corpus.path=one.txt", "predict needs --text TEXT"),
        ("predict run --file=nowhere.csv", "file='nowhere.csv': corpus 'nowhere.csv' does not exist in "),
        ("inspect notes", "'notes' holds no run"),
        *(
            (f"{name} seeds{more}", "'seeds' holds no run (no config.json); give one of seeds/seed-2, seeds/seed-10")
            for name, more in (("evaluate", ""), ("sample", ""), ("inspect", ""), ("predict", " --text=1"))
        ),
    ],
)
def test_a_mistake_gets_one_sentence_and_writes_nothing(home, whole, monkeypatch, capfd, arguments, message):
    for name, text in {
        "broken.py": "import jaxformer\nx = y\n",
        "syntax.py": "config = (\n",
        "misspelt.py": "from jaxformer import *\nconfig = Config('new', Decoder(n_layer=2))\n",
        "empty.py": "\n",
        "exits.py": "raise SystemExit(3)\n",
        "text.gz": "plain",
        "two_lines.py": "raise ValueError('x\\ny')\n",
        "empty.txt": "",
        "short.txt": "so short",
        "one.txt": "1",
    }.items():
        (home / name).write_text(text)
    for seed in ("seed-2", "seed-10"):
        (home / "seeds" / seed).mkdir(parents=True, exist_ok=True)
        (home / "seeds" / seed / "config.json").write_text("{}")
    (home / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    for run, name, old, new in (
        ("damaged", "tokenizer.json", None, '{"class": "jaxformer.data.tokenizers:Characters", "alphabet": null}'),
        ("long", "config.json", None, "9" * 5000),
        ("other", "config.json", '"n_layers": 2', '"n_layers": 4'),
    ):
        if not (home / run).exists():
            shutil.copytree(home / "run", home / run)
            path = home / run / name
            path.write_text(new if old is None else path.read_text().replace(old, new))
    monkeypatch.chdir(home)
    before = listing(home)
    name, *rest = arguments.split()
    try:
        status = main.run(name, rest)
    except SystemExit as error:  # argparse's, for --help
        status = error.code
    out, err = capfd.readouterr()
    assert status == 2 and message in err + out, err
    assert "Traceback" not in err and listing(home) == before
    assert err.count("\n") == 1 and out == ""


@pytest.mark.slow
def test_a_part_is_swapped_by_its_import_path(home, whole, tmp_path):
    """On the command line alone: a stranger's part and its field, a part of the package, and parts in tuples."""
    (home / "slopes.py").write_text(
        "from jaxformer.model.positions import NoPosition\n\n\nclass Slope(NoPosition):\n    rate: float = 0.5\n\n"
        "    def bias(self, params, view, new, seen):\n        return -self.rate * view.distance()\n"
    )
    quick = ["config.py", "--directory=run-swap", "--train.sample_tokens=0"]
    swap = ["--model.position.rate=0.25", "--model.position=slopes:Slope", "--model.mask=Window,Causal"]
    swap += ["--model.mask.0.size=5", "--model.feed_forward=GatedFeedForward", "--model.norm=RMSNorm"]
    for steps in (10, 20):
        finish(command(home, "train", *quick, *swap, f"--train.steps={steps}"))
    model = inspect(home, "run-swap --import=slopes")["config"]["model"]
    assert model["position"] == {"class": "slopes:Slope", "rate": 0.25}
    assert [mask["class"].split(":")[1] for mask in model["mask"]] == ["Window", "Causal"]
    assert model["mask"][0]["size"] == 5 and model["norm"]["class"] == "jaxformer.model.layers:RMSNorm"
    _, err = finish(command(home, "sample", "run-swap"), 2)
    assert "class='slopes:Slope' is no spec" in err


@pytest.mark.slow
def test_a_warm_start(home, whole, monkeypatch):
    """What fits is taken, the rest is drawn; the report says which; and the run continues without its source."""
    start = ["config.py", "--directory=run-warm", "--init_from=run", "--model.d_ff=20", "--train.seed=5"]
    start += ["--train.sample_tokens=0", "--train.steps=40", "--train.save_every=20"]
    process = command(home, "train", *start, "--train.eval_every=40")
    _, err = finish(process)
    assert "taken from run, step 700: 12 arrays" in err and "up: [2, 14, 56] there, [2, 14, 20] here" in err
    report = json.loads((home / "run-warm" / "init_from.json").read_text())
    assert report["step"] == 700 and report["unused"] == [] and len(report["taken"]) == 12
    assert set(report["not_taken"]) == {f"decoder/layers/block0/feed_forward/{name}" for name in ("up", "down")}
    monkeypatch.chdir(home)
    warm, _, _ = jaxformer.build("config.py", {"init_from": "run", "model.d_ff": 20})
    cold, _, _ = jaxformer.build("config.py", {"model.d_ff": 20})
    params = (state.params["decoder"]["layers"]["block0"] for state in (warm, cold, jaxformer.open_run("run").state))
    new, drawn, old = ({"q": p["attention"]["project"]["q"], "up": p["feed_forward"]["up"]} for p in params)
    assert (new["q"] == old["q"]).all() and (new["up"] == drawn["up"]).all() and (new["q"] != drawn["q"]).all()
    assert rows(home, "run-warm")[0]["loss"] < whole["rows"][0]["loss"] - 0.05
    before = inspect(home, "run-warm")["state_sha256"]
    shutil.rmtree(home / "run-warm" / "checkpoints" / "40")
    os.rename(home / "run", home / "run-away")
    try:
        finish(command(home, "train", *start))
        assert inspect(home, "run-warm")["state_sha256"] == before
    finally:
        os.rename(home / "run-away", home / "run")
    _, err = finish(command(home, "train", *[a for a in start if "init_from" not in a]), 2)
    assert "init_from was 'run' and is None" in err


@pytest.mark.slow
def test_a_warm_start_with_another_tokenizer_leaves_the_vocabulary(home, whole):
    (home / "letters.txt").write_text("".join(chr(65 + i) for i in range(17)) * 99)
    other = [
        "config.py",
        "--directory=run-letters",
        "--init_from=run/checkpoints/700",
        "--data.corpus.path=letters.txt",
    ]
    _, err = finish(command(home, "train", *other, "--train.steps=10", "--train.sample_tokens=0"))
    assert "embedding/table: another tokenizer" in err
    same = [*other[:1], "--directory=run-same", *other[2:3], "--data.tokenizer=TokenizerFile"]
    same += ["--data.tokenizer.path=run/tokenizer.json", "--train.steps=10", "--train.sample_tokens=0"]
    _, err = finish(command(home, "train", *same))
    assert (
        "not taken" not in err
        and (home / "run-same" / "tokenizer.json").read_text() == (home / "run" / "tokenizer.json").read_text()
    )


def test_a_warm_start_killed_in_its_first_save_is_a_warm_start(home, whole, tmp_path):
    """What Orbax leaves of an unfinished save is no checkpoint."""
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4.damaged").mkdir()
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "3").mkdir()  # Orbax was through, but the manifest is not written
    assert not has_checkpoint(tmp_path)
    (tmp_path / "checkpoints" / "3" / "manifest.json").touch()
    assert has_checkpoint(tmp_path)


@pytest.mark.slow
def test_a_moving_average_is_what_is_evaluated_and_sampled(home, whole):
    """Interrupted and resumed, with the gradients' norms in its rows, packed documents, and a trace of the device."""
    new = ["config.py", "--directory=run-ema", "--train.ema_decay=0.9", "--train.grad_norms=true", "--profile=20:34"]
    new += ["--data.sampling=PackedDocuments", "--train.eval_every=20", "--writers=TensorBoard"]
    finish(command(home, "train", *new, "--train.steps=40"))
    _, err = finish(command(home, "train", *new, "--train.steps=60"))
    found = rows(home, "run-ema")
    assert found[0]["grad_norms"]["decoder/layers/block0/attention/project/q"][1] > 0
    assert [row["step"] for row in found if row["split"] == "valid"] == [20, 40, 60]
    run = jaxformer.open_run(home / "run-ema")
    cwd = os.getcwd()
    os.chdir(home)
    try:
        row = run.evaluate()
    finally:
        os.chdir(cwd)
    assert row["loss"] == found[-1]["loss"] and row["bits_per_byte"] == found[-1]["bits_per_byte"]
    last = dataclasses.replace(run, state=run.state.replace(ema=()))
    assert sha256(last.eval_params) == inspect(home, "run-ema")["params_sha256"] != sha256(run.eval_params)
    assert list((home / "run-ema" / "profile").rglob("*.xplane.pb")), err
    assert list((home / "run-ema" / "tensorboard").iterdir())


PARTS = """
from jaxformer.model.positions import NoPosition
from jaxformer.writers import Writer


class Fails(NoPosition):
    def bias(self, params, view, new, seen):
        raise RuntimeError("not yet")


class Breaks(Writer):
    rows: int = 3

    def open(self, directory, config, step):
        self_rows = [0, self.rows]

        class Sink:
            def write(self, row):
                self_rows[0] += 1
                if self_rows[0] == self_rows[1]:
                    raise ConnectionError("no route to host")

            def close(self):
                raise AssertionError("was dropped")

        return Sink()
"""


@pytest.mark.slow
def test_a_run_that_failed_before_its_first_step_holds_no_directory(home, whole):
    (home / "parts.py").write_text(PARTS)
    quick = ["config.py", "--directory=run-fails", "--train.steps=10", "--train.sample_tokens=0"]
    process = command(home, "train", *quick, "--model.position=parts:Fails")
    _, err = process.communicate()
    assert process.returncode == 1 and "RuntimeError: not yet" in err
    finish(command(home, "train", *quick))
    _, err = finish(command(home, "train", *quick, "--model.n_layers=1"), 2)
    assert "holds another run: model.n_layers was 2 and is 1" in err


@pytest.mark.slow
def test_a_writer_that_fails_does_not_end_the_run(home, whole):
    """And the run goes on, and is opened, without the writer's module."""
    (home / "parts.py").write_text(PARTS)
    quick = ["config.py", "--directory=run-breaks", "--train.sample_tokens=0"]
    _, err = finish(command(home, "train", *quick, "--train.steps=50", "--writers=parts:Breaks"))
    assert "writers: Breaks failed (ConnectionError: no route to host)" in err
    assert err.count("writers: Breaks failed") == 1
    assert len(rows(home, "run-breaks")) == 11
    finish(command(home, "sample", "run-breaks", "--tokens=3"))
    finish(command(home, "train", *quick, "--train.steps=60"))


def test_opening_a_run_from_within_executes_none_of_its_files(home, whole, tmp_path):
    shutil.copytree(home / "run", tmp_path / "run")
    for name in ("optax.py", "tqdm.py", "tokenizers.py", "json.py"):
        (tmp_path / "run" / name).write_text("open('executed', 'w')\n")
    finish(command(tmp_path / "run", "sample", ".", "--tokens=3"))
    (tmp_path / "run" / "own.py").write_text("")
    finish(command(tmp_path / "run", "sample", ".", "--tokens=3", "--import", "own"))
    module = [sys.executable, "-m", "jaxformer", "sample", ".", "--tokens=3", "--import", "own"]
    subprocess.run(module, cwd=tmp_path / "run", check=True)
    assert not (tmp_path / "run" / "executed").exists()


@pytest.mark.slow
def test_a_corpus_may_move_with_a_notice(home, whole):
    quick = ["config.py", "--directory=run-moved", "--train.sample_tokens=0"]
    finish(command(home, "train", *quick, "--train.steps=10"))
    shutil.copy(home / "text.txt", home / "moved.txt")
    _, err = finish(command(home, "train", *quick, "--train.steps=20", "--data.corpus.path=moved.txt"))
    assert "data.corpus.path was text.txt and is moved.txt from here on" in err
    data = json.loads((home / "run-moved" / "data.json").read_text())
    (home / "run-moved" / "data.json").write_text(json.dumps(data | {"ids_sha256": ["x"]}))
    _, err = finish(command(home, "train", *quick, "--train.steps=30", "--data.corpus.path=moved.txt"), 2)
    assert "other ids come out of the same text" in err


def test_help(home, whole):
    out, _ = finish(command(home, "train", "config", "--help", "--model.position=Sinusoidal", "--data.corpus=Mixture"))
    assert "--model.position=Sinusoidal " in out and "of ALiBi, Learned, Llama3Rotary" in " ".join(out.split())
    assert re.search(r"--model.position.base=10000.0 +wavelengths", out) and "--data.batch_size=3 " in out
    assert re.search(r"--data.corpus.weights= +must be given", out) and "pyright" not in out
    for flag in ("dry_run", "seeds=N", "profile=START:STOP", "init_from=RUN", "import=MODULE"):
        assert f"  --{flag} " in out
    out, _ = finish(command(home, "sample", "--help"))
    assert "--prompt_file" in out and "A UTF-8 file that holds the prompt." in out and "--import=MODULE" in out
    out, _ = finish(command(home, "predict", "--help"))
    assert "--data.corpus CLASS" in out and "as --data.corpus=Table" in " ".join(out.split())


@pytest.mark.slow
def test_a_dry_run_prints_the_config_and_writes_nothing(home, whole):
    before = listing(home)
    out, err = finish(command(home, "train", "config.py", "--directory=new", "--dry_run", "--model.n_layers=4"))
    config, _, summary = out.rpartition("}\n")
    assert json.loads(config + "}")["model"]["n_layers"] == 4 and listing(home) == before
    found = dict(line.split(maxsplit=1) for line in summary.splitlines())
    count = int(found["n_params"].replace(",", ""))
    assert found["params_bytes"] == human(4 * count, "B") and found["tokens_per_step"] == "39"
    assert re.fullmatch(r"[\d.]+ kB", found["total_bytes"]) and "compiled" not in err
    missing = ["--data.corpus.path=nowhere.txt", "--data.tokenizer=BPE", "--data.tokenizer.vocab_size=300"]
    out, err = finish(command(home, "train", "config.py", "--dry_run", *missing))  # the size is declared
    assert "vocab_size      300\n" in out and listing(home) == before
    assert "directory='run' holds another run: data.tokenizer was Characters and is BPE; train it in another" in err


@pytest.mark.slow
def test_prompts(home, whole):
    """From a file, of any length; the same continuation as by hand."""
    (home / "prompt.txt").write_text("1 plus 1 is 2\n2 plus ")
    by_file, _ = finish(command(home, "sample", "run", "--prompt_file=prompt.txt", "--tokens=5", "--min_p=0.05"))
    by_hand, _ = finish(command(home, "sample", "run", "--prompt=1 plus 1 is 2\n2 plus ", "--tokens=5", "--min_p=0.05"))
    assert by_file == by_hand and len(by_file) == 27


@pytest.mark.slow
def test_a_text_ends_with_its_document(home, whole):
    """Documents of a line each: the model learns to end them, and samples stop there."""
    lines = "".join(json.dumps({"text": f"{i % 7} and {i % 7}"}) + "\n" for i in range(600))
    (home / "lines.jsonl").write_text(lines)
    new = ["config.py", "--directory=run-lines", "--data.corpus=JSONLines", "--data.corpus.path=lines.jsonl"]
    new += ["--data.tokenizer.end_token=true", "--data.sampling=PackedDocuments", "--train.steps=500"]
    finish(command(home, "train", *new, "--train.eval_every=500"))
    out, _ = finish(command(home, "sample", "run-lines", "--samples=9", "--tokens=40", "--temperature=0.5"))
    texts = out.removesuffix("\n").split("\n---------------\n")
    assert len(texts) == 9 and sum(bool(re.fullmatch(r"\d and \d", text)) for text in texts) >= 8, texts


@pytest.mark.slow
def test_a_corpus_that_changed_is_refused(home, whole, tmp_path):
    for name in ("text.txt", "config.py"):
        (tmp_path / name).write_text((home / name).read_text())
    quick = ["--train.steps=10", "--train.sample_tokens=0"]
    finish(command(tmp_path, "train", "config.py", *quick))
    (tmp_path / "text.txt").write_text("another text entirely\n" * 100)
    for name, arguments in (("train", ["config.py", "--train.steps=20", *quick[1:]]), ("evaluate", ["run"])):
        _, err = finish(command(tmp_path, name, *arguments), 2)
        assert "data.corpus has SHA-256" in err and "restore that text" in err


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_with_its_status(home, whole):
    """During imports, compilation and training; nothing but a sentence is said."""
    for seconds, signum in ((1.0, signal.SIGINT), (2.0, signal.SIGTERM), (3.5, signal.SIGINT)):
        process = command(home, "train", "config.py", "--directory=run-brief", "--train.steps=100000")
        time.sleep(seconds)
        process.send_signal(signum)
        finish(process, 128 + signum)
        shutil.rmtree(home / "run-brief", ignore_errors=True)


@pytest.mark.slow
def test_rows_that_are_none_are_dropped_and_a_diverged_run_keeps_its_best(home, whole):
    arguments = ["config.py", "--directory=run-nan", "--train.eval_every=10", "--train.save_every=10"]
    finish(command(home, "train", *arguments, "--train.steps=20"))
    with open(home / "run-nan" / "metrics.jsonl", "ab") as file:
        file.write(b'junk\n{}\n\n5\n{"step": "x"}\n\xff\xfe\n\0\0\0')
    poison = "import jaxformer.run.members as members\n"
    poison += "members.evaluate = lambda *a: [dict(loss=float('nan'), bits_per_byte=1.0, tokens=5)]\n"
    (home / "poisoned.py").write_text(poison + (home / "config.py").read_text())
    _, err = finish(command(home, "train", "poisoned.py", *arguments[1:], "--train.steps=60"))
    assert "6 lines that are no rows are dropped" in err
    found = rows(home, "run-nan")
    assert [row["step"] for row in found if row["split"] == "valid"] == [10, 20, 30, 40, 50, 60]
    assert [row["loss"] for row in found if row["split"] == "valid"][2:] == [None] * 4
    steps = {int(path.name) for path in (home / "run-nan" / "checkpoints").iterdir()}
    assert steps == {20, 50, 60}
    out, _ = finish(command(home, "evaluate", "run-nan", "--step=best", "--json"))
    assert json.loads(out)["step"] == 20
    (home / "poisoned.py").write_text(
        poison.replace("float('nan')", "next(members.losses)") + (home / "config.py").read_text()
    )
    with open(home / "poisoned.py", "a") as file:
        file.write("members.losses = iter([float('nan'), 3.0, 4.0])\n")
    late = ["--directory=run-late", "--train.steps=30", "--train.eval_every=10", "--train.save_every=1000"]
    finish(command(home, "train", "poisoned.py", *late))
    assert {int(path.name) for path in (home / "run-late" / "checkpoints").iterdir()} == {20, 30}


def test_two_processes_do_not_train_the_same_run(home, whole):
    first = command(home, "train", "config.py", "--directory=run-twice", "--train.steps=100000")
    wait_for_step(home, "run-twice", 5, first)
    _, err = finish(command(home, "train", "config.py", "--directory=run-twice", "--train.steps=100000"), 2)
    assert "is being trained by another process" in err
    first.send_signal(signal.SIGTERM)
    finish(first, 143)


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_sentence(home, whole):
    """No file may grow past 24 KB, as if the disk were full; what was saved before stays."""
    small = ["--directory=run-full", "--model.d_model=98", "--train.save_every=700"]
    limit = ["bash", "-c", 'ulimit -f 24; JAX_ENABLE_COMPILATION_CACHE=false exec "$@"', "bash"]
    process = command(home, "train", "config.py", *small, prefix=limit)
    _, err = finish(process, 1)
    assert "run-full/checkpoints has no room for a checkpoint of" in err.splitlines()[-1]
    assert not (home / "run-full" / "checkpoints" / "700").exists()
    finish(command(home, "train", "config.py", *small))
    assert inspect(home, "run-full")["step"] == 700
