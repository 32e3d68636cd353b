"""Specs: frozen dataclasses whose fields are hyperparameters, read from a config, the command line or a stored run."""

import abc
import contextlib
import dataclasses
import difflib
import functools
import importlib
import inspect
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePath
from typing import Any, Literal, Self, TypeVar

import jax
import numpy as np

S = TypeVar("S", bound="Spec")


class InputError(ValueError):
    """The user's mistake, in one sentence that names field or file, value, rule and remedy."""


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Says in errors what they are about."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{what}: {error}") from None


@typing.dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field,))
@dataclasses.dataclass(frozen=True)
class Spec(abc.ABC):
    """A part that may be swapped. Subclassing makes the class a frozen dataclass, hashable, and a pytree.

    Fields annotated with `float` or with a Spec are the pytree's leaves, all others its structure. So a spec that is
    closed over is static, and the same spec passed as an argument has traced numbers and compiles nothing anew.

    The base of a role has abstract methods; only a class that defines them all can be made.
    """

    keeps_fields = False  # True: given on the command line in another's place, it keeps what was set of common fields
    abstract = False  # class Base(Spec, abstract=True): of no use itself, even if no method is missing

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        if missing := ", ".join(sorted(cls.__abstractmethods__)):
            raise InputError(
                f"{cls.__name__} is abstract until it defines {missing}; define that, or take another class"
            )
        if cls.abstract:
            raise InputError(f"{cls.__name__} is abstract; take another class")
        for name in fields.keys() - cls.__dataclass_fields__.keys():
            names = [field.name for field in dataclasses.fields(cls)]
            raise InputError(f"{cls.__name__} has no field {name}; {nearest(name, names)}")
        return super().__new__(cls)

    def __init_subclass__(cls, abstract: bool = False) -> None:
        cls.abstract = abstract
        dataclasses.dataclass(frozen=True)(cls)
        annotations = typing.get_type_hints(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        data = [name for name in names if _is_traced(annotations[name])]
        jax.tree_util.register_dataclass(cls, data, [name for name in names if name not in data])

    def check(self, at: str = "") -> None:
        """Raises ValueError for values that do not go together; `at` is the path of this spec, as "model."."""


def _is_traced(annotation: Any) -> bool:
    if arguments := typing.get_args(annotation):  # a union, or a tuple
        return any(_is_traced(argument) for argument in arguments)
    return annotation is float or (isinstance(annotation, type) and issubclass(annotation, Spec))


# --- values: from the command line, a config file or a stored run


def changed(spec: Any, of: Callable[["Spec"], dict[str, Any]]) -> Any:
    """The spec, and those at any depth of it, each with the fields that a function gives for it."""
    if isinstance(spec, tuple):
        return tuple(changed(each, of) for each in spec)
    if not isinstance(spec, Spec):
        return spec
    inner = {field.name: getattr(spec, field.name) for field in dataclasses.fields(spec)}
    parts = {name: changed(value, of) for name, value in inner.items() if isinstance(value, (Spec, tuple))}
    return dataclasses.replace(spec, **parts | of(spec))


def checked(spec: S, at: str = "") -> S:
    """The spec with numbers cast to their annotated types; an InputError if a value cannot be.

    Without the cast `weight_decay=0` and `weight_decay=0.0` would be two programs.
    """
    annotations = typing.get_type_hints(type(spec))
    names = [field.name for field in dataclasses.fields(spec)]
    spec = dataclasses.replace(spec, **{n: _cast(getattr(spec, n), annotations[n], at + n) for n in names})
    try:
        spec.check(at)
    except ValueError as error:
        raise InputError(str(error)) from error
    return spec


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


def _with_fields_of(old: Spec, new: S) -> S:
    """The new spec with what was set in the old one of the fields that both declare alike."""
    hints = [typing.get_type_hints(type(spec)) for spec in (old, new)]
    names = [f.name for f in dataclasses.fields(old) if getattr(old, f.name) != _default(f)]
    names = [name for name in names if name in hints[1] and hints[0][name] == hints[1][name]]
    return dataclasses.replace(new, **{name: getattr(old, name) for name in names})


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


def fields(spec: Spec, at: str = "") -> Iterator[tuple[str, Spec, str]]:
    """Every field: its path, the spec that has it, its name there."""
    for name in (field.name for field in dataclasses.fields(spec)):
        yield at + name, spec, name
        value = getattr(spec, name)
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, Spec):
                yield from fields(part, f"{at}{name}.{i}." if isinstance(value, tuple) else f"{at}{name}.")


def listing(spec: Spec) -> Iterator[tuple[str, str, str]]:
    """Every field by its path, its value as the command line takes it, and what it means; "" for a value that must be
    given."""
    for path, owner, name in fields(spec):
        value, options = getattr(owner, name), _options(typing.get_type_hints(type(owner))[name])
        parts = value if isinstance(value, tuple) else (value,)
        missing = value is None and types.NoneType not in options
        meaning = ["must be given"] if missing else []
        meaning += filter(None, [field_comments(type(owner)).get(name)])
        kinds = [k for o in options for k in (o, *typing.get_args(o)) if isinstance(k, type)]
        if kinds := [kind for kind in kinds if issubclass(kind, Spec)]:
            choices = _choices(kinds)
            meaning += [f"of {choices}"] if choices != type(value).__name__ else []
        meaning += [f"one of {', '.join(_literals([o]))}" for o in options if _literals([o])]
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


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a wrong name."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(names) or 'none'}"


def counted(number: int, noun: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


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
    return [at + name for name, annotation in hints.items() if float in _options(annotation)]


def _cast(value: Any, annotation: Any, path: str) -> Any:
    options, value = _options(annotation), value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if type(value) is int and abs(value) >= 2**63:  # which Python may refuse to print
        raise InputError(f"{path} is a whole number of {value.bit_length()} bits, and must be less than 2**63")
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple and isinstance(value, tuple | list):
            inner = typing.get_args(option)[0]
            return tuple(_cast(v, inner, f"{path}.{i}") for i, v in enumerate(value))
        if any(value == text for text in _literals([option])):
            return value
        if isinstance(option, type) and type(value) is option and option is not float:
            return value if not isinstance(value, Spec) else checked(value, path + ".")
        if isinstance(option, type) and issubclass(option, Spec) and isinstance(value, option):
            return checked(value, path + ".")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and float in options:
        if abs(value) < 3.4e38:  # NaN is not
            return float(value)
        raise InputError(f"{path}={value!r} must be a finite number in float32")
    if int in options and isinstance(value, float) and value.is_integer():
        return int(value)
    names = [*_literals(options), *(_kind(option) for option in options if not _literals([option]))]
    names = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]])).replace("NoneType", "None")
    if value is None:
        raise InputError(f"{path} must be given, as --{path}=VALUE on the command line or in the config: {names}")
    raise InputError(f"{path}={value!r} must be {names}")


def _kind(option: Any) -> str:
    """What a value of this type is called in a sentence."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(option) or getattr(option, "__name__", str(option))


def _parse(text: str, annotation: Any, path: str) -> Any:
    """What a string on the command line means for a field; a string that fits nothing is left for `_cast` to refuse."""
    options = _options(annotation)
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


def _default(field: dataclasses.Field[Any]) -> Any:
    """MISSING if there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def _literals(options: Iterable[Any]) -> list[str]:
    """The texts that a field may have whose type is Literal."""
    return [text for o in options if typing.get_origin(o) is Literal for text in typing.get_args(o)]


# --- stored form: class names and fields, resolved among classes that exist already; nothing is imported or run


def to_json(value: Any) -> Any:
    """A spec, or a value of one of its fields, as JSON values. Refuses classes that another process could not find by
    their name."""
    if isinstance(value, tuple):
        return [to_json(inner) for inner in value]
    if not isinstance(value, Spec):
        return value
    cls = type(value)
    if cls.__module__ == "__main__" or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
        place = "the config's own file" if cls.__module__ == "<run_path>" else repr(cls.__module__)
        raise InputError(
            f"{cls.__qualname__} cannot be stored: another process would not find it in {place}; "
            "define it at the top level of a module of its own and import that"
        )
    return {"class": class_name(cls)} | {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}


def from_json(
    value: Any, cls: type[S], source: str, renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
) -> S:
    """The inverse of `to_json`, checked; `source` names the file in errors. `renewed` brings the stored form of a spec
    up to date."""
    known = specs_by_name()

    def decode(value: Any, depth: int) -> Any:
        if depth > 50:
            raise InputError("nested deeper than 50 levels; no config is")
        if isinstance(value, list):
            return tuple(decode(v, depth + 1) for v in value)
        if not isinstance(value, dict):
            return value
        value = renewed(value)
        found = known.get(str(value.get("class")))
        if found is None:
            raise InputError(
                f"class={value.get('class')!r} is no spec of jaxformer or of an imported module; "
                f"import its module first (--import={str(value.get('class')).partition(':')[0]} on the command line)"
            )
        names = [f.name for f in dataclasses.fields(found)]
        given = {n: decode(v, depth + 1) for n, v in value.items() if n != "class"}
        for name in given:
            if name not in names:
                raise InputError(f"{found.__name__}.{name}: no such field; {nearest(name, names)}")
        try:
            return found(**given)
        except TypeError as error:  # a field without a default is missing
            raise InputError(f"{error}; add the missing field") from None

    with naming(source):
        spec = decode(value, 0)
        if not isinstance(spec, cls):
            raise InputError(f"holds {type(spec).__name__}, not a {cls.__name__}; was it written by jaxformer?")
        return checked(spec)


def dumps(spec: Spec) -> str:
    return json.dumps(to_json(spec), indent=1) + "\n"


def class_name(cls: type) -> str:
    """How a class is stored: "module:Class"."""
    return f"{cls.__module__}:{cls.__qualname__}"


def known_specs(cls: type[Spec] = Spec) -> list[type[Spec]]:
    """Every spec class that exists in this process."""
    return [c for sub in cls.__subclasses__() for c in (sub, *known_specs(sub))]


def specs_by_name() -> dict[str, type[Spec]]:
    """All of these by the name that they are stored under."""
    return {class_name(c): c for c in known_specs()}
