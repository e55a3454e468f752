"""Several vectors as one: tuples whose length is that of an argument, so that one kernel serves every width."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd import LANES, VectorType

__all__ = ["add_each", "any_greater", "fma_each", "store_each", "zero_each"]


@intrinsic
def zero_each(typing_context, places, array):
    """A vector of zeros for each place."""
    result = types.UniTuple(VectorType(array.dtype), places.count)

    def emit(context, builder, signature, arguments):
        zero = ir.Constant(context.get_value_type(result.dtype), [0.0] * LANES)
        return context.make_tuple(builder, result, [zero] * places.count)

    return result(places, array), emit


def _each_place(context, builder, signature, array_type, array, index, count):
    """Pointers to 16 elements each, from index on."""
    data = context.make_array(array_type)(context, builder, array).data
    vector = ir.VectorType(context.get_value_type(array_type.dtype), 16)
    for z in range(count):
        place = builder.gep(data, [builder.add(index, ir.Constant(index.type, 16 * z))])
        yield vector, builder.bitcast(place, vector.as_pointer())


def _read(builder, vector, place, array_type):
    loaded = builder.load(place, typ=vector)
    loaded.align = array_type.dtype.bitwidth // 8
    return loaded


@intrinsic
def fma_each(typing_context, a, array, index, vectors):
    """``vectors[z] + a * array[index + 16 z ..]``."""

    def emit(context, builder, signature, arguments):
        a, data, start, sums = arguments
        parts = cgutils.unpack_tuple(builder, sums, vectors.count)
        places = _each_place(context, builder, signature, signature.args[1], data, start, vectors.count)
        result = []
        for part, (vector, place) in zip(parts, places, strict=True):
            kind = ir.FunctionType(vector, [vector] * 3)
            name = f"llvm.fmuladd.v16f{array.dtype.bitwidth}"
            multiply = cgutils.get_or_insert_function(builder.module, kind, name)
            result.append(builder.call(multiply, [a, _read(builder, vector, place, array), part]))
        return context.make_tuple(builder, vectors, result)

    return vectors(a, array, types.intp, vectors), emit


@intrinsic
def add_each(typing_context, a, b):
    def emit(context, builder, signature, arguments):
        left, right = (cgutils.unpack_tuple(builder, t, a.count) for t in arguments)
        return context.make_tuple(builder, a, [builder.fadd(x, y) for x, y in zip(left, right, strict=True)])

    return a(a, a), emit


@intrinsic
def any_greater(typing_context, vectors, array, index):
    """Whether any lane is greater than its number in the array."""

    def emit(context, builder, signature, arguments):
        sums, data, start = arguments
        parts = cgutils.unpack_tuple(builder, sums, vectors.count)
        places = _each_place(context, builder, signature, signature.args[1], data, start, vectors.count)
        found = None
        for part, (vector, place) in zip(parts, places, strict=True):
            lanes = builder.fcmp_ordered(">", part, _read(builder, vector, place, array))
            found = lanes if found is None else builder.or_(found, lanes)
        return builder.icmp_unsigned("!=", builder.bitcast(found, ir.IntType(16)), ir.IntType(16)(0))

    return types.boolean(vectors, array, types.intp), emit


@intrinsic
def store_each(typing_context, vectors, array):
    """Write the vectors to the beginning of the array."""

    def emit(context, builder, signature, arguments):
        parts = cgutils.unpack_tuple(builder, arguments[0], vectors.count)
        zero = ir.Constant(ir.IntType(64), 0)
        places = _each_place(
            context, builder, signature, signature.args[1], arguments[1], zero, vectors.count
        )
        for part, (_, place) in zip(parts, places, strict=True):
            builder.store(part, place).align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(vectors, array), emit
