"""The mesh: over how many devices a run is spread, and along which axes batches and parameters are split."""

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxformer.declarations import by_path, path_name
from jaxformer.spec import InputError, Spec

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the rows of a batch are split over both
# Axis → letters of parameters: of those that an array has, the first one here is split over that axis.
LETTERS: Mapping[str, str] = {"fsdp": "DV", "tensor": "HGFV"}
WHOLE = "V"  # is left whole by an axis that does not divide it: a tokenizer's size is nobody's choice


class Mesh(Spec):
    """Over how many devices a run is spread, and how. The batch is split over data · fsdp of them; one axis may be −1,
    which takes all devices that the others leave."""

    data: int = 1  # devices that each have all parameters, and a part of the batch
    fsdp: int = 1  # devices that share parameters and optimizer state out, and have a part of the batch (FSDP, ZeRO-3)
    tensor: int = 1  # devices that share heads, the width of feed-forwards and the vocabulary out
    forced: bool = False  # a mesh of one device is compiled as one of several

    def check(self, at: str = "") -> None:
        for axis in AXES:
            if getattr(self, axis) < 1 and getattr(self, axis) != -1:
                raise ValueError(f"{at}{axis}={getattr(self, axis)} must be at least 1, or −1: all devices left")
        if (free := [f"{at}{axis}" for axis in AXES if getattr(self, axis) == -1])[1:]:
            raise ValueError(
                f"{' and '.join(free)} are −1, but one of them alone may take all devices left; give sizes"
            )

    @property
    def least(self) -> int:
        """How many devices it needs."""
        return math.prod(size for axis in AXES if (size := getattr(self, axis)) > 0)

    def sizes(self, devices: int) -> dict[str, int]:
        """Axis → size, of so many devices. Raises InputError if they are too few."""
        sizes = {axis: getattr(self, axis) for axis in AXES}
        if (fixed := self.least) > devices:
            asked = " · ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size > 1)
            work = " or ".join(f"mesh.fsdp={n}" for n in range(devices, 0, -1) if devices % n == 0)
            raise InputError(
                f"{asked} needs {fixed} devices, but there {'is 1' if devices == 1 else f'are {devices}'}; {work} "
                f"would do, or on CPU --simulate_devices={fixed}"
            )
        return {axis: devices // fixed if size == -1 else size for axis, size in sizes.items()}

    def entered(self) -> contextlib.AbstractContextManager[Any]:
        """Within it, what this module says and does is of this mesh; of one device, unless `forced`, there is none."""
        sizes = self.sizes(jax.device_count())
        count = math.prod(sizes.values())
        if count == 1 and not self.forced:
            return contextlib.nullcontext()
        devices = np.array(jax.devices()[:count]).reshape(tuple(sizes.values()))
        kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
        return jax.set_mesh(jax.sharding.Mesh(devices, AXES, axis_types=kinds))


def axis_sizes() -> dict[str, int]:
    """Of the mesh that is entered; empty without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return dict(mesh.shape) if set(AXES) <= set(mesh.axis_names) else {}


def row_parts() -> int:
    """In how many parts the rows of a batch are."""
    sizes = axis_sizes()
    return math.prod(sizes[axis] for axis in ROWS) if sizes else 1


def vocabulary_part(size: int, parts: int | None = None) -> int:
    """How many of so many ids a device has logits of, of so many along `tensor`; None: those of the mesh entered."""
    parts = axis_sizes().get("tensor", 1) if parts is None else parts
    return size // parts if size % parts == 0 else size


# --- parameters, and what follows them


def partition(letters: str, shape: tuple[int, ...], sizes: Mapping[str, int], path: str = "") -> PartitionSpec:
    """Over which axes a declared array is split. Raises InputError for a size that an axis does not divide."""
    found: list[str | None] = [None] * len(shape)
    for axis, mine in LETTERS.items():
        n = sizes.get(axis, 1)
        places = [i for letter in mine for i, own in enumerate(letters) if own == letter and found[i] is None]
        if n == 1 or not places:
            continue
        i = places[0]
        if shape[i] % n == 0:
            found[i] = axis
        elif letters[i] not in WHOLE:
            work = " or ".join(str(m) for m in range(2, n) if shape[i] % m == 0) or "1"
            raise InputError(
                f"mesh.{axis}={n} must divide {letters[i]}={shape[i]} of {path} (letters {letters}); {work} would do"
            )
    return PartitionSpec(*found)


def partitions(tree: Any, declared: Any, sizes: Mapping[str, int]) -> Any:
    """A PartitionSpec for each array of a tree, as a state or gradients, in a model whose declarations are given.

    Where the path of an array ends with that of a parameter, and it has its shape, with other axes before it perhaps,
    it is split as that parameter is. All else is whole on each device.
    """
    boxes = by_path(declared)

    def one(path: Any, array: Any) -> PartitionSpec:
        names = path_name(path).split("/")
        box = next((boxes[own] for i in range(len(names)) if (own := "/".join(names[i:])) in boxes), None)
        if box is None or (before := array.ndim - len(box.value.shape)) < 0 or array.shape[before:] != box.value.shape:
            return PartitionSpec()
        return PartitionSpec(*[None] * before, *partition(box.letters.all, box.value.shape, sizes, path_name(path)))

    return jax.tree_util.tree_map_with_path(one, tree)


def shardings(tree: Any, declared: Any) -> Any:
    """`partitions` on the devices of the mesh that is entered; without one all is on the first device."""
    if not (sizes := axis_sizes()):
        return jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.devices()[0]), tree)
    mesh = jax.sharding.get_mesh()
    specs = partitions(tree, declared, sizes)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def laid_out(tree: Any, declared: Any) -> Any:
    """Outside a compiled function: arrays on the devices of the mesh, by `partitions`; as they are without one."""
    return jax.device_put(tree, shardings(tree, declared)) if axis_sizes() else tree


def split(tree: Any, declared: Any) -> Any:
    """Inside a compiled function: the tree, laid out by `partitions`; as it is without a mesh."""
    if not (sizes := axis_sizes()):
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, partitions(tree, declared, sizes))


# --- rows


def constrained(x: jax.Array, letters: str) -> jax.Array:
    """Inside a compiled function: x with its axis B split as the rows of a batch are, and the others whole; x as it is
    without a mesh, or where its rows are fewer."""
    if not axis_sizes() or x.shape[letters.index("B")] % row_parts():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ROWS if letter == "B" else None for letter in letters)))


def placed(batch: Mapping[str, Any], before: int = 0) -> Any:
    """Arrays [..., B, ...] from the host, with so many axes before B, each part of their rows on its own devices; of
    abstract ones, where they would be."""
    if not axis_sizes():
        return batch
    mesh, parts = jax.sharding.get_mesh(), row_parts()

    def put(array: Any) -> Any:
        rows = ROWS if array.shape[before] % parts == 0 else None
        sharding = NamedSharding(mesh, PartitionSpec(*[None] * before, rows))
        if isinstance(array, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
        return jax.device_put(array, sharding)

    return {name: put(array) for name, array in batch.items()}
