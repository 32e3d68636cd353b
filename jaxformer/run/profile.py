"""A trace of the device while a run trains."""

import logging
from pathlib import Path
from typing import Any

import jax

from jaxformer.config import Config
from jaxformer.run.reports import Reports
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


class Profile:
    """A trace of the device, from after one step to after another, in the run's folder profile (openxla.org/xprof)."""

    def __init__(self, config: Config, span: tuple[int, int] | None):
        if span and not 0 <= span[0] < span[1] <= config.train.steps:
            most = f"train.steps={config.train.steps}"
            raise InputError(f"profile={span[0]}:{span[1]} must be START:STOP with 0 ≤ START < STOP ≤ {most}")
        self._directory, self._span, self._running = Path(config.directory) / "profile", span, False

    def until_pause(self, step: int, most: int) -> int:
        """Steps to where the trace begins or ends, at most `most`."""
        return min([most, *(at - step for at in self._span or () if at > step)])

    def reach(self, step: int, state: Any, reports: Reports) -> None:
        """To be called when the state after `step` was dispatched; begins the trace there, or ends it, in time that the
        reports do not count."""
        if not self._span or step < self._span[0] or (self._running and step < self._span[1]):
            return
        reports.pause("tracing")
        jax.block_until_ready(state)
        if self._running:
            self.close()
        elif step >= self._span[1]:
            log.warning("profile=%d:%d lies before step %d, at which the run resumes: no trace", *self._span, step)
            self._span = None
        else:
            jax.profiler.start_trace(self._directory)
            self._running = True
        reports.resume()

    def close(self) -> None:
        if self._running:
            self._running, self._span = False, None
            jax.profiler.stop_trace()
            log.info("trace of the device in %s", self._directory)
