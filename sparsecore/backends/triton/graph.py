"""Propagation by torch's products; sparse tables are added to dense ones, and read out of them, as they are stored."""

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from sparsecore.backends.torch import graph as by_torch
from sparsecore.backends.triton.rows import index_of, launches_on, places, tile

__all__ = ["add_rows_", "propagate", "propagate_sample", "propagate_table", "sample"]

_TILE = 2048  # positions of a tile


def add_rows_(x: Tensor, values: Tensor, crow: Tensor, col: Tensor | None) -> Tensor:
    """``X += E`` in place, for a sparse E of X's shape."""
    target = x if x.is_contiguous() else x.contiguous()
    _launch(_add_rows, target, values.contiguous(), crow, col)
    return x if target is x else x.copy_(target)


def sample(crow: Tensor, col: Tensor | None, dense: Tensor, nnz: int) -> Tensor:
    """Entries of a dense (rows, cols) matrix at the nonzeros of a pattern: (nnz,)."""
    dense = dense.contiguous()
    out = dense.new_empty(nnz)
    _launch(_sample, dense, out, crow, col)
    return out


def _launch(
    kernel: triton.JITFunction, dense: Tensor, values: Tensor, crow: Tensor, col: Tensor | None
) -> None:
    n, shape = dense.shape[0], tile(dense.shape[1])
    height = _TILE // shape["COLS"]
    with launches_on(dense):
        kernel[triton.cdiv(n, height), triton.cdiv(dense.shape[1], shape["COLS"])](
            dense, values, *index_of(crow, col), n, **shape, ROWS=height
        )


@triton.jit
def _add_rows(
    dense, values, crow, col, stride, n,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program adds COLS columns of ROWS rows to where they are stored."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    begin = tl.program_id(1) * COLS
    place, stored = places(crow, col, stride, row, row < n, begin, N_COLS, COLS, STEPS)
    target = dense + row[:, None] * N_COLS + (begin + tl.arange(0, COLS))[None, :]
    added = tl.load(values + place, mask=stored, other=0)
    tl.store(target, tl.load(target, mask=stored, other=0) + added, mask=stored)


@triton.jit
def _sample(
    dense, values, crow, col, stride, n,
    N_COLS: tl.constexpr, COLS: tl.constexpr, STEPS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A program reads COLS columns of ROWS rows where they are stored."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    begin = tl.program_id(1) * COLS
    place, stored = places(crow, col, stride, row, row < n, begin, N_COLS, COLS, STEPS)
    source = dense + row[:, None] * N_COLS + (begin + tl.arange(0, COLS))[None, :]
    tl.store(values + place, tl.load(source, mask=stored, other=0), mask=stored)


propagate = partial(by_torch.propagate, add_rows=add_rows_)
propagate_table = partial(by_torch.propagate_table, add_rows=add_rows_)
propagate_sample = partial(by_torch.propagate_sample, pick=sample)
