"""The innermost part of a dense product: sums of several rows in registers, 16 columns wide."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.jit import device_function
from sparsecore.backends.numba.simd_types import (
    I32,
    LANES,
    VectorType,
    alignment,
    call,
    element,
    place_of,
    suffix,
)
from sparsecore.backends.numba.tuples import add_each, zero_each

__all__ = ["ROWS", "copy_rows", "multiply"]

# Rows of which sums are held at a time. A term reads one vector, and one number for each row: with six rows, AVX2 (a
# vector of float32 takes two registers) and AVX-512 both multiply as fast as they can (Zen 4).
ROWS = 6
_PLACES = (0,) * ROWS


@device_function
def multiply(a, i, a_row, a_term, b, j, c, t, c_row, terms):
    """``c[t + r * c_row + l] += sum over k < terms of a[i + r * a_row + k * a_term] * b[j + 16 k + l]`` for ROWS rows
    r and 16 columns l. Places count from the start of each array.

    The terms are summed by themselves: a long sum in parts rounds less than one number after the other.
    """
    sums = zero_each(_PLACES, c)
    for _ in range(terms):
        sums = _term(sums, a, i, a_row, b, j)
        i += a_term
        j += 16
    _put_rows(add_each(sums, _rows(_PLACES, c, t, c_row)), c, t, c_row)


@intrinsic
def copy_rows(typing_context, source, i, target, j):
    """``target[j + r] = source[i + r]`` for ROWS r: a term of a sum, packed."""

    def emit(context, builder, signature, arguments):
        a, i, b, j = arguments
        vector = ir.VectorType(context.get_value_type(source.dtype), ROWS)
        read = builder.load(place_of(context, builder, signature.args[0], a, i, vector), typ=vector)
        read.align = alignment(source)
        written = place_of(context, builder, signature.args[2], b, j, vector)
        builder.store(read, written).align = alignment(target)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), emit


@intrinsic
def _rows(typing_context, places, array, index, step):
    """A vector for each place, ``step`` elements apart."""
    result = types.UniTuple(VectorType(array.dtype), places.count)

    def emit(context, builder, signature, arguments):
        _, data, index, step = arguments
        vector = context.get_value_type(result.dtype)
        parts = []
        for _ in range(places.count):
            part = builder.load(
                place_of(context, builder, signature.args[1], data, index, vector), typ=vector
            )
            part.align = alignment(array)
            parts.append(part)
            index = builder.add(index, step)
        return context.make_tuple(builder, result, parts)

    return result(places, array, types.intp, types.intp), emit


@intrinsic
def _put_rows(typing_context, sums, array, index, step):
    def emit(context, builder, signature, arguments):
        sums_, data, index, step = arguments
        vector = context.get_value_type(sums.dtype)
        for part in cgutils.unpack_tuple(builder, sums_, sums.count):
            place = place_of(context, builder, signature.args[1], data, index, vector)
            builder.store(part, place).align = alignment(array)
            index = builder.add(index, step)
        return context.get_dummy_value()

    return types.void(sums, array, types.intp, types.intp), emit


@intrinsic
def _term(typing_context, sums, a, i, a_row, b, j):
    """``sums[r] + a[i + r * a_row] * b[j ..]`` for every r."""

    def emit(context, builder, signature, arguments):
        sums_, numbers, i, a_row, rows, j = arguments
        vector = context.get_value_type(sums.dtype)
        right = builder.load(place_of(context, builder, signature.args[4], rows, j, vector), typ=vector)
        right.align = alignment(b)
        undefined, first = (
            ir.Constant(vector, ir.Undefined),
            ir.Constant(ir.VectorType(I32, LANES), [0] * LANES),
        )
        result = []
        for part in cgutils.unpack_tuple(builder, sums_, sums.count):
            number = builder.load(
                element(context, builder, signature.args[1], numbers, i), typ=vector.element
            )
            left = builder.insert_element(undefined, number, I32(0))
            left = builder.shuffle_vector(left, undefined, first)
            result.append(call(builder, f"llvm.fmuladd.{suffix(vector)}", vector, [left, right, part]))
            i = builder.add(i, a_row)
        return context.make_tuple(builder, sums, result)

    return sums(sums, a, types.intp, types.intp, b, types.intp), emit
