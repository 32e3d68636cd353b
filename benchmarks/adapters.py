"""What LoRA saves: memory and time of a training step of GPT-2 124M, beside fine-tuning all of it.

    python benchmarks/adapters.py [--rows=1] [--tokens=256] [--dtype=float32] [--rounds=3] [--small]

`configs/gpt2_124m.py` from parameters drawn at random, with AdamW, and LoRA of rank 1, 4 and 16 at every matrix of the
layers. Prints what is trained, what a checkpoint holds, the memory of the compiled step as XLA plans it (arguments:
parameters, the optimizer's state, the batch; temporary: activations, gradients, copies of weights in the dtype of the
computation), and the median of the seconds of a step, in turns, least and most in brackets. --small tries it on a tiny
model.
"""

import argparse
import time
from typing import Any

import compare
import jax
import numpy as np
from peers.limits import device

from jaxformer import config as config_lib
from jaxformer.data.tokenizers import NoTokenizer
from jaxformer.learning.adapters import LoRA
from jaxformer.platform import prepare
from jaxformer.run.plan import abstract_batches, hyper_of, planned_recipe
from jaxformer.run.step import init_state, train_steps

RANKS = None, 1, 4, 16  # None: all parameters are trained
SMALL = {"model.n_layers": 2, "model.n_heads": 2, "model.d_model": 16}


def compiled(rank: int | None, changes: dict[str, Any]) -> dict[str, Any]:
    """A row of the table, with its step, the state and what else the step is called with."""
    adapter = {} if rank is None else {"adapter": LoRA(rank, 2.0 * rank), "init_from": "drawn at random"}
    config = config_lib.resolve("gpt2_124m", changes | adapter)
    recipe, hyper = planned_recipe(config, NoTokenizer(50257)), hyper_of(config)
    state = init_state(recipe, hyper)
    draw = np.random.default_rng(0).integers
    batch = {n: draw(0, 50257, a.shape, np.int32) for n, a in abstract_batches(config, recipe, 1).items()}
    step = train_steps.lower(recipe, state, batch, np.int32(1), hyper).compile()
    size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    whole, moved = size(jax.eval_shape(recipe.model.init, jax.random.key(0))), size(state.params)
    saved = sum(a.nbytes for a in jax.tree.leaves(state.replace(base=())))
    name = "all parameters" if rank is None else f"LoRA, rank {rank}"
    about = {"name": name, "trained": moved, "share": moved / whole, "saved": saved, "memory": step.memory_analysis()}
    return about | {"step": step, "state": state, "more": (batch, np.int32(1), hyper), "seconds": []}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", default="float32", help="of activations")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--small", action="store_true")
    given = parser.parse_args()
    prepare()
    changes = {"data.batch_size": given.rows, "data.window": given.tokens, "train.accumulation": 1}
    changes |= {"train.compute_dtype": given.dtype} | (SMALL if given.small else {})
    rows = [compiled(rank, changes) for rank in RANKS]
    for turn in range(given.rounds + 1):
        for row in rows:
            started = time.perf_counter()
            row["state"], _ = jax.block_until_ready(row["step"](row["state"], *row["more"]))
            if turn:  # the first warms up
                row["seconds"].append(time.perf_counter() - started)
    columns: list[compare.Column] = [
        ("", lambda row: row["name"]),
        ("trained", lambda row: f"{row['trained']:,} ({100 * row['share']:.2f} %)"),
        ("a checkpoint", lambda row: f"{row['saved'] / 1e6:,.1f} MB"),
        ("arguments", lambda row: f"{row['memory'].argument_size_in_bytes / 1e6:,.0f} MB"),
        ("temporary", lambda row: f"{row['memory'].temp_size_in_bytes / 1e6:,.0f} MB"),
        ("seconds", lambda row: compare.spread(row["seconds"], "{:.3f}".format)),
    ]
    print(f"{given.rows} × {given.tokens} tokens, {given.dtype}; {device()}\n\n{compare.grid(columns, rows)}")


if __name__ == "__main__":
    main()
