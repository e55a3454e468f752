"""Four dot products at a time, of one row that is held in registers with rows of a panel."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import (
    I16,
    I32,
    I64,
    LANES,
    VectorType,
    alignment,
    call,
    element,
    place_of,
    suffix,
)

__all__ = ["dot_4", "load_4", "rows_of", "store_4"]


@intrinsic
def rows_of(typing_context, places, array, index):
    """As many vectors as there are places, from ``array.flat[index]`` on."""
    result = types.UniTuple(VectorType(array.dtype), places.count)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result.dtype)
        parts = []
        for z in range(places.count):
            index = builder.add(arguments[2], I64(LANES * z))
            place = place_of(context, builder, signature.args[1], arguments[1], index, vector)
            part = builder.load(place, typ=vector)
            part.align = alignment(array)
            parts.append(part)
        return context.make_tuple(builder, result, parts)

    return result(places, array, types.intp), emit


@intrinsic
def dot_4(typing_context, y, local, first, last, panels, base):
    """Lanes 0 to 3: the dot products of ``y`` (vectors of a row) and rows ``local[first]`` .. ``local[first + 3]`` of
    the panel that begins at ``base``; places beyond ``last - 1`` are taken to be that one. Other lanes are undefined.
    """
    result = y.dtype

    def emit(context, builder, signature, arguments):
        parts = cgutils.unpack_tuple(builder, arguments[0], y.count)
        local, first, last, panels, base = arguments[1:]
        vector = context.get_value_type(result)
        final = builder.sub(last, I64(1))

        def row_of(n):
            k = builder.add(first, I64(n))
            k = builder.select(builder.icmp_signed("<", k, final), k, final)
            row = builder.load(element(context, builder, signature.args[1], local, k), typ=I16)
            index = builder.add(base, builder.mul(builder.zext(row, I64), I64(LANES * y.count)))
            return place_of(context, builder, signature.args[4], panels, index, vector)

        rows = [row_of(n) for n in range(4)]
        sums = [None] * 4
        # All four for each vector of y: with half as many registers as AVX-512 has, y is read from memory.
        for z, part in enumerate(parts):
            for n, row in enumerate(rows):
                loaded = builder.load(builder.gep(row, [I64(z)]), typ=vector)
                loaded.align = alignment(signature.args[4])
                if z == 0:
                    sums[n] = builder.fmul(part, loaded)
                else:
                    sums[n] = call(builder, f"llvm.fmuladd.{suffix(vector)}", vector, [part, loaded, sums[n]])
        return _sum_of_four(builder, sums)

    return result(y, local, types.intp, types.intp, panels, types.intp), emit


@intrinsic
def load_4(typing_context, array, index, count):
    """``array.flat[index]`` and behind it in the first ``count`` of lanes 0 to 3, 0 in those left of the four."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        place, there, kind, name = _four(context, builder, signature, *arguments)
        zero = ir.Constant(kind, [0.0] * 4)
        align = I32(alignment(array))
        four = call(builder, f"llvm.masked.load.{name}", kind, [place, align, there, zero])
        return shuffle(builder, four, four, [0, 1, 2, 3] * 4)

    return result(array, types.intp, types.intp), emit


@intrinsic
def store_4(typing_context, array, index, count, value):
    """Write the first ``count`` of lanes 0 to 3."""

    def emit(context, builder, signature, arguments):
        place, there, _, name = _four(context, builder, signature, *arguments[:3])
        four = shuffle(builder, arguments[3], arguments[3], range(4))
        align = I32(alignment(array))
        call(builder, f"llvm.masked.store.{name}", ir.VoidType(), [four, place, align, there])
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, value), emit


def _four(context, builder, signature, array, index, count):
    """Pointer to four elements, which of them are there, their type and its name."""
    kind = ir.VectorType(context.get_value_type(signature.args[0].dtype), 4)
    place = element(context, builder, signature.args[0], array, index)
    place = builder.bitcast(place, kind.as_pointer())
    numbers = ir.VectorType(I32, 4)
    counts = builder.insert_element(ir.Constant(numbers, ir.Undefined), builder.trunc(count, I32), I32(0))
    counts = shuffle(builder, counts, counts, [0] * 4)
    there = builder.icmp_signed(">", counts, ir.Constant(numbers, [*range(4)]))
    return place, there, kind, f"v4f{signature.args[0].dtype.bitwidth}.p0"


def _quarters(*lanes):
    return [4 * q + lane if lane < 4 else 12 + 4 * q + lane for q in range(4) for lane in lanes]


# Lanes of a and b (from 16 on) that are added to others of them. Every choice is one instruction without a vector of
# places: pairs of a quarter's lanes, its single lanes.
_PAIRS = _quarters(0, 1, 4, 5), _quarters(2, 3, 6, 7)
_SINGLE = _quarters(0, 2, 4, 6), _quarters(1, 3, 5, 7)


def _sum_of_four(builder, vectors):
    """The sums of four vectors in lanes 0 to 3."""

    def joined(a, b, choice):
        low, high = (shuffle(builder, a, b, order) for order in choice)
        return builder.fadd(low, high)

    a, b, c, d = vectors
    quarters = joined(joined(a, b, _PAIRS), joined(c, d, _PAIRS), _SINGLE)
    for half in (8, 4):
        upper = shuffle(builder, quarters, quarters, [(lane + half) % LANES for lane in range(LANES)])
        quarters = builder.fadd(quarters, upper)
    return quarters


def shuffle(builder, a, b, order):
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(order)), [*order]))
