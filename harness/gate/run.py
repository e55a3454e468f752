"""Measures a revision and the working tree against each other, and gathers the findings."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from harness.gate.declared import suite_of
from harness.gate.expectations import Allowance, read_expectations
from harness.gate.verdict import (
    Exit,
    Finding,
    Status,
    TimedRounds,
    compare_figures,
    compare_times,
    compared,
    crossings,
    exit_code,
    last_line,
)
from harness.revisions.collect import Outcome, collect
from harness.revisions.subject import Subject, extract, snapshot
from harness.suite.workload import Workload

__all__ = ["EXPECTATIONS", "Plan", "Verdict", "gate"]

EXPECTATIONS = Path("benchmarks/expectations.toml")
Tell = Callable[[str], object]
_TIMED = ("operation", "layer", "train", "infer", "device")


@dataclass(frozen=True)
class Plan:
    """What a gate measures.

    Attributes:
        workloads: of the suite.
        times: also take times, which takes most of a gate's time. None takes them unless counts have already decided.
        rounds: processes of each side that take turns; what looks slower then gets two times as many.
        seconds: of timing a workload in one of them.
        threads: of torch.
    """

    workloads: Sequence[Workload]
    times: bool | None = None
    rounds: int = 3
    seconds: float = 0.3
    threads: int = 1


@dataclass
class Verdict:
    """Findings, and what was compared.

    Attributes:
        same: both sides have the same sources, so that nothing had to be measured.
        counted, timed: figures that were compared; if there is none of either, a finding says so.
        decided: counts found a regression, so no time was taken.
        tried: workloads that were only run, of the same sources and another suite; None if none was to be.
    """

    base: Subject
    head: Subject
    findings: list[Finding] = field(default_factory=list)
    same: bool = False
    counted: int = 0
    timed: int = 0
    decided: bool = False
    tried: int | None = None


def gate(root: Path, base: str, plan: Plan, store: Path, tell: Tell = lambda line: None) -> Verdict:
    """Compare the working tree of the repository `root` with the commit `base`.

    Raises:
        GitError: no repository, or no such commit.
        ExpectationsError: the file of expectations is damaged.
    """
    allowances = read_expectations(root / EXPECTATIONS)
    suite = suite_of(root, base, store)
    verdict = compare(
        extract(root, base, store),
        snapshot(root, store),
        plan,
        allowances,
        suite.dropped(allowances),
        tell,
        known=suite.workloads.keys(),
    )
    if verdict.same and suite.differs:
        _try(verdict, plan, tell)
    return verdict


def _try(verdict: Verdict, plan: Plan, tell: Tell) -> None:
    """Run the workloads of a suite that has changed where nothing else has."""
    tell(f"running the suite's workloads once: {verdict.head.label}")
    names = [workload.name for workload in plan.workloads]
    found = collect(verdict.head, names, threads=plan.threads, progress=lambda name: tell(f"  {name}"))
    verdict.tried = sum(outcome.missing is None for outcome in found.values())
    for name, outcome in found.items():
        if outcome.error is not None:
            why = f"fails: {last_line(outcome.error)}"
            verdict.findings.append(Finding("regression", name, "*", "*", None, None, math.nan, why))
        elif outcome.missing is not None:
            status: Status = "inconclusive" if outcome.lacks else "skipped"
            verdict.findings.append(Finding(status, name, "*", "*", None, None, math.nan, outcome.missing))


def compare(
    base: Subject,
    head: Subject,
    plan: Plan,
    allowances: Sequence[Allowance] = (),
    dropped: Sequence[Finding] = (),
    tell: Tell = lambda line: None,
    known: Collection[str] = (),
) -> Verdict:
    """Compare two subjects; `dropped` are findings on what the base's own suite had, see `harness.gate.declared`, and
    `known` the names of its workloads.
    """
    verdict = Verdict(base, head, list(dropped))
    if base.digest == head.digest:
        verdict.same = True
        return verdict
    names = [workload.name for workload in plan.workloads]
    tell(f"counting: {base.label} and {head.label}")

    def count(subject: Subject) -> dict[str, Outcome]:
        told = (lambda name: tell(f"  {name}")) if subject is head else None
        return collect(subject, names, threads=plan.threads, progress=told, stop=stop)

    # Counts do not depend on what runs beside them: both sides at once.
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        try:
            old, new = pool.map(count, (base, head))
        except BaseException:  # Ctrl-C comes here alone, and the pool waits for its threads
            stop.set()
            raise
    verdict.findings += compare_figures(old, new, allowances, known)
    verdict.counted = compared(old, new)
    decided = exit_code(verdict.findings) == Exit.regression
    verdict.decided = decided and plan.times is None
    if plan.times or (plan.times is None and not decided):
        works = [
            w.name
            for w in plan.workloads
            if w.group in _TIMED and old[w.name].figures and new[w.name].figures
        ]
        if works:
            _judge_times(verdict, works, plan, tell)
    if not verdict.counted and not verdict.timed:
        why = f"no figure of the {len(names)} workloads could be compared; --verbose tells why"
        verdict.findings.append(Finding("inconclusive", "*", "*", "*", None, None, math.nan, why))
    return verdict


def _judge_times(verdict: Verdict, works: Sequence[str], plan: Plan, tell: Tell) -> None:
    rounds = _Rounds(verdict.base, verdict.head, plan, tell)
    rounds.take(works, plan.rounds)
    old, new = rounds.values("time_vs_frozen")
    found = compare_times(old, new)
    verdict.timed = sum(len(forms.keys() & old.get(name, {}).keys()) for name, forms in new.items())
    doubtful = sorted({f.workload for f in found if f.status in ("regression", "inconclusive")})
    if doubtful:
        rounds.take(doubtful, 2 * plan.rounds, 2.0)
        old, new = rounds.values("time_vs_frozen")
        again = compare_times(_part(old, doubtful), _part(new, doubtful), rerun=True)
        found = [f for f in found if f.workload not in doubtful] + again
    verdict.findings += rounds.failures()
    verdict.findings += found + crossings(*rounds.values("time_vs_dense"))


def _part(values: TimedRounds, names: Sequence[str]) -> TimedRounds:
    return {name: values[name] for name in names if name in values}


class _Rounds:
    """Times of both sides, gathered from fresh processes that take turns."""

    def __init__(self, base: Subject, head: Subject, plan: Plan, tell: Tell) -> None:
        self.sides, self.plan, self.tell = (base, head), plan, tell
        self.outcomes: tuple[list[dict[str, Outcome]], list[dict[str, Outcome]]] = ([], [])

    def take(self, works: Sequence[str], rounds: int, longer: float = 1.0) -> None:
        for turn in range(rounds):
            self.tell(f"timing: round {turn + 1} of {rounds}, {len(works)} workloads")
            for side in (0, 1) if turn % 2 == 0 else (1, 0):
                self.outcomes[side].append(
                    collect(
                        self.sides[side],
                        works,
                        counts=False,
                        seconds=self.plan.seconds * longer,
                        threads=self.plan.threads,
                    )
                )

    def failures(self) -> list[Finding]:
        """Workloads that were counted, and fail when they are timed; only of the head that is a regression."""
        old, new = (
            {n: o.error for outcomes in side for n, o in outcomes.items() if o.error is not None}
            for side in self.outcomes
        )
        found = []
        for name in dict.fromkeys((*new, *old)):
            where = "" if name not in old else " in both revisions" if name in new else " in the base"
            status: Status = "inconclusive" if where else "regression"
            why = f"fails{where} when timed: {last_line(new.get(name) or old[name])}"
            found.append(Finding(status, name, "*", "*", None, None, math.nan, why))
        return found

    def values(self, metric: str) -> tuple[TimedRounds, TimedRounds]:
        """Of the base and of the head: workload, form, a value for each round."""
        return self._side(0, metric), self._side(1, metric)

    def _side(self, side: int, metric: str) -> TimedRounds:
        found: TimedRounds = {}
        for outcomes in self.outcomes[side]:
            for name, outcome in outcomes.items():
                for form, figures in outcome.figures.items():
                    if metric in figures:
                        found.setdefault(name, {}).setdefault(form, []).append(figures[metric])
        return found
