"""Masks: bits of integers, and lanes that they choose."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsecore.backends.numba.processor import has_avx2
from sparsecore.backends.numba.simd_permuted import write_places
from sparsecore.backends.numba.simd_types import (
    I1,
    I8,
    I16,
    I32,
    I64,
    LANES,
    alignment,
    as_lanes,
    call,
    element,
    place_of,
)


@intrinsic
def count(typing_context, mask):
    """Number of set bits of an unsigned integer."""

    def emit(context, builder, signature, arguments):
        kind = arguments[0].type
        found = call(builder, f"llvm.ctpop.i{kind.width}", kind, arguments)
        return found if kind.width == 64 else builder.zext(found, ir.IntType(64))

    return types.intp(mask), emit


@intrinsic
def lowest(typing_context, mask):
    """Place of the lowest set bit of an unsigned integer that is not 0."""

    def emit(context, builder, signature, arguments):
        kind = arguments[0].type
        found = call(builder, f"llvm.cttz.i{kind.width}", kind, [arguments[0], I1(1)])
        return found if kind.width == 64 else builder.zext(found, ir.IntType(64))

    return types.intp(mask), emit


@intrinsic
def first_lanes(typing_context, n):
    """Mask of the first n lanes; n in 0 .. 16."""

    def emit(context, builder, signature, arguments):
        n = builder.trunc(arguments[0], I32)
        return builder.trunc(builder.sub(builder.shl(I32(1), n), I32(1)), I16)

    return types.uint16(types.intp), emit


@intrinsic
def bits(typing_context, words, index):
    """The uint16 at a place of a uint16 array: a mask of 16 positions."""

    def emit(context, builder, signature, arguments):
        return builder.load(element(context, builder, signature.args[0], *arguments), typ=I16)

    return types.uint16(words, types.intp), emit


@intrinsic
def bits64(typing_context, words, index):
    """64 bits that begin at an element of an integer array."""

    def emit(context, builder, signature, arguments):
        place = element(context, builder, signature.args[0], *arguments)
        number = builder.load(builder.bitcast(place, I64.as_pointer()), typ=I64)
        number.align = alignment(words)
        return number

    return types.uint64(words, types.intp), emit


def _compare(operation):
    @intrinsic
    def compare(typing_context, a, b):
        def emit(context, builder, signature, arguments):
            return builder.bitcast(builder.fcmp_ordered(operation, *arguments), I16)

        return types.uint16(a, b), emit

    return compare


greater = _compare(">")  # mask of lanes with a > b; NaN never is
at_least = _compare(">=")


@intrinsic
def where(typing_context, mask, a, b):
    """Lanes of a where the mask is set, of b elsewhere."""

    def emit(context, builder, signature, arguments):
        return builder.select(as_lanes(builder, arguments[0]), *arguments[1:])

    return a(types.uint16, a, a), emit


def _positions(written, explanation):
    @intrinsic
    def positions(typing_context, target, index, mask, base):
        def emit(context, builder, signature, arguments):
            array, index, mask, base = arguments
            kind = context.get_value_type(target.dtype)
            if has_avx2():
                place = element(context, builder, signature.args[0], array, index)
                write_places(builder, place, mask, builder.trunc(base, kind))
                return context.get_dummy_value()
            narrow = ir.VectorType(I8, 64)
            wide = ir.VectorType(kind, written)
            found = call(
                builder,
                "llvm.experimental.vector.compress.v64i8",
                narrow,
                [
                    ir.Constant(narrow, list(range(64))),
                    builder.bitcast(mask, ir.VectorType(I1, 64)),
                    ir.Constant(narrow, [0] * 64),
                ],
            )
            order = ir.Constant(ir.VectorType(I32, written), list(range(written)))
            found = builder.shuffle_vector(found, ir.Constant(narrow, ir.Undefined), order)
            undefined = ir.Constant(wide, ir.Undefined)
            first = builder.insert_element(undefined, builder.trunc(base, kind), I32(0))
            bases = builder.shuffle_vector(first, undefined, ir.Constant(order.type, [0] * written))
            place = place_of(context, builder, signature.args[0], array, index, wide)
            builder.store(builder.add(builder.zext(found, wide), bases), place).align = alignment(target)
            return context.get_dummy_value()

        return types.void(target, types.intp, types.uint64, types.intp), emit

    positions.__doc__ = explanation
    return positions


positions = _positions(
    64,
    "Write base + the places of a uint64's set bits, in order, then base alone: 16 times with AVX2, else 64 in all.",
)
positions_few = _positions(
    32, "The same where at most 32 are set: with AVX-512 32 numbers, half as many stores."
)


@intrinsic
def breaks(typing_context, numbers, index, n):
    """Mask of those of n (1 .. 16) elements of an int64 array that are not their predecessor + 1."""

    def emit(context, builder, signature, arguments):
        array, index, n = arguments
        wide = ir.VectorType(I64, LANES)
        valid = builder.sub(builder.shl(I32(1), builder.trunc(n, I32)), I32(1))
        valid = as_lanes(builder, builder.trunc(valid, I16))
        found = []
        for start in (index, builder.sub(index, I64(1))):
            place = place_of(context, builder, signature.args[0], array, start, wide)
            masked = [place, I32(8), valid, ir.Constant(wide, [0] * LANES)]
            found.append(call(builder, f"llvm.masked.load.v{LANES}i64.p0", wide, masked))
        expected = builder.add(found[1], ir.Constant(wide, [1] * LANES))
        return builder.bitcast(builder.and_(builder.icmp_signed("!=", found[0], expected), valid), I16)

    return types.uint16(numbers, types.intp, types.intp), emit
