"""Attention of tokens to themselves, to their past, or to another text; with or without a cache."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxformer.model import cache as cache_lib
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import NoNorm, add, along, linear
from jaxformer.model.masks import Bidirectional, Places, View
from jaxformer.model.positions import NoPosition
from jaxformer.spec import Arrays, Param, Slot, declare

PROJECTIONS = {"q": Param("D->HK"), "k": Param("D->GK"), "v": Param("D->GK"), "o": Param("HK->D")}
BIASES = {
    "q_bias": Param("HK", fan_in="D"),
    "k_bias": Param("GK", fan_in="D"),
    "v_bias": Param("GK", fan_in="D"),
    "o_bias": Param("D", fan_in="HK"),
}


class Attention(nn.Module):
    """Multi-head attention (arXiv:1706.03762) with grouped key/value heads (arXiv:2305.13245).

    Given a memory, it is cross-attention: keys and values are those that `remember` made of another text.
    """

    dims: Mapping[str, int]
    kernel: Softmax
    position: NoPosition
    mask: Bidirectional
    qkv_bias: bool
    output_bias: bool
    output_projection: bool
    qk_norm: NoNorm
    dropout: float

    def setup(self) -> None:
        there = {*self.kernel.projections} | ({"o"} if self.output_projection else set())
        biased = ({*"qkv"} if self.qkv_bias else set()) | ({"o"} if self.output_bias else set())
        declared = {name: PROJECTIONS[name] for name in PROJECTIONS if name in there}
        declared |= {name: BIASES[name] for name in BIASES if name[0] in there & biased}
        self.projections = declare(self, "project", declared, self.dims)
        self.norm_q = declare(self, "norm_q", self.qk_norm.params("K"), self.dims)
        self.norm_k = declare(self, "norm_k", self.qk_norm.params("K"), self.dims)
        self.for_kernel = declare(self, "kernel_params", self.kernel.params(), self.dims)
        own = self.position.params() if self.position.per_layer else {}
        self.for_position = declare(self, "position_params", own, self.dims)

    def slots(self) -> dict[str, Slot]:
        return cache_lib.PLACE | self.mask.slots() | self.kernel.slots() | self.position.slots()

    def remember(
        self, x: Float[Array, "B T D"], at: Places, shared: Arrays, cache: Arrays | None = None
    ) -> dict[str, jax.Array]:
        """What the tokens x leave behind for queries to look at."""
        position = self.for_position or shared
        k = self.position.rotate(position, self.qk_norm(self.norm_k, self._heads(x, "k", "G")), at)
        more = self.position.remember(position, k, at, cache)
        place = {"part": jnp.ones_like(at.segment)} if "part" in self.mask.slots() else {}
        place |= {name: array for name, array in at._asdict().items() if array is not None}
        return {**place, **more, **self.kernel.remember(self.for_kernel, k, self._heads(x, "v", "G"), at, cache)}

    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Places,
        shared: Arrays,
        key: jax.Array | None,
        cache: Arrays | None = None,
        memory: Arrays | None = None,
    ) -> tuple[Float[Array, "B T D"], Arrays | None]:
        """`shared`: the position's parameters, unless they are per layer. Returns the branch and the written cache."""
        position = self.for_position or shared
        q = self.position.rotate(position, self.qk_norm(self.norm_q, self._heads(x, "q", "H")), at)
        if memory is None:
            new = self.remember(x, at, shared, cache)
            seen, cache = cache_lib.update(cache, new, self.slots())
        else:
            new = seen = memory
        places = Places(seen["position"], seen["segment"], seen.get("part"))
        view = View(at, places, self.mask, self.dims["H"])
        bias = self.position.bias(position, view, new, seen)
        h = self.kernel(self.for_kernel, q, new, seen, view, bias, key, self.dropout)
        if self.is_mutable_collection("activations"):
            scores = self.kernel.masked_scores(self.for_kernel, q, new, seen, view, bias)
            powers, total = self.kernel.weights(self.for_kernel, scores)
            weights = powers / jnp.maximum(total, 1e-30)
            record(self, q=q, k=seen.get("k"), v=seen.get("v"), scores=scores, weights=weights, values=h)
        B, H, T, K = h.shape
        h = h.swapaxes(1, 2).reshape(B, T, H * K)
        if self.output_projection:
            h = linear(h, self.projections["o"].reshape(H * K, -1))
            h = add(h, along(self.projections["o_bias"], h)) if self.output_bias else h
        else:
            h = jnp.pad(h, ((0, 0), (0, 0), (0, self.dims["D"] - H * K)))
        record(self, out=h)
        return h, cache

    def _heads(self, x: Float[Array, "B T D"], name: str, heads: str) -> Float[Array, "B H T K"]:
        if name not in self.projections:  # the kernel does not look at it
            return jnp.zeros((len(x), self.dims[heads], x.shape[1], self.dims["K"]), x.dtype)
        h = linear(x, self.projections[name])  # [B, T, H, K]
        return (add(h, along(self.projections[f"{name}_bias"], h)) if self.qkv_bias else h).swapaxes(1, 2)


def record(module: nn.Module, **activations: Any) -> None:
    """Leaves activations, or dicts of them, under the module's path and these names, where somebody asked for them."""
    for name, value in activations.items():
        if value is not None:
            module.sow("activations", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))
