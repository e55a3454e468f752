"""CPU kernels, compiled by numba on first use and cached on disk."""

from sparsecore.backends.numba.embedding import bag, bag_dot, bag_grad, gather, scatter_grad
from sparsecore.backends.numba.graph import add_rows_, propagate, propagate_table, sample
from sparsecore.backends.numba.linear import sddmm, spmm, spmm_t

__all__ = [
    "add_rows_",
    "bag",
    "bag_dot",
    "bag_grad",
    "gather",
    "propagate",
    "propagate_table",
    "sample",
    "scatter_grad",
    "sddmm",
    "spmm",
    "spmm_t",
]
