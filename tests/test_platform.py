import json
import os
import platform as system
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxformer
from jaxformer import platform
from jaxformer.commands import main
from jaxformer.spec import InputError

pytestmark = pytest.mark.exact


def test_this_machine_computes_right_sums():
    platform.check_numerics()


@pytest.mark.parametrize("wrong", ["sum", "eye"])
def test_a_build_that_does_not_is_refused_with_a_remedy(monkeypatch, wrong):
    class Wrong:
        def __getattr__(self, name):
            right = getattr(jnp, name)
            return (lambda *a: right(*a) * 1.001) if name == wrong else right

    monkeypatch.setattr(platform, "jnp", Wrong())
    with pytest.raises(InputError, match=r"jaxlib .* computes wrong sums on cpu; install .* or start a new process"):
        platform.check_numerics()


def test_flags_are_appended_to_those_that_are_set(monkeypatch):
    for before, after in {
        "": "--xla_gpu_deterministic_ops=true",
        "--xla_cpu_enable_fast_math=false": "--xla_cpu_enable_fast_math=false --xla_gpu_deterministic_ops=true",
        "--xla_gpu_deterministic_ops=false": "--xla_gpu_deterministic_ops=false",
    }.items():
        monkeypatch.setenv("XLA_FLAGS", before)
        platform.set_flags()
        platform.set_flags()
        assert os.environ["XLA_FLAGS"] == after


@pytest.mark.parametrize(
    "begin",
    [
        lambda path: main.run("train", [path]),
        lambda path: jaxformer.train(path),
        lambda path: jaxformer.train_seeds(path, (0,)),
        lambda path: jaxformer.build(path),
    ],
    ids=["command", "train", "train_seeds", "build"],
)
def test_flags_are_set_before_the_users_code_runs(tmp_path, monkeypatch, capsys, begin):
    """It may compute something, from when on XLA reads no flags."""
    config = tmp_path / "config.py"
    config.write_text("import os\nraise ValueError(os.environ.get('XLA_FLAGS'))\n")
    monkeypatch.delenv("XLA_FLAGS")
    try:
        begin(str(config))
        found = capsys.readouterr().err
    except InputError as error:
        found = str(error)
    assert "ValueError: --xla_gpu_deterministic_ops=true" in found


PAGES = """
import resource, statistics, threading
import jax, numpy as np
from jaxformer.platform import prepare
pages = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def calls(take):
    print(statistics.median(-pages() + (take(), pages())[1] for _ in range(11)))
prepare()
thread = threading.Thread(target=calls, args=[lambda: np.ones(10_000_000, np.float32)])
thread.start()
thread.join()
squares = lambda a: jax.lax.optimization_barrier(jax.numpy.outer(a, a)).sum()
program = jax.jit(squares).lower(np.ones(5_000, np.float32)).compile()
assert program.memory_analysis().temp_size_in_bytes >= 100_000_000
calls(lambda: float(program(np.ones(5_000, np.float32))))
"""


OURS = system.libc_ver()[0] == "glibc" and [int(n) for n in system.libc_ver()[1].split(".")[:2]] >= [2, 35]


@pytest.mark.skipif(not OURS, reason="other C libraries are left as they are; older ones of glibc were not tried")
@pytest.mark.parametrize(
    ("environment", "stays"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.rtld.nns=4"}, True),
    ],
)
def test_freed_memory_stays_with_the_process(environment, stays):
    """40 MB that a thread takes and frees, and 100 of a program: the system fills their 10,000 and 24,000 pages once,
    unless the environment says otherwise."""
    own = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))} | {
        "NUMPY_MADVISE_HUGEPAGE": "0"
    }
    done = subprocess.run([sys.executable, "-c", PAGES], env=own | environment, capture_output=True, text=True)
    assert [float(pages) < 5_000 for pages in done.stdout.split()] == [stays] * 2, done


def test_what_is_unfused_is_computed_by_itself():
    x = jnp.linspace(0, 1, 1009)
    power = jax.jit(jnp.exp)
    by_itself, within = (
        jax.jit(lambda x, run=run: jnp.sin(run(power, 2 * x)) + 1).lower(x).compile()
        for run in (platform.unfused, lambda function, *operands: function(*operands))
    )
    assert " call(" in by_itself.as_text() and " call(" not in within.as_text()
    np.testing.assert_allclose(by_itself(x), within(x), rtol=1e-6)


STEPS = """
import json, resource, sys
from jaxformer import train
from jaxformer.run.members import Members
call, compile, found = Members.call, Members.compile, []
def compiling(self, state, buffer):
    compile(self, state, buffer)
    (program,) = self._compiled.values()
    found.append(program.memory_analysis().temp_size_in_bytes // resource.getpagesize())
def counting(self, state, buffer, count):
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[1])
    found.append((resource.getrusage(resource.RUSAGE_SELF).ru_minflt, held))
    return call(self, state, buffer, count)
Members.call, Members.compile = counting, compiling
with open(sys.argv[1]) as file:
    train("quickstart", json.load(file))
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.skipif(not OURS, reason="other C libraries are left as they are; older ones of glibc were not tried")
def test_a_runs_memory_stays_between_its_pauses(tmp_path):
    """An update's temporary memory, which saves, evaluations and samples give back for their own."""
    often = {"eval_every": 8, "save_every": 8, "steps_per_call": 1, "steps": 24}
    knobs = {"directory": str(tmp_path / "run"), "data.batch_size": 64, "optimizer.learning_rate.warmup_steps": 1}
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps(knobs | {f"train.{name}": value for name, value in often.items()}))
    own = {n: v for n, v in os.environ.items() if not n.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", STEPS, str(asked)]
    done = subprocess.run(command, env=own | {"JAXFORMER_CACHE": str(tmp_path)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    temporary, *found = json.loads(done.stdout.splitlines()[-1])  # in pages; a call is found when it begins
    filled, held = np.array(found).T
    assert temporary > 25_000
    for first in (0, 8, 16):
        assert np.median(np.diff(filled[first : first + 8])) < temporary / 10, filled
    for first in (8, 16):
        assert held[first - 1] - held[first] > temporary / 2, held


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (10**9, 1)])
def test_programs_are_forgotten_where_memory_maps_run_out(monkeypatch, limit, kept):
    program = jax.jit(lambda x: x + 1)
    assert program(1) == 2 and program._cache_size() == 1
    monkeypatch.setattr(platform, "MAPS", limit)
    platform.prepare()
    assert program._cache_size() == kept
    assert program(1) == 2
