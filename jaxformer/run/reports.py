"""What is said of a run while it trains: rows, a progress bar or lines in its place, and warnings."""

import collections
import contextlib
import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any, TypeGuard

import jax
import numpy as np
from tqdm import tqdm

from jaxformer.config import Config
from jaxformer.platform import in_notebook
from jaxformer.run.metrics import DIVERGED, Rows
from jaxformer.run.peaks import peak_memory, peak_of
from jaxformer.spec import counted

log = logging.getLogger(__name__)

QUIET = 50.0  # seconds between two lines where there is no terminal for a bar
_alone, _handlers, _runs = threading.Lock(), contextlib.ExitStack(), 0


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Lines of the run are shown on stderr, beside the bar, unless the program has its own way with them.

    It has if it has set the level of the logger "jaxformer" or of the root, or has given a handler to either; one for
    the console that the root has may be a kernel's, or Orbax's, and says nothing of the program. When the run ends,
    of several threads the last one, level and handlers are as they were.
    """
    global _runs
    with _alone:
        if not _runs:
            _handlers.enter_context(_beside())
        _runs += 1
    try:
        yield
    finally:
        with _alone:
            _runs -= 1
            if not _runs:
                _handlers.close()


@contextlib.contextmanager
def _beside() -> Iterator[None]:
    root, own = logging.getLogger(), logging.getLogger("jaxformer")
    before = [(logger, logger.handlers) for logger in (root, own)]
    usual = root.level == logging.WARNING and all(map(_is_console, root.handlers))
    undecided = own.level == logging.NOTSET and not own.handlers and usual
    try:
        for logger, handlers in before:
            logger.handlers = [_Beside(handler) if _is_console(handler) else handler for handler in handlers]
        if undecided:
            own.handlers, own.propagate = [_Beside(logging.StreamHandler())], False
            own.setLevel(logging.INFO)
        yield
    finally:
        if undecided:
            own.propagate = True
            own.setLevel(logging.NOTSET)
        for logger, handlers in before:
            logger.handlers = handlers


def _is_console(handler: logging.Handler) -> TypeGuard[logging.StreamHandler[Any]]:
    return isinstance(handler, logging.StreamHandler) and handler.stream in (sys.stdout, sys.stderr)


class _Beside(logging.StreamHandler):
    """Writes what another handler would, and the bar anew below. (tqdm has one, whose import warns in notebooks that
    lack ipywidgets.)"""

    def __init__(self, handler: logging.StreamHandler[Any]):
        super().__init__(handler.stream)
        self.setLevel(handler.level)
        self.setFormatter(handler.formatter)
        self.filters = handler.filters

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=self.stream)
        except Exception:  # as every handler does
            self.handleError(record)


class Reports:
    """Takes the metrics of calls as they are dispatched, and writes them to the rows of each run and the bar as they
    arrive. Metrics of several runs have a leading axis for them.

    Never more than two calls are in flight: with more, simulated devices deadlock. On CPU it is one, since what waits
    for its input does not run inline (`platform.call_inline`). Speed and seconds are those of training alone, of all
    runs together; pauses (evaluation, sampling, saving) are left out.
    """

    def __init__(self, configs: Sequence[Config], step: int, devices: Sequence[Any], skipped: float = 0.0):
        """`skipped` is how many updates of the steps before were."""
        knobs = configs[0].train
        self._devices, self._peak = devices, peak_of(knobs, devices)
        self._runs = [Rows(config, step) for config in configs]
        self._seeds = [config.train.seed for config in configs]
        hidden = False if in_notebook() else None  # None: where stderr is no terminal
        self._bar = tqdm(total=knobs.steps, initial=step, unit="step", disable=hidden, dynamic_ncols=True)
        self._log_every = knobs.log_every
        self._in_flight: collections.deque[tuple[int, int, int, int, Mapping[str, Any]]] = collections.deque()
        self._idle, self._ahead = Idle(), 1 if jax.default_backend() == "cpu" else 2
        self._seconds, self._elapsed = self._runs[0].seconds, 0.0
        self._first, self._begun = step, self._seconds
        self._steps, self._step, self._loss, self._speed = knobs.steps, step, math.nan, 0.0
        self._told: set[str] = set()
        self._most, self._skipped = math.inf if knobs.guard is None else knobs.guard.most, skipped
        # Step, member and loss of the first update too many that was skipped in a row.
        self.failed: tuple[int, int, float] | None = None
        self._doing = ""
        self._lines = Every(QUIET, self._say) if self._bar.disable else None
        self.resume()

    def pause(self, doing: str) -> None:
        """Waits for all calls; training stops for something else."""
        while self._in_flight:
            self._report()
        self._doing = doing

    def resume(self) -> None:
        """Training begins, or continues after a pause; speed is the mean since then."""
        self._seconds, self._elapsed = self._seconds + self._elapsed, 0.0
        self._since, self._tokens, self._flops = time.perf_counter(), 0, 0
        self._idle.begin()
        self._doing = ""

    def timed(self, call: Callable[..., tuple[Any, Any]], *args: Any) -> tuple[Any, Any]:
        """What a call gives that is dispatched to the device; notes how long that had nothing to do before."""
        self._idle.look()
        began = time.perf_counter()
        state, rows = call(*args)
        self._idle.called(began, rows["loss"])
        return state, rows

    def add(self, step: int, count: int, tokens: int, flops: int, rows: Mapping[str, Any]) -> None:
        """A call of `count` steps up to `step`, of so many tokens and operations, was dispatched; waits until at most
        one is in flight, on CPU none."""
        self._idle.look()
        self._in_flight.append((step, count, tokens, flops, rows))
        if len(self._in_flight) == self._ahead:
            self._report()

    def write(self, step: int, split: str, found: Sequence[Mapping[str, Any]]) -> None:
        """What an evaluation at `step` has found, of each run that has not got its row already."""
        for run, row in zip(self._runs, found, strict=True):
            if not run.has(step, split):
                run.write(step=step, split=split, **row, seconds=round(self._seconds + self._elapsed, 3))

    def diverged(self) -> tuple[int, int, float]:
        """`failed`, which is written to the member's rows."""
        assert self.failed is not None
        step, member, _ = self.failed
        self._runs[member].write(step=step, split=DIVERGED, seconds=round(self._seconds + self._elapsed, 3))
        return self.failed

    def close(self) -> None:
        with contextlib.ExitStack() as rows:  # each run's, whatever another's raise
            for run in self._runs:
                rows.callback(run.close)
            if self._lines is not None:
                self._lines.stop()
            self._bar.close()

    def _report(self) -> None:
        last, count, tokens, flops, arrays = self._in_flight.popleft()
        rows = self._idle.fetched(arrays)
        weights = rows.pop("weight", None)
        self._tokens, self._flops = self._tokens + tokens, self._flops + flops
        self._elapsed = time.perf_counter() - self._since
        self._speed = self._tokens / self._elapsed
        speeds = self._speeds()
        self._warn(last - count, rows["loss"][..., :count], weights)
        self._count_skips(last - count, rows["loss"], rows.get("skipped"), rows.pop("skipped_in_a_row", None), count)
        for i, step in enumerate(range(last - count + 1, last + 1)):
            if step % self._log_every == 0:
                for member, run in enumerate(self._runs):
                    at = (member, i) if len(self._runs) > 1 else i
                    row = jax.tree.map(lambda values, at=at: values[at].tolist(), rows)
                    row |= {"skipped": int(row["skipped"])} if "skipped" in row else {}
                    row |= {"weight": 0} if weights is not None and not weights[at] else {}  # nothing was asked
                    run.write(step=step, split="train", loss=row.pop("loss"), **row, **speeds)
        self._step, self._loss = last, float(rows["loss"][..., count - 1].mean())
        self._bar.set_postfix_str(f"loss {self._loss:.3f}, {self._speed:,.0f} tokens/s", refresh=False)
        self._bar.update(count)

    def _speeds(self) -> dict[str, float]:
        """What rows say of time and of the devices (`metrics.CLOCK`), as far as it is known."""
        of_peak = None if self._peak is None else round(self._flops / self._elapsed / self._peak, 4)
        found = {
            "tokens_per_second": round(self._speed),
            "seconds": round(self._seconds + self._elapsed, 3),
            "mfu": of_peak,
            "host": round(self._idle.seconds / self._elapsed, 4),
            "peak_memory": peak_memory(self._devices),
        }
        return {name: value for name, value in found.items() if value is not None}

    def _warn(self, before: int, losses: np.ndarray, weights: np.ndarray | None) -> None:
        """Tells the first batch of which nothing is asked, and the first loss that is no finite number."""
        losses = np.atleast_2d(losses)
        empty = np.zeros(losses.shape, bool) if weights is None else np.atleast_2d(weights)[:, : losses.shape[1]] == 0
        spoils = ": what follows is worth nothing" if math.isinf(self._most) else ""
        told = {
            "empty": (empty, "no token of the batch is asked for (all weights are 0): nothing is learned from it"),
            "loss": (~np.isfinite(losses) & ~empty, f"the loss is {{}}, no finite number{spoils}"),
        }
        for name, (found, sentence) in told.items():
            if found.any() and name not in self._told:
                i = int(found.any(0).argmax())
                member = int(found[:, i].argmax())
                seed = f" of seed {self._seeds[member]}" if len(self._seeds) > 1 else ""
                log.warning("step %d%s: %s", before + i + 1, seed, sentence.format(losses[member, i]))
                self._told.add(name)

    def _count_skips(
        self, before: int, losses: np.ndarray, skipped: np.ndarray | None, in_a_row: np.ndarray | None, count: int
    ) -> None:
        """Tells how many updates a call has skipped, and notes the first that is one too many."""
        if skipped is None or in_a_row is None:
            return
        skipped, in_a_row = (np.atleast_2d(values)[:, :count] for values in (skipped, in_a_row))
        total = float(skipped[:, -1].sum())
        if total > self._skipped:
            first = before + 1 + int((in_a_row > 0).any(0).argmax())
            n = counted(int(total - self._skipped), "update")
            log.warning("from step %d on %s skipped (train.guard), %d in all", first, n, total)
        self._skipped = total
        if self.failed is None and (in_a_row >= self._most).any():
            member, i = min(zip(*np.nonzero(in_a_row >= self._most), strict=True), key=lambda at: at[1])
            self.failed = before + int(i) + 1, int(member), float(np.atleast_2d(losses)[member, i])

    def _say(self) -> None:
        """One line, of what is known by now."""
        made, seconds = self._step - self._first, self._seconds + self._elapsed - self._begun
        left = timedelta(seconds=round((self._steps - self._step) * seconds / max(made, 1)))
        numbers = f"loss {self._loss:.4f}, {self._speed:,.0f} tokens/s, {left} of training left"
        doing = f"; {self._doing}" if self._doing else ""
        log.info("step %d of %d: %s%s", self._step, self._steps, numbers if made else "no step is done yet", doing)


class Idle:
    """How long the device has had nothing to do since `begin`: at most, for that it is through with a call is seen only
    when someone looks. Nothing is waited for but what is `fetched`."""

    def begin(self) -> None:
        self._newest: Any = None
        self.seconds, self._busy = 0.0, time.perf_counter()

    def look(self) -> None:
        if not self._free():
            self._busy = time.perf_counter()  # when it was last seen at work

    def called(self, began: float, out: Any) -> None:
        """A call that gives `out` was dispatched, from `began` until now."""
        now = time.perf_counter()
        if self._free():  # a call that comes back done was at work in its dispatch
            self.seconds += (began if out.is_ready() else now) - self._busy
        self._newest, self._busy = out, now

    def fetched(self, rows: Mapping[str, Any]) -> dict[str, Any]:
        """What a call gives, on the host, which waits for it."""
        done = rows["loss"].is_ready()
        found = jax.tree.map(np.asarray, dict(rows))
        if not done:
            self._busy = time.perf_counter()
        self.look()
        return found

    def _free(self) -> bool:
        return self._newest is None or self._newest.is_ready()


class Every:
    """Calls a function every so many seconds, from a thread of its own, so that it is heard while the device works."""

    def __init__(self, seconds: float, call: Callable[[], None]):
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(seconds, call), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self, seconds: float, call: Callable[[], None]) -> None:
        while not self._done.wait(seconds):
            call()
