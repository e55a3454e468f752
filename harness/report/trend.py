"""Series of a figure over commits, and the commits at which they step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from harness.history.reader import Run
from harness.report.figures import figures_of
from harness.suite.workload import METRICS

__all__ = ["Series", "Step", "series_of", "steps_of"]

# A series of times steps where it changes by this share at least; asv's detection needs a few commits on either side.
LEAST = 0.05


@dataclass(frozen=True)
class Series:
    """Values of one figure over the runs, NaN where a run does not have it."""

    workload: str
    form: str
    metric: str
    values: tuple[float, ...]


@dataclass(frozen=True)
class Step:
    """A commit from which on a figure is another."""

    series: Series
    index: int
    commit: str
    before: float
    after: float

    @property
    def change(self) -> float:
        return self.after / self.before - 1 if self.before else math.inf


def series_of(runs: Sequence[Run], metrics: Sequence[str]) -> list[Series]:
    """All series of these metrics."""
    tables = [figures_of(run) for run in runs]
    keys = dict.fromkeys(
        (workload, form, metric)
        for table in tables
        for workload, forms in table.items()
        for form, values in forms.items()
        for metric in metrics
        if metric in values
    )
    return [
        Series(*key, tuple(t.get(key[0], {}).get(key[1], {}).get(key[2], math.nan) for t in tables))
        for key in keys
    ]


def steps_of(runs: Sequence[Run], series: Series) -> list[Step]:
    """Where a series steps: exactly at every change of a count; of times by asv's piecewise constant fit."""
    known = [(index, value) for index, value in enumerate(series.values) if math.isfinite(value)]
    if METRICS[series.metric].kind == "count":
        return [
            Step(series, index, runs[index].commit, before, value)
            for (_, before), (index, value) in itertools.pairwise(known)
            if value != before
        ]
    if len(known) < 4:
        return []
    from asv.step_detect import detect_steps

    pieces = detect_steps([value for _, value in known])
    steps = []
    for old, new in itertools.pairwise(pieces):
        if abs(new[2] / old[2] - 1) >= LEAST:
            index = known[new[0]][0]
            steps.append(Step(series, index, runs[index].commit, old[2], new[2]))
    return steps
