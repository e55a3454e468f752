"""Writes figures of a commit into asv's results folder, as the installed asv itself would: `asv publish` reads them."""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from harness.history.identity import Identity
from harness.history.reader import read_file
from harness.revisions.collect import Outcome
from harness.revisions.subject import git

__all__ = ["HistoryError", "discover", "held", "results_file", "set_aside", "write_run"]

_REQUIRED = ("torch", "numba", "numpy", "scipy", "asv_runner")


class HistoryError(Exception):
    """Results cannot be written or read; the text says why."""


def discover(benchmarks: Path) -> dict[str, dict[str, Any]]:
    """All asv benchmarks of the suite by name: parameters, units, versions, as asv's own discovery finds them.

    Raises:
        HistoryError: a bench file does not import.
    """
    program = (
        "import sys\n"
        "from asv_runner.discovery import list_benchmarks\n"
        "with open(sys.argv[2], 'w') as f: list_benchmarks(sys.argv[1], f)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "benchmarks.json"
        done = subprocess.run(
            [sys.executable, "-P", "-c", program, str(benchmarks), str(found)],
            env={**os.environ, "PYTHONPATH": str(benchmarks.parent.parent)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise HistoryError(f"asv cannot discover the benchmarks in {benchmarks}: {done.stderr[-1500:]}")
        return {benchmark["name"]: benchmark for benchmark in json.loads(found.read_text())}


def held(path: Path) -> dict[str, set[str]]:
    """Workloads that a result file has figures of, and which; of those that failed it has none. No file, no names.

    Raises:
        HistoryError: it is damaged: we or asv cannot read it.
    """
    from asv.results import Results
    from asv.util import UserError

    if not path.exists():
        return {}
    try:
        Results.load(str(path), machine_name=path.parent.name)
        run = read_file(path)
    except (UserError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise HistoryError(f"{path}: not a result file of asv: {error or type(error).__name__}") from error
    found: dict[str, set[str]] = {}
    for record in run.records:
        if record.params and record.value is not None and not math.isnan(record.value):
            found.setdefault(str(record.params[0]), set()).add(record.benchmark.rpartition(".track_")[2])
    return found


def set_aside(path: Path) -> Path:
    """Rename a file that is damaged, so that a new one can take its place; its new name, that no reader looks for."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def write_run(
    results: Path,
    root: Path,
    commit: str,
    identity: Identity,
    benchmarks: Mapping[str, Mapping[str, Any]],
    outcomes: Mapping[str, Outcome],
) -> Path:
    """Add the outcomes of workloads to the file of a commit. What was not measured stays as it is there: other
    workloads, those that were skipped, times where none were taken, and figures of a workload that fails now.

    Nothing is half-written: the file is replaced when the new one is complete.

    Returns:
        Path of the file.

    Raises:
        HistoryError: the file that is to be added to is damaged.
    """
    from asv.results import Results
    from asv.runner import BenchmarkResult

    (results / identity.name).mkdir(parents=True, exist_ok=True)
    _replace(results / identity.name / "machine.json", {**identity.asv_machine(), "version": 1})
    _replace(results / "benchmarks.json", {**benchmarks, "version": 2})
    date = 1000 * int(git(root, "show", "-s", "--format=%ct", commit))
    requirements = {name: metadata.version(name) for name in _REQUIRED}
    run = Results(
        {**identity.asv_machine(), "python": identity.python, **requirements},
        requirements,
        commit,
        date,
        identity.python,
        _environment(identity),
        {"OMP_NUM_THREADS": str(identity.threads)},
    )
    path = results_file(results, commit, identity)
    kept = held(path)
    run.load_data(str(results))
    for name, benchmark in benchmarks.items():
        values = _values(name, benchmark, outcomes, kept)
        if values is not None:
            chosen = {place for place, (known, _) in enumerate(values) if known}
            count = len(values)
            run.add_result(
                dict(benchmark),
                BenchmarkResult([value for _, value in values], [None] * count, [None] * count, 0, "", None),
                selected_idx=chosen,
            )
    with tempfile.TemporaryDirectory(dir=results, prefix=".new-") as folder:
        (Path(folder) / identity.name).mkdir()
        run.save(folder)
        (Path(folder) / path.relative_to(results)).replace(path)
    return path


def results_file(results: Path, commit: str, identity: Identity) -> Path:
    """Where asv keeps a commit's results on a machine."""
    from asv.results import get_filename

    return results / get_filename(identity.name, commit, _environment(identity))


def _environment(identity: Identity) -> str:
    return f"harness-py{identity.python}"


def _values(
    name: str,
    benchmark: Mapping[str, Any],
    outcomes: Mapping[str, Outcome],
    kept: Mapping[str, Collection[str]],
) -> list[tuple[bool, float | None]] | None:
    """(measured now, value) for every combination of parameters; None if nothing of a benchmark was measured."""
    metric = name.rpartition(".track_")[2]
    works, forms = ([text.strip("'") for text in values] for values in benchmark["params"])
    found: list[tuple[bool, float | None]] = []
    for work, form in itertools.product(works, forms):
        outcome = outcomes.get(work)
        if outcome is not None and outcome.error is not None:
            found.append((metric not in kept.get(work, ()), None))
        else:
            figures = {} if outcome is None else outcome.figures.get(form, {})
            # It may be marked as failed, by a measurement before.
            works_now = outcome is not None and outcome.missing is None and metric not in kept.get(work, ())
            found.append((metric in figures or works_now, figures.get(metric, math.nan)))
    return found if any(known for known, _ in found) else None


def _replace(path: Path, document: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(document, indent=4, sort_keys=True) + "\n")
    temporary.replace(path)
