"""Who may look at whom: a rule over the places of tokens, from which masks and distances are made on demand."""

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxformer.declarations import Arrays, Slot
from jaxformer.spec import Spec


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rows:
    """What is known of rows before anything is compiled."""

    whole: bool = False  # each is one document from its first token on, without padding


ANY = Rows()


class Places(NamedTuple):
    """Where each token stands. Rows that are all alike may be given once, as a batch of one.

    `position` counts from 0 within a document, `segment` tells documents of a packed row apart; segment 0 marks
    padding and empty cache slots. Where a document has two texts, as a prefix and what follows it, `part` is 0 in the
    first and 1 in the second.
    """

    position: Int[Array, "B T"]
    segment: Int[Array, "B T"]
    part: Int[Array, "B T"] | None = None
    rows: Rows = ANY


def places(segment: Int[Array, "B T"], part: Int[Array, "B T"] | None = None) -> Places:
    """Positions counted from 0 within each segment."""
    index = jnp.arange(segment.shape[1])[None]
    new = jnp.pad(segment[:, 1:] != segment[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    start = jax.lax.cummax(jnp.where(new, index, 0), axis=1)
    return Places(index - start, segment, part)


def one_document(length: int) -> Places:
    """Every row one document of `length` tokens."""
    return Places(jnp.arange(length)[None], jnp.ones((1, length), jnp.int32), rows=Rows(whole=True))


class Mask(Spec):
    """A rule of who sees whom within a document; padding sees padding only, whatever the rule."""

    causal = False  # True: nothing later is ever seen
    reads_part = False  # True: `sees` reads `part`, which cached tokens then keep

    @property
    def sees_answers(self) -> bool:
        """Whether a token may see later ones that are not of the first part."""
        return not self.causal

    @abc.abstractmethod
    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        """Places of a query and a key of the same document, whose arrays broadcast against each other."""

    def reach(self) -> tuple[int | None, int | None]:
        """How many tokens back and ahead at most a token sees of its document; None: any number."""
        return None, 0 if self.causal else None

    def span(self, length: int) -> int:
        """How many cache slots a text of `length` tokens needs, so that nothing visible is overwritten: `length`, or
        the same for all that are longer."""
        return length


class Bidirectional(Mask):
    """A token sees all of its document."""

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return True


class Causal(Mask):
    """A token sees itself and the past of its document."""

    causal = True

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return key.position <= query.position


class Prefix(Mask):
    """Causal, but the first part of a document is seen by all of its tokens (arXiv:1910.10683, section 3.2.1)."""

    reads_part = True

    @property
    def sees_answers(self) -> bool:
        return False

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        past = key.position <= query.position
        return past if key.part is None else past | (key.part == 0)


class Local(Mask):
    """A token sees those less than `size` away, on either side (arXiv:2004.05150)."""

    size: int = 128  # how many tokens away the first unseen one is

    def check(self, at: str = "") -> None:
        if not 1 <= self.size < 2**31:
            raise ValueError(f"{at}size={self.size} must be at least 1, the token itself, and less than 2**31")

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return jnp.abs(query.position - key.position) < self.size

    def reach(self) -> tuple[int | None, int | None]:
        return self.size - 1, 0 if self.causal else self.size - 1

    def span(self, length: int) -> int:
        return min(self.size, length)


class Window(Local):
    """Causal, and at most `size` tokens back, the token itself counted (arXiv:2004.05150)."""

    causal = True

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return (key.position <= query.position) & (key.position > query.position - self.size)


class Both(Mask):
    """What every one of several rules allows, as Both((Prefix(), Local(64)))."""

    rules: tuple[Mask, ...]  # the masks that are combined

    def check(self, at: str = "") -> None:
        if not self.rules:
            raise ValueError(f"{at}rules must not be empty; give one or more")

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(rule.causal for rule in self.rules)

    @property
    def sees_answers(self) -> bool:
        return all(rule.sees_answers for rule in self.rules)

    @property
    def reads_part(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(rule.reads_part for rule in self.rules)

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return functools.reduce(operator.and_, (rule.sees(query, key) for rule in self.rules))

    def reach(self) -> tuple[int | None, int | None]:
        back, ahead = (
            [n for n in each if n is not None] for each in zip(*(r.reach() for r in self.rules), strict=True)
        )
        return min(back, default=None), min(ahead, default=None)

    def span(self, length: int) -> int:
        return min(rule.span(length) for rule in self.rules)


class Either(Both):
    """What at least one of several rules allows, as Either((Window(64), Prefix()))."""

    @property
    def causal(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return all(rule.causal for rule in self.rules)

    @property
    def sees_answers(self) -> bool:
        return any(rule.sees_answers for rule in self.rules)

    def sees(self, query: Places, key: Places) -> Bool[Array, "..."] | bool:
        return functools.reduce(operator.or_, (rule.sees(query, key) for rule in self.rules))

    def reach(self) -> tuple[int | None, int | None]:
        back, ahead = zip(*(rule.reach() for rule in self.rules), strict=True)
        return None if None in back else max(back), None if None in ahead else max(ahead)

    def span(self, length: int) -> int:
        return max(rule.span(length) for rule in self.rules)


class View(NamedTuple):
    """Queries, keys and the rule between them. Arrays are made on demand, so that a kernel may work in blocks."""

    query: Places
    key: Places
    rule: Mask
    n_heads: int  # of the queries

    def distance(self) -> Int[Array, "B 1 T S"]:
        """How many tokens the key lies back."""
        return self.query.position[:, None, :, None] - self.key.position[:, None, None, :]

    def mask(self) -> Bool[Array, "B 1 T S"]:
        """True where the query sees the key. Padding sees padding only."""
        query = jax.tree.map(lambda a: a[:, None, :, None], self.query)
        key = jax.tree.map(lambda a: a[:, None, None, :], self.key)
        return (query.segment == key.segment) & self.rule.sees(query, key)


Range = tuple[jax.Array | int, int]  # the first of some entries, and how many
Bias = Callable[[Arrays, View, Arrays, Arrays], Any]  # `Position.bias`


def no_bias(params: Arrays, view: View, new: Arrays, seen: Arrays) -> float:
    """That of most positions."""
    return 0.0


class Look(NamedTuple):
    """What heads of queries look at."""

    q: Float[Array, "B H T K"]
    new: Arrays  # what is remembered of the queries' own tokens
    seen: Arrays  # and of the keys' tokens
    view: View  # which of these may be seen
    slots: Mapping[str, Slot] = {}  # of what is remembered
    bias_of: Bias = no_bias
    bias_params: Mapping[str, jax.Array] = {}

    @property
    def bias(self) -> Float[Array, "..."] | float:
        """Of the position, to be added to scores [B, H, T, S]."""
        return self.bias_of(self.bias_params, self.view, self.new, self.seen)

    def cut(self, queries: Range, keys: Range) -> "Look":
        """Some of the queries at some of the keys: (first, how many)."""
        of = lambda places, some: jax.tree.map(lambda a: _cut(a, 1, some), places)
        view = self.view._replace(query=of(self.view.query, queries), key=of(self.view.key, keys))
        axes = {name: slot.letters.index("S") for name, slot in self.slots.items() if "S" in slot.letters}
        each = lambda arrays, some: {n: _cut(a, axes[n], some) if n in axes else a for n, a in arrays.items()}
        q, new, seen = _cut(self.q, 2, queries), each(self.new, queries), each(self.seen, keys)
        return self._replace(q=q, new=new, seen=seen, view=view)


def _cut(array: jax.Array, axis: int, some: Range) -> jax.Array:
    return array if array.shape[axis] == some[1] else jax.lax.dynamic_slice_in_dim(array, *some, axis)
