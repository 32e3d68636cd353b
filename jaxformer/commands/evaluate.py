"""jaxformer evaluate."""

from collections.abc import Mapping

from jaxformer.commands.arguments import print_row, step_of


def evaluate(
    run: str,
    file: str | None = None,
    step: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Prints the loss of a trained run, and what else its task measures.

    Args:
        run: The run's directory.
        file: A file or folder to evaluate on, read as the run's own corpus is; by default the run's validation split.
        step: A checkpoint's step, or "best"; by default the newest.
        json: Prints one JSON object.
        overrides: Another corpus in place of a file, with its fields, as --data.corpus=JSONLines --data.corpus.path=F.
    """
    from jaxformer.run.opened import open_run
    from jaxformer.spec import InputError

    if file is not None and overrides:
        raise InputError(f"file={file!r} must not be given beside {', '.join(overrides)}; give data.corpus.path={file}")
    opened = open_run(run, step_of(step))
    print_row(opened.evaluate(opened.corpus_of(overrides) if overrides else file), json)
