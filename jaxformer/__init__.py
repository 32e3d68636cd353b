"""jaxformer: the transformer lab for JAX."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxformer.config import Config as Config
    from jaxformer.config import Data as Data
    from jaxformer.config import Train as Train
    from jaxformer.lab.compare import compare as compare
    from jaxformer.model.models import Decoder as Decoder
    from jaxformer.model.models import Encoder as Encoder
    from jaxformer.model.models import EncoderDecoder as EncoderDecoder
    from jaxformer.run.loop import build as build
    from jaxformer.run.loop import train as train
    from jaxformer.run.loop import train_seeds as train_seeds
    from jaxformer.run.opened import open_run as open_run
    from jaxformer.spec import Spec as Spec

_HOMES = {
    "Config": "config",
    "Data": "config",
    "Decoder": "model.models",
    "Encoder": "model.models",
    "EncoderDecoder": "model.models",
    "Spec": "spec",
    "Train": "config",
    "build": "run.loop",
    "compare": "lab.compare",
    "open_run": "run.opened",
    "train": "run.loop",
    "train_seeds": "run.loop",
}
__all__ = list(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("jaxformer")
    if name not in _HOMES:
        raise AttributeError(f"module 'jaxformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"jaxformer.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
