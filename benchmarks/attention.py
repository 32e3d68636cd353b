"""Attention with gradients by each implementation: milliseconds, memory and compilation, by the length of the rows.

    python benchmarks/attention.py

8 · 256 tokens whatever the length, 4 heads of 32, causal. Interleaved; the least of 10 rounds.
"""

import dataclasses
import time

import jax
import jax.numpy as jnp
from peers.limits import device

from jaxformer.model.implementations import Blocked, Plain
from jaxformer.model.kernels import Softmax
from jaxformer.model.masks import Causal, Look, View, one_document

HEADS, WIDTH, TOKENS = 4, 32, 2048
WAYS = {"Plain": Plain(), "Blocked": Blocked()}


def compiled(kernel: Softmax, length: int) -> tuple[jax.stages.Compiled, float]:
    """Its gradients by queries, keys and values, [B, H, T, K]; and the seconds that compiling took."""

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        left, at = {"k": k, "v": v}, one_document(length)
        return kernel({}, Look(q, left, left, View(at, at, Causal(), HEADS), kernel.slots()), None, 0.0).h.sum()

    began = time.perf_counter()
    shape = jax.ShapeDtypeStruct((TOKENS // length, HEADS, length, WIDTH), jnp.float32)
    program = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape).compile()
    return program, time.perf_counter() - began


def main() -> None:
    print(f"{device()}, jax {jax.__version__}")
    for length in (64, 128, 256, 512, 1024, 2048):
        programs = {n: compiled(dataclasses.replace(Softmax(), implementation=way), length) for n, way in WAYS.items()}
        shape = TOKENS // length, HEADS, length, WIDTH
        inputs = [jax.random.normal(jax.random.key(i), shape) for i in range(3)]
        best = dict.fromkeys(programs, float("inf"))
        for _ in range(10):
            for name, (program, _) in programs.items():
                began = time.perf_counter()
                jax.block_until_ready(program(*inputs))
                best[name] = min(best[name], time.perf_counter() - began)
        for name, (program, seconds) in programs.items():
            found = program.memory_analysis()
            memory = found.temp_size_in_bytes / 1e6 if found else float("nan")
            print(f"T {length:5} {name:8} {best[name] * 1e3:7.1f} ms {memory:7.1f} MB, compiled in {seconds:.1f} s")


if __name__ == "__main__":
    main()
