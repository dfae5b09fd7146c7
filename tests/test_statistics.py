"""statistics.py: bootstrap intervals against figures worked out by hand."""

import pytest

from expander.statistics import bootstrap


def test_the_interval_depends_on_the_seed_only():
    values = [value**0.5 for value in range(40)]
    assert bootstrap(values, 1) == bootstrap(values, 1)
    assert bootstrap(values, 1) != bootstrap(values, 2)


def test_the_interval_covers_the_mean():
    assert bootstrap([40.0] * 9, 0) == (40.0, 40.0)
    assert bootstrap([7.0], 0) == (7.0, 7.0)
    # Resamples of (0, 100) have the means 0, 50 and 100 with 1/4, 1/2 and 1/4.
    assert bootstrap([0.0, 100.0], 0) == (0.0, 100.0)
    # A mean of 400 values of which half are 100: standard error 50 / sqrt(400) = 2.5.
    low, high = bootstrap([0.0, 100.0] * 200, 0)
    assert low == pytest.approx(50 - 1.96 * 2.5, abs=0.3)
    assert high == pytest.approx(50 + 1.96 * 2.5, abs=0.3)
