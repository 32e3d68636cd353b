"""What came before: recurrent networks beside a transformer of as many parameters, on the same text."""

import jax
import numpy as np

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.lab.experiments import Experiment, Report, Result, Row
from jaxformer.lab.measures import before_training, gradient_by_distance, loss_by_position
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.baselines import GRU, LSTM, RNN
from jaxformer.model.heads import LanguageHead
from jaxformer.model.models import Model
from jaxformer.model.positions import Rotary
from jaxformer.pictures import lines, panels, smooth

CONTEXT = 128
HEAD = LanguageHead(tied=False, bias=True)
MODELS: dict[str, Model] = {
    "RNN": RNN(d_model=194, context_length=CONTEXT),
    "GRU": GRU(d_model=120, context_length=CONTEXT),
    "LSTM": LSTM(d_model=104, context_length=CONTEXT),
    "transformer": Decoder(
        n_layers=2, n_heads=4, d_model=62, head_width=16, context_length=CONTEXT, position=Rotary(), head=HEAD, unroll=2
    ),
}


def row(name: str) -> Row:
    config = Config(
        directory="runs/rnn",
        data=Data(corpus=TinyShakespeare(), batch_size=32),
        model=MODELS[name],
        optimizer=AdamW(WarmupCosine(peak=3e-3, final=0.0, warmup_steps=100)),
        train=Train(steps=3000, steps_per_call=50, log_every=50, eval_every=500, save_every=1500, sample_tokens=0),
    )
    return Row(name, config, None, 3)


def tell(report: Report) -> None:
    table, by_step, by_time, by_place, reach = [], {}, {}, {}, {}
    for name, result in report.results.items():
        steps, losses = result.curve("valid")
        by_step[name] = steps, np.mean(losses, 0)
        by_time[name] = result.curve("valid", "seconds")[1][0], np.mean(losses, 0)
        places = np.mean([loss_by_position(run) for run in result.runs], 0)
        by_place[name] = np.arange(1, CONTEXT + 1), smooth(places, 4)
        far = np.mean([gradient_by_distance(run) for run in result.runs], 0)
        table.append(costs(result, places, far))
        reach[name] = np.arange(CONTEXT), far
        reach[f"{name}, before training"] = np.arange(CONTEXT), gradient_by_distance(before_training(result.runs[0]))
    report.table(table)
    figure, axes = panels(2, 2, 11, 8)
    lines(axes[0], by_step, "step", "validation loss (nats)")
    lines(axes[1], by_time, "seconds of training, all seeds together", "validation loss (nats)")
    lines(axes[2], by_place, "place in the window", "validation loss (nats)", log="x")
    lines(axes[3], reach, "tokens back", "gradient norm", log="y")
    axes[3].set_ylim(1e-8, None)
    report.picture(
        "comparison",
        figure,
        "Loss by step, by time, and by place in the window (how much the text before a token helps), and how much the "
        "last prediction depends on a token so many places back.",
    )


def costs(result: Result, places: np.ndarray, far: np.ndarray) -> dict[str, str]:
    """What a model takes and reaches; losses and gradients by place."""
    step = 1000 * result.seconds / result.row.config.train.steps
    return {
        "model": result.row.name,
        "parameters": f"{sum(a.size for a in jax.tree.leaves(result.runs[0].state.params)):,}",
        "ms a step of all seeds": f"{step:.0f}",
        "loss": f"{result.mean:.4f}",
        "of places 1 to 8": f"{places[:8].mean():.4f}",
        "65 to 128": f"{places[64:].mean():.4f}",
        "gradient of the token 1 back": f"{far[1]:.1e}",
        "16 back": f"{far[16]:.1e}",
        "100 back": f"{far[100]:.1e}",
    }


experiment = Experiment(
    "Recurrent networks beside a transformer",
    """
Characters, windows of 128, batches of 32, about 100,000 parameters each, one recipe. A recurrent network takes one
token after another, and what is far back reaches it through many products.
""",
    tuple(map(row, MODELS)),
    tell,
)
