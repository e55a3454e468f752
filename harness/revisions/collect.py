"""Runs worker processes on subjects and gathers what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
from harness.revisions.subject import Subject

__all__ = ["Outcome", "collect", "settings"]

# What reaches the measuring processes from the environment, and changes what they measure.
_SETTINGS = ("SPARSECORE_BACKEND", "SPARSECORE_SIMD", "THP_MEM_ALLOC_ENABLE")

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Outcome:
    """What came of a workload: figures by form and metric, or why there are none.

    Attributes:
        missing: what the revision or the machine lacks; not an error.
        lacks: it is the revision that lacks it.
        error: what went wrong.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: str | None = None
    lacks: bool = False
    error: str | None = None


def settings() -> dict[str, str]:
    """Those variables of the environment that change what is measured, where they are set."""
    return {name: os.environ[name] for name in _SETTINGS if os.environ.get(name)}


def collect(
    subject: Subject,
    workloads: Sequence[str],
    *,
    counts: bool = True,
    seconds: float = 0.0,
    threads: int = 1,
    timeout: float = 1200.0,
    progress: Progress | None = None,
    stop: threading.Event | None = None,
    into: dict[str, Outcome] | None = None,
) -> dict[str, Outcome]:
    """Measure workloads of a subject in a fresh process; after a crash the next process goes on behind it.

    Args:
        counts, seconds: see `harness.suite.measure.Effort`.
        threads: of torch.
        timeout: seconds that a workload may take, and the start of the process; it counts as failed then.
        progress: is called with the name of every workload that begins.
        stop: once it is set nothing is measured any more. An interrupt reaches the main thread alone.
        into: where outcomes are put as they come: an interrupt leaves there what was found until then.
    """
    outcomes: dict[str, Outcome] = {} if into is None else into
    left = list(workloads)
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        while left and not _stopped(stop):
            asked = _Request(subject, left, counts, seconds, threads)
            failed = _run(Path(folder), asked, outcomes, timeout, progress, stop)
            if failed is not None and not _stopped(stop):
                running, why = failed
                # Before the first one began it is not a workload that fails, but all of them.
                for name in [running] if running is not None else left:
                    outcomes.setdefault(name, Outcome(error=why))
            left = [name for name in left if name not in outcomes]
    return outcomes


def _stopped(stop: threading.Event | None) -> bool:
    return stop is not None and stop.is_set()


@dataclass(frozen=True)
class _Request:
    """What one process is to measure."""

    subject: Subject
    workloads: list[str]
    counts: bool
    seconds: float
    threads: int


def _run(
    folder: Path,
    asked: _Request,
    outcomes: dict[str, Outcome],
    timeout: float,
    progress: Progress | None,
    stop: threading.Event | None,
) -> tuple[str | None, str] | None:
    """Add the outcomes of one process; where and how it failed: (workload, or None before the first, and why)."""
    output, request = folder / "output.jsonl", folder / "request.json"
    output.write_text("")
    request.write_text(json.dumps({**vars(asked), "subject": str(asked.subject.path), "output": str(output)}))
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.revisions.worker", str(request)],
            env=_environment(asked.subject, asked.threads),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        try:
            why = _wait(process, output, timeout, progress, stop)
        finally:
            running = _gather(output, outcomes)
        errors.seek(0)
        said = errors.read()[-2000:]
    if why is None and all(name in outcomes for name in asked.workloads):
        return None
    # Last, and in one line, because that line is what a verdict shows of an error.
    why, lines = why or "the measuring process ended early", said.strip().splitlines()
    return running, "\n".join([*lines, ": ".join([why, *lines[-1:]])])


def _gather(output: Path, outcomes: dict[str, Outcome]) -> str | None:
    """Add what a process has written; the name of the workload that it was at."""
    running = None
    for line in output.read_text().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # the last one, of a process that was killed while it wrote
            break
        if "start" in event:
            running = event["start"]
        else:
            running = None
            name = event.pop("name")
            outcomes[name] = Outcome(**event)
    return running


def _wait(
    process: subprocess.Popen[bytes],
    output: Path,
    timeout: float,
    progress: Progress | None,
    stop: threading.Event | None,
) -> str | None:
    """Wait for the end; why it is not a good one, or None."""
    begun, since = 0, time.monotonic()
    try:
        while True:
            try:
                code = process.wait(0.2)
            except subprocess.TimeoutExpired:
                code = None
            starts = [line for line in output.read_text().splitlines() if line.startswith('{"start"')]
            if len(starts) > begun:
                since = time.monotonic()
            if progress is not None:
                for line in starts[begun:]:
                    progress(json.loads(line)["start"])
            begun = len(starts)
            if code is not None:
                return None if code == 0 else f"the measuring process {_ended(code)}"
            if _stopped(stop):
                return "interrupted"
            if time.monotonic() - since > timeout:
                return f"it took longer than {timeout:g} s"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with {code}"
    hint = ", as the system does where memory runs out" if code == -signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-code).name}{hint}"


def _environment(subject: Subject, threads: int) -> dict[str, str]:
    """The subject's packages first, then those of the running tree; threads pinned, hashes fixed."""
    own = str(Path(harness.__file__).resolve().parent.parent)
    pinned = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS")}
    path = os.pathsep.join([str(subject.path), own])
    return {**os.environ, **pinned, "PYTHONPATH": path, "PYTHONHASHSEED": "0"}
