"""Products of a sparse weight W (rows = outputs, cols = inputs) with dense activations, from bitmaps.

A tile of W is spread out in registers, zeros included, and multiplied on the tensor cores: a pass over W reads what is
stored, and no dense form of it is ever written. What is multiplied in vain costs less there than to look for what need
not be. Of csr a bitmap is made for the call, a bit a position, where so many are stored that this is faster; else
torch.sparse multiplies, as it does float64.

What is multiplied is as exact as `products` says; what is not stored is multiplied as a 0, so that infinite numbers may
become NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.torch import linear as by_torch
from sparsecore.backends.triton.products import OPTIONS, WIDEN, load_parts, parts_of, product, split
from sparsecore.backends.triton.rows import bitmap_of, launches_on, ones, spread

__all__ = ["sddmm", "spmm", "spmm_t"]

_PROGRAMS = 512  # some for every multiprocessor
_WIDTH = 64  # columns of most tiles
_FEWEST = 16  # examples for which a bitmap is made of csr
# The density from which on that pays: torch.sparse turns the index for spmm_t, and is slow to sample a product.
_FORWARD, _BACKWARD = 1 / 20, 1 / 50


def _bits(
    dtype: torch.dtype, crow: Tensor, col: Tensor | None, examples: int, n_cols: int, nnz: int, least: float
) -> Tensor | None:
    """The bitmap to read: the index, or one made of it from density ``least`` on. None: torch.sparse multiplies."""
    rows = crow.shape[0] - 1
    # Places within a tile of activations are counted by 32 bits.
    if dtype == torch.float64 or not examples or max(rows, n_cols) >= 1 << 23:
        return None
    if col is None:
        return crow.contiguous()
    if examples < _FEWEST or nnz < least * rows * n_cols or crow.dtype != torch.int32:
        return None
    return bitmap_of(crow, col, n_cols)


def _examples(n: int, most: int) -> int:
    return min(most, max(16, triton.next_power_of_2(n)))


def spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    (n, n_cols), n_rows = x.shape, crow.shape[0] - 1
    bitmap = _bits(values.dtype, crow, col, n, n_cols, values.numel(), _FORWARD)
    if bitmap is None:
        return by_torch.spmm(values, crow, col, x)
    out = x.new_empty(n, n_rows)
    height, width, examples = 64, 32, _examples(n, 128)
    with launches_on(values):
        parts, number = split(x, _WIDTH)
        _spmm[triton.cdiv(n, examples) * triton.cdiv(n_rows, height),](
            out, values.contiguous(), bitmap, bitmap.stride(0), parts, parts.stride(1), parts.stride(0), n, n_rows,
            N_COLS=n_cols, COLS=width, EXAMPLES=examples, ROWS=height, PARTS=number, WIDEN=WIDEN, num_stages=2,
            **OPTIONS,
        )  # fmt: skip
    return out


@triton.jit
def _spmm(
    out, values, bitmap, stride, x, pitch, apart, n, n_rows,
    N_COLS: tl.constexpr, COLS: tl.constexpr, EXAMPLES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS outputs of EXAMPLES examples, COLS columns of W at a time."""
    groups = tl.cdiv(n, EXAMPLES)  # on one axis with the rows: CUDA's others end at 65,535
    low = tl.program_id(0) % groups * EXAMPLES
    example = tl.arange(0, EXAMPLES)[None, :]
    live = low + example < n
    row = tl.program_id(0) // groups * ROWS + tl.arange(0, ROWS)
    exists = row < n_rows
    words = bitmap + row.to(tl.int64) * stride
    first = tl.load(words, mask=exists, other=0)
    words += 1
    total = tl.zeros((ROWS, EXAMPLES), tl.float32)
    given, apart = x + low.to(tl.int64) * pitch, apart.to(tl.int64)
    offset = example * pitch + tl.arange(0, COLS)[:, None]
    for begin in range(0, N_COLS, COLS):
        place, stored = spread(words, exists, first, N_COLS - begin, COLS)
        weight = tl.load(values + place, mask=stored, other=0)
        for number in tl.static_range(COLS // 32):
            first += ones(tl.load(words + number, mask=exists & (begin + 32 * number < N_COLS), other=0))
        words += COLS // 32
        w, w2, w3 = parts_of(weight, x.dtype.element_ty, PARTS)
        x1, x2, x3 = load_parts(given + offset, apart, live, PARTS)
        total += product(w, w2, w3, x1, x2, x3, tl.zeros((ROWS, EXAMPLES), tl.float32), PARTS, WIDEN)
        given += COLS
    target = out + low.to(tl.int64) * n_rows + example * n_rows + row[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=exists[:, None] & live)


def spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    n, n_rows = dy.shape
    bitmap = _bits(values.dtype, crow, col, n, n_cols, values.numel(), _BACKWARD)
    if bitmap is None:
        return by_torch.spmm_t(values, crow, col, dy, n_cols)
    examples, height = _examples(n, 128), 32
    tiles = triton.cdiv(n_cols, _WIDTH), triton.cdiv(n, examples)
    # The sum over the rows is cut into parts, that enough programs run; they are added in their order.
    steps = triton.cdiv(n_rows, height)
    each = max(4, triton.cdiv(steps, triton.cdiv(_PROGRAMS, tiles[0] * tiles[1])))
    cuts = triton.cdiv(steps, each)
    out = dy.new_empty(cuts, n, n_cols, dtype=torch.float32)
    with launches_on(values):
        parts, number = split(dy, 128)
        _spmm_t[tiles[0] * tiles[1], cuts](
            out, values.contiguous(), bitmap, bitmap.stride(0), _starts_of(bitmap, n_rows, n_cols),
            parts, parts.stride(1), parts.stride(0), n, n_rows, each * height,
            N_COLS=n_cols, COLS=_WIDTH, EXAMPLES=examples, ROWS=height, PARTS=number, WIDEN=WIDEN,
            **OPTIONS,
        )  # fmt: skip
    return (out[0] if cuts == 1 else out.sum(0)).to(dy.dtype)


def _starts_of(bitmap: Tensor, n_rows: int, n_cols: int) -> Tensor:
    """Place of the first nonzero of each tile of columns in each row: (tiles, rows)."""
    starts = bitmap.new_empty(triton.cdiv(n_cols, _WIDTH), n_rows)
    _starts[triton.cdiv(n_rows, 128),](
        starts, bitmap, bitmap.stride(0), n_rows, N_COLS=n_cols, COLS=_WIDTH, **OPTIONS
    )
    return starts


@triton.jit
def _starts(out, bitmap, stride, n_rows, N_COLS: tl.constexpr, COLS: tl.constexpr):
    """A program writes those of 128 rows."""
    row = tl.program_id(0) * 128 + tl.arange(0, 128)
    exists = row < n_rows
    words = bitmap + row.to(tl.int64) * stride
    first = tl.load(words, mask=exists, other=0)
    for begin in range(0, N_COLS, COLS):
        tl.store(out + row, first, mask=exists)
        for number in tl.static_range(COLS // 32):
            words += 1
            first += ones(tl.load(words, mask=exists & (begin + 32 * number < N_COLS), other=0))
        out += n_rows


@triton.jit
def _spmm_t(
    out, values, bitmap, stride, starts, dy, pitch, apart, n, n_rows, part,
    N_COLS: tl.constexpr, COLS: tl.constexpr, EXAMPLES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A program adds up ``part`` rows of W for COLS inputs of EXAMPLES examples, ROWS at a time."""
    strips = tl.cdiv(N_COLS, COLS)
    strip = tl.program_id(0) % strips
    begin = strip * COLS
    low = tl.program_id(0) // strips * EXAMPLES
    example = tl.arange(0, EXAMPLES)[:, None]
    live = low + example < n
    start = tl.program_id(1) * part
    end = tl.minimum(start + part, n_rows)
    row = start + tl.arange(0, ROWS)
    bitmap += 1 + begin // 32
    starts += strip.to(tl.int64) * n_rows
    first = tl.load(starts + row, mask=row < end, other=0)
    place, stored = spread(bitmap + row.to(tl.int64) * stride, row < end, first, N_COLS - begin, COLS)
    weight = tl.load(values + place, mask=stored, other=0)
    total = tl.zeros((EXAMPLES, COLS), tl.float32)
    given, apart = dy + low.to(tl.int64) * pitch + start, apart.to(tl.int64)
    offset = example * pitch + tl.arange(0, ROWS)[None, :]
    for _ in range(start, end, ROWS):
        # The next tile's weights are under way while this one's are multiplied.
        row += ROWS
        first = tl.load(starts + row, mask=row < end, other=0)
        place, stored = spread(bitmap + row.to(tl.int64) * stride, row < end, first, N_COLS - begin, COLS)
        following = tl.load(values + place, mask=stored, other=0)
        w, w2, w3 = parts_of(weight, dy.dtype.element_ty, PARTS)
        dy1, dy2, dy3 = load_parts(given + offset, apart, live, PARTS)
        total += product(dy1, dy2, dy3, w, w2, w3, tl.zeros((EXAMPLES, COLS), tl.float32), PARTS, WIDEN)
        given += ROWS
        weight = following
    column = (begin + tl.arange(0, COLS))[None, :]
    target = out + (tl.program_id(1).to(tl.int64) * n + low) * N_COLS + example * N_COLS + column
    tl.store(target, total, mask=live & (column < N_COLS))


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    (n, n_cols), n_rows = x.shape, dy.shape[1]
    bitmap = _bits(x.dtype, crow, col, n, n_cols, nnz, _BACKWARD)
    if bitmap is None:
        return by_torch.sddmm(crow, col, dy, x, nnz)
    out = x.new_empty(nnz)
    height, examples = 64, 32
    with launches_on(x):
        outputs, number = split(dy, 128)
        inputs, _ = split(x, _WIDTH)
        _sddmm[triton.cdiv(n_cols, _WIDTH) * triton.cdiv(n_rows, height),](
            out, bitmap, bitmap.stride(0), _starts_of(bitmap, n_rows, n_cols),
            outputs, outputs.stride(1), outputs.stride(0), inputs, inputs.stride(1), inputs.stride(0), n, n_rows,
            N_COLS=n_cols, COLS=_WIDTH, EXAMPLES=examples, ROWS=height, PARTS=number, WIDEN=WIDEN,
            **OPTIONS,
        )  # fmt: skip
    return out


@triton.jit
def _sddmm(
    out, bitmap, stride, starts, dy, dy_pitch, dy_apart, x, x_pitch, x_apart, n, n_rows,
    N_COLS: tl.constexpr, COLS: tl.constexpr, EXAMPLES: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """A program computes the products of ROWS outputs and COLS inputs, and writes those of stored weights."""
    strips = tl.cdiv(N_COLS, COLS)
    strip = tl.program_id(0) % strips
    begin = strip * COLS
    top = tl.program_id(0) // strips * ROWS
    total = tl.zeros((ROWS, COLS), tl.float32)
    example = tl.arange(0, EXAMPLES)
    outputs, inputs = dy + top, x + begin
    dy_apart, x_apart = dy_apart.to(tl.int64), x_apart.to(tl.int64)
    of_output = example[None, :] * dy_pitch + tl.arange(0, ROWS)[:, None]
    of_input = example[:, None] * x_pitch + tl.arange(0, COLS)[None, :]
    for low in range(0, n, EXAMPLES):
        live = low + example < n
        dy1, dy2, dy3 = load_parts(outputs + of_output, dy_apart, live[None, :], PARTS)
        x1, x2, x3 = load_parts(inputs + of_input, x_apart, live[:, None], PARTS)
        total += product(dy1, dy2, dy3, x1, x2, x3, tl.zeros((ROWS, COLS), tl.float32), PARTS, WIDEN)
        outputs += EXAMPLES * dy_pitch
        inputs += EXAMPLES * x_pitch
    row = top + tl.arange(0, ROWS)
    first = tl.load(starts + strip.to(tl.int64) * n_rows + row, mask=row < n_rows, other=0)
    words = bitmap + 1 + begin // 32 + row.to(tl.int64) * stride
    place, stored = spread(words, row < n_rows, first, N_COLS - begin, COLS)
    tl.store(out + place, total.to(out.dtype.element_ty), mask=stored)
