"""jaxformer inspect."""

from pathlib import Path

from jaxformer.commands.arguments import find_modules_here, print_row


def inspect(run: str, json: bool = False) -> None:
    """Prints what a run, or the model of a config, is made of: parameters, activations, operations, bytes, hashes.

    Args:
        run: The run's directory, a config file, or the name of a preset.
        json: Prints one JSON object.
    """
    from jaxformer.config import config_file
    from jaxformer.run.inspection import inspect_config, render
    from jaxformer.run.opened import open_run

    is_config = not Path(run).is_dir() and (Path(run).suffix == ".py" or config_file(run))
    if is_config:
        find_modules_here()
    found = inspect_config(run) if is_config else open_run(run).inspect()
    if json:
        return print_row(found, True)
    found.pop("config")
    print_row({name: value for name, value in found.items() if not isinstance(value, list)}, False)
    print("\n" + render(found))
