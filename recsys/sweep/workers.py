"""Runs in processes of their own, a few at a time: one that fails or dies leaves the others and us alive."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from recsys.config import Config

__all__ = ["Event", "Failure", "Task", "run_tasks"]

_PATIENCE = 20.0  # seconds that a worker has to end after it was told to, before it is killed


@dataclass(frozen=True)
class Task:
    """A run to begin, or to continue if its folder is there."""

    config: Config
    folder: Path


@dataclass(frozen=True)
class Event:
    """What happened to a task: "start", "epoch" (with its log record), "done" or "failed" (with why)."""

    kind: str
    task: Task
    record: dict[str, Any] | None = None
    failure: Failure | None = None


@dataclass(frozen=True)
class Failure:
    """Why a run came to nothing; `trace` is empty where the reason says all."""

    reason: str
    trace: str = ""


def run_tasks(
    tasks: Sequence[Task], jobs: int, threads: int, on_event: Callable[[Event], object]
) -> dict[Path, Failure]:
    """Train every task, `jobs` at a time with `threads` CPU threads each; returns the failures by folder.

    Processes are spawned, one for a run: what a run holds or breaks goes with it.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the workers have ended; their folders hold their last complete epochs.
    """
    waiting, failures = list(tasks), {}
    running: dict[Connection, tuple[Task, BaseProcess]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                task = waiting.pop(0)
                connection, process = _start(task, threads)
                running[connection] = (task, process)
                on_event(Event("start", task))
            for ready in wait(list(running)):
                assert isinstance(ready, Connection)
                task, process = running[ready]
                try:
                    message = ready.recv()
                except (EOFError, OSError):
                    process.join()
                    message = Failure(_cause_of_death(process.exitcode))
                if isinstance(message, dict):
                    on_event(Event("epoch", task, record=message))
                    continue
                del running[ready]
                ready.close()
                if isinstance(message, Failure):
                    failures[task.folder] = message
                    on_event(Event("failed", task, failure=message))
                else:
                    on_event(Event("done", task))
                process.join(_PATIENCE)
    finally:
        _stop([process for _, process in running.values()])
    return failures


def _start(task: Task, threads: int) -> tuple[Connection, BaseProcess]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, task, threads), daemon=True)
    with _no_interrupt():
        process.start()
    theirs.close()
    return ours, process


@contextmanager
def _no_interrupt() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which the terminal sends to all: we tell them to stop, once."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # else the first start would, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stop(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(_PATIENCE)
        if process.is_alive():
            process.kill()
            process.join()


def _cause_of_death(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (is the memory enough for so many --jobs?)" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {exitcode} before the run did"


def _work(connection: Connection, task: Task, threads: int) -> None:
    """What a worker does: one run. It sends log records, then True or a Failure."""
    # The parent ends us by SIGTERM; that is an interruption, so that files are closed and nothing is printed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        connection.send(_train(task, threads, connection.send))
    except KeyboardInterrupt:
        os._exit(130)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _train(task: Task, threads: int, send: Callable[[dict[str, Any]], object]) -> bool | Failure:
    import torch

    from recsys.errors import RecsysError
    from recsys.training import session
    from sparsecore.errors import SparsecoreError

    torch.set_num_threads(threads)
    try:
        if (task.folder / "config.toml").is_file():
            session.resume(task.folder, data_dir=task.config.data.dir, quiet=True, on_epoch=send)
        else:
            session.train(task.config, task.folder, quiet=True, on_epoch=send)
    except (RecsysError, SparsecoreError) as error:
        return Failure(str(error))
    except Exception as error:
        return Failure(f"{type(error).__name__}: {error}", traceback.format_exc())
    return True
