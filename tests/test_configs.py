"""Every published config loads, checks, and has the shape that its docstring claims."""

import ast
import dataclasses
import errno
import json
import math
import os
import re
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from tiny import without_corpus

import jaxformer
from jaxformer import config as config_lib
from jaxformer.commands import main
from jaxformer.config import load, presets, resolve
from jaxformer.data.corpora import TextFiles
from jaxformer.declarations import is_declared
from jaxformer.run.plan import planned_recipe
from jaxformer.spec import dumps, from_json

pytestmark = pytest.mark.exact  # one of them trains for real

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    config = resolve(path)
    tokenizer, state = without_corpus(config)
    count = sum(a.size for a in jax.tree.leaves(state.params))
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert f"jaxformer train {path.stem}" in text and "cores" in text
    published = re.search(r"([\d,]+) parameters", text)
    assert published, "the docstring gives the number of parameters"
    if "tinyshakespeare" in text or tokenizer is None:
        assert int(published[1].replace(",", "")) == count
    assert config.directory == f"runs/{path.stem}"
    assert from_json(json.loads(dumps(config)), type(config), "x") == config


def test_a_preset_goes_by_its_name_and_a_file_comes_before_it(tmp_path, monkeypatch):
    assert list(presets().values()) == CONFIGS
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()  # no file
    assert load("quickstart") == load(CONFIGS[0].parent / "quickstart.py")
    (tmp_path / "quickstart.py").write_text(
        "from jaxformer import Config, Decoder\nconfig = Config('a', Decoder(2, 2))"
    )
    assert load("quickstart") == load("quickstart.py") == jaxformer.Config("a", jaxformer.Decoder(2, 2))


def test_a_config_that_changes_where_modules_are_looked_for_keeps_its_change_and_no_more(tmp_path, monkeypatch):
    before = [*sys.path]
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own.py").write_text(
        "import sys\nimport jaxformer\n"
        "sys.path.insert(0, 'mine')\nconfig = jaxformer.Config('a', jaxformer.Decoder(2, 2))"
    )
    load(tmp_path / "own.py")
    assert sys.path == ["mine", *before]


def test_a_full_disk_leaves_no_half_of_a_preset(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "fsync", full)
    assert main.run("new", [str(tmp_path / "mine.py")]) == 1 and not [*tmp_path.iterdir()]


def test_a_wheel_has_the_presets_inside(tmp_path, monkeypatch):
    project = tomllib.loads((CONFIGS[0].parent.parent / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"configs": "jaxformer/presets"}
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "only.py").write_text(CONFIGS[0].read_text())
    monkeypatch.setattr(config_lib, "__file__", str(tmp_path / "config.py"))
    assert list(presets()) == ["only"] and load("only") == load(CONFIGS[0])


def test_new_writes_a_preset_to_edit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.run("new", ["mine.py"]) == 0 and main.run("new", ["tiny.py", "reverse"]) == 0
    assert load("mine") == dataclasses.replace(load("quickstart"), directory="runs/mine")
    assert load("tiny").model == load("reverse").model
    assert "jaxformer train mine.py" in capsys.readouterr().out
    assert main.run("new", ["mine.py", "reverse"]) == 2 and load("mine").directory == "runs/mine"


def test_presets_are_listed(capsys):
    assert main.run("presets", []) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()[1:] if line[0] != " "}
    assert list(rows) == list(presets()) and "812,800  A small decoder" in rows["quickstart"]


def test_the_scaled_rung_is_nanogpts_recipe(data_directory):
    """nanoGPT prints 10,740,096 decayed parameters, and 4,992 that are not: the gains of its norms."""
    config = resolve(CONFIGS[0].parent / "shakespeare_gpu.py")
    sizes: dict[bool, int] = {True: 0, False: 0}
    for box in jax.tree.leaves(planned_recipe(config).model.declared(), is_leaf=is_declared):
        sizes[box.decay] += box.value.size
    assert sizes == {True: 10_740_096, False: 4_992}
    x = np.linspace(-5, 5, 41, dtype=np.float32)
    exact = [v * (1 + math.erf(v / 2**0.5)) / 2 for v in x.tolist()]
    np.testing.assert_allclose(config.model.feed_forward.activation(jax.numpy.asarray(x)), exact, atol=1e-6)


@pytest.mark.slow
def test_the_scaled_rung_takes_a_step_and_learns(data_directory, tmp_path):
    """The ladder's last rung is for a GPU; here with small batches and an evaluation of little text."""
    (tmp_path / "valid.txt").write_text("To be, or not to be: that is the question.\n" * 20)
    small = {"data.batch_size": 2, "train.steps": 3, "train.steps_per_call": 1, "train.log_every": 1}
    small |= {"data.valid": TextFiles(str(tmp_path / "valid.txt")), "train.sample_tokens": 0}
    jaxformer.train(CONFIGS[0].parent / "shakespeare_gpu.py", small, directory=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["split"] for row in rows] == ["train", "train", "train", "valid"]
    assert rows[2]["loss"] < rows[0]["loss"] < 4.5 and rows[3]["loss"] < 4.5


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("shakespeare_cpu_fast", marks=pytest.mark.slow),
        pytest.param("shakespeare_cpu", marks=pytest.mark.rare),
    ],
)
def test_shakespeare_reaches_its_loss(name, data_directory, tmp_path):
    """One seed, of which the published means are 1.905 and 1.907; the last step counts, not the best."""
    run = jaxformer.train(CONFIGS[0].parent / f"{name}.py", {"train.sample_tokens": 0}, directory=tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == run.config.train.steps and rows[-1]["split"] == "valid" and rows[-1]["loss"] < 1.93
