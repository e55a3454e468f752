"""What spoils measurements on this machine: load, threads, clock, libraries, a cold cache of compiled kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

__all__ = ["Check", "examine"]


@dataclass(frozen=True)
class Check:
    """One finding: "bad" spoils measurements, "note" may."""

    status: Literal["ok", "note", "bad"]
    what: str
    found: str
    advice: str = ""


def examine(threads: int = 1) -> list[Check]:
    """All checks, for measurements with so many threads. Takes about a second."""
    return [
        *_load(),
        *_memory(),
        *_threads(threads),
        *_clock(),
        *_libraries(),
        *_kernels(),
    ]


def _load() -> Iterator[Check]:
    import psutil

    cores = os.cpu_count() or 1
    others = [process for process in psutil.process_iter() if process.pid != os.getpid()]
    _shares(others)  # of the time since this call, at the next one
    busy = psutil.cpu_percent(interval=0.8) / 100 * cores
    shares = _shares(others)
    found = f"{busy:.1f} of {cores} cores busy"
    if busy > 0.3 * cores:
        hungry = sorted(shares, key=lambda name: -shares[name])
        names = ", ".join(f"{name} ({shares[name]:.0f} %)" for name in hungry[:3])
        yield Check("bad", "load", found, f"stop what runs beside a measurement; busiest: {names}")
    else:
        yield Check("ok", "load", found)


def _shares(processes: list[Any]) -> dict[str, float]:
    """Percent of a core that each process took since the last call, by name and number."""
    import psutil

    found = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            found[f"{process.name()} {process.pid}"] = process.cpu_percent(None)
    return found


def _memory() -> Iterator[Check]:
    import psutil

    free, swap = psutil.virtual_memory().available / 2**30, psutil.swap_memory()
    if swap.total and swap.percent > 20:
        yield Check(
            "bad", "memory", f"{swap.percent:.0f} % of swap in use", "free memory first: paging is timed too"
        )
    else:
        status: Literal["ok", "note"] = "ok" if free > 4 else "note"
        advice = "" if free > 4 else "a full run holds up to 4 GiB; take a quick one, or --only"
        yield Check(status, "memory", f"{free:.1f} GiB available", advice)


def _threads(threads: int) -> Iterator[Check]:
    cores = os.cpu_count() or 1
    if threads > cores:
        yield Check("bad", "threads", f"{threads} on {cores} cores", "ask for no more threads than cores")
    elif threads > 1:
        advice = (
            "neighbours disturb two threads more than one: keep the machine to yourself, or measure with 1"
        )
        yield Check("note", "threads", f"{threads} on {cores} cores", advice)
    else:
        yield Check("ok", "threads", f"1 on {cores} cores")
    set_here = {
        name: os.environ[name]
        for name in (
            "OMP_NUM_THREADS",
            "MKL_NUM_THREADS",
            "NUMBA_NUM_THREADS",
            "KMP_AFFINITY",
            "GOMP_CPU_AFFINITY",
        )
        if name in os.environ
    }
    if set_here:
        listed = ", ".join(f"{name}={value}" for name, value in set_here.items())
        yield Check(
            "note", "environment", listed, "harness sets threads itself, in the processes that measure"
        )


def _clock() -> Iterator[Check]:
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if not governor.exists():
        yield Check(
            "note", "clock", "frequency is not visible, as in a virtual machine", "trust ratios, not seconds"
        )
    else:
        name = governor.read_text().strip()
        if name == "performance":
            yield Check("ok", "clock", f"governor {name}")
        else:
            yield Check(
                "note", "clock", f"governor {name}", "cpupower frequency-set -g performance steadies times"
            )


def _libraries() -> Iterator[Check]:
    absent = [
        name
        for name in ("asv", "asv_runner", "jinja2", "matplotlib", "psutil")
        if not importlib.util.find_spec(name)
    ]
    if absent:
        yield Check("bad", "libraries", f"missing: {', '.join(absent)}", 'pip install "sparsecore[bench]"')
    else:
        yield Check("ok", "libraries", "all there")
    capability = torch.backends.cpu.get_cpu_capability()
    status: Literal["ok", "note"] = "ok" if "AVX512" in capability else "note"
    advice = (
        "" if status == "ok" else "kernels take their portable form: compare only with machines that do too"
    )
    yield Check(status, "vector units", capability, advice)
    if os.environ.get("SPARSECORE_SIMD"):
        yield Check(
            "note",
            "SPARSECORE_SIMD",
            os.environ["SPARSECORE_SIMD"],
            "unset it, unless that is what you measure",
        )
    if not torch.backends.mkl.is_available():
        yield Check("note", "BLAS", "torch has no MKL", "dense baselines may be slower than elsewhere")


def _kernels() -> Iterator[Check]:
    import sparsecore

    folder = Path(sparsecore.__file__).parent / "backends" / "numba" / "__pycache__"
    compiled = len(list(folder.glob("*.nbc"))) if folder.is_dir() else 0
    if compiled:
        yield Check("ok", "compiled kernels", f"{compiled} in the cache")
    else:
        advice = "the first run compiles, for a minute or two; times are taken after that"
        yield Check("note", "compiled kernels", "none in the cache", advice)
    if not os.access(folder.parent, os.W_OK) and "NUMBA_CACHE_DIR" not in os.environ:
        yield Check(
            "bad",
            "compiled kernels",
            f"{folder.parent} cannot be written",
            "set NUMBA_CACHE_DIR to a folder that can",
        )
