"""Mixers: how the tokens of a text, or of two, learn of each other. Multi-head attention is one."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxformer.declarations import Arrays, Declarations, Param, Slot
from jaxformer.model import cache as cache_lib
from jaxformer.model.kernels import Kernel
from jaxformer.model.layers import NoNorm, Norm, Out, biased, linear, lookup, ones, weighted
from jaxformer.model.masks import ANY, Look, Mask, Places, Rows, View
from jaxformer.model.positions import Position
from jaxformer.spec import Spec

# Fields of a Decoder that are a mixer's to read. One that no mixer of a model reads must be at its default.
HEADS = ("n_heads", "n_kv_heads", "head_width")
FIELDS = (*HEADS, "position", "kernel", "mask", "qk_norm", "bias", "qkv_bias", "output_projection")


class Context(NamedTuple):
    """What a mixer is given besides its tokens x [B, T, D]."""

    ids: Int[Array, "B T"]
    at: Places
    layer: Int[Array, ""] | int = 0  # its number in the stack, from 0; traced
    position: Mapping[str, jax.Array] = {}  # parameters of the position, unless they are per layer
    key: jax.Array | None = None  # of dropout; None means evaluation
    cache: Arrays | None = None
    memory: Arrays | None = None  # of cross-attention: what `remember` made of the other text
    below: Mapping[str, Any] = {}  # what layers below in the group have handed on


class Parts(Spec):
    """The fields of a block that a mixer may read, and the sizes of letters."""

    dims: Mapping[str, int]
    position: Position
    kernel: Kernel
    mask: Mask
    qk_norm: Norm = NoNorm()
    qkv_bias: bool = False
    output_bias: bool = False
    output_projection: bool = True
    dropout: float = 0.0  # of attention's weights


class Mixer(Spec):
    """A part that mixes tokens."""

    causal = False  # True: a token sees nothing later, whatever the mask
    sees_ahead = False  # True: a token sees later ones, whatever the mask
    whole_stack = False  # True: the group, in which layers hand on, is all layers of the stack
    reads: ClassVar[tuple[str, ...]] = ()  # of FIELDS, those that it reads

    def check_parts(self, parts: Parts, at: str) -> None:
        """Raises ValueError for parts and sizes that it cannot use; `at` is "model."."""

    def summary(self, parts: Parts) -> str:
        """What a run calls it when it starts."""
        return type(self).__name__

    def params(self, parts: Parts) -> Declarations:
        return {}

    def slots(self, parts: Parts) -> dict[str, Slot]:
        """Room in the cache. Entries for tokens need those of their places, too: `place_slots`, which `place` fills."""
        return {}

    def for_decoding(self, params: Any) -> Any:
        """Parameters, which it takes as well, as a loop over tokens reads them fastest."""
        return params

    @abc.abstractmethod
    def __call__(self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], context: Context) -> Out:
        """Out([B, T, D], the written cache): None if there was none."""


class MultiHead(Mixer):
    """Multi-head attention (arXiv:1706.03762) with grouped key/value heads (arXiv:2305.13245).

    Given a memory, it is cross-attention: keys and values are those that `remember` made of another text.
    """

    reads = FIELDS

    def check_parts(self, parts: Parts, at: str) -> None:
        parts.position.check_width(parts.dims["K"], at)
        parts.kernel.check_sizes(parts.dims, at)

    def summary(self, parts: Parts) -> str:
        return type(parts.kernel).__name__

    def params(self, parts: Parts) -> Declarations:
        project: dict[str, Param] = {}
        for name in (*parts.kernel.projections, *("o" if parts.output_projection else "")):
            heads = "HK" if name in "qo" else "GK"
            into, out = (heads, "D") if name == "o" else ("D", heads)
            project[name] = Param(f"{into}->{out}")
            if parts.output_bias if name == "o" else parts.qkv_bias:
                project[f"{name}_bias"] = Param(out, fan_in=into)
        return {
            "project": project,
            **{f"norm_{name}": parts.qk_norm.params("K") for name in "qk" if name in parts.kernel.projections},
            "kernel_params": parts.kernel.params(),
            "position_params": parts.position.params() if parts.position.per_layer else {},
        }

    def slots(self, parts: Parts) -> dict[str, Slot]:
        own = parts.kernel.slots()
        return place_slots(parts) | own | parts.position.slots() if own else {}

    def for_decoding(self, params: Any) -> Any:
        """With matrices of two axes: XLA on CPU fuses a reshape into a product of one row, then ten times slower."""
        flat = lambda name, a: a.reshape(-1, a.shape[-1]) if name == "o" else a.reshape(len(a), -1)
        project = params["project"].items()
        return {**params, "project": {name: a if "bias" in name else flat(name, a) for name, a in project}}

    def values(
        self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B G T K"]:
        """What the tokens x are worth to queries."""
        return _heads(params, parts, x, "v")

    def remember(self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], context: Context) -> Arrays:
        """What the tokens x leave behind for queries to look at."""
        at, cache, position = context.at, context.cache, _of_position(params, parts, context)
        k = parts.position.rotate(position, _normed(params, parts, x, "k"), at)
        more = parts.position.remember(position, k, at, cache)
        v = self.values(params, parts, x, context)
        return {**place(parts, at), **more, **parts.kernel.remember(params["kernel_params"], k, v, at, cache)}

    def gather(
        self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], h: Float[Array, "B H T K"]
    ) -> Float[Array, "B T D"]:
        """What heads give to the tokens x, side by side, and projected."""
        B, H, T, K = h.shape
        h = h.swapaxes(1, 2).reshape(B, T, H * K)
        if parts.output_projection:
            return biased(linear(h, params["project"]["o"].reshape(H * K, -1)), params["project"], "o_bias")
        return jnp.pad(h, ((0, 0), (0, 0), (0, parts.dims["D"] - H * K)))

    def __call__(self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], context: Context) -> Out:
        position, at, cache, handed = _of_position(params, parts, context), context.at, context.cache, {}
        q = parts.position.rotate(position, _normed(params, parts, x, "q"), at)
        rows = at.rows if cache is None and context.memory is None else ANY
        if context.memory is None:
            new, slots = self.remember(params, parts, x, context), self.slots(parts)
            seen, cache = cache_lib.update(cache, new, slots) if slots else (new, cache)
            seen, handed = parts.kernel.share(params["kernel_params"], seen, context.below)
        else:
            new, seen = {}, context.memory  # the queries' own tokens are not looked at
        view = view_of(parts, at, seen, rows)
        look = Look(q, new, seen, view, self.slots(parts), parts.position.bias, position)
        out = parts.kernel(params["kernel_params"], look, context.key, parts.dropout)
        h = self.gather(params, parts, x, out.h)
        kept = {"q": q, "k": seen.get("k"), "v": seen.get("v"), "values": out.h, **out.activations}
        sums = {"kernel_params": out.sums} if out.sums else {}
        return Out(h, cache, out.losses, sums, handed, kept)


class ValueEmbeddings(MultiHead):
    """MultiHead whose values have a learned vector for each id added, times a learned number for each head that begins
    at 1 (modded-nanogpt, nanochat). Tables are each layer's own; of cross-attention there is none."""

    def summary(self, parts: Parts) -> str:
        return f"{super().summary(parts)} with value embeddings"

    def check_parts(self, parts: Parts, at: str) -> None:
        super().check_parts(parts, at)
        if "v" not in parts.kernel.projections:
            raise ValueError(f"{at}mixer=ValueEmbeddings needs values, and {type(parts.kernel).__name__} looks at none")

    def params(self, parts: Parts) -> Declarations:
        return {**super().params(parts), "embedding": {"table": Param("VGK"), "gain": Param("G", ones)}}

    def values(
        self, params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], context: Context
    ) -> Float[Array, "B G T K"]:
        own = params["embedding"]
        table = own["table"].reshape(len(own["table"]), -1)  # [V, G · K]
        more = lookup(table, context.ids).reshape(*x.shape[:2], *own["table"].shape[1:]).swapaxes(1, 2)  # [B, G, T, K]
        return super().values(params, parts, x, context) + weighted((own["gain"][:, None, None], more))


def view_of(parts: Parts, at: Places, seen: Arrays, rows: Rows = ANY) -> View:
    """Queries at their places, and keys at those that they have left in the slots; `rows` tells of the keys'."""
    return View(at, Places(seen["position"], seen["segment"], seen.get("part"), rows), parts.mask, parts.dims["H"])


def place_slots(parts: Parts) -> dict[str, Slot]:
    """Those in which a cached token's place is kept, as the mask reads it."""
    return cache_lib.PLACE | (cache_lib.PART if parts.mask.reads_part else {})


def place(parts: Parts, at: Places) -> dict[str, jax.Array]:
    """What tokens leave in `place_slots`."""
    second = {"part": jnp.ones_like(at.segment)} if parts.mask.reads_part else {}
    own = {"position": at.position, "segment": at.segment, "part": at.part}
    return second | {name: array for name, array in own.items() if array is not None}


def _of_position(params: Mapping[str, Any], parts: Parts, context: Context) -> Arrays:
    return params["position_params"] if parts.position.per_layer else context.position


def _normed(params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], name: str) -> Float[Array, "B H T K"]:
    """Queries or keys, normed; zeros where the kernel does not look at them."""
    heads = _heads(params, parts, x, name)
    return parts.qk_norm(params[f"norm_{name}"], heads) if name in params["project"] else heads


def _heads(params: Mapping[str, Any], parts: Parts, x: Float[Array, "B T D"], name: str) -> Float[Array, "B H T K"]:
    """Queries, keys or values of each head."""
    own = params["project"]
    if name not in own:  # the kernel does not look at it
        return jnp.zeros((len(x), parts.dims["H" if name == "q" else "G"], x.shape[1], parts.dims["K"]), x.dtype)
    h = linear(x, own[name]).reshape(*x.shape[:2], -1, parts.dims["K"])
    return biased(h, own, f"{name}_bias").swapaxes(1, 2)
