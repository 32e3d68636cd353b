"""Files of the format safetensors: a length, a JSON header, and arrays one behind the other. Nothing in them is run.

Read and written in pieces, so that memory holds no file; a library that maps one into memory counts it all.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jaxformer.spec import InputError

DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # as a command or a config.json calls them
SIZES = {  # bytes of a number, in whatever stands beside parameters, too
    **{name: kind.itemsize for name, kind in DTYPES.items()},
    **{"F64": 8, "I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1},
}
HEADER = 1 << 24  # bytes of a header at most; one tensor takes about a hundred
PIECE = 1 << 22  # numbers that are read at once


class Tensor(NamedTuple):
    """An array in a file."""

    file: Path
    dtype: str  # as the file names it
    shape: tuple[int, ...]
    start: int  # byte at which it begins

    def rows(self) -> Iterator[tuple[int, NDArray[Any]]]:
        """Pieces of the array as [rows, numbers in a row], each with the number of its first row."""
        width, dtype = math.prod(self.shape[1:]), DTYPES[self.dtype]
        many = max(1, PIECE // max(width, 1))
        with open(self.file, "rb") as file:
            file.seek(self.start)
            for first in range(0, self.shape[0], many):
                count = min(many, self.shape[0] - first)
                piece = np.empty((count, width), dtype)
                if file.readinto(piece.reshape(-1).view(np.uint8).data) < piece.nbytes:
                    raise InputError(f"{self.file} ends within a tensor; copy it again")
                yield first, piece


class Written(NamedTuple):
    """An array to be written."""

    shape: tuple[int, ...]
    made: Callable[[], NDArray[np.float32]]


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name. Raises InputError for a file that does not hold what its header says."""
    try:
        with open(path, "rb") as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8 or not 2 <= length <= min(HEADER, size - 8):
                raise ValueError(f"its header cannot have {length:,} bytes")
            text = file.read(length)
        found = json.loads(text, object_pairs_hook=_once)
        if not isinstance(found, dict):
            raise ValueError("its header is no JSON object")
        found.pop("__metadata__", None)
        tensors = {name: _tensor(path, name, value, 8 + length) for name, value in found.items()}
        _check_places(tensors, 8 + length, size)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is no whole safetensors file ({error}); copy or convert it again") from None
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("its header names a thing twice")
    return found


def _tensor(path: Path, name: str, value: Any, data: int) -> Tensor:
    about = value if isinstance(value, dict) else {}
    dtype, shape, offsets = about.get("dtype"), about.get("shape"), about.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in SIZES:
        raise ValueError(f"{name!r} has the dtype {str(dtype)[:20]!r}, known here are {', '.join(SIZES)}")
    if not (_counts(shape) and _counts(offsets) and len(offsets) == 2 and len(shape) <= 8):
        raise ValueError(f"{name!r} has no shape and offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * SIZES[dtype]:
        raise ValueError(f"{name!r} has other bytes than {dtype}{shape} takes")
    return Tensor(path, dtype, tuple(shape), data + offsets[0])


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_places(tensors: Mapping[str, Tensor], start: int, size: int) -> None:
    """Raises ValueError unless tensors follow one another without gaps up to the end of the file."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, math.prod(item[1].shape))):
        if tensor.start != start:
            raise ValueError(f"{name!r} does not begin where the tensor before it ends")
        start += math.prod(tensor.shape) * SIZES[tensor.dtype]
    if start != size:
        raise ValueError(f"its tensors end at byte {start:,} of {size:,}")


def write_file(path: Path, tensors: Mapping[str, Written], dtype: str) -> None:
    """Writes arrays, each made when its turn comes, in a dtype such as "bfloat16"."""
    kind, at = DTYPES[NAMES[dtype]], 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses the file
    for name, tensor in tensors.items():
        end = at + math.prod(tensor.shape) * kind.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that arrays are aligned
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(np.ascontiguousarray(tensor.made().astype(kind)).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
