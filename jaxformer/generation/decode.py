"""From a trained model to text: prefill, then token by token with a cache."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.generation.logits_processors import Unchanged
from jaxformer.model.masks import Places, places
from jaxformer.model.models import Model

Processors = tuple[Unchanged, ...]


class Stop(NamedTuple):
    """Which rows, bool[B], have ended; and the id that ends a row, −1 if none does."""

    ended: Any
    end: Any


def generate(
    model: Model,
    params: Any,
    prompts: Sequence[Sequence[int]],
    tokens: int,
    processors: Processors = (),
    seed: int = 0,
    context: int | None = None,
    end: int | None = None,
    sources: Sequence[Sequence[int]] | None = None,
) -> np.ndarray:
    """int32[B, tokens] that follow the prompts, none of which may be empty.

    A row that has drawn `end` holds nothing else from there on, and nothing more is drawn once all rows have.

    Sample i, token t is drawn with the key fold_in(fold_in(key(seed), i), t), so that asking for more samples of a
    prompt, or for more tokens, leaves the first ones as they were. A text that fills the context goes on from its last
    half; rows do so together, when the longest is full. `context` is the model's context_length, or less. A prefix
    mask sees the whole prompt, or the half. `sources` are what the encoder of a model that has one reads, a row each.
    Ids are not checked here.
    """
    context = context or model.context_length
    memory = None if sources is None else _encode(model, params, *padded([s[:context] for s in sources], context))
    texts = [list(prompt)[-context:] for prompt in prompts]
    made: list[np.ndarray] = []
    done, ended = 0, np.zeros(len(texts), bool)
    while done < tokens and not ended.all():
        longest = max(map(len, texts))
        count = min(tokens - done, context - longest + 1)
        prompt, segment = padded(texts, context)
        lengths = segment.sum(1)
        h, cache = _prefill(model, context, params, prompt, segment, memory)
        stop = Stop(ended, np.int32(-1 if end is None else end))
        numbers = np.int32(done), np.int32(count), np.uint32(seed)
        ids, ended = jax.device_get(
            _decode(model, context, params, h, cache, lengths, *numbers, processors, stop, memory)
        )
        made.append(ids[:, :count])
        done += count
        half = max(1, context // 2)
        texts = [(text + row.tolist())[-half:] for text, row in zip(texts, made[-1], strict=True)]
    rest = np.full((len(texts), tokens - done), end, np.int32) if ended.all() else np.zeros((len(texts), 0), np.int32)
    return np.concatenate([*made, rest], 1)


def padded(texts: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments, int32[B, T], padded on the right to a power of two: many lengths share one program."""
    longest = max(1, *map(len, texts))
    ids = np.zeros((len(texts), min(limit, 1 << (longest - 1).bit_length())), np.int32)
    segments = np.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], segments[i, : len(text)] = text, 1
    return ids, segments


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Model, params: Any, ids: jax.Array, segment: jax.Array) -> Any:
    return model.encode(params, ids, places(segment))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    model: Model, context: int, params: Any, prompt: jax.Array, segment: jax.Array, memory: Any
) -> tuple[jax.Array, Any]:
    """The hidden state [B, D] of the last token of each prompt [B, T], padded on the right, and the filled cache."""
    at = places(segment, jnp.zeros_like(segment))
    cache = model.cache(len(prompt), context, jax.tree.leaves(params)[0].dtype)
    h, cache = model.hidden(params, prompt, at, cache=cache, memory=memory)
    return jnp.take_along_axis(h, segment.sum(1)[:, None, None] - 1, axis=1)[:, 0], cache


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(
    model: Model,
    context: int,
    params: Any,
    h: jax.Array,
    cache: Any,
    lengths: jax.Array,
    first: jax.Array,
    count: jax.Array,
    seed: jax.Array,
    processors: Processors,
    stop: Stop,
    memory: Any,
) -> tuple[jax.Array, jax.Array]:
    """`count` tokens, numbered from `first` for their keys: the leading columns of int32[B, context]; who has ended."""
    rows = jnp.arange(len(h))
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(rows)

    def draw(h: jax.Array, t: jax.Array, ended: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = model.logits(params, h)
        for processor in processors:
            logits = processor(logits)
        ids = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, t), row))(keys, logits)
        ids = jnp.where(ended, stop.end, ids)
        return ids, ids == stop.end

    def goes_on(carry: Any) -> jax.Array:
        i, _, _, ended = carry
        return (i < count) & ~ended.all()

    def body(carry: Any) -> Any:
        i, ids, cache, ended = carry
        one = jnp.ones((len(h), 1), jnp.int32)
        at = Places((lengths + i - 1)[:, None], one, one)
        last = jax.lax.dynamic_slice_in_dim(ids, i - 1, 1, axis=1)
        new, cache = model.hidden(params, last, at, cache=cache, memory=memory)
        new, ended = draw(new[:, 0], first + i, ended)
        return i + 1, ids.at[:, i].set(new), cache, ended

    new, ended = draw(h, first, stop.ended)
    ids = jnp.full((len(h), context), stop.end, jnp.int32).at[:, 0].set(new)
    _, ids, _, ended = jax.lax.while_loop(goes_on, body, (jnp.int32(1), ids, cache, ended))
    return ids, ended
