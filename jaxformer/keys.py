"""Random numbers of training, for initial values, dropout and objectives: a key follows from the seed, the step and a
purpose listed here. Rows are drawn by data/hashes.py."""

import math

import jax
import jax.numpy as jnp

from jaxformer.platform import on_one_cpu

ROTATIONS = (17, 29, 16, 24), (13, 15, 26, 6)  # of Threefry-2x32, in groups of four rounds that take turns
PURPOSES = ("init", "dropout", "objective", "adapter")  # append only: a run's numbers depend on the place in this list


def fold(key: jax.Array | None, *numbers: int | jax.Array) -> jax.Array | None:
    """Folds the numbers in, one after another. None, which means evaluation, stays None."""
    for number in numbers:
        key = None if key is None else jax.random.fold_in(key, number)
    return key


def key_for(seed: int | jax.Array, step: int | jax.Array, purpose: str) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, PURPOSES.index(purpose))


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """jax.random.bits(key, shape), uint32, `on_one_cpu` in one pass over memory: JAX's program for a CPU takes five."""
    alone = getattr(jax.config, "jax_threefry_partitionable", False)  # a number does not depend on how many there are
    size = math.prod(shape)
    if not (alone and str(jax.random.key_impl(key)) == "threefry2x32" and on_one_cpu() and size < 2**32):
        return jax.random.bits(key, shape, jnp.uint32)
    k0, k1 = jax.random.key_data(key)
    x0, x1 = threefry(k0, k1, jnp.uint32(0), jax.lax.iota(jnp.uint32, size))
    return (x0 ^ x1).reshape(shape)


def threefry(k0: jax.Array, k1: jax.Array, x0: jax.Array, x1: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds: counters x, encrypted by a key (Salmon and others, "Parallel random numbers: as easy
    as 1, 2, 3", 2011). Not for JAX's keys, which are made by it, too: XLA of jax 0.12 does not come to an end of one
    within another (LOG.md)."""
    keys = k0, k1, k0 ^ k1 ^ jnp.uint32(0x1BD11BDA)
    x0, x1 = x0 + k0, x1 + k1
    for i in range(1, 6):
        for bits in ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = (x1 << bits | x1 >> 32 - bits) ^ x0
        x0, x1 = x0 + keys[i % 3], x1 + keys[(i + 1) % 3] + jnp.uint32(i)
    return x0, x1
