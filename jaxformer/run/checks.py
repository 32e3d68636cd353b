"""Whether data, objective and model go together, before anything is written."""

import functools
import logging
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jaxformer.config import Config
from jaxformer.data.batches import Batch, Examples
from jaxformer.data.datasets import Prepared
from jaxformer.data.tokenizers import Tokenizer
from jaxformer.learning.objectives import Classification
from jaxformer.model.heads import TokenClassificationHead
from jaxformer.run.plan import hyper_of, prepare_data, recipe_of
from jaxformer.run.step import Recipe, evaluate_batch, init_state
from jaxformer.spec import InputError

log = logging.getLogger(__name__)


def checked_data(config: Config) -> Prepared:
    """The data that a config asks for. Raises InputError if no row of it can be drawn, or nothing validated; for a
    wrong vocabulary; and for what objective and heads cannot learn from."""
    prepared = prepare_data(config)
    recipe = recipe_of(config, prepared.tokenizer, prepared.classes)
    sampling, more = config.data.sampling, "give more text, or a smaller data.window"
    for (corpus, _), source in zip(config.data.corpus.parts(), prepared.train, strict=True):
        try:
            sampling.check_source(source, config.row_length)
        except InputError as error:
            raise InputError(f"data.corpus={corpus}: has for training {error}; {more}") from None
    passes = (sampling.full_pass(source, config.row_length, 1) for source in prepared.valid)
    found = next(filter(None, (next(batches, None) for batches in passes)), None)
    if found is None:
        data = config.data
        which = f"data.corpus={data.corpus}" if data.valid is None else f"data.valid={data.valid}"
        remedy = "give more text" + (", or a larger data.valid_fraction" if data.valid is None else "")
        what = "no example" if sampling.examples else "no 2 tokens, one of which predicts the other"
        raise InputError(f"{which}: has for validation {what}; {remedy}")
    field = "data.corpus" if config.data.valid is None else "data.valid"
    _check_batch(config, recipe, prepared.tokenizer, field, found)
    for source in prepared.train:
        batch = next(iter(sampling.full_pass(source, config.row_length, 1)))
        _check_batch(config, recipe, prepared.tokenizer, "data.corpus", batch)
    if isinstance(sampling, Examples):
        for source, split in ((prepared.train[0], "train"), (prepared.valid[0], "valid")):
            if cut := sampling.count_cut(source, config.row_length):
                message = "%s: %d of %d examples are longer than data.window=%d, and are cut"
                log.warning(message, split, cut, source.n_examples, config.window)
    return prepared


def _check_batch(config: Config, recipe: Recipe, tokenizer: Tokenizer, field: str, batch: Batch) -> None:
    """Raises InputError for batches without what the objective needs, or with labels that are not of its kind; and if
    no evaluation tells what the best checkpoint is."""
    name = type(recipe.objective).__name__
    if "source" in batch and "source" not in recipe.objective.needs:
        raise InputError(
            f"objective={name} reads one text, but examples of {field} have two; set data.sampling.joined=true, or "
            "leave the target of the corpus out"
        )
    for head in recipe.model.heads:
        if isinstance(head, TokenClassificationHead) and isinstance(recipe.objective, Classification):
            labels = batch.get(f"labels_{head.column}")
            if labels is None or labels.shape != batch["tokens"].shape:
                raise InputError(
                    f"model.head=TokenClassificationHead needs a label for each token of {field}, as no corpus here "
                    "gives; take ClassificationHead, or a sampling of your own"
                )
    for array in recipe.objective.needs:
        if array not in batch:
            raise InputError(
                f"objective={name} needs two texts in each example: a data.corpus with a target, as Table(target=...), "
                "and data.sampling=Examples, not joined"
            )
    for column, shape in recipe.objective.label_shapes(recipe.model).items():
        labels = batch.get(f"labels_{column}")
        if labels is None:
            raise InputError(
                f"objective={name} needs labels of the column {column!r}: name it in {field}.labels, and take "
                "data.sampling=Examples"
            )
        if labels.shape[1:] != shape:
            several = "any number of classes" if labels.ndim > 1 else "one class"
            raise InputError(
                f"model.head: a row of {field} has {several} of {column!r}, which is not what the head says; "
                "MultiLabelHead and the corpus's `several` go together"
            )
    if config.train.best_by != "loss":
        params = jax.eval_shape(lambda: init_state(recipe, hyper_of(config))).params
        lengths = jax.ShapeDtypeStruct((recipe.model.vocab_size,), np.float32)
        sums = jax.eval_shape(functools.partial(evaluate_batch, recipe), params, batch, np.int32(0), lengths)
        known = dict.fromkeys(sums, 1.0)
        if "bytes" in known and tokenizer.byte_lengths() is None:
            known["bytes"] = 0.0
        rank_of(config, recipe.objective.summary(known))


def rank_of(config: Config, found: Mapping[str, Any]) -> float:
    """What is least for the best evaluation."""
    value = found.get(config.train.best_by)
    if not isinstance(value, float):
        names = ", ".join(name for name, value in found.items() if isinstance(value, float))
        raise InputError(f"train.best_by={config.train.best_by!r} must be a number of the evaluation: {names}")
    return value if config.train.best_by in ("loss", "bits_per_byte") else -value
