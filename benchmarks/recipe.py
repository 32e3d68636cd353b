"""Time to a loss: whole runs on tiny Shakespeare, from the start of a process to its end, here and in PyTorch.

    pip install -e ".[peers]"
    python benchmarks/recipe.py [same] [fast] [best] [--seeds=N] [--json=FILE] [--markdown=FILE]

Two effects are seen apart: `same` has nanoGPT's recipe for a CPU on both sides, which is what the framework gives;
`fast` and `best` have a better recipe on both sides, which is what the recipe gives. The first row, PyTorch with
nanoGPT's recipe, is the one that all others are compared with. Contestants take turns, seed by seed, each in a fresh
process; what they write is removed. PyTorch compiles anew each time, and saves and evaluates once, at the end;
jaxformer does so as often as its config says, with an empty cache, and the fast recipe "again" with what that has left
there.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import compare
import jax
import jax.numpy as jnp
import numpy as np
from peers.limits import cpu
from peers.recipes import Adam, Modern, Muon, Recipe

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.corpora import TINYSHAKESPEARE_SHA256, TINYSHAKESPEARE_URL
from jaxformer.data.files import fetch
from jaxformer.learning.schedules import Schedule

BASELINE = "shakespeare_cpu"
CONFIGS = {"same": BASELINE, "fast": "shakespeare_cpu_fast", "best": "shakespeare_cpu_best"}


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    side: str  # "jaxformer" or "PyTorch"
    config: str  # of jaxformer, whose recipe it is on both sides
    warm: bool = False  # finds the programs and the ids that the same config has left in the cache


def contestants(names: Sequence[str]) -> list[Contestant]:
    """Those of the names, the baseline before all others."""
    found = [Contestant("PyTorch, nanoGPT's recipe", "PyTorch", BASELINE)]
    for name in names:
        config, recipe = CONFIGS[name], "nanoGPT's recipe" if name == "same" else f"the {name} recipe"
        found += [Contestant(f"PyTorch, {recipe}", "PyTorch", config)] if name != "same" else []
        found += [Contestant(f"jaxformer, {recipe}", "jaxformer", config)]
        found += [Contestant(f"jaxformer, {recipe}, again", "jaxformer", config, warm=True)] if name == "fast" else []
    return found


# --- one recipe, read from the config of jaxformer

NANOGPT = {
    "position": "Learned",
    "kernel": "Softmax",
    "mixer": "MultiHead",
    "norm": "LayerNorm",
    "qk_norm": "NoNorm",
    "feed_forward.activation": "GELU",
    "residual": "PreNorm",
    "initializer": "GPT2Normal",
    "bias": False,
    "dropout": 0.0,
}
MODERN = NANOGPT | {
    "position": "Rotary",
    "norm": "RMSNorm",
    "norm.gain": False,
    "qk_norm": "RMSNorm",
    "qk_norm.gain": False,
    "feed_forward.activation": "SquaredReLU",
    "initializer": "ZeroOutputs",
    "initializer.base": "LeCunNormal",
}
MUON = {
    "groups.0.which": "Hidden",
    "groups.0.optimizer": "Muon",
    "groups.0.optimizer.nesterov": True,
    "groups.0.optimizer.heads": False,
    "groups.0.optimizer.adjust_lr": "original",
    "groups.0.optimizer.cautious": False,
    "groups.1.which": "Everything",
    "groups.1.optimizer": "AdamW",
    "groups.1.optimizer.clip": None,
}


def recipe_of(config: Config) -> Recipe:
    """What the peer trains, so that no number has a second home. Raises ValueError for parts that the peer lacks."""
    model: Any = config.model
    optimizer: Any = config.optimizer
    steps = config.train.steps
    if hasattr(optimizer, "groups"):
        _check(optimizer, MUON, "optimizer")
        matrices, rest = optimizer.groups
        rates = [
            _rates(steps, optimizer.learning_rate, each.optimizer.learning_rate) * each.factor
            for each in optimizer.groups
        ]
        own, adam = matrices.optimizer, rest.optimizer
        coefficients = [[float(number) for number in each] for each in own.coefficients(own.steps)]
        muon = Muon(rates[0].tolist(), own.weight_decay, own.momentum, coefficients)
    else:
        _check(config, {"optimizer": "AdamW"}, "")
        rates, adam, muon = [_rates(steps, optimizer.learning_rate)], optimizer, None
    adam = Adam(rates[-1].tolist(), adam.b1, adam.b2, adam.eps, adam.weight_decay)
    return Recipe(
        layers=model.n_layers,
        heads=model.n_heads,
        width=model.d_model,
        context=config.window,
        hidden=model.d_ff or 4 * model.d_model,
        valid=config.data.valid_fraction,
        batch=config.data.batch_size,
        seed=config.train.seed,
        adam=adam,
        clip=optimizer.clip,
        muon=muon,
        modern=_modern(model),
    )


def _modern(model: Any) -> Modern | None:
    _check(model, NANOGPT if model.head.tied else MODERN, "model")
    if model.head.tied:
        return None
    first, scale = model.initializer.base, model.kernel.scale or (model.d_model // model.n_heads) ** -0.5
    return Modern(model.position.base, scale, model.embedding.normed, model.head.cap, first.std, first.scale)


def _check(spec: Any, known: Mapping[str, Any], at: str) -> None:
    """Raises ValueError unless fields, told by their paths, have these values or are of the classes of these names."""
    for path, value in known.items():
        found = spec
        for name in path.split("."):
            found = found[int(name)] if name.isdecimal() else getattr(found, name)
        if value not in (found, type(found).__name__):
            raise ValueError(f"{at}.{path}={found}: peers/pytorch_recipe.py has {value} and nothing else")


def _rates(steps: int, *schedules: Schedule) -> Any:
    """The product of the schedules at each update, float64[steps]."""
    at = jnp.arange(steps)
    each = [jax.vmap(lambda step, schedule=schedule: schedule(step, jnp.int32(steps)))(at) for schedule in schedules]
    return np.prod(np.asarray(each, np.float64), axis=0)


# --- one process for each run


def run(contestant: Contestant, config: Config, corpus: Path, folder: Path, cache: Path) -> dict[str, float]:
    """Seconds from the start of a fresh process to its end; the loss over the whole validation split at the end, and of
    how many tokens. Raises compare.Failed."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    paths = [str(compare.HERE), str(compare.HERE.parent), os.environ.get("PYTHONPATH", "")]
    environment |= {"OMP_NUM_THREADS": str(compare.CORES), "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"JAXFORMER_CACHE": str(cache), "JAXFORMER_DATA": str(corpus.parent)}
    environment |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    environment |= {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # recipes for CPUs, on both sides
    command, given, knobs, directory = [sys.executable, "-m"], "", config.train, folder / "run"
    if contestant.side == "PyTorch":
        command += ["peers.pytorch_recipe", str(corpus), str(folder)]
        given = json.dumps(dataclasses.asdict(recipe_of(config)))
    else:
        path = str(config_lib.config_file(contestant.config))
        command += ["jaxformer", "train", path, f"--directory={directory}"]
        command += [f"--train.seed={knobs.seed}", f"--train.steps={knobs.steps}"]
    started = time.perf_counter()
    done = subprocess.run(command, input=given, capture_output=True, text=True, env=environment)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise compare.Failed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1][:200])
    if contestant.side == "PyTorch":
        found = json.loads(done.stdout.splitlines()[-1])
    else:
        rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        found = next(row for row in reversed(rows) if row["split"] in ("valid", "valid_full"))
    return {"seconds": seconds, "loss": found["loss"], "tokens": found["tokens"]}


def measured(chosen: Sequence[Contestant], seeds: int, steps: int | None) -> list[dict[str, Any]]:
    """Each contestant in turn, seed by seed."""
    corpus = fetch("tinyshakespeare.txt", TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256)
    rows: list[dict[str, Any]] = [{"name": each.name, "runs": [], "failed": None} for each in chosen]
    overrides = {} if steps is None else {"train.steps": steps}
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            for i, (each, row) in enumerate(zip(chosen, rows, strict=True)):
                config = config_lib.resolve(each.config, overrides | {"train.seed": seed})
                row["steps"], own = config.train.steps, Path(folder, str(i))
                own.mkdir()
                load = os.getloadavg()[0]
                print(f"seed {seed}: {each.name}; load {load:.1f}", end="", file=sys.stderr, flush=True)
                try:
                    found = run(each, config, corpus, own, Path(folder, each.config))
                    row["runs"].append({"seed": seed, **found, "load": load})
                    print(", {seconds:.1f} s, {loss:.4f} nats".format(**found), file=sys.stderr)
                except compare.Failed as error:
                    row["failed"] = str(error)
                    print(f", failed: {error}", file=sys.stderr)
    counts = {found["tokens"] for row in rows for found in row["runs"]}
    assert len(counts) < 2, f"losses are of different numbers of tokens: {counts}"
    return rows


# --- what is told of it


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Medians, in brackets the least and the most; ratios and differences are of the same seed."""
    some = [row for row in rows if row["runs"]]
    first = {found["seed"]: found for found in rows[0]["runs"]}
    of = lambda row, name: [found[name] for found in row["runs"]]
    pairs = lambda row, name: [(own[name], first[own["seed"]][name]) for own in row["runs"] if own["seed"] in first]
    columns: list[compare.Column] = [
        ("", lambda row: row["name"]),
        ("steps", lambda row: f"{row['steps']:,}"),
        ("seconds", lambda row: compare.spread(of(row, "seconds"), "{:,.1f}".format)),
        ("nats per character", lambda row: compare.spread(of(row, "loss"), "{:.3f}".format)),
    ]
    if first:
        share = lambda row: [own / base for own, base in pairs(row, "seconds")]
        less = lambda row: [base - own for own, base in pairs(row, "loss")]
        columns += [("of the first's time", lambda row: compare.spread(share(row), "{:.2f}".format) + " ×")]
        columns += [("below its loss", lambda row: compare.spread(less(row), "{:.3f}".format))]
    failed = [f"\n{row['name']} failed: {row['failed']}" for row in rows if row["failed"]]
    return "\n".join([compare.grid(columns, some), *failed])


def block(found: Mapping[str, Any]) -> str:
    """What BENCHMARKS.md says of a processor."""
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    seeds = f"{found['seeds']} seeds" if found["seeds"] > 1 else "1 seed"
    told = f"{time.strftime('%Y-%m-%d')}, {seeds}, {found['minutes']:.0f} minutes; {versions}."
    return f"## Time to a loss, {found['device']}\n\n{told}\n\n{table(found['rows'])}\n"


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="RECIPE", help=f"of {', '.join(CONFIGS)}; all without one")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="instead of each config's own number")
    parser.add_argument("--json", type=Path, help="a file for all that is found")
    parser.add_argument("--markdown", type=Path, help="a page whose block of this processor is replaced")
    given = parser.parse_args()
    if unknown := set(given.names) - set(CONFIGS):
        parser.error(f"{' '.join(sorted(unknown))}: no recipe is called so; there are {', '.join(CONFIGS)}")
    if os.getloadavg()[0] > 0.5:
        print("other processes run: PyTorch's threads wait for one another, and lose most by it", file=sys.stderr)
    started = time.monotonic()
    rows = measured(contestants(given.names or list(CONFIGS)), given.seeds, given.steps)
    versions = {name: number for name in ("jax", "torch") if (number := version(name))}
    found = {"device": cpu(), "versions": {"Python": sys.version.split()[0]} | versions, "seeds": given.seeds}
    found |= {"minutes": (time.monotonic() - started) / 60, "rows": rows}
    print(block(found))
    if given.json:
        given.json.write_text(json.dumps(found, indent=1))
    if given.markdown:
        page = given.markdown.read_text() if given.markdown.exists() else "# Benchmarks\n"
        given.markdown.write_text(compare.placed(page, block(found)))


if __name__ == "__main__":
    main()
