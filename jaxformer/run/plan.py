"""From a config to what it runs: data, the static and the traced part of the step, the shapes of batches and state."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import Config
from jaxformer.data.datasets import Prepared, classes_of, fitted, prepare
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.model.heads import ClassificationHead, Head
from jaxformer.run.step import Hyper, Recipe, evaluate_batch, evaluate_members, init_state
from jaxformer.spec import InputError

Classes = Mapping[str, tuple[str, ...]]  # column of a table -> the names of its classes


def planned_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer whose vocabulary has a size; reads the corpus only if the size depends on it."""
    tokenizer = config.data.tokenizer
    planned = tokenizer.learns and tokenizer.vocab_size is not None
    return tokenizer if planned else fitted(tokenizer, config.data.corpus)


def prepare_data(config: Config, tokenizer: Tokenizer | None = None, classes: Classes | None = None) -> Prepared:
    """The ids that a config asks for; `tokenizer` is a fitted one, `classes` those known, where there are some."""
    data = config.data
    given = {h.column: h.classes for h in config.model.heads if isinstance(h, ClassificationHead) and h.classes}
    known = given | dict(classes or {})
    return prepare(
        data.corpus,
        tokenizer or data.tokenizer,
        data.valid,
        data.valid_fraction,
        data.split_seed,
        data.sampling.examples,
        known,
    )


def planned_recipe(config: Config, tokenizer: Tokenizer | None = None) -> Recipe:
    """`recipe_of` before there is a run; reads the corpus only if sizes depend on it."""
    heads = [head for head in config.model.heads if isinstance(head, ClassificationHead)]
    classes = classes_of(config.data.corpus) if any(head.classes is None for head in heads) else {}
    return recipe_of(config, tokenizer or planned_tokenizer(config), classes)


def recipe_of(config: Config, tokenizer: Tokenizer, classes: Classes) -> Recipe:
    """The static part of the step; vocabulary and special ids are the tokenizer's, classes those of the table."""
    size, special = tokenizer.vocab_size, tokenizer.special
    assert size is not None
    if config.model.vocab_size not in (None, size):
        raise InputError(f"model.vocab_size={config.model.vocab_size} must be {size}, the tokenizer's; None takes that")
    heads = tuple(_with_classes(head, classes) for head in config.model.heads)
    head = heads if isinstance(config.model.head, tuple) else heads[0]
    model = dataclasses.replace(config.model, vocab_size=size, head=head)
    try:
        objective = config.objective.filled(special, size, config.row_length + 1, config.data.sampling.several)
        for each in heads:
            each.params()
    except ValueError as error:
        raise InputError(str(error)) from None
    train = config.train
    return Recipe(model, objective, train.compute_dtype, train.accumulation, train.grad_norms)


def _with_classes(head: Head, classes: Classes) -> Head:
    if not isinstance(head, ClassificationHead) or head.classes is not None:
        return head
    return dataclasses.replace(head, classes=tuple(classes.get(head.column, ())) or None)


def abstract_batches(config: Config, recipe: Recipe, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `count` batches, [count, B, ...], as large as they may be; the corpus is not read."""
    shapes = config.data.sampling.shapes(config.data.corpus, config.row_length)
    shapes |= {f"labels_{name}": shape for name, shape in recipe.objective.label_shapes(recipe.model).items()}
    leading = count, config.data.batch_size
    return {name: jax.ShapeDtypeStruct((*leading, *shape), jnp.int32) for name, shape in shapes.items()}


def hyper_of(config: Config) -> Hyper:
    train = config.train
    ema_decay = None if train.ema_decay is None else np.float32(train.ema_decay)
    return Hyper(np.uint32(train.seed), np.int32(train.steps), config.optimizer, ema_decay)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """Shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.eval_shape(lambda: init_state(recipe, hyper_of(config)))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes)


def evaluate(
    recipe: Recipe, params: Any, sources: Sequence[Source], config: Config, tokenizer: Tokenizer
) -> dict[str, Any]:
    """The objective's summary of a full pass of the sources."""
    total = _sums(functools.partial(evaluate_batch, recipe, params), recipe, sources, config, tokenizer)
    return _summary(recipe, total)


def evaluate_together(
    recipe: Recipe, params: Any, sources: Sequence[Source], config: Config, tokenizer: Tokenizer
) -> list[dict[str, Any]]:
    """`evaluate` for each member of parameters that have a leading axis for them."""
    total = _sums(functools.partial(evaluate_members, recipe, params), recipe, sources, config, tokenizer)
    count = len(jax.tree.leaves(params)[0])
    return [_summary(recipe, {name: values[i] for name, values in total.items()}) for i in range(count)]


def _summary(recipe: Recipe, total: dict[str, Any]) -> dict[str, Any]:
    total = {name: float(value) for name, value in total.items()}
    return recipe.objective.summary(total) if total else {"loss": math.nan, "tokens": 0}


def _sums(
    evaluated: Callable[..., dict[str, jax.Array]],
    recipe: Recipe,
    sources: Sequence[Source],
    config: Config,
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """What batches of a full pass add up to, in double precision."""
    lengths = tokenizer.byte_lengths()
    known = np.zeros(recipe.model.vocab_size or 0, np.float32) if lengths is None else lengths.astype(np.float32)
    total: dict[str, Any] = {}
    in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
    passes = (config.data.sampling.full_pass(s, config.row_length, config.data.batch_size) for s in sources)
    for number, batch in enumerate(itertools.chain.from_iterable(passes)):
        in_flight.append(evaluated(batch, np.int32(number), known))
        if len(in_flight) == 2:
            _add(total, in_flight.popleft())
    for sums in in_flight:
        _add(total, sums)
    return total


def _add(total: dict[str, Any], sums: dict[str, jax.Array]) -> None:
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
