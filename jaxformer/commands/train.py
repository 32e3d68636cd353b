"""jaxformer train."""

import json
from collections.abc import Sequence

from jaxformer.commands.arguments import find_modules_here, overrides_of, print_row


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
    find_modules_here()
    config = config_lib.load(arguments[0])
    flags = {"-h", "--help", "--dry_run"}
    overrides = overrides_of([a for a in arguments[1:] if a not in flags])
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
        return print_row(found, False)
    from jaxformer.run import loop

    if seeds is None:
        loop.train(config, overrides, profile=profile)
    else:
        first = config_lib.resolve(config, overrides).train.seed
        loop.train_seeds(config, range(first, first + seeds), overrides)
    return None


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
