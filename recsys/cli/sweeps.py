"""Commands about several runs: sweep, reproduce, compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from recsys.cli.app import (
    ConfigFile,
    DataDir,
    DatasetName,
    DensityOption,
    Epochs,
    Jobs,
    JobThreads,
    Method,
    Model,
    Overrides,
    Preset,
    Quiet,
    app,
    make_config,
)

if TYPE_CHECKING:
    from recsys.config import Config


@app.command()
def sweep(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and their table.")],
    preset: Preset = None,
    config_file: ConfigFile = None,
    dataset: DatasetName = None,
    data_dir: DataDir = None,
    model: Model = None,
    method: Method = None,
    density: DensityOption = None,
    epochs: Epochs = None,
    overrides: Overrides = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="TABLE.KEY=V1,V2,...", help="Values to try; repeat for a product of settings."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each cell, from train.seed on.")] = 1,
    jobs: Jobs = 1,
    metric: Annotated[
        list[str] | None, typer.Option(help="Test metric to tabulate, such as ndcg@20; repeat.")
    ] = None,
    best: Annotated[
        str | None, typer.Option(metavar="METRIC", help="Name the best cell by this validation metric.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Heat map of a grid of two settings (.svg, .pdf, .png)."),
    ] = None,
    quiet: Quiet = False,
    threads: JobThreads = None,
) -> None:
    """Train a grid of settings with several seeds; what has ended is not repeated, so the same command resumes."""
    from recsys.sweep.command import sweep as run

    plain = {
        "model.name": model,
        "sparsity.method": method,
        "sparsity.density": density,
        "train.epochs": epochs,
    }

    def of_cell(variation: Mapping[str, Any]) -> Config:
        return make_config(preset, config_file, dataset, data_dir, None, overrides, plain, variation)

    title = preset or (config_file.stem if config_file else of_cell({}).model.name)
    whole = run(
        of_cell,
        grid or [],
        output,
        title=title,
        seeds=seeds,
        jobs=jobs,
        threads=threads,
        metrics=metric or [],
        best=best,
        plot=plot,
        quiet=quiet,
    )
    if not whole:
        raise typer.Exit(1)


@app.command()
def reproduce(
    table: Annotated[
        str, typer.Option(help="Table of results: main, small, or a .toml file of your own.")
    ] = "main",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Written: OUTPUT.md, OUTPUT.json. Default: TABLE.")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="Folder for the runs. Default: runs/TABLE.")] = None,
    only: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only runs whose 'preset method density=...' has it.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="In place of the presets': shorter.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="In place of the table's.")] = None,
    jobs: Jobs = 1,
    timing: Annotated[
        float, typer.Option(min=0, help="Seconds to time each density of a row; 0: no costs.")
    ] = 20.0,
    data_dir: DataDir = None,
    overrides: Overrides = None,
    quiet: Quiet = False,
    threads: JobThreads = None,
) -> None:
    """Train and measure a table of results, with published values beside ours; the same command resumes."""
    from recsys.reproduce.command import reproduce as run

    name = Path(table).stem
    whole = run(
        table,
        output or Path(name),
        runs or Path("runs") / name,
        only=only,
        epochs=epochs,
        seeds=seeds,
        jobs=jobs,
        threads=threads,
        timing=timing,
        data_dir=None if data_dir is None else str(data_dir.resolve()),
        overrides=overrides or [],
        quiet=quiet,
    )
    if not whole:
        raise typer.Exit(1)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs that have ended.")],
    metric: Annotated[
        str | None, typer.Option(help="What to test. Default: what the first run chose its epoch by.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Also draw quality against cost: a .png or .svg file.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write all values to this file.")
    ] = None,
) -> None:
    """Compare runs on the same test users: quality, significance against the first dense run, cost."""
    import json

    from recsys.compare import compare_runs
    from recsys.errors import RecsysError
    from recsys.plots import check_plot, save_plot

    if plot is not None:
        check_plot(plot)
    comparison = compare_runs(runs, metric)
    Console(markup=False).print(*comparison.tables())
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
            typer.echo(f"written: {json_file}")
        if plot is not None:
            save_plot(comparison, plot)
            typer.echo(f"written: {plot}")
    except OSError as error:
        raise RecsysError(f"cannot write {error.filename}: {error.strerror}") from error
