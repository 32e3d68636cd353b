"""The families: specs that wire stacks of the one block. Parameters are plain dicts, and functions of them pure."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxformer.model import cache as cache_lib
from jaxformer.model.attention import Attention
from jaxformer.model.blocks import BlockSpec, PreNorm, Stack
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import FeedForward, GPT2Normal, LayerNorm, NoNorm, Normal, lookup
from jaxformer.model.masks import Causal, Places, one_document
from jaxformer.model.positions import Learned, NoPosition
from jaxformer.spec import Arrays, Param, Spec, declare, draw

Params = Mapping[str, Any]
REMAT = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")


class Decoder(Spec):
    """A decoder-only language model (GPT-2 by default)."""

    n_layers: int
    n_heads: int
    d_model: int
    context_length: int  # the longest text that the model sees at once
    vocab_size: int | None = None  # None: the tokenizer's
    n_kv_heads: int | None = None  # None: n_heads
    d_ff: int | None = None  # None: 4 · d_model
    dropout: float = 0.0
    position: NoPosition = Learned()
    kernel: Softmax = Softmax()
    mask: Causal | tuple[Causal, ...] = Causal()  # a tuple repeats over the layers
    feed_forward: FeedForward = FeedForward()
    norm: NoNorm = LayerNorm()
    residual: PreNorm = PreNorm()
    bias: bool = False  # of attention's projections; feed_forward and norm have their own
    tied_head: bool = True  # logits from the embedding table (arXiv:1608.05859)
    logit_cap: float | None = None  # logits are kept within ± this by tanh (arXiv:2408.00118)
    initializer: Normal = GPT2Normal()
    unroll: int = 1  # groups of layers in each turn of the scan: more is faster on CPU, and slower to compile
    remat: str | None = None  # "nothing_saveable": least memory; "dots_saveable": some; None: no recomputation

    def check(self, at: str = "") -> None:
        for name in ("n_layers", "n_heads", "d_model", "context_length", "vocab_size", "n_kv_heads", "d_ff", "unroll"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{at}{name}={value} must be at least 1")
        if self.d_model % self.n_heads:
            fits = max(n for n in range(1, min(self.n_heads, self.d_model) + 1) if self.d_model % n == 0)
            raise ValueError(f"{at}n_heads={self.n_heads} must divide {at}d_model={self.d_model}; {fits} does")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{at}n_kv_heads={self.n_kv_heads} must divide {at}n_heads={self.n_heads}; "
                f"1 always does, and {self.n_heads} gives every query head its own"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{at}dropout={self.dropout} must be at least 0 and less than 1; 0 turns it off")
        if self.logit_cap is not None and self.logit_cap <= 0:
            raise ValueError(f"{at}logit_cap={self.logit_cap} must be more than 0; 30 is usual, None turns it off")
        if self.remat not in (None, *REMAT):
            raise ValueError(f"{at}remat={self.remat!r} must be None or one of {', '.join(REMAT)}")
        kinds = len(self.kinds)
        if not kinds or self.n_layers % kinds:
            raise ValueError(f"{at}mask has {kinds} kinds, which must divide {at}n_layers={self.n_layers}")
        if self.n_layers // kinds % self.unroll:
            raise ValueError(f"{at}unroll={self.unroll} must divide {self.n_layers // kinds}, the groups of layers")
        if self.remat and self.unroll == self.n_layers // kinds > 1:
            raise ValueError(f"{at}remat={self.remat!r} needs a scan: {at}unroll={self.unroll} must be less; 1 does")
        if self.position.per_layer and type(self.position).embed is not NoPosition.embed:
            name = type(self.position).__name__
            raise ValueError(f"{at}position={name} embeds above the layers; it cannot have per_layer = True")
        self.position.check_width(self.d_model // self.n_heads, at)

    @property
    def dims(self) -> dict[str, int]:
        """Letter → size (README, "Letters"). L is the length of the stacked axis."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=None must be set before the model is used; take the tokenizer's")
        return {
            "V": self.vocab_size,
            "D": self.d_model,
            "H": self.n_heads,
            "G": self.n_kv_heads or self.n_heads,
            "K": self.d_model // self.n_heads,
            "F": self.d_ff or 4 * self.d_model,
            "C": self.context_length,
            "L": self.n_layers // len(self.kinds),
        }

    @property
    def kinds(self) -> tuple[BlockSpec, ...]:
        """The blocks of a group, which repeats over the layers."""
        masks = self.mask if isinstance(self.mask, tuple) else (self.mask,)
        return tuple(
            BlockSpec(
                *(self.position, self.kernel, mask, self.feed_forward, self.norm, self.residual),
                *(self.bias, self.dropout),
            )
            for mask in masks
        )

    def declared(self) -> Any:
        """The tree of declarations: each parameter's letters, decay and abstract value."""
        ids = jnp.zeros((1, 1), jnp.int32)
        init = lambda: Network(self).init(jax.random.key(0), ids, one_document(1), None)["params"]
        return jax.eval_shape(init)

    def init(self, key: jax.Array) -> Params:
        """Parameters in float32."""
        return draw(self.declared(), key, lambda box: self.initializer(box, 2 * self.n_layers))

    def hidden(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        at: Places,
        key: jax.Array | None = None,
        cache: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states, and the cache with the new tokens in it (None if none was given).

        `key` is that of dropout; None means evaluation. Ids must be less than vocab_size: JAX clamps without a word.
        """
        return Network(self).apply({"params": params}, ids, at, key, cache)  # pyright: ignore[reportReturnType]

    def logits(self, params: Params, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits; a part of its own, so that a loss may work in chunks."""
        if self.tied_head:
            logits = jnp.einsum("...D,VD->...V", h, params["embedding"]["table"], preferred_element_type=jnp.float32)
        else:
            logits = jnp.einsum("...D,DV->...V", h, params["head"]["kernel"], preferred_element_type=jnp.float32)
        return logits if self.logit_cap is None else self.logit_cap * jnp.tanh(logits / self.logit_cap)

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> dict[str, Arrays]:
        """An empty cache for texts of at most `length` tokens."""

        def one(kind: BlockSpec) -> Arrays:
            attention = Attention(self.dims, kind.kernel, kind.position, kind.mask, kind.bias, kind.dropout)
            dims = self.dims | {"B": batch_size, "S": kind.mask.span(length)}
            slots = cache_lib.empty(attention.slots(), dims, dtype)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (dims["L"], *a.shape)), slots)

        return {f"block{i}": one(kind) for i, kind in enumerate(self.kinds)}


class Network(nn.Module):
    """The Flax module behind a model."""

    spec: Decoder

    def setup(self) -> None:
        s = self.spec
        self.embedding = declare(self, "embedding", {"table": Param("VD", decay=True)}, s.dims)
        self.head = declare(self, "head", {} if s.tied_head else {"kernel": Param("D->V")}, s.dims)
        self.decoder = Stack(s.kinds, s.n_layers, s.dims, s.unroll, s.remat)

    def __call__(self, ids: jax.Array, at: Places, key: jax.Array | None, cache: Any = None) -> tuple[jax.Array, Any]:
        x, written = self.decoder(lookup(self.embedding["table"], ids), at, key, cache)
        return x, None if cache is None else written
