"""Which positions a weight has ever stored: one bit for each."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.errors import TopologyError
from sparsecore.pattern import Pattern
from sparsecore.topology.blocks import row_blocks

__all__ = ["EverActive"]


class EverActive:
    """Bitmap of the positions that were stored at some time (in-time over-parameterisation, ITOP, Liu et al. 2021).

    Costs rows * cols / 8 bytes: 1/128 of what a dense weight takes with its gradient and Adam's moments.
    """

    def __init__(self, pattern: Pattern) -> None:
        self.size = pattern.shape[0] * pattern.shape[1]
        self.bits = torch.zeros(-(-self.size // 8), dtype=torch.uint8, device=pattern.col.device)
        self.count = 0
        for block in row_blocks(pattern):
            self.add(block.positions + block.base)

    def add(self, positions: Tensor) -> None:
        """Mark linear positions, each named once."""
        if positions.device != self.bits.device:  # the model has moved since
            self.bits = self.bits.to(positions.device)
        byte = positions.div(8, rounding_mode="floor")
        bit = (positions - byte * 8).to(torch.uint8)
        unseen = (self.bits[byte] >> bit) & 1 == 0
        byte, bit = byte[unseen], bit[unseen]
        # Bits of one byte are distinct and not set: adding them is or-ing them.
        self.bits.index_add_(0, byte, torch.ones_like(bit) << bit)
        self.count += byte.numel()

    @property
    def fraction(self) -> float:
        """Ever-active positions as a share of all."""
        return self.count / self.size

    def expect(self, bits: Tensor, name: str) -> None:
        """Refuse a bitmap of another size."""
        if bits.shape != self.bits.shape or bits.dtype != torch.uint8:
            raise TopologyError(
                f"the saved history of {name} has {bits.numel()} bytes, expected {self.bits.numel()}"
            )

    def load(self, bits: Tensor) -> None:
        """Continue from a saved bitmap."""
        self.bits.copy_(bits)
        ones = torch.tensor([bin(i).count("1") for i in range(256)], device=self.bits.device)
        self.count = int((torch.bincount(self.bits.to(torch.int64), minlength=256) * ones).sum())
