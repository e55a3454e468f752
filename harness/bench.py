"""Measures workloads in this process and prints what was found: for a developer who changes a kernel."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import box
from rich.table import Table

from harness.command import console, new_file, regular_expression
from harness.suite.measure import Effort, measure
from harness.suite.registry import choose
from harness.suite.workload import METRICS, Missing
from recsys.files import replacing

__all__ = ["bench"]

_SHOWN = ("macs", "resident_bytes", "peak_bytes", "seconds", "noise")
_SHARES = (
    "macs_vs_dense",
    "bytes_vs_dense",
    "peak_vs_dense",
    "time_vs_dense",
    "time_vs_masked",
    "time_vs_frozen",
)


def bench(
    name: Annotated[
        str,
        typer.Argument(
            callback=regular_expression, help="Regular expression of workloads; see harness list."
        ),
    ] = "",
    full: Annotated[bool, typer.Option("--full", help="Real shapes too.")] = False,
    seconds: Annotated[float, typer.Option(min=0, help="Timing of a workload; 0 counts only.")] = 1.0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    output: Annotated[
        Path | None, typer.Option("--json", callback=new_file, help="Also write all figures here.")
    ] = None,
) -> None:
    """Measure workloads here and now. Exit code 1 if one fails."""
    here = console()
    workloads = choose(name, quick=not full)
    if not workloads:
        raise typer.BadParameter(f"no workload matches {name!r}; see harness list")
    torch.set_num_threads(threads)
    found, failed = {}, False
    for workload in workloads:
        try:
            figures = measure(workload, Effort(True, seconds))
        except Missing as missing:
            here.print(f"{workload.name}: skipped, {missing}", highlight=False)
            continue
        except Exception:
            failed = True
            here.print(f"{workload.name}: failed\n{traceback.format_exc()}", highlight=False)
            continue
        found[workload.name] = figures
        here.print(_table(workload.name, figures))
    if output is not None:
        with replacing(output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if failed:
        raise typer.Exit(1)


def _table(title: str, figures: dict[str, dict[str, float]]) -> Table:
    present = {metric for values in figures.values() for metric in values}
    columns = [m for m in (*_SHOWN, *_SHARES, "file_bytes", "quality_loss", "quality_gap") if m in present]
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column("form")
    for metric in columns:
        table.add_column(metric.replace("_", " "), justify="right")
    for form, values in figures.items():
        table.add_row(form, *(_number(metric, values.get(metric)) for metric in columns))
    return table


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if METRICS[metric].kind == "count" else f"{value:.3g}"
