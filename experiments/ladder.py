"""From a bigram to three blocks with norms, each rung one thing more: by the published recipe, and by a better one."""

import math
import time
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np

from jaxformer import Config, Data, Decoder, Train
from jaxformer.data.corpora import TinyShakespeare
from jaxformer.lab.experiments import Experiment, Report, Result, Row, mean_or_better
from jaxformer.lab.measures import nats
from jaxformer.learning.optimizers import AdamW
from jaxformer.learning.schedules import Constant, WarmupCosine
from jaxformer.model.baselines import Bigram, TokenEmbedding
from jaxformer.model.blocks import PreNorm
from jaxformer.model.heads import LanguageHead
from jaxformer.model.kernels import Look, Softmax, Uniform
from jaxformer.model.layers import MLP, LayerNorm, LeCunNormal, NoNorm, OneLayer, ReLU, TorchUniform
from jaxformer.model.masks import Causal, View, one_document
from jaxformer.model.models import Model
from jaxformer.pictures import lines, panels, smooth
from jaxformer.run.opened import Run
from jaxformer.run.plan import prepare_data

SEEDS = 8
ALONE = Decoder(  # attention and nothing besides: no sums, no norms, no output projection, no feed-forward
    n_layers=1,
    n_heads=4,
    d_model=32,
    context_length=8,
    head=LanguageHead(tied=False, bias=True),
    norm=NoNorm(),
    residual=PreNorm(attention=False, cross_attention=False, feed_forward=False),
    output_projection=False,
    feed_forward=None,
    initializer=TorchUniform(),
)
ONE_HEAD = replace(ALONE, n_heads=1, head_width=16)
FEED = replace(ALONE, feed_forward=OneLayer(ReLU(), bias=True))
BLOCKS = replace(FEED, n_layers=3, unroll=3)
SUMS = replace(
    BLOCKS,
    residual=PreNorm(),
    output_projection=True,
    bias=True,
    qkv_bias=False,
    feed_forward=MLP(ReLU(), bias=True),
)
RUNGS: dict[str, tuple[Model, float | None]] = {
    "bigram table": (Bigram(context_length=8, initializer=TorchUniform()), 2.4919),
    "token embedding and linear head": (TokenEmbedding(d_model=32, context_length=8), 2.5165),
    "token averaging": (replace(ONE_HEAD, kernel=Uniform()), None),
    "one head of 16": (ONE_HEAD, 2.4176),
    "four heads of 8": (ALONE, 2.2609),
    "and feed-forward": (FEED, 2.2291),
    "three blocks without sums": (BLOCKS, 2.3403),
    "and residual sums": (SUMS, 2.0681),
    "and LayerNorm": (replace(SUMS, norm=LayerNorm()), 2.0590),
}
BETTER = "better recipe: "


def rung(name: str, better: bool) -> Row:
    """By the published recipe: PyTorch's initial values, AdamW with decay 0.01, no schedule, no clipping."""
    model, published = RUNGS[name]
    table = isinstance(model, TokenEmbedding)
    steps, rate = (3000, 1e-2) if table else (5000, 1e-3)
    config = Config(
        directory="runs/ladder",
        data=Data(corpus=TinyShakespeare(), batch_size=32),
        model=model,
        optimizer=AdamW(Constant(rate), b2=0.999, weight_decay=0.01, clip=None),
        train=Train(steps=steps, steps_per_call=500, log_every=50, eval_every=steps, save_every=steps, sample_tokens=0),
    )
    narrow = (
        "the head's 16 numbers are filled up with zeros to d_model, so that the linear layer behind them begins within "
        "± 1/√32, not the published ± 1/√16"
    )
    remark = narrow if isinstance(model, Decoder) and model.head_width else ""
    if not better:
        return Row(name, config, published, SEEDS, remark=remark)
    changes = {
        "model.initializer": TorchUniform(std=0.2) if isinstance(model, Bigram) else LeCunNormal(std=0.2),
        "optimizer.learning_rate": WarmupCosine(peak=0.03 if table else 0.01, final=0.0, warmup_steps=100),
        "optimizer.clip": 1.0,
    }
    return Row(BETTER + name, config, published, SEEDS, changes, reached=mean_or_better)


def tell(report: Report) -> None:
    results = report.results
    one, three = results["four heads of 8"], results["three blocks without sums"]
    feed = results["and feed-forward"]
    verdict = "worse than one, as published" if three.mean > feed.mean else "better than one, other than published"
    report.text(
        f"Three blocks without sums ({three.mean:.4f}) are {verdict} ({feed.mean:.4f}); one of attention alone has "
        f"{one.mean:.4f}."
    )
    noise = random_batches(results["and LayerNorm"].runs[0], 20)
    report.text(
        "The published losses are of one seed each, and means over 200 random batches; twenty such means of one run of "
        f"the last rung deviate by {np.std(noise, ddof=1):.4f} from one another. Ours are of the whole split. By how "
        "many deviations, of seeds and batches together, a published loss is less than our mean:"
    )
    report.table([distance(results[name], float(np.std(noise, ddof=1))) for name in RUNGS if RUNGS[name][1]])
    figure, axes = panels(1, 2, 11, 4.5)
    for each, better in zip(axes, (False, True), strict=True):
        curves = {}
        for name in RUNGS:
            steps, losses = results[BETTER * better + name].curve()
            curves[name] = steps, smooth(np.mean(losses, 0), 5)
        lines(each, curves, "step", "training loss (nats)", "better recipe" if better else "published recipe")
        each.set_ylim(1.9, 3.2)
    report.picture("curves", figure, "Training loss of every rung, the mean of all seeds, smoothed over 250 steps.")
    report.text("### 500 characters from each rung (seed 0, better recipe)")
    for name in RUNGS:
        report.text(name + ":")
        report.code(results[BETTER + name].runs[0].sample(tokens=500, seed=0))
    report.text("### Why scores are divided by √K\n\nQueries and keys of unit variance, 4 × 8 of them:")
    report.table(list(map(variances, (4, 16, 64, 256))))
    logits = np.array([0.1, -0.2, 0.3, -0.2, 0.5])
    figure, axes = panels(1, 4, 9, 2.4)
    for each, scale in zip(axes, (1, 4, 16, 64), strict=True):
        each.bar(range(5), jax.nn.softmax(logits * scale))
        each.set(ylim=(0, 1), title=f"softmax({scale} × z)", xticks=range(5))
    report.picture("softmax", figure, "Softmax sharpens as its input z = (0.1, −0.2, 0.3, −0.2, 0.5) grows.")
    report.text("### Averaging the past: loops against matrices")
    report.table(loops_against_matrices())


def distance(result: Result, noise: float) -> dict[str, str]:
    spread = math.hypot(result.deviation or 0.0, noise)
    return {"row": result.row.name, "deviations": f"{(result.mean - (result.row.published or 0.0)) / spread:.1f}"}


def random_batches(run: Run, count: int) -> list[float]:
    """Losses as they were published: over 200 batches of 32 windows that begin anywhere in the validation split."""
    tokens = prepare_data(run.config, run.tokenizer).valid[0].tokens
    first = np.random.default_rng(0).integers(0, len(tokens) - 8, (count, 200 * 32, 1))
    drawn = (np.asarray(tokens[each + np.arange(9)], np.int32) for each in first)
    return [float(nats(run.model, run.state.eval_params, rows).mean()) for rows in drawn]


def variances(width: int) -> dict[str, str]:
    q, k = jax.random.normal(jax.random.key(0), (2, 4, 1, 8, width))
    scaled = Softmax().scores({}, q, {}, {"k": k})
    raw = jnp.einsum("BHTK,BHSK->BHTS", q, k)
    top = lambda scores: float(jax.nn.softmax(scores).max(-1).mean())
    return {
        "width K": str(width),
        "variance of q·k": f"{raw.var():.2f}",
        "variance of q·k/√K": f"{scaled.var():.2f}",
        "largest weight, unscaled": f"{top(raw):.2f}",
        "largest weight, scaled": f"{top(scaled):.2f}",
    }


def loops_against_matrices() -> list[dict[str, str]]:
    """The mean of each token's past, [B, T, D] = [32, 64, 32]: nested loops against one product, and the kernel."""
    x = np.random.default_rng(0).normal(size=(32, 64, 32)).astype(np.float32)

    def loops() -> np.ndarray:
        out = np.zeros_like(x)
        for b in range(x.shape[0]):
            for t in range(x.shape[1]):
                out[b, t] = x[b, : t + 1].mean(0)
        return out

    means = jnp.tril(jnp.ones((64, 64))) / jnp.arange(1, 65)[:, None]  # [T, S]
    at = one_document(64)
    view = View(at, at, Causal(), 1)
    ways = {
        "a product with the matrix of means": jax.jit(lambda x: jnp.einsum("TS,BSD->BTD", means, x)),
        "the uniform kernel": jax.jit(
            lambda x: Uniform()({}, Look(x[:, None], {}, {"v": x[:, None]}, view), None, 0.0).h
        ),
    }
    return [compared(name, loops, f, x) for name, f in ways.items()]


def compared(name: str, loops: Callable[[], np.ndarray], f: Callable[..., jax.Array], x: np.ndarray) -> dict[str, str]:
    on_device, ratios = jnp.asarray(x), []
    difference = float(np.abs(loops() - np.asarray(f(on_device)).reshape(x.shape)).max())
    for _ in range(20):  # A B A B
        started = time.perf_counter()
        loops()
        between = time.perf_counter()
        jax.block_until_ready(f(on_device))
        ratios.append((between - started) / (time.perf_counter() - between))
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
    return {
        "instead of loops": name,
        "largest difference": f"{difference:.1e}",
        "times faster, median of 20": f"{middle:.0f} ({low:.0f} to {high:.0f} for the middle half)",
        "published": "about 220",
    }


experiment = Experiment(
    "The ladder: from a bigram to a decoder",
    """
Windows of 8 characters, d_model 32, batches of 32. Each rung adds one thing to the one before. By the published recipe
(PyTorch's initial values, AdamW with decay 0.01, no schedule), "reached" means that the published number lies within
the range of the seeds or is beaten; below, the same architectures and steps with a warm-up, a cosine to zero, clipping
and other initial values, where it means that the mean is at or below it.
""",
    tuple(rung(name, better) for better in (False, True) for name in RUNGS),
    tell,
)
