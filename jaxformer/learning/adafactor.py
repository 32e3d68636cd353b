"""Adafactor: second moments of matrices by the sums of their rows and columns."""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.declarations import Declared, is_declared, map_declared
from jaxformer.learning.optimizers import Optimizer, check_weight_decay
from jaxformer.learning.schedules import Schedule, WarmupCosine

if TYPE_CHECKING:
    import optax


class Adafactor(Optimizer):
    """Adam without momentum, whose second moments of a matrix are a product of rows and columns (arXiv:1804.04235).

    An array is as many matrices as its batch letters say; the axes that a matrix sums over are its rows. What is no
    matrix, tables included, has a second moment for each number.
    """

    learning_rate: Schedule = WarmupCosine(peak=0.03, final=0.003)  # the learning rate of each step
    decay_power: float = 0.8  # of update t the average of squares keeps 1 − t^−power
    eps: float = 1e-30  # is added to squares
    threshold: float = 1.0  # largest root mean square of a matrix's update, before the learning rate
    relative: bool = True  # updates are times the root mean square of their parameters
    least: float = 1e-3  # of those root mean squares
    weight_decay: float = 0.0  # what is taken off matrices and embedding tables in each step, times the learning rate

    def check(self, at: str = "") -> None:
        for name, usual in (("decay_power", 0.8), ("eps", 1e-30), ("threshold", 1), ("least", 1e-3)):
            if getattr(self, name) <= 0:
                raise ValueError(f"{at}{name}={getattr(self, name)} must be more than 0; {usual:g} is usual")
        check_weight_decay(self, at)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        rate = self.learning_rate(step, steps)

        def init(params: Any) -> Squares:
            return Squares(jnp.int32(0), map_declared(zeros, declared))

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Squares]:
            count = state.n_updates + 1
            keep = 1 - count.astype(jnp.float32) ** -self.decay_power

            def moments(box: Declared, old: dict[str, jax.Array], g: jax.Array) -> dict[str, jax.Array]:
                squares = as_matrices(box, g) ** 2 + self.eps
                of = {"rows": lambda: squares.mean(2), "columns": lambda: squares.mean(1), "all": lambda: squares}
                return {name: keep * mean + (1 - keep) * of[name]() for name, mean in old.items()}

            def change(box: Declared, own: dict[str, jax.Array], g: jax.Array, p: jax.Array) -> jax.Array:
                direction = normalized(own, as_matrices(box, g))
                direction = direction / jnp.maximum(1, size(direction) / self.threshold)
                if self.relative:
                    direction = direction * jnp.maximum(self.least, size(as_matrices(box, p)))
                direction = direction.reshape(p.shape)
                return -rate * (direction + self.weight_decay * p if box.decay else direction)

            new = jax.tree.map(moments, declared, state.moments, updates, is_leaf=is_declared)
            changes = jax.tree.map(change, declared, new, updates, params, is_leaf=is_declared)
            return changes, Squares(count, new)

        return optax.GradientTransformation(init, update)


class Squares(NamedTuple):
    """What Adafactor carries from one step to the next."""

    n_updates: jax.Array  # int32
    moments: Any  # for each array means of squares: rows [n, r] and columns [n, s] of n matrices [r, s], or all


def as_matrices(box: Declared, a: jax.Array) -> Float[Array, "n r s"]:
    """Of what is no matrix r is 1."""
    batch, into = len(box.letters.batch), len(box.letters.into)
    shape = box.value.shape
    return a.reshape(math.prod(shape[:batch]), math.prod(shape[batch : batch + into]), -1)


def zeros(box: Declared) -> dict[str, jax.Array]:
    n, r, s = jax.eval_shape(lambda a: as_matrices(box, a), box.value).shape
    if box.letters.into and box.letters.out:
        return {"rows": jnp.zeros((n, r)), "columns": jnp.zeros((n, s))}
    return {"all": jnp.zeros((n, r, s))}


def normalized(moments: dict[str, jax.Array], g: Float[Array, "n r s"]) -> Float[Array, "n r s"]:
    """Over the root of the second moment. That of a matrix is rows · columns / mean of the rows, a product that may be
    too small for float32."""
    if "all" in moments:
        return g / jnp.sqrt(moments["all"])
    rows, columns = moments["rows"][:, :, None], moments["columns"][:, None]
    return g / jnp.sqrt(rows) / jnp.sqrt(columns) * jnp.sqrt(rows.mean(1, keepdims=True))


def size(x: Float[Array, "n r s"]) -> Float[Array, "n 1 1"]:
    """The root mean square of each matrix."""
    return jnp.sqrt((x * x).mean((1, 2), keepdims=True))
