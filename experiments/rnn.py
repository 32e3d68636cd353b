"""What came before: recurrent networks beside a transformer of as many parameters, on the same text and in recall."""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tasks import Recall
from jaxformer.data.tokenizers import Characters
from jaxformer.lab.experiments import Experiment, Report, Result, Row
from jaxformer.lab.measures import before_training, gradient_by_distance, loss_by_position, nats
from jaxformer.learning.objectives import PrefixLM
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.baselines import GRU, LSTM, RNN
from jaxformer.model.heads import LanguageHead
from jaxformer.model.masks import Places, one_document
from jaxformer.model.models import Model
from jaxformer.model.positions import Rotary
from jaxformer.pictures import lines, panels, smooth
from jaxformer.run.opened import Run

CONTEXT = 128
HEAD = LanguageHead(tied=False, bias=True)
MODELS: dict[str, Model] = {
    "RNN": RNN(d_model=194, context_length=CONTEXT),
    "GRU": GRU(d_model=120, context_length=CONTEXT),
    "LSTM": LSTM(d_model=104, context_length=CONTEXT),
    "LSTM, forget gates not biased": LSTM(d_model=104, context_length=CONTEXT, forget_bias=None),
    "transformer": Decoder(
        n_layers=2, n_heads=4, d_model=62, head_width=16, context_length=CONTEXT, position=Rotary(), head=HEAD, unroll=2
    ),
}


DISTANCES = 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 100  # tokens back
LENGTHS = 64, 128, 256, 512, 1024, 2048
RECALLED = "recall: "


def row(name: str) -> Row:
    config = Config(
        directory="runs/rnn",
        data=Data(corpus=TinyShakespeare(), batch_size=32),
        model=MODELS[name],
        optimizer=AdamW(WarmupCosine(peak=3e-3, final=0.0, warmup_steps=100)),
        train=Train(steps=3000, steps_per_call=50, log_every=50, eval_every=500, save_every=1500, sample_tokens=0),
    )
    return Row(name, config, None, 2)


def recalled(name: str) -> Row:
    """Ten symbols, d = 1 to 100 tokens back, behind noise of 26 others."""
    config = Config(
        directory="runs/rnn",
        data=Data(
            corpus=Recall(examples=50_000),
            tokenizer=Characters(end_token=True),
            sampling=Examples(joined=True),
            batch_size=64,
        ),
        model=MODELS[name],
        objective=PrefixLM(),
        optimizer=AdamW(WarmupCosine(peak=3e-3, final=0.0, warmup_steps=100)),
        train=Train(steps=1000, steps_per_call=50, log_every=50, eval_every=500, save_every=500, sample_tokens=0),
    )
    return Row(RECALLED + name, config)


def tell(report: Report) -> None:
    table, by_step, by_time, by_place, reach = [], {}, {}, {}, {}
    for name in MODELS:
        result = report.results[name]
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
    biased, plain = (report.results[name] for name in ("LSTM", "LSTM, forget gates not biased"))
    gain = plain.mean - biased.mean
    report.text(
        "An LSTM's forget gate begins near a half, so that a state is halved at each token and "
        f"{2**-16:.0e} of it is left after 16; biased by 1, as is usual, it keeps 0.73 of it at each. Here that "
        f"{'lowers' if gain > 0 else 'raises'} the loss by {abs(gain):.4f} nats (plain {plain.mean:.4f}, biased "
        f"{biased.mean:.4f}; the RNN has {report.results['RNN'].mean:.4f}). As many parameters give an LSTM, with four "
        f"matrices for the RNN's one, a state of {MODELS['LSTM'].d_model} numbers instead of {MODELS['RNN'].d_model}."
    )
    recall(report)
    lengths(report)


def recall(report: Report) -> None:
    report.text(
        "### Recall\n\nOne of ten symbols, then noise, then the symbol is asked for: it stood d tokens back, d = 1 to "
        "100 evenly in training (1,000 steps of 64 texts). Accuracy on 500 texts of each d, drawn with another seed "
        "(of d = 1 and 2 there are so few that training has most of them); guessing has 0.10:"
    )
    found = {name: recall_by_distance(report.results[RECALLED + name].runs[0]) for name in MODELS}
    report.table(
        [
            {"model": name} | {f"d = {d}": f"{accuracy:.2f}" for d, accuracy in zip(DISTANCES, accuracies, strict=True)}
            for name, accuracies in found.items()
        ]
    )
    figure, axes = panels(1, 1, 7, 4)
    lines(axes[0], {name: (DISTANCES, each) for name, each in found.items()}, "tokens back", "accuracy")
    report.picture("recall", figure, "How often a symbol is said that stood so many tokens back.")


def recall_by_distance(run: Run) -> list[float]:
    accuracies, tokenizer = [], run.tokenizer
    for d in DISTANCES:
        pairs = list(Recall(length=d, shortest=d, examples=500, seed=1).pairs())
        ids = jnp.asarray([[*tokenizer.document(text)][: d + 2] for text, _ in pairs])  # end token, text, end token
        h = run.model.hidden(run.eval_params, ids, one_document(d + 2)).h[:, -1]
        said = run.model.logits(run.eval_params, h).argmax(-1)
        answers = jnp.asarray([tokenizer.encode(answer)[0] for _, answer in pairs])
        accuracies.append(float((said == answers).mean()))
    return accuracies


def lengths(report: Report) -> None:
    """Seconds and memory against the length of a text."""
    report.text(
        "### What a long text costs\n\nThe models above, untrained, with a context of T tokens. Training: the gradient "
        "of one text of T tokens, and the memory that its program needs besides parameters and gradients. Generation: "
        "one token more behind T, the mean of 20. Medians of 5, in turns."
    )
    names = ("RNN", "LSTM", "transformer")
    rows, curves = [], {title: {name: (LENGTHS, []) for name in names} for title in TITLES}
    for length in LENGTHS:
        found = costs_of_length({name: replace(MODELS[name], vocab_size=65, context_length=length) for name in names})
        for name, numbers in found.items():
            for title, number in zip(TITLES, numbers, strict=True):
                curves[title][name][1].append(number)
            cells = (f"{1000 * numbers[0]:.1f}", f"{numbers[1] / 2**20:.1f}", f"{1000 * numbers[2]:.2f}")
            rows.append({"T": length, "model": name} | dict(zip(TITLES, cells, strict=True)))
    for cells in rows:
        cells["T"] = f"{cells['T']:,}"
    report.table(sorted(rows, key=lambda cells: names.index(cells["model"])))
    figure, axes = panels(1, 3, 13, 4)
    for each, (title, of_models) in zip(axes, curves.items(), strict=True):
        lines(each, of_models, "tokens T", title, log="xy")
    slope = lambda name, title: np.polyfit(np.log(LENGTHS[-3:]), np.log(curves[title][name][1][-3:]), 1)[0]
    report.picture(
        "lengths",
        figure,
        "Who is sequential and who is quadratic: a recurrent network takes one token after another, a transformer all "
        "at once, but each with every other.",
    )
    report.text(
        "From T = 512 to 2,048 time grows as T to the power of "
        + ", ".join(f"{slope(name, TITLES[0]):.2f} ({name})" for name in names)
        + ", memory as "
        + ", ".join(f"{slope(name, TITLES[1]):.2f} ({name})" for name in names)
        + "."
    )


TITLES = "training, ms", "training, MiB", "generation, ms a token"


def costs_of_length(models: dict[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Seconds and bytes of a gradient, seconds of a generated token."""
    calls: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    memory: dict[str, int] = {}
    for name, model in models.items():
        params = model.init(jax.random.key(0))
        length = model.context_length
        ids = jax.random.randint(jax.random.key(1), (1, length + 1), 0, 65)
        gradient = jax.jit(jax.grad(lambda params, ids, model=model: nats(model, params, ids).mean()))
        compiled = gradient.lower(params, ids).compile()
        memory[name] = getattr(compiled.memory_analysis(), "temp_size_in_bytes", 0)  # 0: this backend does not tell
        cache = model.cache(1, length)

        @jax.jit
        def more(params: Any, token: jax.Array, cache: Any, model: Any = model, length: int = length) -> jax.Array:
            at = Places(jnp.full((1, 1), length - 1), jnp.ones((1, 1), jnp.int32))
            return model.logits(params, model.hidden(params, token, at, cache=cache).h)

        train = lambda compiled=compiled, params=params, ids=ids: compiled(params, ids)
        say = lambda more=more, params=params, ids=ids, cache=cache: more(params, ids[:, :1], cache)
        calls[name] = train, say
    seconds = {name: ([], []) for name in models}
    for _ in range(5):
        for name, both in calls.items():
            for kept, call, times in zip(seconds[name], both, (1, 20), strict=True):
                jax.block_until_ready(call())  # the processor's caches hold what another model left there
                started = time.perf_counter()
                for _ in range(times):
                    jax.block_until_ready(call())
                kept.append((time.perf_counter() - started) / times)
    middle = statistics.median
    return {name: (middle(seconds[name][0]), float(memory[name]), middle(seconds[name][1])) for name in models}


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
Characters, windows of 128, batches of 32, about 100,000 parameters each, one recipe with one rate, 3e-3, which was
tuned for none of them. A recurrent network takes one token after another, and what is far back reaches it through many
products.
""",
    (*map(row, MODELS), *map(recalled, MODELS)),
    tell,
)
