"""Whether two models differ beyond chance on the same users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from recsys.errors import RecsysError

__all__ = ["Paired", "paired"]

_RESAMPLED = 1 << 22  # numbers that the bootstrap holds at a time: 32 MiB


@dataclass(frozen=True)
class Paired:
    """A comparison of per-user values, user by user.

    Attributes:
        users: how many.
        difference: mean of new - old.
        low, high: bootstrap confidence interval of the difference, by percentiles.
        t_p: two-sided p value of the paired t-test.
        wilcoxon_p: two-sided p value of Wilcoxon's signed-rank test; users with equal values are left out.
    """

    users: int
    difference: float
    low: float
    high: float
    t_p: float
    wilcoxon_p: float


def paired(
    new: NDArray[np.float64],
    old: NDArray[np.float64],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Paired:
    """Compare the values of two models for the same users.

    The p values speak of other users drawn like these, for the weights as they are: not of other seeds of training.

    Args:
        new, old: (m,) values of a metric; place i of both is one user.
        confidence: of the interval.
        resamples, seed: of the bootstrap.

    Raises:
        RecsysError: different numbers of users, or fewer than two.
    """
    if new.shape != old.shape or new.ndim != 1 or len(new) < 2:
        raise RecsysError(
            f"expected the values of the same two or more users, got shapes {new.shape} and {old.shape}"
        )
    gain = new - old
    # Values averaged over seeds may differ by rounding alone, which a test of signs and ranks takes for a difference.
    gain[np.abs(gain) < 1e-12] = 0
    mean = float(gain.mean())
    if np.ptp(gain) == 0:
        # Nothing varies: the tests are undefined, and where nothing differs the answer is plain.
        p = 1.0 if mean == 0 else 0.0
        wilcoxon = 1.0 if mean == 0 else float(stats.wilcoxon(gain).pvalue)
        return Paired(len(gain), mean, mean, mean, p, wilcoxon)
    interval = stats.bootstrap(
        (gain,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _RESAMPLED // len(gain)),
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Paired(
        users=len(gain),
        difference=mean,
        low=float(interval.low),
        high=float(interval.high),
        t_p=float(stats.ttest_1samp(gain, 0.0).pvalue),
        wilcoxon_p=float(stats.wilcoxon(gain).pvalue),
    )
