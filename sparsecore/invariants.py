"""What must hold of an index set in CSR."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsecore.errors import PatternError

__all__ = ["INTEGERS", "check_csr", "check_range", "check_shape"]

INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_csr(crow: Tensor, col: Tensor, shape: tuple[int, int], values: Tensor | None = None) -> None:
    """See `sparsecore.Pattern.check`."""
    rows, cols = check_shape(shape)
    for name, index in (("crow", crow), ("col", col)):
        if index.dim() != 1 or index.dtype not in INTEGERS:
            raise PatternError(f"{name} must be a 1-D integer tensor, got {index.dim()}-D {index.dtype}")
    if crow.numel() != rows + 1:
        raise PatternError(f"crow must have rows + 1 = {rows + 1} entries, got {crow.numel()}")
    crow, nnz = crow.to(torch.int64), col.numel()
    if int(crow[0]) != 0 or int(crow[-1]) != nnz:
        raise PatternError(f"crow must run from 0 to nnz = {nnz}, got {int(crow[0])} to {int(crow[-1])}")
    falls = torch.nonzero(crow[1:] < crow[:-1])
    if falls.numel():
        raise PatternError(f"crow must never fall, but it does after row {int(falls[0])}")
    check_range(col, cols, "column")
    if nnz > 1:
        col = col.to(torch.int64)
        starts = torch.zeros(nnz + 1, dtype=torch.bool, device=col.device)
        starts[crow] = True
        bad = torch.nonzero((col[1:] <= col[:-1]) & ~starts[1:nnz])
        if bad.numel():
            k = int(bad[0])
            row = int(torch.searchsorted(crow, torch.tensor(k, device=crow.device), right=True)) - 1
            a, b = int(col[k]), int(col[k + 1])
            kind = "unique" if a == b else "ascending"
            raise PatternError(
                f"columns of a row must be {kind}: row {row} has {b} after {a}; "
                "sort and merge duplicates first (scipy's sum_duplicates, torch's coalesce)"
            )
    if values is not None and (values.dim() != 1 or values.numel() != nnz):
        raise PatternError(f"values must be 1-D with nnz = {nnz} entries, got {tuple(values.shape)}")


def check_shape(shape: tuple[int, int]) -> tuple[int, int]:
    """The shape as Python's integers.

    Raises:
        PatternError: if it is not two positive integers.
    """
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 1:
        raise PatternError(f"shape must be two positive integers (rows, cols), got {tuple(shape)}")
    return int(shape[0]), int(shape[1])


def check_range(index: Tensor, size: int, name: str) -> None:
    """Refuse indices outside ``0 .. size - 1``.

    Raises:
        PatternError: naming one.
    """
    if index.numel() == 0:
        return
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        raise PatternError(f"{name} indices must be in 0 .. {size - 1}, got {low if low < 0 else high}")
