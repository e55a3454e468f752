"""Seconds until a kernel has run for the first time: compiled, and loaded from the disk cache.

    python -m harness.compile_times

prints them as JSON, for the cache that NUMBA_CACHE_DIR names. `compare` runs that twice with an empty cache.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from numba.core.event import EventStatus, install_recorder

from harness import kernel_forms
from harness.kernel_cases import CASES
from harness.operands import Forms

__all__ = ["compare", "first_calls", "import_seconds"]

_IMPORTS = ("torch", "torch, numba", "sparsecore")

# Enough work for two threads.
_SIZE = {"rows": 3000, "cols": 40, "batch": 256, "users": 300, "items": 400}
_PRODUCTS: dict[str, Callable[..., Forms]] = {
    "spmm": kernel_forms.spmm,
    "spmm_t": kernel_forms.spmm_t,
    "sddmm": kernel_forms.sddmm,
}


def _calls() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way through the kernels: in either encoding, tiny, for few examples, at high density."""
    for case in CASES:
        one = case.quick.get("batch") == 1
        size = dict(case.quick) if one else {key: _SIZE.get(key, value) for key, value in case.quick.items()}
        yield case.name, case.build(0.5, **size).ours
        if "encoding" in inspect.signature(case.build).parameters:
            for encoding in ("bitmap", "csr"):
                yield f"{case.name}, {encoding}", case.build(0.5, **size, encoding=encoding).ours
        if not one:
            yield f"{case.name}, tiny", case.build(0.5, **case.quick).ours
    for name, build in _PRODUCTS.items():
        for batch, density in ((1, 0.5), (4, 0.5), (8, 0.5), (16, 0.5), (256, 0.98)):
            for encoding in ("bitmap", "csr"):
                call = f"{name}, B = {batch}, density {density:g}, {encoding}"
                yield call, build(density, 3000, 40, batch, encoding=encoding).ours


def first_calls() -> list[dict[str, Any]]:
    """Everything once with one thread and once with two: seconds, and the kernels that were compiled."""
    found = []
    for name, run in _calls():
        for n_threads in (1, 2):
            torch.set_num_threads(n_threads)
            with install_recorder("numba:compile") as recorder:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            open_since: dict[str, float] = {}
            kernels: dict[str, float] = {}
            for stamp, event in recorder.buffer:
                kernel = event.data["dispatcher"].py_func.__qualname__
                if event.status == EventStatus.START:
                    open_since[kernel] = stamp
                elif kernel in open_since:
                    kernels[kernel] = kernels.get(kernel, 0.0) + stamp - open_since.pop(kernel)
            found.append({"operation": name, "threads": n_threads, "seconds": seconds, "kernels": kernels})
    return found


def compare() -> list[dict[str, Any]]:
    """First calls in a new process with an empty cache, and in another one after it.

    Returns:
        One row for each call and number of threads: ``compiled`` and ``cached`` seconds, and by name the seconds
        of the kernels that were compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "NUMBA_CACHE_DIR": folder}
        runs = []
        for _ in range(2):
            command = [sys.executable, "-m", "harness.compile_times"]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout))
    return [
        {**first, "compiled": first["seconds"], "cached": second["seconds"]}
        for first, second in zip(*runs, strict=True)
    ]


def import_seconds(samples: int = 7) -> dict[str, float]:
    """Seconds that an import takes in a new interpreter: torch, torch and numba, sparsecore; in turns, the minimum."""
    seconds = dict.fromkeys(_IMPORTS, float("inf"))
    for _ in range(samples):
        for names in _IMPORTS:
            code = f"import time; start = time.perf_counter(); import {names}; print(time.perf_counter() - start)"
            done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
            seconds[names] = min(seconds[names], float(done.stdout))
    return seconds


if __name__ == "__main__":
    print(json.dumps(first_calls()))
