"""The gradient of looked-up rows at their nonzeros: entries are sorted by row, and one program adds up those of a row.

Nothing is added atomically, so a sum has one order. A row that most of the entries name keeps its program busy with all
of them, some at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.triton.rows import index_of, launches_on, places, tile

__all__ = ["bag_grad", "scatter_grad", "touched"]

_TILE = 1024  # positions of a tile


def _sorted(ids: Tensor, crow: Tensor) -> tuple[Tensor, Tensor]:
    """Ids ascending, equal ones as they come, and where each was. A sort of 32-bit numbers passes half as often."""
    return (ids if crow.shape[0] > 2**31 else ids.to(torch.int32)).sort(stable=True)


def scatter_grad(crow: Tensor, col: Tensor | None, ids: Tensor, grad: Tensor, nnz: int) -> Tensor:
    """``out[k] = sum of grad[e, col[k]]`` over the entries e whose id is the row of nonzero k."""
    out = grad.new_zeros(nnz)
    ids, order = _sorted(ids, crow)
    _add_up(out, None, None, crow, col, ids, order, None, grad)
    return out


def bag_grad(
    crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, weights: Tensor, grad: Tensor, nnz: int
) -> Tensor:
    """``out[k] = sum of weights[e] * grad[bags[e], col[k]]`` over the entries e whose id is the row of nonzero k."""
    out = grad.new_zeros(nnz)
    ids, order = _sorted(ids, crow)
    _add_up(out, None, None, crow, col, ids, bags[order], weights[order], grad)
    return out


def touched(
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    grad: Tensor,
    nnz: int,
    sources: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`scatter_grad` at the nonzeros of the rows that occur: their places (t,), ascending, and values (t,).

    With sources and weights, entry e adds ``weights[e] * grad[sources[e]]``. Waits for the device once, to know t.
    """
    ids, order = _sorted(ids, crow)
    pointers = crow[:, 0] if col is None else crow
    begin = pointers[ids].to(torch.int64)
    length = pointers[ids + 1].to(torch.int64) - begin
    length[1:] *= ids[1:] != ids[:-1]  # a row counts where it occurs first
    end = length.cumsum(0)
    total = int(end[-1]) if ids.numel() else 0
    place = torch.empty(total, dtype=torch.int64, device=ids.device)
    wide = grad.float() if grad.dtype in (torch.float16, torch.bfloat16) else grad
    values = wide.new_empty(total)
    _add_up(
        values, place, begin - (end - length), crow, col, ids,
        order if sources is None else sources[order], None if weights is None else weights[order].to(wide.dtype), wide,
    )  # fmt: skip
    return place, values.to(grad.dtype)


def _add_up(
    out: Tensor,
    out_places: Tensor | None,
    shift: Tensor | None,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    sources: Tensor,
    weights: Tensor | None,
    grad: Tensor,
) -> None:
    """Write the gradient of ascending ids: at the places of their nonzeros, or with ``shift`` that much before them."""
    n, shape = ids.numel(), tile(grad.shape[1])
    with launches_on(grad):
        _add_up_rows[n, triton.cdiv(grad.shape[1], shape["COLS"])](
            out,
            out_places,
            shift,
            *index_of(crow, col),
            ids,
            sources,
            weights,
            grad.contiguous(),
            n,
            **shape,
            ROWS=_TILE // shape["COLS"],
            num_warps=1,  # most programs have one entry or none
        )


@triton.jit
def _add_up_rows(
    out, out_places, shift, crow, col, stride, ids, sources, weights, grad, n,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The program of the first entry of a row writes COLS columns of its gradient; the others have nothing to do."""
    head = tl.program_id(0)
    begin = tl.program_id(1) * COLS
    row = tl.load(ids + head)
    if tl.load(ids + head - 1, mask=head > 0, other=-1) == row:
        return
    column = begin + tl.arange(0, COLS)
    total = tl.zeros((COLS,), out.dtype.element_ty)
    at = head
    mine = ROWS  # how many of the entries that were looked at last are of this row
    while mine == ROWS:
        entry = at + tl.arange(0, ROWS)
        same = tl.load(ids + entry, mask=entry < n, other=-1) == row
        source = tl.load(sources + entry, mask=same, other=0).to(tl.int64)
        inside = same[:, None] & (column < N_COLS)[None, :]
        added = tl.load(grad + source[:, None] * N_COLS + column[None, :], mask=inside, other=0)
        if weights is not None:
            weight = tl.load(weights + entry, mask=same, other=0)
            added *= tl.where(inside, weight[:, None], 0.0)
        total += tl.sum(added, 0)
        mine = tl.sum(same.to(tl.int32), 0)
        at += ROWS
    rows = tl.zeros((1,), tl.int64) + row
    place, stored = places(crow, col, stride, rows, rows >= 0, begin, N_COLS, COLS, STEPS)
    if shift is None:
        tl.store(out + place, total[None, :], mask=stored)
    else:
        target = place - tl.load(shift + head)
        tl.store(out + target, total[None, :], mask=stored)
        tl.store(out_places + target, place.to(tl.int64), mask=stored)
