"""jaxformer plan."""

from collections.abc import Mapping


def plan(
    config: str,
    devices: int | None = None,
    device_memory: str | None = None,
    peak_flops: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Says what a run would ask of each device, before there is one: memory, communication, operations, room for rows.

    Args:
        config: A config file, or the name of a preset.
        devices: How many there are to be; without mesh.* all under mesh.fsdp. Left out: those here, by mesh.*.
        device_memory: Bytes of each, such as 80GB: then it says how many rows fit, and what would make a batch fit.
        peak_flops: Operations of each in a second, such as 989e12: then it says how long a step takes at least.
        json: Prints one JSON object.
        overrides: Any field, as --model.n_layers=6.
    """
    from jaxformer.commands.arguments import find_modules_here, print_row
    from jaxformer.run import budget

    find_modules_here()
    texts = {"device_memory": device_memory, "peak_flops": peak_flops}
    given = {name: budget.amount(text, name) for name, text in texts.items() if text is not None}
    found = budget.plan(config, overrides, devices, **given)
    if json:
        print_row(found, True)
    else:
        print(budget.render(found))
