"""The code of a user's parts, on which what they make depends as much as on their fields."""

import dataclasses
import hashlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxformer.spec import Spec, class_name


def digests(spec: Spec) -> dict[str, str]:
    """SHA-256 of the source of each class in a spec that is not of this package, and of what else its module and the
    user's modules behind that hold."""
    classes = {c for own in _specs(spec) for c in type(own).__mro__ if _of_user(c.__module__)}
    texts = {class_name(c): source(c) for c in classes}
    for name in _reached({c.__module__ for c in classes}):
        rest = source(sys.modules[name])
        for text in list(texts.values()):
            rest = rest.replace(text, "")
        texts[name] = rest
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in sorted(texts.items())}


def modules(*specs: Spec) -> list[str]:
    """The modules of the classes in these specs that are neither of this package nor of Python, and the user's modules
    behind those."""
    kinds = (c.__module__ for spec in specs for own in _specs(spec) for c in type(own).__mro__)
    found = list(dict.fromkeys(name for name in kinds if not _ours(name) and name in sys.modules))
    return [*found, *sorted(_reached({name for name in found if _of_user(name)}) - {*found})]


def source(thing: Any) -> str:
    """Of a class or module; "" if there is none, as of a class that was typed in."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


def _reached(names: set[str]) -> set[str]:
    """The modules, and those of the user's whose things they name."""
    things = [thing for name in names for thing in vars(sys.modules[name]).values()]
    named = {getattr(thing, "__name__" if inspect.ismodule(thing) else "__module__", None) for thing in things}
    more = {name for name in named if isinstance(name, str) and _of_user(name)} - names
    return _reached(names | more) if more else names


def _of_user(name: str) -> bool:
    """Whether a module is neither of this package, nor of Python, nor installed."""
    file = getattr(sys.modules.get(name), "__file__", None)
    return not _ours(name) and file is not None and not {"site-packages", "dist-packages"} & set(Path(file).parts)


def _ours(name: str) -> bool:
    return name.split(".")[0] in {"jaxformer", *sys.stdlib_module_names}


def _specs(value: Any) -> Iterator[Spec]:
    if isinstance(value, tuple):
        for inner in value:
            yield from _specs(inner)
    elif isinstance(value, Spec):
        yield value
        for field in dataclasses.fields(value):
            yield from _specs(getattr(value, field.name))
