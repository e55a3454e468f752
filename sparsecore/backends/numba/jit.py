"""How kernels are compiled, cached, split over threads, and handed torch's memory."""

from __future__ import annotations

import hashlib
import os
import platform
import threading
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba.launch import address_of, call_chunk, limit_threads, set_threads, share_out
from sparsecore.backends.numba.processor import PORTABLE
from sparsecore.errors import SparsecoreError

__all__ = ["array", "device_function", "kernel", "operand", "serial_kernel", "share_out", "split", "threads"]

# Sums may be reassociated (a vectorised dot product needs it), but NaN and infinity keep their meaning.
_FASTMATH = {"reassoc", "contract", "arcp", "nsz"}
_OPTIONS: dict[str, Any] = {"cache": True, "nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}

# Below this many multiply-adds a second thread costs more than it brings (a region is about 2 us on idle cores,
# milliseconds on busy ones).
_SERIAL_WORK = 50_000

# What compiled kernels depend on besides their own file: numba's cache does not notice edits of inlined helpers, nor
# (where installers keep a wheel's file times) that another version was installed.
_FILES = [*sorted(Path(__file__).parent.glob("*.py")), Path(__file__).parents[2] / "sampling.py"]
_SOURCES = hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in _FILES)).hexdigest()

_SIMD = os.environ.get("SPARSECORE_SIMD", "native")
if _SIMD not in ("native", "portable"):
    raise SparsecoreError(f"SPARSECORE_SIMD must be native or portable, got {_SIMD!r}")
if _SIMD == "portable" and platform.machine().lower() in ("x86_64", "amd64"):
    # What a processor without AVX-512 gets, to test it anywhere. The cache tells processors apart by these two.
    numba.config.CPU_NAME, numba.config.CPU_FEATURES = PORTABLE


def _njit(function: Callable[..., Any], **more: Any) -> Any:
    """numba.njit with our options; without a cache where no folder for one can be written to, as in containers that are
    read-only and have no home. (A folder that others can write to will not do: numba would unpickle what lies there.)
    """
    try:
        return numba.njit(**more, **_OPTIONS)(function)
    except RuntimeError as error:
        if "no locator available" not in str(error):
            raise
    if _OPTIONS["cache"]:
        _OPTIONS["cache"] = False
        warnings.warn(
            f"kernels are compiled anew in every process, for neither {Path(__file__).parent} nor a cache folder of "
            "this user can be written to: set NUMBA_CACHE_DIR to one that can, and that only you can write to",
            stacklevel=2,
        )
    return numba.njit(**more, **_OPTIONS)(function)


_forked = False


def _note_fork() -> None:
    global _forked
    _forked = True


# GNU OpenMP aborts a process that was forked after its thread pool started: children run the serial kernels.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_note_fork)


def device_function(function: Callable[..., Any]) -> Any:
    """A helper that is inlined into kernels."""
    return _njit(function, inline="always")


def _compiled(function: Any, **more: Any) -> Any:
    dispatcher = _njit(function, **more)
    if _OPTIONS["cache"]:
        file = dispatcher._cache._cache_file
        file._source_stamp = (file._source_stamp, _SOURCES)
    return dispatcher


def serial_kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a function without parallel constructs, compiled once. It may allocate arrays, and return them."""
    return _compiled(function)


def _share(chunk, arguments, n_chunks):
    before = limit_threads(n_chunks)
    for number in numba.prange(n_chunks):
        call_chunk(chunk, arguments, np.intp(number))  # its own type would be unsigned
    set_threads(before)


_share = _compiled(_share, parallel=True)


class kernel:
    """Decorator: the work of one chunk, to be shared by threads or done by one.

    The last two arguments of the function are the number of chunks and the number of the chunk that it is to do; who
    calls the kernel gives all but the very last. The number of threads is the number of chunks, torch's, or numba's
    where that is smaller; numba's own setting is as before after the call.

    A kernel is compiled once, for one thread and for several, and so begins with

        if chunk < 0:
            return share_out(chunk, n_chunks)

    where a negative number is the address of what hands out chunks (`launch`).

    Kernels allocate nothing (scratch is given to them: `memory.workspace`), so that numba need not count references to
    arrays. It does so inside loops where it does not see that it could leave it, and threads then wait for each other:
    an Adam step on the rows of a batch took as long with two as with one.
    """

    def __init__(self, function: Any) -> None:
        if "share_out" not in function.__code__.co_names:
            raise TypeError(f"{function.__qualname__} does not begin with share_out")
        self._compiled = _compiled(function, _nrt=False)

    def __call__(self, *arguments: Any) -> Any:
        if arguments[-1] == 1:
            return self._compiled(*arguments, 0)
        share, alone = _pool()
        if not alone:
            return self._compiled(*arguments, -share)
        with _alone:
            return self._compiled(*arguments, -share)


_alone = threading.Lock()


@cache
def _pool() -> tuple[int, bool]:
    """Start numba's threads. It sets the number of OpenMP threads, which may be torch's too (one library for both):
    put that back.

    Returns:
        The address of what shares out chunks, and whether it serves one of Python's threads at a time: where numba
        finds neither OpenMP nor TBB, the process would be aborted.
    """
    before = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(before)
    share = address_of(_share, numba.types.uintp, numba.types.uintp, numba.types.intp)
    return share, numba.threading_layer() == "workqueue"


def threads(work: int) -> int:
    """Number of chunks for this many multiply-adds: torch's thread count, or 1 where that is faster or safer."""
    if work < _SERIAL_WORK or _forked:
        return 1
    return torch.get_num_threads()


def operand(tensor: Tensor) -> Tensor:
    """What was given beside a weight on the CPU, with its numbers in memory, one after the other.

    Raises:
        SparsecoreError: if it is on another device.
    """
    if not tensor.is_cpu:
        raise SparsecoreError(
            f"the weight is on the CPU, what it is used with on {tensor.device}: move one of them with .to()"
        )
    if tensor.is_neg():  # torch leaves the sign of the imaginary part of a conjugate for later
        tensor = tensor.resolve_neg()
    if tensor._is_zerotensor():  # has no memory
        tensor = tensor.clone()
    try:
        return tensor if tensor.is_contiguous() else tensor.contiguous()
    except RuntimeError as error:
        if tensor.layout is torch.strided:
            raise
        raise SparsecoreError(
            f"expected a dense tensor, got layout {tensor.layout}: convert it with .to_dense(), or give the ids of "
            "what it holds to a SparseEmbeddingBag"
        ) from error


def _checked_numpy(tensor: Tensor) -> np.ndarray:
    return operand(tensor).numpy()


try:
    torch._efficientzerotensor(1).numpy()
    _numpy = _checked_numpy  # torch 2.6 reads where such a tensor has no memory
except RuntimeError:
    _numpy = Tensor.numpy


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as a C-contiguous numpy array (copied only where it is not contiguous)."""
    # To ask a tensor all that could be in the way takes as long as the conversion, which refuses most of it.
    try:
        found = _numpy(tensor)
    except (RuntimeError, TypeError):
        return _converted(tensor)
    return found if found.flags.c_contiguous and found.dtype.char != "e" else _converted(tensor)


def _converted(tensor: Tensor) -> np.ndarray:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        raise SparsecoreError(
            f"the numba backend computes in float32 or float64, got {str(tensor.dtype).removeprefix('torch.')}; "
            "convert the model and its input with .to(torch.float32)"
        )
    return operand(tensor.detach() if tensor.requires_grad else tensor).numpy()


@device_function
def split(crow, n_chunks, chunk):
    """First row of a chunk when rows are split so that rows + nonzeros are even: smallest r, crow[r] + r >= target."""
    n_rows = crow.shape[0] - 1
    target = (crow[n_rows] + n_rows) * chunk // n_chunks
    low, high = 0, n_rows
    while low < high:
        middle = (low + high) // 2
        if crow[middle] + middle >= target:
            high = middle
        else:
            low = middle + 1
    return low
