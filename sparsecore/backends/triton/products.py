"""Products of tiles of float32 on tensor cores, as exact as float32's own.

Tensor cores multiply 16-bit numbers. A float32 is the sum of three bfloat16 (8 bits of its 24 each), and of the nine
products of two of them the six largest are summed: as exact as float32's own product. Where torch was told that less is
enough (``torch.set_float32_matmul_precision``), it is the sum of two, or one. Tensor cores cut off what they add up
where an ordinary addition rounds: each tile's sum begins at 0, and is added to the others by the latter. Infinite
numbers may become NaN.
"""

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["OPTIONS", "WIDEN", "load_parts", "parts_of", "product", "split"]

_PARTS = {"highest": 3, "high": 2, "medium": 1}
OPTIONS = {"enable_fp_fusion": True}  # Triton 3.9 wants to be told
# The interpreter takes the bits of a bfloat16 for an integer's when it multiplies.
WIDEN = os.environ.get("TRITON_INTERPRET") == "1"


def _parts_of_float32() -> int:
    try:
        return _PARTS[torch.get_float32_matmul_precision()]
    except RuntimeError:  # so says torch where TF32 was allowed by way of its newer setting
        return 3 if torch.backends.cuda.matmul.fp32_precision == "ieee" else 2


def split(x: Tensor, multiple: int, exact: bool = False) -> tuple[Tensor, int]:
    """The parts of a matrix, (parts, rows, columns), with zeros up to a multiple of columns; and their number.

    ``exact``: as many as float32 has, whatever torch was told.
    """
    single = x.dtype == torch.float32
    rows, cols = x.shape
    width = triton.cdiv(cols, multiple) * multiple
    number = (3 if exact else _parts_of_float32()) if single else 1
    if width == cols and not single:
        return x.contiguous().view(1, rows, cols), 1
    out = x.new_empty((number, rows, width), dtype=torch.bfloat16 if single else x.dtype)
    _split[rows, triton.cdiv(width, 1024)](
        out, x.contiguous(), cols, width, rows * width, PARTS=number, **OPTIONS
    )
    return out, number


@triton.jit
def _split(out, x, cols, width, apart, PARTS: tl.constexpr):
    """A program splits up to 1024 numbers of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * 1024 + tl.arange(0, 1024)
    left = tl.load(x + row * cols + column, mask=column < cols, other=0)
    for _ in tl.static_range(PARTS):
        part = left.to(out.dtype.element_ty)
        tl.store(out + row * width + column, part, mask=column < width)
        left -= part.to(left.dtype)
        out += apart.to(tl.int64)


@triton.jit
def _dot(a, b, total, WIDEN: tl.constexpr):
    if WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    return tl.dot(a, b, total)


@triton.jit
def product(a, a2, a3, b, b2, b3, zero, PARTS: tl.constexpr, WIDEN: tl.constexpr):
    """A product of two tiles in PARTS parts each, the largest first; the smallest of the products are summed first."""
    total = zero
    if PARTS > 2:
        total = _dot(a, b3, total, WIDEN)
        total = _dot(a3, b, total, WIDEN)
        total = _dot(a2, b2, total, WIDEN)
    if PARTS > 1:
        total = _dot(a, b2, total, WIDEN)
        total = _dot(a2, b, total, WIDEN)
    return _dot(a, b, total, WIDEN)


@triton.jit
def parts_of(weight, dtype: tl.constexpr, PARTS: tl.constexpr):
    """The parts of a tile of float32, as many as PARTS (the others are not used)."""
    large = weight.to(dtype)
    middle = large
    small = large
    if PARTS > 1:
        left = weight - large.to(tl.float32)
        middle = left.to(dtype)
        small = (left - middle.to(tl.float32)).to(dtype)
    return large, middle, small


@triton.jit
def load_parts(source, apart, mask, PARTS: tl.constexpr):
    """The parts of a tile that `split` has written, as many as PARTS (the others are not used)."""
    first = tl.load(source, mask=mask, other=0)
    second = first
    third = first
    if PARTS > 1:
        second = tl.load(source + apart, mask=mask, other=0)
    if PARTS > 2:
        third = tl.load(source + 2 * apart, mask=mask, other=0)
    return first, second, third
