"""Optimizers by groups of parameters."""

import abc
import fnmatch
from typing import TYPE_CHECKING, Any

import jax

from jaxformer.declarations import Declared, by_path, selected, trained, updated
from jaxformer.learning.muon import Muon
from jaxformer.learning.optimizers import AdamW, Frozen, Optimizer, check_clip, clip_by_global_norm
from jaxformer.learning.schedules import Constant, Product, Schedule, WarmupCosine
from jaxformer.spec import Spec

if TYPE_CHECKING:
    import optax


class Which(Spec):
    """Which arrays a group has."""

    @abc.abstractmethod
    def __call__(self, path: str, box: Declared) -> bool:
        """Whether it has the array of this path, as "decoder/layers/block0/attention/project/q", declared so."""


class Hidden(Which):
    """The matrices of layers: not those of an embedding or a head, no biases, no gains."""

    def __call__(self, path: str, box: Declared) -> bool:
        batch, into, out = box.letters
        return "L" in batch and bool(into) and bool(out)


class Lettered(Which):
    """By letters, as they are declared: "D->HK", "E|D->F", "VD"."""

    letters: tuple[str, ...]  # as of one layer

    def __call__(self, path: str, box: Declared) -> bool:
        of_layer = box.letters._replace(batch=box.letters.batch.replace("L", ""))
        return str(of_layer) in self.letters


class Path(Which):
    """By path, as `jaxformer inspect` tells it: "embedding/*", "*/attention/*", "*bias"."""

    pattern: str  # "*" stands for any characters, "/" included

    def __call__(self, path: str, box: Declared) -> bool:
        return fnmatch.fnmatchcase(path, self.pattern)


class Everything(Which):
    """What no group before it has."""

    def __call__(self, path: str, box: Declared) -> bool:
        return True


class Group(Spec):
    """Some arrays, and how they change."""

    which: Which = Everything()  # arrays of the group, but for those of groups before it
    optimizer: Optimizer = AdamW()  # how they change
    factor: float = 1.0  # multiplies its learning rate

    def check(self, at: str = "") -> None:
        if self.factor <= 0:
            raise ValueError(f"{at}factor={self.factor} must be more than 0; {at}optimizer=Frozen changes nothing")


class Groups(Optimizer):
    """Each array by the optimizer of the first group that has it; unless said otherwise Muon and AdamW."""

    learning_rate: Schedule = Constant(1.0)  # multiplies the learning rates of all groups
    groups: tuple[Group, ...] = (  # what each has, and how it changes
        Group(Hidden(), Muon()),
        Group(Everything(), AdamW(WarmupCosine(peak=6e-3, final=6e-4))),
    )
    clip: float | None = 1.0  # largest global norm of the gradients of all groups; None: any

    keeps_fields = False  # its learning rate is a factor

    def check(self, at: str = "") -> None:
        if not self.groups:
            raise ValueError(f"{at}groups= must have at least one; Group is one of everything")
        check_clip(self, at)

    def check_declared(self, declared: Any) -> None:
        self._of(declared)
        for group, part in zip(self.groups, self._parts(declared, declared), strict=True):
            if not part:
                raise ValueError(f"optimizer.groups: no array is left for {group.which}; leave that group out")
            group.optimizer.check_declared(part)

    def frozen(self, declared: Any) -> Any:
        own = trained(declared, declared)
        for group, part in zip(self.groups, self._parts(own, own), strict=True):
            declared = updated(declared, group.optimizer.frozen(part))
        return declared

    def rate(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        """That of the first group that is not frozen."""
        moving = [each for each in self._optimizers if not isinstance(each, Frozen)]
        return (moving or self._optimizers)[0].rate(step, steps)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        parts = lambda tree: self._parts(tree, declared)
        each = [o.transform(part, step, steps) for o, part in zip(self._optimizers, parts(declared), strict=True)]

        def init(params: Any) -> Any:
            return tuple(own.init(part) for own, part in zip(each, parts(params), strict=True))

        def update(updates: Any, state: Any, params: Any = None, **told: Any) -> tuple[Any, Any]:
            if self.clip is not None:
                updates, _ = clip_by_global_norm(self.clip).update(updates, optax.EmptyState(), **told)
            whole, states = updates, []
            for own, *args in zip(each, parts(updates), state, parts(params), strict=True):
                changes, new = own.update(*args)
                whole, states = updated(whole, changes), [*states, new]
            return whole, tuple(states)

        return optax.GradientTransformationExtraArgs(init, update)

    def eval_params(self, opt_state: Any, params: Any) -> Any:
        for group, state in zip(self.groups, opt_state, strict=True):
            params = group.optimizer.eval_params(state, params)
        return params

    @property
    def averages(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(group.optimizer.averages for group in self.groups)

    @property
    def _optimizers(self) -> list[Optimizer]:
        """Of each group, with its learning rate."""
        by = lambda group: Product((self.learning_rate, Constant(group.factor)))
        return [group.optimizer.scaled(by(group)) for group in self.groups]

    def _of(self, declared: Any) -> dict[str, int]:
        """Path → number of the group."""
        found: dict[str, int] = {}
        for path, box in by_path(declared).items():
            numbers = [i for i, group in enumerate(self.groups) if group.which(path, box)]
            if not numbers:
                raise ValueError(
                    f"optimizer.groups: none has {path} (letters {box.letters}); add Group(Everything(), ...)"
                )
            found[path] = numbers[0]
        return found

    def _parts(self, tree: Any, declared: Any) -> list[dict[str, Any]]:
        """Of each group the tree of its own arrays."""
        numbers = self._of(declared)
        return [selected(tree, declared, lambda path, _, i=i: numbers[path] == i) for i in range(len(self.groups))]
