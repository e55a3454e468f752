"""Builds the report from asv's result files: HTML of one file, or Markdown."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from statistics import geometric_mean
from typing import Any

from harness.gate.page import number
from harness.gate.verdict import Exit, Finding, compare_figures, compared, exit_code
from harness.history.reader import Run
from harness.report.charts import shares_chart, trend_chart
from harness.report.figures import (
    Row,
    break_even,
    figures_of,
    of_one_version,
    outcomes_of,
    rigl_share,
    rows_of,
)
from harness.report.trend import Step, series_of, steps_of
from harness.revisions.collect import Outcome
from harness.suite.registry import WORKLOADS
from harness.suite.workload import METRICS

__all__ = ["Report", "build", "to_html", "to_markdown"]

GROUPS = {
    "operation": "Operations",
    "layer": "Layers, training step",
    "train": "Models, training step",
    "infer": "Models, ten items for a user",
    "device": "On a GPU",
}
INTERVAL = 20  # steps between explorations of the small models

# Why counted multiply-adds differ from the formulas, which take every one of them for a product with a sparse weight.
WHY = {
    "lightgcn": "only the first hop reads the sparse table: later hops multiply the graph with dense rows",
    "ultragcn": "scores of pairs multiply whole rows, zeros included",
    "neumf": "a lookup costs no multiply-adds: what is counted are the layers and the products of rows",
    "cdae": "the input bag reads only rows that were chosen",
    "multvae": "the input bag reads only rows that were chosen",
}


@dataclass(frozen=True)
class Report:
    """What the page says."""

    verdict: str
    code: int
    run: Run
    before: Run | None
    findings: list[Finding]
    groups: dict[str, list[Row]]
    evens: list[tuple[str, str, str]]
    formulas: list[dict[str, Any]]
    quality: list[dict[str, Any]]
    steps: list[Step]
    trends: list[dict[str, Any]]
    problems: list[str]


def build(runs: Sequence[Run], problems: Sequence[str] = (), commit: str | None = None) -> Report:
    """The report on the last of these runs, all of one machine, of a commit and its ancestors, oldest first; each
    workload is held against the last run before it that has it.

    commit: the one asked for, by default that of the last run. If it is another, the verdict says so and never passes.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("no results: measure a commit first (harness run)")
    runs, dropped = of_one_version(runs)
    run, before = runs[-1], runs[-2] if len(runs) > 1 else None
    findings: list[Finding] = []
    verdict, code = f"{run.commit[:10]}: nothing older on this machine to hold it against", 0
    if before is not None:
        new = outcomes_of(run)
        old: dict[str, Outcome] = {}
        of: set[str] = set()
        for one in reversed(runs[:-1]):
            fresh = {name: outcome for name, outcome in outcomes_of(one).items() if name not in old}
            old |= fresh
            if fresh.keys() & new.keys():
                of.add(one.commit)
        both = {name: new[name] for name in new if name in old}
        findings = compare_figures({name: old[name] for name in both}, both)
        count = compared(old, both)
        code = int(exit_code(findings)) or (0 if count else int(Exit.inconclusive))
        worse = sum(f.status == "regression" for f in findings)
        words = {0: "PASS", 1: f"REGRESSION in {worse} figures", 2: "INCONCLUSIVE"}[code]
        against = f"{len(of)} earlier commits" if len(of) > 1 else min(of, default=before.commit)[:10]
        verdict = (
            f"{words}: {run.commit[:10]} against {against}, {count:,} exact counts and figures of quality"
        )
        if dropped:
            verdict += f"; {dropped} figures of other versions of their benchmarks are not compared"
        absent = len(old.keys() - new.keys())
        if absent:
            verdict += f"; {absent} workloads that were measured earlier are not in it"
    if commit is not None and commit != run.commit:
        verdict = f"{commit[:10]} is not measured, its nearest ancestor that is: {verdict}"
        code = code or int(Exit.inconclusive)
    figures = figures_of(run)
    rows = [row for row in rows_of(figures) if row.workload in WORKLOADS]
    groups = {
        title: [row for row in rows if WORKLOADS[row.workload].group == group]
        for group, title in GROUPS.items()
    }
    steps = [
        step
        for series in series_of(runs, ("macs", "resident_bytes", "peak_bytes", "time_vs_frozen"))
        for step in steps_of(runs, series)
    ]
    return Report(
        verdict,
        code,
        run,
        before,
        findings,
        {title: part for title, part in groups.items() if part},
        _evens(rows),
        _formulas(rows),
        _quality(figures),
        sorted(steps, key=lambda step: (-step.index, step.series.workload)),
        _trends(runs),
        list(problems),
    )


def _evens(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(workload, method, density below which it is faster than dense)."""
    shares: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if math.isfinite(row.time_share):
            shares.setdefault((row.workload, row.method), {})[row.density] = row.time_share
    return [(*key, break_even(points)) for key, points in shares.items()]


def _formulas(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Counted shares of training beside RigL's formula and the paper's (the density itself)."""
    found = []
    for row in rows:
        if (
            not WORKLOADS[row.workload].quick  # presets explore at intervals of their own
            or WORKLOADS[row.workload].group != "train"
            or row.method != "dsl"
            or not math.isfinite(row.macs_share)
        ):
            continue
        rigl, model = rigl_share(row.density, INTERVAL), row.workload.partition("-")[0]
        differs = max(abs(row.macs_share - rigl), abs(row.macs_share - row.density)) > 0.05
        found.append(
            {
                "workload": row.workload,
                "density": row.density,
                "counted": row.macs_share,
                "rigl": rigl,
                "paper": row.density,
                "why": WHY.get(model, "") if differs else "",
            }
        )
    return found


def _quality(figures: dict[str, dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    return [
        {
            "workload": workload,
            "form": form,
            "ndcg": 1 - values["quality_loss"],
            "gap": values.get("quality_gap", 0.0),
        }
        for workload, forms in figures.items()
        for form, values in forms.items()
        if "quality_loss" in values
    ]


def _trends(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Geometric means over the workloads of a kind, each relative to the first run that has it; NaN where none has."""
    commits, found = [run.commit for run in runs], []
    for metric in ("time_vs_frozen", "macs", "resident_bytes"):
        lines: dict[str, list[float]] = {}
        for group, title in GROUPS.items():
            chosen = [
                _relative(series.values)
                for series in series_of(runs, (metric,))
                if series.workload in WORKLOADS
                and WORKLOADS[series.workload].group == group
                and series.form != "dense"
                and any(value > 0 for value in series.values)
            ]
            if chosen:
                lines[title] = [_mean([values[place] for values in chosen]) for place in range(len(runs))]
        if lines:
            found.append({"metric": metric, "what": METRICS[metric].what, "commits": commits, "lines": lines})
    return found


def _relative(values: Sequence[float]) -> list[float]:
    first = next(value for value in values if value > 0)
    return [value / first for value in values]


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if value > 0]  # NaN is not
    return geometric_mean(known) if known else math.nan


def to_html(report: Report) -> str:
    """One file: no script, no link to anything, charts inline."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"share": _share, "number": number, "signed": _signed, "day": _day}
    template = (resources.files("harness.report") / "page.html").read_text(encoding="utf-8")
    charts = {
        title: shares_chart(rows, f"{title}: share of dense time by density")
        for title, rows in report.groups.items()
    }
    trends = [
        trend_chart(
            t["commits"], t["lines"], f"{t['what']} over commits, relative to the first", "of the first"
        )
        for t in report.trends
    ]
    from markupsafe import Markup

    return environment.from_string(template).render(
        report=report,
        workloads=WORKLOADS,
        charts={title: Markup(svg) for title, svg in charts.items()},
        trends=[(t, Markup(svg)) for t, svg in zip(report.trends, trends, strict=True)],
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )


def to_markdown(report: Report) -> str:
    """The verdict and the table of workloads, for a pull request."""
    lines = [f"**{report.verdict}**", ""]
    for title, rows in report.groups.items():
        lines += [
            f"### {title}",
            "",
            "| workload | form | MACs | memory | peak | time | of masked | noise | gain / ideal |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {r.workload} | {r.form} | {_share(r.macs_share)} | {_share(r.bytes_share)} | {_share(r.peak_share)} "
            f"| {_share(r.time_share)} | {_share(r.masked_share)} | {_share(r.noise)} "
            f"| {_share(r.achieved)} / {_share(r.ideal)} |"
            for r in rows
        ]
        lines.append("")
    facts = ", ".join(f"{key} {value}" for key, value in report.run.requirements.items())
    lines += ["Shares of dense; less is better.", "", f"Machine {report.run.machine}; {facts}.", ""]
    return "\n".join(lines)


def _share(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _signed(value: float) -> str:
    return f"{value:+.1%}" if math.isfinite(value) else "-"


def _day(milliseconds: int) -> str:
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).strftime("%Y-%m-%d")
