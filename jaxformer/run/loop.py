"""The story of a run: it starts or goes on, trains, evaluates, saves, and stops when told to."""

import contextlib
import dataclasses
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.contrib.logging import logging_redirect_tqdm

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.batches import Batch, Batches
from jaxformer.data.datasets import Prepared, check_ids
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.directory import claimed, has_checkpoint, noticed
from jaxformer.run.metrics import Profile, Reports, record_start
from jaxformer.run.opened import Run, abstract_state, evaluate, hyper_of, prepare_data, recipe_of
from jaxformer.run.step import Hyper, Recipe, TrainState, init_state, train_steps
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
    for writer in config.writers:
        writer.require()
    set_flags()
    check_numerics()
    trace = Profile(config, profile)
    with logging_redirect_tqdm():
        prepared = _checked(config, prepare_data(config))
        saved = has_checkpoint(Path(config.directory))  # then what it began with is not needed
        begin = _beginning(dataclasses.replace(config, init_from=None) if saved else config, prepared)
        with claimed(config, prepared):
            return _train(config, prepared, begin, trace)


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
    prepared = _checked(config, prepare_data(config))
    recipe, hyper = recipe_of(config, prepared.tokenizer), hyper_of(config)

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        check_ids(np.asarray(batch["tokens"]), recipe.model.vocab_size)
        state, metrics = train_steps(recipe, state, jax.tree.map(lambda a: a[None], batch), np.int32(1), hyper)
        return state, jax.tree.map(lambda a: a[0], metrics)

    state, _ = _beginning(config, prepared)()
    return state, step, _batches(config, prepared).at


def _train(config: Config, prepared: Prepared, begin: Beginning, profile: Profile) -> Run:
    directory, knobs = Path(config.directory), config.train
    recipe, hyper = recipe_of(config, prepared.tokenizer), hyper_of(config)
    with _signals() as received, contextlib.closing(Checkpoints(directory / "checkpoints", knobs.keep)) as checkpoints:
        state = checkpoints.restore_newest(abstract_state(config, recipe))
        if state is None and (directory / "metrics.jsonl").exists():
            log.warning("%s holds no checkpoint: the run begins anew", directory)
        report = None
        if state is None:
            state, report = begin()
        run = Run(config, prepared.tokenizer, state)
        step, best = int(run.state.step), checkpoints.best()
        if step >= knobs.steps:
            log.info("%s is finished: it has made %d of %d steps", directory, step, knobs.steps)
            return run
        for path, change in noticed(config).items():
            log.warning("%s was %s and is %s from here on", path, *change)
        config_lib.save(config, directory / "config.json")
        record_start(directory / "starts.jsonl", step)
        _summarize(run, prepared)
        if report:
            tell(report, directory)
        batches = _batches(config, prepared)
        buffer = _buffer(config, batches, step)
        call = _compile(recipe, state, buffer, hyper)

        with contextlib.closing(Reports(config, step)) as reports, contextlib.closing(profile):
            stop = False
            profile.reach(step, state)
            while step < knobs.steps and not stop:
                count = profile.until_pause(step, _until_pause(config, step))
                state, rows = call(state, buffer, np.int32(count), hyper)
                step += count
                buffer = _buffer(config, batches, step)  # while the device works
                reports.add(step, count, rows)
                profile.reach(step, state)
                stop = bool(received)
                evaluates = step % knobs.eval_every == 0 or step == knobs.steps
                saves = step % knobs.save_every == 0 or step == knobs.steps or stop
                if not (evaluates or saves):
                    continue
                reports.drain()
                loss = None
                if evaluates:
                    found = evaluate(recipe, state.eval_params, prepared.valid, config, prepared.tokenizer)
                    reports.write(step=step, split="valid", **found)
                    loss, bits = found["loss"], found["bits_per_byte"]
                    more = "" if bits is None else f", {bits:.4f} bits per byte"
                    log.info("step %d: validation loss %.4f%s", step, loss, more)
                    if math.isfinite(loss) and (best is None or loss < best[1]):
                        best, saves = (step, loss), True
                if saves:
                    checkpoints.save(state, step, loss)
                if evaluates:
                    _show_sample(dataclasses.replace(run, state=state))
                reports.resume()
    if stop and step < knobs.steps:
        raise Interrupted(received[0], step)
    log.info("done: %d steps in %s", step, directory)
    return dataclasses.replace(run, state=state)


def _beginning(config: Config, prepared: Prepared) -> Beginning:
    """Makes the state before the first step, and the report of a warm start.

    The run to start from is opened now, so that a wrong one is refused before anything is written.
    """
    recipe, hyper = recipe_of(config, prepared.tokenizer), hyper_of(config)
    if config.init_from is None:
        return lambda: (init_state(recipe, hyper), None)
    source = open_source(config.init_from)
    report = compare(recipe.model, source, source.tokenizer == prepared.tokenizer)
    return lambda: (take(init_state(recipe, hyper), source, report), report)


def _compile(recipe: Recipe, state: TrainState, buffer: Batch, hyper: Hyper) -> Callable[..., tuple[TrainState, Any]]:
    """`train_steps` ahead of time, so that no row counts compilation as training."""
    started = time.perf_counter()
    compiled = train_steps.lower(recipe, state, buffer, np.int32(1), hyper).compile()
    log.info("%-10s %.1f s", "compiled in", time.perf_counter() - started)
    return compiled


# --- data of a step


def _checked(config: Config, prepared: Prepared) -> Prepared:
    """Raises InputError for data of which no row can be drawn, or nothing validated; and for a wrong vocabulary."""
    recipe_of(config, prepared.tokenizer)
    sampling, more = config.data.sampling, "give more text, or a smaller data.window"
    for (corpus, _), source in zip(config.data.corpus.parts(), prepared.train, strict=True):
        try:
            sampling.check_source(source, config.window)
        except InputError as error:
            raise InputError(f"data.corpus={corpus}: has for training {error}; {more}") from None
    passes = (sampling.full_pass(source, config.window, 1) for source in prepared.valid)
    if not any(next(batches, None) for batches in passes):
        data = config.data
        which = f"data.corpus={data.corpus}" if data.valid is None else f"data.valid={data.valid}"
        remedy = "give more text" + (", or a larger data.valid_fraction" if data.valid is None else "")
        raise InputError(f"{which}: has for validation no 2 tokens, one of which predicts the other; {remedy}")
    return prepared


def _batches(config: Config, prepared: Prepared) -> Batches:
    data = config.data
    return Batches(prepared.train, prepared.weights, data.sampling, config.window, data.batch_size, config.train.seed)


def _buffer(config: Config, batches: Batches, step: int) -> Batch:
    """The batches of the next call, stacked: [K, B, ...]."""
    size = min(config.train.steps_per_call, config.train.steps)
    found = [batches.at(step + i) for i in range(size)]
    return {name: np.stack([batch[name] for batch in found]) for name in found[0]}


def _until_pause(config: Config, step: int) -> int:
    """Steps of the next call: at most up to the next evaluation, save or end."""
    knobs = config.train
    pauses = (knobs.eval_every - step % knobs.eval_every, knobs.save_every - step % knobs.save_every)
    return min(knobs.steps_per_call, knobs.steps - step, *pauses)


# --- what a user sees


def _summarize(run: Run, prepared: Prepared) -> None:
    config, model, device = run.config, run.model, jax.devices()[0]
    n_params = sum(a.size for a in jax.tree.leaves(run.state.params))
    counts = prepared.manifest
    rows = {
        "run": f"{config.directory}, step {int(run.state.step)} of {config.train.steps}",
        "device": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "model": f"{type(model).__name__}, {n_params:,} parameters, vocabulary {model.vocab_size}",
        "attention": f"{type(model.kernel).__name__}, in XLA",
        "dtypes": f"parameters float32, compute {config.train.compute_dtype}",
        "data": f"{counts['train_tokens']:,} tokens for training, {counts['valid_tokens']:,} for validation",
        "step": f"{config.data.batch_size * config.window:,} tokens; {config.train.steps_per_call} steps per call",
    }
    for name, text in rows.items():
        log.info("%-10s %s", name, text)


def _show_sample(run: Run) -> None:
    if tokens := run.config.train.sample_tokens:
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
