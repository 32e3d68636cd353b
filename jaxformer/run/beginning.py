"""How runs begin, or resume where they stopped: their states, and what is told and stored before they train."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.datasets import Prepared
from jaxformer.mesh import laid_out
from jaxformer.run.checkpoint import CheckpointWriter, restore_together
from jaxformer.run.directory import has_begun, has_checkpoint
from jaxformer.run.metrics import read_rows, rows_of
from jaxformer.run.notices import devices_of, summarize, tell_beginning, tell_changes
from jaxformer.run.opened import Run
from jaxformer.run.peaks import peak_of
from jaxformer.run.plan import abstract_state, hyper_of, recipe_of
from jaxformer.run.starts import last_seeds, record_start, starts_of
from jaxformer.run.step import TrainState, init_state
from jaxformer.run.warm_start import compare, open_source, take, tell
from jaxformer.spec import InputError

log = logging.getLogger(__name__)

# What a run begins with: computed once, and with few of LLVM's passes compiled in a third of the time.
first_state = jax.jit(init_state, static_argnums=0, compiler_options={"xla_backend_optimization_level": 1})

Origin = tuple[Run, dict[str, Any]] | None  # the run that others begin with, and the report of what is taken of it


def origin_of(config: Config, prepared: Prepared) -> Origin:
    """Opened and compared before anything is written, so that a wrong one is refused."""
    if config.init_from is None:
        return None
    run, recipe = open_source(config.init_from), recipe_of(config, prepared.tokenizer, prepared.classes)
    return run, compare(recipe, run, run.tokenizer.same_ids(prepared.tokenizer))


def begun(config: Config, prepared: Prepared, origin: Origin) -> TrainState:
    """The state before the first step."""
    recipe, hyper = recipe_of(config, prepared.tokenizer, prepared.classes), hyper_of(config)
    state = first_state(recipe, hyper)
    if origin is None:
        return state
    params = take(recipe.whole(state.params, state.base), *origin)
    del state  # the optimizer's numbers need not be there twice
    return init_state(recipe, hyper, laid_out(params, recipe.model.declared()))


def groups(configs: Sequence[Config]) -> list[list[int]]:
    """The indices of those that train together: of the runs begun, the same as at their last start; and all new ones.

    Others would have other steps, and other bits than if nothing had interrupted them. Where none of those of a start
    has saved anything they begin anew: perhaps the process died before each had recorded its start.
    """
    places = [config.directory for config in configs]
    starts = [last_seeds(place) if starts_of(place).exists() else None for place in places]
    saved = {start for start, each in zip(starts, configs, strict=True) if has_checkpoint(Path(each.directory))}
    found: dict[tuple[int, ...] | None, list[int]] = {}
    for i, start in enumerate(starts):
        found.setdefault(start if start in saved else None, []).append(i)
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
    configs: Sequence[Config], prepared: Prepared, saved: Sequence[CheckpointWriter], origin: Origin
) -> tuple[list[Run], Origin]:
    """The runs at the newest step that all have saved or, without one, as they begin: then with the origin.

    Raises InputError where nothing but the checkpoint of a run is left that others have lost.
    """
    config, recipe = configs[0], recipe_of(configs[0], prepared.tokenizer, prepared.classes)
    states = restore_together(saved, abstract_state(config, recipe))
    if states is None:
        _check_lost(configs, saved)
        if has_begun(Path(config.directory)):
            log.warning("%s holds no checkpoint: the run begins anew", config.directory)
        states = [begun(each, prepared, origin) for each in configs]
        tell_beginning(config)
    else:
        origin = None
    opened = zip(configs, states, strict=True)
    return [Run(each, prepared.tokenizer, state, prepared.classes) for each, state in opened], origin


def _check_lost(configs: Sequence[Config], saved: Sequence[CheckpointWriter]) -> None:
    """Raises InputError if a run has the one checkpoint that others have lost. Where their first save was cut short it
    is nothing that counts: then no row is behind it."""
    for config, checkpoints in zip(configs, saved, strict=True):
        rows, last = read_rows(rows_of(config))[0], config_lib.read(Path(config.directory) / "config.json").train.steps
        for step in checkpoints.steps():
            finished = step == last and any((row["step"], row.get("split")) == (step, "valid") for row in rows)
            if finished or any(row["step"] > step for row in rows):
                lost = next(other.directory for other in saved if not other.has(step))
                raise InputError(
                    f"{lost} has lost the checkpoint of step {step}, which {checkpoints.directory} has; put it back, "
                    "or train anew in another directory"
                )


def record(runs: Sequence[Run], prepared: Prepared, saved: Sequence[CheckpointWriter], origin: Origin) -> None:
    """Tells what the runs are from here on, and stores it."""
    config, step = runs[0].config, int(runs[0].state.step)
    seeds, devices = [run.config.train.seed for run in runs], devices_of([run.state for run in runs])
    peak = peak_of(config.train, devices)
    tell_changes(config, step, devices, seeds)
    for run, checkpoints in zip(runs, saved, strict=True):
        stored = Path(run.config.directory) / "config.json"
        config_lib.save(run.config, stored, config_lib.format_of(stored))
        record_start(run.config, step, seeds, devices, peak)
        checkpoints.forget_after(step)
    summarize(runs, prepared, peak)
    if origin is not None:
        for run in runs:
            tell(origin[1], Path(run.config.directory))
