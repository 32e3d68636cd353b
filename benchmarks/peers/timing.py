"""How every contestant takes the time, and what it says of it."""

import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Found = dict[str, Any]
SIDES = 1024, 2048, 4096, 8192  # of the matrices whose products tell what the machine can do
LONG = 2.0  # seconds of a product that is not worth while


def timed(call: Callable[[], Any], seconds: float, per_call: int = 1, after: Callable[[], Any] = lambda: None) -> Found:
    """Seconds of each of the `per_call` steps of a call, the median; and how much longer the first call takes, which
    compiles.

    `call` returns when its result is known. Others are made until so many `seconds` have passed, two at least. What
    comes `after` a call is not counted.
    """
    found: list[float] = []
    while len(found) < 3 or sum(found[1:]) < seconds:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
        after()
    median = statistics.median(found[1:])
    return {"seconds": median / per_call, "compile": max(found[0] - median, 0.0)}


def stalled(save: Callable[[], Any], step: Callable[[], Any], seconds: float, after: Callable[[], Any]) -> Found:
    """Seconds by which a save delays the end of a step that overwrites what is saved: it may wait for a copy. Less than
    a hundredth of a step is noise, and told as that much."""
    alone = timed(step, seconds / 4)["seconds"]
    found = timed(lambda: (save(), step()), seconds / 4, after=after)
    return found | {"seconds": max(found["seconds"] - alone, alone / 100)}


def sides_of(dtypes: Iterable[str], count: int, found: Found) -> Iterator[tuple[str, int]]:
    """Each dtype with the first `count` sides of matrices, but for products that would take too long at the operations
    a second that are `found` meanwhile: a processor may lack units for a dtype."""
    for dtype in dtypes:
        for side in SIDES[:count]:
            if not found[dtype] or 2 * side**3 / found[dtype] < LONG:
                yield dtype, side


def best(call: Callable[[], Any], seconds: float) -> float:
    """The shortest of calls made for so many seconds, two at least, behind one that is left out."""
    call()
    found: list[float] = []
    while len(found) < 2 or sum(found) < seconds:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
    return min(found)


def held() -> int:
    """The most bytes that the process has held at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
