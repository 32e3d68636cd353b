"""Learning rates as functions of the step."""

import jax
import jax.numpy as jnp

from jaxformer.spec import Spec


class Constant(Spec):
    """The same rate at every step; also the base of all schedules."""

    peak: float = 1e-3

    def check(self, at: str = "") -> None:
        if self.peak <= 0:
            raise ValueError(f"{at}peak={self.peak} must be more than 0; 1e-3 suits small models")

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        """The rate of update `step`, counted from 0, in a run of `steps`."""
        return jnp.float32(self.peak)


class WarmupCosine(Constant):
    """Linear up to `peak`, then half a cosine down to `final` (arXiv:1608.03983)."""

    final: float = 1e-4
    warmup_steps: int = 100

    def check(self, at: str = "") -> None:
        super().check(at)
        if not 0 <= self.final <= self.peak:
            raise ValueError(f"{at}final={self.final} must lie between 0 and {at}peak={self.peak}; a tenth is usual")
        if not 0 <= self.warmup_steps < 2**31 - 1:
            raise ValueError(f"{at}warmup_steps={self.warmup_steps} must be at least 0 and less than 2**31 - 1")

    def __call__(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        warm = self.peak * (step + 1) / (self.warmup_steps + 1)
        done = jnp.clip((step - self.warmup_steps) / jnp.maximum(steps - self.warmup_steps, 1), 0, 1)
        cosine = self.final + 0.5 * (self.peak - self.final) * (1 + jnp.cos(jnp.pi * done))
        return jnp.where(step < self.warmup_steps, warm, cosine)
