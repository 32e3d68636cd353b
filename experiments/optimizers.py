"""Which optimizer with which learning rate: a small decoder, trained by each at several rates."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.lab.experiments import Experiment, Report, Result, Row
from jaxformer.learning.adafactor import Adafactor
from jaxformer.learning.groups import Everything, Group, Groups, Hidden
from jaxformer.learning.muon import Muon
from jaxformer.learning.optimizers import AdamW, Lion, Optimizer
from jaxformer.learning.schedule_free import ScheduleFree
from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.pictures import panels

SEEDS, CLOSE = 2, 0.02  # a rate is good whose mean loss is so many nats from that of the best one, or fewer
FALLING = WarmupCosine(peak=1.0, final=0.0, warmup_steps=50)
ADAMW = AdamW(Constant(6e-3))  # beside Muon

DECODER = Config(
    directory="runs/optimizers",
    data=Data(corpus=TinyShakespeare(), batch_size=16),
    model=Decoder(n_layers=2, n_heads=4, d_model=64, context_length=32, unroll=2),
    train=Train(
        steps=500, steps_per_call=50, log_every=50, eval_every=500, save_every=500, sample_tokens=0, guard=None
    ),
)


def beside_adamw(muon: Muon) -> Groups:
    return Groups(FALLING, (Group(Hidden(), muon), Group(Everything(), ADAMW)))


def falling(rate: float) -> WarmupCosine:
    return replace(FALLING, peak=rate)


# Optimizer -> learning rate -> what is trained with; of Muon the rate is that of the layers' matrices.
TRIED: Mapping[str, Mapping[float, Optimizer]] = {
    "AdamW": {rate: AdamW(falling(rate)) for rate in (1e-3, 3e-3, 6e-3, 1e-2, 3e-2)},
    "Muon and AdamW": {rate: beside_adamw(Muon(Constant(rate))) for rate in (3e-3, 1e-2, 2e-2, 5e-2, 1e-1)},
    "Muon by heads and AdamW": {
        rate: beside_adamw(Muon(Constant(rate), heads=True)) for rate in (3e-3, 1e-2, 2e-2, 5e-2, 1e-1)
    },
    "schedule-free AdamW": {
        rate: ScheduleFree(optimizer=AdamW(Constant(rate, warmup_steps=50), b1=0.0))
        for rate in (3e-3, 6e-3, 1e-2, 2e-2, 5e-2)
    },
    "Lion": {rate: Lion(falling(rate)) for rate in (2e-4, 5e-4, 1e-3, 2e-3, 5e-3)},
    "Adafactor": {rate: Adafactor(falling(rate)) for rate in (1e-2, 3e-2, 1e-1, 2e-1, 5e-1)},
}


def name_of(optimizer: str, rate: float) -> str:
    return f"{optimizer} at {rate:g}"


def results_of(report: Report, optimizer: str) -> dict[float, Result]:
    return {rate: report.results[name_of(optimizer, rate)] for rate in TRIED[optimizer]}


def tell(report: Report) -> None:
    report.text(
        f"The best rate of those tried, and the rates whose mean loss is within {CLOSE} nats of that; floats that the "
        "optimizer keeps for each parameter."
    )
    report.table([cells(optimizer, results_of(report, optimizer)) for optimizer in TRIED])
    figure, (axes,) = panels(1, 1, 6, 4)
    for optimizer in TRIED:
        found = {rate: result.mean for rate, result in results_of(report, optimizer).items()}
        axes.plot([*found], [*found.values()], marker="o", label=optimizer)
    axes.set_xscale("log")
    axes.set_xlabel("learning rate")
    axes.set_ylabel("validation loss")
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    report.picture("rates", figure, "Loss on the whole validation split by learning rate, means of 2 seeds.")


def cells(optimizer: str, results: Mapping[float, Result]) -> dict[str, Any]:
    means = {rate: result.mean for rate, result in results.items() if math.isfinite(result.mean)}
    best = min(means, key=lambda rate: means[rate])
    good = [rate for rate, mean in means.items() if mean <= means[best] + CLOSE]
    state = results[best].runs[0].state
    count = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    return {
        "optimizer": optimizer,
        "best rate": f"{best:g}",
        "loss": f"{means[best]:.4f} ± {results[best].deviation:.4f}",
        "good rates": f"{min(good):g} to {max(good):g}",
        "floats kept": f"{count(state.opt_state) / count(state.params):.2f}",
    }


experiment = Experiment(
    "Which optimizer, with which learning rate",
    """
A decoder of 2 layers, 4 heads, d_model 64 and context 32 on tiny Shakespeare by characters, 500 steps of 16 windows,
2 seeds for each optimizer and rate. Rates warm up for 50 steps and fall along a cosine to 0; those of schedule-free
learning stay where they are. Beside Muon, AdamW has what is no matrix of a layer, at a rate of 0.006. What is best
here, in so few steps and so small, need not be best in a large model.
""",
    tuple(
        Row(name_of(optimizer, rate), DECODER, None, SEEDS, {"optimizer": spec})
        for optimizer, rates in TRIED.items()
        for rate, spec in rates.items()
    ),
    tell,
)
