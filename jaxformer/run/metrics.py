"""What a run reports: rows of metrics.jsonl, a progress bar, and a record of each start."""

import collections
import contextlib
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from jaxformer.config import Config
from jaxformer.data.files import write
from jaxformer.spec import InputError, to_json
from jaxformer.writers import Sink

log = logging.getLogger(__name__)


class Rows:
    """The rows of one run, to metrics.jsonl and the config's writers. One that goes on from a step drops those after
    it."""

    def __init__(self, config: Config, step: int):
        path = Path(config.directory) / "metrics.jsonl"
        last = _drop_rows_after(path, step)
        self.seconds = last.get("seconds", 0.0)  # of training, up to the step
        self._file = open(path, "a")  # noqa: SIM115 (closed by `close`)
        self._sinks: dict[str, Sink] = {}
        for writer in config.writers:
            with self._surviving(type(writer).__name__):
                self._sinks[type(writer).__name__] = writer.open(path.parent, to_json(config), step)

    def write(self, **row: Any) -> None:
        """Numbers that are not finite are written as null: JSON has no others."""
        row = finite(row)
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, sink in list(self._sinks.items()):
            with self._surviving(name):
                sink.write(row)

    def close(self) -> None:
        self._file.close()
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
            log.warning("writers: %s failed (%s: %s); the run goes on without it", name, type(error).__name__, error)


class Reports:
    """Takes the metrics of calls as they are dispatched, and writes them to the rows of each run and the bar as they
    arrive. Metrics of several runs have a leading axis for them.

    Never more than two calls are in flight: with more, simulated devices deadlock. Speed and seconds are those of
    training alone, of all runs together; pauses (evaluation, sampling, saving) are left out.
    """

    def __init__(self, configs: Sequence[Config], step: int):
        knobs = configs[0].train
        self._runs = [Rows(config, step) for config in configs]
        self._bar = tqdm(total=knobs.steps, initial=step, unit="step", disable=None, dynamic_ncols=True)
        self._log_every = knobs.log_every
        self._in_flight: collections.deque[tuple[int, int, int, Mapping[str, Any]]] = collections.deque()
        self._seconds, self._elapsed = self._runs[0].seconds, 0.0
        self.resume()

    def resume(self) -> None:
        """Training begins, or goes on after a pause; speed is the mean since then."""
        self._seconds, self._elapsed = self._seconds + self._elapsed, 0.0
        self._since, self._tokens = time.perf_counter(), 0

    def add(self, step: int, count: int, tokens: int, rows: Mapping[str, Any]) -> None:
        """A call of `count` steps up to `step`, of so many tokens, was dispatched; waits until at most one is in
        flight."""
        self._in_flight.append((step, count, tokens, rows))
        if len(self._in_flight) == 2:
            self._report()

    def drain(self) -> None:
        """Waits for all calls."""
        while self._in_flight:
            self._report()

    def write(self, step: int, found: Sequence[Mapping[str, Any]]) -> None:
        """What an evaluation at `step` has found, of each run."""
        for run, row in zip(self._runs, found, strict=True):
            run.write(step=step, split="valid", **row, seconds=round(self._seconds + self._elapsed, 3))

    def close(self) -> None:
        self._bar.close()
        for run in self._runs:
            run.close()

    def _report(self) -> None:
        last, count, tokens, arrays = self._in_flight.popleft()
        rows = jax.tree.map(np.asarray, arrays)  # waits
        self._tokens += tokens
        self._elapsed = time.perf_counter() - self._since
        speed, seconds = self._tokens / self._elapsed, round(self._seconds + self._elapsed, 3)
        for i, step in enumerate(range(last - count + 1, last + 1)):
            if step % self._log_every == 0:
                for member, run in enumerate(self._runs):
                    at = (member, i) if len(self._runs) > 1 else i
                    row = jax.tree.map(lambda values, at=at: values[at].tolist(), rows)
                    speeds = {"tokens_per_second": round(speed), "seconds": seconds}
                    run.write(step=step, split="train", loss=row.pop("loss"), **row, **speeds)
        loss = rows["loss"][..., count - 1].mean()
        self._bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)
        self._bar.update(count)


class Profile:
    """A trace of the device, from after one step to after another, in the run's folder profile (openxla.org/xprof)."""

    def __init__(self, config: Config, span: tuple[int, int] | None):
        if span and not 0 <= span[0] < span[1] <= config.train.steps:
            raise InputError(f"profile={span[0]}:{span[1]} must be START:STOP with 0 ≤ START < STOP ≤ train.steps")
        self._directory, self._span, self._running = Path(config.directory) / "profile", span, False

    def until_pause(self, step: int, most: int) -> int:
        """Steps to where the trace begins or ends, at most `most`."""
        return min([most, *(at - step for at in self._span or () if at > step)])

    def reach(self, step: int, state: Any) -> None:
        """To be called when the state after `step` was dispatched; begins the trace there, or ends it."""
        if not self._span or step < self._span[0] or (self._running and step < self._span[1]):
            return
        jax.block_until_ready(state)
        if self._running:
            self.close()
        elif step >= self._span[1]:
            log.warning("profile=%d:%d lies before step %d, at which the run goes on: no trace", *self._span, step)
            self._span = None
        else:
            jax.profiler.start_trace(self._directory)
            self._running = True

    def close(self) -> None:
        if self._running:
            self._running, self._span = False, None
            jax.profiler.stop_trace()
            log.info("trace of the device in %s", self._directory)


def finite(value: Any) -> Any:
    """The value with None where a number is not finite."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_rows_after(path: Path, step: int) -> dict[str, Any]:
    """The last row that is left."""
    text = path.read_text(errors="replace") if path.exists() else ""
    kept, unread, last = [], 0, {}
    for line in text.split("\n"):
        try:
            row = json.loads(line)
            if row["step"] <= step:
                kept.append(line + "\n")
                last = row
        except (ValueError, KeyError, TypeError):
            unread += bool(line.strip())
    if unread:
        log.warning("%s: %d lines that are no rows are dropped, as a killed process may leave one", path, unread)
    write(path, "".join(kept))
    return last


def record_start(path: Path, step: int, seeds: Sequence[int]) -> None:
    """Appends to starts.jsonl what the numbers of a run may depend on besides its config; `seeds` are those of the
    runs trained together, its own among them."""
    packages = ("jaxformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "seeds": list(seeds),
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": {name: _version(name) for name in packages},
        "devices": [f"{d.platform}:{d.device_kind}" for d in jax.devices()],
        "processor": processor(),
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "git": _git(),
    }
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def last_seeds(path: Path) -> tuple[int, ...]:
    """The seeds of the last start, () if none can be read."""
    try:
        return tuple(last_start(path)["seeds"])
    except (OSError, ValueError, LookupError, TypeError):
        return ()


def last_start(path: Path) -> dict[str, Any]:
    """What `record_start` appended last."""
    return json.loads(path.read_text().splitlines()[-1])


def processor() -> str:
    """The machine's, and how many of its cores this process may use."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1] if found else platform.processor()}, {cores} cores"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """Commit of the working directory, with -dirty behind it if files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
