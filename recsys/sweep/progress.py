"""How far a sweep is: bars on a terminal, a line for every run elsewhere."""

from __future__ import annotations

import math
import statistics
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from recsys.sweep.workers import Event, Task

__all__ = ["Display"]


class Display:
    """Shows the events of `recsys.sweep.workers.run_tasks` on standard error.

    Args:
        total: runs in all.
        ended: how many of them had ended before.
        quiet: show nothing but failures.
        jobs: runs at a time.

    From the first run that ends on, it says about how long the others will take: the mean so far, times the rounds of
    ``jobs`` that their number makes. Runs under way count whole, and resumed ones as long as the rest of them took.
    """

    def __init__(
        self, total: int, ended: int, quiet: bool = False, console: Console | None = None, jobs: int = 1
    ) -> None:
        self.console = Console(markup=False, stderr=True) if console is None else console
        self.total, self.ended, self.quiet = total, ended, quiet
        self._jobs, self._took = jobs, list[float]()
        self._bars = not quiet and self.console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=self.console,
            disable=not self._bars,
            transient=True,
        )
        self._whole = self._progress.add_task("runs", total=total, completed=ended, note="")
        self._rows: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}

    def __enter__(self) -> Self:
        if self.ended and not self.quiet:
            self._say(f"{self.ended} of {self.total} runs have ended already")
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        """Take an event."""
        name, task = event.task.folder.name, event.task
        if event.kind == "start":
            self._started[name] = time.monotonic()
            self._rows[name] = self._progress.add_task(name, total=_last_epoch(task), note="")
            if not self._bars and not self.quiet:
                self._say(f"{name}: begins")
        elif event.kind == "epoch":
            assert event.record is not None
            metric = task.config.train.metric
            value = event.record.get("validation", {}).get(metric)
            self._progress.update(self._rows[name], completed=event.record["epoch"])
            if value is not None:
                self._progress.update(self._rows[name], note=f"{metric} {value:.4f}")
        else:
            self.ended += 1
            self._progress.remove_task(self._rows.pop(name))
            self._progress.update(self._whole, completed=self.ended)
            seconds = time.monotonic() - self._started.pop(name)
            if event.failure is not None:
                self._say(f"{name}: failed after {seconds:.0f} s: {event.failure.reason}")
            elif not self.quiet:
                self._took.append(seconds)
                self._say(f"{name}: ended after {seconds:.0f} s ({self.ended} of {self.total}){self._rest()}")

    def _rest(self) -> str:
        """About how long what is left will take, as if all runs took as long; sparse and dense ones do not."""
        left = self.total - self.ended
        if not left:
            return ""
        rounds = math.ceil(left / self._jobs)
        return f"; about {_duration(rounds * statistics.mean(self._took))} for the other {left}"

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def _duration(seconds: float) -> str:
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def _last_epoch(task: Task) -> int:
    return task.config.train.stop_epoch or task.config.train.epochs
