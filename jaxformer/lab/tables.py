"""Rows of cells as text."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The keys of the first row are the columns."""
    cells = [[str(value).replace("|", "\\|") for value in row.values()] for row in rows]
    lines = [list(rows[0]), ["---"] * len(rows[0]), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def aligned_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For a terminal: columns two spaces apart."""
    lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = lambda line: "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
    return "\n".join(pad(line).rstrip() for line in lines)


def csv_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """None is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
