"""The families: specs that wire stacks of the one block. Parameters are plain dicts, and functions of them pure."""

import abc
import collections
import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, TypeVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict
from jaxtyping import Array, Float, Int

from jaxformer.declarations import Arrays, Declarations, Param, declare, draw, map_declared, path_name
from jaxformer.declarations import whole as with_empty
from jaxformer.keys import fold
from jaxformer.model import cache as cache_lib
from jaxformer.model.agreement import as_tuple, check_transformer
from jaxformer.model.blocks import BlockSpec, Stack
from jaxformer.model.heads import Head, LanguageHead
from jaxformer.model.implementations import Asked, Implementation
from jaxformer.model.kernels import Kernel, Softmax
from jaxformer.model.layers import (
    MLP,
    FeedForward,
    GPT2Normal,
    Initializer,
    LayerNorm,
    NoNorm,
    Norm,
    Out,
    add,
    lookup,
)
from jaxformer.model.masks import Bidirectional, Causal, Mask, Places, one_document
from jaxformer.model.mixers import Context, Mixer, MultiHead, Parts
from jaxformer.model.positions import Learned, NoPosition, Position
from jaxformer.model.residuals import PreNorm, Residual
from jaxformer.spec import Spec, within

Params = Mapping[str, Any]
H = TypeVar("H", bound=Head)
Remat = Literal["nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable", "everything_saveable"]
ENCODER, HEAD = 1 << 30, (1 << 30) + 1  # folded into the key of dropout: these have others than the layers


class Model(Spec):
    """What training and generation ask of a model.

    A model is a Flax module, its `network`, and what can be said of it without one.
    """

    d_model: int  # width of the residual stream
    context_length: int  # the longest text that the model sees at once, in tokens
    vocab_size: int | None = None  # how many ids there are; None: as the tokenizer
    head: Head | tuple[Head, ...] = LanguageHead()  # what the model is asked for
    initializer: Initializer = GPT2Normal()  # how parameters are initialised

    keeps_fields = True
    generates = True  # token after token
    encodes = False  # has `encode`: its hidden states need the memory of another text
    sees_ahead = False  # a token's hidden state may depend on some that follow
    sees_answers = False  # and on more of those than a prefix
    tells_parts = False  # the first of two texts in a row from the second
    gives_logits = False  # its hidden states are logits

    def check(self, at: str = "") -> None:
        self.check_sizes(at, "d_model", "context_length", "vocab_size")
        if wrong := [head for head in self.heads if head.reads_logits and not self.gives_logits]:
            kinds = f"{type(wrong[0]).__name__} reads logits, and {type(self).__name__} gives hidden states"
            raise ValueError(f"{at}head={kinds}; take LanguageHead")
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
            if value is not None and value >= 2**31:
                raise ValueError(f"{at}{name}={value} must be less than 2**31: indices are int32")

    @property
    def heads(self) -> tuple[Head, ...]:
        return as_tuple(self.head)

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Column → names of its classes, of the heads that know them."""
        return {head.column: head.classes for head in self.heads if head.column and head.classes}

    @property
    def writes(self) -> bool:
        """Whether it writes text, token after token: one that sees its answers has learned no next token."""
        return self.generates and not self.sees_answers and any(head.writes for head in self.heads)

    @property
    def dims(self) -> dict[str, int]:
        """Letter → size (docs/extend.md, "Letters")."""
        if self.vocab_size is None:
            raise ValueError("model.vocab_size=None must be set before the model is used; take the tokenizer's")
        return {"V": self.vocab_size, "D": self.d_model, "C": self.context_length}

    @property
    def n_residuals(self) -> int:
        """How often the longest residual stream is added to; 0: there is none."""
        return 0

    def params(self) -> Declarations:
        """What the model owns outside its layers: the embedding and the heads. `embedding` has a `table` [V, D]."""
        return {"embedding": {"table": Param("VD", decay=True)}} | {f"head_{h.name}": h.params() for h in self.heads}

    @property
    def stacked(self) -> dict[tuple[str, ...], int]:
        """Modules of which several layers lie stacked, in the order in which they run: path → how many layers."""
        return {}

    def summary(self) -> dict[str, str]:
        """What a run says of it when it starts, besides its size: line by line, by name."""
        return {}

    def implemented(self, tokens: int, dtype: str = "float32", whole: bool = False) -> tuple[Self, str]:
        """The model with the implementations of its kernels chosen, and which and why, for rows of so many tokens,
        computed in that dtype; `whole`: each row is one document, without padding. Raises ValueError for one that
        cannot do what is asked of it."""
        return self, ""

    def refuses_split_heads(self) -> str | None:
        """Why its heads cannot be split over devices; None if they can."""

    @abc.abstractmethod
    def network(self) -> nn.Module:
        """The Flax module behind the model; its `everything` runs all that has parameters."""

    def declared(self) -> Any:
        """The tree of declarations: each parameter's letters, decay and abstract value."""
        return map_declared(lambda box: box, _declared(self))  # a tree of the caller's own

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
        recorded: bool = False,
    ) -> Out:
        """Out of the hidden states [B, T, D] and the cache with the new tokens in it (None if none was given).

        `key` is that of dropout; None means evaluation. `memory` is the h of `encode`, of a model that has it. Ids
        must be less than vocab_size: JAX clamps without a word. Where `recorded`, Out has activations, by name.
        """
        return self._apply(recorded, params, ids, at, key, cache, memory)

    def encode(
        self,
        params: Params,
        ids: Int[Array, "B S"],
        at: Places,
        key: jax.Array | None = None,
        recorded: bool = False,
    ) -> Out:
        """Out of the memory of a text, for `hidden` of another: of rows whose segments are the same numbers."""
        raise NotImplementedError(f"{type(self).__name__} reads one text; take an EncoderDecoder")

    def _apply(self, recorded: bool, params: Params, *args: Any, method: Any = None) -> Out:
        network = self.network()
        if not recorded:
            return network.apply({"params": params}, *args, method=method)  # pyright: ignore[reportReturnType]
        out, more = network.apply({"params": params}, *args, method=method, mutable=["activations"])
        leaves = jax.tree_util.tree_flatten_with_path(more.get("activations", {}))[0]
        return out._replace(activations={path_name(path): value for path, value in leaves})

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
        encoded = Out(None) if source is None else self.encode(params, *source, recorded=True)
        out = self.hidden(params, ids, at, memory=encoded.h, recorded=True)
        found = {**encoded.activations, **out.activations}
        real = jnp.broadcast_to(at.segment > 0, ids.shape)
        for head in self.heads:
            found[f"head_{head.name}/out"] = self.read(params, head, out.h, *head.given(params, real))
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
        raise NotImplementedError(f"{type(self).__name__} has no cache; define `cache` to write token after token")

    def for_decoding(self, params: Params) -> Params:
        """Parameters as a loop over tokens reads them fastest; `hidden` and `logits` take them as well."""
        heads = {f"head_{head.name}": head for head in self.heads if head.writes}
        return {**params, **{name: head.for_decoding(params.get(name, {}), params) for name, head in heads.items()}}

    def apart(self, stacked: Any) -> Any:
        """A cache or a memory for parameters `for_decoding`."""
        return stacked


# Fields that change no number of a trained model.
FREE = ("dropout", "initializer", "unroll", "remat", "kernel.implementation", "position.decay", "head.dropout")


def without_effect(path: str) -> bool:
    """Whether a field, or one within it, of one of several parts too, changes no number of a trained model."""
    return within(path, FREE)


@functools.lru_cache(maxsize=64)  # a run asks for it a dozen times, and each is a trace of the model
def _declared(model: Model) -> Any:
    ids, at = jnp.zeros((1, 1), jnp.int32), one_document(1)
    init = lambda: model.network().init(jax.random.key(0), ids, at, method="everything")["params"]
    return jax.eval_shape(init)


class Embedding(Spec):
    """Ids to vectors, by a table [V, D]."""

    scaled: bool = False  # vectors are multiplied by √d_model (arXiv:1706.03762, section 3.4)
    normed: bool = False  # a norm follows, with positions added, as in BERT
    token_types: int = 0  # how many types of tokens have a vector each, as BERT's two sentences; 0: none

    def check(self, at: str = "") -> None:
        if self.token_types < 0:
            raise ValueError(
                f"{at}token_types={self.token_types} must be at least 0; 2 tells a first text from a second"
            )

    def params(self) -> Declarations:
        types = {"parts": Param("PD", decay=True, sizes={"P": self.token_types})} if self.token_types else {}
        return {"table": Param("VD", decay=True)} | types

    def __call__(self, params: Arrays, ids: Int[Array, "B T"], at: Places) -> Float[Array, "B T D"]:
        x = lookup(params["table"], ids)
        if self.scaled:
            x = x * x.shape[-1] ** 0.5
        if self.token_types:
            part = jnp.zeros_like(at.segment) if at.part is None else jnp.minimum(at.part, self.token_types - 1)
            x = add(x, lookup(params["parts"], part))
        return x


class Decoder(Model):
    """A decoder-only language model (GPT-2 by default); also the base of the other transformers."""

    n_layers: int = 6  # number of blocks
    n_heads: int = 6  # number of query heads
    n_kv_heads: int | None = None  # number of key and value heads; None: n_heads
    head_width: int | None = None  # width of each head; None: d_model / n_heads
    d_ff: int | None = None  # width inside the feed-forward; None: 4 · d_model
    dropout: float = 0.0  # probability of dropout
    embedding: Embedding = Embedding()  # how ids become vectors
    position: Position | tuple[Position, ...] = Learned()  # how places are told; a tuple repeats over layers
    mixer: Mixer | tuple[Mixer, ...] = MultiHead()  # how tokens learn of each other
    kernel: Kernel | tuple[Kernel, ...] | None = Softmax()  # the function inside attention; None: no attention
    mask: Mask | tuple[Mask, ...] = Causal()  # which tokens see which
    feed_forward: FeedForward | tuple[FeedForward, ...] | None = MLP()  # done with each token; None: attention alone
    norm: Norm = LayerNorm()  # how branches are normalised
    residual: Residual = PreNorm()  # how branches join the stream
    qk_norm: Norm = NoNorm()  # how each head's queries and keys are normalised (arXiv:2010.04245)
    bias: bool = False  # whether attention's projections have biases; feed_forward and norm have fields of their own
    qkv_bias: bool | None = None  # whether those of queries, keys and values have; None: as bias
    output_projection: bool = True  # attention ends with a projection; False: its heads side by side, then zeros
    unroll: int | None = None  # groups of layers in a turn of the scan; None: by the device (`Stack`)
    remat: Remat | None = None  # which activations are kept, not recomputed; None: all, or by the device (`Stack`)

    stacks = ("decoder",)  # by name

    def check(self, at: str = "") -> None:
        super().check(at)
        check_transformer(self, at)

    @property
    def generates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return "decoder" in self.stacks

    @property
    def sees_ahead(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not all(kind.parts.mask.causal for kind in self.kinds(self.stacks[-1]))

    @property
    def sees_answers(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return any(kind.parts.mask.sees_answers for kind in self.kinds(self.stacks[-1]))

    @property
    def tells_parts(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.embedding.token_types > 1  # of one alone both parts have it

    @property
    def dims(self) -> dict[str, int]:
        return super().dims | self.widths

    @property
    def widths(self) -> dict[str, int]:
        """Letter → size, whatever the vocabulary."""
        return {
            "D": self.d_model,
            "C": self.context_length,
            "H": self.n_heads,
            "G": self.n_kv_heads or self.n_heads,
            "K": self.head_width or self.d_model // self.n_heads,
            "F": self.d_ff or 4 * self.d_model,
        }

    @property
    def n_residuals(self) -> int:
        return max(1, *(len(kind.branches) * self.layers(s) for s in self.stacks for kind in self.kinds(s)))

    def params(self) -> Declarations:
        return {**super().params(), "embedding": self.embedding.params()}

    @property
    def stacked(self) -> dict[tuple[str, ...], int]:
        kinds = {stack: len(self.kinds(stack)) for stack in self.stacks}
        return {(s, "layers", f"block{i}"): self.layers(s) // n for s, n in kinds.items() for i in range(n)}

    def summary(self) -> dict[str, str]:
        each = [pair for stack in self.stacks for kind in self.kinds(stack) for pair in kind.mixers.values()]
        names = sorted({mixer.summary(parts) for mixer, parts in each})
        return {"attention": ", ".join(names)} if names else {}

    def implemented(self, tokens: int, dtype: str = "float32", whole: bool = False) -> tuple[Self, str]:
        own = self.position, self.mask, self.mixer, *(getattr(self, f"encoder_{n}", ()) for n in ("mask", "mixer"))
        parts = [part for each in own for part in as_tuple(each) if part is not None]
        ours = all(type(part).__module__.startswith("jaxformer.") for part in parts)
        biased = [type(p).__name__ for p in as_tuple(self.position) if type(p).bias is not Position.bias]
        masks, width = as_tuple(self.mask), self.widths["K"]
        asked = Asked(tokens, self.dropout, dtype, width, masks, biased[0] if biased else None, whole, ours)
        found, why = self._implemented(asked)
        if (repeated := found._fused_alike()) > 1:
            found, why = self._implemented(asked._replace(repeated=repeated))
        return found, why

    def _fused_alike(self) -> int:
        """How many calls of cuDNN with the same mask are in a turn of a scan, at most."""
        found = [0]
        for stack in self.stacks:
            kinds = self.kinds(stack)
            alike = collections.Counter(kind.parts.mask for kind in kinds if kind.fused)
            found += [n * min(self.unroll or 1, self.layers(stack) // len(kinds)) for n in alike.values()]
        return max(found)

    def _implemented(self, asked: Asked) -> tuple[Self, str]:
        found, whys = dict[str, Any](), list[str]()
        for name in ("kernel", "cross_kernel"):
            kernels = getattr(self, name, None)
            if kernels is None:
                continue
            try:
                each = [kernel.implemented(asked) for kernel in as_tuple(kernels)]
            except ValueError as error:
                raise ValueError(f"model.{name}.{error}") from None
            found[name] = tuple(kernel for kernel, _ in each) if isinstance(kernels, tuple) else each[0][0]
            whys += [f"{type(kernel.implementation).__name__} ({why})" for kernel, why in each if why]
        return dataclasses.replace(self, **found), ", ".join(dict.fromkeys(whys))

    def refuses_split_heads(self) -> str | None:
        kernels = [kernel for name in ("kernel", "cross_kernel") for kernel in as_tuple(getattr(self, name, None))]
        each = [getattr(kernel, "implementation", None) for kernel in kernels]
        names = {type(one).__name__ for one in each if isinstance(one, Implementation) and not one.splits_heads}
        return f"implementation={min(names)} computes all heads on one device; take another" if names else None

    def layers(self, stack: str) -> int:
        """How many a stack has."""
        return self.n_layers

    @property
    def repeats(self) -> bool:
        """Whether some stack has several groups of layers."""
        return any(self.layers(stack) > len(self.kinds(stack)) for stack in self.stacks)

    def kinds(self, stack: str) -> tuple[BlockSpec, ...]:
        """The blocks of a group, which repeats over the layers of a stack."""
        return self._kinds(stack, self.mask, self.mixer, None)

    def _kinds(
        self,
        stack: str,
        masks: Mask | tuple[Mask, ...],
        mixers: Mixer | tuple[Mixer, ...],
        cross_kernel: Kernel | None,
    ) -> tuple[BlockSpec, ...]:
        each: Any = self.position, self.kernel, masks, mixers, self.feed_forward
        count = math.lcm(*(len(as_tuple(parts)) for parts in each))
        if any(part and part.whole_stack for part in (*as_tuple(self.kernel), *as_tuple(mixers))):
            count = math.lcm(count, self.layers(stack))
        qkv_bias = self.bias if self.qkv_bias is None else self.qkv_bias
        rest = self.qk_norm, qkv_bias, self.bias, self.output_projection, self.dropout
        dims = FrozenDict(self.widths | ({"V": self.vocab_size} if self.vocab_size else {}))
        cross = cross_kernel and Parts(dims, NoPosition(), cross_kernel, Bidirectional(), *rest)

        def kind(i: int) -> BlockSpec:
            position, kernel, mask, mixer, feed_forward = (as_tuple(parts)[i % len(as_tuple(parts))] for parts in each)
            parts = Parts(dims, position, kernel or Softmax(), mask, *rest)
            mixer = mixer if kernel else None
            return BlockSpec(parts, mixer, cross, feed_forward, self.norm, self.residual, self.dropout)

        return tuple(map(kind, range(count)))

    def network(self) -> "Network":
        return Network(self)

    def cache(self, batch_size: int, length: int, dtype: Any = jnp.float32) -> dict[str, Arrays]:
        kinds = self.kinds("decoder")
        turns = self.n_layers // len(kinds)

        def one(kind: BlockSpec) -> Arrays:
            dims = self.dims | {"B": batch_size, "S": kind.parts.mask.span(length)}
            slots = cache_lib.empty({} if kind.mixer is None else kind.mixer.slots(kind.parts), dims, dtype)
            return jax.tree.map(lambda a: jnp.broadcast_to(a, (turns, *a.shape)), slots)

        return {f"block{i}": one(kind) for i, kind in enumerate(kinds)}

    def for_decoding(self, params: Params) -> Params:
        """Each layer's by themselves: a loop that cut them out of the stack would copy them for each token."""
        kinds = {f"block{i}": kind for i, kind in enumerate(self.kinds("decoder"))}
        decoder = dict(params["decoder"])
        for i, group in enumerate(self._groups(decoder.pop("layers"))):
            decoder[f"layers{i}"] = {name: kinds[name].for_decoding(block) for name, block in group.items()}
        return {**super().for_decoding(params), "decoder": decoder}

    def apart(self, stacked: Any) -> Any:
        same = {f"block{i}": kind.same for i, kind in enumerate(self.kinds("decoder"))}
        return stacked and cache_lib.apart(self._groups(stacked), same)

    def _groups(self, stacked: Any) -> list[Any]:
        turns = self.n_layers // len(self.kinds("decoder"))
        return [jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(turns)]


class Encoder(Decoder):
    """A bidirectional encoder (arXiv:1810.04805): each token's hidden state depends on the whole text."""

    mask: Mask | tuple[Mask, ...] = Bidirectional()

    stacks = ("encoder",)


class EncoderDecoder(Decoder):
    """A decoder that also attends to what an encoder makes of another text (arXiv:1706.03762).

    Both share the embedding; each has its own positions.
    """

    n_encoder_layers: int | None = None  # number of blocks of the encoder; None: n_layers
    encoder_mask: Mask | tuple[Mask, ...] = Bidirectional()  # which tokens of the source see which
    encoder_mixer: Mixer | tuple[Mixer, ...] | None = None  # how tokens of the source learn of each other; None: mixer
    cross_kernel: Kernel = Softmax()  # kernel of the decoder's attention to the encoder

    stacks = ("encoder", "decoder")
    encodes = True

    def check(self, at: str = "") -> None:
        self.check_sizes(at, "n_encoder_layers")
        super().check(at)
        if self.cross_kernel.shares:
            raise ValueError(
                f"{at}cross_kernel={type(self.cross_kernel).__name__} needs what other layers hand on, which attention "
                "to another text does not get; take another kernel"
            )

    def layers(self, stack: str) -> int:
        return (self.n_encoder_layers or self.n_layers) if stack == "encoder" else self.n_layers

    def kinds(self, stack: str) -> tuple[BlockSpec, ...]:
        if stack == "encoder":
            return self._kinds(stack, self.encoder_mask, self.encoder_mixer or self.mixer, None)
        return self._kinds(stack, self.mask, self.mixer, self.cross_kernel)

    def encode(
        self,
        params: Params,
        ids: Int[Array, "B S"],
        at: Places,
        key: jax.Array | None = None,
        recorded: bool = False,
    ) -> Out:
        """The memory is keys, values and places of each of the decoder's layers, stacked; read-only from here on."""
        out = self._apply(recorded, params, ids, at, fold(key, ENCODER), method="encode")
        layers, attention = params["decoder"]["layers"], MultiHead()

        def one(parts: Any, name: str) -> Arrays:
            own = lambda p: with_empty(attention.params(parts), p)
            remember = lambda p: attention.remember(own(p), parts, out.h, Context(ids, at))
            with jax.named_scope(f"decoder/layers/{name}/cross_attention"):
                return jax.vmap(remember)(layers[name]["cross_attention"])  # pyright: ignore[reportReturnType]

        kinds = enumerate(self.kinds("decoder"))
        return out._replace(h={f"block{i}": one(kind.cross, f"block{i}") for i, kind in kinds})


class Network(nn.Module):
    """The Flax module behind a transformer."""

    spec: Decoder

    def setup(self) -> None:
        s = self.spec
        own = {name: declare(self, name, params, s.dims) for name, params in s.params().items()}
        self.table = own["embedding"]
        for name in s.stacks:
            setattr(self, name, Stack(s.kinds(name), s.layers(name), s.embedding.normed, s.unroll, s.remat))

    def __call__(self, ids: jax.Array, at: Places, key: jax.Array | None, cache: Any = None, memory: Any = None) -> Out:
        out = self._run(self.spec.stacks[-1], ids, at, key, cache, memory)
        return out if cache is not None else out._replace(cache=None)

    def encode(self, ids: jax.Array, at: Places, key: jax.Array | None) -> Out:
        return self._run("encoder", ids, at, key)._replace(cache=None)

    def everything(self, ids: jax.Array, at: Places) -> None:
        if self.spec.encodes:
            self.encode(ids, at, None)
        self(ids, at, None)

    def _run(self, name: str, ids: jax.Array, at: Places, *rest: Any) -> Out:
        out = getattr(self, name)(self.spec.embedding(self.table, ids, at), ids, at, *rest)
        return out._replace(sums={name: out.sums} if out.sums else {})
