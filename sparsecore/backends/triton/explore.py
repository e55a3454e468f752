"""Exploration: kernels compare bitmaps and rewrite them, reading the bits where they lie.

Index sets in csr, and what is left, go through torch's operations on masks of some rows at a time; of them the random
draw is a kernel. With masks the host waits for the device in every block of rows, and launches dozens of small steps.
Here it launches a kernel for a whole weight.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.torch import explore as by_torch
from sparsecore.backends.torch.explore import overlay_
from sparsecore.backends.triton.draw import members
from sparsecore.backends.triton.rows import launches_on, ones, places, tile
from sparsecore.ops.explore import Index

__all__ = ["fill", "grow", "overlay_", "prune", "realign_", "record_"]

_TILE = 1024  # positions that a program looks at
_ENTRIES = 256  # of a list

fill = partial(by_torch.fill, members=members)


def prune(values: Tensor, index: Index, shape: tuple[int, int], k: int) -> Index:
    """Index without the k weights of smallest magnitude."""
    bitmap, col = index
    if col is not None:
        return by_torch.prune(values, index, shape, k)
    stays, new = by_torch.what_stays(values, k).view(torch.uint8), torch.zeros_like(bitmap)
    _over_positions(_keep, shape, bitmap, bitmap.stride(0), stays, new)
    return _with_pointers(new, shape)


def _insert(index: Index, shape: tuple[int, int], new: Tensor) -> Index:
    """With these linear positions added, which it does not have."""
    if index[1] is not None or not new.numel():
        return by_torch.insert(index, shape, new)
    bitmap = index[0].clone()
    with launches_on(bitmap):
        _set[triton.cdiv(new.numel(), _ENTRIES),](
            bitmap,
            bitmap.stride(0),
            new,
            new.numel(),
            N_COLS=shape[1],
            ENTRIES=_ENTRIES,
            enable_fp_fusion=True,
        )
    return _with_pointers(bitmap, shape)


grow = partial(by_torch.grow, insert=_insert)


def realign_(tensors: Sequence[tuple[Tensor, float]], old: Index, new: Index, shape: tuple[int, int]) -> int:
    """Move the numbers of the nonzeros of ``old`` to their places in ``new``, by one permutation for all."""
    if old[1] is not None or new[1] is not None:
        return by_torch.realign_(tensors, old, new, shape)
    source = torch.empty(tensors[0][0].numel(), dtype=torch.int32, device=old[0].device)
    _over_positions(_trace, shape, old[0], new[0], old[0].stride(0), source)
    return by_torch.move_(tensors, source)


def record_(history: Tensor, index: Index, shape: tuple[int, int]) -> int:
    """Set the bit of every stored position; returns how many were not set before."""
    bitmap, col = index
    if col is not None or shape[1] % 8:  # else a byte belongs to two rows
        return by_torch.record_(history, index, shape)
    width = min(128, triton.next_power_of_2(shape[1] // 8))
    height = _TILE // width
    grid = triton.cdiv(shape[0], height), triton.cdiv(shape[1] // 8, width)
    added = torch.empty(grid, dtype=torch.int32, device=history.device)
    with launches_on(history):
        _record[grid](
            history, bitmap, bitmap.stride(0), added, shape[0],
            BYTES=shape[1] // 8, WIDTH=width, ROWS=height, enable_fp_fusion=True,
        )  # fmt: skip
    return int(added.sum())


def _with_pointers(bitmap: Tensor, shape: tuple[int, int]) -> Index:
    """The bitmap, its pointers made to count its bits."""
    counts, width = bitmap.new_zeros(shape[0] + 1), min(32, triton.next_power_of_2(triton.cdiv(shape[1], 32)))
    height = _TILE // width
    with launches_on(bitmap):
        _count[triton.cdiv(shape[0], height),](
            bitmap, bitmap.stride(0), counts, shape[0],
            WORDS=triton.cdiv(shape[1], 32), WIDTH=width, ROWS=height, enable_fp_fusion=True,
        )  # fmt: skip
    bitmap[:, 0] = counts.cumsum(0, dtype=torch.int32)
    return bitmap, None


def _over_positions(kernel: Any, shape: tuple[int, int], *arguments: Any) -> None:
    """Launch a kernel whose programs look at a tile of a weight's positions each."""
    size = tile(shape[1])
    height = _TILE // size["COLS"]
    with launches_on(arguments[0]):
        kernel[triton.cdiv(shape[0], height), triton.cdiv(shape[1], size["COLS"])](
            *arguments, shape[0], **size, ROWS=height
        )


@triton.jit
def _keep(
    index, stride, stays, new, rows,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Words of the bits that stay."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin, live = tl.program_id(1) * COLS, row < rows
    place, stored = places(index, None, stride, row, live, begin, N_COLS, COLS, STEPS)
    left = tl.load(stays + place, mask=stored, other=0).to(tl.int32) << (tl.arange(0, COLS) % 32)[None, :]
    word = begin // 32 + tl.arange(0, COLS // 32)
    inside = live[:, None] & (32 * word < N_COLS)[None, :]
    # Bits of one word are distinct: adding them is or-ing them.
    found = tl.sum(tl.reshape(left, (ROWS, COLS // 32, 32)), 2)
    tl.store(new + row[:, None] * stride + 1 + word[None, :], found, mask=inside)


@triton.jit
def _set(index, stride, positions, n, N_COLS: tl.constexpr, ENTRIES: tl.constexpr):
    """The bit of each position in a list."""
    at = tl.program_id(0) * ENTRIES + tl.arange(0, ENTRIES)
    position = tl.load(positions + at, mask=at < n, other=0).to(tl.int64)
    row = position // N_COLS
    column = (position - row * N_COLS).to(tl.int32)
    one = tl.full((ENTRIES,), 1, tl.int32)
    tl.atomic_or(index + row * stride + 1 + column // 32, one << (column % 32), mask=at < n, sem="relaxed")


@triton.jit
def _count(index, stride, counts, rows, WORDS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """How many bits of each row are set, after the number of the row before."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live, total = row < rows, tl.zeros((ROWS,), tl.int32)
    for first in range(0, WORDS, WIDTH):
        word = first + tl.arange(0, WIDTH)
        inside = live[:, None] & (word < WORDS)[None, :]
        total += tl.sum(
            ones(tl.load(index + row[:, None] * stride + 1 + word[None, :], mask=inside, other=0)), 1
        )
    tl.store(counts + row + 1, total, mask=live)


@triton.jit
def _trace(
    old, new, stride, source, rows,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """For each nonzero of the new index set its place in the old one, or -1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    begin, live = tl.program_id(1) * COLS, row < rows
    before, was = places(old, None, stride, row, live, begin, N_COLS, COLS, STEPS)
    place, stored = places(new, None, stride, row, live, begin, N_COLS, COLS, STEPS)
    tl.store(source + place, tl.where(was, before, -1), mask=stored)


@triton.jit
def _record(
    history, index, stride, added, rows, BYTES: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):
    """Bytes of a history with the bits of an index set, and how many of them are new."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (byte < BYTES)[None, :]
    word = tl.load(index + row[:, None] * stride + 1 + (byte // 4)[None, :], mask=inside, other=0)
    mine = (word >> (8 * (byte % 4))[None, :]) & 255
    target = history + row[:, None] * BYTES + byte[None, :]
    known = tl.load(target, mask=inside, other=0).to(tl.int32)
    tl.store(target, (known | mine).to(tl.uint8), mask=inside)
    fresh = tl.sum(tl.sum(ones(mine & (known ^ 255)), 1), 0)
    tl.store(added + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), fresh)
