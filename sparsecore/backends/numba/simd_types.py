"""What vectors of 16 numbers are to numba and to LLVM, and how the intrinsics address memory."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

LANES = 16
I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
MASK = ir.VectorType(I1, LANES)


class VectorType(types.Type):
    """numba type of 16 numbers of one floating-point type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector16({dtype})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))


def element(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def place_of(context, builder, array_type, array, index, vector):
    return builder.bitcast(element(context, builder, array_type, array, index), vector.as_pointer())


def alignment(array_type) -> int:
    return array_type.dtype.bitwidth // 8


def call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def suffix(vector) -> str:
    return f"v{LANES}f{64 if isinstance(vector.element, ir.DoubleType) else 32}"


def as_lanes(builder, mask):
    return builder.bitcast(mask, MASK)


def interleave(builder, a, b, half, high):
    """Blocks of ``half`` lanes, one of a and one of b in turn: the low or the high block of each pair."""
    chosen = []
    for lane in range(LANES):
        if high:
            chosen.append(lane + half if not lane & half else LANES + lane)
        else:
            chosen.append(lane if not lane & half else LANES + lane - half)
    order = ir.Constant(ir.VectorType(I32, LANES), chosen)
    return builder.shuffle_vector(a, b, order)
