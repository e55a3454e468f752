"""Dot products of looked-up rows: with rows of another table, or with dense rows."""

import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.triton.rows import index_of, launches_on, places, tile

__all__ = ["bag_dot", "gather_dot"]

_TILE = 1024  # positions of a tile; two are held at once


def gather_dot(
    values_a: Tensor,
    crow_a: Tensor,
    col_a: Tensor | None,
    ids_a: Tensor,
    values_b: Tensor,
    crow_b: Tensor,
    col_b: Tensor | None,
    ids_b: Tensor,
    n_cols: int,
) -> Tensor:
    """``a[ids_a[e]] . b[ids_b[e, j]]`` for ids_a (n,) and ids_b (n,) or (n, m): of the shape of ids_b."""
    n, each, shape = ids_b.numel(), ids_b.shape[1] if ids_b.dim() == 2 else 1, tile(n_cols)
    out = values_a.new_empty(ids_b.shape)
    height = _TILE // shape["COLS"]
    with launches_on(values_a):
        _gather_dot[triton.cdiv(n, height),](
            out,
            values_a.contiguous(),
            *index_of(crow_a, col_a),
            ids_a.contiguous(),
            values_b.contiguous(),
            *index_of(crow_b, col_b),
            ids_b.contiguous(),
            n,
            each,
            **shape,
            ROWS=height,
        )
    return out


@triton.jit
def _gather_dot(
    out, values_a, crow_a, col_a, stride_a, ids_a, values_b, crow_b, col_b, stride_b, ids_b, n, each,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS products; ``each`` of them in a row share their row of a."""
    pair = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = pair < n
    row_a = tl.load(ids_a + pair // each, mask=live, other=0).to(tl.int64)
    row_b = tl.load(ids_b + pair, mask=live, other=0).to(tl.int64)
    total = tl.zeros((ROWS,), values_a.dtype.element_ty)
    for begin in range(0, N_COLS, COLS):
        place, stored = places(crow_a, col_a, stride_a, row_a, live, begin, N_COLS, COLS, STEPS)
        left = tl.load(values_a + place, mask=stored, other=0)
        place, stored = places(crow_b, col_b, stride_b, row_b, live, begin, N_COLS, COLS, STEPS)
        right = tl.load(values_b + place, mask=stored, other=0)
        total += tl.sum(left * right, 1)
    tl.store(out + pair, total, mask=live)


def bag_dot(
    values: Tensor, crow: Tensor, col: Tensor | None, ids: Tensor, bags: Tensor, grad: Tensor
) -> Tensor:
    """``out[e] = table[ids[e]] . grad[bags[e]]``: gradient of the entries' weights."""
    n, shape = ids.numel(), tile(grad.shape[1])
    out = values.new_empty(n)
    height = _TILE // shape["COLS"]
    with launches_on(values):
        _bag_dot[triton.cdiv(n, height),](
            out,
            values.contiguous(),
            *index_of(crow, col),
            ids.contiguous(),
            bags.contiguous(),
            grad.contiguous(),
            n,
            **shape,
            ROWS=height,
        )
    return out


@triton.jit
def _bag_dot(
    out, values, crow, col, stride, ids, bags, grad, n,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program computes ROWS products; of the dense rows it reads what the sparse ones store."""
    entry = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = entry < n
    row = tl.load(ids + entry, mask=live, other=0).to(tl.int64)
    dense = grad + tl.load(bags + entry, mask=live, other=0).to(tl.int64) * N_COLS
    total = tl.zeros((ROWS,), values.dtype.element_ty)
    for begin in range(0, N_COLS, COLS):
        place, stored = places(crow, col, stride, row, live, begin, N_COLS, COLS, STEPS)
        column = begin + tl.arange(0, COLS)
        left = tl.load(values + place, mask=stored, other=0)
        right = tl.load(dense[:, None] + column[None, :], mask=stored, other=0)
        total += tl.sum(left * right, 1)
    tl.store(out + entry, total, mask=live)
