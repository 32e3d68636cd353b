"""What is promised where something is wrong, tried at random: damaged checkpoints, interruptions, wrong input.

    python benchmarks/faults.py flips [--count 500]       a flipped bit in the newest of two checkpoints
    python benchmarks/faults.py files                     its files cut, emptied, zeroed, deleted, swapped
    python benchmarks/faults.py resume [--count 30]       so many steps, interrupted after each one and resumed
    python benchmarks/faults.py configs [--count 10000]   fields, values and command lines, most of them wrong
    python benchmarks/faults.py texts [--count 10000]     texts of any characters through the tokenizers

Each prints one line; with exit status 1, and the first cases on stderr, if a promise is broken.
"""

import argparse
import collections
import contextlib
import io
import itertools
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jaxformer
from jaxformer import Config, Data, Decoder, Train, config
from jaxformer.commands import main as commands
from jaxformer.data.batches import ShuffledWindows
from jaxformer.data.corpora import TextFiles
from jaxformer.data.tokenizers import BPE, Bytes, Characters
from jaxformer.learning.optimizers import AdamW
from jaxformer.model.masks import Causal
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter
from jaxformer.run.manifest import has_manifest, sha256
from jaxformer.spec import InputError, fields, from_json, known_specs, to_json

Found = tuple[str, list[str]]  # the line, and the cases in which a promise was broken
BROKEN = ("silently wrong", "tracebacks", "refused beside a whole one", "fell back without a word")
OUTCOMES = (*BROKEN, "refused", "fell back", "without effect")


def tiny(folder: Path) -> Config:
    text = folder / "text.txt"
    text.write_text("".join(f"{i} plus {i} is {2 * i}\n" for i in range(40)))
    return Config(
        str(folder / "run"),
        Decoder(n_layers=1, n_heads=2, d_model=16, context_length=8, dropout=0.1),
        Data(TextFiles(str(text)), sampling=ShuffledWindows(), batch_size=4),
        train=Train(steps=20, save_every=10, eval_every=20, keep=2, steps_per_call=5, sample_tokens=0),
    )


# --- damaged checkpoints


def opened(run: Path, saved: dict[int, str], older_too: bool) -> str:
    """What comes of opening a run whose checkpoint of step 20 is damaged, and perhaps the older one, too."""
    finished = has_manifest(run / "checkpoints" / "20")  # without a manifest it is as if it had never been
    with warnings_of("jaxformer") as told:
        try:
            state = jaxformer.open_run(run).state
        except InputError:
            return "refused" if older_too else "refused beside a whole one"
        except Exception:  # whatever it is, the user gets a traceback
            return "tracebacks"
    if saved.get(step := int(state.step)) != sha256(state):
        return "silently wrong"
    return "without effect" if step == 20 else "fell back" if told or not finished else "fell back without a word"


def damaged(folder: Path, cases: Callable[[Path, list[Path]], Iterable[tuple[str, Any, bool]]], what: str) -> Found:
    """Trains a run with checkpoints of steps 10 and 20 (once), damages copies of it and opens them. The cases are made
    of the run and the newest one's files: what it is, what it does to a copy, whether to the older checkpoint, too."""
    run, counts, broken = folder / "run", collections.Counter[str](), list[str]()
    jaxformer.train(tiny(folder))
    saved = {step: sha256(jaxformer.open_run(run, step).state) for step in (10, 20)}
    files = [path.relative_to(run) for path in sorted(run.glob("checkpoints/20/**/*")) if path.is_file()]
    for case, damage, older_too in cases(run, files):
        shutil.rmtree(folder / "copy", ignore_errors=True)
        damage(Path(shutil.copytree(run, folder / "copy")))
        counts[found := opened(folder / "copy", saved, older_too)] += 1
        broken += [f"{found}: {case}"] if found in BROKEN else []
    return f"{counts.total()} {what}: {', '.join(f'{counts[name]} {name}' for name in OUTCOMES)}", broken


def flips(folder: Path, count: int = 500, seed: int = 0) -> Found:
    """One bit of all those of the newest checkpoint."""
    rng = random.Random(seed)

    def flip(path: Path, bit: int) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    def cases(run: Path, files: list[Path]) -> Iterator[tuple[str, Any, bool]]:
        sizes = [(run / path).stat().st_size for path in files]
        for i in rng.choices(range(len(sizes)), sizes, k=count):
            path, bit = files[i], rng.randrange(8 * sizes[i])
            yield f"bit {bit} of {path}", lambda copy, path=path, bit=bit: flip(copy / path, bit), False

    return damaged(folder, cases, "flips")


def files(folder: Path, count: int | None = None, seed: int = 0) -> Found:
    """Each file of the newest checkpoint in each way, or some of these; to swap damages the older one, too."""
    ways: dict[str, Callable[[Path], Any]] = {
        "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "emptied": lambda path: path.write_bytes(b""),
        "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "deleted": lambda path: path.unlink(),
    }

    def swap(path: Path, other: Path) -> None:
        path.rename(between := path.with_name("between"))
        other.rename(path)
        between.rename(other)

    def cases(run: Path, files: list[Path]) -> list[tuple[str, Any, bool]]:
        each: list[tuple[str, Any, bool]] = []
        for path, (name, way) in itertools.product(files, ways.items()):
            each.append((f"{path} {name}", lambda copy, path=path, way=way: way(copy / path), False))
        for path in files:
            same = run / "checkpoints" / "10" / path.relative_to("checkpoints/20")
            others = [same] if same.exists() else sorted(same.parent.iterdir())  # what holds arrays has a random name
            for other in (found.relative_to(run) for found in others):
                how = lambda copy, path=path, other=other: swap(copy / path, copy / other)
                each.append((f"{path} swapped with {other}", how, True))
        return each if count is None else random.Random(seed).sample(each, min(count, len(each)))

    return damaged(folder, cases, "damaged files")


# --- interruptions


def resume(folder: Path, count: int = 30, seed: int = 0) -> Found:
    """Saves after every step of a straight run; then all is built anew and restored after each, and trains to the end:
    every state on the way is that of the straight run."""
    spec = config.resolve(tiny(folder), {"train.steps": count, "train.seed": seed})

    def trained(first: int, state: Any = None, save: Callable[[Any, int], None] = lambda *_: None) -> list[str]:
        begin, step, batch_at = jaxformer.build(spec)
        state = begin if state is None else state
        digests = [sha256(state)]
        for i in range(first, count):
            state, _ = step(state, batch_at(i))
            digests.append(sha256(state))
            save(state, i + 1)
        return digests

    with contextlib.closing(CheckpointWriter(folder / "steps", count)) as writer:
        straight = trained(0, save=writer.save)
    of = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
    abstract, saved = jax.tree.map(of, jaxformer.build(spec)[0]), Checkpoints(folder / "steps")
    wrong = [n for n in range(1, count + 1) if trained(n, saved.restore(abstract, n)) != straight[n:]]
    epochs = count * spec.data.batch_size * spec.window / (0.9 * (folder / "text.txt").stat().st_size)
    line = f"{count} steps, {epochs:.1f} epochs, interrupted after each step: {len(wrong)} with other bits"
    return line, [f"resumed after step {n}" for n in wrong]


# --- wrong input

NUMBERS = "0 -1 3 1e3 1e400 -inf nan 0x10 1_0 ٣ ² 1e-9 ½ none None true TRUE null [] {} , ,,1 1,2,x ' \" `x` -- % %s"
NAMES = "{x} $HOME ~ ../.. . : x: :y = * math:pi math:no ..:x no_module:X Decoder Causal,X Ünïcödé 🦊 \ud800 é"
STRANGE = ["", " ", "a b", "\n", "\t\0", "\u202eabc", "9" * 30, "9" * 5000, "a" * 300]
WORDS = [*NUMBERS.split(), *NAMES.split(), *STRANGE]
VALUES = [*(None, True, -1, 3, 10**40, 10**400, 10**5000, 0.5, 1e39, float("nan"), float("inf"), 1j, b"x", (), [], {})]
VALUES += [*(("a", None), [1, 2], {"a": 1}, object(), AdamW, AdamW(), Decoder, Bytes(), (Causal(), 3), range(3), len)]
VALUES += [*(np.int64(3), np.float32("nan"), np.arange(2), np.array(3), np.bool_(True), np.str_("x"), Path("x"), [[1]])]
OPTIONS = ["--json", "--help", "-h", "--step", "--seed=x", "--tokens=-1", "--prompt", "--by=loss", "--file=x"]


def configs(folder: Path, count: int = 10_000, seed: int = 0) -> Found:
    """Presets with fields set, many misspelt, to values, most of them wrong; and commands with any words. What is
    accepted can be stored and read again. Nothing is compiled or trained."""
    rng, counts, broken = random.Random(seed), collections.Counter[str](), list[str]()
    loaded = {name: config.load(name) for name in config.presets()}
    paths = {name: [path for path, _, _ in fields(spec)] for name, spec in loaded.items()}
    words = [*WORDS, *(c.__name__ for c in known_specs())]

    def path_of(name: str) -> str:
        path, rest = rng.choice(paths[name]), rng.choice(["", "x", ".", "..", ".0.", "é", ".x"])
        at = rng.randrange(len(path) + 1)
        wrong = path[:at] + rest + path[at + rng.randrange(2) :]
        return rng.choice([path] * 4 + [wrong, path.rpartition(".")[2], path + ".x", rng.choice(WORDS)])

    def resolved(name: str, overrides: dict[str, Any]) -> str:
        with contextlib.suppress(InputError):
            spec = config.resolve(loaded[name], overrides)
            assert from_json(json.loads(json.dumps(to_json(spec))), Config, "") == spec
            return "accepted"
        return "refused"

    def called(name: str, arguments: list[str]) -> str:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                status = commands.run(name, arguments)
            except SystemExit as ended:  # of --help
                status = ended.code
        assert status in (0, 1, 2), f"exit status {status}"
        return f"exit status {status}"

    for _ in range(count):
        name, draw = rng.choice([*loaded]), rng.random()
        chosen = {path_of(name): rng.choice(VALUES if draw < 0.4 else words) for _ in range(rng.randint(1, 2))}
        given = [f"--{path}={value}" for path, value in chosen.items() if draw > 0.4]
        case: tuple[Any, ...] = resolved, name, chosen
        if draw > 0.9:  # the first word is no config, no run, and no path that can be written to
            command, more = rng.choice([*commands.COMMANDS, rng.choice(WORDS)]), rng.choices(WORDS + OPTIONS, k=3)
            case = called, command, ["no such folder/thing", *rng.sample(more + given, len(more + given))]
        elif draw > 0.8:  # --help reads all and trains nothing
            case = called, "train", [name, *given, "--help"]
        try:
            counts[case[0](*case[1:])] += 1
        except Exception as error:  # whatever it is, the user gets a traceback
            broken.append(f"{case[1]} {[*case[2]]}: {error!r:.300}")
    told = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    return f"{count} configs and command lines: {len(broken)} tracebacks, {told}", broken


RANGES = [(32, 126), (0, 31), (127, 255), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
RANGES += [(0x200B, 0x202E), (0xD800, 0xDFFF), (0xE000, 0xF8FF), (0xFE00, 0xFFFF), (0x10FF00, 0x10FFFF)]
PARTS = ["<|endoftext|>", "<mask>", "<extra_id_0>", "Ġ", "\ufffd", "\ufeff", "👩\u200d👩\u200d👧", "\r\n", " \u0301"]


def texts(folder: Path, count: int = 10_000, seed: int = 0) -> Found:
    """Texts of any characters are what they were when they come back from their ids: by Bytes and BPE all that have
    UTF-8 (lone surrogates have none), by Characters all of its corpus. Others are replaced, or an InputError."""
    rng, counts, broken = random.Random(seed), collections.Counter[str](), list[str]()

    def text() -> str:
        parts = rng.choices(PARTS, k=rng.randrange(3))
        for span in rng.sample(RANGES, rng.randrange(4)):
            parts.append("".join(chr(rng.randint(*span)) for _ in range(rng.randrange(12))))
        return "".join(rng.sample(parts, len(parts)))

    utf8 = lambda text: not any(0xD800 <= ord(c) <= 0xDFFF for c in text)
    corpus = ["".join(map(chr, range(32, 127))), *(text() for _ in range(20))]
    characters, bpe = Characters().fit(corpus), BPE(400, mask_token=True, sentinels=2).fit([*filter(utf8, corpus)])
    exact = dict.fromkeys([Bytes(), Bytes(end_token=True, sentinels=2), bpe], utf8)
    exact |= dict.fromkeys([characters, replace(characters, unknown_token=True)], set().union(*corpus).issuperset)
    for drawn, tokenizer in itertools.product((text() for _ in range(count)), exact):
        try:
            back = tokenizer.decode(tokenizer.encode(drawn))
        except InputError:
            back = None
        except Exception as error:  # whatever it is, the user gets a traceback
            broken.append(f"{type(tokenizer).__name__} of {drawn!a}: {error!r:.300}")
            continue
        counts["exact" if back == drawn else "refused" if back is None else "replaced"] += 1
        if back != drawn and (exact[tokenizer](drawn) or "\ufffd" not in (back or "\ufffd")):
            broken.append(f"{type(tokenizer).__name__} of {drawn!a} gives {back!a}")
    told = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
    return f"{count} texts by {len(exact)} tokenizers: {len(broken)} broken promises, {told}", broken


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """What is logged under a name meanwhile, and nowhere else."""
    logger, handler, told = logging.getLogger(name), logging.Handler(logging.WARNING), list[logging.LogRecord]()
    handler.handle = lambda record: told.append(record) is None
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [handler], False
    try:
        yield told
    finally:
        logger.handlers, logger.propagate = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trials = {function.__name__: function for function in (flips, files, resume, configs, texts)}
    parser.add_argument("what", choices=trials)
    parser.add_argument("--count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    sys.unraisablehook = lambda _: (
        None
    )  # of several reads that fail at once Orbax awaits one; the others are told of so
    warnings.simplefilter("ignore", RuntimeWarning)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL + 1)
    with (
        tempfile.TemporaryDirectory() as name,
        contextlib.chdir(name),
        warnings_of("jaxformer"),
        warnings_of("asyncio"),
    ):
        os.environ["JAXFORMER_CACHE"] = f"{name}/cache"
        count = {} if asked.count is None else {"count": asked.count}
        line, broken = trials[asked.what](Path(name), seed=asked.seed, **count)
    print(line)
    print(*broken[:20], sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
