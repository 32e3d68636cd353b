"""The block, and a stack of blocks that is scanned or unrolled over the same stacked parameters."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from jaxformer.declarations import Arrays, Declarations, declare
from jaxformer.keys import fold
from jaxformer.mesh import constrained
from jaxformer.model import cache as cache_lib
from jaxformer.model.implementations import CuDNN
from jaxformer.model.layers import FeedForward, LayerNorm, Norm, Out, dropout
from jaxformer.model.masks import Places
from jaxformer.model.mixers import Context, Mixer, MultiHead, Parts
from jaxformer.model.positions import Position
from jaxformer.model.residuals import PreNorm, Residual, Site
from jaxformer.spec import InputError, Spec

EMBED, WEIGHTS, ATTENTION, FEED, CROSS_WEIGHTS, CROSS, INSIDE, RULE = range(8)  # of dropout, and of other draws
LAID_OUT = {"cpu": 12, "gpu": 8}  # groups of layers at most that are not scanned
SITES = {"attention": ATTENTION, "cross_attention": CROSS, "feed_forward": FEED}


class BlockSpec(Spec):
    """What a block is made of."""

    parts: Parts
    mixer: Mixer | None  # None: tokens of a text do not learn of each other
    cross: Parts | None  # of attention to another text; None: there is none
    feed_forward: FeedForward | None
    norm: Norm = LayerNorm()
    residual: Residual = PreNorm()
    dropout: float = 0.0

    @property
    def fused(self) -> bool:
        """Whether attention is a call of cuDNN."""
        kernels = [parts.kernel for mixer, parts in self.mixers.values() if "kernel" in mixer.reads]
        return any(isinstance(getattr(kernel, "implementation", None), CuDNN) for kernel in kernels)

    @property
    def mixers(self) -> dict[str, tuple[Mixer, Parts]]:
        """By the name of their branch."""
        own = {} if self.mixer is None else {"attention": (self.mixer, self.parts)}
        return own | ({} if self.cross is None else {"cross_attention": (MultiHead(), self.cross)})

    @property
    def branches(self) -> tuple[str, ...]:
        """Of the residual stream, those that there are."""
        return (*self.mixers, *(() if self.feed_forward is None else ("feed_forward",)))

    @property
    def same(self) -> frozenset[str]:
        """Slots of the cache that are declared the same in all layers."""
        slots = {} if self.mixer is None else self.mixer.slots(self.parts)
        return frozenset(name for name, slot in slots.items() if slot.same)

    def for_decoding(self, params: Arrays) -> Any:
        """A layer's parameters as a loop over tokens reads them fastest."""
        mixers = {name: mixer for name, (mixer, _) in self.mixers.items() if name in params}
        return {**params, **{name: mixer.for_decoding(params[name]) for name, mixer in mixers.items()}}


class Block(nn.Module):
    """A mixer, attention to another text if there is one, and feed-forward, each a branch of the residual stream."""

    spec: BlockSpec
    n_layers: int
    place: int = 0  # of the first of these layers in the stack

    @nn.compact
    def __call__(self, stream: Any, context: Context) -> Out:
        """Out of the stream; `sums` by branch. `context.key` is the layer's."""
        s, key, outs = self.spec, context.key, dict[str, Out]()
        own = self._declare("residual_enter", s.residual.params("enter", self.n_layers))
        stream = s.residual.enter(own, stream, context.layer, self.n_layers)
        for name in s.residual.order(s.branches):
            branch = fold(key, SITES[name])
            site = self._site(name, context.layer, fold(branch, RULE))
            h = constrained(s.residual.before(stream, site), "BTD")
            outs[name] = self._branch(name, h, context)
            stream = s.residual.after(stream, dropout(branch, outs[name].h, s.dropout), site)
            record(self, **{f"after_{name}": stream, name: {"out": outs[name].h, **outs[name].activations}})
        sums = {name: out.sums for name, out in outs.items() if out.sums}
        written = outs["attention"].cache if "attention" in outs else None
        return Out(stream, context.cache if written is None else written, sums=sums).beside(stream, *outs.values())

    def _branch(self, name: str, h: jax.Array, context: Context) -> Out:
        """What a part gives for its branch."""
        s, key = self.spec, context.key
        if name == "feed_forward":
            assert s.feed_forward is not None
            params = self._declare(name, s.feed_forward.params())
            with jax.named_scope(name):
                return s.feed_forward(params, h, context.at, fold(key, FEED, INSIDE))
        mixer, parts = s.mixers[name]
        params = self._declare(name, mixer.params(parts))
        if name == "attention":
            context = context._replace(memory=None, key=fold(key, WEIGHTS))
        else:
            context = context._replace(cache=None, key=fold(key, CROSS_WEIGHTS))
            if context.memory is None and not self.is_initializing():
                raise ValueError("an encoder–decoder's hidden states need the memory that `encode` returns")
        with jax.named_scope(name):
            return mixer(params, parts, h, context)

    def _site(self, name: str, layer: Any, key: jax.Array | None) -> Site:
        s = self.spec
        more = ["", "_out", *(f"_{i}" for i in range(2, s.residual.n_norms))]
        labels = [f"norm_{name}{each}" for each in more[: s.residual.n_norms]]
        norms = tuple(functools.partial(s.norm, self._declare(label, s.norm.params())) for label in labels)
        params = self._declare(f"residual_{name}", s.residual.params(name, self.n_layers))
        return Site(name, layer, params, key, norms)

    def _declare(self, name: str, params: Declarations) -> Any:
        return declare(self, name, params, self.spec.parts.dims, self.place)


class Group(nn.Module):
    """One block of each kind: what the scan repeats."""

    kinds: tuple[BlockSpec, ...]
    n_layers: int

    @nn.compact
    def __call__(self, stream: Any, scanned: Any, ids: Any, at: Places, shared: Any, key: jax.Array | None) -> Any:
        """The stream; and the written caches, losses, and sums for what is not trained."""
        (first, caches, memories), found = scanned, Out(stream)
        written, sums, names = {}, {}, position_names(self.kinds)
        for i, kind in enumerate(self.kinds):
            name = f"block{i}"
            own = caches and caches[name], memories and memories[name]
            position = shared[names[kind.parts.position]]
            context = Context(ids, at, first + i, position, fold(key, first + i), *own, found.handed)
            out = Block(kind, self.n_layers, i, name=name)(found.h, context)
            lost = {*out.handed} - {*found.handed} - {"seen"}  # which every kernel hands on
            if i + 1 == len(self.kinds) < self.n_layers and (lost or (i == 0 and kind.parts.kernel.shares)):
                raise InputError(
                    f"layers hand on {', '.join(sorted(lost)) or 'what they see'}, and nobody is above them in their "
                    f"group, of {len(self.kinds)} of {self.n_layers} layers; set whole_stack = True in the class of "
                    "the kernel or the mixer"
                )
            written[name], sums = out.cache, sums | ({name: out.sums} if out.sums else {})
            found = found.beside(out.h, out)
        return found.h, (written, found.losses, sums)


class Stack(nn.Module):
    """`n_layers` blocks that repeat a group of kinds, then a last norm if they are pre-norm.

    Parameters, cache and memory of each kind lie stacked along a leading axis L; `unroll` groups are laid out in each
    turn of the scan, over the same parameters and with the same result. More are faster, since a scan copies what each
    turn reads, and slower to compile: None takes all up to 12 on CPUs and 8 on GPUs, and 1 elsewhere, with `remat`, and
    of fused attention (unrolled calls of cuDNN crashed with jax 0.11.2; since `_says_deterministic` they were not run).

    With `remat`, the name of one of jax.checkpoint_policies, a group keeps for the backward pass only what that policy
    says, and computes the rest anew. None keeps all; but where a GPU scans, what products of matrices give and fused
    attention: what a scan keeps it writes and reads once more (LOG.md has the times; `python benchmarks/compare.py gpu
    step --also model.remat=everything_saveable`).
    """

    kinds: tuple[BlockSpec, ...]
    n_layers: int
    normed: bool = False  # the embedded input
    unroll: int | None = None
    remat: str | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        ids: Any,
        at: Places,
        key: jax.Array | None,
        cache: Any = None,
        memory: Any = None,
    ) -> Out:
        s, turns = self.kinds[0], self.n_layers // len(self.kinds)  # norm, residual, dropout are those of all kinds
        shared, n_layers = {}, self.n_layers
        for position, name in position_names(self.kinds).items():
            own = {} if position.per_layer else position.params()
            shared[name] = declare(self, name, own, s.parts.dims)
            x = position.embed(shared[name], x, at)
        if self.normed:
            x = self._norm("norm_embedding", x)
        x = dropout(fold(key, n_layers, EMBED), x, s.dropout)
        record(self, embedded=x)
        own = {
            name: declare(self, f"residual_{name}", s.residual.params(name, n_layers), s.parts.dims)
            for name in ("begin", "end")
        }
        stream = s.residual.begin(own["begin"], x, n_layers)
        layers = self._apart if self.has_variable("params", "layers0") else self._scanned
        stream, (cache, losses, sums) = layers(turns, stream, cache, memory, ids, at, shared, key)
        x = s.residual.end(own["end"], stream)
        if s.residual.last_norm:
            x = self._norm("norm", x)
        record(self, out=x)
        losses = {name: loss.replace(value=loss.value.sum(0)) for name, loss in losses.items()}
        return Out(x, cache, losses, {"layers": sums} if sums else {})

    def _scanned(self, turns: int, stream: Any, cache: Any, memory: Any, *more: Any) -> Any:
        """The stream behind the layers; and caches, losses and sums, stacked."""
        group: Any = Group
        unroll, remat = self._laid_out(turns)
        if remat:  # the scan keeps XLA from merging what is computed anew with what was computed at first
            group = nn.remat(Group, policy=remat, prevent_cse=False)
        layers = nn.scan(
            group,
            variable_axes={"params": 0, "activations": 0},
            split_rngs={"params": True},
            in_axes=(0, *[nn.broadcast] * 4),  # pyright: ignore[reportArgumentType]
            length=turns,
            unroll=unroll,
            metadata_params={nn.PARTITION_NAME: "L", "kinds": len(self.kinds)},
            check_constancy_invariants=False,  # nothing is broadcast out of it; the check traces each layer once more
        )(self.kinds, self.n_layers, name="layers")
        return layers(stream, (jnp.arange(0, self.n_layers, len(self.kinds)), cache, memory), *more)

    def _laid_out(self, turns: int) -> tuple[int, Any]:
        """Groups in a turn of the scan, and the policy of what is kept for the backward pass; None: all."""
        backend, fused = jax.default_backend(), any(kind.fused for kind in self.kinds)
        few = turns <= LAID_OUT.get(backend, 0) and not self.remat and not (backend == "gpu" and fused)
        unroll = min(self.unroll or (turns if few else 1), turns)
        scanned_on_gpu = backend == "gpu" and unroll < turns
        asked = self.remat and getattr(jax.checkpoint_policies, self.remat)
        return unroll, asked or (_products_and_attention if scanned_on_gpu else None)

    def _apart(self, turns: int, stream: Any, cache: Any, memory: Any, *more: Any) -> Any:
        """The same with parameters `for_decoding`, and a cache and a memory `apart`."""
        caches, losses, sums = [], [], []
        for i in range(turns):
            group = Group(self.kinds, self.n_layers, name=f"layers{i}")
            scanned = jnp.int32(i * len(self.kinds)), cache_lib.whole(cache, i), cache_lib.whole(memory, i)
            stream, (written, *found) = group(stream, scanned, *more)
            caches.append(cache and cache_lib.own(written, cache[i]))
            losses.append(found[0])
            sums.append(found[1])
        stacked = lambda trees: jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)
        return stream, (tuple(caches), stacked(losses), stacked(sums))

    def _norm(self, name: str, x: jax.Array) -> jax.Array:
        s = self.kinds[0]
        return s.norm(declare(self, name, s.norm.params(), s.parts.dims), x)


def _products_and_attention(primitive: Any, *operands: Any, **how: Any) -> Any:
    """A policy of jax.checkpoint: keeps what products of matrices give, and what cuDNN's attention does."""
    attention = primitive.name.startswith("dot_product_attention_fwd")
    return attention or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *operands, **how)


def position_names(kinds: Sequence[BlockSpec]) -> dict[Position, str]:
    """What the parameters of each positional scheme of a stack are called; equal schemes share them."""
    found = list(dict.fromkeys(kind.parts.position for kind in kinds))
    return {position: f"position{i if len(found) > 1 else ''}" for i, position in enumerate(found)}


def record(module: nn.Module, **activations: Any) -> None:
    """Leaves activations, or dicts of them, under the module's path and these names, where somebody asked for them."""
    for name, value in activations.items():
        if isinstance(value, dict):
            value = {inner: array for inner, array in value.items() if array is not None}
        module.sow("activations", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: jnp.zeros(()))
