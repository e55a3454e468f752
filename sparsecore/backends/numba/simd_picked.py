"""Values times the numbers that belong to them, picked by a bitmap from vectors that lie in registers.

A bitmap's bits become the places of its nonzeros in one instruction (compress bytes), and those pick numbers out of
two registers in another (permute): 16 nonzeros at a time, however many positions they come from. Processors with
AVX-512 VBMI2 (Ice Lake, Zen 4 and later) have both.
"""

from __future__ import annotations

import functools

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from sparsecore.backends.numba.simd_lanes import has_avx512
from sparsecore.backends.numba.simd_types import I1, I8, I16, I32, I64, LANES, as_lanes, call, place_of

__all__ = ["add_picked_32", "add_picked_64", "can_pick"]

_PLACES = ir.VectorType(I32, LANES)


@functools.cache
def can_pick(dtype: np.dtype) -> bool:
    """Whether there are instructions for it: else `add_picked_32` and `add_picked_64` must not be compiled."""
    features = binding.get_host_cpu_features() if has_avx512() else {}
    return dtype == np.float32 and bool(features.get("avx512vbmi2", False))


def _add_picked(positions, explanation):
    bytes_, mask_type = ir.VectorType(I8, positions), types.Integer.from_bitwidth(positions, signed=False)

    @intrinsic
    def add_picked(typing_context, total, values, k, mask, x):
        def emit(context, builder, signature, arguments):
            total, values, k, mask, x = arguments
            vector = total.type
            blocks = cgutils.unpack_tuple(builder, x, positions // LANES)
            zeros = ir.Constant(bytes_, [0] * positions)
            places = call(
                builder,
                f"llvm.experimental.vector.compress.v{positions}i8",
                bytes_,
                [
                    ir.Constant(bytes_, list(range(positions))),
                    builder.bitcast(mask, ir.VectorType(I1, positions)),
                    zeros,
                ],
            )

            valid = call(
                builder, f"llvm.x86.bmi.pext.{positions}", mask.type, [mask, mask]
            )  # a bit each place

            def take(start, total):
                """16 of the places, as far as they exist."""
                order = ir.Constant(_PLACES, list(range(start, start + LANES)))
                chosen = builder.zext(builder.shuffle_vector(places, zeros, order), _PLACES)
                place = place_of(
                    context, builder, signature.args[1], values, builder.add(k, I64(start)), vector
                )
                value = builder.load(place, typ=vector)
                value.align = 4
                product = call(
                    builder, "llvm.fma.v16f32", vector, [value, _picked(builder, blocks, chosen), total]
                )
                lanes = builder.trunc(builder.lshr(valid, valid.type(start)), I16)
                return builder.select(as_lanes(builder, lanes), product, total)

            few = take(0, total)
            before = builder.block
            with builder.if_then(builder.icmp_unsigned(">", valid, valid.type(0xFFFF)), likely=False):
                more = few
                for start in range(LANES, positions, LANES):
                    more = take(start, more)
                after = builder.block
            result = builder.phi(vector)
            result.add_incoming(few, before)
            result.add_incoming(more, after)
            return result

        return total(total, values, types.intp, mask_type, x), emit

    add_picked.__doc__ = explanation
    return add_picked


def _picked(builder, blocks, places):
    """The numbers at 16 places of two or four blocks of 16."""
    vector = blocks[0].type

    def of_two(low, high):
        return call(builder, "llvm.x86.avx512.vpermi2var.ps.512", vector, [low, places, high])

    if len(blocks) == 2:
        return of_two(*blocks)
    upper = builder.icmp_unsigned(">=", places, ir.Constant(places.type, [2 * LANES] * LANES))
    return builder.select(upper, of_two(*blocks[2:]), of_two(*blocks[:2]))


add_picked_32 = _add_picked(
    32,
    "``total`` + ``values[k + i]`` * the number at the place of the i-th set bit of a uint32 in ``x``, a pair of "
    "vectors; sums in any lanes. 32 values are read; those and x without a bit do not count, be they NaN.",
)
add_picked_64 = _add_picked(64, "The same for a uint64, four vectors, and 64 values.")
