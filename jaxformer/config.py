"""Every knob of a run on one page; and how a config is loaded, overridden, checked, stored and compared."""

import contextlib
import dataclasses
import difflib
import json
import runpy
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxformer.data import dialogues, tables, tasks
from jaxformer.data.batches import RandomWindows, RowSize, Sampling
from jaxformer.data.corpora import Corpus, PythonTopics, TextFiles
from jaxformer.data.files import expanded, located, read_json, write
from jaxformer.data.tokenizers import Characters, Tokenizer
from jaxformer.generation.decode import Sampler
from jaxformer.learning import adafactor, by_depth, groups, schedule_free
from jaxformer.learning.adapters import Adapter
from jaxformer.learning.guards import Guard
from jaxformer.learning.objectives import NextToken, Objective
from jaxformer.learning.optimizers import AdamW, Optimizer
from jaxformer.learning.schedules import WarmupLinear
from jaxformer.mesh import Mesh
from jaxformer.model import baselines
from jaxformer.model.masks import Causal
from jaxformer.model.models import Decoder, Model
from jaxformer.overrides import override
from jaxformer.spec import InputError, Spec, checked, from_json, specs_by_name, to_json, within
from jaxformer.writers import Writer

S = TypeVar("S", bound=Spec)
# Imported so that their specs are known by name, in overrides and stored configs.
PARTS = dialogues, tables, tasks, baselines, groups, adafactor, by_depth, schedule_free


class Data(Spec):
    """Text, and how batches are made of it."""

    corpus: Corpus = PythonTopics()  # the text to train on
    valid: Corpus | None = None  # the text to validate on; None: a part of the corpus, or of each one of a mixture
    valid_fraction: float = 0.1  # the share of the corpus that is kept for validation; of windows its end
    split_seed: int | None = 0  # which examples or documents validate, of each class its share; None: the last ones
    valid_tokens: int | None = None  # how many tokens an evaluation on the way reads, the same each time; None: all
    tokenizer: Tokenizer = Characters()  # how text becomes ids
    sampling: Sampling = RandomWindows()  # how rows are made of the ids
    batch_size: int = 16  # rows in a batch
    window: int | None = None  # tokens in a row; None: model.context_length

    def check(self, at: str = "") -> None:
        _check_data(self, at)


class Train(Spec):
    """How long, how often, from which seed."""

    steps: int = 1000  # how many updates are made
    seed: int = 0  # determines the first parameters, the batches and dropout
    steps_per_call: int = 10  # steps in one call of the device: more is faster, but a signal waits for its end
    accumulation: int = 1  # slices of a batch whose gradients are summed before the update, to save memory
    compute_dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # dtype of activations; all else is float32
    product_dtype: Literal["bfloat16"] | None = None  # of what matrices multiply, sums are float32; None: compute_dtype
    ema_decay: float | None = None  # decay of an average of parameters, which is evaluated; None: no average
    guard: Guard | None = Guard()  # skips updates that a loss or gradient spoils; None: none
    log_every: int = 10  # steps between two rows of metrics
    grad_norms: bool = False  # adds the gradient's norm of each parameter and layer to these rows
    eval_every: int = 250  # steps between two evaluations
    save_every: int = 250  # steps between two checkpoints
    keep: int = 2  # how many of the newest checkpoints are kept beside the best one
    best_by: str = "loss"  # metric that tells the best one: least of losses and bits_per_byte, most of others
    sample_tokens: int = 200  # length of the text that an evaluation shows; 0: none

    def check(self, at: str = "") -> None:
        _check_train(self, at)


class Config(Spec):
    """A run."""

    directory: str  # where the run is kept
    model: Model  # the architecture
    data: Data = Data()  # the text, and how batches are made of it
    objective: Objective = NextToken()  # what is learned of a batch
    optimizer: Optimizer = AdamW()  # how gradients change the parameters
    train: Train = Train()  # how long, how often, from which seed
    sampler: Sampler | None = None  # how texts are drawn from the model; None: LeftToRight
    init_from: str | None = None  # a run, or one of its checkpoints, whose parameters this one begins with
    writers: tuple[Writer, ...] = ()  # where rows go besides metrics.jsonl
    mesh: Mesh = Mesh()  # over how many devices, and how
    adapter: Adapter | None = None  # trains little beside the parameters of `init_from`; None: trains them all

    def check(self, at: str = "") -> None:
        _check_config(self, at)

    @property
    def window(self) -> int:
        """Tokens that the model sees at once."""
        return self.data.window or self.model.context_length

    @property
    def slice_rows(self) -> int:
        """Rows that go through the model at once."""
        return self.data.batch_size // self.train.accumulation

    @property
    def row(self) -> RowSize:
        """How many tokens a row of a batch has."""
        return RowSize(self.window, self.objective.lookahead)


# What may differ when a run resumes, with what is inside. Nothing else may: the result would be that of neither config.
FREE = {"directory", "sampler", "writers"} | {
    f"train.{n}" for n in ("log_every", "eval_every", "save_every", "keep", "sample_tokens")
}
MOVED = {"data.corpus.path", "data.valid.path", "data.tokenizer.path"}  # what they hold must be the same
NOTICE = MOVED | {
    "data.valid_tokens",
    *(f"train.{n}" for n in ("steps", "steps_per_call", "grad_norms", "guard")),
    "mesh",
    *("model.unroll", "model.remat", "model.kernel.implementation", "model.cross_kernel.implementation"),
}


def presets() -> dict[str, Path]:
    """The files of the configs that come with jaxformer, by name: a checkout's configs/, which a wheel has inside."""
    package = Path(__file__).parent
    folder = package / "presets" if (package / "presets").is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def config_file(name: str | Path) -> Path | None:
    """The file at that path, with or without its .py; or else the preset of that name."""
    here = located(str(name))
    found = [path for path in (here, Path(f"{here}.py")) if path.is_file()]
    return found[0] if found else presets().get(str(name))


def load(name: str | Path) -> Config:
    """The `config` that a Python file, or a preset, defines. Raises InputError if there is none."""
    path = config_file(name)
    if path is None:
        close = difflib.get_close_matches(Path(name).stem, presets(), n=1)
        remedy = f"did you mean the preset {close[0]}?" if close else "`jaxformer presets` lists those that there are"
        raise InputError(f"config {str(name)!r} is neither a file nor a preset; {remedy}")
    found = execute(path).get("config")
    if not isinstance(found, Config):
        raise InputError(f"{path}: must define `config`, a jaxformer Config, but it is {type(found).__name__}")
    return found


def execute(path: Path) -> dict[str, Any]:
    """What a Python file of the user's defines. Raises InputError if it raises anything."""
    folder = str(path.parent.absolute())
    sys.path.insert(0, folder)  # as Python does for a script: a config may import its neighbours
    try:
        return runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # whatever the user's file raises, it is the user's to fix
        raise InputError(f"{_place(path, error)}: {_reason(error)}") from error
    finally:
        with contextlib.suppress(ValueError):  # which may have changed it
            sys.path.remove(folder)


def _place(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _reason(error: BaseException) -> str:
    if isinstance(error, InputError):
        return str(error)
    return f"{type(error).__name__}: {error}"


def resolve(config: Config | str | Path, overrides: Mapping[str, Any] | None = None) -> Config:
    """The config, or that of a file, with fields replaced by their paths ("model.n_layers": 6), and checked.

    No shell expands the ~ or $NAME of a directory that stands in a file, or behind --directory=.
    """
    found = checked(overridden(config if isinstance(config, Config) else load(config), overrides or {}))
    return dataclasses.replace(found, directory=expanded(found.directory))


def overridden(config: Config, overrides: Mapping[str, Any]) -> Config:
    """Not checked: fields that must be given may still be missing."""
    if not isinstance(overrides, Mapping):
        raise InputError(
            f"overrides={overrides!r} must map paths of fields to values, such as {{'train.steps': 500}}; give a "
            "directory by its name, directory=..."
        )
    parts_first = sorted(overrides.items(), key=lambda item: item[0].count("."))  # before their fields
    for path, value in parts_first:
        config = override(config, path, value)
    return config


def check_storable(config: Config) -> None:
    """Raises InputError if another process could not read the config back."""
    to_json(config)


# --- the stored form, in which runs of before still open

FORMAT = 4
# Format, class, field, value: what runs up to it did where a field has another default since, or was not there.
BEFORE: tuple[tuple[int, type[Spec], str, Any], ...] = (
    (1, Data, "split_seed", None),
    (1, WarmupLinear, "shortens", False),
    (2, TextFiles, "skip", ()),
    (3, baselines.LSTM, "forget_bias", None),
)
# What classes were called.
RENAMED = {
    "jaxformer.model.heads:Pooling": "jaxformer.model.heads:MeanPooling",
    "jaxformer.model.layers:FeedForward": "jaxformer.model.layers:MLP",
    **{
        f"jaxformer.model.blocks:{name}": f"jaxformer.model.residuals:{name}"
        for name in ("PreNorm", "PostNorm", "SandwichNorm", "Parallel")
    },
}
# Class, field that it had, part and field in which its value stands since.
MOVED_INTO: tuple[tuple[type[Spec], str, str, str], ...] = (
    (Decoder, "scale_embedding", "embedding", "scaled"),
    (Decoder, "embedding_norm", "embedding", "normed"),
    (Decoder, "n_parts", "embedding", "token_types"),
)
# Class, field that it had, the value at which it did nothing.
DROPPED: tuple[tuple[type[Spec], str, Any], ...] = ((Objective, "label_smoothing", 0.0), (Objective, "z_loss", 0.0))


def save(config: Config, path: Path, since: int = FORMAT) -> None:
    """`since` is the format in which the run was stored when it began."""
    write(path, json.dumps({"format": since} | to_json(config), indent=1) + "\n")


def read(path: Path) -> Config:
    """The config stored in a run. Executes nothing."""
    value, since = _stored(path)
    known = specs_by_name()
    if isinstance(value, dict) and isinstance(value.get("writers"), list):  # they do not make the run: unknown ones go
        value["writers"] = [w for w in value["writers"] if not isinstance(w, dict) or str(w.get("class")) in known]
        of_class = {str(w["class"]) if isinstance(w, dict) else str(w): w for w in value["writers"]}
        value["writers"] = list(of_class.values())
    return from_json(value, Config, str(path), lambda fields: _renewed(fields, since, known))


def _renewed(stored: dict[str, Any], since: int, known: Mapping[str, type[Spec]]) -> dict[str, Any]:
    """What a spec, stored in a format, would be now. Raises InputError if it would be nothing."""
    name = str(stored.get("class"))
    found = stored | ({"class": RENAMED[name]} if RENAMED.get(name) in known else {})
    kind = known.get(str(found.get("class")))
    if kind is None:
        return found
    gone = found.keys() - {field.name for field in dataclasses.fields(kind)}
    rows = lambda table: [row for row in table if issubclass(kind, row[0]) and row[1] in gone]
    for until, cls, name, old in BEFORE:
        if since <= until and issubclass(kind, cls):
            found.setdefault(name, old)
    for _, name, part, inner in rows(MOVED_INTO):
        there = found.get(part)
        found[part] = (there if isinstance(there, dict) else to_json(getattr(kind, part))) | {inner: found.pop(name)}
    for _, name, nothing in rows(DROPPED):
        if (was := found.pop(name)) != nothing:
            raise InputError(f"{kind.__name__}.{name}={was!r} is known no more; take the jaxformer that wrote it")
    return found


def format_of(path: Path) -> int:
    """The format in which the run was stored when it began."""
    return _stored(path)[1]


def _stored(path: Path) -> tuple[Any, int]:
    value = read_json(path)
    since = value.pop("format", 1) if isinstance(value, dict) else 1
    if since not in range(1, FORMAT + 1):
        raise InputError(f"{path}: format={since!r} must be at most {FORMAT}; take the jaxformer that wrote it")
    return value, since


def as_begun(new: S, stored: S, since: int) -> S:
    """The config of a run that was stored in an older format, with what has another default since as it was then."""
    before = [(name, old) for until, cls, name, old in BEFORE if since <= until and isinstance(new, cls)]

    def renewed(a: Any, b: Any) -> Any:
        if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
            return tuple(map(renewed, a, b))
        return as_begun(a, b, since) if isinstance(a, Spec) and isinstance(b, Spec) and type(a) is type(b) else a

    changes: dict[str, Any] = {}
    for field in dataclasses.fields(new):
        a, b = getattr(new, field.name), getattr(stored, field.name)
        changes[field.name] = b if a == field.default and (field.name, b) in before else renewed(a, b)
    return dataclasses.replace(new, **changes)


def differences(old: Spec, new: Spec, at: str = "") -> dict[str, tuple[Any, Any]]:
    """Path → (old, new) of every field that differs."""
    found: dict[str, tuple[Any, Any]] = {}
    for name in (field.name for field in dataclasses.fields(old)):
        a, b = getattr(old, name), getattr(new, name)
        found |= _differences(a, b, at + name)
    return found


def _differences(a: Any, b: Any, path: str) -> dict[str, tuple[Any, Any]]:
    if isinstance(a, Spec) and type(a) is type(b):
        return differences(a, b, f"{path}.")
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) and any(isinstance(part, Spec) for part in a):
        parts = (_differences(*pair, f"{path}.{i}") for i, pair in enumerate(zip(a, b, strict=True)))
        return {name: change for part in parts for name, change in part.items()}
    return {path: (a, b)} if a != b else {}


def may_change(path: str) -> bool | None:
    """Whether a run may resume with another value of the field; None: with a notice."""
    return None if within(path, NOTICE) else within(path, FREE)


def told(path: str, old: Any, new: Any) -> str:
    """A difference in words: of two parts their classes, and what differs of the fields that both have."""
    if not (isinstance(old, Spec) and isinstance(new, Spec)):
        return f"{path} was {old!r} and is {new!r}"
    kinds = [f"{path} was {type(old).__name__} and is {type(new).__name__}"] if type(old) is not type(new) else []
    both = [field.name for field in dataclasses.fields(old) if hasattr(new, field.name)]
    rows = [(f"{path}.{name}", getattr(old, name), getattr(new, name)) for name in both]
    return "; ".join(kinds + [told(*row) for row in rows if row[1] != row[2]])


# --- checks


def _check_data(data: Data, at: str) -> None:
    if data.batch_size < 1:
        raise ValueError(f"{at}batch_size={data.batch_size} must be at least 1")
    if data.window is not None and data.window < 1:
        raise ValueError(f"{at}window={data.window} must be at least 1; None takes model.context_length")
    if data.split_seed is not None and not 0 <= data.split_seed < 2**32:
        raise ValueError(f"{at}split_seed={data.split_seed} must be at least 0 and less than 2**32, or None")
    if data.valid_tokens is not None and data.valid_tokens < 1:
        raise ValueError(f"{at}valid_tokens={data.valid_tokens} must be at least 1; None evaluates all")
    data.sampling.check_corpus(data.corpus, data.valid, at)
    if not 0 < data.valid_fraction < 1:
        raise ValueError(f"{at}valid_fraction={data.valid_fraction} must lie between 0 and 1; 0.1 is usual")


def _check_train(train: Train, at: str) -> None:
    for name in ("steps", "steps_per_call", "accumulation", "log_every", "eval_every", "save_every", "keep"):
        if getattr(train, name) < 1:
            raise ValueError(f"{at}{name}={getattr(train, name)} must be at least 1")
    if train.steps >= 2**31:
        raise ValueError(f"{at}steps={train.steps} must be less than 2**31")
    if not 0 <= train.seed < 2**32:
        raise ValueError(f"{at}seed={train.seed} must be at least 0 and less than 2**32")
    if train.product_dtype is not None and train.compute_dtype != "float32":
        raise ValueError(
            f"{at}product_dtype={train.product_dtype} must be None beside {at}compute_dtype={train.compute_dtype}: it "
            "is for activations in float32"
        )
    if train.ema_decay is not None and not 0 < train.ema_decay < 1:
        raise ValueError(f"{at}ema_decay={train.ema_decay} must lie between 0 and 1; 0.999 is usual, None turns it off")
    if train.sample_tokens < 0:
        raise ValueError(f"{at}sample_tokens={train.sample_tokens} must be at least 0; 0 shows no text")


def _check_config(config: Config, at: str) -> None:
    if not config.directory or "\0" in config.directory or any("\ud800" <= c <= "\udfff" for c in config.directory):
        raise ValueError(f"{at}directory={config.directory!r} must name a folder for the run; runs/NAME is usual")
    if config.window > config.model.context_length:
        raise ValueError(
            f"{at}data.window={config.window} must be at most {at}model.context_length={config.model.context_length}; "
            "None takes that"
        )
    if config.row.tokens < 2:
        raise ValueError(f"{at}data.window={config.window} must be at least 2 for {type(config.objective).__name__}")
    config.objective.check_model(config.model)
    if config.train.product_dtype is not None and not isinstance(config.model, Decoder):
        kind = type(config.model).__name__
        raise ValueError(
            f"{at}train.product_dtype={config.train.product_dtype} must be None: {at}model={kind} has no products that "
            "it makes faster"
        )
    _check_prefix(config, at)
    for field, corpus in (("corpus", config.data.corpus), ("valid", config.data.valid)):
        if corpus is not None and corpus.marked and not config.objective.weighs:
            raise ValueError(
                f"{at}data.{field}={type(corpus).__name__} says which tokens are answers, and "
                f"{at}objective={type(config.objective).__name__} does not read it; take NextToken"
            )
    names = [type(writer).__name__ for writer in config.writers]
    if len(set(names)) < len(names):
        raise ValueError(f"{at}writers=({', '.join(names)}) must differ: each keeps one record of the run")
    if config.sampler is not None:
        config.sampler.check_model(config.objective, config.model)
    config.objective.check_rows(at, config.data.batch_size, config.train.accumulation)
    if config.train.ema_decay is not None and config.optimizer.averages:
        kind = type(config.optimizer).__name__
        raise ValueError(
            f"{at}train.ema_decay={config.train.ema_decay} must be None: optimizer={kind} averages by itself"
        )
    if config.adapter is not None and config.init_from is None:
        raise ValueError(
            f"{at}adapter={type(config.adapter).__name__} leaves parameters as they are: {at}init_from=None must name "
            "the run whose they are"
        )
    if config.data.batch_size % config.train.accumulation:
        raise ValueError(
            f"{at}train.accumulation={config.train.accumulation} must divide "
            f"{at}data.batch_size={config.data.batch_size}"
        )


def _check_prefix(config: Config, at: str) -> None:
    """A mask that sees no more than the first of two texts ahead is causal where rows have one."""
    model, two = config.model, config.data.sampling.joined or config.objective.second
    if two or not isinstance(model, Decoder) or not model.sees_ahead or model.sees_answers:
        return
    try:
        config.objective.check_model(dataclasses.replace(model, mask=Causal()))
    except ValueError as error:
        raise ValueError(
            f"{at}model.mask is causal where rows have one text, as those of "
            f"{at}data.sampling={type(config.data.sampling).__name__}; take Bidirectional: {error}"
        ) from None
