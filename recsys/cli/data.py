"""`recsys data`: what there is to train on, how to get it, what it looks like."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
from rich.table import Table

from recsys.cli.app import DataDir, make_config

if TYPE_CHECKING:
    from recsys.data.download import Source

__all__ = ["data_app"]

data_app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="List, prepare and describe datasets."
)

Text = str | None


def _option(help: str, **more: Any) -> Any:
    return typer.Option(help=help, **more)


@data_app.command("list")
def list_datasets(data_dir: DataDir = None) -> None:
    """Names that --dataset takes, those that can be downloaded with `recsys data prepare`, and those that cannot."""
    from recsys.data import available
    from recsys.data.download import ORIGINS, SOURCES
    from recsys.errors import DataError

    try:
        names = available(data_dir)
    except DataError as error:  # of the variable: no data yet, which this list is asked for
        if data_dir is not None:
            raise
        typer.echo(f"{error}; make it, or download into it:", err=True)
        names = ["synthetic"]
    typer.echo("To train on:")
    for name in names:
        typer.echo(f"  {name}")
    typer.echo("To download (recsys data prepare NAME --output FOLDER):")
    for name, source in SOURCES.items():
        typer.echo(f"  {name}  {source.url}\n      {source.terms}")
    missing = {name: origin for name, origin in ORIGINS.items() if name not in names}
    if missing:
        typer.echo("Of presets, to be brought into --data-dir (DIR/NAME/train.txt, ...); mind their terms:")
    for name, origin in missing.items():
        typer.echo(f"  {name}  {origin}")


@data_app.command()
def prepare(
    source: Annotated[
        str, typer.Argument(help="A file, a folder, or a name of `recsys data list` to download.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    user_column: Annotated[Text, _option("Name in the header, or place from 1 without one.")] = None,
    item_column: Annotated[Text, _option("Likewise.")] = None,
    rating_column: Annotated[Text, _option("Likewise.")] = None,
    timestamp_column: Annotated[Text, _option("Likewise.")] = None,
    separator: Annotated[Text, _option("Between two fields; \\t is a tab.")] = None,
    header: Annotated[bool | None, typer.Option("--header/--no-header", help="Whether there is one.")] = None,
    ids: Annotated[Text, _option("auto, any or text: whether ids are numbers.")] = None,
    order: Annotated[Text, _option("time or file: what histories are ordered by.")] = None,
    min_rating: Annotated[float | None, _option("Leave out rows with a lower rating.")] = None,
    min_user: Annotated[int | None, _option("k-core: least interactions of a user.", min=0)] = None,
    min_item: Annotated[int | None, _option("k-core: least interactions of an item.", min=0)] = None,
    split: Annotated[Text, _option("ratio, heldout, loo or temporal.")] = None,
    validation: Annotated[float | None, _option("Fraction; with loo, 0 for none.")] = None,
    test: Annotated[float | None, _option("Likewise.")] = None,
    fold_in: Annotated[float | None, _option("heldout: fraction of a history that is shown.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    archive: Annotated[
        Path | None, _option("A download's file that was fetched elsewhere, in place of the connection.")
    ] = None,
    sha256: Annotated[Text, _option("Checksum that a download must have.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the dataset in --output.")] = False,
) -> None:
    """Convert a file or folder, or a download, to a folder that loads at once: split, with raw ids."""
    from recsys.data.prepare import check_free
    from recsys.data.prepare import prepare as convert
    from recsys.errors import ConfigError

    options: dict[str, Any] = {
        "user_column": user_column,
        "item_column": item_column,
        "rating_column": rating_column,
        "timestamp_column": timestamp_column,
        "separator": None if separator is None else separator.replace("\\t", "\t"),
        "header": header,
        "ids": ids,
        "order": order,
        "min_rating": min_rating,
        "min_user": min_user,
        "min_item": min_item,
        "split": split,
        "validation": validation,
        "test": test,
        "fold_in": fold_in,
    }
    check_free(output, overwrite)
    if os.path.exists(source):
        for name, given in (("--sha256", sha256), ("--archive", archive)):
            if given is not None:
                raise ConfigError(f"{name} is of a download; the source is a file or folder here")
        dataset = convert(source, output, seed, overwrite, **options)
    else:
        dataset = _download(source, output, seed, overwrite, archive, sha256, options)
    _print(_statistics(dataset))
    where = output.resolve()
    typer.echo(f"written: {output}; train on it with --data-dir {where.parent} --dataset {where.name}")


def _download(
    name: str,
    output: Path,
    seed: int,
    overwrite: bool,
    archive: Path | None,
    sha256: str | None,
    options: dict[str, Any],
) -> Any:
    import difflib

    from recsys.data.download import ORIGINS, SOURCES, unpack, verify
    from recsys.data.prepare import prepare as convert
    from recsys.errors import DataError

    if name in ORIGINS and name not in SOURCES:
        raise DataError(
            f"{name!r} cannot be downloaded here and is no file or folder: it is {ORIGINS[name]}; bring the files into "
            f"DIR/{name} and give --data-dir DIR, or give their folder here to convert it"
        )
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1, cutoff=0.0)[0]
        raise DataError(
            f"{name!r} is neither a file or folder nor a dataset to download; of those the nearest is {near!r}, all "
            f"are: {', '.join(SOURCES)}"
        )
    source = SOURCES[name]
    typer.echo(f"{source.url}\n{source.terms}")
    with tempfile.TemporaryDirectory() as temporary:
        if archive is None:
            archive = Path(temporary) / Path(source.url).name
            found = _fetch(name, source, archive, sha256)
        else:
            found = verify(archive, source.md5, sha256)
        if source.md5 is None and sha256 is None:
            typer.echo(
                f"unverified: its owner publishes no checksum; sha256 {found} (give it as --sha256 the next time)",
                err=True,
            )
        file = unpack(archive, source.member, Path(temporary))
        given = {key: value for key, value in options.items() if value is not None}
        origin = f"{source.url} sha256 {found}"
        return convert(file, output, seed, overwrite, origin, **{**source.options, **given})


def _fetch(name: str, source: Source, archive: Path, sha256: str | None) -> str:
    from recsys.data.download import fetch

    console = Console(markup=False, stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name)

        def progress(done: int, total: int | None) -> None:
            bar.update(task, completed=done, total=total)

        return fetch(source.url, archive, source.md5, sha256, on_bytes=progress)


@data_app.command()
def stats(
    dataset: Annotated[str, typer.Argument(help="A name of `recsys data list`, or a file or folder.")],
    data_dir: DataDir = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the split.")] = 0,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="data.options.KEY=VALUE", help="How to read and split it, as for recsys train."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Sizes, quantiles of the activity of users and items, and how uneven popularity is (Gini)."""
    from recsys.errors import ConfigError
    from recsys.training.session import load_dataset

    for text in overrides or []:
        if not text.startswith("data.options."):
            raise ConfigError(f"--set expects data.options.KEY=VALUE here, got {text!r}")
    config = make_config(None, None, dataset, data_dir, None, overrides, {"data.seed": seed})
    found = _statistics(load_dataset(config))
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _print(found)


def _statistics(dataset: Any) -> dict[str, Any]:
    from recsys.data.statistics import statistics

    return statistics(dataset)


def _print(found: dict[str, Any]) -> None:
    console = Console(markup=False, file=sys.stdout)
    table = Table(title=str(found["name"]), show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for key, value in found.items():
        if key in ("name", "notes") or isinstance(value, dict):
            continue
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        table.add_row(key.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else shown)
    console.print(table)
    quantiles = found["interactions_per_user"]
    table = Table(title="interactions in train, by quantile")
    table.add_column("of")
    for quantile in quantiles:
        table.add_column(
            {"0": "least", "0.5": "median", "1": "most"}.get(quantile, quantile), justify="right"
        )
    for of in ("user", "item"):
        table.add_row(
            f"a{'n' * (of == 'item')} {of}", *(f"{v:,.0f}" for v in found[f"interactions_per_{of}"].values())
        )
    console.print(table)
    for note in found["notes"]:
        console.print(f"note: {note}", highlight=False)
