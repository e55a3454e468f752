"""Single numbers and vectors in memory. Indices are not checked."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from sparsecore.backends.numba.processor import FAR
from sparsecore.backends.numba.simd_types import (
    I8,
    I32,
    LANES,
    MASK,
    VectorType,
    alignment,
    as_lanes,
    call,
    element,
    place_of,
    suffix,
)


@intrinsic
def at(typing_context, array, index):
    """``array.flat[index]``, without the check for negative indices."""

    def emit(context, builder, signature, arguments):
        return builder.load(
            element(context, builder, signature.args[0], *arguments),
            typ=context.get_value_type(signature.return_type),
        )

    return array.dtype(array, types.intp), emit


@intrinsic
def put(typing_context, array, index, number):
    """``array.flat[index] = number``."""

    def emit(context, builder, signature, arguments):
        builder.store(arguments[2], element(context, builder, signature.args[0], *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), emit


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of an element, into the nearest cache; the index may lie beyond the array."""
    return _prefetch(array, 3)


@intrinsic
def prefetch_far(typing_context, array, index):
    """The same for a large memory that is read at random places: into the cache that has most requests under way."""
    return _prefetch(array, FAR)


def _prefetch(array, locality):
    def emit(context, builder, signature, arguments):
        place = element(context, builder, signature.args[0], *arguments)
        call(
            builder,
            "llvm.prefetch.p0",
            ir.VoidType(),
            [builder.bitcast(place, I8.as_pointer()), I32(0), I32(locality), I32(1)],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


@intrinsic
def copy(typing_context, source, index, target, place):
    """16 elements of any type from ``source.flat[index]`` to ``target.flat[place]``, an array of the same type."""

    def emit(context, builder, signature, arguments):
        vector = ir.VectorType(context.get_value_type(source.dtype), LANES)
        read = builder.load(place_of(context, builder, signature.args[0], *arguments[:2], vector), typ=vector)
        read.align = alignment(source)
        written = place_of(context, builder, signature.args[2], *arguments[2:], vector)
        builder.store(read, written).align = alignment(target)
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), emit


@intrinsic
def load(typing_context, array, index):
    """The 16 elements of ``array`` that begin at flat position ``index``."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = place_of(context, builder, signature.args[0], *arguments, vector)
        instruction = builder.load(place, typ=vector)
        instruction.align = alignment(array)
        return instruction

    return result(array, types.intp), emit


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector to the flat position ``index`` of ``array``."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        place = place_of(context, builder, signature.args[0], *arguments[:2], vector)
        builder.store(arguments[2], place).align = alignment(array)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def load_masked(typing_context, array, index, mask):
    """The elements of the mask's lanes, 0 in the others: memory of those is not touched."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = place_of(context, builder, signature.args[0], *arguments[:2], vector)
        zero = ir.Constant(vector, [0.0] * LANES)
        return call(
            builder,
            f"llvm.masked.load.{suffix(vector)}.p0",
            vector,
            [place, I32(alignment(array)), as_lanes(builder, arguments[2]), zero],
        )

    return result(array, types.intp, types.uint16), emit


@intrinsic
def store_masked(typing_context, array, index, value, mask):
    """Write the mask's lanes only."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        place = place_of(context, builder, signature.args[0], *arguments[:2], vector)
        call(
            builder,
            f"llvm.masked.store.{suffix(vector)}.p0",
            ir.VoidType(),
            [arguments[2], place, I32(alignment(array)), as_lanes(builder, arguments[3])],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.uint16), emit


@intrinsic
def lookup(typing_context, array, places, longest):
    """``array.flat[min(place, longest)]`` for the 16 places, which are whole numbers from 0 on."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(places)
        wide = ir.VectorType(ir.IntType(64), LANES)
        near = call(builder, f"llvm.minnum.{suffix(vector)}", vector, arguments[1:])
        index = builder.fptosi(near, wide)
        base = builder.ptrtoint(
            element(context, builder, signature.args[0], arguments[0], I32(0)), wide.element
        )
        base = builder.insert_element(ir.Constant(wide, ir.Undefined), base, I32(0))
        first = ir.Constant(ir.VectorType(I32, LANES), [0] * LANES)
        base = builder.shuffle_vector(base, ir.Constant(wide, ir.Undefined), first)
        size = ir.Constant(wide, [alignment(array)] * LANES)
        addresses = builder.add(base, builder.mul(index, size))
        pointers = builder.inttoptr(addresses, ir.VectorType(I8.as_pointer(), LANES))
        every = ir.Constant(MASK, [1] * LANES)
        zero = ir.Constant(vector, [0.0] * LANES)
        name = f"llvm.masked.gather.{suffix(vector)}.v{LANES}p0"
        return call(builder, name, vector, [pointers, I32(alignment(array)), every, zero])

    return places(array, places, places), emit
