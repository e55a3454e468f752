"""Compares what was measured of two revisions, and judges: counts exactly, quality and times against their own noise.

In this order (what fails first is told first):

1. a workload, form or figure that the base has and the head has not, that fails, or that is not a number;
2. a count that is higher than before, or 0, as one is that nobody takes any more;
3. quality: a mean over seeds that is worse by more than max(3 %, 3 standard errors of the seeds' differences); where
   fewer than two seeds are known of both sides, more than 3 % are inconclusive;
4. a time against the frozen kernel that is longer by more than max(10 %, 3 x its own noise). Noise is how far the best
   third of the rounds spreads (of three rounds: how far the second best lies above the best), of the noisier side, so
   that more rounds make less of it. What is longer by more than 10 %, but not than 3 x its noise, is inconclusive; so
   is any change of more than 10 % where noise is above 15 %.

A workload that fails in both revisions is inconclusive, and so is a comparison of nothing. Everything else (times
against dense, shares) is told, and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from statistics import median, stdev
from typing import Literal

from harness.gate.expectations import Allowance, find_allowance
from harness.revisions.collect import Outcome
from harness.suite.workload import METRICS

__all__ = [
    "Exit",
    "Finding",
    "Status",
    "TimedRounds",
    "compare_figures",
    "compare_times",
    "compared",
    "crossings",
    "exit_code",
    "last_line",
]

Status = Literal["regression", "inconclusive", "allowed", "improvement", "note", "new", "skipped"]
Rounds = Mapping[str, Mapping[str, Sequence[float]]]  # workload, form, one value for each round
TimedRounds = dict[str, dict[str, list[float]]]

QUALITY, TIME, TOO_NOISY, NOISES = 0.03, 0.10, 0.15, 3.0


class Exit(IntEnum):
    """What the command returns."""

    passed = 0
    regression = 1
    inconclusive = 2


@dataclass(frozen=True)
class Finding:
    """One figure that is worth telling.

    Attributes:
        base, head: the figures; None where there is none.
        change: head / base - 1 (of quality: NDCG lost), NaN where it has no meaning.
        why: in words.
    """

    status: Status
    workload: str
    form: str
    metric: str
    base: float | None
    head: float | None
    change: float
    why: str


def compare_figures(
    base: Mapping[str, Outcome],
    head: Mapping[str, Outcome],
    allowances: Sequence[Allowance] = (),
    known: Collection[str] = (),
) -> list[Finding]:
    """Findings of counts and quality, and of what is there of one side only; both sides hold the same workloads.

    known: workloads that the base's own suite has. If this one's code cannot run on the base, that is not news.
    """
    found: list[Finding] = []
    for workload in dict.fromkeys((*base, *head)):
        old, new = base.get(workload), head.get(workload)
        found += _compare_workload(workload, old, new, allowances)
        if old is not None and old.lacks and workload in known:
            allowance = find_allowance(allowances, workload, "*", "*", None)
            status: Status = "inconclusive" if allowance is None else "allowed"
            why = f"the base has it, but this suite cannot measure it there: {old.missing}; a name of its own is needed"
            reason = why if allowance is None else allowance.reason
            found.append(Finding(status, workload, "*", "*", None, None, math.nan, reason))
    return found


def _compare_workload(
    workload: str, old: Outcome | None, new: Outcome | None, allowances: Sequence[Allowance]
) -> list[Finding]:
    def gone(form: str, metric: str, value: float | None, why: str) -> Finding:
        allowance = find_allowance(allowances, workload, form, metric, None)
        if allowance is not None:
            return Finding("allowed", workload, form, metric, value, None, math.nan, allowance.reason)
        return Finding("regression", workload, form, metric, value, None, math.nan, why)

    if new is None:
        return [
            gone(
                "*", "*", None, "the benchmark is gone; if it was meant to, see benchmarks/expectations.toml"
            )
        ]
    if new.error is not None:
        why = f"fails: {last_line(new.error)}"
        if old is not None and old.error is not None:  # neither worse nor known to be as good
            why = f"fails in both revisions, here with: {last_line(new.error)}"
            return [Finding("inconclusive", workload, "*", "*", None, None, math.nan, why)]
        return [Finding("regression", workload, "*", "*", None, None, math.nan, why)]
    if old is None or old.missing is not None or old.error is not None:
        why = "is new" if old is None else old.missing or "fails in the base"
        if new.missing is not None:
            return [Finding("skipped", workload, "*", "*", None, None, math.nan, new.missing)]
        return [
            Finding("new", workload, "*", "*", None, None, math.nan, why),
            *_not_numbers(workload, new, {}),
        ]
    if new.missing is not None:
        return [gone("*", "*", None, f"worked before, and now: {new.missing}")]
    found = _not_numbers(workload, new, old.figures)
    for form, figures in old.figures.items():
        if form not in new.figures:
            found.append(gone(form, "*", None, "the form is gone"))
            continue
        for metric, value in figures.items():
            if METRICS[metric].kind not in ("count", "quality") or math.isnan(value):
                continue
            other = new.figures[form].get(metric)
            if other is None:
                found.append(gone(form, metric, value, "the figure is gone"))
            elif METRICS[metric].kind == "count" and other != value:
                found.append(_count(workload, form, metric, value, other, allowances))
            elif metric == "quality_loss" and other != value:
                found += _quality(workload, form, figures, new.figures[form], allowances)
    return found


def _not_numbers(workload: str, new: Outcome, old: Mapping[str, Mapping[str, float]]) -> list[Finding]:
    """Figures that are not finite, unless they were not before either."""
    return [
        Finding(
            "regression",
            workload,
            form,
            metric,
            old.get(form, {}).get(metric),
            value,
            math.nan,
            "is not a number",
        )
        for form, figures in new.figures.items()
        for metric, value in figures.items()
        if not math.isfinite(value) and math.isfinite(old.get(form, {}).get(metric, 0.0))
    ]


def _count(
    workload: str, form: str, metric: str, old: float, new: float, allowances: Sequence[Allowance]
) -> Finding:
    change = new / old - 1 if old else math.inf
    if 0 < new < old:
        return Finding("improvement", workload, form, metric, old, new, change, "counted exactly")
    allowance = find_allowance(allowances, workload, form, metric, new)
    if allowance is not None:
        return Finding("allowed", workload, form, metric, old, new, change, allowance.reason)
    why = (
        "counted exactly" if new else "nothing is counted any more; if that is meant, allow it with up_to = 0"
    )
    return Finding("regression", workload, form, metric, old, new, change, why)


def _quality(
    workload: str,
    form: str,
    old: Mapping[str, float],
    new: Mapping[str, float],
    allowances: Sequence[Allowance],
) -> list[Finding]:
    """Quality is 1 - loss; the seeds of the two sides are pairs."""
    seeds = [name for name in old if name.startswith("quality_loss_") and name in new]
    mean = 1 - old["quality_loss"]
    lost = (new["quality_loss"] - old["quality_loss"]) / mean if mean > 0 else math.nan
    drops = [(new[seed] - old[seed]) / mean for seed in seeds]
    error = stdev(drops) / math.sqrt(len(drops)) if len(drops) > 1 else math.inf
    limit = max(QUALITY, NOISES * error)

    def finding(status: Status, why: str) -> list[Finding]:
        pair = old["quality_loss"], new["quality_loss"]
        return [Finding(status, workload, form, "quality_loss", *pair, lost, why)]

    why = f"NDCG@20 {lost:+.1%} lost, standard error {error:.1%}, limit {limit:.1%}"
    if len(drops) < 2:
        why = f"NDCG@20 {lost:+.1%} lost; {len(drops)} seeds are known of both sides, so how far it varies is not known"
    if lost > (limit if len(drops) > 1 else QUALITY):
        allowance = find_allowance(allowances, workload, form, "quality_loss", new["quality_loss"])
        if allowance:
            return finding("allowed", allowance.reason)
        return finding("regression" if lost > limit else "inconclusive", why)
    if lost > QUALITY:
        return finding("inconclusive", why)
    return finding("improvement", why) if -lost > limit else []


def compared(base: Mapping[str, Outcome], head: Mapping[str, Outcome]) -> int:
    """Number of figures that counts and quality were judged by: those that both sides have."""
    return sum(
        METRICS[metric].kind in ("count", "quality")
        for name in base.keys() & head.keys()
        for form, figures in head[name].figures.items()
        for metric in figures.keys() & base[name].figures.get(form, {}).keys()
    )


def last_line(error: str) -> str:
    """Of a traceback, or of what else was said: there it says what happened."""
    return error.strip().rpartition("\n")[2]


def compare_times(
    base: Rounds, head: Rounds, metric: str = "time_vs_frozen", rerun: bool = False
) -> list[Finding]:
    """Findings of times, each side's values from several fresh processes that took turns.

    Args:
        rerun: these are of a second measurement, of what the first found too long; only said in words.
    """
    found = []
    for workload, forms in head.items():
        for form, new in forms.items():
            old = base.get(workload, {}).get(form, [])
            if not old or not new:
                continue
            change = min(new) / min(old) - 1
            noise = max(_noise(old), _noise(new))
            limit = max(TIME, NOISES * noise)
            where = (workload, form, metric, min(old), min(new), change)
            why = f"{len(new)} rounds{' (rerun)' if rerun else ''}, noise {noise:.1%}, limit {limit:.0%}"
            if noise > TOO_NOISY:
                if abs(change) > TIME:
                    found.append(Finding("inconclusive", *where, why))
            elif change > TIME:
                found.append(Finding("regression" if change > limit else "inconclusive", *where, why))
            elif 1 / (1 + change) - 1 > limit:
                found.append(Finding("improvement", *where, why))
    return found


def crossings(base: Rounds, head: Rounds) -> list[Finding]:
    """Notes on forms that were faster than dense and are not any more, or the other way round."""
    found = []
    for workload, forms in head.items():
        for form, new in forms.items():
            old = base.get(workload, {}).get(form, [])
            if old and new and (median(old) < 1) != (median(new) < 1):
                pair = median(old), median(new)
                why = "slower than dense now" if pair[1] >= 1 else "faster than dense now"
                found.append(
                    Finding("note", workload, form, "time_vs_dense", *pair, pair[1] / pair[0] - 1, why)
                )
    return found


def _noise(values: Sequence[float]) -> float:
    """How far the minimum is to be trusted. Not the spread of all rounds: a busy machine makes most of them slow, and
    the best ones agree all the same.
    """
    ascending = sorted(values)
    return ascending[max(1, len(ascending) // 3)] / ascending[0] - 1 if len(ascending) > 1 else math.inf


def exit_code(findings: Sequence[Finding]) -> Exit:
    """Regression before inconclusive before pass."""
    statuses = {finding.status for finding in findings}
    if "regression" in statuses:
        return Exit.regression
    return Exit.inconclusive if "inconclusive" in statuses else Exit.passed
