"""jaxformer compare."""


def compare(
    runs: list[str],
    by: str = "loss",
    json: bool = False,
    markdown: bool = False,
    csv: str | None = None,
    picture: str | None = None,
) -> None:
    """Prints what differs between runs, in their configs and in their losses, and whether seeds alone would explain it.

    Args:
        runs: Directories of runs, or folders of runs; the others are compared with the first.
        by: A number of the evaluations, such as loss, bits_per_byte or accuracy.
        json: Print one JSON object.
        markdown: Print Markdown.
        csv: A file that gets a line for each run.
        picture: A file that gets the curves, such as curves.png; needs Matplotlib.
    """
    from jaxformer.data.files import located, write
    from jaxformer.lab.compare import compare
    from jaxformer.spec import InputError

    if json and markdown:
        raise InputError("json must not be given beside markdown; leave one of them out")
    for name, path in (("csv", csv), ("picture", picture)):  # before one of them is written
        if path is not None and not located(path).parent.is_dir():
            raise InputError(f"{name}={path!r} must be a file in a folder that is there; make the folder first")
    found = compare(runs, by)
    lines = "" if csv is None else found.csv()
    if picture is not None:
        figure, path = found.figure(), located(picture)
        if path.suffix[1:] not in (known := figure.canvas.get_supported_filetypes()):
            raise InputError(f"picture={picture!r} must end in one of .{', .'.join(sorted(known))}")
        figure.savefig(path, dpi=90, metadata={"Software": None} if path.suffix == ".png" else None)
    if csv is not None:
        write(located(csv), lines)
    print(found.json() if json else found.markdown() if markdown else found)
