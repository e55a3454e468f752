"""Huge pages for large arrays.

A row looked up at random in an array of some hundred megabytes misses the TLB as surely as the cache: with pages of
4 KiB, finding where the row lies in memory costs about as much as fetching it (measured: dot products of rows of two
tables of 128 MB take 1.2 to 1.5 times as long). Linux gives 2 MiB pages to who asks for them (its setting ``madvise``,
the usual one). torch does not ask, unless THP_MEM_ALLOC_ENABLE=1 is in the environment: dense tables then gain too.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

from torch import Tensor

__all__ = ["ask_huge_pages"]

_HUGE = 2 << 20  # bytes of a huge page
_LARGE = 8 << 20  # bytes from which an array asks for them

_MADV_HUGEPAGE = 14
_libc: Any = ctypes.CDLL(None) if sys.platform == "linux" else None


def ask_huge_pages(tensor: Tensor) -> Tensor:
    """The tensor, whose memory should not have been written yet: pages get their size at the first touch.

    Nothing happens to small tensors, on other devices than the CPU, and on other systems than Linux.
    """
    size = tensor.numel() * tensor.element_size()
    if size >= _LARGE and _libc is not None and tensor.device.type == "cpu":
        start = -(-tensor.data_ptr() // _HUGE) * _HUGE
        length = (tensor.data_ptr() + size) // _HUGE * _HUGE - start
        _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
    return tensor
