"""jaxformer reproduce."""


def reproduce(name: str, json: bool = False, directory: str = "runs", results: str | None = None) -> None:
    """Trains the systems of an experiment, or resumes them, and prints their numbers beside the published ones.

    Args:
        name: A file of the folder experiments, without its .py; a Python file of yours; or all that are not `long`.
        json: Print one JSON list.
        directory: Where the runs are kept, in NAME/ROW/seed-SEED.
        results: The report, a section of a Markdown file: by default RESULTS.md; of your own file beside its runs.
    """
    from jaxformer.commands.arguments import find_modules_here
    from jaxformer.data.files import located
    from jaxformer.lab import experiments

    find_modules_here()
    found, known = [], experiments.names() if name == "all" else []
    # A fault in the last is told before the first has trained for hours.
    known = [each for each in known if not experiments.load(each).long]
    for each in known or [name]:
        found += experiments.reproduce(each, located(directory), located(results) if results else None)
    print(experiments.as_json(found) if json else experiments.as_table(found))
