"""Runs as their files tell of them, and which differ by their seed alone. No model is built, nothing executed."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxformer import config as config_lib
from jaxformer.data.files import located, read_json
from jaxformer.data.tokenizers import read_tokenizer
from jaxformer.run.metrics import DIVERGED, less_is_better, read_rows
from jaxformer.run.starts import all_sources
from jaxformer.spec import InputError, Spec, class_name, dumps, specs_by_name, to_json, within

# What does not make another group, with what is inside; of what may differ when a run resumes, some changes what is
# learned. What texts hold is told by their fingerprints, not by where they stand.
IGNORED = (config_lib.FREE | config_lib.NOTICE | {"train.seed"}) - config_lib.MOVED - {"train.steps", "train.guard"}
NUMBERS_OF_NONE = {"step", "tokens", "seconds"}  # numbers in a row that say nothing of how good a run is


@dataclasses.dataclass(frozen=True)
class Record:
    """A run: its config as it is stored, what it was trained on, and its rows."""

    directory: str
    config: dict[str, Any]
    texts: dict[str, Any]  # data.json, and the SHA-256 of tokenizer.json
    rows: list[dict[str, Any]]
    sources: dict[str, list[str]]  # SHA-256 of the code of its parts from outside the package, of all that trained it

    @property
    def seed(self) -> int:
        return self.config["train"]["seed"]

    @property
    def steps(self) -> int:
        return self.config["train"]["steps"]

    @property
    def end(self) -> dict[str, Any]:
        """The row of the whole validation split at the last step; {} if the run has not come so far."""
        split = "valid" if self.config["data"].get("valid_tokens") is None else "valid_full"
        found = [row for row in self.rows if row.get("split") == split and row["step"] == self.steps]
        return found[-1] if found else {}

    def curve(self, by: str) -> dict[int, float]:
        """Step → number of every evaluation; those that are not finite are left out."""
        rows = [row for row in self.rows if row.get("split") == "valid"]
        return {row["step"]: float(row[by]) for row in rows if _finite(row.get(by))}

    def trouble(self, by: str) -> str:
        """Why it has no final number, in a few words; "" if it has one."""
        if not self.rows:
            return "has no rows: not begun"
        step, last = self.rows[-1]["step"], self.end or self.rows[-1]
        asked = last.get("weight", last.get("tokens", last.get("examples"))) != 0
        if asked and last.get("loss", 0.0) is None:
            return f"diverged: no finite number at step {step:,}"
        if self.rows[-1].get("split") == DIVERGED:
            return f"diverged: too many updates skipped in a row at step {step:,}"
        if not self.end:
            return f"unfinished: at step {step:,} of {self.steps:,}"
        return "" if _finite(self.end.get(by)) else f"has no {by}"

    @property
    def text(self) -> tuple[Any, ...]:
        """Which text its evaluations are of."""
        data, kinds = self.config["data"], specs_by_name()
        if data.get("valid") is not None:
            return ("valid", self.texts.get("valid_sha256"))
        sampling = str((data.get("sampling") or {}).get("class"))
        documents = getattr(kinds.get(sampling), "whole_documents", sampling)  # which are drawn, not taken from the end
        seed = data.get("split_seed") if documents else None
        examples = getattr(kinds.get(sampling), "examples", sampling)  # which are cut by their number, not by tokens
        return ("corpus", self.texts.get("corpus_sha256"), data.get("valid_fraction"), documents, examples, seed)

    def unknown(self, part: str) -> str:
        """The module of its "objective" or "sampling", if that is not imported, so that what it says is not known."""
        name = str(((self.config | self.config["data"]).get(part) or {}).get("class"))
        return "" if name in specs_by_name() else name.partition(":")[0]

    @property
    def shares(self) -> list[float]:
        """What each text of a mixture counts in a number of all of them."""
        data = self.config["data"]
        weights = (data.get("valid") or data.get("corpus") or {}).get("weights") or [1.0]
        return [round(weight / sum(weights), 9) for weight in weights]

    def of_part(self, by: str) -> bool:
        """Whether a number of its evaluations is of one text of a mixture, as loss_NAME is."""
        return any(by.startswith(f"{name}_") for name in self.end if name != by)

    @property
    def objective(self) -> Any:
        """What its loss is of; smoothing and z-loss are left out of what is reported."""
        fields, data = self.config.get("objective") or {}, self.config["data"]
        kind = specs_by_name().get(str(fields.get("class")))
        if kind and (measured := vars(kind).get("measures")):  # each class says it for itself
            own = {field.name for field in dataclasses.fields(measured)}
            fields = {name: value for name, value in fields.items() if name in own} | {"class": class_name(measured)}
        found = {name: value for name, value in fields.items() if name not in ("label_smoothing", "z_loss")}
        if getattr(kind, "among_rows", False):
            rows = data["batch_size"] // self.config["train"].get("accumulation", 1)
            found |= {"rows": rows, "sampling": data.get("sampling")}
        return found

    @property
    def cut(self) -> tuple[int, int] | None:
        """Where its evaluations cut long examples: the tokens of a window, and how many are left in all; None if they
        leave out nothing."""
        data, model = self.config["data"], self.config["model"]
        kind = specs_by_name().get(str((data.get("sampling") or {}).get("class")))
        if not getattr(kind, "examples", False) or "tokens" not in self.end:
            return None
        return data.get("window") or model.get("context_length"), self.end["tokens"]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def numbers_of(records: Sequence[Record]) -> list[str]:
    """The names of the numbers that the evaluations have."""
    rows = [row for record in records for row in record.rows if str(row.get("split")).startswith("valid")]
    return sorted({name for row in rows for name, value in row.items() if _finite(value)} - NUMBERS_OF_NONE)


def find_runs(paths: Sequence[str | Path]) -> list[Record]:
    """The runs in these folders and the folders within, in their order, each once. Raises InputError if one has
    none."""
    found: dict[Path, Record] = {}
    for path in map(located, map(str, paths)):
        if not path.is_dir():
            raise InputError(f"{str(path)!r} is no folder; give the directory of a run, or a folder of runs")
        inside = [each.parent for each in path.rglob("config.json") if (each.parent / "data.json").is_file()]
        if not inside:
            raise InputError(f"{str(path)!r} holds no run, no config.json beside a data.json; give a folder of runs")
        for folder in sorted(inside, key=lambda folder: _natural(str(folder))):
            if folder.resolve() not in found:
                found[folder.resolve()] = _record(folder)
    return list(found.values())


def _natural(text: str) -> list[Any]:
    """A key by which seed-2 comes before seed-10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", text)]


def _record(directory: Path) -> Record:
    path = directory / "config.json"
    try:
        config = to_json(config_lib.read(path))
    except InputError:  # parts of a module that was not imported, perhaps: the fields can be compared all the same
        config = _json(path)
    known = ("train", "seed"), ("train", "steps"), ("data", "corpus"), ("model", "class")
    if any(not isinstance(config.get(part), dict) or name not in config[part] for part, name in known):
        raise InputError(f"{path}: holds no config of a run; give another folder")
    config.pop("format", None)
    texts, tokenizer = _json(directory / "data.json"), directory / "tokenizer.json"
    sha256 = hashlib.sha256(_of_tokenizer(tokenizer)).hexdigest() if tokenizer.exists() else None
    rows, _ = read_rows(directory / "metrics.jsonl")
    return Record(
        str(directory),
        config,
        texts | {"tokenizer_sha256": sha256},
        rows,
        all_sources(directory, config["train"]["steps"]),
    )


def _of_tokenizer(path: Path) -> bytes:
    """As it would be stored now, with fields that it has gained since; of one that cannot be read the file itself."""
    try:
        return dumps(read_tokenizer(path)).encode()
    except InputError:
        return path.read_bytes()


def _json(path: Path) -> dict[str, Any]:
    if not isinstance(found := read_json(path), dict):
        raise InputError(f"{path}: must hold a JSON object; restore the file, or leave the run out")
    return found


# --- groups


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs that differ by their seed. `records` are those that count, one for each seed."""

    name: str
    config: dict[str, Any]  # what makes the group: without seed, directory and the like
    records: list[Record]  # by seed
    left_out: dict[str, str]  # directory -> why

    @property
    def seeds(self) -> list[int]:
        return [record.seed for record in self.records]

    @property
    def diverged(self) -> int:
        return sum(" diverged: " in why for why in self.left_out.values())

    def final(self, by: str) -> dict[int, float]:
        """Seed → number of the whole validation split at the last step."""
        return {record.seed: float(record.end[by]) for record in self.records}

    def best(self, by: str) -> dict[int, float]:
        """Seed → the best of all evaluations, which was chosen by the split that it is of."""
        best = min if less_is_better(by) else max
        return {record.seed: best(record.curve(by).values(), default=float(record.end[by])) for record in self.records}


def grouped(records: Sequence[Record], by: str) -> list[Group]:
    """In the order in which each has its first run."""
    paths: dict[Any, str] = {}
    configs = [_config(record, paths) for record in records]
    alike: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        alike.setdefault(_key(_of_seed(config, None, SEEDED)), []).append(i)
    for each in alike.values():
        seeds = [records[i].seed for i in each]
        given = {name: [value(configs[i]) for i in each] for name, value in SEEDED.items()}
        if len(set(seeds)) > 1 and (names := [name for name in SEEDED if given[name] == seeds]):
            for i in each:
                configs[i] = _of_seed(configs[i], "train.seed", names)
    found: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        found.setdefault(_key(config), []).append(i)
    return [_group([records[i] for i in each], configs[each[0]], by) for each in found.values()]


RUN_OF_SEED = re.compile(r"(?<=/seed-)\d+(?=/|$)")


def _number(path: str | None) -> int | None:
    """The seed of the run in a path."""
    found = RUN_OF_SEED.search(path or "")
    return int(found[0]) if found else None


# What may follow the seed, as `Row.also` and `begins_with` make it: a split for each, a part of the table, another run.
SEEDED: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "split_seed": lambda config: config["data"].get("split_seed"),
    "fold": lambda config: (config["data"]["corpus"] or {}).get("fold"),
    "init_from": lambda config: _number(config.get("init_from")),
    "tokenizer": lambda config: _number((config["data"].get("tokenizer") or {}).get("path")),
}


def _of_seed(config: Mapping[str, Any], value: Any, names: Collection[str]) -> dict[str, Any]:
    """The config with these fields, and what follows from them, at the same value for every seed."""
    data, corpus = config["data"], config["data"]["corpus"]
    if "split_seed" in names:
        data = data | {"split_seed": value}
    if "fold" in names and "fold" in (corpus or {}):
        data = data | {"corpus": corpus | {"fold": value}, "corpus_sha256": value, "tokenizer_sha256": value}
    if "tokenizer" in names and SEEDED["tokenizer"](config) is not None:
        path = RUN_OF_SEED.sub(str(value), data["tokenizer"]["path"])
        data = data | {"tokenizer": data["tokenizer"] | {"path": path}}
    if "init_from" in names and SEEDED["init_from"](config) is not None:
        config = {**config, "init_from": RUN_OF_SEED.sub(str(value), config["init_from"])}
    return {**config, "data": data}


def _key(config: Mapping[str, Any]) -> str:
    return json.dumps(config, sort_keys=True)


def _config(record: Record, paths: dict[Any, str]) -> dict[str, Any]:
    """What makes a run's group. A text that was moved keeps the path at which it was met first."""
    prints = {name: record.texts.get(f"{name}_sha256") for name in ("corpus", "valid", "tokenizer")}

    def kept(value: Any, at: str) -> Any:
        if within(at, config_lib.MOVED):
            sha256 = prints[at.split(".")[1]]
            return value if sha256 is None else paths.setdefault((at, sha256), value)
        if isinstance(value, list):
            return [kept(inner, f"{at}.{i}") for i, inner in enumerate(value)]
        if not isinstance(value, dict):
            return value
        inside = {name: f"{at}.{name}" if at else name for name in value}
        return {n: kept(value[n], path) for n, path in inside.items() if not within(path, IGNORED)}

    config = kept(record.config, "")
    config["data"] |= {f"{name}_sha256": sha256 and sha256[:12] for name, sha256 in prints.items()}
    return config | {"sources": {name: ", then ".join(s[:12] for s in each) for name, each in record.sources.items()}}


def _group(records: Sequence[Record], config: dict[str, Any], by: str) -> Group:
    counted: dict[int, Record] = {}
    left_out: dict[str, str] = {}
    for record in records:
        if why := record.trouble(by):
            left_out[record.directory] = f"seed {record.seed} {why}"
        elif record.seed in counted:  # the same numbers again, and no more is known by them
            left_out[record.directory] = f"seed {record.seed} counts already, in {counted[record.seed].directory}"
        else:
            counted[record.seed] = record
    by_seed = [counted[seed] for seed in sorted(counted)]
    return Group(_name([record.directory for record in records]), config, by_seed, left_out)


def _name(directories: Sequence[str]) -> str:
    """What the directories have in common, as runs/rotary of runs/rotary/seed-0 or of runs/rotary-0 and more."""
    if len(directories) == 1:
        return directories[0]
    names = {re.sub(r"[-_./]?(seed)?[-_.]?\d+$", "", directory) for directory in directories}
    return names.pop() if len(names) == 1 else f"{directories[0]} and others"


# --- what differs


def differences(values: Sequence[Any], at: str = "") -> dict[str, list[Any]]:
    """Path → a stored value for each, of the fields that are not the same in all. None where a field is not there."""
    first = values[0]
    if all(value == first for value in values):
        return {}
    if all(isinstance(value, dict) and value.get("class") == first.get("class") for value in values):
        names = dict.fromkeys(name for value in values for name in value)
        found = [differences([value.get(name) for value in values], f"{at}.{name}") for name in names]
    elif all(isinstance(value, list) and len(value) == len(first) for value in values):
        found = [differences(list(each), f"{at}.{i}") for i, each in enumerate(zip(*values, strict=True))]
    else:
        return {at.removeprefix("."): list(values)}
    return {path: each for part in found for path, each in part.items()}


def told(value: Any) -> str:
    """A stored value for the eye: classes without their modules, and without fields that have their defaults."""
    if isinstance(value, list):
        return ", ".join(map(told, value)) or "()"
    if not isinstance(value, dict):
        return str(value)
    kinds = specs_by_name()
    name = str(value.get("class"))
    defaults = _defaults(kinds[name]) if name in kinds else {}
    fields = [f"{n}={told(v)}" for n, v in value.items() if n != "class" and not (n in defaults and defaults[n] == v)]
    return f"{name.rpartition(':')[2]}({', '.join(fields)})"


def _defaults(kind: type[Spec]) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(kind) if field.default is not dataclasses.MISSING]
    return {field.name: to_json(field.default) for field in fields}
