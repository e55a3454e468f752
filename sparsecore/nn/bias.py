"""A bias vector of which only some entries are stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparsecore import ops
from sparsecore.nn.base import SparseModule
from sparsecore.nn.magnitude import magnitude_pattern
from sparsecore.pattern import Pattern

__all__ = ["SparseBias", "copy_bias", "make_bias"]


class SparseBias(SparseModule):
    """``x + b`` with b of ``features`` numbers, nnz of them stored: a table with one row, looked up once.

    Exists because the published Dynamic Sparse Learning prunes biases too; the saving is small.

    Args:
        features: length of the vector.
        device, dtype: as in torch.
        density: fraction of the entries that is stored, in (0, 1].
        generator: CPU generator of the index set. Values start at zero.
    """

    def __init__(
        self,
        features: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        density: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(Pattern.random((1, features), density, generator=generator), device, dtype)
        nn.init.zeros_(self.values)

    def forward(self, input: Tensor) -> Tensor:
        """x (*, features) -> (*, features)."""
        ids = torch.zeros(1, dtype=torch.int64, device=input.device)
        row = ops.gather(*self.operands, ids, self.shape[1])
        return input + row[0]

    @classmethod
    def from_dense(
        cls, bias: Tensor, *, density: float | None = None, mask: Tensor | None = None
    ) -> SparseBias:
        """The sparse form of a dense bias vector: its largest magnitudes, or the entries under a mask."""
        row = bias.detach().view(1, -1)
        pattern = magnitude_pattern(row, density, None if mask is None else mask.view(1, -1))
        module = cls.__new__(cls)
        SparseModule.__init__(module, pattern, bias.device, bias.dtype)
        with torch.no_grad():
            module.values.copy_(row.reshape(-1)[pattern.positions()])
        return module

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.shape[1],)

    def to_dense(self) -> Tensor:
        """The dense vector, (features,)."""
        return self.pattern.to_dense(self.values.detach()).view(-1)

    def extra_repr(self) -> str:
        return f"features={self.shape[1]}, {self._shape_repr()}"


def make_bias(bias: Tensor | None, density: float | None) -> nn.Parameter | SparseBias | None:
    """The bias of a sparse layer that is made from a dense one: a copy, or its largest magnitudes."""
    if bias is None:
        return None
    if density is None:
        return nn.Parameter(bias.detach().clone(), bias.requires_grad)
    sparse = SparseBias.from_dense(bias, density=density)
    sparse.values.requires_grad_(bias.requires_grad)
    return sparse


def copy_bias(bias: nn.Parameter | SparseBias | None, dense: Tensor | None) -> None:
    """Write a sparse layer's bias into that of its dense form."""
    if bias is None or dense is None:
        return
    stored = bias.values if isinstance(bias, SparseBias) else bias
    with torch.no_grad():
        dense.copy_(bias.to_dense() if isinstance(bias, SparseBias) else bias)
    dense.requires_grad_(stored.requires_grad)
