"""Optimizers: Optax transforms, told by the declared letters what to do with each parameter."""

from typing import Any

import jax
import optax

from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.spec import Spec, map_declared


def decayed(declared: Any) -> Any:
    """The tree of which parameters decay."""
    return map_declared(lambda box: box.decay, declared)


class SGD(Spec):
    """Plain gradient descent; also the base of all optimizers."""

    learning_rate: Constant = WarmupCosine()

    def transform(self, declared: Any, learning_rate: jax.Array) -> optax.GradientTransformation:
        """Built anew inside each step, so that every number may be traced; `declared` is `Decoder.declared()`."""
        return optax.sgd(learning_rate)


class AdamW(SGD):
    """Adam with decoupled weight decay (arXiv:1711.05101), after clipping by the global norm (arXiv:1211.5063)."""

    b1: float = 0.9
    b2: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float | None = 1.0

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

    def transform(self, declared: Any, learning_rate: jax.Array) -> optax.GradientTransformation:
        adamw = optax.adamw(
            learning_rate, self.b1, self.b2, self.eps, weight_decay=self.weight_decay, mask=decayed(declared)
        )
        return adamw if self.clip is None else optax.chain(optax.clip_by_global_norm(self.clip), adamw)
