"""Vectors of 16 numbers inside numba kernels.

numba cannot prove that two arrays do not overlap, so it keeps sums of an inner loop in memory instead of in registers.
These intrinsics emit LLVM vector code directly: a 16-lane value lives in registers (one AVX-512 register for float32,
two for float64, two AVX2 or four NEON ones elsewhere; LLVM splits it), and is loaded or stored as a whole. Only
portable LLVM operations are used.

Indices count elements from the start of a C-contiguous array and are **not** checked.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

__all__ = ["LANES", "add", "fma", "horizontal_sum", "load", "mul", "splat", "store", "zeros"]

LANES = 16


class VectorType(types.Type):
    """numba type of 16 numbers of one floating-point type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector16({dtype})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))


def _pointer(context, builder, signature, arguments, vector):
    array = context.make_array(signature.args[0])(context, builder, arguments[0])
    return builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())


def _align(array_type: types.Array) -> int:
    return array_type.dtype.bitwidth // 8


@intrinsic
def load(typing_context, array, index):
    """The 16 elements of ``array`` that begin at flat position ``index``."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        instruction = builder.load(_pointer(context, builder, signature, arguments, vector), typ=vector)
        instruction.align = _align(array)
        return instruction

    return result(array, types.intp), emit


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector to the flat position ``index`` of ``array``."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        instruction = builder.store(arguments[2], _pointer(context, builder, signature, arguments, vector))
        instruction.align = _align(array)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def splat(typing_context, scalar):
    """16 copies of a number."""
    result = VectorType(scalar)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], ir.IntType(32)(0))
        order = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
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
        name = f"llvm.fmuladd.v{LANES}f{a.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(vector, [vector] * 3), name)
        return builder.call(function, arguments)

    return a(a, a, a), emit


@intrinsic
def add(typing_context, a, b):
    """``a + b``."""

    def emit(context, builder, signature, arguments):
        return builder.fadd(*arguments)

    return a(a, a), emit


@intrinsic
def mul(typing_context, a, b):
    """``a * b``."""

    def emit(context, builder, signature, arguments):
        return builder.fmul(*arguments)

    return a(a, a), emit


@intrinsic
def horizontal_sum(typing_context, a):
    """Sum of the 16 lanes, by a tree."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(a)
        scalar = vector.element
        name = f"llvm.vector.reduce.fadd.v{LANES}f{a.dtype.bitwidth}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(scalar, [scalar, vector]), name
        )
        return builder.call(function, [ir.Constant(scalar, -0.0), arguments[0]], fastmath=("reassoc",))

    return a.dtype(a), emit
