"""Arithmetic on rows of documents, where positions and segments say what belongs together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxformer.model.masks import Places, places


def ends(at: Places) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """The indices of the first and of the last token of each token's document."""
    index = jnp.arange(at.segment.shape[1])[None]
    last = jnp.pad(at.segment[:, 1:] != at.segment[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return index - at.position, jax.lax.cummin(jnp.where(last, index, index.size), axis=1, reverse=True)


def second_parts(key: jax.Array, segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """1 from a place in each document on that is drawn evenly from all behind its first token."""
    at = places(segments)
    first, last = ends(at)
    u = jnp.take_along_axis(jax.random.uniform(key, segments.shape), first, 1)  # one number for each document
    split = 1 + jnp.floor(u * jnp.maximum(last - first, 1)).astype(jnp.int32)
    return (at.position >= split).astype(jnp.int32)


def any_of_document(chosen: Bool[Array, "B T"], at: Places) -> Bool[Array, "B T"]:
    """Whether any token of each token's document is chosen."""
    count = jnp.pad(jnp.cumsum(chosen, 1), ((0, 0), (1, 0)))
    first, last = ends(at)
    return jnp.take_along_axis(count, last + 1, 1) > jnp.take_along_axis(count, first, 1)


def same_texts(ids: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, "B B"]:
    """Which rows hold the same tokens in the same places, whatever their padding holds."""
    alike = (ids[:, None] == ids[None]) | (segments[:, None] == 0)
    return (alike & (segments[:, None] == segments[None])).all(-1)


def composition(key: jax.Array, total: jax.Array, parts: jax.Array, size: int) -> Int[Array, "T"]:
    """`parts` lengths of at least 1 that add up to `total`, all ways equally likely; then zeros: int32[size].

    Of a total of 0 all are zeros. `parts` must be from 1 to max(total, 1), and `total` at most `size`.
    """
    place = jnp.arange(1, size + 1)  # a part may end behind each token but the last
    rank = jnp.argsort(jnp.argsort(jnp.where(place < total, jax.random.uniform(key, (size,)), 2.0)))
    return jnp.diff(jnp.sort(jnp.where(rank < parts - 1, place, total)), prepend=0)


def compact(
    ids: Int[Array, "B N"], segments: Int[Array, "B N"], kept: Bool[Array, "B N"], width: int
) -> tuple[Int[Array, "B W"], Int[Array, "B W"]]:
    """What is kept, moved to the left of rows of `width`; the rest is padding."""
    beyond = width + jnp.arange(kept.shape[1])  # out of range: dropped
    place = jnp.where(kept, jnp.cumsum(kept, 1) - 1, beyond)
    row = jnp.arange(len(ids))[:, None]
    empty = jnp.zeros((len(ids), width), jnp.int32)
    put = lambda a: empty.at[row, place].set(a, mode="drop", unique_indices=True)
    return put(ids), put(segments)
