"""Signals that end a run: collected, and looked at where the run can stop."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any

log = logging.getLogger(__name__)

# Ctrl-C; kill, SLURM's limit; a closed terminal; SLURM's --signal=USR1. Windows lacks the last two.
ENDING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name)]


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, after its state was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}; the state is saved, the same command resumes")
        self.signum = signum


class Stop(Exception):
    """Ends an evaluation or a sample, so that the run can save and stop."""


class Received(list[int]):
    """The signals so far, none at first."""

    def check(self) -> None:
        """Raises Stop if one has come."""
        if self:
            raise Stop

    def interrupt(self, step: int) -> None:
        """Raises Interrupted if one has come."""
        if self:
            raise Interrupted(self[0], step)


def meant() -> list[int]:
    """Those that end a run: not the ones that were ignored when the process began, as SIGHUP is under nohup."""
    return [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]


@contextlib.contextmanager
def collected(doing: str = "saving, then stopping") -> Iterator[Received]:
    """Collects signals instead of dying of them, and says what it is `doing` then. Outside the main thread, they stay
    as they are."""
    received = Received()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        log.warning("%s: %s", signal.Signals(signum).name, doing)

    old = {signum: signal.signal(signum, note) for signum in meant()}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
