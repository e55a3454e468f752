"""Where results and scratch live. Fresh pages are dear: a first touch costs 1.4 us per 4 KiB (measured on a
virtual machine), 14 ms for 40 MB, about as long as a sparse product at density 0.1 that fills them.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["output", "workspace"]

_HUGE = 2 << 20  # bytes of a huge page
_LARGE = 8 << 20  # bytes from which a result asks for them
_KEPT = 16 << 20  # bytes of a workspace that are kept for the next call, at most

_MADV_HUGEPAGE = 14
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None
_kept = threading.local()


def output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result.

    glibc maps large blocks afresh every time. Where the kernel gives huge pages to who asks for them (its setting
    ``madvise``, the usual one), their first touch takes a fifth of the time.
    """
    result = torch.empty(shape, dtype=dtype)
    size = result.numel() * result.element_size()
    if size >= _LARGE and _libc is not None:
        start = -(-result.data_ptr() // _HUGE) * _HUGE
        length = (result.data_ptr() + size) // _HUGE * _HUGE - start
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return result


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
