"""Products of a sparse weight W (rows = outputs, cols = inputs) with dense activations: which algorithm runs.

*small*: one number after the other, where a call costs more than that. *one_csr*: the same for one example from CSR, of
larger weights too. *lanes_csr*: vectors along a small batch, from CSR. *few*: vectors along the columns of W, for a
handful of examples. *panels*: vectors along the batch. *turned*: panels too, with W column-major. *blockwise*: dense
products of blocks that are spread out. All but those named after CSR read either encoding of W (sparsecore.encoding),
and all keep nothing between calls but scratch and the memory of large results. Panels and lanes of ``spmm_t`` add the
threads' sums, in their order: its rounding depends on the number of threads.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from sparsecore.backends.numba import (
    blockwise,
    few,
    lanes_csr,
    one_csr,
    panel_sddmm,
    panel_spmm,
    panel_spmm_t,
    small,
    turned_spmm_t,
    turning,
)
from sparsecore.backends.numba.jit import array, threads
from sparsecore.backends.numba.memory import result_of
from sparsecore.backends.numba.processor import ZEN_5
from sparsecore.encoding import has_expand

__all__ = ["sddmm", "spmm", "spmm_t"]

# Largest batch of the few, for a bitmap and for CSR (chosen at 20000 x 600 from batches 1, 2, 4, 8 and 16; at 16 panels
# are already faster for sddmm; `few_spmm` and the vectors of `few_csr` hold no more than 16).
_FEW = {"spmm": (16, 16), "spmm_t": (4, 16), "sddmm": (8, 1)}
# Batch and density from which dense products of blocks are faster than panels, the density of layers with up to WIDE
# inputs and of wider ones (a panel's features then no longer stay in the second-level cache). Measured at 20000 x 600,
# 600 x 20000, 1024 x 1024 and 600 x 200, on Zen 5 (before activations were packed), on Zen 3, and on Zen 4: limits for
# what was not measured, too.
_BLOCKWISE = {
    "Zen 5": {"spmm": (128, 0.9, 0.9), "spmm_t": (32, 0.85, 0.5), "sddmm": (128, 1.1, 0.9)},
    "AVX-512": {"spmm": (17, 0.8, 0.6), "spmm_t": (17, 0.72, 0.4), "sddmm": (96, 0.85, 0.62)},
    "portable": {"spmm": (65, 0.5, 0.35), "spmm_t": (32, 0.55, 0.2), "sddmm": (32, 0.4, 0.25)},
}
_TURN = (33, 128)  # batch from which ``spmm_t`` turns W, in blocks and value by value


def spmm(values: Tensor, crow: Tensor, col: Tensor | None, x: Tensor) -> Tensor:
    """``Y = X W^T``: X (B, cols) -> Y (B, rows)."""
    (batch, cols), rows, nnz = x.shape, crow.shape[0] - 1, values.shape[0]
    if not batch or not nnz:
        return torch.zeros((batch, rows), dtype=x.dtype, device="cpu")
    if col is not None and one_csr.suits(batch, nnz, rows, x.dtype):
        return one_csr.spmm(values, crow, col, x, threads(nnz))
    in_blocks = _in_blocks("spmm", batch, nnz, (rows, cols))
    if col is not None and lanes_csr.suits(batch, nnz, (rows, cols), x.dtype, in_blocks):
        return lanes_csr.spmm(values, crow, col, x, threads(batch * nnz))
    if small.is_small_product(batch, nnz, rows, x.dtype):
        return small.spmm(values, crow, col, x)
    y = result_of(crow, "spmm", (batch, rows), x.dtype)
    module = _algorithm("spmm", panel_spmm, batch, in_blocks, col)
    module.spmm(array(values), array(crow), _columns(col), array(x), y.numpy(), threads(batch * nnz))
    return y


def spmm_t(values: Tensor, crow: Tensor, col: Tensor | None, dy: Tensor, n_cols: int) -> Tensor:
    """``dX = dY W``: dY (B, rows) -> dX (B, cols)."""
    (batch, rows), nnz = dy.shape, values.shape[0]
    if not batch or not nnz:
        return torch.zeros((batch, n_cols), dtype=dy.dtype, device="cpu")
    in_blocks = _in_blocks("spmm_t", batch, nnz, (rows, n_cols))
    if col is not None and lanes_csr.suits_gradient(
        "spmm_t", batch, nnz, (rows, n_cols), dy.dtype, in_blocks
    ):
        return lanes_csr.spmm_t(values, crow, col, dy, n_cols, threads(batch * nnz))
    if small.is_small_product(batch, nnz, rows, dy.dtype):
        return small.spmm_t(values, crow, col, dy, n_cols)
    dx = result_of(crow, "spmm_t", (batch, n_cols), dy.dtype)
    panels = turned_spmm_t if _turns(batch, nnz, (rows, n_cols), col, dy.dtype) else panel_spmm_t
    module = _algorithm("spmm_t", panels, batch, in_blocks, col)
    module.spmm_t(array(values), array(crow), _columns(col), array(dy), dx.numpy(), threads(batch * nnz))
    return dx


def sddmm(crow: Tensor, col: Tensor | None, dy: Tensor, x: Tensor, nnz: int) -> Tensor:
    """``(dY^T X)`` at the nonzeros: dY (B, rows), X (B, cols) -> (nnz,)."""
    (batch, cols), rows = x.shape, dy.shape[1]
    if not batch or not nnz:
        return torch.zeros(nnz, dtype=x.dtype, device="cpu")
    in_blocks = _in_blocks("sddmm", batch, nnz, (rows, cols))
    if col is not None and lanes_csr.suits_gradient("sddmm", batch, nnz, (rows, cols), x.dtype, in_blocks):
        return lanes_csr.sddmm(crow, col, dy, x, nnz, threads(batch * nnz))
    if small.is_small_product(batch, nnz, rows, x.dtype):
        return small.sddmm(crow, col, dy, x, nnz)
    out = result_of(crow, "gradient", (nnz,), x.dtype)
    module = _algorithm("sddmm", panel_sddmm, batch, in_blocks, col)
    module.sddmm(array(crow), _columns(col), array(dy), array(x), out.numpy(), threads(batch * nnz))
    return out


def _algorithm(
    operation: str, panels: ModuleType, batch: int, in_blocks: bool, col: Tensor | None
) -> ModuleType:
    if batch <= _FEW[operation][col is not None]:
        return few
    return blockwise if in_blocks else panels


def _in_blocks(operation: str, batch: int, nnz: int, shape: tuple[int, int]) -> bool:
    """Whether blocks of a weight of this shape are multiplied densely, whatever the number of threads."""
    least, narrow, wide = _BLOCKWISE[_processor()][operation]
    return batch >= least and nnz >= (wide if shape[1] > panel_spmm.WIDE else narrow) * shape[0] * shape[1]


def _turns(batch: int, nnz: int, shape: tuple[int, int], col: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether ``spmm_t`` turns a weight of this shape."""
    crowded = nnz >= turning.CROWDED * shape[0] * shape[1]
    in_blocks = crowded and col is None and dtype is torch.float32 and has_expand()
    return batch >= _TURN[not in_blocks] and shape[1] <= turning.MOST_COLUMNS


def _processor() -> str:
    return "portable" if not has_expand() else "Zen 5" if ZEN_5 else "AVX-512"


def _columns(col: Tensor | None) -> np.ndarray | None:
    return None if col is None else array(col)
