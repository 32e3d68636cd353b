"""Every random number of a run: its key follows from the seed, the step and a purpose listed here."""

import jax

PURPOSES = ("init", "dropout", "objective", "adapter")  # append only: a run's numbers depend on the place in this list


def fold(key: jax.Array | None, *numbers: int | jax.Array) -> jax.Array | None:
    """Folds the numbers in, one after another. None, which means evaluation, stays None."""
    for number in numbers:
        key = None if key is None else jax.random.fold_in(key, number)
    return key


def key_for(seed: int | jax.Array, step: int | jax.Array, purpose: str) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(seed), step)
    return jax.random.fold_in(key, PURPOSES.index(purpose))
