"""The story of a run: it starts or resumes, trains, evaluates, saves, and stops when told to."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer import platform
from jaxformer.config import Config
from jaxformer.data.batches import Batch
from jaxformer.data.datasets import Prepared
from jaxformer.data.sources import check_ids
from jaxformer.learning.guards import Diverged
from jaxformer.mesh import placed
from jaxformer.run.beginning import Origin, begun, checkpoints_of, groups, origin_of, record, restored
from jaxformer.run.checks import checked_data
from jaxformer.run.directory import as_begun, check_directory, claimed, has_checkpoint
from jaxformer.run.members import Members, batches_of
from jaxformer.run.notices import devices_of
from jaxformer.run.opened import Run
from jaxformer.run.pauses import Pauses, owed, until_pause
from jaxformer.run.plan import check_batch, hyper_of, recipe_of
from jaxformer.run.profile import Profile
from jaxformer.run.reports import Reports, shown
from jaxformer.run.signals import collected
from jaxformer.run.step import TrainState, train_steps
from jaxformer.run.warm_start import tell_other_beginnings
from jaxformer.spec import InputError, counted

log = logging.getLogger(__name__)


def train(
    config: Config | str | Path,
    overrides: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    profile: tuple[int, int] | None = None,
) -> Run:
    """Trains a run, or resumes it where it stopped, and returns it.

    `config` is a Config, the path of a file that defines one, or the name of a preset; `overrides` maps field paths to
    values ({"model.n_layers": 6}). `profile` asks for a trace of the device from after one step to after another, in
    the run's folder `profile`. Raises InputError before anything is written, Interrupted after a signal that ends runs,
    and Diverged once too many updates in a row were skipped (`train.guard`).

    What the run says of itself goes to stderr, unless the program has handlers of its own for logs; fewer lines with
    logging.getLogger("jaxformer").setLevel("WARNING").
    """
    config = _resolved(config, overrides, directory)
    return _trained([config], Profile(config, profile))[0]


def train_seeds(
    config: Config | str | Path,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
) -> list[Run]:
    """Trains runs that differ in nothing but their seed together, as one program, or resumes them.

    Each is a run of its own in directory/seed-SEED, and but for rounding what it would be alone: meant for an
    accelerator that one small run leaves idle. Those that have a checkpoint resume with those that they were trained
    with last, so that other seeds may be added to them. Raises as `train` does.
    """
    first = _resolved(config, overrides, directory)
    if not isinstance(seeds, Sequence) or not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds={seeds!r} must be one or more, each once, such as range(8)")
    check_together(first, len(seeds))
    own = [{"train.seed": seed, "directory": str(Path(first.directory) / f"seed-{seed}")} for seed in seeds]
    return _trained([config_lib.resolve(first, each) for each in own], Profile(first, None))


def check_together(config: Config, count: int) -> None:
    """Raises InputError if so many seeds of the config cannot train together."""
    n_buckets = config.data.sampling.n_buckets
    if n_buckets > 1 and count > 1:
        raise InputError(
            f"data.sampling.n_buckets={n_buckets} gives every seed rows of another width, and seeds trained "
            "together need the same; set data.sampling.n_buckets=1, or train them one by one"
        )


def build(
    config: Config | str | Path, overrides: Mapping[str, Any] | None = None
) -> tuple[TrainState, Callable[..., tuple[TrainState, Any]], Callable[[int], Batch]]:
    """The pure core of a run, for loops of one's own: (state, step, batch_at).

    `step(state, batch)` returns the next state and metrics, and donates the old one; `batch_at(i)` is the batch of
    step i. Nothing is written but the prepared corpus in the cache.
    """
    config = _resolved(config, overrides)
    platform.prepare()
    prepared = checked_data(config)
    recipe, hyper = recipe_of(config, prepared.tokenizer, prepared.classes), hyper_of(config)

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        check_batch(recipe, batch)
        if (rows := len(batch["tokens"])) % recipe.slices:
            raise InputError(f"a batch of {rows} rows must be a multiple of train.accumulation={recipe.slices}")
        for name in {"tokens", "source"} & batch.keys():
            check_ids(np.asarray(batch[name]), recipe.model.vocab_size)
        with config.mesh.entered():
            one = placed({name: array[None] for name, array in batch.items()}, 1)
            state, metrics = train_steps(recipe, state, one, np.int32(1), hyper)
        return state, jax.tree.map(lambda a: a[0], metrics)

    origin = origin_of(config, prepared)
    with config.mesh.entered():
        state = begun(config, prepared, origin)
    return state, step, batches_of(config, prepared).at


def _resolved(
    config: Config | str | Path, overrides: Mapping[str, Any] | None, directory: str | Path | None = None
) -> Config:
    platform.set_flags()  # before the config's file, which may compute something
    if directory is not None:
        overrides = {**(overrides or {}), "directory": str(directory)}
    return config_lib.resolve(config, overrides)


def _trained(configs: Sequence[Config], trace: Profile) -> list[Run]:
    """A run, or several that differ in their seed and directory."""
    configs = as_begun(configs)
    for writer in configs[0].writers:
        writer.require()
    platform.prepare()
    with shown():
        prepared = checked_data(configs[0])
        for config in configs:
            check_directory(config, prepared)  # of all, before anything is written to one
        new = any(not has_checkpoint(Path(config.directory)) for config in configs)
        origin = origin_of(configs[0], prepared) if new else None  # what others began with is not needed
        if origin is not None:
            tell_other_beginnings(configs, origin[1])
        found, diverged = dict[int, Run](), list[Diverged]()
        with claimed(configs, prepared):
            for group in groups(configs):
                try:
                    runs = _train([configs[i] for i in group], prepared, origin, trace)
                    found |= zip(group, runs, strict=True)
                except Diverged as error:  # is no reason not to train the others
                    log.warning("%s", error)
                    diverged.append(error.with_traceback(None))  # which would keep what they trained in memory
        platform.trim_memory()
        if diverged:
            raise diverged[0]
        return [found[i] for i in range(len(configs))]


def _train(configs: Sequence[Config], prepared: Prepared, origin: Origin, profile: Profile) -> list[Run]:
    """Trains runs together from where they are to their last step, or to the end of the call that a signal comes in."""
    config, members = configs[0], Members(configs, prepared)
    with collected() as received, config.mesh.entered(), checkpoints_of(configs) as saved:
        runs, origin = restored(configs, prepared, saved, origin)
        step, steps = int(runs[0].state.step), config.train.steps
        due = owed(configs, saved, step)
        if step >= steps and not any(due):
            more = f", more than the {steps:,} asked for" if step > steps else ""
            log.info("%s is finished: it has made %s%s", config.directory, counted(step, "step"), more)
            received.interrupt(step)
            return runs
        record(runs, prepared, saved, origin)
        state = members.together([run.state for run in runs])
        reports = Reports(configs, step, devices_of(state), members.skipped(state))
        with contextlib.closing(reports), contextlib.closing(profile):
            pauses = Pauses(runs, members, saved, reports, received)
            buffer = members.buffer(step)
            pauses.before(step, state, buffer, due)
            profile.reach(step, state, reports)
            while step < steps and not received:
                pauses.compile(state, buffer)
                count = profile.until_pause(step, min(until_pause(config, step), members.same_shapes(step)))
                state, rows = reports.timed(members.call, state, buffer, count)
                tokens, flops = members.real_tokens(buffer, count), members.flops(buffer, count)
                step += count
                buffer = members.buffer(step)  # while an accelerator works
                reports.add(step, count, tokens, flops, rows)
                profile.reach(step, state, reports)
                if step == steps:  # what diverged at the end is not kept as a finished run
                    reports.pause("ending")
                if not reports.failed:
                    pauses.after(step, state)
                if reports.failed:
                    raise members.diverged(state, *reports.diverged())
            if received:
                pauses.save(step, state)
    received.interrupt(step)
    log.info("done: %s in %s", counted(step, "step"), ", ".join(each.directory for each in configs))
    return [dataclasses.replace(run, state=own) for run, own in zip(runs, members.apart(state), strict=True)]
