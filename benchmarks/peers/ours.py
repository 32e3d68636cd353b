"""jaxformer, as its trainer and sampler run it; in bfloat16 the sampler gets parameters of that type, which a command
leaves in float32."""

import itertools
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from peers.sizes import TOP_K, Size, Texts
from peers.timing import Found, stalled, timed

from jaxformer.config import Config, resolve
from jaxformer.data.batches import Batches, RandomWindows
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import NoTokenizer
from jaxformer.generation.decode import LeftToRight, Request, row_keys
from jaxformer.generation.logits_processors import usual_processors
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Learned
from jaxformer.platform import prepare
from jaxformer.run.checkpoint import CheckpointWriter
from jaxformer.run.plan import hyper_of, planned_recipe
from jaxformer.run.step import Recipe, init_state, train_steps


def planned(size: Size, overrides: Mapping[str, Any]) -> tuple[Config, Recipe]:
    """A config at its own settings but for the sizes, and what it trains; an encoder with positions as the others'."""
    prepare()
    sizes = {
        "model.n_layers": size.layers,
        "model.n_heads": size.heads,
        "model.d_model": size.width,
        "model.context_length": size.context,
        "data.batch_size": size.batch,
        "data.window": max(size.tokens, 2),
    }
    alike = {"model.head.classes": ("no", "yes"), "model.position": Learned(), "model.embedding": Embedding()}
    config = resolve(size.config, {**sizes, **({} if size.causal else alike), **overrides})
    return config, planned_recipe(config, NoTokenizer(size.vocabulary))


def step(
    size: Size,
    seconds: float,
    steps_per_call: int,
    dtype: str = "float32",
    products: bool = False,
    overrides: Mapping[str, Any] = {},
) -> Found:
    """Of a step with its batch and every metric fetched; products alone, or the whole computation, are of the dtype."""
    config, recipe = planned(size, {f"train.{'product' if products else 'compute'}_dtype": dtype, **overrides})
    hyper, rng = hyper_of(config), np.random.default_rng(0)
    kind = np.uint8 if size.vocabulary <= 256 else np.uint16
    source = Source(rng.integers(0, size.vocabulary, 1_000_000).astype(kind), np.zeros(1, np.int64))
    drawn = Batches((source,), (1.0,), RandomWindows(), config.row, size.batch, 0)
    at, state = 0, init_state(recipe, hyper)

    def call() -> None:
        nonlocal at, state
        batch = {"tokens": np.stack([drawn.at(at + i)["tokens"] for i in range(steps_per_call)])}
        if not size.causal:
            lengths = rng.integers(5, size.tokens + 1, (steps_per_call, size.batch, 1))
            batch["segments"] = (np.arange(size.tokens) < lengths).astype(np.int32)
            batch["labels_target"] = lengths[..., 0].astype(np.int32) % 2
        state, metrics = train_steps(recipe, state, batch, np.int32(steps_per_call), hyper)
        jax.device_get(metrics)
        at += steps_per_call

    return timed(call, seconds, steps_per_call)


def decode(size: Size, seconds: float, texts: Texts, dtype: str = "float32") -> Found:
    """Of one more token for each text, the prompts' share included."""
    config, recipe = planned(size, {})
    params = jax.tree.map(lambda a: a.astype(dtype), init_state(recipe, hyper_of(config)).params)
    keys = row_keys(0, 0, texts.batch)
    how = usual_processors(top_k=TOP_K)
    prompts = texts.prompts(size.vocabulary)
    sampler = LeftToRight()
    prepared = params, sampler.prepared(recipe.model, params)  # once for a run, as by `Run.request`
    request = Request(recipe.objective, recipe.model, params, prompts, texts.new, keys, how, prepared=prepared)

    def call() -> None:
        drawn = sum(part.ids.shape[1] for part in sampler(request))
        assert drawn == texts.new, drawn

    return timed(call, seconds, texts.new)


def checkpoint(size: Size, seconds: float) -> Found:
    """Of a save, for the thread that trains; the disk is waited for between saves."""
    config, recipe = planned(size, {})
    state = jax.block_until_ready(init_state(recipe, hyper_of(config)))
    steps, more = itertools.count(), jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(more(state))

    with tempfile.TemporaryDirectory() as folder:
        saved = CheckpointWriter(Path(folder))
        found = stalled(lambda: saved.save(state, next(steps)), step, seconds, after=saved.wait)
        saved.close()
    return found
