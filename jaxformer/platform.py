"""What a run stands on: the flags of XLA, a canary that no run starts without, memory that stays with the process, and
whether a notebook shows it."""

import contextlib
import ctypes
import os
import sys
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

from jaxformer.spec import InputError

MAPS = 20_000  # of compiled programs, from which on they are forgotten; Linux gives a process 65,530
KEPT = 64 << 20  # bytes of the largest freed block that stays: threads' heaps of glibc have no room for larger ones
MALLOPT = {-3: KEPT, -2: KEPT, -1: 4 * KEPT}  # M_MMAP_THRESHOLD, M_TOP_PAD, M_TRIM_THRESHOLD of malloc.h


def prepare() -> None:
    """What comes before a run: flags, memory that is kept, a check of this build's sums, room for compiled programs."""
    set_flags()
    keep_memory()
    check_numerics()
    spare_memory_maps()


def set_flags() -> None:
    """Asks XLA for GPU kernels that give the same bits in every process. XLA reads it at the first computation.

    Without it sums are atomic and kernels chosen by a stopwatch. Whatever XLA_FLAGS says of it already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()


def keep_memory() -> None:
    """Asks glibc to keep what is freed. XLA on CPU takes its temporary memory anew at each call, and what has gone back
    to the system comes again as pages to be filled with zeros: a third of a small step's time, of one step per call.

    Whatever the environment says of malloc stays; other C libraries are not asked, and glibc before 2.35 refuses the
    first number, since its threads' heaps are smaller.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    if sys.platform == "linux" and not told:
        with contextlib.suppress(AttributeError):  # musl has no such function
            mallopt = ctypes.CDLL(None).mallopt
            all(mallopt(parameter, value) for parameter, value in MALLOPT.items())  # up to one that is refused


def simulate_devices(count: int) -> None:
    """Makes so many devices of the CPU, for what is to be tried without accelerators, before JAX computes anything.

    Calls wait for their results: several in flight on simulated devices may wait for each other for ever.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    for name, value in {"jax_platforms": "cpu", "jax_cpu_enable_async_dispatch": False}.items():
        os.environ[name.upper()] = str(value).lower()  # of processes that this one starts
        jax.config.update(name, value)


def check_numerics() -> None:
    """Raises InputError if this build of XLA sums wrongly; takes a tenth of a second.

    jaxlib 0.10.2 and 0.11 do, on CPU (jax#39103, jax#39741), in a way that changes from call to call.
    """
    column = jnp.ones((1024, 1))
    total = jax.jit(lambda a: jnp.sum(jnp.broadcast_to(a, (2, 1024, 1024))))
    rows = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769.0))
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))
    if all(float(total(column)) == 2 * 1024 * 1024 for _ in range(10)) and float(squares(rows)[-1]) == 2.0**30:
        return
    raise InputError(
        f"jaxlib {metadata.version('jaxlib')} computes wrong sums on {jax.default_backend()}; "
        "install a release that does not (pip install 'jax!=0.10.2,!=0.11.*'), or start a new process with "
        "XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce"
    )


def spare_memory_maps() -> None:
    """Forgets compiled programs if they hold more than MAPS memory maps; those in use compile again.

    The programs of a run hold about a thousand; past Linux's limit XLA dies of a segmentation fault.
    """
    try:
        with open("/proc/self/maps") as file:
            many = sum(1 for _ in file) > MAPS
    except OSError:  # not Linux
        return
    if many:
        jax.clear_caches()


def host() -> Any:
    """The device that is the host's own memory; None where JAX_PLATFORMS leaves out cpu."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        return None


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook, which shows figures, and lines though it has no terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    return hasattr(shell, "kernel")
