"""What a model is made of and what it costs: parameters, activations, operations and bytes of each of its parts.

Nothing is computed: all is read off declarations, abstract shapes and jaxprs.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.learning.objectives import Batch, Example, NextToken
from jaxformer.model.models import Model
from jaxformer.run.plan import abstract_batches, planned_recipe
from jaxformer.run.step import Recipe
from jaxformer.spec import is_declared, path_name, to_json

Row = dict[str, Any]
ELSEWHERE = "elsewhere"  # in no module, as the scores of a contrastive objective


def inspect(objective: NextToken, model: Model, batch: Batch, compute_dtype: str = "float32") -> Row:
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
    """The config, and what its model is made of and costs for one of its batches."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), abstract_batches(config, recipe, 1))
    found = inspect(recipe.objective, recipe.model, shapes, recipe.compute_dtype)
    return found | {"config": to_json(config)}


def inspect_config(path: str) -> dict[str, Any]:
    """`Run.inspect` for a config file, without a state; reads the corpus only if its tokenizer learns from it."""
    config = config_lib.resolve(path)
    hashes = {"params_sha256": None, "state_sha256": None}
    return {"step": None, **describe(config, planned_recipe(config)), **hashes}


def parameters(model: Model) -> list[Row]:
    """A row for each array of parameters: name, letters, shape, count, decay. Stacked layers are one array."""
    boxes = jax.tree_util.tree_flatten_with_path(model.declared(), is_leaf=is_declared)[0]
    return [
        {
            "name": path_name(path),
            "letters": box.letters,
            "shape": list(box.value.shape),
            "count": math.prod(box.value.shape),
            "decay": box.decay,
        }
        for path, box in boxes
    ]


def activations(model: Model, example: Example, compute_dtype: str = "float32") -> list[Row]:
    """A row for each activation of `Model.activations`: name, shape, dtype, bytes. Stacked layers are one array.

    A second text that no encoder reads, as that of a contrastive pair, is left out.
    """
    read = lambda params, e: model.activations(params, e.ids, e.at, e.source if model.encodes else None)
    found: dict[str, Any] = jax.eval_shape(read, _abstract_params(model, compute_dtype), example)
    return [
        {"name": name, "shape": list(a.shape), "dtype": str(a.dtype), "bytes": a.size * a.dtype.itemsize}
        for name, a in sorted(found.items(), key=lambda item: _place(item[0]))
    ]


def flops(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """Module path → floating-point operations of the matrix products in it, two for each multiply-add.

    `args` are arrays, or their shapes and dtypes. Counted are the products of the function's jaxpr, whoever wrote them:
    in scans and grids as often as they run, of branches the costliest, and in loops whose length only the run knows,
    once. Everything else, as softmax and norms, is not counted, nor what has no jaxpr, as a kernel of cuDNN.
    """
    return dict(_products(jax.make_jaxpr(function)(*args).jaxpr, ""))


def layers(objective: NextToken, model: Model, example: Example, compute_dtype: str = "float32") -> list[Row]:
    """A row for each part of the model: what it costs in all of its `layers`, which lie stacked.

    Every parameter, activation and product is in just one row. A forward pass is the loss without dropout, a step the
    loss with its gradients, anything recomputed included, without the optimizer.
    """
    table, params = parameters(model), _abstract_params(model, compute_dtype)
    forward = lambda params, example: objective.loss(model, params, example, None)[0]

    def step(params: Any, example: Example) -> Any:
        return jax.value_and_grad(lambda p: objective.loss(model, p, example, jax.random.key(0))[0])(params)

    costs = {
        "n_params": [(_owner(row["name"]), row["count"]) for row in table],
        "flops_forward": flops(forward, params, example).items(),
        "flops_step": flops(step, params, example).items(),
        "activations_bytes": [
            (_owner(row["name"]), row["bytes"]) for row in activations(model, example, compute_dtype)
        ],
    }
    sums = {column: Counter() for column in costs}
    for column, pairs in costs.items():
        for name, count in pairs:
            sums[column][_part(name)] += count
    stacked = {_block(row["name"]): row["shape"][0] for row in table if _block(row["name"])}
    names = sorted({name for counts in sums.values() for name in counts}, key=_place)
    return [
        {"name": name, "layers": stacked.get(_block(name), 1)}
        | {column: counts[name] for column, counts in sums.items()}
        for name in names
    ]


def render(found: Mapping[str, Any]) -> str:
    """What `inspect` gives, as tables for people."""
    sums = "n_params", "flops_forward", "flops_step", "activations_bytes"
    total = {"name": "in all", "layers": ""} | {name: found[name] for name in sums}
    return "\n\n".join(
        (
            _table("part", [*found["layers"], total], "layers", *sums),
            _table("activation", found["activations"], "shape", "dtype", "bytes"),
            _table("parameter", found["table"], "letters", "shape", "count", "decay"),
        )
    )


# --- products of a jaxpr


def _products(jaxpr: Jaxpr, path: str) -> Counter[str]:
    """Operations by module; `path` is the scope that the jaxpr runs in, to which its own names are relative."""
    found = Counter[str]()
    for equation in jaxpr.eqns:
        kind, params = equation.primitive.name, equation.params
        here = f"{path}/{equation.source_info.name_stack}"
        if kind == "dot_general":
            (summed, _), _ = params["dimension_numbers"]
            left = equation.invars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            out = equation.outvars[0].aval.shape  # pyright: ignore[reportAttributeAccessIssue]
            found[_module(here)] += 2 * math.prod(out) * math.prod(left[axis] for axis in summed)
            continue
        inner = [_products(jaxpr, here) for jaxpr in _jaxprs(params.values())]
        if kind == "cond":
            inner = [max(inner, key=Counter.total)]
        times = params["length"] if kind == "scan" else 1
        if kind == "pallas_call":
            times = math.prod(params["grid_mapping"].grid)
        for counts in inner:
            for name, count in counts.items():
                found[name] += times * count
    return found


def _jaxprs(values: Any) -> Iterator[Jaxpr]:
    """Those among an equation's parameters: bodies, branches."""
    for value in values:
        if isinstance(value, ClosedJaxpr | Jaxpr):
            yield value.jaxpr if isinstance(value, ClosedJaxpr) else value
        elif isinstance(value, tuple | list):
            yield from _jaxprs(value)


def _module(scope: str) -> str:
    """The module path in a scope such as "jvp(Network)/decoder/layers/block0/block0._branch/attention/BTD,DK->BTK".

    Transformations wrap the names, a method is "module.method" below its module, a module without a name is called by
    its class, and an einsum by its letters.
    """
    names: list[str] = []
    for piece in re.sub(r"\w+\(|\)", "", scope).split("/"):
        name = piece.partition(".")[0]
        named = re.fullmatch(r"[a-z_]\w*|[A-Z]\w*_\d+", name) and name != "rematted_computation"
        if named and names[-1:] != [name]:
            names.append(name)
    return "/".join(names) or ELSEWHERE


# --- names


def _owner(name: str) -> str:
    """The module of an array."""
    return name.rpartition("/")[0]


def _part(module: str) -> str:
    """The row of a module: what is inside a part of a block, as a norm of queries, is counted with that part."""
    found = re.match(r"\w+/layers/\w+/\w+", module)
    return found[0] if found else module


def _block(name: str) -> str:
    """The block that a name is in, or is; else ''."""
    found = re.match(r"\w+/layers/\w+", name)
    return found[0] if found else ""


def _place(name: str) -> tuple[int, str]:
    """Sorts from the ids to the loss."""
    first = name.partition("/")[0]
    order = ("embedding", "encoder", "decoder")
    after = len(order) + first.startswith("head_") + 2 * (first == ELSEWHERE)
    return (order.index(first) if first in order else after), name


def _abstract_params(model: Model, dtype: str) -> Any:
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.dtype(dtype)), shapes)


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
    return f"{value:,}" if isinstance(value, int) else value
