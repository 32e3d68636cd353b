"""What a run would be, without one step of it: its config, its size, its memory."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config
from jaxformer.data.datasets import fitted
from jaxformer.mesh import placed
from jaxformer.platform import set_flags
from jaxformer.run.budget import needs
from jaxformer.run.directory import as_begun, check_begun, has_begun, other_run
from jaxformer.run.notices import tell_beginning
from jaxformer.run.plan import abstract_batches, abstract_state, hyper_of, planned_recipe, planned_tokenizer
from jaxformer.run.step import train_steps
from jaxformer.run.warm_start import compare, open_source
from jaxformer.spec import to_json

log = logging.getLogger(__name__)


def dry_run(config: Config | str | Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The resolved config as JSON values; what `budget.needs` says of it; and, in bytes of one device, what its step as
    it is compiled here works with besides what it is given, `working_bytes`, and with both, `total_bytes`.

    The corpus is read only if sizes depend on it, or a tokenizer is to be compared with that of `init_from`; nothing is
    allocated on the device. Raises InputError as `train` would, but for what the corpus itself may bring; a directory
    that holds another run is a warning.
    """
    (config,) = as_begun([config_lib.resolve(config, overrides)])
    for writer in config.writers:
        writer.require()
    set_flags()
    tokenizer = planned_tokenizer(config)
    recipe, hyper = planned_recipe(config, tokenizer), hyper_of(config)
    other = other_run(config) if has_begun(Path(config.directory)) else None
    if other:
        log.warning("%s; train it in another directory", other)
    if other or not check_begun(config):
        tell_beginning(config)
        if config.init_from is not None:
            source = open_source(config.init_from)
            compare(recipe, source, source.tokenizer.same_ids(fitted(tokenizer, config.data.corpus)))
    found = needs(config, recipe, jax.device_count())
    with config.mesh.entered():
        state = abstract_state(config, recipe)
        batches = placed(abstract_batches(config, recipe, min(config.train.steps_per_call, config.train.steps)), 1)
        memory = train_steps.lower(recipe, state, batches, np.int32(1), hyper).compile().memory_analysis()
    assert memory is not None  # only a backend without memory has none
    passed = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    measured = {"working_bytes": memory.temp_size_in_bytes, "total_bytes": passed + memory.temp_size_in_bytes}
    return {"config": to_json(config), **found, **measured}
