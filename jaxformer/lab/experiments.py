"""Published numbers, and what runs of ours measure beside them. An experiment is a list of rows, each a config."""

import dataclasses
import functools
import json
import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import config as config_lib
from jaxformer import pictures
from jaxformer.config import Config
from jaxformer.data.files import read_json, write
from jaxformer.data.tokenizers import TokenizerFile
from jaxformer.lab.intervals import estimate
from jaxformer.lab.tables import markdown_table
from jaxformer.learning.schedules import Schedule
from jaxformer.run import warm_start
from jaxformer.run.directory import as_begun, has_begun
from jaxformer.run.loop import check_together, train, train_seeds
from jaxformer.run.metrics import finite, rows_of
from jaxformer.run.opened import Run
from jaxformer.run.starts import changed_sources, last_seeds, last_start, starts_of
from jaxformer.spec import InputError, fields, within

log = logging.getLogger(__name__)

# What a run may resume with, but would then not be what the config comes to by itself, or not have the same rows.
SAME = {"train.steps", "train.log_every", "train.eval_every", "train.guard", "data.valid_tokens"}

Metrics = Sequence[Mapping[str, Any]]  # the rows of a run's metrics.jsonl


def final(name: str) -> Callable[[Metrics], float]:
    """That number of the whole validation split at the end."""
    return lambda rows: [row[name] for row in rows if row["split"].startswith("valid")][-1]


final_loss = final("loss")  # in nats
final_accuracy = final("accuracy")  # the share of validation examples whose class was right
final_exact = final("exact")  # the share of validation examples whose answer was exact


def best_accuracy(rows: Metrics) -> float:
    """The highest of all evaluations."""
    return max(row["accuracy"] for row in rows if row["split"] == "valid")


def late_training_loss(rows: Metrics) -> float:
    """The mean of the logged training losses of the last tenth of the run."""
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    return statistics.fmean(losses[-max(1, len(losses) // 10) :])


def within_or_better(values: Sequence[float], published: float, higher: bool) -> bool:
    """Whether the published number lies in the range of the seeds, or all of them are better."""
    return bool(np.max(values) >= published if higher else np.min(values) <= published)  # False if one is no number


def mean_or_better(values: Sequence[float], published: float, higher: bool) -> bool:
    """Whether the mean is at the published number or better, to the digits that are printed."""
    mean = round(statistics.fmean(values), 4)
    return mean >= published if higher else mean <= published


def near(values: Sequence[float], published: float, higher: bool) -> bool:
    """Whether the mean is within 3 % of the published number: for results that are bad on purpose."""
    return abs(statistics.fmean(values) - published) <= 0.03 * abs(published)


@dataclasses.dataclass(frozen=True)
class Row:
    """What was published, and the runs that measure it: one config with several seeds, trained together."""

    name: str
    config: Config
    published: float | tuple[float, ...] | None = None  # several numbers: of as many runs, each with a verdict
    seeds: int = 1
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    measure: Callable[[Metrics], float] = final_loss
    higher: bool = False  # whether more is better
    reached: Callable[[Sequence[float], float, bool], bool] = within_or_better
    also: tuple[str, ...] = ()  # fields that take the seed as well, as "data.split_seed"; then runs are trained apart
    begins_with: str | None = None  # an earlier row that lends parameters and tokenizer: seed by seed, or its one run;
    # with init_from=None among the overrides the tokenizer alone
    platform: str | None = None  # "gpu": trained on one of these alone; elsewhere the table says "not run"
    remark: str = ""

    @property
    def numbers(self) -> tuple[float, ...]:
        """All that was published."""
        if self.published is None:
            return ()
        return self.published if isinstance(self.published, tuple) else (self.published,)

    @property
    def slug(self) -> str:
        """The name of its folder."""
        return _slug(self.name)


def _slug(name: str) -> str:
    return re.sub(r"\W+", "-", name).strip("-").lower()


@dataclasses.dataclass
class Result:
    """What the runs of a row have come to. There are none if it needs a device that was not at hand."""

    row: Row
    runs: list[Run]
    metrics: list[Metrics]

    @property
    def values(self) -> list[float]:
        try:
            return [self.row.measure(rows) for rows in self.metrics]
        except (LookupError, ValueError) as error:
            names = sorted({name for rows in self.metrics for row in rows for name in row})
            raise InputError(
                f"row {self.row.name!r}: its measure finds no number in the rows of its runs, which have "
                f"{', '.join(names)} ({type(error).__name__}: {error}); give the row another measure"
            ) from error

    @property
    def mean(self) -> float:
        return estimate(self.values).mean if self.runs else math.nan

    @property
    def deviation(self) -> float | None:
        """Of the seeds; None if there is but one."""
        return estimate(self.values).deviation if self.runs else None

    @property
    def seconds(self) -> float:
        """Of training, all seeds together."""
        places = [run.config.directory for run in self.runs]
        ends = {last_seeds(place): rows[-1]["seconds"] for place, rows in zip(places, self.metrics, strict=True)}
        return sum(ends.values())  # what was trained together took that time once

    @property
    def reached(self) -> tuple[bool, ...]:
        """Whether each of the published numbers is; empty if nothing was run."""
        row, values = self.row, self.values
        return tuple(row.reached(values, number, row.higher) for number in row.numbers) if self.runs else ()

    def curve(self, split: str = "train", name: str = "loss") -> tuple[list[int], list[list[float]]]:
        """Steps, and for each run its numbers there."""
        found = [[row for row in rows if row["split"] == split] for rows in self.metrics]
        return [row["step"] for row in found[0]], [[row[name] for row in rows] for rows in found]

    def summary(self) -> dict[str, Any]:
        """As `reproduce --json` prints it."""
        reached = self.reached
        return {
            "row": self.row.name,
            "published": self.row.published,
            "measured": self.mean,
            "deviation": self.deviation,
            "seeds": len(self.runs),
            "reached": reached if isinstance(self.row.published, tuple) else next(iter(reached), None),
            "steps": self.row.config.train.steps,
            "seconds": self.seconds,
        }


class Report:
    """The blocks of Markdown that an experiment leaves, and its pictures."""

    def __init__(self, name: str, results: Sequence[Result], pictures: Path):
        self.results = {result.row.name: result for result in results if result.runs}  # of the rows that were run
        self.blocks: list[str] = []
        self._name, self._pictures = name, pictures

    def text(self, text: str) -> None:
        self.blocks.append(text.strip())

    def code(self, text: str) -> None:
        self.blocks.append(f"```\n{text.strip()}\n```")

    def table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self.blocks.append(markdown_table(rows))

    def picture(self, name: str, figure: Any, caption: str) -> None:
        """Saves a Matplotlib figure beside the results, small enough to be committed."""
        self._pictures.mkdir(parents=True, exist_ok=True)
        path = self._pictures / f"{self._name}-{name}.png"
        figure.savefig(path, dpi=90, metadata={"Software": None})
        self.blocks.append(f"![{caption}]({self._pictures.name}/{path.name})\n\n{caption}")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A system and its published numbers. `tell` adds to the report what a table does not show."""

    title: str
    about: str
    rows: tuple[Row, ...]
    tell: Callable[[Report], None] = lambda report: None
    long: bool = False  # left out of `reproduce all`


def load(name: str) -> Experiment:
    """The `experiment` that experiments/NAME.py, or a Python file of yours, defines. Raises InputError if none does."""
    path = Path(name) if name.endswith(".py") else Path("experiments", f"{name}.py")
    if not path.is_file():
        known = ", ".join(names()) or "none in experiments/"
        raise InputError(f"{name!r} is no experiment; there are {known}, or give the path of a Python file")
    found = config_lib.execute(path).get("experiment")
    if not isinstance(found, Experiment):
        raise InputError(f"{path}: must define `experiment`, an Experiment, but it is {type(found).__name__}")
    if not found.rows:
        raise InputError(f"{path}: the experiment has no rows; give it one")
    slugs = [row.slug for row in found.rows]
    if len(set(slugs)) != len(slugs):
        raise InputError(f"{path}: rows must have names of their own, but they are {', '.join(slugs)}")
    before: dict[str, int] = {}
    for row in found.rows:
        if row.seeds < 1:
            raise InputError(f"{path}: row {row.name!r}: seeds={row.seeds} must be at least 1")
        lent = before.get(row.begins_with, 0) if row.begins_with else 1
        if lent != 1 and lent < row.seeds:
            raise InputError(
                f"{path}: row {row.name!r}: begins_with={row.begins_with!r} must be an earlier row of one seed, or of "
                f"at least as many, {row.seeds}"
            )
        before[row.name] = row.seeds
        config = _resolved(row, Path(), row.seeds - 1, lent)
        if not row.also and not row.begins_with:
            check_together(config, row.seeds)
    return found


def names() -> list[str]:
    """The experiments of the working directory."""
    return sorted(path.stem for path in Path("experiments").glob("*.py"))


def _resolved(row: Row, directory: Path, seed: int | None = None, lent: int = 1) -> Config:
    """The config of a row or, given a seed, of one of its runs; `directory` is that of the experiment, `lent` how many
    seeds the row has that it begins with."""
    own: dict[str, Any] = {} if seed is None else dict.fromkeys(("train.seed", *row.also), seed)
    begun: dict[str, Any] = {}
    if row.begins_with:
        run = directory / _slug(row.begins_with) / f"seed-{0 if lent == 1 else seed or 0}"
        begun = {"init_from": str(run), "data.tokenizer": TokenizerFile(str(run / "tokenizer.json"))}
    return config_lib.resolve(row.config, {**begun, **row.overrides, **own})


def _check_kept(config: Config, home: Path, lent: bool) -> None:
    """Raises InputError for a run of before that is not what this config would come to by itself."""
    if not has_begun(home):
        return
    (config,) = as_begun([dataclasses.replace(config, directory=str(home))])
    old = config_lib.read(home / "config.json")
    found = config_lib.differences(old, config)
    changed = {path: change for path, change in found.items() if within(path, SAME)}
    before, after = old.train.steps, config.train.steps
    if before < after and not _depends_on_steps(config, before, after):
        del changed["train.steps"]
    told = [config_lib.told(path, *change) for path, change in changed.items()]
    told += [f"the code of {name} has changed since" for name in changed_sources(config)]
    if told:
        raise InputError(f"{home}: {', '.join(told)}; delete the folder to train it again")
    report = home / "init_from.json"
    if lent and config.init_from and report.exists():
        taken = read_json(report)
        if not warm_start.still_has(warm_start.open_source(config.init_from), taken):
            raise InputError(
                f"{home}: it began with other parameters than {config.init_from} has now; delete the folder to train "
                "it again"
            )


def _depends_on_steps(config: Config, before: int, after: int) -> bool:
    """Whether a rate at the end of a run of `before` steps is another one if there are to be `after`."""
    found = (getattr(owner, name) for _, owner, name in fields(config.optimizer, ""))
    rates = [rate for rate in found if isinstance(rate, Schedule)]
    at = lambda rate, steps: float(rate(jnp.int32(before - 1), jnp.int32(steps)))
    return any(at(rate, before) != at(rate, after) for rate in rates)


def run_row(row: Row, directory: Path, lent: int = 1) -> Result:
    """Trains the runs of a row, or resumes them, and reads what they have left. `lent` is how many seeds the row has
    that it begins with."""
    of_seed = functools.partial(_resolved, row, directory, lent=lent)
    config, home = of_seed(), directory / row.slug
    places = {seed: home / f"seed-{seed}" for seed in range(row.seeds)}
    for seed, place in places.items():
        _check_kept(of_seed(seed), place, row.begins_with is not None)
    finished = all((place / "checkpoints" / str(config.train.steps)).exists() for place in places.values())
    if row.platform not in (None, jax.default_backend()) and not finished:
        runs = []
    elif row.also or row.begins_with:
        runs = [train(of_seed(seed), directory=place) for seed, place in places.items()]
    else:
        runs = train_seeds(config, range(row.seeds), directory=home)
    return Result(dataclasses.replace(row, config=config), runs, [read_metrics(run) for run in runs])


def read_metrics(run: Run) -> Metrics:
    """The rows of a run; what is null in them, of a run that diverged, is no number."""
    numbers = lambda row: {name: math.nan if value is None else value for name, value in row.items()}
    with open(rows_of(run.config), encoding="utf-8") as lines:
        return [json.loads(line, object_hook=numbers) for line in lines]


def reproduce(name: str, directory: Path, results: Path | None = None) -> list[Result]:
    """Runs an experiment and puts its section into the results file; pictures go to the folder of the same name.

    Runs are in directory/NAME/ROW; one that is finished is not run again. The results file is RESULTS.md, of the
    working directory for an experiment in its folder experiments, and of directory/NAME for any other.
    """
    experiment, stem = load(name), Path(name).stem
    pictures.require()
    ours = not name.endswith(".py") or Path(name).resolve().parent == Path("experiments").resolve()
    command = f"python scripts/reproduce.py {name}" if ours else f"jaxformer reproduce {name}"
    results = results or (Path() if ours else directory / stem) / "RESULTS.md"
    _read(results)
    seeds = {row.name: row.seeds for row in experiment.rows}
    found = [run_row(row, directory / stem, seeds.get(row.begins_with or "", 1)) for row in experiment.rows]
    report = Report(stem, found, results.parent / results.stem.lower())
    experiment.tell(report)
    seconds = sum(result.seconds for result in found)
    cost = f"`{command}`: {seconds:.0f} s of training. {trained_on(found)}."
    head = f"## {experiment.title}\n\n{cost}"
    remarks = [f"* {result.row.name}: {result.row.remark}" for result in found if result.row.remark]
    blocks = [head, experiment.about.strip(), as_table(found), "\n".join(remarks), *report.blocks]
    _put(results, stem, "\n\n".join(filter(None, blocks)))
    log.info("%s has the report", results)
    return found


def _cells(result: Result) -> dict[str, Any]:
    row, values, deviation = result.row, result.values, result.deviation
    spread = "" if deviation is None else f" ± {deviation:.4f} ({min(values):.4f} to {max(values):.4f})"
    return {
        "row": row.name,
        "published": ", ".join(f"{number:g}" for number in row.numbers),
        "measured": f"{result.mean:.4f}{spread}" if values else f"not run: no {str(row.platform).upper()} here",
        "seeds": len(values) or "",
        "reached": ", ".join("yes" if each else "**no**" for each in result.reached),
        "steps": row.config.train.steps,
        "seconds": f"{result.seconds:.0f}" if values else "",
    }


def trained_on(results: Sequence[Result]) -> str:
    """Versions and machines at the last starts of all runs, as starts.jsonl has them."""
    found: dict[str, None] = {}
    for run in (run for result in results for run in result.runs):
        start = last_start(run.config.directory)
        if not {"versions", "python", "devices"} <= start.keys():
            raise InputError(
                f"{starts_of(run.config.directory)}: no start can be read; delete the folder to train it again"
            )
        versions = ", ".join(f"{name} {start['versions'][name]}" for name in ("jax", "flax", "optax"))
        kinds = ", ".join(sorted(set(start["devices"])))
        found[f"{versions}, Python {start['python']}; {kinds}; {start.get('processor', 'processor not recorded')}"] = (
            None
        )
    return ". And: ".join(found)


TITLE = """# Results

Each section was written by the command that it begins with; no number of its own is typed by hand. Losses are nats per
token on the whole validation split, "measured" is the mean of the seeds ± their standard deviation (their range), and
"reached" says of each published number whether it lies within the range of the seeds or is beaten, unless the section
says otherwise.
"""


def _read(path: Path) -> dict[str, str]:
    """The sections of a results file by their names. Raises InputError for a file that is none."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else TITLE
    if not text.startswith(TITLE.splitlines()[0]):
        raise InputError(f"results={str(path)!r} holds something that is no results; give another file")
    return dict(re.findall(r"<!-- ([^\n]+) -->\n(.*?)\n<!-- end -->", text, re.DOTALL))


def _put(path: Path, name: str, section: str) -> None:
    """Replaces a section of the file, or adds it in alphabetical order."""
    sections = _read(path) | {name: section}
    parts = [f"<!-- {key} -->\n{sections[key]}\n<!-- end -->" for key in sorted(sections)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, "\n".join([TITLE, *(part + "\n" for part in parts)]))


def as_table(results: Sequence[Result]) -> str:
    return markdown_table([_cells(result) for result in results])


def as_json(results: Sequence[Result]) -> str:
    return json.dumps(finite([result.summary() for result in results]), ensure_ascii=False)
