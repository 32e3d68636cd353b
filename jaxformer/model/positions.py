"""Positional schemes: three hooks (embed, rotate, bias) and parameters shared by all layers."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxformer.model.layers import add, lookup
from jaxformer.model.masks import Places, View
from jaxformer.spec import Arrays, Param, Slot, Spec


class NoPosition(Spec):
    """No positional information; also the base of all schemes, whose hooks change nothing."""

    per_layer = False  # True: the parameters belong to each layer's attention, and `embed` has none

    def check_width(self, width: int, at: str) -> None:
        """Raises ValueError if heads of this width cannot be rotated."""

    def params(self) -> dict[str, Param]:
        return {}

    def slots(self) -> dict[str, Slot]:
        return {}

    def remember(self, params: Arrays, k: Float[Array, "B G T K"], at: Places, cache: Arrays | None) -> Arrays:
        """What the new tokens leave in the declared slots: an entry for each token, or the new running state."""
        return {}

    def embed(self, params: Arrays, x: Float[Array, "B T D"], at: Places) -> Float[Array, "B T D"]:
        """The embedded input with positions added."""
        return x

    def rotate(self, params: Arrays, qk: Float[Array, "B H T K"], at: Places) -> Float[Array, "B H T K"]:
        """Queries, or keys, turned by their positions."""
        return qk

    def bias(self, params: Arrays, view: View, new: Arrays, seen: Arrays) -> Float[Array, "..."] | float:
        """What is added to the scores [B, H, T, S]; `new` is what the queries' tokens left, `seen` the keys'."""
        return 0.0


class Learned(NoPosition):
    """A learned vector for each of the context's positions (arXiv:1705.03122)."""

    def params(self) -> dict[str, Param]:
        return {"table": Param("CD")}

    def embed(self, params: Arrays, x: Float[Array, "B T D"], at: Places) -> Float[Array, "B T D"]:
        return add(x, lookup(params["table"], at.position))


class Sinusoidal(NoPosition):
    """Sines in the even places of D, cosines in the odd ones, of falling frequency (arXiv:1706.03762, section 3.5)."""

    base: float = 10_000.0

    def check(self, at: str = "") -> None:
        if self.base <= 1:
            raise ValueError(f"{at}base={self.base} must be more than 1; 10000 is usual")

    def embed(self, params: Arrays, x: Float[Array, "B T D"], at: Places) -> Float[Array, "B T D"]:
        angle = at.position[..., None] * _frequencies(x.shape[-1], self.base)[None, None]  # [B, T, ⌈D/2⌉]
        table = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*angle.shape[:2], -1)
        return add(x, table[..., : x.shape[-1]])


class Rotary(NoPosition):
    """Rotary positions, halves of a head paired (arXiv:2104.09864)."""

    base: float = 10_000.0

    def check(self, at: str = "") -> None:
        if self.base <= 1:
            raise ValueError(f"{at}base={self.base} must be more than 1; 10000 is usual")

    def check_width(self, width: int, at: str) -> None:
        if width % 2:
            raise ValueError(
                f"{at}d_model / {at}n_heads = {width} must be even for {at}position=Rotary; choose another {at}n_heads"
            )

    def rotate(self, params: Arrays, qk: Float[Array, "B H T K"], at: Places) -> Float[Array, "B H T K"]:
        angle = at.position[:, None, :, None] * _frequencies(qk.shape[-1], self.base)[None, None, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)  # [B, 1, T, K/2]
        a, b = jnp.split(qk.astype(jnp.float32), 2, -1)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(qk.dtype)


def _frequencies(width: int, base: float) -> jax.Array:  # float32[⌈width / 2⌉]
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
