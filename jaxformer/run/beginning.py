"""How runs begin, or go on from where they stopped: their states, and what is told and stored before they train."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.datasets import Prepared
from jaxformer.run.checkpoint import CheckpointWriter, restore_together
from jaxformer.run.notices import devices_of, summarize, tell_beginning, tell_changes
from jaxformer.run.opened import Run
from jaxformer.run.plan import abstract_state, hyper_of, recipe_of
from jaxformer.run.starts import last_seeds, record_start, starts_of
from jaxformer.run.step import TrainState, init_state
from jaxformer.run.warm_start import compare, open_source, take, tell

log = logging.getLogger(__name__)

Report = dict[str, Any]  # of a warm start
Beginning = Callable[[], tuple[TrainState, Report | None]]


def source_of(config: Config) -> Run | None:
    """The run that another begins with, opened before anything is written, so that a wrong one is refused."""
    return None if config.init_from is None else open_source(config.init_from)


def beginning(config: Config, prepared: Prepared, source: Run | None) -> Beginning:
    """Makes the state before the first step, and the report of a warm start."""
    recipe, hyper = recipe_of(config, prepared.tokenizer, prepared.classes), hyper_of(config)
    if source is None:
        return lambda: (init_state(recipe, hyper), None)
    report = compare(recipe.model, source, source.tokenizer == prepared.tokenizer)
    return lambda: (take(init_state(recipe, hyper), source, report), report)


def groups(configs: Sequence[Config]) -> list[list[int]]:
    """The indices of those that train together: of the runs begun, the same as at their last start; and all new ones.

    Others would have other steps, and other bits than if nothing had interrupted them.
    """
    found: dict[tuple[int, ...] | None, list[int]] = {}
    for i, config in enumerate(configs):
        begun = last_seeds(starts_of(config)) if starts_of(config).exists() else None
        found.setdefault(begun, []).append(i)
    for begun, group in found.items():  # in the order of then
        order = {seed: place for place, seed in enumerate(begun or ())}
        group.sort(key=lambda i, order=order: order.get(configs[i].train.seed, i))
    return list(found.values())


@contextlib.contextmanager
def checkpoints_of(configs: Sequence[Config]) -> Iterator[list[CheckpointWriter]]:
    """What saves the runs; on leaving, the last save is waited for."""
    knobs = configs[0].train
    keep = knobs.keep if len(configs) == 1 else max(knobs.keep, 2)  # a kill between two saves leaves a step to all
    with contextlib.ExitStack() as stack:
        places = [Path(config.directory) / "checkpoints" for config in configs]
        yield [stack.enter_context(contextlib.closing(CheckpointWriter(place, keep))) for place in places]


def restored(
    configs: Sequence[Config], prepared: Prepared, saved: Sequence[CheckpointWriter], begins: Sequence[Beginning]
) -> tuple[list[Run], Sequence[Report | None]]:
    """The runs at the newest step that all have saved or, without one, as they begin, with the reports of that."""
    config, reports = configs[0], ()
    recipe = recipe_of(config, prepared.tokenizer, prepared.classes)
    states = restore_together(saved, abstract_state(config, recipe))
    if states is None:
        if (Path(config.directory) / "metrics.jsonl").exists():
            log.warning("%s holds no checkpoint: the run begins anew", config.directory)
        states, reports = zip(*(begin() for begin in begins), strict=True)
        tell_beginning(config)
    opened = zip(configs, states, strict=True)
    return [Run(each, prepared.tokenizer, state, prepared.classes) for each, state in opened], reports


def record(
    runs: Sequence[Run], prepared: Prepared, saved: Sequence[CheckpointWriter], reports: Sequence[Report | None]
) -> None:
    """Tells what the runs are from here on, and stores it."""
    config, step = runs[0].config, int(runs[0].state.step)
    tell_changes(config, step)
    seeds, devices = [run.config.train.seed for run in runs], devices_of([run.state for run in runs])
    for run, checkpoints in zip(runs, saved, strict=True):
        stored = Path(run.config.directory) / "config.json"
        config_lib.save(run.config, stored, config_lib.format_of(stored))
        record_start(run.config, step, seeds, devices)
        checkpoints.forget_after(step)
    summarize(runs, prepared)
    for run, report in zip(runs, reports, strict=False):
        if report:
            tell(report, Path(run.config.directory))
