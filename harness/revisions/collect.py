"""Runs worker processes on subjects and gathers what they found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import harness
from harness.revisions.subject import Subject

__all__ = ["Outcome", "collect"]

Progress = Callable[[str], object]


@dataclass(frozen=True)
class Outcome:
    """What came of a workload: figures by form and metric, or why there are none.

    Attributes:
        missing: what the revision or the machine lacks; not an error.
        error: what went wrong.
    """

    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    missing: str | None = None
    error: str | None = None


def collect(
    subject: Subject,
    workloads: Sequence[str],
    *,
    counts: bool = True,
    seconds: float = 0.0,
    threads: int = 1,
    timeout: float = 1200.0,
    progress: Progress | None = None,
) -> dict[str, Outcome]:
    """Measure workloads of a subject in a fresh process; after a crash the next process goes on behind it.

    Args:
        counts, seconds: see `harness.suite.measure.Effort`.
        threads: of torch.
        timeout: seconds that a workload may take, and the start of the process; it counts as failed then.
        progress: is called with the name of every workload that begins.
    """
    outcomes: dict[str, Outcome] = {}
    left = list(workloads)
    with tempfile.TemporaryDirectory(prefix="harness-") as folder:
        while left:
            found, failed = _run(Path(folder), subject, left, counts, seconds, threads, timeout, progress)
            outcomes |= found
            if failed is not None:
                running, why = failed
                # Before the first one began it is not a workload that fails, but all of them.
                for name in [running] if running is not None else left:
                    outcomes.setdefault(name, Outcome(error=why))
            left = [name for name in left if name not in outcomes]
    return outcomes


def _run(
    folder: Path,
    subject: Subject,
    workloads: list[str],
    counts: bool,
    seconds: float,
    threads: int,
    timeout: float,
    progress: Progress | None,
) -> tuple[dict[str, Outcome], tuple[str | None, str] | None]:
    """Outcomes of one process, and where and how it failed: (workload, or None before the first, and why)."""
    output, request = folder / "output.jsonl", folder / "request.json"
    output.write_text("")
    asked = {
        "subject": str(subject.path),
        "workloads": workloads,
        "counts": counts,
        "seconds": seconds,
        "threads": threads,
        "output": str(output),
    }
    request.write_text(json.dumps(asked))
    with (folder / "stderr").open("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "harness.revisions.worker", str(request)],
            env=_environment(subject, threads),
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
        why = _wait(process, output, timeout, progress)
        errors.seek(0)
        said = errors.read()[-2000:]
    found: dict[str, Outcome] = {}
    running = None
    for line in output.read_text().splitlines():
        event = json.loads(line)
        if "start" in event:
            running = event["start"]
        else:
            running = None
            name = event.pop("name")
            found[name] = Outcome(**event)
    if why is None and len(found) == len(workloads):
        return found, None
    # Last, and in one line, because that line is what a verdict shows of an error.
    why, lines = why or "the measuring process ended early", said.strip().splitlines()
    return found, (running, "\n".join([*lines, ": ".join([why, *lines[-1:]])]))


def _wait(
    process: subprocess.Popen[bytes], output: Path, timeout: float, progress: Progress | None
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
