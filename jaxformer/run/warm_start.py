"""Parameters of another run as the beginning of this one."""

import dataclasses
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.files import read_json, write
from jaxformer.declarations import by_path, path_name
from jaxformer.model.implementations import Auto
from jaxformer.model.models import Model, without_effect
from jaxformer.run.directory import has_checkpoint
from jaxformer.run.manifest import sha256
from jaxformer.run.opened import Run, finite, open_run
from jaxformer.run.step import Recipe, TrainState
from jaxformer.spec import InputError, changed, naming

log = logging.getLogger(__name__)


def open_source(init_from: str) -> Run:
    """The run at its newest checkpoint or, given RUN/checkpoints/STEP, at that one; of its state the parameters."""
    path = Path(init_from)
    at_step = path.parent.name == "checkpoints" and path.name.isdecimal() and len(path.name) < 20
    with naming(f"init_from={init_from!r}"):
        run = open_run(path.parent.parent, int(path.name)) if at_step else open_run(path)
    if not finite(run.state):
        raise InputError(f"init_from={init_from!r} has no parameters of finite numbers; take another run or checkpoint")
    return dataclasses.replace(run, state=TrainState(run.state.step, run.eval_params, opt_state=()))


def compare(recipe: Recipe, run: Run, same_tokenizer: bool) -> dict[str, Any]:
    """A report of which parameters of the model can be taken from the run, and which not.

    Taken is what has the same path and shape; an axis of the vocabulary only if the tokenizers are the same, of classes
    only if these are. Raises InputError if nothing is, or not all that an adapter leaves as it is.
    """
    model = recipe.model
    old, new = by_path(run.state.params), by_path(model.declared())
    left: dict[str, str] = {}
    classes = {head.name: head.classes for head in run.model.heads}
    same_heads = {f"head_{head.name}" for head in model.heads if head.classes == classes.get(head.name)}
    for path, box in new.items():
        if path not in old:
            left[path] = "not in that run"
        elif old[path].shape != box.value.shape:
            left[path] = f"{list(old[path].shape)} there, {list(box.value.shape)} here"
        elif "V" in box.letters.all and not same_tokenizer:
            left[path] = "another tokenizer"
        elif "N" in box.letters.all and path.split("/")[0] not in same_heads:
            left[path] = "other classes"
    taken = [path for path in new if path not in left]
    if not taken:
        raise InputError(f"init_from={run.config.directory!r} has no parameter of this model; is it the right run?")
    if recipe.adapter is not None:
        base = by_path(recipe.adapter.base(model.declared(), model.declared()))
        if random := [path for path in left if path in base]:
            raise InputError(
                f"init_from={run.config.directory!r} gives no {random[0]} ({left[random[0]]}), which adapter="
                f"{type(recipe.adapter).__name__} would leave at random; have it trained, as --adapter.trained=Path, "
                f"--adapter.trained.0.pattern='{random[0].partition('/')[0]}*'"
            )
    ends = {"eos_token_id": [*run.ends]} if run.ends and same_tokenizer else {}
    return {
        "run": run.config.directory,
        "step": int(run.state.step),
        **ends,
        "taken_sha256": sha256({path: old[path] for path in taken}),
        "taken": taken,
        "not_taken": left,
        "unused": sorted(set(old) - set(new)),
        "otherwise": _otherwise(run.model, model),
    }


def _otherwise(old: Model, new: Model) -> list[str]:
    """How a model computes otherwise than the one whose parameters it takes; what was taken may then be of less use."""
    if type(old) is not type(new):
        return [f"model was {type(old).__name__} and is {type(new).__name__}"]
    alike = lambda spec: {"implementation": Auto()} if hasattr(spec, "implementation") else {}
    old, new = changed(old, alike), changed(new, alike)
    sizes = ("vocab_size", "context_length", "head")
    found = {path: change for path, change in config_lib.differences(old, new).items() if not path.startswith(sizes)}
    return [config_lib.told(f"model.{path}", *change) for path, change in found.items() if not without_effect(path)]


def still_has(run: Run, report: dict[str, Any]) -> bool:
    """Whether the run has the parameters that were taken from it."""
    own = by_path(run.state.params)
    taken = {path: own[path] for path in report["taken"] if path in own}
    return sha256(taken) == report["taken_sha256"]


def tell_other_beginnings(configs: Sequence[Config], report: dict[str, Any]) -> None:
    """Says which runs of before began with other parameters than that run has now."""
    for place in (Path(config.directory) for config in configs):
        path = place / "init_from.json"
        begun = has_checkpoint(place) and path.exists()  # else it begins anew
        if begun and read_json(path).get("taken_sha256") != report["taken_sha256"]:
            log.warning("%s has trained on since %s began with it: new runs begin otherwise", report["run"], place)


def take(params: Any, run: Run, report: dict[str, Any]) -> Any:
    """The parameters, with those that the report lists as taken."""
    old = by_path(run.state.params)
    pick = lambda path, a: old[path_name(path)] if path_name(path) in report["taken"] else a
    return jax.tree_util.tree_map_with_path(pick, params)


def tell(report: dict[str, Any], directory: Path) -> None:
    """Says what was taken, and keeps it in the run."""
    log.info("%-10s %s, step %d: %d arrays", "taken from", report["run"], report["step"], len(report["taken"]))
    for path, reason in report["not_taken"].items():
        log.info("%-10s %s: %s", "not taken", path, reason)
    for path in report["unused"]:
        log.info("%-10s %s: not in this model", "unused", path)
    if report["otherwise"]:
        log.warning("%s computes otherwise than what it is trained from: %s", directory, "; ".join(report["otherwise"]))
    write(directory / "init_from.json", json.dumps(report, indent=1) + "\n")
