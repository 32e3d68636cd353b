"""The train step, a pure function of state, batch and hyperparameters; and K of them in one call."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct

from jaxformer.declarations import Declared, by_path, is_declared, trained, updated
from jaxformer.keys import key_for
from jaxformer.learning.adapters import Adapter
from jaxformer.learning.chunks import loss_scale
from jaxformer.learning.guards import Guard, guarded
from jaxformer.learning.objectives import Batch, Example, NextToken, Objective, Sums
from jaxformer.learning.optimizers import GradNorm, Optimizer, global_norm
from jaxformer.mesh import constrained, split
from jaxformer.model.models import Model
from jaxformer.spec import Spec


class Recipe(Spec):
    """The static part of a step."""

    model: Model
    objective: Objective = NextToken()
    compute_dtype: str = "float32"
    slices: int = 1  # of a batch, whose gradients are accumulated
    grad_norms: bool = False  # among the metrics: the gradient's norm for every parameter and layer
    guard: Guard | None = Guard()  # skips updates that a loss or gradient spoils
    adapter: Adapter | None = None  # makes the model's parameters of a base and of what is trained; None: all are
    product_dtype: str | None = None  # of matrices that activations are multiplied by; None: compute_dtype

    def declared(self) -> Any:
        """The declarations of a state's `params`."""
        of_model = self.model.declared()
        return of_model if self.adapter is None else self.adapter.declared(of_model)

    def every_declared(self) -> Any:
        """The declarations of all arrays of a state, those of its base, too."""
        of_model, own = self.model.declared(), self.declared()
        return {**own, **updated(of_model, own)} if self.adapter else of_model

    def whole(self, params: Any, base: Any) -> Any:
        """The model's parameters, of those of a state, or of an average of them, and its base."""
        return params if self.adapter is None else self.adapter.whole(self.model.declared(), params, base)

    def cast(self, params: Any) -> Any:
        """The model's parameters: what its declarations say is trained, in the dtype of the computation."""
        declared = self.model.declared()
        cast = lambda box, a: a.astype(self.dtype_of(box))
        own = jax.tree.map(cast, trained(declared, declared), trained(params, declared), is_leaf=is_declared)
        return updated(params, own)

    def dtype_of(self, box: Declared) -> str:
        """That in which a trained array of the model's is computed with."""
        return self.product_dtype if self.product_dtype and box.letters.into else self.compute_dtype


class Hyper(NamedTuple):
    """The traced part of a step: other numbers compile nothing."""

    seed: Any  # uint32
    steps: Any  # int32: the length of the run, for schedules
    optimizer: Optimizer
    ema_decay: Any = None  # float32; None: no average is kept


class TrainState(struct.PyTreeNode):
    """All that a run carries from one step to the next, and all that is saved."""

    step: jax.Array  # int32: updates made so far
    params: Any
    opt_state: Any
    ema: Any = ()  # an exponential moving average of params; empty if none is kept
    skips: Any = ()  # `guards.Skips`: of updates; empty without a guard
    base: Any = ()  # with an adapter: the parameters that stay as they are

    def eval_params(self, recipe: Recipe, optimizer: Optimizer) -> Any:
        """The model's parameters for evaluation and sampling."""
        return recipe.whole(self.ema or optimizer.eval_params(self.opt_state, self.params), self.base)


@functools.partial(jax.jit, static_argnums=0)
def init_state(recipe: Recipe, hyper: Hyper, params: Any = None) -> TrainState:
    """The state before the first step, of freshly drawn parameters of the model or of copies of those given."""
    drawn = lambda: recipe.model.init(key_for(hyper.seed, 0, "init"))
    params, base = drawn() if params is None else jax.tree.map(jnp.copy, params), ()
    if recipe.adapter is not None:
        of_model, key = recipe.model.declared(), key_for(hyper.seed, 0, "adapter")
        params, base = recipe.adapter.begin(of_model, params, key), recipe.adapter.base(of_model, params)
    declared = hyper.optimizer.frozen(recipe.declared())
    transform = hyper.optimizer.transform(trained(declared, declared), jnp.int32(0), hyper.steps)
    ema = () if hyper.ema_decay is None else params
    skips = () if recipe.guard is None else recipe.guard.begin()
    state = TrainState(jnp.int32(0), params, transform.init(trained(params, declared)), ema, skips, base)
    return split(state, recipe.every_declared())


def train_step(recipe: Recipe, state: TrainState, batch: Batch, hyper: Hyper) -> tuple[TrainState, dict[str, Any]]:
    """One update. Metrics: loss (plain nats per token, before the update), objective_loss (what is minimised, where it
    is more: with smoothing, z-loss and losses of parts), losses (those of parts, without their weights), grad_norm
    (before clipping), learning_rate, weight (the sum of weights: of most objectives, how many tokens were predicted).
    Where that is 0 there is no loss: it is NaN. With a guard, skipped: updates skipped so far, and skipped_in_a_row.

    The moving average begins with a shorter memory, (1 + step) / (10 + step), so that it forgets the first parameters.
    """
    example = recipe.objective.prepare(batch, key_for(hyper.seed, state.step, "objective"), state.step)
    key, own = key_for(hyper.seed, state.step, "dropout"), recipe.declared()
    declared = hyper.optimizer.frozen(own)
    sums, grads = _gradients(recipe, state, declared, example, key)
    count = jnp.where(sums.weight > 0, sums.weight, 1)  # of a batch of padding alone the gradient is 0
    grads = split(grads, own)
    mean = lambda: jax.tree.map(lambda g: g / count, grads)  # made where it is read: no pass over memory of its own
    grad_norm = global_norm(grads, count)

    def update(old: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
        params, opt_state, ema = old
        moved = trained(params, declared)
        transform = hyper.optimizer.transform(trained(declared, declared), state.step, hyper.steps)
        by, told = optax.with_extra_args_support(transform), GradNorm(mean(), grad_norm)
        updates, opt_state = by.update(told.of, opt_state, moved, grad_norm=told)
        new = updated(params, optax.apply_updates(moved, updates))
        new = updated(new, _advanced(own, params, sums.state, sums.weight > 0))
        if hyper.ema_decay is not None:
            decay = jnp.minimum(hyper.ema_decay, (1 + state.step) / (10 + state.step))
            average = lambda mean, new, old: mean if new is old else decay * mean + (1 - decay) * new
            ema = jax.tree.map(average, ema, new, params)  # of what nothing moves it stays, too, to the bit
        return new, opt_state, ema

    of_token = lambda total: jnp.where(sums.weight > 0, total / count, jnp.nan)
    metrics: dict[str, Any] = {"loss": of_token(sums.nats), "weight": sums.weight}
    if sums.total is not None:
        metrics["objective_loss"] = of_token(sums.total)
    if sums.losses:
        metrics["losses"] = jax.tree.map(of_token, sums.losses)
    metrics |= {"grad_norm": grad_norm, "learning_rate": hyper.optimizer.rate(state.step, hyper.steps)}
    if recipe.grad_norms:
        metrics["grad_norms"] = norms(trained(declared, declared), mean())
    old, skips = (state.params, state.opt_state, state.ema), state.skips
    if recipe.guard is None:
        params, opt_state, ema = update(old)
    else:
        loss = sums.minimised / count
        passes = recipe.guard.passes(skips, loss, grad_norm)
        params, opt_state, ema = guarded(passes, update, old)
        skips = recipe.guard.counted(skips, passes, loss, sums.weight)
        metrics |= {"skipped": skips.total, "skipped_in_a_row": skips.in_a_row}
    new = TrainState(state.step + 1, params, opt_state, ema, skips, state.base)
    return split(new, recipe.every_declared()), metrics


def _advanced(declared: Any, params: Any, sums: Any, real: jax.Array, path: str = "") -> Any:
    """The next values of what no gradient moves and parts have given sums for; each layer's by its own."""
    if not is_declared(declared):
        return {n: _advanced(declared[n], params[n], inner, real, f"{path}/{n}") for n, inner in sums.items()}
    if declared.trained or declared.advance is None:
        raise ValueError(f"{path[1:]}: a part gives sums for it; declare it as Param(..., trained=False, advance=...)")
    advance = jax.vmap(declared.advance) if "L" in declared.letters.batch else declared.advance
    return jnp.where(real, advance(params, sums), params)  # a batch of padding alone changes nothing


def norms(declared: Any, grads: Any) -> dict[str, jax.Array]:
    """The norm of each array, of stacked ones for each layer: [L]."""

    def norm(box: Declared, grad: jax.Array) -> jax.Array:
        return jnp.sqrt((grad * grad).sum(tuple(range(int("L" in box.letters.batch), grad.ndim))))

    return by_path(jax.tree.map(norm, declared, grads, is_leaf=is_declared))


def _gradients(recipe: Recipe, state: TrainState, declared: Any, example: Example, key: jax.Array) -> tuple[Sums, Any]:
    """Sums over the slices of a batch, and their gradients by what is trained; what an optimizer leaves frozen is cast
    as the model declares it."""
    n, params = recipe.slices, state.params
    if recipe.adapter is None:
        params = recipe.cast(params)  # once, whatever the number of slices
    moved = trained(params, declared)
    scale = loss_scale(recipe.compute_dtype, example.ids.size // n)

    def one(example: Example, index: int | jax.Array) -> Any:
        def loss(moved: Any) -> Any:
            key_of_slice, own = jax.random.fold_in(key, index), updated(params, moved)
            if recipe.adapter is not None:  # a small change beside a large number is lost before the cast, not after
                own = recipe.cast(recipe.whole(own, state.base))
            sums = recipe.objective.loss(recipe.model, own, example, key_of_slice)
            return sums.minimised * scale, sums

        (_, sums), grads = jax.value_and_grad(loss, has_aux=True)(moved)
        return sums, jax.tree.map(lambda g: g.astype(jnp.float32) / scale, grads)

    if n == 1:
        return one(example, 0)

    def slices(a: jax.Array) -> jax.Array:
        if a.shape[0] == 1:
            return jnp.broadcast_to(a, (n, *a.shape))
        return constrained(a.reshape(n, -1, *a.shape[1:]), "NB" + "." * (a.ndim - 1))

    def add(total: Any, xs: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*xs)), None

    cut = jax.tree.map(slices, example), jnp.arange(n)
    zero = jax.eval_shape(one, *jax.tree.map(lambda a: a[0], cut))
    return jax.lax.scan(add, jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), zero), cut)[0]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_steps(
    recipe: Recipe, state: TrainState, batches: Batch, count: jax.Array, hyper: Hyper
) -> tuple[TrainState, dict[str, Any]]:
    """The first `count` batches of a buffer [K, B, ...], a run-time number; metrics are [K], NaN where not reached."""
    size, at = jax.tree.leaves(batches)[0].shape[0], lambda i: jax.tree.map(lambda a: a[i], batches)
    step = jax.jit(train_step, static_argnums=0, inline=True)  # traced once, for the shapes and for the loop

    def body(i: jax.Array, carry: Any) -> Any:
        state, metrics, batch = carry  # were it cut here, XLA would cut its segments anew for each score
        state, row = step(recipe, state, batch, hyper)
        return state, jax.tree.map(lambda buffer, value: buffer.at[i].set(value), metrics, row), at(i + 1)

    row = jax.eval_shape(lambda: step(recipe, state, at(0), hyper)[1])
    metrics = jax.tree.map(lambda a: jnp.full((size, *a.shape), jnp.nan), row)
    state, metrics, _ = jax.lax.fori_loop(0, count, body, (state, metrics, at(0)))
    return split(state, recipe.every_declared()), metrics


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_members(
    recipe: Recipe, states: TrainState, batches: Batch, count: jax.Array, hyper: Hyper
) -> tuple[TrainState, dict[str, Any]]:
    """`train_steps` of several runs that differ in their seed: one program, whose states, batches [·, K, B, ...],
    seeds and metrics have a leading axis for the members."""

    def alone(state: TrainState, batches: Batch, seed: jax.Array) -> tuple[TrainState, dict[str, Any]]:
        return train_steps(recipe, state, batches, count, hyper._replace(seed=seed))

    states, metrics = jax.vmap(alone)(states, batches, hyper.seed)
    return split(states, recipe.every_declared()), metrics


@functools.partial(jax.jit, static_argnums=0)
def evaluate_batch(
    recipe: Recipe, params: Any, batch: Batch, number: jax.Array, byte_lengths: jax.Array
) -> dict[str, jax.Array]:
    """The objective's sums over a batch, of the model's parameters, without dropout. Batch `number` has the same draws
    at every evaluation. Where it has `counted`, float32[B], rows count as often.

    `byte_lengths` is that of the tokenizer, [V].
    """
    batch = {**batch}
    counted = batch.pop("counted", None)
    example = recipe.objective.prepare(batch, jax.random.fold_in(jax.random.key(0), number))
    if counted is not None:
        each = lambda weights: weights * counted.reshape(-1, *[1] * (weights.ndim - 1))
        how = None if example.counted is None else each(example.counted)
        example = example._replace(weights=each(example.weights), counted=how)
    return recipe.objective.sums(recipe.model, recipe.cast(params), example, byte_lengths)


@functools.partial(jax.jit, static_argnums=0)
def evaluate_members(
    recipe: Recipe, params: Any, batch: Batch, number: jax.Array, byte_lengths: jax.Array
) -> dict[str, jax.Array]:
    """`evaluate_batch` of parameters that have a leading axis for the members; so have the sums."""
    return jax.vmap(lambda own: evaluate_batch(recipe, own, batch, number, byte_lengths))(params)
