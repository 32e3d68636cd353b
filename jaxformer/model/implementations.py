"""Implementations of softmax attention: how a kernel's formula is computed, with the same result but for rounding."""

import abc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.declarations import Arrays
from jaxformer.model.layers import Out
from jaxformer.model.masks import Look, Range
from jaxformer.spec import Spec

Formula = Callable[[Arrays, Look, jax.Array | None, float], Out]  # as `Softmax.formula`
GROUPS = 4  # of queries at most, each with a range of keys of its own: so many programs are compiled for a layer
BLOCKS = "blocks"  # the scope of what computes by blocks: the products of the formula count, not these
LONG = 256  # tokens of a row from which on `Blocked` is faster on CPU: benchmarks/attention.py


class Implementation(Spec):
    """How a kernel's formula is computed."""

    def refuses(self, rate: float) -> str | None:
        """Why it cannot compute weights that have dropout of that rate; None if it can."""

    def chosen(self, tokens: int, rate: float, ours: bool) -> tuple["Implementation", str]:
        """The implementation for rows of so many tokens, before anything is compiled, and why it; `ours`: the parts
        that it is to compute are the package's. Raises ValueError if it refuses."""
        if reason := self.refuses(rate):
            raise ValueError(f"implementation={type(self).__name__}: {reason}")
        return self, "as asked"

    @abc.abstractmethod
    def __call__(self, formula: Formula, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        """What the formula gives of the rest."""


class Plain(Implementation):
    """The formula as it is written: all scores at once, T · S numbers for each head."""

    def __call__(self, formula: Formula, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        return formula(params, look, key, rate)


class Auto(Plain):
    """`Blocked` for long rows on CPU, else `Plain`. A run chooses when it starts; a model by itself is `Plain`."""

    def chosen(self, tokens: int, rate: float, ours: bool) -> tuple[Implementation, str]:
        blocked, backend = Blocked(), jax.default_backend()
        if backend != "cpu":
            return Plain(), f"none is known to be faster on {backend}"
        if tokens < LONG:
            return Plain(), f"rows of {tokens} tokens"
        if reason := blocked.refuses(rate):
            return Plain(), reason
        return (blocked, f"rows of {tokens} tokens") if ours else (Plain(), "a part of your own")


class Blocked(Implementation):
    """The formula for some queries at a time, over the keys that the mask leaves them; computed anew for the gradient.

    Memory grows with T, not with T². Keys are left out in steps of a quarter of T, or of `size`: a causal mask saves
    almost half of the products, a window all but its share. Documents of a row must lie one after another, their
    positions counted from 0.
    """

    size: int = 64  # how many queries at a time

    def check(self, at: str = "") -> None:
        if self.size < 1:
            raise ValueError(f"{at}size={self.size} must be at least 1; 64 is usual")

    def refuses(self, rate: float) -> str | None:
        return f"dropout={rate} of weights is drawn for all queries at once" if rate else None

    def __call__(self, formula: Formula, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        if key is not None and (reason := self.refuses(rate)):
            raise ValueError(f"implementation={type(self).__name__}: {reason}")
        whole, T = formula(params, look, key, rate), look.q.shape[2]  # of which only what is used is computed
        if self.size >= T:
            return whole
        S = look.view.key.position.shape[1]
        back, ahead = look.view.rule.reach() if look.seen is look.new else (None, None)
        step = -(-(T // self.size) // GROUPS) * self.size
        edges = [*range(0, T - T % self.size, step), T - T % self.size, T]
        parts: list[jax.Array] = []
        for first, last in itertools.pairwise(dict.fromkeys(edges)):
            low = 0 if back is None else max(0, first - back)
            high = S if ahead is None else min(S, last + ahead)
            size = min(self.size, last - first)

            def block(at: jax.Array, params: Any, look: Look, size: int = size, keys: Range = (low, high - low)) -> Any:
                return formula(params, look.cut((at, size), keys), key, rate).h

            with jax.named_scope(BLOCKS):
                parts.append(_in_turn(block, np.arange(first, last, size, dtype=np.int32), params, look))
        return whole._replace(h=jnp.concatenate(parts, 2))


def _in_turn(block: Callable[..., jax.Array], firsts: Any, params: Arrays, look: Look) -> jax.Array:
    """block(first, params, look) [B, H, size, M] of N known numbers, in turn, side by side: [B, H, N · size, M].

    The backward pass computes each block anew and adds up its gradients. jax.checkpoint in a scan would keep the masks
    of all blocks, T · S numbers, as they depend on nothing that is differentiated.
    """
    arrays = params, look.q, look.new, look.seen, look.bias_params, look.view.query, look.view.key
    leaves, tree = jax.tree.flatten(arrays)
    real = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]

    def one(at: jax.Array, floats: Sequence[jax.Array], rest: Sequence[jax.Array]) -> jax.Array:
        of = {True: iter(floats), False: iter(rest)}
        params, q, *others, query, key = tree.unflatten([next(of[is_real]) for is_real in real])
        view = look.view._replace(query=query, key=key)
        new, seen, bias_params = others
        return block(at, params, look._replace(q=q, new=new, seen=seen, view=view, bias_params=bias_params))

    @jax.custom_vjp
    def run(floats: Any, rest: Any) -> jax.Array:
        found = jax.lax.scan(lambda _, at: (None, one(at, floats, rest)), None, firsts)[1]
        return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1, found.shape[-1])

    def backward(saved: Any, g: jax.Array) -> Any:
        floats, rest = saved
        size = g.shape[2] // len(firsts)

        def body(total: Any, at: jax.Array) -> Any:
            pull = jax.vjp(lambda floats: one(at, floats, rest), floats)[1]
            grads = pull(jax.lax.dynamic_slice_in_dim(g, at - firsts[0], size, 2))[0]
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads), None

        zeros = [jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in floats]
        total = jax.lax.scan(body, zeros, firsts)[0]
        return [a.astype(b.dtype) for a, b in zip(total, floats, strict=True)], None

    run.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return run(*([a for a, is_real in zip(leaves, real, strict=True) if is_real is kind] for kind in (True, False)))
