"""Attention with gradients by each implementation: milliseconds, memory, compilation and how far the gradients are from
those of `Plain`, by the length of the rows. Exit status 1 where that is more than is promised.

    python benchmarks/attention.py

Causal; so many tokens whatever the length. Interleaved; the least of 10 rounds.
"""

import dataclasses
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from peers.limits import device

from jaxformer.model.implementations import Blocked, CuDNN, Implementation, Plain
from jaxformer.model.kernels import Softmax
from jaxformer.model.masks import Causal, Look, View, one_document


@dataclasses.dataclass(frozen=True)
class Setting:
    heads: int
    width: int  # of each
    tokens: int  # in all rows
    lengths: tuple[int, ...]  # of the rows
    dtype: str
    far: float  # ‖gradient − that of Plain‖ / ‖that of Plain‖ at most
    ways: Mapping[str, Implementation]


BOTH = {"Plain": Plain(), "Blocked": Blocked()}
CPU = Setting(4, 32, 2048, (64, 128, 256, 512, 1024, 2048), "float32", 1e-5, BOTH)
GPU = Setting(12, 64, 16_384, (256, 1024, 4096), "bfloat16", 2e-2, {**BOTH, "CuDNN": CuDNN()})


def compiled(kernel: Softmax, shape: Any) -> tuple[jax.stages.Compiled, float]:
    """Its gradients by queries, keys and values, [B, H, T, K]; and the seconds that compiling took."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        at = one_document(shape.shape[2])
        left = {"k": k, "v": v, "position": at.position}  # as a mixer leaves it
        look = Look(q, left, left, View(at, at, Causal(), shape.shape[1]), kernel.slots())
        return jnp.square(kernel({}, look, None, 0.0).h.astype(jnp.float32)).sum()

    began = time.perf_counter()
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return program, time.perf_counter() - began


def distance(found: Any, wanted: Any) -> float:
    """The largest, of queries, keys and values."""
    full, norm = (lambda a: np.asarray(a, np.float32)), np.linalg.norm
    return float(np.max([norm(full(a) - full(b)) / norm(full(b)) for a, b in zip(found, wanted, strict=True)]))


def main() -> int:
    setting, wrong = CPU if jax.default_backend() == "cpu" else GPU, False
    heads, width, tokens = setting.heads, setting.width, setting.tokens
    print(f"{device()}, jax {jax.__version__}; {heads} heads of {width}, {tokens} tokens, {setting.dtype}")
    for length in setting.lengths:
        shape = jax.ShapeDtypeStruct((tokens // length, heads, length, width), setting.dtype)
        ways = {name: Softmax(implementation=way) for name, way in setting.ways.items()}
        programs = {name: compiled(kernel, shape) for name, kernel in ways.items()}
        inputs = [jax.random.normal(jax.random.key(i), shape.shape, shape.dtype) for i in range(3)]
        best, gradients = dict.fromkeys(programs, float("inf")), dict[str, Any]()
        for _ in range(10):
            for name, (program, _) in programs.items():
                began = time.perf_counter()
                gradients[name] = jax.block_until_ready(program(*inputs))
                best[name] = min(best[name], time.perf_counter() - began)
        for name, (program, seconds) in programs.items():
            found, far = program.memory_analysis(), distance(gradients[name], gradients["Plain"])
            memory, wrong = found.temp_size_in_bytes / 1e6 if found else float("nan"), wrong or not far <= setting.far
            print(
                f"T {length:5} {name:8} {best[name] * 1e3:7.2f} ms {memory:7.1f} MB, compiled in {seconds:.1f} s, "
                f"{far:.1e} from Plain"
            )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
