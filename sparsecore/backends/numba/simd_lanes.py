"""Lanes that move: packed numbers to the lanes of a mask and back, and transposed blocks."""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_types import (
    I16,
    I32,
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


def has_avx512() -> bool:
    """Whether code is compiled for a processor with AVX-512: this one, unless numba was told another."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return False
    features = binding.get_host_cpu_features()
    return bool(features.get("avx512f", False) and features.get("bmi2", False))


@intrinsic
def expand(typing_context, array, index, mask):
    """The next ``count(mask)`` elements from ``index``, in order, in the mask's lanes; 0 in the others."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = element(context, builder, signature.args[0], *arguments[:2])
        zero = ir.Constant(vector, [0.0] * LANES)
        return call(
            builder,
            f"llvm.masked.expandload.{suffix(vector)}",
            vector,
            [place, as_lanes(builder, arguments[2]), zero],
        )

    return result(array, types.intp, types.uint16), emit


@intrinsic
def spread(typing_context, value, mask):
    """The first ``count(mask)`` lanes, in order, in the mask's lanes; 0 in the others.

    With AVX-512 ``spread(load_masked(a, i, first_lanes(count(m))), m)`` takes half as long as ``expand(a, i, m)``:
    the instruction is slow when it reads memory itself (Zen 5: 0.6 and 1.1 ns).
    """

    def emit(context, builder, signature, arguments):
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
    kind = VectorType(source.dtype)

    def emit(context, builder, signature, arguments):
        a, start, step, b, place, leap = arguments
        vector = context.get_value_type(kind)
        rows = []
        for _ in range(LANES):
            row = builder.load(place_of(context, builder, signature.args[0], a, start, vector), typ=vector)
            row.align = alignment(source)
            rows.append(row)
            start = builder.add(start, step)
        # Exchange off-diagonal blocks of 8, 4, 2 and 1: after each stage rows and lanes have swapped one index bit.
        for half in (8, 4, 2, 1):
            swapped = list(rows)
            for k in range(LANES):
                if not k & half:
                    swapped[k] = interleave(builder, rows[k], rows[k + half], half, high=False)
                    swapped[k + half] = interleave(builder, rows[k], rows[k + half], half, high=True)
            rows = swapped
        for row in rows:
            to = place_of(context, builder, signature.args[3], b, place, vector)
            builder.store(row, to).align = alignment(target)
            place = builder.add(place, leap)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit
