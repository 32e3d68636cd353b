"""Writers: where rows of metrics go besides metrics.jsonl."""

import abc
import importlib.util
import json
import math
import os
import textwrap
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from jaxformer.pictures import loss_curve
from jaxformer.platform import in_notebook
from jaxformer.spec import InputError, Spec


class Sink(Protocol):
    """An opened writer. Rows are flat but for dicts of lists: {"step": 10, "split": "train", "loss": 3.2}."""

    def write(self, row: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class Writer(Spec):
    """Where rows of metrics go; a subclass names its package and opens its sink.

    A killed process may take rows of its last 15 seconds with it; metrics.jsonl has them.
    """

    package = ""  # what `open` imports
    extra = ""  # jaxformer's, which installs it

    def require(self) -> None:
        """Raises InputError if the package is missing, so that a run fails before it starts."""
        if self.package and importlib.util.find_spec(self.package) is None:
            name, remedy = type(self).__name__, f'pip install "jaxformer[{self.extra}]"'
            raise InputError(f"writers: {name} needs the package {self.package}; {remedy}")

    @abc.abstractmethod
    def open(self, directory: Path, config: Mapping[str, Any], step: int) -> Sink:
        """A sink for the run in `directory`; rows after `step` that a killed process wrote are superseded."""


class LossCurve(Writer):
    """The loss by step, of training and of validation: in a notebook a figure that grows below the cell, anywhere the
    file loss.png of the run's folder, written at each evaluation and at the end."""

    package, extra = "matplotlib", "pictures"

    def open(self, directory: Path, config: Mapping[str, Any], step: int) -> Sink:
        return _Curve(directory)


class TensorBoard(Writer):
    """Event files in the run's folder tensorboard/; TensorBoard hides the rows after `step` and marks NaN as such."""

    package, extra = "tensorboardX", "tensorboard"

    def open(self, directory: Path, config: Mapping[str, Any], step: int) -> Sink:
        return _Events(directory / "tensorboard", config, step)


class WandB(Writer):
    """A run of Weights & Biases that resumes under its id, kept in the run's file wandb.id.

    Rows are drawn over their own "step". W&B's own counts calls, and it would drop the rows of a run that went back.
    It deletes none either: what a killed process wrote after `step` stays, and the summary shows the newest. Offline,
    each start leaves a folder wandb/offline-run-*, and `wandb sync` uploads them all.
    """

    package = extra = "wandb"
    project: str = "jaxformer"  # the project that the run belongs to
    name: str | None = None  # what the run is called; None: as its directory
    mode: Literal["online", "offline", "disabled"] = "online"  # whether rows are uploaded

    def check(self, at: str = "") -> None:
        if not self.project:
            raise ValueError(f"{at}project={self.project!r} must not be empty; 'jaxformer' is the default")
        if self.name == "":
            raise ValueError(f"{at}name={self.name!r} must not be empty; None is the name of the directory")

    def open(self, directory: Path, config: Mapping[str, Any], step: int) -> Sink:
        return _Logged(self, directory, config)


class _Curve:
    """Draws anew at most every SECONDS, so that training is not held up; what is drawn takes a tenth of one."""

    SECONDS = 2.0

    def __init__(self, directory: Path):
        path = directory / "metrics.jsonl"
        self._rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        self._directory, self._handle, self._drawn = directory, None, 0.0
        if in_notebook():
            self._show()

    def write(self, row: Mapping[str, Any]) -> None:
        self._rows.append(row)
        evaluated = row["split"] != "train"
        if in_notebook() and (evaluated or time.monotonic() - self._drawn > self.SECONDS):
            self._show()
        if evaluated:
            self._save()

    def close(self) -> None:
        if self._rows:
            if in_notebook():
                self._show()
            self._save()

    def _show(self) -> None:
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        figure = loss_curve(self._rows, str(self._directory))
        if self._handle is None:
            self._handle = display(figure, display_id=True)
        else:
            self._handle.update(figure)
        self._drawn = time.monotonic()

    def _save(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        new = self._directory / "loss.png.new"
        loss_curve(self._rows, str(self._directory)).savefig(new, format="png", dpi=100)
        new.replace(self._directory / "loss.png")


class _Events:
    def __init__(self, directory: Path, config: Mapping[str, Any], step: int):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        self._summary = Summary
        # The suffix, for of two starts within a second the later would otherwise overwrite the former's file.
        suffix = f".{time.time_ns()}"
        self._writer = SummaryWriter(str(directory), purge_step=step + 1, flush_secs=10, filename_suffix=suffix)
        self._writer.add_text("config", textwrap.indent(json.dumps(config, indent=1), "    "), step)  # Markdown's code

    def write(self, row: Mapping[str, Any]) -> None:
        # Not by `add_scalar`, which logs a warning for each NaN.
        values = [self._summary.Value(tag=name, simple_value=x) for name, x in _scalars(row).items()]
        self._writer.file_writer.add_summary(self._summary(value=values), row["step"])  # pyright: ignore

    def close(self) -> None:
        self._writer.close()


class _Logged:
    def __init__(self, writer: WandB, directory: Path, config: Mapping[str, Any]):
        if writer.mode != "online":  # else W&B reports its own use over the network, offline too
            os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # pyright: ignore[reportMissingImports]

        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=writer.project,
            name=writer.name or directory.resolve().name,
            mode=writer.mode,
            id=_id(directory / "wandb.id"),
            resume="allow",
            dir=str(directory),
            config=dict(config),
            save_code=False,
            reinit="create_new",  # a run that the user's own process has open stays as it is
            settings=wandb.Settings(silent=True, console="off", disable_git=True, disable_code=True),
        )
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log({"step": row["step"], **_scalars(row)})

    def close(self) -> None:
        self._run.finish()


def _id(path: Path) -> str:
    """The id in a file, drawn and written if there is none; an empty file is left by a process killed as it wrote."""
    found = path.read_text().strip() if path.exists() else ""
    if not found:
        found = uuid.uuid4().hex
        path.write_text(found + "\n")
    return found


def _scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """A row's numbers as "split/name" or "split/name/key/index"; None, JSON's word for what is not finite, is nan."""
    found = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}/{key}", inner)
        elif isinstance(value, list | tuple):
            for i, inner in enumerate(value):
                add(f"{name}/{i}", inner)
        else:
            found[name] = math.nan if value is None else float(value)

    for name, value in row.items():
        if name not in ("step", "split"):
            add(f"{row['split']}/{name}", value)
    return found
