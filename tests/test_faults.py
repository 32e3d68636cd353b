"""What benchmarks/faults.py tries by the thousand, a few times each; and that it finds what breaks a promise."""

import gc
import importlib.util
import shutil
from pathlib import Path

import pytest

from jaxformer.run import manifest

# Of several reads that fail at once Orbax awaits one; the others are told of when they are collected, whenever that is.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def script():
    path = Path(__file__).parent.parent / "benchmarks" / "faults.py"
    spec = importlib.util.spec_from_file_location("faults", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


faults = script()


@pytest.fixture(autouse=True)
def _numerics_are_sound(monkeypatch):
    """Each opening tries them anew."""
    monkeypatch.setattr("jaxformer.platform.check_numerics", lambda: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all, so that the run whose checkpoints are damaged is trained once."""
    yield tmp_path_factory.mktemp("faults")
    gc.collect()


@pytest.mark.slow
def test_damaged_checkpoints_are_found(folder):
    line, broken = faults.flips(folder, 8)
    assert line.startswith("8 flips: 0 silently wrong, 0 tracebacks, 0 refused beside a whole one, ") and not broken
    line, broken = faults.files(folder, 8)
    assert line.startswith("8 damaged files: 0 silently wrong, 0 tracebacks, 0 refused ") and not broken


@pytest.mark.slow
def test_what_is_not_looked_at_would_be_told(folder, monkeypatch):
    """Without the digests the older arrays pass for the newest."""
    monkeypatch.setattr(manifest.Manifest, "damaged", lambda *_: None)

    def older(copy):
        shutil.rmtree(copy / "checkpoints/20/state")
        shutil.copytree(copy / "checkpoints/10/state", copy / "checkpoints/20/state")
        return copy

    _, broken = faults.damaged(folder, lambda *_: [("older arrays", older, False)], "x")
    assert "fell back without a word" in broken[0]


def test_a_run_resumes_with_the_same_bits(folder):
    line, broken = faults.resume(folder, 4)
    assert line == "4 steps, 0.2 epochs, interrupted after each step: 0 with other bits" and not broken


def test_wrong_configs_and_commands_get_a_sentence(folder, monkeypatch):
    monkeypatch.chdir(folder)
    line, broken = faults.configs(folder, 60)
    assert line.startswith("60 configs and command lines: 0 tracebacks, ") and not broken


def test_texts_come_back(folder):
    line, broken = faults.texts(folder, 20)
    assert line.startswith("20 texts by 5 tokenizers: 0 broken promises, ") and not broken
