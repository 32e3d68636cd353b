"""Optimizers: Optax transforms, told by the declared letters what to do with each parameter."""

import abc
from typing import TYPE_CHECKING, Any

import jax
from jaxtyping import Array, Int

from jaxformer.declarations import map_declared
from jaxformer.learning.schedules import Schedule, WarmupCosine
from jaxformer.spec import Spec

if TYPE_CHECKING:  # a config costs no import of Optax
    import optax


class Optimizer(Spec):
    """What becomes of gradients."""

    learning_rate: Schedule = WarmupCosine()  # the learning rate of each step

    keeps_fields = True

    @abc.abstractmethod
    def transform(self, declared: Any, step: Int[Array, ""], steps: Int[Array, ""]) -> "optax.GradientTransformation":
        """From gradients to updates, at a step, counted from 0, of a run of `steps`.

        It is built anew inside each step, so that every number may be traced; its `init` must not depend on them.
        `declared` is the tree of the model's declarations: each parameter's letters, its sizes, whether it decays.
        """


def decayed(declared: Any) -> Any:
    """The tree of which parameters decay."""
    return map_declared(lambda box: box.decay, declared)


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
    weight_decay: float = 0.1  # what is taken off matrices in each step, times the learning rate
    clip: float | None = 1.0  # largest global norm of gradients; None: any

    def check(self, at: str = "") -> None:
        for name in ("b1", "b2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{at}{name}={getattr(self, name)} must be at least 0 and less than 1; 0.9 is usual")
        if self.eps <= 0:
            raise ValueError(f"{at}eps={self.eps} must be more than 0; 1e-8 is usual")
        if self.weight_decay < 0:
            raise ValueError(f"{at}weight_decay={self.weight_decay} must be at least 0; 0 turns it off")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"{at}clip={self.clip} must be more than 0; None turns it off")

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        rate, mask = self.learning_rate(step, steps), decayed(declared)
        adamw = optax.adamw(rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=mask)
        return adamw if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), adamw)
