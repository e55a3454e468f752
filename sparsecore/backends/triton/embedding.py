"""Rows of a sparse table, looked up by id: alone, or summed in bags."""

import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.triton.rows import index_of, launches_on, places, tile

__all__ = ["bag", "gather"]

_TILE = 2048  # positions of a tile
_BAG_TILE = 1024


def gather(values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, n_cols: int) -> Tensor:
    """Rows ``ids`` (n,) of the table as a dense (n, cols) tensor."""
    n, shape = ids.numel(), tile(n_cols)
    out = values.new_empty(n, n_cols)
    height = _TILE // shape["COLS"]
    with launches_on(values):
        _gather[triton.cdiv(n, height), triton.cdiv(n_cols, shape["COLS"])](
            out, values.contiguous(), *index_of(crow, col), ids.contiguous(), n, **shape, ROWS=height
        )
    return out


@triton.jit
def _gather(
    out, values, crow, col, stride, ids, n,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program writes COLS columns of ROWS looked-up rows."""
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    begin = tl.program_id(1) * COLS
    live = entry < n
    row = tl.load(ids + entry, mask=live, other=0).to(tl.int64)
    place, stored = places(crow, col, stride, row, live, begin, N_COLS, COLS, STEPS)
    found = tl.load(values + place, mask=stored, other=0)
    column = begin + tl.arange(0, COLS)
    target = out + entry.to(tl.int64)[:, None] * N_COLS + column[None, :]
    tl.store(target, found, mask=live[:, None] & (column < N_COLS)[None, :])


def bag(
    values: Tensor,
    crow: Tensor,
    col: Tensor | None,
    ids: Tensor,
    offsets: Tensor,
    weights: Tensor,
    n_cols: int,
) -> Tensor:
    """``out[b] = sum of weights[e] * table[ids[e]]`` over the entries e of bag b: dense (bags, cols)."""
    n_bags, shape = offsets.numel() - 1, tile(n_cols)
    out = values.new_empty(n_bags, n_cols)
    with launches_on(values):
        _bag[n_bags, triton.cdiv(n_cols, shape["COLS"])](
            out,
            values.contiguous(),
            *index_of(crow, col),
            ids.contiguous(),
            offsets.contiguous(),
            weights.contiguous(),
            **shape,
            ROWS=_BAG_TILE // shape["COLS"],
        )
    return out


@triton.jit
def _bag(
    out, values, crow, col, stride, ids, offsets, weights,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program adds up COLS columns of one bag, ROWS entries at a time."""
    bag = tl.program_id(0).to(tl.int64)
    begin = tl.program_id(1) * COLS
    at = tl.load(offsets + bag)
    end = tl.load(offsets + bag + 1)
    total = tl.zeros((COLS,), values.dtype.element_ty)
    while at < end:
        entry = at + tl.arange(0, ROWS)
        live = entry < end
        row = tl.load(ids + entry, mask=live, other=0).to(tl.int64)
        place, stored = places(crow, col, stride, row, live, begin, N_COLS, COLS, STEPS)
        found = tl.load(values + place, mask=stored, other=0)
        weight = tl.load(weights + entry, mask=live, other=0)
        # An infinite weight times nothing is nothing.
        total += tl.sum(tl.where(stored, weight[:, None], 0.0) * found, 0)
        at += ROWS
    column = begin + tl.arange(0, COLS)
    tl.store(out + bag * N_COLS + column, total, mask=column < N_COLS)
