"""The story of a run: it starts or goes on, trains, evaluates, saves, and stops when told to."""

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.batches import Batch
from jaxformer.data.datasets import Prepared
from jaxformer.data.sources import check_ids
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import CheckpointWriter, restore_together
from jaxformer.run.checks import checked_data
from jaxformer.run.directory import as_begun, check_directory, claimed, has_checkpoint
from jaxformer.run.members import Members, batches_of
from jaxformer.run.notices import devices_of, summarize, tell_beginning, tell_changes
from jaxformer.run.opened import Run
from jaxformer.run.pauses import Pauses, owed, until_pause
from jaxformer.run.plan import abstract_state, check_arrays, hyper_of, recipe_of
from jaxformer.run.profile import Profile
from jaxformer.run.reports import Reports
from jaxformer.run.signals import Interrupted, collected
from jaxformer.run.starts import last_seeds, record_start, starts_of
from jaxformer.run.step import TrainState, init_state, train_steps
from jaxformer.run.warm_start import compare, open_source, take, tell
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


Beginning = Callable[[], tuple[TrainState, dict[str, Any] | None]]


def train(
    config: Config | str | Path,
    overrides: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    profile: tuple[int, int] | None = None,
) -> Run:
    """Trains a run, or goes on with it where it stopped, and returns it.

    `config` is a Config or the path of a file that defines one; `overrides` maps field paths to values
    ({"model.n_layers": 6}). `profile` asks for a trace of the device from after one step to after another, in the
    run's folder `profile`. Raises InputError before anything is written, and Interrupted after a signal that ends runs.
    """
    if directory is not None:
        overrides = {**(overrides or {}), "directory": str(directory)}
    config = config_lib.resolve(config, overrides)
    return _trained([config], Profile(config, profile))[0]


def train_seeds(
    config: Config | str | Path,
    seeds: Sequence[int],
    overrides: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
) -> list[Run]:
    """Trains runs that differ in nothing but their seed together, as one program, or goes on with them.

    Each is a run of its own in directory/seed-SEED, and but for rounding what it would be alone: meant for an
    accelerator that one small run leaves idle. Those that have a checkpoint go on with those that they were trained
    with last, so that other seeds may be added to them. Raises as `train` does.
    """
    if directory is not None:
        overrides = {**(overrides or {}), "directory": str(directory)}
    if not seeds or len(set(seeds)) != len(seeds):
        raise InputError(f"seeds={list(seeds)} must be one or more, each once")
    first = config_lib.resolve(config, overrides)
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
    config = config_lib.resolve(config, overrides)
    set_flags()
    check_numerics()
    prepared = checked_data(config)
    recipe, hyper = recipe_of(config, prepared.tokenizer, prepared.classes), hyper_of(config)

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        check_arrays(recipe, batch)
        check_ids(np.asarray(batch["tokens"]), recipe.model.vocab_size)
        state, metrics = train_steps(recipe, state, jax.tree.map(lambda a: a[None], batch), np.int32(1), hyper)
        return state, jax.tree.map(lambda a: a[0], metrics)

    state, _ = _beginning(config, prepared, _source_of(config))()
    return state, step, batches_of(config, prepared).at


def _trained(configs: Sequence[Config], trace: Profile) -> list[Run]:
    """A run, or several that differ in their seed and directory."""
    configs = as_begun(configs)
    for writer in configs[0].writers:
        writer.require()
    set_flags()
    check_numerics()
    with logging_redirect_tqdm(), contextlib.ExitStack() as claims:
        prepared = checked_data(configs[0])
        for config in configs:
            check_directory(config, prepared)  # of all, before anything is written to one
        new = any(not has_checkpoint(Path(config.directory)) for config in configs)
        source = _source_of(configs[0]) if new else None  # what others began with is not needed
        begins = [_beginning(config, prepared, source) for config in configs]
        for config in configs:
            claims.enter_context(claimed(config, prepared))
        found: dict[int, Run] = {}
        for group in _groups(configs):
            runs = _train([configs[i] for i in group], prepared, [begins[i] for i in group], trace)
            found |= zip(group, runs, strict=True)
        return [found[i] for i in range(len(configs))]


def _groups(configs: Sequence[Config]) -> list[list[int]]:
    """The indices of those that train together: of the runs begun, the same as at their last start; and all new ones.

    Others would have other steps, and other bits than if nothing had interrupted them.
    """
    groups: dict[tuple[int, ...] | None, list[int]] = {}
    for i, config in enumerate(configs):
        begun = last_seeds(starts_of(config)) if starts_of(config).exists() else None
        groups.setdefault(begun, []).append(i)
    for begun, group in groups.items():  # in the order of then
        order = {seed: place for place, seed in enumerate(begun or ())}
        group.sort(key=lambda i, order=order: order.get(configs[i].train.seed, i))
    return list(groups.values())


def _train(configs: Sequence[Config], prepared: Prepared, begins: Sequence[Beginning], profile: Profile) -> list[Run]:
    config, directories = configs[0], [Path(config.directory) for config in configs]
    knobs, members = config.train, Members(configs, prepared)
    keep = knobs.keep if len(configs) == 1 else max(knobs.keep, 2)  # a kill between two saves leaves a step to all
    with collected() as received, contextlib.ExitStack() as stack:
        places = [directory / "checkpoints" for directory in directories]
        saved = [stack.enter_context(contextlib.closing(CheckpointWriter(place, keep))) for place in places]
        states, starts = restore_together(saved, abstract_state(config, members.recipe)), []
        if states is None:
            if (directories[0] / "metrics.jsonl").exists():
                log.warning("%s holds no checkpoint: the run begins anew", directories[0])
            states, starts = zip(*(begin() for begin in begins), strict=True)
            tell_beginning(config)
        opened = zip(configs, states, strict=True)
        runs = [Run(each, prepared.tokenizer, state, prepared.classes) for each, state in opened]
        step = int(states[0].step)
        if step >= knobs.steps and not any(owed(configs, saved, step)):
            log.info("%s is finished: it has made %d of %d steps", directories[0], step, knobs.steps)
            if received:
                raise Interrupted(received[0], step)
            return runs
        tell_changes(config, step)
        for each, checkpoints in zip(configs, saved, strict=True):
            stored = Path(each.directory) / "config.json"
            config_lib.save(each, stored, config_lib.format_of(stored))
            record_start(each, step, [own.train.seed for own in configs], devices_of(states))
            checkpoints.forget_after(step)
        summarize(runs, prepared)
        for report, directory in zip(starts, directories, strict=False):
            if report:
                tell(report, directory)
        state = members.together(states)

        with contextlib.closing(Reports(configs, step)) as reports, contextlib.closing(profile):
            pauses = Pauses(runs, members, saved, reports, received)
            pauses.catch_up(step, state)
            buffer = members.buffer(step)
            if step < knobs.steps and not received:
                reports.pause("compiling")
                members.call(state, buffer, 0)  # so that no row counts that as training
            reports.resume()
            profile.reach(step, state)
            while step < knobs.steps and not received:
                most = min(until_pause(config, step), members.same_shapes(step))
                count = profile.until_pause(step, most)
                state, rows = members.call(state, buffer, count)
                tokens = members.real_tokens(buffer, count)
                step += count
                buffer = members.buffer(step)  # while the device works
                reports.add(step, count, tokens, rows)
                profile.reach(step, state)
                pauses.after(step, state)
            if received:
                pauses.save(step, state)
    if received:
        raise Interrupted(received[0], step)
    log.info("done: %d steps in %s", step, ", ".join(map(str, directories)))
    return [dataclasses.replace(run, state=own) for run, own in zip(runs, members.apart(state), strict=True)]


def _source_of(config: Config) -> Run | None:
    """The run that another begins with, opened before anything is written, so that a wrong one is refused."""
    return None if config.init_from is None else open_source(config.init_from)


def _beginning(config: Config, prepared: Prepared, source: Run | None) -> Beginning:
    """Makes the state before the first step, and the report of a warm start."""
    recipe, hyper = recipe_of(config, prepared.tokenizer, prepared.classes), hyper_of(config)
    if source is None:
        return lambda: (init_state(recipe, hyper), None)
    report = compare(recipe.model, source, source.tokenizer == prepared.tokenizer)
    return lambda: (take(init_state(recipe, hyper), source, report), report)
