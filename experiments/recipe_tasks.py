"""Whether the fast recipe helps small models of other tasks: beside AdamW at the best of six schedules."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

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
    Row,
    final_accuracy,
    final_exact,
    final_loss,
)
from jaxformer.lab.intervals import ERROR, paired_difference
from jaxformer.learning.objectives import SequenceToSequence, SpanCorruption
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.heads import LanguageHead
from jaxformer.model.layers import RMSNorm
from jaxformer.model.positions import RelativeBias

CONFIGS = Path(__file__).parent.parent / "configs"
SEEDS, RATES, WARMUPS = 3, (1e-3, 3e-3, 1e-2), {"": 10, ", long warm-up": 3}  # of the steps one part of so many
RECIPE: Any = load(CONFIGS / "shakespeare_cpu_fast.py")
Changes = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """Where the recipe may help or not: a preset, made smaller."""

    config: Config
    measure: Callable[[Metrics], float] = final_loss
    higher: bool = False

    @property
    def recipe(self) -> Changes:
        """The recipe in its place. What the model is asked for, its dropout, and positions that tell of distances
        stay; the rates are those of the recipe."""
        names = ("norm", "qk_norm", "kernel", "feed_forward", "initializer")
        changes: dict[str, Any] = {f"model.{name}": getattr(RECIPE.model, name) for name in names}
        own: Any = self.config.model
        if not isinstance(own.position, RelativeBias):
            changes["model.position"] = RECIPE.model.position
        if type(own.head) is LanguageHead:
            changes["model.head"] = RECIPE.model.head
        return changes | {"optimizer": RECIPE.optimizer}

    def adam(self, rate: float, parts: int) -> Changes:
        """The preset's AdamW, with a warm-up of one part of the steps, and a cosine to zero."""
        return {"optimizer.learning_rate": WarmupCosine(rate, final=0.0, warmup_steps=self.config.train.steps // parts)}


def short(name: str, steps: int, data: Changes | None = None, **model: Any) -> Config:
    """A preset, made smaller; its seeds can be trained together."""
    found = load(CONFIGS / f"{name}.py")
    every = {"steps_per_call": 25, "log_every": 25, "eval_every": steps, "save_every": steps}
    sampling = Examples() if isinstance(found.data.sampling, Examples) else found.data.sampling
    return replace(
        found,
        directory="runs/recipe_tasks",
        data=replace(found.data, **{"sampling": sampling, **(data or {})}),
        model=replace(found.model, **model),
        train=replace(found.train, steps=steps, sample_tokens=0, best_by="loss", **every),
    )


def pairs(steps: int, objective: Any, **data: Any) -> Config:
    """A small encoder–decoder with relative positions and AdamW; its seeds can be trained together."""
    every: dict[str, Any] = {"steps_per_call": 25, "log_every": 25, "eval_every": steps, "save_every": steps}
    sizes: dict[str, Any] = {"n_layers": 1, "n_encoder_layers": 2, "n_heads": 4, "d_model": 96, "context_length": 64}
    return Config(
        "runs/recipe_tasks",
        EncoderDecoder(**sizes, position=RelativeBias(), norm=RMSNorm()),
        Data(**data, sampling=Examples(), batch_size=32),
        objective,
        AdamW(weight_decay=0.01),
        Train(steps=steps, sample_tokens=0, **every),
    )


def asked(name: str) -> Table:
    columns = ("question", "answer")
    return Table(f"$JAXFORMER_DATA/birth_places/{name}.tsv", *columns, columns=columns)


WIKI = TextLines("$JAXFORMER_DATA/birth_places/wiki.txt")
TASKS: Mapping[str, Task] = {
    "tokens: Shakespeare by BPE(1024) (loss)": Task(short("shakespeare_cpu", 300, {"tokenizer": BPE(1024)})),
    "masked tokens: tweets (loss)": Task(short("disaster_tweets_masked", 300, {"window": 48}, d_model=64)),
    "corrupted spans: biographies (loss)": Task(
        pairs(300, SpanCorruption(density=0.4), corpus=WIKI, tokenizer=BPE(2048, sentinels=32))
    ),
    "sequence to sequence: reverse 20 digits (exact)": Task(short("reverse", 600), final_exact, True),
    "classes: tweets (accuracy)": Task(short("disaster_tweets", 300, {"window": 48}, d_model=64), final_accuracy, True),
    "answers: birth places (loss)": Task(
        pairs(200, SequenceToSequence(), corpus=asked("train"), valid=asked("dev"), tokenizer=BPE(2048))
    ),
}
SCHEDULES = {f"AdamW at {rate:g}{more}": (rate, parts) for more, parts in WARMUPS.items() for rate in RATES}
WITH_RECIPE = "recipe"


def rows() -> tuple[Row, ...]:
    """Of each task AdamW by every schedule, and the recipe."""
    found = []
    for name, task in TASKS.items():
        changes = {how: task.adam(*schedule) for how, schedule in SCHEDULES.items()} | {WITH_RECIPE: task.recipe}
        more: dict[str, Any] = {"measure": task.measure, "higher": task.higher}
        found += [Row(f"{name}, {how}", task.config, None, SEEDS, change, **more) for how, change in changes.items()]
    return tuple(found)


def tell(report: Report) -> None:
    report.text(
        "Differences are paired seed by seed; their intervals hold together at 95 %, and helps or harms is said where "
        "one leaves out 0. AdamW's schedule was chosen on the validation split that it is judged on, in its favour."
    )
    report.table([compared(name, report) for name in TASKS])


def compared(name: str, report: Report) -> dict[str, str]:
    sign, by_adam = -1 if TASKS[name].higher else 1, [report.results[f"{name}, {how}"] for how in SCHEDULES]
    before = min(by_adam, key=lambda result: (math.isnan(result.mean), sign * result.mean))  # none that diverged
    after = report.results[f"{name}, {WITH_RECIPE}"]
    change = paired_difference(before.values, after.values, ERROR / len(TASKS))
    half = change.half_width or 0.0
    helps = (change.mean > 0) == TASKS[name].higher
    return {
        "task": name,
        "AdamW at its best": f"{before.mean:.4f} ± {before.deviation or 0:.4f}",
        "which is": before.row.name.removeprefix(f"{name}, "),
        "recipe": f"{after.mean:.4f} ± {after.deviation or 0:.4f}",
        "difference": f"{change.mean:+.4f} [{change.mean - half:+.4f}, {change.mean + half:+.4f}]",
        "said": ("helps" if helps else "harms") if abs(change.mean) > half > 0 else "",
    }


experiment = Experiment(
    "The recipe on other tasks",
    f"""
Small models of other tasks than the one on which `configs/shakespeare_cpu_fast.py` was tuned: with its parts and its
optimizer at its own rates, and as they were, by AdamW at three rates, with a warm-up of a tenth or (long) a third of
the steps and a cosine to zero; {SEEDS} seeds trained together.
""",
    rows(),
    tell,
    long=True,
)
