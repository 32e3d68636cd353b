"""The rows of a run: metrics.jsonl, and whatever writers its config names."""

import contextlib
import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxformer.config import Config
from jaxformer.data.files import parsed, write
from jaxformer.spec import to_json
from jaxformer.writers import Sink

log = logging.getLogger(__name__)

DIVERGED = "diverged"  # the split of the row that ends a run of which too many updates in a row were skipped
CLOCK = {"tokens_per_second", "seconds", "mfu", "host", "peak_memory"}  # of a row, what is of no run but of one start


class Rows:
    """The rows of one run, to metrics.jsonl and the config's writers. One that resumes from a step drops those after
    it."""

    def __init__(self, config: Config, step: int):
        self._path = path = rows_of(config)
        kept = _drop_rows_after(path, step)
        self.seconds = kept[-1].get("seconds", 0.0) if kept else 0.0  # of training, up to the step
        self._evaluated = {(row["step"], row.get("split")) for row in kept}
        self._file = open(path, "a")  # noqa: SIM115 (closed by `close`)
        self._sinks: dict[str, Sink] = {}
        for writer in config.writers:
            with self._surviving(type(writer).__name__):
                self._sinks[type(writer).__name__] = writer.open(path.parent, to_json(config), step)

    def has(self, step: int, split: str) -> bool:
        """Whether an evaluation of the step was written before this start."""
        return (step, split) in self._evaluated

    def write(self, **row: Any) -> None:
        """Numbers that are not finite are written as null: JSON has no others. Raises OSError if the file is gone."""
        if not (self._path.exists() and os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))):
            raise OSError(f"{self._path} was deleted or moved while the run wrote to it; nothing more can be kept")
        row = finite(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.write(row)

    def close(self) -> None:
        try:
            self._file.close()  # raises what the disk does
        finally:
            for name, sink in list(self._sinks.items()):
                with self._surviving(name):
                    sink.close()

    @contextlib.contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """A writer that fails does not end the run: metrics.jsonl has all rows."""
        try:
            yield
        except Exception as error:  # whatever a service or its package raises
            self._sinks.pop(name, None)
            log.warning("writers: %s failed (%s: %s); the run continues without it", name, type(error).__name__, error)


def finite(value: Any) -> Any:
    """The value with None where a number is not finite."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def less_is_better(by: str) -> bool:
    """Of the numbers of an evaluation, as `train.best_by` has it."""
    return by.startswith(("loss", "bits_per_byte"))


def rows_of(config: Config) -> Path:
    return Path(config.directory) / "metrics.jsonl"


def read_rows(path: Path, upto: float = math.inf) -> tuple[list[dict[str, Any]], int]:
    """The rows up to a step, and how many lines are none, as a killed process may leave one."""
    rows, unread = [], 0
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            row = parsed(line)
            if row["step"] <= upto:
                rows.append(row)
        except (ValueError, KeyError, TypeError):
            unread += bool(line.strip())
    return rows, unread


def _drop_rows_after(path: Path, step: int) -> list[dict[str, Any]]:
    """Leaves the rows up to the step, and returns them."""
    rows, unread = read_rows(path, step)
    if unread:
        log.warning("%s: %d lines that are no rows are dropped, as a killed process may leave one", path, unread)
    write(path, "".join(json.dumps(row) + "\n" for row in rows))
    return rows
