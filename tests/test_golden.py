"""A short run whose numbers are pinned, so that no change moves them without a word."""

import numpy as np
import pytest

from jaxformer.data.batches import Batches, RandomWindows, RowSize
from jaxformer.data.sources import Source
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.models import Decoder
from jaxformer.run.step import Hyper, Recipe, init_state, train_steps

pytestmark = pytest.mark.exact

LOSSES = [3.427818, 3.428775, 3.406899, 3.450396, 3.434331, 3.42247, 3.42677, 3.431887]
GRAD_NORMS = [1.150676, 1.019968, 1.314255, 1.12421, 1.082495, 1.038669, 1.070133, 1.264912]
UPDATE = """
The golden run moved. If that was meant, say in the commit why, and paste these into tests/test_golden.py:
LOSSES = {}
GRAD_NORMS = {}
"""


def test_golden_run():
    tokens = (np.arange(1009) ** 2 % 31).astype(np.uint8)
    recipe = Recipe(Decoder(n_layers=2, n_heads=2, d_model=14, context_length=13, vocab_size=31, dropout=0.1, unroll=1))
    hyper = Hyper(np.uint32(7), np.int32(8), AdamW(WarmupCosine(shortens=False)))
    drawn = Batches((Source(tokens, np.zeros(1, np.int64)),), (1.0,), RandomWindows(), RowSize(11), 5, 7)
    batches = {"tokens": np.stack([drawn.at(step)["tokens"] for step in range(8)])}
    _, row = train_steps(recipe, init_state(recipe, hyper), batches, np.int32(8), hyper)
    losses, norms = ([round(float(x), 6) for x in row[name]] for name in ("loss", "grad_norm"))
    same = len(LOSSES) == 8 and np.allclose(losses, LOSSES, rtol=1e-5) and np.allclose(norms, GRAD_NORMS, rtol=1e-4)
    assert same, UPDATE.format(losses, norms)
