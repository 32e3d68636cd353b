"""Learning rates by depth: lower layers of a trained model change less, or not at all."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer.declarations import Declared, by_path, is_declared, path_name, trained
from jaxformer.learning.optimizers import AdamW, Optimizer
from jaxformer.learning.schedules import Constant, Schedule

if TYPE_CHECKING:
    import optax

BELOW = "embedding", "position", "norm_embedding", "residual_begin"  # beginnings of the names of what is below layers


class ByDepth(Optimizer):
    """Another optimizer whose rate is that of the last layer, and of each layer below `decay` times that of the one
    above it (discriminative fine-tuning, arXiv:1801.06146, section 3.1).

    What is below the first layer, as the embedding, counts as a layer there; what is above the last, as a head, has the
    last one's rate. Of an encoder–decoder each stack has depths of its own.
    """

    learning_rate: Schedule = Constant(1.0)  # multiplies the learning rates of the optimizer
    optimizer: Optimizer = AdamW()  # how arrays change
    decay: float = 0.8  # of a layer's rate to that of the layer above it; 1: all alike
    still: int = 0  # how many of the lowest layers stay as they are, and with them what is below the first

    keeps_fields = False  # its learning rate is a factor

    def check(self, at: str = "") -> None:
        if not 0 < self.decay <= 1:
            raise ValueError(f"{at}decay={self.decay} must be more than 0 and at most 1; 0.8 is usual")
        if self.still < 0:
            raise ValueError(f"{at}still={self.still} must be at least 0")
        if self.optimizer.averages:  # it would average what layers have not moved by
            kind = type(self.optimizer).__name__
            raise ValueError(
                f"{at}optimizer={kind} averages by itself; put ByDepth inside: {kind}(optimizer=ByDepth())"
            )

    def check_declared(self, declared: Any) -> None:
        self.optimizer.check_declared(declared)
        places, own = _places(declared), self.frozen(declared)
        deepest = max((n_layers for _, n_layers in places.values()), default=0)
        if self.still > deepest:
            raise ValueError(f"optimizer.still={self.still} must be at most {deepest}, the layers of the model")
        for path, (layers, n_layers) in _places(trained(own, own)).items() if self.decay < 1 else ():
            if (layers < 0).any() and not 0 < n_layers == places[path][1]:
                raise ValueError(
                    f"optimizer=ByDepth moves {path}, whose rate follows from how many layers are above it, and none "
                    "of these: they are frozen or another group's; put ByDepth around Groups, or give a group a factor"
                )

    def frozen(self, declared: Any) -> Any:
        declared = self.optimizer.frozen(declared)
        places = _places(declared)
        one = lambda path, box: box.replace(trained=box.trained and not self._still(*places[path_name(path)]).all())
        return jax.tree_util.tree_map_with_path(one, declared, is_leaf=is_declared)

    def rate(self, step: jax.Array, steps: jax.Array) -> jax.Array:
        """That of the last layer."""
        return self.optimizer.scaled(self.learning_rate).rate(step, steps)

    def transform(self, declared: Any, step: jax.Array, steps: jax.Array) -> "optax.GradientTransformation":
        import optax

        inner = self.optimizer.scaled(self.learning_rate).transform(declared, step, steps)
        places = _places(declared)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            changes, state = inner.update(updates, state, params)

            def scaled(path: Any, change: jax.Array) -> jax.Array:
                factor = self._factors(*places[path_name(path)])
                return change * factor.reshape(*factor.shape, *[1] * (change.ndim - factor.ndim))

            return jax.tree_util.tree_map_with_path(scaled, changes), state

        return optax.GradientTransformation(inner.init, update)

    def _factors(self, layers: Any, n_layers: int) -> jax.Array:
        """Of an array's updates, by its place: [L] where layers lie stacked, else []."""
        above = np.maximum(n_layers - 1 - layers, 0).astype(np.float32)
        return jnp.where(self._still(layers, n_layers), 0.0, self.decay**above)

    def _still(self, layers: Any, n_layers: int) -> Any:
        """Whether it stays as it is, or each layer that lies stacked; never what is above the last."""
        return (layers < min(self.still, n_layers)) & (self.still > 0)  # of layers that are all frozen n_layers is 0


def _places(declared: Any) -> dict[str, tuple[Any, int]]:
    """Path → the number of an array's layer, or of each that lies stacked, and how many layers its stack has: that of
    "encoder", "decoder" or what else the path begins with.

    The number is −1 of what is below the first layer, as "embedding/table" and "decoder/position/table" are, and of
    what is above the last as many as there are layers.
    """
    boxes, depths = by_path(declared), dict[str, int]()
    for path, box in boxes.items():
        if box.letters.batch.startswith("L"):
            stack = _names(path)[0]
            depths[stack] = max(depths.get(stack, 0), box.layers[1] * box.value.shape[0])

    def place(path: str, box: Declared) -> tuple[Any, int]:
        names, (first, between) = _names(path), box.layers
        n_layers = depths.get(names[0], max(depths.values(), default=0))
        if box.letters.batch.startswith("L"):
            return first + between * np.arange(box.value.shape[0]), n_layers
        return np.int32(-1 if any(name.startswith(BELOW) for name in names[:2]) else n_layers), n_layers

    return {path: place(path, box) for path, box in boxes.items()}


def _names(path: str) -> list[str]:
    return path.removeprefix("adapters/").split("/")
