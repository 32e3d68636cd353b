"""What goes together in a transformer: parts and sizes of which a model can be made."""

import dataclasses
from typing import Any, TypeVar

from jaxformer.model.layers import OneLayer, ReLU, Square, SquaredReLU, ZeroOutputs, check_dropout
from jaxformer.model.mixers import FIELDS, HEADS, MultiHead
from jaxformer.model.positions import NoPosition, Position
from jaxformer.model.residuals import ReZero
from jaxformer.spec import Spec

T = TypeVar("T")


def as_tuple(parts: T | tuple[T, ...]) -> tuple[T, ...]:
    """The parts of a field that may have one, or several that repeat over layers."""
    return parts if isinstance(parts, tuple) else (parts,)


def check_transformer(model: Any, at: str) -> None:
    """Raises ValueError for parts and sizes of which no model can be made."""
    model.check_sizes(at, "n_layers", "n_heads", "n_kv_heads", "head_width", "d_ff", "unroll")
    check_dropout(model.dropout, at)
    if model.feed_forward is None and model.kernel is None:
        raise ValueError(f"{at}kernel=None and {at}feed_forward=None leave nothing of a block; set one of them")
    _check_zeros(model, at)
    for position in as_tuple(model.position):
        if position.per_layer and type(position).embed is not Position.embed:
            name = type(position).__name__
            raise ValueError(f"{at}position={name} embeds above the layers; it cannot have per_layer = True")
    for stack in model.stacks:
        _check_stack(model, at, stack)
    if model.remat and not model.repeats and model.n_layers > 1:
        raise ValueError(
            f"{at}remat={model.remat!r} computes a group of layers anew, and all of them are one, as none repeats or "
            "they hand on what they see: it would save nothing; leave it out"
        )
    _check_read(model, at)


def _check_zeros(model: Any, at: str) -> None:
    """Where outputs begin at zero, something behind, before or beside them must not: else no gradient reaches any."""
    rezero = isinstance(model.residual, ReZero) and model.residual.start == 0
    zeros = isinstance(model.initializer, ZeroOutputs)
    branches = {name for stack in model.stacks for kind in model.kinds(stack) for name in kind.branches}
    off = sorted(name for name in branches if not getattr(model.residual, name, True))
    written = off if model.output_projection else {*off} & {"feed_forward"}  # by a matrix
    if (rezero and off) or (zeros and written):
        which, what = min(off if rezero else written), "residual=ReZero" if rezero else "initializer=ZeroOutputs"
        raise ValueError(
            f"{at}residual.{which}=False leaves nothing of the stream but what {at}{what} begins at zero, through "
            "which no gradient reaches what is below; True adds the stream to it"
        )
    if zeros and rezero:
        raise ValueError(
            f"{at}residual=ReZero and {at}initializer=ZeroOutputs both begin at zero, and no layer would ever learn; "
            f"take one of them, or {at}residual.start=1"
        )
    flat = ReLU, SquaredReLU, Square  # at zero
    if zeros and any(isinstance(p, OneLayer) and isinstance(p.activation, flat) for p in as_tuple(model.feed_forward)):
        raise ValueError(
            f"{at}feed_forward=OneLayer has an activation behind the matrix that {at}initializer=ZeroOutputs begins at "
            "zero, and would never learn; take another of them"
        )


def _check_stack(model: Any, at: str, stack: str) -> None:
    kinds, n_layers = model.kinds(stack), model.layers(stack)
    if not kinds or n_layers % len(kinds):
        raise ValueError(
            f"{at}position, {at}mixer, {at}kernel, {at}mask and {at}feed_forward make {len(kinds)} kinds of layers, "
            f"which must divide the {n_layers} layers of the {stack}"
        )
    if model.remat and model.unroll and model.unroll >= n_layers // len(kinds) > 1:
        raise ValueError(f"{at}remat={model.remat!r} needs a scan: {at}unroll={model.unroll} must be less; 1 does")
    spans = {kind.parts.mask.span(model.context_length) for kind in kinds}
    for mask in (kind.parts.mask for kind in kinds):
        longest, half = mask.span(model.context_length), model.context_length // 2
        if half and mask.span(half) not in (half, longest):
            raise ValueError(
                f"{at}mask: {type(mask).__name__}.span must be the length up to some length, and the same for all "
                f"longer ones; it is {mask.span(half)} of {half}, and {longest} of {model.context_length}"
            )
    if len(spans) > 1 and any(kind.parts.kernel.shares for kind in kinds):
        raise ValueError(f"{at}mask: layers that hand on what they see must see as far back as one another")
    for kind in kinds:
        mask, mixer = kind.parts.mask, kind.mixer
        if mixer and mixer.causal and not mask.causal:
            raise ValueError(
                f"{at}mixer={type(mixer).__name__} sees the past alone, but the {stack}'s mask is "
                f"{type(mask).__name__}; take MultiHead there, or a mixer that heeds the mask"
            )
        for name, part in (("mixer", mixer), ("feed_forward", kind.feed_forward)):
            if part and part.sees_ahead and not mask.sees_answers:
                raise ValueError(
                    f"{at}{name}={type(part).__name__} looks ahead, and the {stack}'s mask {type(mask).__name__} does "
                    "not: it would see the answer; take an Encoder, or another part"
                )


def _check_read(model: Any, at: str) -> None:
    """What no mixer reads is not to be set in vain; and what one reads must suit it."""
    kinds = [kind for stack in model.stacks for kind in model.kinds(stack)]
    each = [pair for kind in kinds for pair in kind.mixers.values()]
    read = {name for kind in kinds if kind.mixer for name in kind.mixer.reads}
    if model.encodes:  # cross-attention has a kernel of its own, no position and no mask
        read |= {*FIELDS} - {"position", "kernel", "mask"}
    names = ", ".join(sorted({type(mixer).__name__ for mixer, _ in each}))
    if model.kernel is None and model.mixer != MultiHead():
        raise ValueError(
            f"{at}kernel=None leaves no attention, and {at}mixer={names or model.mixer}: leave one of them out"
        )
    for field in dataclasses.fields(model):
        value = getattr(model, field.name)
        unread = field.name in FIELDS and field.name not in read and model.kernel is not None
        if field.name == "position":
            given = [type(p) for p in as_tuple(value) if type(p) is not NoPosition]
            unread = unread and any(kind.embed is Position.embed for kind in given)
        if unread and value != field.default:
            text = type(value).__name__ if isinstance(value, Spec) else value
            raise ValueError(f"{at}{field.name}={text} is not read by {at}mixer={names}; leave it at its default")
    if {*HEADS} & read:
        _check_heads(model, at)
    for mixer, parts in each:
        mixer.check_parts(parts, at)


def _check_heads(model: Any, at: str) -> None:
    if model.head_width is None and model.d_model % model.n_heads:
        fits = max(n for n in range(1, min(model.n_heads, model.d_model) + 1) if model.d_model % n == 0)
        raise ValueError(f"{at}n_heads={model.n_heads} must divide {at}d_model={model.d_model}; {fits} does")
    if model.n_kv_heads and model.n_heads % model.n_kv_heads:
        raise ValueError(
            f"{at}n_kv_heads={model.n_kv_heads} must divide {at}n_heads={model.n_heads}; "
            f"1 always does, and {model.n_heads} gives every query head its own"
        )
    heads = model.n_heads * (model.head_width or model.d_model // model.n_heads)
    if not model.output_projection and heads > model.d_model:
        raise ValueError(
            f"{at}output_projection=False leaves the heads side by side, {heads} numbers, more than "
            f"{at}d_model={model.d_model}; True projects them, and a smaller {at}head_width fits"
        )
