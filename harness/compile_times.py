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
from torch import nn

import sparsecore
from harness import bag_forms, graph_forms, kernel_forms, lazy_forms
from harness.kernel_cases import CASES
from harness.operands import Forms, Table
from sparsecore import ops

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
    yield from _in_either_encoding()
    yield from _in_one_way()


def _in_either_encoding() -> Iterator[tuple[str, Callable[[], object]]]:
    """What the kernel benchmark does not measure."""
    rows, cols = 3000, 40
    for encoding in ("bitmap", "csr"):
        for build in (bag_forms.bag, bag_forms.bag_grad, bag_forms.bag_dot):
            yield f"{build.__name__}, {encoding}", build(0.5, rows, cols, 64, 20, encoding=encoding).ours
        yield f"bag, many entries, {encoding}", bag_forms.bag(0.2, 300, cols, 64, 20, encoding=encoding).ours
        yield f"touched, {encoding}", lazy_forms.touched(0.5, rows, cols, 256, encoding=encoding).ours
        grad = graph_forms.propagate_mean_grad(0.5, 40, 2, 300, 400, encoding=encoding)
        yield f"propagate_mean_grad, {encoding}", grad.ours
        for name, run in _exploring(Table(rows, cols, 0.5, encoding=encoding)):
            yield f"{name}, {encoding}", run


def _exploring(weight: Table) -> Iterator[tuple[str, Callable[[], object]]]:
    """Parts of an exploration that do not come in one by gradients alone."""
    shape = (weight.rows, weight.cols)
    history = torch.zeros(-(-weight.rows * weight.cols // 8), dtype=torch.uint8)
    block = torch.zeros(shape)

    def fill() -> object:  # the index may be written into
        crow, col = weight.index
        index = crow.clone(), None if col is None else col.clone()
        return ops.explore.fill(index, shape, 1000, torch.Generator().manual_seed(0))

    yield "fill", fill
    yield "overlay_", lambda: ops.explore.overlay_(block, weight.values, weight.index, slice(0, weight.rows))
    yield "record_", lambda: ops.explore.record_(history, weight.index, shape)


def _in_one_way() -> Iterator[tuple[str, Callable[[], object]]]:
    """Of one encoding, of two at once, or of none."""
    for build in (graph_forms.propagate_rows, graph_forms.propagate_rows_t):
        yield build.__name__, build(1.0, 40, 256, 300, 400).ours
    mixed = kernel_forms.gather_dot(0.5, 3000, 40, 256, encoding="csr", other="bitmap")
    yield "gather_dot, csr beside bitmap", mixed.ours
    yield "gather_dot, few columns in common", _few_in_common()
    yield "score_topk, one query", kernel_forms.score_topk(0.5, 3000, 40, 1, 20, encoding="bitmap").ours
    yield "spmm_t, B = 64", kernel_forms.spmm_t(0.3, 3000, 40, 64, encoding="bitmap").ours
    yield "spmm_t, B = 16, short rows", kernel_forms.spmm_t(0.15, 3000, 40, 16, encoding="csr").ours
    # Blocks of wide weights alone on Zen 5.
    yield "sddmm, B = 128, wide", kernel_forms.sddmm(0.95, 64, 4200, 128, encoding="csr").ours
    # Activations that threads share, packed once.
    yield "spmm, B = 256, wide", kernel_forms.spmm(0.1, 500, 5000, 256, encoding="csr").ours
    yield "spmm, B = 16, wide", kernel_forms.spmm(0.1, 20, 40_000, 16, encoding="bitmap").ours
    yield "Adam of the rows of a dense table", _rows_of_dense_table()
    yield "Adam of two lookups", _two_lookups()


def _few_in_common() -> Callable[[], object]:
    """Of tables that no cache holds: without AVX2 the choice depends on that."""
    weight, ids = Table(250_000, 64, 0.1, encoding="bitmap"), torch.arange(256)
    others = weight.values.clone()
    return lambda: ops.gather_dot(weight.values, *weight.index, ids, others, *weight.index, ids.flip(0), 64)


def _rows_of_dense_table() -> Callable[[], object]:
    table = nn.Embedding(3000, 40, sparse=True)
    optimizer, ids = sparsecore.optim.Adam(table.parameters()), torch.arange(256)

    def run() -> None:
        optimizer.zero_grad()
        table(ids).sum().backward()
        optimizer.step()

    return run


def _two_lookups() -> Callable[[], object]:
    """Their gradients come one after the other, and are merged."""
    values, places = nn.Parameter(torch.zeros(60_000)), torch.arange(256).repeat(2).unsqueeze(0)
    optimizer = sparsecore.optim.Adam([values])

    def run() -> None:
        values.grad = torch.sparse_coo_tensor(places, torch.ones(512), (60_000,), check_invariants=False)
        optimizer.step()

    return run


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
