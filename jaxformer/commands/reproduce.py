"""jaxformer reproduce."""


def reproduce(name: str, json: bool = False, directory: str = "runs", results: str = "RESULTS.md") -> None:
    """Trains the systems of an experiment, or goes on with them, and prints their numbers beside the published ones.

    Args:
        name: A file of the folder experiments, without its .py; a Python file of your own; or all.
        json: Print one JSON list.
        directory: Where the runs are kept, in NAME/ROW/seed-SEED.
        results: A Markdown file whose section is replaced; pictures go to the folder of that name.
    """
    from jaxformer.data.files import located
    from jaxformer.lab import experiments

    found, known = [], experiments.names() if name == "all" else []
    for each in known:
        experiments.load(each)  # a fault in the last is told before the first has trained for hours
    for each in known or [name]:
        found += experiments.reproduce(each, located(directory), located(results))
    print(experiments.as_json(found) if json else experiments.as_table(found))
