"""How an index set is stored: row pointers and columns, or one bit a position beside each row's pointer.

*csr*: ``crow`` (rows + 1,) and ``col`` (nnz,) in the narrowest integer type.

*bitmap*: one int32 array of shape (rows + 1, words). Word 0 of a row is its pointer, bit j % 32 of word 1 + j // 32
says whether column j is stored; padding is 0, and the last row holds nnz alone. Pointer and bits of a row lie together:
a row that is looked up at random costs one cache line of index. The order of the values is the same in both.

Bytes an index takes for each position of a weight of density f: csr ``f * (1, 2 or 4) + 4 / cols``, bitmap about
``1/8 + 4 / cols``. Kernels read 16 positions of a bitmap at once, with AVX-512; without it a bitmap has no advantage.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sparsecore.errors import PatternError, SparsecoreError
from sparsecore.pages import ask_huge_pages
from sparsecore.sizes import column_dtype

__all__ = [
    "ENCODINGS",
    "check_bitmap",
    "choose_encoding",
    "decode",
    "encode",
    "has_expand",
    "stored_mask",
    "words",
]

ENCODINGS = ("csr", "bitmap")

# From here on the bitmap is not much larger than uint8 columns, and reading it is faster (results/kernels.md).
_BITMAP_DENSITY = 1 / 16
_BLOCK = 1 << 22  # positions that are spread out as bytes at a time


def choose_encoding(nnz: int, shape: tuple[int, int], device: torch.device | str = "cpu") -> str:
    """The encoding that a new weight gets.

    ``"bitmap"`` on a CPU with AVX-512 from density 1/16 on, else ``"csr"``.
    """
    dense_enough = nnz >= _BITMAP_DENSITY * shape[0] * shape[1] and nnz < 2**31
    return "bitmap" if torch.device(device).type == "cpu" and dense_enough and has_expand() else "csr"


@cache
def has_expand() -> bool:
    """Whether kernels run on AVX-512, which expands 16 positions in one instruction."""
    if os.environ.get("SPARSECORE_SIMD") == "portable":
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512"


def words(cols: int) -> int:
    """32-bit words of a bitmap's row: a power of two up to 8, then a multiple of 4."""
    n = 1 + -(-cols // 32)
    if n <= 8:
        return 1 << (n - 1).bit_length()
    return -(-n // 4) * 4


def encode(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """Bitmap of a CSR index set on the CPU.

    Raises:
        SparsecoreError: if there are 2^31 nonzeros or more, which its pointers cannot count.
    """
    nnz, rows = col.numel(), crow.numel() - 1
    if nnz >= 2**31:
        raise SparsecoreError(f"a bitmap counts fewer than 2^31 nonzeros, got {nnz}; use the csr encoding")
    pointers, columns = crow.numpy(), col.numpy()
    stored = ask_huge_pages(torch.empty((rows + 1, words(cols)), dtype=torch.int32, device="cpu")).zero_()
    bitmap = stored.numpy()
    bitmap[:, 0] = pointers
    masks = -(-cols // 32)
    height = max(1, _BLOCK // (32 * masks))
    for first in range(0, rows, height):
        last = min(first + height, rows)
        row = np.repeat(np.arange(last - first), np.diff(pointers[first : last + 1]))
        spread = np.zeros((last - first, 32 * masks), bool)
        spread[row, columns[pointers[first] : pointers[last]]] = True
        packed = np.packbits(spread, axis=1, bitorder="little")
        bitmap[first:last, 1 : 1 + masks] = packed.view("<i4")
    return stored


def decode(bitmap: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns (in the narrowest type) of a bitmap: copies, O(nnz)."""
    source = bitmap.cpu().numpy()
    rows, masks = source.shape[0] - 1, -(-cols // 32)
    crow = np.ascontiguousarray(source[:, 0])
    col = np.empty(crow[-1], torch.empty(0, dtype=column_dtype(cols), device="cpu").numpy().dtype)
    height = max(1, _BLOCK // (32 * masks))
    for first in range(0, rows, height):
        last = min(first + height, rows)
        packed = np.ascontiguousarray(source[first:last, 1 : 1 + masks]).astype("<i4").view(np.uint8)
        spread = np.unpackbits(packed, axis=1, count=cols, bitorder="little")
        col[crow[first] : crow[last]] = spread.nonzero()[1]
    return torch.from_numpy(crow).to(bitmap.device), torch.from_numpy(col).to(bitmap.device)


def stored_mask(index: tuple[Tensor, Tensor | None], rows: Tensor, cols: int) -> Tensor:
    """Which positions of some rows are stored: bool, (len(rows), cols).

    Args:
        index: ``(crow, col)``, or ``(bitmap, None)``.
        rows: int64 ids.
        cols: of the weight.
    """
    crow, col = index
    if col is None:
        packed = crow[rows, 1 : 1 + -(-cols // 32)].contiguous().view(torch.uint8)  # little-endian machines
        bits = (
            packed.unsqueeze(2)
            .bitwise_right_shift(torch.arange(8, dtype=torch.uint8, device=packed.device))
            .bitwise_and_(1)
        )
        return bits.view(len(rows), 8 * packed.shape[1])[:, :cols].bool()
    first, last = crow[rows].to(torch.int64), crow[rows + 1].to(torch.int64)
    count = last - first
    row = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    entry = torch.arange(row.numel(), device=rows.device) + (first - count.cumsum(0) + count)[row]
    mask = torch.zeros(len(rows), cols, dtype=torch.bool, device=rows.device)
    mask[row, col[entry].to(torch.int64)] = True
    return mask


def check_bitmap(bitmap: Tensor, shape: tuple[int, int]) -> None:
    """Verify every invariant of a bitmap, in O(rows * cols / 8) bytes read.

    Raises:
        PatternError: naming the first that does not hold.
    """
    expected = (shape[0] + 1, words(shape[1]))
    if bitmap.dtype != torch.int32 or tuple(bitmap.shape) != expected:
        raise PatternError(
            f"bitmap must be int32 of shape {expected}, got {bitmap.dtype} {tuple(bitmap.shape)}"
        )
    source = np.ascontiguousarray(bitmap.cpu().numpy())
    masks, rest = -(-shape[1] // 32), shape[1] % 32
    if source[:, 1 + masks :].any() or source[-1, 1:].any():
        raise PatternError("the bitmap's padding must be 0")
    if rest and (source[:, masks].view(np.uint32) >> np.uint32(rest)).any():
        raise PatternError(f"the bitmap has bits beyond column {shape[1] - 1}")
    ones = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)
    counts = ones[source[:-1, 1:].view(np.uint8)].sum(axis=1, dtype=np.int64)
    if source[0, 0] != 0 or (np.diff(source[:, 0].astype(np.int64)) != counts).any():
        raise PatternError("the bitmap's row pointers must count its bits from 0")
