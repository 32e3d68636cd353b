"""What the machine can do: products of matrices, and bytes to and from memory. JAX's best; PyTorch's is beside its
other measurements."""

import platform
from importlib import metadata

import jax
import jax.numpy as jnp
from peers.timing import SIDES, Found, best

from jaxformer.run.starts import processor

DATASHEET = {"H100": 989e12, "H200": 989e12}  # operations a second in bfloat16, by the name of the device


def machine() -> Found:
    """What it is, and what its datasheet says, if that is known here."""
    device = jax.devices()[0]
    name = processor() if device.platform == "cpu" else device.device_kind
    return {"device": name, "datasheet": next((peak for card, peak in DATASHEET.items() if card in name), None)}


def limits(seconds: float, sides: int, room: int) -> Found:
    """Operations a second in products of each dtype with the first so many `sides`, and bytes a second, by arrays of
    `room` numbers."""
    found: Found = {"float32": 0.0, "bfloat16": 0.0}
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    for side in SIDES[:sides]:
        for dtype in ("float32", "bfloat16"):
            a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
            taken = best(lambda a=a: product(a).block_until_ready(), seconds)
            found[dtype] = max(found[dtype], 2 * side**3 / taken)
    a = jnp.ones(room)
    found["bytes"] = 8 * room / best(lambda: copy(a).block_until_ready(), seconds)
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in ("jax", "flax")}}
    return {**machine(), **found, "versions": versions}
