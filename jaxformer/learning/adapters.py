"""Adapters: a run that trains little beside the parameters of another, which stay as they are.

An adapter makes the model's parameters before the model sees them: of the `base`, which no gradient moves, and of a few
arrays beside it. No model, optimizer or checkpoint knows more of it than that.
"""

import abc
import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.declarations import Declared, Letters, by_path, draw, is_declared, selected
from jaxformer.learning.groups import Hidden, Which
from jaxformer.spec import Spec

BESIDE = "adapters"  # where the arrays of an adapter are among those that a run trains


class Adapter(Spec):
    """How parameters are made of a base and of what is trained beside it. Two hooks make one: `beside` and `made`."""

    trained: tuple[Which, ...] = dataclasses.field(default=(), kw_only=True)  # arrays that are trained themselves

    @abc.abstractmethod
    def beside(self, path: str, box: Declared) -> dict[str, Declared]:
        """The arrays beside one of the base's, by name; {}: it stays as it is. A box needs its own `init`."""

    @abc.abstractmethod
    def made(self, box: Declared, value: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        """A parameter, of an array of the base and those beside it; to begin with it must be that array."""

    def declared(self, of_model: Any) -> dict[str, Any]:
        """The declarations of what a run trains, of those of its model: some arrays of the model, those that no
        gradient moves in any case, and under "adapters" those beside the others."""
        boxes = by_path(of_model)
        beside: dict[str, Any] = {}
        for path, box in boxes.items():
            if not self._itself(path, box) and (arrays := self.beside(path, box)):
                *parents, name = path.split("/")
                functools.reduce(lambda tree, parent: tree.setdefault(parent, {}), parents, beside)[name] = arrays
        return self._apart(of_model, of_model, True) | ({BESIDE: beside} if beside else {})

    def reached(self, of_model: Any, params: Any) -> dict[str, Any]:
        """Of a model's parameters those that a step takes gradients by: they are trained, or made of what is."""
        reaches = lambda path, box: box.trained and (self._itself(path, box) or bool(self.beside(path, box)))
        return selected(params, of_model, reaches)

    def base(self, of_model: Any, params: Any) -> dict[str, Any]:
        """Of a model's parameters those that stay as they are."""
        return self._apart(of_model, params, False)

    def begin(self, of_model: Any, params: Any, key: jax.Array) -> dict[str, Any]:
        """Of a model's parameters those that are trained, and the first values of the arrays beside the others."""
        drawn = draw(self.declared(of_model).get(BESIDE, {}), key, _no_init)
        return self._apart(of_model, params, True) | ({BESIDE: drawn} if drawn else {})

    def whole(self, of_model: Any, params: Any, base: Any) -> Any:
        """The model's parameters, in the order of its declarations."""

        def one(declared: Any, old: Any, own: Any, beside: Any) -> Any:
            if not is_declared(declared):
                parts = old or {}, own or {}, beside or {}
                return {n: one(inner, *(part.get(n) for part in parts)) for n, inner in declared.items()}
            if own is not None:
                return own
            return self.made(declared, old, beside) if beside else old

        return one(of_model, base, params, params.get(BESIDE))

    def check_declared(self, of_model: Any) -> None:
        """Raises ValueError if it trains nothing of a model, or nothing of what it names."""
        boxes = by_path(of_model)
        for which in self.trained:
            if not any(which(path, box) for path, box in boxes.items()):
                raise ValueError(f"adapter.trained: the model has no array for {which}; leave it out")
        if BESIDE not in self.declared(of_model):
            raise ValueError(f"adapter={self}: the model has no array for it; `jaxformer inspect` lists those it has")

    def _apart(self, of_model: Any, tree: Any, itself: bool) -> dict[str, Any]:
        """Of a tree of the model's arrays those that are in the base, or those that are `itself` trained."""
        return selected(tree, of_model, lambda path, box: self._itself(path, box) == itself)

    def _itself(self, path: str, box: Declared) -> bool:
        """Whether a run with this adapter has the array among what it trains, or what advances by itself."""
        return not box.trained or any(which(path, box) for which in self.trained)


class LoRA(Adapter):
    """Low-rank adaptation: each matrix W is W + alpha / rank · B·A, A and B of `rank` (arXiv:2106.09685, section 4.1).

    A is drawn as N(0, 1 / fan-in), B begins at 0. Of stacked matrices, as of layers and experts, each has its own. A
    matrix is what its letters say: into D out of H·K, of a model's own parts too.
    """

    rank: int = 8  # columns of A, rows of B
    alpha: float = 16.0  # the product counts alpha / rank times
    targets: Which = Hidden()  # which matrices are adapted

    def check(self, at: str = "") -> None:
        if self.rank < 1:
            raise ValueError(f"{at}rank={self.rank} must be at least 1; 4 to 64 are usual")
        if self.alpha <= 0:
            raise ValueError(f"{at}alpha={self.alpha} must be more than 0; twice the rank is usual")

    def beside(self, path: str, box: Declared) -> dict[str, Declared]:
        batch, into, out = box.letters
        if not (into and out and self.targets(path, box)):
            return {}
        sizes, first = box.value.shape, len(batch)
        of_batch, of_into, of_out = sizes[:first], sizes[first : first + len(into)], sizes[first + len(into) :]

        def array(letters: Letters, shape: tuple[int, ...], init: Any, fan_in: int) -> Declared:
            value = jax.ShapeDtypeStruct(shape, jnp.float32)
            return box.replace(value=value, letters=letters, decay=True, init=init, fan_in=fan_in, advance=None)

        normal = jax.nn.initializers.normal(box.fan_in**-0.5)
        a = array(Letters(batch, into, RANK), (*of_batch, *of_into, self.rank), normal, box.fan_in)
        b = array(Letters(batch, RANK, out), (*of_batch, self.rank, *of_out), jax.nn.initializers.zeros, self.rank)
        return {"a": a, "b": b}

    def made(self, box: Declared, value: jax.Array, own: Mapping[str, jax.Array]) -> jax.Array:
        batch, into, out = box.letters
        names = "abcdefghijklmnopq"  # the letters of a matrix may come twice, as of D to D
        of_batch, rest = names[: len(batch)], names[len(batch) :]
        of_into, of_out = rest[: len(into)], rest[len(into) : len(into) + len(out)]
        form = f"{of_batch}{of_into}{RANK},{of_batch}{RANK}{of_out}->{of_batch}{of_into}{of_out}"
        return value + (self.alpha / self.rank) * jnp.einsum(form, own["a"], own["b"])


RANK = "r"  # the letter of its axis


def _no_init(box: Declared) -> Any:
    raise ValueError(f"an array of an adapter, with letters {box.letters}, must be declared with its init")
