"""Packed numbers to the lanes of a mask and back on AVX2, which has no instruction for either: eight lanes are permuted
at a time, in an order that a table has for each eight bits. Written out lane by lane, as LLVM would, 16 lanes take a
branch each.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba.core import cgutils

from sparsecore.backends.numba.simd_types import I8, I16, I32, I64, LANES, call

_HALF = LANES // 2
_NUMBERS, _PLACES, _BYTES = (ir.VectorType(kind, _HALF) for kind in (ir.FloatType(), I32, I8))
_ABSENT = 0x80  # the lane of a bit that is not set: negative as a signed byte


def _orders() -> tuple[np.ndarray, np.ndarray]:
    """For each eight bits: the number of set ones below each that is set, and the places of those that are set."""
    ranks, places = np.full((256, _HALF), _ABSENT, np.uint8), np.zeros((256, _HALF), np.uint8)
    for byte in range(256):
        stored = [bit for bit in range(_HALF) if byte >> bit & 1]
        ranks[byte, stored] = range(len(stored))
        places[byte, : len(stored)] = stored
    return ranks, places


RANKS, PLACES = (table.view("<u8").reshape(-1).tolist() for table in _orders())
_FIRST = [-1] * _HALF + [0] * _HALF  # from element 8 - n on, lanes are negative that belong to the first n


def expanded_from(builder, place, mask):
    """16 lanes from the packed float32 at ``place``; of memory, those alone are read that the mask counts."""
    low, high = _bytes(builder, mask)
    stored = _count(builder, low)
    halves = []
    for byte, start in ((low, place), (high, builder.gep(place, [stored]))):
        lanes = _first(builder, _count(builder, byte))
        source = builder.bitcast(start, I8.as_pointer())
        packed = call(builder, "llvm.x86.avx.maskload.ps.256", _NUMBERS, [source, lanes])
        order = _order(builder, _entry(builder, RANKS, "ranks", byte))
        halves.append(_where_set(builder, order, _permuted(builder, packed, order)))
    return _joined(builder, *halves)


def expanded(builder, value, mask):
    """16 lanes from those of a packed vector."""
    low, high = _bytes(builder, mask)
    packed = [_half(builder, value, 0), _half(builder, value, _HALF)]
    order = _order(builder, _entry(builder, RANKS, "ranks", low))
    first = _where_set(builder, order, _permuted(builder, packed[0], order))
    order = builder.add(
        _order(builder, _entry(builder, RANKS, "ranks", high)),
        _repeated(builder, builder.trunc(_count(builder, low), I32), _PLACES),
    )
    beyond = builder.icmp_signed(">", order, ir.Constant(_PLACES, [_HALF - 1] * _HALF))
    taken = [_permuted(builder, half, order) for half in packed]
    second = _where_set(builder, order, builder.select(beyond, taken[1], taken[0]))
    return _joined(builder, first, second)


def compressed(builder, value, mask):
    """The mask's lanes at the front; the lanes behind them hold any of the others."""
    low, high = _bytes(builder, mask)
    stored = _count(builder, low)
    order = _order(builder, _entry(builder, PLACES, "places", low))
    first = _permuted(builder, _half(builder, value, 0), order)
    # The second half's numbers follow: rotated by as many lanes as the first has, and taken from there on.
    entry = _entry(builder, PLACES, "places", high)
    turned = call(builder, "llvm.fshl.i64", I64, [entry, entry, builder.shl(stored, I64(3))])
    second = _permuted(builder, _half(builder, value, _HALF), _order(builder, turned))
    own = builder.icmp_signed("<", _first(builder, stored), ir.Constant(_PLACES, [0] * _HALF))
    return _joined(builder, builder.select(own, first, second), second)


def write_places(builder, place, mask, base):
    """``base`` + the places of the set bits of 64, in order, and then 16 times base alone, from ``place`` on."""
    eight, two = ir.VectorType(base.type, _HALF), ir.VectorType(base.type, LANES)
    for begin in range(0, 64, _HALF):
        byte = builder.trunc(builder.lshr(mask, I64(begin)), I8)
        found = builder.zext(builder.bitcast(_entry(builder, PLACES, "places", byte), _BYTES), eight)
        number = builder.add(base, base.type(begin))
        _write(builder, place, builder.add(found, _repeated(builder, number, eight)))
        place = builder.gep(place, [_count(builder, builder.zext(byte, I16))])
    _write(builder, place, _repeated(builder, base, two))


def _write(builder, place, numbers):
    builder.store(numbers, builder.bitcast(place, numbers.type.as_pointer())).align = (
        numbers.type.element.width // 8
    )


def _bytes(builder, mask):
    return builder.and_(mask, I16(0xFF)), builder.lshr(mask, I16(_HALF))


def _count(builder, byte):
    return builder.zext(call(builder, "llvm.ctpop.i16", I16, [byte]), I64)


def _table(builder, name, kind, numbers):
    constant = ir.Constant(ir.ArrayType(kind, len(numbers)), numbers)
    return cgutils.global_constant(builder.module, f".sparsecore.{name}", constant)


def _entry(builder, numbers, name, byte):
    place = builder.gep(_table(builder, name, I64, numbers), [I32(0), builder.zext(byte, I32)])
    return builder.load(place, typ=I64)


def _order(builder, entry):
    return builder.sext(builder.bitcast(entry, _BYTES), _PLACES)


def _first(builder, n):
    """Lanes that are negative where they belong to the first n."""
    place = builder.gep(_table(builder, "first", I32, _FIRST), [I32(0), builder.sub(I64(_HALF), n)])
    lanes = builder.load(builder.bitcast(place, _PLACES.as_pointer()), typ=_PLACES)
    lanes.align = 4
    return lanes


def _repeated(builder, number, vector):
    undefined = ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, number, I32(0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(I32, vector.count), [0] * vector.count)
    )


def _permuted(builder, numbers, order):
    """``numbers[order & 7]``."""
    return call(builder, "llvm.x86.avx2.permps", _NUMBERS, [numbers, order])


def _where_set(builder, order, numbers):
    absent = builder.icmp_signed("<", order, ir.Constant(_PLACES, [0] * _HALF))
    return builder.select(absent, ir.Constant(_NUMBERS, [0.0] * _HALF), numbers)


def _half(builder, value, begin):
    lanes = ir.Constant(_PLACES, list(range(begin, begin + _HALF)))
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes)


def _joined(builder, low, high):
    return builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, LANES), list(range(LANES))))
