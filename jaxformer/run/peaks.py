"""What devices can do at most, and have held at most."""

import contextlib
import functools
import hashlib
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from jaxformer.config import Train
from jaxformer.data.files import cache_directory, write
from jaxformer.run.starts import features, processor

# FLOP/s of dense products by the name of the device: NVIDIA's data sheets (half of what they give with sparsity) and
# Google's pages of each TPU. By default JAX multiplies float32 in TF32 where a GPU has that, and in bfloat16 on a TPU
# (docs.jax.dev/en/latest/201/precision.html).
TPU = lambda peak: {"bfloat16": peak, "float32": peak}
GPU = lambda half, single: {"bfloat16": half, "float16": half, "float32": single}
PEAKS: Mapping[str, Mapping[str, float]] = {
    r"(NVIDIA )?A100[- ](SXM4-[48]0GB|PCIE-40GB|80GB PCIe)": GPU(312e12, 156e12),
    r"NVIDIA (H100 80GB HBM3|H200)": GPU(989e12, 494e12),
    r"NVIDIA L4": GPU(121e12, 60e12),
    r"Tesla T4": {"float16": 65e12, "float32": 8.1e12},
    r"TPU v4": TPU(275e12),
    r"TPU v5( lite|e)": TPU(197e12),
    r"TPU v5p?": TPU(459e12),
    r"TPU v6( lite|e)": TPU(918e12),
}


def peak_flops(devices: Sequence[Any], dtype: str) -> float | None:
    """The most operations per second of products in a dtype that devices of one kind can make together: known by name,
    and measured of a CPU, whose devices share it. None of others."""
    if devices[0].platform == "cpu":
        return _measured(dtype)
    found = next((peaks for name, peaks in PEAKS.items() if re.fullmatch(name, devices[0].device_kind)), {})
    return len(devices) * found[dtype] if dtype in found else None


def peak_of(train: Train, devices: Sequence[Any]) -> float | None:
    """That of a run, in the dtype of its products."""
    return peak_flops(devices, train.product_dtype or train.compute_dtype)


@functools.cache
def _measured(dtype: str) -> float:
    """The best of a few products, which take a tenth of a second, and of those of starts before: other work may be
    beside it."""
    size, best = 768, 0.0
    matrix = jnp.ones((size, size), dtype)
    for result in {jnp.dtype(dtype), jnp.dtype("float32")}:  # of halves, the one or the other is faster by processor
        product = functools.partial(jnp.matmul, matrix, matrix, preferred_element_type=result)
        product().block_until_ready()
        for _ in range(5):
            began = time.perf_counter()
            product().block_until_ready()
            best = max(best, 2 * size**3 / (time.perf_counter() - began))
    kind = " ".join((processor(), *features(), dtype))
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # without a cache, what was measured now
        path = cache_directory() / "peaks" / hashlib.sha256(kind.encode()).hexdigest()[:16]
        before = float(path.read_text()) if path.exists() else 0.0
        if before >= best:
            return before
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, f"{best}\n")
    return best


def peak_memory(devices: Sequence[Any]) -> int | None:
    """The most bytes that one of the devices has held so far; None where they do not tell, as a CPU."""
    stats = [device.memory_stats() for device in devices]
    found = [each["peak_bytes_in_use"] for each in stats if each and "peak_bytes_in_use" in each]
    return max(found, default=None)
