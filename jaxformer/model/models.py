"""The families: specs that wire stacks of the one block. Parameters are plain dicts, and functions of them pure."""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from jaxformer.keys import fold
from jaxformer.model import cache as cache_lib
from jaxformer.model.blocks import BlockSpec, PreNorm, Stack
from jaxformer.model.heads import Head, LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import FeedForward, GPT2Normal, LayerNorm, NoNorm, Normal, lookup
from jaxformer.model.masks import Bidirectional, Causal, Places, one_document
from jaxformer.model.positions import Learned, NoPosition
from jaxformer.spec import Arrays, Param, Spec, declare, draw, path_name

Params = Mapping[str, Any]
H = TypeVar("H", bound=Head)
T = TypeVar("T")
REMAT = ("nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable")
ENCODER, HEAD = 1 << 30, (1 << 30) + 1  # folded into the key of dropout: these have others than the layers


class Model(Spec):
    """What training and generation ask of a model; the base of all.

    A model is a Flax module, its `network`, and what can be said of it without one.
    """

    d_model: int
    context_length: int  # the longest text that the model sees at once
    vocab_size: int | None = None  # None: the tokenizer's
    head: Head | tuple[Head, ...] = LanguageHead()
    initializer: Normal = GPT2Normal()

    generates = True  # token after token
    encodes = False  # has `encode`: its hidden states need the memory of another text
    sees_ahead = False  # a token's hidden state may depend on some that follow
    sees_answers = False  # and on more of those than a prefix
    tells_parts = False  # the first of two texts in a row from the second

    def check(self, at: str = "") -> None:
        self.check_sizes(at, "d_model", "context_length", "vocab_size")
        names = [head.name for head in self.heads]
        if len(set(names)) != len(names) or not names:
            raise ValueError(
                f"{at}head must be one, or several of different columns; it is {', '.join(names) or 'none'}"
            )

    def check_sizes(self, at: str, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{at}{name}={value} must be at least 1")

    @property
    def heads(self) -> tuple[Head, ...]:
        return _as_tuple(self.head)

    @property
    def writes(self) -> bool:
        """Whether it writes text."""
        return self.generates and any(head.writes for head in self.heads)

    @property
    def dims(self) -> dict[str, int]:
        """Letter → size (README, "Letters")."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=None must be set before the model is used; take the tokenizer's")
        return {"V": self.vocab_size, "D": self.d_model, "C": self.context_length}

    @property
    def n_residuals(self) -> int:
        """How often the longest residual stream is added to."""
        return 1

    @property
    def stacked(self) -> dict[tuple[str, ...], int]:
        """Modules of which several layers lie stacked, in the order in which they run: path → how many layers."""
        return {}

    def summary(self) -> dict[str, str]:
        """What a run says of it when it starts, besides its size: line by line, by name."""
        return {}

    def network(self) -> nn.Module:
        """The Flax module behind the model; its `everything` runs all that has parameters."""
        raise NotImplementedError

    def declared(self) -> Any:
        """The tree of declarations: each parameter's letters, decay and abstract value."""
        ids, at = jnp.zeros((1, 1), jnp.int32), one_document(1)
        init = lambda: self.network().init(jax.random.key(0), ids, at, method="everything")["params"]
        return jax.eval_shape(init)

    def init(self, key: jax.Array) -> Params:
        """Parameters in float32."""
        return draw(self.declared(), key, lambda box: self.initializer(box, self.n_residuals))

    def hidden(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        at: Places,
        key: jax.Array | None = None,
        cache: Any = None,
        memory: Any = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Hidden states, and the cache with the new tokens in it (None if none was given).

        `key` is that of dropout; None means evaluation. `memory` is what `encode` gave, of a model that has it. Ids
        must be less than vocab_size: JAX clamps without a word.
        """
        return self.network().apply({"params": params}, ids, at, key, cache, memory)  # pyright: ignore

    def encode(self, params: Params, ids: Int[Array, "B S"], at: Places, key: jax.Array | None = None) -> Any:
        """The memory of a text, for `hidden` of another: of rows whose segments are the same numbers."""
        raise NotImplementedError

    def activations(
        self,
        params: Params,
        ids: Int[Array, "B T"],
        at: Places,
        source: tuple[Int[Array, "B S"], Places] | None = None,
    ) -> dict[str, jax.Array]:
        """Name → what the model computes on the way, without dropout; of stacked layers [L, ...].

        Names are those of the modules, as of parameters, and one more: "decoder/layers/block0/attention/weights".
        """
        found: dict[str, Any] = {}
        memory, variables = None, {"params": params}
        if source is not None:
            memory = self.encode(params, *source)
            _, more = self.network().apply(variables, *source, None, method="encode", mutable=["activations"])
            found |= {path_name(path): value for path, value in _leaves(more.get("activations", {}))}
        (h, _), more = self.network().apply(variables, ids, at, None, None, memory, mutable=["activations"])
        found |= {path_name(path): value for path, value in _leaves(more.get("activations", {}))}
        real = jnp.broadcast_to(at.segment > 0, ids.shape)
        for head in self.heads:
            found[f"head_{head.name}/out"] = self.read(params, head, h, *head.given(params, real))
        return found

    def head_of(self, kind: type[H]) -> H:
        """The first head of a kind. Raises ValueError if there is none."""
        for head in self.heads:
            if isinstance(head, kind):
                return head
        raise ValueError(
            f"model.head must be, or hold, a {kind.__name__}; it is {', '.join(h.name for h in self.heads)}"
        )

    def read(self, params: Params, head: Any, h: Float[Array, "*B D"], *more: Any) -> jax.Array:
        """What a head makes of hidden states, and of what else it is given."""
        with jax.named_scope(f"head_{head.name}"):
            return head(params.get(f"head_{head.name}", {}), h, *more)

    def logits(self, params: Params, h: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """float32 logits of the language head; a part of its own, so that a loss may work in chunks."""
        return self.read(params, self.head_of(LanguageHead), h, params["embedding"]["table"])

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> Any:
        """An empty cache for texts of at most `length` tokens."""
        raise NotImplementedError


def _as_tuple(parts: T | tuple[T, ...]) -> tuple[T, ...]:
    return parts if isinstance(parts, tuple) else (parts,)


def _leaves(tree: Any) -> list[tuple[Any, jax.Array]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]


class Decoder(Model):
    """A decoder-only language model (GPT-2 by default); also the base of the other transformers."""

    n_layers: int = 6
    n_heads: int = 6
    n_kv_heads: int | None = None  # None: n_heads
    head_width: int | None = None  # None: d_model / n_heads
    d_ff: int | None = None  # None: 4 · d_model
    dropout: float = 0.0
    position: NoPosition = Learned()
    kernel: Softmax | tuple[Softmax, ...] | None = Softmax()  # None: no attention
    mask: Bidirectional | tuple[Bidirectional, ...] = Causal()
    feed_forward: FeedForward | tuple[FeedForward, ...] | None = FeedForward()  # None: attention alone; tuples repeat
    norm: NoNorm = LayerNorm()
    residual: PreNorm = PreNorm()
    qk_norm: NoNorm = NoNorm()  # of each head's queries and keys (arXiv:2010.04245)
    bias: bool = False  # of attention's projections; feed_forward and norm have their own
    qkv_bias: bool | None = None  # of queries, keys and values; None: as bias
    output_projection: bool = True  # False: attention gives its heads side by side, and 0 where d_model is wider
    scale_embedding: bool = False  # by √d_model (arXiv:1706.03762, section 3.4)
    embedding_norm: bool = False  # the embedded input is normed, as in BERT
    n_parts: int = 0  # of a document that have an embedding each, as BERT's two sentences; 0: there is none
    unroll: int = 1  # groups of layers in a turn of the scan, at most all: more is faster on CPU, slower to compile
    remat: str | None = None  # "nothing_saveable": least memory; "dots_saveable": some; None: no recomputation

    stacks = ("decoder",)  # by name

    def check(self, at: str = "") -> None:
        super().check(at)
        self.check_sizes(at, "n_layers", "n_heads", "n_kv_heads", "head_width", "d_ff", "unroll")
        if self.n_parts < 0:
            raise ValueError(f"{at}n_parts={self.n_parts} must be at least 0; 2 tells a first text from a second")
        if self.head_width is None and self.d_model % self.n_heads:
            fits = max(n for n in range(1, min(self.n_heads, self.d_model) + 1) if self.d_model % n == 0)
            raise ValueError(f"{at}n_heads={self.n_heads} must divide {at}d_model={self.d_model}; {fits} does")
        if self.n_kv_heads and self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"{at}n_kv_heads={self.n_kv_heads} must divide {at}n_heads={self.n_heads}; "
                f"1 always does, and {self.n_heads} gives every query head its own"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"{at}dropout={self.dropout} must be at least 0 and less than 1; 0 turns it off")
        if self.remat not in (None, *REMAT):
            raise ValueError(f"{at}remat={self.remat!r} must be None or one of {', '.join(REMAT)}")
        heads = self.n_heads * (self.head_width or self.d_model // self.n_heads)
        if not self.output_projection and heads > self.d_model:
            raise ValueError(
                f"{at}output_projection=False leaves the heads side by side, {heads} numbers, more than "
                f"{at}d_model={self.d_model}; True projects them, and a smaller {at}head_width fits"
            )
        if self.feed_forward is None and self.kernel is None:
            raise ValueError(f"{at}kernel=None and {at}feed_forward=None leave nothing of a block; set one of them")
        for stack in self.stacks:
            self._check_stack(at, stack)
        if self.position.per_layer and type(self.position).embed is not NoPosition.embed:
            name = type(self.position).__name__
            raise ValueError(f"{at}position={name} embeds above the layers; it cannot have per_layer = True")
        self.position.check_width(self.head_width or self.d_model // self.n_heads, at)

    def _check_stack(self, at: str, stack: str) -> None:
        kinds, n_layers = len(self.kinds(stack)), self.layers(stack)
        if not kinds or n_layers % kinds:
            raise ValueError(
                f"{at}mask, {at}kernel and {at}feed_forward make {kinds} kinds of layers, which must divide the "
                f"{n_layers} layers of the {stack}"
            )
        if self.remat and self.unroll >= n_layers // kinds > 1:
            raise ValueError(f"{at}remat={self.remat!r} needs a scan: {at}unroll={self.unroll} must be less; 1 does")

    @property
    def generates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "decoder" in self.stacks

    @property
    def sees_ahead(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not all(kind.mask.causal for kind in self.kinds(self.stacks[-1]))

    @property
    def sees_answers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(kind.mask.sees_answers for kind in self.kinds(self.stacks[-1]))

    @property
    def tells_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.n_parts > 0

    @property
    def dims(self) -> dict[str, int]:
        return super().dims | {
            "H": self.n_heads,
            "G": self.n_kv_heads or self.n_heads,
            "K": self.head_width or self.d_model // self.n_heads,
            "F": self.d_ff or 4 * self.d_model,
        }

    @property
    def n_residuals(self) -> int:
        return max(1, *(len(kind.branches) * self.layers(s) for s in self.stacks for kind in self.kinds(s)))

    @property
    def stacked(self) -> dict[tuple[str, ...], int]:
        kinds = {stack: len(self.kinds(stack)) for stack in self.stacks}
        return {(s, "layers", f"block{i}"): self.layers(s) // n for s, n in kinds.items() for i in range(n)}

    def summary(self) -> dict[str, str]:
        kinds = [kind for stack in self.stacks for kind in self.kinds(stack)]
        kernels = {type(kernel).__name__ for kind in kinds for kernel in (kind.kernel, kind.cross_kernel) if kernel}
        return {"attention": f"{', '.join(sorted(kernels))}, in XLA"} if kernels else {}

    def layers(self, stack: str) -> int:
        """How many a stack has."""
        return self.n_layers

    def kinds(self, stack: str) -> tuple[BlockSpec, ...]:
        """The blocks of a group, which repeats over the layers of a stack."""
        return self._kinds(self.mask, None)

    def _kinds(
        self, mask: Bidirectional | tuple[Bidirectional, ...], cross_kernel: Softmax | None
    ) -> tuple[BlockSpec, ...]:
        kernels, masks, feeds = _as_tuple(self.kernel), _as_tuple(mask), _as_tuple(self.feed_forward)
        qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        biases = qkv_bias, self.bias, self.output_projection
        rest = self.norm, self.residual, self.qk_norm, *biases, self.dropout, cross_kernel

        def kind(i: int) -> BlockSpec:
            own = kernels[i % len(kernels)], masks[i % len(masks)], feeds[i % len(feeds)]
            return BlockSpec(self.position, *own, *rest)

        return tuple(map(kind, range(math.lcm(len(kernels), len(masks), len(feeds)))))

    def network(self) -> "Network":
        return Network(self)

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> dict[str, Arrays]:
        kinds = self.kinds("decoder")
        turns = self.n_layers // len(kinds)

        def one(kind: BlockSpec) -> Arrays:
            dims = self.dims | {"B": batch_size, "S": kind.mask.span(length)}
            declared = {} if kind.kernel is None else kind.attention(self.dims).slots()
            slots = cache_lib.empty(declared, dims, dtype)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (turns, *a.shape)), slots)

        return {f"block{i}": one(kind) for i, kind in enumerate(kinds)}


class Encoder(Decoder):
    """A bidirectional encoder (arXiv:1810.04805): each token's hidden state depends on the whole text."""

    mask: Bidirectional | tuple[Bidirectional, ...] = Bidirectional()

    stacks = ("encoder",)


class EncoderDecoder(Decoder):
    """A decoder that also attends to what an encoder makes of another text (arXiv:1706.03762).

    Both share the embedding; each has its own positions.
    """

    n_encoder_layers: int | None = None  # None: n_layers
    encoder_mask: Bidirectional = Bidirectional()
    cross_kernel: Softmax = Softmax()  # of the decoder's attention to the encoder

    stacks = ("encoder", "decoder")
    encodes = True

    def check(self, at: str = "") -> None:
        self.check_sizes(at, "n_encoder_layers")
        super().check(at)

    def layers(self, stack: str) -> int:
        return (self.n_encoder_layers or self.n_layers) if stack == "encoder" else self.n_layers

    def kinds(self, stack: str) -> tuple[BlockSpec, ...]:
        return self._kinds(*((self.encoder_mask, None) if stack == "encoder" else (self.mask, self.cross_kernel)))

    def encode(self, params: Params, ids: Int[Array, "B S"], at: Places, key: jax.Array | None = None) -> Any:
        """Keys, values and places of each of the decoder's layers, stacked; read-only from here on."""
        network = self.network()
        x: Any = network.apply({"params": params}, ids, at, fold(key, ENCODER), method="encode")
        layers = params["decoder"]["layers"]

        def one(kind: BlockSpec, name: str) -> Arrays:
            attention = kind.cross_attention(self.dims)
            remember = lambda p: attention.apply({"params": p}, x, at, {}, method="remember")
            with jax.named_scope(f"decoder/layers/{name}/cross_attention"):
                return jax.vmap(remember)(layers[name]["cross_attention"])  # pyright: ignore[reportReturnType]

        return {name: one(kind, name) for name, kind in ((f"block{i}", k) for i, k in enumerate(self.kinds("decoder")))}


class Network(nn.Module):
    """The Flax module behind a transformer."""

    spec: Decoder

    def setup(self) -> None:
        s = self.spec
        parts = {"parts": Param("PD", decay=True, sizes={"P": s.n_parts})} if s.n_parts else {}
        self.embedding = declare(self, "embedding", {"table": Param("VD", decay=True)} | parts, s.dims)
        for head in s.heads:
            declare(self, f"head_{head.name}", head.params(), s.dims)
        for name in s.stacks:
            setattr(self, name, Stack(s.kinds(name), s.layers(name), s.dims, s.embedding_norm, s.unroll, s.remat))

    def __call__(
        self, ids: jax.Array, at: Places, key: jax.Array | None, cache: Any = None, memory: Any = None
    ) -> tuple[jax.Array, Any]:
        x, written = getattr(self, self.spec.stacks[-1])(self._embedded(ids, at), at, key, cache, memory)
        return x, None if cache is None else written

    def encode(self, ids: jax.Array, at: Places, key: jax.Array | None) -> jax.Array:
        return self.encoder(self._embedded(ids, at), at, key)[0]

    def everything(self, ids: jax.Array, at: Places) -> None:
        if self.spec.encodes:
            self.encode(ids, at, None)
        self(ids, at, None)

    def _embedded(self, ids: jax.Array, at: Places) -> jax.Array:
        x = lookup(self.embedding["table"], ids)
        if self.spec.scale_embedding:
            x = x * self.spec.d_model**0.5
        if self.spec.n_parts:
            x = x + lookup(self.embedding["parts"], jnp.zeros_like(at.segment) if at.part is None else at.part)
        return x
