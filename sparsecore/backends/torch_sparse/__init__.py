"""Sparse times dense by torch-sparse (PyTorch Geometric's), everything else as in the torch backend; CPU and CUDA.

torch-sparse multiplies from the right only, in 64-bit indices, which are made for each call. It has no product sampled
at a pattern: that one (`sddmm`) stays torch's.
"""

from functools import partial

import torch_sparse
from torch import Tensor

from sparsecore.backends.torch import (
    bag,
    bag_dot,
    bag_grad,
    gather,
    gather_dot,
    id_range,
    scatter_grad,
    score_topk,
    sddmm,
    touched,
)
from sparsecore.backends.torch import graph as _graph
from sparsecore.backends.torch import linear as _linear
from sparsecore.pattern import Pattern

__all__ = [
    "bag",
    "bag_dot",
    "bag_grad",
    "gather",
    "gather_dot",
    "id_range",
    "propagate",
    "propagate_from",
    "propagate_rows",
    "propagate_sample",
    "propagate_table",
    "scatter_grad",
    "score_topk",
    "sddmm",
    "spmm",
    "spmm_t",
    "touched",
]


def _product(
    values: Tensor, crow: Tensor, col: Tensor, n_cols: int, dense: Tensor, *, transposed: bool = False
) -> Tensor:
    matrix = Pattern(crow, col, (crow.numel() - 1, n_cols)).to_torch_sparse(values)
    return torch_sparse.matmul(matrix.t() if transposed else matrix, dense)


spmm = partial(_linear.spmm, product=_product)
spmm_t = partial(_linear.spmm_t, product=_product)
propagate = partial(_graph.propagate, product=_product)
propagate_rows = partial(_graph.propagate_rows, product=_product)
propagate_from = partial(_graph.propagate_from, product=_product)
propagate_table = partial(_graph.propagate_table, product=_product)
propagate_sample = partial(_graph.propagate_sample, product=_product)
