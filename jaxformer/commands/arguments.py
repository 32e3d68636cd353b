"""What commands share: how arguments are read, and how answers are printed."""

import argparse
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Callable, Collection, Sequence
from typing import Any, NoReturn


def call(function: Callable[..., None], arguments: Sequence[str], program: str) -> None:
    """Calls the function with the arguments: those without a default and positional ones (before a /) by position,
    the others as --name=value."""
    from jaxformer.spec import InputError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; {program} --help lists what there is")

    head, _, tail = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    meanings = dict(line.strip().split(": ", 1) for line in tail.splitlines())
    more = "--import=MODULE imports a module of your own first, whose parts the run is made of."
    parser = Parser(prog=program, description=head, epilog=more, allow_abbrev=False)
    hints = typing.get_type_hints(function)
    rest, given, parameters = list(arguments), {}, inspect.signature(function).parameters
    for name, parameter in parameters.items():
        kind = (typing.get_args(hints[name]) or (hints[name],))[0]
        if parameter.default is parameter.empty:
            several = "+" if typing.get_origin(hints[name]) is list else None
            parser.add_argument(name, help=meanings[name], nargs=several)
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            parser.add_argument(name, help=meanings[name], nargs="?", default=parameter.default)
        elif name == "overrides":
            of_config = "config" in parameters  # any field of it then, also those without a dot
            rest, given[name] = dotted(rest, _fields_of_config() if of_config else ())
            example = ("--field.path", "VALUE") if of_config else ("--data.corpus", "CLASS")
            parser.add_argument(example[0], help=meanings[name], metavar=example[1], default=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=meanings[name])
        elif typing.get_origin(hints[name]) is tuple:
            parser.add_argument(f"--{name}", action="append", default=[], help=meanings[name], metavar="TEXT")
        else:
            default = {"type": kind, "default": parameter.default, "metavar": kind.__name__.upper()}
            parser.add_argument(f"--{name}", help=meanings[name], **default)
    given |= vars(parser.parse_args(rest))
    first = [given.pop(name) for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_ONLY]
    function(*first, **given)


def summary(function: Callable[..., Any]) -> str:
    """What a command does: the first sentence of its docstring, up to any colon."""
    return re.split(r"[:.;]\s", f"{inspect.getdoc(function)} ", maxsplit=1)[0]


def page(rows: Sequence[tuple[str, str]], indent: str = "  ") -> str:
    """Two columns, the second wrapped to the width of the terminal."""
    width = shutil.get_terminal_size((120, 24)).columns
    left = len(indent) + max((len(name) for name, _ in rows if len(name) < 48), default=0) + 2
    lines = []
    for name, text in rows:
        head = f"{indent}{name}".ljust(left - 2) + "  "
        wrapped = textwrap.wrap(text, max(width - left, 40), break_long_words=False)
        lines += [(head if not i else " " * left) + line for i, line in enumerate(wrapped or [""])]
    return "\n".join(line.rstrip() for line in lines)


def _fields_of_config() -> set[str]:
    """--model and the like; where the run is kept is the command's own affair."""
    from jaxformer.config import Config

    return {f"--{field.name}" for field in dataclasses.fields(Config)} - {"--directory"}


def dotted(arguments: Sequence[str], fields: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    """The arguments that are no paths of fields, and what those are given: --field.path=value or --field.path value.

    `fields` are those that are known without a dot.
    """
    rest, dotted, waiting = list[str](), list[str](), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not re.match(r"--\w+\.[^\s=]*(=|$)", argument) and argument.partition("=")[0] not in fields:
            rest.append(argument)
            continue
        dotted.append(argument)
        if "=" not in argument and waiting:
            dotted.append(waiting.pop(0))
    if dotted:
        find_modules_here()
    return rest, overrides_of(dotted)


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    """--field.path=value or --field.path value."""
    from jaxformer.spec import InputError

    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or (rest and not rest[0].startswith("--"))):
            meant = f"; did you mean --{name[2:].replace('-', '_')}?" if re.match(r"--\w.*-", name) else ""
            raise InputError(f"{name!r} must be --field.path=value, such as --train.steps=500{meant}")
        found[name[2:]] = value if equals else rest.pop(0)
    return found


IMPORTED: list[str] = []  # modules that --import=MODULE has named: processes of a command need them, too


def imported(arguments: Sequence[str]) -> list[str]:
    """Imports the modules that --import=MODULE names, looked for in the working directory too; returns the rest."""
    from jaxformer.spec import InputError

    modules, rest = _taken(arguments, "--import")
    IMPORTED.extend(modules)
    for module in modules:
        if "," in module:
            raise InputError(f"--import={module} must be one module; give each an --import of its own")
        find_modules_here()
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever the user's module raises, it is the user's to fix
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"--import={module}: {reason}; fix the module, or its name") from error
    return rest


def simulated(arguments: Sequence[str]) -> list[str]:
    """Has JAX, which must not have computed anything yet, make as many devices of the CPU as --simulate_devices=N says;
    returns the rest."""
    from jaxformer.spec import InputError

    counts, rest = _taken(arguments, "--simulate_devices")
    for count in counts:
        if not (count.isdecimal() and len(count) < 9 and 0 < int(count) <= 1024):
            raise InputError(f"simulate_devices={count} must be how many devices the CPU is to play, such as 8")
        from jaxformer.platform import simulate_devices

        simulate_devices(int(count))
    return rest


def _taken(arguments: Sequence[str], option: str) -> tuple[list[str], list[str]]:
    """The values of an option, as --option=VALUE or --option VALUE, "" where there is none; and the other arguments."""
    values, rest, waiting = list[str](), list[str](), list(arguments)
    while waiting:
        name, equals, value = waiting.pop(0).partition("=")
        if name != option:
            rest.append(name + equals + value)
        else:
            values.append(value if equals or not waiting else waiting.pop(0))
    return values, rest


def find_modules_here() -> None:
    """Lets imports find the user's modules, behind all others: a run holds files, and none may pass for a package."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def step_of(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() and len(text) < 20 else text


def print_row(row: dict[str, Any], as_json: bool) -> None:
    from jaxformer.run.metrics import finite

    if as_json:
        print(json.dumps(finite(row), ensure_ascii=False))
    else:
        for name, value in row.items():
            print(f"{name:15} {_shown(name, value)}")


def _shown(name: str, value: Any) -> str:
    from jaxformer.run.inspection import human

    if type(value) is int and name.endswith("bytes"):
        return human(value, "B")
    if type(value) is int and value >= 10_000:
        return f"{value:,}" + (f" ({human(value)})" if value >= 1e6 else "")
    return f"{value:,.4f}" if isinstance(value, float) else str(value)
