"""jaxformer export."""

from jaxformer.commands.arguments import print_row, step_of


def export(
    run: str,
    folder: str,
    dtype: str | None = None,
    shard_size: str = "5GB",
    step: str | None = None,
    json: bool = False,
) -> None:
    """Writes a run as a model in Hugging Face's layout, which transformers loads.

    Args:
        run: The run's directory.
        folder: A new or empty folder.
        dtype: Of the tensors: float32, bfloat16 or float16; by default that of a run's import, or float32.
        shard_size: Bytes of a file of tensors at most, such as 500MB or 2GB.
        step: A checkpoint's step, or "best"; by default the newest.
        json: Prints one JSON object.
    """
    from jaxformer.interop.export_folder import export_run
    from jaxformer.run.opened import open_run

    print_row(export_run(open_run(run, step_of(step)), folder, dtype, _bytes(shard_size)), json)


def _bytes(text: str) -> int:
    import re

    from jaxformer.spec import InputError

    found = re.fullmatch(r"(\d{1,9})(KB|MB|GB)", text, re.IGNORECASE)
    if not found or not int(found[1]):
        raise InputError(f"shard_size={text!r} must be a number of KB, MB or GB, such as 2GB")
    return int(found[1]) * {"KB": 10**3, "MB": 10**6, "GB": 10**9}[found[2].upper()]
