"""Means and bootstrap confidence intervals over queries."""

from collections.abc import Iterable, Sequence

import numpy as np

CONFIDENCE = 95  # percent
RESAMPLES = 10_000


def mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def bootstrap(values: Sequence[float], seed: int) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, at CONFIDENCE percent (Efron 1979).

    Args:
        values: one per query; for a paired interval, the difference for each query. The samples
            of one query are not independent, so pass their mean.
    """
    array = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    # 100 resamples at a time, to limit the memory for long lists of queries.
    means = [
        array[rng.integers(len(array), size=(100, len(array)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    tail = (100 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
