"""The manifest of a checkpoint: a digest of each array, and how good its evaluation found it to be.

It is written once all of the checkpoint is on disk: a step without one does not count.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer.data.files import parsed, write
from jaxformer.declarations import by_path
from jaxformer.platform import host

BASE = "base"  # a folder of the run, stored as a checkpoint is: the parameters that an adapter leaves as they are
UNFINISHED = ".orbax-checkpoint-tmp"  # behind the name of what Orbax has not saved whole


def sha256(tree: Any) -> str:
    """SHA-256 over path, dtype, shape and bytes of every array, in the order of the paths, however they are sharded."""
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
    for path in sorted(leaves):
        array = gathered(leaves[path])
        digest.update(f"{path} {array.dtype} {array.shape} ".encode())
        digest.update(_bytes(array))
    return digest.hexdigest()


def gathered(array: Any) -> np.ndarray:
    """An array's numbers on the host, however it is sharded; of one that is split JAX would keep a copy of its own."""
    if not isinstance(array, jax.Array) or len(array.sharding.device_set) == 1:
        return np.asarray(array)
    whole = np.empty(array.shape, array.dtype)
    for part in array.addressable_shards:
        if part.replica_id == 0:
            whole[part.index] = np.asarray(jax.device_put(part.data, host()))
    return whole


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What `manifest.json` of a step holds: the layout and SHA-256 of each array, and the step's rank.

    `before` is the record of steps that were saved before there were manifests.
    """

    arrays: Mapping[str, Mapping[str, Any]]  # name -> {"dtype", "shape", "sha256"}
    rank: float | None = None  # the least is best; None: not evaluated, or not finite
    before: Mapping[str, Any] | None = None
    base: str | None = None  # `digest` of that of the base, which an adapter leaves as it is

    @classmethod
    def of(cls, state: Any, base: str | None = None) -> "Manifest":
        arrays = {name: _layout(leaf) | {"sha256": _sha256(leaf)} for name, leaf in _leaves(state)}
        return cls(arrays, base=base)

    @property
    def digest(self) -> str:
        """SHA-256 of all that it says."""
        return _digest(self._body)

    @property
    def _body(self) -> dict[str, Any]:
        base = {} if self.base is None else {"base": self.base}
        return {"rank": self.rank, "arrays": dict(self.arrays)} | base

    def ranked(self, rank: float) -> "Manifest":
        return dataclasses.replace(self, rank=rank if math.isfinite(rank) else None)

    def other_layout(self, state: Any, but: str | None = None) -> str | None:
        """What is not as `state` has it, arrays or abstract ones, `but` for what lies under that name; None if all
        is."""
        if self.before is not None:
            return None if self.before.get("layout") in (None, _layout_before(state)) else "other shapes"
        new = {name: _layout(leaf) for name, leaf in _leaves(state)}
        old = {name: {"dtype": a["dtype"], "shape": a["shape"]} for name, a in self.arrays.items()}
        for name in (*old, *new):
            if name.split("/")[0] != but and old.get(name) != new.get(name):
                there, here = (_shown(layouts.get(name)) for layouts in (old, new))
                return f"{name} as {there}, not {here}"
        return None

    def damaged(self, state: Any) -> str | None:
        """Which array of a restored state is not what was saved; None if all are. One that the files no longer name
        comes back as it was asked for, without numbers."""
        for name, leaf in _leaves(state):
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return name
        if self.before is not None:
            return None if sha256(state) == self.before.get("state_sha256") else "the state"
        for name, leaf in _leaves(state):
            if _sha256(leaf) != self.arrays[name]["sha256"]:
                return name
        return None

    def write(self, directory: Path) -> None:
        """To a step's directory; all of it, or what was there before."""
        if self.before is not None:
            write(_record_before(directory), json.dumps(dict(self.before) | {"rank": self.rank}))
        else:
            write(directory / "manifest.json", json.dumps({"sha256": self.digest} | self._body, indent=1) + "\n")


def read_manifest(directory: Path) -> Manifest | None:
    """The manifest of a step's directory; None if there is none. Raises ValueError if it is damaged."""
    before = False
    try:
        text = (directory / "manifest.json").read_bytes()
    except FileNotFoundError:
        try:
            text, before = _record_before(directory).read_bytes(), True
        except FileNotFoundError:
            return None
    found = parsed(text)
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    rank = found.pop("rank", None)
    rank = rank if isinstance(rank, float) and math.isfinite(rank) else None
    if before:
        return Manifest({}, rank, found)
    arrays, base = found.get("arrays"), found.get("base")
    manifest = Manifest(arrays if isinstance(arrays, dict) else {}, rank, base=base if isinstance(base, str) else None)
    if found.get("sha256") != manifest.digest:
        raise ValueError("it is not what was written")
    return manifest


def has_manifest(directory: Path) -> bool:
    """Whether a step's directory counts as a checkpoint."""
    return (directory / "manifest.json").exists() or _record_before(directory).exists()


def withdraw(directory: Path) -> None:
    """Takes the manifest away, so that a checkpoint that is being deleted does not count from the first moment on."""
    (directory / "manifest.json").unlink(missing_ok=True)
    _record_before(directory).unlink(missing_ok=True)


def _record_before(directory: Path) -> Path:
    return directory / "info" / "metadata"


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    return sorted(by_path(tree).items())


def _sha256(array: Any) -> str:
    return hashlib.sha256(_bytes(gathered(array))).hexdigest()


def _layout(array: Any) -> dict[str, Any]:
    return {"dtype": str(array.dtype), "shape": list(array.shape)}


def _shown(layout: Mapping[str, Any] | None) -> str:
    return "none" if layout is None else f"{layout['dtype']}{layout['shape']}"


def _bytes(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _layout_before(tree: Any) -> str:
    """SHA-256 over path, dtype and shape of every array."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    lines = sorted(f"{jax.tree_util.keystr(path)} {leaf.dtype} {leaf.shape}" for path, leaf in leaves)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
