"""Lanes that move: packed numbers to the lanes of a mask and back, and transposed blocks."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils, typing
from numba.extending import intrinsic

from sparsecore.backends.numba.processor import has_avx2, has_avx512
from sparsecore.backends.numba.simd_permuted import compressed, expanded, expanded_from
from sparsecore.backends.numba.simd_types import (
    I16,
    I32,
    I64,
    LANES,
    VectorType,
    alignment,
    as_lanes,
    call,
    element,
    interleave,
    place_of,
    suffix,
)


def _permutes(value) -> bool:
    """Whether lanes of a type (a vector's, or an array's) are moved by AVX2's permutations."""
    return value.dtype.bitwidth == 32 and has_avx2()


@intrinsic
def expand(typing_context, array, index, mask):
    """The next ``count(mask)`` elements from ``index``, in order, in the mask's lanes; 0 in the others."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        return _expanded(context, builder, signature, arguments)

    return result(array, types.intp, types.uint16), emit


@intrinsic
def unpack(typing_context, array, index, mask):
    """The same, in half the time where the elements are near: with AVX-512 they are loaded first, for its instruction
    is slow when it reads memory itself (Zen 5: 0.6 and 1.1 ns).
    """
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        if array.dtype.bitwidth != 32 or not has_avx512():
            return _expanded(context, builder, signature, arguments)
        vector = context.get_value_type(result)
        place = place_of(context, builder, signature.args[0], *arguments[:2], vector)
        stored = builder.zext(call(builder, "llvm.ctpop.i16", I16, [arguments[2]]), I32)
        first = builder.trunc(builder.sub(builder.shl(I32(1), stored), I32(1)), I16)
        zero = ir.Constant(vector, [0.0] * LANES)
        given = [place, I32(alignment(array)), as_lanes(builder, first), zero]
        packed = call(builder, f"llvm.masked.load.{suffix(vector)}.p0", vector, given)
        given = [packed, zero, as_lanes(builder, arguments[2])]
        return call(builder, "llvm.x86.avx512.mask.expand.v16f32", vector, given)

    return result(array, types.intp, types.uint16), emit


def _expanded(context, builder, signature, arguments):
    array = signature.args[0]
    vector = context.get_value_type(signature.return_type)
    place = element(context, builder, array, *arguments[:2])
    if _permutes(array):
        return expanded_from(builder, place, arguments[2])
    given = [place, as_lanes(builder, arguments[2]), ir.Constant(vector, [0.0] * LANES)]
    return call(builder, f"llvm.masked.expandload.{suffix(vector)}", vector, given)


@intrinsic
def spread(typing_context, value, mask):
    """The first ``count(mask)`` lanes, in order, in the mask's lanes; 0 in the others."""

    def emit(context, builder, signature, arguments):
        if _permutes(value):
            return expanded(builder, *arguments)
        vector = context.get_value_type(value)
        zero = ir.Constant(vector, [0.0] * LANES)
        lanes = as_lanes(builder, arguments[1])
        if value.dtype.bitwidth == 32 and has_avx512():
            return call(builder, "llvm.x86.avx512.mask.expand.v16f32", vector, [arguments[0], zero, lanes])
        buffer = cgutils.alloca_once(builder, vector)
        builder.store(arguments[0], buffer)
        name = f"llvm.masked.expandload.{suffix(vector)}"
        return call(
            builder, name, vector, [builder.bitcast(buffer, vector.element.as_pointer()), lanes, zero]
        )

    return value(value, types.uint16), emit


@intrinsic
def compress(typing_context, value, mask):
    """The mask's lanes, moved together to the front; the lanes behind them are undefined."""

    def emit(context, builder, signature, arguments):
        if _permutes(value):
            return compressed(builder, *arguments)
        vector = context.get_value_type(value)
        if value.dtype.bitwidth == 64:  # LLVM's own splitting of 16 doubles crashes (seen with LLVM 22)
            return _compress_by_lane(builder, vector, *arguments)
        return call(
            builder,
            f"llvm.experimental.vector.compress.{suffix(vector)}",
            vector,
            [arguments[0], as_lanes(builder, arguments[1]), ir.Constant(vector, ir.Undefined)],
        )

    return value(value, types.uint16), emit


def _compress_by_lane(builder, vector, value, mask):
    """Store every lane; the place moves on where the mask's bit is set."""
    buffer = cgutils.alloca_once(builder, ir.ArrayType(vector.element, LANES + 1))
    place = I32(0)
    for lane in range(LANES):
        number = builder.extract_element(value, I32(lane))
        builder.store(number, builder.gep(buffer, [I32(0), place]))
        bit = builder.and_(builder.lshr(mask, I16(lane)), I16(1))
        place = builder.add(place, builder.zext(bit, I32))
    packed = builder.load(builder.bitcast(buffer, vector.as_pointer()), typ=vector)
    packed.align = 8
    return packed


@intrinsic
def transpose(typing_context, source, index, stride, target, place, target_stride):
    """16 x 16 block: ``target.flat[place + i * target_stride + j] = source.flat[index + j * stride + i]``."""

    def emit(context, builder, signature, arguments):
        _transpose(context, builder, signature, arguments)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit


@intrinsic
def transpose_part(typing_context, source, index, stride, rows, cols, target, place, target_stride, lanes):
    """The same for ``rows`` x ``cols`` numbers of a block, 0 to 16 each: ``lanes`` numbers of ``cols`` target rows are
    written, those beyond ``rows`` as 0.

    The branch for whole blocks is in here because next to one in a kernel numba keeps counting references to arrays:
    that took as long as the block, and longer where threads count those of the same array.
    """

    def emit(context, builder, signature, arguments):
        rows, cols, lanes = arguments[3], arguments[4], arguments[8]
        whole = arguments[:3] + arguments[5:8]
        kinds = signature.args[:3] + signature.args[5:8]
        all_rows, all_cols = (builder.icmp_signed("==", n, I64(LANES)) for n in (rows, cols))
        every = builder.and_(builder.and_(all_rows, all_cols), builder.icmp_signed("==", lanes, I64(LANES)))
        with builder.if_else(every) as (then, otherwise):
            with then:
                _transpose(context, builder, typing.signature(types.void, *kinds), whole)
            with otherwise:
                masks = _masks(builder, rows, cols), _masks(builder, cols, lanes)
                _transpose(context, builder, typing.signature(types.void, *kinds), whole, *masks)
        return context.get_dummy_value()

    whole_numbers = (types.intp,) * 3
    return types.void(source, *whole_numbers, types.intp, target, *whole_numbers), emit


def _masks(builder, n, lanes):
    """Masks of some lanes for the first n vectors, of none for the others."""
    some = builder.sub(builder.shl(I32(1), builder.trunc(lanes, I32)), I32(1))
    some = builder.trunc(some, I16)
    return [builder.select(builder.icmp_signed("<", I64(i), n), some, I16(0)) for i in range(LANES)]


def transposed(builder, rows):
    """16 vectors whose lanes are those of 16 others.

    Off-diagonal blocks of 8, 4, 2 and 1 are exchanged: after each stage rows and lanes have swapped one index bit.
    """
    for half in (8, 4, 2, 1):
        swapped = list(rows)
        for k in range(LANES):
            if not k & half:
                swapped[k] = interleave(builder, rows[k], rows[k + half], half, high=False)
                swapped[k + half] = interleave(builder, rows[k], rows[k + half], half, high=True)
        rows = swapped
    return rows


def _transpose(context, builder, signature, arguments, read=None, written=None):
    """With masks of what is read and written of each vector, or all of it."""
    a, start, step, b, place, leap = arguments
    source, target = signature.args[0], signature.args[3]
    vector = context.get_value_type(VectorType(source.dtype))
    zero = ir.Constant(vector, [0.0] * LANES)
    rows = []
    for i in range(LANES):
        at = place_of(context, builder, source, a, start, vector)
        if read is None:
            row = builder.load(at, typ=vector)
            row.align = alignment(source)
        else:
            masked = [at, I32(alignment(source)), as_lanes(builder, read[i]), zero]
            row = call(builder, f"llvm.masked.load.{suffix(vector)}.p0", vector, masked)
        rows.append(row)
        start = builder.add(start, step)
    for i, row in enumerate(transposed(builder, rows)):
        to = place_of(context, builder, target, b, place, vector)
        if written is None:
            builder.store(row, to).align = alignment(target)
        else:
            masked = [row, to, I32(alignment(target)), as_lanes(builder, written[i])]
            call(builder, f"llvm.masked.store.{suffix(vector)}.p0", ir.VoidType(), masked)
        place = builder.add(place, leap)
