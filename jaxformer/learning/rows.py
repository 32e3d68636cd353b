"""Arithmetic on rows of documents, where positions and segments say what belongs together."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxformer.model.masks import Places, places


def last_index(at: Places, segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """The index of the last token of each token's document."""
    T = segments.shape[1]
    last = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    return jax.lax.cummin(jnp.where(last, jnp.arange(T)[None], T), axis=1, reverse=True)


def second_parts(key: jax.Array, segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """1 from a place in each document on that is drawn evenly from all behind its first token."""
    at, T = places(segments), segments.shape[1]
    start = jnp.arange(T)[None] - at.position
    length = last_index(at, segments) - start + 1
    u = jnp.take_along_axis(jax.random.uniform(key, segments.shape), start, 1)  # one number for each document
    split = 1 + jnp.floor(u * jnp.maximum(length - 1, 1)).astype(jnp.int32)
    return (at.position >= split).astype(jnp.int32)


def any_of_document(chosen: Bool[Array, "B T"], at: Places, segments: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Whether any token of each token's document is chosen."""
    count = jnp.pad(jnp.cumsum(chosen, 1), ((0, 0), (1, 0)))
    start = jnp.arange(segments.shape[1])[None] - at.position
    return jnp.take_along_axis(count, last_index(at, segments) + 1, 1) > jnp.take_along_axis(count, start, 1)


def same_texts(ids: Int[Array, "B T"], segments: Int[Array, "B T"]) -> Bool[Array, "B B"]:
    """Which rows hold the same tokens in the same places, whatever their padding holds."""
    alike = (ids[:, None] == ids[None]) | (segments[:, None] == 0)
    return (alike & (segments[:, None] == segments[None])).all(-1)


def composition(key: jax.Array, total: jax.Array, parts: jax.Array, size: int) -> Int[Array, "T"]:
    """`parts` lengths of at least 1 that add up to `total`, all ways equally likely; then zeros: int32[size].

    Of a total of 0 all are zeros.
    """
    place = jnp.arange(1, size + 1)  # a part may end behind each token but the last
    rank = jnp.argsort(jnp.argsort(jnp.where(place < total, jax.random.uniform(key, (size,)), 2.0)))
    ends = jnp.where((rank < parts - 1) | (place == total), place, 0)
    edges = jnp.sort(jnp.where(ends > 0, ends, total))
    edges = jnp.where(jnp.arange(size) < parts, edges, 0)
    lengths = jnp.diff(edges, prepend=0)
    return jnp.where(jnp.arange(size) < parts, lengths, 0)


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
