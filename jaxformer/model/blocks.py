"""The block, and a stack of blocks that is scanned or unrolled over the same stacked parameters."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxformer.keys import fold
from jaxformer.model.attention import Attention
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import FeedForward, LayerNorm, NoNorm, dropout
from jaxformer.model.masks import Causal, Places
from jaxformer.model.positions import NoPosition
from jaxformer.spec import Arrays, Spec, declare

EMBED, WEIGHTS, ATTENTION, FEED = range(4)  # sites of dropout


class BlockSpec(Spec):
    """What a block is made of."""

    position: NoPosition
    kernel: Softmax = Softmax()
    mask: Causal = Causal()
    feed_forward: FeedForward = FeedForward()
    norm: NoNorm = LayerNorm()
    bias: bool = False  # of attention's projections
    dropout: float = 0.0


class Block(nn.Module):
    """A pre-norm block: x + attention(norm(x)), then x + feed_forward(norm(x)) (arXiv:2002.04745)."""

    spec: BlockSpec
    dims: Mapping[str, int]

    def setup(self) -> None:
        s = self.spec
        self.attention = Attention(self.dims, s.kernel, s.position, s.mask, s.bias, s.dropout)
        self.norm_attention = declare(self, "norm_attention", s.norm.params(), self.dims)
        self.norm_feed_forward = declare(self, "norm_feed_forward", s.norm.params(), self.dims)
        self.feed_forward = declare(self, "feed_forward", s.feed_forward.params(), self.dims)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Places,
        shared: Arrays,
        key: jax.Array | None,
        cache: Arrays | None = None,
    ) -> tuple[Float[Array, "B T D"], Arrays | None]:
        s = self.spec
        h, cache = self.attention(s.norm(self.norm_attention, x), at, shared, fold(key, WEIGHTS), cache)
        x = x + dropout(fold(key, ATTENTION), h, s.dropout)
        h = s.feed_forward(self.feed_forward, s.norm(self.norm_feed_forward, x))
        return x + dropout(fold(key, FEED), h, s.dropout), cache


class Group(nn.Module):
    """One block of each kind: what the scan repeats."""

    kinds: tuple[BlockSpec, ...]
    dims: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, scanned: Any, at: Places, shared: Arrays, key: jax.Array | None) -> Any:
        first, caches = scanned
        written = {}
        for i, kind in enumerate(self.kinds):
            block, name = Block(kind, self.dims, name=f"block{i}"), f"block{i}"
            x, written[name] = block(x, at, shared, fold(key, first + i), caches and caches[name])
        return x, written


class Stack(nn.Module):
    """`n_layers` blocks that repeat a group of kinds, then a last norm.

    Parameters and cache of each kind lie stacked along a leading axis L; `unroll` groups are laid out in each turn of
    the scan, over the same parameters and with the same result.
    """

    kinds: tuple[BlockSpec, ...]
    n_layers: int
    dims: Mapping[str, int]
    unroll: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], at: Places, key: jax.Array | None, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s = self.kinds[0]  # position, norm and dropout are the same for all kinds
        shared = {} if s.position.per_layer else declare(self, "position", s.position.params(), self.dims)
        x = dropout(fold(key, self.n_layers, EMBED), s.position.embed(shared, x, at), s.dropout)
        layers = nn.scan(
            Group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=self.n_layers // len(self.kinds),
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "L"},
        )(self.kinds, self.dims, name="layers")
        first = jnp.arange(0, self.n_layers, len(self.kinds))
        x, cache = layers(x, (first, cache), at, shared, key)
        return s.norm(declare(self, "norm", s.norm.params(), self.dims), x), cache
