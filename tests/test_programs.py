"""Compiled programs that commands keep for the next one."""

import os
import subprocess
import sys

import jax
import pytest

from jaxformer.commands import programs
from jaxformer.commands.programs import KNOBS, keep_programs

SMALL = "--model.n_layers=1 --model.unroll=1 --model.d_model=12 --model.n_heads=2 --model.context_length=7"
CONFIG = f"quickstart {SMALL} --data.batch_size=3 --train.eval_every=99 --train.save_every=99 --train.sample_tokens=0"
OWN = {"JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"}  # what conftest sets


@pytest.fixture
def unset(monkeypatch):
    """JAX as a user has it who has set nothing."""
    for name in OWN:
        monkeypatch.delenv(name)
    before = {
        name: getattr(jax.config, name)
        for name in ("jax_compilation_cache_dir", "jax_enable_compilation_cache", *KNOBS)
    }
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def kept():
    return jax.config.jax_compilation_cache_dir


def command(*arguments, **environment):
    """What it says, with what JAX logs of its compilations."""
    mine = {name: value for name, value in os.environ.items() if name not in {*OWN, "TF_CPP_MIN_LOG_LEVEL"}}
    mine |= {"JAX_DEBUG_LOG_MODULES": "jax._src.compiler"} | environment
    line = [sys.executable, "-m", "jaxformer", "train", *CONFIG.split(), *arguments]
    said = subprocess.run(line, env=mine, capture_output=True, text=True, check=True).stderr
    assert "machine feature" not in said  # XLA's page for each program
    return said


def hits(said):
    return [name for name in ("train_steps", "init_state") if f"cache hit for 'jit_{name}'" in said]


def test_the_next_command_finds_the_programs_of_the_last(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path))
    quick = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # as tests compile
    assert hits(command("--dry_run", **quick)) == []
    (folder,) = (tmp_path / "programs").iterdir()
    assert list(folder.glob("jit_train_steps-*-cache"))
    assert hits(command("--dry_run", **quick)) == ["train_steps"]


@pytest.mark.slow
@pytest.mark.exact
def test_bits_do_not_depend_on_where_a_program_comes_from(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "cache"))

    def train(name, **environment):
        said = command("--train.steps=20", f"--directory={tmp_path / name}", **environment)
        return hits(said), (tmp_path / name / "checkpoints" / "20" / "manifest.json").read_text()

    nothing, bits = train("none", JAX_ENABLE_COMPILATION_CACHE="false")
    assert not nothing and not (tmp_path / "cache" / "programs").exists() and "sha256" in bits
    assert train("empty") == ([], bits)
    assert train("filled") == (["train_steps", "init_state"], bits)


def test_the_folder_is_that_of_the_processor(tmp_path, monkeypatch, unset):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path))
    folders = set()
    for name, value in (("features", ["avx2"]), ("features", ["avx2", "avx512f"]), ("processor", "another, 2 cores")):
        monkeypatch.setattr(programs, name, lambda value=value: value)
        jax.config.update("jax_compilation_cache_dir", None)
        keep_programs()
        folders.add(kept())
    assert len(folders) == 3 and all(os.path.dirname(folder) == str(tmp_path / "programs") for folder in folders)
    assert all(getattr(jax.config, name) == value for name, value in KNOBS.items())


def test_what_the_user_has_set_stays(tmp_path, monkeypatch, unset):
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", "mine")
    keep_programs()
    assert kept() == "mine"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    before = jax.config.jax_compilation_cache_max_size
    keep_programs()
    assert kept() and jax.config.jax_compilation_cache_max_size == before
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_enable_compilation_cache", False)
    keep_programs()
    assert kept() is None


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, unset, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "file"))
    keep_programs()
    assert kept() is None
    (record,) = caplog.records
    assert "not kept" in record.getMessage() and str(tmp_path / "file") in record.getMessage()


def test_half_a_program_goes(tmp_path, monkeypatch, unset):
    """JAX writes the program, then the time; and never over a program that is there."""
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path))
    keep_programs()
    (folder,) = (tmp_path / "programs").iterdir()
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (folder / name).write_bytes(b"12345678")
    jax.config.update("jax_compilation_cache_dir", None)
    keep_programs()
    assert {path.name for path in folder.iterdir()} == {".lockfile", "whole-cache", "whole-atime"}
