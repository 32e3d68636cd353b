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
    from jaxformer.interop.import_folder import import_run

    print_row(import_run(folder, run, window), json)
