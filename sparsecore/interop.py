"""Existing sparse matrices, taken apart into a pattern and its values; and the way back.

=====================  ==========================================  ==============================================
library                from it                                     to it
=====================  ==========================================  ==============================================
torch.sparse           `split`: COO, CSR, CSC, BSR, BSC; copies    `Pattern.to_csr`: shares the values, and the
                                                                   indices where their type is int32;
                                                                   `Pattern.to_coo`: shares the values; from there
                                                                   torch's own ``to_sparse_bsr`` and others
scipy.sparse           `split`: any matrix or array; copies        `Pattern.to_scipy`: shares the values on the CPU
torch-sparse (PyG)     `split`: ``SparseTensor``; copies           `Pattern.to_torch_sparse`: shares the values
DLPack, numpy, JAX ..  `Pattern.from_csr`, of their arrays; copies ``torch.to_dlpack`` of the indices and of
                                                                   ``values.detach()``; nothing is copied
=====================  ==========================================  ==============================================

What is read is always copied: an index in another type than the narrowest one must be, and a weight that trains in
place must not write into somebody's matrix.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsecore.errors import PatternError
from sparsecore.foreign import canonical_csr
from sparsecore.pattern import Pattern

__all__ = ["split"]


def split(matrix: Any) -> tuple[Pattern, Tensor]:
    """Pattern and values, in matching order, of a sparse matrix of torch, scipy or torch-sparse.

    Unsorted entries of COO and of scipy are sorted and duplicates added up (torch's CSR may have neither); explicit
    zeros stay stored. Values and indices are copied.

    Raises:
        PatternError: for something that is not a sparse matrix, or whose indices are not valid.
    """
    if isinstance(matrix, Tensor):
        if matrix.layout == torch.strided or matrix.dim() != 2:
            raise PatternError(
                f"expected a sparse 2-D matrix, got {matrix.dim()}-D with layout {matrix.layout}; "
                "Pattern.from_dense takes a dense one"
            )
        matrix = matrix.detach()
        if matrix.layout != torch.sparse_csr:
            matrix = matrix.to_sparse_coo().coalesce()
        return Pattern.from_torch(matrix), matrix.values().clone()
    if type(matrix).__module__.partition(".")[0] == "torch_sparse":
        return _split_torch_sparse(matrix)
    if not hasattr(matrix, "tocsr"):
        raise PatternError(
            f"expected a sparse matrix of torch, scipy or torch-sparse, got {type(matrix).__name__}"
        )
    csr = canonical_csr(matrix)
    try:
        values = torch.from_numpy(np.array(csr.data))
    except TypeError:
        raise PatternError(
            f"torch has no numbers of type {csr.dtype}: convert the matrix with .astype('float32')"
        ) from None
    return Pattern.from_scipy(csr), values


def _split_torch_sparse(matrix: Any) -> tuple[Pattern, Tensor]:
    crow, col, values = matrix.coalesce().csr()
    if values is None:  # a graph without weights
        values = torch.ones(col.numel(), device=col.device)
    if values.dim() != 1:
        raise PatternError(f"expected one number for each nonzero, got values of shape {tuple(values.shape)}")
    return Pattern.from_csr(crow, col, tuple(matrix.sparse_sizes())), values.detach().clone()
