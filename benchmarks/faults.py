"""What is promised where something is wrong, tried at random: damaged checkpoints, interruptions, wrong input.

    python benchmarks/faults.py flips [--count 500]       one flipped bit in the newest of two checkpoints
    python benchmarks/faults.py files                     its files cut, emptied, zeroed, deleted, swapped
    python benchmarks/faults.py resume                    30 steps, interrupted after each one and resumed
    python benchmarks/faults.py configs [--count 10000]   fields, values and command lines, most of them wrong
    python benchmarks/faults.py texts [--count 10000]     texts of any characters through the tokenizers

Each takes --seed and prints one line; with exit status 1, and the first cases on stderr, if a promise is broken.
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
from jaxformer.data.tokenizers import BPE, Bytes, Characters, Tokenizer
from jaxformer.learning.optimizers import AdamW
from jaxformer.model.masks import Causal
from jaxformer.run.checkpoint import Checkpoints, CheckpointWriter
from jaxformer.run.manifest import has_manifest, sha256
from jaxformer.spec import InputError, fields, from_json, known_specs, to_json

Found = tuple[str, list[str]]  # the line, and the cases in which a promise was broken
Cases = Iterator[tuple[str, Callable[[Path], Any], bool]]  # what it is, what it does, whether to both checkpoints
OUTCOMES = ("silently wrong", "tracebacks", "refused", "fell back to step 10", "without effect")
BROKEN = {*OUTCOMES[:2], "fell back without a word", "refused beside a whole one"}


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


class Damage:
    """A run with whole checkpoints of steps 10 and 20, of which copies are damaged and opened."""

    def __init__(self, folder: Path):
        self.run, self.copy = folder / "run", folder / "copy"
        jaxformer.train(tiny(folder))
        self.saved = {step: sha256(jaxformer.open_run(self.run, step).state) for step in (10, 20)}
        self.files = [p.relative_to(self.run) for p in sorted(self.run.glob("checkpoints/20/**/*")) if p.is_file()]
        self.counts, self.broken = collections.Counter[str](), list[str]()

    def found_of(self, damage: Callable[[Path], Any], older_too: bool = False) -> str:
        """What comes of opening a damaged copy."""
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(self.run, self.copy)
        damage(self.copy)
        counts = has_manifest(self.copy / "checkpoints" / "20")  # without one it is as if it had never been finished
        with warnings_of("jaxformer") as told:
            try:
                state = jaxformer.open_run(self.copy).state
            except InputError:
                return "refused" if older_too else "refused beside a whole one"
            except Exception:
                return "tracebacks"
        if self.saved.get(step := int(state.step)) != sha256(state):
            return "silently wrong"
        return "without effect" if step == 20 else OUTCOMES[3] if told or not counts else "fell back without a word"

    def tried(self, cases: Iterable[tuple[str, Callable[[Path], Any], bool]], what: str) -> Found:
        """The cases, each with what it is and whether it damages the older checkpoint, too."""
        counts, broken = collections.Counter[str](), list[str]()
        for case, damage, older_too in cases:
            counts[found := self.found_of(damage, older_too)] += 1
            broken += [f"{case}: {found}"] if found in BROKEN else []
        each = [f"{counts[name]} {name}" for name in OUTCOMES] + [
            f"{counts[n]} {n}" for n in BROKEN - {*OUTCOMES} & {*counts}
        ]
        return f"{sum(counts.values())} {what}: {', '.join(each)}", broken


def flips(damage: Damage, count: int = 500, seed: int = 0) -> Found:
    """One bit of all those of the newest checkpoint, as often as asked for."""
    rng, sizes = random.Random(seed), [(damage.run / path).stat().st_size for path in damage.files]

    def flip(path: Path, bit: int) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)

    def cases() -> Cases:
        for i in rng.choices(range(len(sizes)), sizes, k=count):
            path, bit = damage.files[i], rng.randrange(8 * sizes[i])
            yield f"bit {bit} of {path}", lambda copy, path=path, bit=bit: flip(copy / path, bit), False

    return damage.tried(cases(), "flips")


def files(damage: Damage) -> Found:
    """Each file of the newest checkpoint in five ways; what is swapped damages the older one, too."""
    ways: dict[str, Callable[[Path], Any]] = {
        "cut to half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        "emptied": lambda path: path.write_bytes(b""),
        "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "deleted": lambda path: path.unlink(),
    }

    def swap(path: Path, other: Path) -> None:
        a, b = path.read_bytes(), other.read_bytes()
        path.write_bytes(b)
        other.write_bytes(a)

    def cases() -> Cases:
        for path, (name, way) in itertools.product(damage.files, ways.items()):
            yield f"{path} {name}", lambda copy, path=path, way=way: way(copy / path), False
        for path in damage.files:
            same = damage.run / "checkpoints" / "10" / path.relative_to("checkpoints/20")
            others = [same] if same.exists() else sorted(same.parent.iterdir())  # what holds arrays has a random name
            for other in (each.relative_to(damage.run) for each in others):
                how = lambda copy, path=path, other=other: swap(copy / path, copy / other)
                yield f"{path} swapped with {other}", how, True

    return damage.tried(cases(), "damaged files")


# --- interruptions


def resume(folder: Path, steps: int = 30) -> Found:
    """Saves behind every step of a straight run; then all is built anew and restored behind each, and trains to the
    end: every state on the way is that of the straight run. The corpus is read more than once."""
    spec = config.resolve(tiny(folder), {"train.steps": steps})
    state, step, batch_at = jaxformer.build(spec)
    abstract = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state)
    with contextlib.closing(CheckpointWriter(folder / "checkpoints", steps)) as writer:
        straight = [sha256(state)]
        for i in range(steps):
            state, _ = step(state, batch_at(i))
            straight.append(sha256(state))
            writer.save(state, i + 1)
    broken = list[str]()
    for stop in range(1, steps + 1):
        _, step, batch_at = jaxformer.build(spec)
        state = Checkpoints(folder / "checkpoints").restore(abstract, stop)
        found = [sha256(state)]
        for i in range(stop, steps):
            state, _ = step(state, batch_at(i))
            found.append(sha256(state))
        broken += [f"resumed behind step {stop}"] if found != straight[stop:] else []
    whole = sum(map(len, TextFiles(str(folder / "text.txt")).documents())) * 0.9
    epochs = steps * spec.data.batch_size * spec.window / whole
    return f"{steps} interruptions of {steps} steps ({epochs:.1f} epochs): {len(broken)} with other bits", broken


# --- wrong input

WORDS = [  # of a command line
    *(
        "",
        " ",
        "0",
        "-1",
        "3",
        "1e3",
        "1e400",
        "-inf",
        "nan",
        "9" * 30,
        "9" * 5000,
        "0x10",
        "1_0",
        "٣",
        "²",
        "1e-9",
        "½",
    ),
    *(
        "none",
        "None",
        "true",
        "TRUE",
        "null",
        "[]",
        "{}",
        ",",
        ",,1",
        "1,2,x",
        "'",
        '"',
        "`x`",
        "a b",
        "\n",
        "\t\0",
        "--",
    ),
    *("Ünïcödé", "🦊", "\ud800", "é", "\u202eabc", "%s", "{x}", "$HOME", "~", "../..", ".", "a" * 300, ":", "x:", ":y"),
    *(
        "math:pi",
        "math:nothing",
        "..:x",
        "no_such_module:X",
        "Decoder",
        "Window,Causal",
        "WarmupCosine",
        "AdamW",
        "*",
        "=",
    ),
]
VALUES = [  # of Python
    *(
        None,
        True,
        0,
        -1,
        3,
        10**40,
        10**400,
        -(10**20),
        0.5,
        1e39,
        float("nan"),
        float("inf"),
        2.5,
        1j,
        b"x",
        (),
        [],
        {},
    ),
    *(
        {1},
        ("a", None),
        [1, 2],
        {"a": 1},
        object(),
        AdamW,
        AdamW(),
        Decoder,
        Bytes(),
        (Causal(), 3),
        [[1]],
        range(3),
        len,
    ),
    *(
        np.int64(3),
        np.float32("nan"),
        np.array([1, 2]),
        np.array(3),
        np.bool_(True),
        np.str_("x"),
        Path("x"),
        2**63,
        -0.0,
    ),
]
OPTIONS = (
    "--json",
    "--help",
    "-h",
    "--step",
    "--seed=x",
    "--tokens=-1",
    "--prompt",
    "--by=loss",
    "--file=x",
    "--model",
)


def configs(folder: Path, count: int = 10_000, seed: int = 0) -> Found:
    """Presets with one to three fields set, many misspelt, to values, most of them wrong; and commands with any words.

    A config that is accepted can be stored and read again. Nothing is compiled or trained.
    """
    rng, found, broken = random.Random(seed), collections.Counter[str](), list[str]()
    loaded = {name: config.load(name) for name in config.presets()}
    paths = {name: [path for path, _, _ in fields(spec)] for name, spec in loaded.items()}
    classes = sorted(c.__name__ for c in known_specs())

    def path_in(name: str) -> str:
        path = rng.choice(paths[name])
        at = rng.randrange(len(path) + 1)
        wrong = path[:at] + rng.choice(["", "x", ".", "..", ".0.", "_", "é", ".x"]) + path[at + rng.randrange(2) :]
        return rng.choice([path, path, path, wrong, path.rpartition(".")[2], path + ".x", rng.choice(WORDS)])

    def word() -> str:
        return rng.choice(classes) if rng.random() < 0.2 else rng.choice(WORDS)

    def resolved(name: str, overrides: dict[str, Any]) -> str:
        try:
            spec = config.resolve(loaded[name], overrides)
            json.dumps(stored := to_json(spec))
        except InputError:
            return "refused"
        assert from_json(stored, Config, "") == spec
        return "accepted"

    def called(name: str, words: list[str]) -> str:
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                status = commands.run(name, words)
        except SystemExit as ended:  # of --help
            status = ended.code
        assert status in (0, 1, 2), f"exit status {status}"
        return f"exit status {status}"

    for _ in range(count):
        name, draw = rng.choice(list(loaded)), rng.random()
        chosen = [path_in(name) for _ in range(rng.randint(1, 3))]
        if draw < 0.8:
            value = (lambda: rng.choice(VALUES)) if draw < 0.4 else word
            case: tuple[Any, ...] = resolved, name, {path: value() for path in chosen}
        elif draw < 0.9:  # with --help nothing is trained
            case = called, "train", [name, *(f"--{path}={word()}" for path in chosen), "--help"]
        else:  # the first word is no config, no run and no path that may be written to
            words = [word() for _ in range(rng.randrange(3))] + [f"--{path}={word()}" for path in chosen]
            words += rng.sample(OPTIONS, 2)
            rng.shuffle(words)
            command = rng.choice([*commands.COMMANDS, rng.choice(WORDS)])
            case = called, command, ["no such folder/thing", *words]
        try:
            found[case[0](*case[1:])] += 1
        except Exception as error:
            broken.append(f"{case[1:]!r:.300}: {error!r:.300}")
    told = ", ".join(f"{number} {name}" for name, number in sorted(found.items()))
    return f"{count} configs and command lines: {len(broken)} tracebacks, {told}", broken


ALPHABETS = [  # ranges of code points
    *((32, 126), (0, 31), (127, 255), (0x300, 0x36F), (0x400, 0x4FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)),
    *((0x200B, 0x202E), (0xD800, 0xDFFF), (0xE000, 0xF8FF), (0xFE00, 0xFFFF), (0x10FF00, 0x10FFFF)),
]
SPECIAL = [
    "",
    "<|endoftext|>",
    "<mask>",
    "<extra_id_0>",
    "\r\n",
    "  ",
    "\n\n",
    "\ufeff",
    "Ġ",
    "\ufffd",
    "👩‍👩‍👧",
    "'s",
    " \u0301",
]


def texts(count: int = 10_000, seed: int = 0) -> Found:
    """Texts of any characters, back from their ids as they were: of all that have UTF-8 (lone surrogates have none)
    by Bytes and BPE, of all whose characters stand in its corpus by Characters; else InputError, but by Bytes U+FFFD."""
    rng, broken, found = random.Random(seed), list[str](), collections.Counter[str]()

    def text() -> str:
        parts = [rng.choice(SPECIAL) for _ in range(rng.randrange(3))]
        for first, last in rng.sample(ALPHABETS, rng.randrange(4)):
            parts.append("".join(chr(rng.randint(first, last)) for _ in range(rng.randrange(12))))
        rng.shuffle(parts)
        return "".join(parts)

    def utf8(drawn: str) -> bool:
        return not any(0xD800 <= ord(c) <= 0xDFFF for c in drawn)

    corpus = ["".join(map(chr, range(32, 127))), *(text() for _ in range(20))]
    fitted = Characters().fit(corpus)
    known = set(fitted.alphabet or "")
    bpe = BPE(400, mask_token=True, sentinels=2).fit([each for each in corpus if utf8(each)])
    kinds: list[tuple[Tokenizer, Callable[[str], bool]]] = [
        *((Bytes(), utf8), (Bytes(end_token=True, mask_token=True, sentinels=2), utf8), (bpe, utf8)),
        *((fitted, known.issuperset), (replace(fitted, unknown_token=True), known.issuperset)),
    ]
    for _ in range(count):
        drawn = text()
        for tokenizer, exact in kinds:
            try:
                back = tokenizer.decode(tokenizer.encode(drawn))
            except InputError:
                back = None
            except Exception as error:
                broken.append(f"{type(tokenizer).__name__} of {drawn!r}: {error!r:.300}")
                continue
            found["back" if back == drawn else "refused" if back is None else "replaced"] += 1
            if exact(drawn) and back != drawn:
                broken.append(f"{type(tokenizer).__name__} of {drawn!r} gives {back!r}")
    told = ", ".join(f"{number} {name}" for name, number in sorted(found.items()))
    return f"{count} texts, {len(kinds)} tokenizers: {len(broken)} broken promises, {told}", broken


# --- the command


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[logging.LogRecord]]:
    """What is logged under a name meanwhile, and nowhere else."""
    logger, handler, told = logging.getLogger(name), logging.Handler(logging.WARNING), list[logging.LogRecord]()
    handler.emit, before = told.append, (logger.handlers, logger.propagate)
    logger.handlers, logger.propagate = [handler], False
    try:
        yield told
    finally:
        logger.handlers, logger.propagate = before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flips", "files", "resume", "configs", "texts"))
    parser.add_argument("--count", type=int, help="how many cases: 500 flips, 10,000 configs or texts")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    how = {"seed": asked.seed} | ({"count": asked.count} if asked.count else {})
    with tempfile.TemporaryDirectory() as name, contextlib.chdir(name), warnings_of("jaxformer"):
        folder = Path(name)
        os.environ["JAXFORMER_CACHE"] = str(folder / "cache")
        line, broken = {
            "flips": lambda: flips(Damage(folder), **how),
            "files": lambda: files(Damage(folder)),
            "resume": lambda: resume(folder),
            "configs": lambda: configs(folder, **how),
            "texts": lambda: texts(**how),
        }[asked.what]()
    print(line)
    print(*broken[:20], sep="\n", end="\n" if broken else "", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
