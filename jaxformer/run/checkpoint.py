"""Checkpoints: Orbax saves and restores, a digest of our own says whether what came back is what was saved."""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxformer.spec import InputError

log = logging.getLogger(__name__)


def sha256(tree: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every array, in the order of the paths, however they are sharded."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for path in sorted(leaves):
        array = np.asarray(leaves[path])
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


class Mismatch(InputError):
    """A sound checkpoint of another model."""


class Checkpoints:
    """The checkpoints of a run: written in the background; the newest `keep` and the best one stay."""

    def __init__(self, directory: Path, keep: int = 1, read_only: bool = False):
        if directory.exists() and not directory.is_dir():
            raise InputError(f"{directory} is no folder of checkpoints; remove it, or give another run")
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant here
        policy = None if read_only else _NewestAndBest(self, keep)
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, read_only=read_only)  # pyright: ignore
        self.directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)
        self._infos = {step: self._read_info(step) for step in self.steps()}

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def rank(self, step: int) -> float:
        """The least is best; infinite if the step was not evaluated, or what was found is not finite."""
        rank = self._infos.get(step, {}).get("rank")
        return rank if isinstance(rank, float) and math.isfinite(rank) else math.inf

    def best(self) -> tuple[int, float] | None:
        """Step and rank of the best checkpoint that was evaluated."""
        step = min(self.steps(), key=self.rank, default=None)
        return None if step is None or math.isinf(self.rank(step)) else (step, self.rank(step))

    def best_rank(self) -> float:
        """Infinite if no checkpoint was evaluated."""
        best = self.best()
        return math.inf if best is None else best[1]

    def save(self, state: Any, step: int, rank: float | None) -> None:
        """Begins to save; raises OSError if there is no room, or if an earlier save has failed."""
        if step in self._manager.all_steps():
            return
        _reserve(self.directory, sum(a.nbytes for a in jax.tree.leaves(state)))
        finite = rank is not None and math.isfinite(rank)
        info = {"state_sha256": sha256(state), "layout": _layout(state), "rank": rank if finite else None}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(info))
        self._infos[step] = info
        with self._as_os_error():
            self._manager.save(step, args=args)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of a step, shaped and sharded as `abstract`. Raises InputError if it is not what was saved."""
        path, info = self.directory / str(step), self._infos[step]
        if info.get("layout", _layout(abstract)) != _layout(abstract):
            raise Mismatch(
                f"{path} was saved with other shapes than those of this config and tokenizer; "
                "restore config.json and tokenizer.json of the run"
            )
        try:
            args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
            state = self._manager.restore(step, args=args)["state"]
        except Exception as error:  # damaged files raise five types of exception, and more with each release
            reason = f"{type(error).__name__}: {str(error)[:200]}"
            raise InputError(f"{path} cannot be restored ({reason}); take another checkpoint") from error
        if sha256(state) != info.get("state_sha256"):
            raise InputError(f"{path} is damaged: its SHA-256 is not that of what was saved; take another checkpoint")
        return state

    def restore_newest(self, abstract: Any, set_aside: bool = True) -> Any:
        """The newest state that is whole, None if there is no checkpoint."""
        states = restore_together([self], abstract, set_aside)
        return states and states[0]

    def set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that a run that goes on can save that step again."""
        aside = self.directory / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(self.directory / str(step), aside)
        self._manager.reload()

    def forget_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, behind which Orbax would save none of those before them."""
        for later in [each for each in self.steps() if each > step]:
            self._manager.delete(later)
            del self._infos[later]

    def wait(self) -> None:
        """Until all is on disk; raises OSError if a save has failed."""
        with self._as_os_error():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, too."""
        self.wait()
        self._manager.close()

    def _read_info(self, step: int) -> dict[str, Any]:
        """What `save` wrote beside the state, {} if that is damaged."""
        try:
            info = json.loads((self.directory / str(step) / "info" / "metadata").read_text())
        except (OSError, ValueError):
            return {}
        return info if isinstance(info, dict) else {}

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its background threads met
            raise OSError(f"no checkpoint could be written to {self.directory}: {error}") from error


def restore_together(runs: Sequence[Checkpoints], abstract: Any, set_aside: bool = True) -> list[Any] | None:
    """The states of all runs at the newest step that each of them has whole; None if none has a checkpoint."""
    damaged: list[tuple[Checkpoints, int]] = []
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
            for run, bad in damaged if set_aside else ():
                run.set_aside(bad)
            return states
    if not any(run.steps() for run in runs):
        return None
    what = "every checkpoint is damaged" if len(runs) == 1 else "no step is whole in each of the runs trained together"
    raise InputError(f"{runs[0].directory}: {what}; train anew in another directory")


def _reserve(directory: Path, n_bytes: int) -> None:
    """Raises OSError if the disk has no room: Orbax would find out in the background, in a storm of tracebacks."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        with tempfile.TemporaryFile(dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        raise OSError(
            f"{directory} has no room for a checkpoint of {n_bytes:,} bytes ({error.strerror}); "
            "free some, and the same command goes on from the last one"
        ) from error


def _layout(tree: Any) -> str:
    """SHA-256 over path, dtype and shape of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    lines = sorted(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class _NewestAndBest:
    """Orbax's question which checkpoints to keep, answered from our own record of ranks."""

    def __init__(self, checkpoints: Checkpoints, keep: int):
        self._checkpoints, self._keep = checkpoints, keep

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        steps = [checkpoint.step for checkpoint in checkpoints]
        best = min(steps, key=self._checkpoints.rank, default=None)
        evaluated = best is not None and math.isfinite(self._checkpoints.rank(best))
        kept = {*sorted(steps)[-self._keep :], *([best] if evaluated else [])}
        return [step in kept for step in steps]
