"""Files: found, downloaded, hashed, and read as bytes, lines or text whatever their size."""

import codecs
import contextlib
import errno
import gzip
import hashlib
import http.client
import json
import logging
import os
import re
import shutil
import tempfile
import urllib.request
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from jaxformer.spec import InputError

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """$JAXFORMER_CACHE, or `jaxformer` in the user's cache."""
    own = os.environ.get("JAXFORMER_CACHE")
    return located(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxformer"


def write(path: Path, text: str) -> None:
    """All of the text or, if the process or the machine dies, what was there before."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:  # as of a full disk
        part.unlink(missing_ok=True)
        raise


def parsed(text: str | bytes) -> Any:
    """What JSON says. Raises ValueError if it is none, or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError(str(error)) from None


def read_json(path: Path) -> Any:
    """What a file of JSON says. Raises InputError if it cannot be read."""
    try:
        return parsed(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); restore the file, or give another") from None


def sync(path: Path) -> None:
    """What a file holds, or which files a folder has, outlasts a power cut from here on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of a file system that cannot, for folders
            raise
    finally:
        os.close(descriptor)


def remove_parts(directory: Path) -> None:
    """Removes what killed processes left of files that they wrote; nobody may be writing to the folder."""
    for path in directory.glob("*.*.part"):
        if path.suffixes[-2][1:].isdecimal():
            path.unlink(missing_ok=True)


def fetch(name: str, url: str, sha256: str) -> Path:
    """The path of a file in $JAXFORMER_DATA or the cache, downloaded into the cache if it is in neither.

    Raises InputError if it is not to be had, or is not the file that it should be.
    """
    shared = os.environ.get("JAXFORMER_DATA")
    cached = cache_directory() / name
    for path in ([located(shared) / name] if shared else []) + [cached]:
        if path.is_file():
            if (found := file_sha256(path)) != sha256:
                raise InputError(f"{path} has SHA-256 {found}, not {sha256}; remove it, or put the right file there")
            return path
    log.info("downloading %s to %s", url, cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
        part = Path(directory) / name
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                shutil.copyfileobj(response, file)
            if (found := file_sha256(part)) != sha256:
                raise ValueError(f"it came with SHA-256 {found}, not {sha256}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{name} could not be downloaded from {url} ({reason}); put it at {cached}") from None
        os.replace(part, cached)
    return cached


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; of a large one it is kept in the cache, and used until size or time of change differ."""
    try:
        status = path.stat()
        kept = cache_directory() / "sha256" / hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino} "
        large = status.st_size >= 1 << 26
        with contextlib.suppress(OSError):  # one that cannot be read is none
            line = kept.read_text(errors="replace") if large else ""
            if line.startswith(state) and len(line) == len(state) + 64:
                return line.removeprefix(state)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None
    if large:
        kept.parent.mkdir(parents=True, exist_ok=True)
        write(kept, state + found)
    return found


def expanded(path: str) -> str:
    """The path, with ~ for the user's home and $NAME for an environment variable."""
    return os.path.expandvars(os.path.expanduser(path))


def located(path: str) -> Path:
    return Path(expanded(path))


def visible_files(root: Path, skip: Collection[str] = ()) -> tuple[list[Path], list[Path], list[Path]]:
    """The visible files of a folder and its subfolders, in the order of their paths; its hidden files; and the folders
    that were not looked into, which are hidden or have a name in `skip`. Behind a link, what was read already is not
    read again.

    Raises InputError for a folder that cannot be read.
    """
    visible, hidden, skipped, seen = list[Path](), list[Path](), list[Path](), set[Path]()
    left = lambda path: path.name.startswith(".") or path.name in skip

    def refuse(error: OSError) -> None:
        raise _unreadable(Path(error.filename), error)

    waiting = [root]
    while waiting:  # the folder itself, then what its links lead to
        top = waiting.pop(0)
        if top != root and left(top.resolve()):
            skipped.append(top)
            continue
        for folder, folders, names in os.walk(top, onerror=refuse):
            inside, folders[:] = sorted(Path(folder, name) for name in folders), []
            if (real := Path(folder).resolve()) in seen:
                continue
            seen.add(real)
            skipped += filter(left, inside)
            waiting += [path for path in inside if path.is_symlink() and not left(path)]
            folders += [path.name for path in inside if not path.is_symlink() and not left(path)]
            for path in filter(Path.is_file, map(Path(folder).joinpath, names)):
                (hidden if path.name.startswith(".") else visible).append(path)
    return sorted(visible), sorted(hidden), sorted(skipped)


def once(files: Iterable[Path]) -> list[Path]:
    """Each file under one of its names, in their order: with a suffix rather than without, its own rather than that of
    a link to it."""
    names = sorted(files, key=lambda path: (not path.suffix, path.is_symlink(), path))
    return sorted({path.resolve(): path for path in reversed(names)}.values())


def is_binary(path: Path) -> bool:
    """Whether the first 8,000 bytes are no UTF-8 and hold a zero byte. UTF-16 is text, though not read."""
    head = next(_chunks(path), b"")[:8000]
    if b"\0" not in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return False
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return False


def plain_name(path: Path) -> str:
    """The name without the ending of a compression."""
    return re.sub(r"\.(gz|zst)$", "", path.name, flags=re.IGNORECASE)


def _chunks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, decompressed if its name says so."""
    try:
        if path.suffix.lower() == ".zst":
            yield from _decompressed(path)
            return
        with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(path, error) from None


def _decompressed(path: Path) -> Iterator[bytes]:
    """Zstandard, frame by frame; a file that breaks off is an error, which the library's own reader passes over."""
    import zstandard

    frame = lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
    with open(path, "rb") as file:
        reader, begun = frame(), False
        while data := file.read(1 << 18):
            while data:
                if reader.eof:
                    reader = frame()
                try:
                    yield reader.decompress(data)
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from None
                data, begun = reader.unused_data, True
        if begun and not reader.eof:
            raise EOFError("it breaks off")


def lines(path: Path) -> Iterator[bytes]:
    begun: list[bytes] = []  # of a line that continues in the next chunk
    for chunk in _chunks(path):
        first, *others = chunk.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    if any(begun):
        yield b"".join(begun)


def decoded(path: Path) -> Iterator[str]:
    decoder, read = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in _chunks(path):
        skipped = 3 if not read and chunk.startswith(codecs.BOM_UTF8) else 0
        pending = len(decoder.getstate()[0])
        try:
            yield decoder.decode(chunk[skipped:])
        except UnicodeDecodeError as error:
            raise _not_utf8(path, read + skipped - pending, error) from None
        read += len(chunk)
    pending = len(decoder.getstate()[0])
    try:
        decoder.decode(b"", True)
    except UnicodeDecodeError as error:
        raise _not_utf8(path, read - pending, error) from None


def _not_utf8(path: Path, offset: int, error: UnicodeDecodeError) -> InputError:
    byte = error.object[error.start]
    return InputError(
        f"{path} is not UTF-8 (byte {offset + error.start} is 0x{byte:02x}); convert it, or leave it out, as by "
        "data.corpus.suffixes=.txt,.md for a folder"
    )


def of_machine(error: Exception) -> bool:
    """Whether memory, a device, open files or the disk failed, and not what is read: it may be whole all the same."""
    if isinstance(error, InputError) and isinstance(error.__context__, OSError):  # a file that cannot be read
        error = error.__context__
    if isinstance(error, OSError):
        return not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)  # of XLA, of TensorStore


def _unreadable(path: Path, error: Exception) -> InputError:
    reason = getattr(error, "strerror", None) or error
    return InputError(f"{path} cannot be read: {reason}; check the file and its permissions")
