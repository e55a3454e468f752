"""Paired comparisons: against the formulas written out, and how often they are wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from recsys.errors import RecsysError
from recsys.significance import paired


def test_against_the_formulas() -> None:
    rng = np.random.default_rng(0)
    old = rng.random(60)
    new = old + rng.normal(0.05, 0.2, 60)
    found = paired(new, old)
    gain = new - old
    t = gain.mean() / (gain.std(ddof=1) / math.sqrt(60))
    assert found.users == 60
    assert found.difference == pytest.approx(gain.mean())
    assert found.t_p == pytest.approx(2 * stats.t.sf(abs(t), df=59))
    ranks = stats.rankdata(np.abs(gain))
    statistic = min(ranks[gain > 0].sum(), ranks[gain < 0].sum())
    z = (statistic - 60 * 61 / 4) / math.sqrt(60 * 61 * 121 / 24)
    assert found.wilcoxon_p == pytest.approx(2 * stats.norm.cdf(z), rel=0.05)
    half = stats.t.ppf(0.975, 59) * gain.std(ddof=1) / math.sqrt(60)
    assert (found.low, found.high) == pytest.approx((gain.mean() - half, gain.mean() + half), abs=0.01)
    assert paired(new, old) == found
    swapped = paired(old, new)
    assert (swapped.difference, swapped.t_p) == pytest.approx((-found.difference, found.t_p))


def test_without_a_difference_few_p_values_are_small() -> None:
    rng = np.random.default_rng(1)
    results = [paired(*rng.random((2, 80)), resamples=200, seed=i) for i in range(200)]
    for p in ("t_p", "wilcoxon_p"):
        assert np.mean([getattr(result, p) < 0.05 for result in results]) == pytest.approx(0.05, abs=0.04)
    assert np.mean([result.low <= 0 <= result.high for result in results]) > 0.88


def test_values_that_do_not_vary() -> None:
    old = np.random.default_rng(2).integers(0, 2, 30).astype(np.float64)
    same = paired(old, old)
    assert (same.difference, same.low, same.high, same.t_p, same.wilcoxon_p) == (0, 0, 0, 1, 1)
    shifted = paired(old + 1, old)
    assert (shifted.difference, shifted.low, shifted.high, shifted.t_p) == (1, 1, 1, 0)
    assert shifted.wilcoxon_p < 1e-5
    one = old.copy()
    one[3] = 1 - one[3]
    assert paired(one, old).wilcoxon_p > 0.3
    rounded = paired(old + 1e-15, old)
    assert (rounded.difference, rounded.wilcoxon_p) == (0, 1)


def test_bad_arguments() -> None:
    for new, old in ((np.ones(3), np.ones(2)), (np.ones(1), np.ones(1)), (np.ones((2, 2)), np.ones((2, 2)))):
        with pytest.raises(RecsysError, match="same two or more users"):
            paired(new, old)
