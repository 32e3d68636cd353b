"""Residual rules: how the branches of a block join the stream that runs through the layers."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.declarations import Arrays, Declarations, Param
from jaxformer.model.layers import constant, ones, weighted, zeros
from jaxformer.spec import Spec


class Site(NamedTuple):
    """Where a branch joins the stream."""

    branch: str  # "attention", "cross_attention" or "feed_forward"
    layer: Int[Array, ""] | int  # from 0, traced
    params: Arrays  # the rule's own, here
    key: jax.Array | None  # for draws of the rule's; None means evaluation
    norms: tuple[Callable[[jax.Array], jax.Array], ...]  # as many as the rule asks for


class Residual(Spec):
    """How branches join the residual stream, which may be any arrays, as long as they keep their shapes."""

    n_norms = 1  # of each branch
    last_norm = True  # what the stream ends as is normed once more

    def params(self, branch: str, n_layers: int) -> Declarations:
        """For each layer at a branch and at "enter", and once for the stack at "begin" and "end"."""
        return {}

    def begin(self, params: Arrays, x: Float[Array, "B T D"], n_layers: int) -> Any:
        """The stream before the first layer."""
        return x

    def enter(self, params: Arrays, stream: Any, layer: Int[Array, ""] | int, n_layers: int) -> Any:
        """The stream as the first branch of a layer finds it."""
        return stream

    def end(self, params: Arrays, stream: Any) -> Float[Array, "B T D"]:
        """What the stream is read as, behind the last layer."""
        return stream

    def order(self, branches: tuple[str, ...]) -> tuple[str, ...]:
        """The branches of a layer, as they follow each other."""
        return branches

    @abc.abstractmethod
    def before(self, stream: Any, site: Site) -> Float[Array, "B T D"]:
        """What the branch is given."""

    @abc.abstractmethod
    def after(self, stream: Any, h: Float[Array, "B T D"], site: Site) -> Any:
        """The stream after the branch has given h. If h is not used, the branch is not computed."""


class PreNorm(Residual):
    """x + f(norm(x)) (arXiv:2002.04745). Where a sum is off, the stream goes through the branch alone."""

    attention: bool = True  # whether x is added to what attention gives
    cross_attention: bool = True  # whether x is added to what cross-attention gives
    feed_forward: bool = True  # whether x is added to what the feed-forward gives

    def before(self, stream: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return site.norms[0](stream)

    def after(self, stream: Float[Array, "B T D"], h: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return stream + h if getattr(self, site.branch) else h


class PostNorm(PreNorm):
    """norm(x + f(x)), as the first transformer (arXiv:1706.03762)."""

    last_norm = False

    def before(self, stream: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return stream

    def after(self, stream: Float[Array, "B T D"], h: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return site.norms[0](super().after(stream, h, site))


class SandwichNorm(PreNorm):
    """x + norm(f(norm(x))), a norm before the branch and one behind it (arXiv:2105.13290)."""

    n_norms = 2

    def after(self, stream: Float[Array, "B T D"], h: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return super().after(stream, site.norms[1](h), site)


class FeedForwardFirst(PreNorm):
    """PreNorm whose layers begin with the feed-forward; of other orders: arXiv:1911.03864."""

    def order(self, branches: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(sorted(branches, key=lambda name: name != "feed_forward"))


class Parallel(PreNorm):
    """x + attention(norm(x)) + feed_forward(norm(x)): both read the same stream, each through a norm of its own (GPT-J,
    2021; one norm for both there)."""

    def begin(self, params: Arrays, x: Float[Array, "B T D"], n_layers: int) -> Any:
        return x, x  # the stream, and what it was before the layer

    def end(self, params: Arrays, stream: Any) -> Float[Array, "B T D"]:
        return stream[0]

    def before(self, stream: Any, site: Site) -> Float[Array, "B T D"]:
        return site.norms[0](stream[site.branch == "feed_forward"])

    def after(self, stream: Any, h: Float[Array, "B T D"], site: Site) -> Any:
        now = super().after(stream[0], h, site)
        return (now, now) if site.branch == "feed_forward" else (now, stream[1])


class ReZero(PreNorm):
    """x + α·f(norm(x)), a learned α for each branch that begins at zero (arXiv:2003.04887, there without norms)."""

    start: float = 0.0  # what α begins at

    def params(self, branch: str, n_layers: int) -> Declarations:
        return {} if branch in ("begin", "enter", "end") else {"alpha": Param("", constant(self.start))}

    def after(self, stream: Float[Array, "B T D"], h: Float[Array, "B T D"], site: Site) -> Float[Array, "B T D"]:
        return super().after(stream, weighted((site.params["alpha"], h)), site)


class InputInjection(PreNorm):
    """PreNorm whose layers begin with λ·x + λ₀·x₀, of the stream and the embedded input; λ begins at 1, λ₀ at 0
    (modded-nanogpt, nanochat)."""

    def params(self, branch: str, n_layers: int) -> Declarations:
        return {"x": Param("", ones), "x0": Param("", zeros)} if branch == "enter" else {}

    def begin(self, params: Arrays, x: Float[Array, "B T D"], n_layers: int) -> Any:
        return {"x": x, "x0": x}

    def enter(self, params: Arrays, stream: Any, layer: Int[Array, ""] | int, n_layers: int) -> Any:
        return {**stream, "x": weighted((params["x"], stream["x"]), (params["x0"], stream["x0"]))}

    def end(self, params: Arrays, stream: Any) -> Float[Array, "B T D"]:
        return stream["x"]

    def before(self, stream: Any, site: Site) -> Float[Array, "B T D"]:
        return super().before(stream["x"], site)

    def after(self, stream: Any, h: Float[Array, "B T D"], site: Site) -> Any:
        return {**stream, "x": super().after(stream["x"], h, site)}


class UNet(InputInjection):
    """InputInjection to whose upper layers, i from the last, is added what the i-th layer gave, times a learned number
    that begins at 1 (arXiv:2209.12152, modded-nanogpt); neighbours in the middle are joined by the stream alone."""

    def params(self, branch: str, n_layers: int) -> Declarations:
        count = (n_layers - 1) // 2
        skip = {"skip": Param("U", ones, sizes={"U": count})} if branch == "begin" and count else {}
        return {**super().params(branch, n_layers), **skip}

    def begin(self, params: Arrays, x: Float[Array, "B T D"], n_layers: int) -> Any:
        stream, count = super().begin(params, x, n_layers), (n_layers - 1) // 2
        return stream | {"kept": jnp.zeros((count, *x.shape), x.dtype), "skip": params["skip"]} if count else stream

    def enter(self, params: Arrays, stream: Any, layer: Int[Array, ""] | int, n_layers: int) -> Any:
        if "kept" in stream:
            x, kept, count = stream["x"], stream["kept"], len(stream["kept"])
            lower, upper = (layer > 0) & (layer <= count), layer >= n_layers - count
            kept = jnp.where(lower, jax.lax.dynamic_update_index_in_dim(kept, x, layer - 1, 0), kept)
            opposite = lambda a: jax.lax.dynamic_index_in_dim(a, n_layers - 1 - layer, keepdims=False)
            x = jnp.where(upper, x + weighted((opposite(stream["skip"]), opposite(kept))), x)
            stream = {**stream, "x": x, "kept": kept}
        return super().enter(params, stream, layer, n_layers)
