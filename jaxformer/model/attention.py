"""Attention of tokens to themselves and to their past, with or without a cache."""

from collections.abc import Mapping

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jaxformer.model import cache as cache_lib
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import add, along, linear
from jaxformer.model.masks import Causal, Places, View
from jaxformer.model.positions import NoPosition
from jaxformer.spec import Arrays, Param, Slot, declare

PROJECTIONS = {"q": Param("D->HK"), "k": Param("D->GK"), "v": Param("D->GK"), "o": Param("HK->D")}
BIASES = {"q_bias": Param("HK"), "k_bias": Param("GK"), "v_bias": Param("GK"), "o_bias": Param("D")}


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762) with grouped key/value heads (arXiv:2305.13245)."""

    dims: Mapping[str, int]
    kernel: Softmax
    position: NoPosition
    mask: Causal
    bias: bool
    dropout: float

    def setup(self) -> None:
        self.projections = declare(self, "project", PROJECTIONS | (BIASES if self.bias else {}), self.dims)
        self.for_kernel = declare(self, "kernel_params", self.kernel.params(), self.dims)
        own = self.position.params() if self.position.per_layer else {}
        self.for_position = declare(self, "position_params", own, self.dims)

    def slots(self) -> dict[str, Slot]:
        return cache_lib.PLACE | self.kernel.slots() | self.position.slots()

    def remember(
        self, x: Float[Array, "B T D"], at: Places, shared: Arrays, cache: Arrays | None = None
    ) -> dict[str, jax.Array]:
        """What the tokens x leave behind for queries to look at."""
        position = self.for_position or shared
        k = self.position.rotate(position, self._heads(x, "k"), at)
        more = self.position.remember(position, k, at, cache)
        return {**at._asdict(), **more, **self.kernel.remember(self.for_kernel, k, self._heads(x, "v"), at, cache)}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Places,
        shared: Arrays,
        key: jax.Array | None,
        cache: Arrays | None = None,
    ) -> tuple[Float[Array, "B T D"], Arrays | None]:
        """`shared`: the position's parameters, unless they are per layer. Returns the branch and the written cache."""
        position = self.for_position or shared
        q = self.position.rotate(position, self._heads(x, "q"), at)
        new = self.remember(x, at, shared, cache)
        seen, cache = cache_lib.update(cache, new, self.slots())
        view = View(at, Places(seen["position"], seen["segment"]), self.mask)
        bias = self.position.bias(position, view, new, seen)
        h = self.kernel(self.for_kernel, q, new, seen, view, bias, key, self.dropout)
        B, H, T, K = h.shape
        h = linear(h.swapaxes(1, 2).reshape(B, T, H * K), self.projections["o"].reshape(H * K, -1))
        return (add(h, along(self.projections["o_bias"], h)) if self.bias else h), cache

    def _heads(self, x: Float[Array, "B T D"], name: str) -> Float[Array, "B H T K"]:
        h = linear(x, self.projections[name])  # [B, T, H, K]
        return (add(h, along(self.projections[f"{name}_bias"], h)) if self.bias else h).swapaxes(1, 2)
