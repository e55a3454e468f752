"""Measures commits and keeps the figures: the working tree's commit, or past ones."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from harness.history.identity import identify
from harness.history.writer import HistoryError, discover, held, results_file, set_aside, write_run
from harness.revisions.collect import Outcome, collect
from harness.revisions.subject import GitError, Subject, commit_of, git
from harness.suite.workload import Workload

__all__ = ["RESULTS", "Kept", "commits_between", "measure_commit"]

RESULTS = Path(".asv/results")
BENCHMARKS = Path("benchmarks/benchmarks")


@dataclass(frozen=True)
class Kept:
    """What was measured of a commit, and where it is kept (None: nowhere)."""

    subject: Subject
    outcomes: dict[str, Outcome]
    path: Path | None
    seconds: float

    @property
    def failed(self) -> list[str]:
        """Names of workloads that failed."""
        return [name for name, outcome in self.outcomes.items() if outcome.error is not None]


def measure_commit(
    root: Path,
    subject: Subject,
    workloads: Sequence[Workload],
    *,
    seconds: float,
    threads: int,
    keep: bool = True,
    console: Console | None = None,
) -> Kept:
    """Measure workloads of a subject, with a bar that tells the time left, and keep the figures under its commit.

    An interrupt keeps what was measured until then, and goes on; a figure that was not measured now stays what it was.
    What could keep the figures from being written is looked at before they are measured; a damaged file of this commit
    is renamed, and told of.

    Raises:
        HistoryError: a bench file does not import, or results cannot be written.
    """
    console = console or Console(markup=False, stderr=True)
    begun, identity, benchmarks = time.perf_counter(), identify(threads), {}
    if keep:
        benchmarks = discover(root / BENCHMARKS)
        for folder in (root / RESULTS, root / RESULTS / identity.name):
            _expect_writable(folder)
        _make_way(results_file(root / RESULTS, subject.revision, identity), console)
    names = [workload.name for workload in workloads]
    outcomes: dict[str, Outcome] = {}
    try:
        with _bar(console, subject.label, len(names)) as advance:
            for part in _parts(names):
                outcomes |= collect(
                    subject, part, seconds=seconds, threads=threads, progress=advance, into=outcomes
                )
    finally:
        path = None
        if keep and outcomes:
            path = write_run(root / RESULTS, root, subject.revision, identity, benchmarks, outcomes)
    return Kept(subject, outcomes, path, time.perf_counter() - begun)


def _expect_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".new-"):
            pass
    except OSError as error:
        raise HistoryError(
            f"{folder}: results cannot be written there ({error.strerror or error}), so nothing was measured; make it "
            "a folder that you may write to, on a disk that has room"
        ) from error


def _make_way(path: Path, console: Console) -> None:
    """Set a damaged file aside."""
    try:
        held(path)
    except HistoryError as error:
        console.print(
            f"{error}; set aside as {set_aside(path).name}", highlight=False, markup=False, soft_wrap=True
        )


def _parts(names: Sequence[str], size: int = 12) -> list[Sequence[str]]:
    """Few workloads a process: memory is given back."""
    return [names[start : start + size] for start in range(0, len(names), size)]


@contextmanager
def _bar(console: Console, label: str, total: int) -> Iterator[Callable[[str], None]]:
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=console.quiet,
    )
    with progress:
        task = progress.add_task(label, total=total)
        begun = 0

        def begins(name: str) -> None:
            nonlocal begun
            progress.update(task, completed=begun, description=f"{label}: {name}")
            begun += 1
            if not console.is_terminal:  # a bar would show nothing before its end
                console.print(
                    f"{label}: {begun} of {total}: {name}", highlight=False, markup=False, soft_wrap=True
                )

        yield begins
        progress.update(task, completed=total, description=label)


def commits_between(root: Path, revisions: str) -> list[str]:
    """Full hashes, oldest first, of ``A..B`` (without A, as git says it), or of one revision.

    Raises:
        GitError: unknown, or none.
    """
    if ".." in revisions:
        found = git(root, "rev-list", "--reverse", "--first-parent", revisions).split()
    else:
        found = [commit_of(root, revisions)]
    if not found:
        raise GitError(f"no commit is in {revisions}")
    return found
