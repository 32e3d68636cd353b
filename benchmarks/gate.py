"""Fails when jaxformer has become slower beside the bare-JAX step and decoding of benchmarks/peers/bare_jax.py.

    python benchmarks/gate.py BASELINE.json --write      # before a change
    python benchmarks/gate.py BASELINE.json              # after it, on the same machine

What is compared is the speed of jaxformer over that of the reference, run in turns: whatever else the machine does
falls on both. Exit status 1 if the median of such a ratio is more than 5 % below the baseline's. About 4 minutes on 2
cores; where a ratio differs from round to round by more than that, it says so, and --rounds=N takes more.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from compare import KEPT, Clock, Contestant, Failed, Measurement, measured, run
from peers.sizes import SIZES, Texts

FALL = 0.05  # of a ratio, from which on it fails
Ratios = Mapping[str, Sequence[float]]


def pair(steps_per_call: int | None = None) -> tuple[Contestant, Contestant]:
    arguments = {} if steps_per_call is None else {"steps_per_call": steps_per_call}
    return Contestant("jaxformer", "ours", arguments), Contestant("bare JAX", "bare_jax", arguments, KEPT)


MEASUREMENTS = [
    Measurement("step small", "step", SIZES["small"], pair(10), 1),
    Measurement("step 10.7M", "step", SIZES["10.7M"], pair(1), 2),
    Measurement("decode small", "decode", SIZES["small, 256"], pair(), 1, texts=Texts(4, 16, 192)),
]


def ratios(rounds: int) -> dict[str, list[float]]:
    """jaxformer's speed over the reference's, round by round. Raises Failed."""
    found: dict[str, list[float]] = {}
    for each in MEASUREMENTS:
        ours, reference = measured(each, rounds, Clock())
        for row in (ours, reference):
            if row.failed:
                raise Failed(f"{each.name}, {row.name}: {row.failed}")
        found[each.name] = [b / a for a, b in zip(ours.seconds, reference.seconds, strict=True)]
    return found


def fallen(before: Ratios, now: Ratios) -> list[str]:
    """A sentence for each ratio that fell by more than the tolerance."""
    lines: list[str] = []
    for name, values in before.items():
        old, new = statistics.median(values), statistics.median(now[name])
        if new < old * (1 - FALL):
            lines.append(f"{name}: {old:.3f} before, {new:.3f} now, {new / old - 1:+.1%}")
    return lines


def baseline(path: Path, machine: str) -> Ratios:
    """The ratios that --write has stored; none, and a sentence why, if they are not to be compared with."""
    names = [each.name for each in MEASUREMENTS]
    try:
        stored = json.loads(path.read_text())
        of, found = stored["machine"], {name: stored["ratios"][name] for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path}: no baseline can be read ({error!r}); --write measures one", file=sys.stderr)
        return {}
    if of != machine:
        print(f"{path} is of another machine: {of}; this is {machine}", file=sys.stderr)
        return {}
    return found


def line(name: str, values: Sequence[float]) -> str:
    spread = f"{min(values):.3f} to {max(values):.3f}"
    noisy = max(values) / min(values) - 1 > FALL
    warning = f"; noisier than {FALL:.0%}: repeat it on a quiet machine, or with more rounds" if noisy else ""
    return f"{name:14} {statistics.median(values):.3f} × bare JAX ({spread} in {len(values)} rounds){warning}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("baseline", type=Path)
    parser.add_argument("--write", action="store_true", help="measures the baseline")
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    try:
        machine, before = run("limits", "machine", {}, {}, Clock().left)["device"], {}
        if not given.write and not (before := baseline(given.baseline, machine)):
            return 2
        now = ratios(given.rounds)
    except Failed as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(line(name, values) for name, values in now.items()))
    if given.write:
        given.baseline.write_text(json.dumps({"machine": machine, "ratios": now}, indent=1) + "\n")
        return 0
    lines = fallen(before, now)
    print("\n".join(lines) or f"no ratio fell by more than {FALL:.0%}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
