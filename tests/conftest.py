"""Strict JAX for all tests: ranks must match, warnings are errors, and each call checks the shapes of its signature."""

import importlib
import inspect
import os
import signal

CACHE = os.path.join(os.path.dirname(os.path.dirname(__file__)), ".jax_cache")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE)  # the commands that tests start share it
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # XLA writes a page for each program that it loads from that cache

for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(ending) is signal.SIG_IGN:  # as of a job in the background: the commands of tests would be deaf
        signal.signal(ending, signal.SIG_DFL)

import jax
import pytest
from beartype import beartype
from jax._src import compiler
from jaxtyping import jaxtyped

from jaxformer import platform

platform.set_flags()
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_default_matmul_precision", "highest")  # what CPU does anyway


def check_shapes(module):
    """Wraps every function and method whose annotations carry shapes, so that each call checks them."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    for owner in [module, *classes]:
        for name, f in list(vars(owner).items()):
            own = inspect.isfunction(f) and f.__module__ == module.__name__
            if own and any("jaxtyping" in repr(a) for a in f.__annotations__.values()):
                setattr(owner, name, jaxtyped(typechecker=beartype)(f))


# From the bottom up, so that each module imports functions that are wrapped already.
LOWER = ("masks", "layers", "residuals", "positions", "kernels")
for name in (*LOWER, "mixers", "blocks", "heads", "models", "baselines"):
    check_shapes(importlib.import_module(f"jaxformer.model.{name}"))
for name in ("learning.rows", "learning.objectives", "generation.logits_processors", "lab.measures"):
    check_shapes(importlib.import_module(f"jaxformer.{name}"))


# Most of a suite's time would go into optimising programs that run for a millisecond.
QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
try:
    jax.jit(lambda: 0).lower().compile(compiler_options=QUICK)
except jax.errors.JaxRuntimeError:  # another jaxlib, without these options
    QUICK = {}
FLAGS = os.environ["XLA_FLAGS"]  # this process has read them, the commands that tests start have not
QUICK_FLAGS = " ".join([FLAGS, *(f"--{name}={str(value).lower()}" for name, value in QUICK.items())])
optimised = compiler.get_compile_options


def quickly(*args, env_options_overrides=None, **kwargs):
    return optimised(*args, env_options_overrides={**QUICK, **(env_options_overrides or {})}, **kwargs)


@pytest.fixture(autouse=True, scope="module")
def _compiled(request):
    """Programs compile quickly; in modules marked `exact`, which compare their bits, as users have them."""
    exact = request.node.get_closest_marker("exact")
    compiler.get_compile_options, os.environ["XLA_FLAGS"] = (optimised, FLAGS) if exact else (quickly, QUICK_FLAGS)
    jax.clear_caches()  # the same program may have been compiled the other way
    yield
    compiler.get_compile_options, os.environ["XLA_FLAGS"] = optimised, FLAGS


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """Prepared corpora go to a folder of the test session, not to the user's cache."""
    monkeypatch.setenv("JAXFORMER_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _spared_memory_maps():
    """One worker runs nine tenths of the suite: more programs than a process may hold."""
    platform.spare_memory_maps()


@pytest.fixture
def data_directory():
    """The folder of published corpora."""
    path = os.environ.get("JAXFORMER_DATA")
    if not path:
        pytest.skip("JAXFORMER_DATA is unset: set it to the folder that holds tinyshakespeare.txt")
    return path
