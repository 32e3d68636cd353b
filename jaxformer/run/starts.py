"""The record of each start of a run, `starts.jsonl`: what its numbers may depend on besides its config."""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from jaxformer.config import Config
from jaxformer.data.files import parsed
from jaxformer.run.plan import implemented
from jaxformer.user_code import digests

# The files by which a step is computed, of a batch of ids.
COMPUTING = (
    *("declarations.py", "keys.py", "mesh.py", "platform.py", "data/batches.py", "data/hashes.py"),
    *("data/sources.py", "model/*.py", "learning/*.py", "run/members.py", "run/plan.py", "run/step.py"),
)
# Flags of XLA that change no numbers, or are told as devices.
NO_MATTER = "--xla_dump", "--xla_force_host_platform_device_count"
PACKAGES = ("jaxformer", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


def record_start(
    config: Config, step: int, seeds: Sequence[int], devices: Sequence[Any], peak_flops: float | None
) -> None:
    """Appends a row; `seeds` are those of the runs trained together, its own among them, `devices` those used,
    `peak_flops` what they can do together, of which `mfu` is a share."""
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "step": step,
        "command": sys.argv,
        "python": sys.version.split()[0],
        **_now(config, devices, seeds),
        "peak_flops": peak_flops,
        "idle_devices": jax.device_count() - len(devices),
        "git": _git(),
        "sources": sources(config),
    }
    path = starts_of(config.directory)
    torn = path.exists() and not path.read_bytes().endswith(b"\n")  # as a killed process or a full disk leaves it
    with open(path, "a") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def starts_of(directory: str | Path) -> Path:
    return Path(directory) / "starts.jsonl"


def read_starts(directory: str | Path) -> list[dict[str, Any]]:
    """The rows of `record_start` that can be read."""
    found: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        for line in starts_of(directory).read_text(errors="replace").split("\n"):
            with contextlib.suppress(ValueError):
                found += [row] if isinstance(row := parsed(line), dict) else []
    return found


def last_start(directory: str | Path) -> dict[str, Any]:
    """What was appended last; {} if nothing was."""
    return (read_starts(directory) or [{}])[-1]


def last_seeds(directory: str | Path) -> tuple[int, ...]:
    """The seeds of the last start, () if none can be read."""
    seeds = last_start(directory).get("seeds")
    return tuple(seeds) if isinstance(seeds, list) else ()


def last_sources(directory: str | Path) -> dict[str, str]:
    """Class or module → SHA-256 of its code at the last start, of the run's parts from outside the package."""
    return _sources(last_start(directory))


def all_sources(directory: str | Path, steps: int) -> dict[str, list[str]]:
    """The same of all starts of a run of so many steps that made one, each code once, in their order."""
    rows, found = read_starts(directory), dict[str, dict[str, None]]()
    for row, after in itertools.zip_longest(rows, rows[1:], fillvalue={"step": steps}):
        if after.get("step") != row.get("step"):
            for name, sha256 in _sources(row).items():
                found.setdefault(name, {})[sha256] = None
    return {name: list(each) for name, each in found.items()}


def _sources(row: Mapping[str, Any]) -> dict[str, str]:
    found = row.get("sources")
    return found if isinstance(found, dict) else {}


def sources(config: Config) -> dict[str, str]:
    """`digests` of what a run's numbers depend on."""
    names = digests(dataclasses.replace(config, writers=(), sampler=None)).keys()
    return {name: sha256 for name, sha256 in digests(config).items() if name in names}


def changed_sources(config: Config) -> list[str]:
    """The parts from outside the package whose code is not that of the run's last start."""
    before = last_sources(config.directory)
    return sorted(name for name, digest in sources(config).items() if before.get(name, digest) != digest)


def processor() -> str:
    """The machine's, and how many of its cores this process may use."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{found[1] if found else platform.processor()}, {cores} cores"


def features() -> list[str]:
    """The processor's vector units, on which XLA's choice of instructions, and so rounding, depends."""
    about = Path("/proc/cpuinfo")
    found = re.search(r"^(?:flags|Features)\s*: (.*)", about.read_text(), re.M) if about.exists() else None
    units = ("sse4", "avx", "fma", "f16c", "amx", "asimd", "sve", "bf16")
    return sorted(name for name in found[1].split() if name.startswith(units)) if found else []


def code(root: Path = Path(__file__).parents[1]) -> str:
    """SHA-256 of those files of the package that a step is computed by: its version may stay where they change."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in COMPUTING for path in root.glob(pattern)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


CODE = code()  # of what is loaded: in a notebook the files may be newer


def _now(config: Config, devices: Sequence[Any], seeds: Sequence[int]) -> dict[str, Any]:
    """What a start records and `moved` compares, in the order in which that tells of it."""
    return {
        "processor": processor(),
        "processor_features": features(),
        "devices": [f"{d.platform}:{d.device_kind}" for d in devices],
        "versions": {name: _version(name) for name in PACKAGES},
        "attention": implemented(config, config.model)[1],
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "code": CODE,
        "seeds": [*seeds],
    }


def _flags(told: str) -> str:
    return " ".join(sorted(flag for flag in told.split() if not flag.startswith(NO_MATTER)))


def moved(config: Config, devices: Sequence[Any], seeds: Sequence[int]) -> str | None:
    """How processor, devices, versions and flags of XLA, the package's code, the implementation of attention and the
    seeds trained together differ from those of the run's last start; None if they do not."""
    before = last_start(config.directory)
    if not before:
        return None

    def compared(row: Mapping[str, Any]) -> dict[str, Any]:
        versions, flags = row.get("versions"), row.get("XLA_FLAGS")
        return {
            **row,
            "versions": {name: versions.get(name) for name in ("jax", "jaxlib")} if versions else None,
            "XLA_FLAGS": None if flags is None else _flags(flags),
            "code": row.get("code", ""),  # it was not always recorded: other code
        }

    old, now = compared(before), compared(_now(config, devices, seeds))
    changed = [name for name, value in now.items() if old.get(name) not in (None, value)]
    names = {
        "processor_features": "the processor's features",
        "versions": "the versions of jax and jaxlib",
        "code": "the code of jaxformer",
    }
    told = [
        f"{name} {old[name]} then, {now[name]} now"
        if name in ("processor", "attention", "XLA_FLAGS", "seeds")
        else names.get(name, name)
        for name in changed
    ]
    return "; ".join(told) or None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> str | None:
    """Commit of the working directory, with -dirty behind it if files differ; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
