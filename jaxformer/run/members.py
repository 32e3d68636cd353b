"""One run, or several that differ in their seed and train as one program, behind one face."""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.config import Config
from jaxformer.data.batches import Batch, Batches
from jaxformer.data.datasets import Prepared
from jaxformer.learning.guards import Diverged
from jaxformer.mesh import laid_out, placed
from jaxformer.run.inspection import model_flops
from jaxformer.run.plan import Judged, evaluate, hyper_of, recipe_of
from jaxformer.run.step import TrainState, train_members, train_step, train_steps
from jaxformer.spec import counted

log = logging.getLogger(__name__)


class Members:
    """The runs of `configs`. State, buffer and metrics of several have a leading axis for them, those of one have not:
    it is the program, and has the bits, of that run alone."""

    def __init__(self, configs: Sequence[Config], prepared: Prepared):
        self.configs, self.prepared = configs, prepared
        self.recipe = recipe_of(configs[0], prepared.tokenizer, prepared.classes)
        hypers = [hyper_of(config) for config in configs]
        seeds = np.array([hyper.seed for hyper in hypers])
        self._several = len(configs) > 1
        self._lead = 2 if self._several else 1  # axes of a buffer before those of a batch
        self._hyper = hypers[0]._replace(seed=seeds) if self._several else hypers[0]
        self._batches = [batches_of(config, prepared) for config in configs]
        self._compiled: dict[Any, Any] = {}
        self._flops: dict[Any, int] = {}  # of a step

    def together(self, states: Sequence[TrainState]) -> TrainState:
        """The states as one; they are used up, as a step uses up its state."""
        if not self._several:
            return states[0]
        stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *states)
        for array in jax.tree.leaves(states):
            array.delete()
        return laid_out(stacked, self.recipe.every_declared())

    def apart(self, state: TrainState) -> Iterator[TrainState]:
        """The state of each, one after another."""
        if not self._several:
            yield state
            return
        for i in range(len(self.configs)):
            yield jax.tree.map(lambda a, i=i: a[i], state)

    def same_shapes(self, step: int) -> int:
        """Steps, from this one on, whose batches have the same shapes."""
        return min(batches.same_shapes(step) for batches in self._batches)

    def buffer(self, step: int) -> Batch:
        """The batches of the next call, stacked: [K, B, ...]."""
        knobs = self.configs[0].train
        size = min(knobs.steps_per_call, knobs.steps)
        alike = min(size, self.same_shapes(step))  # what comes after those waits; its room is filled anyhow
        drawn = [[batches.at(step + i) for i in range(alike)] for batches in self._batches]
        found = [_stack([*own, *own[-1:] * (size - alike)]) for own in drawn]
        return _stack(found) if self._several else found[0]

    def real_tokens(self, buffer: Batch, count: int) -> int:
        """Those of the first `count` batches that models see, padding left out."""
        config, lead = self.configs[0], len(self.configs)
        ahead = {"segments": config.row.lookahead}  # places of a row that are asked for and no more
        seen = lambda name, mask: mask[..., : mask.shape[-1] - ahead.get(name, 0)]
        masks = [seen(name, array) for name, array in buffer.items() if name.endswith("segments")]
        if not masks:
            return lead * count * config.data.batch_size * config.window
        return sum(int((mask.reshape(lead, -1, *mask.shape[-2:])[:, :count] > 0).sum()) for mask in masks)

    def flops(self, buffer: Batch, count: int) -> int:
        """Operations of a call (`model_flops`), padding's among them."""
        return count * self._flops[_shapes(buffer)]

    def compiled(self, buffer: Batch) -> bool:
        """Whether there is a program for the buffer's shapes."""
        return _shapes(buffer) in self._compiled

    def compile(self, state: TrainState, buffer: Batch) -> None:
        """Makes the program for the buffer's shapes, ahead of time."""
        shapes, buffer = _shapes(buffer), placed(buffer, self._lead)
        started = time.perf_counter()
        steps = train_members if self._several else train_steps
        lowered = steps.lower(self.recipe, state, buffer, np.int32(1), self._hyper)
        self._compiled[shapes] = lowered.compile()
        log.info("%-10s %.1f s", "compiled in", time.perf_counter() - started)
        batch = {name: jax.ShapeDtypeStruct(a.shape[self._lead :], a.dtype) for name, a in buffer.items()}
        self._flops[shapes] = len(self.configs) * model_flops(self.recipe, batch)

    def call(self, state: TrainState, buffer: Batch, count: int) -> tuple[TrainState, Any]:
        """`count` steps, by the program that was made for the buffer's shapes."""
        return self._compiled[_shapes(buffer)](state, placed(buffer, self._lead), np.int32(count), self._hyper)

    def skipped(self, state: TrainState) -> float:
        """How many updates there were that the guard has skipped."""
        return float(np.sum(state.skips.total)) if self.recipe.guard else 0.0

    def diverged(self, state: TrainState, step: int, member: int, loss: float) -> Diverged:
        """What is wrong with the update of a step, 1 for the first: if all since were skipped, the parameters are as
        they were, and its gradient can be computed again."""
        config, own = self.configs[member], [*self.apart(state)][member]
        guard = config.train.guard
        assert guard is not None
        what, wrong = f"the loss is {loss:.4g}", list[str]()
        if int(own.step) - step < int(own.skips.in_a_row):
            batch, norms = self._batches[member].at(step - 1), dataclasses.replace(self.recipe, grad_norms=True)
            before = own.replace(step=np.int32(step - 1))
            only = jax.jit(lambda *given: train_step(norms, *given)[1]["grad_norms"])  # without room for another state
            found = only(before, batch, hyper_of(config))
            wrong = [path for path, norm in found.items() if not np.isfinite(norm).all()]
        if wrong:
            what += f", and the gradient of {wrong[0]} is not finite"
            what += f", nor are those of {len(wrong) - 1} other arrays" if wrong[1:] else ""
        return Diverged(
            f"{config.directory}: {counted(guard.most, 'update')} in a row skipped, the last at step {step}: {what}; "
            "look at the batch and the data, or begin another run with a lower learning rate"
        )

    def evaluate(self, state: TrainState, tokens: int | None, between: Callable[[], None]) -> list[dict[str, Any]]:
        """What a full pass of the validation split finds, or one of about so many tokens, of each (`evaluate`)."""
        of = self.configs[0].optimizer
        whole = lambda own: own.eval_params(self.recipe, of)
        params = jax.vmap(whole)(state) if self._several else whole(state)
        more = params, Judged.of(self.prepared), self.configs[0], self.prepared.tokenizer, tokens, between
        return evaluate(self.recipe, *more, len(self.configs) if self._several else None)


def batches_of(config: Config, prepared: Prepared) -> Batches:
    """The batches of a run, each a function of its step."""
    data = config.data
    more = data.sampling, config.row, data.batch_size, config.train.seed
    return Batches(prepared.train, prepared.weights, *more)


def _shapes(buffer: Batch) -> Any:
    return tuple((name, array.shape) for name, array in buffer.items())


def _stack(batches: Sequence[Batch]) -> Batch:
    return {name: np.stack([batch[name] for batch in batches]) for name in batches[0]}
