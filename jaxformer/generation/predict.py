"""From a trained model to what its heads say of texts: classes, vectors."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxformer.generation.decode import padded
from jaxformer.model.masks import places
from jaxformer.model.models import Model


def predict(
    model: Model, params: Any, texts: Sequence[Sequence[int]], seconds: Sequence[int] | None, context: int
) -> list[dict[str, Any]]:
    """The answers of all heads to each text, side by side; {} if none says anything.

    `seconds` tells where in each text the second of a pair begins, None that there are no pairs;
    texts longer than `context` are cut.
    """
    ids, segments = padded([text[:context] for text in texts], context)
    parts = None
    if seconds is not None:
        parts = (np.arange(ids.shape[1])[None] >= np.asarray(seconds)[:, None]).astype(np.int32)
    said = jax.device_get(_predict(model, params, ids, segments, parts))
    found: list[dict[str, Any]] = [{} for _ in texts]
    for head in model.heads:
        for answers, text, out in zip(found, texts, said.get(head.name, ()), strict=False):
            answers |= head.answer(out[: len(text)] if head.of_tokens else out)
    return found


@functools.partial(jax.jit, static_argnums=0)
def _predict(
    model: Model, params: Any, ids: jax.Array, segments: jax.Array, parts: jax.Array | None
) -> dict[str, jax.Array]:
    at = places(segments, parts)
    h = model.hidden(params, ids, at).h
    found = {head: model.read(params, head, h, *head.given(params, at.segment > 0)) for head in model.heads}
    said = {head.name: head.says(out) for head, out in found.items()}
    return {name: array for name, array in said.items() if array is not None}
