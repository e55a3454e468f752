"""How an index set is stored: row pointers and columns, or one bit a position beside each row's pointer.

*csr*: ``crow`` (rows + 1,) and ``col`` (nnz,) in the narrowest integer type.

*bitmap*: one int32 array of shape (rows + 1, words). Word 0 of a row is its pointer, bit j % 32 of word 1 + j // 32
says whether column j is stored; padding is 0, and the last row holds nnz alone. Pointer and bits of a row lie together:
a row that is looked up at random costs one cache line of index. The order of the values is the same in both.

Bytes an index takes for each position of a weight of density f: csr ``f * (1, 2 or 4) + 4 / cols``, bitmap
``1/8 + 4 / cols`` and padding (`words`): 16 bytes a row of 64 columns, 32 of 128. With AVX-512 kernels read 16
positions of a bitmap at once, with AVX2 eight, which pays for rows that are looked up. On a GPU it tells each thread by
itself where its number is.
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends import asked_for, backend_name
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
    "has_permute",
    "pack_bits",
    "stored",
    "stored_mask",
    "unpack_bits",
    "words",
]

ENCODINGS = ("csr", "bitmap")

# From here on the bitmap is not much larger than uint8 columns, and reading it is faster (results/encodings.md).
_BITMAP_DENSITY = 1 / 16
_GPU_BYTES = 2.4
_BLOCK = 1 << 22  # positions that are spread out as bytes at a time
_GPU_BLOCK = 1 << 24


def choose_encoding(
    nnz: int,
    shape: tuple[int, int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    table: bool = False,
) -> str:
    """The encoding that a weight gets that is new, or new on a device.

    ``"bitmap"`` where kernels read it fast: on a CPU with AVX-512 from density 1/16 on, on one with AVX2 too if it is a
    table of float32 (``table``: rows are looked up one by one, neither multiplied nor summed) and no other backend was
    asked for; on CUDA, where triton runs and not for float64, if it takes at most 2.4 bytes a nonzero (from density
    0.06 on in wide rows, 0.11 in rows of 64): then training with Adam, 16 bytes a nonzero, takes at most 1.15 x
    density of what dense training does. Else ``"csr"``.
    """
    device = torch.device(device)
    if device.type == "cpu":
        fast = has_expand() or (table and dtype == torch.float32 and has_permute() and _by_numba())
        good = fast and nnz >= _BITMAP_DENSITY * shape[0] * shape[1]
    else:
        small = 4 * words(shape[1]) * shape[0] <= _GPU_BYTES * nnz
        good = small and dtype != torch.float64 and backend_name(device) == "triton"
    return "bitmap" if good and nnz < 2**31 else "csr"


def has_expand() -> bool:
    """Whether kernels run on AVX-512, which expands 16 positions in one instruction."""
    return _vectors() == "AVX512"


def _by_numba() -> bool:
    """Whether numba's kernels compute on the CPU, and are compiled for the processor that torch sees."""
    told = any(os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES"))
    return asked_for() in (None, "numba") and not told


def has_permute() -> bool:
    """Whether they run on AVX2, which moves 8 numbers to any of 8 lanes."""
    return _vectors() == "AVX2"


@cache
def _vectors() -> str:
    found = torch.backends.cpu.get_cpu_capability()
    portable = os.environ.get("SPARSECORE_SIMD") == "portable"
    return "AVX2" if portable and found == "AVX512" else found


def words(cols: int) -> int:
    """32-bit words of a bitmap's row: a power of two up to 8, then a multiple of 4."""
    n = 1 + -(-cols // 32)
    if n <= 8:
        return 1 << (n - 1).bit_length()
    return -(-n // 4) * 4


def encode(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """Bitmap of a CSR index set.

    Raises:
        SparsecoreError: if there are 2^31 nonzeros or more, which its pointers cannot count.
    """
    nnz, rows = col.numel(), crow.numel() - 1
    if nnz >= 2**31:
        raise SparsecoreError(f"a bitmap counts fewer than 2^31 nonzeros, got {nnz}; use the csr encoding")
    if not crow.is_cpu:
        return _encode_on_device(crow, col, cols)
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


def _encode_on_device(crow: Tensor, col: Tensor, cols: int) -> Tensor:
    """`encode` by torch's operations, in 64-bit arithmetic of `_GPU_BLOCK` nonzeros at a time."""
    rows, width = crow.numel() - 1, words(cols)
    bitmap = torch.zeros((rows + 1, width), dtype=torch.int32, device=crow.device)
    bitmap[:, 0] = crow
    for first in range(0, col.numel(), _GPU_BLOCK):
        column = col[first : first + _GPU_BLOCK].to(torch.int64)
        entry = torch.arange(first, first + column.numel(), device=crow.device)
        word = torch.searchsorted(crow, entry.to(crow.dtype), right=True).sub_(1).mul_(width)
        word.add_(1).add_(column.div(32, rounding_mode="floor"))
        bits = torch.ones((), dtype=torch.int64, device=crow.device) << (column % 32)
        # Bits of one word are distinct: adding them is or-ing them. The 32nd makes it a negative number.
        bitmap.view(-1).index_add_(0, word, bits.to(torch.int32))
    return bitmap


def decode(bitmap: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns (in the narrowest type) of a bitmap: copies, O(nnz)."""
    if not bitmap.is_cpu:
        return _decode_on_device(bitmap, cols)
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


def _decode_on_device(bitmap: Tensor, cols: int) -> tuple[Tensor, Tensor]:
    """`decode` by torch's operations."""
    rows, height = bitmap.shape[0] - 1, max(1, _GPU_BLOCK // cols)
    parts = [
        unpack_bits(bitmap[first : min(first + height, rows)], cols).nonzero()[:, 1].to(column_dtype(cols))
        for first in range(0, rows, height)
    ]
    return bitmap[:, 0].contiguous(), torch.cat(parts)


def unpack_bits(rows: Tensor, cols: int) -> Tensor:
    """Some rows of a bitmap as a mask: bool, (rows, cols)."""
    packed = rows[:, 1 : 1 + -(-cols // 32)].contiguous().view(torch.uint8)  # little-endian machines
    bits = packed.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8, device=rows.device)
    return (
        bits.bitwise_and_(1).view(torch.bool).view(rows.shape[0], 8 * packed.shape[1])[:, :cols].contiguous()
    )


def pack_bits(mask: Tensor) -> Tensor:
    """Words of a bitmap, int32, (rows, words that cols needs), of a mask (rows, cols)."""
    rows, cols = mask.shape
    bits = torch.nn.functional.pad(mask.view(torch.uint8), (0, -cols % 32)).view(rows, -(-cols // 32) * 4, 8)
    weights = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits << weights).sum(2, dtype=torch.uint8).view(torch.int32)


def stored(index: tuple[Tensor, Tensor | None]) -> int:
    """Number of nonzeros of an index set: its last row pointer."""
    pointers = index[0]
    return int(pointers[-1] if pointers.dim() == 1 else pointers[-1, 0])


def stored_mask(index: tuple[Tensor, Tensor | None], rows: Tensor, cols: int) -> Tensor:
    """Which positions of some rows are stored: bool, (len(rows), cols).

    Args:
        index: ``(crow, col)``, or ``(bitmap, None)``.
        rows: int64 ids.
        cols: of the weight.
    """
    crow, col = index
    if col is None:
        return unpack_bits(crow[rows], cols)
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
