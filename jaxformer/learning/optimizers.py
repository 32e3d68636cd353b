"""Optimizers: Optax transforms, told by the declared letters what to do with each parameter."""

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.declarations import map_declared
from jaxformer.learning.schedules import Constant, Product, Schedule, WarmupCosine
from jaxformer.mesh import axis_sizes
from jaxformer.spec import Spec

if TYPE_CHECKING:  # a config costs no import of Optax
    import optax

BLOCK = 1 << 16  # sums side by side of the squares of a large array


class Optimizer(Spec):
    """What becomes of gradients."""

    learning_rate: Schedule = WarmupCosine()  # the learning rate of each step

    keeps_fields = True
    averages = False  # True: `eval_params` are an average, beside which the run keeps no other

    @abc.abstractmethod
    def transform(self, declared: Any, step: Int[Array, ""], steps: Int[Array, ""]) -> "optax.GradientTransformation":
        """From gradients to updates, at a step, counted from 0, of a run of `steps`.

        It is built anew inside each step, so that every number may be traced; its `init` must not depend on them.
        `declared` is the tree of the model's declarations: each parameter's letters, its sizes, whether it decays.
        """

    def check_declared(self, declared: Any) -> None:
        """Raises ValueError if it cannot optimize arrays that are declared so."""

    def frozen(self, declared: Any) -> Any:
        """The declarations, with what it leaves as it is declared as not trained."""
        return declared

    def rate(self, step: Int[Array, ""], steps: Int[Array, ""]) -> Float[Array, ""]:
        """The learning rate that a row of metrics tells."""
        return self.learning_rate(step, steps)

    def scaled(self, by: Schedule) -> Self:
        """The same with learning rates multiplied by those of another schedule."""
        return dataclasses.replace(self, learning_rate=Product((by, self.learning_rate)))

    def eval_params(self, opt_state: Any, params: Any) -> Any:
        """The parameters that evaluation and sampling use, of all parameters and of the transformation's state."""
        return params


def decayed(declared: Any) -> Any:
    """The tree of which parameters decay."""
    return map_declared(lambda box: box.decay, declared)


def check_averages(optimizer: Any, at: str, *names: str) -> None:
    """Raises ValueError for a decay that makes no average."""
    for name in names:
        if not 0 <= getattr(optimizer, name) < 1:
            raise ValueError(f"{at}{name}={getattr(optimizer, name)} must be at least 0 and less than 1; 0.9 is usual")


def check_weight_decay(optimizer: Any, at: str) -> None:
    if optimizer.weight_decay < 0:
        raise ValueError(f"{at}weight_decay={optimizer.weight_decay} must be at least 0; 0 turns it off")


def global_norm(tree: Any, count: Any = 1.0) -> Float[Array, ""]:
    """√Σ (a / count)² over all arrays."""
    return jnp.sqrt(sum(_squared(a, count) for a in jax.tree.leaves(tree)))


def _squared(a: jax.Array, count: Any) -> jax.Array:
    """Σ (a / count)². Of one sum XLA on CPU writes all squares to memory before it adds them; blocks stay in its
    cache."""
    square = lambda a: jnp.square(a.astype(jnp.float32) / count)
    if a.size < 16 * BLOCK or axis_sizes() or jax.default_backend() != "cpu":
        return square(a).sum()
    flat, blocks = a.reshape(-1), a.size // BLOCK
    block = lambda i: square(jax.lax.dynamic_slice_in_dim(flat, i * BLOCK, BLOCK))
    total = jax.lax.fori_loop(0, blocks, lambda i, total: total + block(i), jnp.zeros(BLOCK))
    return total.sum() + square(flat[blocks * BLOCK :]).sum()


class GradNorm(NamedTuple):
    """The global norm of a tree, which the step tells transformations that take extra arguments, as `grad_norm`."""

    of: Any
    norm: Float[Array, ""]


def clip_by_global_norm(limit: float) -> "optax.GradientTransformation":
    """Optax's, but for the norm, which is the one told if it is of these very updates: none before it changed them."""
    import optax

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        own, told = jax.tree.leaves(updates), jax.tree.leaves(grad_norm and grad_norm.of)
        same = bool(told) and len(own) == len(told) and all(a is b for a, b in zip(own, told, strict=True))
        norm = grad_norm.norm if same else global_norm(updates)
        return jax.tree.map(lambda a: jnp.where(norm < limit, a, (a / norm * limit).astype(a.dtype)), updates), state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)


def check_clip(optimizer: Any, at: str) -> None:
    if optimizer.clip is not None and optimizer.clip <= 0:
        raise ValueError(f"{at}clip={optimizer.clip} must be more than 0; None turns it off")


class Frozen(Optimizer):
    """Leaves its arrays as they are, to the bit: they have no gradient and no state. Stands in a group of `Groups`."""

    learning_rate: Schedule = Constant()  # of nothing

    def frozen(self, declared: Any) -> Any:
        return map_declared(lambda box: box.replace(trained=False, decay=False), declared)

    def rate(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        return jnp.float32(0)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        return optax.set_to_zero()


class SGD(Optimizer):
    """Plain gradient descent."""

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        return optax.sgd(self.learning_rate(step, steps))


class AdamW(Optimizer):
    """Adam with decoupled weight decay (arXiv:1711.05101), after clipping by the global norm (arXiv:1211.5063)."""

    b1: float = 0.9  # decay of the average of gradients
    b2: float = 0.99  # decay of the average of their squares
    eps: float = 1e-8  # is added to the root of that average
    weight_decay: float = 0.1  # what is taken off matrices and embedding tables in each step, times the learning rate
    clip: float | None = 1.0  # largest global norm of gradients; None: any

    def check(self, at: str = "") -> None:
        check_averages(self, at, "b1", "b2")
        if self.eps <= 0:
            raise ValueError(f"{at}eps={self.eps} must be more than 0; 1e-8 is usual")
        check_weight_decay(self, at)
        check_clip(self, at)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        rate, mask = self.learning_rate(step, steps), decayed(declared)
        adamw = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=mask)
        return adamw if self.clip is None else optax.chain(clip_by_global_norm(self.clip), adamw)


class Lion(Optimizer):
    """The sign of a mix of momentum and gradient (arXiv:2302.06675); rates are about a tenth of AdamW's."""

    learning_rate: Schedule = WarmupCosine(peak=3e-4, final=3e-5)  # the learning rate of each step
    b1: float = 0.9  # share of the momentum in the mix
    b2: float = 0.99  # decay of the momentum
    weight_decay: float = 1.0  # what is taken off matrices and embedding tables in each step, times the learning rate

    def check(self, at: str = "") -> None:
        check_averages(self, at, "b1", "b2")
        check_weight_decay(self, at)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        rate, mask = self.learning_rate(step, steps), decayed(declared)
        return optax.lion(rate, self.b1, self.b2, weight_decay=self.weight_decay, mask=mask)
