"""Figures of runs as the report needs them: by workload, form and metric; ideal and achieved gains; break-even."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from harness.history.reader import Record, Run
from harness.revisions.collect import Outcome
from harness.suite.workload import density_of, method_of

__all__ = ["Row", "break_even", "figures_of", "of_one_version", "outcomes_of", "rigl_share", "rows_of"]

Figures = dict[str, dict[str, dict[str, float]]]


def figures_of(run: Run) -> Figures:
    """{workload: {form: {metric: value}}} of what a run has; failed benchmarks are not in it."""
    found: Figures = {}
    for record in run.records:
        if record.value is None or math.isnan(record.value) or len(record.params) != 2:
            continue
        workload, form = map(str, record.params)
        metric = record.benchmark.rpartition(".track_")[2]
        found.setdefault(workload, {}).setdefault(form, {})[metric] = record.value
    return found


def of_one_version(runs: Sequence[Run]) -> tuple[list[Run], int]:
    """The runs without those figures whose benchmark has another version in the last run that has it, as two versions
    do not compare; and how many these are.
    """

    def key(record: Record) -> tuple[str, tuple[object, ...]]:
        return record.benchmark.rpartition(".track_")[2], record.params  # files and classes may be renamed

    versions = {key(record): record.version for run in runs for record in run.records}
    kept, dropped = [], 0
    for run in runs:
        records = tuple(r for r in run.records if r.version == versions[key(r)])
        kept.append(replace(run, records=records))
        others = (r.value for r in run.records if r.version != versions[key(r)])
        dropped += sum(value is not None and not math.isnan(value) for value in others)
    return kept, dropped


def outcomes_of(run: Run) -> dict[str, Outcome]:
    """The same for `harness.gate.verdict`; a workload with a failed benchmark is an error."""
    failed = {str(record.params[0]) for record in run.records if record.value is None and record.params}
    outcomes = {name: Outcome(figures=forms) for name, forms in figures_of(run).items()}
    return outcomes | {name: Outcome(error="failed when it was measured") for name in failed}


def rigl_share(density: float, interval: float) -> float:
    """Multiply-adds of training / those of dense by the formula of RigL (Evci et al., ICML 2020, appendix H).

    (3 f_S dT + 2 f_S + f_D) / (dT + 1) / (3 f_D), f_S = density f_D, dT = interval: every dT-th step computes a dense
    gradient. It takes for granted that every multiply-add of the model is with a sparse weight.
    """
    return (3 * density * interval + 2 * density + 1) / (interval + 1) / 3


@dataclass(frozen=True)
class Row:
    """A form of a workload beside dense. Shares are of dense, NaN where there is none.

    Attributes:
        ideal: gain that the multiply-adds alone would allow, 1 / share of MACs.
        achieved: 1 / share of time.
    """

    workload: str
    form: str
    macs: float
    macs_share: float
    bytes_share: float
    peak_share: float
    time_share: float
    masked_share: float
    noise: float
    seconds: float

    @property
    def density(self) -> float:
        return density_of(self.form)

    @property
    def method(self) -> str:
        return method_of(self.form)

    @property
    def ideal(self) -> float:
        return 1 / self.macs_share if self.macs_share > 0 else math.nan

    @property
    def achieved(self) -> float:
        return 1 / self.time_share if self.time_share > 0 else math.nan


def rows_of(figures: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[Row]:
    """A row for every form but dense."""
    found = []
    for workload, forms in figures.items():
        for form, values in forms.items():
            if form == "dense":
                continue

            def get(metric: str, values: Mapping[str, float] = values) -> float:
                return values.get(metric, math.nan)

            found.append(
                Row(
                    workload,
                    form,
                    get("macs"),
                    get("macs_vs_dense"),
                    get("bytes_vs_dense"),
                    get("peak_vs_dense"),
                    get("time_vs_dense"),
                    get("time_vs_masked"),
                    get("noise"),
                    get("seconds"),
                )
            )
    return found


def break_even(shares: Mapping[float, float]) -> str:
    """Density below which a form is faster than dense, from shares of dense time by density.

    In words where it lies outside of what was measured; between two densities, on the line between them.
    """
    known = sorted((density, share) for density, share in shares.items() if math.isfinite(share))
    if not known:
        return "not timed"
    if all(share < 1 for _, share in known):
        return f"above {known[-1][0]:g}"
    if all(share >= 1 for _, share in known):
        return f"below {known[0][0]:g}"
    for (low, below), (high, above) in itertools.pairwise(known):
        if below < 1 <= above:
            return f"{low + (high - low) * (1 - below) / (above - below):.2f}"
    return "no single one"
