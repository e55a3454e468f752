"""What a suite declares that it measures: the base's own against that of the running tree.

Both revisions are measured by the running tree's suite, so a workload, form or figure that it lost is missing on both
sides. It is found here, where it is declared: a workload's `forms`, and what is tracked of its group. (What the counts
of a single workload leave out of its group's figures is declared nowhere.)
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import harness
from harness.gate.expectations import Allowance, find_allowance
from harness.gate.verdict import Finding, last_line
from harness.revisions.subject import PACKAGES, extract, sources
from harness.suite.asv import GROUPS
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS

__all__ = ["Declared", "Suite", "missing", "suite_of"]

# Runs on suites of the past, so it takes nothing but what every one of them has.
_PROGRAM = """
import json
from harness.suite.asv import GROUPS
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS
print(json.dumps({
    name: {
        "forms": list(workload.forms),
        "metrics": [m for m in GROUPS[workload.group] if METRICS[m].kind != "report"],
        "quick": getattr(workload, "quick", False),
    }
    for name, workload in WORKLOADS.items()
}))
"""


# Parts of harness that judge, keep and show figures. All others make them: operands and forms lie beside the suite.
_NO_FIGURES = ("gate", "history", "report")


class Declared(TypedDict):
    """Of a workload: its forms, the figures of its group that decide, and whether a quick run takes it."""

    forms: list[str]
    metrics: list[str]
    quick: bool


@dataclass(frozen=True)
class Suite:
    """The suite of a commit.

    Attributes:
        workloads: what it declares; nothing if the commit had no suite yet.
        differs: what makes figures is not what makes them now, by its sources.
        problem: why it cannot be asked, or None.
    """

    workloads: Mapping[str, Declared]
    differs: bool = False
    problem: Finding | None = None

    def dropped(self, allowances: Sequence[Allowance]) -> list[Finding]:
        """What it declares and the running one does not."""
        problem = [] if self.problem is None else [self.problem]
        return [*problem, *missing(self.workloads, allowances)]


def suite_of(root: Path, base: str, store: Path) -> Suite:
    """The suite of the commit `base`.

    Raises:
        GitError: no repository, or no such commit.
    """
    whole = extract(root, base, store, (*PACKAGES, "harness"))
    if not (whole.path / "harness" / "suite" / "registry.py").is_file():
        return Suite({})
    differs = _measuring(whole.path / "harness") != _measuring(Path(harness.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-P", "-c", _PROGRAM],
        env={**os.environ, "PYTHONPATH": str(whole.path)},
        cwd=whole.path,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        why = f"the base's own suite fails, so what it had is not known: {last_line(done.stderr)}"
        return Suite({}, differs, Finding("inconclusive", "*", "*", "*", None, None, math.nan, why))
    return Suite(json.loads(done.stdout), differs)


def _measuring(package: Path) -> dict[str, bytes]:
    """Sources of a harness that its figures depend on."""
    return {
        name: text for name, text in sources(package).items() if name.partition("/")[0] not in _NO_FIGURES
    }


def missing(suite: Mapping[str, Declared], allowances: Sequence[Allowance]) -> Iterator[Finding]:
    """A finding for every workload, form and deciding figure of a suite that the running one does not declare."""

    def gone(workload: str, form: str, metric: str, what: str) -> Finding:
        allowance = find_allowance(allowances, workload, form, metric, None)
        if allowance is not None:
            return Finding("allowed", workload, form, metric, None, None, math.nan, allowance.reason)
        why = f"the suite has no such {what} any more; if that is meant, see benchmarks/expectations.toml"
        return Finding("regression", workload, form, metric, None, None, math.nan, why)

    for name, declared in suite.items():
        if name not in WORKLOADS:
            yield gone(name, "*", "*", "workload")
            continue
        workload = WORKLOADS[name]
        metrics = [metric for metric in GROUPS[workload.group] if METRICS[metric].kind != "report"]
        if declared["quick"] and not workload.quick:
            yield gone(name, "*", "*", "quick workload")
        for form in declared["forms"]:
            if form not in workload.forms:
                yield gone(name, form, "*", "form")
        for metric in declared["metrics"]:
            if metric not in metrics:
                yield gone(name, "*", metric, "figure")
