"""jaxformer check."""

from collections.abc import Mapping


def check(
    config: str, devices: int | None = None, json: bool = False, overrides: Mapping[str, str] | None = None
) -> None:
    """Tries whether a model is sound: no leak, cache and full pass agree, resume is exact, every array learns.

    Args:
        config: A config file, the name of a preset, or a part of your own as my_module:Part.
        devices: Compares one device with so many, under several meshes, and checks nothing else; simulates them.
        json: Prints one JSON object.
        overrides: Another corpus, or any other field, as --model.n_layers=6.
    """
    from jaxformer.commands.arguments import find_modules_here, print_row
    from jaxformer.lab.check import check

    find_modules_here()
    if devices is not None:
        from jaxformer.platform import simulate_devices
        from jaxformer.spec import InputError

        if not 2 <= devices <= 1024:
            raise InputError(f"devices={devices} must be at least 2 and at most 1024, such as 8")
        simulate_devices(devices)
    found = check(config, overrides, devices=devices)
    if json:
        findings = [finding._asdict() for finding in found.findings]
        print_row({"subject": found.subject, "small": found.small, "sound": found.sound, "findings": findings}, True)
    else:
        print(found)
    if not found.sound:
        raise SystemExit(1)
