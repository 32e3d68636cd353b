"""Positional schemes: three hooks (embed, rotate, bias) and parameters shared by all layers."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.declarations import Arrays, Declarations, Param, Slot
from jaxformer.model.layers import add, lookup
from jaxformer.model.masks import Places, View
from jaxformer.spec import Spec


class Position(Spec, abstract=True):
    """A positional scheme: it overrides the hooks that it needs, of `embed`, `rotate` and `bias`."""

    per_layer = False  # True: the parameters belong to each layer's attention, and `embed` has none

    def check_width(self, width: int, at: str) -> None:
        """Raises ValueError if heads of this width cannot be rotated."""

    def params(self) -> Declarations:
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


class NoPosition(Position):
    """No positional information."""


class Learned(Position):
    """A learned vector for each of the context's positions (arXiv:1705.03122)."""

    decay: bool = False  # whether weight decay acts on the table

    def params(self) -> Declarations:
        return {"table": Param("CD", decay=self.decay)}

    def embed(self, params: Arrays, x: Float[Array, "B T D"], at: Places) -> Float[Array, "B T D"]:
        return add(x, lookup(params["table"], at.position))


class Sinusoidal(Position):
    """Sines in the even places of D, cosines in the odd ones, of falling frequency (arXiv:1706.03762, section 3.5)."""

    base: float = 10_000.0  # wavelengths rise from 2π to 2π times this

    def check(self, at: str = "") -> None:
        if self.base <= 1:
            raise ValueError(f"{at}base={self.base} must be more than 1; 10000 is usual")

    def embed(self, params: Arrays, x: Float[Array, "B T D"], at: Places) -> Float[Array, "B T D"]:
        angle = at.position[..., None] * _frequencies(x.shape[-1], self.base)[None, None]  # [B, T, ⌈D/2⌉]
        table = jnp.stack([jnp.sin(angle), jnp.cos(angle)], -1).reshape(*angle.shape[:2], -1)
        return add(x, table[..., : x.shape[-1]])


class Rotary(Position):
    """Rotary positions, halves of a head paired (arXiv:2104.09864)."""

    base: float = 10_000.0  # wavelengths rise from 2π to 2π times this
    fraction: float = 1.0  # share of each head's width that is turned, from its beginning (arXiv:2204.06745)
    scaling: float = 1.0  # positions are divided by it, to stretch a trained context (arXiv:2306.15595)

    def check(self, at: str = "") -> None:
        if self.base <= 1:
            raise ValueError(f"{at}base={self.base} must be more than 1; 10000 is usual")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"{at}fraction={self.fraction} must be more than 0 and at most 1; 1 turns whole heads")
        if self.scaling <= 0:
            raise ValueError(f"{at}scaling={self.scaling} must be more than 0; 1 leaves positions as they are")

    def check_width(self, width: int, at: str) -> None:
        turned = round(self.fraction * width)
        if turned % 2 or abs(turned - self.fraction * width) > 1e-6:
            raise ValueError(
                f"{at}position turns {self.fraction * width:g} of the {width} numbers of a head, which must be even; "
                f"choose another {at}n_heads, {at}head_width or {at}position.fraction"
            )

    def frequencies(self, width: int) -> Float[Array, "R"]:
        """Radians per position of each pair, R = width / 2."""
        return _frequencies(width, self.base)

    def rotate(self, params: Arrays, qk: Float[Array, "B H T K"], at: Places) -> Float[Array, "B H T K"]:
        turned = round(self.fraction * qk.shape[-1])
        position = at.position[:, None, :, None] / self.scaling
        angle = position * self.frequencies(turned)[None, None, None]
        sin, cos = jnp.sin(angle), jnp.cos(angle)  # [B, 1, T, turned / 2]
        a, b = jnp.split(qk[..., :turned].astype(jnp.float32), 2, -1)
        turned_qk = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(qk.dtype)
        return jnp.concatenate([turned_qk, qk[..., turned:]], -1)


class Llama3Rotary(Rotary):
    """Rotary whose long wavelengths are stretched, short ones kept, and those between blended, so that a model reads
    more than it was first trained on (Llama 3.1; arXiv:2407.21783, section 3.4.2, by the code published with it)."""

    base: float = 500_000.0
    factor: float = 8.0  # long wavelengths are multiplied by it
    low: float = 1.0  # wavelengths longer than trained / low are long
    high: float = 4.0  # those shorter than trained / high are short
    trained: int = 8192  # how many tokens the model first read

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.factor <= 0:
            raise ValueError(f"{at}factor={self.factor} must be more than 0; 8 is usual")
        if not 0 < self.low < self.high:
            raise ValueError(f"{at}low={self.low} must be more than 0 and less than {at}high={self.high}; 1 and 4 do")
        if self.trained < 1:
            raise ValueError(f"{at}trained={self.trained} must be at least 1 token; 8192 is usual")

    def frequencies(self, width: int) -> Float[Array, "R"]:
        short = super().frequencies(width)
        turns = self.trained * short / (2 * math.pi)  # of each pair over what it was trained on
        kept = jnp.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return kept * short + (1 - kept) * short / self.factor


class ALiBi(Position):
    """Scores fall with distance, in each head with another slope (arXiv:2108.12409)."""

    def bias(self, params: Arrays, view: View, new: Arrays, seen: Arrays) -> Float[Array, "..."] | float:
        slopes = jnp.asarray(_slopes(view.n_heads), jnp.float32)[None, :, None, None]
        return -slopes * jnp.abs(view.distance())


class RelativeBias(Position):
    """A learned number for each head and bucket of distance, the same in all layers (T5, arXiv:1910.10683).

    Near distances have a bucket each, far ones share buckets that widen up to `max_distance`. Where tokens see what
    comes after them, half of the buckets are for that.
    """

    buckets: int = 32  # how many distances are told apart
    max_distance: int = 128  # from here on all distances share a bucket

    def check(self, at: str = "") -> None:
        if self.buckets < 4 or self.buckets % 4:
            raise ValueError(f"{at}buckets={self.buckets} must be a multiple of 4; 32 is usual")
        if self.max_distance <= self.buckets // 2:
            raise ValueError(f"{at}max_distance={self.max_distance} must be more than {at}buckets / 2; 128 is usual")

    def params(self) -> Declarations:
        return {"table": Param("RH", sizes={"R": self.buckets})}

    def bias(self, params: Arrays, view: View, new: Arrays, seen: Arrays) -> Float[Array, "..."] | float:
        bucket = self.bucket(view.distance(), view.rule.causal)[:, 0]  # [B, T, S]
        return jnp.moveaxis(lookup(params["table"], bucket), -1, 1).astype(jnp.float32)  # [B, H, T, S]

    def bucket(self, distance: Int[Array, "..."], causal: bool) -> Int[Array, "..."]:
        """The bucket of each distance, which is negative for what comes later."""
        count = self.buckets if causal else self.buckets // 2
        first = jnp.where(distance < 0, 0 if causal else count, 0)
        size = jnp.maximum(distance, 0) if causal else jnp.abs(distance)
        near = count // 2
        far = jnp.log(jnp.maximum(size, 1) / near) / math.log(self.max_distance / near) * (count - near)
        return first + jnp.where(size < near, size, jnp.minimum(near + far.astype(jnp.int32), count - 1))


def _slopes(n_heads: int) -> list[float]:
    """2^(−8/n), 2^(−16/n), …; where n is no power of two, the gaps are filled from the next one's."""
    power = 1 << (n_heads.bit_length() - 1)
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    return slopes if power == n_heads else slopes + _slopes(2 * power)[0::2][: n_heads - power]


def _frequencies(width: int, base: float) -> jax.Array:  # float32[⌈width / 2⌉]
    return base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
