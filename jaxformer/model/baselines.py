"""Language models from before the transformers, against which these are judged: tables and recurrent networks."""

# pyright: reportIncompatibleVariableOverride=false

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from jaxformer.declarations import Arrays, Param, declare
from jaxformer.keys import fold
from jaxformer.model.blocks import record
from jaxformer.model.heads import Head, LanguageHead
from jaxformer.model.layers import GPT2Normal, Initializer, Out, TorchUniform, check_dropout, dropout, lookup
from jaxformer.model.masks import Places
from jaxformer.model.models import Model


class TokenEmbedding(Model):
    """The embedding and the head alone: what comes next depends on one token; also the base of the other baselines."""

    head: Head | tuple[Head, ...] = LanguageHead(tied=False, bias=True)
    initializer: Initializer = TorchUniform()

    def network(self) -> "Network":
        return Network(self)

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> Any:
        """The running state. Its size does not depend on the length; here there is none."""
        return {}


class Rows(LanguageHead):
    """The hidden states of a Bigram as the logits that they are."""

    reads_logits = True

    def check(self, at: str = "") -> None:
        super().check(at)
        if not self.tied or self.bias or self.scaled:
            raise ValueError(f"{at}tied, {at}bias and {at}scaled must be as they were: the table holds the logits")

    def __call__(self, params: Arrays, h: Float[Array, "*B V"], table: Float[Array, "V V"]) -> Float[Array, "*B V"]:
        logits = h.astype(jnp.float32)
        return logits if self.cap is None else self.cap * jnp.tanh(logits / self.cap)


class Bigram(TokenEmbedding):
    """A table of logits: a row for the current token, a column for the next (Shannon 1948, section 3).

    A hidden state is a row, so that D is V and `d_model` is not to be given.
    """

    d_model: int | None = dataclasses.field(default=None, kw_only=True)  # None: vocab_size, always
    head: Head | tuple[Head, ...] = Rows()
    initializer: Initializer = GPT2Normal()

    gives_logits = True

    def check(self, at: str = "") -> None:
        super().check(at)
        if self.d_model is not None:
            raise ValueError(f"{at}d_model={self.d_model} must be None: a Bigram is as wide as the vocabulary")
        for head in self.heads:
            if head.writes and not head.reads_logits:
                raise ValueError(f"{at}head={type(head).__name__} must be Rows: a Bigram's hidden states are logits")

    @property
    def dims(self) -> dict[str, int]:
        dims = super().dims
        return dims | {"D": dims["V"]}


class RNN(TokenEmbedding):
    """A recurrent network (Elman 1990; as a language model Mikolov et al. 2010); also the base of its kin.

    A kin is a class with another of Flax's `cell`s, whose state begins as zeros. Dropout is that of arXiv:1409.2329:
    of what each layer is given and of what the last one gives, never of the state.
    """

    n_layers: int = 1  # number of layers
    dropout: float = 0.0  # probability of dropout between layers

    cell = nn.SimpleCell

    def network(self) -> "Network":
        return RecurrentNetwork(self)

    def check(self, at: str = "") -> None:
        super().check(at)
        self.check_sizes(at, "n_layers")
        check_dropout(self.dropout, at)

    @property
    def stacked(self) -> dict[tuple[str, ...], int]:
        return {("layers",): self.n_layers}

    def new_cell(self) -> Any:
        return self.cell(self.d_model, parent=None)  # no part of a module: it is given its parameters

    def new_state(self, batch_size: int, dtype: Any) -> Any:
        """The cell's carry before the first token: zeros [B, D], or a tuple of them."""
        state = jax.eval_shape(lambda: self.new_cell().initialize_carry(jax.random.key(0), (batch_size, self.d_model)))
        return jax.tree.map(lambda a: jnp.zeros(a.shape, dtype), state)

    def of_cell(self) -> dict[str, dict[str, Param]]:
        """What the cell owns, by Flax's names: those of layers that are given the state begin with h."""
        x, state = jnp.zeros((1, self.d_model)), self.new_state(1, jnp.float32)
        owned = jax.eval_shape(self.new_cell().init, jax.random.key(0), state, x)["params"]
        orthogonal = jax.nn.initializers.orthogonal()

        def one(layer: str, label: str) -> Param:
            if label == "bias":
                return Param("D", fan_in="D")
            return Param("D->D", orthogonal if layer.startswith("h") else None)

        return {layer: {label: one(layer, label) for label in group} for layer, group in owned.items()}

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> Any:
        state = self.new_state(batch_size, dtype)
        return jax.tree.map(lambda a: jnp.broadcast_to(a, (self.n_layers, *a.shape)), state)


class GRU(RNN):
    """Gated recurrent units (arXiv:1406.1078), the reset gate behind the product with the state as in cuDNN."""

    cell = nn.GRUCell


class LSTM(RNN):
    """Long short-term memory (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000)."""

    forget_bias: float | None = 1.0  # the forget gates' first bias (Jozefowicz et al. 2015); None: drawn as others

    cell = nn.OptimizedLSTMCell

    def of_cell(self) -> dict[str, dict[str, Param]]:
        owned = super().of_cell()
        if self.forget_bias is not None:
            bias = owned["hf"]["bias"]
            owned["hf"]["bias"] = dataclasses.replace(bias, init=jax.nn.initializers.constant(self.forget_bias))
        return owned


class Recurrent(nn.Module):
    """One recurrent layer. A state begins anew with each document of a row, and padding leaves it as it was."""

    spec: RNN

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], scanned: Any, at: Places, key: jax.Array | None
    ) -> tuple[Float[Array, "B T D"], Any]:
        s, (layer, cache) = self.spec, scanned
        params = {name: declare(self, name, group, s.dims) for name, group in s.of_cell().items()}
        # In half precision too, a gradient is summed over the tokens in float32.
        params = jax.tree.map(lambda a: a.astype(jnp.float32), params)
        cell, dtype = s.new_cell(), x.dtype
        state = s.new_state(len(x), dtype) if cache is None else jax.tree.map(lambda a: a.astype(dtype), cache)

        def step(state: Any, token: tuple[Float[Array, "B D"], Bool[Array, "B 1"], Bool[Array, "B 1"]]) -> Any:
            x, first, real = token
            own = jax.tree.map(lambda a: a.astype(dtype), params)
            before = jax.tree.map(lambda a: jnp.where(first, 0, a), state)
            after, h = cell.apply({"params": own}, before, x)
            return jax.tree.map(lambda old, new: jnp.where(real, new, old), state, after), h

        x = dropout(fold(key, layer), x, s.dropout)
        of_each = lambda a: jnp.broadcast_to(a, x.shape[:2]).T[..., None]  # [T, B, 1]
        state, x = jax.lax.scan(step, state, (x.swapaxes(0, 1), of_each(at.position == 0), of_each(at.segment > 0)))
        x = x.swapaxes(0, 1)
        record(self, out=x)
        return x, None if cache is None else jax.tree.map(lambda old, new: new.astype(old.dtype), cache, state)


class Network(nn.Module):
    """The Flax module behind a baseline."""

    spec: TokenEmbedding

    @nn.compact
    def __call__(self, ids: jax.Array, at: Places, key: jax.Array | None, cache: Any = None, memory: Any = None) -> Out:
        s = self.spec
        own = {name: declare(self, name, params, s.dims) for name, params in s.params().items()}
        x = lookup(own["embedding"]["table"], ids)
        record(self, embedded=x)
        return Out(*self.above(x, at, key, cache))

    def above(self, x: jax.Array, at: Places, key: jax.Array | None, cache: Any) -> tuple[jax.Array, Any]:
        return x, cache

    def everything(self, ids: jax.Array, at: Places) -> None:
        self(ids, at, None)


class RecurrentNetwork(Network):
    """Recurrent layers above the embedding; parameters and state lie stacked along a leading axis L."""

    spec: RNN

    def above(self, x: jax.Array, at: Places, key: jax.Array | None, cache: Any) -> tuple[jax.Array, Any]:
        s = self.spec
        layers = nn.scan(
            Recurrent,
            variable_axes={"params": 0, "activations": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
            length=s.n_layers,
            metadata_params={nn.PARTITION_NAME: "L"},
        )(s, name="layers")
        x, cache = layers(x, (jnp.arange(s.n_layers), cache), at, key)
        x = dropout(fold(key, s.n_layers), x, s.dropout)
        record(self, out=x)
        return x, cache
