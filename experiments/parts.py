"""What each part is worth: one change at a time to a small decoder, and to a small encoder that classifies."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxformer import Config, Data, Decoder, Train
from jaxformer.config import load
from jaxformer.data.batches import Examples
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.data.tokenizers import BPE
from jaxformer.lab.experiments import Experiment, Report, Result, Row, final_accuracy
from jaxformer.lab.intervals import ERROR, Estimate, paired_difference
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import WarmupCosine
from jaxformer.model.heads import (
    AttentionPooling,
    BinaryHead,
    ClassificationHead,
    FirstToken,
    LastToken,
    MaxPooling,
)
from jaxformer.model.layers import (
    GELU,
    MLP,
    GatedFeedForward,
    LeCunNormal,
    NoNorm,
    Normal,
    ReLU,
    RMSNorm,
    Sigmoid,
    SiLU,
    Square,
    SquaredReLU,
    Tanh,
    TorchUniform,
    TruncatedNormal,
    XavierUniform,
)
from jaxformer.model.models import Embedding
from jaxformer.model.positions import ALiBi, NoPosition, RelativeBias, Rotary, Sinusoidal
from jaxformer.model.residuals import FeedForwardFirst, Parallel, PostNorm, SandwichNorm
from jaxformer.pictures import panels

SEEDS = 5


DECODER = Config(
    directory="runs/parts",
    data=Data(corpus=TinyShakespeare(), batch_size=16),
    model=Decoder(n_layers=2, n_heads=4, d_model=64, context_length=32, unroll=2),
    optimizer=AdamW(WarmupCosine(peak=3e-3, final=0.0, warmup_steps=50)),
    train=Train(steps=500, steps_per_call=50, log_every=50, eval_every=500, save_every=500, sample_tokens=0),
)
TWEETS = load(Path(__file__).parent.parent / "configs" / "disaster_tweets.py")
ENCODER = replace(
    TWEETS,
    directory="runs/parts",
    data=replace(TWEETS.data, sampling=Examples(), batch_size=32, window=48, tokenizer=BPE(2048, lowercase=True)),
    model=replace(
        TWEETS.model,
        d_model=32,
        n_heads=4,
        n_layers=1,
        context_length=48,
        head=BinaryHead("target"),
        initializer=Normal(),
    ),
    optimizer=AdamW(WarmupCosine(peak=3e-3, final=0.0, warmup_steps=50), weight_decay=0.1),
    train=Train(steps=400, steps_per_call=50, log_every=50, eval_every=400, save_every=400),
)
Changes = Mapping[str, Any]


def head(**changes: Any) -> Changes:
    return {"model.head": BinaryHead("target", **changes)}


# Question -> part -> what is changed; nothing is changed in the first, with which the others are compared.
OF_DECODER: Mapping[str, Mapping[str, Changes]] = {
    "heads": {"4": {}} | {str(n): {"model.n_heads": n} for n in (1, 2, 8)},
    "heads of keys and values": {"4, one each (MHA)": {}, "2, grouped (GQA)": {"model.n_kv_heads": 2}}
    | {"1, for all (MQA)": {"model.n_kv_heads": 1}},
    "activation": {"GELU": {}}
    | {
        name: {"model.feed_forward": MLP(activation)}
        for name, activation in {
            "ReLU": ReLU(),
            "ReLU²": SquaredReLU(),
            "x²": Square(),
            "SiLU": SiLU(),
            "tanh": Tanh(),
            "sigmoid": Sigmoid(),
        }.items()
    }
    | {
        name: {"model.feed_forward": GatedFeedForward(activation), "model.d_ff": 171}  # as many parameters
        for name, activation in {"gated SiLU (SwiGLU)": SiLU(), "gated GELU (GEGLU)": GELU()}.items()
    },
    "norms": {
        "LayerNorm before (pre-norm)": {},
        "RMSNorm before": {"model.norm": RMSNorm()},
        "behind (post-norm)": {"model.residual": PostNorm()},
        "before and behind (sandwich)": {"model.residual": SandwichNorm()},
        "none": {"model.norm": NoNorm()},
    },
    "order in the block": {
        "attention, then feed-forward": {},
        "feed-forward, then attention": {"model.residual": FeedForwardFirst()},
        "both at once (parallel)": {"model.residual": Parallel()},
    },
    "initial values": {"GPT-2's": {}}
    | {
        name: {"model.initializer": initializer}
        for name, initializer in {
            "normal, 0.02": Normal(),
            "truncated normal, 0.02": TruncatedNormal(),
            "Xavier uniform": XavierUniform(),
            "LeCun normal": LeCunNormal(),
            "PyTorch's": TorchUniform(),
        }.items()
    },
    "positions": {"learned": {}}
    | {
        name: {"model.position": position}
        for name, position in {
            "none": NoPosition(),
            "sinusoidal": Sinusoidal(),
            "rotary": Rotary(),
            "ALiBi": ALiBi(),
            "relative bias": RelativeBias(),
        }.items()
    }
    | {
        "sinusoidal, token vectors as large": {
            "model.position": Sinusoidal(),
            "model.embedding": Embedding(scaled=True),
            "model.initializer": XavierUniform(std=1 / 8),
        },
    },
}
OF_ENCODER: Mapping[str, Mapping[str, Changes]] = {
    "pooling": {
        "mean": {},
        "first token": head(pooling=FirstToken()),
        "last token": head(pooling=LastToken()),
        "largest": head(pooling=MaxPooling()),
        "attention": head(pooling=AttentionPooling()),
    },
    "classifier": {
        "sigmoid, linear": {},
        "sigmoid, two layers": head(hidden=32),
        "softmax, linear": {"model.head": ClassificationHead("target")},
        "softmax, two layers": {"model.head": ClassificationHead("target", hidden=32)},
    },
}


def rows() -> tuple[Row, ...]:
    """A row for each part, and one for each of the models that are changed."""
    found = [Row("decoder", DECODER, None, SEEDS)]
    for question, parts in OF_DECODER.items():
        found += [
            Row(f"{question}: {part}", DECODER, None, SEEDS, changes) for part, changes in parts.items() if changes
        ]
    of_accuracy = {"measure": final_accuracy, "higher": True}
    found.append(Row("encoder", ENCODER, None, SEEDS, **of_accuracy))
    for question, parts in OF_ENCODER.items():
        found += [
            Row(f"{question}: {part}", ENCODER, None, SEEDS, changes, **of_accuracy)
            for part, changes in parts.items()
            if changes
        ]
    return tuple(found)


def tell(report: Report) -> None:
    table, compared = [], {}
    for base, questions in (("decoder", OF_DECODER), ("encoder", OF_ENCODER)):
        first = report.results[base]
        for question, parts in questions.items():
            error = ERROR / (len(parts) - 1)
            compared[question, base] = {}
            for part, changes in parts.items():
                result = report.results[f"{question}: {part}"] if changes else first
                difference = paired_difference(first.values, result.values, error) if changes else None
                compared[question, base][part] = difference
                table.append(cells(question, part, result, difference))
    report.text(
        "Losses of the decoder's parts, accuracies of the encoder's (pooling, classifier), on the whole validation "
        "split. The difference is paired seed by seed with the first part of the question, in brackets its interval; "
        "of one question all intervals hold together at 95 %, and better or worse is said where the interval leaves "
        "out 0."
    )
    report.table(table)
    figure, axes = panels(3, 3, 13, 9)
    for each, ((question, base), parts) in zip(axes, compared.items(), strict=True):
        draw(each, f"{question} ({'loss' if base == 'decoder' else 'accuracy'})", parts)
    report.picture(
        "differences",
        figure,
        "Difference from the first part of each question, and its interval: lower is better in losses, higher in "
        "accuracies.",
    )
    report.text(
        "### What shared keys and values save\n\nOne text of 32 tokens; tokens a second are medians of 7, in turns."
    )
    report.table(decoding(report))


def cells(question: str, part: str, result: Result, difference: Estimate | None) -> dict[str, str]:
    said = interval = ""
    if difference is not None and (half := difference.half_width) is not None:
        interval = f"{difference.mean:+.4f} [{difference.mean - half:+.4f}, {difference.mean + half:+.4f}]"
        if abs(difference.mean) > half:
            said = "better" if (difference.mean > 0) == result.row.higher else "worse"
    return {
        "question": question,
        "part": part,
        "measured": f"{result.mean:.4f} ± {result.deviation:.4f}",
        "difference": interval,
        "said": said,
    }


def draw(axes: Any, title: str, parts: Mapping[str, Estimate | None]) -> None:
    """A line for each part, with its interval."""
    for place, difference in enumerate(parts.values()):
        mean, half = (0.0, 0.0) if difference is None else (difference.mean, difference.half_width or 0.0)
        axes.errorbar(mean, place, xerr=half, fmt="o", color="tab:blue", capsize=3)
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_yticks(range(len(parts)), list(parts), fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)


def decoding(report: Report) -> list[dict[str, str]]:
    names = {
        part: report.results[f"heads of keys and values: {part}"] if changes else report.results["decoder"]
        for part, changes in OF_DECODER["heads of keys and values"].items()
    }
    speeds: dict[str, list[float]] = {part: [] for part in names}
    for turn in range(8):
        for part, result in names.items():
            started = time.perf_counter()
            result.runs[0].sample(tokens=31, seed=turn)
            if turn:
                speeds[part].append(31 / (time.perf_counter() - started))
    size = lambda run: sum(a.nbytes for a in jax.tree.leaves(run.model.cache(1, 32)))
    spread = lambda values: f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
    return [
        {
            "heads of keys and values": part,
            "parameters": f"{sum(a.size for a in jax.tree.leaves(result.runs[0].state.params)):,}",
            "loss": f"{result.mean:.4f}",
            "bytes of the cache": f"{size(result.runs[0]):,}",
            "tokens a second": spread(speeds[part]),
        }
        for part, result in names.items()
    ]


experiment = Experiment(
    "What each part is worth",
    """
A decoder of 2 layers, 4 heads, d_model 64 and context 32 on tiny Shakespeare by characters, 500 steps of 16 windows;
and an encoder of one layer, d_model 32, on the disaster tweets, 400 steps of 32. One thing is changed at a time (with
token vectors as large as the sinusoids their initial values, too), with 5 seeds each. All have one rate, 3e-3, which is
not the decoder's best ("Which optimizer, with which learning rate": 1e-2 gains more than most parts do): at another
rate norms and initial values in particular may stand otherwise. What is better here, in so few steps and so small,
need not be better in a large model.
""",
    rows(),
    tell,
)
