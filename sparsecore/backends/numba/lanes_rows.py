"""One row of a weight in CSR times activations that are packed w examples wide, for kernels that are handed addresses.

``scratch[panel + w * j + e]`` is the activation of column j and example e; w is the length of the tuple ``examples``.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import I32, I64, call

__all__ = ["add_row", "dots_of_row", "spread_row"]


class _Row:
    """What both operations read: the columns of nonzeros, and vectors of w numbers in scratch memory."""

    def __init__(
        self, context: Any, builder: Any, zero: Any, column: Any, width: int, columns: Any, scratch: Any
    ) -> None:
        self.builder, self.width = builder, width
        self.number, self.column = context.get_value_type(zero), context.get_value_type(column)
        self.bits = 64 if isinstance(self.number, ir.DoubleType) else 32
        self.vector = ir.VectorType(self.number, width)
        self.columns = builder.inttoptr(columns, self.column.as_pointer())
        self.scratch = self.numbers(scratch)

    def numbers(self, address: Any) -> Any:
        return self.builder.inttoptr(address, self.number.as_pointer())

    def place(self, index: Any) -> Any:
        there = self.builder.gep(self.scratch, [index])
        return self.builder.bitcast(there, self.vector.as_pointer())

    def load(self, index: Any) -> Any:
        loaded = self.builder.load(self.place(index), typ=self.vector)
        loaded.align = self.bits // 8
        return loaded

    def place_of_column(self, panel: Any, k: Any) -> Any:
        """Where the vector of nonzero k's column lies."""
        j = self.builder.load(self.builder.gep(self.columns, [k]), typ=self.column)
        j = j if self.column == I64 else self.builder.zext(j, I64)
        return self.place(self.builder.add(panel, self.builder.mul(j, I64(self.width))))

    def activations(self, panel: Any, k: Any) -> Any:
        loaded = self.builder.load(self.place_of_column(panel, k), typ=self.vector)
        loaded.align = self.bits // 8
        return loaded

    def spread(self, number: Any) -> Any:
        """The number in every lane."""
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, number, I32(0))
        everywhere = ir.Constant(ir.VectorType(I32, self.width), [0] * self.width)
        return self.builder.shuffle_vector(one, undefined, everywhere)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return call(self.builder, f"llvm.fmuladd.v{self.width}f{self.bits}", self.vector, [a, b, c])


@intrinsic
def add_row(typing_context, values, begin, end, columns, column, scratch, panel, place, zero, examples):
    """scratch[place + e] = sum of values[k] * scratch[panel + w * columns[k] + e] for k from begin to end, e < w."""
    w = examples.count
    sums = 2 if w == 16 else 4  # at a time: multiply-adds to the same one wait for each other

    def emit(context, builder, signature, arguments):
        values_, begin_, end_, columns_, _, scratch_, panel_, place_ = arguments[:8]
        row = _Row(context, builder, zero, column, w, columns_, scratch_)
        vector, values_at = row.vector, row.numbers(values_)
        nothing = ir.Constant(vector, [0.0] * w)
        totals = [cgutils.alloca_once(builder, vector) for _ in range(sums)]
        for total in totals:
            builder.store(nothing, total)

        def add(k, total):
            value = builder.load(builder.gep(values_at, [k]), typ=row.number)
            total_ = row.multiply_add(
                row.spread(value), row.activations(panel_, k), builder.load(total, typ=vector)
            )
            builder.store(total_, total)

        def add_each(k):
            for i, total in enumerate(totals):
                add(builder.add(k, I64(i)), total)

        done = _in_groups(builder, begin_, end_, sums, add_each)
        with cgutils.for_range(builder, builder.sub(end_, done)) as loop:
            add(builder.add(done, loop.index), totals[0])
        loaded = [builder.load(total, typ=vector) for total in totals]
        while len(loaded) > 1:
            loaded = [builder.fadd(*loaded[i : i + 2]) for i in range(0, len(loaded), 2)]
        builder.store(loaded[0], row.place(place_)).align = row.bits // 8
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, long, column, long, long, long, zero, examples), emit


@intrinsic
def dots_of_row(
    typing_context, begin, end, columns, column, scratch, panel, place, out, more, zero, examples
):
    """out[k] (+)= sum over e < w of scratch[place + e] * scratch[panel + w * columns[k] + e], for k from begin to end.

    Four at a time, whose lanes are added up together. ``more``: add to what is there already.
    """
    w = examples.count

    def emit(context, builder, signature, arguments):
        begin_, end_, columns_, _, scratch_, panel_, place_, out_, more_ = arguments[:9]
        row = _Row(context, builder, zero, column, w, columns_, scratch_)
        own, out_at = row.load(place_), row.numbers(out_)
        four = ir.VectorType(row.number, 4)
        more_ = builder.trunc(more_, ir.IntType(1)) if more_.type.width > 1 else more_

        def shuffled(a, b, lanes):
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

        def products(k):
            """Four partial sums."""
            found, lanes = builder.fmul(own, row.activations(panel_, k)), w
            while lanes > 4:
                lanes //= 2
                low, high = ([*range(lanes)], [*range(lanes, 2 * lanes)])
                found = builder.fadd(shuffled(found, found, low), shuffled(found, found, high))
            return found

        def pairs(a, b, even, odd):
            return builder.fadd(shuffled(a, b, even), shuffled(a, b, odd))

        def write(k, sums, kind):
            there = builder.bitcast(builder.gep(out_at, [k]), kind.as_pointer())
            before = builder.load(there, typ=kind)
            before.align = row.bits // 8
            sums = builder.select(more_, builder.fadd(before, sums), sums)  # what was not written may be NaN
            builder.store(sums, there).align = row.bits // 8

        def group(k):
            a, b, c, d = (products(builder.add(k, I64(i))) for i in range(4))
            first = pairs(a, b, [0, 4, 2, 6], [1, 5, 3, 7])
            second = pairs(c, d, [0, 4, 2, 6], [1, 5, 3, 7])
            write(k, pairs(first, second, [0, 1, 4, 5], [2, 3, 6, 7]), four)

        done = _in_groups(builder, begin_, end_, 4, group)
        with cgutils.for_range(builder, builder.sub(end_, done)) as loop:
            k = builder.add(done, loop.index)
            sums = products(k)
            sums = pairs(sums, sums, [0, 2], [1, 3])
            write(k, builder.fadd(*(builder.extract_element(sums, I32(i)) for i in range(2))), row.number)
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, column, long, long, long, long, types.boolean, zero, examples), emit


@intrinsic
def spread_row(typing_context, values, begin, end, columns, column, scratch, sums, place, zero, examples):
    """scratch[sums + w * columns[k] + e] += values[k] * scratch[place + e] for k from begin to end, e < w."""
    w = examples.count

    def emit(context, builder, signature, arguments):
        values_, begin_, end_, columns_, _, scratch_, sums_, place_ = arguments[:8]
        row = _Row(context, builder, zero, column, w, columns_, scratch_)
        own, values_at = row.load(place_), row.numbers(values_)

        def add(k):
            value = builder.load(builder.gep(values_at, [k]), typ=row.number)
            there = row.place_of_column(sums_, k)
            before = builder.load(there, typ=row.vector)
            before.align = row.bits // 8
            total = row.multiply_add(row.spread(value), own, before)
            builder.store(total, there).align = row.bits // 8

        def group(k):
            for i in range(4):
                add(builder.add(k, I64(i)))

        done = _in_groups(builder, begin_, end_, 4, group)
        with cgutils.for_range(builder, builder.sub(end_, done)) as loop:
            add(builder.add(done, loop.index))
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, long, column, long, long, long, zero, examples), emit


def _in_groups(builder: Any, begin: Any, end: Any, size: int, body: Any) -> Any:
    """Loop over whole groups of nonzeros, and where the rest of them begins."""
    groups = builder.sdiv(builder.sub(end, begin), I64(size))
    with cgutils.for_range(builder, groups) as loop:
        body(builder.add(begin, builder.mul(loop.index, I64(size))))
    return builder.add(begin, builder.mul(groups, I64(size)))
