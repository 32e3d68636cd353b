"""From a trained model to text: prefill, then token by token with a cache."""

import abc
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxformer.generation.logits_processors import LogitsProcessor, Text, first
from jaxformer.learning.objectives import Objective
from jaxformer.model.masks import Places, places
from jaxformer.model.models import Model
from jaxformer.spec import Spec

Processors = tuple[LogitsProcessor, ...]

STRETCH = 128  # tokens that are drawn without a word to the host, at most
BRIEF = 32  # so many at first, then as many as there are: of texts that end early no more is drawn in vain
TOGETHER = 4  # samples that are drawn side by side: always so many, since sums in other shapes round differently
SMALLEST = 64  # tokens that the smallest cache holds; larger ones two or four times as many, up to the context
MANY = 16  # texts from which on the cache doubles: of few, what is compiled for each size costs more than it saves
ROOM = 1024  # tokens of text for which processors that read it have room without compiling again


class Request(NamedTuple):
    """What a sampler is asked for: how B texts continue. Ids are not checked."""

    objective: Objective
    model: Model
    params: Any
    prompts: Sequence[Sequence[int]]  # none is empty
    tokens: int  # at most so many of each text
    keys: jax.Array  # [B], one for each text: `row_keys`
    processors: Processors = ()  # act on logits before a token is drawn
    context: int | None = None  # so many tokens the model sees at once; None: its context_length
    end: int | None = None  # the id that ends a text
    sources: Sequence[Sequence[int]] | None = None  # what the encoder reads, of a model that has one
    stretch: int = STRETCH  # at most so many tokens between two words to the caller
    second: bool = False  # whether what is drawn is a second text, told from the prompt by its token type
    frames: Sequence[Sequence[bool]] | None = None  # which ids of the prompts nobody wrote, as the start; None: none
    prepared: tuple[Any, Any] | None = None  # parameters, and what the sampler has `prepared` of them


class Drawn(NamedTuple):
    """The next tokens of each text."""

    ids: np.ndarray  # int32[B, n]
    log_probabilities: np.ndarray | None = None  # float32[B, n], natural, of the model itself; None: not known


def row_keys(seed: int, first: int, count: int) -> jax.Array:
    """Keys [count] of the samples from `first` on: fold_in(key(seed), number of the sample)."""
    return _row_keys(np.uint32(seed), np.int32(first), count)


@functools.partial(jax.jit, static_argnums=2)
def _row_keys(seed: jax.Array, first: jax.Array, count: int) -> jax.Array:
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first + jnp.arange(count))


class Sampler(Spec):
    """How texts are drawn from a model that an objective has trained."""

    def check_model(self, objective: Objective, model: Model) -> None:
        """Raises ValueError if it cannot draw texts from the model."""

    def prepared(self, model: Model, params: Any) -> Any:
        """What it needs of the parameters in another form, which several requests may share; None: nothing."""

    @abc.abstractmethod
    def __call__(self, request: Request) -> Iterator[Drawn]:
        """What follows the prompts, some tokens at a time; the caller may stop asking for more.

        A row in which `end` stands holds nothing else from there on. There may be fewer than `tokens` in all, if all
        rows have ended. The same key gives the same text.
        """


class LeftToRight(Sampler):
    """Token after token, each drawn from what the model says of those before it.

    Token t of a text is drawn with the key fold_in(key of the text, t), so that asking for more tokens leaves the first
    ones as they were. A text that fills the context continues from its last half; the rows of a request do so together,
    when the longest is full. A prefix mask sees the whole prompt, or the half, and token types take it for the first
    text. Nothing more is drawn once all rows have ended.
    """

    def check_model(self, objective: Objective, model: Model) -> None:
        if not model.writes:
            raise ValueError(f"sampler=LeftToRight must have a decoder with a LanguageHead, not {type(model).__name__}")

    def prepared(self, model: Model, params: Any) -> Any:
        return _for_decoding(model, params)

    def __call__(self, request: Request) -> Iterator[Drawn]:
        model, params, sources = request.model, request.params, request.sources
        context = request.context or model.context_length
        memory = None if sources is None else _encode(model, params, *padded([s[:context] for s in sources], context))
        of, own_params = request.prepared or (None, None)
        if of is not params or own_params is None:
            own_params = self.prepared(model, params)
        own_memory = _apart(model, memory)
        second = request.second or request.objective.second
        how = How(request.keys, request.processors, np.int32(-1 if request.end is None else request.end))
        texts = [list(prompt) for prompt in request.prompts]
        length, done, ended = context, 0, np.zeros(len(texts), bool)
        while done < request.tokens and not ended.all():
            seen = [text[-length:] for text in texts]
            room = context - max(map(len, seen)) + 1
            prompt, segment = padded(seen, context)
            known = _known(texts, request.frames, room) if any(p.reads_text for p in how.processors) else None
            at = segment.sum(1)
            size = _size(len(texts), int(at.max()) + 1, context)
            now, cache = _prefill(model, size, params, prompt, segment, memory, np.int32(done), how, ended, known)
            new = Drawn(np.asarray(now.ids)[:, None], np.asarray(now.log_probabilities)[:, None])
            left = min(request.tokens - done, room)
            while True:
                yield new
                count, ended = new.ids.shape[1], np.asarray(now.ended)
                for text, row in zip(texts, new.ids.tolist(), strict=True):
                    text.extend(row)
                done, left = done + count, left - count
                if left == 0 or ended.all():
                    break
                if at.max() == size:
                    size = _size(len(texts), size + 1, context)
                    cache = _grown(model, len(texts), size, cache, own_params)
                count = min(left, request.stretch, STRETCH, max(BRIEF, done), size - int(at.max()))
                steps = at, np.int32(done), np.int32(count)
                drawn, now, cache = _decode(model, second, own_params, now, cache, *steps, how, own_memory)
                new, at = Drawn(*(np.asarray(a)[:, :count] for a in drawn)), at + count
            length = max(1, context // 2)


def _size(rows: int, length: int, context: int) -> int:
    """The size of the cache while so many texts have up to `length` tokens: by these alone, so that what is drawn does
    not depend on how much is asked for. Reading what is empty costs time; each size is a program of its own."""
    size = SMALLEST
    while size < length:
        size *= 2 if rows >= MANY else 4
    return min(size, context)


def padded(texts: Sequence[Sequence[int]], limit: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and segments, int32[B, T], padded on the right to a power of two: many lengths share one program."""
    longest = max(1, *map(len, texts))
    ids = np.zeros((len(texts), min(limit, 1 << (longest - 1).bit_length())), np.int32)
    segments = np.zeros_like(ids)
    for i, text in enumerate(texts):
        ids[i, : len(text)], segments[i, : len(text)] = text, 1
    return ids, segments


def _known(texts: Sequence[Sequence[int]], frames: Sequence[Sequence[bool]] | None, room: int) -> Text:
    """The whole texts, with room for so many tokens more; as wide for whatever number of tokens is asked for."""
    size = max(ROOM, 1 << (max(map(len, texts)) + room - 1).bit_length())
    ids, segments = padded(texts, size)
    more, frame = ((0, 0), (0, size - ids.shape[1])), np.zeros((len(texts), size), bool)
    for row, own in zip(frame, frames or (), strict=False):
        row[: len(own)] = own
    return Text(jnp.asarray(np.pad(ids, more)), jnp.asarray(np.pad(segments > 0, more)), jnp.asarray(frame))


@functools.partial(jax.jit, static_argnums=0)
def _for_decoding(model: Model, params: Any) -> Any:
    return model.for_decoding(params)


@functools.partial(jax.jit, static_argnums=0)
def _apart(model: Model, memory: Any) -> Any:
    return model.apart(memory)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _grown(model: Model, rows: int, size: int, cache: Any, params: Any) -> Any:
    """The cache, with room for `size` tokens."""
    dtype = jax.tree.leaves(params)[0].dtype
    write = lambda new, old: new.at[tuple(slice(n) for n in old.shape)].set(old)
    return jax.tree.map(write, model.apart(model.cache(rows, size, dtype)), cache)


class How(NamedTuple):
    """How tokens are drawn."""

    keys: jax.Array  # [B]
    processors: Processors
    end: Int[Array, ""] | np.int32  # -1: none


class Now(NamedTuple):
    """Where texts stand: the last token of each, and whether it has ended."""

    ids: Int[Array, "B"]
    log_probabilities: Float[Array, "B"]
    ended: Bool[Array, "B"]
    text: Text | None  # with the last token; None: no processor reads it


@functools.partial(jax.jit, static_argnums=0)
def _encode(model: Model, params: Any, ids: jax.Array, segment: jax.Array) -> Any:
    return model.encode(params, ids, places(segment)).h


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(
    model: Model,
    size: int,
    params: Any,
    prompt: jax.Array,
    segment: jax.Array,
    memory: Any,
    number: jax.Array,
    how: How,
    ended: jax.Array,
    text: Text | None,
) -> tuple[Now, Any]:
    """Token `number` behind each prompt [B, T], padded on the right; and the filled cache."""
    at = places(segment, jnp.zeros_like(segment))
    cache = model.cache(len(prompt), size, jax.tree.leaves(params)[0].dtype)
    h, cache, *_ = model.hidden(params, prompt, at, cache=cache, memory=memory)
    last = jnp.take_along_axis(h, segment.sum(1)[:, None, None] - 1, axis=1)[:, 0]
    return _draw(model, params, last, _uniform(how.keys, number), how, ended, text), model.apart(cache)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=4)
def _decode(
    model: Model,
    second: bool,
    params: Any,
    now: Now,
    cache: Any,
    lengths: jax.Array,
    first: jax.Array,
    count: jax.Array,
    how: How,
    memory: Any,
) -> tuple[tuple[jax.Array, jax.Array], Now, Any]:
    """`count` tokens behind the last ones, numbered from `first` for their keys: the leading columns of int32[B,
    STRETCH], and of their log-probabilities; where the texts stand; and the cache. `lengths` are those of the texts
    before the last token."""

    def goes_on(carry: Any) -> jax.Array:
        i, _, now, _ = carry
        return (i < count) & ~now.ended.all()

    def body(carry: Any) -> Any:
        i, (ids, log_probabilities), now, cache = carry
        cache = whole(cache)
        one = jnp.ones((len(now.ids), 1), jnp.int32)
        at = Places((lengths + i)[:, None], one, one if second else None)
        h, cache, *_ = model.hidden(params, now.ids[:, None], at, cache=cache, memory=memory)
        now = _draw(model, params, h[:, 0], uniform[i], how, now.ended, now.text)
        drawn = ids.at[:, i].set(now.ids), log_probabilities.at[:, i].set(now.log_probabilities)
        return i + 1, drawn, now, squeezed(cache)

    # Of one text XLA on CPU drops the axis for texts where it reads the cache, and would write, and copy, it twice.
    leaves, tree = jax.tree.flatten(cache)
    squeezed = lambda cache: [array.squeeze() for array in jax.tree.leaves(cache)]
    whole = lambda arrays: tree.unflatten([a.reshape(b.shape) for a, b in zip(arrays, leaves, strict=True)])
    shape = len(now.ids), STRETCH
    uniform = jax.vmap(_uniform, (None, 0))(how.keys, first + jnp.arange(STRETCH))  # in the loop it costs 3 µs a token
    drawn = jnp.full(shape, how.end, jnp.int32), jnp.zeros(shape, jnp.float32)
    _, drawn, now, cache = jax.lax.while_loop(goes_on, body, (jnp.int32(0), drawn, now, squeezed(cache)))
    return drawn, now, whole(cache)


def _draw(
    model: Model, params: Any, h: jax.Array, uniform: jax.Array, how: How, ended: jax.Array, text: Text | None
) -> Now:
    """A token of each row from its hidden state [B, D], by uniform numbers [B]."""
    own = logits = model.logits(params, h)
    for processor in how.processors:
        logits = processor(logits, text)
    ids = jnp.where(ended, how.end, choose(uniform, logits))
    chosen = jnp.take_along_axis(own, jnp.maximum(ids, 0)[:, None], 1)[:, 0]
    log_probabilities = chosen - jax.nn.logsumexp(own, -1)
    return Now(ids, log_probabilities, ids == how.end, None if text is None else text.append(ids))


def _uniform(keys: jax.Array, number: jax.Array) -> Float[Array, "B"]:
    """The numbers from 0 to 1 by which token `number` of each row is drawn."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, number)))(keys)


def choose(uniform: Float[Array, "B"], logits: Float[Array, "B V"]) -> Int[Array, "B"]:
    """A token of each row, with the probability that its logit gives it: where the sum of probabilities passes a
    number from 0 to 1. One such number for each row costs a tenth of one for each token."""
    p = jnp.exp(logits - logits.max(-1, keepdims=True))
    sums = jnp.cumsum(p, -1)
    passed = sums > uniform[:, None] * sums[:, -1:]
    ids, likeliest = first(passed & (p > 0)), first(~(p < 1))  # which is taken where rounding leaves none
    return jnp.where(ids < p.shape[-1], ids, likeliest)[:, 0]
