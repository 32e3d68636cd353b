"""Checkpoints: Orbax saves and restores, a digest of our own says whether what came back is what was saved."""

import contextlib
import hashlib
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

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


class Checkpoints:
    """The checkpoints of a run: written in the background; the newest `keep` and the best one stay."""

    def __init__(self, directory: Path, keep: int = 1, read_only: bool = False):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax warns of what is meant here
        loss = _valid_loss
        keep_both = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(get_metric_fn=loss, reverse=True, n=1),
        ]
        options = ocp.CheckpointManagerOptions(
            best_fn=loss,
            best_mode="min",
            preservation_policy=None if read_only else preservation_policy.AnyPreservationPolicy(keep_both),
            read_only=read_only,
        )
        self._directory = directory
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def best(self) -> tuple[int, float] | None:
        """Step and validation loss of the best checkpoint that was evaluated."""
        losses = {step: _valid_loss(self._manager.metrics(step) or {}) for step in self.steps()}
        step = min(losses, key=lambda s: losses[s], default=None)
        return None if step is None or math.isinf(losses[step]) else (step, losses[step])

    def save(self, state: Any, step: int, valid_loss: float | None) -> None:
        """Begins to save; raises OSError if there is no room, or if an earlier save has failed."""
        if step in self._manager.all_steps():
            return
        _reserve(self._directory, sum(a.nbytes for a in jax.tree.leaves(state)))
        evaluated = valid_loss is not None and math.isfinite(valid_loss)
        metrics = {"state_sha256": sha256(state)} | ({"valid_loss": valid_loss} if evaluated else {})
        args = ocp.args.Composite(state=ocp.args.StandardSave(state))
        with self._as_os_error():
            self._manager.save(step, args=args, metrics=metrics)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state of a step, shaped and sharded as `abstract`. Raises InputError if it is not what was saved."""
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
            state, metrics = restored["state"], self._manager.metrics(step) or {}
        except Exception as error:  # damaged files raise five types of exception, and more with each release
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            raise InputError(f"{self._directory / str(step)} cannot be restored ({reason}); {REMEDY}") from error
        if sha256(state) != metrics.get("state_sha256"):
            raise InputError(
                f"{self._directory / str(step)} is damaged: its SHA-256 differs from when it was saved; {REMEDY}"
            )
        return state

    def restore_newest(self, abstract: Any, set_aside: bool = True) -> Any:
        """The newest state that is whole, None if there is no checkpoint.

        Damaged newer ones are renamed, so that a run that goes on can save those steps again.
        """
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                state = self.restore(abstract, step)
            except InputError as error:
                log.warning("%s", error)
                damaged.append(step)
            else:
                if damaged and set_aside:
                    for bad in damaged:
                        aside = self._directory / f"{bad}.damaged"
                        shutil.rmtree(aside, ignore_errors=True)
                        os.rename(self._directory / str(bad), aside)
                    self._manager.reload()
                return state
        if damaged:
            raise InputError(f"{self._directory}: every checkpoint is damaged; train anew in another directory")
        return None

    def close(self) -> None:
        """Waits until all is on disk; raises OSError if a save has failed."""
        with self._as_os_error():
            self._manager.wait_until_finished()
        self._manager.close()

    @contextlib.contextmanager
    def _as_os_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Orbax passes on whatever its background threads met
            raise OSError(f"no checkpoint could be written to {self._directory}: {error}") from error


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


REMEDY = "take another checkpoint"


def _valid_loss(metrics: Any) -> float:
    loss = metrics.get("valid_loss", math.inf)
    return loss if math.isfinite(loss) else math.inf
