"""What cross-entropy in chunks saves: temporary memory and time of a training step, with it and without, in turns.

    python benchmarks/memory.py [ROUNDS [ROWS...]]

The model has GPT-2's vocabulary and little else: 50,257 tokens, width 256, 2 layers, rows (16, then 64) of 128 tokens.
Prints the temporary memory of the compiled step, the median of its seconds, and the ratios with their range.
"""

import statistics
import sys
import time
from typing import Any

import jax
import numpy as np
from peers.limits import device

from jaxformer import Decoder
from jaxformer.learning import chunks
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant
from jaxformer.platform import prepare
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps


def main(rounds: int = 5, *rows: int) -> None:
    prepare()
    for count in rows or (16, 64):
        compare(rounds, count)
    print(device())


def compare(rounds: int, rows: int) -> None:
    recipe = Recipe(Decoder(vocab_size=50_257, d_model=256, n_layers=2, n_heads=4, context_length=128))
    hyper = Hyper(np.uint32(0), np.int32(100), AdamW(Constant(1e-3)))
    tokens = {"tokens": np.random.default_rng(0).integers(0, 50_257, (1, rows, 129), dtype=np.int32)}
    compiled: dict[str, Any] = {}
    for name, most in {"at once": 2**40, "in chunks": chunks.MOST}.items():  # what is usual last: it stays
        chunks.MOST = most
        jax.clear_caches()
        compiled[name] = train_steps.lower(recipe, init_state(recipe, hyper), tokens, np.int32(1), hyper).compile()
    states = {name: init_state(recipe, hyper) for name in compiled}
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for turn in range(rounds + 1):
        for name, step in compiled.items():
            started = time.perf_counter()
            states[name], _ = step(states[name], tokens, np.int32(1), hyper)
            jax.block_until_ready(states[name].params)
            if turn:  # the first touches the memory
                seconds[name].append(time.perf_counter() - started)
    sizes = {name: step.memory_analysis().temp_size_in_bytes / 2**20 for name, step in compiled.items()}
    print(f"{rows * 128:,} tokens")
    for name, found in seconds.items():
        print(f"  {name:10} {sizes[name]:7,.0f} MiB of temporary memory, {statistics.median(found):.3f} s a step")
    ratios = sorted(a / b for a, b in zip(seconds["in chunks"], seconds["at once"], strict=True))
    of_time = f"{statistics.median(ratios):.2f} of the time ({ratios[0]:.2f} to {ratios[-1]:.2f})"
    print(f"  in chunks {sizes['in chunks'] / sizes['at once']:.2f} of the memory, {of_time}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
