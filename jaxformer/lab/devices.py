"""Is a run on several devices the run on one? A small version of a config takes the same steps on both."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jaxformer.declarations import by_path
from jaxformer.lab.probe import ROWS, Inapplicable, Probe, close
from jaxformer.mesh import Mesh, partition, placed
from jaxformer.run.step import Hyper, init_state, train_steps
from jaxformer.spec import InputError

STEPS = 4


def meshes(devices: int) -> Iterator[tuple[str, Mesh]]:
    """What is tried, and how it is called."""
    yield f"mesh.data={devices}", Mesh(data=devices)
    yield f"mesh.fsdp={devices}", Mesh(fsdp=devices)
    if devices % 2 == 0:
        yield f"mesh.fsdp={devices // 2} mesh.tensor=2", Mesh(fsdp=devices // 2, tensor=2)


def agrees(probe: Probe, mesh: Mesh) -> str:
    """Losses and norms of gradients are those of one device, in steps of the config's own optimizer."""
    sizes = mesh.sizes(jax.device_count())
    if refusal := probe.model.refuses_split_heads() if sizes["tensor"] > 1 else None:
        raise Inapplicable(refusal)
    try:
        for path, box in by_path(probe.declared).items():
            partition(box.letters.all, box.value.shape, sizes, path)
    except InputError as error:
        raise Inapplicable(f"refused: {error}") from None
    parts = batches(math.prod(sizes.values()))
    return close(_steps(probe, mesh, parts), _steps(probe, Mesh(), parts), "losses and norms of gradients")


def batches(devices: int) -> int:
    """How many of ROWS rows make one of which every device has as many rows."""
    return math.lcm(devices, ROWS) // ROWS


@functools.lru_cache(2)  # of one device, with which each mesh is compared
def _steps(probe: Probe, mesh: Mesh, parts: int) -> dict[str, Any]:
    batches = [[probe.batch(step * parts + i) for i in range(parts)] for step in range(STEPS)]
    together = lambda name: np.stack([np.concatenate([part[name] for part in batch]) for batch in batches])
    buffer = {name: together(name) for name in batches[0][0]}
    hyper = Hyper(np.uint32(0), np.int32(STEPS), probe.config.optimizer)
    with mesh.entered():
        state = init_state(probe.recipe, hyper)
        _, rows = train_steps(probe.recipe, state, placed(buffer, 1), np.int32(STEPS), hyper)
    return {name: np.asarray(rows[name]) for name in ("loss", "grad_norm")}
