"""jaxformer verify_resume."""

from collections.abc import Mapping


def verify_resume(
    config: str,
    kills: int = 5,
    signals: int = 1,
    seed: int = 0,
    seeds: int | None = None,
    directory: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Trains a config twice, straight through and killed at random moments, and prints whether the ends are identical.

    Args:
        config: A config file, or the name of a preset.
        kills: How many SIGKILLs the second run gets, some of them while it saves or is evaluated.
        signals: How many signals that end runs it gets besides, SIGTERM first.
        seed: Draws the moments.
        seeds: How many seeds are trained together.
        directory: Where both runs are kept; by default they are deleted if they are identical.
        json: Prints one JSON object.
        overrides: Sets a field of the config, as in train.
    """
    from jaxformer.commands.arguments import IMPORTED, find_modules_here
    from jaxformer.lab.verify_resume import verify_resume

    find_modules_here()
    found = verify_resume(config, overrides, kills, signals, seed, seeds, directory, IMPORTED)
    print(found.json() if json else found)
    if not found.identical:
        raise SystemExit(1)
