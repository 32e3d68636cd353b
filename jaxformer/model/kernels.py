"""Attention kernels: from queries, and what is remembered of the keys' tokens, to a value per head."""

import abc
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxformer.declarations import Arrays, Declarations, Param, Slot
from jaxformer.model.implementations import Asked, Auto, Implementation, Plain
from jaxformer.model.layers import Out, constant, dropout, product, weighted
from jaxformer.model.masks import Look, Places
from jaxformer.spec import Spec


class Kernel(Spec):
    """How heads of queries make values of what is remembered of the keys' tokens: the function inside attention."""

    keeps_fields = True
    projections = ("q", "k", "v")  # those that it looks at, of queries, keys and values
    shares = False  # True: it uses what layers below in the group have handed on
    whole_stack = False  # True: the group, in which layers hand on, is all layers of the stack

    def check_sizes(self, dims: Mapping[str, int], at: str) -> None:
        """Raises ValueError for sizes of letters that it cannot use, as H heads of width K; `at` is "model."."""

    def params(self) -> Declarations:
        return {}

    def slots(self) -> dict[str, Slot]:
        """Room in the cache; empty if it looks only at what a layer below hands on."""
        return {}

    def implemented(self, asked: Asked) -> tuple["Kernel", str]:
        """The kernel with its implementation chosen for what is asked, and why. Raises ValueError if the one that is
        named cannot do it."""
        return self, ""

    def remember(
        self, params: Arrays, k: Float[Array, "B G T K"], v: Float[Array, "B G T M"], at: Places, cache: Arrays | None
    ) -> Arrays:
        """What the new tokens leave in the declared slots: an entry for each token, or the new running state."""
        return {name: array for name, array in (("k", k), ("v", v)) if name in self.slots()}

    def share(self, params: Arrays, seen: Arrays, below: Mapping[str, Any]) -> tuple[Arrays, Mapping[str, Any]]:
        """What the queries look at, of the slots `seen` with their places; and what is handed on to layers above in
        the group. `below` is what layers below in the group have handed on."""
        return seen, {"seen": seen}

    @abc.abstractmethod
    def __call__(self, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        """Out of values [B, H, T, M], M the width of a value; `key` and `rate` are those of the dropout of weights."""


class Softmax(Kernel):
    """Softmax attention (arXiv:1706.03762). A subclass overrides the step in which its idea differs."""

    implementation: Implementation = dataclasses.field(default=Auto(), kw_only=True)  # how it is computed
    scale: float | None = dataclasses.field(default=None, kw_only=True)  # scores are multiplied by it; None: 1/√K

    def slots(self) -> dict[str, Slot]:
        return {"k": Slot("BGSK"), "v": Slot("BGSK")}

    @property
    def changed(self) -> str | None:
        """The class, if it is one whose formula is another."""
        steps = "scores", "weights", "masked_scores", "formula"
        other = any(getattr(type(self), step) is not getattr(Softmax, step) for step in steps)
        return type(self).__name__ if other else None

    def implemented(self, asked: Asked) -> tuple["Softmax", str]:
        name, ours = type(self).__name__, asked.ours and type(self).__module__ == __name__
        asked = asked._replace(changed=asked.changed or self.changed, ours=ours)
        own = type(self).__call__ is not Softmax.__call__
        implementation, why = (Plain(), "its own") if own else self.implementation.chosen(asked)
        if own and not isinstance(self.implementation, Auto | Plain):
            raise ValueError(f"implementation: {name} computes itself, in its __call__; leave it at Auto")
        return dataclasses.replace(self, implementation=implementation), why

    def scores(self, params: Arrays, q: Float[Array, "B H T K"], new: Arrays, seen: Arrays) -> Float[Array, "B H T S"]:
        """float32 scores before bias and mask; `new` is remembered of the queries' tokens, `seen` of the keys'."""
        scale = q.shape[-1] ** -0.5 if self.scale is None else self.scale  # of q: T·K products instead of T·S
        return _scores(_grouped(q * scale, seen["k"].shape[1]), seen["k"], q.shape[2]).reshape(*q.shape[:3], -1)

    def weights(
        self, params: Arrays, scores: Float[Array, "B H T S"]
    ) -> tuple[Float[Array, "B H T S"], Float[Array, "B H T 1"]]:
        """Weights and what their values are divided by; a masked score is −inf.

        Dividing after the value product saves two passes over [T, S], on CPU a third of attention's time.
        """
        top = jnp.maximum(scores.max(-1, keepdims=True), -1e30)  # a query that sees nothing gives 0, not NaN
        powers = jnp.exp(scores - jax.lax.stop_gradient(top))
        return powers, powers.sum(-1, keepdims=True)

    def masked_scores(self, params: Arrays, look: Look) -> Float[Array, "B H T S"]:
        """What `weights` is given: scores with the position's bias, −inf where a query does not see a key."""
        scores = self.scores(params, look.q, look.new, look.seen) + look.bias
        return jnp.where(look.view.mask(), scores, -jnp.inf)

    def __call__(self, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        return self.implementation(self, params, look, key, rate)

    def formula(self, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        """softmax(scores) V: what every implementation computes."""
        scores = self.masked_scores(params, look)
        powers, total = self.weights(params, scores)
        q, v, total = look.q, look.seen["v"], jnp.where(total > 0, total, 1)  # 1: a query that sees nothing
        weights = _grouped(dropout(key, powers, rate).astype(q.dtype), v.shape[1])
        h = (product("BGTS,BGSK->BGTK", weights, v).reshape(*q.shape[:3], -1) / total).astype(q.dtype)
        return Out(h, activations={"scores": scores, "weights": powers / total})


def plain(
    q: Float[Array, "*B T K"], k: Float[Array, "*B S K"], v: Float[Array, "*B S K"], mask: Bool[Array, "..."]
) -> Float[Array, "*B T K"]:
    """softmax(QKᵀ/√K)V as it is written (arXiv:1706.03762, equation 1): what `Softmax` is tested against."""
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    return jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), axis=-1) @ v


class SoftCapped(Softmax):
    """Softmax attention whose scores are kept within ± `cap` by tanh (arXiv:2408.00118)."""

    cap: float = 50.0  # scores are kept within ± this

    def check(self, at: str = "") -> None:
        if self.cap <= 0:
            raise ValueError(f"{at}cap={self.cap} must be more than 0; 50 is usual")

    def scores(self, params: Arrays, q: Float[Array, "B H T K"], new: Arrays, seen: Arrays) -> Float[Array, "B H T S"]:
        return self.cap * jnp.tanh(super().scores(params, q, new, seen) / self.cap)


class ValueResidual(Softmax):
    """Softmax attention whose values are mixed with those of the first layer that has this kernel, by two learned
    numbers that begin at ½ (arXiv:2410.17897)."""

    shares = True
    whole_stack = True

    def params(self) -> Declarations:
        return {"mix": Param("M", constant(0.5), sizes={"M": 2})}

    def share(self, params: Arrays, seen: Arrays, below: Mapping[str, Any]) -> tuple[Arrays, Mapping[str, Any]]:
        first, (own, old) = below.get("first", seen["v"]), params["mix"]
        return {**seen, "v": weighted((own, seen["v"]), (old, first))}, {"first": first}


class Uniform(Softmax):
    """The plain mean of what a token sees: attention before it looks at anything."""

    projections = ("v",)

    def slots(self) -> dict[str, Slot]:
        return {"v": Slot("BGSK")}

    def masked_scores(self, params: Arrays, look: Look) -> Float[Array, "B H T S"]:
        shape = *look.q.shape[:3], look.seen["v"].shape[2]
        return jnp.where(look.view.mask(), jnp.zeros(shape, jnp.float32), -jnp.inf)  # whatever the position's bias


def _scores(q: Float[Array, "B G RT K"], k: Float[Array, "B G S K"], T: int) -> Float[Array, "B G RT S"]:
    """QKᵀ. On CPU, of one token, as while text is written, a matrix times a vector for each query: of a product of
    matrices XLA lays out all keys anew."""
    if T > 1 or jax.default_backend() != "cpu":
        return product("BGTK,BGSK->BGTS", q, k)
    one = lambda r: jnp.einsum("BGSK,BGK->BGS", k, q[:, :, r], preferred_element_type=jnp.float32)
    return jnp.stack([one(r) for r in range(q.shape[2])], 2)


def _grouped(x: Float[Array, "B H T N"], groups: int) -> Float[Array, "B G RT N"]:
    """The queries of R = H / G heads one behind the other, beside the key/value head that they share. With R as an axis
    of its own, even of 1, gradients on CPU take up to twice the time (LOG.md)."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])
