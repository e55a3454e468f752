"""A weight's rows, a bounded number of positions at a time.

An exploration has to look at every position of a weight, stored or not. It does so in blocks of rows, so that nothing
as large as the weight, and no 64-bit index of every nonzero, ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecore.pattern import Pattern

__all__ = ["BLOCK", "RowBlock", "block_height", "merge_places", "row_blocks"]

# Positions of a block: 4 MiB of float32 gradient; an eighth of a small weight.
BLOCK = 1 << 20


class RowBlock:
    """Rows ``first .. last - 1`` of a pattern; positions are counted from the block's first one."""

    def __init__(self, pattern: Pattern, first: int, last: int) -> None:
        cols = pattern.shape[1]
        self.first, self.last = first, last
        self.base = first * cols
        self.numel = (last - first) * cols
        pointers = pattern.crow[first : last + 1].to(torch.int64)
        self.start, self.stop = int(pointers[0]), int(pointers[-1])
        row = torch.repeat_interleave(pointers.diff(), output_size=self.stop - self.start)
        self.positions = row.mul_(cols).add_(pattern.col[self.start : self.stop])
        """Local position of every stored entry of the block, int64, ascending."""

    def within(self, positions: Tensor) -> tuple[int, int]:
        """Range of the members of an ascending tensor of global positions that fall into this block."""
        edges = torch.tensor([self.base, self.base + self.numel], device=positions.device)
        low, high = torch.searchsorted(positions, edges).tolist()
        return low, high


def block_height(shape: tuple[int, int]) -> int:
    """Rows of a block."""
    rows, cols = shape
    return max(1, min(BLOCK, rows * cols // 8) // cols)


def row_blocks(pattern: Pattern) -> Iterator[RowBlock]:
    """All rows of a pattern, in order."""
    height = block_height(pattern.shape)
    for first in range(0, pattern.shape[0], height):
        yield RowBlock(pattern, first, min(first + height, pattern.shape[0]))


def merge_places(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the members of two ascending, disjoint tensors in their merged order. O(n log m), and no sort."""
    into_a = torch.arange(a.numel(), device=a.device) + torch.searchsorted(b, a)
    into_b = torch.arange(b.numel(), device=b.device) + torch.searchsorted(a, b)
    return into_a, into_b
