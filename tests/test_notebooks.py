"""Notebooks: those of the repository as plain Python, with short trainings; and what a notebook shows of a run."""

import json
import logging
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
import tiny

import jaxformer
from jaxformer import config as config_lib
from jaxformer.platform import in_notebook
from jaxformer.run import loop, reports

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
SHORT = {"train.steps_per_call": 1, "train.sample_tokens": 0, "data.batch_size": 2, "data.valid_fraction": 0.01}


def cells(path):
    return json.loads(path.read_text())["cells"]


def python(source):
    """Magics do nothing, as `%pip install` would in a test."""
    return re.sub(r"^(\s*)[%!].*", r"\1pass", "".join(source), flags=re.M)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_as_plain_python(path, tmp_path, monkeypatch):
    """Its trainings are of a step for each 500, and each trained for all of them."""
    pytest.importorskip("matplotlib", reason="needs Matplotlib: jaxformer[pictures]")
    train, trained = loop.train, []

    def short(config, overrides=None, directory=None):
        given = dict(overrides or {}) | ({} if directory is None else {"directory": str(directory)})
        config = config_lib.resolve(config, given)
        steps = config.train.steps // 500
        run = train(config, SHORT | {"train.steps": steps, "train.eval_every": steps, "train.save_every": steps})
        trained.append((int(run.state.step), steps))
        return run

    monkeypatch.setattr(loop, "train", short)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for i, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            exec(compile(python(cell["source"]), f"{path.name}, cell {i}", "exec"), names)
    assert len(trained) > 2 and all(step == steps >= 2 for step, steps in trained)
    assert (tmp_path / "runs").is_dir()


def test_notebooks_hold_no_outputs_and_install_first():
    assert [path.stem for path in NOTEBOOKS] == ["bigram_to_block", "first_model"]
    for path in NOTEBOOKS:
        code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
        assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
        assert '%pip install -q "{WHERE}[cuda12,pictures]"' in "".join(code[0]["source"])
        assert len({cell["id"] for cell in cells(path)}) == len(cells(path))


# --- what is shown


@pytest.fixture
def notebook(monkeypatch):
    """As in a notebook's kernel."""
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=None)))


@pytest.fixture
def loggers(monkeypatch):
    """The root and jaxformer's, as a program finds them."""
    root, own = logging.getLogger(), logging.getLogger("jaxformer")
    monkeypatch.setattr(root, "handlers", root.handlers)  # each test sets them: pytest adds its own before
    return root, own


def lines(capsys):
    with reports.shown():
        logging.getLogger("jaxformer.run.loop").info("step 1")
        logging.getLogger("jaxformer.run.loop").warning("no good")
    return capsys.readouterr().err


def test_a_notebook_is_known_by_its_kernel(notebook, monkeypatch):
    assert in_notebook()
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace()))
    assert not in_notebook()  # IPython in a terminal
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))
    assert not in_notebook()


def test_lines_are_shown_where_the_program_has_not_decided(loggers, capsys):
    root, own = loggers
    root.handlers = []
    assert lines(capsys) == "step 1\nno good\n"
    assert (root.handlers, own.handlers, own.level, own.propagate) == ([], [], logging.NOTSET, True)
    root.handlers = [logging.StreamHandler(sys.stderr)]  # as the import of Orbax leaves it
    assert lines(capsys) == "step 1\nno good\n"


def test_a_program_that_logs_shows_what_it_wants(loggers, tmp_path, capsys):
    """Its format, its level and its files."""
    root, own = loggers
    console, file = logging.StreamHandler(sys.stderr), logging.FileHandler(tmp_path / "log.txt")
    console.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root.handlers = before = [console, file]
    assert lines(capsys) == "WARNING no good\n" and (tmp_path / "log.txt").read_text() == "no good\n"
    own.setLevel(logging.INFO)  # as the commands do
    try:
        assert lines(capsys) == "INFO step 1\nWARNING no good\n"
    finally:
        own.setLevel(logging.NOTSET)
    root.handlers = [file]
    assert lines(capsys) == ""
    root.handlers = before
    file.close()
    assert root.handlers is before and own.propagate


def test_the_handler_of_a_kernel_does_not_silence_a_notebook(notebook, loggers, tmp_path, capsys):
    root, own = loggers
    root.handlers = [logging.StreamHandler(sys.stderr)]
    assert lines(capsys) == "step 1\nno good\n" and own.propagate and not own.handlers
    file = logging.FileHandler(tmp_path / "log.txt")
    root.handlers = [*root.handlers, file]  # the user's
    assert lines(capsys) == "no good\n"
    file.close()
    own.setLevel(logging.WARNING)
    try:
        root.handlers = root.handlers[:1]
        assert lines(capsys) == "no good\n"
    finally:
        own.setLevel(logging.NOTSET)


def test_a_notebook_has_a_bar_though_it_is_no_terminal(notebook, tmp_path):
    shown = reports.Reports([jaxformer.Config(str(tmp_path), tiny.decoder())], 0, jax.devices())
    assert not shown._bar.disable and shown._lines is None
    shown.close()
