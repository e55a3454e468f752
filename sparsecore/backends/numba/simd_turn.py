"""Blocks of a weight turned: from rows of values with a bitmap to columns of values with the rows they came from."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_lanes import transposed
from sparsecore.backends.numba.simd_types import (
    I8,
    I16,
    I32,
    I64,
    LANES,
    VectorType,
    as_lanes,
    call,
    element,
    place_of,
)

__all__ = ["turn_block"]

_AHEAD = 32  # values of a row that are asked for: two cache lines


@intrinsic
def turn_block(typing_context, values, start, reached, i, masks, m, step, turned, rows, ends, row):
    """Sixteen rows, sixteen columns: their float32 values to the ends of the columns' lists.

    Row r of the block has its values in ``values`` from ``start + reached[i + r]`` on, where 16 can be read, and the
    uint16 ``masks[m + r * step]`` says which columns they are in. The list of column c ends at ``ends[c]`` in
    ``turned``, and in ``rows``, to which ``row + r`` is written. ``reached`` and ``ends`` move on; 16 numbers behind
    the end of a list are overwritten.
    """
    kind = VectorType(values.dtype)

    def emit(context, builder, signature, arguments):
        values, start, reached, i, masks, m, step, turned, rows, ends, row = arguments
        kinds = signature.args
        vector, words = context.get_value_type(kind), ir.VectorType(I16, LANES)
        zero = ir.Constant(vector, [0.0] * LANES)
        block, bits = [], ir.Constant(words, ir.Undefined)
        for r in range(LANES):
            mask = builder.load(element(context, builder, kinds[4], masks, m), typ=I16)
            place = element(context, builder, kinds[2], reached, builder.add(i, I64(r)))
            gone = builder.load(place, typ=I32)
            k = builder.add(start, builder.zext(gone, I64))
            ahead = element(context, builder, kinds[0], values, builder.add(k, I64(_AHEAD)))
            fetched = [builder.bitcast(ahead, I8.as_pointer()), I32(0), I32(3), I32(1)]
            call(builder, "llvm.prefetch.p0", ir.VoidType(), fetched)
            packed = builder.load(place_of(context, builder, kinds[0], values, k, vector), typ=vector)
            packed.align = 4
            spread = [packed, zero, as_lanes(builder, mask)]
            block.append(call(builder, "llvm.x86.avx512.mask.expand.v16f32", vector, spread))
            stored = builder.zext(call(builder, "llvm.ctpop.i16", I16, [mask]), I32)
            builder.store(builder.add(gone, stored), place)
            bits = builder.insert_element(bits, mask, I32(r))
            m = builder.add(m, step)
        numbers = ir.VectorType(I32, LANES)
        first = builder.insert_element(ir.Constant(numbers, ir.Undefined), builder.trunc(row, I32), I32(0))
        first = builder.shuffle_vector(first, first, ir.Constant(numbers, [0] * LANES))
        which = builder.add(first, ir.Constant(numbers, list(range(LANES))))
        for c, values_of_column in enumerate(transposed(builder, block)):
            chosen = builder.and_(bits, ir.Constant(words, [1 << c] * LANES))
            lanes = builder.icmp_unsigned("!=", chosen, ir.Constant(words, [0] * LANES))
            end = element(context, builder, kinds[9], ends, I64(c))
            place = builder.load(end, typ=I32)
            wide = builder.zext(place, I64)
            for what, array, kind_of_array, to in (
                (values_of_column, turned, kinds[7], vector),
                (which, rows, kinds[8], words),
            ):
                undefined = ir.Constant(what.type, ir.Undefined)
                name = "f32" if to is vector else "i32"
                packed = call(
                    builder,
                    f"llvm.experimental.vector.compress.v{LANES}{name}",
                    what.type,
                    [what, lanes, undefined],
                )
                packed = packed if to is vector else builder.trunc(packed, words)
                target = place_of(context, builder, kind_of_array, array, wide, to)
                builder.store(packed, target).align = 4 if to is vector else 2
            found = builder.zext(call(builder, "llvm.ctpop.i16", I16, [builder.bitcast(lanes, I16)]), I32)
            builder.store(builder.add(place, found), end)
        return context.get_dummy_value()

    place = types.intp
    signature = types.void(values, place, reached, place, masks, place, place, turned, rows, ends, place)
    return signature, emit
