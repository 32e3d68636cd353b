"""A run trained in processes of its own, which are killed and told to stop at random moments, and seen from outside."""

import contextlib
import dataclasses
import itertools
import json
import logging
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer.config import Config
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.manifest import has_manifest
from jaxformer.run.pauses import evaluations
from jaxformer.run.signals import Received, meant
from jaxformer.run.starts import read_starts
from jaxformer.spec import InputError

log = logging.getLogger(__name__)

# What kills wait for, in turn: a step or a moment of the start, drawn at random; the next save; the next evaluation.
AIMS = "a step", "saving", "a start", "evaluating", "a step"


class Different(Exception):
    """How the interrupted run is not as it should be."""


@dataclasses.dataclass(frozen=True)
class Interruption:
    """A signal that a run was sent, and what could be seen of the run from outside just before."""

    signal: str
    phase: str  # "starting", or "compiling", "training" or "evaluating", each perhaps with " and saving"
    step: int  # of the newest row of metrics.jsonl; 0 if it has none
    saved: int  # the newest step with a manifest in all runs trained together; -1 if there is none
    starts: int  # how many starts had been recorded
    seconds: float  # since the process began
    took: float = 0.0  # seconds from the signal to the end of the process

    def __str__(self) -> str:
        saved = "nothing was saved" if self.saved < 0 else f"step {self.saved} was saved"
        return (
            f"{self.signal} while {self.phase} behind step {self.step}, {self.seconds:.1f} s after its start; {saved}"
        )


@dataclasses.dataclass(frozen=True)
class Trial:
    """A command that trains runs, one or several together, to be kept in `directory`; what it says goes to a file
    beside that."""

    command: Sequence[str]  # arguments of jaxformer
    config: Config
    directory: Path
    directories: Sequence[Path]  # of each run
    received: Received  # signals that are for this process

    @property
    def said(self) -> Path:
        return self.directory.with_suffix(".log")

    def last_line(self) -> str:
        lines = self.said.read_text(errors="replace").split("\n")
        return next((line.removeprefix("jaxformer: ") for line in reversed(lines) if line.strip()), "it said nothing")

    def straight(self) -> tuple[float, float, float]:
        """Trains to the end; the seconds until the first row, in all, and of a call. Raises InputError and OSError for
        a command that fails."""
        began, first = time.monotonic(), 0.0
        with self.process() as (process, seen):
            if not self.ended(process, lambda: seen.row is not None):
                first = time.monotonic() - began
            self.ended(process)
        if process.returncode:
            failed = f"training ended with status {process.returncode}: {self.last_line()} ({self.said})"
            raise InputError(self.last_line()) if process.returncode == 2 else OSError(failed)
        trained = (seen.row or {}).get("seconds", 0.0)
        return first, time.monotonic() - began, trained * self.config.train.steps_per_call / self.config.train.steps

    def interrupted(
        self, rng: random.Random, kills: int, signals: int, first: float, call: float
    ) -> Iterator["Interruption"]:
        """Trains to the end, killed and told to stop on the way, and started again each time; `first` and `call` are
        the seconds until the first row and of a call.

        Steps are drawn so that what is left of the plan fits what is left of training; where an interruption finds no
        newer step saved than the one before did, the next comes later. A run that is through before its turn is started
        once more, and is hit while it finds that out.
        """
        ending = [s for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP) if s in meant()] or [signal.SIGTERM]
        plan = [(signal.SIGKILL, aim) for aim in itertools.islice(itertools.cycle(AIMS), kills)]
        rng.shuffle(plan)
        for signum in itertools.islice(itertools.cycle(ending), signals):  # while there is much to train
            plan.insert(rng.randint(0, kills // 2), (signum, "a step"))
        steps, saved, slower = self.config.train.steps, 0, 1.0
        for place, (signum, aim) in enumerate(plan):
            share = min(1.0, slower * 2 / (len(plan) - place + 1)) * (steps - saved)
            step, start = saved + rng.uniform(0, share if aim == "a step" else 0), rng.uniform(0, first)
            later = rng.uniform(0, 2 * call)
            while (found := self._interrupt(signum, aim, step, start, later)) is None:
                aim, start = "a start", start / 2
            yield found
            slower, saved = 2 * slower if found.saved <= saved else 1.0, max(saved, found.saved)
        with self.process() as (process, _):
            self.ended(process)
        self._expect(process.returncode, 0)

    def _interrupt(
        self, signum: signal.Signals, aim: str, step: float, start: float, later: float
    ) -> Interruption | None:
        """Starts the run and sends it a signal: so many seconds after its start, or behind the step, some part of two
        calls later or when it does what is aimed at. None if it was through before."""
        began = time.monotonic()
        with self.process() as (process, seen):
            if aim == "a start":
                reached = lambda: time.monotonic() - began > start
            else:
                reached = lambda: seen.trains and seen.step >= step and (aim == "a step" or aim in seen.phase)
            if self.ended(process, reached):
                self._expect(process.returncode, 0)
                return None
            time.sleep(later if aim == "a step" else min(later, 0.05))
            found = Interruption(signum.name, seen.phase, seen.step, seen.saved, seen.starts, time.monotonic() - began)
            process.send_signal(signum)
            sent = time.monotonic()
            self.ended(process)
        took = time.monotonic() - sent
        if process.returncode == 0:
            return None
        early = found.phase == "starting" and process.returncode == -signum  # before Python could hear of it
        self._expect(process.returncode, -signum if signum == signal.SIGKILL or early else 128 + signum)
        if signum != signal.SIGKILL and found.phase != "starting" and seen.saved < seen.step:
            raise Different(f"{signum.name}: the run ended behind step {seen.step}, but with step {seen.saved} saved")
        return dataclasses.replace(found, took=took)

    def _expect(self, status: int, expected: int) -> None:
        if status != expected:
            raise Different(f"a start ended with status {status}, not {expected}: {self.last_line()} ({self.said})")

    @contextlib.contextmanager
    def process(self) -> Iterator[tuple["subprocess.Popen[Any]", "Seen"]]:
        """A process that trains, in a session of its own, so that it gets no signals but ours."""
        command = [sys.executable, "-P", "-m", "jaxformer", *self.command, f"--directory={self.directory}"]
        with open(self.said, "ab") as file:
            seen = Seen(self.config, self.directories)
            how: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            with subprocess.Popen(command, start_new_session=True, **how) as process:
                try:
                    yield process, seen
                finally:
                    process.kill()

    def ended(self, process: "subprocess.Popen[Any]", reached: Callable[[], bool] = lambda: False) -> bool:
        """Whether the process ended before something was reached. Raises Stop for signals to this process."""
        while process.poll() is None:
            self.received.check()
            if reached():
                return False
            time.sleep(0.002)
        return True


class Seen:
    """What can be seen of runs trained together while a process, about to begin, trains them."""

    def __init__(self, config: Config, directories: Sequence[Path]):
        self._config, self._directories, self._began = config, directories, time.time()
        self._before = self.starts

    @property
    def starts(self) -> int:
        return len(read_starts(self._directories[0]))

    @property
    def row(self) -> dict[str, Any] | None:
        """The newest one."""
        path = self._directories[0] / "metrics.jsonl"
        with contextlib.suppress(OSError, ValueError, IndexError), open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - 50_000))
            return json.loads(file.read().split(b"\n")[-2])
        return None

    @property
    def step(self) -> int:
        return (self.row or {"step": 0})["step"]

    @property
    def saved(self) -> int:
        steps = [set(Checkpoints(directory / "checkpoints").steps()) for directory in self._directories]
        return max(set.intersection(*steps), default=-1)

    @property
    def trains(self) -> bool:
        """Whether the process has written a row."""
        begun, row = read_starts(self._directories[0])[self._before :], self.row
        return bool(begun) and row is not None and row["step"] > begun[-1]["step"]

    @property
    def phase(self) -> str:
        """A sample passes for training, and so does an evaluation that falls between two rows."""
        if self.starts == self._before:
            return "starting"
        row = self.row if self.trains else None
        doing = "compiling" if row is None else "evaluating" if _awaits(self._config, row) else "training"
        folders = (path for directory in self._directories for path in (directory / "checkpoints").glob("*"))
        return doing + " and saving" * any(map(self._is_unfinished, folders))

    def _is_unfinished(self, path: Path) -> bool:
        """A folder that this process has touched and that is no checkpoint yet, or no longer."""
        with contextlib.suppress(FileNotFoundError):
            return path.stat().st_ctime > self._began and not has_manifest(path)
        return False


def _awaits(config: Config, row: Mapping[str, Any]) -> bool:
    """Whether a row of metrics is the last one before an evaluation."""
    due = evaluations(config, row["step"])
    return bool(due) and row["split"] != due[-1]
