"""`recsys sweep`: from what was typed to runs, tables and a picture."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recsys.config import Config
from recsys.errors import ConfigError
from recsys.results import save_results
from recsys.sweep.engine import Outcome, Plan, run_cells, threads_for
from recsys.sweep.grid import Cell, Grid, make_grid, parse_axis
from recsys.sweep.heatmap import check_plot, draw_heatmap
from recsys.sweep.progress import Display
from recsys.sweep.summary import (
    best_row,
    markdown_table,
    plus_minus,
    shown_metrics,
    summarise,
    terminal_tables,
)
from recsys.training.session import load_dataset

__all__ = ["print_failures", "sweep", "train_all"]


def sweep(
    make_config: Callable[[Mapping[str, Any]], Config],
    axes: Sequence[str],
    output: Path,
    *,
    title: str,
    seeds: int = 1,
    jobs: int = 1,
    threads: int | None = None,
    metrics: Sequence[str] = (),
    best: str | None = None,
    plot: Path | None = None,
    quiet: bool = False,
) -> bool:
    """Train a grid, write ``sweep.json`` and ``sweep.md`` into `output`, print the table; whether no run failed.

    Args:
        make_config: see `recsys.sweep.grid.make_grid`.
        axes: of `recsys.sweep.grid.parse_axis`, as typed.
        output: folder of the runs.
        title: of the table.
        seeds, jobs, threads: see `make_grid` and `run_cells`.
        metrics: of test, for the table and (the first) for the picture; none takes recall, NDCG and the metric by which
            epochs are chosen, and that one for the picture.
        best: a validation metric to choose a cell by.
        plot: file for a heat map.
        quiet: no progress.

    Raises:
        RecsysError: settings, folders or a picture that cannot be; nothing was trained then.
        KeyboardInterrupt: on Ctrl-C, saying how to go on.
    """
    grid = make_grid(make_config, [parse_axis(text) for text in axes], seeds)
    for name in (*metrics, *([] if best is None else [best])):
        make_config({"train.metric": name})  # refuses what will not be computed
    if plot is not None:
        check_plot(grid, plot)
    if best is not None:
        _expect_validation(grid, best)
    threads = threads or threads_for(jobs)
    outcome = train_all(grid.cells, output, jobs, threads, quiet)
    console = Console(markup=False)
    rows = summarise(outcome.runs)
    chosen = make_config({}).train.metric
    base = make_config({}).to_dict()
    base["data"].pop("dir", None)  # nobody else's
    document = {
        "title": title,
        "base": base,
        "axes": grid.axes,
        "seeds": seeds,
        "jobs": jobs,
        "threads": threads,
        "summary": rows,
        "runs": outcome.runs,
        "failed": outcome.failed,
    }
    names = shown_metrics(rows, chosen, metrics) if rows else []
    lines = [
        f"# {title}",
        "",
        "Test metrics at the epoch that was best on validation; mean ± sample standard deviation over seeds.",
        "bytes: weights, indices, gradients, optimizer state, as a share of the dense (or first) row too.",
        "",
        *(markdown_table(rows, names) if rows else ["No run has ended."]),
    ]
    if outcome.failed:
        lines += ["", "Failed:", ""]
        lines += [f"* {run['cell']} seed {run['seed']}: {run['error']}" for run in outcome.failed]
    save_results(output / "sweep", "recsys", lines, document)
    if rows:
        console.print(*terminal_tables(rows, names, title))
        if plot is not None:
            draw_heatmap(grid, rows, metrics[0] if metrics else chosen, plot, title)
            console.print(f"The picture is in {plot}.", highlight=False, soft_wrap=True)
    print_failures(outcome)
    console.print(f"Every figure is in {output / 'sweep.json'}.", highlight=False, soft_wrap=True)
    if best is not None and rows:
        row = best_row(rows, best)
        console.print(
            f"Best by validation {best}: {row['cell']} (validation {plus_minus(row['validation'][best])}, "
            f"test {plus_minus(row['test'].get(best))})",
            highlight=False,
            soft_wrap=True,
        )
    return not outcome.failed


def _expect_validation(grid: Grid, metric: str) -> None:
    """Refuse --best before anything is trained where no run will have validation users to compute it on."""
    for config in {json.dumps(cell.config.to_dict()["data"]): cell.config for cell in grid.cells}.values():
        if len(load_dataset(config).validation.rows_with_targets):
            return
    raise ConfigError(
        f"--best {metric}: a cell is chosen by validation users and the data has none; give the split a validation "
        "part (data.options.validation), or leave --best away"
    )


def train_all(cells: Sequence[Cell], folder: Path, jobs: int, threads: int, quiet: bool) -> Outcome:
    """`run_cells` with progress; Ctrl-C says how far it got.

    Raises:
        KeyboardInterrupt: on Ctrl-C.
    """
    plan = Plan.of(cells, folder)
    try:
        with Display(len(cells), len(cells) - len(plan.open), quiet, jobs=jobs) as display:
            return run_cells(cells, folder, jobs=jobs, threads=threads, on_event=display)
    except KeyboardInterrupt:
        ended = len(cells) - len(plan.open)
        raise KeyboardInterrupt(
            f"interrupted; {ended} of {len(cells)} runs in {folder} have ended; "
            "the same command continues with the others"
        ) from None


def print_failures(outcome: Outcome) -> None:
    """Every run that failed, with its reason, on standard error."""
    console = Console(markup=False, stderr=True)
    for run in outcome.failed:
        console.print(
            f"failed: {run['cell']} seed {run['seed']} ({run['folder']}): {run['error']}",
            style="red",
            highlight=False,
            soft_wrap=True,
        )
