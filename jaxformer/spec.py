"""Specs, frozen dataclasses whose fields are hyperparameters; and the declarations of the arrays that they own."""

import abc
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import json
import math
import re
import sys
import types
import typing
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct

Arrays = Mapping[str, jax.Array]
Initializer = Callable[..., jax.Array]  # (key, shape, dtype) -> array
S = TypeVar("S", bound="Spec")


class InputError(ValueError):
    """The user's mistake, in one sentence that names field or file, value, rule and remedy."""


@typing.dataclass_transform(frozen_default=True)
@dataclasses.dataclass(frozen=True)
class Spec(abc.ABC):
    """A part that may be swapped. Subclassing makes the class a frozen dataclass, hashable, and a pytree.

    Fields annotated with `float` or with a Spec are the pytree's leaves, all others its structure. So a spec that is
    closed over is static, and the same spec passed as an argument has traced numbers and compiles nothing anew.

    The base of a role has abstract methods; only a class that defines them all can be made.
    """

    def __new__(cls, *args: Any, **fields: Any) -> Self:
        if missing := ", ".join(sorted(cls.__abstractmethods__)):
            raise InputError(
                f"{cls.__name__} is abstract until it defines {missing}; define that, or take another class"
            )
        return super().__new__(cls)

    def __init_subclass__(cls) -> None:
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


def override(spec: S, path: str, value: Any, at: str = "") -> S:
    """The spec with the field at a dotted path replaced; "mask.0.size" goes into a tuple.

    A string is read as the field's type: "3", "none", "1e-3", "0.7,0.3", and for a part its class: "Rotary" if it is
    known already, "my_module:Decay" imports the module. A part keeps what was set of the fields that both classes
    have, and begins with its defaults elsewhere; its fields can follow.
    """
    name, _, rest = path.partition(".")
    names = [field.name for field in dataclasses.fields(spec)]
    if name not in names:
        raise InputError(f"{at}{name}: {type(spec).__name__} has no such field; {nearest(name, names)}")
    old, new = getattr(spec, name), value
    if rest:
        new = _override_inside(old, rest, value, at + name)
    elif isinstance(value, str):
        new = _parse(value, typing.get_type_hints(type(spec))[name], at + name)
        new = _with_fields_of(old, new) if isinstance(old, Spec) and isinstance(new, Spec) else new
    return dataclasses.replace(spec, **{name: new})


def _with_fields_of(old: Spec, new: S) -> S:
    """The new spec with what was set in the old one of the fields that both declare alike."""
    hints = [typing.get_type_hints(type(spec)) for spec in (old, new)]
    names = [f.name for f in dataclasses.fields(old) if getattr(old, f.name) != _default(f)]
    names = [name for name in names if name in hints[1] and hints[0][name] == hints[1][name]]
    return dataclasses.replace(new, **{name: getattr(old, name) for name in names})


def _override_inside(old: Any, path: str, value: Any, at: str) -> Any:
    if isinstance(old, Spec):
        return override(old, path, value, at + ".")
    place, _, rest = path.partition(".")
    if isinstance(old, tuple) and rest and place.isdecimal() and int(place) < len(old):
        i = int(place)
        return (*old[:i], _override_inside(old[i], rest, value, f"{at}.{i}"), *old[i + 1 :])
    if isinstance(old, tuple) and any(isinstance(part, Spec) for part in old):
        raise InputError(f"{at}.{path}: {at} has {len(old)} parts; give {at}.0.FIELD to {at}.{len(old) - 1}.FIELD")
    raise InputError(f"{at}.{path}: {at}={old!r} has no fields; set {at} itself")


def listing(spec: Spec, at: str = "") -> Iterator[tuple[str, str, str]]:
    """Every field by its path, its value as the command line takes it, and what it means."""
    hints, comments = typing.get_type_hints(type(spec)), _comments(type(spec))
    for name in (field.name for field in dataclasses.fields(spec)):
        value = getattr(spec, name)
        parts = value if isinstance(value, tuple) else (value,)
        kinds = [k for o in _options(hints[name]) for k in (o, *typing.get_args(o)) if isinstance(k, type)]
        kinds = [kind for kind in kinds if issubclass(kind, Spec)]
        comment = comments.get(name, "")
        if kinds:
            comment = "; ".join(filter(None, [comment, f"of {_choices(kinds)}"]))
        is_part = lambda part: isinstance(part, Spec)
        yield at + name, ",".join(type(p).__name__ if is_part(p) else str(p) for p in parts), comment
        for i, part in enumerate(parts):
            if is_part(part):
                yield from listing(part, f"{at}{name}.{i}." if isinstance(value, tuple) else f"{at}{name}.")


def _choices(kinds: Iterable[type[Spec]]) -> str:
    """The names of the classes that a part may have; abstract ones are none, and those of a script are not found."""
    found = {c for kind in kinds for c in (kind, *known_specs(kind))}
    return ", ".join(sorted({c.__name__ for c in found if not inspect.isabstract(c) and c.__module__ != "__main__"}))


def _comments(cls: type) -> dict[str, str]:
    """What stands behind # beside the fields of a class and its bases."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        with contextlib.suppress(OSError, TypeError):  # no source
            found |= dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(base), re.MULTILINE))
    return found


def nearest(name: str, names: Iterable[str]) -> str:
    """The end of a sentence about a wrong name."""
    names = list(names)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(names) or 'none'}"


def _cast(value: Any, annotation: Any, path: str) -> Any:
    options, value = _options(annotation), value.item() if isinstance(value, np.generic) else value
    for option in options:
        origin = typing.get_origin(option)
        if origin is tuple and isinstance(value, tuple | list):
            inner = typing.get_args(option)[0]
            return tuple(_cast(v, inner, f"{path}.{i}") for i, v in enumerate(value))
        if isinstance(option, type) and type(value) is option and option is not float:
            return value if not isinstance(value, Spec) else checked(value, path + ".")
        if isinstance(option, type) and issubclass(option, Spec) and isinstance(value, option):
            return checked(value, path + ".")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and float in options:
        if abs(value) < 3.4e38:  # NaN is not
            return float(value)
        raise InputError(f"{path}={value!r} must be a finite number in float32")
    names = " or ".join("None" if o is types.NoneType else getattr(o, "__name__", str(o)) for o in options)
    if value is None:
        raise InputError(f"{path} must be given, as --{path}=VALUE on the command line or in the config: {names}")
    raise InputError(f"{path}={value!r} must be {names}, but it is {type(value).__name__}")


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
            try:
                return option(text)
            except ValueError:
                pass
    return _part(text, specs, path) if specs and text else text


def _part(text: str, kinds: tuple[type[Spec], ...], path: str) -> Spec:
    """A part by the name of its class, with its defaults; None where a field has none, for a later override to fill."""
    module, colon, name = text.rpartition(":")
    if colon:
        try:
            found = [getattr(importlib.import_module(module), name)]
        except (Exception, SystemExit) as error:  # whatever the user's module raises, it is the user's to mend
            raise InputError(f"{path}={text}: {type(error).__name__}: {error}; mend the module, or its name") from error
    else:
        found = [c for kind in kinds for c in {kind, *known_specs(kind)} if c.__name__ == name]
    if len(found) > 1:
        modules = " or ".join(sorted(f"{c.__module__}:{name}" for c in found))
        raise InputError(f"{path}={text!r} has several classes of that name; give {modules}")
    if not found or not isinstance(found[0], type) or not issubclass(found[0], kinds):
        raise InputError(f"{path}={text!r} must be one of {_choices(kinds)}, or module:Class of such a part")
    try:
        return found[0](**{f.name: None for f in dataclasses.fields(found[0]) if _default(f) is dataclasses.MISSING})
    except InputError as error:
        raise InputError(f"{path}={text}: {error}, of {_choices(kinds)}") from None


def _default(field: dataclasses.Field[Any]) -> Any:
    """MISSING if there is none."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _options(annotation: Any) -> tuple[Any, ...]:
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return typing.get_args(annotation) if union else (annotation,)


# --- stored form: class names and fields, resolved among classes that exist already; nothing is imported or run


def to_json(spec: Spec) -> Any:
    """The spec as JSON values. Refuses classes that another process could not find by their name."""

    def encode(value: Any) -> Any:
        if isinstance(value, tuple):
            return [encode(v) for v in value]
        if not isinstance(value, Spec):
            return value
        cls = type(value)
        if cls.__module__ == "__main__" or getattr(sys.modules.get(cls.__module__), cls.__qualname__, None) is not cls:
            raise InputError(
                f"{cls.__qualname__} cannot be stored: another process would not find it in {cls.__module__!r}; "
                "define it at the top level of a module of its own and import that"
            )
        return {"class": class_name(cls)} | {f.name: encode(getattr(value, f.name)) for f in dataclasses.fields(value)}

    return encode(spec)


def from_json(
    value: Any, cls: type[S], source: str, renewed: Callable[[dict[str, Any]], dict[str, Any]] = lambda fields: fields
) -> S:
    """The inverse of `to_json`, checked; `source` names the file in errors. `renewed` brings the stored form of a spec
    up to date."""
    known = {class_name(c): c for c in known_specs()}

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
                "import its module first (--import=MODULE on the command line)"
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

    try:
        spec = decode(value, 0)
        if not isinstance(spec, cls):
            raise InputError(f"holds {type(spec).__name__}, not a {cls.__name__}; was it written by jaxformer?")
        return checked(spec)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def dumps(spec: Spec) -> str:
    return json.dumps(to_json(spec), indent=1) + "\n"


def class_name(cls: type) -> str:
    """How a class is stored: "module:Class"."""
    return f"{cls.__module__}:{cls.__qualname__}"


def known_specs(cls: type[Spec] = Spec) -> list[type[Spec]]:
    """Every spec class that exists in this process."""
    return [c for sub in cls.__subclasses__() for c in (sub, *known_specs(sub))]


# --- declarations of arrays


@dataclasses.dataclass(frozen=True)
class Param:
    """One array of weights. "D->HK" is a matrix from D to H·K; letters without an arrow are a bias, gain or table.

    The letters (docs: README, "Letters") are the one source for shape, decay, fan-in, sharding and the tables that
    describe a model. Letters that one part alone knows carry their sizes: Param("RH", sizes={"R": 32}).
    """

    letters: str
    init: Initializer | None = None  # None: the model's initializer decides, by the letters
    decay: bool | None = None  # None: matrices decay, everything else does not
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    fan_in: str = ""  # of a bias: the letters that the matrix before it sums over; a matrix says so itself


@dataclasses.dataclass(frozen=True)
class Slot:
    """Room in the cache. With S in its letters: one entry per token, written by position. Without: a running state."""

    letters: str
    fill: float = 0
    dtype: Any = None  # None: the compute dtype
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # of letters that this part alone knows


class Declared(struct.PyTreeNode, nn.meta.AxisMetadata):
    """The box in which a declaration leaves Flax's init: an abstract array and how it was declared."""

    value: Any
    letters: str = struct.field(pytree_node=False)
    decay: bool = struct.field(pytree_node=False)
    init: Initializer | None = struct.field(pytree_node=False)
    fan_in: int = struct.field(pytree_node=False)  # numbers that go into each number of a product; 0 of a table, a gain

    def sizes(self) -> dict[str, int]:
        """Letter → size."""
        return dict(zip(self.letters.replace("->", ""), self.value.shape, strict=True))

    def unbox(self) -> Any:
        return self.value

    def replace_boxed(self, val: Any) -> "Declared":
        return self.replace(value=val)

    def add_axis(self, index: int, params: Any) -> "Declared":  # called by nn.scan
        return self.replace(letters=params[nn.PARTITION_NAME] + self.letters)

    def remove_axis(self, index: int, params: Any) -> "Declared":
        return self.replace(letters=self.letters[1:])


def declare(module: nn.Module, name: str, params: Mapping[str, Param], dims: Mapping[str, int]) -> Arrays:
    """A group of parameters of a module, {} if there are none. At init, boxed zeros: `draw` gives them values."""

    def create(key: jax.Array) -> dict[str, Any]:
        group = {}
        for label, p in params.items():
            sizes = {**dims, **p.sizes}
            shape = tuple(sizes[letter] for letter in p.letters.replace("->", ""))
            decay = "->" in p.letters if p.decay is None else p.decay
            summed = p.letters.partition("->")[0] if "->" in p.letters else p.fan_in
            fan_in = math.prod(sizes[letter] for letter in summed) if summed else 0
            group[label] = Declared(jnp.zeros(shape), p.letters, decay, p.init, fan_in)
        return group

    return module.param(name, create) if params else {}


def is_declared(x: Any) -> bool:
    return isinstance(x, Declared)


def map_declared(function: Callable[[Declared], Any], declared: Any) -> Any:
    """Maps over the boxes of a tree of declarations."""
    return jax.tree.map(function, declared, is_leaf=is_declared)


def path_name(path: Any) -> str:
    """How an array is called: "decoder/layers/block0/attention/project/q"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def draw(declared: Any, key: jax.Array, initializer: Callable[[Declared], Initializer]) -> Any:
    """float32 values for a tree of declarations.

    An array's key depends on its path and its layer alone, so that adding a part or a layer leaves the other arrays
    as they were, and an ablation differs in its idea only.
    """

    def one(path: Any, box: Declared) -> jax.Array:
        own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
        make, shape = box.init or initializer(box), box.value.shape
        if not box.letters.startswith("L"):
            return make(own, shape, jnp.float32)
        return jax.vmap(lambda layer: make(jax.random.fold_in(own, layer), shape[1:], jnp.float32))(
            jnp.arange(shape[0])
        )

    return jax.tree_util.tree_map_with_path(one, declared, is_leaf=is_declared)
