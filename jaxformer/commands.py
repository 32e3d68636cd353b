"""The commands: each reads its arguments, calls one function of the library and prints the answer."""

import argparse
import errno
import importlib
import inspect as inspect_module
import json
import logging
import os
import re
import signal
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxformer.run.signals import meant

# Nothing heavy is imported up here, so that a signal during JAX's import is met by `main` already.


def train(arguments: Sequence[str]) -> None:
    """train CONFIG [--field.path=value ...]: trains a run, or goes on with it. CONFIG --help lists the fields."""
    from jaxformer import config as config_lib
    from jaxformer.spec import InputError, listing

    if not arguments or arguments[0].startswith("-"):
        usage = (
            "usage: train CONFIG [--field.path=value ...] [--dry_run] [--profile=START:STOP] [--seeds=N] "
            "[--import=MODULE], "
            "as in: train configs/quickstart.py --train.steps=500"
        )
        if arguments and arguments[0] in ("-h", "--help"):
            return print(usage + "\ntrain CONFIG --help lists every field and its value in that config")
        raise InputError(usage)
    _find_modules_here()
    config = config_lib.load(arguments[0])
    flags = {"-h", "--help", "--dry_run"}
    overrides = _overrides([a for a in arguments[1:] if a not in flags])
    profile, seeds = _span(overrides.pop("profile", None)), _count(overrides.pop("seeds", None))
    if {"-h", "--help"} & set(arguments):
        fields = list(listing(config_lib.resolve(config, overrides)))
        wide = max(len(path) + len(value) for path, value, _ in fields if len(path) + len(value) < 60)
        for path, value, meaning in fields:
            print(f"{f'--{path}={value}':{wide + 5}} {meaning}".rstrip())
        return None
    if seeds and (profile or "--dry_run" in arguments):
        raise InputError("profile and dry_run are of one run; leave them out, or --seeds")
    if "--dry_run" in arguments:
        from jaxformer.run.dry_run import dry_run

        found = dry_run(config, overrides)
        print(json.dumps(found.pop("config"), indent=1, ensure_ascii=False))
        return _print(found, False)
    from jaxformer.run import loop

    if seeds is None:
        loop.train(config, overrides, profile=profile)
    else:
        first = config_lib.resolve(config, overrides).train.seed
        loop.train_seeds(config, range(first, first + seeds), overrides)
    return None


def sample(
    run: str,
    prompt: str | None = None,
    tokens: int = 200,
    samples: int = 1,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int = 0,
    step: str | None = None,
    prompt_file: str | None = None,
) -> None:
    """Prints texts that a trained run writes.

    Args:
        run: The run's directory.
        prompt: How each text begins; by default it is what follows the tokenizer's start token.
        tokens: How many tokens each text goes on, unless the tokenizer's end token comes before.
        samples: How many texts; a line of dashes stands between them.
        temperature: Less than 1 sharpens the distribution; 0 always takes the likeliest token.
        top_k: Draw among the k likeliest tokens.
        top_p: Draw among the likeliest tokens that reach this probability together.
        min_p: Draw among the tokens at least so many times as probable as the likeliest.
        seed: Other seeds give other texts.
        step: A checkpoint's step, or "best"; by default the newest.
        prompt_file: A UTF-8 file that holds the prompt.
    """
    from jaxformer.run.opened import open_run, read_prompt
    from jaxformer.spec import InputError

    if prompt_file is not None:
        if prompt is not None:
            raise InputError(f"prompt_file={prompt_file!r} must not be given beside prompt; leave one of them out")
        prompt = read_prompt(prompt_file)
    opened = open_run(run, _step(step))
    how = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    texts = opened.samples(prompt, tokens, samples, seed, **how)
    print("\n---------------\n".join(texts))


def evaluate(
    run: str,
    file: str | None = None,
    step: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Prints the loss of a trained run.

    Args:
        run: The run's directory.
        file: A file or folder, read as the run's own corpus is; by default the run's validation split.
        step: A checkpoint's step, or "best"; by default the newest.
        json: Print one JSON object.
        overrides: Another corpus instead of a file, and its fields, as in --data.corpus=JSONLines --data.corpus.path=F.
    """
    from jaxformer.run.opened import open_run
    from jaxformer.spec import InputError

    if file is not None and overrides:
        raise InputError(
            f"file={file!r} must not be given beside {', '.join(overrides)}; give --data.corpus.path={file}"
        )
    opened = open_run(run, _step(step))
    if overrides:
        row = opened.evaluate_corpus(opened.corpus_of(overrides))
    else:
        row = opened.evaluate_valid() if file is None else opened.evaluate_file(file)
    _print(row, json)


def predict(
    run: str,
    text: str | None = None,
    second: str | None = None,
    file: str | None = None,
    step: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Prints what a trained run says of a text: its class, its vector, or the text that answers it.

    Args:
        run: The run's directory.
        text: The text.
        second: The second text, of a run that was trained on pairs as one row.
        file: Instead of one text a table (.csv, .tsv, .jsonl), or a text in each line; each gets a JSON object.
        step: A checkpoint's step, or "best"; by default the newest.
        json: Print one JSON object.
        overrides: Another corpus instead of a file, and its fields, as in --data.corpus=Table --data.corpus.path=F.
    """
    from jaxformer.run.opened import open_run
    from jaxformer.spec import InputError

    if (text is not None) + (file is not None) + bool(overrides) != 1 or (text is None and second is not None):
        raise InputError(
            "predict needs --text TEXT, and --second TEXT for a pair, or --file FILE alone, or --data.corpus=CLASS and "
            "its fields alone"
        )
    opened = open_run(run, _step(step))
    if text is None:
        rows = opened.predict_file(str(file)) if not overrides else opened.predict_corpus(opened.corpus_of(overrides))
    else:
        rows = opened.predict([text], None if second is None else [second])
    for row in rows:
        if not json and text is not None and set(row) == {"text"}:
            print(row["text"])
        else:
            _print(row, json or text is None)


def inspect(run: str, json: bool = False) -> None:
    """Prints what is in a run, or what a config would make: parameters, activations, operations, bytes, hashes.

    Args:
        run: The run's directory, or a config file.
        json: Print one JSON object.
    """
    from jaxformer.run.inspection import inspect_config, render
    from jaxformer.run.opened import open_run

    found = inspect_config(run) if Path(run).suffix == ".py" and not Path(run).is_dir() else open_run(run).inspect()
    if json:
        return _print(found, True)
    found.pop("config")
    _print({name: value for name, value in found.items() if not isinstance(value, list)}, False)
    print("\n" + render(found))


def reproduce(name: str, json: bool = False, directory: str = "runs", results: str = "RESULTS.md") -> None:
    """Trains the systems of an experiment, or goes on with them, and prints their numbers beside the published ones.

    Args:
        name: A file of the folder experiments, without its .py; a Python file of your own; or all.
        json: Print one JSON list.
        directory: Where the runs are kept, in NAME/ROW/seed-SEED.
        results: A Markdown file whose section is replaced; pictures go to the folder of that name.
    """
    from jaxformer.data.files import located
    from jaxformer.lab import experiments

    found, known = [], experiments.names() if name == "all" else []
    for each in known:
        experiments.load(each)  # a fault in the last is told before the first has trained for hours
    for each in known or [name]:
        found += experiments.reproduce(each, located(directory), located(results))
    print(experiments.as_json(found) if json else experiments.as_table(found))


PATH_ERRORS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError, PermissionError)
COMMANDS: dict[str, Callable[..., None]] = {
    f.__name__: f for f in (train, sample, evaluate, predict, inspect, reproduce)
}


def main(name: str | None = None) -> None:
    """Runs a command and exits with the status that README, "Exit status", promises."""
    for signum in meant():  # until `train` has something to save and collects them itself
        signal.signal(signum, _leave)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("jaxformer").setLevel(logging.INFO)
    sys.stdout.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        status = _run(name, sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:  # what `train` raises when all is saved
        status = _fail(str(interrupt), 128 + getattr(interrupt, "signum", signal.SIGINT))
    sys.exit(status)


def _leave(signum: int, frame: Any) -> None:
    """Ends the process at once: an exception raised here might be swallowed, by a callback of the garbage collector."""
    os._exit(128 + signum)


def _run(name: str | None, arguments: list[str]) -> int:
    from jaxformer.spec import InputError

    if name is None:
        name = arguments.pop(0) if arguments else ""
    try:
        arguments = _imported(arguments)
        if name not in COMMANDS:
            usage = f"usage: jaxformer {'|'.join(COMMANDS)} ...; add --help to any of them"
            return _fail(usage, 0 if name in ("-h", "--help") else 2)
        if name == "train":
            train(arguments)
        else:
            _call(COMMANDS[name], arguments, name)
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


def _call(function: Callable[..., None], arguments: Sequence[str], program: str) -> None:
    """Calls the function with the arguments: required ones by position, others as --name=value."""
    from jaxformer.spec import InputError

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            raise InputError(f"{message}; {program} --help lists what there is")

    head, _, tail = inspect_module.getdoc(function).partition("\n\nArgs:\n")  # pyright: ignore
    meanings = dict(line.strip().split(": ", 1) for line in tail.splitlines())
    more = "--import=MODULE imports a module of your own first, for parts that the run was made of."
    parser = Parser(prog=program, description=head, epilog=more, allow_abbrev=False)
    hints = typing.get_type_hints(function)
    rest, given = list(arguments), {}
    for name, parameter in inspect_module.signature(function).parameters.items():
        kind = (typing.get_args(hints[name]) or (hints[name],))[0]
        if parameter.default is parameter.empty:
            parser.add_argument(name, help=meanings[name])
        elif name == "overrides":
            rest, given[name] = _dotted(rest)
            parser.add_argument("--data.corpus", help=meanings[name], metavar="CLASS", default=argparse.SUPPRESS)
        elif kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=meanings[name])
        else:
            default = {"type": kind, "default": parameter.default, "metavar": kind.__name__.upper()}
            parser.add_argument(f"--{name}", help=meanings[name], **default)
    function(**vars(parser.parse_args(rest)), **given)


def _dotted(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments that are no paths of fields, and what those are given: --field.path=value or --field.path value."""
    rest, dotted, waiting = list[str](), list[str](), list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if not re.match(r"--\w+\.[^\s=]*(=|$)", argument):
            rest.append(argument)
            continue
        dotted.append(argument)
        if "=" not in argument and waiting:
            dotted.append(waiting.pop(0))
    if dotted:
        _find_modules_here()
    return rest, _overrides(dotted)


def _imported(arguments: Sequence[str]) -> list[str]:
    """Imports the modules that --import=MODULE names, looked for in the working directory too; returns the rest."""
    from jaxformer.spec import InputError

    rest, waiting = [], list(arguments)
    while waiting:
        name, equals, module = waiting.pop(0).partition("=")
        if name != "--import":
            rest.append(name + equals + module)
            continue
        module = module if equals or not waiting else waiting.pop(0)
        _find_modules_here()
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:  # whatever the user's module raises, it is the user's to mend
            reason = f"{type(error).__name__}: {error}"
            raise InputError(f"--import={module}: {reason}; mend the module, or its name") from error
    return rest


def _find_modules_here() -> None:
    """Lets imports find the user's modules, behind all others: a run holds files, and none may pass for a package."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _fail(message: str, status: int) -> int:
    sentence = "".join(c if c.isprintable() else repr(c)[1:-1] for c in " ".join(message.split()))
    print("jaxformer:", sentence, file=sys.stderr)
    return status


def _overrides(arguments: Sequence[str]) -> dict[str, str]:
    """--field.path=value or --field.path value."""
    from jaxformer.spec import InputError

    found: dict[str, str] = {}
    rest = list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or not (equals or (rest and not rest[0].startswith("--"))):
            raise InputError(f"{name!r} must be --field.path=value, such as --train.steps=500")
        found[name[2:]] = value if equals else rest.pop(0)
    return found


def _span(text: str | None) -> tuple[int, int] | None:
    """What --profile=START:STOP says."""
    from jaxformer.spec import InputError

    if text is None:
        return None
    start, _, stop = text.partition(":")
    if not (start.isdecimal() and stop.isdecimal() and len(text) < 30):
        raise InputError(f"profile={text} must be START:STOP, two steps, such as 100:110")
    return int(start), int(stop)


def _count(text: str | None) -> int | None:
    """What --seeds=N says."""
    from jaxformer.spec import InputError

    if text is not None and not (text.isdecimal() and 0 < int(text) < 10_000):
        raise InputError(f"seeds={text} must be how many are trained together, from train.seed on, such as 8")
    return None if text is None else int(text)


def _step(text: str | None) -> int | str | None:
    return int(text) if text and text.isdecimal() and len(text) < 20 else text


def _print(row: dict[str, Any], as_json: bool) -> None:
    from jaxformer.run.metrics import finite

    if as_json:
        print(json.dumps(finite(row), ensure_ascii=False))
    else:
        for name, value in row.items():
            form = ",.4f" if isinstance(value, float) else "," if type(value) is int and value >= 10_000 else ""
            print(f"{name:15} {value if isinstance(value, dict | list) else format(value, form)}")
