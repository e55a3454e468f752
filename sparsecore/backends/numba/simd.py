"""Vectors of 16 numbers inside numba kernels.

numba cannot prove that two arrays do not overlap, so it keeps sums of an inner loop in memory instead of in registers.
These intrinsics emit LLVM vector code directly: a 16-lane value lives in registers (one AVX-512 register for float32,
two for float64, two AVX2 or four NEON ones elsewhere; LLVM splits it), and is loaded or stored as a whole. Only
portable LLVM operations are used: where the processor has no instruction for one (expanding and compressing need
AVX-512), LLVM writes it out lane by lane.

A *mask* is a uint16: bit i belongs to lane i. Indices count elements from the start of a C-contiguous array and are
**not** checked.
"""

from __future__ import annotations

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils, config
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

__all__ = [
    "LANES", "absolute", "add", "at", "at_least", "bits", "bits64", "breaks", "compress", "consecutive", "count", "div",
    "expand", "first_lanes", "fma", "greater", "hidden", "horizontal_sum", "load", "load_masked", "lookup",
    "lowest", "mul", "positions", "prefetch", "put", "splat", "spread", "sqrt", "store", "store_masked", "sub",
    "sum_of_each", "transpose", "where", "zeros",
]  # fmt: skip

LANES = 16
_I1, _I8, _I16, _I32, _I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
_MASK = ir.VectorType(_I1, LANES)


class VectorType(types.Type):
    """numba type of 16 numbers of one floating-point type."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"vector16({dtype})")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, ir.VectorType(dmm.lookup(fe_type.dtype).get_value_type(), LANES))


def _element(context, builder, array_type, array, index):
    data = context.make_array(array_type)(context, builder, array).data
    return builder.gep(data, [index])


def _vectors(context, builder, array_type, array, index, vector):
    return builder.bitcast(_element(context, builder, array_type, array, index), vector.as_pointer())


def _align(array_type) -> int:
    return array_type.dtype.bitwidth // 8


def _call(builder, name, result, arguments):
    kind = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _suffix(vector) -> str:
    return f"v{LANES}f{64 if isinstance(vector.element, ir.DoubleType) else 32}"


def _lanes(builder, mask):
    return builder.bitcast(mask, _MASK)


# ---------------------------------------------------------------- single numbers


@intrinsic
def at(typing_context, array, index):
    """``array.flat[index]``, without the check for negative indices."""

    def emit(context, builder, signature, arguments):
        return builder.load(
            _element(context, builder, signature.args[0], *arguments),
            typ=context.get_value_type(signature.return_type),
        )

    return array.dtype(array, types.intp), emit


@intrinsic
def put(typing_context, array, index, number):
    """``array.flat[index] = number``."""

    def emit(context, builder, signature, arguments):
        builder.store(arguments[2], _element(context, builder, signature.args[0], *arguments[:2]))
        return context.get_dummy_value()

    return types.void(array, types.intp, array.dtype), emit


@intrinsic
def prefetch(typing_context, array, index):
    """Ask for the cache line of an element; the index may lie beyond the array."""

    def emit(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments)
        _call(
            builder,
            "llvm.prefetch.p0",
            ir.VoidType(),
            [builder.bitcast(place, _I8.as_pointer()), _I32(0), _I32(3), _I32(1)],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


# ---------------------------------------------------------------- masks


@intrinsic
def count(typing_context, mask):
    """Number of set bits of an unsigned integer."""

    def emit(context, builder, signature, arguments):
        kind = arguments[0].type
        found = _call(builder, f"llvm.ctpop.i{kind.width}", kind, arguments)
        return found if kind.width == 64 else builder.zext(found, ir.IntType(64))

    return types.intp(mask), emit


@intrinsic
def lowest(typing_context, mask):
    """Place of the lowest set bit of an unsigned integer that is not 0."""

    def emit(context, builder, signature, arguments):
        kind = arguments[0].type
        found = _call(builder, f"llvm.cttz.i{kind.width}", kind, [arguments[0], _I1(1)])
        return found if kind.width == 64 else builder.zext(found, ir.IntType(64))

    return types.intp(mask), emit


@intrinsic
def first_lanes(typing_context, n):
    """Mask of the first n lanes; n in 0 .. 16."""

    def emit(context, builder, signature, arguments):
        n = builder.trunc(arguments[0], _I32)
        return builder.trunc(builder.sub(builder.shl(_I32(1), n), _I32(1)), _I16)

    return types.uint16(types.intp), emit


@intrinsic
def bits(typing_context, words, index):
    """The uint16 at a place of a uint16 array: a mask of 16 positions."""

    def emit(context, builder, signature, arguments):
        return builder.load(_element(context, builder, signature.args[0], *arguments), typ=_I16)

    return types.uint16(words, types.intp), emit


def _compare(operation):
    @intrinsic
    def compare(typing_context, a, b):
        def emit(context, builder, signature, arguments):
            return builder.bitcast(builder.fcmp_ordered(operation, *arguments), _I16)

        return types.uint16(a, b), emit

    return compare


greater = _compare(">")  # mask of lanes with a > b; NaN never is
at_least = _compare(">=")


# ---------------------------------------------------------------- memory


@intrinsic
def load(typing_context, array, index):
    """The 16 elements of ``array`` that begin at flat position ``index``."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = _vectors(context, builder, signature.args[0], *arguments, vector)
        instruction = builder.load(place, typ=vector)
        instruction.align = _align(array)
        return instruction

    return result(array, types.intp), emit


@intrinsic
def store(typing_context, array, index, value):
    """Write a vector to the flat position ``index`` of ``array``."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        place = _vectors(context, builder, signature.args[0], *arguments[:2], vector)
        builder.store(arguments[2], place).align = _align(array)
        return context.get_dummy_value()

    return types.void(array, types.intp, value), emit


@intrinsic
def load_masked(typing_context, array, index, mask):
    """The elements of the mask's lanes, 0 in the others: memory of those is not touched."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = _vectors(context, builder, signature.args[0], *arguments[:2], vector)
        zero = ir.Constant(vector, [0.0] * LANES)
        return _call(
            builder,
            f"llvm.masked.load.{_suffix(vector)}.p0",
            vector,
            [place, _I32(_align(array)), _lanes(builder, arguments[2]), zero],
        )

    return result(array, types.intp, types.uint16), emit


@intrinsic
def store_masked(typing_context, array, index, value, mask):
    """Write the mask's lanes only."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        place = _vectors(context, builder, signature.args[0], *arguments[:2], vector)
        _call(
            builder,
            f"llvm.masked.store.{_suffix(vector)}.p0",
            ir.VoidType(),
            [arguments[2], place, _I32(_align(array)), _lanes(builder, arguments[3])],
        )
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.uint16), emit


@intrinsic
def expand(typing_context, array, index, mask):
    """The next ``count(mask)`` elements from ``index``, in order, in the mask's lanes; 0 in the others."""
    result = VectorType(array.dtype)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        place = _element(context, builder, signature.args[0], *arguments[:2])
        zero = ir.Constant(vector, [0.0] * LANES)
        return _call(
            builder,
            f"llvm.masked.expandload.{_suffix(vector)}",
            vector,
            [place, _lanes(builder, arguments[2]), zero],
        )

    return result(array, types.intp, types.uint16), emit


@intrinsic
def compress(typing_context, value, mask):
    """The mask's lanes, moved together to the front; the lanes behind them are undefined."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        if value.dtype.bitwidth == 64:  # LLVM's own splitting of 16 doubles crashes (seen with LLVM 22)
            return _compress_by_lane(builder, vector, *arguments)
        return _call(
            builder,
            f"llvm.experimental.vector.compress.{_suffix(vector)}",
            vector,
            [arguments[0], _lanes(builder, arguments[1]), ir.Constant(vector, ir.Undefined)],
        )

    return value(value, types.uint16), emit


def _compress_by_lane(builder, vector, value, mask):
    """Store every lane; the place moves on where the mask's bit is set."""
    buffer = cgutils.alloca_once(builder, ir.ArrayType(vector.element, LANES + 1))
    place = _I32(0)
    for lane in range(LANES):
        number = builder.extract_element(value, _I32(lane))
        builder.store(number, builder.gep(buffer, [_I32(0), place]))
        bit = builder.and_(builder.lshr(mask, _I16(lane)), _I16(1))
        place = builder.add(place, builder.zext(bit, _I32))
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
            row = builder.load(_vectors(context, builder, signature.args[0], a, start, vector), typ=vector)
            row.align = _align(source)
            rows.append(row)
            start = builder.add(start, step)
        # Exchange off-diagonal blocks of 8, 4, 2 and 1: after each stage rows and lanes have swapped one index bit.
        for half in (8, 4, 2, 1):
            swapped = list(rows)
            for k in range(LANES):
                if not k & half:
                    swapped[k] = _interleave(builder, rows[k], rows[k + half], half, high=False)
                    swapped[k + half] = _interleave(builder, rows[k], rows[k + half], half, high=True)
            rows = swapped
        for row in rows:
            to = _vectors(context, builder, signature.args[3], b, place, vector)
            builder.store(row, to).align = _align(target)
            place = builder.add(place, leap)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, target, types.intp, types.intp), emit


def _interleave(builder, a, b, half, high):
    """Blocks of ``half`` lanes, one of a and one of b in turn: the low or the high block of each pair."""
    chosen = []
    for lane in range(LANES):
        if high:
            chosen.append(lane + half if not lane & half else LANES + lane)
        else:
            chosen.append(lane if not lane & half else LANES + lane - half)
    order = ir.Constant(ir.VectorType(_I32, LANES), chosen)
    return builder.shuffle_vector(a, b, order)


# ---------------------------------------------------------------- arithmetic


@intrinsic
def splat(typing_context, scalar):
    """16 copies of a number."""
    result = VectorType(scalar)

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(result)
        first = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[0], _I32(0))
        order = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
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
        return _call(builder, f"llvm.fmuladd.{_suffix(vector)}", vector, arguments)

    return a(a, a, a), emit


def _binary(instruction):
    @intrinsic
    def operate(typing_context, a, b):
        def emit(context, builder, signature, arguments):
            return getattr(builder, instruction)(*arguments)

        return a(a, a), emit

    return operate


def _unary(name):
    @intrinsic
    def operate(typing_context, a):
        def emit(context, builder, signature, arguments):
            vector = context.get_value_type(a)
            return _call(builder, f"llvm.{name}.{_suffix(vector)}", vector, arguments)

        return a(a), emit

    return operate


add, sub, mul, div = (_binary(name) for name in ("fadd", "fsub", "fmul", "fdiv"))
absolute, sqrt = _unary("fabs"), _unary("sqrt")


@intrinsic
def horizontal_sum(typing_context, a):
    """Sum of the 16 lanes, by a tree."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(a)
        scalar = vector.element
        name = f"llvm.vector.reduce.fadd.{_suffix(vector)}"
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(scalar, [scalar, vector]), name
        )
        return builder.call(function, [ir.Constant(scalar, -0.0), arguments[0]], fastmath=("reassoc",))

    return a.dtype(a), emit


@intrinsic
def sum_of_each(typing_context, vectors):
    """A tuple of 16 vectors -> one vector: lane i is the sum of the i-th's lanes. 15 additions, not 16 trees."""
    result = vectors.dtype

    def emit(context, builder, signature, arguments):
        parts = cgutils.unpack_tuple(builder, arguments[0], LANES)
        for half in (8, 4, 2, 1):
            # parts[k] and parts[k + half] become one vector whose lanes with bit `half` belong to the second.
            parts = [
                builder.fadd(
                    _interleave(builder, parts[k], parts[k + half], half, high=False),
                    _interleave(builder, parts[k], parts[k + half], half, high=True),
                )
                for k in range(half)
            ]
        return parts[0]

    return result(vectors), emit


@intrinsic
def consecutive(typing_context, first):
    """int32 numbers ``first .. first + 15`` as the bits of a float32 vector, to be compressed and stored as such."""
    result = VectorType(types.float32)

    def emit(context, builder, signature, arguments):
        vector = ir.VectorType(_I32, LANES)
        undefined = ir.Constant(vector, ir.Undefined)
        start = builder.insert_element(undefined, builder.trunc(arguments[0], _I32), _I32(0))
        start = builder.shuffle_vector(start, undefined, ir.Constant(vector, [0] * LANES))
        numbers = builder.add(start, ir.Constant(vector, list(range(LANES))))
        return builder.bitcast(numbers, context.get_value_type(result))

    return result(types.intp), emit


# ---------------------------------------------------------------- moving lanes


def _has_avx512() -> bool:
    """Whether code is compiled for a processor with AVX-512: this one, unless numba was told another."""
    if config.CPU_NAME or config.CPU_FEATURES:
        return False
    return bool(binding.get_host_cpu_features().get("avx512f", False))


@intrinsic
def spread(typing_context, value, mask):
    """The first ``count(mask)`` lanes, in order, in the mask's lanes; 0 in the others.

    With AVX-512 ``spread(load_masked(a, i, first_lanes(count(m))), m)`` takes half as long as ``expand(a, i, m)``:
    the instruction is slow when it reads memory itself (Zen 5: 0.6 and 1.1 ns).
    """

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(value)
        zero = ir.Constant(vector, [0.0] * LANES)
        lanes = _lanes(builder, arguments[1])
        if value.dtype.bitwidth == 32 and _has_avx512():
            return _call(builder, "llvm.x86.avx512.mask.expand.v16f32", vector, [arguments[0], zero, lanes])
        buffer = cgutils.alloca_once(builder, vector)
        builder.store(arguments[0], buffer)
        name = f"llvm.masked.expandload.{_suffix(vector)}"
        return _call(
            builder, name, vector, [builder.bitcast(buffer, vector.element.as_pointer()), lanes, zero]
        )

    return value(value, types.uint16), emit


# ---------------------------------------------------------------- for products over bitmaps


@intrinsic
def bits64(typing_context, words, index):
    """64 bits that begin at an element of an integer array."""

    def emit(context, builder, signature, arguments):
        place = _element(context, builder, signature.args[0], *arguments)
        number = builder.load(builder.bitcast(place, _I64.as_pointer()), typ=_I64)
        number.align = _align(words)
        return number

    return types.uint64(words, types.intp), emit


@intrinsic
def positions(typing_context, target, index, mask, base):
    """Write base + the places of a uint64's set bits as uint16, in order. All of 64 elements are written."""

    def emit(context, builder, signature, arguments):
        array, index, mask, base = arguments
        narrow, wide = ir.VectorType(_I8, 64), ir.VectorType(_I16, 64)
        found = _call(
            builder,
            "llvm.experimental.vector.compress.v64i8",
            narrow,
            [
                ir.Constant(narrow, list(range(64))),
                builder.bitcast(mask, ir.VectorType(_I1, 64)),
                ir.Constant(narrow, ir.Undefined),
            ],
        )
        undefined = ir.Constant(wide, ir.Undefined)
        first = builder.insert_element(undefined, builder.trunc(base, _I16), _I32(0))
        bases = builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, 64), [0] * 64))
        place = builder.bitcast(
            _element(context, builder, signature.args[0], array, index), wide.as_pointer()
        )
        builder.store(builder.add(builder.zext(found, wide), bases), place).align = _align(target)
        return context.get_dummy_value()

    return types.void(target, types.intp, types.uint64, types.intp), emit


@intrinsic
def where(typing_context, mask, a, b):
    """Lanes of a where the mask is set, of b elsewhere."""

    def emit(context, builder, signature, arguments):
        return builder.select(_lanes(builder, arguments[0]), *arguments[1:])

    return a(types.uint16, a, a), emit


@intrinsic
def hidden(typing_context, number):
    """The same integer, unknown to the compiler: it cannot foresee the trips of a loop that steps by it."""

    def emit(context, builder, signature, arguments):
        kind = ir.FunctionType(arguments[0].type, [arguments[0].type])
        return builder.call(ir.InlineAsm(kind, "", "=r,0", side_effect=False), arguments)

    return number(number), emit


@intrinsic
def lookup(typing_context, array, places, longest):
    """``array.flat[min(place, longest)]`` for the 16 places, which are whole numbers from 0 on."""

    def emit(context, builder, signature, arguments):
        vector = context.get_value_type(places)
        wide = ir.VectorType(ir.IntType(64), LANES)
        near = _call(builder, f"llvm.minnum.{_suffix(vector)}", vector, arguments[1:])
        index = builder.fptosi(near, wide)
        base = builder.ptrtoint(
            _element(context, builder, signature.args[0], arguments[0], _I32(0)), wide.element
        )
        base = builder.insert_element(ir.Constant(wide, ir.Undefined), base, _I32(0))
        first = ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES)
        base = builder.shuffle_vector(base, ir.Constant(wide, ir.Undefined), first)
        size = ir.Constant(wide, [_align(array)] * LANES)
        addresses = builder.add(base, builder.mul(index, size))
        pointers = builder.inttoptr(addresses, ir.VectorType(_I8.as_pointer(), LANES))
        every = ir.Constant(_MASK, [1] * LANES)
        zero = ir.Constant(vector, [0.0] * LANES)
        name = f"llvm.masked.gather.{_suffix(vector)}.v{LANES}p0"
        return _call(builder, name, vector, [pointers, _I32(_align(array)), every, zero])

    return places(array, places, places), emit


@intrinsic
def breaks(typing_context, numbers, index, n):
    """Mask of those of n (1 .. 16) elements of an int64 array that are not their predecessor + 1."""

    def emit(context, builder, signature, arguments):
        array, index, n = arguments
        wide = ir.VectorType(_I64, LANES)
        valid = builder.sub(builder.shl(_I32(1), builder.trunc(n, _I32)), _I32(1))
        valid = _lanes(builder, builder.trunc(valid, _I16))
        found = []
        for start in (index, builder.sub(index, _I64(1))):
            place = _vectors(context, builder, signature.args[0], array, start, wide)
            masked = [place, _I32(8), valid, ir.Constant(wide, [0] * LANES)]
            found.append(_call(builder, f"llvm.masked.load.v{LANES}i64.p0", wide, masked))
        expected = builder.add(found[1], ir.Constant(wide, [1] * LANES))
        return builder.bitcast(builder.and_(builder.icmp_signed("!=", found[0], expected), valid), _I16)

    return types.uint16(numbers, types.intp, types.intp), emit
