"""jaxformer import."""

from jaxformer.commands.arguments import print_row


def import_(folder: str, run: str, window: int | None = None, json: bool = False) -> None:
    """Makes a run of a model in Hugging Face's layout: of its parameters alone, without a corpus or an optimizer.

    Args:
        folder: It holds config.json, tokenizer.json and one or many .safetensors files.
        run: The new run's directory.
        window: How many tokens the run reads at once; by default the model's context, at most 2048.
        json: Prints one JSON object.
    """
    from jaxformer.declarations import by_path
    from jaxformer.interop.import_folder import import_run
    from jaxformer.run.manifest import sha256

    made = import_run(folder, run, window)
    count = sum(array.size for array in by_path(made.state.params).values())
    row = {"run": made.config.directory, "model": type(made.config.model).__name__, "n_params": count}
    print_row(row | {"params_sha256": sha256(made.state.params)}, json)
