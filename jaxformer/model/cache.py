"""The cache: one dict of slots per layer. Prefill, decoding, ragged rows and windows all take this one path."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.declarations import Arrays, Slot

PLACE = {name: Slot("BS", 0, jnp.int32, same=True) for name in ("position", "segment")}  # segment 0: an empty slot
PART = {"part": Slot("BS", 1, jnp.int32, same=True)}


def empty(slots: Mapping[str, Slot], dims: Mapping[str, int], dtype: Any) -> dict[str, jax.Array]:
    """Slots of a new cache."""

    def one(slot: Slot) -> jax.Array:
        sizes = {**dims, **slot.sizes}
        return jnp.full([sizes[letter] for letter in slot.letters], slot.fill, slot.dtype or dtype)

    return {name: one(slot) for name, slot in slots.items()}


def update(cache: Arrays | None, new: Arrays, slots: Mapping[str, Slot]) -> tuple[Arrays, Arrays | None]:
    """What the new tokens see, and the cache with them in it.

    Several tokens at once look at the old cache beside themselves: in a rolling cache the later ones overwrite what
    the earlier ones still see. A single token looks at the written cache, which saves the copy.
    """
    if cache is None:
        return new, None
    rows = len(cache["position"])
    alike = [name for name, slot in slots.items() if slot.letters == "BS"]  # may be given once for all rows
    new = {**new} | {name: jnp.broadcast_to(new[name], (rows, new[name].shape[1])) for name in alike}
    written = _write(cache, new, slots)
    if new["position"].shape[1] == 1:
        return written, written
    both = lambda name, axis: jnp.concatenate([cache[name], new[name].astype(cache[name].dtype)], axis)
    seen = {n: both(n, s.letters.index("S")) if "S" in s.letters else new[n] for n, s in slots.items()}
    return seen, written


def _write(cache: Arrays, new: Arrays, slots: Mapping[str, Slot]) -> dict[str, jax.Array]:
    position, size, real = new["position"], cache["position"].shape[1], new["segment"] > 0
    last = jnp.max(position, axis=1, keepdims=True, where=real, initial=0)
    kept = real & (position > last - size)  # else two tokens share a slot, and which one stays is undefined
    beyond = size + jnp.arange(position.shape[1])  # out of range: dropped
    slot = jnp.where(kept, position % size, beyond)
    row = jnp.arange(len(slot))[:, None]
    # A GPU's deterministic kernels sort the places of every write that may have two at one.
    how: dict[str, Any] = {"mode": "drop", "unique_indices": True}

    def one(old: jax.Array, new: jax.Array, letters: str) -> jax.Array:
        if "S" not in letters:
            return new
        axis = letters.index("S")
        if len(slot) == 1:  # without the axis for texts, XLA on CPU writes in place
            index = (*[slice(None)] * (axis - 1), slot[0])
            return old[0].at[index].set(new[0].astype(old.dtype), **how)[None]
        index = (row, *[slice(None)] * (axis - 1), slot)
        return old.at[index].set(jnp.moveaxis(new, axis, 1).astype(old.dtype), **how)

    return {name: one(cache[name], new[name], s.letters) for name, s in slots.items()}


# --- the slots of a stack's groups of layers while text is written: {block: {slot: array}} of each


def apart(groups: Sequence[Mapping[str, Arrays]], same: Mapping[str, Collection[str]]) -> tuple[Any, ...]:
    """Without the slots of a block that are the `same` in all groups, but in the first: to write one costs as much as
    to write keys."""
    first, *others = groups
    own = lambda block, slots: {name: array for name, array in slots.items() if name not in same[block]}
    return first, *({block: own(block, slots) for block, slots in group.items()} for group in others)


def whole(groups: Sequence[Mapping[str, Arrays]] | None, i: int) -> Any:
    """The i-th of groups `apart`, with what it lacks of the first, which it will write as the first does."""
    return groups and {block: {**groups[0][block], **slots} for block, slots in groups[i].items()}


def own(written: Mapping[str, Arrays], group: Mapping[str, Arrays]) -> dict[str, Arrays]:
    """Of what a group has written, what it keeps."""
    return {block: {name: written[block][name] for name in slots} for block, slots in group.items()}
