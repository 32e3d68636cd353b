"""Declarations of the arrays that a part owns: its parameters, and its room in the cache."""

import dataclasses
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

Arrays = Mapping[str, jax.Array]
Draw = Callable[..., jax.Array]  # of an array's first values: (key, shape, dtype) -> array


class Letters(NamedTuple):
    """The axes of an array (docs/extend.md, "Letters"): of `batch` many alike, what a matrix sums over, the rest.

    "D->HK" is a matrix from D to H·K, "E|D->F" are E of them, and stacked over layers they are "LE|D->F". Letters
    without an arrow are a bias, gain or table.
    """

    batch: str
    into: str  # "" of what is no matrix
    out: str

    @classmethod
    def of(cls, text: str) -> "Letters":
        batch, _, rest = text.rpartition("|")
        into, _, out = rest.rpartition("->")
        return cls(batch, into, out)

    @property
    def all(self) -> str:
        """A letter for each axis, in order."""
        return self.batch + self.into + self.out

    def __str__(self) -> str:
        return (f"{self.batch}|" if self.batch else "") + (f"{self.into}->" if self.into else "") + self.out


@dataclasses.dataclass(frozen=True)
class ByLayer:
    """An initializer that depends on the layer's number, from 0: ByLayer(lambda layer: constant(0.9**layer)). The
    number is traced."""

    at: Callable[[jax.Array], Draw]


@dataclasses.dataclass(frozen=True)
class Param:
    """One array of weights, by its `Letters`: "D->HK", "E|D->F", "VD".

    They are the one source for shape, decay, fan-in, sharding and the tables that describe a model. Letters that one
    part alone knows carry their sizes: Param("RH", sizes={"R": 32}). The initializer makes one of a batch: its shape
    has no batch letters.

    No gradient moves an array that is not `trained`. If the part returns sums for it (`Out.sums`), what it is at the
    next step is `advance(old, sums)`; the sums are those of a whole batch, whatever its slices.
    """

    letters: str
    init: Draw | ByLayer | None = None  # None: the model's initializer decides, by the letters
    decay: bool | None = None  # None: matrices decay, everything else does not
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fan_in: str = ""  # of a bias: the letters that the matrix before it sums over; a matrix says so itself
    trained: bool = True
    advance: Callable[[jax.Array, Any], jax.Array] | None = None  # None: it stays as it is


Declarations = Mapping[str, Any]  # of `Param` by name; a part's parts have dicts of their own within


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room in the cache. With S in its letters: one entry per token, written by position. Without: a running state."""

    letters: str
    fill: float = 0
    dtype: Any = None  # None: the compute dtype
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of letters that this part alone knows
    same: bool = False  # in all layers of a kind: while text is written, the first one's is kept for all


class Declared(struct.PyTreeNode, nn.meta.AxisMetadata):
    """The box in which a declaration leaves Flax's init: an abstract array and how it was declared."""

    value: Any
    letters: Letters = struct.field(pytree_node=False)
    decay: bool = struct.field(pytree_node=False)
    init: Draw | ByLayer | None = struct.field(pytree_node=False)
    fan_in: int = struct.field(pytree_node=False)  # numbers that go into each number of a product; 0 of a table, a gain
    trained: bool = struct.field(pytree_node=False)
    advance: Callable[..., jax.Array] | None = struct.field(pytree_node=False)
    layers: tuple[int, int] = struct.field(pytree_node=False)  # the number of the first one stacked, and steps between

    def sizes(self) -> dict[str, int]:
        """Letter → size."""
        return dict(zip(self.letters.all, self.value.shape, strict=True))

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> "Declared":  # called by nn.scan
        stacked = self.letters._replace(batch=params[nn.PARTITION_NAME] + self.letters.batch)
        return self.replace(letters=stacked, layers=(self.layers[0], params.get("kinds", 1)))

    def remove_axis(self, index: int, params: Any) -> "Declared":
        return self.replace(letters=self.letters._replace(batch=self.letters.batch[1:]))


def declare(module: nn.Module, name: str, params: Declarations, dims: Mapping[str, int], layer: int = 0) -> Any:
    """Parameters of a module, as nested as they are declared. At init, boxed zeros: `draw` gives them values. `layer`
    is the number of the first layer, where layers are stacked."""

    def box(p: Param) -> Declared:
        letters, sizes = Letters.of(p.letters), {**dims, **p.sizes}
        if unknown := sorted({*letters.all, *p.fan_in} - sizes.keys()):
            example = f'Param("{p.letters}", sizes={{"{unknown[0]}": 32}})'
            raise ValueError(f"{name}: Param({p.letters!r}) has letters of no known size, {unknown}; give {example}")
        shape = tuple(sizes[letter] for letter in letters.all)
        decay = bool(letters.into) and p.trained if p.decay is None else p.decay
        summed = letters.into or p.fan_in
        fan_in = math.prod(sizes[letter] for letter in summed) if summed else 0
        return Declared(jnp.zeros(shape), letters, decay, p.init, fan_in, p.trained, p.advance, (layer, 1))

    def create(key: Any = None, params: Declarations = params) -> dict[str, Any]:
        found = {n: box(p) if isinstance(p, Param) else create(key, p) for n, p in params.items()}
        return {n: inner for n, inner in found.items() if inner != {}}

    if not module.is_initializing():  # which checks no shapes: of parameters `for_decoding` some have others
        return whole(params, module.get_variable("params", name, {}))
    return whole(params, module.param(name, create) if create() else {})


def whole(params: Declarations, arrays: Arrays) -> dict[str, Any]:
    """A part's arrays with {} for each of its parts that declares none: these are not stored."""
    empty: Arrays = {}
    return {n: arrays[n] if isinstance(p, Param) else whole(p, arrays.get(n, empty)) for n, p in params.items()}  # pyright: ignore


def is_declared(x: Any) -> bool:
    return isinstance(x, Declared)


def map_declared(function: Callable[[Declared], Any], declared: Any) -> Any:
    """Maps over the boxes of a tree of declarations."""
    return jax.tree.map(function, declared, is_leaf=is_declared)


def trained(tree: Any, declared: Any) -> Any:
    """The tree without the arrays that no gradient moves."""
    kept = {n: box for n, box in declared.items() if not is_declared(box) or box.trained}
    return {n: tree[n] if is_declared(box) else trained(tree[n], box) for n, box in kept.items()}


def selected(tree: Any, declared: Any, keep: Callable[[str, Declared], bool], path: str = "") -> dict[str, Any]:
    """The tree with those arrays alone that are to be kept, by their path, as `path_name` gives it, and their box."""
    found: dict[str, Any] = {}
    for name, box in declared.items():
        if not is_declared(box):
            if inner := selected(tree[name], box, keep, f"{path}{name}/"):
                found[name] = inner
        elif keep(path + name, box):
            found[name] = tree[name]
    return found


def by_path(tree: Any) -> dict[str, Any]:
    """Path, as `path_name` gives it, → array, or box of a tree of declarations."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_declared)[0]}


def updated(tree: Any, new: Any) -> Any:
    """The tree with the arrays of another, which may lack some, in their place."""
    if not isinstance(tree, Mapping):
        return new
    return {n: updated(inner, new[n]) if n in new else inner for n, inner in tree.items()}


def path_name(path: Any) -> str:
    """How an array is called: "decoder/layers/block0/attention/project/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def draw(declared: Any, key: jax.Array, initializer: Callable[[Declared], Draw | ByLayer]) -> Any:
    """float32 values for a tree of declarations.

    An array's key depends on its path and its layer alone, so that adding a part or a layer leaves the other arrays
    as they were, and an ablation differs in its idea only. Each of a batch is drawn for itself.
    """

    def one(path: Any, box: Declared) -> jax.Array:
        make, batch, shape = box.init or initializer(box), box.letters.batch, box.value.shape
        first, step = box.layers

        def some(axis: int, key: jax.Array, layer: Any) -> jax.Array:
            if axis == len(batch):
                init = make.at(layer) if isinstance(make, ByLayer) else make
                return init(key, shape[axis:], jnp.float32)
            number = lambda i: first + step * i if batch[axis] == "L" else layer
            each = lambda i: some(axis + 1, jax.random.fold_in(key, i), number(i))
            return jax.vmap(each)(jnp.arange(shape[axis]))

        return some(0, jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode())), first)

    return jax.tree_util.tree_map_with_path(one, declared, is_leaf=is_declared)
