"""Every operation against its best dense form, torch.sparse and scipy, in one process, in turns.

    python -m harness.kernels --threads 1,2 --output results/kernels

writes ``OUTPUT.json`` and ``OUTPUT.md``. Ratio = time of the fastest dense form / ours, of the minima of interleaved
samples (higher is better); beside it the ratio of the medians, which says how much the machine was disturbed. Useful
rates count nonzeros only, and are shown as a fraction of what the machine can do, measured in the same run.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from harness import compile_times
from harness.ceilings import Ceilings, measure_ceilings
from harness.command import new_results, regular_expression, run_main, whole_numbers
from harness.handoff import handoff_ns
from harness.kernel_cases import CASES, Case
from harness.losing_cases import LOSING, SKEWED
from harness.overhead import measure_overhead
from recsys.results import save_results
from sparsecore.measure import Timing, interleaved

__all__ = ["main", "measure"]

HEAD = (
    "| operation | density | threads | ratio | of medians | target | dense | others | ms | spread | useful "
    + "| of ceiling |"
)
_LEAST = 7  # samples of each form


def measure(
    case: Case, density: float, ceilings: dict[int, Ceilings], seconds: float, quick: bool = False
) -> list[dict[str, Any]]:
    """Time all forms of a case for each number of threads that has ceilings.

    Returns:
        A row each: ``ratio`` and ``median ratio`` (dense / ours), the fastest ``dense`` form, ``others`` (time / ours),
        ``ms`` and its ``spread`` (median / minimum - 1), the useful ``rate`` a second, its ``fraction`` of the case's
        ceiling, and the ``target``.
    """
    forms = case.build(density, **(case.quick if quick else case.size))
    candidates = {"ours": forms.ours, **forms.dense, **forms.others}
    rows, before = [], torch.get_num_threads()
    try:
        for n_threads, ceiling in ceilings.items():
            torch.set_num_threads(n_threads)
            times: dict[str, Timing] = interleaved(
                candidates, seconds, least=1 if quick else _LEAST, warm=0 if quick else 1
            )
            ours = times["ours"]
            dense = min(forms.dense, key=lambda name: times[name].minimum)
            work = forms.flops if case.bound == "fma" else forms.nbytes
            rate = work / ours.minimum
            rows.append(
                {
                    "operation": case.name,
                    "density": density,
                    "threads": n_threads,
                    "ratio": times[dense].minimum / ours.minimum,
                    "median ratio": min(times[name].median for name in forms.dense) / ours.median,
                    "target": case.targets.get(density),
                    "dense": dense,
                    "others": {name: times[name].minimum / ours.minimum for name in forms.others},
                    "ms": 1e3 * ours.minimum,
                    "spread": ours.median / ours.minimum - 1,
                    "unit": "GFLOP/s" if case.bound == "fma" else "GB/s",
                    "rate": rate,
                    "bound": case.bound,
                    "fraction": rate / getattr(ceiling, case.bound),
                    "samples": ours.samples,
                    "all ms": {name: 1e3 * t.minimum for name, t in times.items()},
                }
            )
    finally:
        torch.set_num_threads(before)
    return rows


def _measure_all(
    cases: Iterable[Case], ceilings: dict[int, Ceilings], seconds: float, quick: bool, console: Console
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows, and what was left out with the reason."""
    rows, skipped = [], []
    for case in cases:
        reason = None if quick else case.missing()
        if reason:
            skipped.append(f"{case.name}: {reason}")
            continue
        for density in case.densities:
            for row in measure(case, density, ceilings, seconds, quick):
                rows.append(row)
                target = f" (target {row['target']:g})" if row["target"] else ""
                console.print(
                    f"{case.name} @ {density:g}, {row['threads']} threads: {row['ratio']:.2f}{target}"
                )
            if not quick:  # large operands must not wait for the collector
                gc.collect()
    return rows, skipped


def _line(r: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {ratio:.1f}" for name, ratio in r["others"].items())
    target = f"{r['target']:g}" if r["target"] else ""
    return (
        f"| {r['operation']} | {r['density']:g} | {r['threads']} | {r['ratio']:.2f} | {r['median ratio']:.2f} "
        f"| {target} | {r['dense']} | {others} | {r['ms']:.3g} | {r['spread']:.0%} | {r['rate'] / 1e9:.3g} {r['unit']} "
        f"| {r['fraction']:.0%} |"
    )


def _table(rows: list[dict[str, Any]]) -> list[str]:
    return [HEAD, "|---|---|---|---|---|---|---|---|---|---|---|---|", *map(_line, rows)]


def _page(document: dict[str, Any]) -> list[str]:
    lines = [
        "# Kernels",
        "",
        "Ratio: time of the fastest dense form / ours, minima of interleaved samples (*of medians* beside it); above 1",
        "sparse is faster. *Others*: time of torch.sparse CSR, scipy and torch-sparse (if there) / ours. *Spread*: how",
        "far our median is above our minimum. *Useful*: work on nonzeros alone; *of ceiling*: fraction of the rate",
        "below that bounds the operation. Before each timed call the form runs once untimed, so that every form finds",
        "the caches as in a loop of its own.",
        "",
        *_table(document["wins"]),
        "",
        *(f"Left out: {reason}." for reason in document["skipped"]),
        "",
        "## Where it loses or may lose",
        "",
        *_table(document["losses"]),
        "",
        "## Ceilings",
        "",
        "| threads | multiply-add, GFLOP/s | read, GB/s | copy | random 256-byte rows | the same from 16 MiB |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {n} | " + " | ".join(f"{value / 1e9:.1f}" for value in rates.values()) + " |"
        for n, rates in document["ceilings"].items()
    ]
    handoffs = ["not measured" if ns is None else f"{ns:.0f} ns" for ns in document["handoff ns"]]
    lines += [
        "",
        "A cache line to another processor and back: " + " before, ".join(handoffs) + " after all cases.",
        "",
        "## A call with nothing to do",
        "",
        "Microseconds of forward and backward on tiny shapes. Target: operators add at most 30.",
        "",
        "| call | threads | torch | our operator | our module | operator adds | module adds |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['call']} | {r['threads']} | {r['torch']:.1f} | {r['operator']:.1f} | {r['module']:.1f} "
        f"| {r['added']:.1f} | {r['module added']:.1f} |"
        for r in document["overhead"]
    ]
    if document["imports"]:
        lines += [
            "",
            "## Import",
            "",
            "Seconds in a new interpreter. Target: sparsecore at most torch and numba plus 0.2.",
            "",
            "| " + " | ".join(f"`import {names}`" for names in document["imports"]) + " |",
            "|---|---|---|",
            "| " + " | ".join(f"{seconds:.2f}" for seconds in document["imports"].values()) + " |",
        ]
    if document["compile"]:
        lines += [
            "",
            "## First calls",
            "",
            "Seconds in a new process with an empty kernel cache, and in the next one. A kernel is compiled once, for",
            "one thread and for several. What an earlier row compiled is not compiled again, and is not listed.",
            "",
            "| operation | threads | compiled | cached | kernels |",
            "|---|---|---|---|---|",
        ]
        for r in (r for r in document["compile"] if r["kernels"]):
            kernels = ", ".join(f"{name} {seconds:.1f}" for name, seconds in r["kernels"].items())
            lines.append(
                f"| {r['operation']} | {r['threads']} | {r['compiled']:.2f} | {r['cached']:.3f} | {kernels} |"
            )
    return lines


def main(
    threads: Annotated[
        str, typer.Option(callback=whole_numbers, help="Numbers of threads, comma-separated.")
    ] = "1,2",
    output: Annotated[
        Path | None, typer.Option(callback=new_results, help="Write OUTPUT.json and OUTPUT.md.")
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            callback=regular_expression,
            help="Measure only operations whose name matches this regular expression.",
        ),
    ] = "",
    seconds: Annotated[
        float, typer.Option(help="Timing of each operation, density and number of threads.")
    ] = 1.5,
    quick: Annotated[
        bool, typer.Option(help="Tiny shapes: everything runs once, nothing is judged.")
    ] = False,
    compiling: Annotated[
        bool, typer.Option(help="Also measure imports and first calls, in new processes.")
    ] = True,
) -> None:
    """Measure every operation against dense."""
    console = Console(markup=False, stderr=True)
    seconds = 0.0 if quick else seconds
    numbers = [int(n) for n in threads.split(",")]
    ceilings = {n: measure_ceilings(n, quick) for n in numbers}
    rounds = 100 if quick else 100_000
    near = handoff_ns(rounds)
    chosen = [case for case in CASES if re.search(only, case.name)]
    may_lose = [case for case in (*LOSING, *SKEWED) if re.search(only, case.name)]
    wins, skipped = _measure_all(chosen, ceilings, seconds, quick, console)
    losses, skipped_too = _measure_all(may_lose, ceilings, seconds / 2, quick, console)
    overhead, before = [], torch.get_num_threads()
    for n in numbers:
        torch.set_num_threads(n)
        overhead += measure_overhead(seconds)
    torch.set_num_threads(before)
    document = {
        "quick": quick,
        "wins": wins,
        "losses": losses,
        "skipped": skipped + skipped_too,
        "ceilings": {n: asdict(c) for n, c in ceilings.items()},
        "handoff ns": [near, handoff_ns(rounds)],
        "overhead": overhead,
        "imports": compile_times.import_seconds() if compiling and not quick else {},
        "compile": compile_times.compare() if compiling and not quick else [],
    }
    page = _page(document)
    if output is not None:
        save_results(output, "python -m harness.kernels", page, document)
    else:
        print("\n".join(page))


if __name__ == "__main__":
    run_main(main)
