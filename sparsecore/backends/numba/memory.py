"""Where results and scratch live. Fresh pages are dear: a first touch costs 1.4 us per 4 KiB (measured on a
virtual machine), 14 ms for 40 MB, about as long as a sparse product at density 0.1 that fills them.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from sparsecore.pages import ask_huge_pages

__all__ = [
    "TYPES",
    "is_kept",
    "kept_results",
    "output",
    "release",
    "result_of",
    "scratch_tensor",
    "workspace",
]

TYPES = {np.dtype(np.float32): torch.float32, np.dtype(np.float64): torch.float64}

MOST_KEPT = 16 << 20  # bytes of a workspace that are kept for the next call, at most
_LARGE = 8 << 20  # bytes of a result whose memory is kept

# Not torch's default device. (To read its name takes half a microsecond.)
_CPU = torch.device("cpu")

_kept = threading.local()
_results = WeakTensorKeyDictionary()


def _references(kept: dict[str, np.ndarray]) -> int:
    memory = kept.pop("", None)
    return sys.getrefcount(memory)


# References to an array that only a local name knows: 2 up to Python 3.13, then 1. A debugger's look at the frame would
# be a third; too few only means that nothing is used again.
_UNUSED = min(2, _references({"": np.empty(0)}))


def output(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for a result.

    glibc maps large blocks afresh every time. On huge pages their first touch takes a fifth of the time.
    """
    return ask_huge_pages(torch.empty(shape, dtype=dtype, device=_CPU))


def is_kept(size: int) -> bool:
    """Whether the memory of a result of this many bytes is used again."""
    return size >= _LARGE


def result_of(index: Tensor, operation: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory for what an operation makes of the weight that has this index.

    A large result lies in the memory of an earlier one that nothing uses any more: training frees gradients and outputs
    in every step, and to get 40 MB back from the system, cleared, takes 3 to 5 ms, as long as a quarter of a sparse
    product at density 0.1. One is kept for each operation, as long as the index lives.
    """
    size = math.prod(shape) * dtype.itemsize
    if not is_kept(size):
        return torch.empty(*shape, dtype=dtype, device=_CPU)
    kept = _results.get(index)
    if kept is None:
        kept = _results[index] = {}
    memory = kept.pop(operation, None)
    if memory is not None and memory.size == size and sys.getrefcount(memory) <= _UNUSED:
        chosen = memory
    else:
        chosen = output((size,), torch.uint8).numpy()
    # An earlier one that is in use stays: a second one beside it (zero_grad(set_to_none=False) adds every new gradient
    # to the one that lies there) is not worth its memory.
    kept[operation] = chosen if memory is None or memory.size != size else memory
    return torch.from_numpy(chosen).view(dtype).view(shape)


def kept_results(indices: Iterable[Tensor]) -> list[Tensor]:
    """Memory that is kept for results of the weights with these indices."""
    return [torch.from_numpy(memory) for index in indices for memory in _results.get(index, {}).values()]


def release(indices: Iterable[Tensor]) -> None:
    """Give that memory back; it is made anew at the next call."""
    for index in indices:
        _results.pop(index, None)


def workspace(name: str, n_chunks: int, size: int, dtype: torch.dtype) -> np.ndarray:
    """Uninitialised scratch, a row for each chunk, each on a cache line. The same memory at the next call with this
    name and type in this thread, unless it is large.
    """
    row = -(-size // 64) * 64
    buffer = _kept.__dict__.get((name, dtype))
    if buffer is None or buffer.size < n_chunks * row:
        buffer = torch.empty(n_chunks * row, dtype=dtype, device=_CPU).numpy()
        if buffer.nbytes <= MOST_KEPT:
            _kept.__dict__[name, dtype] = buffer
    return buffer[: n_chunks * row].reshape(n_chunks, row)


def scratch_tensor(name: str, size: int, dtype: torch.dtype) -> Tensor:
    """Such scratch for kernels that are handed addresses, in one piece."""
    buffer = _kept.__dict__.get((name, "tensor", dtype))
    if buffer is None or buffer.shape[0] < size:
        buffer = torch.empty(size, dtype=dtype, device=_CPU)
        if size * dtype.itemsize <= MOST_KEPT:
            _kept.__dict__[name, "tensor", dtype] = buffer
    return buffer
