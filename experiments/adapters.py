"""Full fine-tuning, LoRA, and a new head over what is frozen: of the encoder of tweets, pretrained by masking."""

import statistics
import time
from pathlib import Path

import jax
import numpy as np

from jaxformer.config import load
from jaxformer.lab.experiments import Experiment, Report, Result, Row, best_accuracy, final_accuracy
from jaxformer.lab.intervals import estimate
from jaxformer.learning.adapters import LoRA
from jaxformer.learning.groups import Everything, Group, Groups
from jaxformer.learning.groups import Path as Named
from jaxformer.learning.optimizers import AdamW, Frozen
from jaxformer.learning.schedules import WarmupLinear
from jaxformer.run.members import batches_of
from jaxformer.run.plan import hyper_of, prepare_data
from jaxformer.run.step import init_state, train_steps

CONFIGS = Path(__file__).parent.parent / "configs"
TUNED, MASKED = (load(CONFIGS / f"disaster_tweets{end}.py") for end in ("", "_masked"))
SPLITS = ("data.corpus.fold", "data.split_seed")
SEEDS, STEPS = 3, 172  # two epochs
HEAD = Named("head_*")
REST = Named("embedding*"), Named("*bias"), Named("*scale"), HEAD  # what is no matrix of a layer
FAST = AdamW(WarmupLinear(peak=5e-3, final=0.0, warmup_steps=50), weight_decay=0.0)


def tunes(name: str, **overrides) -> Row:
    knobs = {"train.steps": STEPS, "train.eval_every": STEPS // 4, "train.save_every": STEPS}
    overrides = knobs | overrides
    how = {"measure": best_accuracy, "higher": True, "also": SPLITS, "begins_with": PRETRAINED.name}
    return Row(name, TUNED, None, SEEDS, overrides, **how)


PRETRAINED = Row("masked pretraining", MASKED, None, SEEDS, measure=final_accuracy, higher=True, also=SPLITS)
TUNINGS = (
    tunes("full"),
    *(
        tunes(f"LoRA, rank {rank}", adapter=LoRA(rank, 2.0 * rank, trained=(HEAD,)), optimizer=FAST)
        for rank in (1, 4, 16)
    ),
    tunes("frozen, new head", optimizer=Groups(groups=(Group(HEAD, FAST), Group(Everything(), Frozen())))),
    tunes("LoRA, full rank, and the rest", adapter=LoRA(128, 128.0, trained=REST)),
)


def tell(report: Report) -> None:
    results = [report.results[row.name] for row in TUNINGS]
    times = step_times(results)
    report.table([about(result, seconds) for result, seconds in zip(results, times, strict=True)])


def about(result: Result, seconds: float) -> dict[str, str]:
    """What a row of the table says: of the parameters that are trained, and of the last rows of training."""
    run = result.runs[0]
    size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    trained = size(run.state.params)
    if isinstance(run.config.optimizer, Groups):
        trained = size({path: a for path, a in run.state.params.items() if path.startswith("head_")})
    losses = [float(np.mean(losses[-5:])) for losses in result.curve("train")[1]]
    files = sum(
        f.stat().st_size for f in (Path(run.config.directory) / "checkpoints" / str(STEPS)).rglob("*") if f.is_file()
    )
    return {
        "row": result.row.name,
        "trained": f"{trained:,} ({100 * trained / size(run.eval_params):.2f} %)",
        "accuracy, best of 4": f"{estimate(result.values).mean:.4f} ± {estimate(result.values).deviation:.4f}",
        "training loss, last 50 steps": f"{estimate(losses).mean:.4f} ± {estimate(losses).deviation:.4f}",
        "state": f"{size(run.state) * 4 / 1e6:.1f} MB",
        "a checkpoint": f"{files / 1e6:.2f} MB",
        "ms of a step": f"{1000 * seconds:.1f}",
    }


def step_times(results: list[Result], rounds: int = 5) -> list[float]:
    """Medians over rounds in which the rows have their turn, of ten steps of one batch."""
    calls, found = [], [list[float]() for _ in results]
    for result in results:
        run = result.runs[0]
        recipe, hyper = run.recipe, hyper_of(run.config)
        batch = batches_of(run.config, prepare_data(run.config, run.tokenizer, run.classes)).at(0)
        stacked = {name: np.repeat(array[None], 10, 0) for name, array in batch.items()}
        calls.append((recipe, init_state(recipe, hyper, run.eval_params), stacked, hyper))
    for round_ in range(rounds + 1):
        for i, (recipe, state, batches, hyper) in enumerate(calls):
            start = time.perf_counter()
            state, _ = jax.block_until_ready(train_steps(recipe, state, batches, np.int32(10), hyper))
            calls[i] = (recipe, state, batches, hyper)
            if round_:  # the first compiles
                found[i].append((time.perf_counter() - start) / 10)
    return [statistics.median(times) for times in found]


experiment = Experiment(
    "Adapters",
    """
The encoder of `disaster_tweets` after masked pretraining on the same tweets, two epochs of fine-tuning, with all rows
of a seed on the same split: accuracy in validation, the best of 4 evaluations. LoRA adapts the matrices of both layers
and trains the new head itself; its optimizer has five times the rate of full fine-tuning, and no weight decay. At full
rank, with everything else trained itself and the optimizer of full fine-tuning, its training loss is to be within 0.02
of it.
""",
    (PRETRAINED, *TUNINGS),
    tell,
)
