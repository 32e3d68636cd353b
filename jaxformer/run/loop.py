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
from jaxformer.data.datasets import Batch, Prepared, Tokens, check_ids, prepare
from jaxformer.platform import check_numerics, set_flags
from jaxformer.run.checkpoint import Checkpoints
from jaxformer.run.directory import claimed, noticed
from jaxformer.run.metrics import Reports, record_start
from jaxformer.run.opened import Run, abstract_state, evaluate, hyper_of, recipe_of
from jaxformer.run.step import Hyper, Recipe, TrainState, init_state, train_steps
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


class Interrupted(KeyboardInterrupt):
    """A signal ended the run, after its state was saved."""

    def __init__(self, signum: int, step: int):
        super().__init__(f"{signal.Signals(signum).name} at step {step}; the state is saved, the same command goes on")
        self.signum = signum


def train(
    config: Config | str | Path, overrides: Mapping[str, Any] | None = None, directory: str | Path | None = None
) -> Run:
    """Trains a run, or goes on with it where it stopped, and returns it.

    `config` is a Config or the path of a file that defines one; `overrides` maps field paths to values
    ({"model.n_layers": 6}). Raises InputError before anything is written, and Interrupted after SIGINT or SIGTERM.
    """
    if directory is not None:
        overrides = {**(overrides or {}), "directory": str(directory)}
    config = config_lib.resolve(config, overrides)
    set_flags()
    check_numerics()
    prepared = prepare(config.data.corpus, config.data.tokenizer)
    tokens, valid = _splits(config, prepared)
    recipe_of(config, prepared.tokenizer)  # raises before anything is written
    with claimed(config, prepared), logging_redirect_tqdm():
        return _train(config, prepared, tokens, valid)


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
    prepared = prepare(config.data.corpus, config.data.tokenizer)
    tokens, _ = _splits(config, prepared)
    recipe, hyper = recipe_of(config, prepared.tokenizer), hyper_of(config)

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Any]:
        check_ids(np.asarray(batch["tokens"]), recipe.model.vocab_size)
        state, metrics = train_steps(recipe, state, jax.tree.map(lambda a: a[None], batch), np.int32(1), hyper)
        return state, {name: values[0] for name, values in metrics.items()}

    return init_state(recipe, hyper), step, lambda i: _batch_at(config, tokens, i)


def _train(config: Config, prepared: Prepared, tokens: Tokens, valid: Tokens) -> Run:
    directory, knobs = Path(config.directory), config.train
    recipe, hyper = recipe_of(config, prepared.tokenizer), hyper_of(config)
    with _signals() as received, contextlib.closing(Checkpoints(directory / "checkpoints", knobs.keep)) as checkpoints:
        state = checkpoints.restore_newest(abstract_state(config, recipe))
        if state is None and (directory / "metrics.jsonl").exists():
            log.warning("%s holds no checkpoint: the run begins anew", directory)
        run = Run(config, prepared.tokenizer, init_state(recipe, hyper) if state is None else state)
        step, best = int(run.state.step), checkpoints.best()
        if step >= knobs.steps:
            log.info("%s is finished: it has made %d of %d steps", directory, step, knobs.steps)
            return run
        for path, change in noticed(config).items():
            log.warning("%s was %s and is %s from here on", path, *change)
        config_lib.save(config, directory / "config.json")
        record_start(directory / "starts.jsonl", step)
        _summarize(run, tokens, valid)
        buffer = _buffer(config, tokens, step)
        call = _compile(recipe, run.state, buffer, hyper)

        with contextlib.closing(Reports(config, step)) as reports:
            state, stop = run.state, False
            while step < knobs.steps and not stop:
                count = _until_pause(config, step)
                state, rows = call(state, buffer, np.int32(count), hyper)
                step += count
                buffer = _buffer(config, tokens, step)  # while the device works
                reports.add(step, count, rows)
                stop = bool(received)
                evaluates = step % knobs.eval_every == 0 or step == knobs.steps
                saves = step % knobs.save_every == 0 or step == knobs.steps or stop
                if not (evaluates or saves):
                    continue
                reports.drain()
                loss = None
                if evaluates:
                    loss = evaluate(recipe, state.params, valid, config)
                    reports.write(step=step, split="valid", loss=loss)
                    log.info("step %d: validation loss %.4f", step, loss)
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


def _compile(recipe: Recipe, state: TrainState, buffer: Batch, hyper: Hyper) -> Callable[..., tuple[TrainState, Any]]:
    """`train_steps` ahead of time, so that no row counts compilation as training."""
    started = time.perf_counter()
    compiled = train_steps.lower(recipe, state, buffer, np.int32(1), hyper).compile()
    log.info("%-10s %.1f s", "compiled in", time.perf_counter() - started)
    return compiled


# --- data of a step


def _splits(config: Config, prepared: Prepared) -> tuple[Tokens, Tokens]:
    tokens, valid = prepared.split(config.data.valid_fraction)
    if len(tokens) <= config.window or len(valid) < 2:
        raise InputError(
            f"data.corpus={config.data.corpus} has {len(prepared.tokens)} tokens, {len(tokens)} for training and "
            f"{len(valid)} for validation; it needs more than the window of {config.window} and at least 2: "
            "give more text, or a smaller data.window"
        )
    return tokens, valid


def _batch_at(config: Config, tokens: Tokens, step: int) -> Batch:
    rows = np.arange(config.data.batch_size)
    return config.data.sampling.batch_at(tokens, config.window, config.train.seed, step, rows)


def _buffer(config: Config, tokens: Tokens, step: int) -> Batch:
    """The batches of the next call, stacked: [K, B, ...]."""
    size = min(config.train.steps_per_call, config.train.steps)
    batches = [_batch_at(config, tokens, step + i) for i in range(size)]
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}


def _until_pause(config: Config, step: int) -> int:
    """Steps of the next call: at most up to the next evaluation, save or end."""
    knobs = config.train
    pauses = (knobs.eval_every - step % knobs.eval_every, knobs.save_every - step % knobs.save_every)
    return min(knobs.steps_per_call, knobs.steps - step, *pauses)


# --- what a user sees


def _summarize(run: Run, tokens: Tokens, valid: Tokens) -> None:
    config, model, device = run.config, run.model, jax.devices()[0]
    n_params = sum(a.size for a in jax.tree.leaves(run.state.params))
    rows = {
        "run": f"{config.directory}, step {int(run.state.step)} of {config.train.steps}",
        "device": f"{jax.device_count()} × {device.platform} ({device.device_kind})",
        "model": f"{type(model).__name__}, {n_params:,} parameters, vocabulary {model.vocab_size}",
        "attention": f"{type(model.kernel).__name__}, in XLA",
        "dtypes": f"parameters float32, compute {config.train.compute_dtype}",
        "data": f"{len(tokens):,} tokens for training, {len(valid):,} for validation",
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
