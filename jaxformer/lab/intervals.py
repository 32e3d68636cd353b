"""What a few seeds tell of the mean of all seeds: intervals and tests by Student's t."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import special

ERROR = 0.05  # of an interval: how often it misses; of a test: how often it calls equal means different


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean, and how far the mean of all seeds may lie from it. None where the seeds are too few, or all alike."""

    mean: float
    deviation: float | None  # standard deviation of the seeds, with n - 1; of a difference None
    half_width: float | None  # the interval is mean ± half_width
    p_value: float | None  # of the hypothesis that the mean of all seeds is 0


def estimate(values: Sequence[float], error: float = ERROR, of: Sequence[Sequence[float]] | None = None) -> Estimate:
    """The mean of the values and its interval at a confidence of 1 - error; `of` are the numbers that the values were
    made of, whose rounding they have."""
    mean, n = float(np.mean(values)), len(values)
    if n < 2:
        return Estimate(mean, None, None, None)
    deviation = float(np.std(values, ddof=1))
    return Estimate(mean, deviation, *_by_t(mean, deviation / math.sqrt(n), n - 1, error, of or [values]))


def paired_difference(first: Sequence[float], second: Sequence[float], error: float = ERROR) -> Estimate:
    """Of second - first, pair by pair. What both have in common, as the order of the data, cancels."""
    found = estimate([b - a for a, b in zip(first, second, strict=True)], error, [first, second])
    return dataclasses.replace(found, deviation=None)


def welch_difference(first: Sequence[float], second: Sequence[float], error: float = ERROR) -> Estimate:
    """Of the means of two samples that need not have the same deviation (Welch, Biometrika 34, 1947)."""
    mean = float(np.mean(second) - np.mean(first))
    if min(len(first), len(second)) < 2:
        return Estimate(mean, None, None, None)
    parts = [float(np.var(values, ddof=1)) / len(values) for values in (first, second)]
    total = sum(parts)
    within = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    return Estimate(
        mean, None, *_by_t(mean, math.sqrt(total), total**2 / within if within else 1.0, error, [first, second])
    )


def _by_t(
    mean: float, standard_error: float, freedom: float, error: float, samples: Sequence[Sequence[float]]
) -> tuple[float | None, float | None]:
    """Half-width and p-value. None if nothing spreads: a few equal numbers do not say that all are equal."""
    if standard_error <= 1e-14 * max(abs(value) for values in samples for value in values):  # but for rounding
        return None, None
    half_width = float(special.stdtrit(freedom, 1 - error / 2)) * standard_error
    return half_width, 2 * float(special.stdtr(freedom, -abs(mean) / standard_error))
