"""What each ingredient of the fast recipe is worth, alone and among the others; and to which tasks it carries over."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer import EncoderDecoder
from jaxformer.config import Config, Data, Train, load
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TextLines
from jaxformer.data.tables import Table
from jaxformer.data.tokenizers import BPE
from jaxformer.lab.experiments import (
    Experiment,
    Metrics,
    Report,
    Result,
    Row,
    final_accuracy,
    final_exact,
    final_loss,
)
from jaxformer.lab.intervals import ERROR, Estimate, paired_difference
from jaxformer.learning.groups import Groups
from jaxformer.learning.objectives import SequenceToSequence, SpanCorruption
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant, WarmupCosine, WarmupLinear
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Softmax
from jaxformer.model.layers import GELU, MLP, GPT2Normal, LayerNorm, NoNorm, RMSNorm
from jaxformer.model.models import Embedding
from jaxformer.model.positions import Learned, RelativeBias
from jaxformer.pictures import panels

CONFIGS = Path(__file__).parent.parent / "configs"
SEEDS, TASK_SEEDS = 5, 3
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


@dataclass(frozen=True)
class Task:
    """Where the recipe may help or not: a preset, made smaller."""

    config: Config
    measure: Callable[[Metrics], float] = final_loss
    higher: bool = False

    @property
    def changes(self) -> Changes:
        """The recipe in its place. What the model is asked for, its dropout, and positions that tell of distances
        stay; the rates are those of the recipe."""
        names = ("norm", "qk_norm", "kernel", "feed_forward", "initializer", "embedding")
        changes: dict[str, Any] = {f"model.{name}": getattr(MODEL, name) for name in names}
        own: Any = self.config.model
        if not isinstance(own.position, RelativeBias):
            changes["model.position"] = MODEL.position
        if type(own.head) is LanguageHead:
            changes["model.head"] = MODEL.head
        return changes | {"optimizer": OPTIMIZER}


def short(name: str, steps: int, data: Changes | None = None, **model: Any) -> Config:
    """A preset, made smaller; its seeds can be trained together."""
    found = load(CONFIGS / f"{name}.py")
    every = {"steps_per_call": 25, "log_every": 25, "eval_every": steps, "save_every": steps}
    sampling = Examples() if isinstance(found.data.sampling, Examples) else found.data.sampling
    return replace(
        found,
        directory="runs/recipe",
        data=replace(found.data, **{"sampling": sampling, **(data or {})}),
        model=replace(found.model, **model),
        train=replace(found.train, steps=steps, sample_tokens=0, best_by="loss", **every),
    )


def pairs(steps: int, rate: float, warmup_steps: int, objective: Any, **data: Any) -> Config:
    """A small encoder–decoder with relative positions and AdamW; its seeds can be trained together."""
    every: dict[str, Any] = {"steps_per_call": 25, "log_every": 25, "eval_every": steps, "save_every": steps}
    sizes: dict[str, Any] = {"n_layers": 1, "n_encoder_layers": 2, "n_heads": 4, "d_model": 96, "context_length": 64}
    return Config(
        "runs/recipe",
        EncoderDecoder(**sizes, position=RelativeBias(), norm=RMSNorm()),
        Data(**data, sampling=Examples(), batch_size=32),
        objective,
        AdamW(WarmupLinear(peak=rate, final=0.0, warmup_steps=warmup_steps), weight_decay=0.01),
        Train(steps=steps, sample_tokens=0, **every),
    )


def asked(name: str) -> Table:
    columns = ("question", "answer")
    return Table(f"$JAXFORMER_DATA/birth_places/{name}.tsv", *columns, columns=columns)


WIKI = TextLines("$JAXFORMER_DATA/birth_places/wiki.txt")
TASKS: Mapping[str, Task] = {
    "characters: Shakespeare (loss)": Task(short("shakespeare_cpu", 500)),
    "tokens: Shakespeare by BPE(1024) (loss)": Task(short("shakespeare_cpu", 300, {"tokenizer": BPE(1024)})),
    "masked tokens: tweets (loss)": Task(short("disaster_tweets_masked", 300, {"window": 48}, d_model=64)),
    "corrupted spans: biographies (loss)": Task(
        pairs(300, 2e-3, 200, SpanCorruption(density=0.4), corpus=WIKI, valid=WIKI, tokenizer=BPE(2048, sentinels=32))
    ),
    "sequence to sequence: reverse 20 digits (exact)": Task(short("reverse", 600), final_exact, True),
    "classes: tweets (accuracy)": Task(short("disaster_tweets", 300, {"window": 48}, d_model=64), final_accuracy, True),
    "answers: birth places (loss)": Task(
        pairs(200, 5e-4, 50, SequenceToSequence(), corpus=asked("train"), valid=asked("dev"), tokenizer=BPE(2048))
    ),
}
WHOLE = {"recipe": RECIPE, "baseline": BASELINE, "what is left": LEFT}
WITH, WITHOUT = "baseline + {}", "recipe − {}"


def rows() -> tuple[Row, ...]:
    """The recipe, the baseline, what is left, each ingredient in the first two; then the tasks, by pairs."""
    of = lambda name, config, changes: Row(name, config, None, SEEDS, changes)
    found = [Row(name, config, None, SEEDS) for name, config in WHOLE.items()]
    for name, (added, left_out) in INGREDIENTS.items():
        found += [of(WITHOUT.format(name), RECIPE, left_out), of(WITH.format(name), BASELINE, added)]
    for name, task in TASKS.items():
        more = {"measure": task.measure, "higher": task.higher}
        found.append(Row(f"{name}, as it was", task.config, None, TASK_SEEDS, **more))
        found.append(Row(f"{name}, recipe", task.config, None, TASK_SEEDS, task.changes, **more))
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
    report.text(
        "### Where it carries\n\nSmall models of other tasks, by AdamW and with the whole recipe at its own rates; "
        f"{TASK_SEEDS} seeds."
    )
    report.table([carried(name, report) for name in TASKS])


def difference(first: Result, second: Result, together: int = 1) -> Estimate:
    return paired_difference(first.values, second.values, ERROR / together)


def told(found: Estimate) -> str:
    if (half := found.half_width) is None:  # nothing spreads
        return f"{found.mean:+.4f}"
    return f"{found.mean:+.4f} [{found.mean - half:+.4f}, {found.mean + half:+.4f}]"


def carried(name: str, report: Report) -> dict[str, str]:
    before, after = (report.results[f"{name}, {which}"] for which in ("as it was", "recipe"))
    change, higher = difference(before, after, len(TASKS)), TASKS[name].higher
    sure = change.half_width is not None and abs(change.mean) > change.half_width
    return {
        "task": name,
        "as it was": f"{before.mean:.4f} ± {before.deviation or 0:.4f}",
        "recipe": f"{after.mean:.4f} ± {after.deviation or 0:.4f}",
        "difference": told(change),
        "said": ("helps" if (change.mean > 0) == higher else "harms") if sure else "",
    }


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
