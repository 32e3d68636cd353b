"""What a run stops training for: it saves, is evaluated, shows a sample."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxformer import platform
from jaxformer.config import Config
from jaxformer.data.batches import Batch
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.checks import rank_of
from jaxformer.run.members import Members
from jaxformer.run.metrics import read_rows, rows_of
from jaxformer.run.opened import Run
from jaxformer.run.reports import Reports
from jaxformer.run.signals import Received, Stop
from jaxformer.run.step import TrainState

log = logging.getLogger(__name__)


class Pauses:
    """Saves first what is due to be saved, so that nothing is lost should the process die in an evaluation.

    An evaluation and a sample end when a signal comes. The evaluation is made up for when the run resumes
    (`before`), so that no row is missing.
    """

    def __init__(
        self,
        runs: Sequence[Run],
        members: Members,
        saved: Sequence[CheckpointWriter],
        reports: Reports,
        received: Received,
    ):
        self._runs, self._members, self._saved, self._reports, self._received = runs, members, saved, reports, received
        self._configs, self._config = members.configs, members.configs[0]
        self._best = [checkpoints.best_rank() for checkpoints in saved]

    def after(self, step: int, state: TrainState) -> None:
        """What is due after a step; `state` is that of all runs together."""
        due, saves = evaluations(self._config, step), saves_at(self._config, step)
        if due or saves:
            if saves:
                self.save(step, state)
            self._evaluate(step, state, due)
            if due:
                self._sample(state)
            self._resume()

    def before(self, step: int, state: TrainState, buffer: Batch, due: "Owed") -> None:
        """What is due before the first call, of that buffer: makes up for what is `owed` to the step at which the run
        resumes, and compiles."""
        missing, found = due
        if found:
            self._rank(step, state, found)
        if missing:
            self._evaluate(step, state, missing)
        if step < self._config.train.steps and not self._received:
            self.compile(state, buffer)
        self._resume()

    def compile(self, state: TrainState, buffer: Batch) -> None:
        """Compiles the program for the buffer's shapes, if it is not, so that no row counts that as training."""
        if not self._members.compiled(buffer):
            self._reports.pause("compiling")
            self._members.compile(state, buffer)
            self._resume()

    def _resume(self) -> None:
        platform.trim_memory()
        self._reports.resume()

    def save(self, step: int, state: TrainState) -> None:
        """Begins to save; waits where the save before is not yet complete (`CheckpointWriter.save`), and for the first
        one of runs together, so that rows behind it say that all of them had it (`beginning.restored`)."""
        self._reports.pause("saving")
        if all(checkpoints.has(step) for checkpoints in self._saved):
            return
        for checkpoints in self._saved:  # so that the step before this one is on disk for all
            checkpoints.wait()
        first = len(self._saved) > 1 and not any(checkpoints.steps() for checkpoints in self._saved)
        for checkpoints, own in zip(self._saved, self._members.apart(state), strict=True):
            checkpoints.save(own, step)
        for checkpoints in self._saved if first else ():
            checkpoints.wait()

    def _evaluate(self, step: int, state: TrainState, splits: Sequence[str]) -> None:
        for split in splits:
            self._reports.pause("evaluating")
            tokens = self._config.data.valid_tokens if split == "valid" else None
            try:
                self._received.check()
                found = self._members.evaluate(state, tokens, self._received.check)
            except Stop:
                return
            self._reports.write(step, split, found)
            log.info("step %d: %s %s", step, SPLITS[split], _sentence(found))
            if split == "valid":
                self._rank(step, state, found)

    def _rank(self, step: int, state: TrainState, found: Sequence[Mapping[str, Any]]) -> None:
        """Tells checkpoints how good they are; what is better than any before is saved, if it was not due."""
        by = self._config.train.best_by  # not in a row that asked for nothing
        ranks = [rank_of(self._config, row) if by in row else math.inf for row in found]
        better = [math.isfinite(rank) and rank < best for rank, best in zip(ranks, self._best, strict=True)]
        if any(better):
            self.save(step, state)
        self._best = [
            min(rank, best) if new else best for rank, best, new in zip(ranks, self._best, better, strict=True)
        ]
        for checkpoints, rank in zip(self._saved, ranks, strict=True):
            if checkpoints.has(step):
                checkpoints.add_rank(step, rank)

    def _sample(self, state: TrainState) -> None:
        """Shows a text of the first run."""
        run = dataclasses.replace(self._runs[0], state=next(self._members.apart(state)))
        source, tokens = self._members.prepared.valid[0], self._config.train.sample_tokens
        if not tokens or not run.writes:
            return
        self._reports.pause("sampling")
        try:
            self._received.check()
            if not run.model.encodes:
                how: dict[str, Any] = {"temperature": 0.8, "seed": self._config.train.seed}
                log.info("%s", run.sample(tokens=tokens, between=self._received.check, **how))
            elif source.texts == 2:
                log.info("%s", run.show(source, self._received.check))
        except Stop:
            return


SPLITS = {"valid": "validation", "valid_full": "whole validation split:"}


def evaluations(config: Config, step: int) -> list[str]:
    """The splits on which the state after a step is evaluated."""
    last = step == config.train.steps
    due = ["valid"] if last or (step > 0 and step % config.train.eval_every == 0) else []
    return [*due, "valid_full"] if last and config.data.valid_tokens is not None else due


Owed = tuple[list[str], list[dict[str, Any]]]


def owed(configs: Sequence[Config], saved: Sequence[CheckpointWriter], step: int) -> Owed:
    """What a process that died owes the step that the runs have come to: the splits of which some run has no row, and
    the rows that tell how good the step is, if a checkpoint does not know."""
    due = evaluations(configs[0], step)
    made = [
        {row.get("split"): row for row in read_rows(rows_of(config), step)[0] if row["step"] == step}
        for config in configs
    ]
    missing = [split for split in due if not all(split in own for own in made)]
    best_by, found = configs[0].train.best_by, [own["valid"] for own in made if "valid" in own]
    ranked = len(found) == len(configs) and all(isinstance(row.get(best_by), float) for row in found)
    unknown = any(math.isinf(checkpoints.rank(step)) for checkpoints in saved)
    return missing, found if ranked and unknown and "valid" in due else []


def saves_at(config: Config, step: int) -> bool:
    return step == config.train.steps or step % config.train.save_every == 0


def until_pause(config: Config, step: int) -> int:
    """Steps of the next call: at most up to the next evaluation, save or end."""
    knobs = config.train
    pauses = (knobs.eval_every - step % knobs.eval_every, knobs.save_every - step % knobs.save_every)
    return min(knobs.steps_per_call, knobs.steps - step, *pauses)


def _sentence(found: Sequence[Mapping[str, Any]]) -> str:
    """Each number, of several runs the mean and the range."""
    parts: list[str] = []
    for name in (name for name, value in found[0].items() if isinstance(value, float)):
        values = [row[name] for row in found]
        spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
        parts.append(f"{name.replace('_', ' ')} {sum(values) / len(values):.4f}{spread}")
    return ", ".join(parts)
