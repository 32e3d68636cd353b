"""A short run whose numbers are pinned, so that no change moves them without a word."""

import numpy as np

from jaxformer.data.datasets import RandomWindows
from jaxformer.learning.optimizers import AdamW
from jaxformer.model.models import Decoder
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps

LOSSES = [3.435931, 3.432485, 3.43422, 3.421863, 3.427895, 3.438769, 3.436051, 3.426954]
GRAD_NORMS = [1.032459, 1.009434, 0.998923, 1.031341, 1.006383, 0.984386, 1.13033, 1.034265]
UPDATE = """
The golden run moved. If that was meant, say in the commit why, and paste these into tests/test_golden.py:
LOSSES = {}
GRAD_NORMS = {}
"""


def test_golden_run():
    tokens = (np.arange(1009) ** 2 % 31).astype(np.uint8)
    recipe = Recipe(Decoder(n_layers=2, n_heads=2, d_model=14, context_length=13, vocab_size=31, dropout=0.1))
    hyper = Hyper(np.uint32(7), np.int32(8), AdamW())
    batches = [RandomWindows().batch_at(tokens, 11, 7, step, np.arange(5))["tokens"] for step in range(8)]
    _, row = train_steps(recipe, init_state(recipe, hyper), {"tokens": np.stack(batches)}, np.int32(8), hyper)
    losses, norms = ([round(float(x), 6) for x in row[name]] for name in ("loss", "grad_norm"))
    same = len(LOSSES) == 8 and np.allclose(losses, LOSSES, rtol=1e-5) and np.allclose(norms, GRAD_NORMS, rtol=1e-4)
    assert same, UPDATE.format(losses, norms)
