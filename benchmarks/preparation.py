"""How fast a large text is tokenised, in how much memory, and whether a killed preparation ends with the same files.

    python benchmarks/preparation.py FILE [VOCABULARY]

Two preparations of FILE by BPE, each in a cache of its own: one whole, one killed three times. Prints seconds for
learning the vocabulary and for encoding, MB/s per core, the peak of resident memory, and the hashes of both.
"""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peers.timing import held


def prepare(path: str, vocabulary: str) -> None:
    from jaxformer.data.corpora import TextFiles
    from jaxformer.data.datasets import fitted
    from jaxformer.data.datasets import prepare as prepare_all
    from jaxformer.data.tokenizers import BPE

    corpus = TextFiles(path)
    corpus.fingerprint()
    started = time.perf_counter()
    tokenizer = fitted(BPE(int(vocabulary)), corpus)
    learned = time.perf_counter()
    prepare_all(corpus, tokenizer)
    row = {
        "learning_seconds": learned - started,
        "encoding_seconds": time.perf_counter() - learned,
        "peak_bytes": held(),
    }
    print(json.dumps(row))


def run(cache: str, arguments: list[str], seconds: float | None = None) -> str | None:
    """What a preparation prints; None if it was killed after so many seconds."""
    command = [sys.executable, __file__, "--child", *arguments]
    process = subprocess.Popen(command, env=os.environ | {"JAXFORMER_CACHE": cache}, stdout=subprocess.PIPE, text=True)
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return None


def hashes(cache: str) -> dict[str, str]:
    found = sorted(Path(cache).glob("tokens/*/*.bin"))
    return {path.name: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest() for path in found}


def main(path: str, vocabulary: str = "50257") -> None:
    with tempfile.TemporaryDirectory() as whole, tempfile.TemporaryDirectory() as killed:
        row = json.loads(run(whole, [path, vocabulary]) or "")
        size, cores = os.path.getsize(path), os.cpu_count() or 1
        speed = size / 1e6 / row["encoding_seconds"]
        print(f"{size:,} bytes, {cores} cores, BPE({vocabulary}): learned in {row['learning_seconds']:.0f} s")
        print(f"encoded in {row['encoding_seconds']:.0f} s: {speed:.1f} MB/s, {speed / cores:.1f} MB/s per core")
        print(f"peak of resident memory {row['peak_bytes'] / 1e9:.2f} GB")
        encoding = row["encoding_seconds"]  # the vocabulary is kept after the first time
        windows = row["learning_seconds"] + 0.3 * encoding, 0.25 * encoding, 0.2 * encoding
        kills = sum(run(killed, [path, vocabulary], seconds) is None for seconds in windows)
        run(killed, [path, vocabulary])
        same = "the same files" if hashes(whole) == hashes(killed) else "OTHER FILES"
        print(f"killed {kills} times, it ends with {same}")
        for name, digest in hashes(whole).items():
            print(f"{name} {digest}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        prepare(*sys.argv[2:])
    else:
        main(*sys.argv[1:])
