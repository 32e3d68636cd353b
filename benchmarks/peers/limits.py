"""What the machine can do: products of matrices, and bytes to and from memory. JAX's best; PyTorch's is beside its
other measurements."""

import platform
import re
from importlib import metadata
from pathlib import Path

import jax
import jax.numpy as jnp
from peers.timing import Found, best, sides_of

from jaxformer.run.peaks import peak_flops
from jaxformer.run.starts import features, processor

DTYPES = "float32", "bfloat16"


UNITS = {"amx": "AMX", "avx512": "AVX-512", "avx2": "AVX2", "sve": "SVE", "asimd": "NEON"}


def cpu() -> str:
    """The processor, family and model as Linux numbers them, cores, and its widest vector units: a cloud gives one name
    to several."""
    widest = next((name for unit, name in UNITS.items() if any(each.startswith(unit) for each in features())), "")
    (name, _, cores), about = processor().rpartition(", "), Path("/proc/cpuinfo")
    text = about.read_text() if about.exists() else ""
    found = [re.search(rf"^{field}\s*: (\d+)", text, re.M) for field in ("cpu family", "model")]
    numbers = f" (family {found[0][1]}, model {found[1][1]})" if found[0] and found[1] else ""
    return ", ".join(filter(None, (name + numbers, cores, widest)))


def device() -> str:
    """The model of what JAX computes on."""
    first = jax.devices()[0]
    return cpu() if first.platform == "cpu" else first.device_kind


def machine() -> Found:
    """What it is and, of other devices than a CPU, what their data sheet says of products in each dtype."""
    first = jax.devices()[:1]
    known = {} if first[0].platform == "cpu" else {dtype: peak_flops(first, dtype) for dtype in DTYPES}
    return {"device": device(), "datasheet": known}


def limits(seconds: float, sides: int, room: int) -> Found:
    """Operations a second in products of each dtype with the first so many `sides`, and bytes a second, by arrays of
    `room` numbers."""
    found: Found = dict.fromkeys(DTYPES, 0.0)
    product, copy = jax.jit(lambda a: a @ a), jax.jit(lambda a: a + 1)
    for dtype, side in sides_of(DTYPES, sides, found):
        a = jax.random.normal(jax.random.key(0), (side, side)).astype(dtype)
        taken = best(lambda a=a: product(a).block_until_ready(), seconds)
        found[dtype] = max(found[dtype], 2 * side**3 / taken)
    a = jnp.ones(room)
    found["bytes"] = 8 * room / best(lambda: copy(a).block_until_ready(), seconds)
    versions = {"Python": platform.python_version(), **{name: metadata.version(name) for name in ("jax", "flax")}}
    return {**machine(), **found, "versions": versions}
