"""Who may look at whom: a rule over positions and segments, from which masks and distances are made on demand."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxformer.spec import Spec


class Places(NamedTuple):
    """Where each token stands. Rows that are all alike may be given once, as a batch of one.

    `position` counts from 0 within a document, `segment` tells documents of a packed row apart; segment 0 marks
    padding and empty cache slots.
    """

    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]


def places(segment: Int[Array, "B T"]) -> Places:
    """Positions counted from 0 within each segment."""
    index = jnp.arange(segment.shape[1])[None]
    new = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    return Places(index - start, segment)


def one_document(length: int) -> Places:
    """Every row one document of `length` tokens."""
    return Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32))


class Causal(Spec):
    """A token sees itself and the past of its document."""

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        """Positions of query and key, broadcast against each other, of the same document."""
        return key <= query

    def span(self, length: int) -> int:
        """How many cache slots a text of `length` tokens needs, so that nothing visible is overwritten."""
        return length


class Window(Causal):
    """Causal, and at most `size` tokens back, the token itself counted (arXiv:2004.05150)."""

    size: int = 128

    def check(self, at: str = "") -> None:
        if self.size < 1:
            raise ValueError(f"{at}size={self.size} must be at least 1; 1 sees the token itself alone")

    def sees(self, query: Int[Array, "..."], key: Int[Array, "..."]) -> Bool[Array, "..."]:
        return (key <= query) & (key > query - self.size)

    def span(self, length: int) -> int:
        return min(self.size, length)


class View(NamedTuple):
    """Queries, keys and the rule between them. Arrays are made on demand, so that a kernel may work in blocks."""

    query: Places
    key: Places
    rule: Causal

    def distance(self) -> Int[Array, "B 1 T S"]:
        """How many tokens the key lies back."""
        return self.query.position[:, None, :, None] - self.key.position[:, None, None, :]

    def mask(self) -> Bool[Array, "B 1 T S"]:
        """True where the query sees the key. Padding sees padding only."""
        query = Places(*(a[:, None, :, None] for a in self.query))
        key = Places(*(a[:, None, None, :] for a in self.key))
        return (query.segment == key.segment) & self.rule.sees(query.position, key.position)
