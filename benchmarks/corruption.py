"""What does `jaxformer import` make of damaged folders? Copies of a whole one, each damaged in another way.

    python benchmarks/corruption.py --count 1000

Prints how many were refused in a sentence, taken though they were damaged (in what no number depends on, or in numbers
that may be anything), and met by any other exception, and how far memory rose; exit status 1 if any was met so, if code
that lay in a folder was run, or if memory rose by more than 200 MB.
"""

import argparse
import json
import logging
import pickle
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers.timing import held

from jaxformer.interop.import_folder import parameters, read_folder
from jaxformer.spec import InputError

WHOLE = Path(__file__).parent.parent / "tests" / "fixtures" / "interop"
KINDS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "bert")
MEGABYTES = 200
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64, 10**30, -1, 0, 1.5, True, None, "7", [], {})
NAMES = ("../model.safetensors", "/etc/passwd", "a/../../b.safetensors", "..\\b.safetensors", "\0.safetensors", "", ".")
Damage = Callable[[Path, np.random.Generator], None]


class Payload:
    """What leaves a mark when it is unpickled."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (self.mark, "w")


def _header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _write(path: Path, header: Any, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + body)


def _any_tensor(folder: Path, rng: np.random.Generator) -> tuple[Path, dict[str, Any], bytes, dict[str, Any]]:
    path = folder / "model.safetensors"
    header, body = _header(path)
    names = sorted(header.keys() - {"__metadata__"})
    return path, header, body, header[names[int(rng.integers(len(names)))]]


def truncated(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data) if rng.integers(2) else 3000))])


def flipped(folder: Path, rng: np.random.Generator) -> None:
    path = folder / str(rng.choice(["model.safetensors", "config.json"]))
    data = bytearray(path.read_bytes())
    for _ in range(int(rng.integers(1, 9))):
        data[int(rng.integers(min(len(data), 3000)))] = int(rng.integers(256))
    path.write_bytes(bytes(data))


def long_header(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "model.safetensors"
    header, body = _header(path)
    _write(path, header, body, int(rng.choice([0, 1, 2**20, 2**31, 2**40, 2**63 - 1])))


def other_dtype(folder: Path, rng: np.random.Generator) -> None:
    path, header, body, tensor = _any_tensor(folder, rng)
    tensor["dtype"] = [*HUGE, "F16", "BF16", "F64", "I32", "I8", "F8_E4M3", "PICKLE"][int(rng.integers(len(HUGE) + 7))]
    _write(path, header, body)


def huge_shape(folder: Path, rng: np.random.Generator) -> None:
    path, header, body, tensor = _any_tensor(folder, rng)
    value = HUGE[int(rng.integers(len(HUGE)))]
    tensor["shape"] = [value] * int(rng.integers(1, 60)) if rng.integers(2) else value
    _write(path, header, body)


def overlapping(folder: Path, rng: np.random.Generator) -> None:
    path, header, body, tensor = _any_tensor(folder, rng)
    start, end = tensor["data_offsets"]
    by = int(rng.integers(-64, 64))
    tensor["data_offsets"] = [start + by, end + by] if rng.integers(2) else [HUGE[int(rng.integers(len(HUGE)))], end]
    _write(path, header, body)


def other_names(folder: Path, rng: np.random.Generator) -> None:
    path, header, body, tensor = _any_tensor(folder, rng)
    name = next(name for name, value in header.items() if value is tensor)
    others = (name + "x", "model.layers.99999999.mlp.up_proj.weight", "\ud800", "x" * 100_000, "", name.upper())
    header[others[int(rng.integers(len(others)))]] = header.pop(name)
    _write(path, header, body)


def no_json(folder: Path, rng: np.random.Generator) -> None:
    text = [b"[" * 100_000, b"{}", b"[]", b"null", b"{" + b'"a":' * 3, b"\xff\xfe", b"9" * 5000, b'{"a": NaN}']
    chosen = text[int(rng.integers(len(text)))]
    if rng.integers(2):
        (folder / str(rng.choice(["config.json", "tokenizer_config.json", "tokenizer.json"]))).write_bytes(chosen)
    else:
        _write(folder / "model.safetensors", chosen, b"\0" * int(rng.integers(100)))


def other_options(folder: Path, rng: np.random.Generator) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for _ in range(int(rng.integers(1, 4))):
        name = sorted(config)[int(rng.integers(len(config)))]
        config[name] = HUGE[int(rng.integers(len(HUGE)))]
    path.write_text(json.dumps(config))


def shards(folder: Path, rng: np.random.Generator) -> None:
    """In two files; then in one whose name leads elsewhere, or that is not there, or of other tensors."""
    path = folder / "model.safetensors"
    header, _ = _header(path)
    names = sorted(header.keys() - {"__metadata__"})
    path.rename(folder / "model-00001-of-00001.safetensors")
    index: dict[str, Any] = dict.fromkeys(names, "model-00001-of-00001.safetensors")
    name = names[int(rng.integers(len(names)))]
    others = (*NAMES, *HUGE, "model-00002-of-00002.safetensors", "x" * 5000 + ".safetensors")
    index[name] = others[int(rng.integers(len(others)))]
    where: Any = index if rng.integers(4) else HUGE[int(rng.integers(len(HUGE)))]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def pickled(folder: Path, rng: np.random.Generator) -> None:
    data = pickle.dumps(Payload(str(folder.parent / "mark")))
    for name in ("pytorch_model.bin", "model.safetensors", "tokenizer.json")[: int(rng.integers(1, 4))]:
        (folder / name).write_bytes(data)
    if rng.integers(2):
        (folder / "model.safetensors").unlink(missing_ok=True)


def no_file(folder: Path, rng: np.random.Generator) -> None:
    path = folder / str(rng.choice(["config.json", "model.safetensors"]))
    path.unlink()
    if rng.integers(2):
        path.mkdir()


DAMAGES: tuple[Damage, ...] = (
    *(truncated, flipped, long_header, other_dtype, huge_shape, overlapping, other_names, no_json, other_options),
    *(shards, pickled, no_file),
)


def met(seed: int, home: Path) -> tuple[str, str]:
    """How one damaged folder is met: ("refused" | "taken" | "raised", the sentence)."""
    rng, damage = np.random.default_rng(seed), DAMAGES[seed % len(DAMAGES)]
    folder = home / "folder"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(WHOLE / KINDS[int(rng.integers(len(KINDS)))], folder)
    damage(folder, rng)
    try:
        parameters(read_folder(folder))
    except InputError as error:
        return "refused", str(error)
    except Exception:
        return "raised", traceback.format_exc()
    return "taken", damage.__name__


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("jaxformer").setLevel(logging.ERROR)
    found, taken, ran = Counter[str](), Counter[str](), False
    with tempfile.TemporaryDirectory() as name:
        for kind in KINDS:  # what whole ones take
            parameters(read_folder(WHOLE / kind))
        before = held()
        for seed in range(args.seed, args.seed + args.count):
            how, why = met(seed, Path(name))
            found[how] += 1
            taken[why] += how == "taken"
            if how == "raised":
                print(f"--seed {seed}: {why}", file=sys.stderr)
        ran = (Path(name) / "mark").exists()
    rose = (held() - before) / 2**20
    print(json.dumps({**found, "taken_by_damage": +taken, "code_run": ran, "memory_rose_mb": round(rose)}))
    sys.exit(bool(found["raised"] or ran or rose > MEGABYTES))


if __name__ == "__main__":
    main()
