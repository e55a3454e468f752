"""Index arrays as torch sees them: the nonzeros of some rows, CSR views, and products with these."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from sparsecore.encoding import decode

__all__ = ["PART", "Product", "csr", "entries", "indices", "parts", "product"]

PART = 1 << 16  # nonzeros whose places, columns and products exist at a time, on a CPU


def indices(crow: Tensor, col: Tensor | None, n_cols: int) -> tuple[Tensor, Tensor]:
    """Row pointers and columns; a bitmap (made for CPU kernels) is decoded for the call."""
    return decode(crow, n_cols) if col is None else (crow, col)


def entries(crow: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Every nonzero of the rows ``ids``: which of the ids it belongs to, and its place in the values. Both int64."""
    start = crow[ids].to(torch.int64)
    length = crow[ids + 1].to(torch.int64) - start
    which = torch.repeat_interleave(length)
    before = length.cumsum(0) - length
    place = torch.arange(which.numel(), device=which.device) + (start - before)[which]
    return which, place


def parts(crow: Tensor, ids: Tensor, n_cols: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """`entries` of the ids in turn, so many at a time that what is computed of them stays small: which ids (a slice),
    whose each nonzero is among these, its place. On a GPU all at once: to count them first would be to wait for it.
    """
    bounds = [0, ids.numel()]
    if ids.is_cpu and ids.numel() * n_cols > PART:
        ends = (crow[ids + 1] - crow[ids]).cumsum(0, dtype=torch.int64)
        steps = torch.arange(PART, max(PART, int(ends[-1])), PART)
        bounds[1:1] = torch.searchsorted(ends, steps, right=True).tolist()
    for first, last in pairwise(bounds):
        if first < last:
            yield slice(first, last), *entries(crow, ids[first:last])


def csr(values: Tensor, crow: Tensor, col: Tensor, n_cols: int) -> Tensor:
    """A ``torch.sparse_csr`` matrix over these values.

    torch wants one index type for both arrays: narrow columns are widened to the pointers' type for the call. Its
    kernels read all three as contiguous memory without looking at the strides.
    """
    return torch.sparse_csr_tensor(
        crow.contiguous(),
        col.to(crow.dtype).contiguous(),
        values.contiguous(),
        (crow.numel() - 1, n_cols),
        check_invariants=False,
    )


class Product(Protocol):
    """``A D`` or, transposed, ``A^T D`` for A (rows, n_cols) in CSR and a dense D."""

    def __call__(
        self,
        values: Tensor,
        crow: Tensor,
        col: Tensor,
        n_cols: int,
        dense: Tensor,
        *,
        transposed: bool = False,
    ) -> Tensor: ...


def product(
    values: Tensor, crow: Tensor, col: Tensor, n_cols: int, dense: Tensor, *, transposed: bool = False
) -> Tensor:
    """By torch.sparse. Transposed, the index is turned in every call, as torch does in ``dense @ A`` too."""
    matrix = _turned(values, crow, col, n_cols) if transposed else csr(values, crow, col, n_cols)
    return torch.sparse.mm(matrix, dense)


def _turned(values: Tensor, crow: Tensor, col: Tensor, n_cols: int) -> Tensor:
    """The transpose (n_cols, rows), in CSR. torch's own conversion takes longer, and on a GPU waits for it."""
    ordered, order = col.sort(stable=True)
    rows = torch.arange(crow.numel() - 1, dtype=crow.dtype, device=crow.device)
    row = rows.repeat_interleave(crow.diff(), output_size=col.numel())[order]
    columns = torch.arange(
        n_cols + 1, dtype=torch.int32 if n_cols < 2**31 else torch.int64, device=crow.device
    )
    ends = torch.searchsorted(ordered.to(columns.dtype), columns, out_int32=crow.dtype == torch.int32)
    return csr(values[order], ends, row, crow.numel() - 1)
