"""Means over batches with the interval a reviewer asks for, and differences of settings that met the same batches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from lmleak.records import Score
from lmleak.seeds import derive

#: Resamples. The 2.5 % quantile of 2,000 has a standard error of 0.35 percentage points of coverage.
RESAMPLES = 2000
LEVEL = 0.95


def summarise(values: Sequence[float | None], seed: int = 0) -> Score | None:
    """Mean over batches with a 95 % percentile bootstrap interval (Efron 1979).

    Args:
        values: one a batch; None (undefined or not scored) is left out.
        seed: of the resampling, which uses its own generator. Equal seeds and lengths resample the same batches.

    Returns:
        mean, interval (None below two batches) and the number of batches that count; None where no batch does.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    n = len(known)
    if n == 0:
        return None
    mean = float(known.mean())
    if n == 1:
        return Score(mean, None, None, 1)
    if (known == known[0]).all():  # exact, where the resampled sums would be off by a rounding
        return Score(float(known[0]), float(known[0]), float(known[0]), n)
    means = _resamples(n, seed) @ known / n
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Score(mean, float(low), float(high), n)


def paired_difference(a: Sequence[float | None], b: Sequence[float | None], seed: int = 0) -> Score | None:
    """Mean of `a - b` over the batches where both are known, with its interval: far tighter than two intervals.

    Args:
        a: one value a batch of the first setting.
        b: the same batches under the second setting.
        seed: of the resampling.

    Raises:
        ValueError: the two do not have the same number of batches.
    """
    pairs = zip(a, b, strict=True)
    return summarise([None if x is None or y is None else x - y for x, y in pairs], seed)


@lru_cache(maxsize=4)
def _resamples(n: int, seed: int) -> np.ndarray:
    """How often each of n batches is drawn, [RESAMPLES, n]. Cached: all metrics and cells of a study share it."""
    draws = np.random.default_rng(derive(seed, "bootstrap", n)).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    return draws.astype(np.float64)
