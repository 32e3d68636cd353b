"""How every contestant takes the time, and what it says of it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

Found = dict[str, Any]


def timed(call: Callable[[], Any], seconds: float, per_call: int = 1, after: Callable[[], Any] = lambda: None) -> Found:
    """Seconds of each of the `per_call` steps of a call, the median; and how much longer the first call takes, which
    compiles.

    `call` returns when its result is known. The second call is left out; then they are counted until so many `seconds`
    have passed, two at least. What comes `after` a call is not counted.
    """
    found: list[float] = []
    while len(found) < 4 or sum(found[2:]) < seconds:
        started = time.perf_counter()
        call()
        found.append(time.perf_counter() - started)
        after()
    median = statistics.median(found[2:])
    return {"seconds": median / per_call, "compile": found[0] - median}
