"""What the guard costs: training steps with and without it, in turns.

    python benchmarks/guards.py [ROUNDS]

Prints the medians of milliseconds per step, and the median of the ratios of neighbouring calls with their quartiles.
"""

import dataclasses
import statistics
import sys
import time

import jax
import numpy as np
from peers.limits import device

from jaxformer import config as config_lib
from jaxformer.run.plan import hyper_of, planned_recipe
from jaxformer.run.step import init_state, train_steps

STEPS = 10


def main(rounds: int) -> None:
    config = config_lib.resolve("quickstart")
    guarded = planned_recipe(config)
    recipes = {"with the guard": guarded, "without": dataclasses.replace(guarded, guard=None)}
    size = guarded.model.vocab_size
    shape = STEPS, config.data.batch_size, config.row.tokens
    buffer = {"tokens": np.random.default_rng(0).integers(0, size, shape, dtype=np.int32)}
    hyper = hyper_of(config)
    states = {name: init_state(recipe, hyper) for name, recipe in recipes.items()}
    seconds: dict[str, list[float]] = {name: [] for name in recipes}
    for turn in range(rounds + 1):
        for name, recipe in recipes.items():
            started = time.perf_counter()
            states[name], _ = train_steps(recipe, states[name], buffer, np.int32(STEPS), hyper)
            jax.block_until_ready(states[name].params)
            if turn:  # the first compiles
                seconds[name].append((time.perf_counter() - started) / STEPS)
    for name, found in seconds.items():
        print(f"{name:15} {1000 * statistics.median(found):.2f} ms a step")
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    quarters = ratios[len(ratios) // 4], ratios[3 * len(ratios) // 4]
    print(f"ratio {statistics.median(ratios):.3f} (quartiles {quarters[0]:.3f} to {quarters[1]:.3f}); {device()}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 30)
