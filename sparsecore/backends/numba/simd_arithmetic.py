"""Arithmetic on vectors, and sums of their lanes."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import (
    I32,
    I64,
    LANES,
    VectorType,
    alignment,
    call,
    interleave,
    place_of,
    suffix,
)


@intrinsic
def splat(typing_context, scalar):
    """16 copies of a number."""
    result = VectorType(scalar)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], I32(0))
        order = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), order)

    return result(scalar), emit


@intrinsic
def zeros(typing_context, array):
    """16 zeros of the array's element type."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        return ir.Constant(context.get_value_type(result), [0.0] * LANES)

    return result(array), emit


@intrinsic
def fma(typing_context, a, b, c):
    """``a * b + c``, rounded once where the processor can."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(a)
        return call(builder, f"llvm.fmuladd.{suffix(vector)}", vector, arguments)

    return a(a, a, a), emit


def _binary(instruction):
    @intrinsic
    def operate(typing_context, a, b):
        def emit(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, a), emit

    return operate


def _unary(name):
    @intrinsic
    def operate(typing_context, a):
        def emit(context, builder, signature, arguments):
            vector = context.get_value_type(a)
            return call(builder, f"llvm.{name}.{suffix(vector)}", vector, arguments)

        return a(a), emit

    return operate


add, sub, mul, div = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))
absolute, sqrt = _unary("fabs"), _unary("sqrt")


@intrinsic
def horizontal_sum(typing_context, a):
    """Sum of the 16 lanes, by a tree."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(a)
        scalar = vector.element
        name = f"llvm.vector.reduce.fadd.{suffix(vector)}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(scalar, [scalar, vector]), name
        )
        return builder.call(function, [ir.Constant(scalar, -0.0), arguments[0]], fastmath=("reassoc",))

    return a.dtype(a), emit


@intrinsic
def sum_of_each(typing_context, vectors):
    """A tuple of 16 vectors -> one vector: lane i is the sum of the i-th's lanes. 15 additions, not 16 trees."""
    result = vectors.dtype

    def emit(context, builder, signature, arguments):
        return _folded(builder, cgutils.unpack_tuple(builder, arguments[0], LANES))

    return result(vectors), emit


@intrinsic
def sum_of_rows(typing_context, array, index):
    """The same for the 16 rows of 16 that begin at ``index``."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        rows = []
        for row in range(LANES):
            start = builder.add(arguments[1], I64(row * LANES))
            place = place_of(context, builder, signature.args[0], arguments[0], start, vector)
            rows.append(builder.load(place, typ=vector))
            rows[-1].align = alignment(array)
        return _folded(builder, rows)

    return result(array, types.intp), emit


def _folded(builder, parts):
    for half in (8, 4, 2, 1):
        # parts[k] and parts[k + half] become one vector whose lanes with bit `half` belong to the second.
        parts = [
            builder.fadd(
                interleave(builder, parts[k], parts[k + half], half, high=False),
                interleave(builder, parts[k], parts[k + half], half, high=True),
            )
            for k in range(half)
        ]
    return parts[0]


@intrinsic
def consecutive(typing_context, first):
    """int32 numbers ``first .. first + 15`` as the bits of a float32 vector, to be compressed and stored as such."""
    result = VectorType(types.float32)

    def emit(context, builder, signature, arguments):
        vector = ir.VectorType(I32, LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        start = builder.insert_element(undefined, builder.trunc(arguments[0], I32), I32(0))
        start = builder.shuffle_vector(start, undefined, ir.Constant(vector, [0] * LANES))
        numbers = builder.add(start, ir.Constant(vector, list(range(LANES))))
        return builder.bitcast(numbers, context.get_value_type(result))

    return result(types.intp), emit


@intrinsic
def hidden(typing_context, number):
    """The same integer, unknown to the compiler: it cannot foresee the trips of a loop that steps by it."""

    def emit(context, builder, signature, arguments):
        kind = ir.FunctionType(arguments[0].type, [arguments[0].type])
        return builder.call(ir.InlineAsm(kind, "", "=r,0", side_effect=False), arguments)

    return number(number), emit
