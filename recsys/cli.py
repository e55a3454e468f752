"""The command line. It imports nothing heavy before a command needs it: `recsys --help` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

from recsys.data_cli import data_app

if TYPE_CHECKING:
    from recsys.config import Config

__all__ = ["app", "main"]


class _Friendly(TyperGroup):
    """Errors that the user can mend are one line and exit code 2; Ctrl-C is exit code 130; others keep their
    traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            _complain(str(interrupt) or "interrupted")
            raise typer.Exit(130) from None
        except ValueError as error:
            if not _expected(error):
                raise
            _complain(str(error))
            raise typer.Exit(2) from None


def _expected(error: ValueError) -> bool:
    from recsys.errors import RecsysError

    # Only where sparsecore was imported can it have raised; importing it here would compile nothing but take
    # a second.
    errors = sys.modules.get("sparsecore.errors")
    known = (RecsysError,) if errors is None else (RecsysError, errors.SparsecoreError)
    return isinstance(error, known)


def _complain(message: str) -> None:
    line = " ".join(message.split())
    Console(stderr=True, soft_wrap=True).print(f"[red]error: {escape(line)}[/red]", highlight=False)


app = typer.Typer(
    cls=_Friendly,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Recommender models whose weights are trained and stored sparse.",
)
app.add_typer(data_app, name="data")

DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="Folder of datasets. Default: environment SPARSECORE_DATA.")
]
DatasetName = Annotated[str | None, typer.Option("--dataset", help="synthetic, or a folder of --data-dir.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars and no table of epochs.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: all cores.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Seed of everything random in training.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Override a setting, such as train.lr=0.01."),
]
Preset = Annotated[str | None, typer.Option(help="Settings that come with recsys.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time, each in a process of its own.")]
JobThreads = Annotated[
    int | None, typer.Option("--threads", min=1, help="CPU threads of each run. Default: cores / jobs.")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write the run to.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")]


@app.command()
def quickstart(
    dataset: DatasetName = None,
    data_dir: DataDir = None,
    seed: Seed = None,
    overrides: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    threads: Threads = None,
    timing: Annotated[float, typer.Option(min=0, help="Seconds spent on timing steps.")] = 6.0,
) -> None:
    """Train MultVAE dense, masked and sparse, and compare them in one table; at most two minutes on two
    cores.
    """
    config = _config("quickstart", None, dataset, data_dir, seed, overrides)
    from recsys.quickstart import run

    _use_threads(threads)
    run(config, output=output, overwrite=overwrite, quiet=quiet, timing_seconds=timing)


@app.command()
def train(
    preset: Preset = None,
    config_file: ConfigFile = None,
    dataset: DatasetName = None,
    data_dir: DataDir = None,
    model: Annotated[str | None, typer.Option(help="Name of the model, such as multvae or ease.")] = None,
    method: Annotated[str | None, typer.Option(help="dense, masked, static or dsl.")] = None,
    density: Annotated[float | None, typer.Option(help="Fraction of weights kept, in (0, 1].")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs to train at most.")] = None,
    seed: Seed = None,
    overrides: Overrides = None,
    output: Output = None,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the interrupted run in --output.")
    ] = False,
    refit: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Train RUN's model on train and validation together, to its best epoch."
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log to tensorboard/ in the run's folder.")
    ] = False,
    quiet: Quiet = False,
    threads: Threads = None,
) -> None:
    """Train one model; the folder it writes holds settings, log, metrics and a saved recommender."""
    from recsys.errors import ConfigError

    plain = {
        "model.name": model,
        "sparsity.method": method,
        "sparsity.density": density,
        "train.epochs": epochs,
        "train.tensorboard": tensorboard or None,
    }
    given = [preset, config_file, dataset, data_dir, seed, overrides, *plain.values()]
    config = None
    if refit is not None:
        if output is None or resume or any(value is not None for value in given):
            raise ConfigError(
                "--refit takes the settings of the run that it names; expected --output and no other setting"
            )
    elif resume:
        if output is None or overwrite or any(value is not None for value in given):
            raise ConfigError(
                "--resume takes the run from --output with the settings it was started with; "
                "expected --output and no other setting"
            )
    else:
        config = _config(preset, config_file, dataset, data_dir, seed, overrides, plain)
        if output is None:
            data = Path(config.data.name)
            short = data.name.partition(".")[0] if data.is_absolute() else config.data.name
            name = f"{short}-{config.model.name}-{config.sparsity.method}-seed{config.train.seed}"
            output = Path("runs") / name.replace("/", "-")
    from recsys.training import session
    from recsys.training.run_folder import RunFolder

    _use_threads(threads)
    listener = None if quiet else _print_epoch
    try:
        if refit is not None:
            from recsys.training.refit import refit as train_again

            metrics = train_again(refit, output, overwrite=overwrite, quiet=quiet, on_epoch=listener)
        elif config is None:
            metrics = session.resume(output, quiet=quiet, on_epoch=listener)
        else:
            metrics = session.train(config, output, overwrite=overwrite, quiet=quiet, on_epoch=listener)
    except KeyboardInterrupt:
        if not (output / "checkpoint.pt").is_file():
            raise KeyboardInterrupt("interrupted before training began; nothing was written") from None
        done = RunFolder(output).load_checkpoint()["epoch"]
        raise KeyboardInterrupt(
            f"interrupted; {output} holds the run after {done} epochs; continue it with: "
            f"recsys train --resume --output {output}"
        ) from None
    protocol = RunFolder(output).config().evaluation.describe()
    parts = {name: metrics[name] for name in ("validation", "test")}
    _print_metrics(parts, f"best epoch: {metrics['best_epoch']}; {protocol}")
    typer.echo(
        f"{metrics['parameters_stored']:,} parameters stored, {metrics['seconds']:.1f} s; see {output}"
    )


@app.command()
def sweep(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the runs and their table.")],
    preset: Preset = None,
    config_file: ConfigFile = None,
    dataset: DatasetName = None,
    data_dir: DataDir = None,
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

    def make_config(variation: Mapping[str, Any]) -> Config:
        return _config(preset, config_file, dataset, data_dir, None, overrides, variation=variation)

    title = preset or (config_file.stem if config_file else make_config({}).model.name)
    whole = run(
        make_config,
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
    table: Annotated[str, typer.Option(help="Table of results: main, or a .toml file of your own.")] = "main",
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
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Evaluate the best epoch of a run on its validation and test users."""
    from recsys.training.run_folder import RunFolder
    from recsys.training.session import evaluate_run

    _use_threads(threads)
    metrics = evaluate_run(run, None if data_dir is None else str(data_dir))
    _print_metrics(metrics, RunFolder(run).config().evaluation.describe())


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
    Console().print(*comparison.tables())
    try:
        if json_file is not None:
            json_file.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
        if plot is not None:
            save_plot(comparison, plot)
    except OSError as error:
        raise RecsysError(f"cannot write {error.filename}: {error.strerror}") from error


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved recommender.")],
    user: Annotated[str | None, typer.Option(help="Raw id of a user of the training data.")] = None,
    item: Annotated[
        list[str] | None, typer.Option(help="Raw id of an item chosen; repeat. In place of --user.")
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 10,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="Also what was chosen already.")
    ] = False,
) -> None:
    """Recommend items to a user by raw id, or to somebody new by the items they have chosen."""
    from recsys.recommender import SavedRecommender

    saved = SavedRecommender.load(run)
    found = saved.recommend(user, k=k, exclude_seen=not include_seen, items=item or None)
    for place, (raw, score) in enumerate(found, 1):
        typer.echo(f"{place:3d}  {raw}  {score:.4f}")


def _config(
    preset: str | None,
    path: Path | None,
    dataset: str | None,
    data_dir: Path | None,
    seed: int | None,
    overrides: list[str] | None,
    options: dict[str, Any] | None = None,
    variation: Mapping[str, Any] | None = None,
) -> Config:
    from recsys.config import load_config
    from recsys.data.formats import is_supported

    # Absolute: the settings are kept with the run, which may be evaluated from elsewhere.
    place = None if data_dir is None else str(data_dir.resolve())
    if dataset is not None and is_supported(dataset):
        dataset = str(Path(dataset).resolve())
    plain = {"data.name": dataset, "data.dir": place, "train.seed": seed, **(options or {})}
    return load_config(preset, path, overrides or [], plain, variation)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _print_epoch(record: dict[str, Any]) -> None:
    shown = [f"epoch {record['epoch']:4d}"]
    if "loss" in record:
        shown.append(f"loss {record['loss']:.4f}")
    shown += [f"{name} {value:.4f}" for name, value in record.get("validation", {}).items()]
    if "drop_fraction" in record:
        shown += [f"drop fraction {record['drop_fraction']:.3f}", f"ever active {record['ever_active']:.3f}"]
    typer.echo("  ".join([*shown, f"{record['seconds']:.1f} s"]))


def _print_metrics(metrics: dict[str, dict[str, float]], title: str) -> None:
    table = Table(title=title)
    metrics = {part: values for part, values in metrics.items() if values}
    table.add_column("")
    for part in metrics:
        table.add_column(part, justify="right")
    # Metrics down, parts across: with several cut-offs they would not fit the width of a terminal.
    for name in next(iter(metrics.values())):
        table.add_row(name, *(f"{values[name]:.4f}" for values in metrics.values()))
    Console().print(table)


def main() -> None:
    """Entry point of the `recsys` command."""
    app()


if __name__ == "__main__":
    main()
