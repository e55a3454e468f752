"""The command line. It imports nothing heavy before a command needs it: `recsys --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from typer.core import TyperGroup

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
    preset: Annotated[str | None, typer.Option(help="Settings that come with recsys.")] = None,
    config_file: Annotated[Path | None, typer.Option("--config", help="TOML file of settings.")] = None,
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
    }
    if resume:
        given = [preset, config_file, dataset, data_dir, seed, overrides, *plain.values()]
        if output is None or overwrite or any(value is not None for value in given):
            raise ConfigError(
                "--resume takes the run from --output with the settings it was started with; "
                "expected --output and no other setting"
            )
        config = None
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
        if config is None:
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
    _print_metrics({name: metrics[name] for name in ("validation", "test")}, metrics["best_epoch"])
    typer.echo(
        f"{metrics['parameters_stored']:,} parameters stored, {metrics['seconds']:.1f} s; see {output}"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data_dir: DataDir = None,
    threads: Threads = None,
) -> None:
    """Evaluate the best epoch of a run on its validation and test users."""
    from recsys.training.session import evaluate_run

    _use_threads(threads)
    _print_metrics(evaluate_run(run, None if data_dir is None else str(data_dir)))


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
) -> Config:
    from recsys.config import load_config

    # Absolute: the settings are kept with the run, which may be evaluated from elsewhere.
    place = None if data_dir is None else str(data_dir.resolve())
    if dataset is not None and dataset.endswith((".csv", ".csv.gz", ".npz")):
        dataset = str(Path(dataset).resolve())
    plain = {"data.name": dataset, "data.dir": place, "train.seed": seed, **(options or {})}
    return load_config(preset, path, overrides or [], plain)


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


def _print_metrics(metrics: dict[str, dict[str, float]], best_epoch: int | None = None) -> None:
    table = Table(title=None if best_epoch is None else f"best epoch: {best_epoch}")
    metrics = {part: values for part, values in metrics.items() if values}
    names = list(next(iter(metrics.values())))
    table.add_column("")
    for name in names:
        table.add_column(name, justify="right")
    for part, values in metrics.items():
        table.add_row(part, *(f"{values[name]:.4f}" for name in names))
    Console().print(table)


def main() -> None:
    """Entry point of the `recsys` command."""
    app()


if __name__ == "__main__":
    main()
