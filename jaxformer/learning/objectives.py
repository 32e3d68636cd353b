"""Objectives: from a batch of tokens to inputs, targets and weights, and to a sum of nats and a sum of weights."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.model.masks import Places, one_document, places
from jaxformer.model.models import Decoder
from jaxformer.spec import Spec

Batch = Mapping[str, Any]


class Example(NamedTuple):
    """What the model sees and what it should say. Arrays that are alike for all rows have a batch of one."""

    ids: Int[Array, "B T"]
    at: Places
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]


class NextToken(Spec):
    """Predict each token from those before it.

    A batch holds `tokens` int32[B, T + 1] and, where rows have padding or several documents, `segments` of that shape:
    0 is padding, and nothing is predicted across a change of segment.
    """

    def prepare(self, batch: Batch, key: jax.Array) -> Example:
        tokens = batch["tokens"]
        if "segments" not in batch:
            length = tokens.shape[1] - 1
            return Example(tokens[:, :-1], one_document(length), tokens[:, 1:], jnp.ones((1, length)))
        segments = batch["segments"]
        inside = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        return Example(tokens[:, :-1], places(segments[:, :-1]), tokens[:, 1:], inside.astype(jnp.float32))

    def loss(
        self, model: Decoder, params: Any, example: Example, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The sum of weighted nats, and the sum of weights; a key of None means evaluation."""
        h, _ = model.hidden(params, example.ids, example.at, key)
        logits = model.logits(params, h)
        chosen = jnp.take_along_axis(logits, example.targets[..., None], -1)[..., 0]
        weights = jnp.broadcast_to(example.weights, chosen.shape)
        return ((jax.nn.logsumexp(logits, -1) - chosen) * weights).sum(), weights.sum()
