"""Where results and scratch live. Fresh pages are dear: a first touch costs 1.4 us per 4 KiB (measured on a
virtual machine), 14 ms for 40 MB, about as long as a sparse product at density 0.1 that fills them.
"""

from __future__ import annotations

import threading

import numpy as np
import torch
from torch import Tensor

from sparsecore.pages import ask_huge_pages

__all__ = ["output", "workspace"]

_KEPT = 16 << 20  # bytes of a workspace that are kept for the next call, at most

_kept = threading.local()


def output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result.

    glibc maps large blocks afresh every time. On huge pages their first touch takes a fifth of the time.
    """
    return ask_huge_pages(torch.empty(shape, dtype=dtype))


def workspace(name: str, n_chunks: int, size: int, dtype: torch.dtype) -> np.ndarray:
    """Uninitialised scratch, a row for each chunk, each on a cache line. The same memory at the next call with this
    name and type in this thread, unless it is large.
    """
    row = -(-size // 64) * 64
    buffer = _kept.__dict__.get((name, dtype))
    if buffer is None or buffer.size < n_chunks * row:
        buffer = torch.empty(n_chunks * row, dtype=dtype).numpy()
        if buffer.nbytes <= _KEPT:
            _kept.__dict__[name, dtype] = buffer
    return buffer[: n_chunks * row].reshape(n_chunks, row)
