"""What others hand over, as torch and scipy: matrices in canonical CSR, arrays as tensors."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecore.errors import PatternError

__all__ = ["canonical_csr", "tensor_of"]


def canonical_csr(matrix: Any, what: str = "a scipy.sparse matrix") -> Any:
    """A copy in CSR, sorted, duplicates added up.

    Raises:
        PatternError: if it is not a 2-D sparse matrix of scipy.
    """
    if not hasattr(matrix, "tocsr"):
        raise PatternError(
            f"expected {what}, got {type(matrix).__name__}; scipy.sparse.csr_array(...) makes one of an array"
        )
    if len(matrix.shape) != 2:
        raise PatternError(f"expected {what} of two dimensions, got {len(matrix.shape)}")
    csr = matrix.tocsr(copy=True)
    csr.sum_duplicates()  # sorts as well
    return csr


def tensor_of(array: Any) -> Tensor:
    """A tensor, or an array of numpy or of a library that speaks DLPack, as a tensor; perhaps the same memory.

    Raises:
        PatternError: for anything else.
    """
    if isinstance(array, Tensor):
        return array
    try:
        if hasattr(array, "__dlpack__") and not isinstance(array, np.ndarray):
            return torch.from_dlpack(array)
        return torch.from_numpy(np.array(array))
    except (TypeError, ValueError, BufferError) as error:
        raise PatternError(
            f"expected a tensor, an array of numpy or one that speaks DLPack, got {type(array).__name__}: {error}"
        ) from None
