"""What each ingredient of the fast recipe is worth, alone and among the others."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.config import load
from jaxformer.lab.experiments import Experiment, Report, Result, Row
from jaxformer.lab.intervals import ERROR, Estimate, paired_difference
from jaxformer.learning.groups import Groups
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import GELU, MLP, GPT2Normal, LayerNorm, NoNorm
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Learned
from jaxformer.pictures import panels

CONFIGS = Path(__file__).parent.parent / "configs"
SEEDS = 5
Changes = Mapping[str, Any]

FAST = load(CONFIGS / "shakespeare_cpu_fast.py")
TRAIN = replace(FAST.train, log_every=25, sample_tokens=0)
LEFT = replace(FAST, directory="runs/recipe", train=TRAIN)
RECIPE: Any = replace(  # with two ingredients that have no sure effect, and so have left the preset
    LEFT, model=replace(FAST.model, embedding=Embedding(normed=True), head=LanguageHead(tied=False, cap=15.0))
)
BASELINE: Any = replace(  # its rate: the best of 2, 4, 8 and 16 thousandths in 250 steps (LOG.md)
    load(CONFIGS / "shakespeare_cpu.py"),
    directory="runs/recipe",
    optimizer=AdamW(WarmupCosine(peak=4e-3, final=0.0, warmup_steps=25)),
    train=TRAIN,
)
MODEL: Any = RECIPE.model
OPTIMIZER: Any = RECIPE.optimizer
HIDDEN, REST = OPTIMIZER.groups
RATE = REST.optimizer.learning_rate


def falling(peak: float) -> Any:
    """The recipe's schedule, from this rate."""
    return replace(OPTIMIZER.learning_rate, peak=peak)


def with_schedule(optimizer: Any, schedule: Any) -> Changes:
    return {"optimizer": replace(optimizer, learning_rate=schedule)}


def with_adam() -> Changes:
    """The recipe's AdamW, of the embedding and the head, in the place of the baseline's."""
    return {"optimizer": replace(REST.optimizer, learning_rate=BASELINE.optimizer.learning_rate)}


def muon_beside(adam: Any) -> Changes:
    """Muon for the matrices of layers beside the baseline's AdamW for the rest, by its schedule."""
    shape = adam.learning_rate
    rest = replace(REST, optimizer=replace(adam, learning_rate=Constant(shape.peak)))
    return {"optimizer": Groups(replace(shape, peak=1.0), groups=(HIDDEN, rest))}


# Ingredient -> what the baseline becomes with it, and the recipe without it.
INGREDIENTS: Mapping[str, tuple[Changes, Changes]] = {
    "Muon for matrices of layers": (
        muon_beside(BASELINE.optimizer),
        {"optimizer": replace(REST.optimizer, learning_rate=falling(5e-3))},  # of all arrays
    ),
    "a rate that falls in a line, no warm-up": (
        with_schedule(BASELINE.optimizer, falling(BASELINE.optimizer.learning_rate.peak)),
        with_schedule(OPTIMIZER, replace(BASELINE.optimizer.learning_rate, peak=1.0)),
    ),
    "AdamW without decay and clipping, b2 0.95": (
        with_adam(),
        {"optimizer": replace(OPTIMIZER, groups=(HIDDEN, replace(REST, optimizer=AdamW(RATE))))},
    ),
    "rotary positions": ({"model.position": MODEL.position}, {"model.position": Learned()}),
    "queries and keys normed, scale 0.34": (
        {"model.qk_norm": MODEL.qk_norm, "model.kernel": MODEL.kernel},
        {"model.qk_norm": NoNorm(), "model.kernel": Softmax()},
    ),
    "norms without mean and gain": (
        {"model.norm": MODEL.norm},
        {"model.norm": LayerNorm(bias=False)},
    ),
    "a norm behind the embedding": (
        {"model.embedding": Embedding(normed=True)},
        {"model.embedding": Embedding()},
    ),
    "ReLU²": ({"model.feed_forward": MODEL.feed_forward}, {"model.feed_forward": MLP(GELU())}),
    "outputs that begin at zero": (
        {"model.initializer": replace(MODEL.initializer, base=GPT2Normal())},
        {"model.initializer": MODEL.initializer.base},
    ),
    "a head of its own": (
        {"model.head": LanguageHead(tied=False)},
        {"model.head": LanguageHead(tied=True, scaled=True, cap=15.0)},
    ),
    "logits within ± 15": (
        {"model.head": LanguageHead(cap=15.0)},
        {"model.head": LanguageHead(tied=False)},
    ),
}


WHOLE = {"recipe": RECIPE, "baseline": BASELINE, "what is left": LEFT}
WITH, WITHOUT = "baseline + {}", "recipe − {}"


def rows() -> tuple[Row, ...]:
    """The recipe, the baseline, what is left, and each ingredient in the first two."""
    of = lambda name, config, changes: Row(name, config, None, SEEDS, changes)
    found = [Row(name, config, None, SEEDS) for name, config in WHOLE.items()]
    for name, (added, left_out) in INGREDIENTS.items():
        found += [of(WITHOUT.format(name), RECIPE, left_out), of(WITH.format(name), BASELINE, added)]
    return tuple(found)


def tell(report: Report) -> None:
    recipe, baseline, left = (report.results[name] for name in WHOLE)
    table, drawn = [], {}
    for name in INGREDIENTS:
        without, added = report.results[WITHOUT.format(name)], report.results[WITH.format(name)]
        gone, come = difference(recipe, without, len(INGREDIENTS)), difference(added, baseline, len(INGREDIENTS))
        drawn[name] = gone, come
        table.append(
            {
                "ingredient": name,
                "recipe without it": f"{without.mean:.4f}",
                "costs": told(gone),
                "baseline with it": f"{added.mean:.4f}",
                "gives": told(come),
            }
        )
    report.text(
        f"### One at a time\n\nThe recipe has {recipe.mean:.4f}, the baseline after as many steps {baseline.mean:.4f}. "
        '"costs" is what its loss rises by without an ingredient, "gives" what that of the baseline falls by with it: '
        "differences paired seed by seed; intervals of a column hold together at 95 %. Without Muon AdamW at "
        "5e-3 moves all arrays, the embedding and the head among them; a tied head is scaled by 1/√D."
    )
    report.table(table)
    report.picture(
        "ingredients", picture(drawn), "What the loss rises by without an ingredient, and falls by in the baseline."
    )
    report.text(
        "What is left without the norm behind the embedding and the bound on logits, `configs/shakespeare_cpu_fast.py` "
        f"as it is now, has {left.mean:.4f}: {told(difference(recipe, left))} to the recipe with both."
    )


def difference(first: Result, second: Result, together: int = 1) -> Estimate:
    return paired_difference(first.values, second.values, ERROR / together)


def told(found: Estimate) -> str:
    if (half := found.half_width) is None:  # nothing spreads
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.mean - half:+.4f}, {found.mean + half:+.4f}]"


def picture(drawn: Mapping[str, tuple[Estimate, Estimate]]) -> Any:
    figure, (axes,) = panels(1, 1, 9, 6)
    for side, label in enumerate(("recipe: without it", "baseline: with it")):
        means = [pair[side].mean for pair in drawn.values()]
        widths = [pair[side].half_width or 0.0 for pair in drawn.values()]
        axes.errorbar(means, np.arange(len(drawn)) + 0.2 * side, xerr=widths, fmt="o", capsize=3, label=label)
    axes.set_yticks(range(len(drawn)), list(drawn), fontsize=9)
    axes.invert_yaxis()
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_xlabel("nats per character")
    axes.legend(fontsize=9)
    axes.grid(alpha=0.3)
    return figure


experiment = Experiment(
    "The recipe",
    f"""
`configs/shakespeare_cpu_fast.py`, with the two ingredients that left it by this table, beside AdamW as
`configs/shakespeare_cpu.py` has it, at its best rate for as few steps: {RECIPE.train.steps} of
{RECIPE.data.batch_size} rows, {SEEDS} seeds trained together. Time to a loss, beside PyTorch, is in BENCHMARKS.md.
""",
    rows(),
    tell,
    long=True,
)
