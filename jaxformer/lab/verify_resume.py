"""Whether a run that is killed and resumed ends as one that nothing interrupted: both are trained, then compared."""

import collections
import dataclasses
import hashlib
import itertools
import json
import logging
import random
import shutil
import signal
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.files import located
from jaxformer.data.tokenizers import read_tokenizer
from jaxformer.declarations import by_path
from jaxformer.lab.interruptions import Different, Interruption, Trial
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.directory import read_classes, verify_data
from jaxformer.run.loop import check_together
from jaxformer.run.manifest import sha256
from jaxformer.run.members import batches_of
from jaxformer.run.metrics import CLOCK, read_rows
from jaxformer.run.opened import open_run
from jaxformer.run.plan import prepare_data
from jaxformer.run.signals import Stop, collected
from jaxformer.run.starts import read_starts
from jaxformer.spec import InputError, counted

log = logging.getLogger(__name__)

SECONDS = 10.0  # in which a run that is told to stop has saved and is out, unless two calls take longer


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What `verify_resume` finds; printed it is a text, `json` the same as one object."""

    config: str
    directory: str | None  # where both runs are; None: deleted
    interruptions: tuple[Interruption, ...]
    findings: tuple[str, ...]
    difference: str | None  # the first one

    @property
    def identical(self) -> bool:
        return self.difference is None

    def __str__(self) -> str:
        counts = {i.signal: [j.signal for j in self.interruptions].count(i.signal) for i in self.interruptions}
        sent = ", ".join(counted(count, name) for name, count in sorted(counts.items()))
        verdict = f"identical: {sent}" if self.identical else f"different: {self.difference}"
        kept = f"; both runs are in {self.directory}" if self.directory else ""
        return "\n".join((*map(str, self.interruptions), *self.findings, verdict + kept))

    def json(self) -> str:
        return json.dumps({"identical": self.identical} | dataclasses.asdict(self), ensure_ascii=False)


def verify_resume(
    config: str | Path,
    overrides: Mapping[str, Any] | None = None,
    kills: int = 5,
    signals: int = 1,
    seed: int = 0,
    seeds: int | None = None,
    directory: str | Path | None = None,
    imports: Sequence[str] = (),
) -> Verdict:
    """Trains a config straight through, and again with SIGKILLs and signals that end runs at random moments, resumed by
    the same command each time; then compares all that the two runs are.

    `config` is a preset's name or a file's path, `overrides` are texts as on the command line: processes of their own
    train. `seed` draws the moments. Two kills of five wait for a save and for an evaluation. The `signals` are SIGTERM,
    SIGINT and SIGHUP in turn. `seeds` is how many seeds train together. Both runs stay in `directory`, which must be
    empty or new; without one, in a temporary folder that is deleted if all is identical. `imports` are modules that the
    processes import first, as by --import.

    Compared are the stored configs, all batches, rows but for what they say of time, and every array of every
    checkpoint left. A run does not record its batches: they are built anew, from what each run has stored, and losses
    and states are the witnesses that these were seen. Each start must begin at the newest step that was saved before,
    which it does if that is whole by the hashes of its manifest, or at a later one.

    Raises InputError for a config that cannot be trained, OSError if the first run fails otherwise, and
    KeyboardInterrupt for a signal of one's own.
    """
    first = _checked(config, overrides, kills, signals, seeds)
    given = directory is not None and located(str(directory)).is_dir()
    folder = _folder(directory)
    names = [""] if seeds is None else [f"seed-{first.train.seed + i}" for i in range(seeds)]
    flags = [f"--{path}={value}" for path, value in (overrides or {}).items()]
    flags += [f"--import={module}" for module in imports]
    command = ["train", str(config), *flags, *([f"--seeds={seeds}"] if seeds else [])]
    found, findings, difference = list[Interruption](), list[str](), None
    with collected("stopping, too") as received:
        straight, resumed = (
            Trial(command, first, folder / kind, [folder / kind / name for name in names], received)
            for kind in ("straight", "resumed")
        )
        try:
            try:
                until_row, in_all, call = straight.straight()
            except InputError:  # of a config that cannot be trained; what is compared later stays
                shutil.rmtree(folder)
                if given:
                    folder.mkdir()
                raise
            findings.append(f"straight: {counted(first.train.steps, 'step')} in {in_all:.1f} s")
            for each in resumed.interrupted(random.Random(seed), kills, signals, until_row, call):
                found.append(each)
                log.info("%d of %d: %s", len(found), kills + signals, each)
            _refuse(lost(found, read_starts(resumed.directories[0])))
            findings.append("checkpoints: none lost; every start began at the newest one that was saved before")
            findings += _stops(found, call)
            for sentence in _checks(first, straight.directories, resumed.directories):
                findings.append(sentence)
        except Different as error:
            difference = str(error)
        except Stop:
            stop = KeyboardInterrupt(f"{signal.Signals(received[0]).name}: no verdict; the runs are in {folder}")
            stop.signum = received[0]  # pyright: ignore[reportAttributeAccessIssue]
            raise stop from None
    kept = directory is not None or difference is not None
    if not kept:
        shutil.rmtree(folder)
    return Verdict(str(config), str(folder) if kept else None, tuple(found), tuple(findings), difference)


def _checked(
    config: str | Path, overrides: Mapping[str, Any] | None, kills: int, signals: int, seeds: int | None
) -> Config:
    if not isinstance(config, str | Path):
        raise InputError(f"config={config!r} must be a preset's name or a file's path: another process reads it")
    if "directory" in (overrides or {}):
        raise InputError("directory must not be among overrides; give the one in which both runs are kept beside them")
    for name, value in (("kills", kills), ("signals", signals)):
        if not 0 <= value < 10_000:
            raise InputError(f"{name}={value} must be how many are sent to the run, such as 5")
    if not kills + signals:
        raise InputError("kills=0 and signals=0 interrupt nothing; give one of them at least 1")
    found = config_lib.resolve(config, overrides)
    if seeds is not None:
        if not 0 < seeds < 10_000:
            raise InputError(f"seeds={seeds} must be how many are trained together, such as 2")
        check_together(found, seeds)
    if found.train.save_every >= found.train.steps:
        log.warning(
            "train.save_every=%d: nothing is saved before step %d, and a run killed before that begins anew",
            *(found.train.save_every, found.train.steps),
        )
    return found


def _folder(directory: str | Path | None) -> Path:
    if directory is None:
        return Path(tempfile.mkdtemp(prefix="verify_resume-"))
    folder = located(str(directory))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"directory={str(directory)!r} must be empty or new; give another one")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# --- comparison


def _checks(config: Config, straight: Sequence[Path], resumed: Sequence[Path]) -> Iterator[str]:
    """What is found alike, a sentence for each; raises Different at the first thing that is not."""
    for one, other in zip(straight, resumed, strict=True):
        name = f"{one.name}, " if len(straight) > 1 else ""
        _refuse(differing_configs(one, other), name)
        digests = [batches_sha256(directory) for directory in (one, other)]
        _refuse(None if len(set(digests)) == 1 else f"batches: SHA-256 {digests[0]}, then {digests[1]}", name)
        yield f"{name}batches: {config.train.steps:,}, built of what each run has stored, alike (SHA-256 {digests[0]})"
        _refuse(differing_rows(one, other), name)
        yield f"{name}rows: {len(read_rows(one / 'metrics.jsonl')[0]):,}, alike"
        yield f"{name}{_states(one, other, name)}"


def _refuse(difference: str | None, name: str = "") -> None:
    if difference is not None:
        raise Different(name + difference)


def lost(found: Sequence[Interruption], starts: Sequence[Mapping[str, Any]]) -> str | None:
    """The first checkpoint that was saved before an interruption, and from which, or a later one, the next start did
    not begin."""
    for each in found:
        later = starts[each.starts :]
        if later and later[0]["step"] < each.saved:
            return f"{each}; the next start began at step {later[0]['step']}"
    return None


def _stops(found: Sequence[Interruption], call: float) -> list[str]:
    took = [each.took for each in found if each.signal != "SIGKILL"]
    if not took:
        return []
    late = "" if max(took) <= max(SECONDS, 2 * call) else ", longer than they may"
    allowed = f"the longer of {SECONDS:.0f} s and two calls, {2 * call:.1f} s"
    return [f"signals: saved and out after {max(took):.1f} s at most{late} ({allowed}), with status 128 + the signal"]


def differing_configs(one: Path, other: Path) -> str | None:
    left, right = (config_lib.read(directory / "config.json") for directory in (one, other))
    changed = {path: both for path, both in config_lib.differences(left, right).items() if path != "directory"}
    return next((f"config: {path} is {old}, then {new}" for path, (old, new) in changed.items()), None)


def batches_sha256(directory: Path) -> str:
    """SHA-256 over the batches of all steps, built from the config, tokenizer and classes that a run has stored.

    Raises InputError if the corpus is not what the run began with.
    """
    config = config_lib.read(directory / "config.json")
    prepared = prepare_data(config, read_tokenizer(directory / "tokenizer.json"), read_classes(directory))
    verify_data(directory, prepared.manifest)
    batches, digest = batches_of(config, prepared), hashlib.sha256()
    for step in range(config.train.steps):
        digest.update(sha256(batches.at(step)).encode())
    return digest.hexdigest()


def differing_rows(one: Path, other: Path) -> str | None:
    """The first row of metrics.jsonl that is missing, doubled, out of place or different but for the clock."""
    found = [_rows(directory) for directory in (one, other)]
    for kind, rows in zip(("straight", "resumed"), found, strict=True):
        counts = collections.Counter(name for name, _ in rows)
        if double := next((name for name, count in counts.items() if count > 1), None):
            return f"rows: {double} is there twice in the {kind} run"
    for left, right in itertools.zip_longest(*found):
        if left is None or right is None or left[0] != right[0]:
            names = [row[0] if row else "none" for row in (left, right)]
            return f"rows: {names[0]} in the straight run, {names[1]} in its place in the resumed run"
        for field in (*left[1], *right[1]):
            values = [row[1].get(field, "nothing") for row in (left, right)]
            if values[0] != values[1]:
                return f"rows: {left[0]}: {field} is {values[0]}, then {values[1]}"
    return None


def _rows(directory: Path) -> list[tuple[str, dict[str, Any]]]:
    rows, unread = read_rows(directory / "metrics.jsonl")
    names = [f"step {row['step']}, {row.get('split')}" for row in rows]
    found = [(name, {k: v for k, v in row.items() if k not in CLOCK}) for name, row in zip(names, rows, strict=True)]
    return [*found, (counted(unread, "torn line"), {})] if unread else found


def _states(one: Path, other: Path, name: str) -> str:
    """Compares every checkpoint left to both, each verified by its manifest as it is restored."""
    left, right = (Checkpoints(directory / "checkpoints") for directory in (one, other))
    ranks = [{step: each.rank(step) for step in each.steps()} for each in (left, right)]
    _refuse(differing_checkpoints(*ranks), name)
    steps, count, state = sorted(ranks[0].keys() & ranks[1].keys()), 0, None
    for step in steps:
        try:
            state, again = (open_run(directory, step).state for directory in (one, other))
        except InputError as error:  # one that is damaged
            raise Different(str(error)) from None
        difference = differing_arrays(state, again)
        _refuse(difference and f"state of step {step}: {difference}", name)
        count = len(jax.tree.leaves(state))
    hashes = f"params_sha256 {sha256(state and state.params)}, state_sha256 {sha256(state)}"
    return f"states: {count} arrays of each of the steps {', '.join(map(str, steps))}, alike ({hashes})"


def differing_checkpoints(one: Mapping[int, float], other: Mapping[int, float]) -> str | None:
    """How the steps left to two runs differ, or their ranks. The second may have such as a signal made it save, each in
    the place of an older one of the first."""
    more, less = sorted(other.keys() - one.keys()), sorted(one.keys() - other.keys())
    replaced = len(more) == len(less) and all(new > old for new, old in zip(more, less, strict=True))
    alike = all(one[step] == other[step] for step in one.keys() & other.keys())
    same = replaced and alike and max(one, default=0) == max(other, default=0)
    return None if same else f"checkpoints and ranks: {dict(one)}, then {dict(other)}"


def differing_arrays(one: Any, other: Any) -> str | None:
    """The first array of two states, in the order of their paths, that is not the same bits."""
    named = [{name: np.asarray(array) for name, array in by_path(state).items()} for state in (one, other)]
    for name in sorted({*named[0], *named[1]}):
        left, right = (arrays.get(name) for arrays in named)
        layouts = ["none" if a is None else f"{a.dtype}{list(a.shape)}" for a in (left, right)]
        if left is None or right is None or layouts[0] != layouts[1]:
            return f"{name} is {layouts[0]}, then {layouts[1]}"
        raw = [np.ascontiguousarray(a).reshape(-1).view(np.uint8).reshape(a.size, -1) for a in (left, right)]
        unlike = (raw[0] != raw[1]).any(1)
        if unlike.any():
            at = np.unravel_index(int(unlike.argmax()), left.shape)
            place, count = f"{name}{list(map(int, at))}", counted(int(unlike.sum()), "number")
            return f"{place} is {left[at]}, then {right[at]}; {count} of {unlike.size:,} in it differ"
    return None
