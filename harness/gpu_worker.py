"""Measurements on a device in a process of their own, so that one that crashes or hangs costs its own row alone.

An illegal access on a GPU leaves every later call of its process failing, and a wrong kernel may never return. Jobs go
to a process that is started anew, with what is left of them, whenever that happened.
"""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import shutil
import subprocess
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

import sparsecore
from sparsecore.measure import Timing

__all__ = [
    "Job",
    "Reply",
    "Watched",
    "describe_error",
    "device_facts",
    "launch_times",
    "run_jobs",
    "serve",
    "time_calls",
    "watch",
]

Row = dict[str, Any]
_FLUSH = 256 << 20  # bytes: several times the last-level cache of any GPU there is
_CLOCK = 2e9  # cycles a second, about
_FEWEST = 5  # samples, however long they take
_LONGEST = 100.0  # seconds of one job, start of the process included
_ROOT = Path(__file__).parents[1]
_TRIES = 3  # processes that do not even begin
LATE = "not measured: out of time"


@dataclass(frozen=True)
class Job:
    """Something to measure: ``module.measure(job, device, quick)`` returns its rows."""

    module: str
    name: str
    density: float | None = None

    def row(self, **fields: Any) -> Row:
        """A row of this job."""
        return {"name": self.name, "density": self.density, **fields}


@dataclass
class Reply:
    """What became of a job: its rows, the warnings that reached the user, and what it ran on."""

    rows: list[Row]
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    broken: bool = False  # the process is of no more use


# ---- in the measuring process


def launch_times(calls: Mapping[str, Callable[[int], object]], device: str) -> dict[str, float]:
    """Seconds until a call of each function returns, the median of some: what the host takes to launch it, and what it
    waits for the device if the call does.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_FEWEST):
        for name, run in calls.items():
            if torch.device(device).type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            run(turn)
            times[name].append(time.perf_counter() - begin)
    return {name: median(found) for name, found in times.items()}


def time_calls(
    calls: Mapping[str, Callable[[int], object]],
    device: str,
    samples: int = 20,
    seconds: float = 6.0,
    lead: float = 0.0,
) -> dict[str, Timing]:
    """Time functions of a turn's number in rotating order, each from caches that hold none of its operands.

    On a GPU from event to event, behind a kernel that overwrites its cache. A call whose kernels take longer than the
    host takes to launch them, or one that the host has launched before its turn comes, shows what the GPU needs; one
    that waits for the device shows the waiting too.

    Args:
        calls: by name; each should have run before.
        device: where they run.
        samples: of each; fewer, but at least five, where they take longer than ``seconds`` in all.
        seconds: see ``samples``.
        lead: seconds by which the host is ahead of a GPU.
    """
    cuda = torch.device(device).type == "cuda"
    cache = torch.empty(_FLUSH if cuda else 0, dtype=torch.uint8, device=device)

    def sample(run: Callable[[], object]) -> float:
        if not cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        if lead:
            torch.cuda._sleep(int(lead * _CLOCK))
        first.record()
        run()
        last.record()
        last.synchronize()
        return first.elapsed_time(last) / 1e3

    names, enabled = list(calls), gc.isenabled()
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.disable()
    try:
        begin, turn = time.perf_counter(), 0
        while turn < samples and (turn < min(_FEWEST, samples) or time.perf_counter() - begin < seconds):
            for place in range(len(names)):
                name = names[(place + turn) % len(names)]
                times[name].append(sample(partial(calls[name], turn)))
            turn += 1
    finally:
        if enabled:
            gc.enable()
    return {name: Timing(min(found), median(found), len(found)) for name, found in times.items()}


@dataclass(frozen=True)
class Watched:
    """Waits of the host for the device in one call (None off CUDA), their places, and other warnings."""

    syncs: int | None
    places: list[str]


def watch(run: Callable[[], object], device: str) -> Watched:
    """Run once and note where the host waits for the device, as far as torch can tell (it misses some).

    Other warnings go on to whoever records them.
    """
    cuda = torch.device(device).type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
    for other in caught:
        if other not in waits and "debug mode is a prototype" not in str(other.message):
            warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
    places = sorted({f"{_place(w.filename)}:{w.lineno}" for w in waits})
    return Watched(len(waits) if cuda else None, places)


def describe_error(error: BaseException) -> str:
    """Kind, message (its beginning) and the innermost place in this repository."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).is_relative_to(_ROOT)]
    place = f" at {_place(frames[-1].filename)}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{place}"


def _place(filename: str) -> str:
    path = Path(filename)
    return str(path.relative_to(_ROOT)) if path.is_relative_to(_ROOT) else "/".join(path.parts[-3:])


def device_facts(device: str) -> dict[str, Any]:
    """Device, driver and versions, for the head of the results."""
    facts: dict[str, Any] = {"device": device, "torch": torch.__version__}
    try:
        facts["triton"] = metadata.version("triton")
    except metadata.PackageNotFoundError:
        facts["triton"] = "absent"
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = properties.name
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
        facts["l2_mib"] = round(getattr(properties, "L2_cache_size", 0) / 2**20)
        facts["cuda"] = torch.version.cuda
        facts["tf32"] = "on" if torch.backends.cuda.matmul.allow_tf32 else "off"
        facts["driver"] = _driver()
    return facts


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout.splitlines() or ["unknown"])[0].strip()


def serve(jobs: Sequence[Job], device: str, quick: bool, results: Connection) -> None:
    """What a measuring process runs: it sends what it runs on, then a `Reply` for each job, in order."""
    cuda = torch.device(device).type == "cuda"
    if cuda:
        with warnings.catch_warnings():  # newer versions recommend another name for it
            warnings.simplefilter("ignore")
            torch.backends.cuda.matmul.allow_tf32 = False
    else:
        torch.set_num_threads(1)  # on the CPU nothing is judged
    modules = {job.module: importlib.import_module(job.module) for job in jobs}
    gc.freeze()  # what is imported stays: it need not be looked through after every job
    results.send(Reply([], facts=device_facts(device)))
    # On the CPU the code path of a GPU without triton; there what it has by itself.
    with nullcontext() if cuda else sparsecore.backend("torch"):
        for job in jobs:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.manual_seed(0)
                try:
                    reply = Reply(modules[job.module].measure(job, device, quick))
                except Exception as error:
                    reply = Reply([job.row(error=describe_error(error))])
            reply.warnings = sorted(
                {
                    f"{w.category.__name__} at {_place(w.filename)}:{w.lineno}: {str(w.message)[:300]}"
                    for w in caught
                }
            )
            gc.collect()
            if cuda:
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except RuntimeError:
                    reply.broken = True
            results.send(reply)
            if reply.broken:
                return


# ---- in the process that asks


def run_jobs(
    jobs: Sequence[Job],
    device: str,
    quick: bool,
    deadline: float,
    target: Callable[[Sequence[Job], str, bool, Connection], None] = serve,
) -> Iterator[tuple[Job, Reply]]:
    """Every job with its reply, in order; a job that ends its process, hangs or comes too late has a row that says so.

    Args:
        jobs: what to measure.
        device, quick: see `serve`.
        deadline: on the clock of ``time.monotonic``; what is not done by then is not measured.
        target: what the process runs.
    """
    context = multiprocessing.get_context("spawn")
    waiting, tries, reason = list(jobs), _TRIES, LATE
    while waiting and tries and time.monotonic() < deadline:
        mine, theirs = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(waiting, device, quick, theirs), daemon=True)
        process.start()
        theirs.close()  # else the end of the process would not end the pipe
        try:
            begun = _next_reply(mine, process, waiting[0], deadline)
            broken = begun.broken
            if broken:
                tries, reason = tries - 1, begun.rows[0]["error"]
            while waiting and not broken:
                reply = _next_reply(mine, process, waiting[0], deadline)
                broken, reply.facts = reply.broken, begun.facts
                yield waiting.pop(0), reply
        finally:
            process.kill()
            process.join()
            mine.close()
    for job in waiting:
        yield job, Reply([job.row(error=LATE if tries else f"not measured: {reason}")])


def _next_reply(results: Connection, process: Any, job: Job, deadline: float) -> Reply:
    left = deadline - time.monotonic()
    try:
        if results.poll(max(0.0, min(left, _LONGEST))):
            return results.recv()
    except (EOFError, OSError):
        process.join()
        text = f"the measuring process ended with exit code {process.exitcode}"
        return Reply([job.row(error=text)], broken=True)
    text = LATE if left < _LONGEST else f"stopped after {_LONGEST:g} seconds"
    return Reply([job.row(error=text)], broken=True)
