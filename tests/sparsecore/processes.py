"""Run a task in several processes that form a gloo group, or code in one without AVX-512."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sparsecore.encoding import has_expand

WORLD = 2


def process(rank: int, task: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    """One of them; what `torch.multiprocessing.spawn` is given."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/ranks",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(
            seconds=300
        ),  # a rank that waits for another in vain; kernels may have to be compiled
    )
    try:
        result = task(rank, folder, *arguments)
    except Exception:
        result = traceback.format_exc()
    torch.save(result, folder / f"rank{rank}.part")
    os.replace(folder / f"rank{rank}.part", folder / f"rank{rank}.pt")
    # A rank that left while another is still reading from it would make gloo abort that one.
    end = time.monotonic() + 300
    while time.monotonic() < end and not all((folder / f"rank{r}.pt").exists() for r in range(WORLD)):
        time.sleep(0.02)
    # Not by destroy_process_group: torch 2.6 may wait there, with Python's lock, for a thread that wants the lock.
    os._exit(0)


def run(task: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What a task returns on every rank; a traceback where it fails."""
    mp.spawn(process, (task, folder, *arguments), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]


def run_portable(code: str) -> None:
    """Run code, which may import the modules here, in a process whose kernels are those of a CPU without AVX-512."""
    if not has_expand():
        pytest.skip("this processor has no AVX-512: every test here runs that code")
    start = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\nimport torch; torch.set_num_threads(1)\n"
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        env={**os.environ, "SPARSECORE_SIMD": "portable"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
