"""What a run stands on: the flags of XLA, a canary that no run starts without, memory that stays with the process, and
whether a notebook shows it."""

import ctypes
import os
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.xla_metadata import set_xla_metadata

from jaxformer.spec import InputError

MAPS = 20_000  # of compiled programs, from which on they are forgotten; Linux gives a process 65,530
MALLOPT = {-4: 0, -2: 64 << 20, -1: -1}  # of malloc.h: M_MMAP_MAX, no mmap; M_TOP_PAD; M_TRIM_THRESHOLD, no trimming


def prepare() -> None:
    """What comes before a run: flags, memory that is kept, a check of this build's sums, room for compiled programs."""
    set_flags()
    keep_memory()
    check_numerics()
    spare_memory_maps()


def set_flags() -> None:
    """Asks for what JAX reads at its first computation: programs on CPU that run inline (`call_inline`), and of XLA
    GPU kernels that give the same bits in every process.

    Without that sums are atomic and kernels chosen by a stopwatch. Whatever XLA_FLAGS says of it already stays.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_deterministic_ops" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    call_inline()


def call_inline() -> None:
    """Has programs on CPU run in the thread that calls them, if their inputs are ready and the device is one; Python's
    other threads do not wait. JAX reads it at its first computation.

    What XLA takes in a thread of its own `keep_memory` cannot keep; and several calls in flight on simulated devices
    may wait for each other for ever.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def keep_memory() -> None:
    """Asks glibc to keep what is freed. XLA on CPU takes its temporary memory anew at each call, and what has gone back
    to the system comes again as pages to be filled with zeros: a sixth to a third of a step's time, of one step per
    call (LOG.md). Other threads than the first have heaps with room for 64 MiB: their larger blocks go back.

    Whatever the environment says of malloc stays, and other C libraries are not asked.
    """
    if libc := _glibc():
        for parameter, value in MALLOPT.items():
            libc.mallopt(parameter, value)


def trim_memory() -> None:
    """Gives back what is free of the memory that is kept: what took it, compilation or an evaluation, is over."""
    if libc := _glibc():
        libc.malloc_trim(0)


def _glibc() -> Any:
    """The C library, if it is glibc, and nothing in the environment says how it is to allocate."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    told = "glibc.malloc" in tunables or any(name.startswith("MALLOC_") for name in os.environ)
    libc = ctypes.CDLL(None) if sys.platform == "linux" and not told else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None  # musl has neither


def simulate_devices(count: int) -> None:
    """Makes so many devices of the CPU, for what is to be tried without accelerators, before JAX computes anything."""
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={count}".strip()
    os.environ["JAX_PLATFORMS"] = "cpu"  # of processes that this one starts
    jax.config.update("jax_platforms", "cpu")
    call_inline()


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


def on_one_cpu() -> bool:
    """Whether programs are for a CPU, and no mesh is entered."""
    return jax.default_backend() == "cpu" and jax.sharding.get_abstract_mesh().empty


def unfused(function: Callable[..., Any], *operands: Any) -> Any:
    """What a jitted function gives. `on_one_cpu` XLA fuses it neither with what it reads nor with its readers: it is
    computed once, and does not keep them from whole vectors. Elsewhere XLA decides."""
    if not on_one_cpu():
        return function(*operands)
    with set_xla_metadata(inlineable="false"):
        return function(*operands)


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
