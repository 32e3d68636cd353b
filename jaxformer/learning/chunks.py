"""A loss in chunks of places, so that the logits of one chunk are alive at a time, and its gradient beside it.

Of a small model with GPT-2's vocabulary a training step has so much of the temporary memory, and takes so much of the
time, that one without chunks does (`python benchmarks/memory.py 6 16 32 64`; 2 cores of an AMD EPYC, jax 0.10.1): of
2,048 tokens 0.39 and 1.02, of 4,096 0.25 and 1.02, of 8,192 0.18 and 0.97. What is left is other than logits.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.keys import fold

MOST = 128 * 2**20  # bytes of float32 logits in a chunk, on CPU
CHUNKS = 16  # as many of them at most, but for odd lengths: each adds a gradient of the whole table to the sum

# (h [B, T, D], a tree of arrays [B, T, ...], key) -> (what is minimised, a tree of arrays [B, T, ...], one of numbers)
Loss = Callable[[Any, Any, Any], tuple[jax.Array, Any, Any]]


def most() -> int:
    """Bytes of float32 logits that a chunk may have; 1 GiB on accelerators."""
    return MOST if jax.default_backend() == "cpu" else 8 * MOST


def unchunked() -> int:
    """Bytes of float32 logits up to which all places are computed at once: on CPU two chunks save less than they cost
    (LOG.md); on accelerators it was not measured."""
    return 2 * MOST if jax.default_backend() == "cpu" else most()


def chunk_size(places: int, n_bytes: int) -> int:
    """Places of a chunk, of so many whose logits take so many bytes in all: an even share of them, if there is one."""
    least = min(-(-n_bytes // most()), CHUNKS, places)
    for n in range(least, min(2 * least, places + 1)):
        if places % n == 0:
            return places // n
    return -(-places // least)


def loss_scale(dtype: str, tokens: int) -> float:
    """What a sum over so many tokens is multiplied by, so that its gradient fits the dtype: float16 ends at 65,504,
    which the gradient of a frequent token's row passes from some 40,000 tokens on. A power of 2: it rounds nothing."""
    return 1.0 if dtype != "float16" else 2.0 ** min(0, 14 - (tokens - 1).bit_length())


def in_chunks(loss: Loss, size: int, h: jax.Array, beside: Any, key: jax.Array | None) -> tuple[jax.Array, Any, Any]:
    """`loss` of a sum over places, computed for `size` of them after another; of its draws each has a key of its own.

    The gradients of a chunk, by h and by whatever else `loss` closes over, are computed with it, so that no logits are
    kept or computed again for the backward pass, which multiplies them by a number (as arXiv:2410.10989).
    They are those of what is minimised: no gradient goes through the other results, nor to `beside`. Those of
    parameters are added up in float32. Where no gradient is asked for, none is computed.
    """
    even = h.shape[1] - h.shape[1] % size
    beside = jax.lax.stop_gradient(beside)
    before = lambda tree: jax.tree.map(lambda a: a[:, :even], tree)
    behind = lambda tree: jax.tree.map(lambda a: a[:, even:], tree)
    found = _scanned(loss, size, before(h), before(beside), key)
    if even < h.shape[1]:  # the last chunk is shorter
        rest = loss(behind(h), behind(beside), fold(key, h.shape[1]))
        rows = jax.tree.map(lambda *arrays: jnp.concatenate(arrays, 1), found[1], rest[1])
        found = found[0] + rest[0], rows, jax.tree.map(jnp.add, found[2], rest[2])
    return found[0], *jax.lax.stop_gradient(found[1:])


def _scanned(loss: Loss, size: int, h: jax.Array, beside: Any, key: jax.Array | None) -> tuple[jax.Array, Any, Any]:
    first = jax.tree.map(lambda a: a[:, :size], (h, beside))
    closed: Any = jax.closure_convert(loss, *first, fold(key, 0))  # read: what a gradient may be asked by
    of_chunk, read = closed

    def cut(a: jax.Array) -> jax.Array:  # [B, T, ...] -> [n, B, size, ...]
        return a.reshape(len(a), -1, size, *a.shape[2:]).swapaxes(0, 1)

    def joined(a: jax.Array) -> jax.Array:
        return a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:])

    def summed(total: jax.Array, rows: Any, numbers: Any) -> tuple[jax.Array, Any, Any]:
        return total.sum(), jax.tree.map(joined, rows), jax.tree.map(lambda a: a.sum(0), numbers)

    def pieces(h: jax.Array, beside: Any) -> Any:
        return jnp.arange(h.shape[1] // size), *jax.tree.map(cut, (h, beside))

    @jax.custom_vjp
    def run(read: Any, h: jax.Array, beside: Any, key: Any) -> tuple[jax.Array, Any, Any]:
        def body(_: None, piece: Any) -> Any:
            i, h, beside = piece
            return None, of_chunk(h, beside, fold(key, i), *read)

        return summed(*jax.lax.scan(body, None, pieces(h, beside))[1])

    def forward(read: Any, h: jax.Array, beside: Any, key: Any) -> Any:
        scale = loss_scale(h.dtype.name, h.shape[0] * size)

        def body(grads: Any, piece: Any) -> Any:
            i, h, beside = piece

            def minimised(read: Any, h: jax.Array) -> Any:
                total, *more = of_chunk(h, beside, fold(key, i), *read)
                return total * scale, (total, *more)

            (by_read, by_h), found = jax.grad(minimised, (0, 1), has_aux=True)(read, h)
            return jax.tree.map(lambda a, g: a + g.astype(a.dtype) / scale, grads, by_read), (by_h, found)

        zeros = [jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in read]
        grads, (by_h, found) = jax.lax.scan(body, zeros, pieces(h, beside))
        return summed(*found), (grads, joined(by_h) / scale, [jnp.zeros((), a.dtype) for a in read])

    def backward(kept: Any, cotangents: Any) -> Any:
        grads, by_h, like = kept
        by_read = [(g * cotangents[0]).astype(a.dtype) for g, a in zip(grads, like, strict=True)]
        return by_read, (by_h * cotangents[0]).astype(by_h.dtype), None, None

    run.defvjp(forward, backward)
    return run(read, h, beside, key)
