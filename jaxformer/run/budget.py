"""What a run would ask of each of its devices: memory by kind, communication, operations. Nothing is allocated: all is
read off declarations, abstract shapes and jaxprs."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.declarations import by_path, map_declared, selected, trained, updated
from jaxformer.mesh import AXES, ROWS, partition, partitions, vocabulary_part
from jaxformer.model.models import Decoder, Model
from jaxformer.run.inspection import human, model_flops
from jaxformer.run.plan import abstract_batches, abstract_state, check_mesh, implemented, planned_recipe
from jaxformer.run.step import Recipe
from jaxformer.spec import InputError

log = logging.getLogger(__name__)
# Of `model.remat`, from what keeps most to what computes most anew.
POLICIES = None, "dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"


def plan(
    config: Config | str | Path,
    overrides: Mapping[str, Any] | None = None,
    devices: int | None = None,
    device_memory: float | None = None,
    peak_flops: float | None = None,
) -> dict[str, Any]:
    """`budget` of a config on so many devices (None: those of this machine, by its own mesh); a mesh of one, of which
    more are asked for, is taken for fsdp=−1. Reads the corpus only if sizes depend on it."""
    if devices is not None and devices < 1:
        raise InputError(f"devices={devices} must be at least 1, such as 8; left out, it is those of this machine")
    config, count = config_lib.resolve(config, overrides), devices or jax.device_count()
    if devices and all(getattr(config.mesh, axis) == 1 for axis in AXES):
        config = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, fsdp=-1))
    return budget(config, planned_recipe(config), count, device_memory, peak_flops)


def budget(
    config: Config, recipe: Recipe, devices: int, device_memory: float | None = None, peak_flops: float | None = None
) -> dict[str, Any]:
    """Bytes of each device by kind, what it sends in a step by axis of the mesh, and operations, as JSON values.

    `params_bytes`, `optimizer_bytes`, `ema_bytes` and `batches_bytes` are what a step is given. Beside these it holds
    `gradients_bytes`; `cast_bytes`, parameters in the dtype of the computation; `gathered_bytes`, those of two layers
    put together under fsdp; `activations_bytes`, what the forward pass of a slice keeps for the backward pass under
    `model.remat`; `logits_bytes` of the places that are computed at once, and their gradient. `estimated_bytes` is the
    sum; the compiler's own choices come on top, and take something off. `policies` says of each value of `remat` how
    many rows of a slice a device has room for, given its memory in bytes. Bytes that are sent are those of ring
    algorithms. `seconds_at_peak` is the time of a step in which nothing but its products took any, given a device's
    FLOP/s. Raises InputError as `train` would, but for what the corpus may bring.
    """
    sizes = check_mesh(config, recipe, devices)
    works = _Works(config, recipe, sizes)
    found = _needs(config, recipe, sizes, works)
    total, own = found["estimated_bytes"], getattr(recipe.model, "remat", None)
    fixed = total - found["activations_bytes"] - found["logits_bytes"]
    policies = [works.policy(name, fixed, device_memory) for name in works.policies]
    seconds = None if peak_flops is None else found["flops_per_step"] / math.prod(sizes.values()) / peak_flops
    advice = None if device_memory is None else _advice(config, works, found, device_memory, own, policies)
    return found | {"policies": policies, "seconds_at_peak": seconds, "advice": advice}


def needs(config: Config, recipe: Recipe, devices: int) -> dict[str, Any]:
    """`budget` but for what another policy, memory or device would change."""
    sizes = check_mesh(config, recipe, devices)
    return _needs(config, recipe, sizes, _Works(config, recipe, sizes))


def _needs(config: Config, recipe: Recipe, sizes: Mapping[str, int], works: "_Works") -> dict[str, Any]:
    declared, itemsize = recipe.every_declared(), jnp.dtype(recipe.compute_dtype).itemsize
    state, knobs = abstract_state(config, recipe), config.train
    moved = trained(state.params, config.optimizer.frozen(recipe.declared()))
    whole = jax.eval_shape(recipe.whole, state.params, state.base)
    cast = jax.eval_shape(recipe.cast, whole)
    halves = {path: a.dtype.itemsize < 4 for path, a in by_path(cast).items()}
    split = lambda tree: _bytes(tree, declared, sizes)
    made = {} if recipe.adapter is None else recipe.adapter.reached(recipe.model.declared(), cast)
    is_made = by_path(made).keys()  # by a step, of the base and what is trained beside it; each has a gradient
    batches = abstract_batches(config, recipe, min(knobs.steps_per_call, knobs.steps))
    kinds = {
        "params_bytes": split(state.params) + split(state.base),
        "optimizer_bytes": split(state.opt_state),
        "ema_bytes": split(state.ema),
        "batches_bytes": sum(_size(a) for a in batches.values()) // math.prod(sizes[axis] for axis in ROWS),
        "gradients_bytes": split(moved) * min(knobs.accumulation, 2) + split(made),
        "cast_bytes": split(selected(cast, recipe.model.declared(), lambda path, _: halves[path] or path in is_made)),
        "gathered_bytes": _gathered(recipe, sizes),
    }
    kinds["activations_bytes"], kinds["logits_bytes"] = works.of(works.rows, getattr(recipe.model, "remat", None))
    sent = _sent(config, recipe, sizes, works.rows, itemsize)
    n_tokens = config.data.batch_size * config.window
    return {
        "devices": math.prod(sizes.values()),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in sizes.items()),
        "attention": implemented(config, config.model)[1],
        "n_params": sum(a.size for a in jax.tree.leaves((state.params, state.base))),
        "n_trained": sum(a.size for a in jax.tree.leaves(moved)),
        "vocab_size": recipe.model.vocab_size,
        "tokens_per_step": n_tokens,
        "tokens_in_all": n_tokens * knobs.steps,
        "rows_of_a_slice": works.rows,
        **kinds,
        "estimated_bytes": sum(kinds.values()),
        **{f"sent_{axis}_bytes": count for axis, count in sent.items()},
        "flops_per_step": model_flops(recipe, _slice(config, recipe, config.data.batch_size)),
    }


def render(found: Mapping[str, Any]) -> str:
    """What `budget` gives, for people."""
    lines = list[str]()
    for name, value in found.items():
        if name == "policies":
            for row in value:
                room = f"; a device has room for slices of {row['rows']:,} rows" if "rows" in row else ""
                each = f"{human(row['bytes_per_row'], 'B')} of activations a row"
                lines.append(f"remat={row['remat'] or 'none'}: {each}{room}")
        elif name.endswith("bytes"):
            lines.append(f"{name:18} {human(value, 'B')}")
        elif value not in ("", None):
            shown = f"{value:,.4f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
            lines.append(f"{name:18} {shown}")
    return "\n".join(lines)


class _Works:
    """What slices of so many rows keep."""

    def __init__(self, config: Config, recipe: Recipe, sizes: Mapping[str, int]):
        self._config, model = config, _share(recipe.model, sizes["tensor"])
        self.rows = config.slice_rows // math.prod(sizes[axis] for axis in ROWS)  # of a slice, on one device
        # Layers alike need be traced but once; on a GPU what is kept depends on how many are laid out.
        if isinstance(model, Decoder) and jax.default_backend() != "gpu":
            model = dataclasses.replace(model, unroll=1)
        self._recipe, self.policies = dataclasses.replace(recipe, model=model), (None,)
        if isinstance(model, Decoder) and (model.repeats or model.n_layers == 1):
            self.policies = POLICIES if model.remat in POLICIES else (*POLICIES, model.remat)
        self._known: dict[Any, tuple[int, int]] = {}

    def of(self, rows: int, remat: str | None) -> tuple[int, int]:
        """Bytes of activations, and of logits."""
        if (rows, remat) not in self._known:
            recipe = self._recipe
            if isinstance(recipe.model, Decoder):
                recipe = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, remat=remat))
            self._known[rows, remat] = _kept(self._config, recipe, rows)
        return self._known[rows, remat]

    def policy(self, remat: str | None, fixed: int, memory: float | None) -> dict[str, Any]:
        """Bytes of a row of a slice; and how many rows a device has room for beside what is fixed."""
        first = self.rows
        least, more = (sum(self.of(rows, remat)) for rows in (first, 2 * first))
        row = max((more - least) // first, 1)
        if memory is None:
            return {"remat": remat, "bytes_per_row": row}
        rows = max(int((memory - fixed - least) // row) + first, 0)
        while rows and (over := fixed + sum(self.of(rows, remat)) - memory) > 0:  # chunks of logits make it no line
            rows = max(rows - max(1, int(over // row)), 0)
        return {"remat": remat, "bytes_per_row": row, "rows": rows}


def saved(config: Config, recipe: Recipe, rows: int) -> list[Any]:
    """What the forward pass of a slice of so many rows keeps for its backward pass, besides parameters and batch: the
    abstract arrays that `jax.ad_checkpoint.print_saved_residuals` would list."""
    declared, adapter = recipe.model.declared(), recipe.adapter
    dtype = lambda box: recipe.dtype_of(box) if box.trained else "float32"
    params = map_declared(lambda box: jax.ShapeDtypeStruct(box.value.shape, dtype(box)), declared)

    def kept(moved: Any, params: Any, example: Any) -> Any:
        def loss(moved: Any) -> jax.Array:
            return recipe.objective.loss(recipe.model, updated(params, moved), example, jax.random.key(0)).minimised

        return jax.tree.leaves(jax.vjp(loss, moved)[1])

    if adapter is None:
        moved = trained(params, config.optimizer.frozen(declared))
    else:
        moved = adapter.reached(declared, params)
    jaxpr = jax.make_jaxpr(kept)(moved, params, _example(config, recipe, rows)).jaxpr
    given = set(jaxpr.invars)
    own = {id(v): v for v in jaxpr.outvars if not isinstance(v, Literal) and v not in given}
    return [v.aval for v in own.values()]


def _example(config: Config, recipe: Recipe, rows: int) -> Any:
    prepare = lambda batch: recipe.objective.prepare(batch, jax.random.key(0))
    return jax.eval_shape(prepare, _slice(config, recipe, rows))


def _slice(config: Config, recipe: Recipe, rows: int) -> dict[str, Any]:
    """The shapes of a batch of so many rows."""
    shapes = abstract_batches(config, recipe, 1)
    return {name: jax.ShapeDtypeStruct((rows, *a.shape[2:]), a.dtype) for name, a in shapes.items()}


def _kept(config: Config, recipe: Recipe, rows: int) -> tuple[int, int]:
    """Bytes of what is saved; and of logits with their gradient, of a chunk or of all places."""
    model, vocabulary, chunk = recipe.model, recipe.model.vocab_size or 0, list[int | None]()

    def ask(example: Any) -> Any:
        h = jnp.zeros((*example.ids.shape, model.dims["D"]), recipe.compute_dtype)
        chunk.append(recipe.objective.chunk_size(model, h, example))

    jax.eval_shape(ask, _example(config, recipe, rows))
    arrays = saved(config, recipe, rows)
    is_logits = lambda a: len(a.shape) > 2 and a.shape[-1] == vocabulary and a.dtype == jnp.float32
    logits = sum(_size(a) for a in arrays if is_logits(a))
    alive = 8 * rows * chunk[0] * vocabulary if chunk[0] else 2 * logits
    return sum(_size(a) for a in arrays if not is_logits(a)), alive


def _share(model: Model, tensor: int) -> Model:
    """The model of what one device of the axis computes."""
    if tensor == 1 or not isinstance(model, Decoder):
        return model
    of = model.widths
    return dataclasses.replace(
        model,
        n_heads=of["H"] // tensor,
        n_kv_heads=of["G"] // tensor,
        head_width=of["K"],
        d_ff=of["F"] // tensor,
        vocab_size=vocabulary_part(model.vocab_size or 0, tensor),
    )


def _bytes(tree: Any, declared: Any, sizes: Mapping[str, int]) -> int:
    """Of one device."""
    of = lambda a, spec: _size(a) // math.prod(sizes[axis] for axis in spec if axis)
    return sum(jax.tree.leaves(jax.tree.map(of, tree, partitions(tree, declared, sizes))))


def _size(array: Any) -> int:
    return array.size * array.dtype.itemsize


def _gathered(recipe: Recipe, sizes: Mapping[str, int]) -> int:
    """Of two layers' arrays, of the larger stack and the mean of its kinds; or of the largest other array, if that is
    more."""
    if sizes["fsdp"] == 1:
        return 0
    layers, others = dict[str, int](), [0]
    for path, box in by_path(recipe.every_declared()).items():
        spec, itemsize = partition(box.letters.all, box.value.shape, sizes), jnp.dtype(recipe.dtype_of(box)).itemsize
        if "fsdp" not in spec:
            continue
        size = box.value.size * itemsize // (sizes["tensor"] if "tensor" in spec else 1)
        if "L" in box.letters.batch:
            stack, kinds = path.partition("/")[0], box.layers[1]
            layers[stack] = layers.get(stack, 0) + size // box.value.shape[0] // kinds
        else:
            others.append(size)
    return max(2 * max(layers.values(), default=0), *others)


def _sent(config: Config, recipe: Recipe, sizes: Mapping[str, int], rows: int, itemsize: int) -> dict[str, int]:
    """Bytes that a device sends in a step, by axis. Under fsdp parameters are gathered for the forward pass of each
    slice and for the backward one, and gradients scattered; between copies of parameters gradients are summed; over
    tensor each matrix into what is split sums its inputs' gradients, and each out of it its outputs."""
    found, slices, tokens = dict.fromkeys(sizes, 0.0), config.train.accumulation, rows * config.window
    ring = lambda axis: (sizes[axis] - 1) / sizes[axis]
    again = 2 if getattr(recipe.model, "remat", None) else 1  # the forward pass is made twice
    own_boxes = by_path(config.optimizer.frozen(recipe.declared()))  # an adapter's base, without gradients, is not here
    for path, box in by_path(recipe.every_declared()).items():
        moves, letters, shape = path in own_boxes and own_boxes[path].trained, box.letters, box.value.shape
        spec = partition(letters.all, shape, sizes)
        size = box.value.size * jnp.dtype(recipe.dtype_of(box)).itemsize
        own = size / math.prod(sizes[axis] for axis in spec if axis)
        copies = [axis for axis in ROWS if axis not in spec]
        for axis in copies:
            found[axis] += 2 * ring(axis) * own * slices * moves
        if "fsdp" in spec:
            found["fsdp"] += (2 + moves) * ring("fsdp") * own * sizes["fsdp"] * slices
        if "tensor" in spec:
            place, first = spec.index("tensor"), len(letters.batch)
            layers = shape[0] if "L" in letters.batch else 1
            inside = first <= place < first + len(letters.into)
            behind = first + len(letters.into)
            width = math.prod(shape[behind:] if inside else shape[first:behind])
            times = layers * (again if inside else 1)
            if not letters.into:  # of a table: rows that are looked up, and as a head its inputs' gradients
                width, times = recipe.model.dims["D"], 2 * ("D" in letters.out)
            found["tensor"] += 2 * ring("tensor") * times * tokens * width * itemsize * slices
    return {axis: round(count) for axis, count in found.items()}


def _advice(
    config: Config,
    works: _Works,
    found: Mapping[str, Any],
    memory: float,
    remat: str | None,
    policies: list[dict[str, Any]],
) -> str:
    """Whether it fits; and if not, how it would: with as few slices and as little computed anew as may be."""
    total, rows, slices = found["estimated_bytes"], works.rows, config.train.accumulation
    if total <= memory:
        return f"it fits: {human(total, 'B')} of {human(int(memory), 'B')}"
    fixed, how = total - found["activations_bytes"] - found["logits_bytes"], ""
    for n in (n for n in range(1, rows + 1) if rows % n == 0):
        room = memory - fixed - (found["gradients_bytes"] if n > 1 and slices == 1 else 0)  # those of all slices
        for row in policies:
            fields = {"train.accumulation": slices * n} if n > 1 else {}
            fields |= {"model.remat": row["remat"]} if row["remat"] != remat else {}
            if (fields := _allowed(config, fields)) is None:
                continue
            how = " ".join(f"--{path}={value}" for path, value in fields.items())
            if row["rows"] >= rows // n and sum(works.of(rows // n, row["remat"])) <= room:
                return f"it does not fit; it would with {how}"
    return f"it does not fit{how and f', not even with {how}'}; take more devices under mesh.fsdp"


def _allowed(config: Config, fields: dict[str, Any]) -> dict[str, Any] | None:
    """Fields with which the config passes its checks: these, with layers scanned where they must be; None without."""
    for more in ({}, {"model.unroll": 1}):
        with contextlib.suppress(InputError):
            config_lib.resolve(config, fields | more)
            return fields | more
    return None


def amount(text: str, name: str) -> float:
    """ "80GB" or "989e12" as a number. Raises InputError for anything else."""
    powers = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
    number = text.upper().removesuffix("B")
    power = number[-1:] if number[-1:] in powers else ""
    try:
        value = float(number.removesuffix(power)) * powers[power]
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name}={text} must be a number, such as 80GB or 989e12")
    return value
