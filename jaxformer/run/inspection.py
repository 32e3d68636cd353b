"""What a model is made of and what it costs: parameters, activations, operations and bytes of each of its parts.

Nothing is computed: all is read off declarations, abstract shapes and jaxprs.
"""

import math
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.declarations import Declared, by_path
from jaxformer.learning.objectives import Batch, Example, Objective
from jaxformer.mesh import partition
from jaxformer.model.implementations import BLOCKS
from jaxformer.model.models import Model
from jaxformer.run.plan import abstract_batches, planned_recipe
from jaxformer.run.step import Recipe
from jaxformer.spec import to_json

Row = dict[str, Any]
Names = tuple[str, ...]  # of a module or an array, from the outside in
ELSEWHERE = "elsewhere"  # in no module, as the scores of a contrastive objective


def inspect(objective: Objective, model: Model, batch: Batch, compute_dtype: str = "float32") -> Row:
    """All of this page as JSON values, for one batch of the objective: arrays, or their shapes and dtypes.

    `flops_step` is that of loss and gradients. `activations_bytes` is the sum over all that are recorded; a step keeps
    some of these and others besides, as the compiler sees fit.
    """
    example = jax.eval_shape(lambda batch: objective.prepare(batch, jax.random.key(0)), batch)
    table, named = parameters(model), activations(model, example, compute_dtype)
    rows = layers(objective, model, example, compute_dtype)
    total = lambda name: sum(row[name] for row in rows)
    return {
        "n_params": total("n_params"),
        "params_bytes": 4 * total("n_params"),  # they are float32 always
        "activations_bytes": total("activations_bytes"),
        "flops_forward": total("flops_forward"),
        "flops_step": total("flops_step"),
        "layers": rows,
        "activations": named,
        "table": table,
    }


def describe(config: Config, recipe: Recipe) -> dict[str, Any]:
    """The config, and what its model is made of and costs for one of its batches; under a mesh also how each array is
    split, as "D/8", and what a device has of it."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), abstract_batches(config, recipe, 1))
    found = inspect(recipe.objective, recipe.model, shapes, recipe.compute_dtype)
    sizes = config.mesh.sizes(max(jax.device_count(), config.mesh.least))
    if math.prod(sizes.values()) > 1:
        for row, (path, box) in zip(found["table"], _declared(recipe.model).items(), strict=True):
            row |= _layout(box, sizes, "/".join(path))
        found["device_bytes"] = sum(row["device_bytes"] for row in found["table"])
    return found | {"config": to_json(config)}


def inspect_config(path: str) -> dict[str, Any]:
    """`Run.inspect` for a config file, without a state; reads the corpus only if sizes depend on it."""
    config = config_lib.resolve(path)
    hashes = {"params_sha256": None, "state_sha256": None}
    return {"step": None, **describe(config, planned_recipe(config)), **hashes}


def parameters(model: Model) -> list[Row]:
    """A row for each array of parameters: name, letters, shape, count, decay. Stacked layers are one array."""
    return [
        {
            "name": "/".join(path),
            "letters": str(box.letters),
            "shape": list(box.value.shape),
            "count": math.prod(box.value.shape),
            "decay": box.decay,
        }
        for path, box in _declared(model).items()
    ]


def activations(model: Model, example: Example, compute_dtype: str = "float32") -> list[Row]:
    """A row for each activation of `Model.activations`: name, shape, dtype, bytes. Stacked layers are one array.

    A second text that no encoder reads, as that of a contrastive pair, is left out.
    """
    found = _activations(model, example, compute_dtype)
    return [
        {"name": "/".join(path), "shape": list(a.shape), "dtype": str(a.dtype), "bytes": a.size * a.dtype.itemsize}
        for path, a in sorted(found.items(), key=lambda item: _place(model, item[0]))
    ]


def flops(function: Callable[..., Any], *args: Any) -> dict[Names, int]:
    """Floating-point operations of the matrix products in each scope, two for each multiply-add.

    A scope is known by its names, from the outside in, as jax.named_scope, Flax's modules, einsums and transformations
    give them. `args` are arrays, or their shapes and dtypes. Counted are the products of the function's jaxpr, whoever
    wrote them: in scans and grids as often as they run, of branches the costliest, and in loops whose length only the
    run knows, once. Attention counts whole, by blocks or not. Everything else, as softmax and norms, is not counted,
    nor what has no jaxpr, as a kernel of cuDNN.
    """
    return dict(_products(jax.make_jaxpr(function)(*args).jaxpr, ()))


def model_flops(recipe: Recipe, batch: Batch) -> int:
    """Floating-point operations of the matrix products of a step: thrice those of the loss, since a product has two
    more in its gradient. What is recomputed counts once (arXiv:2204.02311, appendix B: model FLOPs).

    Of a decoder that is 6·N + 12·L·H·K·T for each token: N counts the parameters of matrices and of the head, tied or
    not, but no table that is looked up in. Attention counts as it is computed, with what a causal mask hides.
    A batch is arrays, or their shapes and dtypes.
    """
    objective, model = recipe.objective, recipe.model
    params = _abstract_params(model, "float32")
    example = jax.eval_shape(lambda batch: objective.prepare(batch, jax.random.key(0)), batch)
    forward = lambda params, example: objective.loss(model, params, example, None).minimised
    return 3 * sum(flops(forward, params, example).values())


def layers(objective: Objective, model: Model, example: Example, compute_dtype: str = "float32") -> list[Row]:
    """A row for each part of the model: what it costs in all of its `layers`, which lie stacked.

    Every parameter, activation and product is in just one row. A forward pass is the loss without dropout, a step the
    loss with its gradients, anything recomputed included, without the optimizer.
    """
    params, declared = _abstract_params(model, compute_dtype), _declared(model)
    recorded = _activations(model, example, compute_dtype)
    modules = {path[:n] for path in (*declared, *recorded) for n in range(len(path))}
    forward = lambda params, example: objective.loss(model, params, example, None).minimised

    def step(params: Any, example: Example) -> Any:
        return jax.value_and_grad(lambda p: objective.loss(model, p, example, jax.random.key(0)).minimised)(params)

    costs = {
        "n_params": [(path[:-1], box.value.size) for path, box in declared.items()],
        "flops_forward": [(_module(scope, modules), count) for scope, count in flops(forward, params, example).items()],
        "flops_step": [(_module(scope, modules), count) for scope, count in flops(step, params, example).items()],
        "activations_bytes": [(path[:-1], a.size * a.dtype.itemsize) for path, a in recorded.items()],
    }
    sums, stacked = {column: Counter[Names]() for column in costs}, model.stacked
    for column, pairs in costs.items():
        for module, count in pairs:
            sums[column][_part(model, module)] += count
    parts = sorted({part for counts in sums.values() for part in counts}, key=lambda part: _place(model, part))
    return [
        {"name": "/".join(part) or ELSEWHERE, "layers": stacked.get(_block(model, part), 1)}
        | {column: counts[part] for column, counts in sums.items()}
        for part in parts
    ]


def render(found: Mapping[str, Any]) -> str:
    """What `inspect` gives, as tables for people."""
    sums = "n_params", "flops_forward", "flops_step", "activations_bytes"
    total = {"name": "in all", "layers": ""} | {name: found[name] for name in sums}
    return "\n\n".join(
        (
            _table("part", [*found["layers"], total], "layers", *sums),
            _table("activation", found["activations"], "shape", "dtype", "bytes"),
            _table("parameter", found["table"], *(name for name in found["table"][0] if name != "name")),
        )
    )


# --- products of a jaxpr


def _products(jaxpr: Jaxpr, scope: Names) -> Counter[Names]:
    """Operations by scope; `scope` is the one that the jaxpr runs in, to which its own are relative."""
    found = Counter[Names]()
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        here = scope + tuple(entry.name for entry in equation.source_info.name_stack.stack)
        if BLOCKS in here:
            continue
        if kind == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            out = equation.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            found[here] += 2 * math.prod(out) * math.prod(left[axis] for axis in summed)
            continue
        inner = [_products(jaxpr, here) for jaxpr in jaxprs(params.values())]
        if kind == "cond" and (platforms := params.get("branches_platforms")):  # of jax.lax.platform_dependent
            backend = jax.default_backend()
            inner = [next(c for p, c in zip(platforms, inner, strict=True) if p is None or backend in p)]
        elif kind == "cond":
            inner = [max(inner, key=Counter.total)]
        times = params["length"] if kind == "scan" else 1
        if kind == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        for counts in inner:
            for name, count in counts.items():
                found[name] += times * count
    return found


def jaxprs(values: Any) -> Iterator[Jaxpr]:
    """Those among an equation's parameters: bodies, branches."""
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value
        elif isinstance(value, tuple | list):
            yield from jaxprs(value)


# --- modules


def _declared(model: Model) -> dict[Names, Declared]:
    """Every parameter by its path."""
    return {tuple(name.split("/")): box for name, box in by_path(model.declared()).items()}


def _activations(model: Model, example: Example, compute_dtype: str) -> dict[Names, Any]:
    """Every activation by its path."""
    read = lambda params, e: model.activations(params, e.ids, e.at, e.source if model.encodes else None)
    found = jax.eval_shape(read, _abstract_params(model, compute_dtype), example)
    return {tuple(name.split("/")): a for name, a in found.items()}


def _module(scope: Names, modules: Container[Names]) -> Names:
    """The innermost of the modules that a scope is in; () if it is in none.

    A scope may be several modules, "decoder/layers", or a method of one, "attention.remember".
    """
    module: Names = ()
    for name in (name.partition(".")[0] for names in scope for name in names.split("/")):
        if (*module, name) in modules:
            module = (*module, name)
    return module


def _block(model: Model, path: Names) -> Names:
    """The stacked module that a path is in, or is; else ()."""
    return next((block for block in model.stacked if path[: len(block)] == block), ())


def _part(model: Model, module: Names) -> Names:
    """The row of a module: what is inside a part of a block, as a norm of queries, is counted with that part."""
    block = _block(model, module)
    return module[: len(block) + 1] if block else module


def _place(model: Model, path: Names) -> tuple[int, Names]:
    """Sorts from the ids to the loss."""
    order = ["embedding", *(block[0] for block in model.stacked), *(f"head_{head.name}" for head in model.heads)]
    return (order.index(path[0]) if path and path[0] in order else len(order)), path


def _abstract_params(model: Model, dtype: str) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), shapes)


def _layout(box: Declared, sizes: Mapping[str, int], path: str) -> Row:
    """Of an array on a mesh."""
    axes = zip(box.letters.all, partition(box.letters.all, box.value.shape, sizes, path), strict=True)
    split = [(letter, sizes[axis]) for letter, axis in axes if axis]
    n_bytes = 4 * box.value.size // math.prod(size for _, size in split)
    return {"split": " ".join(f"{letter}/{size}" for letter, size in split), "device_bytes": n_bytes}


# --- text


def _table(title: str, rows: Sequence[Mapping[str, Any]], *columns: str) -> str:
    """Aligned columns, numbers to the right."""
    lines = [[title, *columns]] + [[row["name"], *(_text(row[column]) for column in columns)] for row in rows]
    numbers = [False, *(any(type(row[column]) is int for row in rows) for column in columns)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    form = lambda text, width, number: text.rjust(width) if number else text.ljust(width)
    return "\n".join("  ".join(map(form, line, widths, numbers)).rstrip() for line in lines)


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "×".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    return human(value) if isinstance(value, int) else value


def human(number: float, unit: str = "") -> str:
    """A large number by three digits and the power of 1,000 that they are of: "810,112", "10.7M", "1.3 GB"."""
    if number < (10_000 if unit else 1_000_000):
        return f"{number:,} {unit}".rstrip()
    power = 0
    while number >= 999.5:
        number, power = number / 1000, power + 1
    return f"{number:.3g}{' ' if unit else ''}{'kMGTPE'[power - 1]}{unit}"
