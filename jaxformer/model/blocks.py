"""The block, and a stack of blocks that is scanned or unrolled over the same stacked parameters."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxformer.keys import fold
from jaxformer.model.attention import Attention, record
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import FeedForward, LayerNorm, NoNorm, dropout
from jaxformer.model.masks import Bidirectional, Causal, Places
from jaxformer.model.positions import NoPosition
from jaxformer.spec import Arrays, Spec, declare

EMBED, WEIGHTS, ATTENTION, FEED, CROSS_WEIGHTS, CROSS = range(6)  # sites of dropout

Norm = Callable[[jax.Array], jax.Array]


class PreNorm(Spec):
    """x + f(norm(x)) (arXiv:2002.04745); also the base of all ways in which a branch f joins the residual stream x.

    Where a sum is off, the stream goes through the branch alone.
    """

    attention: bool = True  # whether x is added to what attention gives
    cross_attention: bool = True
    feed_forward: bool = True

    n_norms = 1  # of each branch
    last_norm = True  # the stream is normed once more after the last block

    def before(self, norms: tuple[Norm, ...], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the branch is given."""
        return norms[0](x)

    def after(
        self, norms: tuple[Norm, ...], x: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        """The stream after the branch has given h; x is 0 where the sum is off."""
        return x + h


class PostNorm(PreNorm):
    """norm(x + f(x)), as the first transformer (arXiv:1706.03762)."""

    last_norm = False

    def before(self, norms: tuple[Norm, ...], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return x

    def after(
        self, norms: tuple[Norm, ...], x: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        return norms[0](x + h)


class SandwichNorm(PreNorm):
    """x + norm(f(norm(x))), a norm before the branch and one behind it (arXiv:2105.13290)."""

    n_norms = 2

    def after(
        self, norms: tuple[Norm, ...], x: Float[Array, "B T D"], h: Float[Array, "B T D"]
    ) -> Float[Array, "B T D"]:
        return x + norms[1](h)


class BlockSpec(Spec):
    """What a block is made of."""

    position: NoPosition
    kernel: Softmax | None = Softmax()  # None: no attention of a text to itself
    mask: Bidirectional = Causal()
    feed_forward: FeedForward | None = FeedForward()  # None: a block of attention alone
    norm: NoNorm = LayerNorm()
    residual: PreNorm = PreNorm()
    qk_norm: NoNorm = NoNorm()
    qkv_bias: bool = False
    output_bias: bool = False
    output_projection: bool = True
    dropout: float = 0.0
    cross_kernel: Softmax | None = None  # of attention to another text; None: there is none

    @property
    def branches(self) -> tuple[str, ...]:
        """Of the residual stream, those that there are."""
        parts = {"attention": self.kernel, "cross_attention": self.cross_kernel, "feed_forward": self.feed_forward}
        return tuple(name for name, part in parts.items() if part is not None)

    def attention(self, dims: Mapping[str, int], name: str | None = None) -> Attention:
        """Attention of a text to itself."""
        assert self.kernel is not None
        return self._attention(dims, name, (self.kernel, self.position, self.mask))

    def cross_attention(self, dims: Mapping[str, int], name: str | None = None) -> Attention:
        """The same attention, to all of another text."""
        assert self.cross_kernel is not None
        return self._attention(dims, name, (self.cross_kernel, NoPosition(), Bidirectional()))

    def _attention(
        self, dims: Mapping[str, int], name: str | None, parts: tuple[Softmax, NoPosition, Bidirectional]
    ) -> Attention:
        projections = self.qkv_bias, self.output_bias, self.output_projection
        return Attention(dims, *parts, *projections, self.qk_norm, self.dropout, name=name)


class Block(nn.Module):
    """Attention, attention to another text if there is one, then feed-forward, each a branch of the residual stream."""

    spec: BlockSpec
    dims: Mapping[str, int]

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        at: Places,
        shared: Arrays,
        key: jax.Array | None,
        cache: Arrays | None = None,
        memory: Arrays | None = None,
    ) -> tuple[Float[Array, "B T D"], Arrays | None]:
        s, written = self.spec, cache

        def attend(h: jax.Array) -> jax.Array:
            nonlocal written
            h, written = s.attention(self.dims, "attention")(h, at, shared, fold(key, WEIGHTS), cache)
            return h

        def cross(h: jax.Array) -> jax.Array:
            attention, seen = s.cross_attention(self.dims, "cross_attention"), memory
            if seen is None:
                if not self.is_initializing():
                    raise ValueError("an encoder–decoder's hidden states need the memory that `encode` returns")
                seen = attention.remember(h, at, {})
            return attention(h, at, {}, fold(key, CROSS_WEIGHTS), memory=seen)[0]

        def feed_forward(h: jax.Array) -> jax.Array:
            assert s.feed_forward is not None
            own = declare(self, "feed_forward", s.feed_forward.params(), self.dims)
            with jax.named_scope("feed_forward"):
                out = s.feed_forward(own, h)
            inner = type(s.feed_forward).__call__ is FeedForward.__call__  # else there may be none
            if self.is_mutable_collection("activations"):
                record(self, feed_forward={"out": out} | ({"inner": s.feed_forward.inner(own, h)} if inner else {}))
            return out

        functions = {
            "attention": (attend, ATTENTION),
            "cross_attention": (cross, CROSS),
            "feed_forward": (feed_forward, FEED),
        }
        for name in s.branches:
            f, site = functions[name]
            x = self._branch(name, f, x, fold(key, site))
        return x, written

    def _branch(self, name: str, f: Norm, x: jax.Array, key: jax.Array | None) -> jax.Array:
        """The stream after branch f."""
        s = self.spec
        labels = [f"norm_{name}", f"norm_{name}_out"][: s.residual.n_norms]
        norms = tuple(functools.partial(s.norm, declare(self, label, s.norm.params(), self.dims)) for label in labels)
        h = f(s.residual.before(norms, x))
        stream = x if getattr(s.residual, name) else jnp.zeros_like(x)
        x = s.residual.after(norms, stream, dropout(key, h, s.dropout))
        record(self, **{f"after_{name}": x})
        return x


class Group(nn.Module):
    """One block of each kind: what the scan repeats."""

    kinds: tuple[BlockSpec, ...]
    dims: Mapping[str, int]

    @nn.compact
    def __call__(self, x: jax.Array, scanned: Any, at: Places, shared: Arrays, key: jax.Array | None) -> Any:
        first, caches, memories = scanned
        written = {}
        for i, kind in enumerate(self.kinds):
            block, name = Block(kind, self.dims, name=f"block{i}"), f"block{i}"
            own = caches and caches[name], memories and memories[name]
            x, written[name] = block(x, at, shared, fold(key, first + i), *own)
        return x, written


class Stack(nn.Module):
    """`n_layers` blocks that repeat a group of kinds, then a last norm if they are pre-norm.

    Parameters, cache and memory of each kind lie stacked along a leading axis L; `unroll` groups are laid out in each
    turn of the scan, over the same parameters and with the same result. With `remat`, the name of one of
    jax.checkpoint_policies, a group keeps for the backward pass only what that policy says, and computes the rest anew.
    """

    kinds: tuple[BlockSpec, ...]
    n_layers: int
    dims: Mapping[str, int]
    embedding_norm: bool = False
    unroll: int = 1
    remat: str | None = None

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], at: Places, key: jax.Array | None, cache: Any = None, memory: Any = None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s, turns = self.kinds[0], self.n_layers // len(self.kinds)  # position, norm, residual are those of all kinds
        shared = {} if s.position.per_layer else declare(self, "position", s.position.params(), self.dims)
        x = s.position.embed(shared, x, at)
        if self.embedding_norm:
            x = s.norm(declare(self, "norm_embedding", s.norm.params(), self.dims), x)
        x = dropout(fold(key, self.n_layers, EMBED), x, s.dropout)
        record(self, embedded=x)
        group: Any = Group
        if self.remat:  # the scan keeps XLA from merging what is computed anew with what was computed at first
            group = nn.remat(Group, policy=getattr(jax.checkpoint_policies, self.remat), prevent_cse=False)
        layers = nn.scan(
            group,
            variable_axes={"params": 0, "activations": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=turns,
            unroll=min(self.unroll, turns),
            metadata_params={nn.PARTITION_NAME: "L"},
        )(self.kinds, self.dims, name="layers")
        first = jnp.arange(0, self.n_layers, len(self.kinds))
        x, cache = layers(x, (first, cache, memory), at, shared, key)
        if s.residual.last_norm:
            x = s.norm(declare(self, "norm", s.norm.params(), self.dims), x)
        record(self, out=x)
        return x, cache
