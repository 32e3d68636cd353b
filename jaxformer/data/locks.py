"""Locks on files and folders, by which processes keep out of each other's way: the one place that needs Unix."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from jaxformer.spec import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextlib.contextmanager
def locked(path: Path, taken: Callable[[], None]) -> Iterator[None]:
    """While this process alone holds the lock of a file, which is made if it is not there.

    If another process holds it, `taken` is called; unless it raises, this process waits. Raises InputError on systems
    that have no such locks, before anything is written, and on file systems that have none.
    """
    if fcntl is None:
        raise InputError("jaxformer trains and prepares corpora on Linux and macOS; on Windows run it inside WSL 2")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken()
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise InputError(
                f"{path.parent} cannot be locked ({error.strerror}), so that two processes might write to it; give a "
                "folder on another file system"
            ) from None
        yield


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While a folder is read; `is_read` tells others so. Raises FileNotFoundError if it is not there."""
    if fcntl is None:
        yield
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(folder, fcntl.LOCK_SH)
        yield
    finally:
        os.close(folder)


def is_read(path: Path) -> bool:
    """Whether a folder is being read, perhaps by this process; False where that cannot be known."""
    if fcntl is None:
        return False
    with contextlib.suppress(FileNotFoundError):
        folder = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
        finally:
            os.close(folder)
    return False
