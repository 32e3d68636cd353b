"""The language of the command line: a field by its dotted path, its value as text, and the list of both."""

import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import math
import os
import re
import sys
import types
import typing
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any, TypeVar

from jaxformer.spec import InputError, Spec, fields, known_specs, literals, nearest, options_of

S = TypeVar("S", bound=Spec)


def override(spec: S, path: str, value: Any, at: str = "", root: Spec | None = None) -> S:
    """The spec with the field at a dotted path replaced; "mask.0.size" goes into a tuple.

    A string is read as the field's type: "3", "none", "1e-3", "0.7,0.3", and for a part its class: "Rotary" if it is
    known already, "my_module:Decay" imports the module. A part keeps what was set of the fields that both classes
    have, and begins with its defaults elsewhere; its fields can follow. `at` is where the spec stands in the `root`,
    in whose fields a wrong name is looked for.
    """
    name, _, rest = path.partition(".")
    names, root = [field.name for field in dataclasses.fields(spec)], root or spec
    if name not in names:
        raise InputError(f"{at}{name}: {type(spec).__name__} has no such field; {_meant(name, names, root, value)}")
    old, new = getattr(spec, name), value
    if rest:
        new = _override_inside(old, rest, value, at + name, root)
    elif isinstance(value, str):
        if isinstance(old, Spec) and _is_number(value) and (numbers := _numbers(old, f"{at}{name}.")):
            raise InputError(f"{at}{name}={value}: a part is no number; give a field of it, {' or '.join(numbers)}")
        new = _parse(value, typing.get_type_hints(type(spec))[name], at + name)
        if isinstance(old, Spec) and isinstance(new, Spec) and old.keeps_fields and new.keeps_fields:
            new = _with_fields_of(old, new)
    return dataclasses.replace(spec, **{name: new})


def _override_inside(old: Any, path: str, value: Any, at: str, root: Spec) -> Any:
    if isinstance(old, Spec):
        return override(old, path, value, at + ".", root)
    place, _, rest = path.partition(".")
    if isinstance(old, tuple) and rest and place.isdecimal() and len(place) < 9 and int(place) < len(old):
        i = int(place)
        return (*old[:i], _override_inside(old[i], rest, value, f"{at}.{i}", root), *old[i + 1 :])
    if isinstance(old, tuple) and any(isinstance(part, Spec) for part in old):
        raise InputError(f"{at}.{path}: {at} has {len(old)} parts; give {at}.0.FIELD to {at}.{len(old) - 1}.FIELD")
    raise InputError(f"{at}.{path}: {at}={old!r} has no fields; set {at} itself")


def _with_fields_of(old: Spec, new: S) -> S:
    """The new spec with what was set in the old one of the fields that both declare alike."""
    hints = [typing.get_type_hints(type(spec)) for spec in (old, new)]
    names = [f.name for f in dataclasses.fields(old) if getattr(old, f.name) != _default(f)]
    names = [name for name in names if name in hints[1] and hints[0][name] == hints[1][name]]
    return dataclasses.replace(new, **{name: getattr(old, name) for name in names})


def _default(field: dataclasses.Field[Any]) -> Any:
    """MISSING if there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _meant(name: str, names: list[str], root: Spec, value: Any) -> str:
    """The end of a sentence about a wrong name: a field that has it elsewhere in the root, by its initials too, or one
    that is called nearly so. A string comes from the command line, where a path begins with dashes."""
    last = lambda path: path.rpartition(".")[2]
    paths = {path: getattr(owner, field) for path, owner, field in fields(root)}
    found = [path for path in paths if last(path) == name]
    found = found or [path for path in paths if "".join(word[:1] for word in last(path).split("_")) == name]
    if not found:
        close = difflib.get_close_matches(name, [*names, *map(last, paths)], n=1, cutoff=0.75)
        found = [path for path in paths if last(path) in close and last(path) not in names]
    if not found:
        return nearest(name, names)
    if _is_number(value):  # which no part is, but perhaps a field of it
        found = [next(iter(_numbers(paths[path], f"{path}.")), path) for path in found]
    return f"did you mean {' or '.join(('--' if isinstance(value, str) else '') + path for path in found)}?"


def _is_number(value: Any) -> bool:
    with contextlib.suppress(TypeError, ValueError, OverflowError):  # as of 10**400
        return math.isfinite(float(value))
    return False


def _numbers(part: Any, at: str) -> list[str]:
    """The paths of a part's own fields of type float."""
    hints = typing.get_type_hints(type(part)) if isinstance(part, Spec) else {}
    return [at + name for name, annotation in hints.items() if float in options_of(annotation)]


# --- what a text means


def _parse(text: str, annotation: Any, path: str) -> Any:
    """What a string on the command line means for a field; one that fits nothing is left for `checked` to refuse."""
    options = options_of(annotation)
    specs = tuple(option for option in options if isinstance(option, type) and issubclass(option, Spec))
    if types.NoneType in options and text.lower() == "none":
        return None
    if bool in options and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for option in options:
        if typing.get_origin(option) is tuple and ("," in text or not specs):
            inner = typing.get_args(option)[0]
            return tuple(_parse(part.strip(), inner, path) for part in text.split(",") if part.strip())
    for option in (int, float):
        if option in options:
            with contextlib.suppress(ValueError):
                return option(text)
    if int in options and _is_number(text) and float(text).is_integer():  # "1e3"
        return int(float(text))
    return _part(text, specs, path) if specs and text else text


def _part(text: str, kinds: tuple[type[Spec], ...], path: str) -> Spec:
    """A part by the name of its class, with its defaults; None where a field has none, for a later override to fill."""
    module, colon, name = text.rpartition(":")
    if colon:
        try:
            found = [getattr(importlib.import_module(module), name)]
        except (Exception, SystemExit) as error:  # whatever the user's module raises, it is the user's to fix
            raise InputError(f"{path}={text}: {type(error).__name__}: {error}; fix the module, or its name") from error
    else:
        found = [c for kind in kinds for c in {kind, *known_specs(kind)} if c.__name__ == name]
    if len(found) > 1:
        modules = " or ".join(sorted(f"{c.__module__}:{name}" for c in found))
        raise InputError(f"{path}={text!r} has several classes of that name; give {modules}")
    if not found or not isinstance(found[0], type) or not issubclass(found[0], kinds):
        raise InputError(f"{path}={text!r} {_no_part(text, kinds, path)}")
    try:
        return found[0](**{f.name: None for f in dataclasses.fields(found[0]) if _default(f) is dataclasses.MISSING})
    except InputError as error:
        raise InputError(f"{path}={text}: {error}, of {_choices(kinds)}") from None


def _no_part(text: str, kinds: tuple[type[Spec], ...], path: str) -> str:
    """What is wrong with a name that no class has."""
    module, _, name = text.rpartition(".")
    if re.fullmatch(r"\w+(\.\w+)*", module) and re.fullmatch(r"[A-Z]\w*", name):
        return f"must name a class of a module with a colon; give --{path}={module}:{name}"
    readers = [c for kind in kinds for c in (kind, *known_specs(kind)) if "path" in c.__dataclass_fields__]
    if readers and (re.search(r"[./\\]", text) or os.path.exists(text)):
        known = lambda reader: {*PurePath(text).suffixes} & {*getattr(reader, "suffixes", ())}
        reader = next(filter(known, readers), readers[0])
        return f"is a path, and must be a class; give --{path}={reader.__name__} --{path}.path={text}"
    known = {name.lower(): name for name in _choices(kinds).split(", ")}
    close = difflib.get_close_matches(text.lower(), known, n=1)
    meant = f"; did you mean {known[close[0]]}?" if close else ""
    return f"must be one of {_choices(kinds)}, or module:Class of such a part{meant}"


# --- what may be said


def listing(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """Every field by its path, its value as the command line takes it, and what it means; "" for a value that must be
    given."""
    for path, owner, name in fields(spec):
        value, options = getattr(owner, name), options_of(typing.get_type_hints(type(owner))[name])
        parts = value if isinstance(value, tuple) else (value,)
        missing = value is None and types.NoneType not in options
        meaning = ["must be given"] if missing else []
        meaning += filter(None, [field_comments(type(owner)).get(name)])
        kinds = [k for o in options for k in (o, *typing.get_args(o)) if isinstance(k, type)]
        if kinds := [kind for kind in kinds if issubclass(kind, Spec)]:
            choices = _choices(kinds)
            meaning += [f"of {choices}"] if choices != type(value).__name__ else []
        meaning += [f"one of {', '.join(literals([o]))}" for o in options if literals([o])]
        shown = ",".join(type(p).__name__ if isinstance(p, Spec) else str(p) for p in parts)
        yield path, "" if missing else shown, "; ".join(meaning)


def _choices(kinds: Iterable[type[Spec]]) -> str:
    """The names of the classes that a part may have; abstract ones are none, and those of a script are not found."""
    found = {c for kind in kinds for c in (kind, *known_specs(kind))}
    return ", ".join(
        sorted({c.__name__ for c in found if not (c.abstract or inspect.isabstract(c)) and c.__module__ != "__main__"})
    )


def field_comments(cls: type) -> dict[str, str]:
    """What stands behind # beside the fields of a class and its bases; of two comments, as on a line that pyright is to
    pass over, the first."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = _class_sources(base.__module__).get(base.__qualname__, "")
        rows = re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", text, re.MULTILINE)
        found |= {name: re.sub(r"\s*(# )?pyright:.*", "", comment) for name, comment in rows}
    return found


@functools.cache
def _class_sources(module: str) -> dict[str, str]:
    """By name; `inspect` parses the whole file for each class."""
    with contextlib.suppress(KeyError, OSError, TypeError):  # no source
        source = inspect.getsource(sys.modules[module])
        return dict(re.findall(r"^class (\w+)(.*?)(?=^[^\s)]|\Z)", source, re.MULTILINE | re.DOTALL))
    return {}
