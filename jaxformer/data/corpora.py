"""Corpora: where text comes from, as a sequence of documents."""

import hashlib
import http.client
import logging
import os
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from jaxformer.spec import InputError, Spec

log = logging.getLogger(__name__)


def cache_directory() -> Path:
    """$JAXFORMER_CACHE, or `jaxformer` in the user's cache."""
    own = os.environ.get("JAXFORMER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxformer"


class Corpus(Spec):
    """Text. A subclass yields its documents, in the same order every time."""

    def documents(self) -> Iterator[str]:
        """Raises InputError for text that is missing or cannot be read."""
        yield from ()

    def fingerprint(self) -> str:
        """SHA-256 of the documents and their boundaries."""
        digest = hashlib.sha256()
        for document in self.documents():
            data = document.encode()
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()


class PythonTopics(Corpus):
    """Python's own help texts, about 0.46 MB, in every CPython. They differ between Python's versions."""

    def documents(self) -> Iterator[str]:
        from pydoc_data.topics import topics

        yield "\n\n".join(topics[name] for name in sorted(topics))


class TextFiles(Corpus):
    """A UTF-8 file, or all files of a folder and its subfolders in the order of their paths; hidden ones left out."""

    path: str

    def documents(self) -> Iterator[str]:
        root = Path(os.path.expanduser(self.path))
        if not self.path or not root.exists():
            raise InputError(f"corpus {self.path!r} does not exist; give the path of a text file or folder")
        for path in [root] if root.is_file() else _visible_files(root):
            yield _read(path)


class TinyShakespeare(Corpus):
    """The 1,115,394 characters of tinyshakespeare.txt, in $JAXFORMER_DATA or the cache, else downloaded once."""

    def documents(self) -> Iterator[str]:
        yield _read(fetch("tinyshakespeare.txt", TINYSHAKESPEARE_URL, TINYSHAKESPEARE_SHA256))


TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINYSHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def fetch(name: str, url: str, sha256: str) -> Path:
    """The path of a file in $JAXFORMER_DATA or the cache, downloaded into the cache if it is in neither.

    Raises InputError if it is not to be had, or is not the file that it should be.
    """
    shared = os.environ.get("JAXFORMER_DATA")
    cached = cache_directory() / name
    for path in ([Path(shared) / name] if shared else []) + [cached]:
        if path.is_file():
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != sha256:
                raise InputError(f"{path} has SHA-256 {found}, not {sha256}; remove it, or put the right file there")
            return path
    log.info("downloading %s to %s", url, cached)
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cached.parent) as directory:
        part = Path(directory) / name
        try:
            with urllib.request.urlopen(url, timeout=30) as response, open(part, "wb") as file:
                shutil.copyfileobj(response, file)
            found = hashlib.sha256(part.read_bytes()).hexdigest()
            if found != sha256:
                raise ValueError(f"it came with SHA-256 {found}, not {sha256}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise InputError(f"{name} could not be downloaded from {url} ({reason}); put it at {cached}") from None
        os.replace(part, cached)
    return cached


def _visible_files(root: Path) -> list[Path]:
    paths = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    return sorted(p for p in paths if p.is_file())


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x}); "
            "convert it, or leave it out of the corpus"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; check the file and its permissions") from None
