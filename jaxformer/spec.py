"""Specs: frozen dataclasses whose fields are hyperparameters, read from a config, the command line or a stored run."""

import abc
import contextlib
import dataclasses
import difflib
import json
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
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


# --- values, wherever they come from


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


def fields(spec: Spec, at: str = "") -> Iterator[tuple[str, Spec, str]]:
    """Every field: its path, the spec that has it, its name there."""
    for name in (field.name for field in dataclasses.fields(spec)):
        yield at + name, spec, name
        value = getattr(spec, name)
        for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
            if isinstance(part, Spec):
                yield from fields(part, f"{at}{name}.{i}." if isinstance(value, tuple) else f"{at}{name}.")


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a wrong name."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(names) or 'none'}"


def counted(number: int, noun: str) -> str:
    """ "1 step", "2,000 steps"."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def _cast(value: Any, annotation: Any, path: str) -> Any:
    options, value = options_of(annotation), value.tolist() if isinstance(value, np.generic | np.ndarray) else value
    if type(value) is int and abs(value) >= 2**63:  # which Python may refuse to print
        raise InputError(f"{path} is a whole number of {value.bit_length()} bits, and must be less than 2**63")
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple and isinstance(value, tuple | list):
            inner = typing.get_args(option)[0]
            return tuple(_cast(v, inner, f"{path}.{i}") for i, v in enumerate(value))
        if any(value == text for text in literals([option])):
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
    names = [*literals(options), *(_kind(option) for option in options if not literals([option]))]
    names = " or ".join(filter(None, [", ".join(names[:-1]), names[-1]])).replace("NoneType", "None")
    if value is None:
        raise InputError(f"{path} must be given, as --{path}=VALUE on the command line or in the config: {names}")
    raise InputError(f"{path}={value!r} must be {names}")


def _kind(option: Any) -> str:
    """What a value of this type is called in a sentence."""
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(option) or getattr(option, "__name__", str(option))


def options_of(annotation: Any) -> tuple[Any, ...]:
    """The types that a field may have: of a union all of them."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


def literals(options: Iterable[Any]) -> list[str]:
    """The texts that a field may have whose type is Literal."""
    return [text for o in options if typing.get_origin(o) is Literal for text in typing.get_args(o)]


def within(path: str, known: Iterable[str]) -> bool:
    """Whether the field at a path is one of those known, or inside one of them. Of one of several parts, or of a
    mixture's corpora, as if it stood alone."""
    single = re.sub(r"(\.corpora)?\.\d+", "", path)
    return any(f"{single}.".startswith(f"{each}.") for each in known)


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
