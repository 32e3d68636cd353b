"""From a trained model to text: prefill, then token by token with a cache."""

import abc
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.generation.logits_processors import LogitsProcessor
from jaxformer.learning.objectives import Objective
from jaxformer.model.masks import Places, places
from jaxformer.model.models import Model
from jaxformer.spec import Spec

Processors = tuple[LogitsProcessor, ...]

STRETCH = 32  # tokens that are drawn without a word to the host


class Sampler(Spec):
    """How texts are drawn from a model that an objective has trained."""

    def check_model(self, objective: Objective, model: Model) -> None:
        """Raises ValueError if it cannot draw texts from the model."""

    @abc.abstractmethod
    def __call__(
        self,
        objective: Objective,
        model: Model,
        params: Any,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        processors: Processors = (),
        seed: int = 0,
        context: int | None = None,
        end: int | None = None,
        sources: Sequence[Sequence[int]] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        """int32[B, tokens] that follow the prompts, none of which may be empty.

        A row in which `end` stands holds nothing else from there on. `processors` act on logits before a token is
        drawn; the same `seed` gives the same texts. The model sees at most `context` tokens at once: its
        context_length, if that is None. `sources` are what the encoder of a model that has one reads, a row each. Ids
        are not checked. `between` is called every so often; what it raises ends the drawing.
        """


class LeftToRight(Sampler):
    """Token after token, each drawn from what the model says of those before it.

    Sample i, token t is drawn with the key fold_in(fold_in(key(seed), i), t), so that asking for more samples of a
    prompt, or for more tokens, leaves the first ones as they were. A text that fills the context goes on from its last
    half; rows do so together, when the longest is full. A prefix mask sees the whole prompt, or the half. Nothing more
    is drawn once all rows have ended.
    """

    def check_model(self, objective: Objective, model: Model) -> None:
        if not model.writes:
            raise ValueError(f"sampler=LeftToRight must have a decoder with a LanguageHead, not {type(model).__name__}")

    def __call__(
        self,
        objective: Objective,
        model: Model,
        params: Any,
        prompts: Sequence[Sequence[int]],
        tokens: int,
        processors: Processors = (),
        seed: int = 0,
        context: int | None = None,
        end: int | None = None,
        sources: Sequence[Sequence[int]] | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> np.ndarray:
        context = context or model.context_length
        memory = None if sources is None else _encode(model, params, *padded([s[:context] for s in sources], context))
        texts = [list(prompt)[-context:] for prompt in prompts]
        how = np.uint32(seed), processors, np.int32(-1 if end is None else end)
        made: list[np.ndarray] = []
        done, ended = 0, np.zeros(len(texts), bool)
        while done < tokens and not ended.all():
            longest = max(map(len, texts))
            left = min(tokens - done, context - longest + 1)
            prompt, segment = padded(texts, context)
            ids, ended, cache = _prefill(model, context, params, prompt, segment, memory, np.int32(done), *how, ended)
            new = [np.asarray(ids)[:, None]]
            at = segment.sum(1)
            while (left := left - new[-1].shape[1]) > 0 and not np.asarray(ended).all():
                between()
                count = min(left, STRETCH)
                first = np.int32(done + sum(part.shape[1] for part in new))
                known = model, params, ids, cache, at, first
                drawn, ended, cache = _decode(*known, np.int32(count), *how, ended, memory)
                new.append(np.asarray(drawn)[:, :count])
                ids, at = new[-1][:, -1], at + count
            made.append(np.concatenate(new, 1))
            ended = np.asarray(ended)
            done += made[-1].shape[1]
            half = max(1, context // 2)
            texts = [(text + row.tolist())[-half:] for text, row in zip(texts, made[-1], strict=True)]
        rest = np.full((len(texts), tokens - done if ended.all() else 0), end or 0, np.int32)
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
    return model.encode(params, ids, places(segment)).h


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    model: Model,
    context: int,
    params: Any,
    prompt: jax.Array,
    segment: jax.Array,
    memory: Any,
    number: jax.Array,
    seed: jax.Array,
    processors: Processors,
    end: jax.Array,
    ended: jax.Array,
) -> tuple[jax.Array, jax.Array, Any]:
    """The token int32[B] behind each prompt [B, T], padded on the right; who has ended; and the filled cache."""
    at = places(segment, jnp.zeros_like(segment))
    cache = model.cache(len(prompt), context, jax.tree.leaves(params)[0].dtype)
    h, cache, *_ = model.hidden(params, prompt, at, cache=cache, memory=memory)
    last = jnp.take_along_axis(h, segment.sum(1)[:, None, None] - 1, axis=1)[:, 0]
    return *_draw(model, params, last, number, seed, processors, end, ended), cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _decode(
    model: Model,
    params: Any,
    last: jax.Array,
    cache: Any,
    lengths: jax.Array,
    first: jax.Array,
    count: jax.Array,
    seed: jax.Array,
    processors: Processors,
    end: jax.Array,
    ended: jax.Array,
    memory: Any,
) -> tuple[jax.Array, jax.Array, Any]:
    """`count` tokens behind the `last` ones int32[B], numbered from `first` for their keys: the leading columns of
    int32[B, STRETCH]; who has ended; and the cache. `lengths` are those of the texts before `last`."""

    def goes_on(carry: Any) -> jax.Array:
        i, _, _, _, ended = carry
        return (i < count) & ~ended.all()

    def body(carry: Any) -> Any:
        i, last, ids, cache, ended = carry
        one = jnp.ones((len(last), 1), jnp.int32)
        at = Places((lengths + i)[:, None], one, one)
        h, cache, *_ = model.hidden(params, last[:, None], at, cache=cache, memory=memory)
        new, ended = _draw(model, params, h[:, 0], first + i, seed, processors, end, ended)
        return i + 1, new, ids.at[:, i].set(new), cache, ended

    ids = jnp.full((len(last), STRETCH), end, jnp.int32)
    _, _, ids, cache, ended = jax.lax.while_loop(goes_on, body, (jnp.int32(0), last, ids, cache, ended))
    return ids, ended, cache


def _draw(
    model: Model,
    params: Any,
    h: jax.Array,
    number: jax.Array,
    seed: jax.Array,
    processors: Processors,
    end: jax.Array,
    ended: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Token `number` of each row from its hidden state [B, D]: int32[B]; and who has ended."""
    logits = model.logits(params, h)
    for processor in processors:
        logits = processor(logits)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), i), number))(
        jnp.arange(len(h))
    )
    ids = jnp.where(ended, end, jax.vmap(jax.random.categorical)(keys, logits)).astype(jnp.int32)
    return ids, ids == end
