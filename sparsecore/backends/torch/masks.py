"""An index set as boolean masks, a block of rows at a time, and index sets from such masks.

A mask is what torch computes with best: merging, moving and counting need neither search nor sort, and of the sizes
that the host must know there is one for each block.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from sparsecore.encoding import pack_bits, unpack_bits, words
from sparsecore.ops.explore import Index
from sparsecore.sizes import column_dtype
from sparsecore.topology.blocks import block_height

__all__ = ["Block", "Writer", "blocks", "bounds"]


class Block:
    """Rows ``first .. last - 1`` of an index set, whose nonzeros are ``start .. stop - 1`` of all.

    ``mask`` is made when the block is: bool, (rows, cols), true where something is stored.
    """

    def __init__(self, index: Index, cols: int, rows: tuple[int, int], nonzeros: tuple[int, int]) -> None:
        (self.first, self.last), (self.start, self.stop) = rows, nonzeros
        self.height, self.base = self.last - self.first, self.first * cols
        crow, col = index
        if col is None:
            self.mask = unpack_bits(crow[self.first : self.last], cols)
            return
        pointers = crow[self.first : self.last + 1].to(torch.int64)
        position = torch.repeat_interleave(pointers.diff(), output_size=self.stop - self.start)
        position.mul_(cols).add_(col[self.start : self.stop])
        self.mask = torch.zeros(self.height, cols, dtype=torch.bool, device=crow.device)
        self.mask.view(-1)[position] = True

    def places(self) -> Tensor:
        """For each position of the block, how many before it are stored: (rows * cols,); int32 where that is enough."""
        kind = torch.int32 if self.mask.numel() < 2**31 else torch.int64
        flat = self.mask.view(torch.uint8).view(-1)
        return flat.cumsum(0, dtype=kind).sub_(flat)


def bounds(index: Index, shape: tuple[int, int]) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last rows and nonzeros of every block, in order. The device is waited for once."""
    crow, col = index
    height = block_height(shape, crow.device)
    edges = [*range(0, shape[0], height), shape[0]]
    pointers = crow[:, 0] if col is None else crow
    return zip(
        pairwise(edges), pairwise(pointers[torch.tensor(edges, device=crow.device)].tolist()), strict=True
    )


def blocks(index: Index, shape: tuple[int, int]) -> Iterator[Block]:
    """All rows of an index set, in order."""
    for part in bounds(index, shape):
        yield Block(index, shape[1], *part)


class Writer:
    """Makes an index set of masks, block by block, in the encoding of another one."""

    def __init__(self, like: Index, shape: tuple[int, int]) -> None:
        self.shape, (crow, col) = shape, like
        self.pointers = torch.zeros(shape[0] + 1, dtype=torch.int64, device=crow.device)
        self.kind = crow.dtype
        self.bitmap: Tensor | None = None
        self.columns = [
            torch.empty(0, dtype=column_dtype(shape[1]) if col is None else col.dtype, device=crow.device)
        ]
        if col is None:
            self.bitmap = crow.new_zeros(shape[0] + 1, words(shape[1]))

    def add(self, first: int, mask: Tensor) -> None:
        """Rows ``first ..`` of the new index set."""
        last = first + mask.shape[0]
        self.pointers[first + 1 : last + 1] = mask.sum(1)
        if self.bitmap is not None:
            self.bitmap[first:last, 1 : 1 + -(-self.shape[1] // 32)] = pack_bits(mask)
        else:
            self.columns.append(mask.nonzero()[:, 1].to(self.columns[0].dtype))

    def index(self) -> Index:
        """What was added, in all."""
        pointers = self.pointers.cumsum(0).to(self.kind)
        if self.bitmap is None:
            return pointers, torch.cat(self.columns)
        self.bitmap[:, 0] = pointers
        return self.bitmap, None
