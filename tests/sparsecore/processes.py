"""Run a task in several processes that form a gloo group."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

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
    dist.destroy_process_group()


def run(task: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What a task returns on every rank; a traceback where it fails."""
    mp.spawn(process, (task, folder, *arguments), nprocs=WORLD)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(WORLD)]
