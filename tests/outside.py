"""A stranger's module: parts with parameters per head and cache entries of their own, in one class each."""

import jax
import jax.numpy as jnp

from jaxformer.declarations import Param, Slot
from jaxformer.model.kernels import Softmax
from jaxformer.model.positions import Position

normal = jax.nn.initializers.normal(1.0)


def per_query(x, n_heads):
    """[B, T, S, G] -> [B, H, T, S]."""
    return jnp.repeat(jnp.moveaxis(x, -1, 1), n_heads // x.shape[-1], axis=1)


class SinkWithStatistic(Softmax):
    """A sink logit per head; scores fall with the energy of keys that has passed since (a running statistic)."""

    rate: float = 0.1

    def params(self):
        return {"sink": Param("H", normal)}

    def slots(self):
        return super().slots() | {"energy_at": Slot("BSG", dtype=jnp.float32), "energy": Slot("BG", dtype=jnp.float32)}

    def remember(self, params, k, v, at, cache):
        energy = jnp.abs(k).mean(-1).swapaxes(1, 2).astype(jnp.float32) * (at.segment > 0)[..., None]  # [B, T, G]
        total = jnp.cumsum(energy, 1) + (0 if cache is None else cache["energy"][:, None])
        return {"k": k, "v": v, "energy_at": total, "energy": total[:, -1]}

    def scores(self, params, q, new, seen):
        passed = new["energy_at"][:, :, None] - seen["energy_at"][:, None]
        return super().scores(params, q, new, seen) - self.rate * per_query(passed, q.shape[1])

    def weights(self, params, scores):
        sink = jnp.broadcast_to(params["sink"][None, :, None, None], (*scores.shape[:-1], 1))
        weights, total = super().weights(params, jnp.concatenate([sink, scores], -1))
        return weights[..., 1:], total


class LearnedPace(Position):
    """A learned clock: each token advances it by sigmoid(gate · k); a slope per head and layer weighs what passed."""

    per_layer = True

    def params(self):
        return {"gate": Param("GK", normal), "slope": Param("H", normal)}

    def slots(self):
        return {"clock_at": Slot("BSG", dtype=jnp.float32), "clock": Slot("BG", dtype=jnp.float32)}

    def remember(self, params, k, at, cache):
        pace = jax.nn.sigmoid(jnp.einsum("BGTK,GK->BTG", k, params["gate"]).astype(jnp.float32))
        clock = jnp.cumsum(pace * (at.segment > 0)[..., None], 1) + (0 if cache is None else cache["clock"][:, None])
        return {"clock_at": clock, "clock": clock[:, -1]}

    def bias(self, params, view, new, seen):
        passed = new["clock_at"][:, :, None] - seen["clock_at"][:, None]
        slope = jnp.exp(params["slope"])
        return -slope[None, :, None, None] * per_query(passed, len(slope))


class TurnPerLayer(Position):
    """A learned speed of rotation for each layer, and a state of a size of its own that counts the tokens seen."""

    per_layer = True

    def params(self):
        return {"speed": Param("R", normal, sizes={"R": 1})}

    def slots(self):
        return {"seen": Slot("BR", dtype=jnp.float32, sizes={"R": 1})}

    def remember(self, params, k, at, cache):
        count = (at.segment > 0).sum(1, keepdims=True) * jnp.ones((k.shape[0], 1))
        return {"seen": count + (0 if cache is None else cache["seen"])}

    def rotate(self, params, qk, at):
        a, b = jnp.split(qk, 2, -1)
        angle = at.position[:, None, :, None] * params["speed"][None, None, None]
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)
