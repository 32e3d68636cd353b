"""What the tokens of a text look at, in each layer and head of a model."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from jaxformer import pictures
from jaxformer.generation.decode import padded
from jaxformer.model.masks import places
from jaxformer.model.models import Model
from jaxformer.spec import InputError


@dataclasses.dataclass(frozen=True)
class Attention:
    """Weights of attention: how much each token looks at each of the columns, in sum 1."""

    tokens: list[str]
    columns: list[str]  # what is looked at: the same tokens, or those of another text
    weights: Float[np.ndarray, "L H T S"]
    layers: list[int]  # the numbers of those that record weights, from 0

    def __repr__(self) -> str:
        layers, heads, rows, columns = self.weights.shape
        return f"<Attention of {layers} layers, {heads} heads: {rows} tokens look at {columns}>"

    def plot(self, layer: int | None = None) -> Any:
        """A Matplotlib figure: a map for each head (across) of one layer, or of all (down)."""
        width = min(12.0, 4.0 * self.weights.shape[1])
        if layer is None:
            return pictures.attention_maps(self.tokens, self.weights, width, self.columns, self.layers)
        if layer not in self.layers:
            raise InputError(f"layer={layer} must be one of {', '.join(map(str, self.layers))}")
        own = self.weights[[self.layers.index(layer)]]
        return pictures.attention_maps(self.tokens, own, width, self.columns, [layer])


def attention(
    model: Model, params: Any, ids: Sequence[int], second: int | None, context: int
) -> tuple[Float[np.ndarray, "L H T S"], list[int]]:
    """Weights of a text's attention to itself, and the layers that they are of. `second` is where the second text of a
    joined pair begins; an encoder–decoder reads the text with its encoder."""
    tokens, segments = padded([ids], context)
    parts = None if second is None else (np.arange(tokens.shape[1])[None] >= second).astype(np.int32)
    found = _recorded(model, params, tokens, segments, parts, None)
    return _weights(model, found, "attention", len(ids), len(ids))


def cross_attention(
    model: Model, params: Any, source: Sequence[int], ids: Sequence[int], context: int
) -> tuple[Float[np.ndarray, "L H T S"], list[int]]:
    """Weights of the attention that an encoder–decoder's second text pays to the first."""
    first, second = padded([source], context), padded([ids], context)
    found = _recorded(model, params, *second, None, first)
    return _weights(model, found, "cross_attention", len(ids), len(source))


@functools.partial(jax.jit, static_argnums=0)
def _recorded(model: Model, params: Any, ids: Any, segments: Any, parts: Any, source: Any) -> dict[str, jax.Array]:
    """The weights alone, so that nothing else is kept: an encoder's, if its decoder is given no `source` to read."""
    at, read = places(segments, parts), source and (source[0], places(source[1]))
    if model.encodes and read is None:
        found = model.encode(params, ids, at, recorded=True).activations
    else:
        found = model.activations(params, ids, at, read)
    return {name: array for name, array in found.items() if name.endswith("/weights")}


def _weights(
    model: Model, found: dict[str, jax.Array], branch: str, rows: int, columns: int
) -> tuple[Float[np.ndarray, "L H T S"], list[int]]:
    """Of the layers that record weights of a branch, in their order: block i of a group of p is layer i, i + p, …"""
    layers: dict[int, np.ndarray] = {}
    for stack in dict.fromkeys(path[:-1] for path in model.stacked):
        blocks = [path for path in model.stacked if path[:-1] == stack]
        for i, path in enumerate(blocks):
            own = np.asarray(found.get("/".join((*path, branch, "weights")), ()), np.float32)  # [L/p, B, H, T, S]
            for turn, weights in enumerate(own):
                layers[turn * len(blocks) + i] = weights[0, :, :rows, :columns]
    if not layers:
        raise InputError(f"its layers record no weights of {branch.replace('_', '-')}; a model with Softmax does")
    return np.stack([layers[layer] for layer in sorted(layers)]), sorted(layers)
