"""A verdict in words: for the terminal, and as Markdown for a pull request."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from harness.gate.run import Verdict
from harness.gate.verdict import Exit, Finding, exit_code
from harness.suite.workload import METRICS
from recsys.files import replacing

__all__ = ["headline", "number", "plain", "show", "write"]

_ORDER = ("regression", "inconclusive", "allowed", "improvement", "note", "new", "skipped")
_COLOURS = {"regression": "bold red", "inconclusive": "yellow", "improvement": "green"}


def headline(verdict: Verdict) -> str:
    """The verdict in one line."""
    count = {status: sum(f.status == status for f in verdict.findings) for status in _ORDER}
    code = exit_code(verdict.findings)
    words = {
        Exit.passed: "PASS",
        Exit.regression: f"REGRESSION in {count['regression']} figures",
        Exit.inconclusive: f"INCONCLUSIVE in {count['inconclusive']} figures",
    }[code]
    if verdict.same:
        measured = "same sources on both sides, nothing to measure"
        if verdict.tried is not None:
            measured = f"same sources on both sides, another suite: {verdict.tried} workloads ran"
    else:
        timed = "the counts decide, no times taken" if verdict.decided else f"{verdict.timed:,} timed"
        measured = f"{verdict.counted:,} figures counted, {timed}"
    extra = ", ".join(
        f"{count[status]} {status}" for status in ("improvement", "allowed", "new") if count[status]
    )
    return (
        f"{words}: {verdict.head.label} ({_short(verdict.head.revision)}) against {verdict.base.label} "
        f"({_short(verdict.base.revision)}); {measured}{'; ' + extra if extra else ''}{_skipped(verdict)}"
    )


def _skipped(verdict: Verdict, most: int = 3) -> str:
    """How many workloads neither side could measure, and why: a verdict says nothing of them."""
    reasons = Counter(finding.why for finding in verdict.findings if finding.status == "skipped")
    if not reasons:
        return ""
    told = [f"{why} ({count})" for why, count in reasons.most_common(most)]
    others = reasons.total() - sum(count for _, count in reasons.most_common(most))
    told += [f"other reasons ({others}), see --verbose"] if others else []
    return f"; {reasons.total()} workloads skipped: {', '.join(told)}"


def _short(revision: str) -> str:
    return revision[:10] + ("+" if revision.endswith("+") else "")


def _sorted(findings: list[Finding]) -> list[Finding]:
    size = {f: abs(f.change) if math.isfinite(f.change) else math.inf for f in findings}
    return sorted(findings, key=lambda f: (_ORDER.index(f.status), -size[f]))


def number(value: float | None, metric: str) -> str:
    """A figure as people read it: counts to the last digit, all others to four."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if _is_count(metric) and math.isfinite(value) else f"{value:.4g}"


def _cells(finding: Finding) -> tuple[str, ...]:
    change = f"{finding.change:+.1%}" if math.isfinite(finding.change) else "-"
    return (
        finding.status,
        f"{finding.workload}/{finding.form}",
        finding.metric,
        number(finding.base, finding.metric),
        number(finding.head, finding.metric),
        change,
        finding.why,
    )


def _is_count(metric: str) -> bool:
    return metric in METRICS and METRICS[metric].kind == "count"


_HEAD = ("verdict", "workload/form", "figure", "base", "head", "change", "why")


def show(verdict: Verdict, console: Console, all_findings: bool = False) -> None:
    """Print the verdict line, and the findings; new and skipped workloads only if asked for."""
    code = exit_code(verdict.findings)
    console.print(
        headline(verdict), style={0: "bold green", 1: "bold red", 2: "bold yellow"}[code], highlight=False
    )
    shown = [f for f in _sorted(verdict.findings) if all_findings or f.status not in ("new", "skipped")]
    if not shown:
        return
    table = Table(box=box.SIMPLE_HEAD)
    for name in _HEAD:
        table.add_column(
            name, justify="right" if name in ("base", "head", "change") else "left", overflow="fold"
        )
    for finding in shown:
        table.add_row(*_cells(finding), style=_COLOURS.get(finding.status))
    console.print(table)


def plain(finding: Finding) -> dict[str, Any]:
    """A finding for JSON, which has no word for NaN and infinity: None."""
    found = asdict(finding)
    odd = (key for key, value in found.items() if isinstance(value, float) and not math.isfinite(value))
    return found | dict.fromkeys(odd)


def write(
    verdict: Verdict, command: str, machine: Mapping[str, object], page: Path | None, document: Path | None
) -> None:
    """The verdict as Markdown, and as JSON, each where a path is given."""
    if page is not None:
        facts = ", ".join(f"{key} {value}" for key, value in machine.items())
        with replacing(page) as temporary:
            temporary.write_text(_markdown(verdict, command, facts), encoding="utf-8")
    if document is not None:
        found = {
            "command": command,
            "machine": dict(machine),
            "base": verdict.base.revision,
            "head": verdict.head.revision,
            "exit_code": int(exit_code(verdict.findings)),
            "findings": [plain(finding) for finding in verdict.findings],
        }
        with replacing(document) as temporary:
            temporary.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _markdown(verdict: Verdict, command: str, machine: str) -> str:
    """A page: the verdict line first, then the findings, then how to repeat it."""
    lines = [f"**{headline(verdict)}**", ""]
    shown = _sorted(verdict.findings)
    if shown:
        lines += ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in _cells(f)) + " |" for f in shown]
        lines.append("")
    lines += [
        "Less is better in every figure. Counts are exact; times are ratios to a frozen kernel in the same process.",
        "",
        f"Command: `{command}`",
        "",
        f"Machine: {machine}.",
        "",
    ]
    return "\n".join(lines)
