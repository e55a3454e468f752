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
from pathlib import Path
from typing import TypedDict

from harness.gate.expectations import Allowance, find_allowance
from harness.gate.verdict import Finding, last_line
from harness.revisions.subject import PACKAGES, extract
from harness.suite.asv import GROUPS
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS

__all__ = ["Declared", "dropped", "missing"]

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
    }
    for name, workload in WORKLOADS.items()
}))
"""


class Declared(TypedDict):
    """Of a workload: its forms, and the figures of its group that decide."""

    forms: list[str]
    metrics: list[str]


def dropped(root: Path, base: str, store: Path, allowances: Sequence[Allowance]) -> list[Finding]:
    """What the suite of the commit `base` declares and the running one does not; nothing if it had no suite yet.

    Raises:
        GitError: no repository, or no such commit.
    """
    whole = extract(root, base, store, (*PACKAGES, "harness"))
    if not (whole.path / "harness" / "suite" / "registry.py").is_file():
        return []
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
        return [Finding("inconclusive", "*", "*", "*", None, None, math.nan, why)]
    return list(missing(json.loads(done.stdout), allowances))


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
        for form in declared["forms"]:
            if form not in workload.forms:
                yield gone(name, form, "*", "form")
        for metric in declared["metrics"]:
            if metric not in metrics:
                yield gone(name, "*", metric, "figure")
