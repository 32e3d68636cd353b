"""What a trained model does, in numbers: where in a window it errs, how far a gradient reaches, what it looks at."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxformer.data.sources import Source, Tokens
from jaxformer.declarations import Declared, is_declared
from jaxformer.learning.objectives import cross_entropy
from jaxformer.model.masks import one_document
from jaxformer.model.models import Model
from jaxformer.run.beginning import first_state
from jaxformer.run.opened import Run
from jaxformer.run.plan import hyper_of, prepare_data
from jaxformer.run.step import norms
from jaxformer.spec import InputError


def validation_rows(run: Run, count: int) -> Int[np.ndarray, "B T"]:
    """The first `count` windows of the run's validation split, side by side, each with the token that follows it; of a
    mixture, of its first corpus."""
    length = run.config.window
    tokens = _text(run, prepare_data(run.config, run.tokenizer, run.classes).valid[0], "validation")
    whole = (len(tokens) - 1) // length
    first = np.arange(min(count, whole))[:, None] * length
    return np.asarray(tokens[first + np.arange(length + 1)], np.int32)


def _text(run: Run, source: Source, split: str) -> Tokens:
    """A split's documents one after another, at least a window and the token that follows it."""
    if source.examples:
        raise InputError(f"{run.config.directory}: it is validated on examples, of which no windows can be cut")
    tokens = source.tokens
    if source.picked is not None:  # documents that were drawn
        tokens = np.concatenate([source.example(i)[0] for i in range(source.n_examples)])
    if len(tokens) <= run.config.window:
        raise InputError(f"{run.config.directory}: its {split} split has no window of {run.config.window + 1} tokens")
    return tokens


def estimate_loss(run: Run, batches: int = 200, seed: int = 0) -> dict[str, float]:
    """nanoGPT's estimate of a causal model's loss, by split: the mean of so many batches of windows that begin
    anywhere, in float32; of a mixture, of its first corpus. `evaluate` asks for each token of the split once."""
    _check_causal(run)
    prepared, found, rng = prepare_data(run.config, run.tokenizer, run.classes), {}, np.random.default_rng(seed)
    length, shape = run.config.window, (run.config.data.batch_size, 1)
    for split, source in (("train", prepared.train[0]), ("valid", prepared.valid[0])):
        tokens = _text(run, source, {"train": "training", "valid": "validation"}[split])
        first = (rng.integers(0, len(tokens) - length, shape) for _ in range(batches))
        rows = (np.asarray(tokens[each + np.arange(length + 1)], np.int32) for each in first)
        found[split] = float(np.mean([nats(run.model, run.eval_params, each).mean() for each in rows]))
    return found


def _check_causal(run: Run) -> None:
    if run.model.encodes or run.model.sees_ahead:
        raise InputError(f"{run.config.directory}: its model sees what it should predict; take a causal decoder")


def loss_by_position(run: Run, count: int = 1024) -> Float[np.ndarray, "T"]:
    """Mean nats of a causal model's predictions at each place of `count` windows of the validation split."""
    _check_causal(run)
    rows, total, batch = validation_rows(run, count), 0.0, run.config.data.batch_size
    for first in range(0, len(rows), batch):
        total = total + np.asarray(nats(run.model, run.eval_params, rows[first : first + batch])).sum(0)
    return np.asarray(total / len(rows))


@functools.partial(jax.jit, static_argnums=0)
def nats(model: Model, params: Any, rows: Int[Array, "B T1"]) -> Float[Array, "B T"]:
    """Those of each prediction in windows that are documents; a row has a token more than the model sees."""
    h = model.hidden(params, rows[:, :-1], one_document(rows.shape[1] - 1)).h
    return cross_entropy(model.logits(params, h), rows[:, 1:])


def gradient_by_distance(run: Run, count: int = 256) -> Float[np.ndarray, "T"]:
    """How much the last prediction of a window depends on the token d places before it, d = 0 … T − 1.

    The mean over `count` windows of the norm of the gradient of its nats by that token's embedding.
    """
    _check_causal(run)
    rows = validation_rows(run, count)
    return np.asarray(_reach(run.model, run.eval_params, rows))[::-1]


@functools.partial(jax.jit, static_argnums=0)
def _reach(model: Model, params: Any, rows: Int[Array, "B T1"]) -> Float[Array, "T"]:
    length = rows.shape[1] - 1
    each = jnp.arange(length)[None]  # every place has a row of a table for itself: its gradient is the token's
    body = dataclasses.replace(model, vocab_size=length, head=())  # whose tables have so many rows
    declared = body.declared()

    def of_places(row: Int[Array, "T1"]) -> Any:
        def one(box: Declared, a: jax.Array) -> jax.Array:
            return jnp.take(a, row[:-1], box.letters.all.index("V")) if "V" in box.letters.all else a

        return jax.tree.map(one, declared, {name: params[name] for name in declared}, is_leaf=is_declared)

    def last(embedded: Float[Array, "T D"], row: Int[Array, "T1"]) -> Float[Array, ""]:
        own = of_places(row)
        own = {**own, "embedding": {**own["embedding"], "table": embedded}}
        h = body.hidden(own, each, one_document(length)).h
        return cross_entropy(model.logits(params, h[:, -1:]), row[None, -1:])[0, 0]

    def one(row: Int[Array, "T1"]) -> Float[Array, "T"]:
        gradient = jax.grad(last)(params["embedding"]["table"][row[:-1]], row)
        return jnp.sqrt((gradient * gradient).sum(-1))

    return jax.lax.map(one, rows, batch_size=32).mean(0)


def before_training(run: Run) -> Run:
    """The run with the parameters that it began with, unless those came from another one."""
    return dataclasses.replace(run, state=first_state(run.recipe, hyper_of(run.config)))


def activations(run: Run, name: str, count: int = 32) -> Float[np.ndarray, "L ..."]:
    """A stacked activation by its name (`inspect_run.py` lists them), over windows of the validation split."""
    rows = validation_rows(run, count)
    if run.model.encodes:
        raise InputError(f"{run.config.directory}: its model reads two texts; call model.activations with both")
    ids = jnp.asarray(rows[:, :-1])
    found = run.model.activations(run.eval_params, ids, one_document(ids.shape[1]))
    if name not in found:
        raise InputError(f"activation {name!r} is none of this model; it has {', '.join(found)}")
    return np.asarray(found[name], np.float64)


def norms_by_layer(values: Float[np.ndarray, "L *N"]) -> Float[np.ndarray, "L"]:
    """The root mean square in each layer."""
    return np.sqrt((values**2).mean(tuple(range(1, values.ndim))))


def differences_by_layer(values: Float[np.ndarray, "L B T D"]) -> Float[np.ndarray, "L"]:
    """How much the tokens of a text still differ: the part of the root mean square that is no common mean of theirs."""
    return norms_by_layer(values - values.mean(2, keepdims=True)) / norms_by_layer(values)


def gradient_norms(run: Run, count: int = 32) -> dict[str, np.ndarray]:
    """Name → the norm of the gradient of the mean nats over windows of the validation split; stacked arrays [L]."""
    _check_causal(run)
    rows = validation_rows(run, count)
    grads = jax.grad(lambda params: nats(run.model, params, rows).mean())(run.eval_params)
    return {name: np.asarray(value) for name, value in norms(run.model.declared(), grads).items()}
