"""A folder in Hugging Face's layout to a run of parameters alone."""

import dataclasses
import fnmatch
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from jaxformer import config as config_lib
from jaxformer.config import Config, Data, Train
from jaxformer.data.batches import Examples, Sampling, ShuffledWindows
from jaxformer.data.corpora import NoCorpus
from jaxformer.data.files import located, parsed, write
from jaxformer.data.locks import locked
from jaxformer.data.tokenizers import SPECIAL, NoTokenizer, Subwords, Tokenizer, TokenizerFile, defined, read_tokenizer
from jaxformer.declarations import by_path
from jaxformer.interop.architecture import Architecture, Options, Place
from jaxformer.interop.families import ARCHITECTURES
from jaxformer.interop.tensors import DTYPES, NAMES, Tensor, read_header
from jaxformer.learning.objectives import TokenObjective
from jaxformer.learning.optimizers import Frozen
from jaxformer.model.models import Decoder
from jaxformer.platform import set_flags
from jaxformer.run.checkpoint import save_once
from jaxformer.run.directory import check_begun, has_begun
from jaxformer.run.manifest import sha256
from jaxformer.run.plan import recipe_of
from jaxformer.run.step import TrainState
from jaxformer.spec import InputError, checked, dumps

log = logging.getLogger(__name__)

WINDOW = 2048  # tokens that a run reads at once at most, unless it is told otherwise
JSON = 1 << 26  # bytes of a JSON file at most
SHARDS = "model.safetensors.index.json"
ONE = "model.safetensors"
OWN_TOKENIZER = "tokenizer.jaxformer.json"  # as a run stores it; `export` leaves it beside the other form


class Found(NamedTuple):
    """What a folder holds, checked."""

    architecture: Architecture
    kind: str  # its model_type
    model: Decoder
    tokenizer: Tokenizer
    sources: Mapping[str, tuple[Tensor, list[Place]]]  # by the tensor's name
    ends: list[int]  # ids that end a text, where the folder names several


def read_folder(folder: Path) -> Found:
    """Raises InputError that names all that is missing, too much, misshapen or not supported; reads no numbers."""
    if not folder.is_dir():
        raise InputError(f"{str(folder)!r} is no folder; give one with a config.json and .safetensors files")
    options = Options(_object(folder / "config.json"))
    kind = options.get("model_type")
    known = {name: architecture for architecture in ARCHITECTURES for name in architecture.kinds}
    if not isinstance(kind, str) or kind not in known:
        raise InputError(f"{folder / 'config.json'}: model_type={kind!r} must be one of {', '.join(known)}")
    architecture, tensors = known[kind], _tensors(folder)
    model = architecture.model(options, sorted(tensors))
    if options.problems:
        raise InputError(f"{folder / 'config.json'}: {'; '.join(options.problems)}")
    if unknown := options.unknown():
        log.warning("%s: not known, and not heeded: %s", folder / "config.json", ", ".join(unknown))
    if model.n_layers > len(tensors):  # before a table is made of so many
        raise InputError(f"{folder} has {len(tensors)} tensors, too few for {model.n_layers} layers; copy it again")
    try:
        checked(model, "model.")
    except ValueError as error:
        raise InputError(f"{folder / 'config.json'}: no such model can be made ({error})") from None
    sources = _matched(folder, architecture, model, tensors)
    return Found(
        architecture,
        kind,
        model,
        _tokenizer(folder, options, architecture, model),
        sources,
        _ends(folder, options, model),
    )


def import_run(folder: str | Path, directory: str | Path, window: int | None = None) -> dict[str, Any]:
    """Writes the run of parameters alone that a folder's model makes to a new directory; says what it wrote.

    Arrays are read one by one into their places. `window` is how many tokens the run reads at once.
    """
    set_flags()
    found = read_folder(located(str(folder)))
    config = _config(found, located(str(directory)), window)
    place = Path(config.directory)
    if has_begun(place) or check_begun(config):
        raise InputError(f"directory={config.directory!r} holds a run already; give a new directory")
    try:
        recipe_of(config, found.tokenizer, {})
    except InputError as error:
        raise InputError(f"{folder}: {error}; a tokenizer.json beside config.json tells of special tokens") from None

    def taken() -> None:
        raise InputError(f"directory={config.directory!r} is being written by another process; wait for it")

    place.mkdir(parents=True, exist_ok=True)
    with locked(place / "lock", taken):
        state = TrainState(cast(Any, np.zeros((), np.int32)), parameters(found), opt_state=())
        save_once(place / "checkpoints", state, 0)
        write(place / "data.json", json.dumps({"classes": {}}) + "\n")
        write(place / "tokenizer.json", dumps(found.tokenizer))
        dtypes = sorted({tensor.dtype for tensor, _ in found.sources.values()})
        names = [name for name, short in NAMES.items() if short in dtypes]
        dtype = names[0] if len(names) == 1 else "float32"
        origin = {"folder": str(folder), "model_type": found.kind, "dtype": dtype, "eos_token_id": found.ends}
        write(place / "imported.json", json.dumps(origin, indent=1) + "\n")
        config_lib.save(config, place / "config.json")  # last: it makes the directory a run
    count = sum(array.size for array in jax.tree.leaves(state.params))
    about = {"run": config.directory, "model": type(config.model).__name__, "n_params": count}
    return about | {"params_sha256": sha256(state.params)}


def _config(found: Found, directory: Path, window: int | None) -> Config:
    model = dataclasses.replace(found.model, vocab_size=None)  # the tokenizer's
    objective = found.architecture.objective(found.model)
    sampling: Sampling = ShuffledWindows() if isinstance(objective, TokenObjective) else Examples()
    data = Data(
        corpus=NoCorpus(),
        tokenizer=TokenizerFile(str(directory / "tokenizer.json")),
        sampling=sampling,
        batch_size=8,
        window=min(WINDOW, model.context_length) if window is None else window,
    )
    train = Train(steps=1, guard=None)
    try:
        return checked(Config(str(directory), model, data, objective, Frozen(), train))
    except ValueError as error:
        raise InputError(str(error)) from None


# --- tensors


def _tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, by name."""
    if (folder / ONE).is_file():
        return read_header(folder / ONE)
    if not (folder / SHARDS).is_file():
        others = sorted(path.name for path in folder.glob("*.bin"))
        more = f"; {', '.join(others[:3])} may run code when it is read: convert it" if others else ""
        raise InputError(f"{folder} has neither {ONE} nor {SHARDS}{more}")
    index, found = _object(folder / SHARDS).get("weight_map"), dict[str, Tensor]()
    if not isinstance(index, dict) or not all(isinstance(file, str) for file in index.values()):
        raise InputError(f"{folder / SHARDS}: weight_map must name the file of each tensor; copy it again")
    for file in sorted(set(index.values())):
        if not re.fullmatch(r"[\w\-][\w\-.]{0,200}\.safetensors", file, re.ASCII):
            raise InputError(f"{folder / SHARDS}: {file[:80]!r} must be the name of a .safetensors file of the folder")
        for name, tensor in read_header(folder / file).items():
            if index.get(name) != file:
                raise InputError(f"{folder / SHARDS} does not say that {name!r} is in {file}; copy the folder again")
            found[name] = tensor
    if missing := sorted(set(index) - set(found)):
        raise InputError(f"{folder / SHARDS}: {_some(missing)} are not in the files that it names; copy them again")
    return found


def _matched(
    folder: Path, architecture: Architecture, model: Decoder, tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, list[Place]]]:
    """Each tensor with what it is read into. Raises InputError if anything is left over on either side."""
    places, named = architecture.places(model), dict[str, Tensor]()
    for name, tensor in tensors.items():
        new = architecture.renamed(name)
        named[new if new in places or architecture.prefix + new not in places else architecture.prefix + new] = tensor
    missing = sorted(places.keys() - named.keys())
    ignored = lambda name: any(fnmatch.fnmatchcase(name, pattern) for pattern in architecture.ignored)
    extra = sorted(name for name in named.keys() - places.keys() if not ignored(name) and name != architecture.tied)
    wrong = list[str]()
    for name in sorted(places.keys() & named.keys()):
        tensor, whole = named[name], places[name][0].whole
        if tensor.shape != whole or tensor.dtype not in DTYPES:
            wrong.append(f"{name} is {tensor.dtype}{list(tensor.shape)}, not {'/'.join(DTYPES)}{list(whole)}")
    told = [f"missing: {_some(missing)}"] * bool(missing) + [f"not known: {_some(extra)}"] * bool(extra)
    told += [f"misshapen: {_some(wrong, '; ')}"] * bool(wrong)
    if told:
        raise InputError(f"{folder} holds other tensors than its config.json says; {'; '.join(told)}")
    if (other := named.get(architecture.tied or "")) and architecture.tied not in places:
        table = next(name for name, of in places.items() if of[0].path == "embedding/table")
        if not _equal(other, named[table]):
            raise InputError(f"{folder}: {architecture.tied} is not the embedding, as config.json says that it is")
    return {name: (named[name], own) for name, own in places.items()}


def _equal(one: Tensor, other: Tensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    pairs = zip(one.rows(), other.rows(), strict=True)
    return all(np.array_equal(a.view(np.uint8), b.view(np.uint8)) for (_, a), (_, b) in pairs)


def _some(names: list[str], between: str = ", ") -> str:
    return between.join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")


def parameters(found: Found) -> Any:
    """float32 parameters, each array filled in its place."""
    shapes = jax.eval_shape(found.model.init, jax.random.key(0))
    params = jax.tree.map(lambda a: np.empty(a.shape, np.float32), shapes)
    arrays = by_path(params)
    for tensor, places in found.sources.values():
        for first, rows in tensor.rows():
            for place in places:
                _put(place, arrays[place.path], first, rows)
    return params


def _put(place: Place, array: np.ndarray, first: int, rows: np.ndarray) -> None:
    """Copies what rows of a tensor, from `first` on, hold of a parameter."""
    (i, _), into = place.row.part, place.box.letters.into
    own = array if place.layer is None else array[place.layer]
    if into and not place.row.transposed:
        ins, outs = place.shape
        own.reshape(ins, outs)[first : first + len(rows)] = rows[:, i * outs : (i + 1) * outs]
        return
    size = place.shape[0]
    flat = own.reshape(-1, size).T if into else own.reshape(size, -1)  # a view, its rows as the file has them
    start = i * size
    low, high = max(first, start), min(first + len(rows), start + size)
    flat[low - start : max(high, low) - start] = rows[low - first : max(high, low) - first]


# --- the tokenizer


def _tokenizer(folder: Path, options: Options, architecture: Architecture, model: Decoder) -> Tokenizer:
    """Of tokenizer.json, or of the files before it, with the special tokens that the folder names; without, of ids."""
    size = model.dims["V"]
    about = _object(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    if (folder / OWN_TOKENIZER).is_file():
        found = read_tokenizer(folder / OWN_TOKENIZER)
        if found.vocab_size != size:
            raise InputError(f"{folder / OWN_TOKENIZER} has {found.vocab_size} ids, and the model {size}; remove it")
        if isinstance(found, Subwords):  # a run may have trained on dialogues of another template
            found = dataclasses.replace(found, chat_template=_chat_template(folder, about))
        return found
    token = lambda name: _content(about.get(name))
    start, end = token("bos_token") or token("cls_token"), token("eos_token") or token("sep_token")
    special = dict(zip(SPECIAL, (start, end, token("pad_token"), token("mask_token")), strict=True))
    if (file := folder / "tokenizer.json").is_file():
        found = TokenizerFile(str(file), **special).fit(())
    elif (definition := _older(folder, architecture, about)) is not None:
        found = defined(definition, folder, **special)
    else:
        last = options.get("eos_token_id")
        log.warning("%s has no tokenizer.json: the run reads and writes numbers of ids", folder)
        return checked(NoTokenizer(size, last if type(last) is int and 0 <= last < size else None))
    found = checked(found)
    assert found.vocab_size is not None
    if found.vocab_size > size or (found.vocab_size < size and not isinstance(found, Subwords)):
        raise InputError(f"{folder}: its tokenizer has {found.vocab_size} ids, and the model {size}; copy it again")
    if isinstance(found, Subwords):
        found = dataclasses.replace(found, size=size, chat_template=_chat_template(folder, about))
    return found


def _ends(folder: Path, options: Options, model: Decoder) -> list[int]:
    file, size = folder / "generation_config.json", model.dims["V"]
    about = _object(file) if file.is_file() else {}
    own, found = options.get("eos_token_id"), about.get("eos_token_id")
    found = own if found is None else found
    found = found if isinstance(found, list) else [found]
    return [i for i in found if type(i) is int and 0 <= i < size]


def _older(folder: Path, architecture: Architecture, about: Mapping[str, Any]) -> str | None:
    """The definition of a tokenizer in files of before tokenizer.json; None if there is none."""
    try:
        library = architecture.older_tokenizer(folder, about)
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{folder}: the files of its tokenizer cannot be read ({error}); copy them again") from None
    if library is not None and (added := folder / "added_tokens.json").is_file():
        raise InputError(f"{added} is not read; save the tokenizer as tokenizer.json, as transformers does")
    return None if library is None else library.to_str()


def _chat_template(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Of a file of its own or of tokenizer_config.json, where it may be the one called "default" of several."""
    if (file := folder / "chat_template.jinja").is_file():
        if file.stat().st_size > JSON:
            raise InputError(f"{file} is larger than {JSON:,} bytes; remove it")
        return file.read_text(encoding="utf-8", errors="replace")
    found = about.get("chat_template")
    if isinstance(found, list):
        named = {str(each.get("name")): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) and token else None


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of a file of bounded size."""
    try:
        if path.stat().st_size > JSON:
            raise ValueError(f"it is larger than {JSON:,} bytes")
        found = parsed(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it holds no JSON object")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again") from None
    return found
