"""A run to a folder in Hugging Face's layout."""

import dataclasses
import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxformer.config import differences
from jaxformer.data.dialogues import conversations_of
from jaxformer.data.files import located, write
from jaxformer.data.templates import Template
from jaxformer.data.tokenizers import END_OF_TEXT, MASK, Bytes, Characters, NoTokenizer, Subwords, Tokenizer
from jaxformer.declarations import by_path
from jaxformer.interop.architecture import Architecture, Options, Place, explicit
from jaxformer.interop.families import ARCHITECTURES
from jaxformer.interop.import_folder import ONE, OWN_TOKENIZER, SHARDS
from jaxformer.interop.tensors import DTYPES, NAMES, Written, write_file
from jaxformer.model.heads import ClassificationHead
from jaxformer.model.models import Decoder, Encoder, without_effect
from jaxformer.run.opened import Run
from jaxformer.spec import InputError, dumps

log = logging.getLogger(__name__)

# How Qwen splits words, which `transformers` does with every tokenizer beside a qwen2.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def export_run(run: Run, folder: str | Path, dtype: str | None = None, shard_size: int = 5 * 10**9) -> dict[str, Any]:
    """Writes config.json, tensors, tokenizer and a model card to a new folder; says what it wrote.

    `dtype` is that of the tensors; None takes the one that the run was imported in, or float32. No file of tensors is
    larger than `shard_size` bytes, unless one tensor is. Raises InputError that names each part of the model that no
    architecture has.
    """
    place, origin = located(str(folder)), run.imported
    dtype = dtype or origin.get("dtype", "float32")
    if dtype not in NAMES:
        raise InputError(f"dtype={dtype!r} must be one of {', '.join(NAMES)}")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"folder={str(folder)!r} holds something already; give an empty or a new one")
    architecture, model = architecture_of(run)
    tensors = _tensors(architecture, model, by_path(run.eval_params))
    kind = DTYPES[NAMES[dtype]]
    options: dict[str, Any] = architecture.options(model, _like(run)) | {"dtype": dtype} | _ids(run)
    texts = _tokenizer_files(run, model)
    if options["model_type"] == "qwen2" and "tokenizer.json" in texts and not _is_qwens(run.tokenizer):
        log.warning(
            "%s: transformers.AutoTokenizer splits the text of every qwen2 as Qwen does; read this one by "
            "transformers.PreTrainedTokenizerFast",
            folder,
        )
    if (own := conversations_of(run.config.data.corpus)) and own.system is not None:
        log.warning("%s: no file has data.corpus.system=%r, with which the dialogues began", folder, own.system)
    place.mkdir(parents=True, exist_ok=True)
    sizes = _write_tensors(place, tensors, dtype, kind.itemsize, shard_size)
    for name, text in texts.items():
        write(place / name, text)
    count = sum(array.size for array in by_path(run.eval_params).values())
    write(place / "README.md", _card(run, options, count))
    write(place / "config.json", json.dumps(options, indent=2) + "\n")  # last: it makes the folder a model
    named = {"folder": str(folder), "architecture": options["architectures"][0], "dtype": dtype, "n_params": count}
    return named | {"files": len(sizes), "total_bytes": sum(sizes)}


def architecture_of(run: Run) -> tuple[Architecture, Decoder]:
    """The architecture that has all parts of the run's model, and the model as it is read back from there.

    Raises InputError that names the parts that the nearest one has not.
    """
    found, like = list[tuple[bool, int, str]](), _like(run)
    if not isinstance(run.model, Decoder) or run.model.encodes:
        raise InputError(f"{run.config.directory}: no architecture is a {type(run.model).__name__}")
    for architecture in ARCHITECTURES:
        try:
            again = _read_back(architecture, run.model, like)
        except (ValueError, KeyError):  # it is far from this one
            continue
        wrong = _missing(architecture, run.model, again)
        if not wrong:
            return architecture, again
        found.append(
            (type(again) is not type(run.model), len(wrong), f"{architecture.kinds[0]} has not {'; '.join(wrong)}")
        )
    *_, nearest = min(found, default=(False, 0, f"model.head={run.model.head!r} is of none"))
    raise InputError(f"{run.config.directory}: no architecture has all parts of its model; {nearest}")


def _missing(architecture: Architecture, model: Decoder, again: Decoder) -> list[str]:
    """What of the model is not there in what is read back."""
    if type(again) is not type(model):
        return [f"model={type(model).__name__}"]
    wrong = list[str]()
    for path, (ours, theirs) in differences(explicit(model), explicit(again)).items():
        zeros = path in architecture.optional and ours is False
        if not (without_effect(path) or zeros):
            wrong.append(f"model.{path}={ours!r}, but {theirs!r}")
    return wrong + architecture.lacks(again)


def _like(run: Run) -> str | None:
    """The kind as which it is written, where several have its parts: that of its import, or of its tokenizer."""
    return run.imported.get("model_type") or ("qwen2" if _is_qwens(run.tokenizer) else None)


def _is_qwens(tokenizer: Tokenizer) -> bool:
    """Whether text is split as Qwen's tokenizers do it."""
    return isinstance(tokenizer, Subwords) and json.dumps(QWEN)[1:-1] in tokenizer.definition


def _read_back(architecture: Architecture, model: Decoder, like: str | None) -> Decoder:
    """As the architecture would read what it would write. Raises ValueError or KeyError if it can write nothing."""
    model = explicit(model)
    names = [row.name for row in architecture.rows(model)]
    options = Options(json.loads(json.dumps(architecture.options(model, like))))
    again = architecture.model(options, names)
    if options.problems:
        raise ValueError("; ".join(options.problems))
    if isinstance(again.head, ClassificationHead) and isinstance(model.head, ClassificationHead):
        head = dataclasses.replace(again.head, column=model.head.column)  # which no file names
        again = dataclasses.replace(again, head=head)
    return again


# --- tensors


def _tensors(architecture: Architecture, model: Decoder, arrays: Mapping[str, Any]) -> dict[str, Written]:
    found = dict[str, Written]()
    for name, places in architecture.places(model).items():
        name = name.removeprefix(architecture.prefix) if architecture.bare(model) else name
        found[name] = Written(places[0].whole, lambda places=places: assembled(places, arrays))
    return found


def assembled(places: list[Place], arrays: Mapping[str, Any]) -> np.ndarray:
    """A tensor of the parts that it has; zeros of a bias that the run's model has not."""

    def one(place: Place) -> np.ndarray:
        if place.path not in arrays:
            return np.zeros(place.shape, np.float32)
        own = np.asarray(arrays[place.path])
        own = own if place.layer is None else own[place.layer]
        if place.box.letters.into and place.row.transposed:
            return own.reshape(place.shape[::-1]).T
        return own.reshape(place.shape)

    return np.concatenate([one(place) for place in places], places[0].axis)


def _write_tensors(
    folder: Path, tensors: Mapping[str, Written], dtype: str, itemsize: int, shard_size: int
) -> list[int]:
    """The sizes of the files."""
    shards, sizes = list[dict[str, Written]](), list[int]()
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * itemsize
        if not shards or sizes[-1] + size > shard_size:
            shards.append({})
            sizes.append(0)
        shards[-1][name] = tensor
        sizes[-1] += size
    files = (
        [ONE] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard, dtype)
    if len(shards) > 1:
        where = {name: file for file, shard in zip(files, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes)}, "weight_map": where}
        write(folder / SHARDS, json.dumps(index, indent=2) + "\n")
    return sizes


# --- the tokenizer


def _ids(run: Run) -> dict[str, Any]:
    """What ends a text: the end, what ends an answer, and what the folder named that it was imported from."""
    tokenizer, template = run.tokenizer, _template(run)
    (padding,) = tokenizer.special["padding"] or (None,)
    ends = [] if tokenizer.end is None else [tokenizer.end]
    ends += [*(template.ends.ids if template else ()), *run.ends]
    found = list(dict.fromkeys(ends)) or [None]
    end = found[0] if len(found) == 1 else found
    return {"bos_token_id": tokenizer.start, "eos_token_id": end, "pad_token_id": padding}


def _template(run: Run) -> Template | None:
    """What writes the dialogues that it was trained on."""
    own = conversations_of(run.config.data.corpus)
    return Template.of(run.tokenizer, own.template) if own else None


def _tokenizer_files(run: Run, model: Decoder) -> dict[str, str]:
    """In both forms: the library's, which `transformers` reads, and that of a run, from which it is read back."""
    tokenizer, template = run.tokenizer, _template(run)
    own = {OWN_TOKENIZER: dumps(tokenizer)}
    if isinstance(tokenizer, NoTokenizer):
        return own
    if isinstance(tokenizer, Subwords):
        definition = tokenizer.definition
        tokens = {
            "bos_token": tokenizer.start_token,
            "eos_token": tokenizer.end_token,
            "pad_token": tokenizer.padding_token,
            "mask_token": tokenizer.mask_token,
            "unk_token": json.loads(definition)["model"].get("unk_token"),
        }
    else:
        definition, tokens = _definition(tokenizer)
    if isinstance(model, Encoder):
        definition = _framed(definition, tokenizer)
        end = tokens["eos_token"]
        tokens |= {"cls_token": end and tokens["bos_token"], "sep_token": end}
        tokens |= {"pad_token": tokens.get("pad_token") or end}  # with which rows are filled without one
    named = {name: token for name, token in tokens.items() if token is not None}
    parts = ["token_type_ids"] * bool(model.embedding.token_types)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model.context_length}
    about |= {"model_input_names": ["input_ids", *parts, "attention_mask"]}
    about |= {"clean_up_tokenization_spaces": False, **named}
    source = template.source if template else tokenizer.chat_template
    about |= {} if source is None else {"chat_template": source}
    config = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
    return own | {"tokenizer.json": definition, "tokenizer_config.json": config}


def _framed(definition: str, tokenizer: Tokenizer) -> str:
    """With the special tokens around a text, or around two, that `Tokenizer.document` puts there."""
    import tokenizers as lib

    library: Any = lib.Tokenizer.from_str(definition)
    end = () if tokenizer.end is None else (tokenizer.end,)
    before, after = ([library.id_to_token(i) for i in ids] for ids in (tokenizer.prefix, end))
    single = [*(f"{token}:0" for token in before), "$A:0", *(f"{token}:0" for token in after)]
    pair = [*single, "$B:1", *(f"{token}:1" for token in after)]
    special = [(token, library.token_to_id(token)) for token in {*before, *after}]
    processors: Any = lib.processors
    library.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return library.to_str()


def _definition(tokenizer: Tokenizer) -> tuple[str, dict[str, str | None]]:
    """Bytes or characters as the library `tokenizers` has them, with the same ids; and the names of special ones."""
    import tokenizers as lib

    special = tokenizer.special
    names = dict.fromkeys(special["end"], END_OF_TEXT) | dict.fromkeys(special["mask"], MASK)
    names |= {i: f"<extra_id_{number}>" for number, i in enumerate(special["sentinels"])}
    parts: Any = lib  # whose stubs know less than it has
    if isinstance(tokenizer, Bytes):
        table = _byte_characters()
        found = lib.Tokenizer(parts.models.BPE({table[i]: i for i in range(256)}, []))
        found.pre_tokenizer = parts.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        found.decoder = parts.decoders.ByteLevel()
    elif isinstance(tokenizer, Characters):
        unknown = "<unk>" if tokenizer.unknown_token else None
        ids = {c: i for i, c in enumerate(tokenizer.alphabet or "")} | {token: i for i, token in names.items()}
        ids |= {} if unknown is None else {unknown: special["others"][0]}
        found = lib.Tokenizer(parts.models.WordLevel(ids, **({} if unknown is None else {"unk_token": unknown})))
        found.pre_tokenizer = parts.pre_tokenizers.Split(lib.Regex(r"[\s\S]"), "isolated")
        found.decoder = parts.decoders.Fuse()
    else:
        raise InputError(f"the tokenizer {type(tokenizer).__name__} has no form that transformers reads")
    found.add_special_tokens([names[i] for i in sorted(names)])
    assert all(found.token_to_id(token) == i for i, token in names.items())
    end = END_OF_TEXT if special["end"] else None
    tokens = {"bos_token": end, "eos_token": end, "mask_token": MASK if special["mask"] else None}
    return found.to_str(), tokens | {"unk_token": "<unk>" if special.get("others") else None}


def _byte_characters() -> list[str]:
    """The character by which GPT-2 writes each byte: itself where it is printable, else one from U+0100 on."""
    own = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = iter(range(256, 512))
    return [chr(i) if i in own else chr(next(others)) for i in range(256)]


# --- the model card


def _card(run: Run, options: Mapping[str, Any], count: int) -> str:
    config, step = run.config, int(run.state.step)
    trained = f"trained for {step:,} steps on `{type(config.data.corpus).__name__}`" if step else "not trained further"
    name, auto = options["architectures"][0], "AutoModel" if options["architectures"] == ["BertModel"] else None
    return f"""---
library_name: transformers
tags: [jaxformer]
---

# {Path(config.directory).name}

{count:,} parameters, {options["model_type"]}, context of {config.model.context_length:,} tokens; exported from a run of
jaxformer, {trained}. Objective: `{type(config.objective).__name__}`.

```python
import transformers

model = transformers.{auto or name}.from_pretrained("PATH OF THIS FOLDER")
```

What it was trained on, its limits and its license are not recorded here: add them before you publish it.
"""
