"""`recsys reproduce`: every run of a table, then its costs, then its page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from recsys.config import Config, load_config, presets
from recsys.data import available
from recsys.errors import ConfigError
from recsys.models.settings import FittedConfig
from recsys.reproduce.definition import PartRow, TableDefinition, TableRow, load_published, load_table
from recsys.reproduce.measure import measure_cells
from recsys.reproduce.page import Section, table_page
from recsys.results import save_results
from recsys.sweep.command import print_failures, train_all
from recsys.sweep.engine import Plan, threads_for
from recsys.sweep.grid import Cell, make_grid
from recsys.sweep.summary import shown_metrics, summarise

__all__ = ["reproduce"]


def reproduce(
    name: str,
    output: Path,
    runs: Path,
    *,
    only: str | None = None,
    epochs: int | None = None,
    seeds: int | None = None,
    jobs: int = 1,
    threads: int | None = None,
    timing: float = 20.0,
    data_dir: str | None = None,
    overrides: Sequence[str] = (),
    quiet: bool = False,
) -> bool:
    """Train what a table is made of, measure costs, write ``OUTPUT.json`` and ``OUTPUT.md``; whether no run failed.

    Rows whose preset or data set is not there are left out, and the page says so. The same call continues an
    interrupted one. Costs are measured when no run is going any more.

    Args:
        name: of a table of the package, or path of a .toml file.
        output: path of the page without suffix.
        runs: folder for the runs, a folder for each preset in it.
        only: regular expression; cells whose "preset method density=..." it does not find are left out.
        epochs: in place of the presets'; the page says so.
        seeds: in place of the table's.
        jobs, threads: runs at a time, and threads of each.
        timing: seconds to measure each density of a row for; 0 measures no cost.
        data_dir, overrides: as in `recsys.config.load_config`, for every run.
        quiet: no progress.

    Raises:
        RecsysError: a table or settings that are not valid.
        KeyboardInterrupt: on Ctrl-C.
    """
    table = load_table(name)
    changed: dict[str, Any] = {"epochs": epochs, "seeds": seeds}
    table = table.model_copy(update={key: value for key, value in changed.items() if value is not None})
    pattern = _pattern(only)
    work, notes = [], []
    for row in table.rows:
        if only and not _chosen(table, row, pattern):
            continue  # settings that are meant for the chosen rows need not be valid for others
        missing = _missing(table, row, data_dir, overrides)
        if missing is not None:
            notes.append(missing)
            continue
        cells = [
            cell
            for cell in _cells(table, row, data_dir, overrides)
            if pattern.search(f"{row.preset} {cell.name}")
        ]
        if cells:
            work.append((row, cells))
    say = Console(markup=False, stderr=True)
    for note in notes:
        say.print(note, highlight=False, soft_wrap=True)
    if not work:
        why = [f"--only {only!r} is in none of them (such as 'cdae-ml-1m dsl density=0.5')"] if only else []
        raise ConfigError(f"no run of the table {name!r} is left: {'; '.join([*why, *notes])}")
    # All of them, before hours are spent on the first.
    parts = [_parts(table, row, cells, data_dir, overrides) for row, cells in work]
    work = [(row, _begun_with(own, cells, runs)) for (row, cells), own in zip(work, parts, strict=True)]
    plans = [Plan.of(cells, runs / row.preset) for row, cells in work]
    plans += [Plan.of(cells, runs / preset) for own in parts for preset, cells in own.values()]
    if not quiet:
        # Parts may be those of several rows, or a row of their own.
        total, left = (
            len({plan.place(cell) for plan in plans for cell in some(plan)})
            for some in (lambda plan: plan.cells, lambda plan: plan.open)
        )
        say.print(
            f"{total} trainings in {len(work)} row{'s' * (len(work) > 1)}, {left} of them to be done; fewer by "
            f"--only REGEX (such as --only '^{work[0][0].preset} ') and --seeds N, shorter by --epochs N",
            highlight=False,
            soft_wrap=True,
        )
    sections: list[Section] = []
    for (row, cells), own in zip(work, parts, strict=True):
        for preset, first in own.values():
            if not quiet:
                say.print(f"{row.preset}: begins with {len(first)} runs of {preset}", highlight=False)
            print_failures(train_all(first, runs / preset, jobs, threads or threads_for(jobs), quiet))
        if not quiet:
            say.print(f"{row.preset}: {len(cells)} runs", highlight=False)
        outcome = train_all(cells, runs / row.preset, jobs, threads or threads_for(jobs), quiet)
        print_failures(outcome)
        config = cells[0].config
        summary = summarise(outcome.runs)
        asked = row.metrics or table.metrics
        sections.append(
            {
                "preset": row.preset,
                "set": row.set,
                "pretrained": {name: part.model_dump(mode="json") for name, part in row.pretrained.items()},
                "config": config,
                "metrics": [metric for metric in asked if summary and metric in summary[0]["test"]]
                or shown_metrics(summary, config.train.metric),
                "summary": summary,
                "cost": {},
                "runs": outcome.runs,
                "failed": outcome.failed,
                "dataset": outcome.runs[0]["dataset"] if outcome.runs else None,
            }
        )
    if timing > 0:
        for (row, cells), section in zip(work, sections, strict=True):
            if not quiet:
                say.print(f"{row.preset}: measuring steps and recommendations", highlight=False)
            section["cost"] = _cost(cells, runs / row.preset, timing)
    lines = table_page(table, load_published(), sections, notes)
    if timing > 0:
        lines += [
            "",
            f"Threads when costs were measured: {torch.get_num_threads()}; times are in turns with dense.",
        ]
    document = {
        "table": table.model_dump(mode="json"),
        "only": only,
        "timing_threads": torch.get_num_threads(),
        "sections": [{**section, "config": _plain(section["config"])} for section in sections],
        "left_out": notes,
    }
    save_results(output, "recsys", lines, document)
    Console(markup=False).print(f"The table is in {output}.md.", highlight=False, soft_wrap=True)
    return not any(section["failed"] for section in sections)


def _pattern(only: str | None) -> re.Pattern[str]:
    try:
        return re.compile(only or "")
    except re.error as error:
        raise ConfigError(f"--only {only!r} is not a regular expression: {error}") from error


def _chosen(table: TableDefinition, row: TableRow, pattern: re.Pattern[str]) -> bool:
    """Whether the pattern is in any of the row's runs, or in the name of a preset that does not exist."""
    if row.preset not in presets():
        return pattern.search(row.preset) is not None
    cells = _cells(table.model_copy(update={"seeds": 1}), row, None, ())
    return any(pattern.search(f"{row.preset} {cell.name}") for cell in cells)


def _missing(
    table: TableDefinition, row: TableRow, data_dir: str | None, overrides: Sequence[str]
) -> str | None:
    """Why a row cannot be, or None."""
    for preset in (row.preset, *(part.preset for part in row.pretrained.values())):
        if preset not in presets():
            return (
                f"{row.preset}: there is no {'such preset' if preset == row.preset else f'preset {preset}'}"
            )
    data = _cells(table.model_copy(update={"seeds": 1}), row, data_dir, overrides)[0].config.data
    dataset = data.name
    if dataset not in available(data.dir) and not Path(dataset).exists():
        return f"{row.preset}: the data set {dataset} was not found (--data-dir, SPARSECORE_DATA)"
    return None


def _cells(
    table: TableDefinition, row: PartRow, data_dir: str | None, overrides: Sequence[str]
) -> list[Cell]:
    options = row.set if data_dir is None else {**row.set, "data.dir": data_dir}
    shorter = {"train.epochs": table.epochs} if table.epochs else {}

    def make_config(variation: Mapping[str, Any]) -> Config:
        return load_config(
            row.preset, overrides=overrides, options=options, variation={**shorter, **variation}
        )

    axes: list[tuple[str, list[Any]]] = [
        ("sparsity.method", list(table.methods)),
        ("sparsity.density", list(table.densities)),
    ]
    # What is fitted at once draws nothing at random: further seeds would repeat it.
    fitted = isinstance(make_config({}).model, FittedConfig)
    return make_grid(make_config, axes, 1 if fitted else table.seeds).cells


def _parts(
    table: TableDefinition,
    row: TableRow,
    cells: Sequence[Cell],
    data_dir: str | None,
    overrides: Sequence[str],
) -> dict[str, tuple[str, list[Cell]]]:
    """The runs that those of a row take weights from: {part: (preset, one run for each of `cells`)}."""
    found = {}
    for name, part in row.pretrained.items():
        own = {(cell.name, cell.seed): cell for cell in _cells(table, part, data_dir, overrides)}
        found[name] = part.preset, [own[cell.name, cell.seed] for cell in cells]
    return found


def _begun_with(
    parts: Mapping[str, tuple[str, Sequence[Cell]]], cells: Sequence[Cell], runs: Path
) -> list[Cell]:
    """The cells, each with its parts as `train.pretrained`."""
    folders: list[dict[str, str]] = [{} for _ in cells]
    for name, (preset, own) in parts.items():
        plan = Plan.of(own, runs / preset)
        for one, cell in zip(folders, own, strict=True):
            one[name] = str(plan.place(cell).resolve())
    return [
        replace(cell, config=cell.config.replace(train={"pretrained": one})) if one else cell
        for cell, one in zip(cells, folders, strict=True)
    ]


def _cost(cells: Sequence[Cell], folder: Path, seconds: float) -> dict[str, Any]:
    """Of the first seed of each cell that has ended; nothing of models that take no steps."""
    if isinstance(cells[0].config.model, FittedConfig):
        return {}
    plan = Plan.of(cells, folder)
    first: dict[str, tuple[Config, Path]] = {}
    for cell in cells:
        if plan.metrics(cell) is not None:
            first.setdefault(cell.name, (cell.config, plan.place(cell)))
    return measure_cells(first, seconds) if first else {}


def _plain(config: Config) -> dict[str, Any]:
    tree = config.to_dict()
    tree["data"].pop("dir", None)
    tree["train"].pop("pretrained")  # folders; what they hold is in the row
    return tree
