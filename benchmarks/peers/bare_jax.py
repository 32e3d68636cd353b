"""The least that a GPT takes in JAX: one function per formula, no parts, no choices. What `benchmarks/gate.py` measures
jaxformer against."""

import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from peers.sizes import TOP_K, Size, Texts
from peers.timing import Found, stalled, timed

from jaxformer.platform import set_flags


def init(size: Size, key: jax.Array) -> dict[str, Any]:
    """Matrices are normal with deviation 0.02, gains are 1."""
    keys = iter(jax.random.split(key, 2 + 4 * size.layers))
    matrix = lambda *shape: 0.02 * jax.random.normal(next(keys), shape)
    D = size.width

    def layer() -> dict[str, jax.Array]:
        matrices = {"qkv": matrix(D, 3 * D), "out": matrix(D, D), "up": matrix(D, 4 * D), "down": matrix(4 * D, D)}
        return matrices | {"norm_attention": jnp.ones(D), "norm_feed": jnp.ones(D)}

    tables = {"tokens": matrix(size.vocabulary, D), "positions": matrix(size.context, D)}
    return tables | {"norm": jnp.ones(D), "layers": [layer() for _ in range(size.layers)]}


def norm(x: jax.Array, gain: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain


def heads_of(x: jax.Array, heads: int) -> jax.Array:  # [B, T, 3D] -> [3, B, H, T, K]
    return x.reshape(*x.shape[:2], 3, heads, -1).transpose(2, 0, 3, 1, 4)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:  # -> [B, T, D]
    """Divides behind the product with the values, which saves two passes over [T, S]."""
    scores = jnp.where(mask, jnp.einsum("BHTK,BHSK->BHTS", q * q.shape[-1] ** -0.5, k), -1e30)
    powers = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    values = jnp.einsum("BHTS,BHSK->BHTK", powers, v) / powers.sum(-1, keepdims=True)
    return values.swapaxes(1, 2).reshape(q.shape[0], q.shape[2], -1)


def times(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """x · matrix as one product of two matrices, which XLA on CPU is faster at than at those of more axes."""
    return (x.reshape(-1, x.shape[-1]) @ matrix).reshape(*x.shape[:-1], -1)


def feed_forward(layer: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    return times(jax.nn.gelu(times(norm(x, layer["norm_feed"]), layer["up"])), layer["down"])


def hidden(params: dict[str, Any], ids: jax.Array, heads: int) -> tuple[jax.Array, list[tuple[jax.Array, ...]]]:
    """[B, T, D] behind the last norm; and the keys and values of each layer."""
    T = ids.shape[1]
    x, mask, seen = params["tokens"][ids] + params["positions"][:T], jnp.tri(T, dtype=bool), []
    for layer in params["layers"]:
        q, k, v = heads_of(times(norm(x, layer["norm_attention"]), layer["qkv"]), heads)
        seen.append((k, v))
        x = x + times(attention(q, k, v, mask), layer["out"])
        x = x + feed_forward(layer, x)
    return norm(x, params["norm"]), seen


def step(size: Size, seconds: float, steps_per_call: int) -> Found:
    """Of a step with its batch, its loss fetched."""
    set_flags()
    matrices = lambda params: jax.tree.map(lambda a: a.ndim == 2, params)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 2000, 1e-4)
    adamw = optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=matrices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamw)

    def loss(params: Any, rows: jax.Array) -> jax.Array:
        logits = times(hidden(params, rows[:, :-1], size.heads)[0], params["tokens"].T)
        return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()

    def one(state: Any, rows: jax.Array) -> Any:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params, rows)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    steps = jax.jit(lambda state, batches: jax.lax.scan(one, state, batches), donate_argnums=0)
    params = jax.jit(init, static_argnums=0)(size, jax.random.key(0))
    state, rng = (params, optimizer.init(params)), np.random.default_rng(0)
    tokens = rng.integers(0, size.vocabulary, 1_000_000, dtype=np.int32)

    def call() -> None:
        nonlocal state
        first = rng.integers(0, len(tokens) - size.tokens, (steps_per_call, size.batch, 1))
        state, losses = steps(state, tokens[first + np.arange(size.tokens + 1)])
        jax.device_get(losses)

    return timed(call, seconds, steps_per_call)


@functools.partial(jax.jit, static_argnums=(3, 4))
def generated(params: Any, ids: jax.Array, lengths: jax.Array, size: Size, new: int, key: jax.Array) -> jax.Array:
    """`new` tokens [new, B] behind prompts [B, P] of these lengths; a cache per layer, updated in place."""
    B, P = ids.shape
    slots, rows = jnp.arange(P + new), jnp.arange(B)

    def drawn(x: jax.Array, key: jax.Array) -> jax.Array:
        logits, best = jax.lax.top_k(x @ params["tokens"].T, min(TOP_K, size.vocabulary))
        return jnp.take_along_axis(best, jax.random.categorical(key, logits)[:, None], 1)[:, 0]

    def one(carry: Any, key: jax.Array) -> Any:
        last, at, cache = carry  # a token [B] and its place in each text; keys and values [B, H, S, K] of each layer
        x, mask = (params["tokens"][last] + params["positions"][at])[:, None], (slots <= at[:, None])[:, None, None]
        after = []
        for layer, (k, v) in zip(params["layers"], cache, strict=True):
            q, new_k, new_v = heads_of(times(norm(x, layer["norm_attention"]), layer["qkv"]), size.heads)
            k, v = k.at[rows, :, at].set(new_k[:, :, 0]), v.at[rows, :, at].set(new_v[:, :, 0])
            after.append((k, v))
            x = x + times(attention(q, k, v, mask), layer["out"])
            x = x + feed_forward(layer, x)
        following = drawn(norm(x[:, 0], params["norm"]), key)
        return (following, at + 1, after), following

    h, seen = hidden(params, ids, size.heads)
    cache = [tuple(jnp.pad(a, ((0, 0), (0, 0), (0, new), (0, 0))) for a in kv) for kv in seen]
    keys = jax.random.split(key, new)
    first = drawn(h[rows, lengths - 1], keys[0])
    rest = jax.lax.scan(one, (first, lengths, cache), keys[1:])[1]
    return jnp.concatenate([first[None], rest])


def decode(size: Size, seconds: float, texts: Texts) -> Found:
    """Of one more token for each text, the prompts' share included."""
    set_flags()
    params, prompts = jax.jit(init, static_argnums=0)(size, jax.random.key(0)), texts.prompts(size.vocabulary)
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    ids = np.array([prompt + [0] * (lengths.max() - len(prompt)) for prompt in prompts], np.int32)
    call = lambda: jax.device_get(generated(params, ids, lengths, size, texts.new, jax.random.key(1)))
    return timed(call, seconds, texts.new)


def checkpoint(size: Size, seconds: float) -> Found:
    """Of a save by Orbax alone, for the thread that trains; the disk is waited for between saves."""
    params = jax.jit(init, static_argnums=0)(size, jax.random.key(0))
    state = jax.block_until_ready((params, optax.adamw(1e-3).init(params)))
    more = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(more(state))

    with tempfile.TemporaryDirectory() as folder, ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as saver:
        path = Path(folder, "saved")

        def clear() -> None:
            saver.wait_until_finished()
            shutil.rmtree(path)

        save = lambda: saver.save(path, args=ocp.args.StandardSave(state))
        return stalled(save, step, seconds, after=clear)
