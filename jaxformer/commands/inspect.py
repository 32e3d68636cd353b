"""jaxformer inspect."""

from pathlib import Path

from jaxformer.commands.arguments import print_row


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
        return print_row(found, True)
    found.pop("config")
    print_row({name: value for name, value in found.items() if not isinstance(value, list)}, False)
    print("\n" + render(found))
