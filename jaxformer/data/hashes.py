"""Draws that follow from their numbers alone: a hash, and permutations of any length without a table."""

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]


def mix(x: Hashes) -> Hashes:
    """SplitMix64 (doi:10.1145/2714064.2660195): one step of the generator from the state x."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permuted(x: Hashes, n: int, keys: Hashes) -> Hashes:
    """Where a random permutation of 0, …, n − 1 takes x; each element may have a key of its own.

    A Feistel network over the next power of four, walked until it lands below n (doi:10.1007/3-540-45760-7_9).
    """
    half = np.uint64(max(1, (n - 1).bit_length() + 1 >> 1))
    low = (np.uint64(1) << half) - np.uint64(1)

    def scrambled(x: Hashes) -> Hashes:
        left, right = x >> half, x & low
        for turn in range(6):
            left, right = right, left ^ (mix(mix(keys + np.uint64(turn)) + right) & low)
        return left << half | right

    x = scrambled(x)
    while (outside := x >= np.uint64(n)).any():
        x = np.where(outside, scrambled(x), x)
    return x
