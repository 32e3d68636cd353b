"""jaxformer beside its peers: training steps, decoding, compilation, memory, saves, each as a share of what the machine
can do.

    pip install -e ".[peers]" && python benchmarks/compare.py [NAME...] [--rounds=N] [--json=FILE] [--markdown=FILE]

Without a NAME it measures all that CPUs are measured by; `step small` whatever is called both, `--list` shows names
and minutes. Each measurement is a process of its own; contestants take turns (A B C A B C), so that what else the
machine does falls on all of them. The first round compiles, later ones find what it has compiled. --markdown writes
the block of this processor or GPU into a file such as BENCHMARKS.md, in place of the one that it has; given NAMEs, the
tables of these, each with when and how it was measured.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from peers.sizes import SIZES, Size, Texts, Work, tiny, work_of_step, work_of_token
from peers.timing import held

HERE = Path(__file__).parent
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclasses.dataclass(frozen=True)
class Contestant:
    name: str
    peer: str  # a module of peers/
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of its function
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What is measured of whom. The first contestant is the one that the others are compared with."""

    name: str
    what: str  # the function of peers' modules: "step", "decode", "checkpoint"
    size: Size
    contestants: tuple[Contestant, ...]
    minutes: float  # about how long it takes, on 2 cores
    rounds: int = 3
    texts: Texts | None = None  # of decoding

    @property
    def tokens(self) -> int:
        """How many come of what the seconds are measured of."""
        return self.size.batch * self.size.tokens if self.texts is None else self.texts.batch

    def work(self, dtype: str) -> Work | None:
        if self.what == "checkpoint":
            return None
        return work_of_step(self.size) if self.texts is None else work_of_token(self.size, self.texts, dtype)


@dataclasses.dataclass
class Row:
    """What was found of a contestant, round by round."""

    name: str
    dtype: str
    found: list[dict[str, float]] = dataclasses.field(default_factory=list)
    failed: str | None = None  # what it says of it

    @property
    def seconds(self) -> list[float]:
        return [each["seconds"] for each in self.found]


BF16 = {"dtype": "bfloat16"}
ADAPTIVE = {"XLA_FLAGS": "--xla_gpu_deterministic_ops=false"}
ALL_APART = {"model.unroll": "12", "model.kernel.implementation": "CuDNN"}  # `Auto` does not take cuDNN so
KEPT = {  # glibc keeps what is freed, as jaxformer asks it to by `mallopt`; PyTorch, no faster by it, goes without
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
}
TORCH = Contestant("PyTorch, compiled", "pytorch"), Contestant("PyTorch, compiled, bf16", "pytorch", BF16)
TRANSFORMERS = Contestant("transformers, compiled", "huggingface")
FLAX = Contestant("Flax, as its examples", "flax_linen", environment=KEPT)
GENERATE = (
    Contestant("transformers, generate", "huggingface"),
    Contestant("transformers, static cache, compiled", "huggingface", {"static": True}),
)
HALF_GENERATE = tuple(  # faster where weights are read from memory; of a small model slower
    dataclasses.replace(each, name=f"{each.name}, bf16", arguments={**each.arguments, **BF16}) for each in GENERATE
)
DECODERS = Contestant("jaxformer", "ours"), Contestant("bare JAX", "bare_jax", environment=KEPT), *GENERATE
SAVERS = Contestant("jaxformer", "ours"), Contestant("Orbax, async", "bare_jax"), Contestant("torch.save", "pytorch")


def steps(*, several: int) -> tuple[Contestant, ...]:
    """Those of a training step; of JAX with so many steps per call, and with one."""

    def both(name: str, peer: str, given: Mapping[str, str]) -> list[Contestant]:
        counts = dict.fromkeys((several, 1))
        told = lambda n: f"{name}, {n} step{'s' * (n > 1)} per call"
        return [Contestant(told(n), peer, {"steps_per_call": n}, given) for n in counts]

    half = Contestant("jaxformer, bf16", "ours", {"steps_per_call": several, **BF16})
    products = {"steps_per_call": several, "products": True, **BF16}
    halves = Contestant("jaxformer, bf16 products", "ours", products)
    ours, bare = both("jaxformer", "ours", {}), both("bare JAX", "bare_jax", KEPT)
    return *ours, half, halves, *bare, FLAX, *TORCH, TRANSFORMERS


def decoding(size: str, name: str, minutes: float, *, new: int, batch: int, **more: Any) -> Measurement:
    texts, rounds = (
        Texts(batch, 64 if more.get("ragged") else 16, new, **more),
        1 if batch > 1 and "124M" in size else 2,
    )
    decoders = (*DECODERS, *(HALF_GENERATE if "124M" in size else ()))
    return Measurement(f"decode {name}", "decode", SIZES[size], decoders, minutes, rounds, texts)


def on_gpu(overrides: Sequence[str]) -> list[Measurement]:
    """What one GPU is measured by; jaxformer also with each of the overrides, such as `model.kernel=MyKernel`."""
    own = {"steps_per_call": 5, **BF16}
    with_one = [
        Contestant(f"jaxformer, {each}", "ours", own | {"overrides": dict([each.split("=", 1)])}) for each in overrides
    ]
    steps = (
        Contestant("jaxformer", "ours", own),
        Contestant("PyTorch, compiled", "pytorch", BF16 | {"padded": 64}),
        Contestant("jaxformer, not deterministic", "ours", own, ADAPTIVE),
        Contestant("jaxformer, layers laid out", "ours", own | {"overrides": ALL_APART}),
        *with_one,
    )
    decoders = tuple(
        dataclasses.replace(each, arguments={**each.arguments, **BF16}) for each in (DECODERS[0], *GENERATE)
    )
    size = SIZES["124M, 1024"]
    return [
        Measurement("gpu step 124M", "step", size, steps, 4, 1),
        *(
            Measurement(f"gpu decode 124M {batch}", "decode", size, decoders, 1.5, 1, Texts(batch, 16, 128))
            for batch in (1, 32)
        ),
    ]


MEASUREMENTS = [
    Measurement("step small", "step", SIZES["small"], steps(several=10), 6),
    Measurement("step 10.7M", "step", SIZES["10.7M"], steps(several=10), 9),
    Measurement("step 124M", "step", SIZES["124M"], steps(several=1), 6, rounds=1),
    Measurement("step encoder", "step", SIZES["encoder"], (*steps(several=10)[:4], FLAX, *TORCH, TRANSFORMERS), 5),
    decoding("small, 256", "small 1", 2, new=192, batch=1),
    decoding("small, 256", "small 32", 2, new=192, batch=32),
    decoding("small, 256", "small 32 ragged", 2, new=192, batch=32, ragged=True),
    decoding("124M, 1024", "124M 1", 5, new=32, batch=1),
    decoding("124M, 1024", "124M 32", 4, new=32, batch=32),
    decoding("124M, 1024", "124M 32 ragged", 4, new=32, batch=32, ragged=True),
    Measurement("checkpoint 10.7M", "checkpoint", SIZES["10.7M"], SAVERS, 1),
]


# --- one process per contestant and round


def child(argument: str) -> None:
    """Prints what a function of a peer finds, and the most memory that it held."""
    given = json.loads(argument)
    arguments = given["arguments"]
    for name, kind in (("size", Size), ("texts", Texts)):
        if arguments.get(name) is not None:
            arguments[name] = kind(**arguments[name])
    found = getattr(import_module(f"peers.{given['peer']}"), given["what"])(**arguments)
    print(json.dumps({**found, "memory": memory()}))


def memory() -> int:
    """The most bytes held at once: on the GPU, if there is one, or else by the process."""
    jax, torch = sys.modules.get("jax"), sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if jax is not None and jax.default_backend() != "cpu":
        return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
    return held()


class Failed(Exception):
    """A contestant did not finish."""


def run(peer: str, what: str, arguments: Mapping[str, Any], environment: Mapping[str, str], limit: float) -> Any:
    """What a fresh process finds. Raises Failed."""
    given = json.dumps({"peer": peer, "what": what, "arguments": arguments}, default=dataclasses.asdict)
    paths = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])  # measures this checkout
    known = {"OMP_NUM_THREADS": str(CORES), "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONPATH": paths}
    command = [sys.executable, __file__, "--child", given]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env={**os.environ, **known, **environment}, timeout=limit
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {limit:.0f} s") from None
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode or not lines:
        raise Failed(lines[-1][:200] if lines else f"exit status {done.returncode}")
    return json.loads(lines[-1])


@dataclasses.dataclass
class Clock:
    """How long processes may take."""

    seconds: float = 3.0  # that a contestant measures for
    limit: float = 600.0  # of one process
    end: float = float("inf")  # of all, in time.monotonic()

    @property
    def left(self) -> float:
        left = min(self.limit, self.end - time.monotonic())
        if left <= 0:
            raise Failed("there was no time left")
        return left


def measured(
    measurement: Measurement, rounds: int, clock: Clock, kept: Path | None = None, emulated: Sequence[str] = ()
) -> list[Row]:
    """Each contestant in turn, round by round; what they compile is `kept` in a folder, if one is given."""
    rows = [Row(each.name, each.arguments.get("dtype", "float32")) for each in measurement.contestants]
    for each, row in zip(measurement.contestants, rows, strict=True):
        if row.dtype == "bfloat16" and each.peer in emulated:
            row.failed = "products of bfloat16 are emulated here, at less than a tenth of float32's speed; not run"
    with contextlib.nullcontext(str(kept)) if kept else tempfile.TemporaryDirectory() as compiled:
        caches = {"JAX_COMPILATION_CACHE_DIR": compiled, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        given = {"size": measurement.size, "seconds": clock.seconds}
        given |= {"texts": measurement.texts} if measurement.texts else {}
        for turn in range(rounds):
            for i, (each, row) in enumerate(zip(measurement.contestants, rows, strict=True)):
                caches["TORCHINDUCTOR_CACHE_DIR"] = f"{compiled}/inductor{i}"
                if row.failed is None:
                    print(f"{measurement.name}, round {turn + 1}: {each.name}", file=sys.stderr)
                    arguments, environment = {**given, **each.arguments}, {**caches, **each.environment}
                    try:
                        row.found.append(run(each.peer, measurement.what, arguments, environment, clock.left))
                    except Failed as error:
                        row.failed = str(error)
    return rows


def limits(clock: Clock, sides: int, room: int) -> dict[str, Any]:
    """What the machine can do, the best that is found by any of two libraries; of `sides` and `room` see there."""
    found: dict[str, Any] = {"float32": 0.0, "bfloat16": 0.0, "bytes": 0.0, "versions": {}, "load": os.getloadavg()[0]}
    found["emulated"] = []  # by whom products of bfloat16 are: so much slower that nobody would take them
    for library in ("limits", "pytorch"):
        arguments = {"seconds": min(clock.seconds, 0.3), "sides": sides, "room": room}
        try:
            own = run(library, "limits", arguments, {}, clock.left)
        except Failed as error:
            print(f"the limits, by {library}.py: {error}", file=sys.stderr)
            continue
        found |= {name: own[name] for name in ("device", "datasheet") if name in own}
        found["versions"] |= own["versions"]
        if own["bfloat16"] < own["float32"] / 10:
            found["emulated"].append(library)
        found |= {name: max(found[name], own[name]) for name in ("float32", "bfloat16", "bytes")}
    return found


# --- what is told of it


def told(measurement: Measurement, rows: Sequence[Row], limits: Mapping[str, Any]) -> dict[str, Any]:
    """Rows as they are printed and stored."""
    return {
        "name": measurement.name,
        "size": dataclasses.asdict(measurement.size),
        "texts": measurement.texts and dataclasses.asdict(measurement.texts),
        "params": measurement.size.params,
        "rows": [_told(measurement, row, rows[0], limits) for row in rows],
    }


def _told(measurement: Measurement, row: Row, first: Row, limits: Mapping[str, Any]) -> dict[str, Any]:
    if not row.found:
        return {"name": row.name, "failed": row.failed}
    seconds, work = statistics.median(row.seconds), measurement.work(row.dtype)
    found: dict[str, Any] = {"name": row.name, "seconds": row.seconds, "failed": row.failed}
    found |= {"compile": row.found[0].get("compile"), "memory": max(each["memory"] for each in row.found)}
    found["ratios"] = [b / a for a, b in zip(first.seconds, row.seconds, strict=False)]
    if work is not None:
        found["tokens_per_second"] = [measurement.tokens / each for each in row.seconds]
        found["flops_per_second"] = work.flops / seconds
        if limits[row.dtype] and limits["bytes"]:
            found["of_limit"] = max(work.flops / limits[row.dtype], work.bytes / limits["bytes"]) / seconds
        if measurement.what == "step" and (peak := limits.get("datasheet", {}).get(row.dtype)):
            found["mfu"] = work.flops / seconds / peak
    return found


Column = tuple[str, Callable[[Mapping[str, Any]], str]]


def spread(values: Sequence[float], form: Callable[[float], str]) -> str:
    """The median and, in brackets, the least and the most."""
    ends = f" ({form(min(values))} to {form(max(values))})" if len(values) > 1 else ""
    return form(statistics.median(values)) + ends


def _columns(found: Mapping[str, Any]) -> list[Column]:
    rows = [row for row in found["rows"] if "seconds" in row]
    first = found["rows"][0]["name"]
    columns: list[Column] = [("", lambda row: row["name"])]
    if any("tokens_per_second" in row for row in rows):
        columns += [("tokens/s", lambda row: spread(row["tokens_per_second"], "{:,.0f}".format))]
    else:
        columns += [("ms", lambda row: spread([1000 * each for each in row["seconds"]], "{:,.0f}".format))]
    if rows and rows[0]["name"] == first:  # it has not failed
        columns += [(f"{first.split(',')[0]} is", lambda row: spread(row["ratios"], "{:.2f}".format) + " ×")]
    if any("of_limit" in row for row in rows):
        columns += [("of the limit", lambda row: f"{row['of_limit']:.0%}")]
    if any("mfu" in row for row in rows):
        columns += [("MFU", lambda row: f"{row['mfu']:.1%}")]
    if any("flops_per_second" in row for row in rows):
        columns += [("compiles in", lambda row: f"{row['compile']:.1f} s")]
    return [*columns, ("memory", lambda row: f"{row['memory'] / 1e6:,.0f} MB")]


def table(found: Mapping[str, Any]) -> str:
    """A measurement as a table of Markdown, and what has failed below it."""
    failed = [f"\n{row['name']} failed: {row['failed']}" for row in found["rows"] if row["failed"]]
    return "\n".join([grid(_columns(found), [row for row in found["rows"] if "seconds" in row]), *failed])


def grid(columns: Sequence[Column], rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of Markdown."""
    cells = [[make(row) for _, make in columns] for row in rows]
    titles = [title for title, _ in columns]
    widths = [max(3, *(len(line[i]) for line in [titles, *cells])) for i in range(len(columns))]
    lines = [titles, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |" for line in lines
    )


def title(found: Mapping[str, Any]) -> str:
    size, texts = Size(**found["size"]), found["texts"] and Texts(**found["texts"])
    shape = f"{size.layers} layers, {size.heads} heads, {size.width} wide, vocabulary {size.vocabulary:,}"
    if texts is not None:
        lengths = f"1 to {texts.prompt}" if texts.ragged else str(texts.prompt)
        rows = "1 text" if texts.batch == 1 else f"{texts.batch} texts"
        shape += f", context {size.context}; {rows}, {texts.new} tokens behind prompts of {lengths}, top-k 20"
    elif not found["name"].startswith("checkpoint"):
        shape += f"; {size.batch} rows of {size.tokens} tokens"
    return f"{found['name']}: {shape}; {found['params'] / 1e6:,.1f}M parameters"


def heading(limits: Mapping[str, Any], seconds: float) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in limits["versions"].items())
    float32, bfloat16 = (f"{limits[name] / 1e9:,.0f}" for name in ("float32", "bfloat16"))
    peaks = f"{float32} GFLOP/s in float32 and {bfloat16} in bfloat16 of products of matrices"
    measured = f"{peaks}, {limits['bytes'] / 1e9:,.1f} GB/s"
    when = f"{time.strftime('%Y-%m-%d')}, {seconds / 60:.0f} minutes"
    busy = f"; {limits['load']:.1f} other processes ran when it began" if limits["load"] > 0.5 else ""
    return f"{when}{busy}; {versions}. The limits as measured: {measured}."


def block(limits: Mapping[str, Any], found: Sequence[Mapping[str, Any]], seconds: float) -> str:
    """What BENCHMARKS.md says of a processor."""
    parts = [f"## {limits.get('device', 'unknown device')}", heading(limits, seconds)]
    for each in found:
        parts += [f"**{title(each)}**", table(each)]
    return "\n\n".join(parts) + "\n"


def placed(page: str, block: str) -> str:
    """The page with the block in place of the one with the same heading, or at its end."""
    found = _old(page, block)
    if found is None:
        return f"{page.rstrip()}\n\n{block}"
    return (page[: found.start()] + block + "\n" + page[found.end() :]).rstrip("\n") + "\n"


def added(page: str, block: str) -> str:
    """The page with the block's tables in place of those of the same names, or behind the others; each tells how it was
    measured."""
    found = _old(page, block)
    if found is None:
        return placed(page, block)
    cut = lambda text: re.split(r"^(?=\*\*)", text.rstrip("\n") + "\n\n", flags=re.MULTILINE)
    name = lambda table: table[2:].partition(":")[0]
    (head, *old), (how, *new) = cut(found[0]), cut(block)
    how = how.partition("\n\n")[2]
    tables = {name(table): table for table in old}
    tables |= {name(table): table.replace("\n\n", f"\n\n{how}", 1) for table in new}
    return placed(page, "".join([head, *tables.values()]).rstrip("\n") + "\n")


def _old(page: str, block: str) -> re.Match[str] | None:
    """The block of the page with the same heading."""
    head = block.partition("\n")[0]
    return re.search(rf"^{re.escape(head)}\n.*?(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)


def selected(names: Sequence[str], overrides: Sequence[str] = ()) -> list[Measurement]:
    """Those whose name has all of these words; without any, all but a GPU's."""
    of_gpu = on_gpu(overrides)
    known = {word for each in (*MEASUREMENTS, *of_gpu) for word in each.name.split()}
    if unknown := set(names) - known:
        sys.exit(f"{' '.join(sorted(unknown))}: no measurement is called so; --list shows those that there are")
    within = of_gpu if "gpu" in names else MEASUREMENTS
    found = [each for each in within if set(names) <= set(each.name.split())]
    return found or sys.exit(
        f"{' '.join(names)}: no measurement is called all of it; --list shows those that there are"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a word of the names of what is measured")
    parser.add_argument("--rounds", type=int, help="instead of each measurement's own number")
    parser.add_argument("--json", type=Path, help="a file for all that is found")
    parser.add_argument("--markdown", type=Path, help="a page whose block of this processor is replaced")
    parser.add_argument(
        "--also", action="append", default=[], metavar="FIELD=VALUE", help="on a GPU: jaxformer so, too"
    )
    parser.add_argument("--within", type=float, default=float("inf"), metavar="SECONDS", help="what is left then fails")
    parser.add_argument("--seconds", type=float, default=3.0, help="that each contestant measures for at least")
    parser.add_argument("--compiled", type=Path, metavar="FOLDER", help="keeps what is compiled, for the next call")
    parser.add_argument("--quick", action="store_true", help="next to nothing, to see that it runs")
    parser.add_argument("--list", action="store_true", help="names, and about how many minutes each takes on 2 cores")
    given = parser.parse_args()
    if wrong := [each for each in given.also if "=" not in each or "gpu" not in given.names]:
        parser.error(f"--also={wrong[0]} must be FIELD=VALUE, beside the name gpu")
    chosen, started = selected(given.names, given.also), time.monotonic()
    if given.list:
        return print("\n".join(f"{each.name:20} {each.minutes:4g}" for each in chosen))
    clock = Clock(given.seconds, end=started + given.within)
    if os.getloadavg()[0] > 0.5:
        print("other processes run: PyTorch's threads wait for one another, and lose most by it", file=sys.stderr)
    if given.quick:
        clock.seconds = 0.01
        os.environ["TORCH_COMPILE_DISABLE"] = "1"
        few = lambda texts: texts and dataclasses.replace(texts, batch=min(texts.batch, 3), prompt=8, new=8)
        chosen = [dataclasses.replace(each, size=tiny(each.size), texts=few(each.texts), rounds=1) for each in chosen]
    else:
        minutes = sum(each.minutes * (given.rounds or each.rounds) / each.rounds for each in chosen)
        print(f"about {minutes:.0f} minutes on 2 cores", file=sys.stderr)
    peaks = limits(clock, *((1, 1 << 20) if given.quick else (4, 1 << 28) if "gpu" in given.names else (3, 1 << 26)))
    found: list[dict[str, Any]] = []
    for each in chosen:
        found.append(
            told(each, measured(each, given.rounds or each.rounds, clock, given.compiled, peaks["emulated"]), peaks)
        )
        seconds = time.monotonic() - started
        print(f"\n{title(found[-1])}\n\n{table(found[-1])}", flush=True)
        if given.json:
            given.json.write_text(json.dumps({"limits": peaks, "seconds": seconds, "measurements": found}, indent=1))
    print(f"\n{peaks.get('device')}; {heading(peaks, time.monotonic() - started)}")
    if given.markdown:
        page = given.markdown.read_text() if given.markdown.exists() else "# Benchmarks\n"
        put = added if set(given.names) - {"gpu"} else placed
        given.markdown.write_text(put(page, block(peaks, found, time.monotonic() - started)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2])
    else:
        main()
