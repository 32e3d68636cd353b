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


class PreNorm(Spec):
    """x + f(norm(x)) (arXiv:2002.04745); also the base of all ways in which a branch f joins the residual stream x."""

    last_norm = True  # the stream is normed once more after the last block

    def before(self, norm: NoNorm, params: Arrays, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the branch is given."""
        return norm(params, x)

    def after(
        self, norm: NoNorm, params: Arrays, x: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream after the branch has given h."""
        return x + h


class PostNorm(PreNorm):
    """norm(x + f(x)), as the first transformer (arXiv:1706.03762)."""

    last_norm = False

    def before(self, norm: NoNorm, params: Arrays, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x

    def after(
        self, norm: NoNorm, params: Arrays, x: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        return norm(params, x + h)


class BlockSpec(Spec):
    """What a block is made of."""

    position: NoPosition
    kernel: Softmax = Softmax()
    mask: Causal = Causal()
    feed_forward: FeedForward = FeedForward()
    norm: NoNorm = LayerNorm()
    residual: PreNorm = PreNorm()
    bias: bool = False  # of attention's projections
    dropout: float = 0.0


class Block(nn.Module):
    """Attention, then feed-forward, each a branch of the residual stream."""

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
        s, norm = self.spec, self.norm_attention
        h, cache = self.attention(s.residual.before(s.norm, norm, x), at, shared, fold(key, WEIGHTS), cache)
        x = s.residual.after(s.norm, norm, x, dropout(fold(key, ATTENTION), h, s.dropout))
        norm = self.norm_feed_forward
        h = s.feed_forward(self.feed_forward, s.residual.before(s.norm, norm, x))
        return s.residual.after(s.norm, norm, x, dropout(fold(key, FEED), h, s.dropout)), cache


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
    """`n_layers` blocks that repeat a group of kinds, then a last norm if they are pre-norm.

    Parameters and cache of each kind lie stacked along a leading axis L; `unroll` groups are laid out in each turn of
    the scan, over the same parameters and with the same result. With `remat`, the name of one of
    jax.checkpoint_policies, a group keeps for the backward pass only what that policy says, and computes the rest anew.
    """

    kinds: tuple[BlockSpec, ...]
    n_layers: int
    dims: Mapping[str, int]
    unroll: int = 1
    remat: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], at: Places, key: jax.Array | None, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s, turns = self.kinds[0], self.n_layers // len(self.kinds)  # position, norm, residual are those of all kinds
        shared = {} if s.position.per_layer else declare(self, "position", s.position.params(), self.dims)
        x = dropout(fold(key, self.n_layers, EMBED), s.position.embed(shared, x, at), s.dropout)
        group: Any = Group
        if self.remat:  # the scan keeps XLA from merging what is computed anew with what was computed at first
            group = nn.remat(Group, policy=getattr(jax.checkpoint_policies, self.remat), prevent_cse=False)
        layers = nn.scan(
            group,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=turns,
            unroll=self.unroll,
            metadata_params={nn.PARTITION_NAME: "L"},
        )(self.kinds, self.dims, name="layers")
        first = jnp.arange(0, self.n_layers, len(self.kinds))
        x, cache = layers(x, (first, cache), at, shared, key)
        if s.residual.last_norm:
            x = s.norm(declare(self, "norm", s.norm.params(), self.dims), x)
        return x, cache
