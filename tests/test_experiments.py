"""Experiments: those of the house, and one that the command reproduces, goes on with, and tells of."""

import contextlib
import io
import itertools
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import without_corpus

import jaxformer
from jaxformer import Config, Data, Train
from jaxformer import config as config_lib
from jaxformer.commands import main
from jaxformer.config import resolve
from jaxformer.data.corpora import TextLines
from jaxformer.lab import experiments
from jaxformer.lab.experiments import (
    Result,
    Row,
    as_json,
    best_accuracy,
    final_accuracy,
    final_exact,
    late_training_loss,
    load,
    mean_or_better,
    near,
    read_metrics,
    run_row,
    within_or_better,
)
from jaxformer.lab.tables import markdown_table
from jaxformer.model.baselines import Bigram
from jaxformer.spec import InputError, dumps, from_json

ROOT = Path(__file__).parent.parent
HOUSE = sorted((ROOT / "experiments").glob("*.py"))


def read_table(text: str) -> Iterator[dict[str, str]]:
    """The rows of all tables of a Markdown text."""
    columns: list[str] = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else []
        if not cells:
            columns = []
        elif not columns:
            columns = cells
        elif not set(cells) <= {"---"}:
            yield dict(zip(columns, (cell.replace("\\|", "|") for cell in cells), strict=False))


TINY = """
from jaxformer import Config, Data, Train
from jaxformer.data.batches import PackedDocuments
from jaxformer.data.corpora import TextLines
from jaxformer.data.tokenizers import Characters
from jaxformer.lab.experiments import Experiment, Row, late_training_loss, near
from jaxformer.pictures import lines, panels
from jaxformer.learning.guards import Guard
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.model.baselines import Bigram

config = Config(
    directory="unused",
    data=Data(TextLines("lines.txt"), tokenizer=Characters(end_token=True), sampling=PackedDocuments(), batch_size=3),
    model=Bigram(context_length=7),
    optimizer=AdamW(Constant(0.01)),
    train=Train(steps=STEPS, steps_per_call=3, log_every=1, eval_every=11, save_every=11, sample_tokens=0),
)


def tell(report):
    report.text("What is said.")
    report.code(str(sorted(report.results)))
    figure, axes = panels(1, 1, 4, 3)
    curves = {name: (result.curve()[0], result.curve()[1][0]) for name, result in report.results.items()}
    lines(axes[0], curves, "step", "loss")
    report.picture("curves", figure, "Losses of the first seeds.")


BATCH = {"data.batch_size": 5}
experiment = Experiment(
    "Tables of pairs",
    "What they are.",
    (
        Row("Together", config, 99.0, 3, remark="Three at once."),
        Row("One by one", config, 0.5, 2, BATCH, late_training_loss, reached=near, also=("data.split_seed",)),
        Row("unpublished!", config),
    ),
    tell,
)
"""
STEPS = 22
OTHER = "<!-- my own -->\n## Another experiment\n\n| a | b |\n| --- | --- |\n| 1 |  |\n<!-- end -->\n"


def reproduce(home, *arguments):
    """The answer of the command, called in a folder; of tiny.py, if no name is given."""
    out, name = io.StringIO(), [] if arguments and not arguments[0].startswith("-") else ["tiny.py"]
    with contextlib.chdir(home), contextlib.redirect_stdout(out):
        assert main.run("reproduce", [*name, "--json", *arguments]) == 0
    return json.loads(out.getvalue())


def metrics(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def without_times(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "lock"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a text and an experiment."""
    path = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    (path / "lines.txt").write_text("".join("".join(rng.choice(list("abcde"), 5)) + "\n" for _ in range(101)))
    (path / "tiny.py").write_text(TINY.replace("STEPS", str(STEPS)))
    return path


@pytest.fixture(scope="module")
def whole(home, tmp_path_factory):
    """What the command says that nothing interrupted; its results file holds another section before."""
    (home / "Numbers.md").write_text(f"# Results\n\nOld words.\n\n{OTHER}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAXFORMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return reproduce(home, "--directory=kept", "--results=Numbers.md")


def test_the_command_tells_what_the_runs_have_measured(home, whole):
    keys = ["row", "published", "measured", "deviation", "seeds", "reached", "steps", "seconds"]
    assert [list(row) for row in whole] == [keys] * 3
    late = lambda rows: np.mean([row["loss"] for row in rows if row["split"] == "train"][-2:])  # of 22: a tenth
    final = lambda rows: rows[-1]["loss"]
    names = (("Together", "together", 3), ("One by one", "one-by-one", 2), ("unpublished!", "unpublished", 1))
    for row, (name, slug, seeds), measure, published, reached, seconds in zip(
        whole, names, (final, late, final), (99.0, 0.5, None), (True, False, None), (max, sum, max), strict=True
    ):
        folders = sorted((home / "kept" / "tiny" / slug).iterdir())
        assert [folder.name for folder in folders] == [f"seed-{seed}" for seed in range(seeds)]
        runs = [metrics(folder) for folder in folders]
        values = [measure(rows) for rows in runs]
        assert (row["row"], row["published"], row["seeds"], row["steps"]) == (name, published, seeds, STEPS)
        assert row["reached"] is reached and row["measured"] == pytest.approx(np.mean(values), rel=1e-12)
        assert row["deviation"] == (pytest.approx(np.std(values, ddof=1)) if seeds > 1 else None)
        assert row["seconds"] == pytest.approx(seconds(rows[-1]["seconds"] for rows in runs))
        assert len(set(values)) == seeds


def test_only_rows_that_are_trained_apart_give_their_seed_to_other_fields(home, whole):
    for slug, apart in (("together", False), ("one-by-one", True)):
        for seed in range(2):
            config = json.loads((home / "kept" / "tiny" / slug / f"seed-{seed}" / "config.json").read_text())
            assert (config["train"]["seed"], config["data"]["split_seed"]) == (seed, seed if apart else 0)
            assert config["data"]["batch_size"] == (5 if apart else 3)


def test_the_results_file_has_the_same_numbers_and_the_pictures_and_keeps_other_sections(home, whole):
    text = (home / "Numbers.md").read_text()
    other, own = text[text.index("<!-- my own") :], text[text.index("<!-- tiny -->") :]
    assert other.startswith(OTHER) and "Old words" not in text and text.index(other) < text.index(own)
    assert own.startswith("<!-- tiny -->\n## Tables of pairs\n\n`jaxformer reproduce tiny.py`: ")
    for part in ("What they are.", "* Together: Three at once.", "What is said.", "```\n['One by one', 'Together',"):
        assert part in own
    table = list(read_table(own))
    assert len(table) == len(whole)
    for cells, row in zip(table, whole, strict=True):
        assert cells["row"] == row["row"] and cells["measured"].startswith(f"{row['measured']:.4f}")
        assert (
            (f"± {row['deviation']:.4f} (" in cells["measured"]) if row["deviation"] else "±" not in cells["measured"]
        )
        assert (int(cells["seeds"]), int(cells["steps"])) == (row["seeds"], row["steps"])
        assert cells["published"] == ("" if row["published"] is None else f"{row['published']:g}")
        assert cells["reached"] == {None: "", True: "yes", False: "**no**"}[row["reached"]]
    (path,) = re.findall(r"!\[Losses of the first seeds\.\]\((.+)\)", own)
    picture = (home / path).read_bytes()
    assert path == "numbers/tiny-curves.png" and picture.startswith(b"\x89PNG") and len(picture) < 30_000


def test_a_second_call_trains_nothing_and_says_the_same(home, whole):
    written = lambda: re.sub(r"\d+ s this time", "", (home / "Numbers.md").read_text())
    picture = home / "numbers" / "tiny-curves.png"
    before, text, drawn = times(home / "kept"), written(), picture.read_bytes()
    script = [sys.executable, ROOT / "scripts" / "reproduce.py", "tiny.py", "--directory=kept", "--results=Numbers.md"]
    done = subprocess.run([*script, "--json"], cwd=home, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == whole and times(home / "kept") == before
    assert written() == text and picture.read_bytes() == drawn


def test_rows_are_groups_of_seeds_to_compare(home, whole):
    """Also where the seed draws the split. The third row is of the config of the first, and its seed counts once."""
    with contextlib.chdir(home):
        found = jaxformer.compare("kept")
    apart, together = found.rows
    assert (apart["name"], apart["seeds"], together["seeds"]) == ("kept/tiny/one-by-one", [0, 1], [0, 1, 2])
    assert [together["final_loss"], together["final_deviation"]] == [whole[0]["measured"], whole[0]["deviation"]]
    assert found.differences["data.split_seed"] == ["train.seed", 0]
    assert found.verdicts[0].said == "no verdict: the validation texts differ"
    assert "kept/tiny/unpublished/seed-0: seed 0 counts already, in kept/tiny/together/seed-0" in found.notes[-1]


def test_only_an_experiment_of_the_project_writes_to_the_results_of_the_project(home, whole):
    """Any other one beside its runs; both with the command that made them."""
    project, beside = home / "RESULTS.md", home / "kept" / "tiny" / "RESULTS.md"
    project.write_text("# Results\n\nOf the project.\n")
    assert reproduce(home, "--directory=kept") == whole and project.read_text() == "# Results\n\nOf the project.\n"
    assert "\n`jaxformer reproduce tiny.py`: " in beside.read_text()
    assert re.findall(r"!\[.+\]\((.+)\)", beside.read_text()) == ["results/tiny-curves.png"]
    assert (beside.parent / "results" / "tiny-curves.png").exists() and not (home / "results").exists()
    (home / "experiments").mkdir()
    shutil.copy(home / "tiny.py", home / "experiments")
    for name in ("tiny", "experiments/tiny.py"):
        beside.unlink(missing_ok=True)
        project.write_text("# Results\n")
        assert reproduce(home, name, "--directory=kept") == whole and not beside.exists()
        text = project.read_text()
        assert f"\n`python scripts/reproduce.py {name}`: " in text
        assert (home / "results" / "tiny-curves.png").exists()


def test_what_was_stopped_in_the_middle_goes_on_to_the_same_numbers(home, whole):
    """With fewer steps first, and with a row whose folder is gone; the other rows are left as they are."""
    again = lambda: reproduce(home, "--directory=stopped", "--results=stopped.md")
    for steps in (STEPS // 2, STEPS):
        (home / "tiny.py").write_text(TINY.replace("STEPS", str(steps)))
        found = again()
        assert [row["steps"] for row in found] == [steps] * 3
    assert without_times(found) == without_times(whole)
    runs = home / "stopped" / "tiny"
    kept = times(runs / "together") | times(runs / "unpublished")
    shutil.rmtree(runs / "one-by-one")
    assert without_times(again()) == without_times(whole)
    assert times(runs / "together") | times(runs / "unpublished") == kept


def test_rows_that_begin_with_others_or_need_another_device(home, whole):
    """Seed by seed, or all with one run, and with its tokenizer. Several published numbers have a verdict each; what is
    not run is told, and is no defeat."""
    more = """        Row("Begun with others", config, (0.5, 99.0), 2, begins_with="Together"),
        Row("Begun with one", config, None, 2, begins_with="unpublished!"),
        Row("Elsewhere", config, 99.0, platform="abacus"),
    ),
    tell,"""
    (home / "more.py").write_text(TINY.replace("STEPS", str(STEPS)).replace("    ),\n    tell,", more))
    shutil.copytree(home / "kept" / "tiny", home / "kept" / "more")
    begun, alike, elsewhere = reproduce(home, "more.py", "--directory=kept", "--results=More.md")[3:]
    assert alike["seeds"] == 2
    assert begun["published"] == [0.5, 99.0] and begun["reached"] == [False, True] and begun["seeds"] == 2
    for seed in range(2):
        for row, lender in (("begun-with-others", f"together/seed-{seed}"), ("begun-with-one", "unpublished/seed-0")):
            config = json.loads((home / "kept/more" / row / f"seed-{seed}" / "config.json").read_text())
            assert config["init_from"] == f"kept/more/{lender}"
            assert config["data"]["tokenizer"]["path"] == f"kept/more/{lender}/tokenizer.json"
    said = {name: elsewhere[name] for name in ("measured", "reached", "seeds", "seconds")}
    assert said == {"measured": None, "reached": None, "seeds": 0, "seconds": 0}
    cells = {row["row"]: row for row in read_table((home / "More.md").read_text())}
    assert cells["Begun with others"]["published"] == "0.5, 99"
    assert cells["Begun with others"]["reached"] == "**no**, yes"
    assert (cells["Elsewhere"]["measured"], cells["Elsewhere"]["reached"]) == ("not run: no ABACUS here", "")
    assert not (home / "kept" / "more" / "elsewhere").exists()
    shutil.copytree(home / "kept" / "more" / "unpublished", home / "kept" / "more" / "elsewhere")
    shutil.rmtree(home / "kept" / "more" / "elsewhere" / "seed-0" / "checkpoints" / str(STEPS))
    half = reproduce(home, "more.py", "--directory=kept", "--results=More.md")[5]
    assert half["seeds"] == 0  # begun on the other device: it is not finished here


CHANGES = {
    "fewer steps": ("steps=22", "steps=11", "train.steps was 22 and is 11"),
    "other rows": ("log_every=1,", "log_every=2,", "train.log_every was 1 and is 2"),
    "other evaluations": ("eval_every=11", "eval_every=22", "train.eval_every was 11 and is 22"),
    "another cap of evaluations": (
        "batch_size=3)",
        "batch_size=3, valid_tokens=7)",
        "data.valid_tokens was None and is 7",
    ),
    "another guard": ("steps=22,", "steps=22, guard=Guard(most=7),", "train.guard.most was 20 and is 7"),
    "another length of a schedule": ("steps=22", "steps=33", "train.steps was 22 and is 33"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_of_before_that_is_not_what_its_row_would_train_now_is_refused(home, tmp_path, capfd, change):
    old, new, message = CHANGES[change]
    falls = "Constant(0.01)", "WarmupCosine(peak=0.01, warmup_steps=1)"
    text = TINY.replace("STEPS", "22").replace("Constant\n", "WarmupCosine\n").replace(*falls)
    only = text[: text.index('        Row("Together')] + '        Row("unpublished!", config),\n    ),\n    tell,\n)\n'
    shutil.copy(home / "lines.txt", tmp_path)
    (tmp_path / "tiny.py").write_text(only)
    reproduce(tmp_path)
    before = times(tmp_path / "runs")
    (tmp_path / "tiny.py").write_text(only.replace(old, new))
    with contextlib.chdir(tmp_path):
        assert main.run("reproduce", ["tiny.py"]) == 2
    told = capfd.readouterr().err
    assert f"runs/tiny/unpublished/seed-0: {message}; delete the folder to train it again" in told
    assert times(tmp_path / "runs") == before


def test_a_run_of_other_code_is_refused(home, whole, monkeypatch):
    monkeypatch.setattr(experiments, "changed_sources", lambda config: [f"mine:Part of {config.directory}"])
    with contextlib.chdir(home), pytest.raises(InputError, match="mine:Part of kept/tiny/together/seed-0 has changed"):
        experiments.reproduce("tiny.py", Path("kept"))


def test_a_measure_of_numbers_that_no_row_has_is_told_with_those_that_there_are(home):
    result = Result(Row("One", "quickstart", measure=final_accuracy), [], [[{"split": "valid", "loss": 1.0}]])
    with pytest.raises(
        InputError, match=r"row 'One': its measure finds no number .* loss, split .*KeyError: 'accuracy'"
    ):
        result.values  # noqa: B018


def test_a_row_that_began_with_what_has_changed_since_is_refused(home, tmp_path, capfd):
    """And one that takes a tokenizer alone has nothing of what its lender has learned."""
    rows = """        Row("Lender", config, overrides={"train.steps": MORE}),
        Row("Borrower", config, begins_with="Lender"),
        Row("Of its tokens", config, overrides={"init_from": None}, begins_with="Lender"),
    ),
    tell,
)
"""
    text = TINY.replace("STEPS", "11")
    text = text[: text.index('        Row("Together')] + rows
    shutil.copy(home / "lines.txt", tmp_path)
    (tmp_path / "tiny.py").write_text(text.replace("MORE", "11"))
    first, second, third = reproduce(tmp_path)
    assert second["measured"] < first["measured"] == third["measured"]
    config = json.loads((tmp_path / "runs/tiny/of-its-tokens/seed-0/config.json").read_text())
    assert (
        config["init_from"] is None and config["data"]["tokenizer"]["path"] == "runs/tiny/lender/seed-0/tokenizer.json"
    )
    (tmp_path / "tiny.py").write_text(text.replace("MORE", "22"))  # at a constant rate: it goes on
    with contextlib.chdir(tmp_path):
        assert main.run("reproduce", ["tiny.py"]) == 2
    told = "runs/tiny/borrower/seed-0: it began with other parameters than runs/tiny/lender/seed-0 has now; delete the"
    assert told in capfd.readouterr().err
    shutil.rmtree(tmp_path / "runs" / "tiny" / "borrower")
    assert reproduce(tmp_path)[1]["measured"] < second["measured"]


def test_seeds_that_a_lender_had_once_lend_nothing(home, tmp_path):
    """Borrowers begin with the seeds that their lender's row has now."""
    data = Data(TextLines(str(home / "lines.txt")), batch_size=3)
    train = Train(steps=3, eval_every=3, save_every=3, sample_tokens=0)
    config = Config("unused", data=data, model=Bigram(context_length=7), train=train)
    row, lender = Row("Borrower", config, seeds=2, begins_with="Lender"), tmp_path / "lender"
    for seed in range(2):
        jaxformer.train(config, {"train.seed": seed}, lender / f"seed-{seed}")
    for lent, expected in ((1, 0), (2, 1)):
        runs = run_row(row, tmp_path, lent).runs
        assert runs[1].config.init_from == str(lender / f"seed-{expected}")
        shutil.rmtree(tmp_path / "borrower")


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("nonsense", "'nonsense' is no experiment; there are one, two, or give the path of a Python file"),
        ("nowhere.py", "'nowhere.py' is no experiment"),
        ("empty.py", "empty.py: must define `experiment`, an Experiment, but it is NoneType"),
        ("twice.py", "twice.py: rows must have names of their own, but they are together, one-by-one, together"),
        ("broken.py", "broken.py, line 2: ModuleNotFoundError: No module named 'nowhere'"),
        ("wrong.py", "data.batch_size=0 must be at least 1"),
        ("none.py", "none.py: row 'unpublished!': seeds=0 must be at least 1"),
        (
            "after.py",
            "after.py: row 'unpublished!': begins_with='One by one' must be an earlier row of one",
        ),
        ("also.py", "data.splt_seed: Data has no such field; did you mean split_seed?"),
        ("bare.py", "bare.py: the experiment has no rows; give it one"),
        ("tiny.py --results=notes.md", "results='notes.md' holds something that is no results; give another file"),
        ("tiny.py --results=loss.png", "results='loss.png' holds something that is no results; give another file"),
        ("tiny.py", 'pictures need Matplotlib; pip install "jaxformer[pictures]"'),
        ("all", "experiments/one.py: must define `experiment`"),
    ],
)
def test_a_mistake_gets_one_sentence_and_trains_nothing(tmp_path, home, monkeypatch, capfd, arguments, message):
    shutil.copy(home / "lines.txt", tmp_path)
    tiny = TINY.replace("STEPS", "3")
    (tmp_path / "experiments").mkdir()
    for name, text in {
        "tiny.py": tiny,
        "empty.py": "",
        "experiments/one.py": "",
        "experiments/two.py": tiny,
        "twice.py": tiny.replace("unpublished!", "-together-"),
        "broken.py": "\nimport nowhere\n",
        "wrong.py": tiny.replace('"data.batch_size": 5', '"data.batch_size": 0'),
        "none.py": tiny.replace('Row("unpublished!", config)', 'Row("unpublished!", config, seeds=0)'),
        "after.py": tiny.replace("config)", "config, None, 3, begins_with='One by one')"),
        "also.py": tiny.replace("data.split_seed", "data.splt_seed"),
        "bare.py": "from jaxformer.lab.experiments import Experiment\nexperiment = Experiment('T', 'A', ())\n",
        "notes.md": "What I think of it.\n",
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "loss.png").write_bytes(b"\x89PNG\xff")
    if "Matplotlib" in message:
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if not installed
    monkeypatch.chdir(tmp_path)
    before = times(tmp_path)
    status = main.run("reproduce", arguments.split())
    out, err = capfd.readouterr()
    assert status == 2 and message in err and "Traceback" not in err and err.count("\n") == 1 and out == ""
    assert times(tmp_path) == before


def test_all_of_no_experiments_is_a_mistake(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main.run("reproduce", ["all"]) == 2
    assert "there are none in experiments/" in capfd.readouterr().err and not list(tmp_path.iterdir())


def test_all_leaves_out_what_takes_hours(tmp_path, monkeypatch, capfd):
    run = []
    monkeypatch.setattr("jaxformer.lab.experiments.reproduce", lambda name, *where: run.append(name) or [])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experiments").mkdir()
    for name, how in {"one": "", "two": ", long=True", "three": ", long=False"}.items():
        text = (
            "from jaxformer.config import load\nfrom jaxformer.lab.experiments import Experiment, Row\n"
            f"experiment = Experiment('{name}', '', (Row('a', load('quickstart')),){how})\n"
        )
        (tmp_path / "experiments" / f"{name}.py").write_text(text)
    assert main.run("reproduce", ["all", "--json"]) == 0 and run == ["one", "three"]
    assert main.run("reproduce", ["two", "--json"]) == 0 and run[2:] == ["two"]
    capfd.readouterr()


# --- numbers


def test_reached_by_the_range_the_mean_or_nearness():
    rng = np.random.default_rng(0)
    for _ in range(100):
        values, published, higher = (
            np.round(rng.normal(1, 0.05, 3), 2),
            round(rng.normal(1, 0.05), 2),
            bool(rng.integers(2)),
        )
        sign = -1 if higher else 1  # now less is better
        found, wanted = sign * values, sign * published
        inside, better = found.min() <= wanted <= found.max(), (found < wanted).all()
        assert within_or_better(values, published, higher) == (inside or better)
        assert mean_or_better(values, published, higher) == (round(found.mean(), 4) <= wanted)
        assert near(values, published, higher) == (abs(values.mean() - published) / published <= 0.03)
    assert mean_or_better([0.98995, 0.98996], 0.99, True) and not mean_or_better([0.98994, 0.98994], 0.99, True)
    assert mean_or_better([0.01004], 0.01, False) and not mean_or_better([0.01006], 0.01, False)
    for off, expected in ((0.9699, False), (0.9701, True), (1.0299, True), (1.0301, False)):
        assert [near([off * 2.47], 2.47, higher) for higher in (False, True)] == [expected] * 2


def test_measures_of_rows():
    valid = [{"split": "valid", "accuracy": a, "exact": e} for a, e in ((0.3, 0.9), (0.7, 0.1), (0.5, 0.2))]
    train = [{"split": "train", "loss": float(i)} for i in range(29)]
    rows = [valid[0], *train, *valid[1:]]
    found = best_accuracy(rows), final_accuracy(rows), final_exact(rows), late_training_loss(rows)
    assert found == (0.7, 0.5, 0.2, 27.5)
    assert late_training_loss(train[:7]) == 6


@pytest.mark.parametrize("order", [(None, 1.0), (1.0, None)])
def test_a_seed_that_diverged_is_told_and_has_not_reached(tmp_path, order):
    runs = []
    for seed, loss in enumerate(order):
        (tmp_path / str(seed)).mkdir()
        line = {"step": 3, "split": "valid", "loss": loss, "seconds": 0.5}
        (tmp_path / str(seed) / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        runs.append(SimpleNamespace(config=SimpleNamespace(directory=str(tmp_path / str(seed)))))
    for reached in (within_or_better, mean_or_better, near):
        row = Row("row", Config("run", Bigram(context_length=3)), 1.0, 2, reached=reached)
        result = Result(row, runs, list(map(read_metrics, runs)))
        (said,) = json.loads(as_json([result]))
        assert (said["measured"], said["deviation"], said["reached"]) == (None, None, False)


def test_tables_are_read_as_they_are_written():
    rng = np.random.default_rng(0)
    tables = []
    for columns in (1, 2, 5):
        cells = rng.choice(["", "a b", "a|b", "−1.5 ± 0.1", "**no**", "1 - 2"], (3, columns)).tolist()
        names = ["", *"abcd"][:columns]
        tables.append([dict(zip(names, row, strict=True)) for row in cells])
    text = "\n\n".join(f"Words | more.\n\n{markdown_table(table)}" for table in tables)
    assert list(read_table(text)) == [row for table in tables for row in table]


# --- of the house


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: path.stem)
def test_an_experiment_of_the_house_could_be_run(path):
    """Its configs resolve, may be stored, and have models with shapes; rows have folders of their own."""
    rows = load(str(path)).rows
    assert len({row.slug for row in rows}) == len(rows) and all(re.fullmatch(r"\w[\w-]*", row.slug) for row in rows)
    for row in rows:
        begins = {"init_from": "another"} if row.begins_with else {}
        config = resolve(row.config, row.overrides | dict.fromkeys(("train.seed", *row.also), 3) | begins)
        assert from_json(json.loads(dumps(config)), Config, "x") == config
        assert sum(a.size for a in jax.tree.leaves(without_corpus(config)[1].params)) > 1000


@pytest.mark.parametrize("path", HOUSE, ids=lambda path: path.stem)
def test_the_results_are_those_of_the_experiment_as_it_is(path):
    """Its title, what it says of itself, and its rows: what has changed since is to be run again."""
    section = (ROOT / "RESULTS.md").read_text(encoding="utf-8").partition(f"<!-- {path.stem} -->\n")[2]
    section, experiment = section.partition("\n<!-- end -->")[0], load(str(path))
    assert section.startswith(f"## {experiment.title}\n") and experiment.about.strip() in section
    table = itertools.takewhile(lambda cells: "reached" in cells, read_table(section))
    assert [cells["row"] for cells in table] == [row.name.replace("|", "\\|") for row in experiment.rows]


@pytest.mark.slow
def test_a_cheap_row_comes_out_as_the_results_file_has_it(data_directory, tmp_path):
    (row,) = (row for row in load(str(ROOT / "experiments" / "ladder.py")).rows if row.name == "bigram table")
    text = (
        (ROOT / "RESULTS.md").read_text(encoding="utf-8").partition("<!-- ladder -->")[2].partition("<!-- end -->")[0]
    )
    kept = next(cells for cells in read_table(text) if cells["row"] == row.name)
    mean, deviation = map(float, re.match(r"([\d.]+) ± ([\d.]+)", kept["measured"]).groups())
    result = run_row(row, tmp_path)
    assert (len(result.runs), result.row.config.train.steps) == (int(kept["seeds"]), int(kept["steps"]))
    assert result.mean == pytest.approx(mean, abs=0.002) and result.deviation == pytest.approx(
        deviation, rel=0.5, abs=1e-4
    )


def test_a_published_number_that_is_not_reached_has_a_cause():
    """Ours where seeds differ from those of the control in PyTorch, else its luck, with how many of these reach it."""
    ladder, rng = config_lib.execute(ROOT / "experiments" / "ladder.py"), np.random.default_rng(0)
    near, far = (mean + 0.01 * rng.standard_normal(8) for mean in (2.1, 2.2))
    config = Config("run", Bigram(context_length=3))

    def cause(ours, control, *published):
        runs = [[{"step": 3, "split": "valid", "loss": float(loss)}] for loss in ours]
        result = Result(Row("rung", config, published, 8), list(range(8)), runs)
        said = ladder["settled"](result, [{"whole": loss} for loss in control], 0.01)
        return said["cause of a no"]

    assert cause(near, near[::-1], 2.1) == "" and cause(near, near, 2.1, 3.0) == ""
    for numbers in ((2.1,), (2.1, 3.0)):
        assert (
            cause(far, far - 0.001, *numbers)
            == "its luck: no difference from the control is seen, of which none of 8 seeds reach 2.1"
        )
    assert (
        cause(far, near, 2.15)
        == f"ours: {far.mean() - near.mean():+.4f} beside the control, of which 8 of 8 seeds reach 2.15"
    )
