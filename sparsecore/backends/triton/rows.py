"""Where the columns of a row are among the values: what every kernel here begins with, for both encodings.

A program looks at a tile: some rows, and some neighbouring columns of each of them, stored or not. From `places` on all
is dense arithmetic in registers. Columns of the csr encoding are found by binary search, which reads the row's columns
from the nearest cache after its first step; those of a bitmap by counting the bits before them.

Modules with kernels have no ``from __future__ import annotations``: Triton 3.2 wants types as annotations, not text.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.encoding import words

__all__ = ["bitmap_of", "index_of", "launches_on", "lower_bound", "ones", "places", "spread", "tile"]

_HERE = nullcontext()
_WIDEST = 128  # columns of a tile
_NARROWEST = 32  # a tile begins where a bitmap's word does


def tile(n_cols: int) -> dict[str, int]:
    """Compile-time arguments of `places` for a table of this width, and an option that Triton 3.9 wants to be told."""
    width = min(_WIDEST, max(_NARROWEST, triton.next_power_of_2(n_cols)))
    return {"N_COLS": n_cols, "COLS": width, "STEPS": n_cols.bit_length(), "enable_fp_fusion": True}


def index_of(crow: Tensor, col: Tensor | None) -> tuple[Tensor, Tensor | None, int]:
    """What `places` takes for an index set: it, and how far apart the pointers of two rows are."""
    crow = crow.contiguous()
    return crow, None if col is None else col.contiguous(), crow.stride(0)


def launches_on(tensor: Tensor) -> AbstractContextManager[None]:
    """Triton launches on torch's current device, which need not be the tensor's."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return _HERE  # to change the device, even to the same one, takes microseconds
    return torch.cuda.device(tensor.device)


def bitmap_of(crow: Tensor, col: Tensor, n_cols: int) -> Tensor:
    """The bitmap of a csr index set with int32 pointers: where a tile is looked up often, this pays for one call."""
    rows = crow.numel() - 1
    bitmap = crow.new_zeros(rows + 1, words(n_cols))
    with launches_on(crow):
        _set_bits[triton.cdiv(rows + 1, 8),](
            bitmap, bitmap.stride(0), crow.contiguous(), col.contiguous(), rows, ROWS=8, ENTRIES=32,
            enable_fp_fusion=True,
        )  # fmt: skip
    return bitmap


@triton.jit
def _set_bits(bitmap, stride, crow, col, rows, ROWS: tl.constexpr, ENTRIES: tl.constexpr):
    """A program writes ROWS rows of a bitmap whose bits are 0: their pointers, and a bit for each of their columns."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.load(crow + row, mask=row <= rows, other=0)
    end = tl.load(crow + row + 1, mask=row < rows, other=0)
    target = bitmap + row.to(tl.int64) * stride
    tl.store(target, at, mask=row <= rows)
    while tl.max(end - at, 0) > 0:
        entry = at[:, None] + tl.arange(0, ENTRIES)[None, :]
        live = entry < end[:, None]
        column = tl.load(col + entry, mask=live, other=0).to(tl.int32)
        one = tl.full((ROWS, ENTRIES), 1, tl.int32)
        tl.atomic_or(target[:, None] + 1 + column // 32, one << (column % 32), mask=live, sem="relaxed")
        at += ENTRIES


@triton.jit
def places(
    crow, col, stride, row, live, begin, N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr
):
    """Place among the values of the columns ``begin .. begin + COLS - 1`` of some rows, and whether they are stored.

    Args:
        crow, col, stride: from `index_of`.
        row: (R,), int64.
        live: (R,), nothing of the others is stored.
        begin: a multiple of 32.
        N_COLS, COLS, STEPS: from `tile`.

    Returns:
        Both (R, COLS); the place is meaningless where nothing is stored.
    """
    column = begin + tl.arange(0, COLS)
    inside = live[:, None] & (column < N_COLS)[None, :]
    first = tl.load(crow + row * stride, mask=live, other=0)
    if col is None:
        words = crow + row * stride + 1
        for earlier in range(begin // 32):
            first += ones(tl.load(words + earlier, mask=live, other=0))
        place, stored = spread(words + begin // 32, live, first, N_COLS - begin, COLS)
    else:
        last = tl.load(crow + row * stride + stride, mask=live, other=0)
        low = first[:, None] + tl.zeros((1, COLS), tl.int32)
        high = tl.where(inside, last[:, None], low)
        place = lower_bound(col, low, high, column[None, :], STEPS)
        found = tl.load(col + place, mask=place < high, other=0).to(tl.int32)
        stored = (place < high) & (found == column[None, :])
    return place, stored


@triton.jit
def spread(words, live, first, left, COLS: tl.constexpr):
    """`places` for bits that lie together: the next COLS columns of some rows, of which ``left`` exist.

    Args:
        words: (R,), pointers to the first of the words.
        live: (R,), nothing of the others is stored.
        first: (R,), place of the first of the bits that are set.
    """
    column = tl.arange(0, COLS)[None, :]
    word = tl.zeros((1, COLS), tl.int32)
    place, zero = first[:, None], tl.zeros_like(first)
    for number in tl.static_range(COLS // 32):
        its = tl.load(words + number, mask=live & (32 * number + zero < left), other=0)[:, None]
        word = tl.where(column // 32 == number, its, word)
        place += tl.where(column // 32 > number, ones(its), 0)
    bit = column % 32
    return place + ones(word & ((1 << bit) - 1)), ((word >> bit) & 1) != 0


@triton.jit
def lower_bound(ascending, low, high, wanted, STEPS: tl.constexpr):
    """First place in ``low .. high - 1`` of an array with a number not below ``wanted``, else ``high``.

    ``low`` and ``high`` are of one shape and type; STEPS must be at least the bits of ``high - low``.
    """
    for _ in range(STEPS):
        middle = low + (high - low) // 2
        seen = tl.load(ascending + middle, mask=low < high, other=0).to(tl.int32)
        below = (low < high) & (seen < wanted)
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def ones(word):
    """How many bits of each int32 are set, in a form that compilers know an instruction for."""
    x = word.to(tl.uint32, bitcast=True)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)
