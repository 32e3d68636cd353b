"""Checkpoints: Orbax saves and restores, a manifest of our own says whether what came back is what was saved."""

import contextlib
import errno
import logging
import math
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxformer.data.files import of_machine, sync
from jaxformer.data.locks import is_read, reading
from jaxformer.platform import host, trim_memory
from jaxformer.run.manifest import BASE, UNFINISHED, Manifest, gathered, has_manifest, read_manifest, withdraw
from jaxformer.spec import InputError

log = logging.getLogger(__name__)
_alone = threading.Lock()  # of saves by Orbax: those of several runs at a time hang, or fail on each other's files


class Mismatch(InputError):
    """A sound checkpoint of another model, or without its base: older ones are no better."""


class Gone(Exception):
    """A checkpoint that was deleted before it was read, as a run that trains deletes those that newer ones replace."""


class Checkpoints:
    """The checkpoints of a run, to be read; nothing in the directory is changed."""

    def __init__(self, directory: Path):
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is no folder of checkpoints; remove it, or give another run")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant here
        self.directory = directory

    def steps(self) -> list[int]:
        """Those whose manifest is there: the others were never finished, or are being deleted."""
        paths = self.directory.iterdir() if self.directory.exists() else ()
        return sorted(int(path.name) for path in paths if path.name.isdecimal() and has_manifest(path))

    def rank(self, step: int) -> float:
        """The least is best; infinite if the step was not evaluated, or what was found is not finite."""
        try:
            manifest = read_manifest(self.directory / str(step))
        except ValueError:
            return math.inf
        return math.inf if manifest is None or manifest.rank is None else manifest.rank

    def best(self) -> tuple[int, float] | None:
        """Step and rank of the best checkpoint that was evaluated."""
        rank, step = min(((self.rank(step), step) for step in self.steps()), default=(math.inf, 0))
        return None if math.isinf(rank) else (step, rank)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of a step, shaped and sharded as `abstract`, with the base that the run keeps beside its
        checkpoints.

        Raises InputError if it is not what was saved, Gone if it was deleted meanwhile (as long as it is read, it is
        not), and what memory, devices or the disk raise, which says nothing of the checkpoint.
        """
        base, path = getattr(abstract, "base", ()), self.directory / str(step)
        state = self._restored(abstract.replace(base=()) if base else abstract, path)
        return state.replace(base=self._base(base, path)) if base else state

    def _base(self, abstract: Any, of: Path) -> Any:
        path = self.directory.parent / BASE
        try:
            own, manifest = read_manifest(path), read_manifest(of)
            if own is not None and manifest is not None and manifest.base != own.digest:
                raise InputError(f"it is another one than that of {of}")
            return self._restored(abstract, path)
        except (Gone, ValueError) as error:
            why = "it is not there" if isinstance(error, Gone) else error
            raise Mismatch(  # no other checkpoint has another one
                f"{path}, the parameters that the run leaves as they are, cannot be restored: {why}; copy it from "
                "where it is whole, or train anew in another directory"
            ) from None

    def _restored(self, abstract: Any, path: Path) -> Any:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(reading(path))
                manifest = read_manifest(path)
            except FileNotFoundError:
                raise Gone(path) from None
            except ValueError as error:
                raise InputError(f"{path / 'manifest.json'} is damaged ({error}); take another checkpoint") from None
            if manifest is None:
                raise Gone(path)
            abstract, skips = _without_new_skips(abstract, manifest)
            if other := manifest.other_layout(abstract, but="skips"):
                raise Mismatch(
                    f"{path} was saved with other shapes than those of this config and tokenizer ({other}); "
                    "restore config.json and tokenizer.json of the run"
                )
            try:
                # By the manifest all arrays are there; parts without one may have come since: partial.
                how = ocp.checkpoint_utils.construct_restore_args(abstract)
                args = ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(abstract, restore_args=how, partial_restore=True)
                )
                with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                    state = reader.restore(path.absolute(), args=args)["state"]
            except Exception as error:  # damaged files raise five types of exception, and more with each release
                if not has_manifest(path):
                    raise Gone(path) from None
                if of_machine(error):
                    raise
                reason = f"{type(error).__name__}: {str(error)[:200]}"
                raise InputError(f"{path} cannot be restored ({reason}); take another checkpoint") from error
            if wrong := manifest.damaged(state):
                if not has_manifest(path):
                    raise Gone(path)
                raise InputError(
                    f"{path} is damaged: the SHA-256 of {wrong} is not that of what was saved; take another checkpoint"
                )
        return state if skips is None else state.replace(skips=skips)

    def newest_states(self, abstract: Any) -> Iterator[tuple[int, Any]]:
        """Step and state of each checkpoint that is whole, the newest first; damaged ones are told."""
        tried: set[int] = set()
        while steps := [step for step in self.steps() if step not in tried]:
            try:
                state = self.restore(abstract, steps[-1])
            except Mismatch:
                raise
            except Gone:  # newer ones have come
                continue
            except InputError as error:
                log.warning("%s", error)
                tried.add(steps[-1])
            else:
                tried.add(steps[-1])
                yield steps[-1], state

    def chosen(self, abstract: Any, step: int | str | None, finite: Callable[[Any], bool]) -> Any:
        """The state of a step or of the "best" one; None: the newest that is whole and, by `finite`, of finite numbers.

        Says if it is not of finite numbers. Raises InputError if there is none.
        """
        wrong = "%s holds parameters that are no finite numbers%s"
        if step is not None:
            at, state = self._named(abstract, step)
            if not finite(state):
                log.warning(wrong, self.directory / str(at), "")
            return state
        newest = None
        for at, state in self.newest_states(abstract):
            if finite(state):
                return state
            newest = state if newest is None else newest
            log.warning(wrong, self.directory / str(at), "; an older checkpoint is looked for")
        if newest is None:
            _refuse_if_any([self])
            raise InputError(f"{self.directory.parent} holds no checkpoint yet; train it until it saves one")
        log.warning("%s has no checkpoint of finite numbers: the newest is taken", self.directory.parent)
        return newest

    def _named(self, abstract: Any, step: int | str) -> tuple[int, Any]:
        run = self.directory.parent
        while True:
            steps, best = self.steps(), self.best() if step == "best" else None
            known = ", ".join(map(str, steps)) or "none"
            if step == "best" and best is None:
                raise InputError(f"step='best': no evaluation of a checkpoint of {run} was finite; it has {known}")
            at = step if best is None else best[0]
            if not isinstance(at, int) or at not in steps:
                raise InputError(f"step={at!r} must be one of the checkpoints of {run}: {known} or 'best'")
            with contextlib.suppress(Gone):  # a run that trains has replaced it
                return at, self.restore(abstract, at)


class CheckpointWriter(Checkpoints):
    """The checkpoints of a run that this process trains: copied, then hashed and written in the background; the newest
    `keep` and the best stay."""

    def __init__(self, directory: Path, keep: int = 1):
        super().__init__(directory)
        self._clear()
        self._keep = keep
        self._saver = ocp.Checkpointer(ocp.CompositeCheckpointHandler())
        self._background = ThreadPoolExecutor(1)
        self._pending: tuple[int, Future[None]] | None = None  # the step that is being saved
        self._lock = threading.Lock()  # of manifests and what follows
        self._ranks = {step: self.rank(step) for step in self.steps()}
        self._has_base = False  # as this process has saved or restored it

    def _clear(self) -> None:
        """Deletes what killed processes left of steps that they were saving or deleting. Where no step is whole, those
        that lack nothing but a manifest stay, until they are saved anew: someone may have lost the manifests."""
        whole = self.steps()
        for path in (*self.directory.glob("*"), *self.directory.parent.glob(f"{BASE}{UNFINISHED}*")):
            unfinished = path.name.isdecimal() and bool(whole) and int(path.name) not in whole
            if unfinished or UNFINISHED in path.name:
                shutil.rmtree(path, ignore_errors=True)

    def restore(self, abstract: Any, step: int) -> Any:
        state = super().restore(abstract, step)
        self._has_base = True
        return state

    def best_rank(self) -> float:
        """Infinite if no checkpoint was evaluated."""
        return min(self._ranks.values(), default=math.inf)

    def has(self, step: int) -> bool:
        """Whether the step is saved, or about to be."""
        return (self._pending is not None and self._pending[0] == step) or has_manifest(self.directory / str(step))

    def save(self, state: Any, step: int) -> None:
        """Begins to save, of a copy: the state may be donated at once. Raises OSError if there is no room, or if an
        earlier save has failed.

        One that comes before the last is on disk waits for it, so that never more than one copy is alive. The base is
        saved before the first of them, once.
        """
        if self.has(step):
            return
        self.wait()
        if base := getattr(state, "base", ()):
            if not self._has_base:
                save_once(self.directory.parent, jax.tree.map(gathered, base), BASE)
                self._has_base = True
            state = state.replace(base=())
        path = self.directory / str(step)
        try:
            self.directory.mkdir(exist_ok=True)
        except FileNotFoundError:
            message = f"{self.directory.parent} was deleted or moved while the run trained; nothing more can be kept"
            raise OSError(message) from None
        _remove(path)  # what an interrupted process left
        _reserve(self.directory, sum(a.nbytes for a in jax.tree.leaves(state)))
        self._ranks[step] = math.inf
        own = read_manifest(self.directory.parent / BASE) if base else None
        self._pending = step, self._background.submit(self._write, _copied(state), step, own and own.digest)

    def add_rank(self, step: int, rank: float) -> None:
        """Says how good a step that was saved, or is being saved, has been found to be."""
        path = self.directory / str(step)
        with self._lock:  # a save that is pending writes its manifest with the rank, before or after
            self._ranks[step] = rank if math.isfinite(rank) else math.inf
            if manifest := read_manifest(path):
                manifest.ranked(rank).write(path)

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that a run that resumes can save that step again."""
        aside = self.directory / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.directory / str(step), aside)
        self._ranks.pop(step, None)

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps: the run comes to them anew."""
        for later in [each for each in self.steps() if each > step]:
            _remove(self.directory / str(later))
            self._ranks.pop(later, None)

    def wait(self) -> None:
        """Until all is on disk; raises OSError if a save has failed."""
        if self._pending is not None:
            pending, self._pending = self._pending[1], None
            try:
                pending.result()
            except Exception as error:  # Orbax passes on whatever its threads met
                raise OSError(f"no checkpoint could be written to {self.directory}: {error}") from error

    def close(self) -> None:
        """Waits, too."""
        try:
            self.wait()
            self._prune()
        finally:
            self._background.shutdown()
            self._saver.close()

    def _write(self, state: Any, step: int, base: str | None) -> None:
        """Uses a copy up: writes arrays, then the manifest, without which they do not count; deletes what need not
        stay, once all of it and the rows up to the step would outlast a power cut."""
        path = self.directory / str(step)
        try:
            manifest = Manifest.of(state, base)
            with _alone:
                self._saver.save(path.absolute(), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        finally:  # Orbax leaves cycles that hold on to it
            jax.tree.map(lambda a: a.delete(), state)
            trim_memory()
        if (rows := self.directory.parent / "metrics.jsonl").exists():
            sync(rows)
        _sync_all(path)
        sync(self.directory.parent)  # which has config.json, and metrics.jsonl
        with self._lock:
            manifest.ranked(self._ranks[step]).write(path)
        sync(path)
        self._prune()

    def _prune(self) -> None:
        steps = self.steps()
        best = min(steps, key=lambda step: self._ranks.get(step, math.inf), default=None)
        evaluated = best is not None and math.isfinite(self._ranks.get(best, math.inf))
        for step in {*steps} - {*steps[-self._keep :], *([best] if evaluated else [])}:
            if not is_read(self.directory / str(step)):  # by one that reads it: it goes the next time
                _remove(self.directory / str(step))
                self._ranks.pop(step, None)


def save_once(directory: Path, state: Any, step: int | str) -> None:
    """Saves NumPy's arrays that nothing changes meanwhile, without a copy of any. Raises OSError if there is no room.

    They are not compressed: that takes room for another form of each, and of weights gains little.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant here
    path, kinds = directory / str(step), ocp.type_handlers
    directory.mkdir(parents=True, exist_ok=True)
    _remove(path)  # what an interrupted process left
    _reserve(directory, sum(a.nbytes for a in jax.tree.leaves(state)))
    arrays = kinds.create_type_handler_registry((np.ndarray, kinds.NumpyHandler(deepcopy_host_arrays=False)))
    how = ocp.PyTreeCheckpointHandler(type_handler_registry=arrays, use_compression=False)
    handler = ocp.CompositeCheckpointHandler(state=how)
    manifest = Manifest.of(state)
    with _alone, ocp.Checkpointer(handler) as saver:
        saver.save(path.absolute(), args=ocp.args.Composite(state=ocp.args.PyTreeSave(state)))
    _sync_all(path)
    manifest.write(path)
    sync(path)


def restore_together(runs: Sequence[CheckpointWriter], abstract: Any) -> list[Any] | None:
    """The states of all runs at the newest step that each of them has whole; None if none has a checkpoint, or if
    their very first save was cut short.

    Damaged ones are set aside, if there is a step to resume from.
    """
    damaged: list[tuple[CheckpointWriter, int]] = []
    for step in sorted(set[int].intersection(*(set(run.steps()) for run in runs)), reverse=True):
        states: list[Any] = []
        for run in runs:
            try:
                states.append(run.restore(abstract, step))
            except Mismatch:
                raise
            except InputError as error:
                log.warning("%s", error)
                damaged.append((run, step))
        if len(states) == len(runs):
            for run, bad in damaged:
                run.set_aside(bad)
            return states
    counts = [len(run.steps()) for run in runs]
    if damaged or min(counts) or max(counts) > 1:
        _refuse_if_any(runs)
    return None


def _without_new_skips(abstract: Any, manifest: Manifest) -> tuple[Any, Any]:
    """What is to be restored; and, where skips are not saved as they would be, those that the state gets: zeros, as a
    run stored before there were guards, or with another one, begins with."""
    skips = getattr(abstract, "skips", ())
    less = abstract.replace(skips=()) if skips else abstract
    if not skips or manifest.other_layout(abstract) is None or manifest.other_layout(less, but="skips"):
        return abstract, None  # the same, or another model
    return less, jax.tree.map(lambda a: jax.device_put(np.zeros(a.shape, a.dtype), a.sharding), skips)


def _refuse_if_any(runs: Sequence[Checkpoints]) -> None:
    if any(run.steps() for run in runs):
        each = "every checkpoint is damaged"
        what = each if len(runs) == 1 else "no step is whole in each of the runs trained together"
        raise InputError(f"{runs[0].directory}: {what}; train anew in another directory")


def _remove(path: Path) -> None:
    if path.exists():
        withdraw(path)
        shutil.rmtree(path)


def _sync_all(path: Path) -> None:
    for each in (*path.rglob("*"), path, path.parent):
        sync(each)


def _copied(state: Any) -> Any:
    """In the host's memory, so as to take none of an accelerator's; where it is, if JAX_PLATFORMS leaves out cpu. What
    is split is put together, one array after another."""
    several = lambda a: len(a.sharding.device_set) > 1
    one = lambda a: jax.device_put(gathered(a) if several(a) else a, host(), may_alias=several(a))
    return jax.tree.map(one, state)


def _reserve(directory: Path, n_bytes: int) -> None:
    """Raises OSError if the disk has no room: Orbax would find out in the background, in a storm of tracebacks."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            f"{directory} has no room for a checkpoint of {n_bytes:,} bytes ({error.strerror}); "
            "free some, and the same command resumes from the last one"
        ) from error
