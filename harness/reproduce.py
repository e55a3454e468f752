"""Quality of dense, dynamic sparse and static sparse training side by side, over several seeds.

    python -m harness.reproduce multvae-ml-1m --seeds 3 --jobs 2 --runs runs/ml-1m --output results/multvae-ml-1m

trains every method of the grid with every seed, each in a process of its own, and writes ``OUTPUT.json`` (every run)
and ``OUTPUT.md`` (mean and standard deviation). A run that has ended is not repeated, an interrupted one is continued.
"""

from __future__ import annotations

import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from harness.results import save_results

__all__ = ["main", "summarise", "train_one"]

METRICS = ("recall@20", "truncated_recall@20", "ndcg@20")
GRID = "dense,dsl@0.5,dsl@0.25,static@0.5,static@0.25"


def train_one(
    preset: str, cell: str, seed: int, folder: str, data_dir: str | None, overrides: list[str], threads: int
) -> dict[str, Any]:
    """Train one cell (``method@density``) with one seed in ``folder``, or read what is there. Returns its metrics."""
    import torch

    from recsys.config import load_config
    from recsys.errors import ConfigError
    from recsys.training import session
    from recsys.training.run_folder import RunFolder

    torch.set_num_threads(threads)
    method, _, density = cell.partition("@")
    options: dict[str, Any] = {"sparsity.method": method, "train.seed": seed, "data.dir": data_dir}
    if density:
        options["sparsity.density"] = float(density)
    config = load_config(preset, overrides=overrides, options=options)
    if Path(folder).exists():
        made = RunFolder.open(folder).config()
        if made.hash != config.hash:
            raise ConfigError(
                f"{folder} holds a run of other settings; name another --runs folder, or delete it"
            )
        metrics = session.resume(folder, quiet=True)
    else:
        metrics = session.train(config, folder, quiet=True)
    kept = ("test", "validation", "best_epoch", "epochs", "steps", "seconds", "nnz", "resident_bytes")
    return {"cell": cell, "seed": seed, **{key: metrics[key] for key in kept}}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over seeds of each cell's test metrics, in the order of first appearance."""
    rows = []
    for cell in dict.fromkeys(run["cell"] for run in runs):
        mine = [run for run in runs if run["cell"] == cell]
        row: dict[str, Any] = {"cell": cell, "seeds": len(mine)}
        for metric in METRICS:
            values = [run["test"][metric] for run in mine]
            row[metric] = statistics.mean(values)
            row[f"{metric} sd"] = statistics.stdev(values) if len(values) > 1 else float("nan")
        row["best epochs"] = sorted(run["best_epoch"] for run in mine)
        row["stored"] = sum(mine[0]["nnz"].values())
        row["bytes"] = mine[0]["resident_bytes"]["total"]
        rows.append(row)
    return rows


def _page(title: str, rows: list[dict[str, Any]]) -> list[str]:
    dense = next((row for row in rows if row["cell"] == "dense"), rows[0])
    lines = [
        f"# {title}",
        "",
        "Test metrics at the epoch that was best on validation; mean ± sample standard deviation over seeds.",
        "truncated_recall divides by min(20, relevant items), as Liang et al. (2018) and the DSL authors do.",
        "",
        "| method@density | seeds | "
        + " | ".join(METRICS)
        + " | best epochs | weights stored | bytes in training |",
        "|---|---|" + "---|" * (len(METRICS) + 3),
    ]
    for row in rows:
        cells = [f"{row[metric]:.4f} ± {row[f'{metric} sd']:.4f}" for metric in METRICS]
        epochs = ", ".join(map(str, row["best epochs"]))
        share = row["bytes"] / dense["bytes"]
        lines.append(
            f"| {row['cell']} | {row['seeds']} | {' | '.join(cells)} | {epochs} | {row['stored']:,} "
            f"| {row['bytes']:,} ({share:.0%}) |"
        )
    return lines


def main(
    preset: Annotated[str, typer.Argument(help="Preset of recsys, such as multvae-ml-1m.")],
    runs: Annotated[Path, typer.Option(help="Folder for the runs; ended ones in it are reused.")],
    output: Annotated[Path, typer.Option(help="Results are written to OUTPUT.json and OUTPUT.md.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    grid: Annotated[str, typer.Option(help="Comma-separated method[@density] cells.")] = GRID,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time, one thread each.")] = 1,
    data_dir: Annotated[str | None, typer.Option(help="Default: environment SPARSECORE_DATA.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a setting of every run.")] = None,
) -> None:
    """Train a grid of methods with several seeds and tabulate their test metrics."""
    console = Console(stderr=True)
    cells = [cell.strip() for cell in grid.split(",")]
    # Seed by seed, so that an interrupted grid has every method with the same seeds.
    work = [(cell, seed) for seed in range(seeds) for cell in cells]
    results: list[dict[str, Any]] = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        pending = [
            pool.submit(
                train_one, preset, cell, seed, str(runs / f"{cell}-seed{seed}"), data_dir, set_ or [], 1
            )
            for cell, seed in work
        ]
        for (cell, seed), future in zip(work, pending, strict=True):
            run = future.result()
            results.append(run)
            test = "  ".join(f"{metric} {run['test'][metric]:.4f}" for metric in METRICS)
            console.print(f"{cell} seed {seed}: {test}  best epoch {run['best_epoch']} of {run['epochs']}")
    results.sort(key=lambda run: (cells.index(run["cell"]), run["seed"]))
    rows = summarise(results)
    save_results(output, "harness.reproduce", _page(preset, rows), {"summary": rows, "runs": results})


if __name__ == "__main__":
    typer.run(main)
