"""What a run says of itself when it starts."""

import logging
from collections.abc import Sequence
from typing import Any

import jax

from jaxformer.config import Config
from jaxformer.data.datasets import Prepared
from jaxformer.learning.schedules import Schedule
from jaxformer.mesh import axis_sizes
from jaxformer.run.directory import noticed
from jaxformer.run.opened import Run
from jaxformer.run.plan import implemented
from jaxformer.run.starts import changed_sources, features, moved
from jaxformer.spec import counted, fields

log = logging.getLogger(__name__)


def devices_of(state: Any) -> list[Any]:
    """Those that hold a state."""
    found = {device for array in jax.tree.leaves(state) for device in array.devices()}
    return sorted(found, key=lambda device: device.id)


def tell_changes(config: Config, step: int, devices: Sequence[Any], seeds: Sequence[int]) -> None:
    """What is other than when the run was left; to be told before the new config is stored."""
    for path, (old, new) in noticed(config).items():
        more = _rates(config, step, old, new) if path == "train.steps" else ""
        log.warning("%s was %s and is %s from here on%s", path, old, new, more)
    if step == 0:  # nothing of an earlier start is left
        return
    if where := moved(config, devices, seeds):
        log.warning(
            "other than at the run's last start: %s; sums may round otherwise, so bits may differ from here on", where
        )
    if names := changed_sources(config):
        log.warning(
            "%s: the code has changed since the run's last start; it resumes with the new one", ", ".join(names)
        )


def _rates(config: Config, step: int, old: int, new: int) -> str:
    """A schedule may depend on the length of the run."""
    rate = config.optimizer.rate
    before, after = (float(rate(*map(jax.numpy.int32, at))) for at in ((max(step - 1, 0), old), (step, new)))
    return f"; the learning rate goes from {before:.3g} at step {step} to {after:.3g} at step {step + 1}"


def tell_beginning(config: Config) -> None:
    """What a new run does not do as its config says."""
    for path, owner, name in fields(config.optimizer, "optimizer."):
        rate = getattr(owner, name)
        if isinstance(rate, Schedule) and (notice := rate.notice(config.train.steps)):
            log.warning("%s.%s", path, notice)


def summarize(runs: Sequence[Run], prepared: Prepared, peak_flops: float | None) -> None:
    run, devices = runs[0], devices_of(runs[0].state)
    config, model, device = run.config, run.model, devices[0]
    size = lambda tree: sum(a.size for a in jax.tree.leaves(tree))
    n_trained, n_base = size(run.state.params), size(run.state.base)
    counts, per_call = prepared.manifest, counted(config.train.steps_per_call, "step")
    beside = "; evaluations and texts by the formula"
    dtype = config.train.product_dtype or config.train.compute_dtype
    peak_source = "measured" if device.platform == "cpu" else "by its data sheet"
    rows = {"together": "seeds " + ", ".join(str(run.config.train.seed) for run in runs)} if len(runs) > 1 else {}
    rows |= {
        "run": f"{config.directory}, step {int(run.state.step)} of {config.train.steps}",
        "device": f"{len(devices)} × {device.platform} ({device.device_kind})",
        **({"peak": f"{peak_flops / 1e12:,.3f} TFLOP/s of {dtype} products, {peak_source}"} if peak_flops else {}),
        **({"mesh": ", ".join(f"{axis} {n}" for axis, n in sizes.items())} if (sizes := axis_sizes()) else {}),
        "model": f"{type(model).__name__}, {n_trained + n_base:,} parameters, vocabulary {model.vocab_size}",
        **({"adapter": f"{config.adapter}: {n_trained:,} are trained"} if config.adapter else {}),
        **model.summary(),
        **({"computed": how + beside * ("CuDNN (" in how)} if (how := implemented(config, config.model)[1]) else {}),
        "dtypes": f"parameters float32, compute {config.train.compute_dtype}"
        + (f", products {config.train.product_dtype}" if config.train.product_dtype else ""),
        "data": f"{counted(counts['train_tokens'], 'token')} for training, {counts['valid_tokens']:,} for validation",
        "step": f"{counted(config.data.batch_size * config.window, 'token')}; {per_call} per call",
    }
    for name, text in rows.items():
        log.info("%-10s %s", name, text)
    units = {"amx_bf16", "avx512_bf16", "bf16"}
    if config.train.product_dtype and device.platform == "cpu" and (known := features()) and not units & {*known}:
        log.warning("train.product_dtype=bfloat16: this processor has no units for such products; None is faster")
    if idle := jax.device_count() - len(devices):
        sentence = "%d of %d devices are idle; --mesh.fsdp=-1 or --mesh.data=-1 takes them all"
        log.warning(sentence, idle, jax.device_count())
