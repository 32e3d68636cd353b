"""Locks on files, by which processes keep out of each other's way: the one place that needs Unix."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from jaxformer.spec import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def locked(path: Path, taken: Callable[[], None]) -> Iterator[None]:
    """While this process alone holds the lock of a file, which is made if it is not there.

    If another process holds it, `taken` is called; unless it raises, this process waits. Raises InputError on systems
    that have no such locks, before anything is written.
    """
    if fcntl is None:
        raise InputError("jaxformer trains and prepares corpora on Linux and macOS; on Windows run it inside WSL 2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        if not _try(lock, fcntl.LOCK_EX):
            time.sleep(0.1)  # `held` takes it for a moment, too
            if not _try(lock, fcntl.LOCK_EX):
                taken()
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def held(path: Path) -> bool:
    """Whether a process, perhaps this one, holds the lock of a file; False where that cannot be known.

    The file is not made, and nothing is waited for.
    """
    if fcntl is None:
        return False
    try:
        with open(path, "rb") as lock:
            return not _try(lock, fcntl.LOCK_SH)  # shared: two that ask at once do not see each other
    except OSError:
        return False


def _try(lock: IO[Any], kind: int) -> bool:
    """Takes a lock if it is free."""
    assert fcntl is not None
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
