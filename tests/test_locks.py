"""Locks on files: who holds one, who waits, and what is refused where there are none."""

import errno
import os
import subprocess
import sys
import textwrap
import threading

import pytest

from jaxformer.data import locks
from jaxformer.data.corpora import PythonTopics
from jaxformer.data.datasets import encode, prepare
from jaxformer.data.locks import is_read, locked, reading
from jaxformer.data.tokenizers import Bytes
from jaxformer.spec import InputError

HOLDS = """
import sys
from pathlib import Path
from jaxformer.data.locks import locked
with locked(Path(sys.argv[1]), sys.exit):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process, which holds the lock of a file."""
    command = [sys.executable, "-c", HOLDS, str(tmp_path / "folder" / "lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield process
        process.kill()


READS = HOLDS.replace("locked", "reading").replace(", sys.exit)", ")")


def test_who_reads_a_folder_is_seen_without_a_trace(tmp_path):
    """Several may read it; when the last has gone, or was killed, nobody does."""
    (tmp_path / "step").mkdir()
    command = [sys.executable, "-c", READS, str(tmp_path / "step")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        with reading(tmp_path / "step"):
            assert is_read(tmp_path / "step") and is_read(tmp_path / "step")
        assert is_read(tmp_path / "step")
        process.kill()
    assert not is_read(tmp_path / "step") and not is_read(tmp_path / "none")
    assert [p.name for p in tmp_path.rglob("*")] == ["step"]
    with pytest.raises(FileNotFoundError), reading(tmp_path / "none"):
        pass


def test_one_process_waits_for_the_other(tmp_path, holder):
    path, told = tmp_path / "folder" / "lock", []

    def taken():
        told.append("taken")
        threading.Timer(0.1, release).start()

    def release():
        told.append("released")
        holder.kill()

    with locked(path, taken):
        assert told == ["taken", "released"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    refused = pytest.raises(InputError, match=r"folder cannot be locked \(.*; give a folder on another file system")
    with refused, locked(tmp_path / "folder" / "lock", lambda: None):
        pass


REFUSAL = r"jaxformer trains and prepares corpora on Linux and macOS; on Windows run it inside WSL 2"


def test_without_locks_texts_are_encoded_but_no_corpus_is_prepared(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path / "cache"))
    assert len(encode(PythonTopics(), Bytes()).tokens) > 400_000 and not is_read(tmp_path)
    with pytest.raises(InputError, match=REFUSAL):
        prepare(PythonTopics(), Bytes())
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
def test_a_system_without_locks_opens_runs_and_does_not_train(tmp_path):
    """In a process where `fcntl` cannot be imported, as on Windows."""
    (tmp_path / "config.py").write_text(
        textwrap.dedent("""
        from jaxformer import Config, Data, Decoder, Train
        from jaxformer.data.tokenizers import Bytes
        config = Config("run", Decoder(n_layers=1, n_heads=1, d_model=8, context_length=16),
                        Data(tokenizer=Bytes(), batch_size=2), train=Train(steps=2, sample_tokens=0, eval_every=50))
        """)
    )
    (tmp_path / "short.txt").write_text("a short text")
    command = [sys.executable, "-c", "import jaxformer; jaxformer.train('config.py')"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    code = """
    import sys
    sys.modules["fcntl"] = None
    import jaxformer
    run = jaxformer.open_run("run")
    assert len(run.sample("a", 5)) > 1 and run.evaluate("short.txt")["tokens"] == 11
    jaxformer.train("config.py", directory="new") if len(sys.argv) > 1 else None
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    done = subprocess.run([*command, "train"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and f"InputError: {REFUSAL}" in done.stderr and not (tmp_path / "new").exists()
