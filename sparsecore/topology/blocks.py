"""A weight's rows, a bounded number of positions at a time.

An exploration has to look at every position of a weight, stored or not. It does so in blocks of rows, so that nothing
as large as the weight, and no 64-bit index of every nonzero, ever exists.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsecore.pattern import Pattern

__all__ = ["BLOCK", "RowBlock", "block_height", "row_blocks"]

# Positions of a block: 4 MiB of float32 gradient; a sixteenth of a small weight.
BLOCK = 1 << 20
# On a GPU 64 MiB, and a quarter: each block costs dozens of launches and some waiting, whatever its size.
_GPU_BLOCK = 1 << 24


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

    def mark(self, positions: Tensor) -> Tensor:
        """Bitmap of the block, bool, true at these local positions: merging by it needs no search and no sort."""
        bitmap = torch.zeros(self.numel, dtype=torch.bool, device=positions.device)
        bitmap[positions] = True
        return bitmap


def block_height(shape: tuple[int, int], device: torch.device) -> int:
    """Rows of a block."""
    rows, cols = shape
    most, parts = (BLOCK, 16) if device.type == "cpu" else (_GPU_BLOCK, 4)
    return max(1, min(most, rows * cols // parts) // cols)


def row_blocks(pattern: Pattern) -> Iterator[RowBlock]:
    """All rows of a pattern, in order."""
    height = block_height(pattern.shape, pattern.col.device)
    for first in range(0, pattern.shape[0], height):
        yield RowBlock(pattern, first, min(first + height, pattern.shape[0]))
