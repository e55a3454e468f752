"""Vectors that hold several nonzeros: 16 / w of them, with w examples each, for a tuple ``examples`` of length w."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import (
    I32,
    I64,
    LANES,
    VectorType,
    alignment,
    call,
    element,
    place_of,
)

__all__ = ["first_only", "picked", "repeated", "repeated_first"]


@intrinsic
def picked(typing_context, panel, columns, index, examples):
    """``panel[w * columns[index + i] + e]`` in lane w i + e. All 16 / w columns are read, by scalar loads.

    The processor's own gathers took longer on Zen 4.
    """
    result, w = VectorType(panel.dtype), examples.count

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        kind = ir.VectorType(vector.element, w)
        parts = []
        for i in range(LANES // w):
            place = builder.add(arguments[2], I64(i))
            column = builder.load(
                element(context, builder, signature.args[1], arguments[1], place),
                typ=context.get_value_type(columns.dtype),
            )
            column = column if columns.dtype.bitwidth == 64 else builder.zext(column, I64)
            place = place_of(
                context, builder, signature.args[0], arguments[0], builder.mul(column, I64(w)), kind
            )
            parts.append(builder.load(place, typ=kind))
            parts[-1].align = alignment(panel)
        while len(parts) > 1:
            parts = [_joined(builder, *parts[i : i + 2]) for i in range(0, len(parts), 2)]
        return parts[0]

    return result(panel, columns, types.intp, examples), emit


@intrinsic
def repeated(typing_context, values, index, examples):
    """``values[index + i]`` in the lanes w i to w i + w - 1."""
    result, w = VectorType(values.dtype), examples.count

    def emit(context, builder, signature, arguments):
        kind = ir.VectorType(context.get_value_type(values.dtype), LANES // w)
        numbers = builder.load(place_of(context, builder, signature.args[0], *arguments[:2], kind), typ=kind)
        numbers.align = alignment(values)
        return _each(builder, numbers, w)

    return result(values, types.intp, examples), emit


@intrinsic
def repeated_first(typing_context, values, index, n, examples):
    """The same for the first n places; memory of the others is not touched, and their lanes are 0."""
    result, w = VectorType(values.dtype), examples.count

    def emit(context, builder, signature, arguments):
        groups = LANES // w
        kind = ir.VectorType(context.get_value_type(values.dtype), groups)
        place = place_of(context, builder, signature.args[0], *arguments[:2], kind)
        mask = _below(builder, arguments[2], groups)
        masked = [place, I32(alignment(values)), mask, ir.Constant(kind, [0.0] * groups)]
        name = f"llvm.masked.load.v{groups}f{values.dtype.bitwidth}.p0"
        return _each(builder, call(builder, name, kind, masked), w)

    return result(values, types.intp, types.intp, examples), emit


@intrinsic
def first_only(typing_context, vector, n):
    """The first n lanes, 0 in the others."""

    def emit(context, builder, signature, arguments):
        zero = ir.Constant(arguments[0].type, [0.0] * LANES)
        return builder.select(_below(builder, arguments[1], LANES), arguments[0], zero)

    return vector(vector, types.intp), emit


def _below(builder, n, lanes):
    """Whether a lane is one of the first n: numbers are compared, since masks of bits take longer without AVX-512."""
    kind = ir.VectorType(I32, lanes)
    undefined = ir.Constant(kind, ir.Undefined)
    limit = builder.insert_element(undefined, builder.trunc(n, I32), I32(0))
    limit = builder.shuffle_vector(limit, undefined, ir.Constant(kind, [0] * lanes))
    return builder.icmp_signed("<", ir.Constant(kind, list(range(lanes))), limit)


def _joined(builder, a, b):
    order = list(range(2 * a.type.count))
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), order))


def _each(builder, numbers, w):
    order = [lane // w for lane in range(LANES)]
    undefined = ir.Constant(numbers.type, ir.Undefined)
    return builder.shuffle_vector(numbers, undefined, ir.Constant(ir.VectorType(I32, LANES), order))
