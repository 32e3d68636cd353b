"""Compiled programs, kept for the next command: JAX's persistent cache, in the folder of prepared corpora."""

import hashlib
import logging
import os
from typing import Any

import jax
from filelock import FileLock

from jaxformer.data.files import cache_directory
from jaxformer.run.starts import features, processor

log = logging.getLogger(__name__)

KNOBS = {  # of jax.config; the environment's come first
    "jax_persistent_cache_min_compile_time_secs": 0.2,  # a step takes seconds to compile, a small program 0.05
    "jax_compilation_cache_max_size": 1 << 29,  # bytes; what was not used for longest goes
    "jax_persistent_cache_enable_xla_caches": "none",  # these have no bound
}


def keep_programs() -> None:
    """Programs of this process that took long to compile are loaded from the cache, and left there.

    Does nothing where the user has set JAX_COMPILATION_CACHE_DIR or turned the cache off. JAX's key has the program,
    the version of jaxlib and XLA_FLAGS, but not the processor, for whose vector units and cores XLA compiles: each kind
    has a folder. A cache that cannot be written is a warning.
    """
    config: Any = jax.config  # whose attributes are made as JAX is imported
    if config.jax_compilation_cache_dir or not config.jax_enable_compilation_cache:
        return
    kind = " ".join((processor(), *features(), os.environ.get("NPROC", "")))  # XLA's threads, where it is set
    try:
        folder = cache_directory() / "programs" / hashlib.sha256(kind.encode()).hexdigest()[:16]
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lockfile", timeout=10):  # as JAX does
            for path in folder.glob("*-cache"):
                if not path.with_name(path.name.removesuffix("cache") + "atime").exists():
                    path.unlink()  # half a program: what wrote it was killed before it came to the second file
    except (OSError, RuntimeError) as error:  # no home is a RuntimeError
        log.warning("compiled programs are not kept for the next command, which compiles anew: %s", error)
        return
    for name, value in {"jax_compilation_cache_dir": str(folder), **KNOBS}.items():
        if name.upper() not in os.environ:
            config.update(name, value)
