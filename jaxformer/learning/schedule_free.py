"""Training without a schedule's end: the average of what an optimizer passes through is evaluated."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxformer.learning.optimizers import AdamW, Optimizer, check_averages
from jaxformer.learning.schedules import Constant, Schedule

if TYPE_CHECKING:
    import optax


class ScheduleFree(Optimizer):
    """Schedule-free learning (arXiv:2405.15682): z is moved by another optimizer, x is the average of all z, and
    gradients are taken between them, at y, the parameters in training. Evaluated is x.

    That average takes the place of the other's momentum, and of a learning rate that falls: it may be stopped anywhere.
    """

    learning_rate: Schedule = Constant(1.0)  # multiplies the learning rates of the optimizer
    optimizer: Optimizer = AdamW(Constant(2.5e-3, warmup_steps=100), b1=0.0)  # moves z; best without momentum
    b1: float = 0.9  # y = b1·x + (1 − b1)·z
    weight_power: float = 2.0  # the weight of a z is the highest learning rate so far to this power

    keeps_fields = False  # its learning rate is a factor
    averages = True

    def check(self, at: str = "") -> None:
        check_averages(self, at, "b1")
        if self.b1 == 0:
            raise ValueError(f"{at}b1={self.b1} must be more than 0; 0.9 is usual")
        if self.optimizer.averages:
            raise ValueError(
                f"{at}optimizer={type(self.optimizer).__name__} averages by itself; take one that does not"
            )
        if self.weight_power < 0:
            raise ValueError(f"{at}weight_power={self.weight_power} must be at least 0; 2 is usual")

    def check_declared(self, declared: Any) -> None:
        self.optimizer.check_declared(declared)

    def frozen(self, declared: Any) -> Any:
        return self.optimizer.frozen(declared)

    def rate(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        return self.optimizer.scaled(self.learning_rate).rate(step, steps)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        rate = self.rate(step, steps)
        inner = self.optimizer.scaled(self.learning_rate).transform(declared, step, steps)

        def init(params: Any) -> Averaged:
            return Averaged(params, jnp.float32(0), jnp.float32(0), inner.init(params))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Averaged]:
            changes, own = inner.update(updates, state.inner, params)
            z = jax.tree.map(jnp.add, state.z, changes)
            fastest = jnp.maximum(state.fastest, rate)
            weight = fastest**self.weight_power
            total = state.weights + weight
            share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1), 0)

            def change(y: jax.Array, before: jax.Array, z: jax.Array) -> jax.Array:
                moved = z - before  # exactly 0 where nothing moves, and so is what is returned
                return self.b1 * share * (moved - (y - before) / self.b1) + (1 - self.b1) * moved

            return jax.tree.map(change, params, state.z, z), Averaged(z, total, fastest, own)

        return optax.GradientTransformation(init, update)

    def eval_params(self, opt_state: Any, params: Any) -> Any:
        def averaged(y: Any, z: Any) -> Any:
            if not isinstance(z, Mapping):
                return self._average(y, z)
            return {**y, **{name: averaged(y[name], inner) for name, inner in z.items()}}

        return averaged(params, opt_state.z)

    def _average(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """x, of the two others."""
        return (y - (1 - self.b1) * z) / self.b1


class Averaged(NamedTuple):
    """What schedule-free learning carries from one step to the next."""

    z: Any
    weights: jax.Array  # their sum
    fastest: jax.Array  # the highest learning rate so far
    inner: Any  # state of the optimizer that moves z
