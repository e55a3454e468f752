"""One row of a weight in CSR times activations that are packed w examples wide, for kernels that are handed addresses.

``scratch[panel + w * j + e]`` is the activation of column j and example e; w is the length of the tuple ``examples``.

Nonzeros are taken some at a time. Those that are left at a row's end are taken as if they were as many, which reads
what belongs to the next rows and makes nothing of it: a loop over them, left after another number of turns in every
row, would cost more than they do. Only the last rows before ``limit``, the end of all nonzeros, have such a loop: how a
row is rounded does not depend on who computes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import I32, I64, call

__all__ = ["SPARE", "add_row", "dot_of_row", "dots_of_row", "spread_row"]

SPARE = 8  # columns of scratch behind the weight's, for what is left at a row's end


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
        return _spread(self.builder, number, self.width)

    def multiply_add(self, a: Any, b: Any, c: Any) -> Any:
        return call(self.builder, f"llvm.fmuladd.v{self.width}f{self.bits}", self.vector, [a, b, c])

    def offsets(self, k: Any, left: Any, nowhere: Any, apart: int) -> list[Any]:
        """Where in a panel the vectors of the next nonzeros lie, of those that are not left one of ``nowhere``."""
        columns = _next(self.builder, self.columns, k, self.column)
        wide = ir.VectorType(I64, SPARE)
        columns = columns if self.column == I64 else self.builder.zext(columns, wide)
        instead = _spread(self.builder, nowhere, SPARE)
        instead = self.builder.add(instead, ir.Constant(wide, [apart * i for i in range(SPARE)]))
        columns = self.builder.select(_are_left(self.builder, left), columns, instead)
        columns = self.builder.mul(columns, ir.Constant(wide, [self.width] * SPARE))
        return [self.builder.extract_element(columns, I32(i)) for i in range(SPARE)]


@intrinsic
def add_row(
    typing_context, values, begin, end, limit, columns, column, scratch, panel, cols, place, zero, examples
):
    """scratch[place + e] = sum of values[k] * scratch[panel + w * columns[k] + e] for k from begin to end, e < w.

    The panel has zeros for a column number ``cols``.
    """
    w = examples.count
    sums = 2 if w == 16 else 4  # multiply-adds to the same one wait for each other

    def emit(context, builder, signature, arguments):
        values_, begin_, end_, limit_, columns_, _, scratch_, panel_, cols_, place_ = arguments[:10]
        row = _Row(context, builder, zero, column, w, columns_, scratch_)
        vector, values_at = row.vector, row.numbers(values_)
        totals = [cgutils.alloca_once(builder, vector) for _ in range(sums)]
        for total in totals:
            builder.store(ir.Constant(vector, [0.0] * w), total)

        def add(i, value, activations):
            total = totals[i % sums]
            total_ = row.multiply_add(row.spread(value), activations, builder.load(total, typ=vector))
            builder.store(total_, total)

        def add_one(k, i=0):
            value = builder.load(builder.gep(values_at, [k]), typ=row.number)
            add(i, value, row.activations(panel_, k))

        def add_each(k):
            for i in range(SPARE):
                add_one(builder.add(k, I64(i)), i)

        def add_rest(k, left):
            found = _next(builder, values_at, k, row.number)
            nothing = ir.Constant(found.type, [0.0] * SPARE)
            found = builder.select(_are_left(builder, left), found, nothing)
            for i, offset in enumerate(row.offsets(k, left, cols_, 0)[:-1]):
                add(i, builder.extract_element(found, I32(i)), row.load(builder.add(panel_, offset)))

        _in_groups(builder, begin_, end_, limit_, add_each, add_rest, add_one)
        loaded = [builder.load(total, typ=vector) for total in totals]
        while len(loaded) > 1:
            loaded = [builder.fadd(*loaded[i : i + 2]) for i in range(0, len(loaded), 2)]
        builder.store(loaded[0], row.place(place_)).align = row.bits // 8
        return context.get_dummy_value()

    long = types.int64
    given = (long, long, long, long, long, column, long, long, long, long, zero, examples)
    return types.void(*given), emit


@intrinsic
def dot_of_row(typing_context, values, begin, end, limit, columns, column, x, zero):
    """The sum of values[k] * x[columns[k]] for k from begin to end: one example, which lies at x as it is."""

    def emit(context, builder, signature, arguments):
        values_, begin_, end_, limit_, columns_, _, x_ = arguments[:7]
        row = _Row(context, builder, zero, column, SPARE, columns_, x_)
        vector, values_at = row.vector, row.numbers(values_)
        nothing = ir.Constant(vector, [0.0] * SPARE)
        total, single = cgutils.alloca_once(builder, vector), cgutils.alloca_once(builder, row.number)
        builder.store(nothing, total)
        builder.store(ir.Constant(row.number, 0.0), single)

        def activation(k):
            j = builder.load(builder.gep(row.columns, [k]), typ=row.column)
            j = j if row.column == I64 else builder.zext(j, I64)
            return builder.load(builder.gep(row.scratch, [j]), typ=row.number)

        def add_each(k, left=None):
            found, picked = _next(builder, values_at, k, row.number), nothing
            for i in range(SPARE):
                picked = builder.insert_element(picked, activation(builder.add(k, I64(i))), I32(i))
            if left is not None:
                stored = _are_left(builder, left)
                found, picked = (builder.select(stored, each, nothing) for each in (found, picked))
            builder.store(row.multiply_add(found, picked, builder.load(total, typ=vector)), total)

        def add_one(k):
            value = builder.load(builder.gep(values_at, [k]), typ=row.number)
            product = builder.fmul(value, activation(k))
            builder.store(builder.fadd(builder.load(single, typ=row.number), product), single)

        _in_groups(builder, begin_, end_, limit_, add_each, add_each, add_one)
        sums, lanes = builder.load(total, typ=vector), SPARE
        while lanes > 1:
            lanes //= 2
            low, high = ([*range(lanes)], [*range(lanes, 2 * lanes)])
            halves = (
                builder.shuffle_vector(sums, sums, ir.Constant(ir.VectorType(I32, lanes), half))
                for half in (low, high)
            )
            sums = builder.fadd(*halves)
        return builder.fadd(builder.extract_element(sums, I32(0)), builder.load(single, typ=row.number))

    long = types.int64
    return zero(long, long, long, long, long, column, long, zero), emit


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

        def one(k):
            sums = products(k)
            sums = pairs(sums, sums, [0, 2], [1, 3])
            write(k, builder.fadd(*(builder.extract_element(sums, I32(i)) for i in range(2))), row.number)

        done = _whole_groups(builder, begin_, end_, 4, group)
        with cgutils.for_range(builder, builder.sub(end_, done)) as loop:
            one(builder.add(done, loop.index))
        return context.get_dummy_value()

    long = types.int64
    return types.void(long, long, long, column, long, long, long, long, types.boolean, zero, examples), emit


@intrinsic
def spread_row(
    typing_context, values, begin, end, limit, columns, column, scratch, sums, cols, place, zero, examples
):
    """scratch[sums + w * columns[k] + e] += values[k] * scratch[place + e] for k from begin to end, e < w.

    What lies there for the SPARE columns from ``cols`` on is overwritten.
    """
    w = examples.count

    def emit(context, builder, signature, arguments):
        values_, begin_, end_, limit_, columns_, _, scratch_, sums_, cols_, place_ = arguments[:10]
        row = _Row(context, builder, zero, column, w, columns_, scratch_)
        own, values_at = row.load(place_), row.numbers(values_)

        def add(k, there):
            value = builder.load(builder.gep(values_at, [k]), typ=row.number)
            before = builder.load(there, typ=row.vector)
            before.align = row.bits // 8
            total = row.multiply_add(row.spread(value), own, before)
            builder.store(total, there).align = row.bits // 8

        def one(k):
            add(k, row.place_of_column(sums_, k))

        def group(k):
            for i in range(SPARE):
                one(builder.add(k, I64(i)))

        def rest(k, left):  # to a column each: additions to the same one wait for each other
            for i, offset in enumerate(row.offsets(k, left, cols_, 1)[:-1]):
                add(builder.add(k, I64(i)), row.place(builder.add(sums_, offset)))

        _in_groups(builder, begin_, end_, limit_, group, rest, one)
        return context.get_dummy_value()

    long = types.int64
    given = (long, long, long, long, long, column, long, long, long, long, zero, examples)
    return types.void(*given), emit


def _in_groups(
    builder: Any,
    begin: Any,
    end: Any,
    limit: Any,
    group: Callable[[Any], None],
    rest: Callable[[Any, Any], None],
    one: Callable[[Any], None],
) -> None:
    """Nonzeros in groups; then those that are left in another, if there are as many up to the limit, or one by one."""
    k = _whole_groups(builder, begin, end, SPARE, group)
    left = builder.sub(end, k)
    can_be_read = builder.icmp_signed("<=", builder.add(k, I64(SPARE)), limit)
    with builder.if_else(can_be_read, likely=True) as (then, otherwise):
        with then:
            rest(k, left)
        with otherwise, cgutils.for_range(builder, left) as loop:
            one(builder.add(k, loop.index))


def _whole_groups(builder: Any, begin: Any, end: Any, size: int, group: Callable[[Any], None]) -> Any:
    """Loop over whole groups of nonzeros, and where the rest of them begins."""
    groups = builder.sdiv(builder.sub(end, begin), I64(size))
    with cgutils.for_range(builder, groups) as loop:
        group(builder.add(begin, builder.mul(loop.index, I64(size))))
    return builder.add(begin, builder.mul(groups, I64(size)))


def _spread(builder: Any, number: Any, lanes: int) -> Any:
    undefined = ir.Constant(ir.VectorType(number.type, lanes), ir.Undefined)
    everywhere = ir.Constant(ir.VectorType(I32, lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(undefined, number, I32(0)), undefined, everywhere)


def _next(builder: Any, pointer: Any, k: Any, kind: Any) -> Any:
    """The next SPARE numbers from k on."""
    vector = ir.VectorType(kind, SPARE)
    loaded = builder.load(builder.bitcast(builder.gep(pointer, [k]), vector.as_pointer()), typ=vector)
    loaded.align = 1
    return loaded


def _are_left(builder: Any, left: Any) -> Any:
    """Which of SPARE lanes are less than ``left``."""
    numbers = ir.Constant(ir.VectorType(I32, SPARE), [*range(SPARE)])
    return builder.icmp_signed("<", numbers, _spread(builder, builder.trunc(left, I32), SPARE))
