"""jaxformer predict."""

from collections.abc import Mapping

from jaxformer.commands.arguments import print_row, step_of


def predict(
    run: str,
    text: tuple[str, ...] = (),
    second: tuple[str, ...] = (),
    file: str | None = None,
    step: str | None = None,
    json: bool = False,
    overrides: Mapping[str, str] | None = None,
) -> None:
    """Prints what a trained run predicts for a text: its class, its vector, or the text that answers it.

    Args:
        run: The run's directory.
        text: The text to be judged or answered; given several times, a JSON object is printed for each.
        second: The second text of a pair, for a run that was trained on pairs in one row, or imported; of each.
        file: In place of one text a table (.csv, .tsv, .jsonl), or a text in each line; prints a JSON object for each.
        step: A checkpoint's step, or "best"; by default the newest.
        json: Prints one JSON object.
        overrides: Another corpus in place of a file, with its fields, as --data.corpus=Table --data.corpus.path=F.
    """
    from jaxformer.run.opened import open_run
    from jaxformer.spec import InputError

    if bool(text) + (file is not None) + bool(overrides) != 1 or (second and not text):
        raise InputError(
            "predict needs --text TEXT, and --second TEXT for a pair, or --file FILE alone, or --data.corpus=CLASS and "
            "its fields alone"
        )
    opened = open_run(run, step_of(step))
    if not text:
        rows = opened.predict(opened.corpus_of(overrides)) if overrides else opened.predict_file(str(file))
    else:
        rows = opened.predict(text, second or None)
    for row in rows:
        if not json and len(text) == 1 and set(row) == {"text"}:
            print(row["text"])
        else:
            print_row(row, json or len(text) != 1)
