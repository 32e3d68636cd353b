"""The command line: each command reads its arguments, calls one function of the library and prints the answer."""

import contextlib
import difflib
import errno
import importlib
import keyword
import logging
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

from jaxformer.commands.arguments import call, imported, page, simulated, summary
from jaxformer.run.signals import meant

# Nothing heavy is imported up here, so that a signal during JAX's import is met by `main` already.

PATH_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
MEMORY = "not enough memory ({}); make the batch, the window or the model smaller"
GROUPS = {
    "train": ("train", "presets", "new", "plan"),
    "use a run": ("sample", "evaluate", "predict", "inspect"),
    "other people's weights": ("import", "export"),
    "experiments": ("compare", "reproduce"),
    "trust": ("check", "verify_resume"),
}
COMMANDS = tuple(
    name for group in GROUPS.values() for name in group
)  # each in a module of its name, `import` in import_
EXAMPLES = """\
  jaxformer train quickstart
  jaxformer train quickstart --model.n_layers=6 --train.seed=1 --directory=runs/six_layers
  jaxformer sample runs/quickstart --prompt "The " --temperature 0.8
  jaxformer new my_config.py"""


def main(name: str | None = None) -> None:
    """Runs a command and exits with the status that docs/runs.md, "Exit status", promises."""
    for stream in ("stdin", "stdout", "stderr"):
        if getattr(sys, stream) is None:  # closed: the next file to be opened would take its number
            setattr(sys, stream, open(os.devnull, "r+"))  # noqa: SIM115
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA writes a page for each program that it loads from a cache
    for signum in meant():  # until `train` has something to save and collects them itself
        signal.signal(signum, _leave)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxformer").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = run(name, sys.argv[1:])
    except KeyboardInterrupt as interrupt:  # what `train` raises when all is saved
        status = _fail(str(interrupt), 128 + getattr(interrupt, "signum", signal.SIGINT))
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # told already: Python would try again as it ends, with another status
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(status)


def _leave(signum: int, frame: Any) -> None:
    """Ends the process at once: an exception raised here might be swallowed, by a callback of the garbage collector."""
    os._exit(128 + signum)


def run(name: str | None, arguments: list[str]) -> int:
    from jaxformer.commands.programs import keep_programs
    from jaxformer.platform import set_flags
    from jaxformer.spec import InputError

    if name is None:
        name = arguments.pop(0) if arguments else ""
    try:
        if not name:
            return _fail("a command is missing; jaxformer --help lists them", 2)
        if name in ("-h", "--help", "help"):
            print(_help(), flush=True)
            return 0
        if name not in COMMANDS:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            which = f"did you mean {close[0]}?" if close else f"give {', '.join(COMMANDS[:-1])} or {COMMANDS[-1]}"
            raise InputError(f"{name!r} is no command; {which}; jaxformer --help tells of each")
        arguments = simulated(arguments)
        set_flags()  # before the user's modules, which may compute something
        keep_programs()
        arguments, command = imported(arguments), _command(name)
        try:
            if name == "train":
                command(arguments)
            else:
                call(command, arguments, f"jaxformer {name}")
        finally:  # of --help, too, which exits
            sys.stdout.flush()  # a full disk may not be noticed before
    except InputError as error:
        return _fail(str(error), 2)
    except PATH_ERRORS as error:
        return _fail(f"{error.filename}: {error.strerror}; check the path and its permissions", 2)
    except OSError as error:
        message = f"{error.filename or 'writing'}: {error.strerror}" if error.strerror else str(error)
        return _fail(message, 2 if error.errno in (errno.ENAMETOOLONG, errno.EROFS) else 1)
    except MemoryError as error:
        return _fail(MEMORY.format(error), 1)
    except RuntimeError as error:
        from jaxformer.learning.guards import Diverged

        if "RESOURCE_EXHAUSTED" in str(error):  # of XLA
            return _fail(MEMORY.format(str(error).partition("\n")[0]), 1)
        if not isinstance(error, Diverged):
            raise
        return _fail(str(error), 1)
    return 0


def _command(name: str) -> Callable[..., None]:
    name += "_" * keyword.iskeyword(name)  # `import`
    return getattr(importlib.import_module(f"jaxformer.commands.{name}"), name)


def _help() -> str:
    groups = [
        f"{title}\n{page([(f'{name:10}', summary(_command(name))) for name in names])}"
        for title, names in GROUPS.items()
    ]
    return "\n\n".join(
        (
            "usage: jaxformer COMMAND ...        jaxformer COMMAND --help describes one",
            *groups,
            f"examples\n{EXAMPLES}",
            "documentation: README.md and the folder docs beside it; in Python, help(jaxformer.train)",
        )
    )


def _fail(message: str, status: int) -> int:
    sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    with contextlib.suppress(OSError):  # of a terminal that was closed
        print("jaxformer:", sentence, file=sys.stderr)
    return status
