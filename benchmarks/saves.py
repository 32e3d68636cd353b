"""What a checkpoint costs: how long the training loop stands still, and how long until it is complete.

    python benchmarks/saves.py [ROUNDS]

The states are those of configs/shakespeare_gpu.py with AdamW, and of the same model at a larger width. The loop's next
step, which overwrites the state in place, stands for training: prints the median (and the most) of the seconds by which
a save delays its end, of those that `save` itself takes, and of those until manifest and arrays are on disk.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from peers.limits import device

from jaxformer import config as config_lib
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.plan import hyper_of, planned_recipe
from jaxformer.run.step import init_state


def main(rounds: int) -> None:
    step = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    for width in (384, 1296):
        config = config_lib.resolve("shakespeare_gpu", {"model.d_model": width})
        recipe = planned_recipe(config)
        state = step(init_state(recipe, hyper_of(config)))
        arrays = [a.nbytes for a in jax.tree.leaves(state)]
        params = sum(a.size for a in jax.tree.leaves(state.params))
        found: dict[str, list[float]] = {"stall": [], "save": [], "complete": []}
        with tempfile.TemporaryDirectory(dir=".") as folder:
            writer = CheckpointWriter(Path(folder))
            for turn in range(rounds + 1):
                state, alone = timed(step, state)
                started = time.perf_counter()
                writer.save(state, turn)
                saved = time.perf_counter() - started
                state, more = timed(step, state)
                writer.wait()
                if turn:  # the first compiles, and Orbax begins
                    found["save"].append(saved)
                    found["stall"].append(saved + more - alone)
                    found["complete"].append(time.perf_counter() - started)
            writer.close()
        said = ", ".join(f"{name} {statistics.median(s):.3f} s ({max(s):.3f})" for name, s in found.items())
        print(f"{params / 1e6:.1f}M parameters, a state of {sum(arrays) / 1e6:,.0f} MB: {said}")
    print(device())


def timed(step: Any, state: Any) -> tuple[Any, float]:
    started = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - started


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 5)
