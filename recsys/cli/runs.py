"""Commands about one run: quickstart, train, evaluate, recommend."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from recsys.cli.app import (
    ConfigFile,
    DataDir,
    DatasetName,
    DensityOption,
    Device,
    Epochs,
    Method,
    Model,
    Output,
    Overrides,
    Overwrite,
    Preset,
    Quiet,
    Seed,
    Threads,
    app,
    make_config,
    use_threads,
)

if TYPE_CHECKING:
    from recsys.config import Config
    from recsys.recommender import SavedRecommender

_NAMED = 3  # users who are unknown
_AT_A_TIME = 4096  # users whose recommendations are printed at once


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
    """Train MultVAE dense, masked and sparse, and compare them in one table; at most two minutes on two cores."""
    config = make_config("quickstart", None, dataset, data_dir, seed, overrides)
    from recsys.quickstart import run

    use_threads(threads)
    run(config, output=output, overwrite=overwrite, quiet=quiet, timing_seconds=timing)


@app.command()
def train(
    preset: Preset = None,
    config_file: ConfigFile = None,
    dataset: DatasetName = None,
    data_dir: DataDir = None,
    model: Model = None,
    method: Method = None,
    density: DensityOption = None,
    epochs: Epochs = None,
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
    everything: Annotated[
        bool, typer.Option("--everything", help="With --refit: on test, too, to serve; nothing is measured.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also log to tensorboard/ in the run's folder.")
    ] = False,
    device: Device = None,
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
        "train.device": device,
    }
    given = [preset, config_file, dataset, data_dir, seed, overrides, *plain.values()]
    config = None
    if everything and refit is None:
        raise ConfigError("--everything trains the model of a finished run once more: expected --refit RUN")
    if refit is not None:
        others = [value for value in given if value is not data_dir]
        if output is None or resume or any(value is not None for value in others):
            raise ConfigError(
                "--refit takes the settings of the run that it names; expected --output, --data-dir if the data has "
                "moved, and no other setting"
            )
    elif resume:
        others = [value for value in given if value is not data_dir and value is not device]
        if output is None or overwrite or any(value is not None for value in others):
            raise ConfigError(
                "--resume takes the run from --output with the settings it was started with; "
                "expected --output, --data-dir if the data has moved, --device if another is to go on, "
                "and no other setting"
            )
    else:
        config = make_config(preset, config_file, dataset, data_dir, seed, overrides, plain)
        if output is None:
            place = Path(config.data.name)
            short = place.name.partition(".")[0] if place.is_absolute() else config.data.name
            name = f"{short}-{config.model.name}-{config.sparsity.method}-seed{config.train.seed}"
            output = Path("runs") / name.replace("/", "-")
    from recsys.training import session
    from recsys.training.run_folder import RunFolder

    use_threads(threads)
    if config is not None and not quiet:
        typer.echo(f"{_describe(config)} -> {output}")
    listener = None if quiet else _print_epoch
    moved = None if data_dir is None else str(data_dir.resolve())
    try:
        if refit is not None:
            from recsys.training.refit import refit as train_again

            metrics = train_again(
                refit,
                output,
                everything=everything,
                data_dir=moved,
                overwrite=overwrite,
                quiet=quiet,
                on_epoch=listener,
            )
        elif config is None:
            metrics = session.resume(output, data_dir=moved, device=device, quiet=quiet, on_epoch=listener)
        else:
            session.expect_place(config, output, overwrite)
            _tell_left_options(preset, config)
            data = session.load_dataset(config)
            if not quiet:  # before hours are spent on them
                typer.echo(
                    f"data: {data.n_users:,} users, {data.n_items:,} items, {data.train.nnz:,} interactions to train on"
                )
                _print_notes(data.notes)
            metrics = session.train(
                config, output, overwrite=overwrite, dataset=data, quiet=quiet, on_epoch=listener
            )
    except KeyboardInterrupt:
        begun = (output / "checkpoint.pt").is_file()
        if config is not None and begun:  # what lies there may be a run that was to be overwritten
            begun = RunFolder(output).config().hash == config.hash
        if not begun:
            raise KeyboardInterrupt("interrupted before training began; nothing was written") from None
        done = RunFolder(output).load_checkpoint()["epoch"]
        raise KeyboardInterrupt(
            f"interrupted; {output} holds the run after {done} epoch{'s' * (done != 1)}; continue it with: "
            f"recsys train --resume --output {output}"
        ) from None
    protocol = RunFolder(output).config().evaluation.describe()
    if config is None and not quiet:
        _print_notes(metrics["dataset"]["notes"])
    parts = {name: metrics[name] for name in ("validation", "test")}
    if any(parts.values()):
        _print_metrics(parts, f"best epoch: {metrics['best_epoch']}; {protocol}")
    else:
        typer.echo(f"trained on everything for {metrics['epochs']} epochs: nobody is left to measure it on")
    fewer = metrics["users"]["test"].get("fewer_candidates")
    if fewer and not quiet:
        typer.echo(f"evaluation: {fewer} test users are ranked for among fewer items than was asked for")
    typer.echo(
        f"{metrics['parameters_stored']:,} parameters stored, {metrics['seconds']:.1f} s; see {output}"
    )


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    data_dir: DataDir = None,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Evaluate the best epoch of a run on its validation and test users."""
    from recsys.training.run_folder import RunFolder
    from recsys.training.session import evaluate_run

    use_threads(threads)
    metrics = evaluate_run(run, None if data_dir is None else str(data_dir), device)
    _print_metrics(metrics, RunFolder(run).config().evaluation.describe())
    if not metrics["test"]:
        typer.echo("the run has not ended: test users are scored once, at its end (recsys train --resume)")


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="Folder of a run, or of a saved recommender.")],
    user: Annotated[str | None, typer.Option(help="Raw id of a user of the training data.")] = None,
    item: Annotated[
        list[str] | None, typer.Option(help="Raw id of an item chosen; repeat. In place of --user.")
    ] = None,
    users: Annotated[
        Path | None,
        typer.Option(
            help="File of raw ids, one a line, in place of --user; - is standard input. Prints csv."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="How many.")] = 10,
    include_seen: Annotated[
        bool, typer.Option("--include-seen", help="Also what was chosen already.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: cpu, cuda or cuda:N. Default: cpu.")
    ] = None,
) -> None:
    """Recommend items to a user by raw id, to many, or to somebody new by the items they have chosen."""
    from recsys.errors import ConfigError
    from recsys.recommender import SavedRecommender

    if users is not None and (user is not None or item):
        raise ConfigError("expected one of --user, --users and --item")
    asked = None if users is None else _lines(users)
    saved = SavedRecommender.load(run, device or "cpu")
    if asked is not None:
        _recommend_many(saved, asked, k, not include_seen)
        return
    found = saved.recommend(user, k=k, exclude_seen=not include_seen, items=item or None)
    for place, (raw, score) in enumerate(found, 1):
        typer.echo(f"{place:3d}  {raw}  {score:.4f}")


def _lines(file: Path) -> list[str]:
    from recsys.errors import DataError

    try:
        text = sys.stdin.read() if str(file) == "-" else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--users {file}: expected a text file of raw ids, one a line: {error}") from error
    return list(dict.fromkeys(line for line in text.splitlines() if line))


def _recommend_many(saved: SavedRecommender, users: list[str], k: int, exclude_seen: bool) -> None:
    """Print user, rank, item, score for everybody; who is not known is told of on standard error."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["user", "rank", "item", "score"])
    known, unknown = 0, list[str]()
    for start in range(0, len(users), _AT_A_TIME):
        part = [user if saved.knows(user) else user.strip() for user in users[start : start + _AT_A_TIME]]
        found = saved.recommend_many(part, k, exclude_seen, skip_unknown=True)
        known += len(found)
        unknown += [user for user in part if user not in found][: _NAMED - len(unknown)]
        for user, best in found.items():
            writer.writerows([user, rank, item, f"{score:.6g}"] for rank, (item, score) in enumerate(best, 1))
    if known < len(users):
        typer.echo(
            f"{len(users) - known} of {len(users)} users are unknown, or have chosen nothing, such as "
            f"{', '.join(unknown)}",
            err=True,
        )


def _tell_left_options(preset: str | None, config: Config) -> None:
    """What a preset has set for its own data is not for another's, see `load_config`."""
    from recsys.config import load_config

    left = {} if preset is None else load_config(preset).data.options
    if left and not left.items() <= config.data.options.items():
        typer.echo(
            f"the preset's options for its own data, {left}, are not taken for {config.data.name}: give what is meant "
            "for it by --set data.options.KEY=VALUE",
            err=True,
        )


def _print_notes(notes: Iterable[str]) -> None:
    for note in notes:
        typer.echo(f"data: {note}")


def _describe(config: Config) -> str:
    """What is about to be trained, in a line."""
    sparsity, train = config.sparsity, config.train
    method = sparsity.method if sparsity.method == "dense" else f"{sparsity.method} {sparsity.density:g}"
    return f"{config.model.name} on {config.data.name}, {method}, at most {train.epochs} epochs, seed {train.seed}"


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
    Console(markup=False).print(table)
