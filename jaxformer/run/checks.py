"""Whether data, objective and model go together, before anything is written."""

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jaxformer.config import Config
from jaxformer.data.batches import Batch
from jaxformer.data.datasets import Prepared
from jaxformer.data.dialogues import Conversations
from jaxformer.data.sources import Source
from jaxformer.run.metrics import less_is_better
from jaxformer.run.plan import (
    Judged,
    check_batch,
    check_mesh,
    check_optimizer,
    prepare_data,
    recipe_of,
    summary,
    tell_cut,
)
from jaxformer.run.starts import sources
from jaxformer.run.step import Recipe, evaluate_batch
from jaxformer.spec import InputError, naming

log = logging.getLogger(__name__)


def checked_data(config: Config) -> Prepared:
    """The data that a config asks for. Raises InputError if no row of it can be drawn, or nothing validated; for a
    wrong vocabulary; and for what objective and heads cannot learn from."""
    for corpus, _ in config.data.corpus.parts() + (config.data.valid.parts() if config.data.valid else ()):
        if told := corpus.summary():
            log.info("%s", told)
    prepared = prepare_data(config)
    recipe = recipe_of(config, prepared.tokenizer, prepared.classes)
    check_optimizer(config, recipe)
    check_mesh(config, recipe, jax.device_count())
    sampling, more = config.data.sampling, "give more text, or a smaller data.window"
    for (corpus, _), source in zip(config.data.corpus.parts(), prepared.train, strict=True):
        try:
            sampling.check_source(source, config.row)
        except InputError as error:
            raise InputError(f"data.corpus={corpus}: has for training {error}; {more}") from None
    firsts = [next(sampling.full_pass(source, config.row, 1), None) for source in prepared.valid]
    found = next(filter(None, firsts), None)
    if found is None:
        data = config.data
        which = f"data.corpus={data.corpus}" if data.valid is None else f"data.valid={data.valid}"
        remedy = "give more text" + (", or a larger data.valid_fraction" if data.valid is None else "")
        what = "no example" if sampling.examples else "no 2 tokens, one of which predicts the other"
        raise InputError(f"{which}: has for validation {what}; {remedy}")
    field = "data.corpus" if config.data.valid is None else "data.valid"
    _check_batch(recipe, field, found)
    if config.train.best_by != "loss":
        _check_best_by(config, recipe, prepared, firsts, found)
    elif sources(config):  # whose mistakes show before anything is written
        _sums(config, recipe, found)
    for name, first in zip(prepared.valid_names, firsts, strict=True):
        if first is None:
            log.warning("%s: the part %r has nothing to validate on", field, name)
    for source in prepared.train:
        batch = next(iter(sampling.full_pass(source, config.row, 1)))
        _check_batch(recipe, "data.corpus", batch)
    for source, split in ((prepared.train[0], "train"), (prepared.valid[0], "valid")):
        tell_cut(config, source, split)
    _tell_of_ends(config, recipe, prepared)
    _tell_of_templates(config)
    _tell_of_classes(prepared)
    _tell_of_duplicates(prepared)
    return prepared


def _tell_of_ends(config: Config, recipe: Recipe, prepared: Prepared) -> None:
    """Several documents, and no id that ends one: says so once, or raises InputError where rows cannot be read."""
    sampling, corpora = config.data.sampling, (config.data.corpus, config.data.valid or config.data.corpus)
    splits = zip(corpora, (prepared.train, prepared.valid), strict=True)
    framed = [one for corpus, own in splits for (part, _), one in zip(corpus.parts(), own, strict=True) if part.framed]
    if prepared.tokenizer.end is not None or not framed:  # an end is put behind each document, or they have their own
        return
    documents = max(len(source.starts) for source in framed)
    remedy = "set data.tokenizer.end_token=true, or take data.tokenizer=BPE"
    tokenizer = f"data.tokenizer={type(config.data.tokenizer).__name__} has no id that ends a text"
    if sampling.joined:
        kind = type(recipe.objective).__name__
        sentence = f"{tokenizer}: of two joined texts (ab, c) and (a, bc) would be the same row"
        if recipe.model.writes:
            raise InputError(f"objective={kind}: {sentence}; {remedy}")
        if not recipe.model.tells_parts:
            log.warning("%s; %s", sentence, remedy)
    elif documents > 1 and not sampling.whole_documents:
        log.warning("%s: the %s documents run together; %s", tokenizer, f"{documents:,}", remedy)
    elif documents > 1 and recipe.model.writes:
        log.warning("%s: where a document ends is not learned, and samples do not end; %s", tokenizer, remedy)


def _tell_of_templates(config: Config) -> None:
    """Dialogues that are written in several ways, as where only those for training have a template of their own."""
    corpora = [corpus for corpus in (config.data.corpus, config.data.valid) if corpus is not None]
    parts = [part for corpus in corpora for part, _ in corpus.parts() if isinstance(part, Conversations)]
    for name in ("template", "system"):
        if len({getattr(part, name) for part in parts}) > 1:
            log.warning(
                "dialogues differ in their %s, in data.corpus or between it and data.valid; give all the same", name
            )


def _tell_of_classes(prepared: Prepared) -> None:
    """Classes of which there is no example to train on, or none to validate on."""
    for column, classes in prepared.classes.items():
        for source, what in ((prepared.train[0], "train"), (prepared.valid[0], "validate")):
            if column not in source.labels:
                continue
            counts = _count(source, column, len(classes))
            if none := [name for name, count in zip(classes, counts, strict=True) if not count]:
                more = f" and {len(none) - 10:,} more" if len(none) > 10 else ""
                log.warning("%r: there is no example to %s on of %s%s", column, what, ", ".join(none[:10]), more)


def _tell_of_duplicates(prepared: Prepared) -> None:
    """Examples to validate on that are to be trained on, too: a model that has learned them by heart knows them."""
    texts = lambda source: (hash(tuple(ids.tobytes() for ids in source.example(i))) for i in range(source.n_examples))
    if not prepared.train[0].examples:
        return
    known = {text for source in prepared.train for text in texts(source)}
    again = sum(text in known for source in prepared.valid for text in texts(source))
    if again:
        count, remedy = sum(source.n_examples for source in prepared.valid), "leave out duplicates"
        log.warning("valid: %d of %d examples have the texts of others to train on; %s", again, count, remedy)


def _count(source: Source, column: str, n_classes: int) -> NDArray[np.int64]:
    """How many examples have each class."""
    labels = source.labels[column]
    return labels.sum(0) if labels.ndim > 1 else np.bincount(labels, minlength=n_classes)


def _check_batch(recipe: Recipe, field: str, batch: Batch) -> None:
    """Raises InputError for batches that the objective cannot be given, or with more than it reads."""
    if "source" in batch and "source" not in recipe.objective.needs:
        raise InputError(
            f"objective={type(recipe.objective).__name__} reads one text, but examples of {field} have two; set "
            "data.sampling.joined=true, or leave the target of the corpus out"
        )
    with naming(field):
        check_batch(recipe, batch)


def _check_best_by(
    config: Config, recipe: Recipe, prepared: Prepared, firsts: Sequence[Batch | None], batch: Batch
) -> None:
    """Raises InputError if no evaluation tells what the best checkpoint is; `firsts` are batches of each source."""
    known = dict.fromkeys(_sums(config, recipe, batch), 1.0)
    if "bytes" in known and prepared.tokenizer.byte_lengths() is None:
        known["bytes"] = 0.0
    sums = [{} if first is None else known for first in firsts]
    if not math.isfinite(rank_of(config, summary(recipe, Judged.of(prepared), sums))):
        raise InputError(f"train.best_by={config.train.best_by!r} is of a part that has nothing to validate on")


def _sums(config: Config, recipe: Recipe, batch: Batch) -> dict[str, Any]:
    """The shapes of what an evaluation sums over a batch with rows as this one's."""
    rows = batch | ({"counted": np.ones(1, np.float32)} if recipe.objective.among_rows else {})
    shapes = {name: jax.ShapeDtypeStruct((config.slice_rows, *a.shape[1:]), a.dtype) for name, a in rows.items()}
    params = jax.eval_shape(recipe.model.init, jax.random.key(0))
    lengths = jax.ShapeDtypeStruct((recipe.model.vocab_size,), np.float32)
    return jax.eval_shape(functools.partial(evaluate_batch, recipe), params, shapes, np.int32(0), lengths)


def rank_of(config: Config, found: Mapping[str, Any]) -> float:
    """What is least for the best evaluation."""
    value = found.get(config.train.best_by)
    if not isinstance(value, float):
        names = ", ".join(name for name, value in found.items() if isinstance(value, float))
        raise InputError(f"train.best_by={config.train.best_by!r} must be a number of the evaluation: {names}")
    return value if less_is_better(config.train.best_by) else -value
