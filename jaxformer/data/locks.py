"""Locks between processes, by files."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


def held(path: Path) -> bool:
    """Whether another process holds a lock of the file or folder, or reads it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(file)
    return False


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """As long as a file or folder is read, `held` says so to others. Raises FileNotFoundError if it is not there."""
    file = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)
