"""Faults in training: an update that a loss or gradient spoils is skipped, and a run that only has such ones stops."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from jaxformer.spec import Spec


class Guard(Spec):
    """When an update is skipped: where loss or gradient, over all slices of the batch, are no finite numbers.

    Parameters, optimizer state and moving average stay as they are, to the bit, and the step advances.
    """

    spike: float | None = None  # skips, too, where the loss is so many standard deviations over the mean; None: nowhere
    window: int = 100  # mean and deviation are those of so many losses before, of updates that were made
    most: int = 20  # so many updates skipped in a row end the run

    def check(self, at: str = "") -> None:
        if self.spike is not None and self.spike <= 0:
            raise ValueError(f"{at}spike={self.spike} must be more than 0; 6 is usual, None turns it off")
        for name, least in (("window", 2), ("most", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{at}{name}={getattr(self, name)} must be at least {least}")

    def begin(self) -> "Skips":
        """Before the first step."""
        none = Skips(jnp.int32(0), jnp.int32(0))
        return none if self.spike is None else none.replace(losses_seen=jnp.int32(0), losses=jnp.zeros(self.window))

    def passes(self, skips: "Skips", loss: Float[Array, ""], norm: Float[Array, ""]) -> Bool[Array, ""]:
        """Whether the update of this loss, whose gradient has this norm, is made."""
        sound = jnp.isfinite(loss) & jnp.isfinite(norm)
        if self.spike is None:
            return sound
        bound = skips.losses.mean() + self.spike * skips.losses.std()
        return sound & ((skips.losses_seen < self.window) | (loss <= bound))

    def counted(
        self, skips: "Skips", passes: Bool[Array, ""], loss: Float[Array, ""], weight: Float[Array, ""]
    ) -> "Skips":
        """After a step. The losses of skipped updates and of batches that ask for nothing do not enter the window."""
        total, in_a_row = skips.total + ~passes, jnp.where(passes, 0, skips.in_a_row + 1)
        if self.spike is None:
            return Skips(total, in_a_row)
        enters = passes & (weight > 0)
        written = skips.losses.at[skips.losses_seen % self.window].set(loss)
        return Skips(total, in_a_row, skips.losses_seen + enters, jnp.where(enters, written, skips.losses))


class Skips(struct.PyTreeNode):
    """What a guard carries from one step to the next. A run stored before there were guards begins with zeros."""

    total: jax.Array  # int32: updates skipped so far
    in_a_row: jax.Array  # int32: up to now
    losses_seen: Any = ()  # int32: how many were written to the window; empty where spikes are not looked for
    losses: Any = ()  # float32[window]: the last ones of updates that were made


def guarded(passes: Bool[Array, ""], update: Callable[[Any], Any], old: Any) -> Any:
    """What the update makes of a tree, or the tree as it is, to the bit. On CPU it has no reverse-mode derivative."""
    if jax.default_backend() == "cpu":  # which overwrites what a loop carries, and would copy what is selected from
        return jax.lax.fori_loop(0, passes.astype(jnp.int32), lambda _, tree: update(tree), old)
    return jax.tree.map(lambda a, b: jnp.where(passes, a, b), update(old), old)


class Diverged(RuntimeError):
    """So many updates were skipped in a row that the run has stopped."""
