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
    from jaxformer.run.budget import amount
    from jaxformer.run.opened import open_run
    from jaxformer.spec import InputError

    size = int(amount(shard_size, "shard_size"))
    if size < 10**6:
        raise InputError(f"shard_size={shard_size!r} must be at least 1MB; 2GB is usual")
    print_row(export_run(open_run(run, step_of(step)), folder, dtype, size), json)
