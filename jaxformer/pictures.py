"""Pictures of numbers, with Matplotlib (pip install "jaxformer[pictures]"), small enough to be kept beside a text."""

import functools
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from jaxformer.spec import InputError

Lines = Mapping[str, tuple[ArrayLike, ArrayLike]]  # label -> xs, ys


def require() -> None:
    """Raises InputError if Matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError('pictures need Matplotlib; pip install "jaxformer[pictures]"')


def panels(rows: int, columns: int, width: float = 8.0, height: float = 4.5) -> tuple[Any, list[Any]]:
    """A figure of so many inches and its axes, row after row.

    Pyplot does not know of it, so that a notebook shows it where it is a cell's result, and only there.
    """
    require()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = functools.partial(_png, figure)  # pyright: ignore[reportAttributeAccessIssue]
    return figure, list(np.atleast_1d(figure.subplots(rows, columns)).flat)


def _png(figure: Any) -> bytes:
    """What a notebook shows of a figure, though pyplot was never imported."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def lines(axes: Any, curves: Lines, x: str, y: str, title: str = "", log: str = "", legend: bool = True) -> None:
    """Draws a line for each label; `log` names the axes that are logarithmic, as "xy". A legend of many lines
    stands beside them."""
    from matplotlib import colormaps

    colors = colormaps["viridis" if len(curves) > 10 else "tab10"]
    for i, (label, (xs, ys)) in enumerate(curves.items()):
        color = colors(i / len(curves)) if len(curves) > 10 else colors(i)
        axes.plot(xs, ys, label=label, linewidth=1.2, color=color)
    axes.set(xlabel=x, ylabel=y, title=title)
    if "x" in log:
        axes.set_xscale("log")
    if "y" in log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if legend:
        beside = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if len(curves) > 6 else {}
        axes.legend(fontsize=8, ncols=math.ceil(len(curves) / 24), **beside)


def image(axes: Any, values: ArrayLike, x: str = "", y: str = "", title: str = "", **how: Any) -> None:
    """Draws a matrix, first row on top."""
    axes.imshow(values, aspect="auto", interpolation="nearest", **how)
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=8)


def loss_curve(rows: Sequence[Mapping[str, Any]], title: str = "") -> Any:
    """A figure of the losses in rows of metrics.jsonl: a line for training, and one for validation."""
    figure, (axes,) = panels(1, 1, 7.0, 4.0)
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row.get("split") in LOSSES and "loss" in row:
            steps, losses = curves.setdefault(LOSSES[row["split"]], ([], []))
            steps.append(row["step"])
            losses.append(math.nan if row["loss"] is None else row["loss"])
    lines(axes, curves, "step", "loss (nats)", title, legend=bool(curves))
    if LOSSES["valid"] in curves:
        next(line for line in axes.get_lines() if line.get_label() == LOSSES["valid"]).set_marker("o")
    return figure


LOSSES = {"train": "training", "valid": "validation"}  # split -> what its line is called


def attention_maps(
    tokens: Sequence[str],
    weights: ArrayLike,
    width: float = 18.0,
    columns: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
) -> Any:
    """A figure with a map for each layer (down) and head (across): rows look at columns. It is wider than `width`,
    in inches, where the tokens need it to be legible.

    `weights` is [L, H, T, S]; `tokens` are those of the rows, and of the columns if these have none of their own.
    `layers` are the numbers of the layers, by default from 0.
    """
    weights = np.asarray(weights)
    top = float(weights.max())  # one scale for all
    count, heads = weights.shape[:2]
    rows, across = ([t.strip() or repr(t) for t in own] for own in (tokens, tokens if columns is None else columns))
    side = max(width / heads, 0.13 * max(len(rows), len(across)))
    figure, axes = panels(count, heads, side * heads, side * count + 0.6)
    for i, each in enumerate(axes):
        layer, head = divmod(i, heads)
        title = f"layer {layer if layers is None else layers[layer]}, head {head}"
        image(each, weights[layer, head], title=title, vmin=0, vmax=top, cmap="viridis")
        plain = {"fontsize": 8, "parse_math": False}  # a token may have dollars in it
        each.set_xticks(range(len(across)), across, rotation=90, **plain)
        each.set_yticks(range(len(rows)), rows if head == 0 else [], **plain)
    return figure


def smooth(values: ArrayLike, width: int) -> np.ndarray:
    """The running mean over `width` numbers, less at the beginning."""
    values = np.asarray(values, np.float64)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def bands(axes: Any, curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], x: str, y: str, title: str) -> None:
    """Draws for each label, of xs, ys and widths, a line with markers in a band from y - width to y + width."""
    lines(axes, {label: (xs, ys) for label, (xs, ys, _) in curves.items()}, x, y, title, legend=bool(curves))
    for line, (xs, ys, widths) in zip(axes.get_lines(), curves.values(), strict=True):
        line.set_marker(".")
        low, high = np.asarray(ys) - np.asarray(widths), np.asarray(ys) + np.asarray(widths)
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, linewidth=0)
