"""Index arrays as torch sees them: the nonzeros of some rows, CSR views, and products with these."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from sparsecore.encoding import decode

__all__ = ["PART", "Part", "Product", "csr", "entries", "indices", "kept", "parts", "product"]

PART = 1 << 16  # nonzeros whose places, columns and products exist at a time, on a CPU
_PADDED = 1 << 22  # positions, stored or not, elsewhere


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


class Part(NamedTuple):
    """Nonzeros of some of the ids that are looked up, in the ids' order."""

    ids: slice  # which of the ids
    which: Tensor  # among these, whose each nonzero is
    place: Tensor  # of each nonzero in the values
    padding: Tensor | None  # where there is no nonzero: what is computed there must count as 0 (`kept`)


def parts(crow: Tensor, ids: Tensor, n_cols: int, nnz: int) -> Iterator[Part]:
    """The nonzeros of the rows ``ids``, so many at a time that what is computed of them stays small."""
    return _exact(crow, ids, n_cols) if _counts(ids) else _padded(crow, ids, n_cols, nnz)


def kept(computed: Tensor, padding: Tensor | None) -> Tensor:
    """What was computed of a part's places, 0 where there is no nonzero; may write into it."""
    return computed if padding is None else computed.masked_fill_(padding, 0)


def _counts(ids: Tensor) -> bool:
    """Whether to ask how many nonzeros rows have is free: on a CPU. A GPU would have to be waited for."""
    return ids.is_cpu


def _exact(crow: Tensor, ids: Tensor, n_cols: int) -> Iterator[Part]:
    bounds = [0, ids.numel()]
    if ids.numel() * n_cols > PART:
        ends = (crow[ids + 1] - crow[ids]).cumsum(0, dtype=torch.int64)
        steps = torch.arange(PART, max(PART, int(ends[-1])), PART)
        bounds[1:1] = torch.searchsorted(ends, steps, right=True).tolist()
    for first, last in pairwise(bounds):
        if first < last:
            yield Part(slice(first, last), *entries(crow, ids[first:last]), None)


def _padded(crow: Tensor, ids: Tensor, n_cols: int, nnz: int) -> Iterator[Part]:
    """Rows filled up to ``n_cols`` places, which no row exceeds: shapes that the index set does not decide.

    On a CPU it would take as long for few nonzeros as for many.
    """
    if nnz == 0:
        return
    step = torch.arange(n_cols, device=ids.device)
    height = max(1, _PADDED // max(1, n_cols))
    for first in range(0, ids.numel(), height):
        rows = ids[first : first + height]
        start, end = (crow[row].to(torch.int64).unsqueeze(1) for row in (rows, rows + 1))
        place = start + step
        which = torch.arange(rows.numel(), device=ids.device).unsqueeze(1).expand(-1, n_cols)
        padding = (place >= end).view(-1)
        # The padding's places lie in later rows, or behind the last one.
        place = place.clamp_(max=nnz - 1).view(-1)
        yield Part(slice(first, first + height), which.reshape(-1), place, padding)


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
