"""A model on `nn.MultiHeadDotProductAttention`, written and trained as Flax's examples lm1b and wmt are: modules of
Linen, a TrainState, one jitted step per call, its state donated."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from peers.sizes import Size
from peers.timing import Found, timed

from jaxformer.platform import set_flags


class Block(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        size, biased, deterministic = self.size, not self.size.causal, self.size.dropout == 0
        h = nn.LayerNorm(use_bias=biased)(x)
        h = nn.MultiHeadDotProductAttention(
            num_heads=size.heads,
            use_bias=biased,
            dropout_rate=size.dropout,
            broadcast_dropout=False,
            deterministic=deterministic,
        )(h, mask=mask)
        x = x + nn.Dropout(size.dropout, deterministic=deterministic)(h)
        h = nn.LayerNorm(use_bias=biased)(x)
        h = nn.Dense(4 * size.width, use_bias=biased)(h)
        h = nn.gelu(h) if size.causal else nn.relu(h)
        h = nn.Dense(size.width, use_bias=biased)(h)
        return x + nn.Dropout(size.dropout, deterministic=deterministic)(h)


class Transformer(nn.Module):
    size: Size

    @nn.compact
    def __call__(self, ids: jax.Array, real: jax.Array) -> jax.Array:
        """Logits [B, T, V] of a decoder; of an encoder one for each text, [B]."""
        size = self.size
        mask = nn.make_causal_mask(ids) if size.causal else nn.make_attention_mask(real, real)
        tokens, table = nn.Embed(size.vocabulary, size.width), nn.initializers.normal(0.02)
        x = tokens(ids) + self.param("positions", table, (size.context, size.width))[: ids.shape[1]]
        x = nn.Dropout(size.dropout, deterministic=size.dropout == 0)(x)
        for _ in range(size.layers):
            x = Block(size)(x, mask)
        x = nn.LayerNorm(use_bias=not size.causal)(x)
        if size.causal:
            return tokens.attend(x)
        pooled = (x * real[..., None]).sum(1) / real.sum(1, keepdims=True)
        h = nn.Dropout(size.dropout, deterministic=False)(nn.relu(nn.Dense(size.width)(pooled)))
        return nn.Dense(1)(h)[:, 0]


def step(size: Size, seconds: float) -> Found:
    """Of a step with its batch, its loss fetched."""
    set_flags()
    model, rng = Transformer(size), np.random.default_rng(0)
    tokens = rng.integers(0, size.vocabulary, 1_000_000, dtype=np.int32)
    first_rows = tokens[: size.batch * size.tokens].reshape(size.batch, size.tokens)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = jax.jit(model.init)(keys, first_rows, jnp.ones_like(first_rows))["params"]
    matrices = lambda params: jax.tree.map(lambda a: a.ndim > 1, params)
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 100, 2000, 1e-4)
    adamw = optax.adamw(rate, b2=0.99, weight_decay=0.1, mask=matrices)
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=optax.chain(optax.clip_by_global_norm(1.0), adamw)
    )

    def one(state: TrainState, rows: jax.Array, real: jax.Array) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(keys["dropout"], state.step)

        def loss(params: dict[str, jax.Array]) -> jax.Array:
            ids = rows[:, :-1] if size.causal else rows
            logits = state.apply_fn({"params": params}, ids, real, rngs={"dropout": key})
            if size.causal:
                return optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:]).mean()
            return optax.sigmoid_binary_cross_entropy(logits, real.sum(1) % 2).mean()

        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    one, width = jax.jit(one, donate_argnums=0), size.tokens + size.causal

    def call() -> None:
        nonlocal state
        first = rng.integers(0, len(tokens) - width, (size.batch, 1))
        real = np.arange(size.tokens) < rng.integers(5, size.tokens + 1, (size.batch, 1))
        state, loss = one(state, jnp.asarray(tokens[first + np.arange(width)]), jnp.asarray(real, jnp.int32))
        jax.device_get(loss)

    return timed(call, seconds)
