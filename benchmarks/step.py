"""Training steps per second of jaxformer beside compiled PyTorch, on the sizes of configs/shakespeare_cpu.py.

    pip install -e ".[peers]" && python benchmarks/step.py [ROUNDS]

Each measurement is a process of its own; the contestants take turns (A B C A B C), so that what else the machine does
falls on all of them. Prints the median over rounds of each one's median tokens per second, the spread, and ratios.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

CALLS = 300  # steps in a measurement
HERE = Path(__file__).parent


def jaxformer(steps_per_call: int) -> list[float]:
    """Seconds of each step, with real batches and every metric fetched."""
    import jax
    import numpy as np

    from jaxformer.config import resolve
    from jaxformer.data.batches import Batches
    from jaxformer.data.sources import Source
    from jaxformer.platform import set_flags
    from jaxformer.run.plan import hyper_of
    from jaxformer.run.step import Recipe, init_state, train_steps
    from jaxformer.spec import override

    set_flags()
    config = resolve(HERE.parent / "configs" / "shakespeare_cpu.py")
    recipe, hyper = Recipe(override(config.model, "vocab_size", 65)), hyper_of(config)
    tokens = np.random.default_rng(0).integers(0, 65, 1_000_000).astype(np.uint8)
    source = Source(tokens, np.zeros(1, np.int64))
    drawn = Batches((source,), (1.0,), config.data.sampling, config.row, config.data.batch_size, 0)
    state, seconds = init_state(recipe, hyper), []
    for call in range(CALLS // steps_per_call + 5):
        started = time.perf_counter()
        batches = [drawn.at(call * steps_per_call + i)["tokens"] for i in range(steps_per_call)]
        state, metrics = train_steps(recipe, state, {"tokens": np.stack(batches)}, np.int32(steps_per_call), hyper)
        jax.device_get(metrics)
        seconds.append((time.perf_counter() - started) / steps_per_call)
    return seconds[5:]


def main(rounds: int) -> None:
    this = [sys.executable, __file__, "--child"]
    contestants = {
        "jaxformer, 1 step per call": [*this, "1"],
        "jaxformer, 10 steps per call": [*this, "10"],
        "PyTorch, torch.compile": [sys.executable, HERE / "torch_peer.py", *map(str, (4, 4, 128, 64, 12, 65, CALLS))],
    }
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, command in contestants.items():
            environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
            done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            found[name].append(12 * 64 / statistics.median(json.loads(done.stdout)))
    peer = found["PyTorch, torch.compile"]
    for name, speeds in found.items():
        ratio = statistics.median(a / b for a, b in zip(speeds, peer, strict=True))
        print(
            f"{name:30} {statistics.median(speeds):8,.0f} tokens/s "
            f"({min(speeds):,.0f} to {max(speeds):,.0f} in {rounds} rounds)  {ratio:.2f} × PyTorch"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(jaxformer(int(sys.argv[2]))))
    else:
        main(int(sys.argv[1]) if sys.argv[1:] else 5)
