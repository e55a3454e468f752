"""From cells to their metrics: what has ended is read, what was interrupted continued, the rest trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.errors import ConfigError, DataError, OutputExistsError, RecsysError
from recsys.files import writing
from recsys.machine import usable_cores
from recsys.sweep.grid import Cell
from recsys.sweep.workers import Event, Task, run_tasks
from recsys.training import session
from recsys.training.run_folder import RunFolder

__all__ = ["Outcome", "Plan", "run_cells", "threads_for"]

KEPT = (
    "dataset",
    "split",
    "test",
    "validation",
    "best_epoch",
    "epochs",
    "steps",
    "seconds",
    "parameters_stored",
    "nnz",
    "resident_bytes",
    "config_hash",
)
KEPT_IF_THERE = ("macs_per_step",)  # runs of older versions do without


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to.

    Attributes:
        runs: one for each cell that has ended, in the order of the cells: cell, seed, settings, folder and what
            metrics.json says.
        failed: one for each that has not: cell, seed, folder, error, traceback.
    """

    runs: list[dict[str, Any]]
    failed: list[dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """Where the cells' runs are in a folder, and which of them have yet to be trained.

    Raises:
        OutputExistsError: a cell's folder is there, but holds something else.
        RecsysError: nothing can be written in `folder`, or there is nothing to measure.
    """

    folder: Path
    cells: Sequence[Cell]
    places: dict[str, Path]  # by hash of the settings

    @classmethod
    def of(cls, cells: Sequence[Cell], folder: Path) -> Plan:
        found = _runs_by_hash(folder)
        places = {}
        for cell in cells:
            if cell.config.data.everything:
                raise ConfigError("a sweep measures on test: expected data.everything=false")
            place = found.get(cell.config.hash)
            if place is None:
                place = folder / cell.folder
                if place.is_dir() and (place / "config.toml").is_file():
                    raise OutputExistsError(
                        f"{place} holds a run of other settings than its name says; "
                        "choose another --output, or delete it"
                    )
                RunFolder.check_free(place)
            places[cell.config.hash] = place
        return cls(folder, cells, places)

    def place(self, cell: Cell) -> Path:
        return self.places[cell.config.hash]

    def metrics(self, cell: Cell) -> dict[str, Any] | None:
        """What the run of a cell came to, or None if it has not ended."""
        return RunFolder(self.place(cell)).metrics()

    @property
    def open(self) -> list[Cell]:
        """Cells whose runs have not ended."""
        return [cell for cell in self.cells if self.metrics(cell) is None]

    def expect_one_split(self) -> None:
        """Refuse runs that have ended on other data than those beside them, or than the rest would be trained on.

        Runs that have begun check that themselves.

        Raises:
            DataError: a file has changed since.
        """
        ended: dict[str, tuple[str, Path]] = {}
        for cell in self.cells:
            split = (self.metrics(cell) or {}).get("split")
            if split is None:
                continue
            first, place = ended.setdefault(_data_of(cell), (split, self.place(cell)))
            if split != first:
                raise DataError(
                    f"{place} and {self.place(cell)} were trained on different data (splits {first} and {split}), "
                    "although with the same settings: delete the one whose data is no more, to train it again"
                )
        # The data as it is now is looked at where some are to be trained on it, or where it has another place.
        open_or_moved = {
            _data_of(cell): cell
            for cell in self.cells
            if self.metrics(cell) is None or RunFolder(self.place(cell)).config().data != cell.config.data
        }
        for data, cell in open_or_moved.items():
            if data in ended:
                split, place = ended[data]
                session.load_dataset(cell.config).expect(split, str(place))


def threads_for(jobs: int) -> int:
    """Threads of each of some runs at a time, so that together they use the cores that we may use."""
    return max(1, usable_cores() // jobs)


def run_cells(
    cells: Sequence[Cell],
    folder: Path,
    *,
    jobs: int = 1,
    threads: int | None = None,
    on_event: Callable[[Event], object] = lambda event: None,
) -> Outcome:
    """Train every cell in a folder of its own within `folder`, as far as that has not been done.

    Args:
        cells: of one or several grids.
        folder: made if it is not there.
        jobs: runs at a time.
        threads: CPU threads of each; None shares out the cores.
        on_event: is called with what happens.

    Raises:
        OutputExistsError: a folder holds a run of other settings; nothing was trained then.
        DataError: see `Plan.expect_one_split`; nothing was trained then.
        KeyboardInterrupt: on Ctrl-C, after all workers have ended. The same call continues.
    """
    plan = Plan.of(cells, folder)
    plan.expect_one_split()
    tasks = [Task(cell.config, plan.place(cell)) for cell in plan.open]
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    failures = run_tasks(tasks, jobs, threads or threads_for(jobs), on_event)
    runs, failed = [], []
    for cell in cells:
        place = plan.place(cell)
        known = {"cell": cell.name, "seed": cell.seed, "settings": cell.settings, "folder": place.name}
        metrics = plan.metrics(cell)
        if metrics is not None:
            missing = [key for key in KEPT if key not in metrics]
            if missing:
                raise RecsysError(
                    f"{place} was made by an older version, without {', '.join(missing)}; delete it to train it again"
                )
            runs.append({**known, **{key: metrics[key] for key in (*KEPT, *KEPT_IF_THERE) if key in metrics}})
        else:
            failure = failures[place]
            failed.append({**known, "error": failure.reason, "traceback": failure.trace})
    return Outcome(runs, failed)


def _data_of(cell: Cell) -> str:
    """The settings of its data, wherever that lies."""
    return json.dumps({**cell.config.to_dict()["data"], "dir": ""}, sort_keys=True)


def _runs_by_hash(folder: Path) -> dict[str, Path]:
    """Runs that are there, by what their settings are now: a later version may have further settings, at their
    defaults.
    """
    found: dict[str, Path] = {}
    for file in sorted(folder.glob("[!.]*/config.toml")):  # with a dot: cut off while it was made
        try:
            found[RunFolder(file.parent).config().hash] = file.parent
        except RecsysError:  # of a version that knew other settings
            continue
    return found
