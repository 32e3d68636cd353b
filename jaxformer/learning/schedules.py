"""Learning rates as functions of the step."""

import abc
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.spec import Spec, counted


class Schedule(Spec):
    """The learning rate of each update."""

    @abc.abstractmethod
    def __call__(self, step: Int[Array, ""], steps: Int[Array, ""]) -> Float[Array, ""]:
        """The rate of update `step`, counted from 0, in a run of `steps`."""

    def notice(self, steps: int) -> str | None:
        """What is not as the fields say in a run of so many steps."""
        return None


def _check_peak(peak: float, at: str) -> None:
    if peak <= 0:
        raise ValueError(f"{at}peak={peak} must be more than 0; 1e-3 suits small models")


def _check_warmup(steps: int, at: str, least: int = 0) -> None:
    if not least <= steps < 2**31 - 1:
        raise ValueError(f"{at}warmup_steps={steps} must be at least {least} and less than 2**31 - 1")


def _short_of_peak(warmup_steps: int, steps: int) -> str:
    run = counted(steps, "step")
    return f"warmup_steps={warmup_steps} is longer than a run of {run}: the rate does not reach its peak"


class Constant(Schedule):
    """The same rate at every step, behind a warm-up if there is one."""

    peak: float = 1e-3  # the learning rate
    warmup_steps: int = 0  # how many steps lead up to it, on a line

    def check(self, at: str = "") -> None:
        _check_peak(self.peak, at)
        _check_warmup(self.warmup_steps, at)

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        return jnp.float32(self.peak) * jnp.minimum(1, (step + 1) / (self.warmup_steps + 1))

    def notice(self, steps: int) -> str | None:
        if steps > self.warmup_steps:
            return None
        return _short_of_peak(self.warmup_steps, steps)


class Product(Schedule):
    """The product of other schedules."""

    factors: tuple[Schedule, ...]  # what is multiplied

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        return math.prod((factor(step, steps) for factor in self.factors), start=jnp.float32(1))


class WarmupLinear(Schedule):
    """Linear up to `peak`, then linear down to `final` (arXiv:1810.04805); also the base of those with a warm-up."""

    peak: float = 1e-3  # the highest learning rate
    final: float = 1e-4  # the learning rate at the end
    warmup_steps: int = 100  # how many steps lead up to the peak
    shortens: bool = True  # a warm-up that would fill the run takes a tenth of it

    def check(self, at: str = "") -> None:
        _check_peak(self.peak, at)
        if not 0 <= self.final <= self.peak:
            raise ValueError(f"{at}final={self.final} must lie between 0 and {at}peak={self.peak}; a tenth is usual")
        _check_warmup(self.warmup_steps, at)

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        warmup = self.warmup(steps)
        warm = self.peak * (step + 1) / (warmup + 1)
        done = jnp.clip((step - warmup) / jnp.maximum(steps - warmup, 1), 0, 1)
        return jnp.where(step < warmup, warm, self.final + (self.peak - self.final) * self.left(done))

    def warmup(self, steps: int | jax.Array) -> jax.Array:
        """How many steps the warm-up of a run of `steps` takes."""
        fits = not self.shortens or self.warmup_steps < jnp.asarray(steps)
        return jnp.where(fits, self.warmup_steps, steps // 10)

    def notice(self, steps: int) -> str | None:
        warmup = int(self.warmup(steps))
        if warmup == self.warmup_steps or type(self).__call__ is not WarmupLinear.__call__:
            return None
        run = counted(steps, "step")
        return f"warmup_steps={self.warmup_steps} is too long for a run of {run}: it is shortened to {warmup}"

    def left(self, done: jax.Array) -> jax.Array:
        """How much of the way from `final` to `peak` is left when `done`, from 0 to 1, of the steps after the warm-up
        are made."""
        return 1 - done


class WarmupCosine(WarmupLinear):
    """Linear up to `peak`, then half a cosine down to `final` (arXiv:1608.03983)."""

    def left(self, done: jax.Array) -> jax.Array:
        return 0.5 * (1 + jnp.cos(jnp.pi * done))


class WSD(WarmupLinear):
    """Warm-up, stable, decay (arXiv:2404.06395): `peak` is held until the last `decay` of the steps after the warm-up,
    then a line leads down to `final`. A run may be stopped before the decay and prolonged by more steps."""

    final: float = 0.0
    decay: float = 0.2  # the share of the steps after the warm-up in which the rate falls

    def check(self, at: str = "") -> None:
        super().check(at)
        if not 0 < self.decay <= 1:
            raise ValueError(f"{at}decay={self.decay} must be more than 0 and at most 1; 0.2 is usual")

    def left(self, done: jax.Array) -> jax.Array:
        return jnp.minimum(1, (1 - done) / self.decay)


class InverseSquareRoot(Schedule):
    """Linear up to `peak`, then falling as 1/√step (arXiv:1706.03762, equation 3); a longer run begins the same.

    The paper's rate is that of `peak` = (d_model · warmup_steps)^−½: 6.99e-4 for 512 and 4,000.
    """

    peak: float = 7e-4  # the highest learning rate
    warmup_steps: int = 4000  # the step of the peak, counted from 1

    def check(self, at: str = "") -> None:
        _check_peak(self.peak, at)
        _check_warmup(self.warmup_steps, at, 1)

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        part = (step + 1) / self.warmup_steps
        return self.peak * jnp.minimum(part, part**-0.5)

    def notice(self, steps: int) -> str | None:
        if steps >= self.warmup_steps:
            return None
        return _short_of_peak(self.warmup_steps, steps)
