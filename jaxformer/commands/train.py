"""jaxformer train."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxformer.commands.arguments import find_modules_here, overrides_of, page, print_row

if TYPE_CHECKING:
    from jaxformer.config import Config


FLAGS = {
    "--field.path=value": "sets a field of the config; CONFIG --help lists all of them, with their values",
    "--dry_run": "prints the config, its parameters and the memory that it needs; trains and writes nothing",
    "--seeds=N": "trains N seeds, from train.seed on, as one program, each in DIRECTORY/seed-SEED",
    "--init_from=RUN": "begins with the parameters of another run",
    "--profile=START:STOP": "records a trace of the device between these steps, in DIRECTORY/profile",
    "--simulate_devices=N": "makes N devices of the CPU, to try a mesh without accelerators",
    "--import=MODULE": "imports a module of your own first, for its parts",
    "--help": "shows this page; after a CONFIG also its fields",
}
USAGE = "usage: jaxformer train CONFIG [--field.path=value ...] [--dry_run] [--seeds=N] [--profile=START:STOP]"


def train(arguments: Sequence[str]) -> None:
    """Trains a run, or resumes it where it stopped: train CONFIG [--field.path=value ...]."""
    from jaxformer import config as config_lib
    from jaxformer.spec import InputError

    helps = {"-h", "--help"} & set(arguments)
    if not arguments or arguments[0].startswith("-"):
        if helps:
            return print(_help())
        raise InputError(f"{USAGE}, such as jaxformer train quickstart --train.steps=500")
    find_modules_here()
    config = config_lib.load(arguments[0])
    flags = {"-h", "--help", "--dry_run"}
    overrides = overrides_of([a for a in arguments[1:] if a not in flags])
    profile, seeds = _span(overrides.pop("profile", None)), _count(overrides.pop("seeds", None))
    if helps:
        return print(f"{_help()}\n\n{_fields(arguments[0], config_lib.overridden(config, overrides))}")
    if sum(map(bool, (profile, seeds, "--dry_run" in arguments))) > 1:
        raise InputError("profile, seeds and dry_run must not be given together; leave out all but one")
    if "--dry_run" in arguments:
        from jaxformer.run.dry_run import dry_run

        found = dry_run(config, overrides)
        print(json.dumps(found.pop("config"), indent=1, ensure_ascii=False))
        return print_row(found, False)
    from jaxformer.run import loop

    if seeds is None:
        loop.train(config, overrides, profile=profile)
    else:
        first = config_lib.resolve(config, overrides).train.seed
        loop.train_seeds(config, range(first, first + seeds), overrides)
    return None


def _help() -> str:
    about = "CONFIG is a Python file that defines `config`, with or without its .py, or the name of a preset\n"
    return f"{USAGE}\n\n{about}(jaxformer presets lists them); a file comes before a preset of its name.\n\n" + page(
        list(FLAGS.items())
    )


def _fields(name: str, config: "Config") -> str:
    """Every field, its value and its meaning, in groups of the config's own fields."""
    from jaxformer.overrides import listing

    groups: dict[str, list[tuple[str, str]]] = {}
    for path, value, meaning in listing(config):
        groups.setdefault(path.partition(".")[0], []).append((f"--{path}={value}", meaning))
    single = [row for rows in groups.values() if len(rows) == 1 for row in rows]
    pages = [page(rows) for rows in [single, *(rows for rows in groups.values() if len(rows) > 1)] if rows]
    return "\n\n".join((f"fields of {name}", *pages))


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

    if text is not None and not (text.isdecimal() and len(text) < 9 and 0 < int(text) < 10_000):
        raise InputError(f"seeds={text} must be how many are trained together, from train.seed on, such as 8")
    return None if text is None else int(text)
