"""The directory of a run: whose it is, and what it says of its beginning."""

import contextlib
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.datasets import Prepared
from jaxformer.data.files import read_json, remove_parts, write
from jaxformer.data.locks import locked
from jaxformer.data.tokenizers import read_tokenizer
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.manifest import BASE, UNFINISHED
from jaxformer.spec import InputError, dumps

FINGERPRINTS = {"data.corpus": "corpus_sha256", "data.valid": "valid_sha256"}  # field -> its name in data.json
ORIGINS = "init_from.json", "imported.json"  # where parameters came from
OURS = {
    *("lock", "data.json", "tokenizer.json", "config.json", "starts.jsonl", *ORIGINS, "checkpoints", BASE),
    # Written before the first checkpoint:
    *("metrics.jsonl", "tensorboard", "wandb", "wandb.id", "profile", "loss.png", "loss.png.new"),
}
WILD = set("*?[\\")  # Orbax looks for the files that it merges by a pattern that the whole path is part of


@contextlib.contextmanager
def claimed(configs: Sequence[Config], prepared: Prepared) -> Iterator[None]:
    """Directories that hold these runs and no others, for this process alone; `check_directory` was called before."""
    with contextlib.ExitStack() as locks:
        for config in configs:
            locks.enter_context(locked(Path(config.directory) / "lock", functools.partial(_refuse_taken, config)))
        for config in [each for each in configs if not check_directory(each, prepared)]:  # again, behind the locks
            directory = Path(config.directory)
            for name in ORIGINS:  # of what was to be here, and has not begun
                (directory / name).unlink(missing_ok=True)
            write(directory / "data.json", json.dumps(prepared.manifest, indent=1) + "\n")
            write(directory / "tokenizer.json", dumps(prepared.tokenizer))
            config_lib.save(config, directory / "config.json")  # last: it makes the directory a run
        for config in configs:
            remove_parts(Path(config.directory))
        yield


def _refuse_taken(config: Config) -> None:
    raise InputError(f"directory={config.directory!r} is being trained by another process; wait for it")


def check_directory(config: Config, prepared: Prepared) -> bool:
    """Whether the directory holds this run already; raises InputError if it holds anything else, or never could."""
    config_lib.check_storable(config)
    directory = Path(config.directory)
    if not check_begun(config):
        if has_checkpoint(directory):
            raise InputError(f"{directory} has checkpoints and no config.json; restore that, or give another directory")
        return False
    verify_data(directory, prepared.manifest)
    if read_tokenizer(directory / "tokenizer.json") != prepared.tokenizer:
        raise InputError(
            f"{directory / 'tokenizer.json'} is not what data.tokenizer={config.data.tokenizer} gives now; "
            "restore what it was, or give another directory"
        )
    return True


def check_begun(config: Config) -> bool:
    """Whether the directory holds a run of this config that has begun; raises InputError if it holds anything else.

    One that failed before its first step, in a part of the user's perhaps, has not begun.
    """
    directory = Path(config.directory)
    if directory.exists() and not directory.is_dir():
        raise InputError(f"directory={config.directory!r} is a file; give the name of a folder")
    if wild := sorted(WILD & set(str(directory.absolute()))):
        raise InputError(
            f"directory={str(directory.absolute())!r} has {' '.join(wild)} in it, with which Orbax does not find again "
            "what it has saved; give a path without"
        )
    if has_begun(directory):
        if other := other_run(config):
            raise InputError(f"{other}; give another directory")
        return True
    names = {path.name for path in directory.iterdir() if path.suffix != ".part"} if directory.exists() else set()
    if {name.partition(UNFINISHED)[0] for name in names} - OURS:
        raise InputError(
            f"directory={config.directory!r} holds something that is no run; give an empty or a new folder"
        )
    return False


def has_begun(directory: Path) -> bool:
    """Whether a run has left a row or a checkpoint."""
    stored, rows = (directory / name for name in ("config.json", "metrics.jsonl"))
    return stored.exists() and ((rows.exists() and rows.stat().st_size > 0) or has_checkpoint(directory))


def as_begun(configs: Sequence[Config]) -> list[Config]:
    """The configs as the runs in their directories mean them: defaults may have changed since one of these began."""
    for stored in (Path(config.directory) / "config.json" for config in configs):
        if has_begun(stored.parent) and (since := config_lib.format_of(stored)) < config_lib.FORMAT:
            return [config_lib.as_begun(config, config_lib.read(stored), since) for config in configs]
    return list(configs)


def has_checkpoint(directory: Path) -> bool:
    """Whether a step was saved whole: until then a run begins as if nothing had been."""
    return bool(Checkpoints(directory / "checkpoints").steps())


def other_run(config: Config) -> str | None:
    """How the run in the directory is not one of this config, in a sentence; None if it is."""
    changed = config_lib.differences(config_lib.read(Path(config.directory) / "config.json"), config)
    wrong = {path: change for path, change in changed.items() if config_lib.may_change(path) is False}
    fields = "; ".join(config_lib.told(path, *change) for path, change in wrong.items())
    return f"directory={config.directory!r} holds another run: {fields}" if wrong else None


def noticed(config: Config) -> dict[str, tuple[Any, Any]]:
    """Path → (old, new) of the fields that may change, but not without a word."""
    changed = config_lib.differences(config_lib.read(Path(config.directory) / "config.json"), config)
    return {path: change for path, change in sorted(changed.items()) if config_lib.may_change(path) is None}


def read_classes(directory: Path) -> dict[str, tuple[str, ...]]:
    """The classes of the table's columns that the run was trained on."""
    found = read_json(directory / "data.json")
    try:
        found = found.get("classes", {})
        for name, values in found.items():
            if not isinstance(values, list) or {*map(type, values)} - {str} or len(set(values)) != len(values):
                raise ValueError(f"the classes of {name!r} must be a list of different texts")
        return {name: tuple(values) for name, values in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{directory / 'data.json'}: no classes can be read ({error}); restore the file") from None


def read_imported(directory: Path) -> dict[str, Any]:
    """What an imported run was made of: its "folder", "model_type", the "dtype" of its tensors, and in "eos_token_id"
    the ids by which it ends a text; {} if it was not imported. Raises InputError if that cannot be read."""
    path = directory / "imported.json"
    try:
        found = read_json(path) if path.is_file() else {}
        return found | {"eos_token_id": [i for i in found.get("eos_token_id", ()) if type(i) is int]} if found else {}
    except (ValueError, TypeError, AttributeError):
        raise InputError(f"{path} cannot be read; import the model again") from None


def read_ends(directory: Path) -> list[int]:
    """The ids by which the model ends a text that the run was trained from, as `warm_start` has stored them."""
    path = directory / "init_from.json"
    found = read_json(path) if path.is_file() else {}
    return [i for i in found.get("eos_token_id", ()) if type(i) is int] if isinstance(found, dict) else []


def verify_data(directory: Path, found: Mapping[str, Any]) -> None:
    """Raises InputError if fingerprints of the corpora are not those that the run began with."""
    path = directory / "data.json"
    stored = read_json(path)
    try:
        old = {field: stored[name] for field, name in FINGERPRINTS.items()}
    except (KeyError, TypeError) as error:
        raise InputError(f"{path}: no fingerprint of the corpus can be read ({error}); restore the file") from None
    for field, name in FINGERPRINTS.items():
        if old[field] != found[name]:
            raise InputError(
                f"{field} has SHA-256 {found[name]}, but the run in {directory} began with {old[field]}; "
                "restore that text, or give another directory"
            )
    if {"ids_sha256"} <= stored.keys() & found.keys() and found["ids_sha256"] != stored["ids_sha256"]:
        raise InputError(
            f"data: other ids come out of the same text than when the run in {directory} began; restore the versions "
            "and parts of then (starts.jsonl), or give another directory"
        )
