"""Is a model sound? Properties that must hold of every config, tried on a small version of it."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.lab.devices import agrees, meshes
from jaxformer.lab.probe import Inapplicable, Probe, Wrong, sizes_of, small, with_part
from jaxformer.lab.properties import CHECKS
from jaxformer.spec import InputError


class Finding(NamedTuple):
    """What a check came to."""

    check: str
    status: str  # "passed", "failed" or "not applicable"
    detail: str  # the numbers, or the reason
    look_at: str  # where to look if it failed
    seconds: float


class Checked(NamedTuple):
    """All findings, in order."""

    subject: str  # what was checked
    small: str  # how it was made small
    findings: tuple[Finding, ...]

    @property
    def sound(self) -> bool:
        return all(finding.status != "failed" for finding in self.findings)

    def __str__(self) -> str:
        marks = {"passed": "ok", "failed": "FAILED", "not applicable": "-"}
        lines = [f"{self.subject}: {self.small}"]
        told: dict[str, list[Finding]] = {}  # what several checks stumble over once
        for each in self.findings:
            told.setdefault(each.detail if each.status == "failed" else each.check, []).append(each)
        for first, *others in told.values():
            names = "; ".join(each.check for each in (first, *others))
            lines.append(f"{marks[first.status]:7} {names}: {first.detail}")
            lines += [f"        look at {first.look_at}"] if first.status == "failed" and not others else []
        failed = sum(finding.status == "failed" for finding in self.findings)
        passed = sum(finding.status == "passed" for finding in self.findings)
        seconds = sum(finding.seconds for finding in self.findings)
        return "\n".join([*lines, f"{passed} passed, {failed} failed in {seconds:.0f} s"])


def check(
    what: str | Path | Config,
    overrides: Mapping[str, Any] | None = None,
    until_failure: bool = False,
    devices: int | None = None,
) -> Checked:
    """Tries a small version of a config, of a file, a preset, or of a part as "my_module:Part", in the smallest model
    that takes it.

    The config is made small by `small`; its corpus is not read: batches are drawn at random. Leaks and gradients are
    probed on `loud` parameters, behind which nothing hides. With `until_failure` no check follows the first that fails.
    Given `devices`, which must be there, one of them is compared with all, under several meshes, and nothing else.
    Raises InputError for what is no config and no part.
    """
    config = config_lib.resolve(with_part(what) if isinstance(what, str) and ":" in what else what, overrides)
    probe = Probe(small(config))
    checks = CHECKS if devices is None else _of_devices(devices)
    with _quickly_compiled():
        findings: list[Finding] = []
        for each in checks:
            findings.append(_tried(probe, *each))
            if until_failure and findings[-1].status == "failed":
                break
    sizes = ", ".join(f"{name} {value}" for name, value in sizes_of(probe.config.model).items())
    return Checked(
        str(what) if not isinstance(what, Config) else what.directory, f"made small: {sizes}", tuple(findings)
    )


def _of_devices(count: int) -> tuple[tuple[str, str, Callable[[Probe], str]], ...]:
    if not 2 <= count <= jax.device_count():
        there = f"at least 2 and at most {jax.device_count()}, as many as there are; or --simulate_devices={count}"
        raise InputError(f"devices={count} must be {there}")
    where = "the letters of the part's arrays, and reshapes of axes that are split"
    of = lambda mesh: lambda probe: agrees(probe, mesh)
    return tuple((f"1 device = {name}", where, of(mesh)) for name, mesh in meshes(count))


@contextlib.contextmanager
def _quickly_compiled() -> Iterator[None]:
    """XLA leaves most optimisations out: these programs run once or twice."""
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _tried(probe: Probe, name: str, look_at: str, function: Callable[[Probe], str]) -> Finding:
    started = time.perf_counter()
    try:
        status, detail = "passed", function(probe)
    except Wrong as wrong:
        status, detail = "failed", str(wrong)
    except Inapplicable as reason:
        status, detail = "not applicable", str(reason)
    except Exception as error:  # a part of the user's may raise anything: that is a finding, too
        status, detail = "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Finding(name, status, detail, look_at, time.perf_counter() - started)
