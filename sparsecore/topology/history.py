"""Which positions a weight has ever stored: one bit for each."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.errors import TopologyError
from sparsecore.ops import explore

__all__ = ["EverActive"]


class EverActive:
    """Bitmap of the positions that were stored at some time (in-time over-parameterisation, ITOP, Liu et al. 2021).

    Costs rows * cols / 8 bytes: 1/128 of what a dense weight takes with its gradient and Adam's moments.
    """

    def __init__(self, index: explore.Index, shape: tuple[int, int]) -> None:
        self.shape, self.size = shape, shape[0] * shape[1]
        self.bits = torch.zeros(-(-self.size // 8), dtype=torch.uint8, device=index[0].device)
        self.count = 0
        self.add(index)

    def add(self, index: explore.Index) -> None:
        """Mark all positions that an index has."""
        if index[0].device != self.bits.device:  # the model has moved since
            self.bits = self.bits.to(index[0].device)
        self.count += explore.record_(self.bits, index, self.shape)

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
