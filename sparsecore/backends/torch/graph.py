"""Propagation of embeddings over a graph, by torch.sparse."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from sparsecore.backends.torch.csr import Product, entries, indices, product
from sparsecore.pattern import Pattern

Add = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # `add_rows_`
Pick = Callable[[Tensor, Tensor | None, Tensor, int], Tensor]  # `sample`

__all__ = [
    "add_rows_",
    "propagate",
    "propagate_from",
    "propagate_rows",
    "propagate_sample",
    "propagate_table",
    "sample",
]


def propagate(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    x: Tensor,
    *,
    base: Tensor | None = None,
    table: tuple[Tensor, Tensor, Tensor | None] | None = None,
    scale: float = 1.0,
    product: Product = product,
    add_rows: Add | None = None,
) -> Tensor:
    """``scale (A X + base + E)`` for a graph A in CSR and a sparse table E (values, crow, col): X (N, d) -> (M, d)."""
    out = product(weight, crow, col, x.shape[0], x)
    if base is not None:
        out.add_(base)
    if table is not None:
        (add_rows or add_rows_)(out, *table)
    return out if scale == 1.0 else out.mul_(scale)


def propagate_rows(
    crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, ids: Tensor, *, product: Product = product
) -> Tensor:
    """``(A X)[ids]``: of a graph on the CPU only these rows are multiplied; elsewhere to know their number of edges
    would be to wait for the device.
    """
    if not ids.is_cpu:
        return product(weight, crow, col, x.shape[0], x).index_select(0, ids)
    place = entries(crow, ids)[1]
    pointers = F.pad((crow[ids + 1] - crow[ids]).cumsum(0), (1, 0)).to(crow.dtype)
    return product(weight[place], pointers, col[place], x.shape[0], x)


def propagate_from(
    crow: Tensor, col: Tensor, weight: Tensor, x: Tensor, ids: Tensor, n: int, *, product: Product = product
) -> Tensor:
    """``A Z`` where Z, of n rows, is 0 but for the sums of rows of X with the same id: X (m, d) -> (M, d)."""
    whole = x.new_zeros((n, x.shape[1]))
    if ids.is_cpu:
        whole.index_add_(0, ids, x)
    else:  # where the order of index_add_'s additions changes from run to run
        whole.index_put_((ids,), x, accumulate=True)
    return product(weight, crow, col, n, whole)


def propagate_table(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    values: Tensor,
    t_crow: Tensor,
    t_col: Tensor | None,
    n_cols: int,
    *,
    add: bool = False,
    scale: float = 1.0,
    product: Product = product,
    add_rows: Add | None = None,
) -> Tensor:
    """``scale (A E)`` for a sparse table E, with ``add`` ``scale (A E + E)``. torch has no such product: hop 0, an
    activation, is expanded.
    """
    hop = (add_rows or add_rows_)(values.new_zeros((t_crow.shape[0] - 1, n_cols)), values, t_crow, t_col)
    return propagate(crow, col, weight, hop, base=hop if add else None, scale=scale, product=product)


def propagate_sample(
    crow: Tensor,
    col: Tensor,
    weight: Tensor,
    x: Tensor,
    base: Tensor | None,
    t_crow: Tensor,
    t_col: Tensor | None,
    nnz: int,
    scale: float = 1.0,
    *,
    product: Product = product,
    pick: Pick | None = None,
) -> Tensor:
    """``scale (A X + base)`` at the nonzeros of a pattern: (nnz,)."""
    out = propagate(crow, col, weight, x, base=base, scale=scale, product=product)
    return (pick or sample)(t_crow, t_col, out, nnz)


def add_rows_(x: Tensor, values: Tensor, crow: Tensor, col: Tensor | None) -> Tensor:
    """``X += E`` in place, for a sparse E of X's shape."""
    positions = Pattern(*indices(crow, col, x.shape[1]), (x.shape[0], x.shape[1])).positions()
    x.view(-1).index_add_(0, positions, values)
    return x


def sample(crow: Tensor, col: Tensor | None, dense: Tensor, nnz: int) -> Tensor:
    """Entries of a dense (rows, cols) matrix at the nonzeros of a pattern: (nnz,)."""
    shape = (dense.shape[0], dense.shape[1])
    return dense.reshape(-1)[Pattern(*indices(crow, col, shape[1]), shape).positions()]
