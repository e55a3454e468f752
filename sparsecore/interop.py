"""Existing sparse matrices, taken apart into a pattern and its values."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecore.errors import PatternError
from sparsecore.pattern import Pattern

__all__ = ["split"]


def split(matrix: Any) -> tuple[Pattern, Tensor]:
    """Pattern and values of a ``torch.sparse`` COO or CSR matrix or of any scipy.sparse matrix, in matching order.

    Unsorted entries are sorted and duplicates added up, as torch and scipy define it; explicit zeros stay stored. The
    values are copied.

    Raises:
        PatternError: for something that is not a sparse matrix, or whose indices are not valid.
    """
    if isinstance(matrix, Tensor):
        if matrix.layout == torch.sparse_csr and matrix.dim() == 2:
            return Pattern.from_torch(matrix), matrix.values().detach().clone()
        if matrix.layout == torch.sparse_coo and matrix.dim() == 2:
            coalesced = matrix.detach().coalesce()
            return Pattern.from_torch(coalesced), coalesced.values().clone()
        raise PatternError(
            f"expected a 2-D torch COO or CSR matrix, got {matrix.dim()}-D with layout {matrix.layout}"
        )
    if not hasattr(matrix, "tocsr"):
        raise PatternError(f"expected a torch or scipy sparse matrix, got {type(matrix).__name__}")
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # sorts as well
    return Pattern.from_scipy(csr), torch.from_numpy(np.array(csr.data))
