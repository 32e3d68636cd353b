"""jaxformer presets."""

import ast
import re

from jaxformer.commands.arguments import page


def presets() -> None:
    """Lists the configs that come with jaxformer: their names, their sizes, what they are.

    Train one by its name, as in jaxformer train quickstart; jaxformer new my_config.py quickstart writes one to edit.
    """
    from jaxformer import config

    found = config.presets()
    rows, width = [], max(map(len, found), default=0)
    for name, path in found.items():
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        count = re.search(r"([\d,]+) parameters", text)
        first = re.split(r"(?<=[.])\s", text.partition("\n\n")[0])[0].replace("\n", " ")
        rows.append((f"{name:{width}}  {count[1] if count else '':>13}", first))
    print(page([(f"{'preset':{width}}     parameters", ""), *rows], indent=""))
