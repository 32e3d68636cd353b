"""What happens to logits before a token is drawn. Processors apply in the order in which they are given."""

import abc

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.spec import Spec


class LogitsProcessor(Spec):
    """What becomes of logits."""

    @abc.abstractmethod
    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        """Other logits of the same tokens; −inf where one must not be drawn."""


class Temperature(LogitsProcessor):
    """Divides by `temperature`: less than 1 sharpens, 0 leaves the likeliest token alone."""

    temperature: float = 1.0  # logits are divided by it

    def check(self, at: str = "") -> None:
        if self.temperature < 0:
            raise ValueError(
                f"{at}temperature={self.temperature} must be at least 0; 0 always takes the likeliest token"
            )

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        first = jnp.arange(logits.shape[-1])[None] == logits.argmax(-1, keepdims=True)
        greedy = jnp.where(first, logits, -jnp.inf)
        cold = self.temperature < 1e-30  # as good as 0; the quotient might be infinite
        return jnp.where(cold, greedy, logits / jnp.where(cold, 1, self.temperature))


class TopK(LogitsProcessor):
    """Keeps the `top_k` likeliest tokens (arXiv:1805.04833); of equal ones, those of lower id."""

    top_k: int  # how many tokens are kept

    def check(self, at: str = "") -> None:
        if self.top_k < 1:
            raise ValueError(f"{at}top_k={self.top_k} must be at least 1; 1 always takes the likeliest token")

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return jnp.where(_rank(logits) < min(self.top_k, logits.shape[-1]), logits, -jnp.inf)


class TopP(LogitsProcessor):
    """Keeps the fewest likeliest tokens whose probabilities reach `top_p` together (nucleus, arXiv:1904.09751)."""

    top_p: float  # the probability that the kept tokens reach

    def check(self, at: str = "") -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"{at}top_p={self.top_p} must be more than 0 and at most 1; 1 keeps every token")

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        falling = -jnp.sort(-logits, axis=-1)
        probabilities = jax.nn.softmax(falling, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        kept = jnp.maximum((before < self.top_p).sum(-1, keepdims=True), 1)
        kept = jnp.where(self.top_p >= 1, logits.shape[-1], kept)  # float32's sum may pass 1 before the last token
        return jnp.where(_rank(logits) < kept, logits, -jnp.inf)


class MinP(LogitsProcessor):
    """Keeps the tokens at least `min_p` times as probable as the likeliest (arXiv:2407.01082)."""

    min_p: float  # least share of the likeliest token's probability

    def check(self, at: str = "") -> None:
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"{at}min_p={self.min_p} must be at least 0 and at most 1; 0 keeps every token")

    def __call__(self, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        least = logits.max(-1, keepdims=True) + jnp.log(self.min_p)
        return jnp.where(logits >= least, logits, -jnp.inf)


def _rank(logits: jax.Array) -> jax.Array:
    """int32[B, V]: 0 for the likeliest token."""
    return jnp.argsort(jnp.argsort(-logits, axis=-1, stable=True), axis=-1)
