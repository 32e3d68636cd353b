"""The story of a run: it starts or goes on, trains, evaluates, saves, and stops when told to."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.batches import Batch, Examples
from jaxformer.data.datasets import Prepared
from jaxformer.data.sources import check_ids
from jaxformer.model.models import Decoder
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import Checkpoints, restore_together
from jaxformer.run.checks import checked_data, rank_of
from jaxformer.run.directory import check_directory, claimed, has_checkpoint, noticed
from jaxformer.run.members import Members, batches_of
from jaxformer.run.metrics import Profile, Reports, last_seeds, record_start
from jaxformer.run.opened import Run
from jaxformer.run.plan import abstract_state, hyper_of, recipe_of
from jaxformer.run.step import TrainState, init_state, train_steps
from jaxformer.run.warm_start import compare, open_source, take, tell
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


Beginning = Callable[[], tuple[TrainState, dict[str, Any] | None]]


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, after its state was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}; the state is saved, the same command goes on")
        self.signum = signum


def train(
    config: Config | str | Path,
    overrides: Mapping[str, Any] | None = None,
    directory: str | Path | None = None,
    profile: tuple[int, int] | None = None,
) -> Run:
    """Trains a run, or goes on with it where it stopped, and returns it.

    `config` is a Config or the path of a file that defines one; `overrides` maps field paths to values
    ({"model.n_layers": 6}). `profile` asks for a trace of the device from after one step to after another, in the
    run's folder `profile`. Raises InputError before anything is written, and Interrupted after SIGINT or SIGTERM.
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
    sampling = config.data.sampling
    if isinstance(sampling, Examples) and sampling.n_buckets > 1 and count > 1:
        raise InputError(
            f"data.sampling.n_buckets={sampling.n_buckets} gives every seed rows of another width, and seeds trained "
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
        check_ids(np.asarray(batch["tokens"]), recipe.model.vocab_size)
        state, metrics = train_steps(recipe, state, jax.tree.map(lambda a: a[None], batch), np.int32(1), hyper)
        return state, jax.tree.map(lambda a: a[0], metrics)

    state, _ = _beginning(config, prepared, _source_of(config))()
    return state, step, batches_of(config, prepared).at


def _trained(configs: Sequence[Config], trace: Profile) -> list[Run]:
    """A run, or several that differ in their seed and directory."""
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
    for i, directory in enumerate(Path(config.directory) for config in configs):
        begun = last_seeds(directory / "starts.jsonl") if has_checkpoint(directory) else None
        groups.setdefault(begun, []).append(i)
    for begun, group in groups.items():  # in the order of then
        order = {seed: place for place, seed in enumerate(begun or ())}
        group.sort(key=lambda i, order=order: order.get(configs[i].train.seed, i))
    return list(groups.values())


def _train(configs: Sequence[Config], prepared: Prepared, begins: Sequence[Beginning], profile: Profile) -> list[Run]:
    config, directories = configs[0], [Path(config.directory) for config in configs]
    knobs, members = config.train, Members(configs, prepared)
    keep = knobs.keep if len(configs) == 1 else max(knobs.keep, 2)  # a kill between two saves leaves a step to all
    with _signals() as received, contextlib.ExitStack() as stack:
        places = [directory / "checkpoints" for directory in directories]
        saved = [stack.enter_context(contextlib.closing(Checkpoints(place, keep))) for place in places]
        states, starts = restore_together(saved, abstract_state(config, members.recipe)), []
        if states is None:
            if (directories[0] / "metrics.jsonl").exists():
                log.warning("%s holds no checkpoint: the run begins anew", directories[0])
            states, starts = zip(*(begin() for begin in begins), strict=True)
        opened = zip(configs, states, strict=True)
        runs = [Run(each, prepared.tokenizer, state, prepared.classes) for each, state in opened]
        step = int(states[0].step)
        if step >= knobs.steps:
            log.info("%s is finished: it has made %d of %d steps", directories[0], step, knobs.steps)
            if received:
                raise Interrupted(received[0], step)
            return runs
        for path, change in noticed(config).items():
            log.warning("%s was %s and is %s from here on", path, *change)
        seeds = [config.train.seed for config in configs]
        for each, directory, checkpoints in zip(configs, directories, saved, strict=True):
            config_lib.save(each, directory / "config.json")
            record_start(directory / "starts.jsonl", step, seeds)
            checkpoints.forget_after(step)
        best = [checkpoints.best_rank() for checkpoints in saved]
        _summarize(runs, prepared)
        for report, directory in zip(starts, directories, strict=False):
            if report:
                tell(report, directory)
        state, buffer = members.together(states), members.buffer(step)
        members.call(state, buffer, 0)  # compiles, so that no row counts that as training

        with contextlib.closing(Reports(configs, step)) as reports, contextlib.closing(profile):
            stop = False
            profile.reach(step, state)
            while step < knobs.steps and not stop:
                count = profile.until_pause(step, min(_until_pause(config, step), members.same_shapes(step)))
                state, rows = members.call(state, buffer, count)
                tokens = members.real_tokens(buffer, count)
                step += count
                buffer = members.buffer(step)  # while the device works
                reports.add(step, count, tokens, rows)
                profile.reach(step, state)
                stop = bool(received)
                evaluates = step % knobs.eval_every == 0 or step == knobs.steps
                saves = step % knobs.save_every == 0 or step == knobs.steps or stop
                if not (evaluates or saves):
                    continue
                reports.drain()
                ranks = [None] * len(runs)
                if evaluates:
                    found = members.evaluate(state)
                    reports.write(step, found)
                    ranks = [rank_of(config, row) for row in found]
                    log.info("step %d: validation %s", step, _sentence(found))
                    for i, rank in enumerate(ranks):
                        if math.isfinite(rank) and rank < best[i]:
                            best[i], saves = rank, True
                if saves:
                    for checkpoints in saved:  # so that the step before this one is on disk for all
                        checkpoints.wait()
                    for checkpoints, own, rank in zip(saved, members.apart(state), ranks, strict=True):
                        checkpoints.save(own, step, rank)
                if evaluates and knobs.sample_tokens:
                    _show_sample(dataclasses.replace(runs[0], state=next(members.apart(state))), prepared)
                reports.resume()
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


def _until_pause(config: Config, step: int) -> int:
    """Steps of the next call: at most up to the next evaluation, save or end."""
    knobs = config.train
    pauses = (knobs.eval_every - step % knobs.eval_every, knobs.save_every - step % knobs.save_every)
    return min(knobs.steps_per_call, knobs.steps - step, *pauses)


# --- what a user sees


def _summarize(runs: Sequence[Run], prepared: Prepared) -> None:
    run, device = runs[0], jax.devices()[0]
    config, model = run.config, run.model
    n_params = sum(a.size for a in jax.tree.leaves(run.state.params))
    counts = prepared.manifest
    stacks = [model.kinds(name) for name in model.stacks] if isinstance(model, Decoder) else []
    kernels = {type(kind.kernel).__name__ for kinds in stacks for kind in kinds if kind.kernel}
    rows = {"together": "seeds " + ", ".join(str(run.config.train.seed) for run in runs)} if len(runs) > 1 else {}
    rows |= {
        "run": f"{config.directory}, step {int(run.state.step)} of {config.train.steps}",
        "device": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "model": f"{type(model).__name__}, {n_params:,} parameters, vocabulary {model.vocab_size}",
        "attention": f"{', '.join(sorted(kernels)) or 'none'}, in XLA",
        "dtypes": f"parameters float32, compute {config.train.compute_dtype}",
        "data": f"{counts['train_tokens']:,} tokens for training, {counts['valid_tokens']:,} for validation",
        "step": f"{config.data.batch_size * config.window:,} tokens; {config.train.steps_per_call} steps per call",
    }
    for name, text in rows.items():
        log.info("%-10s %s", name, text)


def _sentence(found: Sequence[Mapping[str, Any]]) -> str:
    """Each number, of several runs the mean and the range."""
    parts: list[str] = []
    for name in (name for name, value in found[0].items() if isinstance(value, float)):
        values = [row[name] for row in found]
        spread = f" ({min(values):.4f} to {max(values):.4f})" if len(values) > 1 else ""
        parts.append(f"{name.replace('_', ' ')} {sum(values) / len(values):.4f}{spread}")
    return ", ".join(parts)


def _show_sample(run: Run, prepared: Prepared) -> None:
    tokens = run.config.train.sample_tokens
    if not run.writes:
        return
    if run.model.encodes and prepared.valid[0].texts == 2:
        log.info("%s", run.show(prepared.valid[0]))
    elif not run.model.encodes:
        log.info("%s", run.sample(tokens=tokens, temperature=0.8, seed=run.config.train.seed))


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of dying of them. Outside the main thread, they stay as they are."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, frame: Any) -> None:
        received.append(signum)
        log.warning("%s: saving, then stopping", signal.Signals(signum).name)

    old = {signum: signal.signal(signum, note) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
