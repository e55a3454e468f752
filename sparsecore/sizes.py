"""Types, sizes and places of new tensors: integer types of an index, the number of nonzeros, the device."""

from __future__ import annotations

import numbers

import torch

from sparsecore.errors import DensityError

__all__ = ["check_density", "column_dtype", "default_device", "exact_nnz", "pointer_dtype"]


def default_device() -> torch.device:
    """Where torch makes new tensors now (``torch.get_default_device`` of torch 2.6 does not see ``with`` blocks)."""
    return torch.empty(0).device


def column_dtype(cols: int) -> torch.dtype:
    """Narrowest integer type that holds every column index of a matrix with ``cols`` columns."""
    if cols <= 2**8:
        return torch.uint8
    if cols <= 2**15:
        return torch.int16
    return torch.int32 if cols <= 2**31 else torch.int64


def pointer_dtype(nnz: int) -> torch.dtype:
    """Integer type of the row pointers: int32 while it can count to ``nnz``."""
    return torch.int32 if nnz < 2**31 else torch.int64


def check_density(density: float) -> None:
    """Refuse what is no density.

    Raises:
        DensityError: for anything but a number in (0, 1].
    """
    if not isinstance(density, numbers.Real) or isinstance(density, bool) or not 0.0 < density <= 1.0:
        raise DensityError(f"density must be a number in (0, 1], got {density!r}")


def exact_nnz(shape: tuple[int, int], density: float) -> int:
    """Number of nonzeros of a weight of this shape: ``round(density * rows * cols)``, at least 1.

    Raises:
        DensityError: if the density is outside (0, 1] or so low that nothing would be stored.
    """
    rows, cols = shape
    check_density(density)
    nnz = round(float(density) * rows * cols)
    if not rows * cols:
        raise DensityError(f"a {rows} x {cols} weight has nothing to store: leave it dense")
    if nnz < 1:
        raise DensityError(
            f"density {density:g} of a {rows} x {cols} weight leaves no nonzero at all; "
            f"use at least {1.0 / (rows * cols):.3g}, or leave this weight dense"
        )
    return nnz
