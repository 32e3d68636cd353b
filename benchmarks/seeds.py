"""Eight seeds trained together beside the same eight one after another, all included: start, compilation, saving.

    python benchmarks/seeds.py [ROUNDS]

The runs are rungs of experiments/ladder.py. The two take turns (A B A B), in one process whose compiled programs are
thrown away before each. Prints medians over rounds, and ranges.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import jax

import jaxformer
from jaxformer.lab.experiments import load

SEEDS = range(8)


def main(rounds: int) -> None:
    rows = {row.name: row for row in load(str(Path(__file__).parent.parent / "experiments" / "ladder.py")).rows}
    for name in ("bigram table", "four heads of 8", "and LayerNorm"):
        config, times = rows[name].config, []
        for _ in range(rounds):
            with tempfile.TemporaryDirectory() as directory:
                jax.clear_caches()
                started = time.perf_counter()
                jaxformer.train_seeds(config, SEEDS, directory=f"{directory}/together")
                together = time.perf_counter() - started
                jax.clear_caches()
                started = time.perf_counter()
                for seed in SEEDS:
                    jaxformer.train(config, {"train.seed": seed}, f"{directory}/alone-{seed}")
                times.append((together, time.perf_counter() - started))
        together, alone = (statistics.median(column) for column in zip(*times, strict=True))
        ratios = [b / a for a, b in times]
        print(
            f"{name:16} together {together:.1f} s, one after another {alone:.1f} s: {statistics.median(ratios):.2f} × "
            f"({min(ratios):.2f} to {max(ratios):.2f} in {rounds} rounds)"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if sys.argv[1:] else 3)
