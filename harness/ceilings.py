"""What this machine can do at best: multiply-adds a second, and bytes a second from memory.

Measured in the same run as what is compared with them, by loops that do nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.measure import interleaved

__all__ = ["Ceilings", "measure_ceilings"]

_ROW = 64  # float32: 256 bytes
_AHEAD = 16
# Vectors of 16, as many as there are registers for: a processor that does two at once, in four cycles, needs eight.
_CHAINS = 12 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 6


@dataclass(frozen=True)
class Ceilings:
    """Rates that nothing exceeds, for one number of threads.

    Attributes:
        fma: float32 operations a second (two for each multiply-add) in registers.
        read: bytes a second, from the beginning to the end of memory far larger than the caches.
        copy: bytes a second, read and written, by torch's copy.
        rows: bytes a second of rows of 256 bytes at random places, each asked for ahead of time.
        cached_rows: the same from 16 MiB, which the last cache holds.
    """

    fma: float
    read: float
    copy: float
    rows: float
    cached_rows: float


@intrinsic
def _prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        place = builder.bitcast(builder.gep(data, [arguments[1]]), byte)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def _chains(typing_context: Any, repeats: Any, number: Any) -> Any:
    """Sum of _CHAINS vectors of 16, after ``v = v * number + number`` on each, over and over: nothing but multiply-adds
    in registers, as many that do not wait for each other as it takes."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), 16)
        name = "llvm.fmuladd.v16f32"
        multiply_add = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(vector, [vector] * 3), name
        )
        undefined, first = (
            ir.Constant(vector, ir.Undefined),
            ir.Constant(ir.VectorType(ir.IntType(32), 16), [0] * 16),
        )
        same = builder.insert_element(undefined, arguments[1], ir.IntType(32)(0))
        same = builder.shuffle_vector(same, undefined, first)
        chains = [cgutils.alloca_once_value(builder, same) for _ in range(_CHAINS)]
        with cgutils.for_range(builder, arguments[0]):
            for chain in chains:
                builder.store(builder.call(multiply_add, [builder.load(chain), same, same]), chain)
        total = builder.load(chains[0])
        for chain in chains[1:]:
            total = builder.fadd(total, builder.load(chain))
        return builder.extract_element(total, ir.IntType(32)(0))

    return types.float32(types.intp, types.float32), emit


@numba.njit(parallel=True, cache=True, nogil=True)
def _multiply_adds(out: Any, repeats: int, n_chunks: int) -> Any:
    for chunk in prange(n_chunks):
        out[chunk, 0] = _chains(repeats, out[chunk, 1])


@numba.njit(nogil=True, fastmath=True)
def _total(part: Any) -> Any:
    """In a function of its own: inside prange, LLVM does not see that the places are not negative."""
    s = np.float32(0)
    for i in range(part.shape[0]):
        s += part[i]
    return s


@numba.njit(parallel=True, cache=True, nogil=True, fastmath=True)
def _sum(x: Any, n_chunks: int) -> Any:
    total = np.zeros((n_chunks, 16), np.float32)
    for chunk in prange(n_chunks):
        total[chunk, 0] = _total(x[x.shape[0] * chunk // n_chunks : x.shape[0] * (chunk + 1) // n_chunks])
    return total


@numba.njit(parallel=True, cache=True, nogil=True, fastmath=True)
def _sum_rows(x: Any, ids: Any, n_chunks: int) -> Any:
    total = np.zeros((n_chunks, 16), np.float32)
    last = ids.shape[0] - 1
    for chunk in prange(n_chunks):
        s = np.float32(0)
        for i in range(ids.shape[0] * chunk // n_chunks, ids.shape[0] * (chunk + 1) // n_chunks):
            soon = ids[min(i + _AHEAD, last)] * _ROW
            for c in range(0, _ROW, 16):
                _prefetch(x, soon + c)
            s += _total(x[ids[i] * _ROW : (ids[i] + 1) * _ROW])
        total[chunk, 0] = s
    return total


def measure_ceilings(n_threads: int, quick: bool = False) -> Ceilings:
    """Measure all of them with this many threads (of torch and of numba)."""
    before = torch.get_num_threads()
    elements = 1 << (18 if quick else 26)
    memory = np.ones(elements, np.float32)
    drawn = np.random.default_rng(0).integers(0, elements // _ROW, 1 << (10 if quick else 17))
    near_ids = drawn % min(elements // _ROW, (1 << 24) // (4 * _ROW))
    source, target = torch.from_numpy(memory), torch.empty(elements)
    sums, repeats = np.full((n_threads, 16), 0.25, np.float32), 1000 if quick else 1_000_000
    candidates = {
        "fma": lambda: _multiply_adds(sums, repeats, n_threads),
        "read": lambda: _sum(memory, n_threads),
        "copy": lambda: target.copy_(source),
        "rows": lambda: _sum_rows(memory, drawn, n_threads),
        "cached_rows": lambda: _sum_rows(memory, near_ids, n_threads),
    }
    try:
        for run in candidates.values():
            run()
        torch.set_num_threads(n_threads)  # starting numba's threads changes it
        times = {
            name: t.minimum for name, t in interleaved(candidates, seconds=0.05 if quick else 2.0).items()
        }
    finally:
        torch.set_num_threads(before)
    return Ceilings(
        fma=2 * 16 * _CHAINS * repeats * n_threads / times["fma"],
        read=memory.nbytes / times["read"],
        copy=2 * memory.nbytes / times["copy"],
        rows=4 * _ROW * drawn.size / times["rows"],
        cached_rows=4 * _ROW * drawn.size / times["cached_rows"],
    )
