"""What this machine can do at best: multiply-adds a second, and bytes a second from memory.

Measured in the same run as what is compared with them, by loops that do nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.measure import interleaved
from sparsecore.pages import ask_huge_pages

__all__ = ["Ceilings", "measure_ceilings"]

_ROW = 64  # float32: 256 bytes
_AHEAD = (4, 8, 16, 32)  # rows; the best of them counts
# Vectors of 16, as many as there are registers for: a processor that does two at once, in four cycles, needs eight.
_CHAINS = 12 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 6


@dataclass(frozen=True)
class Ceilings:
    """What loops that do nothing else reach, for one number of threads: nothing that goes to where they go exceeds it
    by much.

    Attributes:
        fma: float32 operations a second (two for each multiply-add) in registers.
        read: bytes a second, from the beginning to the end of memory far larger than the caches.
        copy: bytes a second, read and written, by torch's copy.
        rows: bytes a second of rows of 256 bytes at random places on huge pages, each asked for ahead of time.
        cached_rows: the same from 16 MiB, which the last cache holds.
    """

    fma: float
    read: float
    copy: float
    rows: float
    cached_rows: float


@intrinsic
def _add_rows(typing_context: Any, memory: Any, ids: Any, first: Any, last: Any, ahead: Any) -> Any:
    """Sum of the rows ``ids[first:last]``, that of the id ``ahead`` places further on asked for before each is read:
    nothing but loads and additions of vectors of 16."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        floats, places = (
            context.make_array(kind)(context, builder, value).data
            for kind, value in zip(signature.args[:2], arguments[:2], strict=True)
        )
        begin, end, further = arguments[2:]
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        vector = ir.VectorType(ir.FloatType(), 16)
        ask = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        prefetch = cgutils.get_or_insert_function(builder.module, ask, "llvm.prefetch.p0")
        row = ir.Constant(begin.type, _ROW)
        sums = [
            cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * 16)) for _ in range(_ROW // 16)
        ]
        with cgutils.for_range(builder, builder.sub(end, begin)) as loop:
            i = builder.add(begin, loop.index)
            soon = builder.load(builder.gep(places, [builder.add(i, further)]))
            start = builder.gep(floats, [builder.mul(soon, row)])
            here = builder.gep(floats, [builder.mul(builder.load(builder.gep(places, [i])), row)])
            for part, total in enumerate(sums):
                offset = [ir.Constant(begin.type, 16 * part)]
                line = builder.bitcast(builder.gep(start, offset), byte)
                builder.call(prefetch, [line, word(0), word(3), word(1)])
                found = builder.load(
                    builder.bitcast(builder.gep(here, offset), vector.as_pointer()), typ=vector
                )
                found.align = 4
                builder.store(builder.fadd(builder.load(total), found), total)
        result = builder.load(sums[0])
        for total in sums[1:]:
            result = builder.fadd(result, builder.load(total))
        return builder.extract_element(result, word(0))

    return types.float32(memory, ids, types.intp, types.intp, types.intp), emit


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


@numba.njit(parallel=True, cache=True, nogil=True)
def _sum_rows(x: Any, ids: Any, ahead: int, n_chunks: int) -> Any:
    total = np.zeros((n_chunks, 16), np.float32)
    count = ids.shape[0] - ahead
    for chunk in prange(n_chunks):
        total[chunk, 0] = _add_rows(
            x, ids, count * chunk // n_chunks, count * (chunk + 1) // n_chunks, np.intp(ahead)
        )
    return total


def _sum_places(x: Any, places: Callable[[], Any], ahead: int, n_chunks: int) -> None:
    _sum_rows(x, places(), ahead, n_chunks)


def measure_ceilings(n_threads: int, quick: bool = False) -> Ceilings:
    """Measure all of them with this many threads (of torch and of numba)."""
    before = torch.get_num_threads()
    elements = 1 << (18 if quick else 26)
    source = ask_huge_pages(torch.empty(elements)).fill_(1.0)
    memory, target = source.numpy(), torch.empty(elements)
    count = 1 << (10 if quick else 17)
    far = _places(elements // _ROW, count)
    near = _places(min(elements // _ROW, (1 << 24) // (4 * _ROW)), count)
    sums, repeats = np.full((n_threads, 16), 0.25, np.float32), 1000 if quick else 1_000_000
    candidates: dict[str, Callable[[], object]] = {
        "fma": lambda: _multiply_adds(sums, repeats, n_threads),
        "read": lambda: _sum(memory, n_threads),
        "copy": lambda: target.copy_(source),
    }
    for ahead in _AHEAD:
        candidates[f"rows {ahead}"] = partial(_sum_places, memory, far, ahead, n_threads)
        candidates[f"cached_rows {ahead}"] = partial(_sum_places, memory, near, ahead, n_threads)
    try:
        for run in candidates.values():
            run()
        torch.set_num_threads(n_threads)  # starting numba's threads changes it
        times = {
            name: t.minimum for name, t in interleaved(candidates, seconds=0.05 if quick else 3.0).items()
        }
    finally:
        torch.set_num_threads(before)
    rates = {
        name: max(4 * _ROW * (count - ahead) / times[f"{name} {ahead}"] for ahead in _AHEAD)
        for name in ("rows", "cached_rows")
    }
    return Ceilings(
        fma=2 * 16 * _CHAINS * repeats * n_threads / times["fma"],
        read=memory.nbytes / times["read"],
        copy=2 * memory.nbytes / times["copy"],
        **rates,
    )


def _places(n_rows: int, count: int) -> Callable[[], Any]:
    """Other rows at every call, so that no cache holds those of a call before."""
    lists = itertools.cycle(np.random.default_rng(0).integers(0, n_rows, (8, count)))
    return lambda: next(lists)
