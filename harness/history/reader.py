"""Reads asv's result files: by a reader of our own, as asv's needs its configuration and stops at the first bad file.

A file holds `result_columns` and, for every benchmark, a row of them, of which trailing empty ones are left out; its
values are in the order of `itertools.product` of the parameters, whose values are written as Python literals.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Record", "Run", "read_file", "read_results"]

API_VERSION = 2
_NOT_RUNS = ("machine.json", "benchmarks.json")


@dataclass(frozen=True)
class Record:
    """One figure of one run.

    Attributes:
        benchmark: asv's name, such as "bench_training.TrainingSmall.track_macs".
        params: the parameters' values, as they were: strings and numbers.
        value: NaN where there is none ("n/a"), None where the benchmark failed.
        version: of the benchmark; figures of two versions do not compare.
    """

    benchmark: str
    params: tuple[Any, ...]
    value: float | None
    version: str


@dataclass(frozen=True)
class Run:
    """One file: a commit on a machine.

    Attributes:
        date: of the commit, milliseconds since 1970.
        machine: its name, which is its identity.
        python, requirements, env_vars: of the environment.
    """

    path: Path
    commit: str
    date: int
    machine: str
    python: str
    requirements: dict[str, str]
    env_vars: dict[str, str]
    records: tuple[Record, ...] = field(repr=False)


def read_results(
    folder: Path, machine: str | None = None, ancestry: Sequence[str] | None = None
) -> tuple[list[Run], list[str]]:
    """Runs below asv's results folder, oldest commit first, and what is wrong with the files that were skipped.

    Args:
        machine: only those of this machine.
        ancestry: only those of these commits, in this order, parents first. Without it: all, by the commits' dates,
            which rebases and clocks put out of order.
    """
    place = {commit: number for number, commit in enumerate(ancestry or ())}
    runs, problems = [], []
    for path in sorted(folder.glob("*/*.json")):
        if path.name in _NOT_RUNS or (machine is not None and path.parent.name != machine):
            continue
        try:
            run = read_file(path)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            problems.append(f"{path}: skipped, not a result file of asv: {error or type(error).__name__}")
            continue
        if run.machine != path.parent.name:
            problems.append(f"{path}: skipped, it is of the machine {run.machine!r}")
            continue
        if ancestry is None or run.commit in place:
            runs.append(run)
    return sorted(runs, key=lambda run: (place.get(run.commit, -1), run.date, run.commit)), problems


def read_file(path: Path) -> Run:
    """One result file.

    Raises:
        ValueError, KeyError, TypeError, OSError: it is not one.
    """
    document = json.loads(path.read_text(encoding="utf-8"))  # NaN and Infinity, which asv writes, are read
    if not isinstance(document, dict):
        raise ValueError("expected an object")
    if document.get("version") != API_VERSION:
        raise ValueError(f"expected version {API_VERSION}, got {document.get('version')!r}")
    columns = document["result_columns"]
    records = [
        record
        for name, row in document["results"].items()
        for record in _records(name, dict(zip(columns, row, strict=False)))
    ]
    return Run(
        path,
        str(document["commit_hash"]),
        int(document["date"]),
        str(document["params"]["machine"]),
        str(document["python"]),
        dict(document["requirements"]),
        dict(document.get("env_vars") or {}),
        tuple(records),
    )


def _records(name: str, row: dict[str, Any]) -> Iterator[Record]:
    params = [[_literal(value) for value in values] for values in row.get("params") or []]
    points = list(itertools.product(*params))
    values = row.get("result")
    if values is None:  # everything failed
        values = [None] * len(points)
    if len(values) != len(points):
        raise ValueError(f"{name}: {len(values)} values for {len(points)} combinations of parameters")
    version = str(row.get("version") or "")
    for point, value in zip(points, values, strict=True):
        yield Record(name, point, None if value is None else _number(value), version)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, got {value!r:.40}")
    return float(value) if value is not None else math.nan


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
