"""Sixteen rows of results, w examples side by side, to sixteen neighbours in each of w examples, and back: four
examples at a time, for kernels that are handed addresses. One number after the other, it took as long as short rows of
a weight.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import I32, I64

__all__ = ["TURNED", "turn_back", "turn_out"]

TURNED = 4  # examples at a time
_ROWS = 16


@intrinsic
def turn_out(typing_context, scratch, source, apart, target, place, step, n, zero):
    """``target[place + e * step + i] = scratch[source + i * apart + e]`` for 16 rows i and n examples e, 4 at most."""

    def emit(context, builder, signature, arguments):
        scratch_, source_, apart_, target_, place_, step_, n_ = arguments[:7]
        memory = _Memory(context, builder, zero)
        found: list[list[Any]] = [[] for _ in range(TURNED)]
        for first in range(0, _ROWS, TURNED):
            rows = []
            for i in range(first, first + TURNED):
                at = builder.add(source_, builder.mul(apart_, I64(i)))
                rows.append(memory.load(scratch_, at, TURNED))
            for e, part in enumerate(_turned(builder, rows)):
                found[e].append(part)
        for e, parts in enumerate(found):
            with builder.if_then(builder.icmp_signed("<", I64(e), n_), likely=True):
                at = builder.add(place_, builder.mul(step_, I64(e)))
                memory.store(target_, at, _joined(builder, parts))
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, long, long, long, long, zero), emit


@intrinsic
def turn_back(typing_context, source, place, step, scratch, target, apart, n, zero):
    """``scratch[target + i * apart + e] = source[place + e * step + i]``, and 0 for the examples from n on, of 4."""

    def emit(context, builder, signature, arguments):
        source_, place_, step_, scratch_, target_, apart_, n_ = arguments[:7]
        memory = _Memory(context, builder, zero)
        nothing = ir.Constant(memory.vector(_ROWS), [0.0] * _ROWS)
        rows = []
        for e in range(TURNED):
            row = cgutils.alloca_once_value(builder, nothing)
            with builder.if_then(builder.icmp_signed("<", I64(e), n_), likely=True):
                builder.store(
                    memory.load(source_, builder.add(place_, builder.mul(step_, I64(e))), _ROWS), row
                )
            rows.append(builder.load(row, typ=nothing.type))
        for first in range(0, _ROWS, TURNED):
            some = [_lanes(builder, row, row, range(first, first + TURNED)) for row in rows]
            for i, part in enumerate(_turned(builder, some)):
                memory.store(scratch_, builder.add(target_, builder.mul(apart_, I64(first + i))), part)
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, long, long, long, long, zero), emit


class _Memory:
    """Vectors at addresses."""

    def __init__(self, context: Any, builder: Any, zero: Any) -> None:
        self.builder, self.number = builder, context.get_value_type(zero)
        self.align = 8 if isinstance(self.number, ir.DoubleType) else 4

    def vector(self, lanes: int) -> Any:
        return ir.VectorType(self.number, lanes)

    def _place(self, address: Any, index: Any, vector: Any) -> Any:
        numbers = self.builder.inttoptr(address, self.number.as_pointer())
        return self.builder.bitcast(self.builder.gep(numbers, [index]), vector.as_pointer())

    def load(self, address: Any, index: Any, lanes: int) -> Any:
        vector = self.vector(lanes)
        loaded = self.builder.load(self._place(address, index, vector), typ=vector)
        loaded.align = self.align
        return loaded

    def store(self, address: Any, index: Any, value: Any) -> None:
        self.builder.store(value, self._place(address, index, value.type)).align = self.align


def _lanes(builder: Any, a: Any, b: Any, lanes: Any) -> Any:
    chosen = list(lanes)
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(chosen)), chosen))


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    """4 x 4 numbers."""
    a, b, c, d = rows
    low, high = ([0, 4, 1, 5], [2, 6, 3, 7])
    ab, cd = (
        [_lanes(builder, a, b, half) for half in (low, high)],
        [_lanes(builder, c, d, half) for half in (low, high)],
    )
    first, second = [0, 1, 4, 5], [2, 3, 6, 7]
    return [_lanes(builder, ab[i], cd[i], half) for i in range(2) for half in (first, second)]


def _joined(builder: Any, parts: list[Any]) -> Any:
    while len(parts) > 1:
        width = 2 * parts[0].type.count
        parts = [_lanes(builder, *parts[i : i + 2], range(width)) for i in range(0, len(parts), 2)]
    return parts[0]
