"""Implementations of softmax attention: how a kernel's formula is computed, with the same result but for rounding."""

import abc
import functools
import importlib
import inspect
import itertools
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from jaxformer.declarations import Arrays
from jaxformer.model.cache import PLACE
from jaxformer.model.layers import Out
from jaxformer.model.masks import Bidirectional, Causal, Look, Mask, Range, Window
from jaxformer.spec import Spec

GROUPS = 4  # of queries at most, each with a range of keys of its own: so many programs are compiled for a layer
BLOCKS = "blocks"  # the scope of what computes by blocks: the products of the formula count, not these
HALVES = "bfloat16", "float16"
FUSED = Causal, Window, Bidirectional  # masks that cuDNN computes
NO_DROPOUT = "dropout={} of weights is not in it"
PADDED = 1024  # queries at a time of rows that cuDNN does not take
# XLA's flags that ask for deterministic kernels
DETERMINISTIC = re.compile(r"--xla_gpu_(deterministic|exclude_nondeterministic)_ops(=(true|1))?(\s|$)")
LONG = 256  # tokens of a row from which on a step on CPU gains by `Blocked` (LOG.md)


class Asked(NamedTuple):
    """What attention is to do in training, as far as it is known before anything is compiled."""

    tokens: int  # in a row
    dropout: float = 0.0  # rate of the dropout of weights
    dtype: str = "float32"  # of queries, keys and values
    width: int = 64  # of a head
    masks: tuple[Mask, ...] = (Causal(),)  # those of the layers
    changed: str | None = None  # a part that makes of softmax(scale · QKᵀ + mask) V something else
    whole: bool = False  # each row is one document, without padding
    ours: bool = True  # every part is the package's
    repeated: int = 1  # layers with the same mask in a turn of the scan, at most


class Computed(Protocol):
    """What an implementation sees of a kernel."""

    @property
    def scale(self) -> float | None: ...

    @property
    def changed(self) -> str | None: ...

    def formula(self, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out: ...


class Implementation(Spec):
    """How a kernel's formula is computed."""

    splits_heads = True  # whether heads may be split over devices: `Mesh.tensor`

    def refuses(self, asked: Asked) -> str | None:
        """Why it cannot do what is asked; None if it can."""

    def chosen(self, asked: Asked) -> tuple["Implementation", str]:
        """The implementation that computes what is asked, before anything is compiled, and why it. Raises ValueError if
        it refuses."""
        if reason := self.refuses(asked):
            raise ValueError(f"implementation={type(self).__name__}: {reason}")
        return self, "as asked"

    @abc.abstractmethod
    def __call__(self, kernel: Computed, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        """What the kernel's formula gives of the rest."""


class Plain(Implementation):
    """The formula as it is written: all scores at once, T · S numbers for each head."""

    def __call__(self, kernel: Computed, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        return kernel.formula(params, look, key, rate)


class Auto(Plain):
    """The fastest that can do it: `CuDNN` on an NVIDIA GPU, on CPU `Blocked` for long rows, else `Plain`.

    A run chooses when it starts; a model by itself is `Plain`.
    """

    def chosen(self, asked: Asked) -> tuple[Implementation, str]:
        if jax.default_backend() != "cpu":
            untried = f"{asked.repeated} layers with the same mask are in one turn of the scan, which was never run"
            reason = CuDNN().refuses(asked) or (untried if asked.repeated > 1 else None)
            return (CuDNN(), "it can do what is asked") if reason is None else (Plain(), f"not CuDNN: {reason}")
        if asked.tokens < LONG:
            return Plain(), f"rows of {asked.tokens} tokens"
        if reason := Blocked().refuses(asked):
            return Plain(), reason
        return (Blocked(), f"rows of {asked.tokens} tokens") if asked.ours else (Plain(), "a part of your own")


class CuDNN(Implementation):
    """NVIDIA's fused attention, which keeps no scores: memory grows with T (as arXiv:2307.08691).

    Half precision, rows of one document each, masks `Causal`, `Window` and `Bidirectional`, no dropout of weights: a
    run that trains on something else is refused. Evaluations, whose rows have segments, and texts, which have a cache,
    are computed by the formula, long rows block by block.
    """

    def refuses(self, asked: Asked) -> str | None:
        if reason := _no_cudnn():
            return reason
        if asked.dtype not in HALVES:
            return f"train.compute_dtype={asked.dtype} must be one of {', '.join(HALVES)}"
        if asked.dropout:
            return NO_DROPOUT.format(asked.dropout)
        if asked.changed:
            return f"{asked.changed} changes the formula"
        if other := [type(mask).__name__ for mask in asked.masks if type(mask) not in FUSED]:
            return f"the mask {other[0]} must be Causal, Window or Bidirectional"
        if not asked.whole:
            return "rows have padding or several documents"
        if asked.tokens % 2:
            return f"rows of {asked.tokens} tokens must have an even number of them"
        if asked.repeated > 1 and not _says_deterministic():
            return f"{asked.repeated} layers with the same mask are in one turn of the scan, which XLA fails at"
        widest = 256 if _capability() >= (9, 0) else 128
        if asked.width % 8 or asked.width > widest:
            return f"heads {asked.width} wide must be a multiple of 8, of at most {widest}"
        return None

    def __call__(self, kernel: Computed, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        view = look.view
        if key is not None and rate:
            raise ValueError(f"implementation={type(self).__name__}: {NO_DROPOUT.format(rate)}")
        whole = view.query.rows.whole and view.key.rows.whole and look.q.shape[2] % 2 == 0
        fused = whole and type(view.rule) in FUSED and isinstance(look.bias, float) and kernel.changed is None
        if not fused or look.q.dtype.name not in HALVES:
            return Blocked(PADDED)(kernel, params, look, key, rate)
        q, k, v = look.q, look.seen["k"], look.seen["v"]
        _says_deterministic()
        with jax.named_scope(BLOCKS):
            h = jax.nn.dot_product_attention(
                *(a.swapaxes(1, 2) for a in (q, k, v)),
                scale=kernel.scale,
                is_causal=view.rule.causal,
                local_window_size=(view.rule.size - 1, 0) if isinstance(view.rule, Window) else None,
                implementation="cudnn",
            )
        return kernel.formula(params, look, key, rate)._replace(h=h.swapaxes(1, 2))  # the rest, where it is asked for


def _no_cudnn() -> str | None:
    """Why there is no fused attention on the first device."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.extend.backend.get_backend().platform_version:
        return f"it needs an NVIDIA GPU; this is {jax.default_backend()}"
    if _capability() < (8, 0):
        return f"it needs a GPU of compute capability 8.0; {jax.devices()[0].device_kind} is older"
    return None


@functools.cache
def _says_deterministic() -> bool:
    """Has each backward pass of cuDNN say that it is deterministic, where XLA's kernels are. False: JAX cannot be told.

    XLA writes it to the first of several alike, and then has no plan of the others: a process dies at its first step
    (openxla/xla#46500).
    """
    try:
        within: Any = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        config = within.create_dot_product_attention_backend_config_base
        signature = inspect.signature(config)
        signature.parameters["is_bwd"]
    except (ImportError, AttributeError, KeyError):  # it is none of JAX's interface
        return False

    @functools.wraps(config)
    def saying(*given: Any, **named: Any) -> dict[str, Any]:
        found, asked = config(*given, **named), signature.bind(*given, **named).arguments
        if asked.get("is_bwd") and DETERMINISTIC.search(os.environ.get("XLA_FLAGS", "")):
            found.get("cudnn_fmha_backend_config", {})["force_deterministic"] = True
        return found

    within.create_dot_product_attention_backend_config_base = saying
    return True


def _capability() -> tuple[int, ...]:
    return tuple(int(n) for n in jax.devices()[0].compute_capability.split("."))


class Blocked(Implementation):
    """The formula for some queries at a time, over the keys that the mask leaves them; computed anew for the gradient.

    Memory grows with T, not with T². Keys are left out in steps of a quarter of T, or of `size`: a causal mask saves
    almost half of the products, a window all but its share. Documents of a row must lie one after another, their
    positions counted from 0.
    """

    size: int = 64  # how many queries at a time

    def check(self, at: str = "") -> None:
        if self.size < 1:
            raise ValueError(f"{at}size={self.size} must be at least 1; 64 is usual")

    def refuses(self, asked: Asked) -> str | None:
        return f"dropout={asked.dropout} of weights is drawn for all queries at once" if asked.dropout else None

    def __call__(self, kernel: Computed, params: Arrays, look: Look, key: jax.Array | None, rate: float) -> Out:
        formula = kernel.formula
        if key is not None and (reason := self.refuses(Asked(look.q.shape[2], rate))):
            raise ValueError(f"implementation={type(self).__name__}: {reason}")
        whole, T = formula(params, look, key, rate), look.q.shape[2]  # of which only what is used is computed
        if self.size >= T:
            return whole
        S = look.view.key.position.shape[1]
        own = look.seen.get("position")
        alike = own is not None and own is look.new.get("position")  # the keys are the queries' own tokens
        alike = alike and {*look.seen} <= {*PLACE, *look.slots}  # of others nobody says which axis is cut
        back, ahead = look.view.rule.reach() if alike else (None, None)
        step = -(-(T // self.size) // GROUPS) * self.size
        edges = [*range(0, T - T % self.size, step), T - T % self.size, T]
        parts: list[jax.Array] = []
        for first, last in itertools.pairwise(dict.fromkeys(edges)):
            low = 0 if back is None else max(0, first - back)
            high = S if ahead is None else min(S, last + ahead)
            size = min(self.size, last - first)

            def block(at: jax.Array, params: Any, look: Look, size: int = size, keys: Range = (low, high - low)) -> Any:
                return formula(params, look.cut((at, size), keys), key, rate).h

            with jax.named_scope(BLOCKS):
                parts.append(_in_turn(block, np.arange(first, last, size, dtype=np.int32), params, look))
        return whole._replace(h=jnp.concatenate(parts, 2))


def _in_turn(block: Callable[..., jax.Array], firsts: Any, params: Arrays, look: Look) -> jax.Array:
    """block(first, params, look) [B, H, size, M] of N known numbers, in turn, side by side: [B, H, N · size, M].

    The backward pass computes each block anew and adds up its gradients. jax.checkpoint in a scan would keep the masks
    of all blocks, T · S numbers, as they depend on nothing that is differentiated.
    """
    arrays = params, look.q, look.new, look.seen, look.bias_params, look.view.query, look.view.key
    leaves, tree = jax.tree.flatten(arrays)
    real = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]

    def one(at: jax.Array, floats: Sequence[jax.Array], rest: Sequence[jax.Array]) -> jax.Array:
        of = {True: iter(floats), False: iter(rest)}
        params, q, *others, query, key = tree.unflatten([next(of[is_real]) for is_real in real])
        view = look.view._replace(query=query, key=key)
        new, seen, bias_params = others
        return block(at, params, look._replace(q=q, new=new, seen=seen, view=view, bias_params=bias_params))

    @jax.custom_vjp
    def run(floats: Any, rest: Any) -> jax.Array:
        found = jax.lax.scan(lambda _, at: (None, one(at, floats, rest)), None, firsts)[1]
        return jnp.moveaxis(found, 0, 2).reshape(*found.shape[1:3], -1, found.shape[-1])

    def backward(saved: Any, g: jax.Array) -> Any:
        floats, rest = saved
        size = g.shape[2] // len(firsts)

        def body(total: Any, at: jax.Array) -> Any:
            pull = jax.vjp(lambda floats: one(at, floats, rest), floats)[1]
            grads = pull(jax.lax.dynamic_slice_in_dim(g, at - firsts[0], size, 2))[0]
            return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads), None

        zeros = [jnp.zeros(a.shape, jnp.promote_types(a.dtype, jnp.float32)) for a in floats]
        total = jax.lax.scan(body, zeros, firsts)[0]
        return [a.astype(b.dtype) for a, b in zip(total, floats, strict=True)], None

    run.defvjp(lambda *inputs: (run(*inputs), inputs), backward)
    return run(*([a for a, is_real in zip(leaves, real, strict=True) if is_real is kind] for kind in (True, False)))
