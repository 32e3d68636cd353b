"""The command line: each command reads its arguments, calls one function of the library and prints the answer."""

import errno
import importlib
import logging
import os
import signal
import sys
from typing import Any

from jaxformer.commands.arguments import call, imported
from jaxformer.run.signals import meant

# Nothing heavy is imported up here, so that a signal during JAX's import is met by `main` already.

PATH_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
COMMANDS = ("train", "sample", "evaluate", "predict", "inspect", "compare", "reproduce")  # each in a module of its name


def main(name: str | None = None) -> None:
    """Runs a command and exits with the status that README, "Exit status", promises."""
    for signum in meant():  # until `train` has something to save and collects them itself
        signal.signal(signum, _leave)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxformer").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = run(name, sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:  # what `train` raises when all is saved
        status = _fail(str(interrupt), 128 + getattr(interrupt, "signum", signal.SIGINT))
    sys.exit(status)


def _leave(signum: int, frame: Any) -> None:
    """Ends the process at once: an exception raised here might be swallowed, by a callback of the garbage collector."""
    os._exit(128 + signum)


def run(name: str | None, arguments: list[str]) -> int:
    from jaxformer.spec import InputError

    if name is None:
        name = arguments.pop(0) if arguments else ""
    try:
        arguments = imported(arguments)
        if name not in COMMANDS:
            usage = f"usage: jaxformer {'|'.join(COMMANDS)} ...; add --help to any of them"
            return _fail(usage, 0 if name in ("-h", "--help") else 2)
        command = getattr(importlib.import_module(f"jaxformer.commands.{name}"), name)
        if name == "train":
            command(arguments)
        else:
            call(command, arguments, name)
    except InputError as error:
        return _fail(str(error), 2)
    except PATH_ERRORS as error:
        return _fail(f"{error.filename}: {error.strerror}; check the path and its permissions", 2)
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror}" if error.strerror else str(error)
        return _fail(message, 2 if error.errno == errno.ENAMETOOLONG else 1)
    except MemoryError as error:
        return _fail(f"not enough memory ({error}); make the batch, the window or the model smaller", 1)
    return 0


def _fail(message: str, status: int) -> int:
    sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print("jaxformer:", sentence, file=sys.stderr)
    return status
