"""From a config to what it runs: data, the static and the traced part of the step, the shapes of batches and state."""

import collections
import dataclasses
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import Config
from jaxformer.data.datasets import Prepared, classes_of, fitted, prepare
from jaxformer.data.sources import Source
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.declarations import by_path, trained
from jaxformer.mesh import ROWS, partition, placed, shardings
from jaxformer.model.heads import Classes, MultiLabelHead
from jaxformer.model.models import Model
from jaxformer.run.step import Hyper, Recipe, evaluate_batch, evaluate_members, init_state
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


def planned_tokenizer(config: Config) -> Tokenizer:
    """A tokenizer whose vocabulary has a size; reads the corpus only if the size depends on it."""
    tokenizer = config.data.tokenizer
    planned = tokenizer.learns and tokenizer.vocab_size is not None
    return tokenizer if planned else fitted(tokenizer, config.data.corpus)


def prepare_data(config: Config, tokenizer: Tokenizer | None = None, classes: Classes | None = None) -> Prepared:
    """The ids that a config asks for; `tokenizer` is a fitted one, `classes` those known, where there are some."""
    data = config.data
    known = {**config.model.classes, **(classes or {})}
    return prepare(
        data.corpus,
        tokenizer or data.tokenizer,
        data.valid,
        data.valid_fraction,
        data.split_seed if data.sampling.whole_documents else None,
        data.sampling.examples,
        known,
    )


def planned_recipe(config: Config, tokenizer: Tokenizer | None = None) -> Recipe:
    """`recipe_of` before there is a run; reads the corpus only if sizes depend on it."""
    unknown = any(head.column and head.classes is None for head in config.model.heads)
    classes = classes_of(config.data.corpus) if unknown else {}
    recipe = recipe_of(config, tokenizer or planned_tokenizer(config), classes)
    check_optimizer(config, recipe)
    return recipe


def recipe_of(config: Config, tokenizer: Tokenizer, classes: Classes) -> Recipe:
    """The static part of the step; vocabulary and special ids are the tokenizer's, classes those of the table."""
    size, special = tokenizer.vocab_size, tokenizer.special
    assert size is not None
    if config.model.vocab_size not in (None, size):
        raise InputError(f"model.vocab_size={config.model.vocab_size} must be {size}, the tokenizer's; None takes that")
    heads = tuple(head.with_classes(classes) for head in config.model.heads)
    head = heads if isinstance(config.model.head, tuple) else heads[0]
    model = dataclasses.replace(config.model, vocab_size=size, head=head)
    try:
        model, _ = implemented(config, model)
        objective = config.objective.filled(special, size, config.row.tokens, config.data.sampling.several)
        for each in heads:
            each.params()
    except ValueError as error:
        raise InputError(str(error)) from None
    train = config.train
    how = train.compute_dtype, train.accumulation, train.grad_norms, train.guard
    return Recipe(model, objective, *how, config.adapter, train.product_dtype)


def implemented(config: Config, model: Model) -> tuple[Model, str]:
    """The model with the implementations of attention chosen, and which and why: "Blocked (rows of 256 tokens)"; empty
    for a model without. Raises ValueError for one that cannot do what the config asks for."""
    data = config.data
    whole = config.objective.one_document and "segments" not in data.sampling.shapes(data.corpus, config.row)
    return model.implemented(config.window, config.train.compute_dtype, whole)


def check_optimizer(config: Config, recipe: Recipe) -> None:
    """Raises InputError if the adapter or the optimizer cannot be used for the model's parameters."""
    try:
        if recipe.adapter is not None:
            recipe.adapter.check_declared(recipe.model.declared())
        declared = recipe.declared()
        config.optimizer.check_declared(trained(declared, declared))
    except ValueError as error:
        raise InputError(str(error)) from None
    left = config.optimizer.frozen(declared)
    if not jax.tree.leaves(trained(left, left)):
        kind = type(config.optimizer).__name__
        raise InputError(
            f"optimizer={kind} freezes every parameter; give a group of optimizer=Groups another optimizer, or ByDepth "
            "a smaller still"
        )


def check_mesh(config: Config, recipe: Recipe, devices: int) -> dict[str, int]:
    """Axis → size of the config's mesh on so many devices. Raises InputError if it cannot be made of them, or does not
    divide what it splits."""
    sizes, rows = config.mesh.sizes(devices), config.slice_rows
    if rows % (parts := math.prod(sizes[axis] for axis in ROWS)):
        size, accumulation = config.data.batch_size, config.train.accumulation
        slices = f" / train.accumulation={accumulation}" if accumulation > 1 else ""
        fewer = [n for n in range(accumulation - 1, 0, -1) if size % (n * parts) == 0]
        least = -(-rows // parts) * parts * accumulation
        remedy = f"train.accumulation={fewer[0]}" if fewer else f"data.batch_size={least}"
        raise InputError(
            f"data.batch_size={size}{slices} must be a multiple of mesh.data={sizes['data']} · "
            f"mesh.fsdp={sizes['fsdp']}; {remedy} would do"
        )
    for path, box in by_path(recipe.every_declared()).items():
        partition(box.letters.all, box.value.shape, sizes, path)
    if sizes["tensor"] > 1 and (reason := recipe.model.refuses_split_heads()):
        raise InputError(f"mesh.tensor={sizes['tensor']}: {reason}")
    return sizes


def abstract_batches(config: Config, recipe: Recipe, count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of `count` batches, [count, B, ...], as large as they may be; the corpus is not read."""
    shapes = config.data.sampling.shapes(config.data.corpus, config.row)
    labels = recipe.objective.label_shapes(recipe.model, config.row.tokens)
    shapes |= {f"labels_{column}": shape for column, shape in labels.items()}
    leading = count, config.data.batch_size
    return {name: jax.ShapeDtypeStruct((*leading, *shape), jnp.int32) for name, shape in shapes.items()}


def hyper_of(config: Config) -> Hyper:
    train = config.train
    ema_decay = None if train.ema_decay is None else np.float32(train.ema_decay)
    return Hyper(np.uint32(train.seed), np.int32(train.steps), config.optimizer, ema_decay)


def abstract_state(config: Config, recipe: Recipe) -> Any:
    """Shapes, dtypes and shardings of the state, into which a checkpoint is restored."""
    shapes = jax.eval_shape(lambda: init_state(recipe, hyper_of(config)))
    abstract = lambda a, sharding: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    return jax.tree.map(abstract, shapes, shardings(shapes, recipe.every_declared()))


def check_batch(recipe: Recipe, batch: Mapping[str, Any]) -> None:
    """Raises InputError for a batch without an array that the objective needs, or with labels that no head has."""
    name, heads = type(recipe.objective).__name__, recipe.model.heads
    n_classes = {h.column: len(h.classes) for h in heads if h.classes and not isinstance(h, MultiLabelHead)}
    if missing := [array for array in recipe.objective.needs if array not in batch]:
        raise InputError(
            f"objective={name} needs {', '.join(recipe.objective.needs)}, and a batch has no {', '.join(missing)}; "
            "data.sampling=Examples, not joined, gives two texts of a data.corpus with a target, as Table(target=...)"
        )
    for column, shape in recipe.objective.label_shapes(recipe.model, batch["tokens"].shape[1]).items():
        labels = batch.get(f"labels_{column}")
        if labels is None:
            raise InputError(
                f"objective={name} needs labels of the column {column!r}, and a batch has no labels_{column}; name the "
                "column in data.corpus.labels, and take data.sampling=Examples"
            )
        if labels.shape[1:] != shape:
            raise InputError(
                f"labels_{column} must have the shape {shape} in a row, but has {labels.shape[1:]}: () of one class, "
                "(classes,) of any number, as of data.corpus.several and MultiLabelHead, (tokens,) of each token"
            )
        if (most := np.asarray(labels).max(initial=-1)) >= n_classes.get(column, math.inf):
            raise InputError(
                f"labels_{column}: {most} must be less than {n_classes[column]}, how many classes model.head has; give "
                "their numbers from 0 on, and -1 where there is none"
            )


class Judged(NamedTuple):
    """What a run is validated on: sources, their shares of the whole, and what they are called."""

    sources: tuple[Source, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]

    @classmethod
    def of(cls, prepared: Prepared) -> "Judged":
        return cls(prepared.valid, prepared.valid_weights, prepared.valid_names)


def tell_cut(config: Config, source: Source, name: str) -> None:
    """Says how many examples of a source are longer than what is read of them."""
    if cut := config.data.sampling.count_cut(source, config.row):
        message = "%s: %d of %d examples are longer than data.window=%d, and are cut"
        log.warning(message, name, cut, source.n_examples, config.window)


def evaluate(
    recipe: Recipe,
    params: Any,
    judged: Judged,
    config: Config,
    tokenizer: Tokenizer,
    tokens: int | None = None,
    between: Callable[[], None] = lambda: None,
    members: int | None = None,
) -> list[dict[str, Any]]:
    """The objective's summary of a full pass or, given `tokens`, of about so many, spread over it; of each of several
    `members`, if the parameters have a leading axis for them.

    Of several sources, the whole is what a text is that has of each its share, and each is told beside it, by its
    name. `between` is called between batches; what it raises ends the evaluation.
    """
    evaluated = functools.partial(evaluate_batch if members is None else evaluate_members, recipe, params)
    lengths = tokenizer.byte_lengths()
    known = np.zeros(recipe.model.vocab_size or 0, np.float32) if lengths is None else lengths.astype(np.float32)
    sampling, number, sums = config.data.sampling, itertools.count(), list[dict[str, Any]]()
    for source, share in zip(judged.sources, judged.weights, strict=True):
        part = 1.0 if tokens is None else min(1.0, tokens * share / max(source.n_tokens, 1))
        total: dict[str, Any] = {}  # in double precision
        in_flight: collections.deque[dict[str, jax.Array]] = collections.deque()
        batches = sampling.full_pass(source, config.row, config.slice_rows, part)
        for batch in filled(batches) if recipe.objective.among_rows else batches:
            check_batch(recipe, batch)
            in_flight.append(evaluated(placed(batch), np.int32(next(number)), known))
            if len(in_flight) == 2:
                _add(total, in_flight.popleft())
                between()
        for found in in_flight:
            _add(total, found)
        sums.append(total)
    if members is None:
        return [summary(recipe, judged, sums)]
    own = lambda i: [{name: values[i] for name, values in each.items()} for each in sums]
    return [summary(recipe, judged, own(i)) for i in range(members)]


def summary(recipe: Recipe, judged: Judged, sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the sums of each source come to."""
    each = [{name: float(value) for name, value in source.items()} for source in sums]
    if not any(source.get("weight", 0) for source in each):
        return {"loss": math.nan, "tokens": 0}
    found = recipe.objective.report(_whole(each, judged.weights))
    if len(each) > 1:
        for name, own in zip(judged.names, each, strict=True):
            own = recipe.objective.report(own) if own.get("weight") else {"loss": math.nan, "tokens": 0}
            found |= {f"{key}_{name}": value for key, value in own.items()}
    return found


def _whole(each: Sequence[Mapping[str, float]], weights: Sequence[float]) -> dict[str, float]:
    """The sums of a text as long as all sources together, of which each has its share."""
    if len(each) == 1:
        return dict(each[0])
    some = [(own, share) for own, share in zip(each, weights, strict=True) if own.get("weight")]
    total, shares = sum(own["weight"] for own, _ in some), sum(share for _, share in some)
    scaled = [(own, share / shares * total / own["weight"]) for own, share in some]
    whole = {name: sum(factor * own[name] for own, factor in scaled) for name in some[0][0]}
    return whole | {"weight": total}


def filled(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Batches whose rows of padding are taken from the batch before, if its rows are as wide, for others to be told
    from them; `counted` is 1 of a batch's own rows."""
    before: Mapping[str, Any] = {}
    for batch in batches:
        own = batch.get("segments", np.ones_like(batch["tokens"])).any(1)
        if all(name in before and before[name].shape == a.shape for name, a in batch.items()):
            batch = {n: np.where(own.reshape(-1, *[1] * (a.ndim - 1)), a, before[n]) for n, a in batch.items()}
        yield {**batch, "counted": own.astype(np.float32)}
        before = batch


def _add(total: dict[str, Any], sums: dict[str, jax.Array]) -> None:
    for name, value in sums.items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
