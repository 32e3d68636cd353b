"""Pictures: what is drawn is what was given."""

import io

import numpy as np
import pytest

from jaxformer.pictures import attention_maps, lines, loss_curve, panels, smooth


def test_smooth_is_a_mean_of_those_before():
    values = np.random.default_rng(0).normal(size=23)
    for width in (1, 2, 7, 23, 31):
        expected = [values[max(0, i + 1 - width) : i + 1].mean() for i in range(23)]
        np.testing.assert_allclose(smooth(values, width), expected, atol=1e-12)


@pytest.mark.parametrize("log", ["", "x", "y", "xy"])
def test_lines_are_the_numbers_on_the_axes_that_were_asked_for(log):
    """However many; each has a colour and a place in the legend of its own."""
    for count in (3, 13):
        figure, (first, second) = panels(1, 2)
        curves = {f"curve {i}": (np.arange(1, 6), np.arange(1, 6) + i) for i in range(count)}
        lines(first, curves, "steps", "nats", "title", log)
        lines(second, curves, "steps", "nats", legend=False)
        assert (first.get_xscale(), first.get_yscale()) == tuple("log" if name in log else "linear" for name in "xy")
        assert (first.get_xlabel(), first.get_ylabel(), first.get_title()) == ("steps", "nats", "title")
        for line, (name, (xs, ys)) in zip(first.get_lines(), curves.items(), strict=True):
            assert line.get_label() == name and (line.get_xydata() == np.stack([xs, ys], 1)).all()
        assert [text.get_text() for text in first.get_legend().get_texts()] == list(curves)
        assert len({line.get_color() for line in first.get_lines()}) == count and second.get_legend() is None
        assert figure.axes == [first, second]


def test_attention_has_a_map_for_each_layer_and_head():
    """With the tokens on both axes as they are, formulas or not."""
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3, 5))
    tokens = ["fire", " near", " ", "$_$", "^"]
    names = ["fire", "near", "' '", "$_$", "^"]
    figure = attention_maps(tokens, weights)
    assert len(figure.axes) == 2 * 3
    for i, axes in enumerate(figure.axes):
        (image,) = axes.get_images()
        assert (image.get_array() == weights[i // 3, i % 3]).all() and image.get_clim() == (0, weights.max())
        assert axes.get_title() == f"layer {i // 3}, head {i % 3}"
        assert [label.get_text() for label in axes.get_xticklabels()] == names
        assert [label.get_text() for label in axes.get_yticklabels()] == (names if i % 3 == 0 else [""] * 5)
        places = axes.transData.transform([(0, 0), (0, 1)])
        assert places[0, 1] > places[1, 1]  # the first row is on top
    saved = [io.BytesIO(), io.BytesIO()]
    for file in saved:
        figure.savefig(file, dpi=90, metadata={"Software": None})
    assert saved[0].getvalue() == saved[1].getvalue() and len(saved[0].getvalue()) < 100_000


def test_attention_of_some_layers_to_another_text_bears_their_numbers_and_its_tokens():
    weights = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3, 4))
    figure = attention_maps(list("abcd"), weights, 6.0, list("vwxyz"), [1, 3])
    assert [axes.get_title() for axes in figure.axes[::3]] == ["layer 1, head 0", "layer 3, head 0"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == list("vwxyz")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == list("abcd")


def test_a_loss_curve_has_a_line_for_each_split():
    rows = [
        {"step": 10, "split": "train", "loss": 3.5},
        {"step": 20, "split": "train", "loss": None},  # was no finite number
        {"step": 20, "split": "valid", "loss": 3.25},
        {"step": 20, "split": "valid_full", "loss": 3.0},
        {"step": 30, "split": "train", "loss": 2.5},
    ]
    (axes,) = loss_curve(rows, "runs/a").axes
    training, validation = axes.get_lines()
    np.testing.assert_equal(training.get_xydata(), [[10, 3.5], [20, np.nan], [30, 2.5]])
    np.testing.assert_equal(validation.get_xydata(), [[20, 3.25]])
    assert (training.get_label(), validation.get_label(), axes.get_title()) == ("training", "validation", "runs/a")
    assert validation.get_marker() == "o"  # or a single one could not be seen
    (empty,) = loss_curve([]).axes
    assert not empty.get_lines() and empty.get_legend() is None


def test_a_figure_is_shown_once():
    """By itself, as a cell's result; pyplot, whose figures notebooks show at a cell's end, has none."""
    from matplotlib import pyplot

    figure, _ = panels(1, 1)
    assert figure._repr_png_().startswith(b"\x89PNG") and not pyplot.get_fignums()
